"""Every algorithm on values, built from its YAML: it learns them, or says that it classifies."""

from __future__ import annotations

import pytest
import torch
from helpers.build import ALGORITHMS, built, composed
from helpers.engines import engine_of

from metarun.commands.one_task import Task, follow
from metarun.config.build import build_dataset
from metarun.config.comments import facts
from metarun.config.paths import CONF
from metarun.config.schema import typed
from metarun.errors import ConfigError
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.sampling import sample
from metarun.training.evaluation import adapted_outcome

REGRESS = ("matching", "r2d2")  # of the methods on features
CLASSIFIERS = [
    name
    for name in ALGORITHMS
    if facts(CONF / f"algorithm/{name}.yaml")["family"] == "features" and name not in REGRESS
]


VALUES = [name for name in ALGORITHMS if name not in (*CLASSIFIERS, "meta_nas", "metagan_maml", "platipus")]


@pytest.mark.parametrize("name", VALUES)
def test_an_algorithm_learns_values(name: str):
    """An outer step, an evaluation and an adaptation; tests/commands/test_train.py has the command line."""
    torch.manual_seed(0)
    settings = composed("train", "dataset=sinusoid", f"algorithm={name}", "hardware=cpu")
    algorithm = built(settings)
    source = build_dataset(typed(settings).dataset).load("train", torch.device("cpu"))
    shape = EpisodeShape(settings.ways, settings.shots, settings.queries)
    tasks = sample(source, 3, shape, torch.Generator().manual_seed(0))
    before = [p.detach().clone() for p in algorithm.parameters()]
    engine_of(algorithm, tasks, precision="float32").step()
    assert not all(map(torch.equal, before, algorithm.parameters()))
    with torch.no_grad():
        outcome = adapted_outcome(algorithm.eval(), tasks, torch.float32)
        rows, _, outputs = follow(algorithm, Task(tasks.map(lambda tensor: tensor[:1]), True, [], []))
    expected = (outputs - tasks.query_y[:1]).square().mean().item()  # one value of each example
    for found in (outcome.loss[0].item(), outcome.scores["mse"][0].item(), rows[-1]["query mse"]):
        assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", [*VALUES, "platipus"])
def test_an_algorithm_learns_distributions(name: str):
    """On functions of Gaussian processes, where some of the support is left out; or says that it cannot."""
    torch.manual_seed(0)
    words = ("train", "dataset=gp", f"algorithm={name}", "shots=4", "queries=3", "hardware=cpu")
    settings = composed(*words)
    if name in (*REGRESS, "hsml", "mmaml"):
        with pytest.raises(ConfigError, match="predicts values without an uncertainty"):
            built(settings)
        settings = composed(*words, "dataset.likelihood=null")
    algorithm = built(settings)
    source = build_dataset(typed(settings).dataset).load("train", torch.device("cpu"))
    tasks = sample(source, 3, EpisodeShape(1, 4, 3), torch.Generator().manual_seed(0))
    assert not tasks.there.all()
    engine_of(algorithm, tasks, precision="float32").step()
    with torch.no_grad():
        outcome = adapted_outcome(algorithm.eval(), tasks, torch.float32)
    means = source.spec.objective.to_units(outcome.outputs)
    expected = (means - tasks.query_y).square().mean((1, 2))
    torch.testing.assert_close(outcome.scores["mse"], expected)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_method_that_classifies_says_so(name: str):
    settings = composed("train", "dataset=sinusoid", "backbone=mlp", f"algorithm={name}")
    source = build_dataset(typed(settings).dataset).load("train", torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"needs tasks with classes|takes images"):
        built(settings).on_run_start(source)
