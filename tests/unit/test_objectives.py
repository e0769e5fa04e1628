"""Every metric against scikit-learn or the formula of its paper, task by task."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import scipy.special
import sklearn.metrics
import torch
from torch import Tensor

from metarun.errors import ConfigError
from metarun.tasks.objectives import (
    ACCURACY,
    CLASSIFICATION,
    MSE,
    REGRESSION,
    Metric,
    Objective,
    metric_named,
)

pytestmark = pytest.mark.quick

TASKS, EXAMPLES, WAYS, VALUES = 3, 25, 6, 2
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 1e-2}
PRECISIONS = list(TOLERANCE)


def classified(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits and targets of three tasks: imbalanced; with classes in one of them only; never right."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(TASKS, EXAMPLES, WAYS, generator=generator)
    targets = torch.zeros(TASKS, EXAMPLES, dtype=torch.long)
    targets[0] = torch.multinomial(
        torch.tensor([12.0, 6, 3, 2, 1, 1]), EXAMPLES, replacement=True, generator=generator
    )
    targets[1, ::3] = 2  # classes 0 and 2 occur, 0, 1 and 5 are predicted
    logits[1, :, 2:5] = -30.0
    targets[2] = 4
    logits[2, :, 1] = 20.0
    return logits.to(dtype), targets


def regressed(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    outputs, targets = torch.randn(2, TASKS, EXAMPLES, VALUES, generator=generator)
    targets[1] = outputs[1] + 0.1 * targets[1]
    targets[2] = 3 * targets[2] - 5
    return outputs.to(dtype), targets.to(torch.float32 if dtype == torch.bfloat16 else dtype)


def macro_f1(truth: np.ndarray, predicted: np.ndarray) -> float:
    return sklearn.metrics.f1_score(truth, predicted, average="macro")


CLASSES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": sklearn.metrics.accuracy_score,
    "balanced_accuracy": sklearn.metrics.balanced_accuracy_score,
    "macro_f1": macro_f1,
}
NUMBERS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "mse": sklearn.metrics.mean_squared_error,
    "mae": sklearn.metrics.mean_absolute_error,
    "r2": sklearn.metrics.r2_score,
}


def test_no_metric_is_without_a_test():
    assert {m.name for m in CLASSIFICATION.available} == {*CLASSES, "ece", "nll", "roc_auc"}
    assert {m.name for m in REGRESSION.available} == {*NUMBERS}


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", CLASSES)
def test_metrics_of_predicted_classes_are_those_of_scikit_learn(name: str, dtype: torch.dtype):
    logits, targets = classified(dtype)
    found = metric_named(name).score(logits, targets)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
        expected = [
            CLASSES[name](truth, own.argmax(-1))
            for truth, own in zip(targets.numpy(), logits.double().numpy(), strict=True)
        ]
    assert found.shape == (TASKS,)
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert len(set(expected)) > 1


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("ways", [2, WAYS])
def test_the_area_under_the_roc_curve_is_that_of_scikit_learn(ways: int, dtype: torch.dtype):
    """Of the classes that occur, each against the rest; with many ties, and logits that are far apart."""
    logits, targets = classified(dtype)
    logits[0] = (2 * logits[0]).round() / 2
    logits, targets = logits[..., :ways], targets % ways
    targets[1, 1::3] = targets[2, ::2] = 1
    if ways == 2:
        logits[0] *= 100  # in float32, their softmax would be 0 or 1
    found = metric_named("roc_auc").score(logits, targets)
    expected = []
    for own, truth in zip(logits.double().numpy(), targets.numpy(), strict=True):
        rest = np.stack([scipy.special.logsumexp(np.delete(own, k, 1), axis=1) for k in range(ways)], 1)
        areas = [sklearn.metrics.roc_auc_score(truth == k, (own - rest)[:, k]) for k in np.unique(truth)]
        expected.append(np.mean(areas))
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert metric_named("roc_auc").chance(ways) == 0.5
    # Ties are ties whatever is added to the logits of an example, and in whatever order its others are.
    alike = torch.tensor([0.125, 0.75, 1.25, 2.875]).repeat(1, 8, 1) + 3 * torch.arange(8.0).view(1, 8, 1)
    alike[0, ::2, 1:] = alike[0, ::2, 1:].flip(1)
    truth = torch.tensor([[0, 2] * 4])
    assert metric_named("roc_auc").score(alike.double(), truth).item() == 0.5
    assert metric_named("roc_auc").score(logits, torch.zeros_like(targets)).isnan().all()


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_the_negative_log_likelihood_is_that_of_scikit_learn(dtype: torch.dtype):
    logits, targets = classified(dtype)
    found = metric_named("nll").score(logits, targets)
    expected = [
        sklearn.metrics.log_loss(truth, own, labels=range(WAYS))
        for truth, own in zip(targets.numpy(), logits.double().softmax(-1).numpy(), strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=TOLERANCE[dtype])
    assert torch.equal(found, CLASSIFICATION.loss(logits, targets))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", NUMBERS)
def test_metrics_of_values_are_those_of_scikit_learn(name: str, dtype: torch.dtype):
    outputs, targets = regressed(dtype)
    found = metric_named(name).score(outputs, targets)
    expected = [
        NUMBERS[name](truth, own)
        for truth, own in zip(targets.double().numpy(), outputs.double().numpy(), strict=True)
    ]
    assert found.shape == (TASKS,)
    assert found.tolist() == pytest.approx(expected, rel=TOLERANCE[dtype])


def test_r_squared_of_constant_targets_is_that_of_scikit_learn():
    """1 where they are predicted exactly, else 0; never infinite or NaN, and no other value is lost."""
    outputs, targets = regressed(torch.float32)
    targets[0, :, 0] = outputs[0, :, 0] = 0.1  # its mean is not 0.1 in float32
    targets[1, :, 1] = 0.1
    targets[2], outputs[2] = 7.0, 7.0
    found = metric_named("r2").score(outputs, targets)
    other = [
        sklearn.metrics.r2_score(targets[t, :, v].double(), outputs[t, :, v].double())
        for t, v in ((0, 1), (1, 0))
    ]
    assert found.tolist() == pytest.approx([(1 + other[0]) / 2, (0 + other[1]) / 2, 1.0], rel=1e-5)
    exact = torch.full((1, 4, 1), 2.0, dtype=torch.float64)
    for off in (0.0, 1.0):
        expected = sklearn.metrics.r2_score(exact[0], exact[0] + off)
        assert metric_named("r2").score(exact + off, exact).item() == expected


def calibration_error(logits: np.ndarray, targets: np.ndarray, bins: int = 15) -> float:
    """Guo et al., equation 3, one bin after the other; a bin has its upper edge, in float32."""
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares = (shares / shares.sum(1, keepdims=True)).astype(np.float32)
    confidence, right = shares.max(1), shares.argmax(1) == targets
    edges = (np.arange(bins + 1) / bins).astype(np.float32)
    total = 0.0
    for m in range(bins):
        inside = (confidence > edges[m]) & (confidence <= edges[m + 1])
        if inside.any():
            gap = right[inside].mean() - confidence[inside].astype(np.float64).mean()
            total += inside.mean() * abs(gap)
    return total


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_the_calibration_error_is_that_of_a_loop_over_bins(dtype: torch.dtype):
    logits, targets = classified(dtype)
    found = metric_named("ece").score(logits, targets)
    pairs = zip(logits.double().numpy(), targets.numpy(), strict=True)
    assert found.tolist() == pytest.approx([calibration_error(*pair) for pair in pairs], abs=1e-5)
    assert found.min() > 0.01


def with_confidence(shares: list[float], ways: int) -> Tensor:
    """Logits [1, B, ways] whose largest probability is a share; ties go to class 0."""
    logits = torch.zeros(1, len(shares), ways)
    for i, share in enumerate(shares):
        if share == 1.0:
            logits[0, i, 0] = 200.0
        elif share != 1 / ways:
            logits[0, i, 0] = np.log(share * (ways - 1) / (1 - share))
    return logits


@pytest.mark.parametrize("ways", [3, 5, 15])
def test_a_confidence_on_an_edge_belongs_to_the_bin_below(ways: int):
    """The confidence of guessing among 3, 5 or 15 classes is an edge; the bin above has gaps of its own."""
    edge = 1 / ways
    logits = with_confidence([edge, edge, edge + 0.03], ways)
    targets = torch.tensor([[1, 1, 0]])  # wrong, wrong, right
    assert (logits.softmax(-1).max(-1).values[0, :2] == torch.tensor(edge)).all()
    found = metric_named("ece").score(logits, targets).item()
    assert found == pytest.approx((2 * edge + 1 - (edge + 0.03)) / 3, abs=1e-6)
    assert found == pytest.approx(calibration_error(logits[0].double().numpy(), targets[0].numpy()), abs=1e-6)


def test_a_confidence_of_one_is_in_the_last_bin():
    logits = with_confidence([1.0, 1.0, 0.95, 0.9], 4)
    targets = torch.tensor([[0, 1, 0, 1]])
    assert logits.softmax(-1)[0, 0, 0] == 1.0
    # The last bin: one of its three is wrong, and their mean confidence is 0.98333.
    expected = (abs(1 + 0 + 1 - 2.95) + 0.9) / 4
    assert metric_named("ece").score(logits, targets).item() == pytest.approx(expected, abs=1e-6)


def test_regressions_of_unequal_shapes_are_an_error_of_the_program():
    for name in NUMBERS:
        with pytest.raises(ValueError, match="differ in shape"):
            metric_named(name).score(torch.zeros(2, 3, 1), torch.zeros(2, 3))


BETTER = {"accuracy", "balanced_accuracy", "macro_f1", "roc_auc", "r2"}  # the higher


@pytest.mark.parametrize("metric", [*CLASSIFICATION.available, *REGRESSION.available], ids=lambda m: m.name)
def test_the_direction_of_a_metric_is_that_of_a_better_model(metric: Metric):
    assert metric.is_better(0.7, than=0.6) == (metric.name in BETTER)
    assert metric.is_better(0.6, than=0.7) == (metric.name not in BETTER)
    assert not metric.is_better(0.6, than=0.6)
    assert not metric.is_better(float("nan"), than=0.6)
    percent = metric.name in {"accuracy", "balanced_accuracy", "macro_f1", "roc_auc", "ece"}
    assert (metric.scale, metric.label.endswith(", %")) == ((100, True) if percent else (1, False))


def test_scores_are_shown_in_their_own_unit():
    assert ACCURACY.show(0.91456) == "91.5 %"
    assert ACCURACY.show(0.91456, 2) == "91.46 %"
    assert ACCURACY.show_interval(0.91456, 0.011) == "91.46 ± 1.10 %"
    assert ACCURACY.show_interval(0.01, 0.002, signed=True) == "+1.00 ± 0.20 %"
    assert MSE.show(0.91456) == "0.915"
    assert MSE.show(0.91456, 4) == "0.9146"
    assert MSE.show_interval(0.91456, 0.011) == "0.9146 ± 0.0110"
    assert MSE.show_interval(-0.5, 0.25, signed=True) == "-0.5000 ± 0.2500"
    assert MSE.show_interval(123456789.0, 1e7) == "1.2e+08 ± 1.0e+07"
    assert ACCURACY.show_interval(0.5, float("nan")) == "50.00 ± nan %"


@pytest.mark.parametrize("objective", [CLASSIFICATION, REGRESSION])
def test_metrics_are_chosen_by_name_in_the_order_asked_for(objective: Objective):
    names = [metric.name for metric in objective.available]
    assert objective.choosing(None) is objective
    chosen = objective.choosing(names[::-1])
    assert [metric.name for metric in chosen.metrics] == names[::-1]
    assert (chosen.loss, chosen.available) == (objective.loss, objective.available)
    assert [metric.name for metric in chosen.choosing(names[:1]).metrics] == names[:1]
    with pytest.raises(ConfigError, match=f"no 'f1'; choose from {', '.join(names)}") as error:
        objective.choosing([names[0], "f1"])
    assert "\n" not in str(error.value)
    for wrong in ([], [names[0], names[0]]):
        with pytest.raises(ConfigError, match="at least one metric, and each only once"):
            objective.choosing(wrong)
    other = REGRESSION if objective is CLASSIFICATION else CLASSIFICATION
    with pytest.raises(ConfigError, match=f"no {other.metrics[0].name!r}"):
        objective.choosing([other.metrics[0].name])


@pytest.mark.parametrize("name", ["accuracy", "mse"])
def test_a_number_is_better_than_none(name: str):
    """A diverged model must not remain the best because it was the first."""
    metric = metric_named(name)
    assert metric.is_better(0.1, than=math.nan) and not metric.is_better(math.nan, than=0.1)
    assert not metric.is_better(math.nan, than=math.nan)
    assert metric.is_better(0.2, than=0.1) == (name == "accuracy") != metric.is_better(0.1, than=0.2)
