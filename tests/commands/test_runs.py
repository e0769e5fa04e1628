"""`metarun runs`: any folder of runs, whole, half-written or damaged, is listed without a traceback."""

from __future__ import annotations

import json
import os
import shutil
import time
from datetime import datetime
from pathlib import Path

import pytest
from helpers.run_folders import make
from helpers.runs import TINY, UNTESTED

from metarun.storage.locks import locked
from metarun.training.records import record_of, runs_in


def listed(text: str) -> dict[str, list[str]]:
    """The words of the first line of each run, and what its second line says, by its folder."""
    lines = text.splitlines()[2:]
    pairs = [(a, b) for a, b in zip(lines[::2], lines[1::2], strict=False) if b.startswith("    ")]
    return {b.strip().partition(":")[0]: [*a.split()[2:], b.partition(": ")[2]] for a, b in pairs}


@pytest.fixture
def outputs(metarun) -> Path:
    make(Path("outputs/a/1"), "maml", 0.9)
    make(Path("outputs/a/2"), "protonet", 0.95)
    make(Path("outputs/b"), "anil", scores=(0.2, 0.5, 0.4))
    make(Path("outputs/c"), "maml_plus_plus", scores=(0.3,))
    error = {"overrides": ["seed=1"], "error": "iteration 40: the loss is not finite"}
    Path("outputs/c/failure.json").write_text(json.dumps(error))
    for age, name in enumerate(("c", "b", "a/2", "a/1")):
        os.utime(Path("outputs", name, ".hydra/config.yaml"), (1.7e9 - 1000 * age,) * 2)
    return Path("outputs")


def test_runs_are_listed_filtered_and_sorted(metarun, outputs: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = metarun("runs")
    assert done.stdout.splitlines()[0] == "4 runs in outputs: 2 ended, 1 stopped, 1 failed"
    assert listed(done.stdout) == {
        "outputs/c": [
            "maml_plus_plus",
            "glyphs",
            "failed",
            "30.00",
            "%",
            "iteration 40: the loss is not finite",
        ],
        "outputs/b": ["anil", "glyphs", "stopped", "50.00", "%", "iteration 200"],
        "outputs/a/2": ["protonet", "glyphs", "ended", "95.00", "%", "95.00", "%", ""],
        "outputs/a/1": ["maml", "glyphs", "ended", "90.00", "%", "90.00", "%", ""],
    }
    assert list(listed(done.stdout)) == ["outputs/c", "outputs/b", "outputs/a/2", "outputs/a/1"]
    assert max(map(len, done.stdout.splitlines())) <= 80
    for words, names in {
        "sort=test": ["a/2", "a/1", "b", "c"],
        "sort=validation": ["a/2", "a/1", "b", "c"],
        "sort=name": ["a/1", "a/2", "b", "c"],
        "method=maml* sort=name": ["a/1", "c"],
        "status=failed": ["c"],
        "data=omni*": [],
        "show=1": ["c"],
    }.items():
        found = listed(metarun("runs", "outputs", *words.split()).stdout)
        assert [*found][: len(names)] == [f"outputs/{name}" for name in names], words
        assert words.startswith("sort=test") or len(found) <= max(len(names), 4)
    assert "3 more; show=null lists all" in metarun("runs", "show=1").stdout
    assert sorted(path.name for path in Path("outputs").iterdir()) == ["a", "b", "c"]  # it leaves nothing


def test_a_run_is_named_by_what_is_not_default(metarun, outputs: Path):
    with Path("outputs/a/1/.hydra/config.yaml").open("a") as file:
        file.write("norm: task\nfixed_labels: false\n")
    with Path("outputs/a/1/.hydra/hydra.yaml").open("a") as file:
        file.write("      augment: standard\n      train_tasks: labels\n")
    for pattern in ("maml", "*task*", "maml augment=standard norm=task"):
        done = metarun("runs", f"method='{pattern}'")
        assert "1 run of 4" in done.stdout and "maml augment=standard norm=task  glyphs" in done.stdout
    metarun("report", "outputs", "hydra.run.dir=page")
    assert "maml augment=standard norm=task" in Path("page/report.html").read_text()


BROKEN = {
    "no json": b"{",
    "a list": b"[1, 2]",
    "bytes": b"\xff\xfe\x00",
    "empty": b"",
    "deep": b"[" * 100_000,
    "other types": b'{"metric": 3, "validation": "high", "test": [], "name": 5, "error": [1]}',
    "codes of a terminal": b'{"error": "\\u001b[31mred\\nline", "name": "\\u001b[2J on \\u001b[2J, x"}',
}


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("file", ["result.json", "failure.json", "metrics.jsonl", ".hydra/hydra.yaml"])
def test_a_half_written_run_is_no_error(outputs: Path, name: str, file: str, capsys):
    (outputs / "b" / file).write_bytes(BROKEN[name])
    records = {str(record.folder): record for record in runs_in(outputs)}
    assert len(records) == 4 and records["outputs/b"].status in ("stopped", "ended", "failed")
    assert not any(
        "\x1b" in text for text in (records["outputs/b"].why, *records["outputs/b"].choices.values())
    )


def test_odd_folders_are_no_error(metarun, outputs: Path):
    (outputs / "pipe").mkdir()
    os.mkfifo(outputs / "pipe/metrics.jsonl")
    (outputs / "loop").symlink_to(outputs.resolve())
    (outputs / "lost").symlink_to("nowhere")
    (outputs / "best").mkdir()
    (outputs / "best/best.pt").write_bytes(b"")
    make(outputs / "eval" / "results", "x")
    shutil.rmtree(outputs / "eval/results/.hydra")
    done = metarun("runs", "sort=name")
    assert "7 runs in outputs" in done.stdout
    assert listed(done.stdout)["outputs/best"] == ["?", "?", "stopped", "iteration 0"]


def test_runs_on_one_dataset_are_ranked_together(metarun, outputs: Path):
    config = outputs / "a/1/.hydra/hydra.yaml"  # 0.9, between 0.95 and 0.5 on glyphs
    config.write_text(config.read_text().replace("glyphs", "omniglot"))
    for order in ("test", "validation"):
        found = [*listed(metarun("runs", f"sort={order}").stdout)]
        assert found[0] == "outputs/a/2" and found.index("outputs/a/1") > (0 if order == "test" else 2)


def test_a_run_started_when_the_name_of_its_folder_says(tmp_path: Path):
    written = datetime.fromtimestamp(1.7e9)
    for name, started in {
        "2026-11-26_06-29-59.123456": datetime(2026, 11, 26, 6, 29, 59),
        "2026-13-40_99-99-99": written,
        "mine": written,
    }.items():
        os.utime(make(tmp_path / name) / ".hydra/config.yaml", (1.7e9, 1.7e9))
        assert record_of(tmp_path / name).started == started
    (tmp_path / "mine/machine.json").write_text('{"started": "2026-11-26 06:29:59"}')  # kept by a copy
    assert record_of(tmp_path / "mine").started == datetime(2026, 11, 26, 6, 29, 59)
    (tmp_path / "mine/machine.json").write_text('{"started": 7}')
    assert record_of(tmp_path / "mine").started == written


def test_a_run_is_running_while_its_folder_is_locked(outputs: Path):
    with locked(outputs / "b" / "run"):
        assert record_of(outputs / "b").status == "running"
    assert record_of(outputs / "b").status == "stopped"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lost"], "folder=lost: no such folder"),
        (["outputs/b/metrics.jsonl"], "is a file, not a folder"),
        (["outputs/a/1/.hydra"], "has no training runs"),
        (["sort=x"], "sort=x: must be one of date, name, validation, test"),
        (["status=done"], "status=done: must be one of running, ended, stopped, failed"),
        (["dataset=x"], "dataset: is called data in metarun runs; type data=x"),
        (["show=0"], "show=0: must be a whole number of at least 1"),
    ],
)
def test_mistakes(metarun, outputs: Path, words: list[str], message: str):
    assert message in metarun("runs", *words, status=1).stderr.splitlines()[-1]


def test_hundreds_of_runs_take_a_second(tmp_path: Path):
    for i in range(300):
        make(tmp_path / str(i), scores=(0.5,) * 100)
    start = time.perf_counter()
    assert len(runs_in(tmp_path)) == 300
    assert time.perf_counter() - start < 3


def test_a_run_that_fails_says_why_until_it_is_resumed(metarun, trained, tmp_path: Path):
    words = [*TINY, "algorithm=maml", "inner_rate=1e30", "hydra.run.dir=outputs/x"]
    error = metarun("train", *words, status=1).stderr.splitlines()[-1]
    record = record_of(Path("outputs/x"))
    assert record.status == "failed" and error == f"metarun: error: {record.why}"
    shutil.copytree(trained(*UNTESTED), "outputs/y")
    (Path("outputs/y") / "result.json").unlink()
    Path("outputs/y/failure.json").write_text('{"overrides": [], "error": "earlier"}')
    assert record_of(Path("outputs/y")).why == "earlier"
    metarun("train", "resume=outputs/y")
    assert record_of(Path("outputs/y")).status == "ended" and not Path("outputs/y/failure.json").exists()
