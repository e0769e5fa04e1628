"""Relation networks (Sung, Yang, Zhang, Xiang, Torr and Hospedales 2018)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.feature_method import FeatureMethod, one_hot, require
from metarun.nn.layers import Norm, norm_layer


class RelationNet(FeatureMethod):
    """A second network compares a query's feature maps with a class's, and is trained by squared error.

    A class is the sum of its shots' feature maps (section 3.2), so that shots at test should be those of
    training; beside the query's maps it passes
    two convolutional blocks and two linear layers, whose sigmoid is the relation score (equation 1), 1
    for the query's own class and 0 for the others (equation 2). Logits are what the sigmoid takes.

    A convolution of two stacked maps is the sum of one of each: the first layer sees every class and
    every query once, and not every pair.

    Feature maps smaller than 2x2 are not pooled, and a backbone whose features are no maps gives
    maps of one pixel.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int = 64,
        hidden: int = 8,
        norm: Norm = "running",
    ) -> None:
        super().__init__(backbone)
        require(min(width, hidden) >= 1, f"algorithm.width={width}, hidden={hidden}: must be at least 1")
        self.map_shape: tuple[int, int, int] = getattr(backbone, "map_shape", (self.features, 1, 1))
        channels, *sides = self.map_shape
        layers: list[nn.Module] = []
        for inputs in (2 * channels, width):
            norms = "none" if norm == "instance" and max(sides) == 1 else norm  # would leave nothing
            layers += [nn.Conv2d(inputs, width, 3, padding=1), norm_layer(norms, width), nn.ReLU()]
            if min(sides) >= 2:
                layers.append(nn.MaxPool2d(2))
                sides = [side // 2 for side in sides]
        flat = width * sides[0] * sides[1]
        self.relation = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def fit(self, features: Tensor, targets: Tensor, ways: int) -> Tensor:
        """The summed features of each class [T, N, F]."""
        return one_hot(targets, ways, features).mT @ features

    def score(self, adapted: Tensor, features: Tensor) -> Tensor:
        shape = *features.shape[:2], adapted.shape[1]  # T, B, N
        first: nn.Conv2d = self.relation[0]  # type: ignore[assignment]
        of_class, of_query = first.weight.split(self.map_shape[0], 1)
        classes = self.seen(adapted, of_class, first.bias).unsqueeze(1)  # [T, 1, N, width, H, W]
        queries = self.seen(features, of_query, None).unsqueeze(2)  # [T, B, 1, width, H, W]
        pairs = (classes + queries).flatten(1, 2)  # [T, B*N, width, H, W]
        rest = self.relation[1:].train(self.training)  # a slice is a new module
        return self.by_task(rest, pairs).view(shape)

    def seen(self, features: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Feature maps [T, B, F] convolved, [T, B, width, H, W]."""
        maps = features.flatten(0, 1).unflatten(-1, self.map_shape)
        return F.conv2d(maps, weight, bias, padding=1).unflatten(0, features.shape[:2])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean squared error of the relation scores, [T]."""
        wanted = one_hot(targets, outputs.shape[-1], outputs)
        return (outputs.sigmoid() - wanted).square().mean((1, 2))
