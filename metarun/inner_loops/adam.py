"""Adam, the inner loop of Reptile (Nichol et al. 2018, section 6, with beta1 = 0)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from metarun.errors import check_above_0, check_bound
from metarun.inner_loops.base import InnerLoop, Loss
from metarun.nn.per_task import Params


class Adam(InnerLoop):
    """Adam (Kingma and Ba 2015, algorithm 1) on T tasks at once.

    Departure: the moments of every task start at zero. Reptile's own code carries the second moment over
    from one task to the next, which is not defined for tasks that run in parallel.

    Args:
        rate: the learning rate.
        steps, test_steps, order: see `InnerLoop`.
        beta1, beta2: decay rates of the first and second moment.
        epsilon: added to the denominator.
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
    ) -> None:
        super().__init__(steps, test_steps, order)
        betas = {"beta1": beta1, "beta2": beta2}
        check_bound("inner_loop", betas, lambda beta: 0 <= beta < 1, "at least 0 and below 1")
        check_above_0("inner_loop", epsilon=epsilon)
        self.rate, self.beta1, self.beta2, self.epsilon = rate, beta1, beta2, epsilon

    def trajectory(self, loss: Loss, params: Params) -> Iterator[Params]:
        first = {name: torch.zeros_like(p) for name, p in params.items()}
        second = {name: torch.zeros_like(p) for name, p in params.items()}
        for step in range(self.step_count()):
            grads = self.gradients(loss, params, step)
            correct1, correct2 = 1 - self.beta1 ** (step + 1), 1 - self.beta2 ** (step + 1)
            for name, g in grads.items():
                first[name] = self.beta1 * first[name] + (1 - self.beta1) * g
                second[name] = self.beta2 * second[name] + (1 - self.beta2) * g.square()
            params = {
                name: p
                - self.rate_of(name) * first[name] / correct1 / (root(second[name] / correct2) + self.epsilon)
                for name, p in params.items()
            }
            yield params

    def rate_of(self, name: str) -> float:
        """The learning rate of the weight of a name."""
        return self.rate


def root(x: Tensor) -> Tensor:
    """The square root, with a finite derivative at zero, as second-order gradients need."""
    return (x + 1e-30).sqrt()
