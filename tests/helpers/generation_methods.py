"""Methods that generate examples, built for the rows of METHODS with the same numbers for all tasks."""

from __future__ import annotations

import torch
from torch import nn

from helpers import generation_references as references
from helpers.embedded_references import gradient_of
from metarun.algorithms.distribution_calibration import DistributionCalibration
from metarun.algorithms.hallucination import Hallucination
from metarun.algorithms.metagan import MetaGANMAML, MetaGANRelation
from metarun.inner_loops.sgd import SGD


def hallucination(backbone: nn.Module, steps: int) -> Hallucination:
    """With weights that are no longer the identity."""
    algorithm = Hallucination(backbone, generated=2, noise=3, embedding=4)
    with torch.no_grad():
        for p in algorithm.hallucinator.parameters():
            p += 0.1 * torch.randn_like(p)
        for p in algorithm.embedding.parameters():
            p += torch.randn_like(p)
    fixed = torch.randn(2, 3)
    algorithm.noise = lambda like: fixed
    return algorithm


hallucination_reference = gradient_of(references.hallucination)


def distribution_calibration(backbone: nn.Module, steps: int) -> DistributionCalibration:
    """With statistics of training classes, as a validation would have measured them."""
    algorithm = DistributionCalibration(backbone, classes=11, generated=8, steps=3)
    algorithm.means, algorithm.factors = (torch.rand(11, *size, algorithm.features) for size in ((), (3,)))
    return algorithm


def metagan(backbone: nn.Module, steps: int) -> MetaGANRelation:
    return with_noise(
        MetaGANRelation(backbone, SHAPE, 4, 5, "batch", shots=2, generated=3, noise=2, generator_width=3)
    )


def metagan_maml(backbone: nn.Module, steps: int) -> MetaGANMAML:
    return with_noise(
        MetaGANMAML(
            backbone, SGD(0.1, steps), 3, SHAPE, generated=3, inner_weight=0.7, noise=2, generator_width=3
        )
    )


def with_noise(algorithm):
    """The same three vectors of noise for every task and every pass."""
    fixed = torch.randn(1, 3, 2)
    algorithm.noise = lambda like: fixed
    return algorithm


SHAPE = (1, 16, 16)
