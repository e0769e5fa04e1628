"""Imports run downwards only, and the documents name what exists."""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

import metarun

pytestmark = pytest.mark.quick

PACKAGE = Path(metarun.__file__).parent
#: The floors of the house: a package may import from floors below its own, and from itself.
FLOORS = [
    {"errors"},
    {"storage", "nn", "tasks"},
    {"reporting", "backbones", "inner_loops"},
    {"algorithms", "datasets"},
    {"training"},
    {"config"},
    {"inference"},
    {"commands", "cli"},
    {"__main__"},
]
#: Imports within a floor that are wanted.
WITHIN = {("cli", "commands")}
#: Only these know Hydra and OmegaConf.
HYDRA = {"config", "commands", "cli"}
#: Algorithms that are a variant of another one, and what several share.
VARIANTS = {
    ("pmf", "protonet"),
    ("maml_plus_plus", "maml"),
    ("cavia", "maml"),
    ("imaml", "maml"),
    ("hsml", "maml"),
    ("mmaml", "maml"),
    ("mr_maml", "maml"),
    ("platipus", "maml"),
    ("taml", "maml"),
    ("pretrain", "maml"),
    ("distribution_calibration", "baseline"),
    ("hallucination", "protonet"),
    ("metagan", "maml"),
    ("metagan", "relation"),
}
VARIANTS |= {("reptile", "maml"), ("meta_nas", "reptile"), ("metaoptnet", "r2d2"), ("memories", "snail")}
VARIANTS |= {("lgm_net", "matching")}
SHARED = {"base", "feature_method", "memories", "modulation", "multinomial", "sequences", "svm"}


def names_in(nodes: Iterable[ast.AST]) -> set[str]:
    """Every module that is imported, and every name that may be one."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports(path: Path) -> set[str]:
    """Of a whole file, also within functions."""
    return names_in(ast.walk(ast.parse(path.read_text("utf-8"))))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor(name: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if name in rooms)


def modules() -> dict[str, Path]:
    paths = (path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
    return {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in paths}


def test_imports_run_downwards_only():
    wrong = []
    for path in modules().values():
        own = room(path)
        for name in imports(path):
            parts = name.split(".")
            if parts[0] != "metarun" or len(parts) < 2 or parts[1] in (own, "__version__"):
                continue
            if floor(parts[1]) >= floor(own) and (own, parts[1]) not in WITHIN:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {name}")
    assert not wrong


def test_only_the_outermost_layers_know_hydra():
    wrong = [
        f"{path.relative_to(PACKAGE)} imports {name}"
        for path in modules().values()
        for name in imports(path)
        if name.split(".")[0] in ("hydra", "omegaconf") and room(path) not in HYDRA
    ]
    assert not wrong


def test_no_module_imports_itself_by_way_of_others():
    """But for imports within functions, which are made late."""
    paths = modules()
    within = {
        name: names_in(ast.parse(path.read_text("utf-8")).body) & paths.keys() for name, path in paths.items()
    }
    graphlib.TopologicalSorter(within).prepare()


def test_only_errors_stands_beside_the_packages():
    loose = {path.name for path in PACKAGE.glob("*.py")}
    assert loose == {"__init__.py", "__main__.py", "errors.py"}


def test_no_algorithm_imports_a_sibling_but_a_variant_its_original():
    for path in (PACKAGE / "algorithms").glob("*.py"):
        for name in imports(path):
            if name.startswith("metarun.algorithms."):
                other = name.split(".")[2]
                assert other in {*SHARED, path.stem} or (path.stem, other) in VARIANTS, (path.name, name)


ROOT = Path(__file__).resolve().parents[2]
PAGES = ["docs/architecture.md", "CONTRIBUTING.md"]


def rows(page: str) -> list[tuple[int, set[str], str]]:
    """The rows of a page's table of layers: layer, packages, text."""
    found = re.findall(r"^\| (\d) \| (.*?) \| (.*) \|$", (ROOT / page).read_text("utf-8"), re.MULTILINE)
    return [(int(layer), set(re.findall(r"`(\w+)`", packages)), text) for layer, packages, text in found]


@pytest.mark.parametrize("page", PAGES)
def test_the_documents_have_the_same_layers(page: str):
    layers = {number: set() for number in range(1, len(FLOORS))}
    for number, packages, _ in rows(page):
        layers[number] |= packages
    assert list(layers.values()) == FLOORS[:-1]  # without `__main__`, which only starts `cli`


def test_the_table_of_packages_names_modules_that_exist_and_every_one_of_most_packages():
    for _, packages, text in rows("docs/architecture.md"):
        there = {path.stem for name in packages for path in (PACKAGE / name).glob("[a-z]*.py")}
        named = set(re.findall(r"`([a-z]\w*)`", text))
        assert named <= there, named - there
        if not packages & {"algorithms", "datasets", "backbones", "inner_loops", "errors"}:
            assert named == there, there - named
