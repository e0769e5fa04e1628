"""Robots of MuJoCo that have to run at a speed or in a direction (Finn, Abbeel and Levine 2017, section 5.3).

They are those of gymnasium with the rewards of the papers. Their bodies, time steps and observations are not
those of the papers, so that returns are not comparable in absolute terms.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from metarun.datasets.base import Split
from metarun.datasets.environments.base import Parameters, Range, check_range, uniform
from metarun.datasets.environments.gym import GymFamily, gymnasium, made, registered, versions
from metarun.datasets.environments.simulators import Task
from metarun.tasks.policy_gradient import DEFAULT, Estimator

COST = 0.05  # of the square of the actions of a half-cheetah
# Of an ant, as in the code of MAML (cbfinn/maml_rl, `ant_env_rand_direc.py`).
ANT = {
    "ctrl_cost_weight": 0.005,
    "contact_cost_weight": 0.0005,
    "healthy_reward": 0.05,
    "healthy_z_range": (0.2, 1.0),
    "contact_force_range": (-1.0, 1.0),
}


class Locomotion(GymFamily):
    """A robot of gymnasium, whose reward depends on its speed along the x axis.

    Args:
        horizon: the number of time steps of an episode.
        estimator: see `Estimator`.
    """

    id: ClassVar[str]
    arguments: ClassVar[Mapping[str, Any]]
    view: ClassVar = {"camera_name": "track", "width": 320, "height": 240}

    def __init__(self, *, horizon: int = 200, estimator: Estimator = DEFAULT) -> None:
        super().__init__(estimator, horizon)
        gymnasium("mujoco")

    def make(self, kind: Any, **options: Any) -> Any:
        return made(registered(self.id), **self.arguments, **options)

    @functools.cached_property
    def example(self) -> Any:  # type: ignore[override]
        return self.make(())

    @property
    def identity(self) -> str:
        return f"{self.horizon} {versions(self.example)}"

    def reward(self, task: Task, reward: float, info: Mapping[str, Any]) -> float:
        return self.progress(task, info["x_velocity"]) + sum(info.get(name, 0.0) for name in TERMS)

    @abstractmethod
    def progress(self, task: Task, velocity: float) -> float:
        """The part of the reward that depends on the speed."""


TERMS = ("reward_ctrl", "reward_contact", "reward_survive")  # of the reward of a robot of gymnasium


class HalfCheetahVelocity(Locomotion):
    """A half-cheetah has to run at a speed that it does not observe: the reward is minus the difference.

    Minus 0.05 times the squared norm of the actions.

    Args:
        velocity: the least and the largest speed, [0, 2] in MAML and [0, 3] in ProMP, PEARL and VariBAD.
        horizon: the number of time steps of an episode.
        estimator: see `Estimator`.
    """

    title, id, arguments = "half_cheetah_vel", "HalfCheetah-v5", {"ctrl_cost_weight": COST}

    def __init__(
        self, *, velocity: Range = (0.0, 2.0), horizon: int = 200, estimator: Estimator = DEFAULT
    ) -> None:
        super().__init__(horizon=horizon, estimator=estimator)
        check_range(velocity=velocity)
        self.velocity = tuple(velocity)

    @property
    def identity(self) -> str:
        return f"{self.velocity} {super().identity}"

    def sample(self, split: Split, tasks: int, generator: torch.Generator) -> Parameters:
        return {"velocity": uniform(self.velocity, (tasks,), generator)}  # type: ignore[arg-type]

    def progress(self, task: Task, velocity: float) -> float:
        return -abs(velocity - task["velocity"])


class Direction(Locomotion):
    """A robot has to run forward or backward, which it does not observe: the reward is its speed there."""

    def sample(self, split: Split, tasks: int, generator: torch.Generator) -> Parameters:
        return {"direction": torch.randint(2, (tasks,), generator=generator) * 2.0 - 1}

    def progress(self, task: Task, velocity: float) -> float:
        return task["direction"] * velocity


class HalfCheetahDirection(Direction):
    """A half-cheetah has to run forward or backward, at a cost of 0.05 times the squares of the actions."""

    title, id, arguments = "half_cheetah_dir", "HalfCheetah-v5", {"ctrl_cost_weight": COST}


class AntDirection(Direction):
    """An ant has to run forward or backward, with the costs of the code of MAML, and ends when it falls."""

    title, id, arguments = "ant_dir", "Ant-v5", ANT
