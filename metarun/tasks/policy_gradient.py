"""Policy gradients of T tasks at once: advantages, and the surrogate losses whose gradients they are.

Shapes as in `Trajectories`: [T, H, E] for T tasks, H time steps, E episodes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from metarun.errors import ConfigError
from metarun.tasks.actions import Actions
from metarun.tasks.worlds import Trajectories

RIDGE = 1e-5  # of the linear baseline, as in the code of MAML
CLIPPED = 10.0  # observations in the linear baseline


@dataclass(frozen=True)
class Estimator:
    """How a policy gradient is estimated from trajectories.

    Args:
        discount: of rewards, in (0, 1].
        gae: lambda of generalised advantage estimation (Schulman et al. 2016), in [0, 1]; 1: the returns
            less the baseline.
        baseline: "linear", a linear function of features of observation and time, fitted to the very
            trajectories of each task (Duan, Chen, Houthooft, Schulman and Abbeel 2016); "none".
        normalise: whether the advantages of a task are scaled to mean 0 and standard deviation 1.
        surrogate: the loss of an inner step. All have the same gradient and different Hessians, on which
            the meta-gradient depends: "log_prob", log pi times the advantage, as in the code of MAML; "lvc",
            the ratio of probabilities at each step (ProMP, Rothfuss et al. 2019, section 5); "dice", the
            product of ratios up to a step (Foerster et al. 2018; with advantages, Farquhar et al. 2019),
            whose expected Hessian is exact.
        credit: whether the meta-gradient has the term for the effect of the initial policy on what
            trajectories the inner step sees (E-MAML, Stadie et al. 2018).
    """

    discount: float = 0.99
    gae: float = 1.0
    baseline: Literal["linear", "none"] = "linear"
    normalise: bool = True
    surrogate: Literal["log_prob", "lvc", "dice"] = "log_prob"
    credit: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.discount <= 1:
            raise ConfigError(f"dataset.estimator.discount={self.discount}: must be above 0 and at most 1")
        if not 0 <= self.gae <= 1:
            raise ConfigError(f"dataset.estimator.gae={self.gae}: must be from 0 to 1")

    def with_advantages(self, batch: Trajectories) -> Trajectories:
        """The trajectories with the advantages of their actions."""
        values = batch.values
        if values is None and self.baseline == "linear":
            values = linear_baseline(batch, discounted(batch.rewards, self.discount))
        if values is None:
            values = torch.zeros_like(batch.rewards)
        advantages = generalised_advantages(batch.rewards, values, batch.alive, self.discount, self.gae)
        scale = torch.ones_like(advantages[:, 0, 0])
        if self.normalise:
            mean = alive_mean(advantages, batch.alive)[:, None, None]
            scale = alive_mean((advantages - mean).square(), batch.alive).sqrt() + 1e-8
            advantages = (advantages - mean) / scale[:, None, None] * batch.alive
        return replace(batch, advantages=advantages, scale=scale)

    def inner_loss(self, log_probs: Tensor, batch: Trajectories, actions: Actions) -> Tensor:
        """The loss of an inner step, [T].

        Args:
            log_probs: of the actions under the weights to be changed, [T, H, E].
            batch: trajectories with advantages.
            actions: the kind of the actions.
        """
        assert batch.advantages is not None
        if self.surrogate == "log_prob":
            return -alive_mean(log_probs * batch.advantages, batch.alive)
        change = (log_probs - actions.log_prob(batch.outputs, batch.actions)) * batch.alive
        if self.surrogate == "lvc":
            return -alive_mean(change.exp() * batch.advantages, batch.alive)
        upto = change.cumsum(1)
        # The difference of the products up to this step and up to the one before: its value is zero where
        # the policy is the one that acted, and its derivatives are those of DiCE.
        return -alive_mean((upto.exp() - (upto - change).exp()) * batch.advantages, batch.alive)


DEFAULT = Estimator()


def outer_loss(log_probs: Tensor, batch: Trajectories, actions: Actions, clip: float | None = None) -> Tensor:
    """The loss whose gradient is the policy gradient at any weights near those that acted, [T].

    The ratio of probabilities times the advantage; with `clip`, PPO's clipped surrogate (Schulman et al.
    2017, equation 7).
    """
    assert batch.advantages is not None
    ratio = (log_probs - actions.log_prob(batch.outputs, batch.actions)).exp()
    gains = ratio * batch.advantages
    if clip is not None:
        gains = torch.minimum(gains, ratio.clamp(1 - clip, 1 + clip) * batch.advantages)
    return -alive_mean(gains, batch.alive)


def alive_mean(values: Tensor, alive: Tensor) -> Tensor:
    """The mean over the time steps of all episodes of a task before these end, [T]."""
    return (values * alive).sum((1, 2)) / alive.sum((1, 2))


def discounted(rewards: Tensor, discount: float) -> Tensor:
    """The discounted sum of the rewards from each step on, [T, H, E]."""
    total, totals = torch.zeros_like(rewards[:, 0]), []
    for reward in reversed(rewards.unbind(1)):
        total = reward + discount * total
        totals.append(total)
    return torch.stack(totals[::-1], 1)


def generalised_advantages(
    rewards: Tensor, values: Tensor, alive: Tensor, discount: float, decay: float
) -> Tensor:
    """Generalised advantage estimates, [T, H, E] (Schulman et al. 2016, equation 16).

    The value after the last step is taken as zero, also where the horizon ended it. Steps at which an episode
    has ended take no time: in a trial, the value of the next episode follows the last step of the one before.

    Args:
        rewards, values, alive: [T, H, E].
        discount: of rewards.
        decay: lambda.
    """
    following = total = torch.zeros_like(rewards[:, 0])
    totals = []
    for reward, value, going in zip(*(x.flip(1).unbind(1) for x in (rewards, values, alive)), strict=True):
        here = going > 0
        total = torch.where(here, reward + discount * following - value + discount * decay * total, total)
        following = torch.where(here, value, following)
        totals.append(total)
    return torch.stack(totals[::-1], 1) * alive


def linear_baseline(batch: Trajectories, returns: Tensor) -> Tensor:
    """Returns predicted from features of observation and time by ridge regression, [T, H, E].

    The features are the observation o and its square, t, t^2, t^3 with t in hundreds of steps, and 1. Each
    task has its own regression, on the very trajectories whose returns are predicted.

    Args:
        batch: the trajectories.
        returns: the targets, [T, H, E].
    """
    seen = batch.observations.flatten(3).double().clamp(-CLIPPED, CLIPPED)  # [T, H, E, F]
    time = torch.arange(returns.shape[1], dtype=torch.float64, device=returns.device) / 100
    time = time[None, :, None, None].expand(*returns.shape, 1)
    features = torch.cat([seen, seen**2, time, time**2, time**3, torch.ones_like(time)], -1).flatten(1, 2)
    weighted = features * batch.alive.double().flatten(1, 2).unsqueeze(-1)
    products = weighted.mT @ features  # [T, F, F]
    products.diagonal(dim1=1, dim2=2).add_(RIDGE)
    weights = torch.linalg.solve(products, weighted.mT @ returns.double().flatten(1, 2).unsqueeze(-1))
    return (features @ weights).view_as(returns).to(returns.dtype)
