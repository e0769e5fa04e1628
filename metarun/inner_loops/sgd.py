"""Gradient descent, the inner loop of MAML (Finn et al. 2017, equation 1)."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from metarun.errors import check_above_0
from metarun.inner_loops.base import InnerLoop, Loss
from metarun.nn.per_task import Params


class SGD(InnerLoop):
    """theta <- theta - rate * gradient of the task's mean loss.

    MAML's own code sums the loss over the N classes, so its published rates are N times
    smaller than the same rate here (docs/protocols.md).

    Args:
        rate: the learning rate.
        test_decay: the rate of all steps but the first is multiplied by this in evaluation mode; MAML's code
            for reinforcement learning halves it.
        steps, test_steps, order: see `InnerLoop`.
    """

    def __init__(
        self,
        rate: float = 0.4,
        steps: int = 1,
        test_steps: int | None = None,
        order: int = 2,
        test_decay: float = 1.0,
    ) -> None:
        super().__init__(steps, test_steps, order)
        check_above_0("inner_loop", test_decay=test_decay)
        self.rate, self.test_decay = rate, test_decay

    def trajectory(self, loss: Loss, params: Params) -> Iterator[Params]:
        for step in range(self.step_count()):
            grads = self.gradients(loss, params, step)
            rate = self.rate if self.training or step == 0 else self.rate * self.test_decay
            params = {name: torch.add(p, grads[name], alpha=-rate) for name, p in params.items()}
            yield params
