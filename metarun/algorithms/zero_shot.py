"""Prototypical networks for classes that are known by descriptions (Snell, Swersky and Zemel 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.feature_method import FeatureMethod, one_hot, require, squared_distances
from metarun.errors import ConfigError
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import Episodes, EpisodeShape
from metarun.tasks.source import EpisodeSource


class ZeroShot(FeatureMethod):
    """Classify by the distance to prototypes that are a learned map of class descriptions (section 2.4).

    A prototype has unit length, the features of a query have not (section 3.4). Logits are negative squared
    Euclidean distances.

    Departures from the paper: the map is a small network by default (`hidden=[]` is the linear map of the
    paper), and descriptions are standardised with the mean and the deviation over the training classes, which
    are kept in buffers. With support examples, which the paper does not consider, the description counts as
    one more example: the prototype has the direction of the sum of the mapped description and the features of
    the class's examples, each of unit length.

    Args:
        backbone, description: passed by the builder; see `Algorithm`.
        hidden: the sizes of the hidden layers of the map, which are followed by ReLUs.
    """

    reads_descriptions = True
    mean: Tensor
    deviation: Tensor

    def __init__(
        self, backbone: nn.Module, description: tuple[int, ...], hidden: Sequence[int] = (256, 256)
    ) -> None:
        super().__init__(backbone)
        require(all(size > 0 for size in hidden), f"algorithm.hidden={list(hidden)}: sizes must be above 0")
        self.description = tuple(description)
        sizes = [prod(self.description), *hidden]
        layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
        self.map = nn.Sequential(*layers, nn.Linear(sizes[-1], self.features))
        self.register_buffer("mean", torch.zeros(sizes[0]))
        self.register_buffer("deviation", torch.ones(sizes[0]))

    def check_source(self, source: EpisodeSource, shape: EpisodeShape) -> None:
        super().check_source(source, shape)
        if (there := source.spec.description) != self.description:
            found = f"descriptions of shape {there}" if there else "no descriptions of its classes"
            raise ConfigError(
                f"{source.name}: has {found}, and this model takes those of shape {self.description}; choose "
                "another dataset"
            )

    def on_run_start(self, train: EpisodeSource) -> None:
        """Standardise by the training classes; numbers that are the same for all of them are only centred."""
        if not isinstance(train, ClassStore) or train.about is None:
            return
        about = train.about.flatten(1)
        spread, self.mean[:] = torch.std_mean(about, 0, correction=0)
        self.deviation[:] = torch.where(spread > 1e-6 * about.abs().amax(0), spread, 1)

    def fit_tasks(self, tasks: Episodes, features: Tensor) -> Tensor:
        return self.fit(features, tasks.support_y, tasks.ways, tasks.about)

    def fit(self, features: Tensor, targets: Tensor, ways: int, about: Tensor | None = None) -> Tensor:
        """The prototypes [T, N, F], of support examples, of descriptions [T, N, *description], or of both."""
        total = one_hot(targets, ways, features).mT @ F.normalize(features, dim=-1)
        if about is not None:
            total = total + self.mapped(about)
        return F.normalize(total, dim=-1)

    def mapped(self, about: Tensor) -> Tensor:
        """Descriptions [T, N, *description] as vectors of unit length [T, N, F]."""
        return F.normalize(self.map((about.flatten(2) - self.mean) / self.deviation), dim=-1)

    def score(self, adapted: Tensor, features: Tensor) -> Tensor:
        return -squared_distances(features, adapted)
