"""Images in other classes than their labels say, or in several views of each: for training tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from metarun.errors import ConfigError
from metarun.tasks.choice import different
from metarun.tasks.class_store import HASHED, MANY_CLASSES, MANY_ITEMS, ClassStore, check_examples, hashes_of
from metarun.tasks.episodes import EpisodeShape


class PseudoClasses(ClassStore):
    """The images of a split in classes that need not follow from their labels.

    There may be several partitions of the images into classes. All classes of a task are of one partition,
    which is drawn first, each with the same probability.

    Args:
        store: the split, of whose classes nothing is read.
        members: the numbers of the images of each class, one class after the other, in one partition after
            the other; an image may be in no class of a partition.
        counts: the number of images of each class.
        sizes: the number of classes of each partition; None: there is one partition.
        views: whether the examples of a class are views of the same images: augmented copies of as many
            images as there are shots, or of the only one.
        plain: how many examples of a class, the first ones, are not augmented.
    """

    varies = False

    def __init__(
        self,
        store: ClassStore,
        members: Tensor,
        counts: Sequence[int],
        sizes: Sequence[int] | None = None,
        views: bool = False,
        plain: int = 0,
    ) -> None:
        items, device = store.items, store.items.device
        super().__init__(items, [len(items)], ["all"], store.name, device, store.fingerprint, store.decode)
        self.host_for, self.augment, self.views, self.plain = store.host_for, store.augment, views, plain
        self.members = members.to(device)
        self.counts = torch.tensor(counts, device=device)
        self.starts = self.counts.cumsum(0) - self.counts
        self.smallest_class, self.largest_class = min(counts), max(counts)
        self.names = [f"class {i}" for i in range(len(counts))]
        self.sizes = torch.tensor(sizes or [len(counts)])
        self.has_fixed_classes = len(self.sizes) == 1
        self.spec = replace(store.spec, classes=len(counts), description=None)

    def check(self, shape: EpisodeShape) -> None:
        self.check_shots(shape.shots)
        for size in self.sizes.tolist():
            if shape.ways > size:
                raise ConfigError(f"ways={shape.ways}: {self.name} gives {size} classes; lower ways")
        if not self.views or self.largest_class > 1:
            needed = replace(shape, queries=0) if self.views else shape
            smallest = f"class {self.names[int(self.counts.argmin())]!r}"
            check_examples(self.name, smallest, self.smallest_class, needed)

    def draw_classes(self, tasks: int, ways: int, generator: torch.Generator) -> Tensor:
        """The classes of tasks [T, N]: a partition for each task, and its ways from that one."""
        sizes = self.sizes.to(generator.device)
        partitions = torch.zeros(tasks, dtype=torch.long, device=generator.device)
        if len(sizes) > 1:
            partitions = torch.randint(len(sizes), (tasks,), generator=generator, device=generator.device)
        own = different(sizes[partitions], ways, int(sizes.max()), MANY_CLASSES, generator)
        return own + (sizes.cumsum(0) - sizes)[partitions, None]

    def draw_items(self, classes: Tensor, shape: EpisodeShape, generator: torch.Generator) -> Tensor:
        if not self.views:
            return super().draw_items(classes, shape, generator)
        images = min(shape.shots, self.largest_class)
        counts = self.counts.to(generator.device)[classes]
        places = different(counts, images, self.largest_class, MANY_ITEMS, generator)
        return places[..., torch.arange(shape.shots + shape.queries, device=places.device) % images]

    def items_at(self, classes: Tensor, places: Tensor) -> Tensor:
        return self.members[super().items_at(classes, places)]

    def augmented(self, x: Tensor, random: Tensor) -> Tensor:
        changed = super().augmented(x[:, :, self.plain :], random[:, :, self.plain :])
        return torch.cat([x[:, :, : self.plain], changed], 2)


def by_content(items: Tensor) -> Tensor:
    """The numbers of items in an order that follows from their content alone, whatever their classes are.

    Args:
        items: [items, *stored].
    """
    hashes = torch.cat([hashes_of(block) for block in items.split(HASHED)]).cpu()
    firsts = items.reshape(len(items), -1)[:, 0].cpu()  # blank images have one hash
    order = firsts.argsort(stable=True)
    return order[hashes[order].argsort(stable=True)]
