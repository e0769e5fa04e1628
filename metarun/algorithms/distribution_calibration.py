"""Distribution calibration (Yang, Liu and Xu 2021): features drawn from transferred class statistics."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metarun.algorithms.baseline import Classifier
from metarun.algorithms.feature_method import one_hot, precise, require, without_autocast
from metarun.algorithms.multinomial import multinomial_regression
from metarun.nn.layers import relates_examples
from metarun.nn.per_task import Params
from metarun.tasks.class_store import ClassStore
from metarun.tasks.objectives import class_weights
from metarun.tasks.source import EpisodeSource

IMAGES_AT_ONCE = 128  # embedded for the statistics of the training classes


class DistributionCalibration(Classifier):
    """A logistic regression on support features and on features drawn from calibrated distributions.

    "Free Lunch for Few-Shot Learning: Distribution Calibration", ICLR 2021. Each support feature x, after
    Tukey's ladder of powers (equation 3), chooses the `nearest` training classes by the Euclidean distance of
    their means (equation 5). Its distribution is a normal one, whose mean is that of these means and of x
    together, and whose covariance is the mean of these classes' covariances plus `spread` in every entry
    (equation 6). The classifier is trained on the support and on features drawn from these distributions
    (equation 8). Means and covariances of the training classes (equations 1 and 2) are those of features
    without Tukey's transform, as in the authors' code; `base_power` transforms them, too.

    Training is that of `Classifier`. The statistics are measured before each validation, by one pass over
    the training split, and are part of the checkpoint. To use a network that is trained already: `init=RUN
    iterations=0`.

    Departures: the paper's networks are trained with a second, self-supervised loss. The drawn features are
    combinations of the centred features of the training classes with normal coefficients, which have
    exactly these covariances without a factorisation of each. The same coefficients are used for every
    support feature and task, so that a result depends neither on the order of the classes nor on other tasks.
    Negative features keep their sign in Tukey's transform (but for the power 0). Every class counts equally,
    whatever its number of shots.

    Args:
        backbone, classes: passed by the builder; see `Algorithm`.
        power: Tukey's lambda; 1: features as they are, 0: their logarithm.
        nearest: the number of training classes of each distribution, k.
        spread: alpha, at least 0.
        base_power: Tukey's lambda for the features of the training classes; 1 in the authors' code.
        generated: the number of features drawn for each class; 0: the classifier is trained on the support.
        penalty: the weight of half the squared weights beside the sum of the losses (1/C).
        steps: of the solver of the regression, L-BFGS.
    """

    means: Tensor
    factors: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        classes: int | None = None,
        power: float = 0.5,
        nearest: int = 2,
        spread: float = 0.21,
        generated: int = 750,
        base_power: float = 1.0,
        penalty: float = 1.0,
        steps: int = 60,
    ) -> None:
        super().__init__(backbone, classes)
        count = classes or 1
        require(power >= 0, f"algorithm.power={power}: must be at least 0")
        require(base_power >= 0, f"algorithm.base_power={base_power}: must be at least 0")
        require(nearest >= 1, f"algorithm.nearest={nearest}: must be at least 1")
        require(spread >= 0, f"algorithm.spread={spread}: must be at least 0")
        require(generated >= 0, f"algorithm.generated={generated}: must be at least 0")
        require(steps >= 1, f"algorithm.steps={steps}: must be at least 1")
        require(penalty > 0, f"algorithm.penalty={penalty}: must be above 0")
        self.power, self.nearest, self.spread, self.base_power = power, nearest, spread, base_power
        self.generated, self.penalty, self.steps = generated, penalty, steps
        self.register_buffer("means", torch.zeros(count, self.features))
        # [classes, R, F]: the covariance of class c is factors[c].T @ factors[c].
        self.register_buffer("factors", torch.zeros(count, 0, self.features))

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
        saved = state.get(f"{prefix}factors")
        if isinstance(saved, Tensor) and saved.dim() == 3:  # R depends on the images of a class
            self.factors = self.factors.new_zeros(len(self.factors), saved.shape[1], self.features)
        super()._load_from_state_dict(state, prefix, *args)  # type: ignore[arg-type]

    def check_classes(self) -> None:
        count = len(self.means)
        must = f"must be from 1 to {count}, the number of training classes"
        require(self.nearest <= count, f"algorithm.nearest={self.nearest}: {must}")

    @torch.no_grad()
    def on_validation(self, train: EpisodeSource) -> None:
        assert isinstance(train, ClassStore)
        require(
            not relates_examples(self.backbone),
            "norm: a feature depends on the other examples of its batch, so that a class has no statistics; "
            "choose norm=running, layer, group, instance or none",
        )
        was_training = self.training
        self.eval()
        measured = [
            statistics(tukey(features, self.base_power)) for features in self.features_by_class(train)
        ]
        self.train(was_training)
        longest = max(len(factor) for _, factor in measured)
        self.means = torch.stack([mean for mean, _ in measured]).to(self.means)
        factors = self.means.new_zeros(len(measured), longest, self.features)
        for padded, (_, factor) in zip(factors, measured, strict=True):
            padded[: len(factor)] = factor
        self.factors = factors

    def features_by_class(self, train: ClassStore) -> Iterator[Tensor]:
        """The features [items, F] of all examples of one training class after the other."""
        weight = self.classifier.weight
        for number, count in enumerate(train.counts.tolist()):
            own, places = (torch.tensor(each, device=train.items.device) for each in ([number], range(count)))
            blocks = []
            for rows in train.items_at(own, places)[0].split(IMAGES_AT_ONCE):
                x = train.decode(train.items[rows].to(weight.device))
                x = x.to(weight.dtype) if x.is_floating_point() else x
                blocks.append(precise(self.embed(x.unsqueeze(0))[0]))
            yield torch.cat(blocks)

    def fit(self, features: Tensor, targets: Tensor, ways: int) -> Params:
        """Weights [T, N, F] and biases [T, N] of the logistic regression."""
        support = self.transformed(features).detach()
        balance = class_weights(targets, ways).to(support.dtype)
        with torch.no_grad(), without_autocast(support):
            count = -(-self.generated * ways // support.shape[1])  # rounded up: 0 for generated=0 alone
            drawn = self.drawn(support, count)  # [T, S, M, F]
            each = drawn.shape[2]
            x = torch.cat([support, drawn.flatten(1, 2)], 1)
            y, balance = (torch.cat([row, row.repeat_interleave(each, 1)], 1) for row in (targets, balance))
            w = multinomial_regression(x, one_hot(y, ways, x), balance, self.penalty, self.steps)
        return {"weight": w[:, :-1].mT.contiguous(), "bias": w[:, -1]}

    def score(self, adapted: Params, features: Tensor) -> Tensor:
        return self.logits(self.transformed(features), adapted["weight"], adapted["bias"].unsqueeze(1))

    def transformed(self, features: Tensor) -> Tensor:
        """Features after Tukey's transform, equation 3."""
        return tukey(precise(features), self.power)

    def drawn(self, support: Tensor, count: int) -> Tensor:
        """`count` features of the distribution of each support feature [T, S, F], [T, S, M, F]."""
        means, factors = self.means.to(support), self.factors.to(support)
        _, near = torch.cdist(support, means).topk(self.nearest, largest=False)  # [T, S, k]
        mean = (means[near].sum(2) + support) / (self.nearest + 1)
        noise = self.coefficients(count, like=support)
        along = torch.einsum("mkr,tskrf->tsmf", noise[:, :, 1:], factors[near]) / math.sqrt(self.nearest)
        everywhere = noise[:, :1, 0] * math.sqrt(
            self.spread
        )  # [M, 1]: the covariance of all pairs of features
        return mean.unsqueeze(2) + along + everywhere

    def coefficients(self, count: int, like: Tensor) -> Tensor:
        """Standard normal numbers [M, k, 1 + R], always the same."""
        size = count, self.nearest, 1 + self.factors.shape[1]
        generator = torch.Generator().manual_seed(0)
        return torch.randn(size, generator=generator, dtype=torch.float64).to(like)


def tukey(features: Tensor, power: float) -> Tensor:
    """Features to a power, or their logarithm for the power 0; equation 3."""
    if power == 1:
        return features
    size = features.abs().clamp_min(TINY)
    return features.sign() * size**power if power else size.log()


def statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """The mean [F] of features [items, F], and R [min(items, F), F] with R' R their covariance."""
    mean = features.mean(0)
    centred = (features - mean) / math.sqrt(max(len(features) - 1, 1))
    return mean, torch.linalg.qr(centred, mode="r").R


TINY = 1e-12  # the least feature whose power is taken, for finite derivatives
