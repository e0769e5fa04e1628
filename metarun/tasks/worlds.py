"""Environments of T tasks, in which E episodes of each run side by side, and the trajectories that they give.

T tasks, H time steps, E episodes of a task, `*o` the shape of an observation, `*a` that of an action.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
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
        targets: what the critic's estimates should have been, [T, H, E].
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
    targets: Tensor | None = None

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


class Player(ABC):
    """A policy with a memory that lasts over the episodes of a task, which it plays one after the other."""

    @abstractmethod
    def begin(self) -> None:
        """A new episode begins in every task."""

    @abstractmethod
    def __call__(self, observations: Tensor) -> Tensor:
        """Outputs [T, 1, N] for observations [T, 1, *o], as a network has them."""

    @abstractmethod
    def see(self, actions: Tensor, rewards: Tensor, following: Tensor, alive: Tensor) -> None:
        """Learn what came of the actions.

        Args:
            actions: [T, 1, *a].
            rewards: [T, 1].
            following: the next observations, [T, 1, *o].
            alive: whether the episode goes on, 1 or 0, [T, 1].
        """


@torch.no_grad()
def play(world: World, player: Player, noise: Tensor, chance: Tensor) -> Trajectories:
    """Play E episodes of each task one after the other.

    Args:
        world: the environments.
        player: the policy, which remembers what it sees.
        noise, chance: of `random_numbers`.
    """
    episodes = []
    for each in zip(noise.split(1, 2), chance.split(1, 2), strict=True):
        player.begin()
        episodes.append(roll(world, player, *each, see=player.see))
    return joined(episodes)


def joined(parts: Sequence[Trajectories]) -> Trajectories:
    """The episodes of several trajectories of the same tasks, in turn."""

    def join(name: str) -> Tensor | None:
        tensors = [x for part in parts if (x := getattr(part, name)) is not None]
        return torch.cat(tensors, min(2, tensors[0].dim() - 1)) if tensors else None

    return Trajectories(**{each.name: join(each.name) for each in fields(Trajectories)})  # type: ignore[arg-type]


def in_sequence(batch: Trajectories) -> Trajectories:
    """The time steps of all episodes of a task in turn, as of one episode: [T, E * H, 1, ...]."""

    def sequence(x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(1, 2).unsqueeze(2) if x.dim() > 2 else x

    return batch.map(sequence)


@torch.no_grad()
def roll(
    world: World,
    model: Callable[[Tensor], Tensor],
    noise: Tensor,
    chance: Tensor,
    see: Callable[[Tensor, Tensor, Tensor, Tensor], None] | None = None,
) -> Trajectories:
    """Run an episode of a policy, all tasks and episodes side by side.

    Args:
        world: the environments.
        model: observations [T, E, *o] to outputs [T, E, N].
        noise, chance: of `random_numbers`.
        see: called after each step with what came of it, see `Player`.
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
        if see is not None:
            see(action, steps[-1][2], following, alive)
    observations, actions, rewards, lives, outs = (torch.stack(each, 1) for each in zip(*steps, strict=True))
    return Trajectories(observations, actions, rewards, lives, outs, world.reached())
