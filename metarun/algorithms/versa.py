"""VERSA: amortised inference of task classifiers (Gordon, Bronskill, Bauer, Nowozin and Turner 2019)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from metarun.algorithms.feature_method import FeatureMethod, prototypes, require
from metarun.tasks.numbers import noise_like


class Versa(FeatureMethod):
    """Networks map the mean feature of a class to a distribution over its classifier weights and bias.

    Means and variances depend on the examples of that class only (section 3, "context independence"), so that
    any number of ways is supported. The loss is the negative logarithm of the probability averaged over
    samples of the weights (equation 5); logits are sampled instead of weights, which is the same in
    distribution. Predictions average over as many samples. Evaluation always uses the same samples, which
    are assigned to the classes of a task by the size of their bias, so that they do not depend on the order
    of the classes.

    Args:
        backbone: passed by the builder; see `Algorithm`.
        samples: the number of samples, at least 1.
    """

    def __init__(self, backbone: nn.Module, samples: int = 10) -> None:
        super().__init__(backbone)
        require(samples >= 1, f"algorithm.samples={samples}: must be at least 1")
        self.samples = samples
        size = self.features
        self.weight_mean, self.weight_variance = (dense(size, size) for _ in range(2))
        self.bias_mean, self.bias_variance = (dense(size, 1) for _ in range(2))

    def fit(self, features: Tensor, targets: Tensor, ways: int) -> dict[str, Any]:
        """Means and variances of the weights [T, N, F] and biases [T, N]."""
        means = prototypes(features, targets, ways)
        return {
            "weight": self.weight_mean(means),
            "weight variance": self.weight_variance(means).exp(),
            "bias": self.bias_mean(means).squeeze(-1),
            "bias variance": self.bias_variance(means).squeeze(-1).exp(),
        }

    def score(self, adapted: dict[str, Any], features: Tensor) -> Tensor:
        """The logarithm of the averaged probabilities, [T, B, N]."""
        mean = features @ adapted["weight"].mT + adapted["bias"].unsqueeze(1)
        variance = features.square() @ adapted["weight variance"].mT + adapted["bias variance"].unsqueeze(1)
        logits = mean + variance.sqrt() * self.noise(mean, adapted["bias"])  # [L, T, B, N]
        return logits.log_softmax(-1).logsumexp(0) - math.log(self.samples)

    def noise(self, like: Tensor, bias: Tensor) -> Tensor:
        """Standard normal samples for logits like [T, B, N]: [L, T, B, N], in evaluation [L, T, 1, N].

        Those of evaluation are fixed; `bias` [T, N] decides which class gets which.
        """
        if self.training:
            return noise_like(like.unsqueeze(1).expand(-1, self.samples, -1, -1)).transpose(0, 1)
        generator = torch.Generator().manual_seed(0)
        same = torch.randn(self.samples, like.shape[-1], generator=generator, dtype=like.dtype)
        ranks = bias.argsort(-1).argsort(-1)
        return same.to(like.device)[:, ranks].unsqueeze(2)


def dense(inputs: int, outputs: int) -> nn.Sequential:
    """A network with two hidden layers of the size of its input (appendix D.2)."""
    return nn.Sequential(
        nn.Linear(inputs, inputs), nn.ELU(), nn.Linear(inputs, inputs), nn.ELU(), nn.Linear(inputs, outputs)
    )
