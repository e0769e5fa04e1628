"""MetaOptNet: convex classifiers as base learners (Lee, Maji, Ravichandran and Soatto 2019)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.feature_method import FeatureMethod, one_hot, precise, require, without_autocast
from metarun.algorithms.r2d2 import ridge_regression
from metarun.algorithms.svm import crammer_singer_dual
from metarun.tasks.objectives import class_weights


class MetaOptNet(FeatureMethod):
    """The classifier of a task is a linear support vector machine on its support features.

    The derivative is that of the solution, by the implicit function theorem (section 3.2). If classes have
    different numbers of shots, C and the squared errors are weighted such that every class counts equally.

    Args:
        backbone: passed by the builder; see `Algorithm`.
        head: "svm": the multi-class machine of Crammer and Singer in its dual form (equations 6 to 10);
            "ridge": ridge regression (MetaOptNet-RR in the paper).
        penalty: C, the weight of violated margins in the SVM, above 0.
        ridge: the penalty of ridge regression, above 0.
        scale: the initial value of the learned factor of the predictions (equation 12).
        label_smoothing: the share of the target probability that is distributed over all classes, including
            the true class (in the paper's code: over the other classes), at least 0 and below 1.
    """

    unread: ClassVar = {"ridge": "head=svm", "penalty": "head=ridge"}

    def __init__(
        self,
        backbone: nn.Module,
        head: Literal["svm", "ridge"] = "svm",
        penalty: float = 0.1,
        ridge: float = 50.0,
        scale: float = 1.0,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(backbone)
        for name, value in (("penalty", penalty), ("ridge", ridge), ("scale", scale)):
            require(value > 0, f"algorithm.{name}={value}: must be above 0")
        smooth = f"algorithm.label_smoothing={label_smoothing}: must be at least 0 and below 1"
        require(0 <= label_smoothing < 1, smooth)
        self.head, self.penalty, self.ridge, self.label_smoothing = head, penalty, ridge, label_smoothing
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def fit(self, features: Tensor, targets: Tensor, ways: int) -> dict[str, Any]:
        """{"weights": weights of the classifiers, [T, F, N]}."""
        features = precise(features)
        wanted, balance = one_hot(targets, ways, features), class_weights(targets, ways)
        with without_autocast(features):
            if self.head == "ridge":
                ridge = torch.full((), self.ridge, dtype=features.dtype, device=features.device)
                return {"weights": ridge_regression(features, wanted, ridge, balance.to(features.dtype))}
            wide = features.double()  # in float32, rounding could make the Gram matrix indefinite
            dual = crammer_singer_dual(wide @ wide.mT, wanted, self.penalty, balance).to(features)
            return {"weights": features.mT @ dual}

    def score(self, adapted: dict[str, Any], features: Tensor) -> Tensor:
        with without_autocast(features):
            return self.scale * (precise(features) @ adapted["weights"])

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy with smoothed labels, [T]."""
        losses = F.cross_entropy(
            outputs.flatten(0, 1), targets.flatten(), reduction="none", label_smoothing=self.label_smoothing
        )
        return losses.view(targets.shape).mean(1)
