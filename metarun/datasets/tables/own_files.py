"""One task from a user's tables, for `metarun adapt`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from metarun.datasets.base import OwnQueries, OwnTask
from metarun.datasets.tables.columns import in_order, is_missing, label_of, numbers_of
from metarun.datasets.tables.reading import Cells
from metarun.errors import DataError
from metarun.tasks.class_store import numbers

if TYPE_CHECKING:
    from metarun.datasets.tables.table import Table


def own_task(table: Table, support: Path, query: Path | None, fixed: Sequence[str] | None) -> OwnTask:
    """The task in a file of rows with labels or targets, and a file of rows to predict.

    Args:
        table: the dataset of the model.
        support, query: the files. The queries may have labels or targets, by which they are scored.
        fixed: the labels, if they are those of the training tasks; None: those of the support.

    Raises:
        DataError: a column is missing, or a cell is not as expected; the message names the line.
    """
    cells, wanted = table.read(support), table.roles.answer or "label"
    classes: list[str] = []
    if table.roles.target:
        support_y = values_of(table, cells, wanted, required=True)
    else:
        known = labels_of(table, cells, wanted, required=True)
        classes = list(fixed or in_order({label for label in known if label is not None}))
        support_y = class_numbers(cells, known, classes, wanted)
        if absent := [name for i, name in enumerate(classes) if not (support_y == i).any()]:
            raise DataError(f"{cells.path}: has no row with the {wanted} {absent[0]!r}; add at least one")
        if len(classes) < 2:
            raise DataError(f"{cells.path}: all rows have the same {wanted}; add rows with another one")
    support_x = numbers(table.encode(cells)).unsqueeze(0)
    if query is None:
        return OwnTask(support_x, support_y, None, None, classes, [])
    asked = own_queries(table, table.read(query), classes)
    return OwnTask(support_x, support_y, asked.x, asked.y, classes, asked.names)


def own_queries(table: Table, cells: Cells, classes: Sequence[str]) -> OwnQueries:
    """Rows to predict; `classes` are those of the support. Raises DataError as `own_task`."""
    wanted = table.roles.answer or "label"
    if table.roles.target:
        y = values_of(table, cells, wanted, required=False)
    else:
        y = class_numbers(cells, labels_of(table, cells, wanted, required=False), classes, wanted)
    names = [table.row_name(cells, row) for row in range(len(cells))]
    return OwnQueries(numbers(table.encode(cells)).unsqueeze(0), y, names)


def cells_of(table: Table, items: Any) -> Cells:
    """Rows in memory as cells.

    Args:
        table: the dataset of the model.
        items: mappings from the name of a column to its value; a data frame; or rows of numbers with the
            columns that the model learned from, in their order.

    Raises:
        DataError: rows have other columns.
    """
    if hasattr(items, "columns"):
        names = list(map(str, items.columns))
        rows = list(map(list, items.to_numpy().tolist()))
    elif all(isinstance(item, Mapping) for item in items):
        names = list(dict.fromkeys(str(name) for item in items for name in item))
        rows = [[item.get(name) for name in names] for item in items]
    else:
        smiles = [table.roles.smiles] if table.roles.smiles else []
        names = [*(column.name for column in table.learned.columns), *smiles]
        rows = [np.atleast_1d(np.asarray(item)).tolist() for item in items]
        if wrong := [row for row in rows if len(row) != len(names)]:
            raise DataError(
                f"examples: a row has {len(wrong[0])} values, and the model takes {len(names)}: "
                f"{', '.join(names[:10])}{', ...' * (len(names) > 10)}"
            )
    columns = {name: [as_text(row[i]) for row in rows] for i, name in enumerate(names)}
    return Cells(Path("examples"), columns, list(range(1, len(rows) + 1)))


def as_text(value: Any) -> str:
    """A value as a cell; empty if it is missing."""
    missing = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if missing else str(value).strip()


def labels_of(table: Table, cells: Cells, wanted: str, required: bool) -> list[str | None]:
    """The label of each row; None where it is missing, unless it is required."""
    if wanted not in cells.columns and not required:
        return [None] * len(cells)
    own = cells.column(wanted, "support")
    if required:
        refuse_missing(table, cells, wanted)
    return [None if is_missing(cell, table.roles.missing) else label_of(cell) for cell in own]


def values_of(table: Table, cells: Cells, wanted: str, required: bool) -> Tensor:
    """The target of each row as it is learned, [1, rows, 1]; NaN where it is missing, unless required."""
    if wanted not in cells.columns and not required:
        return torch.full((1, len(cells), 1), torch.nan)
    cells.column(wanted, "support")
    if required:
        refuse_missing(table, cells, wanted)
    return table.standard(torch.from_numpy(numbers_of(cells, wanted, table.roles.missing))).unsqueeze(0)


def refuse_missing(table: Table, cells: Cells, wanted: str) -> None:
    """Raise DataError if a cell of a column is missing."""
    for row, cell in enumerate(cells.columns[wanted]):
        if is_missing(cell, table.roles.missing):
            raise DataError(f"{cells.at(row)}: column {wanted!r} is empty; fill it, or remove the line")


def class_numbers(cells: Cells, labels: Sequence[str | None], classes: Sequence[str], wanted: str) -> Tensor:
    """Labels as class numbers [1, rows]; -1 where they are unknown."""
    places = {name: i for i, name in enumerate(classes)}
    for row, label in enumerate(labels):
        if label is not None and label not in places:
            raise DataError(
                f"{cells.at(row)}: the {wanted} {label!r} is not one of {', '.join(classes)}; correct it"
            )
    return torch.tensor([[-1 if label is None else places[label] for label in labels]])
