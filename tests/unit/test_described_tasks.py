"""Meta-features of tasks and Task2Vec, each against something else that computes it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from metarun.commands.described import correlation
from metarun.tasks.meta_features import intrinsic_dimension, landmarkers, meta_features
from metarun.training.task2vec import distances, fisher_diagonal, fitted_head, positions, task_vector

pytestmark = pytest.mark.usefixtures("float64")


class Probe(nn.Sequential):
    """A convolution, and running averages that are not those of its batch."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
        self[1].running_mean.uniform_()
        self[1].running_var.uniform_(0.5, 2)
        self.eval()


def test_the_fisher_information_is_that_of_a_plain_loop():
    """Over examples and classes, with a gradient each; the network stays as it was."""
    network, x = Probe(), torch.rand(11, 1, 6, 6)  # more than are run at once
    head = torch.randn(3, 4), torch.randn(3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = fisher_diagonal(network, head, x)
    expected = {name: torch.zeros_like(p) for name, p in network.named_parameters()}
    for one in x:
        for label in range(3):
            log_p = (network(one.unsqueeze(0)) @ head[0].T + head[1]).log_softmax(-1)[0, label]
            grads = torch.autograd.grad(log_p, list(network.parameters()))
            for name, grad in zip(expected, grads, strict=True):
                expected[name] += log_p.exp().detach() * grad.square() / len(x)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-14)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    y = torch.arange(11) % 3
    filters = task_vector(network, x, y, 3)
    own = fisher_diagonal(network, fitted_head(network(x).detach(), y, 3), x)
    expected_filters = [own["0.weight"][i].mean() for i in range(3)]
    expected_filters += [own["4.weight"][i].mean() for i in range(4)]
    torch.testing.assert_close(filters, torch.stack(expected_filters))


def test_the_head_is_scikit_learns_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = torch.randn(30, 5), torch.arange(30) % 3
    weight, bias = fitted_head(x + y.unsqueeze(1), y, 3)
    expected = linear_model.LogisticRegression(tol=1e-10, max_iter=1000).fit(x + y.unsqueeze(1), y)
    assert weight.numpy() == pytest.approx(expected.coef_, abs=1e-4)
    assert (bias - bias.mean()).numpy() == pytest.approx(expected.intercept_, abs=1e-4)


def test_distances_ignore_the_size_of_what_all_filters_share():
    """Of a and a: 0. Of vectors without a common filter: 1; a filter without information counts nothing."""
    vectors = torch.tensor([[1.0, 2, 0, 0], [1.0, 2, 0, 0], [0, 0, 3, 0], [2.0, 1, 0, 0]])
    found = distances(vectors)
    a, b = torch.tensor([1 / 3, 2 / 3]), torch.tensor([2 / 3, 1 / 3])
    expected = 1 - (a @ b) / (a.norm() * b.norm())
    torch.testing.assert_close(
        found[0], torch.stack([expected * 0, expected * 0, expected * 0 + 1, expected])
    )
    assert torch.equal(found, found.T)


def test_the_map_keeps_distances_of_a_plane():
    points = torch.randn(7, 2)
    found, kept = positions(torch.cdist(points, points))
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(points, points))
    assert kept == pytest.approx(1)
    assert positions(torch.zeros(1, 1))[0].shape == (1, 2)


def test_sizes_and_separability_by_hand():
    """Points on a line: 0 and 1 of one class, 3, 3.5 and 7 of another."""
    x, y = torch.tensor([[0.0], [1], [3], [3.5], [7]]), torch.tensor([0, 0, 1, 1, 1])
    found = meta_features(x, y)
    entropy = -(0.4 * math.log(0.4) + 0.6 * math.log(0.6)) / math.log(2)
    assert (found["classes"], found["examples"], found["dimension"]) == (2, 5, 1)
    assert found["balance"] == pytest.approx(entropy)
    assert found["nearest neighbour"] == 1
    assert found["within / between"] == pytest.approx((1 + 1 + 0.5 + 0.5 + 3.5) / (3 + 2 + 2 + 2.5 + 6))
    assert meta_features(x, torch.tensor([0, 1, 1, 0, 0]))["nearest neighbour"] == pytest.approx(1 / 5)


@pytest.mark.parametrize("dimension", [1, 2, 4])
def test_the_intrinsic_dimension_is_that_of_a_plane_in_many_dimensions(dimension: int):
    x = torch.rand(400, dimension) @ torch.linalg.qr(torch.randn(20, 20)).Q[:dimension]
    found = intrinsic_dimension(torch.cdist(x, x).fill_diagonal_(math.inf))
    assert found == pytest.approx(dimension, rel=0.2)
    assert math.isnan(intrinsic_dimension(torch.full((2, 2), math.inf)))


def test_landmarkers_tell_what_can_be_separated():
    pytest.importorskip("sklearn")
    y = torch.arange(40) % 2
    noise = torch.randn(40, 3)
    easy = landmarkers(noise + 9 * y.unsqueeze(1), y)
    assert easy == {"decision stump": 1, "naive Bayes": 1, "linear": 1}
    sides = torch.stack([y, torch.arange(40) // 2 % 2], 1)
    corners = landmarkers(sides + 0.1 * noise[:, :2], sides[:, 0] ^ sides[:, 1])
    assert corners["linear"] < 0.8  # no line separates an exclusive or
    assert landmarkers(noise, torch.arange(40)) == {}


def test_a_correlation_has_its_interval():
    """By Bonett and Wright (2000); without variation there is none."""
    a, b = [1.0, 2, 3, 4, 5, 6], [1.0, 3, 2, 5, 4, math.nan]
    rho, low, high = correlation(a, b)
    assert rho == pytest.approx(0.8)
    half = 1.96 * math.sqrt((1 + 0.32) / 2)
    assert (low, high) == pytest.approx(
        (math.tanh(math.atanh(0.8) - half), math.tanh(math.atanh(0.8) + half))
    )
    assert correlation(a, [1.0] * 6) is None
