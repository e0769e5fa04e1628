"""miniImageNet: not redistributable, so users supply their own copy.

100 classes of ImageNet with 600 images each (Vinyals et al. 2016), split 64, 16 and 20 by Ravi and
Larochelle (2017).
"""

from __future__ import annotations

import csv
import io
import re
from functools import cache, cached_property
from pathlib import Path
from typing import ClassVar, cast

import torch

from metarun.datasets.base import ImageDataset, Split, and_more
from metarun.datasets.class_folders import Entry, class_store, entries, note_counts
from metarun.datasets.images import Resize
from metarun.errors import DataError
from metarun.storage.files import user_path
from metarun.tasks.class_store import ClassStore

WNID = re.compile(r"n\d{8}")
PICKLES = (".pkl", ".pickle", ".npz", ".npy")


@cache
def class_split(name: str = "mini_imagenet") -> dict[Split, list[str]]:
    """The WordNet ids of each split, sorted."""
    parts: dict[Split, list[str]] = {"train": [], "validation": [], "test": []}
    for line in Path(__file__).with_name(f"{name}_classes.txt").read_text("utf-8").splitlines():
        if not line.startswith("#"):
            wnid, split = line.split()
            parts[cast(Split, split)].append(wnid)
    return parts


class MiniImageNet(ImageDataset):
    """miniImageNet, in any of the common layouts.

    An image's class is a WordNet id: the name of its folder, or the label of its file name in the CSV
    files, or the beginning of the file name.

    Args:
        root: the folder or zip with the images, see `layouts`.
        size, resize: pixels a side, and how images of another size are resized; by default stretched,
            as in the authors' preparation.

    Raises:
        ConfigError: `size` is out of range.
    """

    name: ClassVar[str] = "mini_imagenet"
    images_per_class: ClassVar[tuple[int, int]] = (600, 600)  # the least and the most
    layouts: ClassVar[str] = (
        "it may hold train, val and test folders of class folders named by WordNet id (n01532829), or one "
        "folder of all images and train.csv, val.csv and test.csv, or zips of either"
    )

    def __init__(self, *, root: str, size: int = 84, resize: Resize = "stretch") -> None:
        super().__init__(size, resize=resize)
        self.root = root
        self._lists: set[str] = set()  # names of the CSV files found

    def known_classes(self, split: Split) -> tuple[str, int]:
        return f"{self.name} {split}", len(class_split(self.name)[split])

    def split(self, name: Split, device: torch.device | str = "cpu") -> ClassStore:
        """The classes of one split, sorted by WordNet id. Raises DataError if some are missing."""
        wanted = class_split(self.name)[name]
        if missing := [wnid for wnid in wanted if wnid not in self._files]:
            own = "val.csv" if name == "validation" else f"{name}.csv"
            unlisted = self._lists and own not in self._lists
            why = f"{own} is missing beside {min(self._lists)}, so " if unlisted else ""
            raise DataError(
                f"dataset.root={self.root}: {why}no images of class {and_more(missing)}, "
                f"of the {len(wanted)} {name} classes; {self.layouts}"
            )
        classes = {wnid: self._files[wnid] for wnid in wanted}
        store = class_store(self, f"{self.name} {name}", classes, Path(self.root), device)
        return note_counts(store, *self.images_per_class)

    @cached_property
    def _files(self) -> dict[str, list[Entry]]:
        """The images of each class, by WordNet id."""
        files = entries(user_path(self.root))
        listed = self._listed(files)
        found: dict[str, list[Entry]] = {}
        for entry in files:
            if (wnid := self._class_of(entry, listed)) is not None:
                found.setdefault(wnid, []).append(entry)
        seen = {entry.parts[-1] for images in found.values() for entry in images}
        if missing := sorted(listed.keys() - seen):
            raise DataError(
                f"dataset.root={self.root}: {missing[0]} is in a CSV file and not among the images "
                f"({len(missing):,} of {len(listed):,} such); {self.layouts}"
            )
        pickles = [entry for entry in files if entry.parts[-1].lower().endswith(PICKLES)]
        if pickles and not found:
            raise DataError(
                f"{pickles[0]}: a pickle, which could run any program when read, so metarun does not read "
                "it; get or export the images themselves, as class folders of files"
            )
        return found

    @staticmethod
    def _class_of(entry: Entry, listed: dict[str, str]) -> str | None:
        name = entry.parts[-1]
        if not name.lower().endswith((".jpg", ".jpeg", ".png")):
            return None
        if len(entry.parts) > 1 and WNID.fullmatch(entry.parts[-2]):
            return entry.parts[-2]
        if listed:
            return listed.get(name)
        start = WNID.match(name)
        return start.group() if start else None

    def _listed(self, files: list[Entry]) -> dict[str, str]:
        """The WordNet id of each file name in the CSV files."""
        listed: dict[str, str] = {}
        for entry in files:
            if entry.parts[-1] not in ("train.csv", "val.csv", "test.csv"):
                continue
            self._lists.add(entry.parts[-1])
            text = entry.read().decode("utf-8-sig", "replace")  # spreadsheets write a byte order mark
            try:
                reader = csv.DictReader(io.StringIO(text))
                rows = list(reader)
            except csv.Error as error:
                raise DataError(f"{entry}: cannot be read as a CSV file ({error}); get it again") from error
            if not {"filename", "label"} <= set(reader.fieldnames or []):
                raise DataError(
                    f"{entry}: needs the columns filename and label, as Ravi and Larochelle's lists have"
                )
            listed |= {row["filename"]: row["label"] for row in rows}
        return listed
