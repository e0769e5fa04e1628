"""Random Markov decision processes with tables of rewards and transitions (Duan et al. 2016, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.datasets.base import Split
from metarun.datasets.environments.bandit import normal
from metarun.datasets.environments.base import Environments, Parameters
from metarun.datasets.environments.players import MakePlayer, tabular_players
from metarun.errors import check_least
from metarun.tasks.actions import Discrete
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.policy_gradient import DEFAULT, Estimator
from metarun.tasks.worlds import World


class Tabular(Environments):
    """States and actions whose rewards and transitions have to be found out.

    The reward of a state and an action is normal with variance 1, and its mean is normal with mean 1 and
    variance 1. The distribution over the next state is drawn from a flat Dirichlet distribution. An episode
    starts in the first state; the observation is the state as a one-hot vector.

    Args:
        states: S.
        choices: A, the number of actions.
        horizon: the number of time steps of an episode.
        estimator: see `Estimator`.
    """

    title = "tabular"

    def __init__(
        self, *, states: int = 10, choices: int = 5, horizon: int = 10, estimator: Estimator = DEFAULT
    ) -> None:
        check_least("dataset", 1, states=states)
        check_least("dataset", 2, choices=choices)
        super().__init__(estimator, horizon)
        self.states, self.choices = states, choices

    @property
    def observation(self) -> tuple[int, ...]:
        return (self.states,)

    @property
    def actions(self) -> Discrete:
        return Discrete(self.choices)

    @property
    def identity(self) -> str:
        return f"{self.states} {self.choices} {self.horizon}"

    def sample(self, split: Split, tasks: int, generator: torch.Generator) -> Parameters:
        """The mean rewards [T, S, A], and the probabilities of the next states [T, S, A, S]."""
        shape = (tasks, self.states, self.choices)
        means = 1 + torch.randn(shape, generator=generator)
        exponential = -torch.log1p(-torch.rand(*shape, self.states, generator=generator))
        return {"means": means, "next": exponential / exponential.sum(-1, keepdim=True)}

    def world(self, parameters: Parameters, device: torch.device | str) -> World:
        return Tables(parameters["means"].to(device), parameters["next"].to(device), self.horizon)

    def optimum(self, parameters: Parameters) -> Tensor:
        """By value iteration over the steps of an episode."""
        means, following = parameters["means"].double(), parameters["next"].double()
        values = torch.zeros_like(means[..., 0])  # [T, S]
        for _ in range(self.horizon):
            values = (means + torch.einsum("tsan,tn->tsa", following, values)).amax(-1)
        return values[:, 0]

    def players(self, shape: EpisodeShape) -> Mapping[str, MakePlayer]:
        return tabular_players(self.states, self.choices, self.horizon)


class Tables(World):
    """The environments of `Tabular`.

    Args:
        means: of the rewards, [T, S, A].
        following: probabilities of the next states, [T, S, A, S].
        horizon: the number of time steps of an episode.
    """

    randoms = 2  # for the reward, and for the next state

    def __init__(self, means: Tensor, following: Tensor, horizon: int) -> None:
        self.means, self.following, self.horizon = means, following, horizon
        self.shares = following.cumsum(-1)
        self.device, self.actions = means.device, Discrete(means.shape[2])
        self.tasks = torch.arange(len(means), device=means.device).unsqueeze(1)

    def __len__(self) -> int:
        return len(self.means)

    def to(self, dtype: torch.dtype) -> Tables:
        return Tables(self.means.to(dtype), self.following.to(dtype), self.horizon)

    def reset(self, episodes: int, chance: Tensor) -> Tensor:
        self.state = torch.zeros(len(self.means), episodes, dtype=torch.long, device=self.device)
        return self.observation()

    def step(self, actions: Tensor, chance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rewards = self.means[self.tasks, self.state, actions] + normal(chance[..., 0])
        shares = self.shares[self.tasks, self.state, actions]
        # The last share may be below 1 by rounding, see `Discrete.sample`.
        beyond = chance[..., 1:].to(shares) * shares[..., -1:] >= shares
        self.state = beyond.sum(-1).clamp_max(shares.shape[-1] - 1)
        return self.observation(), rewards, torch.zeros_like(actions, dtype=torch.bool)

    def observation(self) -> Tensor:
        return F.one_hot(self.state, self.means.shape[1]).to(self.means)
