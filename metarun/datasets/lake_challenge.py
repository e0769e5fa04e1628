"""The challenge of Omniglot's authors: 20 published tasks of one-shot classification within an alphabet.

Lake, Salakhutdinov and Tenenbaum, "Human-level concept learning through probabilistic program induction",
Science 2015, and "The Omniglot challenge: a 3-year progress report", Current Opinion in Behavioral Sciences
2019; https://github.com/brendenlake/omniglot, MIT licence. Each task (a "run") has a drawing of each of 20
characters of an alphabet by one person, and the same 20 characters by another person, to be recognised.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from metarun.datasets.class_folders import Entry, entries
from metarun.datasets.omniglot import URL, characters
from metarun.errors import DataError
from metarun.storage.downloads import download
from metarun.storage.files import data_dir, user_path

ARCHIVE = f"{URL}/one-shot-classification/all_runs.zip"
SHA256 = "437c1eeab0af8484112e1b4cc0f3d541ec727f7c47b9b202da738af9dfd6c325"
RUN = re.compile(r"run\d+")
LABELS = "class_labels.txt"
TASKS, WAYS = 20, 20


class Run(NamedTuple):
    """One task: a drawing of each class, and the drawings to predict with the numbers of their classes."""

    name: str
    classes: list[str]
    support: list[Entry]
    query: list[Entry]
    labels: list[int]


def runs(root: str | None, may_download: bool = True) -> list[Run]:
    """The tasks of the challenge.

    Args:
        root: all_runs.zip, the unpacked runs, or the folder with either. None: the authors' zip, downloaded
            to METARUN_DATA/omniglot if it is not there yet.
        may_download: whether a missing zip may be downloaded.

    Raises:
        DataError: files are missing, or damaged.
    """
    place = where(root, may_download)
    found: dict[tuple[str, ...], dict[str, Entry]] = {}
    for entry in entries(place):
        depth = next((i for i, part in enumerate(entry.parts[:-1], 1) if RUN.fullmatch(part)), None)
        if depth is not None:
            found.setdefault(entry.parts[:depth], {})["/".join(entry.parts[depth:])] = entry
    if not found:
        raise DataError(
            f"{place}: has no folders run01, run02, ... with {LABELS}: put all_runs.zip of {ARCHIVE} there, "
            "or leave dataset.root out"
        )
    return [run_of(place, "/".join(parts), files) for parts, files in found.items()]


def where(root: str | None, may_download: bool) -> Path:
    """The zip or the folder of the tasks, downloaded if that is allowed. Raises DataError."""
    if root is not None:
        folder = user_path(root)
        return next(
            (path for path in (folder / "all_runs.zip", folder / "all_runs") if path.exists()), folder
        )
    path = data_dir() / "omniglot" / "all_runs.zip"
    if not (path.exists() or may_download):
        raise DataError(
            f"Lake's challenge: there is no {path}: put it there from {ARCHIVE}, or set "
            "dataset.download=true, or dataset.root to the folder that has it"
        )
    download(ARCHIVE, path, SHA256)
    return path


def run_of(place: Path, name: str, files: dict[str, Entry]) -> Run:
    """The task in the files of one run, by their paths in it. Raises DataError."""
    where = f"{place}: {name}"
    if LABELS not in files:
        raise DataError(f"{where} has no {LABELS}: get {ARCHIVE} again")
    support = drawings(files, "training")
    query = drawings(files, "test")
    if len(support) < 2 or not query:
        missing = "queries (images in test)" if support else "classes (images in training)"
        raise DataError(f"{where} has too few {missing}: get {ARCHIVE} again")
    given: dict[str, str] = {}
    for number, line in enumerate(text_of(files[LABELS]).split("\n"), 1):
        if not line.strip():
            continue
        pair = ["/".join(path.split("/")[-2:]) for path in line.split()]
        if len(pair) != 2 or pair[0] not in query or pair[1] not in support or pair[0] in given:
            raise DataError(
                f"{files[LABELS]}, line {number}: {line.strip()[:80]!r} does not name a test image and its "
                "training image, as in 'run01/test/item01.png run01/training/class08.png': get "
                f"{ARCHIVE} again"
            )
        given[pair[0]] = pair[1]
    if absent := [path for path in query if path not in given]:
        raise DataError(f"{files[LABELS]}: has no class for {absent[0]}: get {ARCHIVE} again")
    order = list(support)
    labels = [order.index(given[path]) for path in query]
    classes = [path.rpartition("/")[2].removesuffix(".png") for path in order]
    return Run(name, classes, list(support.values()), list(query.values()), labels)


def drawings(files: dict[str, Entry], folder: str) -> dict[str, Entry]:
    """The images of one folder of a run."""
    return {path: file for path, file in sorted(files.items()) if re.fullmatch(rf"{folder}/[^/]+\.png", path)}


def text_of(entry: Entry) -> str:
    """The text of a small file. Raises DataError."""
    try:
        return entry.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{entry}: is not UTF-8 text: get {ARCHIVE} again") from None


def evaluation_classes(names: Iterable[str]) -> list[str]:
    """Those names of classes that name a character or an alphabet of the evaluation set."""
    alphabets = {c.name.partition("/")[0] for c in characters() if c.piece == "images_evaluation"}
    return [name for name in names if alphabets & set(name.partition("@")[0].split("/"))]
