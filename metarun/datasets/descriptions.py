"""Descriptions of classes in files: the same numbers for each class, such as attributes."""

from __future__ import annotations

import csv
import io
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from metarun.datasets.base import and_more
from metarun.datasets.tables.columns import number_of
from metarun.errors import DataError
from metarun.reporting.console import inform
from metarun.storage.files import read_text, user_path

SEPARATORS = ("\t", ";", ",")  # of equal numbers, the first: a comma may be a decimal one


def read_table(file: str) -> dict[str, tuple[str, list[float]]]:
    """The classes in a table, the line of each for messages, and its numbers.

    Args:
        file: a line for each class, the name and the numbers, separated by commas, semicolons or tabs; in
            UTF-8. There may be a first line of headings, in which no column after the first is a number.
            With semicolons or tabs, numbers may have decimal commas.

    Raises:
        DataError: the file cannot be read, or a line is not as expected; the message names the line.
    """
    classes: dict[str, tuple[str, list[float]]] = {}
    size = 0
    for first, place, (cell, *cells), commas in table_rows(user_path(file)):
        if first and all(number_of(each, commas) is None for each in cells):
            size = len(cells)
            continue
        name = same_text(cell)
        numbers = numbers_of(cells, place, 2, commas)
        size = size or len(numbers)
        if not numbers:
            raise DataError(f"{place}: has no numbers; write the name of a class and its numbers in a line")
        if len(numbers) != size:
            raise DataError(f"{place}: has {len(numbers)} numbers, and lines before it have {size}")
        if name in classes:
            raise DataError(f"{place}: class {name!r} is also in {classes[name][0]}; remove one of them")
        classes[name] = place, numbers
    if not classes:
        raise DataError(f"{file}: has no classes; write the name of a class and its numbers in each line")
    return classes


def described(file: str, names: Sequence[str]) -> Tensor:
    """The descriptions of classes in a table, float32 [classes, numbers], in the order of `names`.

    A message says if other classes are in the table, too. Raises DataError if one of these is not.
    """
    table = read_table(file)
    wanted = [same_text(name) for name in names]
    if missing := [name for name in wanted if name not in table]:
        raise DataError(
            f"{file}: has no line for class {and_more([repr(name) for name in missing])}; add the name and "
            "its numbers"
        )
    if others := [place for name, (place, _) in table.items() if name not in set(wanted)]:
        inform(f"{others[0]}: not a class of the dataset; {len(others)} of {len(table)} lines are not used")
    return torch.tensor([table[name][1] for name in wanted])


def table_rows(path: Path) -> Iterator[tuple[bool, str, list[str], bool]]:
    """Whether it is the first, the place, the cells, and whether decimal commas may occur, of each line."""
    text = read_text(path)
    head = next((line for line in text.splitlines() if line.strip()), "")
    separator = max(SEPARATORS, key=head.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    start, first = 1, True
    try:
        for cells in reader:
            place, start = f"{path}, line {start}", reader.line_num + 1
            if any(cell.strip() for cell in cells):
                yield first, place, [cell.strip() for cell in cells], separator != ","
                first = False
    except csv.Error as error:
        raise DataError(f"{path}, line {start}: {error}; check its quotes") from None


def numbers_of(cells: Iterable[str], place: str, first: int = 1, commas: bool = False) -> list[float]:
    """The cells of a line as numbers.

    Args:
        cells: the cells.
        place: the file and the line, for messages.
        first: the number of the first cell's column, for messages.
        commas: whether there may be decimal commas.

    Raises:
        DataError: a cell is not a number, or not finite in float32.
    """
    numbers = []
    for column, cell in enumerate(cells, first):
        number = number_of(cell, commas)
        if number is None:
            raise DataError(f"{place}: {cell!r} in column {column} is not a finite number; correct it")
        numbers.append(number)
    return numbers


def same_text(name: str) -> str:
    """The name in one form: file systems and editors write accents in different ways."""
    return unicodedata.normalize("NFC", name)
