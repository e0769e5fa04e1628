"""Learned rates per layer and step (Antoniou, Edwards and Storkey 2019, "How to train your MAML")."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from metarun.errors import ConfigError
from metarun.inner_loops.base import InnerLoop, Loss, PerWeight
from metarun.nn.per_task import Params


class LayerRates(InnerLoop):
    """MAML++'s LSLR: theta <- theta - alpha[layer, step] * gradient, alpha learned (section 4).

    Every weight tensor has its own rates, as in the paper's code, all initialised to `rate`.
    Test steps beyond the number of training steps use the last rate.

    Args:
        rate: the initial learning rate.
        steps, test_steps, order: see `InnerLoop`; at least one step.
    """

    learned = True

    def __init__(
        self, rate: float = 0.1, steps: int = 5, test_steps: int | None = None, order: int = 2
    ) -> None:
        super().__init__(steps, test_steps, order)
        if steps < 1:
            raise ConfigError(f"inner_loop.steps={steps}: learned rates need at least one step")
        self.rate = rate

    def attach(self, weights: Params) -> None:
        self.rates = PerWeight(
            {name: torch.full((self.steps,), self.rate, dtype=w.dtype) for name, w in weights.items()}
        )

    def trajectory(self, loss: Loss, params: Params) -> Iterator[Params]:
        for step in range(self.step_count()):
            grads = self.gradients(loss, params, step)
            row = min(step, self.steps - 1)
            params = {name: p - self.rates(name)[row] * grads[name] for name, p in params.items()}
            yield params
