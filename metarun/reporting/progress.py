"""The progress of a training run as a line of text."""

from __future__ import annotations

from collections.abc import Sequence

from metarun.reporting.tracker import Row
from metarun.tasks.objectives import Metric


def latest(rows: Sequence[Row], split: str) -> Row | None:
    """The last row of a split, or None."""
    return next((row for row in reversed(rows) if row["split"] == split), None)


def live_line(rows: Sequence[Row], metric: Metric) -> str:
    """The text beside the progress bar: the training loss, and the training and validation scores."""
    train, validation = latest(rows, "train"), latest(rows, "validation")
    loss = f"{train['loss']:.3f}" if train else "-"
    scores = (metric.show(row[metric.name]) if row else "-" for row in (train, validation))
    return "loss {} train {} val {}".format(loss, *scores).replace(" %", "%")


def validation_line(rows: Sequence[Row], metric: Metric) -> str:
    """The permanent line that reports a validation."""
    train, validation = latest(rows, "train"), latest(rows, "validation")
    assert validation
    parts = [f"iteration {validation['iteration']:>6}"]
    for name, row in (("train", train), ("validation", validation)):
        if row:
            score = metric.show(row[metric.name])
            parts.append(f"{name} loss {row['loss']:.4f} {metric.name} {score}")
    return "   ".join(parts)
