"""Robots of MuJoCo and of Meta-World, against plain loops."""

from __future__ import annotations

import pickle
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metarun.datasets.environments.gym import quiet
from metarun.datasets.environments.locomotion import (
    AntDirection,
    HalfCheetahDirection,
    HalfCheetahVelocity,
    Locomotion,
)
from metarun.datasets.environments.metaworld import MetaWorld
from metarun.datasets.environments.simulators import SEEDS
from metarun.errors import ConfigError
from metarun.tasks.worlds import Trajectories, World, random_numbers, roll

HORIZON, EPISODES = 15, 2
SEEDS_OF_TASKS = torch.tensor([4, 9])
CPU = torch.device("cpu")


@pytest.fixture
def mujoco() -> Any:
    pytest.importorskip("gymnasium", reason="gymnasium is not installed: pip install 'metarun[gym]'")
    return pytest.importorskip("mujoco", reason="MuJoCo is not installed: pip install 'metarun[mujoco]'")


@pytest.fixture
def metaworld() -> Any:
    return pytest.importorskip(
        "metaworld", reason="Meta-World is not installed: pip install 'metarun[metaworld]'"
    )


def played(world: World, seeds: Tensor = SEEDS_OF_TASKS) -> tuple[Trajectories, Tensor]:
    """Trajectories of a policy that always has the same distribution of actions; the first random numbers."""
    noise, chance = random_numbers(world, seeds, 0, EPISODES, CPU)
    outputs = torch.full((2 * world.actions.shape[0],), 0.3)
    return roll(world, lambda seen: outputs.expand(*seen.shape[:2], -1), noise, chance), chance[:, 0, :, 0]


def test_a_missing_simulator_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(ConfigError, match=r"pip install 'metarun\[metaworld\]'"):
        MetaWorld(name="reach-v3")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gymnasium", None)
        with pytest.raises(ConfigError, match=r"pip install 'metarun\[mujoco\]'"):
            HalfCheetahVelocity()
    pytest.importorskip("gymnasium")
    for name in [name for name in sys.modules if name.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(ConfigError, match=r"pip install 'metarun\[mujoco\]'"):
        assert HalfCheetahVelocity().spec


def plain(id: str, batch: Trajectories, task: int, episode: int, chance: Tensor, **arguments: Any) -> Any:
    """A plain environment after each step, with its x velocity from its positions, and the action."""
    import gymnasium

    with quiet():  # MuJoCo would write a warning to a file
        instance = gymnasium.make(id, **arguments)
    instance.reset(seed=int(chance[task, episode].item() * SEEDS))
    bare = instance.unwrapped
    for time in range(HORIZON):
        action = batch.actions[task, time, episode].clamp(-1, 1).numpy()
        before = bare.data.qpos[0] if id.startswith("Half") else bare.data.body("torso").xpos[0]
        instance.step(action)
        after = bare.data.qpos[0] if id.startswith("Half") else bare.data.body("torso").xpos[0]
        yield bare, (after - before) / bare.dt, action.astype(np.float64)


@pytest.mark.parametrize("family", [HalfCheetahVelocity, HalfCheetahDirection])
def test_rewards_of_half_cheetahs_are_those_of_the_papers(family: type[Locomotion], mujoco: Any):
    own = family(horizon=HORIZON)
    name = next(iter(own.sample("train", 1, torch.Generator())))
    values = torch.tensor([1.5, -1.0])
    batch, chance = played(own.world({name: values}, CPU))
    assert own.observation == (17,)
    for task in range(2):
        steps = plain("HalfCheetah-v5", batch, task, 1, chance)
        for time, (_, velocity, action) in enumerate(steps):
            value = values[task].item()
            gain = -abs(velocity - value) if name == "velocity" else value * velocity
            expected = gain - 0.05 * np.square(action).sum()
            assert batch.rewards[task, time, 1].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_rewards_of_ants_are_those_of_the_code_of_maml(mujoco: Any):
    own = AntDirection(horizon=HORIZON)
    values = torch.tensor([1.0, -1.0])
    batch, chance = played(own.world({"direction": values}, CPU))
    lengths = batch.alive.sum(1)
    for task in range(2):
        steps = plain("Ant-v5", batch, task, 0, chance, healthy_z_range=(0.2, 1.0))
        for time, (bare, velocity, action) in zip(range(int(lengths[task, 0])), steps, strict=False):
            contact = np.square(np.clip(bare.data.cfrc_ext, -1, 1)).sum()
            costs = 0.005 * np.square(action).sum() + 0.0005 * contact
            expected = values[task].item() * velocity - costs
            healthy = 0.2 <= bare.data.qpos[2] <= 1.0
            assert batch.rewards[task, time, 0].item() == pytest.approx(expected + 0.05 * healthy, abs=1e-5)


def test_a_robot_repeats_itself_in_any_company(mujoco: Any):
    own = HalfCheetahDirection(horizon=HORIZON)
    values = torch.tensor([1.0, -1.0])
    whole, _ = played(own.world({"direction": values}, CPU))
    part, _ = played(own.world({"direction": values[[1]]}, CPU), SEEDS_OF_TASKS[[1]])
    fresh, _ = played(
        HalfCheetahDirection(horizon=HORIZON).world({"direction": values[[1, 0]]}, CPU),
        SEEDS_OF_TASKS[[1, 0]],
    )
    for each in (part.observations, fresh.observations[:1]):
        assert torch.equal(each, whole.observations[1:])


def test_goals_of_both_directions_and_the_range_of_speeds(mujoco: Any):
    generator = torch.Generator().manual_seed(0)
    directions = HalfCheetahDirection().sample("test", 200, generator)["direction"]
    assert set(directions.tolist()) == {-1, 1} and abs(directions.mean()) < 0.3
    speeds = HalfCheetahVelocity(velocity=(0, 3)).sample("test", 500, generator)["velocity"]
    assert 0 <= speeds.min() < 0.1 and 2.9 < speeds.max() <= 3
    assert "mujoco " in HalfCheetahVelocity().split("test").fingerprint
    with pytest.raises(ConfigError, match="velocity"):
        HalfCheetahVelocity(velocity=(3, 0))


def goals(tasks: Any) -> set[tuple[float, ...]]:
    return {tuple(pickle.loads(task.data)["rand_vec"]) for task in tasks}


def test_training_is_on_the_training_goals_and_the_test_on_the_test_goals(metaworld: Any):
    own = MetaWorld(name="reach-v3", seed=3, horizon=5)
    reference = metaworld.ML1("reach-v3", seed=3)
    drawn = {
        split: goals(own.tasks[i] for i in own.sample(split, 50, torch.Generator())["task"].tolist())
        for split in ("train", "validation", "test")
    }
    assert drawn["train"] == drawn["validation"] == goals(reference.train_tasks)
    assert drawn["test"] == goals(reference.test_tasks)
    assert not drawn["train"] & drawn["test"]
    world = own.world(own.sample("train", 2, torch.Generator()), CPU)
    world.reset(1, torch.zeros(2, 1, 1))
    used = {tuple(instance._last_rand_vec) for instance in world.instances}
    assert used <= goals(reference.train_tasks) and len(used) == 2
    names = own.split("test").fingerprint
    assert f"metaworld {metaworld.__version__ if hasattr(metaworld, '__version__') else ''}" in names
    assert "rewards v2" in names and "mujoco " in names


def test_success_is_counted_for_each_episode(metaworld: Any):
    own = MetaWorld(name="reach-v3", horizon=60)
    tasks = own.sample("test", 2, torch.Generator())
    world = own.world(tasks, CPU)
    _, chance = random_numbers(world, SEEDS_OF_TASKS, 0, 2, CPU)
    seen = world.reset(2, chance[:, 0])
    targets = torch.from_numpy(np.stack([each._target_pos for each in world.instances])).float().view(2, 2, 3)
    for time in range(60):  # episode 0 goes to the goal, episode 1 away from it
        way = (targets - seen[..., :3]) * torch.tensor([10.0, -10.0])[:, None]
        seen, _, ended = world.step(torch.cat([way, torch.zeros(2, 2, 1)], -1), chance[:, time + 1])
        assert not ended.any()
    assert world.reached() is not None and world.reached().tolist() == [[True, False], [True, False]]


def test_benchmarks_of_meta_world_that_there_are_not(metaworld: Any):
    for settings, message in (
        ({"name": "reach-v2"}, r"dataset.name=reach-v2: .*did you mean reach-v3\?"),
        ({}, "dataset.name=null: ML1 needs"),
        ({"benchmark": "ML10", "name": "reach-v3"}, "nothing reads it"),
        ({"name": "reach-v3", "horizon": 501}, "at most 500"),
    ):
        with pytest.raises(ConfigError, match=message):
            MetaWorld(**settings)
