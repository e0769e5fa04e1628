"""miniImageNet, from files a user has: nobody may hand it out.

100 classes of ImageNet with 600 images each (Vinyals et al. 2016), split 64, 16 and 20 by Ravi and
Larochelle (2017).
"""

from __future__ import annotations

import csv
import io
import re
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

import torch

from metarun.datasets.base import Dataset
from metarun.datasets.class_folders import Entry, Fit, class_store, entries, tell_counts
from metarun.errors import ConfigError, DataError
from metarun.tasks.class_store import ClassStore

WNID = re.compile(r"n\d{8}")
PICKLES = (".pkl", ".pickle", ".npz", ".npy")


@cache
def class_split(name: str = "mini_imagenet") -> dict[str, list[str]]:
    """The WordNet ids of each split, sorted."""
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for line in Path(__file__).with_name(f"{name}_classes.txt").read_text("utf-8").splitlines():
        if not line.startswith("#"):
            wnid, split = line.split()
            parts[split].append(wnid)
    return parts


class MiniImageNet(Dataset):
    """miniImageNet below `root`, in any of the layouts people have it in.

    A class is a WordNet id: the name of the folder an image is in, or what the CSV files say of
    its file name, or what that begins with. Images of another size are stretched to `size`,
    as in the authors' preparation.
    """

    drawings = False
    name: ClassVar[str] = "mini_imagenet"
    a_class: ClassVar[tuple[int, int]] = (600, 600)  # images of each
    layouts: ClassVar[str] = (
        "it may hold train, val and test folders of class folders named by WordNet id (n01532829), or one "
        "folder of all images and train.csv, val.csv and test.csv, or zips of either"
    )

    def __init__(self, *, root: str, size: int = 84, fit: Fit = "stretch") -> None:
        if size < 1:
            raise ConfigError(f"dataset.size={size}: choose a whole number of pixels, such as 84")
        self.root, self.size, self.fit = root, size, fit
        self._files: dict[str, list[Entry]] | None = None
        self._lists: set[str] = set()  # the CSV files that are there

    @property
    def item_shape(self) -> tuple[int, int, int]:
        return (3, self.size, self.size)

    def split(
        self, name: Literal["train", "validation", "test"], device: torch.device | str = "cpu"
    ) -> ClassStore:
        """The classes of one split, by WordNet id. Raises DataError, saying what is missing."""
        if self._files is None:
            self._files = self._find()
        wanted = class_split(self.name)[name]
        if missing := [wnid for wnid in wanted if wnid not in self._files]:
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            own = {"validation": "val"}.get(name, name) + ".csv"
            lacks = self._lists and own not in self._lists
            why = f"{own} is missing beside {min(self._lists)}, so " if lacks else ""
            raise DataError(
                f"dataset.root={self.root}: {why}no images of class {missing[0]}{others}, "
                f"of the {len(wanted)} {name} classes; {self.layouts}"
            )
        store = class_store(
            f"{self.name} {name}",
            {wnid: self._files[wnid] for wnid in wanted},
            Path(self.root),
            self.item_shape,
            device,
            self.fit,
        )
        return tell_counts(store, *self.a_class)

    def _find(self) -> dict[str, list[Entry]]:
        files = entries(Path(self.root).expanduser())
        listed = self._listed(files)
        found: dict[str, list[Entry]] = {}
        seen = set()
        for entry in files:
            name = entry.parts[-1]
            if (wnid := self._class_of(entry, listed)) is not None:
                found.setdefault(wnid, []).append(entry)
                seen.add(name)
        if listed and (lacking := sorted(listed.keys() - seen)):
            raise DataError(
                f"dataset.root={self.root}: {lacking[0]} is in a CSV file and not among the images "
                f"({len(lacking):,} of {len(listed):,} such); {self.layouts}"
            )
        pickles = [entry for entry in files if entry.parts[-1].lower().endswith(PICKLES)]
        if pickles and not found:
            raise DataError(
                f"{pickles[0]}: a pickle, which could run any program when read, so metarun reads none; "
                "get or export the images themselves, as class folders of files"
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
        """What the CSV files say: file name to WordNet id."""
        listed: dict[str, str] = {}
        for entry in files:
            if entry.parts[-1] not in ("train.csv", "val.csv", "test.csv"):
                continue
            self._lists.add(entry.parts[-1])
            text = entry.read().decode("utf-8-sig", "replace")  # spreadsheets put a mark before it
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
