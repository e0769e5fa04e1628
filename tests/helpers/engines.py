"""metarun's engine on given episodes."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule
from torch.optim import Optimizer

from metarun.algorithms.base import Algorithm
from metarun.tasks.episodes import Episodes, EpisodeShape
from metarun.tasks.source import Draw, EpisodeSource
from metarun.tasks.spec import TaskSpec
from metarun.training.hardware import Hardware
from metarun.training.step import OuterStep


class FixedSource(EpisodeSource):
    """A source that gives the same tasks at every iteration."""

    name = fingerprint = "fixed"

    def __init__(self, episodes: Episodes) -> None:
        self.episodes = episodes
        self.spec = TaskSpec(tuple(episodes.support_x.shape[2:]), episodes.objective)

    def check(self, shape: EpisodeShape) -> None: ...

    def draw(self, tasks: int, shape: EpisodeShape, generator: torch.Generator) -> Draw:
        return (torch.arange(tasks) % len(self.episodes),)

    def gather(self, draw: Draw, shape: EpisodeShape) -> Episodes:
        return self.episodes.map(lambda tensor: tensor[draw[0]])


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
    source = FixedSource(episodes.map(lambda tensor: tensor.to(device)))
    shape = EpisodeShape(episodes.outputs, 1, 1)  # the source does not look at it
    engine = OuterStep(algorithm, optimizer, source, shape, len(episodes), 0, hardware)
    engine.prepare(0)
    return engine


def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """Put a stand-in in TorchInductor's place that runs a graph as it is; the list of what it is given."""
    given: list[GraphModule] = []

    def stand_in(graph: GraphModule, inputs: list[torch.Tensor], options: dict[str, object]):
        given.append(graph)
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile", stand_in)
    return given
