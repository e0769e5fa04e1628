"""LGM-Net: generated matching networks (Li, Dong, Mei, Ma, Huang and Hu 2019)."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.feature_method import precise, require
from metarun.algorithms.matching import MatchingNet
from metarun.nn.layers import Norm, norm_layer, normalises_batches
from metarun.nn.per_task import Params, run_on_tasks
from metarun.nn.task_norm import task_norms
from metarun.tasks.numbers import noise_like
from metarun.tasks.objectives import class_weights


class LGMNet(MatchingNet):
    """A hypernetwork makes, from the support, the last convolutions of the network that embeds a task.

    - A context encoder, three convolutions on the feature maps of the support, gives the mean and the
      logarithm of the variance of a context vector; they are averaged over the support (section 3.2). Labels
      are not read.
    - For each layer of the target network, a linear map of a sample of the context gives the weights and the
      biases. The weights of each filter are scaled to length 1 (section 3.3).
    - The target network, two generated convolutions of 3x3 with a ReLU and a pooling in between, transforms
      the feature maps of the support and the queries. Cosine attention to the support classifies them
      (section 3.4), as in matching networks.

    In training, batch norm takes the statistics of all tasks of a meta-batch together ("intertask
    normalization", section 3.5). Sizes and the order of the layers are those of the authors' code, which has
    no factor of the cosines.

    Departures: evaluation takes the mean of the context (the code: one sample, or a vote of several); every
    class counts equally in the context if classes have different numbers of shots.

    Args:
        backbone: passed by the builder; see `Algorithm`. Features that are not maps are maps of one pixel.
        width: channels of the context encoder and of the generated convolutions, and twice the numbers of the
            context; even.
        scale: see `MatchingNet`.
        norm: the normalisation in the context encoder.
        intertask: whether batch norm takes the statistics of all tasks together in training. False: of each
            task apart, as in other methods, and as in checkpoints that were made without this setting.
    """

    needs_classes = True
    uncoupled = "algorithm.intertask=false"

    def __init__(
        self,
        backbone: nn.Module,
        width: int = 64,
        scale: float = 1.0,
        norm: Norm = "running",
        intertask: bool = False,
    ) -> None:
        super().__init__(backbone, scale=scale)
        require(width >= 2 and width % 2 == 0, f"algorithm.width={width}: must be even, and at least 2")
        self.map_shape: tuple[int, int, int] = getattr(backbone, "map_shape", (self.features, 1, 1))
        channels = self.map_shape[0]
        layers: list[nn.Module] = []
        for inputs in (channels, width):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(), norm_layer(norm, width), pooling()]
        last = nn.Conv2d(width, width, 3, padding=1)
        self.context = nn.Sequential(*layers, last, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.sizes = [(width, inputs, 3, 3) for inputs in (channels, width)]
        self.generators = nn.ModuleList(
            generator(width // 2, inputs * 9, width) for inputs in (channels, width)
        )
        convolutions = [nn.Conv2d(*pair, 3, padding=1) for pair in pairwise((channels, width, width))]
        # In a tuple, so that its weights, which are never used, do not belong to the method.
        self.target = (nn.Sequential(convolutions[0], nn.ReLU(), pooling(), convolutions[1], nn.Flatten()),)
        self.intertask = intertask
        self.couples_tasks = any(map(self.is_intertask, (backbone, self.context)))

    def by_task(self, module: nn.Module, x: Tensor) -> Tensor:
        if not (self.training and self.is_intertask(module)):
            return super().by_task(module, x)
        return super().by_task(module, x.flatten(0, 1).unsqueeze(0)).squeeze(0).unflatten(0, x.shape[:2])

    def is_intertask(self, module: nn.Module) -> bool:
        """Whether all tasks are one batch of a module in training; TaskNorm is by the support of a task."""
        return self.intertask and normalises_batches(module) and not task_norms(module)

    def fit(self, features: Tensor, targets: Tensor, ways: int) -> dict[str, Any]:
        """The generated weights [T, *shape] by name, and what `MatchingNet` needs of the support."""
        weights = self.generated(features, targets, ways)
        return {"weights": weights} | super().fit(self.transformed(weights, features), targets, ways)

    def score(self, adapted: dict[str, Any], features: Tensor) -> Tensor:
        return super().score(adapted, self.transformed(adapted["weights"], features))

    def generated(self, features: Tensor, targets: Tensor, ways: int) -> Params:
        """The weights of the target network, of the features [T, S, F] of the support."""
        encoded = precise(self.by_task(self.context, self.maps(features)))
        balance = class_weights(targets, ways).to(encoded.dtype).unsqueeze(-1)
        mean, log_variance = (encoded * balance).mean(1).chunk(2, -1)
        weights: Params = {}
        for place, shape, layer in zip(("0", "3"), self.sizes, self.generators, strict=True):
            context = mean + (log_variance / 2).exp() * self.noise(mean) if self.training else mean
            numbers = layer(context)  # [T, (M + 1) * width]
            filters, weights[f"{place}.bias"] = numbers[:, : -shape[0]], numbers[:, -shape[0] :]
            filters = F.normalize(filters.unflatten(1, (shape[0], -1)), dim=-1)
            weights[f"{place}.weight"] = filters.unflatten(2, shape[1:])
        return weights

    def transformed(self, weights: Params, features: Tensor) -> Tensor:
        """Features [T, B, F] through the target network with each task's weights, [T, B, F']."""
        return run_on_tasks(self.target[0], weights, self.maps(features), self.batching)

    def maps(self, features: Tensor) -> Tensor:
        return features.unflatten(-1, self.map_shape)

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal numbers of the shape of `like` [T, width / 2]."""
        return noise_like(like)


def pooling() -> nn.MaxPool2d:
    """Maps of half the size, rounded up."""
    return nn.MaxPool2d(2, ceil_mode=True)


def generator(inputs: int, filter_size: int, filters: int) -> nn.Linear:
    """The map from a context to the weights and the biases of a convolution."""
    layer = nn.Linear(inputs, (filter_size + 1) * filters)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
