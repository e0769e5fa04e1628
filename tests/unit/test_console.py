"""Progress as people see it: within 80 columns, with the right values, and shown before long work is done."""

from __future__ import annotations

import io
import time

import pytest
import torch
from rich.console import Console

from metarun.datasets.glyphs import Glyphs
from metarun.errors import counted
from metarun.reporting import classes, console
from metarun.reporting.progress import live_line, validation_line
from metarun.tasks.objectives import CLASSIFICATION, REGRESSION, Metric

pytestmark = pytest.mark.quick

METRICS = [*CLASSIFICATION.available, *REGRESSION.available]


def rows_of(metric: Metric, score: float, train: bool = True) -> list[dict]:
    rows = [{"iteration": 99_999, "split": "train", "loss": 1.23456, metric.name: score}] if train else []
    return [*rows, {"iteration": 100_000, "split": "validation", "loss": 2.34567, metric.name: 0.9 * score}]


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_lines_of_training_fit_eighty_columns(monkeypatch, metric: Metric):
    score = 1.0 if metric.percent else 98.7654
    rows = rows_of(metric, score)
    line = validation_line(rows, metric)
    assert len(line) <= 80
    assert line.endswith(f"{metric.name} {metric.show(score)} val {metric.show(0.9 * score)}")
    assert "loss 1.2346 val 2.3457" in line
    out = io.StringIO()
    monkeypatch.setattr(console, "messages", Console(file=out, width=80))
    with console.Bar("train", 100_000, start=90_000) as bar:
        time.sleep(0.01)
        bar.advance(10_000, live_line(rows, metric))
    (shown,) = out.getvalue().splitlines()
    assert shown.rstrip().endswith(live_line(rows, metric).split()[-1])


def test_a_validation_line_names_what_there_is():
    accuracy, mse = METRICS[0], REGRESSION.available[0]
    assert validation_line(rows_of(accuracy, 0.5, train=False), accuracy).endswith(
        "iteration 100000   loss val 2.3457   accuracy val 45.0 %"
    )
    rows = [
        row | {"loss": row["mse"]} for row in rows_of(mse, 2.0)
    ]  # a loss that is the metric is not repeated
    assert validation_line(rows, mse) == "iteration 100000   mse 2.000 val 1.800"
    long = Metric("a_metric_of_ones_own_with_a_long_name", accuracy.score, "own", percent=True)
    assert "loss" not in validation_line(rows_of(long, 0.5), long)
    assert len(validation_line(rows_of(long, 0.5), long)) <= 80


def test_drawing_many_glyphs_is_announced_before_it_is_done(monkeypatch, capsys):
    """Drawing takes seconds: something must be on the screen before the first one."""
    monkeypatch.setattr(Glyphs, "_draw_block", lambda *_: print(capsys.readouterr().err) or exit(3))
    with pytest.raises(SystemExit):
        Glyphs(train_classes=1000).split("train")
    assert capsys.readouterr().out == "draw glyphs train: 1,000 classes\n\n"


def test_of_many_confusion_matrices_only_the_worst_class_of_each_is_shown(monkeypatch, tmp_path):
    monkeypatch.setattr("metarun.reporting.drawing.save", lambda figure, path: None)
    out = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(classes, "console", out)
    counts = torch.tensor([[9, 1, 0], [0, 10, 0], [4, 0, 6]])
    matrices = {f"maml, glyphs {ways}-way": (counts, ["a", "b", "c"]) for ways in range(2, 12)}
    assert len(classes.report_classes(matrices, tmp_path)) == 3
    shown = out.file.getvalue().splitlines()
    assert len(shown) < 20
    rows = [[cell.strip() for cell in line.split("│")[1:5]] for line in shown if line.startswith("│")]
    f1 = [2 * 9 / (10 + 13), 2 * 10 / (10 + 11), 2 * 6 / (10 + 6)]  # 78 %, 95 % and 75 %
    assert rows == [[title, "c", f"{100 * min(f1):.1f} %", "a"] for title in matrices]
    assert len(list(tmp_path.glob("classes_*.csv"))) == len(list(tmp_path.glob("confusion_*.csv"))) == 10
    assert len(classes.report_classes({"one": (counts, ["a", "b", "c"])}, tmp_path)) == 3
    assert out.file.getvalue().count("\n│ b ") == 1  # the whole table


@pytest.mark.parametrize("count", [2, 20, 423])
def test_long_names_of_classes_take_two_lines_in_the_table_at_most(count: int):
    names = [f"Malayalam_(Grantha)/{'very_long_' * (i % 4)}character{i:03}" for i in range(count)]
    confusion = torch.eye(count).long() * 9 + torch.eye(count).long().roll(1, 0)
    out = Console(file=io.StringIO(), width=80)
    out.print(classes.class_table(classes.class_rows(confusion, names), "maml, omniglot"))
    lines = out.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert len([line for line in lines if line.startswith("│")]) <= 2 * min(count, classes.SHOWN)
    shown = {line.split("│")[1].strip() for line in lines if line.startswith("│")}
    assert any(text.endswith("character000") for text in shown)  # the end of a name tells classes apart


def test_a_number_and_its_noun():
    assert [counted(n, "entry", "entries") for n in (0, 1, 2)] == ["0 entries", "1 entry", "2 entries"]
    assert counted(1, "way") == "1 way" and counted(5, "way") == "5 ways"
