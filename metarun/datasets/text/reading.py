"""Files of labelled texts: csv, tsv, jsonl, also compressed, and class folders of text files."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from metarun.datasets.images import visible
from metarun.errors import DataError, first_line
from metarun.storage.files import read_text

SEPARATORS = (",", ";", "\t")
FORMATS = ".csv, .tsv, .jsonl or .txt file, also with .gz"


class Row(NamedTuple):
    """A line of a file: its cells by the names of the columns, and where it is, for messages."""

    cells: Mapping[str, str]
    place: str


def kind_of(path: Path) -> str:
    """The format of a file by its name, such as ".csv"."""
    return Path(path.stem).suffix.lower() if path.suffix == ".gz" else path.suffix.lower()


def rows_of(path: Path, columns: tuple[str, ...] = ()) -> Iterator[Row]:
    """The rows of a file.

    Args:
        path: a .csv, .tsv or .jsonl file.
        columns: the names of the columns where the file has no line of headings; empty: it has one.

    Raises:
        DataError: the file cannot be read, or a line is not like the others; the message names it.
    """
    match kind_of(path):
        case ".csv" | ".tsv" | ".txt":
            yield from _table_rows(path, columns)
        case ".jsonl" | ".json":
            yield from _json_rows(path)
        case _:
            raise DataError(f"{path}: is not a {FORMATS}")


def _table_rows(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    text = read_text(path)
    first = text.split("\n", 1)[0]
    tabs = kind_of(path) == ".tsv"
    separator = "\t" if tabs else max(SEPARATORS, key=first.count)
    lines = io.StringIO(text, newline="")
    if tabs:
        reader = csv.reader(lines, delimiter=separator, quoting=csv.QUOTE_NONE, strict=True)
    else:
        reader = csv.reader(lines, delimiter=separator, strict=True)
    for place, cells in _lines(reader, path, len(text)):
        if not columns:
            columns = tuple(cell.strip() for cell in cells)
            if twice := [name for i, name in enumerate(columns) if name and name in columns[:i]]:
                raise DataError(f"{place}: two columns are named {twice[0]!r}; rename one of them")
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(columns):
            raise DataError(
                f"{place}: has {len(cells)} fields, and {len(columns)} are expected "
                f"({', '.join(columns)}); put quotes around a text that contains {separator!r}"
            )
        yield Row(dict(zip(columns, cells, strict=True)), place)


def _lines(reader: Any, path: Path, longest: int) -> list[tuple[str, list[str]]]:
    """The cells of each line, and where it begins.

    Args:
        reader: of the module csv.
        path: of the file, for messages.
        longest: the most characters of a cell; the module's own limit, 131,072, is that of the process.
    """
    found, begun = [], 1
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, longest))
    try:
        for cells in reader:
            found.append((f"{path}, line {begun}", cells))
            begun = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}, line {begun}: {error}; check its quotes") from None
    finally:
        csv.field_size_limit(limit)
    return found


def _json_rows(path: Path) -> Iterator[Row]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: is not JSON ({first_line(error)})") from None
        if not isinstance(value, dict):
            raise DataError(f'{place}: is not an object such as {{"text": "...", "label": "..."}}')
        yield Row({key: "" if item is None else str(item) for key, item in value.items()}, place)


def cell(row: Row, column: str, setting: str = "") -> str:
    """A cell without white space around it.

    Args:
        row: the row.
        column: the name of the column.
        setting: the setting that names the column, if there is one, for messages.

    Raises:
        DataError: there is no such column, or the cell is empty.
    """
    if column not in row.cells:
        raise DataError(
            f"{row.place}: there is no column {column!r}, but {', '.join(map(repr, row.cells))}; "
            + (f"set {setting}=COLUMN" if setting else "rename one")
        )
    if not (found := row.cells[column].strip()):
        raise DataError(f"{row.place}: its {column} is empty; remove the line")
    return found


def text_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """The class and the path of each text file in class folders. Raises DataError if there are none."""
    classes = [each for each in visible(folder) if each.is_dir()]
    found = [(each.name, file) for each in classes for file in visible(each) if file.suffix == ".txt"]
    if not found:
        raise DataError(
            f"{folder}: has no class folders of .txt files, one text in each; or name a {FORMATS}"
        )
    yield from found


def whole_text(path: Path) -> str:
    """The text in a file without white space around it. Raises DataError if it is empty or unreadable."""
    if not (text := read_text(path).strip()):
        raise DataError(f"{path}: is empty; remove the file")
    return text


def grouped(labelled: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Texts by their class, from pairs of a class and a text; classes in the order in which they appear."""
    classes: dict[str, list[str]] = {}
    for name, text in labelled:
        classes.setdefault(name, []).append(text)
    return classes
