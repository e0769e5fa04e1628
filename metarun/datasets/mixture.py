"""Several datasets at once: the classes of a task are all from one of them."""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from metarun.datasets.base import Dataset, Split, Splits, at_least
from metarun.datasets.preparation import Preparation
from metarun.errors import ConfigError, naming_part
from metarun.tasks.choice import different, one_of_each
from metarun.tasks.class_store import MANY_CLASSES, ClassStore
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.spec import TaskSpec


class Mixture(Dataset):
    """Tasks of several datasets, whose images are all converted to one shape.

    Args:
        datasets: the datasets, by name.
        parts: the names of those to use, and how often a task is drawn from each, as weights.
        settings: the configuration that `datasets` were built from.
        size: pixels a side. None: the largest height and width of the parts.
        channels: 1 or 3. None: the largest of the parts.

    Raises:
        ConfigError: `parts` is empty, or has a name, a weight or a dataset that cannot be used.
    """

    def __init__(
        self,
        *,
        datasets: Mapping[str, Dataset],
        parts: dict[str, float],
        settings: dict[str, Any] | None = None,
        size: int | None = None,
        channels: Literal[1, 3] | None = None,
    ) -> None:
        if not parts:
            raise ConfigError("dataset.parts: name datasets and their weights, 'dataset.parts={glyphs:1}'")
        for name, weight in parts.items():
            if name not in datasets:
                raise ConfigError(
                    f"dataset.parts: {name} has no settings; type the whole list, dataset=mixture "
                    "'dataset.parts={a:1,b:1}', or +dataset@dataset.settings.NAME=OPTION"
                )
            if not 0 < weight < math.inf:
                raise ConfigError(f"dataset.parts.{name}={weight}: a weight must be above 0 and finite")
            if len(datasets[name].item_shape) != 3:
                kind = datasets[name].spec.kind
                advice = (
                    "; texts of several files can be one file of dataset=texts" if kind == "texts" else ""
                )
                raise ConfigError(
                    f"dataset.parts: a mixture is of images, and {name} has {kind}; leave it out{advice}"
                )
        if size is not None:
            at_least(1, size=size)
        self.weights = parts
        self.datasets = {name: datasets[name] for name in parts}
        self.size, self.channels = size, channels
        self.shape: tuple[int, ...] | None = None  # chosen by `reshaped`

    def reshaped(self, item_shape: tuple[int, ...]) -> Mixture:
        """The mixture with images of this shape; each part's are converted once, from the originals."""
        twin = copy.copy(self)
        twin.shape = item_shape
        return twin

    def prepared_like(self, trained: Preparation) -> Mixture:
        twin = copy.copy(self)
        twin.datasets = {name: part.prepared_like(trained) for name, part in self.datasets.items()}
        return twin

    @property
    def preparation(self) -> Preparation:
        """That of its parts if they agree."""
        first, *others = (dataset.preparation for dataset in self.datasets.values())
        return first if all(each == first for each in others) else super().preparation

    @property
    def decided(self) -> dict[str, Any]:
        parts = {name: dataset.decided for name, dataset in self.datasets.items()}
        return {"settings": {name: own for name, own in parts.items() if own}}

    @property
    def spec(self) -> TaskSpec:
        if self.shape:
            return TaskSpec(self.shape)
        most = [max(sizes) for sizes in zip(*(d.item_shape for d in self.datasets.values()), strict=True)]
        height, width = (self.size or each for each in most[1:])
        return TaskSpec((self.channels or most[0], height, width))

    @property
    def drawings(self) -> bool:  # type: ignore[override]
        return all(dataset.drawings for dataset in self.datasets.values())

    def splits(self) -> tuple[Split, ...]:
        shared = [set(dataset.splits()) for dataset in self.datasets.values()]
        return tuple(split for split in super().splits() if all(split in own for own in shared))

    def check_shape(self, split: Splits, shape: EpisodeShape) -> None:
        for dataset in self.datasets.values():
            dataset.check_shape(split, shape)

    def load(self, name: Splits, device: torch.device | str = "cpu") -> MixtureStore:
        return self.split(name, device)  # type: ignore[arg-type]  # each part loads its own

    def split(self, name: Split, device: torch.device | str = "cpu") -> MixtureStore:
        """The classes of all parts. Raises what a part's `split` raises, with its settings' full names.

        Of a part with several sources, each is a part of its own: a task has classes of one of them.
        """
        stores: dict[str, ClassStore] = {}
        weights: list[float] = []
        for part, dataset in self.datasets.items():
            with naming_part(part, inspect.signature(type(dataset)).parameters):
                store = dataset.load(name)
            if not isinstance(store, ClassStore):
                raise ConfigError(f"dataset.parts: {part} is not a dataset of classes; leave it out")
            store = store.resized(self.item_shape)
            weight = self.weights[part]
            if isinstance(store, MixtureStore):
                stores |= {f"{part} {inner}": each for inner, each in store.parts.items()}
                weights += (weight * store.weights / store.weights.sum()).tolist()
            else:
                stores[part] = store
                weights.append(weight)
        return MixtureStore(stores, weights, f"mixture {name}", device)


class MixtureStore(ClassStore):
    """The classes of several stores of one item shape, one store after the other.

    Args:
        stores: by the name of their dataset. They become `parts`, whose images share the memory of all.
        weights: how often a task is drawn from each store.
        name: what error messages call the split.
        device: where the images are stored.

    Raises:
        ConfigError: the items of two stores differ in shape or type, or in what they are decoded by.
    """

    def __init__(
        self, stores: Mapping[str, ClassStore], weights: list[float], name: str, device: torch.device | str
    ) -> None:
        first, *others = stores.values()
        for other in others:
            if kind_of(first) != kind_of(other):
                raise ConfigError(
                    f"dataset.parts: the items of {first.name} and {other.name} differ in shape, type or "
                    "decoding; leave one of them out"
                )
        marks = [
            f"{store.fingerprint} {weight}" for store, weight in zip(stores.values(), weights, strict=True)
        ]
        super().__init__(
            torch.cat([store.items for store in stores.values()]),
            [count for store in stores.values() for count in store.counts.tolist()],
            [f"{part}: {each}" for part, store in stores.items() for each in store.names],
            name,
            device,
            fingerprint=hashlib.sha256(" ".join(marks).encode()).hexdigest(),
            decode=first.decode,
        )
        self.parts = dict(stores)
        self.sizes = {part: len(store.items) for part, store in stores.items()}
        self.parts = self.with_items(self.items).parts
        self.weights = torch.tensor(weights, dtype=torch.float64)
        self.weights /= self.weights.max()  # the sum of large weights could overflow
        sizes = torch.tensor([len(store.names) for store in stores.values()])
        self.owners = torch.arange(len(sizes)).repeat_interleave(sizes)  # the part of each class

    def check(self, shape: EpisodeShape) -> None:
        self.check_shots(shape.shots)  # those of its parts have no descriptions in common
        for part in self.parts.values():
            part.check(shape)

    def with_items(
        self,
        items: Tensor,
        host_for: torch.device | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> ClassStore:
        twin = super().with_items(items, host_for, decode)
        pieces = dict(zip(self.sizes, items.split(list(self.sizes.values())), strict=True))
        twin.parts = {
            part: store.with_items(pieces[part], host_for, decode) for part, store in self.parts.items()
        }
        return twin

    def keeping(self, classes: Sequence[int]) -> ClassStore:
        """Only some classes; datasets of which none is left are never drawn."""
        twin = super().keeping(classes)
        assert isinstance(twin, MixtureStore)
        twin.owners = self.owners[torch.tensor(classes)]
        twin.parts, twin.weights, first = {}, torch.zeros_like(self.weights), 0
        for part, store in self.parts.items():
            own = [i - first for i in classes if first <= i < first + len(store.names)]
            first += len(store.names)
            if own:
                twin.parts[part] = store if len(own) == len(store.names) else store.keeping(own)
                number = list(self.sizes).index(part)
                twin.weights[number] = self.weights[number]
        return twin

    def classes_beside(self, classes: Tensor) -> Tensor:
        owners = self.owners.to(classes.device)
        return owners.bincount(minlength=len(self.weights))[owners[classes]]

    def draw_classes(self, tasks: int, ways: int, generator: torch.Generator) -> Tensor:
        """The classes of tasks [T, N]: the dataset of each task is drawn, and its ways from that one."""
        device, keys = generator.device, None
        if len(self.names) <= MANY_CLASSES and not self.fixed_labels:
            keys = torch.rand(tasks, len(self.names), generator=generator, device=device)
        part = torch.multinomial(self.weights.to(device), tasks, replacement=True, generator=generator)
        if keys is not None:
            return keys.masked_fill(self.owners.to(device) != part[:, None], -1.0).topk(ways).indices
        counts = self.owners.bincount(minlength=len(self.weights)).to(device)
        if self.fixed_labels:
            own = one_of_each(counts[part], ways, generator)
        else:
            own = different(counts[part], ways, len(self.names), MANY_CLASSES, generator)
        return own + (counts.cumsum(0) - counts)[part, None]


def kind_of(store: ClassStore) -> tuple[Any, ...]:
    """What the items of stores must have in common to be items of one store."""
    return store.items.shape[1:], store.items.dtype, store.decode
