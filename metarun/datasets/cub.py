"""Birds: CUB-200-2011 (Wah et al. 2011), 200 species with about 60 photographs each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import torch

from metarun.datasets.class_folders import Entry, Fit, class_store, entries, tell_counts
from metarun.downloads import download
from metarun.entries import extract_cached
from metarun.episodes import ClassStore
from metarun.errors import ConfigError, DataError
from metarun.files import data_dir
from metarun.tracking import notes, say

SPECIES = re.compile(r"(\d{3})\..+")  # 001.Black_footed_Albatross
ARCHIVE = "CUB_200_2011.tgz"
URL = f"https://data.caltech.edu/records/65de6-vp158/files/{ARCHIVE}"
MD5 = "97eceeb196236b17998738112f37df78"


def split_of(number: int) -> str:
    """The split of species 1 to 200: every second one, then every fourth.

    100, 50 and 50, as Chen et al. 2019 ("A Closer Look at Few-shot Classification") list them.
    """
    return ("train", "validation", "train", "test")[(number - 1) % 4]


class Cub:
    """CUB-200-2011 below `root`: species folders, in a zip or not, or the authors' archive.

    None: that archive, downloaded to METARUN_DATA/cub where it is not there yet.
    """

    drawings = False

    def __init__(
        self, *, root: str | None = None, size: int = 84, fit: Fit = "crop", download: bool = True
    ) -> None:
        if size < 1:
            raise ConfigError(f"dataset.size={size}: choose a whole number of pixels, such as 84")
        self.root, self.size, self.fit, self.download = root, size, fit, download
        self._files: dict[int, list[Entry]] | None = None

    @property
    def item_shape(self) -> tuple[int, int, int]:
        return (3, self.size, self.size)

    def split(
        self, name: Literal["train", "validation", "test"], device: torch.device | str = "cpu"
    ) -> ClassStore:
        """The species of one split, in the authors' order. Raises DataError, saying what is missing."""
        if self._files is None:
            self._files = self._find()
        wanted = [number for number in range(1, 201) if split_of(number) == name]
        if missing := [number for number in wanted if number not in self._files]:
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise DataError(
                f"dataset.root={self.root}: no photographs of species {missing[0]:03}{others}, "
                f"of the {len(wanted)} {name} species; put {URL} there, or leave dataset.root out"
            )
        classes = {self._files[number][0].parts[-2]: self._files[number] for number in wanted}
        store = class_store(f"cub {name}", classes, self._root(), self.item_shape, device, self.fit)
        return tell_counts(store, 41, 60)

    def _find(self) -> dict[int, list[Entry]]:
        root = self._root()
        archive = root if root.name.endswith((".tgz", ".tar.gz", ".tar")) else root / ARCHIVE
        if found := {} if archive == root else species(entries(root)):
            return found
        if not archive.is_file():
            raise DataError(
                f"dataset.root={self.root}: has neither species folders nor {ARCHIVE}; "
                f"put {URL} there, or leave dataset.root out"
            )
        md5 = MD5 if archive.name == ARCHIVE else None  # what a user packed has another name
        tell = f"check and unpack {archive} into the cache"
        return species(entries(extract_cached(archive, "cub", lambda: say(notes, tell), md5)))

    def _root(self) -> Path:
        return Path(self.root).expanduser() if self.root else self._downloaded()

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
    """Photographs by the number of the species whose folder they are in."""
    found: dict[int, list[Entry]] = {}
    for entry in files:
        name = SPECIES.fullmatch(entry.parts[-2]) if len(entry.parts) > 1 else None
        if name and entry.parts[-1].lower().endswith((".jpg", ".jpeg")):  # segmentations are PNG
            found.setdefault(int(name[1]), []).append(entry)
    return found
