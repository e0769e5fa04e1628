"""torchvision's downloadable image sets as few-shot datasets, through one adapter.

Few of them have a class split in the literature that everyone uses; here the classes are ordered
by the SHA-256 digests of their names and cut at the numbers the YAML gives, the first of them to
test on. The rule and the numbers are all there is to it, so that anyone can repeat it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from metarun import images
from metarun.datasets.class_folders import Fit
from metarun.datasets.torchvision_files import Labelled, obtained
from metarun.entries import memmap_cached
from metarun.episodes import ClassStore
from metarun.errors import ConfigError
from metarun.files import data_dir, encoded
from metarun.tracking import Bar

BLOCK = 256  # images decoded before they are put in place

# name: torchvision's class, and the settings of the parts that together are the whole set
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


class FromTorchvision:
    """The set `name`, its classes split into train, validation and test; see the module's docstring.

    `classes`: how many classes each split has. `root`: where torchvision keeps its files; None:
    METARUN_DATA/torchvision.
    """

    drawings = False

    def __init__(
        self,
        *,
        name: Name,
        classes: tuple[int, int, int],
        size: int,
        channels: Literal[1, 3] = 3,
        fit: Fit = "pad",
        root: str | None = None,
        download: bool = True,
    ) -> None:
        if name not in SETS:
            raise ConfigError(f"dataset.name={name}: choose one of {', '.join(SETS)}")
        if size < 1 or min(classes) < 1:
            raise ConfigError(f"dataset.size={size}, dataset.classes={list(classes)}: must be at least 1")
        self.name, self.classes, self.size, self.channels = name, tuple(classes), size, channels
        self.fit, self.root, self.download = fit, root, download

    @property
    def item_shape(self) -> tuple[int, int, int]:
        return (self.channels, self.size, self.size)

    def split(
        self, name: Literal["train", "validation", "test"], device: torch.device | str = "cpu"
    ) -> ClassStore:
        """The classes of one split, sorted by name. Raises DataError if the files are missing."""
        root = os.path.abspath(Path(self.root).expanduser()) if self.root else None
        key = f"1 {self.item_shape} {self.fit} {root}"  # the 1 counts changes of what is decoded
        entry = f"{self.name}-{hashlib.sha256(encoded(key)).hexdigest()[:24]}"
        content, made = memmap_cached(
            entry, self._build, f"{self.name} {key}"
        )  # all classes; a split is some of them
        names, counts = made["names"], made["counts"]
        wanted = self._chosen(names, name)
        parts = dict(zip(names, content.view(-1, *self.item_shape).split(counts), strict=True))
        chosen = torch.cat([parts[each] for each in wanted])
        return ClassStore(
            chosen,
            [len(parts[each]) for each in wanted],
            wanted,
            f"{self.name} {name}",
            device,
            fingerprint=made["sha256"],
        )

    def _chosen(self, names: list[str], split: str) -> list[str]:
        train, validation, test = self.classes
        if sum(self.classes) > len(names):
            raise ConfigError(
                f"dataset.classes={list(self.classes)}: {self.name} has {len(names)} classes in all"
            )
        order = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
        cuts = {
            "test": order[:test],
            "validation": order[test : test + validation],
            "train": order[test + validation : test + validation + train],
        }
        return sorted(cuts[split])

    def _build(self, write: Callable[[bytes], object]) -> dict[str, Any]:
        """Every image, class after class."""
        parts = self._parts()
        total = sum(len(part) for part in parts)
        pixels = torch.empty(total, *self.item_shape, dtype=torch.uint8)
        labels = torch.empty(total, dtype=torch.long)
        with ThreadPoolExecutor(os.cpu_count()) as pool, Bar(f"decode {self.name}", total, "images") as bar:
            for place, (image, label) in enumerate(_items(parts, pool, self._pixels)):
                pixels[place], labels[place] = image, label
                bar.advance()
        numbers = sorted(set(labels.tolist()))
        titles = getattr(parts[0], "classes", None) or [str(number) for number in range(numbers[-1] + 1)]
        counts = []
        for number in numbers:
            own = pixels[labels == number]
            write(own.numpy().tobytes())
            counts.append(len(own))
        return {"names": [str(titles[number]) for number in numbers], "counts": counts}

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        flat = images.flatten(image).convert("L" if self.channels == 1 else "RGB")
        array = torch.from_numpy(images.fit(flat, self.size, self.size, self.fit).copy())
        return array.unsqueeze(0) if self.channels == 1 else array.permute(2, 0, 1)

    def _parts(self) -> list[Labelled]:
        kind, settings = SETS[self.name]
        folder = Path(self.root).expanduser() if self.root else data_dir() / "torchvision"
        instead = "set dataset.root to the folder that has torchvision's files"
        return obtained(self.name, kind, settings, folder, self.download, self.root is None, instead)


def _items(
    parts: list[Labelled], pool: ThreadPoolExecutor, pixels: Callable[[Image.Image], torch.Tensor]
) -> Iterator[tuple[torch.Tensor, int]]:
    """Every image, decoded by several threads, and its class, in order."""
    for part in parts:

        def load(index: int, part: Labelled = part) -> tuple[torch.Tensor, int]:
            image, label = part[index]
            return pixels(image), int(label)

        for start in range(0, len(part), BLOCK):
            yield from pool.map(load, range(start, min(start + BLOCK, len(part))))
