"""Birds: CUB-200-2011 (Wah et al. 2011), 200 species with about 60 photographs each."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path

import torch

from metarun.datasets.base import ImageDataset, Split, and_more
from metarun.datasets.class_folders import Entry, class_store, entries, note_counts
from metarun.datasets.images import Resize
from metarun.errors import DataError
from metarun.reporting.console import inform
from metarun.storage.cached_arrays import extract_cached
from metarun.storage.downloads import download
from metarun.storage.files import data_dir, user_path
from metarun.tasks.class_store import ClassStore

SPECIES = re.compile(r"(\d{3})\..+")  # 001.Black_footed_Albatross
ARCHIVE = "CUB_200_2011.tgz"
URL = f"https://data.caltech.edu/records/65de6-vp158/files/{ARCHIVE}"
MD5 = "97eceeb196236b17998738112f37df78"


def split_of(number: int) -> Split:
    """The split of one of the species 1 to 200: of four in a row, two are for training.

    100, 50 and 50, as Chen et al. 2019 ("A Closer Look at Few-shot Classification") list them.
    """
    order: tuple[Split, ...] = ("train", "validation", "train", "test")
    return order[(number - 1) % 4]


class Cub(ImageDataset):
    """CUB-200-2011.

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

    def split(self, name: Split, device: torch.device | str = "cpu") -> ClassStore:
        """The species of one split, in the authors' order. Raises DataError if some are missing."""
        wanted = [number for number in range(1, 201) if split_of(number) == name]
        if missing := [f"{number:03}" for number in wanted if number not in self._files]:
            raise DataError(
                f"dataset.root={self.root}: no photographs of species {and_more(missing)}, "
                f"of the {len(wanted)} {name} species; put {URL} there, or leave dataset.root out"
            )
        classes = {self._files[number][0].parts[-2]: self._files[number] for number in wanted}
        return note_counts(class_store(self, f"cub {name}", classes, self._root(), device), 41, 60)

    @cached_property
    def _files(self) -> dict[int, list[Entry]]:
        """The photographs of each species, by its number."""
        root = self._root()
        archive = root if root.name.endswith((".tgz", ".tar.gz", ".tar")) else root / ARCHIVE
        if found := {} if archive == root else species(entries(root)):
            return found
        if not archive.is_file():
            raise DataError(
                f"dataset.root={self.root}: has neither species folders nor {ARCHIVE}; "
                f"put {URL} there, or leave dataset.root out"
            )
        md5 = MD5 if archive.name == ARCHIVE else None  # an archive of another name was packed by the user
        work = f"check and unpack {archive} into the cache"
        return species(entries(extract_cached(archive, "cub", lambda: inform(work), md5)))

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
