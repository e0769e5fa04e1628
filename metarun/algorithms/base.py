"""What an algorithm is: it sees tasks, and nothing else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from metarun.errors import ConfigError
from metarun.tasks.episodes import Episodes, Outcome, Tasks
from metarun.tasks.objectives import PerTask
from metarun.tasks.spec import TaskSpec

#: Task-specific state after adaptation (weights, prototypes, ...): a tensor, or dicts and lists of tensors.
Adapted = Any


class Algorithm(nn.Module, ABC):
    """A meta-learning method: it owns the meta-parameters, and does everything for T tasks at once.

    The extension point for a new method. A subclass writes `adapt` and `predict`, and `meta_loss` where
    training minimises something else than the query loss after adaptation. Its constructor is passed what it
    asks for by these names: `backbone`, `inner_loop`, `outputs` (N, or the values of a regression),
    `item_shape`, `classes` (of the training split; None for a regression). Everything else is a setting.

    `self.training` tells meta-training from evaluation, as for any module. Keep tensors on their device and
    shapes fixed (no `.item()`, no branch on a tensor's value): then the method can be traced and captured.
    """

    #: The kind of tasks it needs; others are refused before anything is loaded.
    needs: ClassVar[type[Tasks]] = Tasks  # type: ignore[type-abstract]
    #: Whether it needs tasks with classes.
    needs_classes: ClassVar[bool] = False
    #: Whether a task is learned by steps of `inner_loop`, whose number can be chosen at test time.
    takes_steps: ClassVar[bool] = False
    #: Whether it has `by_instance`, the accuracy at each appearance of a class (`metarun eval instances=N`).
    sees_examples_in_turn: ClassVar[bool] = False
    #: Whether the backbone keeps the weights that it starts with.
    frozen: bool = False
    #: Whether predictions for one query depend on the other queries of its task (transductive).
    uses_query_statistics: bool = False
    #: The loss of the queries, (outputs, targets) -> [T], that training minimises and evaluation reports;
    #: None: the tasks' own. A method with another loss defines a method of this name.
    loss: PerTask | None = None

    @classmethod
    def check_tasks(cls, spec: TaskSpec) -> None:
        """Raise ConfigError where tasks of this kind cannot be learned."""
        if not issubclass(spec.tasks, cls.needs):
            raise ConfigError(
                f"{cls.__name__} needs labelled support and query examples, and this dataset's tasks are "
                f"{spec.tasks.__name__}; choose algorithm=maml"
            )
        if cls.needs_classes and spec.outputs is not None:
            raise ConfigError(
                f"{cls.__name__} classifies, and this dataset's tasks have no classes; "
                "choose algorithm=maml or reptile"
            )

    def own_backbone(self) -> nn.Module | None:
        """The network that `init=RUN` fills with another run's weights; None: there is none."""
        return None

    def check(self, ways: int) -> None:
        """Raise ConfigError where tasks with so many ways cannot be solved."""

    def on_step_start(self, iteration: int) -> bool:
        """Hook called before every outer step.

        Update annealed values here, in place and in buffers: a recorded step (a trace, a CUDA graph) reads
        buffers anew and would repeat a Python number.

        Args:
            iteration: the number of the outer step, from 0.

        Returns:
            Whether the computation itself changed, so that traces, CUDA graphs and memory estimates must be
            made again.
        """
        return False

    @abstractmethod
    def adapt(self, tasks: Any) -> Adapted:
        """Learn each of T tasks from its support.

        Args:
            tasks: the tasks, of the kind that `needs` names. Queries must not be looked at.

        Returns:
            What `predict` needs to know: tensors, or dicts and lists of them, T first in each.
        """

    @abstractmethod
    def predict(self, adapted: Adapted, query_x: Tensor) -> Tensor:
        """Logits [T, B, N], or values [T, B, V], of query_x [T, B, *item]."""

    def meta_loss(self, tasks: Any) -> Outcome:
        """What training minimises: the mean over tasks of the outcome's loss.

        By default the loss of the queries after adaptation.
        """
        return tasks.query(partial(self.predict, self.adapt(tasks)), self.loss)

    def trajectory(self, tasks: Any) -> Iterator[Adapted]:
        """The state before the first inner step, after it, ...; one state for a method without steps."""
        yield self.adapt(tasks)

    def loss_of(self, tasks: Episodes) -> PerTask:
        """The method's own loss, or else that of the tasks."""
        return self.loss or tasks.objective.loss
