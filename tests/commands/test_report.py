"""`metarun report`: one file with the figures of the runs, escaped, without a network."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from helpers.run_folders import make

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
    assert "<script>alert" not in text and html.escape("<script>alert(1)</script>") in text
    assert text.count("<svg") == 1 and not re.search(r"(src|href)=[\"']?https?:", text)
    assert "metarun train" in text


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
