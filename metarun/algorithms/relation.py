"""Relation networks (Sung, Yang, Zhang, Xiang, Torr and Hospedales 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.feature_method import FeatureMethod, one_hot
from metarun.errors import ConfigError, check_least
from metarun.nn.layers import Norm, norm_layer, without_support


class RelationNet(FeatureMethod):
    """A second network compares the feature maps of a query and a class; it is trained by squared error.

    A class is represented by the sum of the feature maps of its shots (section 3.2). The relation module only
    learns from sums of the trained number of shots. With another number, the sum is therefore scaled: it is
    the mean times the trained number of shots, which equals the sum in training. Concatenated with the
    feature maps of the query, it is the input of two convolutional blocks and two linear layers. The sigmoid
    of their output is the relation score (equation 1), with the target 1 for the class of the query and 0 for
    the others (equation 2). Logits are the values before the sigmoid.

    A convolution of concatenated maps is the sum of a convolution of each, so that the first layer is
    computed once for every class and every query, not for every pair.

    Feature maps smaller than 2x2 are not pooled. If the features of the backbone are not feature maps, they
    are treated as maps of one pixel.

    Args:
        backbone, shots: passed by the builder; see `Algorithm`.
        width: channels of the convolutional blocks.
        hidden: units of the first linear layer.
        norm: the normalisation in the convolutional blocks. The pairs that they compare have no support, so
            that of TaskNorm only the part of each example alone remains: "task" is instance norm here,
            "task_layer" and "support" are layer norm.
        padding: pixels of zeros around the maps before each convolution of the second network: 1, or 0 as in
            the paper's code for miniImageNet, with which maps lose 2 pixels.

    Raises:
        ConfigError: if a setting is outside of its range, or the feature maps are too small.
    """

    def __init__(
        self,
        backbone: nn.Module,
        width: int = 64,
        hidden: int = 8,
        norm: Norm = "running",
        shots: int = 1,
        padding: Literal[0, 1] = 1,
    ) -> None:
        super().__init__(backbone)
        self.shots, self.padding = shots, padding
        check_least("algorithm", 1, width=width, hidden=hidden)
        self.map_shape: tuple[int, int, int] = getattr(backbone, "map_shape", (self.features, 1, 1))
        channels, *sides = self.map_shape
        layers: list[nn.Module] = []
        norm = without_support(norm)
        for inputs in (2 * channels, width):
            # Instance norm of a single pixel would always be zero.
            norms = "none" if norm == "instance" and max(sides) == 1 else norm
            layers += [nn.Conv2d(inputs, width, 3, padding=padding), norm_layer(norms, width), nn.ReLU()]
            sides = [side + 2 * padding - 2 for side in sides]
            if min(sides) < 1:
                raise ConfigError(
                    f"algorithm.padding=0: leaves nothing of feature maps of {self.map_shape[1]}x"
                    f"{self.map_shape[2]}; choose algorithm.padding=1"
                )
            if min(sides) >= 2:
                layers.append(nn.MaxPool2d(2))
                sides = [side // 2 for side in sides]
        flat = width * sides[0] * sides[1]
        self.relation = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, 1)
        )

    def own_heads(self) -> Sequence[nn.Module]:
        return [self.relation]

    def fit(self, features: Tensor, targets: Tensor, ways: int) -> Tensor:
        """The sum of the features of each class, scaled to the trained number of shots, [T, N, F]."""
        members = one_hot(targets, ways, features).mT  # [T, N, S]
        return members @ features * (self.shots / members.sum(-1, keepdim=True))

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
        return F.conv2d(maps, weight, bias, padding=self.padding).unflatten(0, features.shape[:2])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean squared error of the relation scores, [T]."""
        wanted = one_hot(targets, outputs.shape[-1], outputs)
        return (outputs.sigmoid() - wanted).square().mean((1, 2))
