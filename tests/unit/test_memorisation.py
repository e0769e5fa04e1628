"""Tasks that one network could memorise, and methods that regularise it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from helpers.engines import engine_of

from metarun.algorithms.maml import MAML
from metarun.algorithms.mr_maml import MRMAML
from metarun.algorithms.taml import TAML, inequality
from metarun.backbones.mlp import MLP
from metarun.datasets.mixture import MixtureStore
from metarun.datasets.sinusoid import Sinusoid
from metarun.errors import ConfigError, TrainingError
from metarun.inner_loops.sgd import SGD
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import Episodes, EpisodeShape
from metarun.training.outer_loops import Gradient, require_sum
from metarun.training.parallel import Ranks

pytestmark = pytest.mark.quick


def classes_of(count: int, name: str = "a") -> ClassStore:
    items = torch.arange(count, dtype=torch.uint8).repeat_interleave(4).view(-1, 1, 1, 1)
    return ClassStore(items, [4] * count, [str(i) for i in range(count)], name)


def vectors() -> Episodes:
    labels = torch.arange(3).repeat_interleave(2).expand(4, -1)
    return Episodes(torch.randn(4, 6, 5), labels, torch.randn(4, 6, 5), labels, torch.zeros(4, 3))


@pytest.mark.parametrize("count", [7, 900])
def test_with_fixed_labels_a_class_is_the_same_way_in_every_task(count: int):
    """And all classes of a way are equally frequent, also of one among several datasets."""
    store, generator = classes_of(count), torch.Generator().manual_seed(0)
    mixture = MixtureStore({"a": classes_of(count), "b": classes_of(11, "b")}, [1.0, 3.0], "both", "cpu")
    for source in (store, mixture):
        source.fixed_labels = True
        classes, *_ = source.draw(4000, EpisodeShape(3, 1, 1), generator)
        in_part = torch.where(classes < count, classes, classes - count)
        assert (in_part % 3 == torch.arange(3)).all()
    assert torch.equal((classes < count).sum(1) % 3, torch.zeros(4000))  # a task is of one dataset
    assert (classes < count).float().mean().item() == pytest.approx(0.25, abs=0.03)
    shares = (
        in_part[classes[:, 0] >= count][:, 0].bincount(minlength=11)[::3] / (classes[:, 0] >= count).sum()
    )
    torch.testing.assert_close(shares, torch.full((4,), 0.25), atol=0.04, rtol=0)
    store.fixed_labels = False
    assert not (store.draw(9, EpisodeShape(3, 1, 1), generator)[0] % 3 == torch.arange(3)).all()


def test_the_amplitude_is_in_the_input_of_training_tasks_alone():
    """Yin et al. 2020, section 6.1."""
    dataset = Sinusoid(amplitude=(0.1, 4.0), phase=(0.0, 0.0), amplitudes=20, noise=0.1)
    shape, found = EpisodeShape(1, 5, 7), {}
    for split in ("train", "test"):
        source = dataset.split(split)
        tasks = source.gather(source.draw(3000, shape, torch.Generator().manual_seed(1)), shape)
        assert tasks.support_x.shape == (3000, 5, 21)
        x, known = tasks.query_x[..., 0], tasks.query_x[..., 1:]
        assert torch.equal(known.sum(-1), torch.ones(3000, 7))
        amplitude = torch.linspace(0.1, 4.0, 20)[known[:, 0].argmax(-1)].unsqueeze(1)
        found[split] = (tasks.query_y[..., 0] - amplitude * x.sin()).std().item()
        assert x.min() < -4.9
    assert found["train"] == pytest.approx(0.1, rel=0.03)
    assert found["test"] > 0.8
    plain = Sinusoid().split("train").draw(5, shape, torch.Generator().manual_seed(1))
    assert len(plain) == 3
    with pytest.raises(ConfigError, match=r"dataset\.amplitudes=1: choose a whole number of at least 2"):
        Sinusoid(amplitudes=1)
    with pytest.raises(ConfigError, match=r"dataset\.amplitudes=20: tasks can be memorised only .* phase"):
        Sinusoid(amplitudes=20)  # whose phases are unknown


@pytest.mark.parametrize("on", ["weights", "activations"])
def test_mr_maml_without_a_divergence_is_maml(on: str, float64: None):
    """The loss and the meta-gradient, in training mode; with a divergence, each task has its own noise."""
    tasks, bottleneck = vectors(), 4 if on == "activations" else None
    regularised = MRMAML(MLP((5,), (6,)), SGD(0.1, 2), 3, regularises=on, weight=0.0, bottleneck=bottleneck)
    network = regularised.learner.backbone.encoder
    body = network[0]
    if on == "activations":  # the means are the first half of the outputs
        body = torch.nn.Sequential(body, mean := torch.nn.Linear(6, 4))
        mean.weight.data, mean.bias.data = (p.data[:4].clone() for p in network[1].parameters())
        body.features = 4
    plain = MAML(body, SGD(0.1, 2), 3, adapts="head")
    plain.learner.head.load_state_dict(regularised.learner.head.state_dict())
    expected, found = (each.meta_loss(tasks) for each in (plain, regularised))
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-12, atol=0)
    slopes = [
        torch.autograd.grad(outcome.loss.mean(), each.learner.head.weight)[0]
        for outcome, each in ((expected, plain), (found, regularised))
    ]
    torch.testing.assert_close(*slopes, rtol=1e-12, atol=1e-15)
    regularised.weight = 1.0
    same = tasks.map(lambda tensor: tensor[:1].expand(4, *tensor.shape[1:]))
    outputs = regularised.predict(regularised.adapt(same), same.query_x)
    assert not torch.allclose(outputs[0], outputs[1])
    regularised.eval()
    outputs = regularised.predict(regularised.adapt(same), same.query_x)
    torch.testing.assert_close(outputs[0], outputs[1])


def test_mr_maml_says_what_it_cannot_do():
    with pytest.raises(ConfigError, match=r"algorithm\.regularises=activations: needs a bottleneck"):
        MRMAML(MLP((5,)), SGD(0.1, 1), 3, regularises="activations")
    with pytest.raises(ConfigError, match=r"algorithm\.weight=-1: must be at least 0"):
        MRMAML(MLP((5,)), SGD(0.1, 1), 3, weight=-1)


def test_measures_of_inequality_are_those_of_economists():
    """Against sums over tasks; equal losses have none, and a factor of all changes nothing."""
    losses = [0.5, 1.0, 1.0, 3.5, 4.0]
    count, total = len(losses), sum(losses)
    mean = total / count
    geometric = math.prod(losses) ** (1 / count)
    pairs = itertools.product(losses, losses)
    expected = {
        ("theil", 0.0): sum(x / total * math.log(x / total * count) for x in losses),
        ("generalised_entropy", 1.0): sum(x / total * math.log(x / total * count) for x in losses),
        ("generalised_entropy", 0.0): math.log(mean / geometric),
        ("generalised_entropy", 2.0): sum((x - mean) ** 2 for x in losses) / count / (2 * mean**2),
        ("atkinson", 1.0): 1 - geometric / mean,
        ("atkinson", 0.5): 1 - (sum(x**0.5 for x in losses) / count) ** 2 / mean,
        ("gini", 0.0): sum(abs(x - y) for x, y in pairs) / (2 * count * total),
        ("variance_of_logarithms", 0.0): sum(math.log(x / geometric) ** 2 for x in losses) / count,
    }
    for (measure, parameter), value in expected.items():
        found = [
            inequality(torch.tensor(each, dtype=torch.float64), measure, parameter).item()
            for each in (losses, [7 * x for x in losses], [2.0] * 3)
        ]
        assert found == pytest.approx([value, value, 0.0], rel=1e-12, abs=1e-14), measure


def test_taml_without_a_weight_is_maml_and_compares_whole_meta_batches(float64: None):
    tasks = vectors()
    plain = MAML(MLP((5,), (6,)), SGD(0.1, 2), 3)
    for measure in ("entropy", "gini"):
        taml = TAML(MLP((5,), (6,)), SGD(0.1, 2), 3, measure=measure, weight=0.0)
        taml.load_state_dict(plain.state_dict())
        assert torch.equal(taml.meta_loss(tasks).loss, plain.meta_loss(tasks).loss)
        assert not taml.couples_tasks
    engine = engine_of(TAML(MLP((5,), (6,)), SGD(0.1, 2), 3, measure="gini"), tasks, tasks_at_once=2)
    assert engine.at_once == 4
    with pytest.raises(TrainingError, match=r"out of memory with all tasks \(full\); lower meta_batch"):
        engine.halve("full")
    message = r"TAML: needs all tasks .* set algorithm.measure=entropy, or start it without torchrun"
    with pytest.raises(ConfigError, match=message):
        require_sum(Gradient(), Ranks(0, 2), engine.algorithm)
    with pytest.raises(ConfigError, match=r"measure=entropy: needs tasks with classes.*measure=theil"):
        TAML(MLP((1,)), SGD(0.1, 1), 1).check_source(Sinusoid().split("train"), EpisodeShape(1, 1, 1))
