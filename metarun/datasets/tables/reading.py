"""Reads tables: csv and tsv files, also compressed with gzip, by the standard library."""

from __future__ import annotations

import csv
import difflib
import fnmatch
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from metarun.errors import DataError
from metarun.storage.files import read_text

DELIMITERS = (",", ";", "\t")


@dataclass(frozen=True)
class Cells:
    """The content of a table as text.

    Args:
        path: of the file.
        columns: the cells of each column, without white space around them, by its name.
        lines: the line of the file at which each row begins, for messages.
        comma: whether numbers may have a decimal comma, as in files that `;` separates.
    """

    path: Path
    columns: dict[str, list[str]]
    lines: list[int]
    comma: bool = False

    def __len__(self) -> int:
        return len(self.lines)

    def at(self, row: int) -> str:
        """The place of a row, for messages."""
        return f"{self.path}, line {self.lines[row]}"

    def column(self, name: str, setting: str) -> list[str]:
        """The cells of a column that a setting names. Raises DataError if there is no such column."""
        if name not in self.columns:
            raise DataError(f"{setting}: {self.path} has no column {name!r}{nearest(name, self.columns)}")
        return self.columns[name]

    def matching(self, patterns: Sequence[str], setting: str) -> list[str]:
        """The columns that names or patterns such as `NR-*` choose, in the order of the table.

        Raises:
            DataError: one of them chooses no column.
        """
        found = set()
        for pattern in patterns:
            exact = [pattern] if pattern in self.columns else []
            own = exact or [name for name in self.columns if fnmatch.fnmatchcase(name, pattern)]
            if not own:
                self.column(pattern, setting)
            found |= {*own}
        return [name for name in self.columns if name in found]

    def keeping(self, rows: Sequence[int]) -> Cells:
        """Only these rows."""
        columns = {name: [cells[i] for i in rows] for name, cells in self.columns.items()}
        return Cells(self.path, columns, [self.lines[i] for i in rows], self.comma)


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown column: the one that may be meant, or all."""
    known = list(known)
    if close := difflib.get_close_matches(word.lower(), [name.lower() for name in known], n=1):
        return f"; did you mean {next(name for name in known if name.lower() == close[0])!r}?"
    shown = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
    return f"; it has {shown}"


def read_table(path: Path) -> Cells:
    """The cells of a csv or tsv file with a header; `,`, `;` or a tab separates them.

    Raises:
        DataError: the file is missing, empty or not text, two columns have one name, or a row has another
            number of cells than the header; the message names the line.
    """
    text = read_text(path)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter_of(text), strict=True)
    lines, found, begin = [], [], 1
    try:
        for row in rows:
            if row:  # an empty line gives no cells
                found.append([cell.strip() for cell in row])
                lines.append(begin)
            begin = rows.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {max(rows.line_num, 1)}: is not a row of a table ({error})") from None
    if len(found) < 2:
        what = "has a header and no rows" if found else "is empty"
        raise DataError(f"{path}: {what}; a table has a header with the names of its columns, and rows")
    header = [name or f"column {i}" for i, name in enumerate(found[0], 1)]
    if twice := [name for i, name in enumerate(header) if name in header[:i]]:
        raise DataError(f"{path}: two columns are named {twice[0]!r}; rename one of them")
    for row, line in zip(found, lines, strict=True):
        if len(row) != len(header):
            raise DataError(
                f"{path}, line {line}: has {len(row)} cells, and the header {len(header)}; correct the line, "
                "or put cells that contain the separator in double quotes"
            )
    columns = dict(zip(header, map(list, zip(*found[1:], strict=True)), strict=True))
    return Cells(path, columns, lines[1:], rows.dialect.delimiter == ";")


def delimiter_of(text: str) -> str:
    """The character that separates the cells of a table: the one that gives its header the most cells."""

    def cells(delimiter: str) -> int:
        try:
            return len(next(csv.reader(head, delimiter=delimiter)))
        except (csv.Error, StopIteration):
            return 0

    head = text.lstrip("\r\n").splitlines(keepends=True)
    return max(DELIMITERS, key=cells)
