"""Regression on a mixture of families of functions (Vuorio, Sun, Hu and Lim 2019, section 5.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from metarun.datasets.base import Dataset, Split, number_rows
from metarun.datasets.sinusoid import Range
from metarun.errors import ConfigError, DataError
from metarun.tasks.episodes import Episodes, EpisodeShape
from metarun.tasks.objectives import DISTRIBUTIONS, REGRESSION
from metarun.tasks.source import Draw, EpisodeSource
from metarun.tasks.spec import TaskSpec

Family = Literal["sinusoid", "line", "quadratic", "tanh", "transformed_l1"]
NUMBERS = 4  # random numbers of a function, of which a family may use fewer


def between(u: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * u


def wide(u: Tensor) -> Tensor:
    return between(u, -3, 3)


# Of points x [T, K+Q, 1] and numbers [T, 1, 1] uniform in [0, 1): the ranges of the authors' code.
FAMILIES: dict[str, Callable[..., Tensor]] = {
    "sinusoid": lambda x, u, v, w, s: between(u, 0.1, 5) * torch.sin(x - between(v, 0, math.pi)),
    "line": lambda x, u, v, w, s: wide(u) * x + wide(v),
    "quadratic": lambda x, u, v, w, s: (
        torch.where(s < 0.5, -1, 1) * between(u, 0.02, 0.15) * (x - wide(v)).square() + wide(w)
    ),
    "tanh": lambda x, u, v, w, s: wide(u) * torch.tanh(x - wide(v)) + wide(w),
    "transformed_l1": lambda x, u, v, w, s: wide(u) * (x - wide(v)).abs() + wide(w),
}


class Functions(Dataset):
    """Tasks y = f(x) with noise; the family of f is drawn first, then its parameters.

    Splits differ only in their random numbers. Departure: each task has a family at random; in the code, each
    meta-batch has as many tasks of one family as of another.

    Args:
        families: one or more of `FAMILIES`; the paper uses the first two, three or all five.
        x: the least and the largest x.
        noise: the standard deviation of the noise of y, at least 0.
        likelihood: see `metarun.datasets.sinusoid.Sinusoid`.

    Raises:
        ConfigError: if there is no family, or one twice, or `noise` is negative.
    """

    def __init__(
        self,
        *,
        families: Sequence[Family] = ("sinusoid", "line", "quadratic", "tanh", "transformed_l1"),
        x: Range = (-5.0, 5.0),
        noise: float = 0.3,
        likelihood: Literal["gaussian"] | None = None,
    ) -> None:
        if not families or len(set(families)) < len(families):
            raise ConfigError(f"dataset.families={list(families)}: choose one or more different families")
        if noise < 0:
            raise ConfigError(f"dataset.noise={noise}: choose a number of at least 0")
        self.families, self.x, self.noise, self.likelihood = tuple(families), x, noise, likelihood

    @property
    def spec(self) -> TaskSpec:
        objective = DISTRIBUTIONS if self.likelihood else REGRESSION
        return TaskSpec(item_shape=(1,), objective=objective, outputs=objective.numbers)

    def split(self, name: Split, device: torch.device | str = "cpu") -> FunctionSource:
        return FunctionSource(self, name, device)

    def examples(self, items: Sequence[Any]) -> Tensor:
        """The points x, a number each."""
        return number_rows(items, "examples", 1).float()


class FunctionSource(EpisodeSource):
    """Tasks of functions, with one way and one output."""

    def __init__(self, settings: Functions, split: Split, device: torch.device | str) -> None:
        self.settings, self.device = settings, device
        self.spec, self.name = settings.spec, f"functions {split}"
        self.fingerprint = f"functions {split} {settings.families} {settings.x} {settings.noise}"

    def check(self, shape: EpisodeShape) -> None:
        self.check_shots(shape.shots)
        if shape.ways != 1:
            raise DataError(f"ways={shape.ways}: a regression task has one way; set ways=1")

    def draw(self, tasks: int, shape: EpisodeShape, generator: torch.Generator) -> Draw:
        """Families [T, 1, 1], the numbers of functions [T, NUMBERS, 1], points and noise [T, K+Q, 1]."""
        own, points, device = self.settings, shape.shots + shape.queries, generator.device
        families = torch.randint(len(own.families), (tasks, 1, 1), generator=generator, device=device)
        numbers = torch.rand(tasks, NUMBERS, 1, generator=generator, device=device)
        x = between(torch.rand(tasks, points, 1, generator=generator, device=device), *own.x)
        return families, numbers, x, own.noise * torch.randn(x.shape, generator=generator, device=device)

    def gather(self, draw: Draw, shape: EpisodeShape) -> Episodes:
        families, numbers, x, noise = (tensor.to(self.device) for tensor in draw)
        values = [FAMILIES[name](x, *numbers.split(1, dim=1)) for name in self.settings.families]
        index = families.unsqueeze(0).expand(1, *x.shape)
        y = torch.stack(values).gather(0, index).squeeze(0) + noise  # [T, K+Q, 1]
        sizes = [shape.shots, shape.queries]
        (support_x, query_x), (support_y, query_y) = x.split(sizes, 1), y.split(sizes, 1)
        return Episodes(support_x, support_y, query_x, query_y, objective=self.spec.objective)
