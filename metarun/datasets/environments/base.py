"""The base classes of environments: families of tasks that differ in a few parameters."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from metarun.datasets.base import Dataset, Split
from metarun.datasets.environments.players import MakePlayer
from metarun.errors import ConfigError, DataError
from metarun.tasks.actions import Actions
from metarun.tasks.episodes import EpisodeShape, Outcome
from metarun.tasks.objectives import RETURN, RETURN_BEFORE, RETURNS, Objective
from metarun.tasks.policy_gradient import Estimator
from metarun.tasks.rollouts import BEFORE, SCORED, Rollouts
from metarun.tasks.source import Draw, EpisodeSource, ReferenceOutcome
from metarun.tasks.spec import TaskSpec
from metarun.tasks.worlds import Trajectories, World

#: The parameters of T tasks by name, each [T, ...].
Parameters = Mapping[str, Tensor]
Range = tuple[float, float]


class Environments(Dataset):
    """A family of environments, whose tasks are drawn at random; a base class for your own.

    A subclass has its parameters (`sample`) and makes environments of them (`world`).

    Args:
        estimator: how policy gradients are estimated, see `Estimator`.
        horizon: the number of time steps of an episode.

    Attributes:
        title: the name of the family in messages.
    """

    title: ClassVar[str]
    objective: ClassVar[Objective] = RETURNS

    def __init__(self, estimator: Estimator, horizon: int) -> None:
        self.estimator = estimator if isinstance(estimator, Estimator) else Estimator(**estimator)
        if horizon < 1:
            raise ConfigError(f"dataset.horizon={horizon}: must be at least 1")
        self.horizon = horizon

    @property
    @abstractmethod
    def observation(self) -> tuple[int, ...]:
        """The shape of an observation, as a network sees it."""

    @property
    @abstractmethod
    def actions(self) -> Actions:
        """The kind of actions."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """The settings, and versions of libraries, that decide what happens in an episode."""

    @abstractmethod
    def sample(self, split: Split, tasks: int, generator: torch.Generator) -> Parameters:
        """Draw the parameters of tasks.

        Args:
            split: "train", "validation" or "test"; most families draw all from one distribution.
            tasks: T.
            generator: the only source of randomness.
        """

    @abstractmethod
    def world(self, parameters: Parameters, device: torch.device | str) -> World:
        """The environments of tasks with these parameters, on a device."""

    def optimum(self, parameters: Parameters) -> Tensor | None:
        """The best expected return of each task if its parameters are known, [T]; None if it is not known."""
        return None

    def players(self, shape: EpisodeShape) -> Mapping[str, MakePlayer]:
        """Classical players of tasks of this shape, by name, which `metarun eval` shows beside models."""
        return {}

    def check_task(self, parameters: Parameters) -> None:
        """Raise ConfigError for typed parameters that no task can have."""

    def positions(self, batch: Trajectories) -> Tensor | None:
        """Where episodes went, [T, H, E, 2], if they move in a plane that can be drawn; else None."""
        return None

    def goal(self, parameters: Parameters) -> Tensor | None:
        """Where the goal of the first task is in that plane, [2]; None if it has none."""
        return None

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec(
            item_shape=self.observation,
            objective=self.objective,
            outputs=self.actions.outputs,
            constants=self.actions.constants,
            static=False,
            tasks=Rollouts,
        )

    def split(self, name: Split, device: torch.device | str = "cpu") -> EnvironmentSource:
        return EnvironmentSource(self, name, device)


class EnvironmentSource(EpisodeSource):
    """Tasks of a family of environments: their parameters, and a seed for all that is random in a task.

    Args:
        family: the family.
        split: the name of the split.
        device: of observations and rewards.
    """

    def __init__(self, family: Environments, split: Split, device: torch.device | str) -> None:
        self.family, self.split, self.device = family, split, device
        self.spec, self.name = family.spec, f"{family.title} {split}"
        self.fingerprint = f"{family.title} {split} {family.identity}"
        self.keys = tuple(family.sample(split, 1, torch.Generator()))

    def check(self, shape: EpisodeShape) -> None:
        if shape.ways != 1:
            raise DataError(f"ways={shape.ways}: a task of an environment has one way; set ways=1")

    def draw(self, tasks: int, shape: EpisodeShape, generator: torch.Generator) -> Draw:
        """The parameters, [T, ...] each, and the seeds [T] int64."""
        parameters = self.family.sample(self.split, tasks, generator)
        seeds = torch.randint(1 << 62, (tasks,), generator=generator)
        return (*parameters.values(), seeds)

    def parameters(self, draw: Draw) -> Parameters:
        """The parameters of the tasks of a draw."""
        return dict(zip(self.keys, draw[:-1], strict=True))

    def with_new_noise(self, draw: Draw, fresh: Draw) -> Draw:
        return (*draw[:-1], fresh[-1])

    def gather(self, draw: Draw, shape: EpisodeShape) -> Rollouts:
        world = self.family.world(self.parameters(draw), self.device)
        return Rollouts(world, draw[-1], shape, self.spec.objective, self.family.estimator)

    def references(self, shape: EpisodeShape, shared: dict[Any, Any]) -> Mapping[str, ReferenceOutcome]:
        """The family's players, and the best expected return of a player that knows the task."""
        players = self.family.players(shape)
        found: dict[str, ReferenceOutcome] = {
            name: partial(self.played, make) for name, make in players.items()
        }
        one = self.family.sample(self.split, 1, torch.Generator())
        if self.family.optimum(one) is not None and RETURN in self.spec.objective.metrics:
            found["optimum, task known"] = self.optimum
        return found

    def played(self, make: MakePlayer, draw: Draw, shape: EpisodeShape) -> Outcome:
        """The outcome of a player, which plays the shots and then the queries, one after the other."""
        tasks, player = self.gather(draw, shape), make(draw[-1])
        for phase in (BEFORE, SCORED) if shape.shots else (SCORED,):
            tasks.recorded[phase] = tasks.played(player, phase)
        scores = tasks.scores()
        return Outcome(-tasks.recorded[SCORED].returns.mean(1), scores)

    def optimum(self, draw: Draw, shape: EpisodeShape) -> Outcome:
        """The best expected return of each task, before and after adaptation; other scores are not known."""
        best = self.family.optimum(self.parameters(draw))
        assert best is not None
        unknown = torch.full_like(best, torch.nan)
        metrics = self.spec.objective.metrics
        return Outcome(-best, {m.name: best if m in (RETURN, RETURN_BEFORE) else unknown for m in metrics})


def uniform(bounds: Range, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers drawn uniformly between bounds, float32."""
    low, high = bounds
    return low + (high - low) * torch.rand(shape, generator=generator)


def check_range(**settings: Any) -> None:
    """Raise ConfigError for a setting of a dataset whose least value is above its largest."""
    for name, (low, high) in settings.items():
        if low > high:
            raise ConfigError(f"dataset.{name}=[{low},{high}]: the first number must not be above the second")
