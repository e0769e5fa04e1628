"""Environments of gymnasium (Towers et al. 2024): any that is registered, as a family of tasks."""

from __future__ import annotations

import copy
import difflib
import functools
import inspect
import os
import sys
import warnings
from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from metarun.datasets.base import Split
from metarun.datasets.environments.base import (
    Environments,
    EnvironmentSource,
    Parameters,
    Range,
    check_range,
    uniform,
)
from metarun.datasets.environments.simulators import Moves, Pool, Simulation, Simulators, Task
from metarun.datasets.environments.vary import (
    Assignment,
    CannotVary,
    check_kept,
    following,
    is_number,
    numbers_of,
)
from metarun.errors import ConfigError, first_line
from metarun.tasks.actions import Actions
from metarun.tasks.policy_gradient import DEFAULT, Estimator


class GymFamily(Environments, Simulation):
    """A family of environments that gymnasium runs; a base class for your own.

    A subclass draws the parameters of tasks (`sample`), makes instances (`make`) and sets them to a task
    (`prepare`, or `kind` where a task needs instances of its own).

    Args:
        estimator: how policy gradients are estimated, see `Estimator`.
        horizon: the number of time steps of an episode.

    Attributes:
        view: arguments of the constructor of an instance that is filmed.
    """

    view: ClassVar[Mapping[str, Any]] = {}

    @abstractmethod
    def make(self, kind: Any, **options: Any) -> Any:
        """A new instance of a kind, without a time limit.

        Args:
            kind: as `kind` says.
            options: further arguments of the constructor, such as `render_mode`.
        """

    @property
    @abstractmethod
    def example(self) -> Any:
        """An instance to read the spaces from."""

    @functools.cached_property
    def pool(self) -> Pool:  # type: ignore[override]
        return Pool(self.make)

    @functools.cached_property
    def moves(self) -> Moves:  # type: ignore[override]
        return Moves(self.example.action_space, self.title)

    @property
    def actions(self) -> Actions:
        return self.moves.actions

    @property
    def observation(self) -> tuple[int, ...]:
        space = self.example.observation_space  # which says what is missing, if gymnasium is not installed
        from gymnasium.spaces import Box

        if not isinstance(space, Box):
            kind = type(space).__name__
            raise ConfigError(
                f"{self.title}: its observations are {kind}; only Box, of numbers, is supported"
            )
        if len(space.shape) > 2:
            raise ConfigError(
                f"{self.title}: its observations are arrays of shape {space.shape}, such as images; only "
                "vectors are supported"
            )
        return (int(np.prod(space.shape)),)

    def world(self, parameters: Parameters, device: torch.device | str) -> Simulators:
        lists = {name: values.tolist() for name, values in parameters.items()}
        tasks = [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
        return Simulators(self, tasks, device)


class Gymnasium(GymFamily):
    """Any registered environment, of which some numbers differ between tasks.

    A number is an argument of the constructor (its instances are then made anew for each task), or else an
    attribute of the environment without its wrappers; attributes that the constructor computes from it are
    computed again, see `metarun.datasets.environments.vary`. It is drawn uniformly; from whole numbers if
    its usual value is one.

    Args:
        id: the name in gymnasium's registry, such as Pendulum-v1.
        vary: the least and the largest value of each number that differs between tasks.
        arguments: further arguments of the constructor, the same for all tasks.
        horizon: the number of time steps of an episode; None: the registered time limit.
        estimator: see `Estimator`.
    """

    def __init__(
        self,
        *,
        id: str,
        vary: dict[str, Range] | None = None,
        arguments: dict[str, float | bool] | None = None,
        horizon: int | None = None,
        estimator: Estimator = DEFAULT,
    ) -> None:
        self.title, self.id = id, id  # type: ignore[misc]
        self.arguments, self.registered = arguments or {}, registered(id)
        if not vary:
            known = sorted(numbers_of(self.example.unwrapped) | self.of_constructor)
            raise ConfigError(
                f"dataset.vary: name at least one number that differs between tasks, as in 'dataset.vary={{"
                f"{known[0] if known else 'NAME'}:[0.5,2]}}'; {id} has {', '.join(known) or 'none'}"
            )
        self.vary = {name: tuple(bounds) for name, bounds in vary.items()}
        check_range(**{f"vary.{name}": bounds for name, bounds in vary.items()})
        horizon = self.registered.max_episode_steps if horizon is None else horizon
        if horizon is None:
            raise ConfigError(f"dataset.horizon=null: {id} has no time limit of its own; set dataset.horizon")
        super().__init__(estimator, horizon)

    @property
    def identity(self) -> str:
        return f"{self.vary} {self.arguments} {self.horizon} {versions(self.example)}"

    def sample(self, split: Split, tasks: int, generator: torch.Generator) -> Parameters:
        return {name: self.draw(name, tasks, generator) for name in self.vary}

    def draw(self, name: str, tasks: int, generator: torch.Generator) -> Tensor:
        low, high = self.vary[name]
        if isinstance(self.usual[name], (int, np.integer)):
            return torch.randint(int(low), int(high) + 1, (tasks,), generator=generator)
        return uniform((low, high), (tasks,), generator)

    def split(self, name: Split, device: torch.device | str = "cpu") -> EnvironmentSource:
        assert self.follows is not None  # every number can vary
        return super().split(name, device)

    @functools.cached_property
    def example(self) -> Any:  # type: ignore[override]
        return made(self.registered, **self.arguments)

    @functools.cached_property
    def of_constructor(self) -> dict[str, Any]:
        """The arguments of the constructor whose usual values are numbers, with these."""
        creator = creator_of(self.registered)
        usual = {name: each.default for name, each in inspect.signature(creator).parameters.items()}
        return {name: value for name, value in (usual | self.registered.kwargs).items() if is_number(value)}

    @functools.cached_property
    def usual(self) -> dict[str, Any]:
        """The usual value of each number in `vary`. Raises ConfigError for one that cannot vary."""
        known = numbers_of(self.example.unwrapped) | self.of_constructor
        for name, (low, high) in self.vary.items():
            if name not in known:
                raise ConfigError(
                    f"dataset.vary.{name}: {self.id} has no such number{suggestion(name, known)}"
                )
            if isinstance(known[name], (int, np.integer)) and (low != int(low) or high != int(high)):
                raise ConfigError(
                    f"dataset.vary.{name}=[{low},{high}]: is a whole number in {self.id}; give such"
                )
        return known

    @functools.cached_property
    def follows(self) -> dict[str, list[Assignment]]:
        """What to compute again after each attribute in `vary`; ConfigError for one that cannot vary."""
        found = {}
        for name in self.vary:
            self.usual[name]
            if name not in self.of_constructor:
                try:
                    found[name] = following(type(self.example.unwrapped), name)
                    check_kept(self.example, name, self.vary[name])
                except CannotVary as reason:
                    raise ConfigError(f"dataset.vary.{name}: cannot vary in {self.id}: {reason}") from None
        return found

    def kind(self, task: Task) -> Hashable:
        return tuple((name, value) for name, value in task.items() if name in self.of_constructor)

    def make(self, kind: Any, **options: Any) -> Any:
        return made(self.registered, **(self.arguments | dict(kind) | options))

    def prepare(self, instance: Any, task: Task) -> None:
        bare = instance.unwrapped
        for name in self.follows:
            setattr(bare, name, task[name])
        for assignments in self.follows.values():
            for assignment in assignments:
                assignment.run(bare)


def gymnasium(extra: str = "gym") -> ModuleType:
    """The package. Raises ConfigError, with the extra of metarun that installs it, if it is not installed."""
    try:
        import gymnasium
    except ImportError:
        raise ConfigError(
            f"environments of gymnasium need that package; install it by pip install 'metarun[{extra}]'"
        ) from None
    return gymnasium


def registered(id: str) -> Any:
    """The registered specification of an environment. Raises ConfigError if there is none."""
    package = gymnasium()
    if ":" in id:  # gymnasium would import the module, also for a checkpoint of somebody else
        raise ConfigError(
            f"dataset.id={id}: is the name of a module to import; derive a class from "
            "metarun.datasets.environments.gym.Gymnasium in that module, and name it in a YAML file"
        )
    try:
        return package.spec(id)
    except package.error.Error:
        raise ConfigError(
            f"dataset.id={id}: gymnasium has no such environment{suggestion(id, package.registry)}"
        ) from None


def creator_of(spec: Any) -> Any:
    """What makes instances of a specification. Raises ConfigError if a package is missing."""
    gymnasium()
    from gymnasium.envs.registration import load_env_creator

    with importing(spec):
        return load_env_creator(spec.entry_point) if isinstance(spec.entry_point, str) else spec.entry_point


def made(spec: Any, **arguments: Any) -> Any:
    """A new instance, without a time limit and checks. Raises ConfigError if it cannot be made."""
    creator_of(spec)  # which imports the simulator, before its warnings are held back
    spec = copy.deepcopy(spec)
    spec.max_episode_steps, spec.order_enforce, spec.disable_env_checker = None, False, True
    with importing(spec), quiet():
        try:
            return gymnasium().make(spec, **arguments)
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(f"{spec.id}: cannot be made with {arguments}: {first_line(error)}") from error


def suggestion(name: str, known: Mapping[str, Any]) -> str:
    """The end of a message: the known name that is closest, or all public ones if they are few."""
    public = [each for each in known if not each.startswith("_")]
    if close := difflib.get_close_matches(name, public, n=1, cutoff=0.5):
        return f"; did you mean {close[0]}?"
    return f"; it has {', '.join(sorted(public))}" if 0 < len(public) < 30 else ""


@contextmanager
def importing(spec: Any) -> Iterator[None]:
    """A context in which a package that an environment needs may be missing: ConfigError says which."""
    try:
        yield
    except (ImportError, gymnasium().error.DependencyNotInstalled) as error:
        missing = f"{spec.id}: needs a package that is not there ({first_line(error)})"
        if "mujoco" in str(spec.entry_point):
            missing = f"{spec.id}: needs MuJoCo; install it by pip install 'metarun[mujoco]'"
        raise ConfigError(missing) from error
    except AttributeError as error:  # of a library for graphics, which MuJoCo loads when it is imported
        if not (chosen := os.environ.get("MUJOCO_GL")) or "mujoco" not in str(spec.entry_point):
            raise
        raise ConfigError(
            f"MUJOCO_GL={chosen}: MuJoCo cannot load that library ({first_line(error)}); install it, or set "
            "MUJOCO_GL=off"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """A context without the warnings of gymnasium about old versions, and of MuJoCo about its own models."""
    mujoco = sys.modules.get("mujoco")
    if mujoco:
        mujoco.set_mju_user_warning(lambda text: None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if mujoco:
            mujoco.set_mju_user_warning(None)


def versions(environment: Any) -> str:
    """The packages whose code runs in an episode, with their versions."""
    modules = [sys.modules[cls.__module__] for cls in type(environment.unwrapped).__mro__]
    used = [value for module in modules for value in vars(module).values() if inspect.ismodule(value)]
    names = {module.__name__.partition(".")[0] for module in (*modules, *used)}
    stated = {
        name: getattr(sys.modules.get(name), "__version__", "") for name in names - {"numpy", "metarun"}
    }
    return " ".join(f"{name} {version}" for name, version in sorted(stated.items()) if version)
