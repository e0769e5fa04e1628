"""The predictions of `metarun adapt`: rows of predictions.csv, and a table of the first ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import Tensor

from metarun.errors import counted
from metarun.reporting.console import shortened

SHOWN = 30  # the most predictions in the table on screen; predictions.csv contains all


def known_targets(targets: Tensor) -> Tensor:
    """Which examples have a known target, bool [B], of class numbers [1, B] or values [1, B, V]."""
    return ~targets[0].isnan().any(-1) if targets.is_floating_point() else targets[0] >= 0


def class_rows(names: Sequence[str], classes: Sequence[str], outputs: Tensor, labels: Tensor) -> list[Any]:
    """One row for each query: the prediction, the probability of every class, and the true class if known.

    Args:
        names: of the queries.
        classes: the names of the ways.
        outputs: logits [1, B, N].
        labels: class numbers [1, B]; -1 where unknown.
    """
    rows = []
    for name, probabilities, label in zip(
        names, outputs[0].softmax(-1).tolist(), labels[0].tolist(), strict=True
    ):
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        rows.append(
            {
                "query": name,
                "prediction": classes[best],
                "probability": probabilities[best],
                "class": classes[label] if label >= 0 else "",
                **{f"p({c})": p for c, p in zip(classes, probabilities, strict=True)},
            }
        )
    return rows


def value_rows(names: Sequence[str], outputs: Tensor, values: Tensor) -> list[dict[str, Any]]:
    """One row for each query of a regression: the prediction, and the true value if known.

    Args:
        names: of the queries.
        outputs: predicted values [1, B, V], in the units that are shown.
        values: the true ones, [1, B, V]; NaN where unknown.
    """
    number = [""] if outputs.shape[-1] == 1 else [f" {i}" for i in range(1, outputs.shape[-1] + 1)]
    rows = []
    for name, own, true in zip(names, outputs[0].tolist(), values[0].tolist(), strict=True):
        shown = ["" if math.isnan(value) else value for value in true]
        rows.append(
            {"query": name}
            | {f"prediction{i}": value for i, value in zip(number, own, strict=True)}
            | {f"value{i}": value for i, value in zip(number, shown, strict=True)}
        )
    return rows


def class_table(rows: list[dict[str, Any]]) -> Table:
    """A table of the first predictions of classes, with wrong ones in red."""
    known = [row for row in rows if row["class"]]
    right = sum(row["prediction"] == row["class"] for row in known)
    title = f", {right} of {len(known)} right ({right / len(known):.1%})" if known else ""
    table = table_for(rows, title, ("query", "prediction", "probability", *(["class"] if known else [])))
    most = 20 if known else 32  # characters of a name, so that no name is broken on 80 columns
    for column in table.columns[1:]:
        column.no_wrap = True
    for row in rows[:SHOWN]:
        wrong = row["class"] and row["prediction"] != row["class"]
        cells = [
            row["query"],
            shortened(row["prediction"], most),
            f"{row['probability']:.3f}",
            *([shortened(row["class"], most)] if known else []),
        ]
        table.add_row(*map(Text, cells), style="red" if wrong else None)
    return table


def value_table(rows: list[dict[str, Any]]) -> Table:
    """A table of the first predictions of values."""
    headings = [key for key in rows[0] if not key.startswith("value") or any(row[key] != "" for row in rows)]
    table = table_for(rows, "", headings)
    for row in rows[:SHOWN]:
        cells = [row[key] if isinstance(row[key], str) else f"{row[key]:.6g}" for key in headings]
        table.add_row(*map(Text, cells))
    return table


def table_for(rows: Sequence[Any], title: str, headings: Sequence[str]) -> Table:
    """An empty table for the first of these rows."""
    caption = f"the first {SHOWN}; all are in predictions.csv" if len(rows) > SHOWN else None
    table = Table(title=counted(len(rows), "query", "queries") + title, caption=caption)
    for heading in headings:
        table.add_column(heading, overflow="fold")
    return table
