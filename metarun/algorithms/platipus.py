"""PLATIPUS: probabilistic model-agnostic meta-learning (Finn, Xu and Levine 2018)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.maml import MAML
from metarun.errors import ConfigError, check_above_0, check_least
from metarun.inner_loops.base import InnerLoop, Loss, PerWeight, rows
from metarun.nn.per_task import Params, flatten, unflatten
from metarun.tasks import numbers
from metarun.tasks.episodes import Episodes, Outcome
from metarun.tasks.spec import TaskSpec


class PLATIPUS(MAML):
    """Learn a distribution of initial weights, of which inner steps make samples of adapted weights.

    Learned are the mean mu and the deviations sigma of initial weights theta, the deviations v of their
    posterior, and two rates (algorithm 1). In training, theta is one sample of
    q = N(mu - gamma_q grad L(mu, queries), v^2), and the inner loop takes it to phi by the support. The loss
    is L(phi, queries) + weight * KL(q || p) / B with p = N(mu - gamma_p grad L(mu, support), sigma^2). With a
    weight of 1 it is the negative evidence lower bound divided by the number B of queries. A new task is
    predicted by samples of theta from p, each with inner steps (algorithm 2): by the mean of their
    probabilities, or the mixture of their Gaussians.

    Departures: losses are means over examples, as everywhere here, and gamma_p and gamma_q are rates of such
    losses. In regression, the network predicts the standard deviation of a value beside its mean; the noise
    is constant in the paper. The paper does not say where the deviations start.

    Args:
        backbone, inner_loop, outputs, head, transductive: see `MAML`.
        classes: passed by the builder; None for a regression.
        deviation: what sigma and v start from, above 0.
        rate: what gamma_p and gamma_q start from.
        samples: the number of samples of theta in predictions.
        weight: of the divergence, at least 0; 1 is the bound itself.

    Raises:
        ConfigError: if a setting is out of range.
    """

    needs = Episodes
    plays = False

    def __init__(
        self,
        backbone: nn.Module,
        inner_loop: InnerLoop,
        outputs: int,
        classes: int | None = None,
        head: Literal["fixed", "shared"] = "fixed",
        transductive: bool = True,
        deviation: float = 0.01,
        rate: float = 0.01,
        samples: int = 10,
        weight: float = 1.0,
    ) -> None:
        super().__init__(backbone, inner_loop, outputs, head, "all", transductive)
        check_above_0("algorithm", deviation=deviation, rate=rate)
        check_least("algorithm", 1, samples=samples)
        check_least("algorithm", 0, weight=weight)
        self.samples, self.classifies, self.weight = samples, classes is not None, weight
        start = {n: torch.full_like(p, math.log(deviation)) for n, p in self.learner.own_parameters().items()}
        self.prior_deviations = PerWeight(start)  # logarithms
        self.posterior_deviations = PerWeight({name: p.clone() for name, p in start.items()})
        self.prior_rate, self.posterior_rate = (nn.Parameter(torch.tensor(float(rate))) for _ in range(2))

    @classmethod
    def check_tasks(cls, spec: TaskSpec) -> None:
        super().check_tasks(spec)
        if spec.outputs is not None and spec.objective.numbers == 1:
            raise ConfigError(
                f"algorithm={cls.__name__}: needs a likelihood, which a mean squared error is not; choose "
                "dataset=gp, or set dataset.likelihood=gaussian"
            )

    def adapt(self, tasks: Any) -> dict[str, Any]:
        """Samples of the adapted weights by name, {"params": [T, L, *shape] each}."""
        *_, last = self.trajectory(tasks)
        return last

    def trajectory(self, tasks: Any) -> Iterator[dict[str, Any]]:
        loss, _, start = self.inner_problem(tasks)
        mean = self.stepped(loss, start, self.prior_rate).unsqueeze(1)
        noise = self.draws(len(tasks), self.samples, mean)
        thetas = mean + logs_of(self.prior_deviations, start).exp().unsqueeze(1) * noise  # [T, L, P]
        several = tasks.map(lambda tensor: tensor.repeat_interleave(self.samples, 0))
        loss, _, like = self.inner_problem(several)
        first = unflatten(thetas.flatten(0, 1), like)
        yield self.state(first)
        for params in self.inner_loop.trajectory(loss, first):
            yield self.state(params)

    def predict(self, adapted: dict[str, Any], query_x: Tensor) -> Tensor:
        params = {name: p.flatten(0, 1) for name, p in adapted["params"].items()}
        outputs = self.learner(params, query_x.repeat_interleave(self.samples, 0))
        outputs = outputs.unflatten(0, (-1, self.samples))  # [T, L, B, N]
        if self.classifies:
            return outputs.log_softmax(-1).logsumexp(1) - math.log(self.samples)
        return outputs.transpose(1, 2).flatten(2)  # of `metarun.tasks.gaussians`

    def meta_loss(self, tasks: Episodes) -> Outcome:
        loss, _, start = self.inner_problem(tasks)

        def query_loss(params: Params, step: int) -> Tensor:
            outputs = self.beside_support(partial(self.learner, params), tasks)(tasks.query_x)
            return self.loss_of(tasks)(outputs, tasks.query_y)

        prior = self.stepped(loss, start, self.prior_rate), logs_of(self.prior_deviations, start)
        posterior = (
            self.stepped(query_loss, start, self.posterior_rate),
            logs_of(self.posterior_deviations, start),
        )
        noise = self.draws(len(tasks), 1, posterior[0]).squeeze(1)
        theta = unflatten(posterior[0] + posterior[1].exp() * noise, start)
        phi = self.inner_loop(loss, theta)
        outcome = tasks.query(self.beside_support(partial(self.learner, phi), tasks), self.loss)
        divergence = kl_divergence(*posterior, *prior)
        return replace(outcome, loss=outcome.loss + self.weight * divergence / tasks.query_x.shape[1])

    def stepped(self, loss: Loss, params: Params, rate: Tensor) -> Tensor:
        """Weights after one step of a learned rate, [T, P]."""
        return flatten(params) - rate * flatten(self.inner_loop.gradients(loss, params, 0))

    def draws(self, tasks: int, samples: int, like: Tensor) -> Tensor:
        """Standard normal numbers [T, L, P], for weights whose last dimension is that of `like`."""
        flat = numbers.normal(tasks, samples * like.shape[-1], like.device)
        return flat.to(like.dtype).unflatten(1, (samples, -1))

    def state(self, params: Params) -> dict[str, Any]:
        return {"params": {name: p.unflatten(0, (-1, self.samples)) for name, p in params.items()}}


def logs_of(deviations: PerWeight, params: Params) -> Tensor:
    """The logarithms of the deviations of the weights of tasks, [T, P]."""
    return flatten({name: rows(deviations(name), p).expand_as(p) for name, p in params.items()})


def kl_divergence(q_mean: Tensor, q_logs: Tensor, p_mean: Tensor, p_logs: Tensor) -> Tensor:
    """KL(q || p) [T] of Gaussians with independent components, by the logarithms of their deviations."""
    ratio = (2 * (q_logs - p_logs)).exp()
    distance = ((q_mean - p_mean) * (-p_logs).exp()).square()
    return 0.5 * (ratio + distance - 1).sum(-1) - (q_logs - p_logs).sum(-1)
