"""The items of one split, grouped by class, from which episodes are drawn by index arithmetic."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.errors import DataError, counted
from metarun.tasks.choice import different, one_of_each
from metarun.tasks.episodes import Episodes, EpisodeShape, Tasks
from metarun.tasks.resize import resized
from metarun.tasks.source import Draw, Fetched
from metarun.tasks.spec import TaskSpec
from metarun.tasks.varied import VariedTasks

MARKS = 8  # hashes kept of each class
NO_MARK = -(1 << 63)  # in place of a hash, of classes with fewer items
HASHED = 256  # items hashed at once, which stay in the processor's cache
# Above these, numbers are drawn in another way (see `different`), with other results for a seed.
MANY_ITEMS = 2_000  # of a class; tieredImageNet has up to 1,300
MANY_CLASSES = 10_000  # of a split; Omniglot with rotations has up to 6,492
OF_ITEMS = ("item_shape", "classes", "item_dtype")  # the parts of a spec that follow from the items
PADDING = 0  # the token id that fills a sequence up to the length of the longest


class Augmentation(Protocol):
    """A random change of training items, such as shifts and flips of images."""

    numbers: int  # uniform random numbers in [0, 1) that each item needs

    def __call__(self, items: Tensor, numbers: Tensor) -> Tensor:
        """Items [B, *item], each changed by its numbers [B, numbers]."""


def pixels(items: Tensor) -> Tensor:
    """Images of bytes as float32 in [0, 1]."""
    return items.float().div_(255)


def unchanged(items: Tensor) -> Tensor:
    """Items as they are, such as features of a network."""
    return items


def numbers(items: Tensor) -> Tensor:
    """Rows of numbers as float32."""
    return items.float()


def tokens(items: Tensor) -> Tensor:
    """Token ids as int64; `PADDING` after the end of a sequence (see `padding_mask`)."""
    return items.long()


def padded(sequences: Sequence[Tensor]) -> Tensor:
    """Sequences of token ids [length] of unequal lengths as items [items, L] for a class store."""
    return torch.nn.utils.rnn.pad_sequence(list(sequences), batch_first=True, padding_value=PADDING)


def padding_mask(ids: Tensor) -> Tensor:
    """True where token ids [..., L] are tokens, False where they are padding."""
    return ids != PADDING


class ClassStore(VariedTasks):
    """The items of one split, of any type and shape, grouped by class and kept on a device.

    An episode batch is index arithmetic on the device, without worker processes and without Python code for
    each item.

    Args:
        items: [items, *stored], the items of a class next to each other: pixels as uint8, token ids as
            int32, rows of numbers as float.
        counts: the number of items of each class, in order.
        names: the classes' names, in order.
        name: what messages call this split, such as "omniglot test".
        device: where the items are kept.
        fingerprint: identifies the items, where that is known already; None: it is computed from them.
        decode: stored items [..., *stored] to what a network takes [..., *item]: `pixels`, `tokens`,
            `numbers`, or a function of yours.
        about: a description of each class, float [classes, *description], for tasks without examples.

    Raises:
        ValueError: where the counts do not fit the items or the names, or the descriptions the names.
    """

    def __init__(
        self,
        items: Tensor,
        counts: Sequence[int],
        names: Sequence[str],
        name: str,
        device: torch.device | str = "cpu",
        fingerprint: str | None = None,
        decode: Callable[[Tensor], Tensor] = pixels,
        about: Tensor | None = None,
    ) -> None:
        if sum(counts) != len(items) or len(counts) != len(names):
            raise ValueError(
                f"{len(items)} items, {sum(counts)} counted, {len(counts)} classes, {len(names)} names"
            )
        if about is not None and len(about) != len(names):
            raise ValueError(f"{len(about)} descriptions of {len(names)} classes")
        self.name = name
        self.names = list(names)
        digest = hashlib.sha256(f"{self.names} {list(counts)}".encode())
        if decode is not pixels or items.dtype != torch.uint8:  # the same bytes may be other items
            kind = getattr(decode, "__qualname__", type(decode).__qualname__)
            digest.update(f" {kind} {items.dtype} {tuple(items.shape[1:])} ".encode())
        digest.update(fingerprint.encode() if fingerprint else _bytes_of(items))
        self.fingerprint = digest.hexdigest()
        self.decode = decode
        self.spec = spec_of(items, decode, len(names))
        self.about: Tensor | None = None
        if about is not None:
            self.about = about.to(device)
            self.spec = replace(self.spec, description=tuple(about.shape[1:]))
        self.smallest_class, self.largest_class = min(counts), max(counts)
        self.items = items.to(device)
        self.counts = torch.tensor(counts, device=device)
        self.starts = self.counts.cumsum(0) - self.counts
        self.augment: Augmentation | None = None  # of training items
        self.fixed_labels = False  # in training: class i is always way i modulo the number of ways
        self.parts: dict[str, ClassStore] = {}  # type: ignore[assignment]

    @property
    def item_shape(self) -> tuple[int, ...]:
        return self.spec.item_shape

    @property
    def described(self) -> bool:  # type: ignore[override]
        return self.about is not None

    def item_counts(self) -> Sequence[int]:
        return self.counts.tolist()

    def described_by(self) -> str:
        return "" if self.about is None else hashlib.sha256(_bytes_of(self.about)).hexdigest()

    def remarks(self) -> Sequence[str]:
        if self.about is None:
            return []
        return [f"{self.name}: each class has a description of {self.about[0].numel()} numbers, for shots=0"]

    def check(self, shape: EpisodeShape) -> None:
        self.check_shots(shape.shots)
        smallest = f"class {self.names[int(self.counts.argmin())]!r}"
        self.check_ways(shape.least.ways)
        check_examples(self.name, smallest, self.smallest_class, shape)

    def check_ways(self, ways: int) -> None:
        """Raise DataError if there are not that many classes."""
        check_classes(self.name, len(self.names), ways)

    def with_items(
        self,
        items: Tensor,
        host_for: torch.device | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> ClassStore:
        """The same classes on other items, and on their device.

        The fingerprint stays: the same choices still name the same examples.

        Args:
            items: [items, *stored], in the same order.
            host_for: None, or the device that fetched items are copied to while `items` stay in host memory.
            decode: of these items; None: as before.
        """
        twin = copy.copy(self)
        twin.items, twin.host_for, twin.decode = items, host_for, decode or self.decode
        twin.spec = spec_of(items, twin.decode, len(self.names), self.spec)
        twin.counts, twin.starts = self.counts.to(items.device), self.starts.to(items.device)
        if self.about is not None:
            twin.about = self.about.to(host_for or items.device)
        return twin

    @cached_property
    def marks(self) -> Tensor:
        """The content of each class, int64 [classes, MARKS] on the CPU: the smallest hashes of its items.

        Classes that have many items in common have some of these in common, whatever the order of the items
        (Broder, "On the resemblance and containment of documents", 1997). Blank items are not counted.
        """
        hashes = torch.cat([hashes_of(block) for block in self.items.split(HASHED)]).cpu()
        return marks_of(
            hashes[s : s + n] for s, n in zip(self.starts.tolist(), self.counts.tolist(), strict=True)
        )

    def keeping(self, classes: Sequence[int]) -> ClassStore:
        """The same items, of which only those of some classes are drawn.

        Args:
            classes: the numbers of the classes to keep, at least one, in ascending order.
        """
        twin, chosen = copy.copy(self), torch.tensor(classes)
        twin.names = [self.names[i] for i in classes]
        twin.name = f"{self.name} without {len(self.names) - len(classes)} training classes"
        twin.fingerprint = hashlib.sha256(f"{self.fingerprint} {twin.names}".encode()).hexdigest()
        twin.marks = self.marks[chosen]
        twin.counts, twin.starts = self.counts[chosen], self.starts[chosen]
        if self.about is not None:
            twin.about = self.about[chosen]
        twin.smallest_class, twin.largest_class = int(twin.counts.min()), int(twin.counts.max())
        twin.spec = replace(self.spec, classes=len(classes))
        return twin

    def resized(self, item_shape: tuple[int, ...]) -> ClassStore:
        """The same images in another size and number of channels."""
        return self.with_items(resized(self.items, item_shape), self.host_for)

    def draw_classes(self, tasks: int, ways: int, generator: torch.Generator) -> Tensor:
        """The classes of tasks [T, N], without replacement."""
        counts = torch.full((tasks,), len(self.names), device=generator.device)
        if self.fixed_labels:
            return one_of_each(counts, ways, generator)
        return different(counts, ways, len(self.names), MANY_CLASSES, generator)

    def draw_items(self, classes: Tensor, shape: EpisodeShape, generator: torch.Generator) -> Tensor:
        """The places [T, N, K+Q] of the items of classes [T, N], without replacement."""
        counts = self.counts.to(generator.device)[classes]  # [T, N]
        return different(counts, shape.shots + shape.queries, self.largest_class, MANY_ITEMS, generator)

    def draw(self, tasks: int, shape: EpisodeShape, generator: torch.Generator) -> Draw:
        """Classes [T, N], items [T, N, K+Q] and, for an augmentation, random numbers."""
        if shape.varied:
            return self.draw_varied(tasks, shape, generator)
        classes = self.draw_classes(tasks, shape.ways, generator)
        items = self.draw_items(classes, shape, generator)
        if self.augment is None:
            return classes, items
        size = *items.shape, self.augment.numbers
        return classes, items, torch.rand(*size, generator=generator, device=generator.device)

    def gather(self, draw: Draw, shape: EpisodeShape) -> Tasks:
        if shape.varied:
            return self.gather_varied(draw)
        return self.gather_equal(draw, shape)

    def gather_equal(self, draw: Draw, shape: EpisodeShape) -> Episodes:
        """The tasks of a draw, all of one shape."""
        classes, items, *random = draw if isinstance(draw, Fetched) else self.fetch(draw)
        x = self.decode(items)  # [T, N, K+Q, *item]
        if self.augment is not None:
            x = self.augmented(x, random[0])
        y = torch.arange(shape.ways, device=x.device).expand(len(x), -1)  # [T, N]
        support_x, query_x = x.split([shape.shots, shape.queries], dim=2)
        return Episodes(
            support_x=support_x.flatten(1, 2),
            support_y=y.repeat_interleave(shape.shots, dim=1),
            query_x=query_x.flatten(1, 2),
            query_y=y.repeat_interleave(shape.queries, dim=1),
            classes=classes,
            objective=self.spec.objective,
            about=None if self.about is None else self.about[classes],
        )

    def augmented(self, x: Tensor, random: Tensor) -> Tensor:
        """Examples [T, N, B, *item], each changed by its random numbers [T, N, B, numbers]."""
        assert self.augment is not None
        return self.augment(x.flatten(0, 2), random.flatten(0, 2)).view(x.shape)

    def items_at(self, classes: Tensor, places: Tensor) -> Tensor:
        """Which items the places [T, N, B] of the classes [T, N] are, [T, N, B]."""
        return self.starts[classes].unsqueeze(-1) + places

    def fetch(self, draw: Draw) -> Fetched:
        """The draw with its items [T, N, K+Q, *stored] in place of their numbers, on the device."""
        classes, places, *random = (tensor.to(self.items.device) for tensor in draw)
        rows = self.items_at(classes, places)  # [T, N, K+Q]
        if self.host_for is None:
            return Fetched((classes, self.items[rows], *random))
        # Into pinned memory, from which a GPU copies without the host waiting for it.
        pinned = self.host_for.type == "cuda"
        stored = self.items.shape[1:]
        items = torch.empty(*rows.shape, *stored, dtype=self.items.dtype, pin_memory=pinned)
        torch.index_select(self.items, 0, rows.flatten(), out=items.view(-1, *stored))
        return Fetched(each.to(self.host_for, non_blocking=pinned) for each in (classes, items, *random))


def check_classes(name: str, classes: int, ways: int) -> None:
    """Raise DataError if a split has too few classes for tasks of so many ways."""
    if ways < 2:
        raise DataError(f"ways={ways}: classification needs at least 2 classes; set ways to 2 or more")
    if classes < 2:
        raise DataError(f"{name} has one class, and a task needs two; choose another split or dataset")
    if ways > classes:
        raise DataError(
            f"ways={ways}: {name} has {counted(classes, 'class', 'classes')}; lower ways to at most {classes}"
        )


def check_examples(name: str, smallest: str, examples: int, shape: EpisodeShape) -> None:
    """Raise DataError if the smallest class of a split has too few examples for tasks of this shape."""
    least = shape.least
    if (wanted := least.shots + least.queries) > examples:
        raise DataError(
            f"shots={least.shots} and queries={least.queries} need {counted(wanted, 'example')} a class: "
            f"{smallest} of {name} has {examples}; lower shots or queries"
        )


def joined(stores: Sequence[ClassStore], name: str, device: torch.device | str = "cpu") -> ClassStore:
    """The classes of several splits of a dataset, whose items are copied into one tensor.

    Args:
        stores: the splits.
        name: of the splits together, such as "all".
        device: where the items are kept.
    """
    first, abouts = stores[0], [store.about for store in stores if store.about is not None]
    return ClassStore(
        torch.cat([store.items for store in stores]),
        [count for store in stores for count in store.counts.tolist()],
        [name for store in stores for name in store.names],
        f"{first.name.rpartition(' ')[0]} {name}",
        device,
        fingerprint=" ".join(store.fingerprint for store in stores),
        decode=first.decode,
        about=torch.cat(abouts) if len(abouts) == len(stores) else None,
    )


def spec_of(
    items: Tensor, decode: Callable[[Tensor], Tensor], classes: int, like: TaskSpec | None = None
) -> TaskSpec:
    """The spec of classification on items, as `decode` gives them; otherwise that of `like`."""
    one = decode(items[:1])
    spec = TaskSpec(tuple(one.shape[1:]), classes=classes, item_dtype=one.dtype)
    return spec if like is None else replace(like, **{name: getattr(spec, name) for name in OF_ITEMS})


def marks_of(classes: Iterable[Tensor]) -> Tensor:
    """The marks [classes, MARKS] of classes, of which the hashes of all items are given."""
    rows = []
    for hashes in classes:
        own = hashes.unique()  # sorted
        own = own[own != NO_MARK][:MARKS]
        rows.append(F.pad(own, (0, MARKS - len(own)), value=NO_MARK))
    return torch.stack(rows)


def hashes_of(items: Tensor) -> Tensor:
    """The hash of each item, int64 [items]; NO_MARK for items whose numbers are all equal.

    It is the sum of the item's 32-bit words, each times a fixed random number, modulo 2**64: multilinear
    hashing (Lemire and Kaser, "Strongly universal string hashing is fast", 2014).
    """
    flat = items.reshape(len(items), -1)
    blank = flat.amin(1) == flat.amax(1)
    octets = flat.contiguous().view(torch.uint8)
    words = F.pad(octets, (0, -octets.shape[1] % 4)).view(torch.int32).long()
    # Not by torch's generator: checkpoints keep hashes, and NumPy promises the same numbers in all versions.
    factors = torch.from_numpy(np.random.PCG64(0).random_raw(words.shape[1]).view(np.int64))
    return (words * factors.to(words.device)).sum(1).masked_fill(blank, NO_MARK)


def _bytes_of(items: Tensor) -> memoryview:
    return items.cpu().contiguous().view(-1).view(torch.uint8).numpy().data
