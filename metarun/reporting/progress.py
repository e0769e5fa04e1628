"""The progress of a training run as a line of text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from metarun.reporting.tracker import Row
from metarun.tasks.objectives import Metric

COLUMNS = 80  # of a terminal


def latest(rows: Sequence[Row], split: str) -> Row | None:
    """The last row of a split, or None."""
    return next((row for row in reversed(rows) if row["split"] == split), None)


def live_line(rows: Sequence[Row], metric: Metric) -> str:
    """The text beside the progress bar: the training loss, and the training and validation scores."""
    train, validation = latest(rows, "train"), latest(rows, "validation")
    if any(row and metric.before in row for row in (train, validation)):
        changes = (change(row, metric) if row else "-" for row in (train, validation))
        return "{} val {}".format(*changes)
    loss = f"{train['loss']:.3f}" if train else "-"
    scores = (metric.show(row[metric.name]) if row else "-" for row in (train, validation))
    return "loss {} train {} val {}".format(loss, *scores).replace(" %", "%")


def change(row: Row, metric: Metric) -> str:
    """A score before and after adaptation, such as "-39.41 to -11.10"; once if nothing was played before."""
    return " to ".join(dict.fromkeys(metric.show(row[name], 2) for name in (metric.before, metric.name)))


def validation_line(rows: Sequence[Row], metric: Metric) -> str:
    """The permanent line that reports a validation, for terminals of 80 columns.

    It has the training value and the validation value of the metric and, where the line has space for it and
    it is another number, of the loss.
    """
    shown = [row for row in (latest(rows, "train"), latest(rows, "validation")) if row]
    words = ("", "val ")[-len(shown) :]  # a validation may come before the first training row
    loss = " ".join(f"{word}{row['loss']:.4f}" for word, row in zip(words, shown, strict=True))
    if all(metric.before in row for row in shown):  # of a surrogate loss, the value means nothing
        changes = ", ".join(f"{word}{change(row, metric)}" for word, row in zip(words, shown, strict=True))
        return f"iteration {shown[-1]['iteration']:>6}   {metric.name} {changes}"
    score = " ".join(f"{word}{metric.show(row[metric.name])}" for word, row in zip(words, shown, strict=True))
    parts = [f"iteration {shown[-1]['iteration']:>6}", f"loss {loss}", f"{metric.name} {score}"]
    same = all(math.isclose(row["loss"], row[metric.name], rel_tol=1e-5) for row in shown)
    if same or len("   ".join(parts)) > COLUMNS:
        del parts[1]
    return "   ".join(parts)
