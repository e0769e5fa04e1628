"""Tasks of different ways and shots: their sizes against a plain loop after the paper, and their examples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from metarun.datasets.mixture import MixtureStore
from metarun.errors import DataError
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import Episodes, EpisodeShape, UnequalEpisodes

SHAPE = EpisodeShape(ways=12, shots=6, queries=10, varied=True)
COUNTS = [*range(4, 20), 30, 60]


def store_of(counts: list[int], name: str = "test", first: int = 0) -> ClassStore:
    """A class store in which every item is the number of its class and its own number."""
    items = torch.tensor([[first + c, i] for c, n in enumerate(counts) for i in range(n)], dtype=torch.uint8)
    return ClassStore(
        items, counts, [f"class {first + c}" for c in range(len(counts))], name, decode=torch.Tensor.float
    )


def sizes_by_hand(counts: list[int], rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """(size of the class, shots, queries) of each way: Triantafillou et al., section 3.2."""
    ways = rng.integers(5, min(12, len(counts)) + 1)
    sizes = [counts[i] for i in rng.permutation(len(counts))[:ways]]
    queries = min(10, min(size // 2 for size in sizes))
    beta = 1 - rng.random()  # in (0, 1]
    support = min(500, sum(int(np.ceil(beta * min(6, size - queries))) for size in sizes))
    weights = [np.exp(rng.uniform(np.log(0.5), np.log(2))) * size for size in sizes]
    shots = [
        min(int(weight / sum(weights) * (support - ways)) + 1, size - queries)
        for weight, size in zip(weights, sizes, strict=True)
    ]
    return [(size, own, queries) for size, own in zip(sizes, shots, strict=True)]


def summary(tasks: list[list[tuple[int, int, int]]]) -> np.ndarray:
    """Numbers that describe the sizes of tasks: means, shares, and a correlation."""
    rows = np.array([row for task in tasks for row in task], dtype=float)
    ways = np.array([len(task) for task in tasks])
    support = np.array([sum(shots for _, shots, _ in task) for task in tasks])
    shares = [(ways == n).mean() for n in (5, 8, 12)] + [(rows[:, 1] == k).mean() for k in (1, 2, 4)]
    return np.array([ways.mean() / 10, support.mean() / 30, support.std() / 15, rows[:, 1].std() / 3,
                     rows[:, 2].mean() / 4, *shares, np.corrcoef(rows[:, 0], rows[:, 1])[0, 1]])  # fmt: skip


def test_sizes_are_distributed_as_in_the_paper():
    store, tasks = store_of(COUNTS), 3000
    classes, shots, queries, *_ = store.draw(tasks, SHAPE, torch.Generator().manual_seed(0))
    drawn = [
        [(COUNTS[c], k, q) for c, k in zip(own, task, strict=True) if k]
        for own, task, q in zip(classes.tolist(), shots.tolist(), queries.tolist(), strict=True)
    ]
    rng = np.random.default_rng(0)
    expected = [sizes_by_hand(COUNTS, rng) for _ in range(tasks)]
    np.testing.assert_allclose(summary(drawn), summary(expected), atol=0.03)
    assert {len(task) for task in drawn} == set(range(5, 13))


def test_the_support_has_at_most_500_examples():
    store = store_of([120] * 50)
    shape = EpisodeShape(ways=50, shots=100, queries=10, varied=True)
    _, shots, queries, items = store.draw(200, shape, torch.Generator().manual_seed(1))
    ways, support = (shots > 0).sum(1), shots.sum(1)
    assert (ways <= support).all() and (support <= 500).all() and support.max() > 450
    assert queries.eq(10).all() and ((items >= 0).sum(1) == support + 10 * ways).all()


def test_examples_are_different_ones_of_their_classes():
    store = store_of(COUNTS)
    draw = store.draw(20, SHAPE, torch.Generator().manual_seed(2))
    tasks = store.gather(draw, SHAPE)
    assert isinstance(tasks, UnequalEpisodes) and len(tasks) == 20
    for task, shots in zip(tasks.tasks, draw[1], strict=True):
        assert task.classes is not None and task.support_y[0].bincount().tolist() == shots[shots > 0].tolist()
        assert len(set(task.query_y[0].bincount().tolist())) == 1
        x, y = (
            torch.cat(pair, 1)[0] for pair in ((task.support_x, task.query_x), (task.support_y, task.query_y))
        )
        assert torch.equal(x[:, 0].long(), task.classes[0][y])
        assert len(x.unique(dim=0)) == len(x)  # the queries are not in the support
    alone = store.gather(tuple(tensor[3:4] for tensor in draw), SHAPE)
    assert isinstance(alone, Episodes) and torch.equal(alone.support_x, tasks.tasks[3].support_x)
    assert alone.support_weights is not None  # every class counts equally


def test_a_task_of_a_mixture_has_classes_of_one_part():
    parts = {"few": store_of([9] * 6), "many": store_of([12] * 30, first=6)}
    store = MixtureStore(parts, [1.0, 1.0], "mixture", "cpu")
    classes, shots, *_ = store.draw(400, SHAPE, torch.Generator().manual_seed(3))
    owners = [set(store.owners[own[k > 0]].tolist()) for own, k in zip(classes, shots, strict=True)]
    assert all(len(each) == 1 for each in owners)
    ways = torch.tensor([int((k > 0).sum()) for k in shots])
    few = torch.tensor([each == {0} for each in owners])
    assert set(ways[few].tolist()) == {5, 6} and set(ways[~few].tolist()) == set(range(5, 13))


def test_what_is_needed_of_the_classes():
    store_of([2] * 5).check(SHAPE)  # fewer classes than ways
    with pytest.raises(DataError, match="has 4 classes"):
        store_of([9] * 4).check(SHAPE)
    with pytest.raises(DataError, match="need 2 examples"):
        store_of([1, 9, 9, 9, 9]).check(SHAPE)


def test_a_run_that_goes_on_is_one_run_and_eval_has_its_tasks(metarun):
    small = [f"dataset.{split}_classes=20" for split in ("train", "validation", "test")]
    small += [
        "dataset=glyphs",
        "dataset.size=16",
        "backbone.width=4",
        "hardware=cpu",
        "log.tensorboard=false",
    ]
    run = [
        *small,
        "varied=true",
        "ways=30",
        "shots=9",
        "meta_batch=2",
        "validation.episodes=2",
        "test.episodes=0",
    ]
    metarun("train", *run, "iterations=3", "hydra.run.dir=whole")
    metarun("train", *run, "iterations=1", "hydra.run.dir=half")
    metarun("train", "resume=half", "iterations=3")
    whole, half = (torch.load(f"{run}/last.pt", weights_only=True)["algorithm"] for run in ("whole", "half"))
    assert all(torch.equal(value, half[name]) for name, value in whole.items())
    done = metarun("eval", "checkpoint=whole", "episodes=3", "confusion=true", "hydra.run.dir=out")
    assert "varied, up to 30-way" in done.stdout
    (row,) = json.loads(Path("out/results.json").read_text())["results"]
    assert row["episodes"] == 3 and row["ways"] is None
    failed = metarun("train", "dataset=sinusoid", "varied=true", status=1)
    assert "varied=true: sinusoid train has no tasks of different ways and shots" in failed.stderr
