"""A pendulum whose mass, length and gravity differ between tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from metarun.datasets.base import Split
from metarun.datasets.environments.base import Environments, Parameters, check_range, uniform
from metarun.errors import ConfigError
from metarun.tasks.actions import Actions, Box
from metarun.tasks.policy_gradient import DEFAULT, Estimator
from metarun.tasks.worlds import World

STEP, MOST_TORQUE, MOST_SPEED = 0.05, 2.0, 8.0  # as in gymnasium's Pendulum-v1
SEEN_SPEED = 8.0  # observations are divided by this, so that all their numbers are in [-1, 1]


class Pendulum(Environments):
    """A pendulum has to be swung up and kept upright by a limited torque.

    The dynamics and the reward are those of gymnasium's Pendulum-v1, whose pendulum has mass 1, length 1 and
    gravity 10. Mass, length and gravity of a task are uniform in their ranges. The observation is the cosine
    and the sine of the angle, and the angular velocity divided by 8; an action is the torque divided by 2.

    Args:
        mass, length, gravity: ranges [low, high].
        horizon: the number of time steps of an episode.
        estimator: see `Estimator`.
    """

    title = "pendulum"
    actions: Actions = Box(1)
    observation = (3,)

    def __init__(
        self,
        *,
        mass: Sequence[float] = (0.5, 1.5),
        length: Sequence[float] = (0.5, 1.5),
        gravity: Sequence[float] = (10.0, 10.0),
        horizon: int = 200,
        estimator: Estimator = DEFAULT,
    ) -> None:
        super().__init__(estimator, horizon)
        ranges = {"mass": mass, "length": length, "gravity": gravity}
        for name, value in ranges.items():
            if len(value) != 2 or not value[0] >= (0 if name == "gravity" else 1e-6):
                raise ConfigError(
                    f"dataset.{name}={list(value)}: must be two numbers above 0, such as [0.5,1.5]"
                )
        check_range(**ranges)
        self.ranges = {name: (float(low), float(high)) for name, (low, high) in ranges.items()}

    @property
    def identity(self) -> str:
        return f"{self.ranges} {self.horizon}"

    def sample(self, split: Split, tasks: int, generator: torch.Generator) -> Parameters:
        return {name: uniform(bounds, (tasks,), generator) for name, bounds in self.ranges.items()}

    def world(self, parameters: Parameters, device: torch.device | str) -> World:
        return Swings({name: values.to(device) for name, values in parameters.items()}, self.horizon)


class Swings(World):
    """The pendulums of `Pendulum`.

    Args:
        parameters: "mass", "length" and "gravity" of each task, [T].
        horizon: the number of time steps of an episode.
    """

    randoms = 2  # for the angle and the angular velocity at the start
    actions = Box(1)

    def __init__(self, parameters: Parameters, horizon: int) -> None:
        self.parameters, self.horizon = dict(parameters), horizon
        mass, length, gravity = (parameters[name].unsqueeze(1) for name in ("mass", "length", "gravity"))
        self.device = mass.device
        self.pull, self.push = 3 * gravity / (2 * length), 3 / (mass * length**2)

    def __len__(self) -> int:
        return len(self.pull)

    def to(self, dtype: torch.dtype) -> Swings:
        return Swings({name: values.to(dtype) for name, values in self.parameters.items()}, self.horizon)

    def reset(self, episodes: int, chance: Tensor) -> Tensor:
        spread = (2 * chance - 1).to(self.pull)
        self.angle, self.speed = math.pi * spread[..., 0], spread[..., 1]
        return self.observation()

    def step(self, actions: Tensor, chance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        torque = MOST_TORQUE * actions.squeeze(-1).clamp(-1, 1)
        angle = torch.remainder(self.angle + math.pi, 2 * math.pi) - math.pi  # 0: upright
        rewards = -(angle.square() + 0.1 * self.speed.square() + 0.001 * torque.square())
        speed = self.speed + STEP * (self.pull * self.angle.sin() + self.push * torque)
        self.speed = speed.clamp(-MOST_SPEED, MOST_SPEED)
        self.angle = self.angle + STEP * self.speed
        return self.observation(), rewards, torch.zeros_like(rewards, dtype=torch.bool)

    def observation(self) -> Tensor:
        return torch.stack([self.angle.cos(), self.angle.sin(), self.speed / SEEN_SPEED], -1)
