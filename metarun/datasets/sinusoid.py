"""Sinusoid regression (Finn et al. 2017, section 5.1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metarun.datasets.base import Dataset, Split
from metarun.episodes import Draw, Episodes, Geometry
from metarun.errors import DataError

Range = tuple[float, float]


class Sinusoid(Dataset):
    """Tasks y = amplitude * sin(x + phase) to be learned from K points.

    The loss is the mean squared error. There are infinitely many tasks, so splits differ only in their
    random numbers.

    Args:
        amplitude, phase, x: the least and the largest value of each; values are drawn uniformly.
    """

    outputs = 1  # how many values a regression model predicts; datasets of classes lack this attribute

    def __init__(
        self,
        *,
        amplitude: Range = (0.1, 5.0),
        phase: Range = (0.0, math.pi),
        x: Range = (-5.0, 5.0),
    ) -> None:
        self.amplitude, self.phase, self.x = amplitude, phase, x

    @property
    def item_shape(self) -> tuple[int, ...]:
        return (1,)

    def split(self, name: Split, device: torch.device | str = "cpu") -> SinusoidSource:
        return SinusoidSource(self, name, device)


class SinusoidSource:
    """Episodes of sinusoids, with one way and one output."""

    item_shape: tuple[int, ...] = (1,)

    def __init__(self, settings: Sinusoid, split: Split, device: torch.device | str) -> None:
        self.settings, self.device = settings, device
        self.split = split
        self.fingerprint = f"sinusoid {split} {settings.amplitude} {settings.phase} {settings.x}"

    def check(self, geometry: Geometry) -> None:
        if geometry.ways != 1:
            raise DataError(f"ways={geometry.ways}: a regression task has one way; set ways=1")

    def draw(self, tasks: int, geometry: Geometry, generator: torch.Generator) -> Draw:
        """Amplitudes [T, 1, 1], phases [T, 1, 1] and points [T, K+Q, 1]."""

        def uniform(bounds: Range, points: int) -> Tensor:
            low, high = bounds
            numbers = torch.rand(tasks, points, 1, generator=generator, device=generator.device)
            return low + (high - low) * numbers

        points = geometry.shots + geometry.queries
        return (
            uniform(self.settings.amplitude, 1),
            uniform(self.settings.phase, 1),
            uniform(self.settings.x, points),
        )

    def gather(self, draw: Draw, geometry: Geometry) -> Episodes:
        amplitude, phase, x = (tensor.to(self.device) for tensor in draw)
        y = amplitude * torch.sin(x + phase)  # [T, K+Q, 1]
        sizes = [geometry.shots, geometry.queries]
        (support_x, query_x), (support_y, query_y) = x.split(sizes, 1), y.split(sizes, 1)
        classes = torch.zeros(len(x), 1, dtype=torch.long, device=x.device)
        return Episodes(support_x, support_y, query_x, query_y, classes)
