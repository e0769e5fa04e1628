"""MedMNIST v2 (Yang et al. 2023): sets of small medical images, together as one few-shot benchmark."""

from __future__ import annotations

import copy
import difflib
import hashlib
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from metarun.datasets.base import ImageDataset, Split, Splits
from metarun.datasets.images import require_folder
from metarun.datasets.medmnist_sets import OTHERS, SETS, SIZES, URL
from metarun.datasets.mixture import MixtureStore
from metarun.errors import ConfigError, DataError, first_line
from metarun.reporting.console import inform
from metarun.storage.cached_arrays import memmap_cached
from metarun.storage.downloads import download
from metarun.storage.files import data_dir, encoded, user_path
from metarun.tasks.class_store import ClassStore
from metarun.tasks.spec import TaskSpec

OWN_SPLITS = ("train", "val", "test")  # of MedMNIST, in each file; a class has the images of all three


class MedMnist(ImageDataset):
    """Several sets of MedMNIST: some to train on, others to validate and to test on.

    The classes of a task are all from one set, and each set is drawn from equally often.

    Args:
        sets: names of sets, such as "bloodmnist".
        validation, test: more sets, to validate and to test on. None: the last of `sets` is tested on, and
            the last of the others is for validation. If no set is left to train on, all are test sets.
        size: pixels a side, which selects the files.
        channels: 3 for RGB, 1 for grey. None: 3 if any of the sets has colours.
        root: the folder with the files NAME.npz, or NAME_64.npz for `size=64`. None: the files are downloaded
            to METARUN_DATA/medmnist.
        download: whether they may be downloaded.

    Raises:
        ConfigError: a set is unknown, named twice, or shows the classes of a set of another split.
    """

    def __init__(
        self,
        *,
        sets: list[str],
        validation: list[str] | None = None,
        test: list[str] | None = None,
        size: Literal[28, 64, 128, 224] = 28,
        channels: Literal[1, 3] | None = None,
        root: str | None = None,
        download: bool = True,
    ) -> None:
        for setting, names in (("sets", sets), ("validation", validation), ("test", test)):
            check_names(setting, names)
        self.sets, self.root, self.download = sets, root, download
        self.by_split = split_sets(sets, validation, test)
        check_apart(self.by_split)
        self.names = [name for names in self.by_split.values() for name in names]
        super().__init__(size, channels or max(SETS[name].channels for name in self.names))
        self.shape: tuple[int, ...] | None = None  # chosen by `reshaped`

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec(self.shape) if self.shape else super().spec

    def reshaped(self, item_shape: tuple[int, ...]) -> MedMnist:
        """The same sets with images of this shape, each converted once, from the originals."""
        twin = copy.copy(self)
        twin.shape = item_shape
        return twin

    def splits(self) -> tuple[Split, ...]:
        return tuple(self.by_split)

    def split(self, name: Split, device: torch.device | str = "cpu") -> ClassStore:
        """The classes of the sets of one split. Raises DataError if there is none, or for a file."""
        return self.load(name, device)

    def load(self, name: Splits, device: torch.device | str = "cpu") -> ClassStore:
        if missing := [each for each in self.parts_of(name) if each not in self.by_split]:
            raise DataError(
                f"dataset.sets=[{','.join(self.sets)}]: no set is left for {missing[0]}; name three sets "
                "or more, or also dataset.validation and dataset.test; eval and adapt take fewer, with "
                "split=test"
            )
        names = [one for each in self.parts_of(name) for one in self.by_split[each]]
        return self._stores(names, name, device)

    def _stores(self, names: Sequence[str], title: str, device: torch.device | str) -> ClassStore:
        stores = {name: self._store(name, f"{name} {title}") for name in names}
        if len(stores) > 1:
            return MixtureStore(stores, [1.0] * len(stores), f"medmnist {title}", device)
        (store,) = stores.values()
        return store.with_items(store.items.to(device))

    def _store(self, name: str, title: str) -> ClassStore:
        """The classes of one set."""
        path, known = self._file(name), SETS[name]
        status, source = path.stat(), os.path.abspath(path)
        mark = f"1 {source}\0{status.st_size}\0{status.st_mtime_ns}"  # 1: the version of the entry's content
        entry = f"medmnist-{name}-{hashlib.sha256(encoded(mark)).hexdigest()[:24]}"

        def build(write: Callable[[bytes], object]) -> dict[str, Any]:
            parts, counts = read(path, name, self.size), []
            for number in range(len(known.classes)):
                pieces = [images[labels == number] for images, labels in parts]
                for piece in pieces:
                    write(np.ascontiguousarray(piece).tobytes())
                counts.append(sum(map(len, pieces)))
            return {"counts": counts}

        content, made = memmap_cached(entry, build, f"medmnist {name} {self.size} {source}", source)
        images = content.view(-1, known.channels, self.size, self.size)
        if len(images) != known.images:
            inform(f"{title}: {len(images):,} images here, {known.images:,} in MedMNIST v2")
        there = [(count, each) for count, each in zip(made["counts"], known.classes, strict=True) if count]
        counts, classes = zip(*there, strict=True)
        store = ClassStore(images, counts, classes, title, fingerprint=made["sha256"])
        return store.resized(self.item_shape)

    def _file(self, name: str) -> Path:
        """The file of a set, downloaded if there is no root. Raises DataError if it is missing."""
        file = file_name(name, self.size)
        url = url_of(file)
        if self.root is None:
            path = data_dir() / "medmnist" / file
            if not (self.download or path.exists()):
                raise DataError(
                    f"{name} is not at {path}, and dataset.download=false: put {url} there, or set "
                    "dataset.root to the folder that has it"
                )
            download(url, path, SETS[name].md5[SIZES.index(self.size)])
            return path
        folder = user_path(self.root)
        require_folder(folder)
        if (folder / file).is_file():
            return folder / file
        others = [size for size in SIZES if (folder / file_name(name, size)).is_file()]
        hint = f"set dataset.size={others[0]} for {file_name(name, others[0])}, " if others else ""
        raise DataError(
            f"dataset.root={self.root}: has no {file}; {hint}put {url} there, or leave dataset.root out"
        )


def file_name(name: str, size: int) -> str:
    return f"{name}.npz" if size == SIZES[0] else f"{name}_{size}.npz"


def url_of(file: str) -> str:
    return f"{URL}{file}?download=1"


def check_names(setting: str, names: list[str] | None) -> None:
    """Raise ConfigError unless a setting is None or names sets that there are, each once."""
    if names == []:
        raise ConfigError(f"dataset.{setting}=[]: name at least one set, such as bloodmnist")
    for name in names or []:
        if name in SETS:
            continue
        if name in OTHERS:
            what = f"{name} {OTHERS[name]}, and is not supported; choose among {', '.join(SETS)}"
        elif close := difflib.get_close_matches(name.lower(), SETS, n=1):
            what = f"there is no set {name!r}; did you mean {close[0]!r}?"
        else:
            what = f"there is no set {name!r}; choose among {', '.join(SETS)}"
        raise ConfigError(f"dataset.{setting}: {what}")


def split_sets(
    sets: list[str], validation: list[str] | None, test: list[str] | None
) -> dict[Split, list[str]]:
    """The sets of each split that there is, see `MedMnist`."""
    rest = list(sets)
    if len(rest) <= (validation is None) + (test is None):
        held_out: dict[Split, list[str]] = {"validation": validation} if validation else {}
        return held_out | {"test": [*rest, *(test or [])]}
    test = test or [rest.pop()]
    validation = validation or [rest.pop()]
    return {"train": rest, "validation": validation, "test": test}


def check_apart(by_split: dict[Split, list[str]]) -> None:
    """Raise ConfigError for a set that is named twice, or that shows the classes of another split's set."""
    named = [(split, name) for split, names in by_split.items() for name in names]
    for i, (split, name) in enumerate(named):
        for other, before in named[:i]:
            if name == before:
                where = f"in {other} and in {split}" if other != split else f"twice in {split}"
                raise ConfigError(f"dataset.sets: {name} is {where}; name each set once")
            if other != split and SETS[name].classes == SETS[before].classes:
                raise ConfigError(
                    f"dataset.sets: {before} ({other}) and {name} ({split}) have the same classes; choose "
                    "sets with other classes, or put both in one split"
                )


def read(path: Path, name: str, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """The images [n, C, H, W] uint8 and labels [n] of MedMNIST's own three splits.

    Args:
        path: the npz file. No pickled object in it is read.
        name: of the set.
        size: pixels a side.

    Raises:
        DataError: the file is damaged, or its arrays are not those of the set.
    """
    again = f"replace it with {url_of(path.name)}"
    if not zipfile.is_zipfile(path):
        raise DataError(f"{path}: is not an npz file, or damaged; {again}")
    arrays, key = {}, ""
    try:
        with np.load(path, allow_pickle=False) as file:
            for key in (f"{part}_{what}" for part in OWN_SPLITS for what in ("images", "labels")):
                arrays[key] = file[key]
    except MemoryError:
        raise
    except KeyError:
        raise DataError(f"{path}: has no array {key}; {again}") from None
    except Exception as error:  # zipfile, zlib and NumPy raise exceptions of many types
        why = f"cannot be read ({first_line(error)})"
        if "allow_pickle" in str(error):
            why = "is a pickled object, which could run any program when read, so metarun does not read it"
        raise DataError(f"{path}: {key} {why}; {again}") from error
    parts = [
        checked(path, part, name, size, arrays[f"{part}_images"], arrays[f"{part}_labels"])
        for part in OWN_SPLITS
    ]
    if not any(len(labels) for _, labels in parts):
        raise DataError(f"{path}: has no images; {again}")
    return parts


def checked(
    path: Path, part: str, name: str, size: int, images: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The images as [n, C, H, W] and the labels as [n]; for arguments and errors see `read`."""
    known = SETS[name]
    colours = (3,) if known.channels == 3 else ()
    if images.dtype != np.uint8 or images.shape[1:] != (size, size, *colours):
        wanted = ", ".join(map(str, ("n", size, size, *colours)))
        raise DataError(
            f"{path}: {part}_images is {images.dtype} {list(images.shape)}, and must be uint8 [{wanted}]"
        )
    if labels.dtype.kind not in "iu" or labels.shape not in ((len(images),), (len(images), 1)):
        raise DataError(
            f"{path}: {part}_labels is {labels.dtype} {list(labels.shape)}, and must be one whole number for "
            f"each of {len(images)} images, [n, 1]"
        )
    labels = labels.reshape(-1)
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(known.classes):
        raise DataError(
            f"{path}: {part}_labels goes from {labels.min()} to {labels.max()}, and {name} has the labels 0 "
            f"to {len(known.classes) - 1}"
        )
    return images.reshape(-1, size, size, known.channels).transpose(0, 3, 1, 2), labels
