"""The base classes of datasets, and what several datasets share: class splits by digest, range checks."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metarun.datasets.images import Resize
from metarun.datasets.preparation import Preparation
from metarun.errors import ConfigError, DataError
from metarun.reporting.console import inform
from metarun.storage.files import encoded
from metarun.tasks.class_store import ClassStore, check_classes, joined
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.source import SPLITS, EpisodeSource
from metarun.tasks.spec import TaskSpec

Split = Literal["train", "validation", "test"]
#: "trainval": the classes to train and to validate on together; "all": those of all splits.
Splits = Split | Literal["trainval", "all"]
Unreadable = Literal["stop", "skip"]
TRAINVAL: tuple[Split, Split] = ("train", "validation")


@dataclass(frozen=True)
class OwnTask:
    """A task from a user's files, batched with T = 1.

    Args:
        support_x: [1, S, *item].
        support_y: class numbers [1, S], or values [1, S, V].
        query_x: [1, B, *item]; None if there are no queries.
        query_y: [1, B], -1 where the class is unknown; or [1, B, V], NaN where the value is unknown.
        classes: the names of the ways; empty for a regression.
        query_names: the queries in words, for the table of predictions.
        about: descriptions of the ways, [1, N, *description], where there are some.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor | None
    query_y: Tensor | None
    classes: Sequence[str]
    query_names: Sequence[str]
    about: Tensor | None = None


class OwnQueries(NamedTuple):
    """Queries from a user's files, see `OwnTask`: `query_x`, `query_y` and `query_names`."""

    x: Tensor
    y: Tensor
    names: Sequence[str]


class Dataset(ABC):
    """A dataset with three splits: derive from this class to add your own, and name it in a YAML file.

    The constructor takes settings as keyword arguments and only stores them: files are read by `split`,
    because a dataset is also built to find out the shape of its items. Every setting has a type hint, which
    the configuration is checked against before the constructor is called; the constructor itself checks
    ranges and raises ConfigError ("dataset.SETTING=VALUE: what is wrong, and what to choose").
    """

    #: Settings that say how examples become inputs of a network: a trained model keeps those of its run.
    of_model: ClassVar[tuple[str, ...]] = ()
    #: Those of them that say where files are, which may have been moved.
    relocates: ClassVar[tuple[str, ...]] = ()
    drawings: bool = False  # bright strokes on a dark ground; a user's images are converted to that

    @property
    @abstractmethod
    def spec(self) -> TaskSpec:
        """The kind of its tasks: the shape of an example, the objective.

        It is known without reading a file, in a run at least by the settings that were `decided` before.
        """

    @property
    def item_shape(self) -> tuple[int, ...]:
        """The shape of one example, (C, H, W) for images."""
        return self.spec.item_shape

    @abstractmethod
    def split(self, name: Split, device: torch.device | str = "cpu") -> EpisodeSource:
        """One split, from which episodes are drawn.

        Args:
            name: "train", "validation" or "test". No class is in two of them.
            device: where the examples are stored and episodes are gathered.

        Returns:
            A `ClassStore` for uint8 images grouped by class, or any other `EpisodeSource`.

        Raises:
            DataError: files are missing, damaged or not what the dataset expects. The message is one line
                that names the file or folder and says how to fix it.
        """

    def splits(self) -> tuple[Split, ...]:
        """The splits that there are: all three, except where a user's files have fewer. Raises DataError."""
        return "train", "validation", "test"

    def parts_of(self, name: Splits) -> tuple[Split, ...]:
        """The splits that a name stands for. Raises DataError if a user's files have none of that name."""
        return self.splits() if name == "all" else TRAINVAL if name == "trainval" else (name,)

    def for_trainval(self) -> Dataset:
        """This dataset, whose validation classes are prepared as its training classes are."""
        return self

    def known_classes(self, split: Split) -> tuple[str, int] | None:
        """The name of a split, as in messages, and the number of its classes; None if only its files tell."""
        return None

    def known_size(self, split: Splits) -> tuple[str, int] | None:
        """`known_classes` of one or several splits together."""
        parts: Sequence[Any] = SPLITS if split == "all" else TRAINVAL if split == "trainval" else (split,)
        dataset = self.for_trainval() if split == "trainval" else self
        known = [size for each in parts if (size := dataset.known_classes(each)) is not None]
        if len(known) < len(parts):
            return None
        names, counts = zip(*known, strict=True)
        return names[0] if len(names) == 1 else f"{names[0].rpartition(' ')[0]} {split}", sum(counts)

    def check_shape(self, split: Splits, shape: EpisodeShape) -> None:
        """Raise DataError if a split cannot have tasks of this shape, as far as the settings tell.

        It is called before files are downloaded or images drawn; `EpisodeSource.check` knows all.
        """
        if (known := self.known_size(split)) is not None:
            check_classes(*known, shape.least.ways)

    def load(self, name: Splits, device: torch.device | str = "cpu") -> EpisodeSource:
        """One split, or the classes of several together. Raises what `split` raises, and ConfigError."""
        if name != "trainval" and name != "all":
            return self.split(name, device)
        dataset = self.for_trainval() if name == "trainval" else self
        stores = [dataset.split(each) for each in self.parts_of(name)]
        if not all(isinstance(store, ClassStore) for store in stores):
            raise ConfigError(
                "split=all: this dataset has no classes; choose train, validation or test"
                if name == "all"
                else "trainval=true: this dataset has no validation classes to train on; leave it out"
            )
        return joined(stores, name, device)  # type: ignore[arg-type]

    @property
    def preparation(self) -> Any:
        """How other examples are prepared for a model that was trained on this dataset; a hashable value."""
        return Preparation(ink="auto" if self.drawings else None)

    @property
    def decided(self) -> dict[str, Any]:
        """Settings that were left open and decided when files were read; a checkpoint keeps them."""
        return {}

    @property
    def files(self) -> dict[str, str]:
        """Text files that other examples are prepared with, such as a tokenizer; a checkpoint keeps them."""
        return {}

    def with_files(self, files: Mapping[str, str]) -> Dataset:
        """This dataset with the files that a checkpoint kept. Raises ConfigError if they are damaged."""
        return self

    def reshaped(self, item_shape: tuple[int, ...]) -> Dataset:
        """This dataset with items of another shape [C, H, W], if it can convert them itself, else itself.

        It is called where a trained model is evaluated on a dataset of another shape. The images of a
        dataset that returns itself are converted afterwards.
        """
        return self

    def prepared_like(self, trained: Any) -> Dataset:
        """This dataset, prepared as that of a trained model where its own settings leave it open.

        Args:
            trained: the `preparation` of a dataset of the same kind.
        """
        return self

    def own_task(self, support: Path, query: str | None) -> OwnTask:
        """The task in a user's files, prepared as the examples of this dataset (`metarun adapt support=`).

        Images are read by the command itself, for any dataset of images.

        Args:
            support: a file or a folder.
            query: a file or a folder, or what the dataset accepts in place of it; None: no queries.

        Raises:
            ConfigError: the dataset cannot read files.
            DataError: a file is missing or is not as expected; the message names the file and the line.
        """
        raise ConfigError(
            "support: the tasks of this checkpoint cannot be read from files; leave support out to adapt to "
            "a task of its dataset"
        )

    @property
    def fixed_labels(self) -> Sequence[str] | None:
        """The labels of all tasks, in the order of the outputs, if way i is the same label in every task."""
        return None

    def examples(self, items: Sequence[Any]) -> Tensor:
        """Items that a program has in memory, prepared as those in files, [B, *item].

        Images are prepared by `metarun.inference.images`, for any dataset of images.

        Args:
            items: texts, or rows; at least one.

        Raises:
            ConfigError: the dataset has no such items.
            DataError: an item is not as expected.
        """
        raise ConfigError("the examples of this checkpoint cannot be prepared; only its dataset has them")

    def targets(self, values: Sequence[Any]) -> Tensor:
        """Values of a regression that a program has in memory, as they are learned, float32 [B, V].

        Args:
            values: a number for each example, or V numbers.

        Raises:
            DataError: they are not finite numbers, or not V of them.
        """
        width = (self.spec.outputs or 1) // self.spec.objective.numbers
        return number_rows(values, "labels", width).float()

    def own_queries(self, query: str, classes: Sequence[str]) -> OwnQueries:
        """The queries in a user's files, for a model that was adapted before (`metarun predict query=`).

        Args:
            query: as for `own_task`.
            classes: the classes of the support; empty for a regression.

        Raises:
            ConfigError, DataError: as `own_task`.
        """
        raise ConfigError("query: the examples of this checkpoint cannot be read from files")


class ImageDataset(Dataset):
    """Square images of `size` pixels a side.

    Args:
        size: height and width in pixels, at least 1.
        channels: 3 for RGB, 1 for grey.
        resize: how an image that is not square is made square, see `metarun.datasets.images.resized`.

    Raises:
        ConfigError: `size` is out of range.
    """

    unreadable: Unreadable | None = None  # None: stop, and the dataset has no such setting
    invert: ClassVar[bool] = False  # whether to exchange black and white when files are decoded
    threaded: ClassVar[bool] = True  # whether several threads decode files

    def __init__(self, size: int, channels: int = 3, resize: Resize = "pad") -> None:
        at_least(1, size=size)
        self.size, self.channels, self.resize = size, channels, resize

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec(item_shape=(self.channels, self.size, self.size))

    @property
    def preparation(self) -> Preparation:
        return super().preparation if self.drawings else Preparation(self.resize)

    @property
    def decoding(self) -> Preparation:
        """How its own files are decoded."""
        return Preparation(self.resize)


def check_ranges(**ranges: tuple[float, float]) -> None:
    """Raise ConfigError if a setting of the dataset that is a range, [low, high], does not start with low."""
    for name, bounds in ranges.items():
        if len(bounds) != 2 or bounds[0] > bounds[1]:
            raise ConfigError(
                f"dataset.{name}={list(bounds)}: must be two numbers, the second not below the first"
            )


def at_least(least: int, **settings: int | Sequence[int]) -> None:
    """Raise ConfigError for a setting that is not a whole number of at least `least`, or a list of those."""
    for name, value in settings.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if any(type(number) is not int or number < least for number in numbers):  # a bool is an int, too
            many = "whole numbers" if numbers is value else "a whole number"
            raise ConfigError(f"dataset.{name}={value!r}: choose {many} of at least {least}")


def number_rows(rows: Sequence[Any], what: str, width: int) -> Tensor:
    """Rows of numbers in memory, float64 [rows, width]; a number alone is a row of one.

    Args:
        rows: numbers, or rows of them: lists, arrays or tensors.
        what: the argument that they are, for messages.
        width: how many numbers a row must have.

    Raises:
        DataError: they are something else, or not finite.
    """
    try:
        array = np.array([np.atleast_1d(np.asarray(row, dtype=np.float64)) for row in rows])
    except (TypeError, ValueError):
        array = np.empty((0, 0))
    if array.shape != (len(rows), width) or not np.isfinite(array).all():
        each = "a finite number" if width == 1 else f"{width} finite numbers"
        raise DataError(f"{what}: must be {each} for each example")
    return torch.from_numpy(array)


def by_digest(names: Iterable[str], seed: str = "") -> list[str]:
    """The names in the order of the SHA-256 digests of the seed followed by the name.

    The order looks random, depends on nothing else and is the same everywhere, so a class split that
    follows it can be repeated by anyone.
    """
    return sorted(names, key=lambda name: hashlib.sha256(encoded(seed + name)).digest())


def split_by_digest(
    names: Iterable[str], sizes: tuple[int, int, int], seed: str = ""
) -> dict[Split, list[str]]:
    """Classes split at random but repeatably, each split sorted by name.

    Args:
        names: of all classes.
        sizes: how many classes to train on, to validate on and to test on. In the order of `by_digest` the
            first are tested on, the next are for validation.
        seed: another one gives another split.
    """
    train, validation, test = sizes
    order, held_out = by_digest(names, seed), validation + test
    return {
        "train": sorted(order[held_out : held_out + train]),
        "validation": sorted(order[test:held_out]),
        "test": sorted(order[:test]),
    }


LEAST_CLASSES = 6  # that can be split into three


def split_by_rule(
    names: Iterable[str], shares: tuple[float, float], seed: int, root: str
) -> dict[Split, list[str]]:
    """The classes of a user's files that name no splits, by digest; fewer than six are all test classes.

    Args:
        names: of all classes.
        shares: of the classes to validate and to test on.
        seed: another one gives another split.
        root: the files, for the message that says how they were split.
    """
    classes = list(names)
    if (count := len(classes)) < LEAST_CLASSES:
        inform(f"{root}: {count} classes are too few for three splits, so all are test classes")
        return {"test": classes}
    validation, test = (max(2, round(share * count)) for share in shares)
    sizes = (max(count - validation - test, 0), validation, test)
    inform(
        f"{root}: {count} classes split {'/'.join(map(str, sizes))} into train, validation and "
        f"test by dataset.seed={seed}",
    )
    return split_by_digest(classes, sizes, f"{seed} ")


def check_shares(validation: float, test: float) -> None:
    """Raise ConfigError unless these shares of the classes leave some to train on."""
    if min(validation, test) <= 0 or validation + test >= 1:
        raise ConfigError(
            f"dataset.validation={validation}, dataset.test={test}: choose shares above 0 that are less "
            "than 1 together"
        )


def select(store: ClassStore, names: Sequence[str]) -> tuple[Tensor, list[int]]:
    """The images [images, C, H, W] of the classes `names` of a store, in that order, and each one's count."""
    images = dict(zip(store.names, store.items.split(store.counts.tolist()), strict=True))
    chosen = [images[name] for name in names]
    return torch.cat(chosen), [len(each) for each in chosen]


def and_more(missing: Sequence[str]) -> str:
    """The first of some names and how many more there are, for a message."""
    return missing[0] if len(missing) == 1 else f"{missing[0]} and {len(missing) - 1:,} more"
