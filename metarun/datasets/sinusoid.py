"""Sinusoid regression (Finn et al. 2017, section 5.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metarun.datasets.base import Dataset, Split, number_rows
from metarun.errors import DataError
from metarun.tasks.episodes import Episodes, EpisodeShape
from metarun.tasks.objectives import REGRESSION
from metarun.tasks.source import Draw, EpisodeSource
from metarun.tasks.spec import TaskSpec

Range = tuple[float, float]


class Sinusoid(Dataset):
    """Tasks y = amplitude * sin(frequency * x + phase) to be learned from K points.

    The loss is the mean squared error. There are infinitely many tasks, so splits differ only in their
    random numbers.

    Args:
        amplitude, phase, x, frequency: the least and the largest value of each; values are drawn uniformly.
    """

    def __init__(
        self,
        *,
        amplitude: Range = (0.1, 5.0),
        phase: Range = (0.0, math.pi),
        x: Range = (-5.0, 5.0),
        frequency: Range = (1.0, 1.0),
    ) -> None:
        self.amplitude, self.phase, self.x, self.frequency = amplitude, phase, x, frequency

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec(item_shape=(1,), objective=REGRESSION, outputs=1)

    def split(self, name: Split, device: torch.device | str = "cpu") -> SinusoidSource:
        return SinusoidSource(self, name, device)

    def examples(self, items: Sequence[Any]) -> Tensor:
        """The points x, a number each."""
        return number_rows(items, "examples", 1).float()


class SinusoidSource(EpisodeSource):
    """Tasks of sinusoids, with one way and one output."""

    def __init__(self, settings: Sinusoid, split: Split, device: torch.device | str) -> None:
        self.settings, self.device = settings, device
        self.spec, self.name = settings.spec, f"sinusoid {split}"
        self.fingerprint = f"sinusoid {split} {settings.amplitude} {settings.phase} {settings.x}"
        if self.varies:
            self.fingerprint += f" {settings.frequency}"

    @property
    def varies(self) -> bool:
        """Whether the frequency is another one than the 1 of Finn et al."""
        return tuple(self.settings.frequency) != (1.0, 1.0)

    def check(self, shape: EpisodeShape) -> None:
        self.check_shots(shape.shots)
        if shape.ways != 1:
            raise DataError(f"ways={shape.ways}: a regression task has one way; set ways=1")

    def draw(self, tasks: int, shape: EpisodeShape, generator: torch.Generator) -> Draw:
        """Amplitudes and phases [T, 1, 1], points [T, K+Q, 1], and frequencies [T, 1, 1] if they vary."""

        def uniform(bounds: Range, points: int) -> Tensor:
            low, high = bounds
            numbers = torch.rand(tasks, points, 1, generator=generator, device=generator.device)
            return low + (high - low) * numbers

        points = shape.shots + shape.queries
        drawn = (
            uniform(self.settings.amplitude, 1),
            uniform(self.settings.phase, 1),
            uniform(self.settings.x, points),
        )
        return (*drawn, uniform(self.settings.frequency, 1)) if self.varies else drawn

    def gather(self, draw: Draw, shape: EpisodeShape) -> Episodes:
        amplitude, phase, x, *frequency = (tensor.to(self.device) for tensor in draw)
        y = amplitude * torch.sin((frequency[0] * x if frequency else x) + phase)  # [T, K+Q, 1]
        sizes = [shape.shots, shape.queries]
        (support_x, query_x), (support_y, query_y) = x.split(sizes, 1), y.split(sizes, 1)
        return Episodes(support_x, support_y, query_x, query_y, objective=self.spec.objective)
