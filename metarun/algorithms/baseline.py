"""Pretraining on all training classes, then a classifier on features that stay: Baseline and its kin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.feature_method import (
    FeatureMethod,
    cosines,
    precise,
    prototypes,
    require,
    squared_distances,
)
from metarun.inner_loops.base import InnerLoop, refuse_learned
from metarun.nn.per_task import Params
from metarun.tasks.episodes import Episodes, Outcome
from metarun.tasks.objectives import cross_entropy


class Classifier(FeatureMethod):
    """One classifier over all training classes is trained on the examples of the tasks, as on any batch.

    Its loss is over all classes, the logits it reports are those of an episode's own ways. What a method
    makes of a new task's features is up to it, and costs nothing in training.
    """

    def __init__(
        self,
        backbone: nn.Module,
        classes: int | None = None,
        cosine: bool = False,
        scale: float = 10.0,
    ) -> None:
        super().__init__(backbone)
        self.cosine, self.scale = cosine, scale
        self.classifier = nn.Linear(self.features, classes or 1, bias=not cosine)

    def meta_loss(self, tasks: Episodes) -> Outcome:
        assert tasks.classes is not None
        whole = tasks.joined()
        features = self.embed(whole.support_x)
        self.on_training_features(features.detach())
        bias = self.classifier.bias
        logits = self.logits(features, self.classifier.weight, 0.0 if bias is None else bias)
        loss = self.loss_of(tasks)(logits, tasks.classes.gather(1, whole.support_y))
        queries = tasks.query_x.shape[1]
        own = tasks.classes.unsqueeze(1).expand(-1, queries, -1)
        return tasks.outcome(logits[:, -queries:].gather(2, own), loss)

    def logits(self, features: Tensor, weight: Tensor, bias: Tensor | float) -> Tensor:
        """[T, B, N] of features [T, B, F] by weight [N, F] or [T, N, F]: linear, or scaled cosines."""
        if self.cosine:
            return self.scale * cosines(features, weight)
        return features @ weight.mT + bias

    def on_training_features(self, features: Tensor) -> None:
        """Hook called with the features [T, B, F] of every training step."""


class Baseline(Classifier):
    """Baseline and, with `cosine`, Baseline++ (Chen, Liu, Kira, Wang and Huang 2019, section 3.2).

    A new task trains a new classifier on its support features by the inner loop, in evaluation
    alone: linear and from zero, or of cosines times `scale` and from random directions, always the
    same ones. Any number of ways can be met.

    Departures: the paper's code takes 100 epochs of batches of four examples by SGD with momentum,
    dampening and weight decay at rate 0.01, here 100 steps of plain gradient descent see the whole
    support; the cosine classifier has no learned norm of each class (nor has the paper, but its code).
    """

    takes_steps = True

    def __init__(
        self,
        backbone: nn.Module,
        inner_loop: InnerLoop,
        classes: int | None = None,
        cosine: bool = False,
        scale: float = 10.0,
    ) -> None:
        refuse_learned(inner_loop, "pretraining takes no inner steps")
        super().__init__(backbone, classes, cosine, scale)
        self.inner_loop = inner_loop
        inner_loop.attach({name: p[0] for name, p in self.new_head(1, 1, torch.zeros(())).items()})

    def fit(self, features: Tensor, targets: Tensor, ways: int) -> Params:
        loss, start = self.inner_problem(features, targets, ways)
        return self.inner_loop(loss, start)

    def score(self, adapted: Params, features: Tensor) -> Tensor:
        return self.logits(features, adapted["weight"], self.bias_of(adapted))

    def trajectory(self, tasks: Episodes) -> Iterator[Params]:
        loss, start = self.inner_problem(self.embed(tasks.support_x), tasks.support_y, tasks.ways)
        yield start
        yield from self.inner_loop.trajectory(loss, start)

    def inner_problem(self, features: Tensor, targets: Tensor, ways: int):
        """The loss of a head on features that are constants, and the head to begin with."""
        features = precise(features.detach())

        def loss(head: Params, step: int) -> Tensor:
            return cross_entropy(self.score(head, features), targets)

        return loss, self.new_head(len(features), ways, features)

    def new_head(self, tasks: int, ways: int, like: Tensor) -> Params:
        """The same for every task: weights [T, N, F] and, where linear, biases [T, N]."""
        if not self.cosine:
            size = tasks, ways, self.features
            return {"weight": like.new_zeros(size), "bias": like.new_zeros(size[:2])}
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(ways, self.features, generator=generator, dtype=torch.float64)
        return {"weight": F.normalize(weight, dim=1).to(like).expand(tasks, -1, -1)}

    def bias_of(self, head: Params) -> Tensor | float:
        return 0.0 if self.cosine else head["bias"].unsqueeze(1)


class SimpleShot(Classifier):
    """The nearest class mean of normalised features (Wang, Chao, Weinberger and van der Maaten 2019).

    `transform="UN"`: features as they are, `"L2N"`: of length 1, `"CL2N"`: of length 1 after the mean
    feature of the training classes is taken off (section 3). That mean is one over everything seen
    in training, later images weighing more (`momentum` of a task), where the paper goes once more
    through the training images at the end.
    """

    average: Tensor
    batches: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        classes: int | None = None,
        transform: Literal["UN", "L2N", "CL2N"] = "CL2N",
        momentum: float = 0.01,
    ) -> None:
        super().__init__(backbone, classes)
        require(0 < momentum <= 1, f"algorithm.momentum={momentum}: must be above 0 and at most 1")
        self.transform, self.momentum = transform, momentum
        self.register_buffer("average", torch.zeros(self.features))
        self.register_buffer("batches", torch.zeros(()))

    def on_training_features(self, features: Tensor) -> None:
        tasks = features.mean(1).to(self.average)  # counted in turn, however many run at once
        counts = torch.arange(1, len(tasks) + 1, device=tasks.device) + self.batches
        share = (1 / counts).clamp_min(self.momentum)
        left = torch.cat([1 - share, share.new_ones(1)]).flip(0).cumprod(0).flip(0)  # by all from here on
        self.average.mul_(left[0]).add_(((share * left[1:]).unsqueeze(1) * tasks).sum(0))
        self.batches += len(tasks)

    def fit(self, features: Tensor, targets: Tensor, ways: int) -> Tensor:
        """The class means of transformed features, [T, N, F]."""
        return prototypes(self.transformed(features), targets, ways)

    def score(self, adapted: Tensor, features: Tensor) -> Tensor:
        return -squared_distances(self.transformed(features), adapted)

    def transformed(self, features: Tensor) -> Tensor:
        features = precise(features)
        if self.transform == "CL2N":
            features = features - self.average
        return features if self.transform == "UN" else F.normalize(features, dim=-1)
