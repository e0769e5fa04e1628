"""Birds: CUB-200-2011 (Wah et al. 2011), 200 species with about 60 photographs each."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from metarun.datasets.base import ImageDataset, Split, and_more
from metarun.datasets.class_folders import Entry, class_store, entries, note_counts
from metarun.datasets.descriptions import numbers_of
from metarun.datasets.images import Resize
from metarun.errors import DataError
from metarun.reporting.console import inform
from metarun.storage.cached_arrays import extract_cached
from metarun.storage.downloads import download
from metarun.storage.files import data_dir, user_path
from metarun.tasks.class_store import ClassStore
from metarun.tasks.spec import TaskSpec

SPECIES = re.compile(r"(\d{3})\..+")  # 001.Black_footed_Albatross
ARCHIVE = "CUB_200_2011.tgz"
URL = f"https://data.caltech.edu/records/65de6-vp158/files/{ARCHIVE}"
# In the archive: for each species, how many percent of people saw each of 312 attributes, such as red wings.
ATTRIBUTES, COUNT = "class_attribute_labels_continuous.txt", 312
MD5 = "97eceeb196236b17998738112f37df78"


def split_of(number: int) -> Split:
    """The split of one of the species 1 to 200: of four in a row, two are for training.

    100, 50 and 50, as Chen et al. 2019 ("A Closer Look at Few-shot Classification") list them.
    """
    order: tuple[Split, ...] = ("train", "validation", "train", "test")
    return order[(number - 1) % 4]


class Cub(ImageDataset):
    """CUB-200-2011. The description of a species are its attributes, if their file is there.

    Args:
        root: a folder or zip with the species folders somewhere below it, the authors' archive, or a folder
            with that archive. None: the archive, downloaded to METARUN_DATA/cub if it is not there yet.
        size, resize: pixels a side, and how photographs are made square.
        download: whether the archive may be downloaded.

    Raises:
        ConfigError: `size` is out of range.
    """

    def __init__(
        self, *, root: str | None = None, size: int = 84, resize: Resize = "crop", download: bool = True
    ) -> None:
        super().__init__(size, resize=resize)
        self.root, self.download = root, download

    @property
    def spec(self) -> TaskSpec:
        return replace(super().spec, description=(COUNT,))

    def known_classes(self, split: Split) -> tuple[str, int]:
        return f"cub {split}", sum(split_of(number) == split for number in range(1, 201))

    def split(self, name: Split, device: torch.device | str = "cpu") -> ClassStore:
        """The species of one split, in the authors' order. Raises DataError if some are missing."""
        wanted = [number for number in range(1, 201) if split_of(number) == name]
        if missing := [f"{number:03}" for number in wanted if number not in self._files]:
            raise DataError(
                f"dataset.root={self.root}: no photographs of species {and_more(missing)}, "
                f"of the {len(wanted)} {name} species; put {URL} there, or leave dataset.root out"
            )
        classes = {self._files[number][0].parts[-2]: self._files[number] for number in wanted}
        about = None if self._attributes is None else self._attributes[[number - 1 for number in wanted]]
        store = class_store(self, f"cub {name}", classes, self._root(), device, about=about)
        return note_counts(store, 41, 60)

    @cached_property
    def _files(self) -> dict[int, list[Entry]]:
        """The photographs of each species, by its number."""
        return species(self._entries)

    @cached_property
    def _attributes(self) -> Tensor | None:
        """The attributes of all species in their order, [200, COUNT]; None if there is no such file."""
        entry = next((each for each in self._entries if each.parts[-1] == ATTRIBUTES), None)
        if entry is None:
            return None
        lines = entry.read().decode(errors="replace").splitlines()
        rows = [numbers_of(line.split(), f"{entry}, line {i}") for i, line in enumerate(lines, 1)]
        if len(rows) != 200 or {len(row) for row in rows} != {COUNT}:
            raise DataError(f"{entry}: has not 200 lines of {COUNT} numbers; replace it by that of {URL}")
        return torch.tensor(rows)

    @cached_property
    def _entries(self) -> list[Entry]:
        """All files, of the archive if the root has no photographs."""
        root = self._root()
        archive = root if root.name.endswith((".tgz", ".tar.gz", ".tar")) else root / ARCHIVE
        files = [] if archive == root else entries(root)
        if species(files):
            return files
        if not archive.is_file():
            raise DataError(
                f"dataset.root={self.root}: has neither species folders nor {ARCHIVE}; "
                f"put {URL} there, or leave dataset.root out"
            )
        md5 = MD5 if archive.name == ARCHIVE else None  # an archive of another name was packed by the user
        work = f"check and unpack {archive} into the cache"
        return entries(extract_cached(archive, "cub", lambda: inform(work), md5))

    def _root(self) -> Path:
        return user_path(self.root) if self.root else self._downloaded()

    def _downloaded(self) -> Path:
        archive = data_dir() / "cub" / ARCHIVE
        if not (self.download or archive.exists()):
            raise DataError(
                f"CUB-200-2011 is not at {archive}, and dataset.download=false: put {URL} there, "
                "or set dataset.root to the folder that has it"
            )
        download(URL, archive, MD5)
        return archive


def species(files: list[Entry]) -> dict[int, list[Entry]]:
    """The photographs in species folders, by the species' number."""
    found: dict[int, list[Entry]] = {}
    for entry in files:
        name = SPECIES.fullmatch(entry.parts[-2]) if len(entry.parts) > 1 else None
        if name and entry.parts[-1].lower().endswith((".jpg", ".jpeg")):  # segmentations are PNG
            found.setdefault(int(name[1]), []).append(entry)
    return found
