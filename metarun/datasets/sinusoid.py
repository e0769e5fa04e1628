"""Sinusoid regression (Finn et al. 2017, section 5.1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.datasets.base import Dataset, Split, at_least, check_ranges, number_rows
from metarun.errors import ConfigError, DataError
from metarun.tasks.episodes import Episodes, EpisodeShape
from metarun.tasks.objectives import DISTRIBUTIONS, REGRESSION
from metarun.tasks.source import Draw, EpisodeSource
from metarun.tasks.spec import TaskSpec

Range = tuple[float, float]


class Sinusoid(Dataset):
    """Tasks y = amplitude * sin(frequency * x + phase) to be learned from K points.

    The loss is the mean squared error. There are infinitely many tasks, so splits differ only in their
    random numbers.

    With `amplitudes`, and one phase and frequency, one function of the inputs solves all training tasks, so
    that a method may memorise it instead of learning from the support (Yin et al. 2020, section 6.1).
    Training tasks have one of so many amplitudes, spaced equally over their range, and its one-hot vector
    follows x in the input. In validation and test, amplitudes are drawn uniformly and the one-hot vector of
    a task is random, so that it says nothing.

    Args:
        amplitude, phase, x, frequency: the least and the largest value of each; values are drawn uniformly.
        amplitudes: the number of training amplitudes, at least 2; None: they are drawn uniformly, too.
        noise: the standard deviation of normal noise that is added to y, at least 0.
        likelihood: "gaussian": a distribution of y is predicted, see `metarun.tasks.objectives`; None: its
            value, with the mean squared error.
    """

    of_model = ("amplitudes",)

    def __init__(
        self,
        *,
        amplitude: Range = (0.1, 5.0),
        phase: Range = (0.0, math.pi),
        x: Range = (-5.0, 5.0),
        frequency: Range = (1.0, 1.0),
        amplitudes: int | None = None,
        noise: float = 0.0,
        likelihood: Literal["gaussian"] | None = None,
    ) -> None:
        check_ranges(amplitude=amplitude, phase=phase, x=x, frequency=frequency)
        if amplitudes is not None:
            at_least(2, amplitudes=amplitudes)
            for name, (low, high) in {"phase": phase, "frequency": frequency}.items():
                if low != high:
                    raise ConfigError(
                        f"dataset.amplitudes={amplitudes}: tasks can be memorised only if all have the same "
                        f"{name}; set dataset.{name}=[{low:g},{low:g}]"
                    )
        if noise < 0:
            raise ConfigError(f"dataset.noise={noise}: choose a number of at least 0")
        self.amplitude, self.phase, self.x, self.frequency = amplitude, phase, x, frequency
        self.amplitudes, self.noise, self.likelihood = amplitudes, noise, likelihood

    @property
    def spec(self) -> TaskSpec:
        shape = (1 + (self.amplitudes or 0),)
        objective = DISTRIBUTIONS if self.likelihood else REGRESSION
        return TaskSpec(item_shape=shape, objective=objective, outputs=objective.numbers)

    def split(self, name: Split, device: torch.device | str = "cpu") -> SinusoidSource:
        return SinusoidSource(self, name, device)

    def examples(self, items: Sequence[Any]) -> Tensor:
        """The points x, a number each, before the one-hot vector if there is one."""
        return number_rows(items, "examples", *self.spec.item_shape).float()


class SinusoidSource(EpisodeSource):
    """Tasks of sinusoids, with one way and one output."""

    def __init__(self, settings: Sinusoid, split: Split, device: torch.device | str) -> None:
        self.settings, self.device = settings, device
        self.spec, self.name = settings.spec, f"sinusoid {split}"
        self.fingerprint = f"sinusoid {split} {settings.amplitude} {settings.phase} {settings.x}"
        if self.other_frequency:
            self.fingerprint += f" {settings.frequency}"
        if settings.amplitudes or settings.noise:
            self.fingerprint += f" {settings.amplitudes} {settings.noise}"
        self.memorable = settings.amplitudes if split == "train" else None

    @property
    def other_frequency(self) -> bool:
        """Whether the frequency is another one than the 1 of Finn et al."""
        return tuple(self.settings.frequency) != (1.0, 1.0)

    def check(self, shape: EpisodeShape) -> None:
        self.check_shots(shape.shots)
        if shape.ways != 1:
            raise DataError(f"ways={shape.ways}: a regression task has one way; set ways=1")

    def draw(self, tasks: int, shape: EpisodeShape, generator: torch.Generator) -> Draw:
        """Amplitudes and phases [T, 1, 1] and points [T, K+Q, 1].

        With settings that ask for them, also frequencies [T, 1, 1], the places of the ones in one-hot vectors
        [T, 1] and noise [T, K+Q, 1], in this order.
        """
        device, points = generator.device, shape.shots + shape.queries

        def uniform(bounds: Range, points: int) -> Tensor:
            low, high = bounds
            numbers = torch.rand(tasks, points, 1, generator=generator, device=device)
            return low + (high - low) * numbers

        own = self.settings
        amplitude, phase, x = uniform(own.amplitude, 1), uniform(own.phase, 1), uniform(own.x, points)
        more = [uniform(own.frequency, 1)] if self.other_frequency else []
        if own.amplitudes:
            place = torch.randint(own.amplitudes, (tasks, 1), generator=generator, device=device)
            if self.memorable:
                values = torch.linspace(*own.amplitude, self.memorable, device=device)
                amplitude = values[place].unsqueeze(-1)
            more.append(place)
        if own.noise:
            more.append(own.noise * torch.randn(x.shape, generator=generator, device=device))
        return amplitude, phase, x, *more

    def gather(self, draw: Draw, shape: EpisodeShape) -> Episodes:
        amplitude, phase, x, *more = (tensor.to(self.device) for tensor in draw)
        y = amplitude * torch.sin((more.pop(0) * x if self.other_frequency else x) + phase)  # [T, K+Q, 1]
        if self.settings.noise:
            y = y + more.pop()
        if self.settings.amplitudes:
            known = F.one_hot(more.pop(), self.settings.amplitudes).to(x)  # [T, 1, amplitudes]
            x = torch.cat([x, known.expand(-1, x.shape[1], -1)], -1)
        sizes = [shape.shots, shape.queries]
        (support_x, query_x), (support_y, query_y) = x.split(sizes, 1), y.split(sizes, 1)
        return Episodes(support_x, support_y, query_x, query_y, objective=self.spec.objective)
