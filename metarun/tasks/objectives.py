"""What a task asks for: a loss to minimise and the metrics that are reported.

T tasks, B examples of each, N classes. Every function here maps outputs and targets of T tasks to one
number for each task, [T]:

- classification: outputs are logits [T, B, N], targets class numbers [T, B] in [0, N);
- regression: outputs and targets are both [T, B, V], V numbers an example; where distributions are
  predicted, outputs are as in `metarun.tasks.gaussians`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from metarun.errors import ConfigError
from metarun.tasks import gaussians
from metarun.tasks.scores import (
    accuracy,
    balanced_accuracy,
    calibration_error,
    macro_f1,
    mean_absolute_error,
    mean_squared_error,
    r_squared,
    roc_auc,
)

PerTask = Callable[[Tensor, Tensor], Tensor]  # (outputs, targets) -> [T]


@dataclass(frozen=True)
class Metric:
    """A score of each task, and how it is compared and shown.

    Metrics of the same name that are shown in the same way are equal, so that the results of models from
    different runs of a dataset with a metric of its own can be compared.

    Args:
        name: the name in `metrics=[...]`, in tables and in result files.
        score: (outputs, targets) -> scores [T]; of environments, (trajectories after adaptation, before it).
        title: the name in pictures.
        higher_is_better: the direction in which one score is better than another.
        percent: whether a score in [0, 1] is shown as a percentage.
        chance: the score of guessing among N classes, where there is one to draw beside results.
        bounds: the lowest and the highest possible score, where it is not a percentage.
        before: the name of the metric that is the same score before adaptation, where there is one.
        aim: the best score, where that is neither the highest nor the lowest.
    """

    name: str
    score: Callable[..., Tensor] = field(compare=False)
    title: str
    higher_is_better: bool = True
    percent: bool = False
    chance: Callable[[int], float] | None = field(default=None, compare=False)
    bounds: tuple[float, float] = (-math.inf, math.inf)
    before: str = ""
    aim: float | None = None

    @property
    def limits(self) -> tuple[float, float]:
        """The lowest and the highest possible score."""
        return (0.0, 1.0) if self.percent else self.bounds

    @property
    def scale(self) -> int:
        """What a score is multiplied by before it is shown."""
        return 100 if self.percent else 1

    @property
    def label(self) -> str:
        """The title with its unit, for the axis of a picture."""
        return f"{self.title}, %" if self.percent else self.title

    def is_better(self, score: float, than: float) -> bool:
        """Whether one score is better than another; any number is better than NaN."""
        if math.isnan(than):
            return not math.isnan(score)
        if self.aim is not None:
            return abs(score - self.aim) < abs(than - self.aim)
        return score > than if self.higher_is_better else score < than

    def show(self, score: float, digits: int | None = None) -> str:
        """A score for people, such as "91.5 %"."""
        if self.percent:
            return f"{100 * score:.{1 if digits is None else digits}f} %"
        return f"{score:.{3 if digits is None else digits}f}"

    def show_interval(self, mean: float, half: float, signed: bool = False) -> str:
        """A mean and half of its 95 % interval for people, such as "91.46 ± 1.10 %"."""
        sign = "+" if signed else ""
        if self.percent:
            return f"{100 * mean:{sign}.2f} ± {100 * half:.2f} %"
        digits = ".4f" if abs(mean) < 1e4 else ".1e"  # a diverged run must not widen the table
        return f"{mean:{sign}{digits}} ± {half:{digits}}"


@dataclass(frozen=True)
class Objective:
    """The loss of a kind of task, and its metrics.

    Args:
        loss: (outputs, targets) -> the loss of each task [T]: a mean over its examples. Papers that sum
            over classes instead need another step size (docs/protocols.md).
        metrics: the metrics that are computed and reported; the first decides which checkpoint is best.
        available: all metrics that can be chosen.
        progress: metrics that training reports besides, unless metrics are chosen.
        units: outputs and targets of a regression [..., V] to the values that people read, such as degrees;
            None: they are these values.
        numbers: how many numbers a network predicts for each value of a regression.
        spread: outputs to the standard deviations [..., V] of the values that people read; None: outputs are
            values without an uncertainty.
    """

    loss: PerTask
    metrics: tuple[Metric, ...]
    available: tuple[Metric, ...]
    progress: tuple[Metric, ...] = ()
    units: Callable[[Tensor], Tensor] | None = None
    numbers: int = 1
    spread: Callable[[Tensor], Tensor] | None = None

    def in_units(self, units: Callable[[Tensor], Tensor]) -> Objective:
        """The same objective of a regression on standardised values, with metrics of the original values.

        Args:
            units: standardised values [..., V] to original ones; see the attribute.
        """

        def converted(metric: Metric) -> Metric:
            score = metric.score
            return replace(
                metric,
                score=lambda outputs, targets: score(units(outputs), units(targets)).to(targets.dtype),
            )

        metrics, available = (tuple(map(converted, each)) for each in (self.metrics, self.available))
        return replace(self, metrics=metrics, available=available, units=units)

    def to_units(self, values: Tensor) -> Tensor:
        """Outputs or targets of a regression in the units that people read."""
        return self.units(values) if self.units else values

    def choosing(self, names: Sequence[str] | None, training: bool = False) -> Objective:
        """The same objective reporting the metrics of these names.

        Args:
            names: of metrics; None: those that it reports by default.
            training: whether these are then also those that it reports in training alone.

        Raises:
            ConfigError: for a name that is not available, or no or repeated names.
        """
        if names is None:
            return replace(self, metrics=self.metrics + self.progress) if training else self
        known = {metric.name: metric for metric in self.available}
        if unknown := [name for name in names if name not in known]:
            raise ConfigError(f"metrics: these tasks have no {unknown[0]!r}; choose from {', '.join(known)}")
        if not names or len(set(names)) < len(names):
            raise ConfigError(f"metrics={list(names)}: name at least one metric, and each only once")
        if (first := known[names[0]]).aim is not None:
            raise ConfigError(
                f"metrics={list(names)}: the first metric decides which checkpoint is best, which "
                f"{first.name} cannot; put another one first"
            )
        return replace(self, metrics=tuple(known[name] for name in names))


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean cross entropy of each task, [T].

    Weighted if there are weights of the examples, [T, B].
    """
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
    return (losses if weights is None else losses * weights).mean(1)


def class_weights(targets: Tensor, ways: int) -> Tensor:
    """Weights of examples with which every class counts equally, float64 [T, S].

    S / (N n) for an example of a class with n examples, so that their mean is 1; exactly 1 if all classes
    have the same number of examples.

    Args:
        targets: class numbers [T, S] in [0, N), with at least one example of each class.
        ways: N.
    """
    sizes = (targets.unsqueeze(2) == targets.unsqueeze(1)).sum(2)  # of the class of each example, [T, S]
    return targets.shape[1] / (ways * sizes).double()


def weighted(loss: PerTask, outputs: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean over examples of a loss that is a mean over examples, [T].

    Args:
        loss: (outputs, targets) -> [T].
        outputs, targets: of the examples, [T, S, ...].
        weights: of the examples, [T, S].
    """
    examples = (tensor.flatten(0, 1).unsqueeze(1) for tensor in (outputs, targets))  # T * S tasks of one
    losses = loss(*examples).view(weights.shape)
    return (losses * weights.to(losses.dtype)).mean(1)


ACCURACY = Metric("accuracy", accuracy, "accuracy", percent=True, chance=lambda ways: 1 / ways)
ROC_AUC = Metric("roc_auc", roc_auc, "ROC-AUC", percent=True, chance=lambda ways: 0.5)
POSITIVE = (0.0, math.inf)
MSE = Metric("mse", mean_squared_error, "mean squared error", higher_is_better=False, bounds=POSITIVE)

CLASSIFICATION = Objective(
    cross_entropy,
    metrics=(ACCURACY,),
    available=(
        ACCURACY,
        Metric(
            "balanced_accuracy", balanced_accuracy, "balanced accuracy", True, True, lambda ways: 1 / ways
        ),
        Metric("macro_f1", macro_f1, "macro F1", percent=True),
        ROC_AUC,
        Metric("ece", calibration_error, "expected calibration error", higher_is_better=False, percent=True),
        Metric("nll", cross_entropy, "negative log-likelihood", higher_is_better=False, bounds=POSITIVE),
    ),
)
REGRESSION = Objective(
    mean_squared_error,
    metrics=(MSE,),
    available=(
        MSE,
        Metric("mae", mean_absolute_error, "mean absolute error", higher_is_better=False, bounds=POSITIVE),
        Metric("r2", r_squared, "R squared", bounds=(-math.inf, 1.0)),
    ),
)


def _of_mean(metric: Metric, values: int) -> Metric:
    """A metric of values, of the means of predicted distributions."""
    return replace(
        metric, score=lambda outputs, targets: metric.score(gaussians.point(outputs, values), targets)
    )


def _coverage(percent: int) -> Metric:
    def score(outputs: Tensor, targets: Tensor) -> Tensor:
        return gaussians.coverage(outputs, targets, percent / 100)

    score.__doc__ = f"The share of the values in their predicted {percent} % interval"
    return Metric(
        f"coverage_{percent}", score, f"values in the {percent} % interval", True, True, aim=percent / 100
    )


LOG_LIKELIHOOD = Metric("log_likelihood", gaussians.log_likelihood, "log-likelihood of a query")
COVERAGES = tuple(map(_coverage, (50, 90, 95)))


def distributions(values: int = 1) -> Objective:
    """The objective of predicted distributions (`metarun.tasks.gaussians`) of V values of an example.

    The loss is the negative log-likelihood. People read the means.
    """
    mse, *others = (_of_mean(metric, values) for metric in REGRESSION.available)
    return Objective(
        gaussians.negative_log_likelihood,
        metrics=(LOG_LIKELIHOOD, mse, *COVERAGES),
        available=(LOG_LIKELIHOOD, *COVERAGES, mse, *others),
        units=partial(gaussians.point, values=values),
        numbers=gaussians.NUMBERS,
        spread=partial(gaussians.deviation, values=values),
    )


DISTRIBUTIONS = distributions()


def _no_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    raise TypeError("the loss of environments is a policy gradient, see metarun.tasks.rollouts")


RETURN = Metric("return", lambda after, before: after.returns.mean(1), "return", before="return_before")
RETURN_BEFORE = Metric(
    "return_before", lambda after, before: before.returns.mean(1), "return before adapting"
)
SUCCESS = Metric(
    "success",
    lambda after, before: after.reached.float().mean(1),
    "success",
    percent=True,
    before="success_before",
)
SUCCESS_BEFORE = Metric(
    "success_before",
    lambda after, before: before.reached.float().mean(1),
    "success before adapting",
    percent=True,
)
# Of tasks that are environments. Scores are of `Trajectories`: those after adaptation, and those before.
RETURNS = Objective(_no_loss, metrics=(RETURN,), available=(RETURN, RETURN_BEFORE), progress=(RETURN_BEFORE,))
SUCCESSES = replace(
    RETURNS,
    metrics=(SUCCESS, RETURN),
    available=(SUCCESS, SUCCESS_BEFORE, RETURN, RETURN_BEFORE),
    progress=(SUCCESS_BEFORE, RETURN_BEFORE),
)


def metric_named(name: str) -> Metric | None:
    """A metric by its name in a result file, for showing its scores; None for one of a dataset's own."""
    known = {
        metric.name: metric
        for each in (CLASSIFICATION, DISTRIBUTIONS, REGRESSION, SUCCESSES)
        for metric in each.available
    }
    return known.get(name)
