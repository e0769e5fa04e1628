"""torchvision's downloadable image sets as few-shot datasets, through one adapter.

Few of them have a class split that the literature agrees on. Here the classes are split by the digests of
their names, see `split_by_digest`, into as many classes as the YAML file says: anyone can repeat that.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from metarun.datasets.base import ImageDataset, Split, at_least, select, split_by_digest
from metarun.datasets.images import Resize
from metarun.datasets.torchvision_files import Labelled, obtained
from metarun.errors import ConfigError
from metarun.reporting.console import Bar
from metarun.storage.cached_arrays import memmap_cached
from metarun.storage.files import data_dir, encoded, user_path
from metarun.tasks.class_store import ClassStore
from metarun.tasks.source import SPLITS

BLOCK = 256  # images submitted to the decoding threads at a time

# By name: torchvision's class, and the settings of the parts that the whole set consists of.
SETS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "aircraft": ("FGVCAircraft", [{"split": "trainval"}, {"split": "test"}]),
    "cifar10": ("CIFAR10", [{"train": True}, {"train": False}]),
    "dtd": ("DTD", [{"split": "train"}, {"split": "val"}, {"split": "test"}]),
    "emnist": ("EMNIST", [{"split": "letters", "train": True}, {"split": "letters", "train": False}]),
    "fashion_mnist": ("FashionMNIST", [{"train": True}, {"train": False}]),
    "flowers": ("Flowers102", [{"split": "train"}, {"split": "val"}, {"split": "test"}]),
    "gtsrb": ("GTSRB", [{"split": "train"}, {"split": "test"}]),
    "kmnist": ("KMNIST", [{"train": True}, {"train": False}]),
    "mnist": ("MNIST", [{"train": True}, {"train": False}]),
    "svhn": ("SVHN", [{"split": "train"}, {"split": "test"}]),
}
Name = Literal[
    "aircraft", "cifar10", "dtd", "emnist", "fashion_mnist", "flowers", "gtsrb", "kmnist", "mnist", "svhn"
]


class FromTorchvision(ImageDataset):
    """One of torchvision's image sets, its classes split as the module's docstring says.

    Args:
        name: which set.
        classes: how many classes to train on, to validate on and to test on.
        size, channels, resize: the images' size, grey or colour, and how they are made square.
        root: the folder with torchvision's files. None: METARUN_DATA/torchvision.
        download: whether missing files may be downloaded.

    Raises:
        ConfigError: `size` or `classes` are out of range.
    """

    def __init__(
        self,
        *,
        name: Name,
        classes: tuple[int, int, int],
        size: int,
        channels: Literal[1, 3] = 3,
        resize: Resize = "pad",
        root: str | None = None,
        download: bool = True,
    ) -> None:
        super().__init__(size, channels, resize)
        at_least(1, classes=list(classes))
        self.name, self.classes, self.root, self.download = name, classes, root, download

    def known_classes(self, split: Split) -> tuple[str, int]:
        return f"{self.name} {split}", self.classes[SPLITS.index(split)]

    def split(self, name: Split, device: torch.device | str = "cpu") -> ClassStore:
        """The classes of one split, sorted by name.

        Raises DataError if the files are missing or damaged, ConfigError if there are too few classes.
        """
        root = os.path.abspath(user_path(self.root)) if self.root else None
        key = f"1 {self.item_shape} {self.resize} {root}"  # 1: the version of the entry's content
        entry = f"{self.name}-{hashlib.sha256(encoded(key)).hexdigest()[:24]}"
        content, made = memmap_cached(
            entry, self._build, f"{self.name} {key}"
        )  # all classes; a split has some
        images, sha256 = content.view(-1, *self.item_shape), made["sha256"]
        whole = ClassStore(images, made["counts"], made["names"], self.name, fingerprint=sha256)
        wanted = self._chosen(whole.names, name)
        chosen, counts = select(whole, wanted)
        return ClassStore(chosen, counts, wanted, f"{self.name} {name}", device, fingerprint=sha256)

    def _chosen(self, names: Sequence[str], split: Split) -> list[str]:
        if sum(self.classes) > len(names):
            raise ConfigError(
                f"dataset.classes={list(self.classes)}: {self.name} has {len(names)} classes in all"
            )
        return split_by_digest(names, self.classes)[split]

    def _build(self, write: Callable[[bytes], object]) -> dict[str, Any]:
        """Write the images of every class, one class after the other; the classes' names and counts."""
        parts = self._parts()
        total = sum(len(part) for part in parts)
        pixels = np.empty((total, *self.item_shape), np.uint8)
        labels = np.empty(total, np.int64)
        with ThreadPoolExecutor(os.cpu_count()) as pool, Bar(f"decode {self.name}", total, "images") as bar:
            for place, (image, label) in enumerate(_items(parts, pool, self._pixels)):
                pixels[place], labels[place] = image, label
                bar.advance()
        numbers = sorted(set(labels.tolist()))
        titles = getattr(parts[0], "classes", None) or [str(number) for number in range(numbers[-1] + 1)]
        counts = []
        for number in numbers:
            own = pixels[labels == number]
            write(own.tobytes())
            counts.append(len(own))
        return {"names": [str(titles[number]) for number in numbers], "counts": counts}

    def _pixels(self, image: Image.Image) -> np.ndarray:
        return self.decoding.array(image, self.item_shape)

    def _parts(self) -> list[Labelled]:
        kind, settings = SETS[self.name]
        folder = user_path(self.root) if self.root else data_dir() / "torchvision"
        instead = "set dataset.root to the folder that has torchvision's files"
        return obtained(self.name, kind, settings, folder, self.download, self.root is None, instead)


def _items(
    parts: list[Labelled], pool: ThreadPoolExecutor, pixels: Callable[[Image.Image], np.ndarray]
) -> Iterator[tuple[np.ndarray, int]]:
    """Every image and the number of its class, in order, decoded by several threads."""
    for part in parts:

        def load(index: int, part: Labelled = part) -> tuple[np.ndarray, int]:
            image, label = part[index]
            return pixels(image), int(label)

        for start in range(0, len(part), BLOCK):
            yield from pool.map(load, range(start, min(start + BLOCK, len(part))))
