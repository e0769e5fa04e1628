"""ALFA (Baik, Choi, Choi, Kim and Lee 2020, "Meta-Learning with Adaptive Hyperparameters")."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from metarun.errors import check_least
from metarun.inner_loops.base import Loss, PerWeight
from metarun.inner_loops.layer_rates import LayerRates
from metarun.nn.per_task import Params


class ALFA(LayerRates):
    """theta <- beta * theta - alpha * gradient, alpha and beta of each task, layer and step (algorithm 1).

    A network g with one hidden layer, as in the paper's code, receives the mean of every weight tensor and of
    its gradient, and has two outputs for every weight tensor. Of tensor l in step s,

        alpha = rates[l, s] * g_alpha[l],    beta = 1 - decays[l, s] * g_beta[l],

    with learned rates and decays, initialised to `rate` and `rate * decay` (the code's names_alpha_dict and
    names_beta_dict). With g_alpha = 1 and g_beta = 0 it is `LayerRates`. Test steps beyond the number of
    training steps use the last rates and decays.

    Departure from the code: the meta-gradient also passes through the mean gradients that g receives, as
    algorithm 1 says; the code holds these inputs constant.

    Args:
        rate: the initial learning rate.
        decay: the initial weight decay, which the learning rate multiplies.
        steps, test_steps, order: see `InnerLoop`; at least one step.
    """

    def __init__(
        self,
        rate: float = 0.01,
        decay: float = 0.0005,
        steps: int = 5,
        test_steps: int | None = None,
        order: int = 2,
    ) -> None:
        super().__init__(rate, steps, test_steps, order)
        check_least("inner_loop", 0, decay=decay)
        self.decay = decay

    def attach(self, weights: Params) -> None:
        super().attach(weights)
        self.decays = PerWeight({name: self.decay * self.rates(name).detach() for name in weights})
        size = 2 * len(weights)
        self.generator = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))

    def trajectory(self, loss: Loss, params: Params) -> Iterator[Params]:
        for step in range(self.step_count()):
            grads = self.gradients(loss, params, step)
            row = min(step, self.steps - 1)
            made = self.generator(torch.cat([means(params), means(grads)], 1))  # [T, 2 * L]
            alphas, betas = (dict(zip(params, half.unbind(1), strict=True)) for half in made.chunk(2, 1))
            params = {
                name: p
                - along(self.decays(name)[row] * betas[name], p) * p
                - along(self.rates(name)[row] * alphas[name], p) * grads[name]
                for name, p in params.items()
            }
            yield params


def means(params: Params) -> Tensor:
    """The mean of each of L tensors of each task, [T, L]."""
    return torch.stack([p.flatten(1).mean(1) for p in params.values()], 1)


def along(factors: Tensor, p: Tensor) -> Tensor:
    """Factors [T] of the tasks, in the shape that multiplies weights [T, *shape]."""
    return factors.view(-1, *[1] * (p.dim() - 1))
