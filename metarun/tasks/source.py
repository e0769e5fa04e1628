"""Where tasks come from: one split of a dataset, from which batches of tasks are drawn."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metarun.errors import DataError
from metarun.tasks.episodes import EpisodeShape, Outcome, Tasks
from metarun.tasks.objectives import Objective
from metarun.tasks.spec import TaskSpec

CURVE = 200  # the least number of queries of a regression task, so that its curve can be drawn
SPLITS = ("train", "validation", "test")

#: The random choices that name a batch of tasks: small tensors, whose first dimension is T.
Draw = tuple[Tensor, ...]

#: What is scored beside models: a draw and the shape of its tasks to their outcome.
ReferenceOutcome = Callable[[Draw, EpisodeShape], Outcome]


class Fetched(tuple[Tensor, ...]):
    """A draw whose items have been looked up already: (classes, items, ...), T first in each."""

    __slots__ = ()


class EpisodeSource(ABC):
    """One split of a dataset on a device; the extension point for a new kind of data.

    Drawing is separate from gathering, so that the random choices alone identify a batch of tasks:
    evaluation hashes them, training is stateless, and two checkpoints can be given the same tasks.

    Attributes:
        spec: the kind of its tasks.
        name: what messages call this split, such as "omniglot test".
        fingerprint: identifies the data that choices refer to.
        names: the classes' names, in order; empty where there are no classes.
        tasks: the names of stored tasks, such as patients; empty where tasks are drawn anew, or from classes.
        parts: the sources of several datasets by their names, where this one mixes them; else empty.
        described: whether a class is known without examples of it, so that tasks may have 0 shots.
        host_for: the device that fetched items are copied to, where items stay in host memory; else None.
        readable: whether `examples` shows examples in words.
        has_fixed_classes: whether an example has the same class in all tasks that contain it.
        varies: whether it has tasks of different ways and shots (`EpisodeShape.varied`).
    """

    spec: TaskSpec
    name: str
    fingerprint: str
    names: Sequence[str] = ()
    tasks: Sequence[str] = ()
    parts: Mapping[str, EpisodeSource] = {}
    described: bool = False
    host_for: torch.device | None = None
    readable: bool = False
    has_fixed_classes: bool = True
    varies: bool = False

    @property
    def undisturbed(self) -> EpisodeSource:
        """The source of the same classes whose tasks are not made of others (`train_tasks`)."""
        return self

    @abstractmethod
    def check(self, shape: EpisodeShape) -> None:
        """Raise DataError where the split cannot give tasks of this shape."""

    def check_shots(self, shots: int) -> None:
        """Raise DataError where tasks have no shots, and nothing else says what their classes are."""
        if not (shots or self.described):
            raise DataError(
                f"shots=0: {self.name} has no descriptions of its classes; set shots to 1 or more, or choose "
                "a dataset that has some, such as glyphs, or image_folder with dataset.descriptions=FILE.csv"
            )

    def usual_ways(self, ways: int) -> int:
        """The ways of a sample task for which nobody chose a number; `ways` is the default."""
        return ways

    def pictured(self, shape: EpisodeShape) -> EpisodeShape:
        """The shape of a sample task for a figure: with queries for a curve, if tasks are drawn anew."""
        drawn_anew = not (self.names or self.item_counts())
        return replace(shape, queries=max(shape.queries, CURVE)) if drawn_anew else shape

    @abstractmethod
    def draw(self, tasks: int, shape: EpisodeShape, generator: torch.Generator) -> Draw:
        """Choose `tasks` tasks.

        Args:
            tasks: T.
            shape: the ways, shots and queries of each.
            generator: the only source of randomness; the tensors are on its device.
        """

    @abstractmethod
    def gather(self, draw: Draw, shape: EpisodeShape) -> Tasks:
        """The tasks that choices name, on the source's device; index arithmetic, without randomness."""

    def with_new_noise(self, draw: Draw, fresh: Draw) -> Draw:
        """The tasks of a draw with what does not define a task, such as seeds of noise, from a fresh draw."""
        return draw

    def remarks(self) -> Sequence[str]:
        """What a user should know about the data, one line each, such as the lengths of texts."""
        return []

    def described_by(self) -> str:
        """Identifies the descriptions of the classes; "" where there are none."""
        return ""

    def item_counts(self) -> Sequence[int]:
        """The number of items of each class, or of each stored task; empty where tasks are drawn anew."""
        return []

    def references(self, shape: EpisodeShape, shared: dict[Any, Any]) -> Mapping[str, ReferenceOutcome]:
        """What is evaluated beside models on tasks of a shape, by the name of its row; empty for most.

        Args:
            shape: the shape of the tasks.
            shared: what sources keep for each other during one evaluation.
        """
        return {}

    def examples(self, draw: Draw, shape: EpisodeShape) -> list[dict[str, str]]:
        """The examples of the first task of a draw as rows of a table, by heading, if it is `readable`."""
        raise NotImplementedError

    def reporting(self, objective: Objective) -> EpisodeSource:
        """The same source with the loss and the metrics of another objective."""
        twin = copy.copy(self)
        twin.spec = replace(self.spec, objective=objective)
        twin.parts = {name: part.reporting(objective) for name, part in self.parts.items()}
        return twin


def split_draw(draw: Draw, tasks_at_once: int) -> Iterator[Draw]:
    """The same tasks, at most `tasks_at_once` at a time, in parts as even as possible."""
    parts = math.ceil(len(draw[0]) / tasks_at_once)
    yield from (type(draw)(part) for part in zip(*(x.tensor_split(parts) for x in draw), strict=True))
