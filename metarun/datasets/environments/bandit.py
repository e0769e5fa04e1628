"""Multi-armed bandits (Duan et al. 2016, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from metarun.datasets.base import Split
from metarun.datasets.environments.base import Environments, Parameters
from metarun.datasets.environments.players import MakePlayer, bandit_players
from metarun.errors import ConfigError, check_least
from metarun.tasks.actions import Discrete
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.policy_gradient import DEFAULT, Estimator
from metarun.tasks.worlds import World

Rewards = Literal["bernoulli", "gaussian"]
HALF_STEP = 2.0**-25  # of uniform float32 numbers, which may be 0


class Bandit(Environments):
    """Arms that give random rewards; an episode is a number of pulls, and the arms stay as they are.

    Bernoulli arms give 1 with a probability that is uniform in [0, 1], and else 0. Gaussian arms have rewards
    with a standard normal mean and variance 1. The observation is the number 1.

    Args:
        arms: k.
        pulls: n, the number of time steps of an episode.
        rewards: "bernoulli" or "gaussian".
        estimator: see `Estimator`.
    """

    title = "bandit"
    observation: tuple[int, ...] = (1,)

    def __init__(
        self,
        *,
        arms: int = 5,
        pulls: int = 10,
        rewards: Rewards = "bernoulli",
        estimator: Estimator = DEFAULT,
    ) -> None:
        check_least("dataset", 2, arms=arms)
        check_least("dataset", 1, pulls=pulls)
        super().__init__(estimator, pulls)
        self.arms, self.rewards = arms, rewards

    @property
    def actions(self) -> Discrete:
        return Discrete(self.arms)

    @property
    def identity(self) -> str:
        return f"{self.arms} {self.horizon} {self.rewards}"

    def sample(self, split: Split, tasks: int, generator: torch.Generator) -> Parameters:
        draw = torch.rand if self.rewards == "bernoulli" else torch.randn
        return {"means": draw(tasks, self.arms, generator=generator)}

    def world(self, parameters: Parameters, device: torch.device | str) -> World:
        return Arms(parameters["means"].to(device), self.horizon, self.rewards)

    def check_task(self, parameters: Parameters) -> None:
        means = parameters["means"]
        if self.rewards == "bernoulli" and not bool(((means >= 0) & (means <= 1)).all()):
            raise ConfigError(
                f"task.means={means[0].tolist()}: are probabilities of a reward; choose numbers from 0 to 1"
            )

    def optimum(self, parameters: Parameters) -> Tensor:
        """The expected return of the best arm alone."""
        return self.horizon * parameters["means"].double().amax(1)

    def players(self, shape: EpisodeShape) -> Mapping[str, MakePlayer]:
        pulls = (shape.shots + shape.queries) * self.horizon
        return bandit_players(self.arms, pulls, self.rewards == "gaussian", every_counts=shape.shots == 0)


class Arms(World):
    """The arms of `Bandit`.

    Args:
        means: of the rewards of each arm, [T, k].
        horizon: the number of pulls.
        rewards: "bernoulli" or "gaussian".
    """

    randoms = 1

    def __init__(self, means: Tensor, horizon: int, rewards: Rewards) -> None:
        self.means, self.horizon, self.rewards, self.device = means, horizon, rewards, means.device
        self.actions = Discrete(means.shape[1])

    def __len__(self) -> int:
        return len(self.means)

    def to(self, dtype: torch.dtype) -> Arms:
        return Arms(self.means.to(dtype), self.horizon, self.rewards)

    def reset(self, episodes: int, chance: Tensor) -> Tensor:
        return self.means.new_ones(len(self.means), episodes, 1)

    def step(self, actions: Tensor, chance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        means, chance = self.means.gather(1, actions), chance.squeeze(-1)
        rewards = (chance < means).to(means) if self.rewards == "bernoulli" else means + normal(chance)
        return self.means.new_ones(*actions.shape, 1), rewards, torch.zeros_like(actions, dtype=torch.bool)


def normal(chance: Tensor) -> Tensor:
    """Standard normal numbers for uniform numbers in [0, 1) of float32."""
    return torch.special.ndtri(chance + HALF_STEP)
