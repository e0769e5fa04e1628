"""Batches of tasks: what an algorithm learns from.

Shape legend, here and everywhere: T tasks, N ways, K shots, Q queries a class, S support and B query
examples of a task (N*K and N*Q where classes are of equal size), C channels, H and W image size.
`*item` is the shape of one example: `C, H, W` for an image, `L` for token ids, `F` for a row of numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from metarun.tasks.objectives import CLASSIFICATION, Objective, PerTask, class_weights, weighted

#: T tasks' examples [T, B, *item] to outputs [T, B, N], each task by its own weights.
Model = Callable[[Tensor], Tensor]
MOST_COPIES = 4  # see `Episodes.repeated`
FEWEST_WAYS = 5  # of varied tasks


@dataclass(frozen=True)
class EpisodeShape:
    """The size of a task: N ways, K shots and Q queries a class. A regression task has one way.

    If tasks are `varied`, each has its own size, and these are bounds (metarun/tasks/varied.py).
    """

    ways: int
    shots: int
    queries: int
    varied: bool = False

    def __str__(self) -> str:
        if self.varied:
            return f"varied, up to {self.ways}-way"
        return f"{self.ways}-way {self.shots}-shot"

    @property
    def least(self) -> EpisodeShape:
        """The smallest task: this one, unless tasks are varied."""
        return EpisodeShape(min(self.ways, FEWEST_WAYS), 1, 1) if self.varied else self

    @property
    def chance(self) -> str:
        """The accuracy of a guess, for reports of tasks without examples; "" with examples, or one way."""
        return "" if self.shots or self.ways == 1 else f"chance {1 / self.ways:.1%}".replace("%", " %")


@dataclass(frozen=True)
class Outcome:
    """What a model made of the queries of T tasks.

    Args:
        loss: the loss of each task [T], whose mean training minimises; or that mean itself, where a
            method's loss is not a sum over tasks.
        scores: each metric's score of each task [T], by the metric's name; without a graph.
        outputs: the outputs for the queries [T, B, N], where there are any.
        gain: how much adaptation raised the score of each task [T], where that is known without more work.
    """

    loss: Tensor
    scores: Mapping[str, Tensor]
    outputs: Tensor | None = None
    gain: Tensor | None = None


class Tasks(ABC):
    """A batch of T tasks on one device, which carry their own objective.

    The extension point for a new kind of task. An inner loop asks for the support loss of given weights at
    each of its steps, the outer loop for the loss and the scores on the queries; neither looks at the data.
    So a task may also make its data with the weights it is given, as an environment does.
    """

    #: What tasks are called where their number is reported.
    unit: ClassVar[str] = "episodes"

    @abstractmethod
    def __len__(self) -> int:
        """T, the number of tasks."""

    @property
    @abstractmethod
    def outputs(self) -> int:
        """How many numbers a network predicts for an example: the ways, or the values of a regression."""

    @abstractmethod
    def support_loss(self, model: Model, step: int) -> Tensor:
        """The loss [T] that an inner loop minimises.

        Args:
            model: the network with the weights that each task has at this step.
            step: the number of the inner step, from 0.
        """

    @abstractmethod
    def query(self, model: Model, loss: PerTask | None = None) -> Outcome:
        """The loss and the scores of a model on the queries.

        Args:
            model: the network with each task's adapted weights.
            loss: (outputs, targets) -> [T], where a method minimises another loss than the tasks' own.
        """

    def to(self, dtype: torch.dtype) -> Tasks:
        """The same tasks with floating point numbers of `dtype`."""
        return self

    def parts(self) -> Sequence[Tasks]:
        """Batches that each have one shape and can be run at once; this one alone, for most."""
        return [self]


@dataclass(frozen=True)
class Episodes(Tasks):
    """T tasks of one shape with labelled support and query examples.

    Args:
        support_x: [T, S, *item].
        support_y: class numbers [T, S] int64 in [0, N), or values [T, S, V].
        query_x: [T, B, *item].
        query_y: [T, B] or [T, B, V].
        classes: [T, N] int64, the classes of the split that a task's ways are; None for a regression.
        objective: the loss and the metrics.
        support_weights: the weights of the support examples in the support loss, [T, S], whose mean is 1;
            None: all equal. See `balanced`. A weight of 0 leaves an example out, so that tasks of one shape
            may have different numbers of shots.
        about: the description of each way, [T, N, *description]; None where classes have none. With it, a
            task may have no support examples.
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    classes: Tensor | None = None
    objective: Objective = CLASSIFICATION
    support_weights: Tensor | None = None
    about: Tensor | None = None

    def __len__(self) -> int:
        return len(self.support_x)

    @property
    def outputs(self) -> int:
        if self.classes is None:
            return self.support_y.shape[-1] * self.objective.numbers
        return self.classes.shape[1]

    @property
    def ways(self) -> int:
        """N. ValueError for a regression, which has no classes."""
        if self.classes is None:
            raise ValueError("these tasks have no classes")
        return self.classes.shape[1]

    @property
    def there(self) -> Tensor:
        """Which support examples there are, bool [T, S]; `support_weights` leaves some out."""
        if self.support_weights is not None:
            return self.support_weights > 0
        return torch.ones(self.support_x.shape[:2], dtype=torch.bool, device=self.support_x.device)

    def support_loss(self, model: Model, step: int) -> Tensor:
        outputs = model(self.support_x)
        if self.support_weights is None:
            return self.objective.loss(outputs, self.support_y)
        return weighted(self.objective.loss, outputs, self.support_y, self.support_weights)

    def query(self, model: Model, loss: PerTask | None = None) -> Outcome:
        return self.outcome(model(self.query_x), loss)

    def outcome(self, outputs: Tensor, loss: PerTask | Tensor | None = None) -> Outcome:
        """The outcome of outputs [T, B, N] for the queries.

        Args:
            outputs: the outputs for `query_x`.
            loss: the loss itself, or (outputs, targets) -> [T]; None: the objective's.
        """
        if not isinstance(loss, Tensor):
            loss = (loss or self.objective.loss)(outputs, self.query_y)
        given = outputs.detach()
        scores = {metric.name: metric.score(given, self.query_y) for metric in self.objective.metrics}
        return Outcome(loss, scores, outputs)

    def joined(self) -> Episodes:
        """The same tasks with support and query examples together as their support."""
        x, y = torch.cat([self.support_x, self.query_x], 1), torch.cat([self.support_y, self.query_y], 1)
        whole = replace(self, support_x=x, support_y=y, support_weights=None)
        return whole if self.support_weights is None else whole.balanced()

    def balanced(self) -> Episodes:
        """The same tasks with a support loss in which every class counts equally.

        For tasks whose classes may have different numbers of shots. It makes no difference if they have the
        same number, nor for a regression.
        """
        if self.classes is None:
            return self
        return replace(self, support_weights=class_weights(self.support_y, self.ways))

    def repeated(self) -> Episodes:
        """Balanced tasks with copies of support examples: every class then has as many as the largest.

        The statistics of a batch are those of a support with equal classes, while the weights of the copies
        of an example add up to its own weight. Copies come after the examples. Tasks that are not `balanced`,
        and those whose classes are equal, stay as they are.

        Classes are filled up to at most `MOST_COPIES` times the mean size of a class, so that one very large
        class does not multiply the memory. All T tasks must have classes of the same sizes, in any order.
        """
        if self.support_weights is None or self.classes is None:
            return self
        tasks, shots = self.support_y.shape
        ways = torch.arange(self.ways, device=self.support_y.device)
        sizes = (self.support_y.unsqueeze(1) == ways.unsqueeze(1)).sum(2, keepdim=True)  # [T, N, 1]
        most = min(int(sizes.max()), MOST_COPIES * shots // self.ways)
        turns = torch.arange(most, device=sizes.device)
        places = sizes.cumsum(1) - sizes + turns % sizes  # in the order of classes, [T, N, turns]
        rows = self.support_y.argsort(dim=1, stable=True).gather(1, places.flatten(1))
        copies = rows[(turns >= sizes).flatten(1)].view(tasks, -1)
        rows = torch.cat([torch.arange(shots, device=rows.device).expand(tasks, -1), copies], 1)
        counts = torch.zeros_like(self.support_y).scatter_add_(1, rows, torch.ones_like(rows))
        each = torch.arange(tasks, device=rows.device).unsqueeze(1)
        weights = self.support_weights / counts * (rows.shape[1] / shots)
        x, y, weights = (tensor[each, rows] for tensor in (self.support_x, self.support_y, weights))
        return replace(self, support_x=x, support_y=y, support_weights=weights)

    def map(self, function: Callable[[Tensor], Tensor]) -> Episodes:
        """The same tasks with every tensor replaced by `function(tensor)`."""
        names = ("support_x", "support_y", "query_x", "query_y", "classes", "support_weights", "about")
        tensors = {name: tensor for name in names if (tensor := getattr(self, name)) is not None}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})  # type: ignore[arg-type]

    def to(self, dtype: torch.dtype) -> Episodes:
        return self.map(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


@dataclass(frozen=True)
class UnequalEpisodes(Tasks):
    """T tasks whose ways, shots or queries differ, as in Meta-Dataset; `tasks` holds each as a batch of one.

    They are run one after another, without padding: an example that is only padding would change the
    statistics of batch norm, and with them the result. The classes of a task may have different numbers of
    shots; every class counts equally in the support loss.
    """

    tasks: tuple[Episodes, ...]

    def __len__(self) -> int:
        return len(self.tasks)

    @property
    def outputs(self) -> int:
        return max(task.outputs for task in self.tasks)

    def parts(self) -> Sequence[Episodes]:
        return [task.balanced() for task in self.tasks]

    def to(self, dtype: torch.dtype) -> UnequalEpisodes:
        return UnequalEpisodes(tuple(task.to(dtype) for task in self.tasks))

    def support_loss(self, model: Model, step: int) -> Tensor:
        raise TypeError("tasks of unequal shapes have no common support; run each of parts()")

    def query(self, model: Model, loss: PerTask | None = None) -> Outcome:
        raise TypeError("tasks of unequal shapes have no common queries; run each of parts()")


def run_parts(run: Callable[[Tasks], Outcome], tasks: Tasks) -> Outcome:
    """`run(part)` of each part of the tasks, as one outcome of all of them."""
    parts = tasks.parts()
    outcomes = [run(part) for part in parts]
    if len(outcomes) == 1:
        return outcomes[0]
    losses = [one.loss.expand(len(part)) for one, part in zip(outcomes, parts, strict=True)]
    scores = {name: torch.cat([one.scores[name] for one in outcomes]) for name in outcomes[0].scores}
    return Outcome(torch.cat(losses), scores)
