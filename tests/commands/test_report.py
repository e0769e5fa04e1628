"""`metarun report`: one file with the figures of the runs, escaped, without a network."""

from __future__ import annotations

import csv
import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from helpers.run_folders import make
from helpers.runs import TINY

VOID = {"meta", "link", "br", "hr", "img", "input", "path", "use"}


class Checked(HTMLParser):
    """Collects the cells of tables, and checks that elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.rows and {"td", "th"} & {*self.open}:
            self.rows[-1][-1] += data


def test_a_report_has_the_figures_of_runs_and_evaluations(metarun):
    make(Path("outputs/a"), "maml", 0.9, scores=(0.2, 0.9))
    make(Path("outputs/b"), "<script>alert(1)</script>", scores=(0.3,))
    Path("outputs/a/.hydra/config.yaml").write_text("ways: 5\nseed: 1\n")
    Path("outputs/b/.hydra/config.yaml").write_text("ways: 5\nseed: 2\n")
    Path("outputs/eval").mkdir()
    row = {"model": "maml", "dataset": "glyphs", "cell": "5-way 1-shot", "metric": "accuracy", "mean": 0.5}
    row |= {"interval": 0.1, "episodes": 60, "uses_query_statistics": True}
    pair = {
        "task": "5-way 1-shot",
        "metric": "accuracy",
        "a": "x",
        "b": "y",
        "difference": 0.2,
        "interval": 0.1,
    }
    content = {"results": [row, {"model": "maml", "reason": "its head has 5 ways"}, 7], "comparisons": [pair]}
    Path("outputs/eval/results.json").write_text(json.dumps(content))
    Path("outputs/eval/confusion_maml.csv").write_text("number,class,as x,as <y>\n1,x,3,1\n2,<y>,0,4\n")
    Path("outputs/eval/confusion_cut.csv").write_text("number,class,as x\n1,x")
    done = metarun("report", "hydra.run.dir=out")
    assert "saved report.html" in done.stderr
    text = Path("out/report.html").read_text("utf-8")
    rows = [[cell.strip() for cell in row] for row in Checked(text).rows]
    assert rows[0][:3] == ["run", "started", "method"]
    first = next(row for row in rows if row[0] == "outputs/a")
    assert first[2:7] == ["maml", "glyphs", "ended", "90.00 ± 1.00 %", "90.00 ± 1.00 %"]
    assert ["seed", "1", "2"] in rows and not any(row[0] == "ways" for row in rows)
    grid = ["maml", "glyphs", "5-way 1-shot", "accuracy", "50.00 ± 10.00 %", "60", "yes"]
    assert grid in rows and ["5-way 1-shot", "accuracy", "x - y", "20.00 ± 10.00 %", "yes"] in rows
    assert any("its head has 5 ways" in row for row in rows)
    assert ["x", "4", "100.0 %", "75.0 %", "85.7 %", "<y>"] in rows and text.count("Confusions in") == 2
    assert "<script>alert" not in text and html.escape("<script>alert(1)</script>") in text
    assert text.count("<svg") == 1 and not re.search(r"(src|href)=[\"']?https?:", text)
    assert "metarun train" in text


def test_the_test_task_of_a_run_and_its_confusions(metarun, trained):
    """They agree with the score of the test, and with `adapt` on the same task."""
    run = trained(*TINY, "iterations=1", "validation.episodes=2")
    task, result = (json.loads((run / name).read_text()) for name in ("test_task.json", "result.json"))
    (confusion,) = task["confusions"].values()
    right = sum(count for true, predicted, count in confusion["counts"] if true == predicted)
    assert right / sum(count for *_, count in confusion["counts"]) == pytest.approx(result["test"]["mean"])
    assert len(confusion["classes"]) == 20
    words = [
        f"checkpoint={run}",
        "seed=0",
        f"queries={len(task['queries']) // 5}",
        "hardware=cpu",
        "hydra.run.dir=out",
    ]
    metarun("adapt", *words)
    with open("out/predictions.csv", newline="") as file:
        rows = [(row["class"], row["prediction"], float(row["probability"])) for row in csv.DictReader(file)]
    assert [
        (row["class"], row["prediction"], pytest.approx(row["probability"], abs=1e-5))
        for row in task["queries"]
    ] == rows
    machine = json.loads((run / "machine.json").read_text())
    assert machine["torch"] == torch.__version__ and machine["device"].startswith("CPU (1 thread)")
    metarun("report", str(run), "hydra.run.dir=report")
    text = Path("report/report.html").read_text("utf-8")
    assert text.count('<figure class="right"') == sum(true == predicted for true, predicted, _ in rows)
    cells = [row[0] for row in Checked(text).rows]
    assert text.count("data:image/png;base64,") == 5 + len(task["queries"]) + 1
    assert f"<dd>{torch.__version__}</dd>" in text and "Confusion matrix" in text
    assert sum(cell in confusion["classes"] for cell in cells) == 15


SHORT = ["hardware=cpu", "log.tensorboard=false", "iterations=1", "validation.episodes=2", "test.episodes=2"]
FEW = [f"dataset.{split}_classes=5" for split in ("train", "validation", "test")]


@pytest.mark.parametrize(
    ("words", "columns"),
    [
        (["dataset=sinusoid", "algorithm=maml"], []),
        (["dataset=bandit", "algorithm=rl2"], ["episodes seen", "return", "return_before", "interval"]),
        (["dataset=phrases", *FEW], ["class", "text", "prediction", "probability"]),
    ],
    ids=["regression", "environment", "texts"],
)
def test_tasks_of_other_kinds(metarun, words: list[str], columns: list[str]):
    metarun("train", *words, *SHORT, "meta_batch=2", "hydra.run.dir=run")
    metarun("report", "run", "hydra.run.dir=out")
    text = Path("out/report.html").read_text("utf-8")
    assert "A test task: " in text and text.count("<svg") == (1 if columns else 2)
    assert not columns or columns in Checked(text).rows


def test_a_run_of_somebody_else_is_text(metarun):
    """What a folder contains is shown as text, and only pictures in it are pictures."""
    run = make(Path("runs/a"), test=0.5, scores=(0.2,))
    bad = [
        {"class": "<b>", "picture": "https://x.y/z.png"},
        {"class": "c", "picture": "data:image/png;base64,AA=="},
    ]
    content = {"shape": "<i>", "support": bad, "queries": [{**row, "prediction": "q"} for row in bad]}
    content["confusions"] = {"a": 3, "b": {"classes": ["x"], "counts": [[5, 5, 1]]}}
    content["confusions"]["c"] = {"classes": list(range(9000)), "counts": []}
    (run / "test_task.json").write_text(json.dumps(content))
    (run / "machine.json").write_text(json.dumps({"torch": "<u>1"}))
    metarun("report", "runs", "hydra.run.dir=out")
    text = Path("out/report.html").read_text("utf-8")
    assert "x.y" not in text and text.count("base64,AA==") == 2
    assert not any(tag in text for tag in ("<b>", "<i>", "<u>1"))


def test_only_runs_on_one_dataset_are_compared(metarun):
    """Each dataset has its own curves and its own table; another option of a group is one line."""
    for name, method, dataset, seed in (
        ("a", "maml", "glyphs", 1),
        ("b", "maml", "omniglot", 2),
        ("c", "protonet", "glyphs", 3),
    ):
        run = make(Path("runs", name), method, scores=(0.2, 0.5))
        config = run / ".hydra/hydra.yaml"
        config.write_text(config.read_text().replace("glyphs", dataset))
        (run / ".hydra/config.yaml").write_text(f"seed: {seed}\nalgorithm:\n  only_{method}: 1\n")
    metarun("report", "runs", "hydra.run.dir=out")
    text = Path("out/report.html").read_text("utf-8")
    rows = Checked(text).rows
    start = rows.index(["setting", "runs/a", "runs/c"])
    assert rows[start + 1 : start + 3] == [["algorithm", "maml", "protonet"], ["seed", "1", "3"]]
    assert len(rows) == start + 3 and text.count("<svg") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lost"], "runs=lost: no such folder; name a run or a folder of runs"),
        (["outputs/a/metrics.jsonl"], "is a file, not a folder"),
        (["outputs/empty"], "outputs/empty: has neither runs nor evaluations"),
    ],
)
def test_mistakes(metarun, words: list[str], message: str):
    make(Path("outputs/a"), scores=(0.2,))
    Path("outputs/empty").mkdir()
    assert message in metarun("report", *words, status=1).stderr.splitlines()[-1]


def test_damaged_runs_are_no_error(metarun):
    make(Path("runs/a"), scores=(0.2,))
    make(Path("runs/b"))
    Path("runs/a/.hydra/config.yaml").write_text("a: [")
    Path("runs/b/result.json").write_text("[1")
    os.mkfifo("runs/b/pipe")
    Path("runs/results.json").write_text('{"results": 3, "comparisons": null}')
    metarun("report", "runs/a", "runs", "hydra.run.dir=out")
    assert Path("out/report.html").stat().st_size < 1e6


@pytest.mark.long
def test_a_click_sorts_in_a_browser_without_errors(metarun):
    browser = shutil.which("chromium") or pytest.skip("chromium is not installed")
    for name, test in (("a", 0.5), ("b", 0.9), ("c", None), ("d", 0.7)):
        make(Path("outputs", name), test=test, scores=(0.2,))
    metarun("report", "hydra.run.dir=out")
    text = Path("out/report.html").read_text("utf-8")
    code = "const heads = document.querySelectorAll('th button');"
    code += (
        "const names = () => [...document.querySelector('tbody').rows].map(row => row.cells[0].innerText);"
    )
    code += "const found = [1, 2].map(() => { heads[6].click(); return names().join(' ') });"
    code += "document.title = found.join(' | ');"
    Path("clicked.html").write_text(text.replace("</body>", f"<script>{code}</script></body>"), "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run(
        [browser, *flags, Path("clicked.html").resolve().as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    up, down = ("outputs/a outputs/d outputs/b outputs/c", "outputs/b outputs/d outputs/a outputs/c")
    assert f"<title>{up} | {down}</title>" in done.stdout
    assert "CONSOLE" not in done.stderr
