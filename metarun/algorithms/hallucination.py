"""Learned hallucination (Wang, Girshick, Hebert and Hariharan 2018) with prototypical networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metarun.algorithms.feature_method import require
from metarun.algorithms.protonet import ProtoNet
from metarun.tasks.numbers import noise_like


class Hallucination(ProtoNet):
    """Prototypical networks on the support and on examples that a network makes of it.

    "Low-Shot Learning from Imaginary Data", CVPR 2018, section 4. The hallucinator G(x, z) is a network of
    three layers with ReLUs, which maps the feature x of an example and noise z to another feature of its
    class, and starts as the identity of x. The support and what is made of it become
    prototypes, and the loss of the queries trains G and the backbone together. Features are meant to be
    non-negative, as after a ReLU; negative ones are cut off in what is generated.

    Departures: in the paper, the features are those of a network that is trained before and then fixed, and
    another network behind G embeds them; here G is applied to the last features, and the backbone is trained
    with it (or is fixed, with a frozen backbone). Every support example is a seed equally often; the paper
    draws the seeds at random. The weights of the noise start from small normal numbers, not from zero.
    Evaluation always uses the same noise.

    Args:
        backbone: passed by the builder; see `Algorithm`.
        generated: the number of examples made of each support example; 0: prototypical networks.
        noise: the size of z, at least 1.
        spread: the standard deviation of the first weights of the noise.
    """

    def __init__(self, backbone: nn.Module, generated: int = 5, noise: int = 16, spread: float = 0.1) -> None:
        super().__init__(backbone)
        require(generated >= 0, f"algorithm.generated={generated}: must be at least 0")
        require(noise >= 1, f"algorithm.noise={noise}: must be at least 1")
        require(spread >= 0, f"algorithm.spread={spread}: must be at least 0")
        self.generated, self.noise_size = generated, noise
        size = self.features
        first, second, third = (nn.Linear(n, size) for n in (size + noise, size, size))
        for layer in (first, second, third):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(first.weight[:, size:], std=spread)
        self.hallucinator = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, nn.ReLU())

    def fit(self, features: Tensor, targets: Tensor, ways: int) -> Tensor:
        """The prototypes [T, N, F] of the support and of what is made of it."""
        made = self.hallucinated(features).flatten(1, 2)
        x = torch.cat([features, made], 1)
        y = torch.cat([targets, targets.repeat_interleave(self.generated, 1)], 1)
        return super().fit(x, y, ways)

    def hallucinated(self, features: Tensor) -> Tensor:
        """What is made of support features [T, S, F], [T, S, M, F]."""
        size = *features.shape[:2], self.generated, -1
        inputs = torch.cat([features.unsqueeze(2).expand(size), self.noise(features).expand(size)], -1)
        return self.hallucinator(inputs)

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal numbers for features like [T, S, F]: [T, S, M, Z]; the same in evaluation."""
        size = self.generated, self.noise_size
        if self.training:
            return noise_like(like.new_empty(()).expand(*like.shape[:2], *size))
        generator = torch.Generator().manual_seed(0)
        return torch.randn(size, generator=generator, dtype=torch.float64).to(like)
