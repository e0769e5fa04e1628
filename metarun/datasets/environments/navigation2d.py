"""2D navigation (Finn, Abbeel and Levine 2017, section 5.3)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from metarun.datasets.base import Split
from metarun.datasets.environments.base import Environments, Parameters, uniform
from metarun.errors import ConfigError
from metarun.tasks.actions import Actions, Box
from metarun.tasks.policy_gradient import DEFAULT, Estimator
from metarun.tasks.worlds import Trajectories, World

STEP = 0.1  # the largest move in each direction
NEAR = 0.01  # an episode ends this close to the goal, in each direction


class Navigation2D(Environments):
    """A point has to move to a goal that it does not see.

    As in the code of the paper (cbfinn/maml_rl, `point_env_randgoal.py`): the goal is uniform in a square
    around the start; the observation is the position; an action in [-1, 1] moves the point by up to 0.1 in
    each direction; the reward is minus the distance to the goal after the move; an episode ends within 0.01
    of the goal in both directions.

    Args:
        half: half of the side of the square.
        reward: "distance", or "sparse": 1 within `radius` of the goal and 0 elsewhere, in episodes that do
            not end at the goal.
        radius: see `reward`.
        horizon: the number of time steps of an episode.
        estimator: see `Estimator`.
    """

    title = "navigation2d"
    actions: Actions = Box(2)
    observation = (2,)

    def __init__(
        self,
        *,
        half: float = 0.5,
        horizon: int = 100,
        reward: Literal["distance", "sparse"] = "distance",
        radius: float = 0.2,
        estimator: Estimator = DEFAULT,
    ) -> None:
        super().__init__(estimator, horizon)
        for name, value in {"half": half, "radius": radius}.items():
            if value <= 0:
                raise ConfigError(f"dataset.{name}={value}: must be above 0")
        self.half, self.reward, self.radius = half, reward, radius

    @property
    def identity(self) -> str:
        return f"{self.half} {self.horizon}" + (f" {self.radius}" if self.reward == "sparse" else "")

    def sample(self, split: Split, tasks: int, generator: torch.Generator) -> Parameters:
        return {"goal": uniform((-self.half, self.half), (tasks, 2), generator)}

    def world(self, parameters: Parameters, device: torch.device | str) -> World:
        radius = self.radius if self.reward == "sparse" else None
        return Plane(parameters["goal"].to(device), self.horizon, radius)

    def positions(self, batch: Trajectories) -> Tensor:
        return batch.observations

    def goal(self, parameters: Parameters) -> Tensor:
        return parameters["goal"][0]

    def optimum(self, parameters: Parameters) -> Tensor:
        """Straight for the goal, as far as a step reaches in each direction."""
        goal = parameters["goal"].double()
        position, total = torch.zeros_like(goal), torch.zeros(len(goal), dtype=torch.float64)
        for _ in range(self.horizon):
            position = position + (goal - position).clamp(-STEP, STEP)
            away = (goal - position).norm(dim=-1)
            total = total + (away < self.radius if self.reward == "sparse" else -away)
        return total


class Plane(World):
    """The plane of `Navigation2D`.

    Args:
        goals: [T, 2].
        horizon: the number of time steps of an episode.
        radius: within which the reward is 1, if it is sparse.
    """

    def __init__(self, goals: Tensor, horizon: int, radius: float | None = None) -> None:
        self.goals, self.horizon, self.radius = goals, horizon, radius
        self.actions, self.device = Box(2), goals.device

    def __len__(self) -> int:
        return len(self.goals)

    def to(self, dtype: torch.dtype) -> Plane:
        return Plane(self.goals.to(dtype), self.horizon, self.radius)

    def reset(self, episodes: int, chance: Tensor) -> Tensor:
        self.position = self.goals.new_zeros(len(self.goals), episodes, 2)
        return self.position

    def step(self, actions: Tensor, chance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.position = self.position + STEP * actions.clamp(-1, 1)
        away = self.position - self.goals.unsqueeze(1)
        distance = away.norm(dim=-1)
        if self.radius is not None:
            near = (distance < self.radius).to(distance.dtype)
            return self.position, near, torch.zeros_like(distance, dtype=torch.bool)
        return self.position, -distance, (away.abs() < NEAR).all(-1)
