"""python -m benchmarks.environments: environment steps a CPU second, with a policy, of one thread."""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from metarun.backbones.mlp import MLP
from metarun.config.build import build_dataset
from metarun.config.paths import CONF
from metarun.config.schema import register_frames
from metarun.datasets.environments.base import Environments
from metarun.errors import MetarunError
from metarun.tasks.worlds import random_numbers, roll

TASKS, EPISODES, ROUNDS = 20, 10, 3
FAMILIES = {
    "navigation2d": [],
    "gymnasium": ["dataset.id=Pendulum-v1", "dataset.vary={m:[0.5,2],l:[0.5,2]}", "dataset.horizon=100"],
    "half_cheetah_vel": ["dataset.horizon=100"],
    "ant_dir": ["dataset.horizon=100"],
    "metaworld": ["dataset.name=reach-v3", "dataset.horizon=20"],
}


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.environments", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="DATASET", help=f"of {', '.join(FAMILIES)}; all")
    names = parser.parse_args().families or list(FAMILIES)
    if unknown := sorted(set(names) - set(FAMILIES)):
        parser.error(f"{unknown[0]}: no such dataset here; there are {', '.join(FAMILIES)}")
    torch.set_num_threads(1)
    register_frames()
    for name in names:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("train", [f"dataset={name}", *FAMILIES[name]])
        try:
            family = build_dataset(cfg.dataset)
            assert isinstance(family, Environments)
            print(f"{name:20} {speed(family):12,.0f} steps a CPU second")
        except MetarunError as error:
            print(f"{name:20} {error}")


def speed(family: Environments) -> float:
    """Steps a CPU second of 20 tasks with 10 episodes each, whose tasks have equal weights; median of 3."""
    world = family.world(family.sample("train", TASKS, torch.Generator().manual_seed(0)), "cpu")
    body = MLP(family.observation, (64, 64))
    policy = nn.Sequential(body, nn.Linear(body.features, family.actions.outputs))
    log_std = torch.zeros(family.actions.constants)

    def model(seen: Tensor) -> Tensor:
        outputs = policy(seen.flatten(0, 1)).unflatten(0, seen.shape[:2])
        return torch.cat([outputs, log_std.expand(*outputs.shape[:2], -1)], -1)

    numbers = random_numbers(world, torch.arange(TASKS), 0, EPISODES, torch.device("cpu"))
    rates = []
    for _ in range(ROUNDS + 1):
        began = time.process_time()
        steps = roll(world, model, *numbers).alive.sum().item()
        rates.append(steps / (time.process_time() - began))
    return median(rates[1:])  # the first makes the instances


if __name__ == "__main__":
    main()
