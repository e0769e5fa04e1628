"""Tasks of several families, and methods that look at a task before they adapt to it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.engines import engine_of

from metarun.algorithms.hsml import HSML
from metarun.algorithms.maml import MAML
from metarun.algorithms.mmaml import MMAML
from metarun.backbones.mlp import MLP
from metarun.datasets.functions import Functions
from metarun.errors import ConfigError
from metarun.inner_loops.sgd import SGD
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.objectives import DISTRIBUTIONS

pytestmark = pytest.mark.quick

SHAPE = EpisodeShape(1, 6, 4)
# What a family is linear in, so that least squares fits each of its functions if the centre is 0.
BASES = {
    "sinusoid": lambda x: [x.sin(), x.cos()],
    "line": lambda x: [x, x**0],
    "quadratic": lambda x: [x**2, x, x**0],
}


def tasks_of(*families: str, count: int = 2000, noise: float = 0.0, generator: int = 0):
    source = Functions(families=families, noise=noise).split("train")
    return source.gather(source.draw(count, SHAPE, torch.Generator().manual_seed(generator)), SHAPE)


@pytest.mark.parametrize("family", BASES)
def test_a_family_is_what_its_name_says(family: str):
    tasks = tasks_of(family, noise=0.0)
    x, y = tasks.query_x.double(), tasks.query_y.double()
    basis = torch.cat(BASES[family](x), -1)  # [T, B, terms]
    solution = torch.linalg.lstsq(basis, y).solution
    assert (basis @ solution - y).abs().max() < 1e-3
    if family == "line":
        assert solution.amin((0, 2)).tolist() == pytest.approx([-3, -3], abs=0.05)
        assert solution.amax((0, 2)).tolist() == pytest.approx([3, 3], abs=0.05)
    if family == "sinusoid":
        assert 0.1 < solution.norm(dim=1).min() < 0.2
        assert 4.9 < solution.norm(dim=1).max() < 5.0
        assert (solution[:, 1] < 1e-3).all()  # sin(x - phase), phase in [0, pi]


def test_families_are_mixed_and_noise_is_added():
    """Two bends of |x| and tanh differ by what they do far from their centre."""
    plain, noisy = tasks_of("transformed_l1", "tanh"), tasks_of("transformed_l1", "tanh", noise=0.3)
    noise = noisy.query_y - plain.query_y
    assert noise.std().item() == pytest.approx(0.3, rel=0.03)
    steep = (plain.query_y.abs() > 6.1).any(1).float().mean()  # a tanh stays within 6
    assert 0.2 < steep < 0.5
    predicted = Functions(likelihood="gaussian")
    assert predicted.spec.outputs == 2 and predicted.split("test").spec.objective is DISTRIBUTIONS
    assert predicted.split("test").fingerprint == Functions().split("test").fingerprint  # the same tasks
    with pytest.raises(ConfigError, match=r"families=.*choose one or more different families"):
        Functions(families=["line", "line"])


def test_mmaml_without_a_modulation_is_maml_and_its_encoder_reads_x_and_y(float64: None):
    torch.manual_seed(0)
    tasks = tasks_of("line", "tanh", count=3).to(torch.float64)
    mmaml = MMAML(MLP((1,), (6, 5)), SGD(0.01, 2), 1, (1,), hidden=4)
    maml = MAML(MLP((1,), (6, 5)), SGD(0.01, 2), 1)
    weights = [p for name, p in mmaml.learner.named_parameters() if "task_s" not in name]
    with torch.no_grad():
        for own, other in zip(maml.learner.parameters(), weights, strict=True):
            own.copy_(other)
    assert len(mmaml.names) == 2
    before = mmaml.meta_loss(tasks).loss
    for modulator in mmaml.modulators:
        torch.nn.init.zeros_(modulator.weight)
        torch.nn.init.zeros_(modulator.bias)
    expected = maml.meta_loss(tasks).loss
    torch.testing.assert_close(mmaml.meta_loss(tasks).loss, expected)
    assert not torch.allclose(before, expected)
    states = list(mmaml.trajectory(tasks))
    for name in ("task_scale", "task_shift"):
        first, last = (each["params"][f"{mmaml.names[0]}.{name}"] for each in (states[0], states[-1]))
        assert torch.equal(first, last)
    with torch.no_grad():
        embedding = mmaml.encoder(tasks)
        lstm, pairs = mmaml.encoder.lstm, torch.cat([tasks.support_x, tasks.support_y], 2)
        _, (ends, _) = lstm(pairs[1:2])  # the last states of the second layer, forward and backward
    torch.testing.assert_close(embedding[1], ends[2:, 0].flatten())


def test_mmaml_of_a_regression_is_traced():
    """As it is by default for tasks this small."""
    algorithm = MMAML(MLP((1,), (6, 5)), SGD(0.01, 2), 1, (1,), hidden=4)
    engine = engine_of(algorithm, tasks_of("line", count=3), compile="auto")
    assert engine.traced
    found = []
    for _ in range(2):
        engine.backward(next(engine.draws))
        found.append(algorithm.encoder.lstm.weight_ih_l0.grad.clone())
        engine.traced.clear()
    assert found[1].abs().max() > 1e-4
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-6)


def test_mmaml_says_what_it_cannot_encode():
    with pytest.raises(ConfigError, match=r"with classes it encodes images.*choose algorithm=maml"):
        MMAML(MLP((4,)), SGD(0.1, 1), 3, (4,), classes=5)


@pytest.mark.parametrize("aggregator", ["recurrent", "pooling"])
def test_hsml_with_one_cluster_and_an_open_gate_is_maml(float64: None, aggregator: str):
    """And its reconstruction error is a part of the loss."""
    torch.manual_seed(0)
    tasks = tasks_of("line", "tanh", count=3).to(torch.float64)
    hsml = HSML(MLP((1,), (6, 5)), SGD(0.01, 2), 1, (1,), hidden=4, clusters=(1,), aggregator=aggregator)
    maml = MAML(MLP((1,), (6, 5)), SGD(0.01, 2), 1)
    maml.load_state_dict(hsml.state_dict(), strict=False)
    closed = hsml.meta_loss(tasks).loss
    for gate in hsml.gates.values():
        torch.nn.init.zeros_(gate.weight)
        torch.nn.init.constant_(gate.bias, 50)  # the sigmoid is 1
    error = hsml.represented(tasks)[1]
    assert error.min() > 0.01
    expected = maml.meta_loss(tasks).loss
    torch.testing.assert_close(hsml.meta_loss(tasks).loss, expected + 0.01 * error)
    assert not torch.allclose(closed, expected, rtol=0.01)


def test_hsml_leaves_missing_points_out_and_shares_tasks_among_clusters():
    torch.manual_seed(0)
    whole = tasks_of("line", count=2)
    fewer = replace(whole, support_x=whole.support_x[:, :4], support_y=whole.support_y[:, :4])
    padded = replace(whole, support_weights=torch.tensor([1.5] * 4 + [0.0] * 2).expand(2, -1))
    for aggregator in ("recurrent", "pooling"):
        hsml = HSML(MLP((1,), (6, 5)), SGD(0.01, 2), 1, (1,), hidden=4, aggregator=aggregator)
        for found, expected in zip(hsml.represented(padded), hsml.represented(fewer), strict=True):
            torch.testing.assert_close(found, expected)
    level = hsml.levels[0]
    near = level.assignments(level.centres.detach().unsqueeze(0) * 100)[0]  # of nodes that are far apart
    torch.testing.assert_close(near, torch.eye(4))
    with pytest.raises(ConfigError, match=r"clusters=\[2, 0\]: must be the clusters of one or more levels"):
        HSML(MLP((1,), (6, 5)), SGD(0.01, 2), 1, (1,), clusters=(2, 0))
    with pytest.raises(ConfigError, match=r"with classes it embeds images.*choose algorithm=maml"):
        HSML(MLP((4,)), SGD(0.1, 1), 3, (4,), classes=5)
