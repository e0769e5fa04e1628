"""A user's own images as a dataset: one folder of classes, or train, val and test folders of them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from metarun.datasets.base import ImageDataset, Split, Unreadable, split_by_digest
from metarun.datasets.class_folders import Entry, class_store, entries
from metarun.datasets.images import Resize, visible
from metarun.errors import ConfigError, DataError
from metarun.reporting.console import inform
from metarun.tasks.class_store import ClassStore

SPLIT_FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train",),
    "validation": ("val", "validation", "valid"),
    "test": ("test",),
}


class ImageFolder(ImageDataset):
    """Images of any size and mode in class folders.

    If `root` has a folder `train`, the training classes are in it and the others in folders `val` and
    `test`. Otherwise the classes directly below `root` are split by the digests of their names, see
    `split_by_digest`.

    Args:
        root: a folder or a zip.
        size, channels, resize: the images' size, grey or colour, and how they are made square.
        unreadable: "stop" raises DataError at a file that is not an image, "skip" leaves it out with a
            warning.
        validation, test: the shares of the classes to validate and to test on, above 0 and less than 1
            together; used where `root` has no folder `train`.
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
        resize: Resize = "pad",
        unreadable: Unreadable = "stop",
        validation: float = 0.2,
        test: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__(size, channels, resize)
        if min(validation, test) <= 0 or validation + test >= 1:
            raise ConfigError(
                f"dataset.validation={validation}, dataset.test={test}: choose shares above 0 that are less "
                "than 1 together"
            )
        self.root, self.unreadable = root, unreadable
        self.shares, self.seed = (validation, test), seed
        self._classes: dict[Split, dict[str, list[Entry]]] | None = None

    def split(self, name: Split, device: torch.device | str = "cpu") -> ClassStore:
        """One split, its classes sorted by name. Raises DataError, naming the file or folder."""
        if self._classes is None:
            self._classes = self._find(announce=name == "train")
        root = Path(self.root)
        title, cached_as = f"{root.name} {name}", f"image_folder-{name}"
        return class_store(self, title, self._classes[name], root, device, cached_as)

    def _find(self, announce: bool) -> dict[Split, dict[str, list[Entry]]]:
        """The images of each split by class; `announce` the rule by which classes are split."""
        root = Path(self.root).expanduser()
        files, root = unwrapped(entries(root), root)
        tops = {entry.parts[0] for entry in files}
        if not set(SPLIT_FOLDERS["train"]) & tops:
            return self._by_rule(classes_of(files, 0, root), announce)
        found: dict[Split, dict[str, list[Entry]]] = {}
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
                    "a class must be in one split only"
                )
        return found

    def _by_rule(
        self, classes: dict[str, list[Entry]], announce: bool
    ) -> dict[Split, dict[str, list[Entry]]]:
        count = len(classes)
        if count < 6:
            raise DataError(
                f"dataset.root={self.root}: has {count} classes; at least 6 are needed for three splits "
                "of two or more"
            )
        validation, test = (max(2, round(share * count)) for share in self.shares)
        sizes = (max(count - validation - test, 0), validation, test)
        if announce:
            inform(
                f"{self.root}: {count} classes split {'/'.join(map(str, sizes))} into train, validation and "
                f"test by dataset.seed={self.seed}",
            )
        parts = split_by_digest(classes, sizes, f"{self.seed} ")
        return {split: {name: classes[name] for name in names} for split, names in parts.items()}


def unwrapped(files: list[Entry], root: Path) -> tuple[list[Entry], Path]:
    """The files and the root without outer folders that only contain one folder, as many zips have."""
    while len({entry.parts[0] for entry in files}) == 1 and min(len(entry.parts) for entry in files) > 2:
        root = root / files[0].parts[0]
        files = [entry._replace(parts=entry.parts[1:]) for entry in files]
    return files, root


def classes_of(files: list[Entry], depth: int, root: Path) -> dict[str, list[Entry]]:
    """Files by the name of the folder at index `depth` of their path, sorted.

    Raises DataError for files that are not in such a folder and for folders without files.
    """
    classes: dict[str, list[Entry]] = {}
    for entry in files:
        if len(entry.parts) < depth + 2:
            raise DataError(f"{entry}: is beside the class folders; move it into one, or away")
        classes.setdefault(entry.parts[depth], []).append(entry)
    above = {root.joinpath(*entry.parts[:depth]) for entry in files}
    for folder in above:
        for path in visible(folder) if folder.is_dir() else []:
            if path.is_dir() and path.name not in classes:
                raise DataError(f"{path}: this class has no images; add some or remove the folder")
    return dict(sorted(classes.items()))
