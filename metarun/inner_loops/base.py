"""The base class of inner loops."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from metarun.errors import ConfigError, check_least
from metarun.nn.per_task import Params, flatten

#: (weights [T, *shape] each, step from 0) -> the loss of each task, [T].
Loss = Callable[[Params, int], Tensor]


class InnerLoop(nn.Module, ABC):
    """Base class of update rules that adapt the weights of T tasks at once.

    The extension point for a new inner loop: a subclass implements `trajectory`. Meta-parameters of the rule
    are `nn.Parameter`s, created in `attach`.

    Args:
        steps: the number of inner steps in training mode.
        test_steps: the number of inner steps in evaluation mode; None: as many as `steps`.
        order: 2 differentiates through the steps; 1 treats the inner gradients as constants (first-order
            approximation).

    Raises:
        ConfigError: if a number of steps is negative, or `order` is not 1 or 2.
    """

    #: Whether the rule has meta-parameters. Only a meta-gradient through the inner steps can train them.
    learned: bool = False
    #: Whether training tasks leave something to later tasks, which start their inner steps with it.
    carries: bool = False

    def __init__(self, steps: int, test_steps: int | None, order: int) -> None:
        super().__init__()
        check_least(
            "inner_loop", 0, steps=steps, **({} if test_steps is None else {"test_steps": test_steps})
        )
        if order not in (1, 2):
            raise ConfigError(f"inner_loop.order={order}: must be 1 (first order) or 2 (second order)")
        self.steps, self.test_steps, self.order = steps, test_steps, order

    def attach(self, weights: Params) -> None:
        """Create the meta-parameters of the rule. The algorithm calls it once, when it is built.

        Args:
            weights: the adapted weights by name, [*shape] each, without the task dimension.
        """

    @abstractmethod
    def trajectory(self, loss: Loss, params: Params) -> Iterator[Params]:
        """Take the inner steps one by one.

        Args:
            loss: (weights, step) -> the loss of each task, [T]. `step` counts from 0.
            params: the starting weights by name, [T, *shape] each.

        Yields:
            The weights after each of the `step_count()` steps, [T, *shape] each.
        """

    def forward(self, loss: Loss, params: Params) -> Params:
        """Take all inner steps.

        Args:
            loss: (weights, step) -> the loss of each task, [T].
            params: the starting weights by name, [T, *shape] each.

        Returns:
            The weights after the last step, [T, *shape] each; `params` itself if there are no steps.
        """
        return deque(self.trajectory(loss, params), maxlen=1).pop() if self.step_count() else params

    def step_count(self) -> int:
        """The number of inner steps in the current mode, training or evaluation."""
        return self.steps if self.training or self.test_steps is None else self.test_steps

    def gradients(self, loss: Loss, params: Params, step: int) -> Params:
        """The gradient of each task's loss, [T, *shape] each; see `losses_and_gradients`."""
        return self.losses_and_gradients(loss, params, step)[1]

    def losses_and_gradients(self, loss: Loss, params: Params, step: int) -> tuple[Tensor, Params]:
        """The loss and the gradient of each task.

        Args:
            loss: (weights, step) -> the loss of each task, [T].
            params: the current weights by name, [T, *shape] each.
            step: the number of the inner step, from 0.

        Returns:
            The losses [T], and the gradients by name, [T, *shape] each. Both are constants of the
            meta-gradient unless `order` is 2.
        """
        through = self.order == 2 and torch.is_grad_enabled()
        if not through:
            params = {name: p.detach() for name, p in params.items()}
        with torch.enable_grad():
            params = {name: p if p.requires_grad else p.requires_grad_() for name, p in params.items()}
            # Tasks share no weights, so the gradient of the summed loss holds the gradient of each task.
            losses = loss(params, step)
            grads = torch.autograd.grad(
                losses.sum(), list(params.values()), create_graph=through, materialize_grads=True
            )
        return losses if through else losses.detach(), dict(zip(params, grads, strict=True))


class PerWeight(nn.ParameterDict):
    """One meta-parameter for each adapted weight; `self(name)` returns the one of that weight.

    Args:
        values: the initial value of the meta-parameter for each weight, by the weight's name.
    """

    def __init__(self, values: Params) -> None:
        super().__init__({self.key(name): nn.Parameter(value) for name, value in values.items()})

    @staticmethod
    def key(name: str) -> str:
        return name.replace(".", "/")  # PyTorch does not allow dots in the names of parameters

    def __call__(self, name: str) -> Tensor:
        return self[self.key(name)]


def refuse_learned(inner_loop: InnerLoop, reason: str) -> None:
    """Raise ConfigError if the inner loop has meta-parameters, which this algorithm does not train."""
    if inner_loop.learned:
        raise ConfigError(
            f"inner_loop={type(inner_loop).__name__}: it has meta-parameters, and {reason}; "
            "choose inner_loop=sgd or adam, or algorithm=maml"
        )


def refuse_trained(inner_loop: InnerLoop, reason: str) -> None:
    """Raise ConfigError if training changes the inner loop, whose steps the method takes in tests only."""
    refuse_learned(inner_loop, reason)
    if inner_loop.carries:
        raise ConfigError(
            f"inner_loop.carry=true: carries on from training task to training task, and {reason}; "
            "choose inner_loop=adam"
        )


def rows(meta: Tensor, p: Tensor) -> Tensor:
    """Meta-parameters [*shape] for weights [T, *shape]; for a head, the rows of the ways in the task."""
    return meta[: p.shape[1]]


def with_proximal_term(loss: Loss, start: Params, strength: float) -> Loss:
    """The loss of each task plus strength/2 ||weights - start||^2."""
    origin = flatten(start)  # [T, P]

    def regularised(params: Params, step: int) -> Tensor:
        return loss(params, step) + 0.5 * strength * (flatten(params) - origin).square().sum(1)

    return regularised
