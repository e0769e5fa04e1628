"""A user's own images as a dataset: one folder of classes, or train, val and test folders of them."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from metarun.datasets.base import (
    LEAST_CLASSES,
    ImageDataset,
    Split,
    Unreadable,
    and_more,
    at_least,
    check_shares,
    split_by_rule,
)
from metarun.datasets.class_folders import Entry, class_store, classes_of, entries
from metarun.datasets.descriptions import described
from metarun.datasets.images import Resize
from metarun.datasets.preparation import Background, InkSetting, Preparation
from metarun.errors import ConfigError, DataError
from metarun.reporting.console import inform
from metarun.storage.files import user_path
from metarun.tasks.class_store import ClassStore

SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("val", "validation", "valid"),
    "test": ("test",),
}
SPLIT_OF = {name: split for split, names in SPLIT_FOLDERS.items() for name in names}
Classes = dict[str, list[Entry]]  # the images of each class, by its name


class ImageFolder(ImageDataset):
    """Images of any size and mode in class folders.

    If `root` has folders `train`, `val` and `test` of class folders, or some of them, they are the splits.
    Otherwise the class folders below `root` are split by the digests of their names, see `split_by_digest`;
    fewer than 6 classes are all test classes.

    Args:
        root: a folder or a zip.
        depth: how many folders below `root`, or below a split's folder, the class folders are, at least 1.
            A class has all images below its folder, and the name of the path to it.
        size, channels: the images' size, grey or colour.
        resize, ink, background, white: see `Preparation`; decided over the images of all splits. What is
            None is as in the training of the model that is evaluated, if there is one.
        unreadable: "stop" raises DataError at a file that is not an image, "skip" leaves it out with a
            warning.
        validation, test: the shares of the classes to validate and to test on, above 0 and less than 1
            together; used where `root` has no folder `train`.
        descriptions: a table with a description of each class, see `descriptions.read_table`.
        seed: another one gives another split.

    Raises:
        ConfigError: `size` or the shares are out of range.
    """

    def __init__(
        self,
        *,
        root: str,
        size: int = 84,
        channels: Literal[1, 3] = 3,
        resize: Resize | None = None,
        ink: InkSetting | None = None,
        background: Background | None = None,
        white: float | None = None,
        unreadable: Unreadable = "stop",
        validation: float = 0.2,
        test: float = 0.2,
        seed: int = 0,
        depth: int = 1,
        descriptions: str | None = None,
    ) -> None:
        super().__init__(size, channels, resize or "pad")
        check_shares(validation, test)
        at_least(1, depth=depth)
        self.root, self.unreadable, self.depth = root, unreadable, depth
        self.descriptions = descriptions
        self.shares, self.seed = (validation, test), seed
        self._too_few = 0  # the number of classes, where they are too few for three splits
        if white is not None and not 0 < white < math.inf:
            raise ConfigError(f"dataset.white={white}: choose a number above 0, such as 255 or 4095")
        self._wanted = Preparation(resize, ink, background, white)
        self._decoding: Preparation | None = None

    @property
    def drawings(self) -> bool:  # type: ignore[override]
        return self._wanted.draws

    @property
    def preparation(self) -> Preparation:
        return self._wanted

    @property
    def decoding(self) -> Preparation:
        """How its files are decoded, decided over all splits. Raises DataError, as `split` does."""
        if self._decoding is None:
            files = [entry for classes in self._classes.values() for own in classes.values() for entry in own]
            sources, name = [entry.opened for entry in files], Path(self.root).name
            made = self._wanted.with_levels(sources, name, skip=True).with_ink(sources, name, skip=True)
            made.suggest_ink(sources, name)
            self._decoding = replace(made, resize=self.resize, ink=made.ink if made.draws else None)
        return self._decoding

    @property
    def decided(self) -> dict[str, Any]:
        made = self._decoding
        found = {"background": made.background, "white": made.white} if made else {}
        return {key: value for key, value in found.items() if value is not None}

    def reshaped(self, item_shape: tuple[int, ...]) -> ImageFolder:
        """The same images, decoded in another shape; itself if they would not be square."""
        channels, height, width = item_shape
        if height != width:
            return self
        twin = copy.copy(self)
        twin.channels, twin.size = channels, height
        return twin

    def prepared_like(self, trained: Preparation) -> ImageFolder:
        twin = copy.copy(self)
        twin._wanted, twin._decoding = self._wanted.or_like(trained), None
        twin.resize = twin._wanted.resize or "pad"
        return twin

    def split(self, name: Split, device: torch.device | str = "cpu") -> ClassStore:
        """One split, its classes sorted by name. Raises DataError, naming the file or folder."""
        if name not in self._classes:
            raise DataError(self._missing(name))
        root = Path(self.root)
        title, cached_as = f"{root.name} {name}", f"image_folder-{name}"
        about = self._about.get(name)
        return class_store(self, title, self._classes[name], root, device, cached_as, about)

    @cached_property
    def _about(self) -> dict[Split, Tensor]:
        """The descriptions of the classes of each split; empty if there are none."""
        if self.descriptions is None:
            return {}
        names = [name for classes in self._classes.values() for name in classes]
        found = described(self.descriptions, names).split([len(own) for own in self._classes.values()])
        return dict(zip(self._classes, found, strict=True))

    def splits(self) -> tuple[Split, ...]:
        return tuple(self._classes)

    @cached_property
    def _classes(self) -> dict[Split, Classes]:
        """The classes of each split that there is."""
        root = user_path(self.root)
        files, root = unwrapped(entries(root), root, self.depth)
        folders = split_folders(files, self.depth, root)
        if not folders:
            return self._by_rule(classes_of(files, 0, root, self.depth))
        found = {
            split: classes_of([entry for entry in files if entry.parts[0] in names], 1, root, self.depth)
            for split, names in folders.items()
        }
        for split in [split for split in found if split != "train"]:  # in their order
            if shared := sorted(found.get("train", {}).keys() & found[split].keys()):
                raise DataError(
                    f"dataset.root={root}: class {shared[0]!r} is in train and in {split}; "
                    "a class must be in one split only"
                )
        return found

    def _by_rule(self, classes: Classes) -> dict[Split, Classes]:
        self._too_few = len(classes) if len(classes) < LEAST_CLASSES else 0
        parts = split_by_rule(classes, self.shares, self.seed, self.root)
        return {split: {name: classes[name] for name in names} for split, names in parts.items()}

    def _missing(self, name: Split) -> str:
        """Why there is no such split, and what to do."""
        if self._too_few:
            return (
                f"dataset.root={self.root}: has {self._too_few} classes; at least {LEAST_CLASSES} are needed "
                "for three splits of two or more; eval and adapt take fewer, with split=test"
            )
        there, *_ = self._classes
        return (
            f"dataset.root={self.root}: has a folder {there}, but none named "
            f"{' or '.join(SPLIT_FOLDERS[name])}; add it, or set dataset.root={self.root}/{there} to split "
            f"those classes, or split={there} in eval and adapt"
        )


def unwrapped(files: list[Entry], root: Path, depth: int) -> tuple[list[Entry], Path]:
    """The files and the root without outer folders that only contain one folder, as many zips have."""
    while len(tops := {entry.parts[0] for entry in files}) == 1:
        (top,) = tops
        if min(len(entry.parts) for entry in files) <= depth + 1 or top.lower() in SPLIT_OF:
            break
        root, files = root / top, [entry._replace(parts=entry.parts[1:]) for entry in files]
    return files, root


def split_folders(files: list[Entry], depth: int, root: Path) -> dict[Split, set[str]]:
    """The folders below a root that are splits: those named like one that contain class folders.

    A folder of such a name is a class if it contains images directly, or if it is the only one beside
    folders of other names. Upper and lower case do not matter.

    Args:
        files: all files below the root.
        depth: see `ImageFolder`.
        root: for messages.

    Returns:
        The names of the folders of each split that there is; empty if `root` contains the classes.
    """
    tops = {entry.parts[0] for entry in files if len(entry.parts) > 1}
    nested = {entry.parts[0] for entry in files if len(entry.parts) > depth + 1}
    found: dict[Split, set[str]] = {}
    for name in sorted(nested):
        if split := SPLIT_OF.get(name.lower()):
            found.setdefault(split, set()).add(name)
    others = sorted(tops - {name for names in found.values() for name in names})
    if others and len(found) < 2:
        return {}
    if others:
        inform(f"{root}: folder {and_more(others)} beside {', '.join(found)} left out")
    return {split: found[split] for split in SPLIT_FOLDERS if split in found}
