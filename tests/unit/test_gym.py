"""Environments of gymnasium as families of tasks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from metarun.datasets.environments.camera import PICTURES, Camera
from metarun.datasets.environments.gym import Gymnasium
from metarun.datasets.environments.navigation2d import Navigation2D
from metarun.datasets.environments.simulators import SEEDS, Simulators
from metarun.errors import ConfigError, TrainingError
from metarun.reporting.pictures import animation
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.rollouts import SCORED
from metarun.tasks.worlds import Trajectories, random_numbers, roll

HORIZON = 12
SEVERAL = torch.tensor([11, 5, 8])  # seeds of tasks


def test_without_gymnasium_a_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(ConfigError, match=r"pip install 'metarun\[gym\]'"):
        Gymnasium(id="Pendulum-v1", vary={"m": (0.5, 2)})


gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed: pip install 'metarun[gym]'")


class Odd(gymnasium.Env):
    """An environment that observes the numbers that differ between tasks, and has a box without bounds."""

    weight = 1.0

    def __init__(self, size: int = 3) -> None:
        self.size, self.spoiled = size, 0.0
        self.overwritten = 2.0
        self.observation_space = gymnasium.spaces.Box(-1, 1, (2, 2))
        self.action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.overwritten = 2.0
        return np.array([[self.size, self.weight], [self.overwritten, 0]]), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        spoiled = self.spoiled / self.spoiled if self.spoiled else 0.0
        seen = np.array([[self.size, self.weight], [spoiled, self.overwritten]])
        return seen, float(action[0]), bool(action[0] > 100), False, {}


class Counted(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = gymnasium.spaces.Discrete(4)


class Pixels(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.observation_space = gymnasium.spaces.Box(0, 255, (8, 8, 3), dtype=np.uint8)


class Levers(Odd):
    def __init__(self) -> None:
        super().__init__()
        self.action_space = gymnasium.spaces.MultiBinary(3)


class Drawn(Odd):
    """Its pictures are as bright as the number of the step."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 1}
    broken = False

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__()
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict]:
        self.steps = 0
        return super().reset(seed=seed)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.steps += 1
        return super().step(action)

    def render(self) -> np.ndarray:
        if self.broken:
            raise RuntimeError("no library\nand more")
        return np.full((4, 6, 3), self.steps, dtype=np.uint8)


@pytest.fixture(autouse=True)
def own_environments() -> Iterator[None]:
    kept = dict(gymnasium.registry)
    for cls in (Odd, Counted, Pixels, Levers, Drawn):
        gymnasium.register(f"{cls.__name__}-v0", entry_point=cls, max_episode_steps=HORIZON)
    yield
    gymnasium.registry.clear()
    gymnasium.registry.update(kept)


def policy(outputs: int) -> Any:
    """Some deterministic function of observations, the same for every task and any number of them."""
    return lambda seen: torch.stack([(seen * (k + 1)).sum(-1).sin() for k in range(outputs)], -1)


def played(world: Simulators, seeds: Tensor, outputs: int, episodes: int = 2) -> Trajectories:
    numbers = random_numbers(world, seeds, 0, episodes, torch.device("cpu"))
    return roll(world, policy(outputs), *numbers)


def pendulums() -> Gymnasium:
    return Gymnasium(id="Pendulum-v1", vary={"m": (0.5, 2), "l": (0.5, 2)}, horizon=HORIZON)


def test_trajectories_are_those_of_a_plain_loop():
    family = pendulums()
    parameters = family.sample("train", 3, torch.Generator().manual_seed(0))
    world = family.world(parameters, "cpu")
    batch = played(world, SEVERAL, 2)
    chance = random_numbers(world, SEVERAL, 0, 2, torch.device("cpu"))[1]
    for task in range(3):
        plain = gymnasium.make("Pendulum-v1")
        plain.unwrapped.m, plain.unwrapped.l = parameters["m"][task].item(), parameters["l"][task].item()
        for episode in range(2):
            seen, _ = plain.reset(seed=int(chance[task, 0, episode, 0].item() * SEEDS))
            for time in range(HORIZON):
                assert batch.observations[task, time, episode].tolist() == seen.tolist()
                action = 2 * batch.actions[task, time, episode].clamp(-1, 1).numpy()  # the torque's bounds
                seen, reward, *_ = plain.step(action)
                assert batch.rewards[task, time, episode] == np.float32(reward)


@pytest.mark.parametrize(
    "family, outputs",
    [
        (pendulums, 2),
        (lambda: Gymnasium(id="CartPole-v1", vary={"masspole": (0.05, 2), "gravity": (5, 15)}), 2),
        (lambda: Gymnasium(id="Pendulum-v1", vary={"g": (5, 15)}, horizon=HORIZON), 2),  # of its constructor
    ],
    ids=["attributes", "derived", "constructor"],
)
def test_a_task_does_not_depend_on_the_others(family: Any, outputs: int):
    own = family()
    own.horizon = 30
    parameters = own.sample("train", 3, torch.Generator().manual_seed(0))
    whole = played(own.world(parameters, "cpu"), SEVERAL, outputs)
    for order in ([2, 0, 1], [1], [0, 2]):
        some = {name: values[order] for name, values in parameters.items()}
        part = played(own.world(some, "cpu"), SEVERAL[order], outputs)
        for name in ("observations", "actions", "rewards", "alive"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[order]), (order, name)
    assert not torch.equal(whole.observations[0, 1:], whole.observations[1, 1:])


def test_attributes_of_the_constructor_are_computed_again():
    family = Gymnasium(id="CartPole-v1", vary={"masspole": (0.2, 0.9), "length": (0.2, 0.9)})
    task = {"masspole": 0.3, "length": 0.8}
    instance = family.make(family.kind(task))
    family.prepare(instance, task)
    bare = instance.unwrapped
    assert (bare.total_mass, bare.polemass_length) == (bare.masscart + 0.3, 0.3 * 0.8)


def test_an_episode_that_ends_early_stands_still():
    family = Gymnasium(id="CartPole-v1", vary={"gravity": (5, 15)}, horizon=100)
    world = family.world(family.sample("train", 2, torch.Generator()), "cpu")
    batch = roll(
        world,
        lambda seen: torch.tensor([0.0, 9.0]).expand(*seen.shape[:2], 2),  # always to the right
        *random_numbers(world, SEVERAL[:2], 0, 3, torch.device("cpu")),
    )
    lengths = batch.alive.sum(1)
    assert lengths.min() > 4 and lengths.max() < 20
    assert torch.equal(batch.returns, lengths)  # a reward of 1 for each step


def test_instances_are_used_again():
    family = pendulums()
    parameters = family.sample("train", 3, torch.Generator())
    world = family.world(parameters, "cpu")
    played(world, SEVERAL, 2)
    before = {id(each) for each in world.instances}
    other = family.world(parameters, "cpu")
    played(other, SEVERAL, 2)
    assert {id(each) for each in other.instances} == before
    with pytest.raises(AssertionError, match="taken for other tasks"):
        world.step(torch.zeros(3, 2, 1), torch.zeros(3, 2, 1))


def test_whole_numbers_boxes_without_bounds_and_matrices():
    family = Gymnasium(id="Odd-v0", vary={"size": (1, 4), "weight": (0, 1)})
    parameters = family.sample("train", 50, torch.Generator().manual_seed(0))
    assert sorted(set(parameters["size"].tolist())) == [1, 2, 3, 4]
    world = family.world({name: values[:2] for name, values in parameters.items()}, "cpu")
    first = world.reset(1, torch.zeros(2, 1, 1))
    assert torch.equal(first[:, 0, 0], parameters["size"][:2].float()) and first.shape == (2, 1, 4)
    assert torch.equal(first[:, 0, 1], parameters["weight"][:2])
    _, rewards, ended = world.step(torch.tensor([[[30.0]], [[300.0]]]), torch.zeros(2, 1, 1))
    assert rewards.tolist() == [[30], [300]] and ended.tolist() == [[False], [True]]


def test_numbers_that_are_not_finite_stop_the_run():
    family = Gymnasium(id="Odd-v0", vary={"weight": (0, 1)}, horizon=3)
    world = family.world({"weight": torch.tensor([0.5])}, "cpu")
    world.reset(1, torch.zeros(1, 1, 1))
    with pytest.raises(TrainingError, match="actions are no longer finite"):
        world.step(torch.full((1, 1, 1), torch.nan), torch.zeros(1, 1, 1))
    world.instances[0].unwrapped.weight = np.nan
    with pytest.raises(TrainingError, match=r"not finite in the task \{'weight': 0.5\}"):
        world.step(torch.zeros(1, 1, 1), torch.zeros(1, 1, 1))
    world.reset(1, torch.zeros(1, 1, 1))
    world.instances[0].unwrapped.weight = np.nan
    seen, *_ = world.step(torch.full((1, 1, 1), 200.0), torch.zeros(1, 1, 1))
    assert seen.isfinite().all()  # it ends there


#: Settings that cannot be used, and what the error says.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no such id": ({"id": "Pendulm-v1"}, "did you mean Pendulum-v1?"),
    "no such version": ({"id": "Pendulum-v77"}, "did you mean Pendulum-v1?"),
    "a module": ({"id": "os:Pendulum-v1"}, "is the name of a module to import"),
    "no such number": ({"id": "Pendulum-v1", "vary": {"mm": (1, 2)}}, r"dataset.vary.mm: .*did you mean m\?"),
    "no number": ({"id": "Pendulum-v1", "vary": {"render_mode": (1, 2)}}, "has no such number"),
    "nothing to vary": ({"id": "Pendulum-v1", "vary": {}}, "name at least one number"),
    "reversed": ({"id": "Pendulum-v1", "vary": {"m": (2, 1)}}, r"dataset.vary.m=\[2,1\]"),
    "of a picture": (
        {"id": "CartPole-v1", "vary": {"screen_width": (1, 2)}},
        "nothing reads it in an episode",
    ),
    "in a space": (
        {"id": "CartPole-v1", "vary": {"x_threshold": (1, 2)}},
        "computes observation_space from it",
    ),
    "through a name": ({"id": "Pendulum-v1", "vary": {"max_speed": (1, 2)}}, "observation_space from it"),
    "overwritten": ({"id": "Odd-v0", "vary": {"overwritten": (1, 2)}}, "an episode begins by setting it"),
    "no whole numbers": ({"id": "Odd-v0", "vary": {"size": (1, 1.5)}}, "whole number"),
    "observations": ({"id": "Counted-v0", "vary": {"size": (1, 2)}}, "its observations are Discrete"),
    "images": ({"id": "Pixels-v0", "vary": {"weight": (1, 2)}}, "such as images"),
    "actions": ({"id": "Levers-v0", "vary": {"weight": (1, 2)}}, "has actions MultiBinary"),
    "no argument": ({"id": "Pendulum-v1", "arguments": {"mass": 1}}, "cannot be made with {'mass': 1}"),
    "no horizon": ({"id": "Blackjack-v1"}, "set dataset.horizon"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_used_is_refused_in_a_line(case: str):
    settings, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message) as error:
        family = Gymnasium(**{"vary": {"m": (1, 2)}, **settings})
        assert family.spec
        family.split("train")
    assert "\n" not in str(error.value)


def test_the_fingerprint_names_the_versions():
    source = pendulums().split("test")
    assert f"gymnasium {gymnasium.__version__}" in source.fingerprint
    assert source.fingerprint != Gymnasium(id="Pendulum-v1", vary={"m": (0.5, 2)}).split("test").fingerprint


def filmed(horizon: int) -> list[np.ndarray]:
    family, shape = Gymnasium(id="Drawn-v0", vary={"weight": (0, 1)}, horizon=horizon), EpisodeShape(1, 1, 2)
    source = family.split("test")
    draw = source.draw(1, shape, torch.Generator())
    tasks = source.gather(draw, shape)
    tasks.query(lambda seen: torch.zeros(*seen.shape[:2], 2))
    return Camera(family, {"weight": draw[0]}).film(tasks, tasks.recorded[SCORED])


def test_a_film_shows_the_recorded_episode(tmp_path: Path):
    pictures = filmed(horizon=5)
    assert [picture[0, 0, 0] for picture in pictures] == [0, 1, 2, 3, 4, 5]
    assert len(filmed(horizon=3 * PICTURES)) == PICTURES + 1
    animation(pictures, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as film:
        assert (film.n_frames, film.size) == (6, (6, 4))


def test_what_cannot_be_filmed_is_refused_in_a_line(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="navigation2d has no pictures"):
        Camera(Navigation2D(), {"goal": torch.zeros(1, 2)})
    monkeypatch.setattr(Drawn, "broken", True)
    with pytest.raises(ConfigError, match=r"cannot draw the environment \(no library\)"):
        filmed(horizon=2)
