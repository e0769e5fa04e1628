"""CIFAR-FS and FC100: CIFAR-100's 60,000 images (Krizhevsky 2009), its classes split in two ways."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch

from metarun.datasets.base import ImageDataset, Split, and_more
from metarun.datasets.class_folders import Entry, class_store, entries, note_counts
from metarun.datasets.torchvision_files import obtained
from metarun.errors import DataError
from metarun.storage.cached_arrays import memmap_cached
from metarun.storage.files import data_dir, user_path
from metarun.tasks.class_store import ClassStore


class Label(NamedTuple):
    name: str
    superclass: str
    cifar_fs: str  # its split in CIFAR-FS
    fc100: str  # its split in FC100


@cache
def labels() -> list[Label]:
    """The 100 classes in the order of their numbers."""
    lines = Path(__file__).with_name("cifar100_classes.txt").read_text("utf-8").splitlines()
    return [Label(*line.split()) for line in lines if not line.startswith("#")]


class Cifar100(ImageDataset):
    """A class split of CIFAR-100, 600 images of 3x32x32 a class.

    Args:
        root: a folder or zip below which there are folders named after the classes, in zips or not. The
            folders above them may have any name. None: torchvision's download.
        download: whether CIFAR-100 may be downloaded.
    """

    name: ClassVar[str]  # cifar_fs or fc100

    def __init__(self, *, root: str | None = None, download: bool = True) -> None:
        super().__init__(size=32)
        self.root, self.download = root, download

    def known_classes(self, split: Split) -> tuple[str, int]:
        return f"{self.name} {split}", len(self._wanted(split))

    def _wanted(self, split: Split) -> list[str]:
        return sorted(label.name for label in labels() if getattr(label, self.name) == split)

    def split(self, name: Split, device: torch.device | str = "cpu") -> ClassStore:
        """The classes of one split, sorted by name. Raises DataError if images are missing or damaged."""
        wanted = self._wanted(name)
        title = f"{self.name} {name}"
        if self.root is None:
            return self._downloaded(title, wanted, device)
        if missing := [each for each in wanted if each not in self._files]:
            raise DataError(
                f"dataset.root={self.root}: no images of {and_more(missing)}, of the {len(wanted)} classes "
                f"of {title}: every class needs a folder of its name there, or leave dataset.root out"
            )
        files = {each: self._files[each] for each in wanted}
        return note_counts(class_store(self, title, files, Path(self.root), device), 600, 600)

    @cached_property
    def _files(self) -> dict[str, list[Entry]]:
        assert self.root is not None
        return class_files(user_path(self.root))

    def _downloaded(self, title: str, wanted: list[str], device: torch.device | str) -> ClassStore:
        numbers = {label.name: number for number, label in enumerate(labels())}

        def build(write: Callable[[bytes], object]) -> dict[str, Any]:
            images, targets = cifar100(self.download)
            counts = []
            for each in wanted:
                own = images[targets == numbers[each]]
                write(own.numpy().tobytes())
                counts.append(len(own))
            return {"counts": counts}

        cached_as = title.replace(" ", "-")
        digest = hashlib.sha256(b"torchvision 1").hexdigest()[:24]  # 1: the version of the entry's content
        content, made = memmap_cached(f"{cached_as}-{digest}", build, f"{cached_as} torchvision")
        images = content.view(-1, *self.item_shape)
        return ClassStore(images, made["counts"], wanted, title, device, fingerprint=made["sha256"])


class CifarFS(Cifar100):
    """CIFAR-FS: 64, 16 and 20 classes at random (Bertinetto et al. 2019)."""

    name = "cifar_fs"


class FC100(Cifar100):
    """FC100: 60, 20 and 20 classes of 12, 4 and 4 superclasses (Oreshkin et al. 2018)."""

    name = "fc100"


def class_files(root: Path) -> dict[str, list[Entry]]:
    """Images in folders named after one of the 100 classes, by that name."""
    names = {label.name for label in labels()}
    found: dict[str, list[Entry]] = {}
    for entry in entries(root):
        if len(entry.parts) > 1 and entry.parts[-2] in names:
            found.setdefault(entry.parts[-2], []).append(entry)
    return found


def cifar100(download: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """All 60,000 images [60000, 3, 32, 32] uint8 and their class numbers, verified by torchvision."""
    from torchvision.datasets import CIFAR100

    folder = data_dir() / "cifar100"
    instead = f"put {CIFAR100.url} there, or set dataset.root to a folder of class folders"
    settings = [{"train": True}, {"train": False}]
    parts: list[Any] = obtained("CIFAR-100", "CIFAR100", settings, folder, download, True, instead)
    images = torch.cat([torch.from_numpy(part.data) for part in parts]).permute(0, 3, 1, 2).contiguous()
    return images, torch.cat([torch.tensor(part.targets) for part in parts])
