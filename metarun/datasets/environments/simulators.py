"""Environments that are Python objects with the interface of gymnasium, one for each episode.

T tasks, E episodes of a task, `*a` the shape of an action, `*o` that of an observation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metarun.errors import ConfigError, TrainingError
from metarun.tasks.actions import Actions, Box, Discrete
from metarun.tasks.worlds import World

#: The parameters of one task by name.
Task = Mapping[str, float]
SEEDS = 1 << 24  # a random number in float32 has so many values


class Moves:
    """Actions of a policy as those of an action space of gymnasium.

    Numbers in [-1, 1] are scaled to the bounds of the space, and others are clipped; where there are no
    bounds, numbers are left as they are.

    Args:
        space: the action space.
        of: the environment, for messages.

    Raises:
        ConfigError: the space is neither a box nor discrete.
    """

    def __init__(self, space: Any, of: str) -> None:
        from gymnasium import spaces

        self.space, self.actions = space, self.kind(spaces, space, of)
        if isinstance(self.actions, Box):
            low, high = space.low.astype(np.float64), space.high.astype(np.float64)
            bounded = np.isfinite(low) & np.isfinite(high)
            with np.errstate(invalid="ignore"):
                self.half = np.where(bounded, (high - low) / 2, 1)
                self.middle = np.where(bounded, (high + low) / 2, 0)

    @staticmethod
    def kind(spaces: Any, space: Any, of: str) -> Actions:
        if isinstance(space, spaces.Discrete):
            return Discrete(int(space.n))
        if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
            return Box(int(np.prod(space.shape)))
        raise ConfigError(f"{of}: has actions {space}; only Box, of real numbers, and Discrete are supported")

    def __call__(self, actions: Tensor) -> Any:
        """An action of the space for each of actions [B, *a]. Raises TrainingError if one is not finite."""
        chosen = actions.cpu().numpy()
        if isinstance(self.actions, Discrete):
            return (chosen + int(self.space.start)).tolist()
        if not np.isfinite(chosen).all():
            raise TrainingError(
                "the policy's actions are no longer finite; lower inner_rate, optimizer.lr or "
                "outer_loop.max_kl"
            )
        chosen = chosen.astype(np.float64).reshape(-1, *self.space.shape)
        scaled = (self.middle + self.half * chosen).astype(self.space.dtype)
        return scaled.clip(self.space.low, self.space.high)


class Pool:
    """Instances of simulators that are used again; it keeps no more than the last use took.

    Args:
        make: makes an instance of a kind.
    """

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make
        self.kept: dict[Hashable, list[Any]] = defaultdict(list)
        self.user: object = None

    def take(self, kinds: Sequence[Hashable], user: object) -> list[Any]:
        """One instance for each kind, which belong to `user` until the next call."""
        self.user, free, chosen = user, self.kept, []
        self.kept = defaultdict(list)
        for kind in kinds:
            instance = free[kind].pop() if free.get(kind) else self.make(kind)
            self.kept[kind].append(instance)
            chosen.append(instance)
        for instance in (each for others in free.values() for each in others):
            instance.close()
        return chosen


class Simulation(ABC):
    """What tasks with the same simulator share: how instances are made, changed and read.

    Attributes:
        horizon: the number of time steps of an episode.
        moves: from actions of a policy to those of an instance.
        pool: the instances.
        success: what of the information of a step says that the goal is reached; "" where there is no goal.
    """

    horizon: int
    success: str = ""

    @property
    @abstractmethod
    def moves(self) -> Moves: ...

    @property
    @abstractmethod
    def pool(self) -> Pool: ...

    def kind(self, task: Task) -> Hashable:
        """Which instances serve a task: those of the same kind."""
        return ()

    def prepare(self, instance: Any, task: Task) -> None:  # noqa: B027
        """Make an instance, of the kind of a task, the environment of that task."""

    def reward(self, task: Task, reward: float, info: Mapping[str, Any]) -> float:
        """The reward of a step, from that of the simulator and its further information."""
        return reward


class Simulators(World):
    """Environments of T tasks with an instance of a simulator for each episode, all in this process.

    Every episode starts by `reset(seed=...)` with a seed from the random numbers that are passed in. So what
    happens in it depends on these and on the actions alone, if the simulator repeats itself.

    Args:
        simulation: how the instances are used.
        tasks: the parameters of each task.
        device: of observations and rewards.
        dtype: of observations and rewards.
    """

    randoms = 1

    def __init__(
        self,
        simulation: Simulation,
        tasks: Sequence[Task],
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.simulation, self.tasks, self.dtype = simulation, tasks, dtype
        self.device = torch.device(device)
        self.horizon, self.actions = simulation.horizon, simulation.moves.actions

    def __len__(self) -> int:
        return len(self.tasks)

    def to(self, dtype: torch.dtype) -> Simulators:
        return Simulators(self.simulation, self.tasks, self.device, dtype)

    def reset(self, episodes: int, chance: Tensor) -> Tensor:
        simulation = self.simulation
        self.task_of = [task for task in self.tasks for _ in range(episodes)]
        self.instances = simulation.pool.take([simulation.kind(task) for task in self.task_of], self)
        seeds = (chance[..., 0].flatten().double() * SEEDS).long().tolist()
        first = []
        for instance, task, seed in zip(self.instances, self.task_of, seeds, strict=True):
            simulation.prepare(instance, task)
            first.append(np.asarray(instance.reset(seed=seed)[0], dtype=np.float64).ravel())
        self.seen = np.stack(first)
        self.over = np.zeros(len(first), dtype=bool)
        self.successful = np.zeros(len(first), dtype=bool)
        return self.tensor(self.seen)

    def step(self, actions: Tensor, chance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        simulation = self.simulation
        assert simulation.pool.user is self, "the instances were taken for other tasks after the reset"
        moves, rewards = simulation.moves(actions.flatten(0, 1)), np.zeros(len(self.over))
        for number in np.flatnonzero(~self.over).tolist():
            seen, reward, terminated, truncated, info = self.instances[number].step(moves[number])
            self.seen[number] = np.asarray(seen).ravel()
            rewards[number] = simulation.reward(self.task_of[number], reward, info)
            self.over[number] = terminated or truncated
            if simulation.success:
                self.successful[number] |= bool(info[simulation.success])
        self.check(rewards)
        return self.tensor(self.seen), self.tensor(rewards), self.flags(self.over)

    def reached(self) -> Tensor | None:
        return self.flags(self.successful) if self.simulation.success else None

    def check(self, rewards: np.ndarray) -> None:
        """Raise TrainingError where an episode goes on from numbers that are not finite."""
        broken = ~(np.isfinite(self.seen).all(1) & np.isfinite(rewards))
        if not broken.any():
            return
        # An episode may end because its state is not finite. Nothing that follows counts, but it is computed.
        self.seen[broken & self.over & np.isfinite(rewards)] = 0
        if (going := broken & ~(self.over & np.isfinite(rewards))).any():
            task = dict(self.task_of[int(np.flatnonzero(going)[0])])
            raise TrainingError(f"the simulator gives numbers that are not finite in the task {task}")

    def tensor(self, numbers: np.ndarray) -> Tensor:
        """A copy of numbers of all episodes, [T, E, ...]."""
        return torch.tensor(numbers, dtype=self.dtype, device=self.device).view(
            len(self), -1, *numbers.shape[1:]
        )

    def flags(self, each: np.ndarray) -> Tensor:
        """A copy of a flag of all episodes, bool [T, E]."""
        return torch.tensor(each, device=self.device).view(len(self), -1)
