"""R2D2 and LR-D2: differentiable closed-form and iterative solvers (Bertinetto et al. 2019)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.feature_method import FeatureMethod, one_hot, precise, require, without_autocast
from metarun.errors import check_above_0
from metarun.tasks.episodes import Episodes
from metarun.tasks.objectives import class_weights
from metarun.tasks.source import EpisodeSource


class R2D2(FeatureMethod):
    """The classifier of a task is the solution of a regression on its support features.

    Both solvers use the Woodbury identity, so that the linear system has S equations for any number of
    features. The penalty and the scale of the predictions (equation 6) are meta-learned; the
    penalty by its logarithm, so that it stays positive. Their common bias is omitted, since a
    softmax is invariant to it; a constant feature gives every class its own bias, as in the paper's code.
    Examples are weighted such that every class counts equally if classes have different numbers of shots.

    In tasks of regression, which the paper does not have, the ridge regression is onto the values themselves,
    and its predictions are not scaled.

    Args:
        backbone: passed by the builder; see `Algorithm`.
        solver: "ridge" (R2D2): ridge regression onto one-hot classes (equation 5). "logistic"
            (LR-D2): one-against-the-rest logistic regressions with the same penalty, solved by
            iteratively reweighted least squares from zero (equation 7); the paper has two ways, for which one
            such regression is enough.
        ridge: the initial penalty, above 0.
        learn_ridge: whether the penalty is learned; the paper's code keeps it at 50.
        reduction: "sum": the penalty is added to the sum of the losses of the support examples. "mean": to
            their mean, as in the paper's code for R2D2 (features and targets divided by the root of NK).
        scale: the initial scale of the predictions.
        steps: the number of steps of iteratively reweighted least squares, at least 1.
    """

    unread: ClassVar = {"steps": "solver=ridge"}
    needs_classes = False
    predicts_distributions = False

    def __init__(
        self,
        backbone: nn.Module,
        solver: Literal["ridge", "logistic"] = "ridge",
        ridge: float = 1.0,
        scale: float = 1.0,
        steps: int = 5,
        learn_ridge: bool = True,
        reduction: Literal["sum", "mean"] = "sum",
    ) -> None:
        super().__init__(backbone)
        require(ridge > 0, f"algorithm.ridge={ridge}: must be above 0")
        require(steps >= 1, f"algorithm.steps={steps}: must be at least 1")
        check_above_0("algorithm", scale=scale)
        self.solver, self.steps, self.reduction = solver, steps, reduction
        self.log_ridge = nn.Parameter(torch.tensor(float(ridge)).log(), requires_grad=learn_ridge)
        self.scale = nn.Parameter(torch.tensor(float(scale)))

    def on_run_start(self, train: EpisodeSource) -> None:
        require(
            self.solver == "ridge" or train.spec.outputs is None,
            "algorithm.solver=logistic: needs tasks with classes, which this dataset does not have; choose "
            "algorithm.solver=ridge",
        )

    def fit_tasks(self, tasks: Episodes, features: Tensor) -> dict[str, Any]:
        if tasks.classes is not None:
            return self.fit(features, tasks.support_y, tasks.outputs)
        features = with_constant(features)
        with without_autocast(features):
            y, there = (each.to(features.dtype) for each in (tasks.support_y, tasks.there))
            return {"values": ridge_regression(features, y, self.penalty(there), there)}

    def penalty(self, balance: Tensor) -> Tensor:
        """The penalty beside the sum of losses weighted by `balance` [T, S]: a scalar, or [T, 1, 1]."""
        ridge = self.log_ridge.exp()
        return ridge * balance.sum(1)[:, None, None] if self.reduction == "mean" else ridge

    def fit(self, features: Tensor, targets: Tensor, ways: int) -> dict[str, Any]:
        """{"weights": weights of the classifiers, [T, F+1, N]}; `fit_tasks`: {"values": of a regression}."""
        features = with_constant(features)
        wanted = one_hot(targets, ways, features)
        balance = class_weights(targets, ways).to(features.dtype)
        ridge = self.penalty(balance)
        with without_autocast(features):
            if self.solver == "ridge":
                return {"weights": ridge_regression(features, wanted, ridge, balance)}
            return {"weights": logistic_regression(features, wanted, ridge, balance, self.steps)}

    def score(self, adapted: dict[str, Any], features: Tensor) -> Tensor:
        with without_autocast(features):
            if "values" in adapted:
                return with_constant(features) @ adapted["values"]
            return self.scale * (with_constant(features) @ adapted["weights"])


def with_constant(features: Tensor) -> Tensor:
    """Features [T, S, F] with a constant feature 1 appended, [T, S, F+1]."""
    return F.pad(precise(features), (0, 1), value=1.0)


def ridge_regression(x: Tensor, y: Tensor, ridge: Tensor, balance: Tensor) -> Tensor:
    """W [T, F, N] that minimises sum_i b_i |x_i W - y_i|^2 + ridge |W|^2.

    X' (X X' + ridge I)^-1 Y, the Woodbury identity, with the rows of X and Y multiplied by the roots of b.

    Args:
        x: [T, S, F].
        y: [T, S, N].
        ridge: a scalar, or [T, 1, 1].
        balance: b, the weights of the examples, [T, S].
    """
    roots = balance.sqrt().unsqueeze(-1)
    x, y = roots * x, roots * y
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return x.mT @ torch.linalg.solve_ex(x @ x.mT + ridge * eye, y).result


def logistic_regression(x: Tensor, y: Tensor, ridge: Tensor, balance: Tensor, steps: int) -> Tensor:
    """N logistic regressions, W [T, F, N].

    Newton's steps on sum_i b_i log(1 + exp(-+ x_i w)) + ridge/2 |w|^2: w = X' (X X' + ridge D^-1)^-1 z with
    D = b mu (1 - mu) and z = X w + (y - mu) / (mu (1 - mu)).

    Args:
        x: [T, S, F].
        y: [T, S, N], in {0, 1}.
        ridge: a scalar, or [T, 1, 1].
        balance: b, the weights of the examples, [T, S].
        steps: the number of steps.
    """
    gram = (x @ x.mT).unsqueeze(1)  # [T, 1, S, S]
    y = y.mT  # [T, N, S]
    margins = torch.zeros_like(y)
    dual = torch.zeros_like(y)
    for _ in range(steps):
        mu = margins.sigmoid()
        spread = (mu * (1 - mu)).clamp_min(1e-6)  # underflows to zero for large margins
        z = margins + (y - mu) / spread
        system = gram + torch.diag_embed(ridge / (balance.unsqueeze(1) * spread))
        dual = torch.linalg.solve_ex(system, z.unsqueeze(-1)).result.squeeze(-1)
        margins = (gram @ dual.unsqueeze(-1)).squeeze(-1)
    return x.mT @ dual.mT
