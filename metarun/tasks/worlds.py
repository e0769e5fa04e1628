"""Environments of T tasks, in which E episodes of each run side by side, and the trajectories that they give.

T tasks, H time steps, E episodes of a task, `*o` the shape of an observation, `*a` that of an action.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from metarun.tasks.actions import Actions

PHASE = 0x5851F42D4C957F2D  # an odd number that spreads the seeds of the phases of a task
SEEDS = (1 << 63) - 1


class World(ABC):
    """The environments of T tasks on one device; all tasks and episodes take a step together.

    The extension point for a new environment. Everything random comes from numbers that are passed in, so
    that what happens in an episode depends on the seed of its task alone.

    Attributes:
        actions: the kind of its actions.
        horizon: H, the number of time steps after which an episode ends.
        randoms: how many uniform random numbers an episode uses at its start, and again at each step.
        device: where its observations and rewards are.
    """

    actions: Actions
    horizon: int
    randoms: int = 0
    device: torch.device

    @abstractmethod
    def __len__(self) -> int:
        """T, the number of tasks."""

    @abstractmethod
    def reset(self, episodes: int, chance: Tensor) -> Tensor:
        """Start new episodes.

        Args:
            episodes: E.
            chance: uniform random numbers in [0, 1), [T, E, randoms].

        Returns:
            The first observations, [T, E, *o].
        """

    @abstractmethod
    def step(self, actions: Tensor, chance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take one time step in every episode, also in those that have ended; what happens there is ignored.

        Args:
            actions: [T, E, *a].
            chance: uniform random numbers in [0, 1), [T, E, randoms].

        Returns:
            The next observations [T, E, *o], the rewards [T, E], and whether an episode ends, bool [T, E].
        """

    def reached(self) -> Tensor | None:
        """Whether each episode reached its goal so far, bool [T, E]; None where there is no such goal."""
        return None

    def to(self, dtype: torch.dtype) -> World:
        """The same environments computing in `dtype`."""
        return self


@dataclass(frozen=True)
class Trajectories:
    """What happened in E episodes of each of T tasks.

    Args:
        observations: what the policy saw, [T, H, E, *o].
        actions: what it did, [T, H, E, *a].
        rewards: what it got, [T, H, E]; 0 after the end of an episode.
        alive: 1 at the steps before and at which an episode ends, 0 after them, [T, H, E].
        outputs: of the network that acted, [T, H, E, N].
        reached: whether an episode reached its goal, bool [T, E]; None where there is no such goal.
        values: a critic's estimates of the return from each step on, [T, H, E], where there is one.
        advantages: how much better an action was than expected, [T, H, E]; set once they are computed.
        scale: what the advantages of a task were divided by to normalise them, [T].
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    alive: Tensor
    outputs: Tensor
    reached: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    scale: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def returns(self) -> Tensor:
        """The sum of the rewards of each episode, [T, E]."""
        return self.rewards.sum(1)

    def map(self, change: Callable[[Tensor], Tensor]) -> Trajectories:
        """The same trajectories with every tensor changed."""
        tensors = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(self, **{name: change(x) for name, x in tensors.items() if x is not None})


def random_numbers(
    world: World, seeds: Tensor, phase: int, episodes: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The random numbers of E episodes of each task; those of a task depend on its seed and the phase alone.

    Args:
        world: the environments.
        seeds: of the tasks, int64 [T] on the CPU.
        phase: which episodes of the tasks these are: 0 for those that are scored, k for inner step k.
        episodes: E.
        device: where the numbers are put.

    Returns:
        Noise for actions [T, H, E, ...], and uniform numbers for the environments [T, H + 1, E, randoms].
    """
    generator, noise, chance = torch.Generator(), [], []
    for seed in seeds.tolist():
        generator.manual_seed((seed + phase * PHASE) & SEEDS)
        noise.append(world.actions.noise(world.horizon, episodes, generator))
        chance.append(torch.rand(world.horizon + 1, episodes, world.randoms, generator=generator))
    return torch.stack(noise).to(device), torch.stack(chance).to(device)


@torch.no_grad()
def roll(world: World, model: Callable[[Tensor], Tensor], noise: Tensor, chance: Tensor) -> Trajectories:
    """Run one episode after the other of a policy without memory, all tasks and episodes side by side.

    Args:
        world: the environments.
        model: observations [T, E, *o] to outputs [T, E, N].
        noise, chance: of `random_numbers`.
    """
    episodes = noise.shape[2]
    observation = world.reset(episodes, chance[:, 0])
    alive = torch.ones(len(world), episodes, dtype=observation.dtype, device=observation.device)
    steps = []
    for time in range(world.horizon):
        outputs = model(observation)
        action = world.actions.sample(outputs, noise[:, time])
        following, reward, ended = world.step(action, chance[:, time + 1])
        steps.append((observation, action, reward * alive, alive, outputs))
        alive, observation = alive * ~ended, following
    observations, actions, rewards, lives, outs = (torch.stack(each, 1) for each in zip(*steps, strict=True))
    return Trajectories(observations, actions, rewards, lives, outs, world.reached())
