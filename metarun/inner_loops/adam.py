"""Adam, the inner loop of Reptile (Nichol et al. 2018, section 6, with beta1 = 0)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from metarun.errors import check_above_0, check_bound
from metarun.inner_loops.base import InnerLoop, Loss, PerWeight, rows
from metarun.nn.per_task import Params


class Adam(InnerLoop):
    """Adam (Kingma and Ba 2015, algorithm 1) on T tasks at once.

    Args:
        rate: the learning rate.
        steps, test_steps, order: see `InnerLoop`.
        beta1, beta2: decay rates of the first and second moment.
        epsilon: added to the denominator.
        carry: whether a task starts with the second moment of the gradients of earlier training tasks, as in
            Reptile's code, and not at zero; see `CarriedMoment`.
    """

    def __init__(
        self,
        rate: float = 1e-3,
        steps: int = 5,
        test_steps: int | None = None,
        order: int = 1,
        beta1: float = 0.0,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        carry: bool = False,
    ) -> None:
        super().__init__(steps, test_steps, order)
        betas = {"beta1": beta1, "beta2": beta2}
        check_bound("inner_loop", betas, lambda beta: 0 <= beta < 1, "at least 0 and below 1")
        check_above_0("inner_loop", epsilon=epsilon)
        self.rate, self.beta1, self.beta2, self.epsilon = rate, beta1, beta2, epsilon
        self.carries = carry
        self.moment: CarriedMoment | None = None

    def attach(self, weights: Params) -> None:
        self.moment = CarriedMoment(weights, self.beta2) if self.carries else None

    def trajectory(self, loss: Loss, params: Params) -> Iterator[Params]:
        first = {name: torch.zeros_like(p) for name, p in params.items()}
        own = first  # what the gradients of the task add to the second moment
        carried: Params = {}
        steps_before: Tensor | int = 0
        if self.moment is not None:
            carried, steps_before = self.moment.start(params, self.training)
        steps = self.step_count()
        for step in range(steps):
            grads = self.gradients(loss, params, step)
            correct1, correct2 = 1 - self.beta1 ** (step + 1), 1 - self.beta2 ** (steps_before + step + 1)
            first = {name: self.beta1 * first[name] + (1 - self.beta1) * g for name, g in grads.items()}
            own = {name: self.beta2 * own[name] + (1 - self.beta2) * g.square() for name, g in grads.items()}
            kept = self.beta2 ** (step + 1)
            second = own | {name: own[name] + kept * each for name, each in carried.items()}
            params = {
                name: p
                - self.rate_of(name) * first[name] / correct1 / (root(second[name] / correct2) + self.epsilon)
                for name, p in params.items()
            }
            if self.moment is not None and self.training and step == steps - 1:
                self.moment.update(own, steps)
            yield params

    def rate_of(self, name: str) -> float:
        """The learning rate of the weight of a name."""
        return self.rate


class CarriedMoment(nn.Module):
    """The second moment of the inner gradients, carried on from task to task.

    Departure from Reptile's code, which runs tasks one after another: all tasks of a meta-batch start with
    the moment before it. The moment after it contains their squared gradients as if they had followed each
    other. If tasks have fewer ways than the head, the mean over their ways counts for the others.

    Args:
        weights: the adapted weights by name, [*shape] each.
        beta2: the decay rate of the moment.

    Attributes:
        averages: the moment by name, [*shape] each; 0 before training.
        steps: the number of inner steps in it.
    """

    steps: Tensor
    steps_before: Tensor

    def __init__(self, weights: Params, beta2: float) -> None:
        super().__init__()
        self.beta2, self.keys = beta2, {name: PerWeight.key(name) for name in weights}
        for name, weight in weights.items():
            self.register_buffer(f"average/{self.keys[name]}", torch.zeros_like(weight))
            # What the tasks of the current meta-batch start with, also if they run in several chunks.
            self.register_buffer(f"before/{self.keys[name]}", torch.zeros_like(weight), persistent=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("steps_before", torch.zeros((), dtype=torch.int64), persistent=False)

    @property
    def averages(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(f"average/{key}") for name, key in self.keys.items()}

    @property
    def before(self) -> dict[str, Tensor]:
        return {name: self.get_buffer(f"before/{key}") for name, key in self.keys.items()}

    def at_iteration(self, iteration: int) -> None:
        """Called before every outer step."""
        self.steps_before.copy_(self.steps)
        for name, average in self.averages.items():
            self.before[name].copy_(average)

    def start(self, params: Params, training: bool) -> tuple[Params, Tensor]:
        """The moment that tasks with these weights [T, *shape] start with, and the steps in it."""
        moments, steps = (self.before, self.steps_before) if training else (self.averages, self.steps)
        return {name: rows(moments[name], p).expand_as(p) for name, p in params.items()}, steps.double()

    def update(self, additions: Params, steps: int) -> None:
        """Add what the tasks of a chunk have added to the moment in their `steps`, [T, *shape] each."""
        for name, added in additions.items():
            tasks, average = len(added), self.averages[name]
            later = torch.arange(tasks - 1, -1, -1, device=added.device)  # the tasks that follow each
            factors = (self.beta2 ** (later * steps).double()).to(added.dtype)
            total = torch.tensordot(factors, added.detach(), 1)
            average.mul_(self.beta2 ** (steps * tasks)).add_(with_rows(total, len(average)))
        self.steps += steps * tasks


def with_rows(x: Tensor, count: int) -> Tensor:
    """A moment [N, *rest] of the N ways of tasks as that of the `count` vectors of a head, [count, *rest].

    Ways that the tasks do not have get the mean. A shared head has one vector for all ways: their mean, too.
    Of other weights, N is `count`.
    """
    if len(x) == count:
        return x
    mean = x.mean(0, keepdim=True)
    return mean if count == 1 else torch.cat([x, mean.expand(count - len(x), *x.shape[1:])])


def root(x: Tensor) -> Tensor:
    """The square root, with a finite derivative at zero, as second-order gradients need."""
    return (x + 1e-30).sqrt()
