"""Pictures of episodes: their actions are taken again in an instance that draws what it does."""

from __future__ import annotations

import os
import sys

import numpy as np
import torch

from metarun.datasets.environments.base import Environments, Parameters
from metarun.datasets.environments.gym import GymFamily
from metarun.datasets.environments.simulators import SEEDS
from metarun.errors import ConfigError, first_line
from metarun.tasks.rollouts import SCORED, Rollouts
from metarun.tasks.worlds import Trajectories, random_numbers

PICTURES = 60  # of an episode, at most


class Camera:
    """Films episodes of one task.

    Args:
        family: the environments.
        parameters: of the task, batched with T = 1.

    Raises:
        ConfigError: the environments have no pictures, or this machine cannot draw them.
    """

    def __init__(self, family: Environments, parameters: Parameters) -> None:
        if not isinstance(family, GymFamily):
            raise ConfigError(
                f"video=true: {family.title} has no pictures; leave video out (paths.png has its episodes)"
            )
        self.world = family.world(parameters, "cpu")
        (self.task,) = self.world.tasks
        if sys.platform == "linux" and not os.environ.get("DISPLAY"):
            os.environ.setdefault("MUJOCO_GL", "egl")  # the other backends need a display, or another library
        self.instance = family.make(family.kind(self.task), render_mode="rgb_array", **family.view)
        family.prepare(self.instance, self.task)
        self.instance.reset(seed=0)
        self.picture()

    def picture(self) -> np.ndarray:
        """What the instance looks like now, uint8 [height, width, 3]. Raises ConfigError if it has none."""
        try:
            shown = self.instance.render()
        except Exception as error:  # of any library for graphics, each with errors of its own
            raise ConfigError(
                f"video=true: this machine cannot draw the environment ({first_line(error)}); install what "
                "it names, or a library for OpenGL and set MUJOCO_GL=egl or osmesa; or leave video out"
            ) from error
        if not isinstance(shown, np.ndarray):
            raise ConfigError("video=true: the environment has no pictures; leave video out")
        return shown

    def film(self, tasks: Rollouts, batch: Trajectories) -> list[np.ndarray]:
        """Pictures of the first episode of scored trajectories, at most 60.

        Args:
            tasks: the task that they are of, T = 1.
            batch: its scored trajectories.

        Raises:
            ConfigError: the episode does not repeat itself.
        """
        simulation = self.world.simulation
        episodes = batch.rewards.shape[2]
        _, chance = random_numbers(self.world, tasks.seeds, SCORED, episodes, torch.device("cpu"))
        simulation.prepare(self.instance, self.task)
        seen, _ = self.instance.reset(seed=int(chance[0, 0, 0, 0].item() * SEEDS))
        steps = int(batch.alive[0, :, 0].sum())
        pictures = []
        for time in range(steps):
            expected = batch.observations[0, time, 0].cpu().double().numpy()
            if not np.allclose(np.asarray(seen).ravel(), expected, rtol=1e-5, atol=1e-6):
                raise ConfigError("video=true: the episode does not repeat itself; leave video out")
            if time % (-(-steps // PICTURES)) == 0:
                pictures.append(self.picture())
            move = simulation.moves(batch.actions[0, time, :1])[0]
            seen, *_ = self.instance.step(move)
        return [*pictures, self.picture()]

    def close(self) -> None:
        self.instance.close()
