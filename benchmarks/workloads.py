"""The timed workloads: named meta-iterations on random data in device memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from metarun.algorithms.base import Algorithm
from metarun.algorithms.maml import MAML
from metarun.algorithms.protonet import ProtoNet
from metarun.algorithms.reptile import Reptile
from metarun.backbones.conv4 import Conv4
from metarun.backbones.mlp import MLP
from metarun.datasets.sinusoid import Sinusoid
from metarun.inner_loops.sgd import SGD
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.source import EpisodeSource


@dataclass(frozen=True)
class Workload:
    """One meta-iteration: `meta_batch` tasks of a shape, their inner loops, the outer step."""

    title: str
    kind: Literal["maml", "reptile", "protonet"]
    item_shape: tuple[int, ...]
    shape: EpisodeShape
    meta_batch: int
    steps: int = 0
    order: int = 2
    width: int = 64
    rate: float = 0.1

    @property
    def regression(self) -> bool:
        return len(self.item_shape) == 1

    def backbone(self) -> nn.Module:
        if self.regression:
            return MLP(self.item_shape)
        return Conv4(self.item_shape, self.width)

    def algorithm(self) -> Algorithm:
        """Build the algorithm, with the same weights in every call."""
        torch.manual_seed(0)
        outputs = 1 if self.regression else self.shape.ways
        inner = SGD(self.rate, self.steps, order=self.order)
        make: dict[str, Callable[[], Algorithm]] = {
            "maml": lambda: MAML(self.backbone(), inner, outputs),
            "reptile": lambda: Reptile(self.backbone(), inner, outputs, batch=0),
            "protonet": lambda: ProtoNet(self.backbone()),
        }
        return make[self.kind]()

    def source(self, device: torch.device) -> EpisodeSource:
        """A split on the device: 100 classes of 20 random images, or sinusoids."""
        if self.regression:
            return Sinusoid().split("train", device)
        generator = torch.Generator().manual_seed(0)
        images = torch.randint(256, (2000, *self.item_shape), dtype=torch.uint8, generator=generator)
        return ClassStore(images, [20] * 100, [str(i) for i in range(100)], "random", device)


OMNIGLOT, MINI = (1, 28, 28), (3, 84, 84)
FIVE_WAY, FEW_QUERIES = EpisodeShape(5, 1, 15), EpisodeShape(5, 1, 1)
WORKLOADS = {
    "W1a": Workload("MAML, Omniglot, 15 queries, 1 step", "maml", OMNIGLOT, FIVE_WAY, 32, 1),
    "W1b": Workload("MAML, Omniglot, 15 queries, 5 steps", "maml", OMNIGLOT, FIVE_WAY, 32, 5),
    "W1c": Workload("MAML, Omniglot, 1 query, 1 step", "maml", OMNIGLOT, FEW_QUERIES, 32, 1),
    "W1d": Workload("MAML, Omniglot, 1 query, 5 steps", "maml", OMNIGLOT, FEW_QUERIES, 32, 5),
    "W2a": Workload("FOMAML, Omniglot, 15 queries, 1 step", "maml", OMNIGLOT, FIVE_WAY, 32, 1, 1),
    "W2b": Workload("FOMAML, Omniglot, 15 queries, 5 steps", "maml", OMNIGLOT, FIVE_WAY, 32, 5, 1),
    "W2c": Workload(
        "Reptile, Omniglot, 10 images a class, 5 steps", "reptile", OMNIGLOT, EpisodeShape(5, 1, 9), 10, 5, 1
    ),
    "W3a": Workload("MAML, 84x84, 1-shot, 5 steps", "maml", MINI, FIVE_WAY, 4, 5, width=32),
    "W3b": Workload("MAML, 84x84, 5-shot, 5 steps", "maml", MINI, EpisodeShape(5, 5, 15), 4, 5, width=32),
    "W4a": Workload("ProtoNet, Omniglot, 20-way 5-shot", "protonet", OMNIGLOT, EpisodeShape(20, 5, 5), 4),
    "W4b": Workload("ProtoNet, Omniglot, 60-way 1-shot", "protonet", OMNIGLOT, EpisodeShape(60, 1, 5), 1),
    "W5a": Workload("MAML, sinusoid, 1 step", "maml", (1,), EpisodeShape(1, 10, 10), 25, 1, rate=0.01),
    "W5b": Workload("MAML, sinusoid, 5 steps", "maml", (1,), EpisodeShape(1, 10, 10), 25, 5, rate=0.01),
}
