"""Prototypical networks (Snell, Swersky and Zemel 2017)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.feature_method import FeatureMethod, cosines, prototypes, require, squared_distances


class ProtoNet(FeatureMethod):
    """Classify by the distance to class prototypes, the means of the embedded shots (equation 1).

    Logits are negative squared Euclidean distances (equation 2), or cosines, times a scale. Cosines with a
    learned scale that starts at 10 are the meta-learning stage of Meta-Baseline (Chen et al. 2021, equation
    3).

    Args:
        backbone: passed by the builder; see `Algorithm`.
        distance: "euclidean" or "cosine".
        scale: multiplies the logits (an inverse temperature), above 0.
        learn_scale: whether the scale is meta-learned.
    """

    def __init__(
        self,
        backbone: nn.Module,
        distance: Literal["euclidean", "cosine"] = "euclidean",
        scale: float = 1.0,
        learn_scale: bool = False,
    ) -> None:
        super().__init__(backbone)
        require(scale > 0, f"algorithm.scale={scale}: must be above 0")
        self.distance = distance
        self.scale = nn.Parameter(torch.tensor(float(scale))) if learn_scale else scale

    def fit(self, features: Tensor, targets: Tensor, ways: int) -> Tensor:
        """The prototypes [T, N, F]."""
        return prototypes(features, targets, ways)

    def score(self, adapted: Tensor, features: Tensor) -> Tensor:
        if self.distance == "cosine":
            return self.scale * cosines(features, adapted)
        return -self.scale * squared_distances(features, adapted)
