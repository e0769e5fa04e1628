"""Tasks of different ways and shots, as in Meta-Dataset (Triantafillou et al. 2020, section 3.2, appendix).

The sizes of a task are drawn as in the authors' code (google-research/meta-dataset, `sampling.py`, with the
values of its default configuration). Its choice of related classes by a hierarchy, for ImageNet and Omniglot,
is not part of this: classes are drawn uniformly.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarun.tasks.episodes import FEWEST_WAYS, Episodes, EpisodeShape, Tasks, UnequalEpisodes
from metarun.tasks.source import Draw, EpisodeSource

MOST_SUPPORT = 500  # examples of a support set
WEIGHT = math.log(2)  # the logarithm of a class's weight is uniform in [-WEIGHT, WEIGHT]


class Sizes(NamedTuple):
    """The shots [T, N] of each class and the queries a class [T] of T tasks; a class of 0 shots is no way."""

    shots: Tensor
    queries: Tensor


def draw_sizes(counts: Tensor, classes: Tensor, shape: EpisodeShape, generator: torch.Generator) -> Sizes:
    """Choose how many ways, queries and shots tasks have.

    The ways are uniform from 5 (`shape.ways` if that is less) to `shape.ways`, or to the number of classes;
    they are the first of `counts`. All classes have as many queries: `shape.queries`, at most half of the
    smallest class. The support has ceil(beta min(`shape.shots`, rest of the class)) examples for each class,
    beta uniform in (0, 1], at most 500 together. They are divided among the classes in proportion to
    exp(alpha) times the size of the class, alpha uniform in [-log 2, log 2], rounded down, at least 1 each.

    Args:
        counts: the size of each class that a task may have, in random order, [T, N].
        classes: how many of these there are, [T].
        shape: the largest number of ways; the most examples that a class adds to the size of a support; the
            most queries.
        generator: the only source of randomness.
    """
    tasks, device = len(counts), generator.device

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, device=device, dtype=torch.float64)

    most = classes.clamp(max=shape.ways)
    fewest = most.clamp(max=FEWEST_WAYS)
    ways = fewest + (uniform(tasks) * (most - fewest + 1)).long()
    used = torch.arange(counts.shape[1], device=device) < ways[:, None]
    smallest = counts.masked_fill(~used, torch.iinfo(counts.dtype).max).amin(1)
    queries = (smallest // 2).clamp(max=shape.queries)
    rest = counts - queries[:, None]
    shares = (uniform(tasks, 1) * rest.clamp(max=shape.shots)).floor() + 1
    support = (shares * used).sum(1, keepdim=True).clamp(max=MOST_SUPPORT)
    weights = counts * torch.exp((2 * uniform(*counts.shape) - 1) * WEIGHT) * used
    wanted = (weights / weights.sum(1, keepdim=True) * (support - ways[:, None])).floor().long() + 1
    return Sizes(torch.minimum(wanted, rest) * used, queries)


def most_examples(shape: EpisodeShape) -> int:
    """The most examples that a task has."""
    return MOST_SUPPORT + shape.ways * shape.queries


def packed(items: Tensor, sizes: Sizes, shape: EpisodeShape) -> Tensor:
    """The chosen items of each task, those of the support first, filled up with -1: [T, `most_examples`].

    Args:
        items: different items of each class in random order, [T, N, most of a class].
        sizes: how many of them are used.
        shape: of the tasks.
    """
    turn = torch.arange(items.shape[2], device=items.device)
    shots, queries = sizes.shots.unsqueeze(2), sizes.queries[:, None, None]
    support = turn < shots
    query = (turn >= shots) & (turn < shots + queries) & (shots > 0)
    whole = items.new_full((len(items), most_examples(shape)), -1)
    for row, own, first, second in zip(whole, items, support, query, strict=True):
        chosen = torch.cat([own[first], own[second]])
        row[: len(chosen)] = chosen
    return whole


def ways_of(shots: Tensor, queries: int) -> tuple[Tensor, Tensor]:
    """The way of each support example [S] and of each query [B] of one task, by its shots [N]."""
    own = shots[shots > 0]
    ways = torch.arange(len(own), device=shots.device)
    return ways.repeat_interleave(own), ways.repeat_interleave(queries)


class VariedTasks(EpisodeSource):
    """The part of a class store that gives tasks of different ways and shots; see `ClassStore`."""

    varies = True
    items: Tensor
    counts: Tensor
    starts: Tensor
    largest_class: int
    decode: Callable[[Tensor], Tensor]
    augment: Any
    about: Tensor | None

    @abstractmethod
    def draw_classes(self, tasks: int, ways: int, generator: torch.Generator) -> Tensor:
        """The classes of tasks [T, N], without replacement."""

    @abstractmethod
    def draw_items(self, classes: Tensor, shape: EpisodeShape, generator: torch.Generator) -> Tensor:
        """The places [T, N, K+Q] of the items of classes [T, N], without replacement."""

    def draw_varied(self, tasks: int, shape: EpisodeShape, generator: torch.Generator) -> Draw:
        """Tasks of their own sizes: classes and shots [T, N], queries [T], items (see `packed`), numbers."""
        device = generator.device
        classes = self.draw_classes(tasks, min(shape.ways, len(self.names)), generator)
        beside = self.classes_beside(classes[:, 0])
        classes = classes.clamp(max=len(self.names) - 1)  # those after the first of `beside` are not used
        counts = self.counts.to(device)[classes]
        sizes = draw_sizes(counts, beside, shape, generator)
        most = min(self.largest_class, MOST_SUPPORT + shape.queries)
        places = self.draw_items(classes, EpisodeShape(shape.ways, most, 0), generator)
        items = packed(places, sizes, shape)
        if self.augment is None:
            return classes, *sizes, items
        numbers = torch.rand(*items.shape, self.augment.numbers, generator=generator, device=device)
        return classes, *sizes, items, numbers

    def classes_beside(self, classes: Tensor) -> Tensor:
        """How many classes can be in a task with each of some classes [T], counting itself."""
        return torch.full_like(classes, len(self.names))

    def gather_varied(self, draw: Draw) -> Tasks:
        """The tasks of `draw_varied`; a single one as episodes of one shape."""
        episodes = tuple(self.gather_one(*one) for one in zip(*draw, strict=True))
        return UnequalEpisodes(episodes) if len(episodes) > 1 else episodes[0].balanced()

    def gather_one(
        self, classes: Tensor, shots: Tensor, queries: Tensor, places: Tensor, *random: Tensor
    ) -> Episodes:
        """One task of `gather_varied`, as a batch of one."""
        support_y, query_y = ways_of(shots, int(queries))
        classes, ways = classes[shots > 0], torch.cat([support_y, query_y])
        rows = self.starts[classes.to(self.starts.device)[ways]] + places[: len(ways)].to(self.starts.device)
        device = self.host_for or self.items.device
        x = self.decode(self.items[rows].to(device))
        if self.augment is not None:
            x = self.augment(x, random[0][: len(ways)].to(device))
        support_x, query_x = x.split([len(support_y), len(query_y)])
        about = None if self.about is None else self.about[classes.to(self.about.device)]
        tensors = (support_x, support_y.to(device), query_x, query_y.to(device), classes.to(device))
        episode = Episodes(*tensors, objective=self.spec.objective, about=about)
        return episode.map(lambda tensor: tensor.unsqueeze(0))
