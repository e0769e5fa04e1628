"""Meta-World (Yu et al. 2019; McLean et al. 2025): a robot arm that handles objects.

Tasks are the benchmark's own task objects. Its registration with gymnasium and its evaluation function are
not used: in version 3.1.1 the registered training environments of ML1 have the goals of the test, and the
evaluation counts episodes that end early, the successful ones, more often than others.
"""

from __future__ import annotations

import functools
from importlib.metadata import version
from typing import Any, ClassVar, Literal

import torch

from metarun.datasets.base import Split
from metarun.datasets.environments.base import Parameters
from metarun.datasets.environments.gym import GymFamily, quiet, suggestion, versions
from metarun.datasets.environments.simulators import Task
from metarun.errors import ConfigError
from metarun.tasks.objectives import SUCCESSES
from metarun.tasks.policy_gradient import DEFAULT, Estimator

LONGEST = 500  # time steps, after which an environment of Meta-World must be reset


class MetaWorld(GymFamily):
    """The goals and objects of a benchmark of Meta-World; the policy does not observe the goal.

    Training and validation tasks are the benchmark's training tasks, because it has no others; its test tasks
    are for the test alone. An episode is a success if its goal is reached at any time.

    Args:
        benchmark: "ML1" (other goals in the test), or "ML10", "ML25" and "ML45" (other objects).
        name: of the environment of ML1, such as reach-v3; None for the others.
        reward: the version of the rewards; results of the two are not comparable.
        seed: of the goals; another one gives another benchmark.
        horizon: the number of time steps of an episode, at most 500.
        estimator: see `Estimator`.

    Attributes:
        tasks: the task objects of the benchmark, those for training first.
        train_tasks: how many are for training.
    """

    title, success = "metaworld", "success"
    objective: ClassVar = SUCCESSES
    view: ClassVar = {"camera_name": "topview", "width": 320, "height": 240}

    def __init__(
        self,
        *,
        benchmark: Literal["ML1", "ML10", "ML25", "ML45"] = "ML1",
        name: str | None = None,
        reward: Literal["v1", "v2"] = "v2",
        seed: int = 0,
        horizon: int = LONGEST,
        estimator: Estimator = DEFAULT,
    ) -> None:
        super().__init__(estimator, horizon)
        if horizon > LONGEST:
            raise ConfigError(f"dataset.horizon={horizon}: Meta-World has at most {LONGEST}")
        known = dict.fromkeys(metaworld().ML1.ENV_NAMES)
        if benchmark == "ML1" and name is None:
            raise ConfigError("dataset.name=null: ML1 needs an environment, as in dataset.name=reach-v3")
        if benchmark != "ML1" and name is not None:
            raise ConfigError(f"dataset.name={name}: nothing reads it with dataset.benchmark={benchmark}")
        if name is not None and name not in known:
            raise ConfigError(f"dataset.name={name}: Meta-World has none such{suggestion(name, known)}")
        self.benchmark, self.name, self.version, self.seed = benchmark, name, reward, seed

    @property
    def identity(self) -> str:
        settings = f"{self.benchmark} {self.name} rewards {self.version} seed {self.seed} {self.horizon}"
        return f"{settings} {versions(self.example)} metaworld {version('metaworld')}"

    @functools.cached_property
    def content(self) -> Any:
        """The benchmark."""
        make = getattr(metaworld(), self.benchmark)
        return make(seed=self.seed) if self.name is None else make(self.name, seed=self.seed)

    @functools.cached_property
    def tasks(self) -> list[Any]:
        return [*self.content.train_tasks, *self.content.test_tasks]

    @property
    def train_tasks(self) -> int:
        return len(self.content.train_tasks)

    def sample(self, split: Split, tasks: int, generator: torch.Generator) -> Parameters:
        """The numbers of tasks in `tasks`; each is drawn once before one is drawn again."""
        first, last = (self.train_tasks, len(self.tasks)) if split == "test" else (0, self.train_tasks)
        count = last - first
        rounds = [torch.randperm(count, generator=generator) for _ in range(-(-tasks // count))]
        return {"task": first + torch.cat(rounds)[:tasks]}

    @functools.cached_property
    def example(self) -> Any:  # type: ignore[override]
        instance = self.make(self.tasks[0].env_name)
        instance.set_task(self.tasks[0])
        return instance

    def kind(self, task: Task) -> str:
        return self.tasks[int(task["task"])].env_name

    def make(self, kind: Any, **options: Any) -> Any:
        with quiet():
            classes = self.content.train_classes | self.content.test_classes
            return classes[kind](reward_function_version=self.version, **options)

    def prepare(self, instance: Any, task: Task) -> None:
        instance.set_task(self.tasks[int(task["task"])])


def metaworld() -> Any:
    """The package. Raises ConfigError if it is not installed."""
    try:
        import metaworld
    except ImportError:
        raise ConfigError(
            "dataset=metaworld: needs Meta-World; install it by pip install 'metarun[metaworld]', in an "
            "environment of its own, because it wants MuJoCo 3.3.0"
        ) from None
    return metaworld
