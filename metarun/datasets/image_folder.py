"""A user's own images as a dataset: one folder of classes, or train, val and test folders of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal

import torch

from metarun.datasets.base import Dataset
from metarun.datasets.class_folders import Entry, Fit, Unreadable, class_store, entries
from metarun.datasets.images import visible
from metarun.errors import ConfigError, DataError
from metarun.reporting.console import inform
from metarun.storage.files import encoded
from metarun.tasks.class_store import ClassStore

SPLIT_FOLDERS = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}


class ImageFolder(Dataset):
    """Images of any size and mode below `root`, a folder or a zip; a class is a folder's name.

    Where `root` has a folder `train`, its classes are those to train on, and `val` and `test` hold
    the others. Else the classes below `root` are split by a rule: in the order of the SHA-256
    digests of the seed and their names, the share `test` is tested on, the share `validation`
    after them is for validation, and the rest is trained on.
    """

    drawings = False

    def __init__(
        self,
        *,
        root: str,
        size: int = 84,
        channels: Literal[1, 3] = 3,
        fit: Fit = "pad",
        unreadable: Unreadable = "stop",
        validation: float = 0.2,
        test: float = 0.2,
        seed: int = 0,
    ) -> None:
        if size < 1:
            raise ConfigError(f"dataset.size={size}: choose a whole number of pixels, such as 84")
        if min(validation, test) <= 0 or validation + test >= 1:
            raise ConfigError(
                f"dataset.validation={validation}, dataset.test={test}: shares above 0, under 1 together"
            )
        self.root, self.size, self.channels = root, size, channels
        self.fit, self.unreadable = fit, unreadable
        self.shares, self.seed = (validation, test), seed
        self._classes: dict[str, dict[str, list[Entry]]] | None = None

    @property
    def item_shape(self) -> tuple[int, int, int]:
        return (self.channels, self.size, self.size)

    def split(
        self, name: Literal["train", "validation", "test"], device: torch.device | str = "cpu"
    ) -> ClassStore:
        """One split, its classes sorted by name. Raises DataError, naming the file or folder."""
        if self._classes is None:
            self._classes = self._find(tells=name == "train")
        title = f"{Path(self.root).name} {name}"
        return class_store(
            title,
            self._classes[name],
            Path(self.root),
            self.item_shape,
            device,
            self.fit,
            self.unreadable,
            kept_as=f"image_folder-{name}",
        )

    def _find(self, tells: bool) -> dict[str, dict[str, list[Entry]]]:
        root = Path(self.root).expanduser()
        files, root = unwrapped(entries(root), root)
        tops = {entry.parts[0] for entry in files}
        if not set(SPLIT_FOLDERS["train"]) & tops:
            return self._by_rule(classes_of(files, 0, root), tells)
        found = {}
        for split, names in SPLIT_FOLDERS.items():
            own = [entry for entry in files if entry.parts[0] in names]
            if not own:
                raise DataError(
                    f"dataset.root={root}: has a folder train, but none named {' or '.join(names)}; "
                    f"add it, or put the classes directly into {root}"
                )
            found[split] = classes_of(own, 1, root)
        for split in ("validation", "test"):
            if shared := sorted(found["train"].keys() & found[split].keys()):
                raise DataError(
                    f"dataset.root={root}: class {shared[0]!r} is in train and in {split}; "
                    "few-shot splits have classes of their own"
                )
        return found

    def _by_rule(self, classes: dict[str, list[Entry]], tells: bool) -> dict[str, dict[str, list[Entry]]]:
        order = sorted(classes, key=lambda name: hashlib.sha256(encoded(f"{self.seed} {name}")).digest())
        if len(order) < 6:
            raise DataError(
                f"dataset.root={self.root}: has {len(order)} classes; at least 6 are needed for three splits "
                "of two or more"
            )
        validation, test = (max(2, round(share * len(order))) for share in self.shares)
        parts = {
            "test": order[:test],
            "validation": order[test : test + validation],
            "train": order[test + validation :],
        }
        if tells:  # once, though every split comes here
            counts = "/".join(str(len(parts[split])) for split in SPLIT_FOLDERS)
            inform(
                f"{self.root}: {len(order)} classes split {counts} into train, validation and test by "
                f"dataset.seed={self.seed}",
            )
        return {split: {name: classes[name] for name in sorted(parts[split])} for split in parts}


def unwrapped(files: list[Entry], root: Path) -> tuple[list[Entry], Path]:
    """The files without folders that hold nothing but one more folder, such as a zip is often made with."""
    while len({entry.parts[0] for entry in files}) == 1 and min(len(entry.parts) for entry in files) > 2:
        root = root / files[0].parts[0]
        files = [entry._replace(parts=entry.parts[1:]) for entry in files]
    return files, root


def classes_of(files: list[Entry], depth: int, root: Path) -> dict[str, list[Entry]]:
    """Files by the folder at a depth of their path, sorted. DataError for stray files and empty folders."""
    classes: dict[str, list[Entry]] = {}
    for entry in files:
        if len(entry.parts) < depth + 2:
            raise DataError(f"{entry}: lies beside the class folders; move it into one, or away")
        classes.setdefault(entry.parts[depth], []).append(entry)
    above = {root.joinpath(*entry.parts[:depth]) for entry in files}
    for folder in above:
        for path in visible(folder) if folder.is_dir() else []:
            if path.is_dir() and path.name not in classes:
                raise DataError(f"{path}: this class has no images; add some or remove the folder")
    return dict(sorted(classes.items()))
