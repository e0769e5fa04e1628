"""Episodes: what an algorithm learns from, and how they are drawn.

Shape legend, here and everywhere: T tasks, N ways, K shots, Q queries a class, C channels,
H and W image size. `*item` is the shape of one example, `C, H, W` for an image.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from metarun.augment import Augment
from metarun.errors import DataError
from metarun.images import converted

SPLITS = ("train", "validation", "test")
DRAW_BLOCK = 16  # meta-batches drawn in one go


@dataclass(frozen=True)
class Geometry:
    """The shape of a task: N ways, K shots and Q queries a class. A regression task has one way."""

    ways: int
    shots: int
    queries: int

    def __str__(self) -> str:
        return f"{self.ways}-way {self.shots}-shot"


@dataclass(frozen=True)
class Episodes:
    """A batch of T tasks of one geometry, on one device.

    For classification targets are int64 in [0, N) of shape [T, N*K]; for regression they are
    floating point of shape [T, N*K, outputs].
    """

    support_x: Tensor  # [T, N*K, *item]
    support_y: Tensor  # [T, N*K] or [T, N*K, outputs]
    query_x: Tensor  # [T, N*Q, *item]
    query_y: Tensor  # [T, N*Q] or [T, N*Q, outputs]
    classes: Tensor  # [T, N] int64: which classes of the split the ways are

    def __len__(self) -> int:
        return len(self.support_x)

    @property
    def ways(self) -> int:
        return self.classes.shape[1]

    def to(self, dtype: torch.dtype) -> Episodes:
        """The same tasks with floating point tensors of `dtype`; labels stay whole numbers."""

        def cast(tensor: Tensor) -> Tensor:
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        if self.support_x.dtype == dtype:
            return self
        return Episodes(*map(cast, self.tensors()))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.support_x, self.support_y, self.query_x, self.query_y, self.classes


Draw = tuple[Tensor, ...]  # the random choices that fix a batch of episodes; small


class EpisodeSource(Protocol):
    """One split of a dataset, on a device, from which episodes are drawn.

    Drawing is separate from gathering so that the random choices alone identify episodes:
    evaluation hashes them, and two checkpoints can be shown the same ones.
    """

    item_shape: tuple[int, ...]
    fingerprint: str  # identifies the data the choices refer to

    def check(self, geometry: Geometry) -> None:
        """Raise DataError where the split cannot give such tasks."""

    def draw(self, tasks: int, geometry: Geometry, generator: torch.Generator) -> Draw:
        """Choose `tasks` tasks; the tensors are on the generator's device."""

    def gather(self, draw: Draw, geometry: Geometry) -> Episodes:
        """Turn the choices into episodes on the source's device."""


class ClassStore:
    """The images of one split, device-resident as uint8, grouped by class; an EpisodeSource.

    An episode batch is index arithmetic on the device: no worker process, no Python per image.
    """

    def __init__(
        self,
        images: Tensor,  # [images, C, H, W] uint8, the images of a class next to each other
        counts: Sequence[int],  # images of each class, in order
        names: Sequence[str],  # the classes' names, in order
        name: str,  # what error messages call this split, such as "omniglot test"
        device: torch.device | str = "cpu",
        fingerprint: str | None = None,  # of the images, where it is known already
    ) -> None:
        if sum(counts) != len(images) or len(counts) != len(names):
            raise ValueError(
                f"{len(images)} images, {sum(counts)} counted, {len(counts)} classes, {len(names)} names"
            )
        self.name = name
        self.names = list(names)
        digest = hashlib.sha256(f"{self.names} {list(counts)}".encode())
        digest.update(fingerprint.encode() if fingerprint else images.contiguous().numpy(force=True).data)
        self.fingerprint = digest.hexdigest()
        self.item_shape = tuple(images.shape[1:])
        self.smallest_class, self.largest_class = min(counts), max(counts)
        self.images = images.to(device)
        self.counts = torch.tensor(counts, device=device)
        self.starts = self.counts.cumsum(0) - self.counts
        self.augment: Augment | None = None  # of training images
        self.parts: dict[str, ClassStore] = {}  # by dataset, where there are several
        self.host_for: torch.device | None = None  # the device that images kept in host memory are copied to

    def check(self, geometry: Geometry) -> None:
        """Raise DataError where there are too few classes, or too few images in some class."""
        if geometry.ways < 2:
            raise DataError(f"ways={geometry.ways}: there is nothing to tell apart; set ways to at least 2")
        if geometry.ways > len(self.names):
            raise DataError(
                f"ways={geometry.ways}: {self.name} has {len(self.names)} classes; "
                f"lower ways to at most {len(self.names)}"
            )
        if (wanted := geometry.shots + geometry.queries) > self.smallest_class:
            smallest = self.names[int(self.counts.argmin())]
            raise DataError(
                f"shots={geometry.shots} and queries={geometry.queries} need {wanted} images a class: "
                f"class {smallest!r} of {self.name} has {self.smallest_class}; lower shots or queries"
            )

    def with_images(self, images: Tensor, host_for: torch.device | None = None) -> ClassStore:
        """The same classes on other images [images, C, H, W], and on their device.

        The fingerprint stays: the same choices still mean the same examples. `host_for`: images stay where
        they are, in host memory, and what is drawn of them is copied to that device.
        """
        twin = copy.copy(self)
        twin.images, twin.item_shape, twin.host_for = images, tuple(images.shape[1:]), host_for
        twin.counts, twin.starts = self.counts.to(images.device), self.starts.to(images.device)
        return twin

    def converted(self, item_shape: tuple[int, ...]) -> ClassStore:
        """The same images in another size and number of channels."""
        return self.with_images(converted(self.images, item_shape), self.host_for)

    def class_keys(self, tasks: int, generator: torch.Generator) -> Tensor:
        """Random numbers [T, classes]: a task's ways are the classes that have its largest.

        The largest of independent uniform numbers are a uniform choice without replacement.
        """
        return torch.rand(tasks, len(self.names), generator=generator, device=generator.device)

    def draw(self, tasks: int, geometry: Geometry, generator: torch.Generator) -> Draw:
        """Classes [T, N] and images [T, N, K+Q], both without replacement."""
        device = generator.device
        classes = self.class_keys(tasks, generator).topk(geometry.ways).indices  # [T, N]
        keys = torch.rand(tasks, geometry.ways, self.largest_class, generator=generator, device=device)
        if self.smallest_class < self.largest_class:
            absent = torch.arange(self.largest_class, device=device) >= self.counts.to(device)[classes, None]
            keys = keys.masked_fill(absent, -1.0)
        images = keys.topk(geometry.shots + geometry.queries).indices  # [T, N, K+Q]
        if self.augment is None:
            return classes, images
        return (
            classes,
            images,
            torch.rand(*images.shape, self.augment.numbers, generator=generator, device=device),
        )

    def gather(self, draw: Draw, geometry: Geometry) -> Episodes:
        """Look the chosen images up; pixels become float32 in [0, 1]."""
        classes, pixels, *changes = draw if draw[1].dtype == torch.uint8 else self.fetch(draw)
        x = pixels.float().div_(255)  # [T, N, K+Q, C, H, W]
        if self.augment is not None:
            x = self.augment(x.flatten(0, 2), changes[0].flatten(0, 2)).view(x.shape)
        y = torch.arange(geometry.ways, device=x.device).expand(len(x), -1)  # [T, N]
        support_x, query_x = x.split([geometry.shots, geometry.queries], dim=2)
        return Episodes(
            support_x=support_x.flatten(1, 2),
            support_y=y.repeat_interleave(geometry.shots, dim=1),
            query_x=query_x.flatten(1, 2),
            query_y=y.repeat_interleave(geometry.queries, dim=1),
            classes=classes,
        )

    def fetch(self, draw: Draw) -> Draw:
        """The draw with its images [T, N, K+Q, C, H, W] uint8 in place of their numbers, on the device."""
        classes, images, *changes = (tensor.to(self.images.device) for tensor in draw)
        rows = self.starts[classes].unsqueeze(-1) + images  # [T, N, K+Q]
        if self.host_for is None:
            return classes, self.images[rows], *changes
        # Into pinned memory, from which a GPU copies without the host waiting for it.
        pinned = self.host_for.type == "cuda"
        pixels = torch.empty(*rows.shape, *self.item_shape, dtype=torch.uint8, pin_memory=pinned)
        torch.index_select(self.images, 0, rows.flatten(), out=pixels.view(-1, *self.item_shape))
        return tuple(each.to(self.host_for, non_blocking=pinned) for each in (classes, pixels, *changes))


def split_draw(draw: Draw, tasks_at_once: int) -> Iterator[Draw]:
    """The same tasks, at most `tasks_at_once` at a time, in parts as even as can be."""
    parts = math.ceil(len(draw[0]) / tasks_at_once)
    yield from zip(*(tensor.tensor_split(parts) for tensor in draw), strict=True)


def seeded(name: str) -> torch.Generator:
    """A CPU generator that depends on the name alone."""
    digest = hashlib.sha256(name.encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def training_draws(
    source: EpisodeSource,
    tasks: int,
    geometry: Geometry,
    seed: int,
    start: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Draw]:
    """The meta-batches of iterations `start`, `start` + 1, ..., on `device`.

    What is drawn at an iteration depends on the seed and the iteration alone. It is drawn on
    the CPU, whose generator gives every device the same episodes, and in blocks, so that small
    tasks do not pay for it each time.
    """
    block, skip = divmod(start, DRAW_BLOCK)
    on_gpu = torch.device(device).type == "cuda"
    while True:
        draws = source.draw(DRAW_BLOCK * tasks, geometry, seeded(f"training {seed} {block}"))
        if on_gpu:  # pinned, so that the host does not wait for the device
            draws = tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in draws)
        meta_batches = list(zip(*(tensor.split(tasks) for tensor in draws), strict=True))
        yield from meta_batches[skip:]
        block, skip = block + 1, 0


def fetched_ahead(draws: Iterator[Draw], store: ClassStore) -> Iterator[Draw]:
    """The draws with their images, copied from host memory while the draw before is at work.

    A thread gathers them and, on a GPU, a stream of its own copies them. A draw that does not fit there
    comes as it is: who gathers it in parts has room for those.
    """
    assert store.host_for is not None
    stream = torch.cuda.Stream(store.host_for) if store.host_for.type == "cuda" else None

    def fetch(draw: Draw) -> Draw:
        try:
            with torch.cuda.stream(stream):  # None: no other stream
                return store.fetch(draw)
        except torch.OutOfMemoryError:
            return draw

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(fetch, next(draws))
        while True:
            ready = coming.result()
            if stream is not None:
                current = torch.cuda.current_stream(store.host_for)
                current.wait_stream(stream)  # before the next copy is put into it
                for tensor in ready:
                    if tensor.is_cuda:
                        tensor.record_stream(current)
            coming = pool.submit(fetch, next(draws))
            yield ready


def sample(source: EpisodeSource, tasks: int, geometry: Geometry, generator: torch.Generator) -> Episodes:
    """Draw and gather in one go."""
    return source.gather(source.draw(tasks, geometry, generator), geometry)
