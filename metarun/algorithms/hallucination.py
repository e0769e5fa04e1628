"""Learned hallucination (Wang, Girshick, Hebert and Hariharan 2018) with prototypical networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metarun.algorithms.feature_method import require
from metarun.algorithms.protonet import ProtoNet
from metarun.nn.frozen import Frozen
from metarun.tasks.numbers import noise_like


class Hallucination(ProtoNet):
    """Prototypical networks on the support and on examples that a network makes of it.

    "Low-Shot Learning from Imaginary Data", CVPR 2018, section 4. The hallucinator G(x, z) is a network of
    three layers with ReLUs, which maps the feature x of an example and noise z to another feature of its
    class, and starts as the identity of x. The support and what is made of it become
    prototypes, and the loss of the queries trains G and the backbone together. Features are meant to be
    non-negative, as after a ReLU; negative ones are cut off in what is generated.

    In the paper (section 5.2), features are those of a network that was trained before and is fixed, and two
    layers with a ReLU in between embed them and what is made of them: `frozen=True`, with `embedding` units.
    Without these two, G is applied to the last features, and the backbone is trained with it.

    Departures: every support example is a seed equally often; the paper draws the seeds at random. The
    weights of the noise start from small normal numbers, not from zero. Evaluation always uses the same
    noise.

    Args:
        backbone: passed by the builder; see `Algorithm`.
        generated: the number of examples made of each support example; 0: prototypical networks.
        noise: the size of z, at least 1.
        spread: the standard deviation of the first weights of the noise.
        embedding: units of each of the two layers behind G; 0: no such layers.
        frozen: whether the backbone is not trained.
    """

    def __init__(
        self,
        backbone: nn.Module,
        generated: int = 5,
        noise: int = 16,
        spread: float = 0.1,
        embedding: int = 0,
        frozen: bool = False,
    ) -> None:
        size: int = backbone.features  # type: ignore[assignment]
        if frozen:
            backbone = nn.Sequential(Frozen(backbone))
            backbone.features = size  # type: ignore[assignment]
        super().__init__(backbone)
        require(generated >= 0, f"algorithm.generated={generated}: must be at least 0")
        require(noise >= 1, f"algorithm.noise={noise}: must be at least 1")
        require(spread >= 0, f"algorithm.spread={spread}: must be at least 0")
        require(embedding >= 0, f"algorithm.embedding={embedding}: must be at least 0")
        self.generated, self.noise_size, self.frozen = generated, noise, frozen
        first, second, third = (nn.Linear(n, size) for n in (size + noise, size, size))
        for layer in (first, second, third):
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(first.weight[:, size:], std=spread)
        self.hallucinator = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third, nn.ReLU())
        layers = [nn.Linear(size, embedding), nn.ReLU(), nn.Linear(embedding, embedding)] if embedding else []
        self.embedding = nn.Sequential(*layers)

    def fit(self, features: Tensor, targets: Tensor, ways: int) -> Tensor:
        """The prototypes [T, N, F] of the support and of what is made of it."""
        made = self.hallucinated(features).flatten(1, 2)
        x = torch.cat([features, made], 1)
        y = torch.cat([targets, targets.repeat_interleave(self.generated, 1)], 1)
        return super().fit(self.embedding(x), y, ways)

    def score(self, adapted: Tensor, features: Tensor) -> Tensor:
        return super().score(adapted, self.embedding(features))

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
