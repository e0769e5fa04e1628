"""`dataset=gp` and predicted distributions, against scikit-learn and SciPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.gaussian_process import GaussianProcessRegressor, kernels

from metarun.algorithms.matching import MatchingNet
from metarun.algorithms.r2d2 import R2D2
from metarun.backbones.mlp import MLP
from metarun.datasets.gp import GaussianProcess, GaussianProcessSource
from metarun.errors import ConfigError
from metarun.tasks import gaussians
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.objectives import DISTRIBUTIONS, MSE, REGRESSION, distributions
from metarun.tasks.sampling import sample

pytestmark = pytest.mark.quick
SHAPE = EpisodeShape(1, 6, 4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scikit(name: str, length: float, scale: float, period: float) -> kernels.Kernel:
    by_name = {
        "rbf": lambda: kernels.RBF(length),
        "matern32": lambda: kernels.Matern(length, nu=1.5),
        "matern52": lambda: kernels.Matern(length, nu=2.5),
        "periodic": lambda: kernels.ExpSineSquared(length, period),
    }
    return kernels.ConstantKernel(scale**2) * by_name[name]()


@pytest.mark.parametrize("kernel", ["rbf", "matern32", "matern52", "periodic"])
def test_the_exact_solution_is_that_of_scikit_learn(kernel: str):
    """Means, variances, and the joint density of the queries."""
    source = GaussianProcess(kernel=kernel, noise=(0.1, 0.3)).split("test")
    draw = source.draw(3, SHAPE, generator())
    tasks, (of, *_) = source.gather(draw, SHAPE), source.opened(draw)
    rows = source.references(SHAPE, {})
    alone, joint = (rows[name](draw, SHAPE) for name in ("exact GP", "exact GP, joint"))
    means, deviations = (part[:, :, 0] for part in gaussians.unpacked(alone.outputs, 1))
    for t in range(3):
        length, scale, noise, period = (tensor[t].item() for tensor in of)
        found = GaussianProcessRegressor(
            scikit(kernel, length, scale, period), alpha=noise**2, optimizer=None
        )
        found.fit(tasks.support_x[t].double(), tasks.support_y[t, :, 0].double())
        mean, covariance = found.predict(tasks.query_x[t].double(), return_cov=True)
        covariance = covariance + noise**2 * np.eye(SHAPE.queries)
        assert means[t, :, 0].tolist() == pytest.approx(mean, abs=1e-4)
        assert deviations[t, :, 0].exp().tolist() == pytest.approx(np.sqrt(covariance.diagonal()), rel=1e-3)
        y = tasks.query_y[t, :, 0].double().numpy()
        whole = scipy.stats.multivariate_normal(mean, covariance).logpdf(y) / 4
        single = scipy.stats.norm(mean, np.sqrt(covariance.diagonal())).logpdf(y).mean()
        assert joint.scores["log_likelihood"][t].item() == pytest.approx(whole, abs=1e-3)
        assert alone.scores["log_likelihood"][t].item() == pytest.approx(single, abs=1e-3)


def test_functions_have_the_covariance_of_their_kernel():
    """Over 20,000 functions at the same points; a fault of the draw would not show in the exact solution."""
    source = GaussianProcess(length=(0.5, 0.5), scale=(0.8, 0.8), noise=(0.3, 0.3)).split("test")
    shape = EpisodeShape(1, 2, 1)
    *kernel, x, normal, counts = source.draw(20_000, shape, generator())
    tasks = source.gather((*kernel, x[:1].expand_as(x), normal, counts), shape)
    values = torch.cat([tasks.support_y, tasks.query_y], 1).squeeze(-1)
    expected = scikit("rbf", 0.5, 0.8, 1.0)(x[0].double().numpy()) + 0.09 * np.eye(3)
    assert values.T.cov().numpy() == pytest.approx(expected, abs=0.02)


def with_fewest(fewest: int | None, split: str = "train") -> GaussianProcessSource:
    return GaussianProcess(fewest=fewest).split(split)


def test_training_tasks_have_from_the_fewest_to_all_of_the_shots():
    tasks = sample(with_fewest(2), 400, SHAPE, generator())
    assert set(tasks.there.sum(1).tolist()) == {2, 3, 4, 5, 6}
    count = int(tasks.there[0].sum())
    outputs = torch.randn(400, 6, 2)
    own = DISTRIBUTIONS.loss(outputs[:1, :count], tasks.support_y[:1, :count])
    torch.testing.assert_close(tasks.support_loss(lambda x: outputs, 0)[:1], own)
    assert tasks.joined().support_weights is None
    for source in (with_fewest(None), with_fewest(2, "test")):
        assert sample(source, 4, SHAPE, generator()).support_weights is None
    assert sample(with_fewest(50), 4, SHAPE, generator()).there.all()  # there are no more than the shots


@pytest.mark.parametrize("method", [R2D2, MatchingNet])
def test_closed_forms_leave_absent_points_out(method: type):
    source = GaussianProcess(likelihood=None).split("train")
    tasks = sample(source, 1, SHAPE, generator(1))
    count = int(tasks.there.sum())
    assert count < 6
    algorithm = method(MLP((1,), hidden=(5,)))
    cut = tasks.map(lambda tensor: tensor[:, :count] if tensor.shape[1] == 6 else tensor)
    found, expected = (algorithm.predict(algorithm.adapt(each), tasks.query_x) for each in (tasks, cut))
    torch.testing.assert_close(found, expected)
    with pytest.raises(ConfigError, match="without an uncertainty; set dataset"):
        method.check_tasks(GaussianProcess().spec)


@pytest.mark.parametrize("components", [1, 3])
def test_scores_of_distributions_are_those_of_scipy(components: int):
    """Mixtures of two values of an example, against sums over components and a numerical quantile."""
    objective = distributions(values=2)
    means, logs = torch.randn(2, 4, 5, components, 2, dtype=torch.float64, generator=generator())
    targets = torch.randn(4, 5, 2, dtype=torch.float64, generator=generator(1))
    outputs = gaussians.packed(means, logs)
    scores = {metric.name: metric.score(outputs, targets) for metric in objective.available}
    for t in range(4):
        parts = scipy.stats.norm(means[t].numpy(), logs[t].exp().numpy())
        joint = parts.logpdf(targets[t].unsqueeze(1).numpy()).sum((0, 2))
        expected = scipy.special.logsumexp(joint) - math.log(components)
        assert scores["log_likelihood"][t].item() == pytest.approx(expected / 5)
        below = parts.cdf(targets[t].unsqueeze(1).numpy()).mean(1)
        for level in (50, 90, 95):
            edge = (1 - level / 100) / 2
            inside = ((below >= edge) & (below <= 1 - edge)).mean()
            assert scores[f"coverage_{level}"][t].item() == pytest.approx(inside)
    for metric in REGRESSION.available:
        torch.testing.assert_close(scores[metric.name], metric.score(means.mean(2), targets))
    draws = torch.distributions.Normal(means, logs.exp()).sample((20_000,)).flatten(0, 0)
    spread = draws.movedim(3, 1).flatten(0, 1).std(0)
    torch.testing.assert_close(objective.spread(outputs), spread, rtol=0.03, atol=0)
    torch.testing.assert_close(objective.to_units(outputs), means.mean(2))
    assert objective.to_units(targets) is targets


def test_a_coverage_is_best_at_its_level_and_does_not_choose_a_checkpoint():
    coverage = next(each for each in DISTRIBUTIONS.available if each.name == "coverage_90")
    assert coverage.is_better(0.88, than=0.94)
    assert not coverage.is_better(0.85, than=0.94)
    with pytest.raises(ConfigError, match="coverage_90 cannot; put another one first"):
        DISTRIBUTIONS.choosing(["coverage_90", "mse"])
    assert MSE in DISTRIBUTIONS.choosing(["mse", "coverage_90"]).metrics


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": (0.0, 1.0)}, "dataset.length: starts at 0.0"),
        ({"length": (0.6, 0.1)}, r"dataset.length=\[0.6, 0.1\]: must be two numbers"),
        ({"noise": (0.0, 0.1)}, "dataset.noise: starts at 0.0; choose a range from 0.001 on"),
        ({"fewest": 0}, "dataset.fewest=0"),
    ],
)
def test_settings_out_of_bounds_are_refused(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        GaussianProcess(**settings)
