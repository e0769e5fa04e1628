"""The predictions of `metarun adapt` and `predict`: predictions.csv, a table of the first ones, figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from metarun.algorithms.base import Algorithm
from metarun.datasets.base import OwnQueries
from metarun.errors import counted
from metarun.inference.adapted import is_rejected
from metarun.reporting import pictures
from metarun.reporting.classes import report_classes
from metarun.reporting.console import console, inform, shortened
from metarun.storage.files import write_csv
from metarun.tasks.objectives import Objective
from metarun.tasks.scores import confusion

REJECTED = ""  # the prediction of a query that belongs to no class
SHOWN = 30  # the most predictions in the table on screen; predictions.csv contains all


def known_targets(targets: Tensor) -> Tensor:
    """Which examples have a known target, bool [B], of class numbers [1, B] or values [1, B, V]."""
    return ~targets[0].isnan().any(-1) if targets.is_floating_point() else targets[0] >= 0


def report_queries(
    queries: OwnQueries,
    classes: Sequence[str],
    outputs: Tensor,
    objective: Objective,
    folder: Path,
    reject: float | None = None,
    points: Tensor | None = None,
) -> list[str]:
    """Print the predictions of queries, and write predictions.csv and figures to the folder.

    Args:
        queries: the examples, their classes or values where they are known, and their names.
        classes: the names of the ways; empty for a regression.
        outputs: predictions [1, B, N].
        objective: of the task.
        folder: the output folder.
        reject: see `class_rows`.
        points: see `value_rows`.

    Returns:
        The names of the files.
    """
    if not classes:
        spread = objective.spread(outputs) if objective.spread else None
        values = objective.to_units(queries.y)
        rows = value_rows(queries.names, objective.to_units(outputs), values, spread, points)
        console.print(value_table(rows))
        write_csv(folder / "predictions.csv", rows)
        return ["predictions.csv"]
    rows = class_rows(queries.names, classes, outputs, queries.y, reject)
    console.print(class_table(rows))
    write_csv(folder / "predictions.csv", rows)
    saved = ["predictions.csv"]
    if queries.x.dim() == 5:  # images
        titles = [title_of(row) for row in rows]
        right = [row["prediction"] == row["class"] if row["class"] else None for row in rows]
        pictures.predictions(queries.x[0].float(), titles, right, folder / "predictions.png")
        saved.append("predictions.png")
    kept = known_targets(queries.y) & torch.tensor([row["prediction"] != REJECTED for row in rows]).to(
        queries.y.device
    )
    if kept.any():
        counts = confusion(outputs[:, kept], queries.y[:, kept])[0].long().cpu()
        saved += report_classes({"queries by class": (counts, classes)}, folder)
    return saved


def note_dependence(algorithm: Algorithm) -> None:
    """Print whether queries were predicted independently of each other, if the network normalises batches."""
    if algorithm.uses_query_statistics:
        inform("the queries were predicted in one batch and depend on each other (transductive)")
    elif algorithm.normalises_batches:
        inform("each query was predicted independently; transductive=true predicts them in one batch")


def title_of(row: dict[str, Any]) -> list[str]:
    """The prediction of a query, the true class if it is another one, and the probability, a line each."""
    wrong = row["class"] and row["prediction"] != row["class"]
    return [
        row["prediction"] or "(none)",
        *([f"(is {row['class']})"] if wrong else []),
        f"{row['probability']:.2f}",
    ]


def class_rows(
    names: Sequence[str],
    classes: Sequence[str],
    outputs: Tensor,
    labels: Tensor,
    reject: float | None = None,
) -> list[Any]:
    """One row for each query: the prediction, the probability of every class, and the true class if known.

    Args:
        names: of the queries.
        classes: the names of the ways.
        outputs: logits [1, B, N].
        labels: class numbers [1, B]; -1 where unknown.
        reject: the probability that a prediction needs; `REJECTED` takes the place of others.
    """
    rows = []
    for name, probabilities, label in zip(
        names, outputs[0].softmax(-1).tolist(), labels[0].tolist(), strict=True
    ):
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        rows.append(
            {
                "query": name,
                "prediction": REJECTED if is_rejected(probabilities[best], reject) else classes[best],
                "probability": probabilities[best],
                "class": classes[label] if label >= 0 else "",
                **{f"p({c})": p for c, p in zip(classes, probabilities, strict=True)},
            }
        )
    return rows


def value_rows(
    names: Sequence[str],
    outputs: Tensor,
    values: Tensor,
    spread: Tensor | None = None,
    points: Tensor | None = None,
) -> list[dict[str, Any]]:
    """One row for each query of a regression: the prediction, and the true value if known.

    Args:
        names: of the queries.
        outputs: predicted values [1, B, V], in the units that are shown.
        values: the true ones, [1, B, V]; NaN where unknown.
        spread: the predicted standard deviations, [1, B, V]; None: there are none.
        points: where the function was asked, [1, B, D]; None: not in the rows.
    """
    columns = {
        "x": None if points is None else points[0].tolist(),
        "prediction": outputs[0].tolist(),
        "deviation": None if spread is None else spread[0].tolist(),
        "value": [["" if math.isnan(value) else value for value in row] for row in values[0].tolist()],
    }
    rows: list[dict[str, Any]] = [{"query": name} for name in names]
    for column, numbers in columns.items():
        for row, own in zip(rows, numbers or [], strict=numbers is not None):
            row |= {column: own[0]} if len(own) == 1 else {f"{column} {i}": x for i, x in enumerate(own, 1)}
    return rows


def class_table(rows: list[dict[str, Any]]) -> Table:
    """A table of the first predictions of classes, with wrong ones in red."""
    rejected = sum(row["prediction"] == REJECTED for row in rows)
    known = [row for row in rows if row["class"] and row["prediction"] != REJECTED]
    right = sum(row["prediction"] == row["class"] for row in known)
    title = f", {right} of {len(known)} right ({right / len(known):.1%})" if known else ""
    title = f", {rejected} rejected{title}" if rejected else title
    table = table_for(rows, title, ("query", "prediction", "probability", *(["class"] if known else [])))
    most = 20 if known else 32  # characters of a name, so that no name is broken on 80 columns
    for column in table.columns[1:]:
        column.no_wrap = True
    for row in rows[:SHOWN]:
        wrong = row["class"] and row["prediction"] != row["class"]
        cells = [
            row["query"],
            shortened(row["prediction"], most) or "(none of them)",
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
