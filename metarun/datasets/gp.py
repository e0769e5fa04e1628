"""Regression on functions that are drawn from Gaussian processes (Kim et al. 2019, section 4.1)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from metarun.datasets.base import Dataset, Split, at_least, check_ranges, number_rows
from metarun.errors import ConfigError, DataError
from metarun.tasks import gaussians
from metarun.tasks.episodes import Episodes, EpisodeShape, Outcome
from metarun.tasks.objectives import DISTRIBUTIONS, LOG_LIKELIHOOD, REGRESSION
from metarun.tasks.source import Draw, EpisodeSource, ReferenceOutcome
from metarun.tasks.spec import TaskSpec

Range = tuple[float, float]
LEAST_NOISE = 0.001  # with less, the covariance of close points has no Cholesky factor in float64

#: The correlation of two points by their distance, and by the length scale and the period of the task.
KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "rbf": lambda r, length, period: (-0.5 * (r / length).square()).exp(),
    "matern32": lambda r, length, period: _matern(math.sqrt(3) * r / length, 1),
    "matern52": lambda r, length, period: _matern(math.sqrt(5) * r / length, 2),
    "periodic": lambda r, length, period: (-2 * ((math.pi * r / period).sin() / length).square()).exp(),
}


def _matern(d: Tensor, order: int) -> Tensor:
    """The Matern kernel of smoothness `order` + 1/2 (Rasmussen and Williams 2006, equation 4.17)."""
    return (1 + d + (d.square() / 3 if order == 2 else 0)) * (-d).exp()


class GaussianProcess(Dataset):
    """Tasks y = f(x) + noise, with a function f of a Gaussian process with mean zero.

    Each task has a kernel of its own: length scale, standard deviation, noise and period are drawn
    uniformly. There are infinitely many tasks, so splits differ only in random numbers. The defaults are
    those of the paper's code, github.com/deepmind/neural-processes. There, all tasks of a meta-batch have the
    same number of context points; here each task has its own.

    Args:
        kernel: "rbf", "matern32", "matern52" or "periodic" (Rasmussen and Williams 2006, section 4.2).
        length: the least and the largest length scale of the kernel, above 0.
        scale: the least and the largest standard deviation of f(x), above 0.
        noise: the least and the largest standard deviation of the noise, at least 0.001.
        period: the least and the largest period of the periodic kernel, above 0.
        x: the least and the largest input.
        fewest: training tasks have from this many to `shots` support points, or `shots` if
            that is less; None: always `shots`.
        likelihood: "gaussian": a distribution of y is predicted, see `metarun.tasks.objectives`; None: its
            value, with the mean squared error.

    Raises:
        ConfigError: a range or a number is out of bounds.
    """

    unread: ClassVar = {"period": "kernel!=periodic"}

    def __init__(
        self,
        *,
        kernel: Literal["rbf", "matern32", "matern52", "periodic"] = "rbf",
        length: Range = (0.1, 0.6),
        scale: Range = (0.1, 1.0),
        noise: Range = (0.02, 0.02),
        period: Range = (0.5, 2.0),
        x: Range = (-2.0, 2.0),
        fewest: int | None = 3,
        likelihood: Literal["gaussian"] | None = "gaussian",
    ) -> None:
        check_ranges(length=length, scale=scale, noise=noise, period=period, x=x)
        lowest = {"length": length[0], "scale": scale[0], "period": period[0]}
        for name, low in lowest.items():
            if low <= 0:
                raise ConfigError(f"dataset.{name}: starts at {low}; choose a range above 0")
        if noise[0] < LEAST_NOISE:
            raise ConfigError(f"dataset.noise: starts at {noise[0]}; choose a range from {LEAST_NOISE} on")
        if fewest is not None:
            at_least(1, fewest=fewest)
        self.kernel, self.x, self.fewest, self.likelihood = kernel, x, fewest, likelihood
        self.parameters = {"length": length, "scale": scale, "noise": noise, "period": period}

    @property
    def spec(self) -> TaskSpec:
        objective = DISTRIBUTIONS if self.likelihood else REGRESSION
        return TaskSpec(item_shape=(1,), objective=objective, outputs=objective.numbers)

    def split(self, name: Split, device: torch.device | str = "cpu") -> GaussianProcessSource:
        return GaussianProcessSource(self, name, device)

    def examples(self, items: Sequence[Any]) -> Tensor:
        """The points x, a number each."""
        return number_rows(items, "examples", 1).float()


class Kernel(NamedTuple):
    """The parameters of the kernels of T tasks, [T, 1, 1] each; see `GaussianProcess`."""

    length: Tensor
    scale: Tensor
    noise: Tensor
    period: Tensor


class GaussianProcessSource(EpisodeSource):
    """Tasks of functions of Gaussian processes, with one way."""

    def __init__(self, settings: GaussianProcess, split: Split, device: torch.device | str) -> None:
        self.settings, self.device, self.split = settings, device, split
        self.spec, self.name = settings.spec, f"gp {split}"
        self.fingerprint = f"gp {split} {settings.kernel} {settings.parameters} {settings.x}"

    def check(self, shape: EpisodeShape) -> None:
        self.check_shots(shape.shots)
        if shape.ways != 1:
            raise DataError(f"ways={shape.ways}: a regression task has one way; set ways=1")

    def draw(self, tasks: int, shape: EpisodeShape, generator: torch.Generator) -> Draw:
        """The parameters of the kernel [T, 1, 1], the points [T, K+Q, 1], as many standard normal numbers
        that the values are made of, and the number of support points [T, 1]."""

        def uniform(bounds: Range, points: int) -> Tensor:
            low, high = bounds
            return low + (high - low) * torch.rand(tasks, points, 1, generator=generator, device=where)

        where, points = generator.device, shape.shots + shape.queries
        kernel = Kernel(**{name: uniform(bounds, 1) for name, bounds in self.settings.parameters.items()})
        x = uniform(self.settings.x, points)
        normal = torch.randn(tasks, points, 1, generator=generator, device=where)
        fewest = min(self.settings.fewest or shape.shots, shape.shots)
        least = fewest if self.split == "train" else shape.shots
        counts = torch.randint(least, shape.shots + 1, (tasks, 1), generator=generator, device=where)
        return (*kernel, x, normal, counts)

    def gather(self, draw: Draw, shape: EpisodeShape) -> Episodes:
        kernel, x, normal, counts = self.opened(draw)
        root = torch.linalg.cholesky_ex(self.covariance(kernel, x))[0]  # without waiting for the device
        y = (root @ normal.double()).to(x.dtype)
        sizes = [shape.shots, shape.queries]
        (support_x, query_x), (support_y, query_y) = x.split(sizes, 1), y.split(sizes, 1)
        weights = None
        if self.split == "train" and self.settings.fewest is not None:
            weights = left_out(counts, shape.shots).to(x.dtype)
        return Episodes(
            support_x, support_y, query_x, query_y, objective=self.spec.objective, support_weights=weights
        )

    def opened(self, draw: Draw) -> tuple[Kernel, Tensor, Tensor, Tensor]:
        """The kernels, the points, the normal numbers and the numbers of support points of a draw."""
        *kernel, x, normal, counts = (tensor.to(self.device) for tensor in draw)
        return Kernel(*kernel), x, normal, counts

    def covariance(self, kernel: Kernel, x: Tensor) -> Tensor:
        """The covariance of y at points [T, P, 1], float64 [T, P, P]."""
        length, scale, noise, period = (tensor.double() for tensor in kernel)
        x = x.double()
        correlation = KERNELS[self.settings.kernel]((x - x.mT).abs(), length, period)
        eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        return scale.square() * correlation + noise.square() * eye

    # the exact solution

    def references(self, shape: EpisodeShape, shared: dict[Any, Any]) -> Mapping[str, ReferenceOutcome]:
        """The exact Gaussian process with the kernel of each task.

        It knows the distribution of all queries of a task together. A prediction of each query alone has its
        means and variances, and the sum of the log-likelihoods of single queries.
        """
        found: dict[str, ReferenceOutcome] = {"exact GP": self.exact}
        if LOG_LIKELIHOOD in self.spec.objective.metrics:
            found["exact GP, joint"] = self.exact_joint
        return found

    def exact(self, draw: Draw, shape: EpisodeShape) -> Outcome:
        mean, covariance = self.posterior(draw, shape)
        tasks = self.gather(draw, shape)
        deviations = covariance.diagonal(dim1=1, dim2=2).sqrt().unsqueeze(-1)
        outputs = mean
        if self.spec.objective.numbers > 1:
            outputs = gaussians.packed(mean.unsqueeze(2), deviations.log().unsqueeze(2))
        return tasks.outcome(outputs.to(tasks.query_y.dtype))

    def exact_joint(self, draw: Draw, shape: EpisodeShape) -> Outcome:
        outcome = self.exact(draw, shape)
        mean, covariance = self.posterior(draw, shape)
        y = self.gather(draw, shape).query_y.double()
        joint = torch.distributions.MultivariateNormal(mean.squeeze(-1), covariance).log_prob(y.squeeze(-1))
        score = (joint / shape.queries).to(outcome.loss.dtype)
        return Outcome(-score, {**outcome.scores, LOG_LIKELIHOOD.name: score})

    def posterior(self, draw: Draw, shape: EpisodeShape) -> tuple[Tensor, Tensor]:
        """The mean [T, Q, 1] and the covariance [T, Q, Q] of the queries given the support, in float64.

        Rasmussen and Williams 2006, equations 2.23 and 2.24, for noisy queries.
        """
        kernel, x, *_ = self.opened(draw)
        y = self.gather(draw, shape).support_y.double()
        known, whole = shape.shots, self.covariance(kernel, x)
        root = torch.linalg.cholesky(whole[:, :known, :known])
        solved = torch.linalg.solve_triangular(root, whole[:, :known, known:], upper=False)
        mean = solved.mT @ torch.linalg.solve_triangular(root, y, upper=False)
        return mean, whole[:, known:, known:] - solved.mT @ solved


def left_out(counts: Tensor, shots: int) -> Tensor:
    """Support weights [T, S] with which tasks have `counts` [T, 1] of the shots, the first ones."""
    return (torch.arange(shots, device=counts.device) < counts) * (shots / counts)
