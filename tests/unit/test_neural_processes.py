"""Neural processes against a plain loop over points, in float64, and beside the exact Gaussian process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.engines import engine_of
from helpers.methods import gradient, relative_error
from helpers.neural_processes import HEADS, PROCESSES, SAMPLES, WIDTH, Reference, built, functions, normal
from torch import Tensor

from metarun.algorithms.neural_process import NeuralProcess
from metarun.datasets.gp import GaussianProcess
from metarun.tasks import gaussians, numbers
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.sampling import fixed_draws, sample
from metarun.training.evaluation import EvalSettings, evaluate
from metarun.training.hardware import Hardware

every_process = pytest.mark.parametrize("name", PROCESSES)


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The same standard normal numbers for each task, [D] or the first of [L D]."""
    noise = torch.randn(SAMPLES * WIDTH)
    monkeypatch.setattr(numbers, "normal", lambda tasks, length, device: noise[:length].expand(tasks, -1))
    return noise


@pytest.mark.usefixtures("float64")
@pytest.mark.quick
@every_process
def test_the_loss_and_its_gradient_are_those_of_a_loop_over_points(name: str, same_noise: Tensor):
    """Whole, in chunks of tasks, and from a trace; the support has absent points."""
    algorithm, tasks = built(name), functions()
    weights = {key: p.detach().clone().requires_grad_() for key, p in algorithm.named_parameters()}
    expected = Reference(name, weights).loss(tasks, same_noise[:WIDTH])
    torch.testing.assert_close(algorithm.meta_loss(tasks).loss.mean(), expected)
    grads = dict(zip(weights, torch.autograd.grad(expected, list(weights.values())), strict=True))
    assert relative_error(gradient(algorithm, tasks), grads) < 1e-10
    assert relative_error(gradient(algorithm, tasks, tasks_at_once=2), grads) < 1e-10
    engine = engine_of(algorithm, tasks)
    engine.trace(compiles=False)
    assert engine.traced
    for _ in range(2):
        engine.backward(next(engine.draws))
        traced = {key: p.grad.clone() for key, p in algorithm.named_parameters()}
        assert relative_error(traced, grads) < 1e-10


@pytest.mark.usefixtures("float64")
@pytest.mark.quick
@every_process
def test_predictions_are_those_of_the_points_that_there_are(name: str, same_noise: Tensor):
    """Each task alone, with its support cut to its own points in another order, and L samples of z."""
    algorithm, tasks = built(name).eval(), functions()
    weights = {key: p.detach() for key, p in algorithm.named_parameters()}
    reference = Reference(name, weights)
    outputs = algorithm.predict(algorithm.adapt(tasks), tasks.query_x)
    latent = PROCESSES[name][1]
    likelihoods = gaussians.log_likelihood(outputs, tasks.query_y)
    for t in range(len(tasks)):
        one = tasks.map(lambda tensor, t=t: tensor[t : t + 1])
        order = torch.arange(int(tasks.there[t].sum())).flip(0)
        cut = replace(
            one, support_x=one.support_x[:, order], support_y=one.support_y[:, order], support_weights=None
        )
        alone = algorithm.predict(algorithm.adapt(cut), one.query_x)
        torch.testing.assert_close(alone[0], outputs[t])
        context = [(cut.support_x[0, i], cut.support_y[0, i]) for i in range(len(order))]
        joint = []
        for sample_noise in same_noise.view(SAMPLES, WIDTH) if latent else [None]:
            z = None
            if latent:
                mean, deviation = reference.distribution(context)
                z = mean + deviation * sample_noise
            points = zip(one.query_x[0], one.query_y[0], strict=True)
            joint.append(sum(normal(reference.predicted(context, x, z)).log_prob(y) for x, y in points))
        densities = torch.cat(joint).exp()
        torch.testing.assert_close(likelihoods[t], densities.mean().log() / 2)


def test_an_evaluation_is_the_same_for_any_number_of_tasks_at_once():
    """The samples of z belong to the tasks, in order."""
    source, settings = GaussianProcess().split("test"), EvalSettings(EpisodeShape(1, 4, 3), 7, 0)
    torch.manual_seed(0)
    algorithm = NeuralProcess((1,), 2, None, True, WIDTH, HEADS, SAMPLES)
    scores = [
        evaluate(algorithm, source, settings, Hardware("cpu", tasks_at_once=count)).scores
        for count in (1, 7, 3)
    ]
    for name, values in scores[0].items():
        torch.testing.assert_close(values, scores[1][name], msg=name)
        torch.testing.assert_close(values, scores[2][name], msg=name)


def test_a_trained_process_comes_close_to_the_exact_one_from_below():
    """On functions with much noise, which standard deviations from 0.1 on can describe."""
    torch.manual_seed(0)
    dataset = GaussianProcess(length=(2.0, 2.0), scale=(1.0, 1.0), noise=(0.5, 0.5))
    shape, train = EpisodeShape(1, 10, 10), dataset.split("train")
    algorithm = NeuralProcess((1,), 2, "mean", False, width=32)
    optimizer = torch.optim.Adam(algorithm.parameters(), lr=0.003)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        optimizer.zero_grad()
        algorithm.meta_loss(sample(train, 16, shape, generator)).loss.mean().backward()
        optimizer.step()
    source = dataset.split("test")
    found = evaluate(algorithm, source, EvalSettings(shape, 200, 0), Hardware("cpu")).scores
    rows = source.references(shape, {})
    exact, joint = (
        torch.cat(
            [rows[name](draw, shape).scores["log_likelihood"] for draw in fixed_draws(source, shape, 200, 0)]
        )
        for name in ("exact GP", "exact GP, joint")
    )
    gap = (exact - found["log_likelihood"]).mean().item()
    assert 0.02 < gap < 0.2
    assert exact.mean() < joint.mean()
    assert found["coverage_90"].mean().item() == pytest.approx(0.9, abs=0.04)
