"""Meta-SGD's inner loop (Li, Zhou, Chen and Li 2017, "Meta-SGD: Learning to Learn Quickly")."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from metarun.errors import ConfigError, check_least
from metarun.inner_loops.base import InnerLoop, Loss, PerWeight, rows
from metarun.nn.per_task import Params


class MetaSGD(InnerLoop):
    """theta <- theta - alpha * gradient, elementwise, with alpha learned for every weight (equation 2).

    The rates are initialised uniformly at random and may become negative, as in the paper. The paper takes
    one step; with more, every step uses the same rates.

    Args:
        low, high: bounds of the initial rates.
        steps, test_steps, order: see `InnerLoop`.
    """

    learned = True

    def __init__(
        self,
        low: float = 0.005,
        high: float = 0.1,
        steps: int = 1,
        test_steps: int | None = None,
        order: int = 2,
    ) -> None:
        super().__init__(steps, test_steps, order)
        check_least("inner_loop", 0, low=low)
        if low > high:
            raise ConfigError(f"inner_loop.low={low}: must not be above inner_loop.high={high}")
        self.low, self.high = low, high

    def attach(self, weights: Params) -> None:
        self.rates = PerWeight(
            {name: torch.empty_like(w).uniform_(self.low, self.high) for name, w in weights.items()}
        )

    def trajectory(self, loss: Loss, params: Params) -> Iterator[Params]:
        for step in range(self.step_count()):
            grads = self.gradients(loss, params, step)
            params = {name: p - rows(self.rates(name), p) * grads[name] for name, p in params.items()}
            yield params
