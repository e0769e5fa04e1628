"""The generated tables of the README and of the documents are up to date, and say what is true."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
from helpers.methods import METHODS
from helpers.neural_processes import PROCESSES

from metarun.config.paths import CONF
from metarun.tasks.episodes import Episodes
from metarun.training.memory import peak_bytes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_row_of_a_run_names_what_its_recipe_has_now(tables):
    """The recipe was without `trainval=true` when this run was made."""
    path = ROOT / "benchmarks" / "results" / "reproduced" / "matching_omniglot.json"
    run = json.loads(path.read_text("utf-8"))
    assert tables.changed_since(run) == "before the recipe had `trainval=true`"
    assert tables.changed_since({**run, "config": {**run["config"], "trainval": True}}) == ""
    assert tables.changed_since({**run, "overrides": ["trainval=false"]}) == ""  # which the run was made with


def test_the_tables_are_up_to_date(tables, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """If this fails, run `python docs/tables.py`."""
    assert tables.main(["--check"]) == 0, capsys.readouterr().err
    # A wrong cell is found, named and put right.
    for file in {file for file, _ in tables.TABLES.values()}:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    page = tmp_path / "docs" / "gradient_based.md"
    right = page.read_text("utf-8")
    page.write_text(right.replace("Nichol et al. 2018", "Nichol et al. 2017"), "utf-8")
    assert tables.main(["--check"], tmp_path) == 1
    assert capsys.readouterr().err.startswith("docs/gradient_based.md: ")
    assert tables.main([], tmp_path) == 0
    assert page.read_text("utf-8") == right
    assert tables.main(["--check"], tmp_path) == 0
    # Every algorithm is in one of the tables of families.
    names = ("gradient_based", "feature_based", "reinforcement", "regression")
    pages = [(ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in names]
    rows = re.findall(r"^\| `(\w+)` \|(?:[^|\n]*\|){6}$", "\n".join(pages), re.MULTILINE)
    assert sorted(rows) == sorted(path.stem for path in (CONF / "algorithm").glob("*.yaml"))


def test_what_the_documents_say_of_all_methods(tables):
    own = [
        (name, tables.settings_of(f"algorithm={name}", *tables.SMALL)) for name in tables.methods("features")
    ]
    norms = {name: settings.norm for name, settings in own}
    assert norms == {name: "none" if name == "meta_networks" else "running" for name in norms}
    page = (ROOT / "docs" / "feature_based.md").read_text("utf-8")
    assert "the default for all methods\nexcept Meta Networks (`none`)" in page
    row = next(row for row in tables.table("kinds of tasks").splitlines() if "`maml`" in row)
    assert "`fomaml`" in row and "`taml`" not in row and "`metagan_maml`" not in row
    row = next(row for row in tables.table("update rules").splitlines() if "`reptile`" in row)
    assert "`imaml`" in row and row.endswith("| `adam`, `adam_carried`, `sgd` |")


def test_every_algorithm_has_a_row_with_an_independent_reference():
    # `reptile-sgd` and `reptile-adam` are both Reptile. Neural processes are in test_neural_processes.py.
    tested = {name.split("-")[0] for name in METHODS} | PROCESSES.keys()
    tested |= {"simclr"}  # `supcon` on other tasks
    files = [
        path for path in (CONF / "algorithm").glob("*.yaml") if "# family: memory\n" not in path.read_text()
    ]
    assert {path.stem for path in files} <= tested  # those with a memory are in test_rl2.py


GRADIENT_METHODS = [
    path.stem
    for path in (CONF / "algorithm").glob("*.yaml")
    if "# family: gradient\n" in path.read_text("utf-8")
]


@pytest.mark.long
@pytest.mark.parametrize("name", GRADIENT_METHODS)
def test_memory_grows_with_the_inner_steps_where_the_table_says_so(tables, name: str):
    few, many = memory(tables, name, 2), memory(tables, name, 8)
    assert tables.methods("gradient")[name]["memory in steps"] == ("grows" if many > 1.5 * few else "flat")


def memory(tables: ModuleType, name: str, steps: int) -> int:
    """Peak bytes of the meta-gradient of one task with so many inner steps in training."""
    algorithm = tables.built(name, *([] if name == "pretrain" else [f"inner_loop.steps={steps}"]))
    y = torch.arange(5).unsqueeze(0)
    x = torch.rand(2, 1, 5, 1, 16, 16)
    episodes = Episodes(x[0], y, x[1], y, y)
    params = [p for p in algorithm.parameters() if p.requires_grad]
    return peak_bytes(
        lambda: torch.autograd.grad(algorithm.meta_loss(episodes).loss.mean(), params, allow_unused=True),
        torch.device("cpu"),
    )
