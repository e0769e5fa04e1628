"""Reports the confusion matrix and the metrics of each class."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text
from torch import Tensor

from metarun.reporting import pictures
from metarun.reporting.console import console, shortened
from metarun.storage.files import write_csv

LONGEST_STEM = 50  # characters
SHOWN = 10  # the most classes in the table on screen, the worst first
TABLES = 3  # the most tables of classes on screen; of more matrices, only the worst class of each is shown


def class_rows(confusion: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall and F1 of each class that occurs, and the class it is most often confused with.

    Args:
        confusion: [classes, classes], how many examples of class i were predicted as class j.
        names: the names of the classes.
    """
    rows = []
    predicted = confusion.sum(0).tolist()
    for i, name in enumerate(names):
        own = confusion[i].tolist()
        queries, right = sum(own), own[i]
        if not queries:
            continue
        other = max((j for j in range(len(own)) if j != i), key=own.__getitem__, default=i)
        rows.append(
            {
                "class": name,
                "queries": queries,
                "precision": right / predicted[i] if predicted[i] else 0.0,
                "recall": right / queries,
                "f1": 2 * right / (queries + predicted[i]),
                "most often taken for": names[other] if other != i and own[other] else "",
            }
        )
    return rows


def class_table(rows: Sequence[dict[str, Any]], title: str) -> Table:
    """A table of the classes, those with the lowest F1 first."""
    worst = sorted(rows, key=lambda row: row["f1"])[:SHOWN]
    caption = f"the {SHOWN} classes with the lowest F1 of {len(rows)}" if len(rows) > SHOWN else None
    table = Table(title=title, caption=caption)
    for heading in ("class", "queries", "precision", "recall", "f1", "most often taken for"):
        left = heading in ("class", "most often taken for")
        table.add_column(heading, justify="left" if left else "right", overflow="fold")
    for row in worst:
        figures = (f"{100 * row[key]:.1f} %" for key in ("precision", "recall", "f1"))
        name, taken = (Text(shortened(row[key])) for key in ("class", "most often taken for"))
        table.add_row(name, str(row["queries"]), *figures, taken)
    return table


def worst_table(reports: Mapping[str, Sequence[dict[str, Any]]]) -> Table:
    """The class with the lowest F1 of each of several reports, one line each."""
    table = Table(title="the class with the lowest F1", caption="all classes are in classes_*.csv")
    for heading in ("tasks", "class", "f1", "most often taken for"):
        table.add_column(heading, justify="right" if heading == "f1" else "left", overflow="fold")
    for title, rows in reports.items():
        worst = min(rows, key=lambda row: row["f1"])
        name, taken = (Text(shortened(worst[key])) for key in ("class", "most often taken for"))
        table.add_row(Text(title), name, f"{100 * worst['f1']:.1f} %", taken)
    return table


def report_classes(matrices: Mapping[str, tuple[Tensor, Sequence[str]]], folder: Path) -> list[str]:
    """Print the metrics of each class; write them, the confusion matrix and a figure of it.

    Args:
        matrices: [classes, classes], how many examples of class i were predicted as class j, and the names of
            the classes; by the title of the table and the figure, which is part of the file names.
        folder: where to write the files.

    Returns:
        The names of the files; of more than three matrices, patterns of names.
    """
    files: list[str] = []
    reports: dict[str, list[dict[str, Any]]] = {}
    for title, (confusion, names) in matrices.items():
        reports[title] = class_rows(confusion, names)
        files += write_classes(reports[title], confusion, names, title, folder)
    if len(reports) > TABLES:
        console.print(worst_table(reports))
        return ["classes_*.csv", "confusion_*.csv", "confusion_*.png"]
    for title, rows in reports.items():
        console.print(class_table(rows, Text(title)))  # type: ignore[arg-type]
    return files


def stem_of(title: str) -> str:
    """A title as a part of the name of a file."""
    stem = re.sub(r"[^\w.-]+", "_", title).strip("_")
    if len(stem) <= LONGEST_STEM:  # file systems limit the length of names, in bytes
        return stem
    return f"{stem[:LONGEST_STEM]}_{hashlib.sha256(stem.encode('utf-8', 'replace')).hexdigest()[:8]}"


def write_classes(
    rows: Sequence[dict[str, Any]], confusion: Tensor, names: Sequence[str], title: str, folder: Path
) -> list[str]:
    """Write the metrics of each class, the confusion matrix and its figure; the names of the files."""
    stem = stem_of(title)
    files = [f"classes_{stem}.csv", f"confusion_{stem}.csv", f"confusion_{stem}.png"]
    write_csv(folder / files[0], rows)
    present = [i for i, name in enumerate(names) if confusion[i].any() or confusion[:, i].any()]
    matrix = confusion[present][:, present]
    labels = [names[i] for i in present]
    write_csv(
        folder / files[1],
        [
            {"number": number, "class": name}
            | {f"as {other}": count for other, count in zip(labels, row, strict=True)}
            for number, (name, row) in enumerate(zip(labels, matrix.tolist(), strict=True), start=1)
        ],
    )
    pictures.confusion_matrix(matrix, labels, title, folder / files[2])
    return files
