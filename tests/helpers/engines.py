"""metarun's engine on given episodes."""

from __future__ import annotations

import pytest
import torch
from torch.fx import GraphModule
from torch.optim import Optimizer

from metarun.algorithms.base import Algorithm
from metarun.engine import Engine
from metarun.episodes import Draw, Episodes, Geometry
from metarun.hardware import Hardware


class FixedSource:
    """An EpisodeSource that gives the same tasks at every iteration."""

    fingerprint = "fixed"

    def __init__(self, episodes: Episodes) -> None:
        self.episodes = episodes
        self.item_shape = tuple(episodes.support_x.shape[2:])

    def check(self, geometry: Geometry) -> None: ...

    def draw(self, tasks: int, geometry: Geometry, generator: torch.Generator) -> Draw:
        return (torch.arange(tasks) % len(self.episodes),)

    def gather(self, draw: Draw, geometry: Geometry) -> Episodes:
        return Episodes(*(tensor[draw[0]] for tensor in self.episodes.tensors()))


def engine_of(
    algorithm: Algorithm,
    episodes: Episodes,
    optimizer: Optimizer | None = None,
    device: str = "cpu",
    **settings,
) -> Engine:
    """metarun's own way to a gradient, in float64."""
    hardware = Hardware(
        device, **({"precision": "float64", "tasks_at_once": 100, "compile": False} | settings)
    )
    hardware.place(algorithm)
    optimizer = optimizer or torch.optim.SGD(algorithm.parameters(), lr=0.1)
    source = FixedSource(Episodes(*(tensor.to(device) for tensor in episodes.tensors())))
    geometry = Geometry(episodes.ways, 1, 1)  # the source does not look at it
    engine = Engine(algorithm, optimizer, source, geometry, len(episodes), 0, hardware)
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
