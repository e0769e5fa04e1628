"""Texts as weighted means of word vectors, from files of GloVe and fastText."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import Tensor

from metarun.datasets.text.tokens import normalised, words
from metarun.datasets.text.vectors import digest_of
from metarun.errors import DataError, counted, first_line
from metarun.reporting.console import Bar
from metarun.storage.files import user_path

EMPTY = "has no word vectors; write a line WORD NUMBER NUMBER ... for each word"
LINES = 10_000  # between two steps of the progress bar
SMOOTH = 1e-4  # a in Arora et al. 2017, who recommend 1e-3 to 1e-4
EULER = 0.5772  # Euler's constant: the sum of 1/r up to n is about log(n) + EULER


@dataclass(frozen=True)
class WordVectors:
    """The weighted mean of the vectors of a text's words.

    A word of probability p has the weight a / (a + p) (Arora et al. 2017, "A simple but tough-to-beat
    baseline for sentence embeddings", section 3, without the common component). The files are
    sorted by frequency, so p is taken from Zipf's law: the r-th of n words has 1 / (r (log n + 0.577)). That
    needs no statistics of the training texts.

    What stands between white space is one word if the file has it, such as "n't"; else it is split as by
    `Tokens`. A word that the file has only with capitals has that vector, one that it does not have is left
    out.

    Args:
        path: a text file with a line `word number number ...` for each word, also with .gz. A first line of
            two numbers, as fastText writes, is skipped.
    """

    path: str
    setting: ClassVar[str] = "vectors"

    @property
    def source(self) -> str:
        return os.path.abspath(user_path(self.path))

    @property
    def mark(self) -> str:
        status = self._file.stat()
        return f"words {SMOOTH} {self.source} {status.st_size} {status.st_mtime_ns}"

    @property
    def digest(self) -> str:
        return digest_of([self._file])

    def at(self, other: WordVectors) -> WordVectors:
        return other

    @property
    def width(self) -> int:
        for number, line in lines(self._file):
            if not is_header(number, line):
                return check_width(self._file, number, len(line.split()) - 1)
        raise DataError(f"{self._file}: {EMPTY}")

    @property
    def _file(self) -> Path:
        """The file. Raises DataError if it is missing."""
        path = user_path(self.path)
        if not path.is_file():
            found = "is a folder" if path.is_dir() else "no such file"
            raise DataError(f"dataset.vectors={self.path}: {found}; name a file of GloVe or fastText")
        return path

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        chunks = [normalised(text).split() for text in texts]
        every = {chunk for each in chunks for chunk in each}
        table = read(self._file, every.union(*(words(chunk) for chunk in every)))
        scale = math.log(table.size) + EULER
        weights = {word: SMOOTH / (SMOOTH + 1 / ((rank + 1) * scale)) for word, rank in table.ranks.items()}
        vectors, counts = np.zeros((len(texts), table.width)), np.zeros((len(texts), 2), np.int32)
        pieces = {chunk: [chunk] if chunk in weights else words(chunk) for chunk in every}
        for vector, count, each in zip(vectors, counts, chunks, strict=True):
            own = [word for chunk in each for word in pieces[chunk]]
            found = [word for word in own if word in weights]
            count[:] = len(own), len(own) - len(found)
            for word in found:
                vector += weights[word] / len(found) * table.vectors[word]
        return vectors.astype(np.float32), counts

    def remark(self, counts: Tensor) -> str:
        total, without = counts.sum(0).tolist()
        empty = int((counts[:, 0] == counts[:, 1]).sum())
        share = without / max(total, 1)
        return f"{share:.1%} of {total:,} words have no vector, nor has any word of {empty:,} texts"


@dataclass(frozen=True)
class Table:
    """The words of a file that were asked for.

    Args:
        vectors: of each word, float32 [width].
        ranks: the place of each word in the file, from 0.
        size: the number of words in the file.
        width: the size of a vector.
    """

    vectors: Mapping[str, np.ndarray]
    ranks: Mapping[str, int]
    size: int
    width: int


def read(path: Path, wanted: Collection[str]) -> Table:
    """The vectors of some words, which are in lower case. Raises DataError, naming the line."""
    vectors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    exact: set[str] = set()
    width = size = 0
    with Bar(f"read {path.name}", os.path.getsize(path), "bytes", transient=True) as bar:
        for number, line in lines(path, bar.advance):
            if is_header(number, line):
                continue
            width = width or check_width(path, number, len(line.split()) - 1)
            word, *cells = line.rsplit(" ", width)
            if len(cells) < width or (" " in word and is_number(word.rsplit(" ", 1)[1])):
                found = counted(len(line.split()) - 1, "number")
                raise DataError(f"{path}, line {number}: has {found}, and the lines before it {width}")
            lower = word.casefold()  # of words that differ in capitals, that without, else the first one
            if lower in wanted and (lower not in vectors or (word == lower and word not in exact)):
                vectors[lower], ranks[lower] = vector_of(path, number, cells), size
                exact |= {word} & {lower}
            size += 1
    if not size:
        raise DataError(f"{path}: {EMPTY}")
    return Table(vectors, ranks, size, width)


def lines(path: Path, advance: Callable[[int], object] = lambda count: None) -> Iterator[tuple[int, str]]:
    """The lines of a text file with their numbers, from 1, without empty ones; `advance(n)` after n bytes.

    Raises:
        DataError: the file cannot be read, or is not text.
    """
    number = done = 0
    try:
        with open(path, "rb") as raw, gzip.open(raw) if path.suffix == ".gz" else raw as stream:
            for number, line in enumerate(stream, 1):
                if number % LINES == 0:
                    advance(raw.tell() - done)
                    done = raw.tell()
                if text := line.decode().strip():
                    yield number, text
    except UnicodeDecodeError:
        raise DataError(
            f"{path}, line {number}: is not UTF-8 text; name a text file of word vectors"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)})") from None


def is_header(number: int, line: str) -> bool:
    """Whether a line is the first one of fastText, the numbers of words and of dimensions."""
    cells = line.split()
    return number == 1 and len(cells) == 2 and all(cell.isdecimal() for cell in cells)


def check_width(path: Path, line: int, width: int) -> int:
    """The number of numbers in a line. Raises DataError if there are none."""
    if width < 1:
        raise DataError(f"{path}, line {line}: has no numbers after the word; name a file of word vectors")
    return width


def is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def vector_of(path: Path, line: int, cells: Sequence[str]) -> np.ndarray:
    """The numbers in a line, float32 [width]. Raises DataError if one is none, or is not finite."""
    if wrong := [cell for cell in cells if not is_number(cell)]:
        raise DataError(
            f"{path}, line {line}: {wrong[0]!r} is not a finite number; correct or remove the line"
        )
    return np.array(cells, dtype=np.float32)
