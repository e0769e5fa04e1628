"""What an algorithm is: it sees nothing but episodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from metarun.episodes import Episodes
from metarun.objectives import task_loss

# What a method knows of T tasks once it has seen their support: a tensor, or dicts of them.
Adapted = Any


class Algorithm(nn.Module, ABC):
    """Owns the meta-parameters; everything it does, it does for T tasks at once.

    `self.training` tells meta-training from evaluation, as for any module.
    """

    #: Whether predictions for one query depend on the other queries of its task.
    uses_query_statistics: bool = False

    def check(self, ways: int) -> None:
        """Raise ConfigError where tasks of so many ways cannot be met."""

    def advance(self, iteration: int) -> bool:
        """Told before outer step `iteration`: what is annealed goes into buffers, in place.

        True where the computation itself is now another one, so that what was recorded of it (a
        trace, a CUDA graph, its memory) no longer holds.
        """
        return False

    @abstractmethod
    def adapt(self, support_x: Tensor, support_y: Tensor, ways: int) -> Adapted:
        """Learn T tasks from support_x [T, S, *item] and support_y [T, S] (or [T, S, outputs])."""

    @abstractmethod
    def predict(self, adapted: Adapted, query_x: Tensor) -> Tensor:
        """Logits [T, B, N] (or values [T, B, outputs]) of query_x [T, B, *item]."""

    def meta_loss(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """The scalar to minimise, a mean over tasks, and the query outputs [T, N*Q, N]."""
        adapted = self.adapt(episodes.support_x, episodes.support_y, episodes.ways)
        outputs = self.predict(adapted, episodes.query_x)
        return self.loss(outputs, episodes.query_y).mean(), outputs

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of each task, [T], that training minimises and evaluation reports."""
        return task_loss(outputs, targets)

    def trajectory(self, support_x: Tensor, support_y: Tensor, ways: int) -> Iterator[Adapted]:
        """What is known before the first inner step, after it, ...; once, where there are no steps."""
        yield self.adapt(support_x, support_y, ways)
