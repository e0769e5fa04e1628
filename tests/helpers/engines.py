"""metarun's engine on given episodes."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from metarun.algorithms.base import Algorithm
from metarun.tasks.episodes import Episodes, EpisodeShape
from metarun.tasks.source import Draw
from metarun.training.hardware import Hardware
from metarun.training.step import OuterStep


class FixedSource:
    """An EpisodeSource that gives the same tasks at every iteration."""

    fingerprint = "fixed"

    def __init__(self, episodes: Episodes) -> None:
        self.episodes = episodes
        self.item_shape = tuple(episodes.support_x.shape[2:])

    def check(self, shape: EpisodeShape) -> None: ...

    def draw(self, tasks: int, shape: EpisodeShape, generator: torch.Generator) -> Draw:
        return (torch.arange(tasks) % len(self.episodes),)

    def gather(self, draw: Draw, shape: EpisodeShape) -> Episodes:
        return Episodes(*(tensor[draw[0]] for tensor in self.episodes.tensors()))


def engine_of(
    algorithm: Algorithm,
    episodes: Episodes,
    optimizer: Optimizer | None = None,
    device: str = "cpu",
    **settings,
) -> OuterStep:
    """metarun's own way to a gradient, in float64."""
    hardware = Hardware(
        device, **({"precision": "float64", "tasks_at_once": 100, "compile": False} | settings)
    )
    hardware.place(algorithm)
    optimizer = optimizer or torch.optim.SGD(algorithm.parameters(), lr=0.1)
    source = FixedSource(Episodes(*(tensor.to(device) for tensor in episodes.tensors())))
    shape = EpisodeShape(episodes.ways, 1, 1)  # the source does not look at it
    engine = OuterStep(algorithm, optimizer, source, shape, len(episodes), 0, hardware)
    engine.prepare(0)
    return engine
