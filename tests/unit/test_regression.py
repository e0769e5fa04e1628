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


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name not in (*CLASSIFIERS, "meta_nas")])
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


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_method_that_classifies_says_so(name: str):
    settings = composed("train", "dataset=sinusoid", "backbone=mlp", f"algorithm={name}")
    source = build_dataset(typed(settings).dataset).load("train", torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"needs tasks with classes|takes images"):
        built(settings).on_run_start(source)
