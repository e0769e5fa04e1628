"""From the cells of a table to vectors of numbers: what is learned of its columns, and applied to others."""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from metarun.datasets.tables.reading import Cells
from metarun.errors import DataError

if TYPE_CHECKING:
    from metarun.datasets.tables.layout import Layout

MOST_VALUES = 50  # of a category with one number for each value; the values of others are hashed
BUCKETS = 64  # of hashed values
MOSTLY = 0.5  # the share of a column's cells above which it is one of numbers
LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Number:
    """A column of numbers.

    Args:
        name: of the column.
        mean, deviation: of the training rows, by which numbers are standardised.
        missing: whether a number tells which cells are missing; a missing number itself is 0.
    """

    name: str
    mean: float
    deviation: float
    missing: bool

    @property
    def width(self) -> int:
        return 1 + self.missing

    def encode(self, cells: Cells, missing: Collection[str]) -> np.ndarray:
        """Standardised numbers, float32 [rows, width]. Raises DataError, naming the line."""
        values = numbers_of(cells, self.name, missing)
        absent = np.isnan(values)
        standard = np.where(absent, 0.0, (values - self.mean) / self.deviation).astype(np.float32)
        return np.stack([standard, absent.astype(np.float32)], 1) if self.missing else standard[:, None]


@dataclass(frozen=True)
class Category:
    """A column of names.

    Args:
        name: of the column.
        values: those of the training rows, which have a number each; the next number is that of all other
            values. Empty: values are hashed.
        missing: whether the last number tells which cells are missing, instead of counting as another value.
    """

    name: str
    values: tuple[str, ...]
    missing: bool

    @property
    def width(self) -> int:
        return (len(self.values) + 1 if self.values else BUCKETS) + self.missing

    def encode(self, cells: Cells, missing: Collection[str]) -> np.ndarray:
        """One-hot vectors, float32 [rows, width]."""
        own = cells.column(self.name, "the model needs this column")
        places = {category_of(value, cells.comma): i for i, value in reversed([*enumerate(self.values)])}
        absent = self.width - 1 if self.missing else None

        def place(cell: str) -> int:
            if absent is not None and is_missing(cell, missing):
                return absent
            category = category_of(cell, cells.comma)
            if self.values:
                return places.get(category, len(self.values))
            return zlib.crc32(category.encode("utf-8", "surrogateescape")) % BUCKETS

        of_cell = {cell: place(cell) for cell in set(own)}
        encoded = np.zeros((len(own), self.width), np.float32)
        encoded[np.arange(len(own)), [of_cell[cell] for cell in own]] = 1
        return encoded


@dataclass(frozen=True)
class Learned:
    """What is learned from the training rows of a table; a checkpoint keeps it as JSON.

    Args:
        columns: the features, in the order of their numbers in a vector.
        labels: the labels of the training tasks, in order.
        mean, deviation: of the target of a regression.
    """

    columns: tuple[Number | Category, ...] = ()
    labels: tuple[str, ...] = ()
    mean: float = 0.0
    deviation: float = 1.0

    @property
    def width(self) -> int:
        """The number of features of a row."""
        return sum(column.width for column in self.columns)

    def encode(self, cells: Cells, missing: Collection[str]) -> Tensor:
        """The features of all rows, float32 [rows, width]. Raises DataError, naming the column or line."""
        blocks = [column.encode(cells, missing) for column in self.columns]
        return torch.from_numpy(np.concatenate([np.zeros((len(cells), 0), np.float32), *blocks], 1))

    def dumps(self) -> str:
        """As JSON, without `$`, which would refer to another setting in a config."""
        return json.dumps(asdict(self), ensure_ascii=False).replace("$", "\\u0024")

    @classmethod
    def loads(cls, text: str) -> Learned:
        """From what `dumps` gives. Raises ValueError for anything else."""
        try:
            content = json.loads(text)
            columns = tuple(
                Category(column["name"], tuple(column["values"]), bool(column["missing"]))
                if "values" in column
                else Number(
                    column["name"], float(column["mean"]), float(column["deviation"]), bool(column["missing"])
                )
                for column in content["columns"]
            )
            return cls(columns, tuple(content["labels"]), float(content["mean"]), float(content["deviation"]))
        except (TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"is not what metarun wrote ({type(error).__name__})") from error


def is_missing(cell: str, missing: Collection[str]) -> bool:
    """Whether a cell is empty or has one of the words for a missing value, as `label_of` gives them."""
    return not cell or label_of(cell.lower()) in missing


def missing_in(cells: Collection[str], missing: Collection[str]) -> set[str]:
    """The different cells that are missing values."""
    return {cell for cell in set(cells) if is_missing(cell, missing)}


def number_of(cell: str, comma: bool) -> float | None:
    """The number in a cell; None if there is none that is finite in float32."""
    try:
        value = float(cell.replace(",", ".", 1) if comma else cell)
    except ValueError:
        return None
    return value if abs(value) <= LARGEST and "_" not in cell else None  # Python reads 1_000 as a number


def numbers_of(cells: Cells, name: str, missing: Collection[str]) -> np.ndarray:
    """The numbers of a column, float64 [rows], NaN where they are missing. Raises DataError."""
    own = cells.column(name, "the model needs this column")
    absent = missing_in(own, missing)
    numbers = dict.fromkeys(absent, math.nan) | {
        cell: value for cell in set(own) - absent if (value := number_of(cell, cells.comma)) is not None
    }
    for row, cell in enumerate(own):
        if cell not in numbers:
            raise DataError(
                f"{cells.at(row)}: column {name!r} has {cell!r} where a finite number is expected; "
                "correct it, add it to dataset.missing, or name a column of words in dataset.categories"
            )
    return np.array([numbers[cell] for cell in own])


def learn_columns(layout: Layout, training: Sequence[int]) -> tuple[tuple[Number | Category, ...], list[str]]:
    """What is learned of the features of a table.

    Args:
        layout: the table.
        training: the rows to learn from.

    Returns:
        The columns, and remarks for the user.

    Raises:
        DataError: an identifier, or a cell that is not a number.
    """
    cells, missing = layout.cells, layout.roles.missing
    found: list[Number | Category] = []
    constant = []
    for name in layout.features:
        own = {cells.columns[name][row] for row in training}
        present = own - missing_in(own, missing)
        absent = len(present) < len(own)
        if len(present) + absent < 2:
            constant.append(name)
            continue
        numeric = name not in layout.categories and is_numeric(cells, name, missing)
        if layout.roles.features is None:  # not named by the user
            refuse_identifier(cells, name, numeric)
        if numeric:
            values = numbers_of(cells, name, missing)[training]
            found.append(Number(name, float(np.nanmean(values)), deviation_of(values), absent))
        else:
            values_of = tuple(sorted({category_of(cell, cells.comma) for cell in present}))
            found.append(Category(name, values_of if len(values_of) <= MOST_VALUES else (), absent))
    remarks = []
    if constant:
        remarks.append(f"the same value in every training row, so left out: {listed(constant)}")
    if hashed := [each.name for each in found if isinstance(each, Category) and not each.values]:
        remarks.append(f"more than {MOST_VALUES} different values, so hashed: {listed(hashed)}")
    if absent_in := [each.name for each in found if each.missing]:
        remarks.append(f"missing values, which have an indicator: {listed(absent_in)}")
    return tuple(found), remarks


def is_numeric(cells: Cells, name: str, missing: Collection[str]) -> bool:
    """Whether most cells of a column that are not missing are numbers."""
    own = Counter(cells.columns[name])
    absent = missing_in(own, missing)
    numbers = sum(
        n for cell, n in own.items() if cell not in absent and number_of(cell, cells.comma) is not None
    )
    return numbers > MOSTLY * sum(n for cell, n in own.items() if cell not in absent)


def refuse_identifier(cells: Cells, name: str, numeric: bool) -> None:
    """Raise DataError if a column of words or whole numbers has another value in every row."""
    own = cells.columns[name]
    if len(own) < 3 or len(set(own)) < len(own):
        return
    if numeric and not all(float(number_of(cell, cells.comma) or 0.0).is_integer() for cell in own):
        return
    raise DataError(
        f"{cells.path}: column {name!r} has another value in each of the {len(own):,} rows, as an identifier "
        f"has; leave it out (dataset.drop=[{name}]), or name the features if it is one (dataset.features=[*] "
        "names all)"
    )


def deviation_of(values: np.ndarray) -> float:
    """The standard deviation of the numbers that are present; 1 where it is 0."""
    return 1.0 if np.nanmin(values) == np.nanmax(values) else float(np.nanstd(values))


def listed(names: Sequence[str], most: int = 5) -> str:
    """Names in a message: the first ones and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def label_of(cell: str) -> str:
    """A label as it is compared: a whole number without its decimals, so that 1 and 1.0 are the same."""
    value = number_of(cell, False)
    return str(int(value)) if value is not None and value.is_integer() and abs(value) < 1e15 else cell


def category_of(cell: str, comma: bool) -> str:
    """A category as it is compared: 1.0 is 1, as programs write whole numbers; 01 is another one than 1."""
    written = cell.replace(",", ".", 1) if comma else cell
    return label_of(written) if "." in written else cell


def in_order(labels: Collection[str]) -> list[str]:
    """Labels by their number where all are numbers, else by name."""
    by_number = {label: number_of(label, False) for label in labels}
    if all(value is not None for value in by_number.values()):
        return sorted(labels, key=lambda label: (by_number[label], label))
    return sorted(labels)
