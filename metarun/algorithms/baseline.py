"""Pretraining on all training classes, then a classifier on frozen features: Baseline and similar methods."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

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
from metarun.errors import check_above_0
from metarun.inner_loops.base import InnerLoop, refuse_trained
from metarun.nn.per_task import Params
from metarun.tasks.episodes import Episodes, Outcome
from metarun.tasks.objectives import class_weights, cross_entropy


class Classifier(FeatureMethod):
    """Base class of methods that pretrain one classifier over all training classes.

    In training, the examples of all tasks are an ordinary batch. The loss is over all training classes; the
    reported scores are restricted to the ways of each task. A subclass defines, by `fit` and `score`, how a
    new task is solved; neither is used in training.

    Args:
        backbone, classes: passed by the builder; see `Algorithm`.
        cosine: whether logits are scaled cosines instead of linear.
        scale: multiplies the cosines.
    """

    classifies_training_classes = True

    def __init__(
        self,
        backbone: nn.Module,
        classes: int | None = None,
        cosine: bool = False,
        scale: float = 10.0,
    ) -> None:
        super().__init__(backbone)
        check_above_0("algorithm", scale=scale)
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
        """Logits [T, B, N] of features [T, B, F] for weight [N, F] or [T, N, F]: linear or scaled cosines."""
        if self.cosine:
            return self.scale * cosines(features, weight)
        return features @ weight.mT + bias

    def on_training_features(self, features: Tensor) -> None:
        """Hook called with the features [T, B, F] of every training step."""


class Baseline(Classifier):
    """Baseline and, with `cosine`, Baseline++ (Chen, Liu, Kira, Wang and Huang 2019, section 3.2).

    In evaluation, the inner loop trains a new classifier on the support features of each task. A linear
    classifier starts at zero; a cosine classifier starts from one random direction, which is the same for
    every class and task, so that the result does not depend on the order of the classes. Any number of ways
    is supported.

    Departures: the paper's code trains for 100 epochs in batches of four examples by SGD with momentum,
    dampening and weight decay at rate 0.01; here 100 steps of plain gradient descent use the whole
    support. The cosine classifier has no learned norm for each class (neither has the paper, but its code
    does).

    Args:
        backbone, inner_loop, classes: passed by the builder; see `Algorithm`.
        cosine, scale: see `Classifier`.
    """

    takes_steps = True
    # Steps are only taken in evaluation, without a gradient through them.
    unread: ClassVar = {
        "scale": "cosine=false",
        "inner_loop.order": "",
        "inner_loop.steps": "test_steps!=null",
    }

    def __init__(
        self,
        backbone: nn.Module,
        inner_loop: InnerLoop,
        classes: int | None = None,
        cosine: bool = False,
        scale: float = 10.0,
    ) -> None:
        refuse_trained(inner_loop, "pretraining takes no inner steps")
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
        """The loss of a classifier on constant features, and its initial weights."""
        features = precise(features.detach())
        balance = class_weights(targets, ways).to(features.dtype)  # every class counts equally

        def loss(head: Params, step: int) -> Tensor:
            return cross_entropy(self.score(head, features), targets, balance)

        return loss, self.new_head(len(features), ways, features)

    def new_head(self, tasks: int, ways: int, like: Tensor) -> Params:
        """Initial weights [T, N, F] and, if linear, biases [T, N]; the same for every task."""
        if not self.cosine:
            size = tasks, ways, self.features
            return {"weight": like.new_zeros(size), "bias": like.new_zeros(size[:2])}
        generator = torch.Generator().manual_seed(0)
        direction = torch.randn(self.features, generator=generator, dtype=torch.float64)
        return {"weight": F.normalize(direction, dim=0).to(like).expand(tasks, ways, -1)}

    def bias_of(self, head: Params) -> Tensor | float:
        return 0.0 if self.cosine else head["bias"].unsqueeze(1)


class SimpleShot(Classifier):
    """Nearest class mean of normalised features (Wang, Chao, Weinberger and van der Maaten 2019, SimpleShot).

    Departure: the mean feature of the training classes is a running average over training, in which later
    images have more weight; the paper computes it after training, in another pass over the training images.

    Args:
        backbone, classes: passed by the builder; see `Algorithm`.
        transform: of the features (section 3). "UN": none; "L2N": scaled to length 1; "CL2N": the mean
            feature of the training classes is subtracted first, then they are scaled to length 1.
        momentum: the weight of a task in the running average, above 0 and at most 1.
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
        tasks = features.mean(1).to(self.average)  # the update is the same for any number of tasks at once
        counts = torch.arange(1, len(tasks) + 1, device=tasks.device) + self.batches
        share = (1 / counts).clamp_min(self.momentum)
        # left[i]: the factor by which tasks i, i + 1, ... together scale what was averaged before them.
        left = torch.cat([1 - share, share.new_ones(1)]).flip(0).cumprod(0).flip(0)
        self.average.mul_(left[0]).add_(((share * left[1:]).unsqueeze(1) * tasks).sum(0))
        self.batches += len(tasks)

    def check_untrained(self) -> None:
        require(
            self.transform != "CL2N",
            "algorithm.transform=CL2N: centres by the mean feature of training, and iterations=0 has none; "
            "choose algorithm.transform=L2N, or iterations=100",
        )

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
