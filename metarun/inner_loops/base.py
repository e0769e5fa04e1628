"""What an inner loop is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from metarun.errors import ConfigError
from metarun.nn.per_task import Params, flatten

Loss = Callable[[Params, int], Tensor]  # (weights, step) -> each task's loss, [T]


class InnerLoop(nn.Module, ABC):
    """An update rule for T tasks at once. Meta-parameters of its own are nn.Parameters.

    `steps` are taken in training, `test_steps` (by default as many) in evaluation mode.
    `order=2` differentiates through the steps; `order=1` treats the inner gradients as
    constants, so that the meta-gradient passes straight through to the starting weights.
    """

    #: Whether it has meta-parameters, which only a meta-gradient through its steps can train.
    learned: bool = False

    def __init__(self, steps: int, test_steps: int | None, order: int) -> None:
        super().__init__()
        if steps < 0 or (test_steps is not None and test_steps < 0):
            raise ConfigError(f"inner_loop.steps={steps}, test_steps={test_steps}: must not be negative")
        if order not in (1, 2):
            raise ConfigError(f"inner_loop.order={order}: 1 (first order) or 2 (second order)")
        self.steps, self.test_steps, self.order = steps, test_steps, order

    def attach(self, weights: Params) -> None:
        """Make the meta-parameters for the weights, [*shape] each, that are to be adapted; called once."""

    @abstractmethod
    def trajectory(self, loss: Loss, params: Params) -> Iterator[Params]:
        """The weights after step 1, 2, ... of every task."""

    def forward(self, loss: Loss, params: Params) -> Params:
        """The weights after the last step; `params` themselves where there is none."""
        return deque(self.trajectory(loss, params), maxlen=1).pop() if self.step_count() else params

    def step_count(self) -> int:
        return self.steps if self.training or self.test_steps is None else self.test_steps

    def gradients(self, loss: Loss, params: Params, step: int) -> Params:
        """Each task's own gradient, [T, *shape] each; part of the graph only for second order."""
        return self.losses_and_gradients(loss, params, step)[1]

    def losses_and_gradients(self, loss: Loss, params: Params, step: int) -> tuple[Tensor, Params]:
        """Each task's own loss, [T], and gradient."""
        through = self.order == 2 and torch.is_grad_enabled()
        if not through:
            params = {name: p.detach() for name, p in params.items()}
        with torch.enable_grad():
            params = {name: p if p.requires_grad else p.requires_grad_() for name, p in params.items()}
            # No weights are shared between tasks: the sum's gradient is each task's own.
            losses = loss(params, step)
            grads = torch.autograd.grad(
                losses.sum(), list(params.values()), create_graph=through, materialize_grads=True
            )
        return losses if through else losses.detach(), dict(zip(params, grads, strict=True))


class PerWeight(nn.ParameterDict):
    """One meta-parameter for each adapted weight, called with that weight's name."""

    def __init__(self, values: Params) -> None:
        super().__init__({self.key(name): nn.Parameter(value) for name, value in values.items()})

    @staticmethod
    def key(name: str) -> str:
        return name.replace(".", "/")  # a module's parameter may not have a dot in its name

    def __call__(self, name: str) -> Tensor:
        return self[self.key(name)]


def refuse_learned(inner_loop: InnerLoop, reason: str) -> None:
    """Raise ConfigError for an inner loop whose meta-parameters could not be trained."""
    if inner_loop.learned:
        raise ConfigError(
            f"inner_loop={type(inner_loop).__name__} has meta-parameters, and {reason}; "
            "choose inner_loop=sgd or adam, or algorithm=maml"
        )


def rows(meta: Tensor, p: Tensor) -> Tensor:
    """Meta-parameters [*shape] for weights [T, *shape]; of a head, as many rows as the task has ways."""
    return meta[: p.shape[1]]


def with_proximal_term(loss: Loss, start: Params, strength: float) -> Loss:
    """The loss plus strength/2 ||weights - start||^2, for each task."""
    origin = flatten(start)  # [T, P]

    def regularised(params: Params, step: int) -> Tensor:
        return loss(params, step) + 0.5 * strength * (flatten(params) - origin).square().sum(1)

    return regularised
