"""Random choice without replacement."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
import torch

from metarun.datasets.mixture import MixtureStore
from metarun.tasks import class_store
from metarun.tasks.choice import by_keys, by_redrawing, different, repeated
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.sampling import seeded

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("count", [3, 5, 9])
def test_every_ordered_choice_is_equally_likely(count: int):
    """All counts of ordered choices of 3 within four standard errors; a count of 3 wants every number."""
    rows = 40_000
    found = by_redrawing(torch.full((rows,), count), 3, seeded("rows"))
    seen = Counter(map(tuple, found.tolist()))
    expected = list(itertools.permutations(range(count), 3))
    assert set(seen) == set(expected)
    share = 1 / len(expected)
    assert max(abs(n / rows - share) for n in seen.values()) < 4.5 * (share * (1 - share) / rows) ** 0.5


def test_each_row_has_its_own_count():
    counts = torch.tensor([[10, 11, 60_000], [2_000_000_000, 15, 19]])
    found = by_redrawing(counts, 10, seeded("rows"))
    assert found.shape == (2, 3, 10)
    assert ((found >= 0) & (found < counts[..., None])).all()
    assert all(len(set(row)) == 10 for row in found.flatten(0, 1).tolist())
    assert found[1, 0].max() > 1_000_000_000


def test_a_large_class_costs_no_more_than_a_small_one(monkeypatch):
    """Counted in random numbers: at most two for each item, and one for each class of each task."""
    drawn = []
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *size, **kw: drawn.append(rand(*size, **kw)) or drawn[-1])
    counts = [60_000, 30, *[600] * 18]
    items = torch.zeros(sum(counts), 1, 1, 1, dtype=torch.uint8)
    store = ClassStore(items, counts, [str(i) for i in range(20)], "large", fingerprint="x")
    store.draw(256, EpisodeShape(5, 1, 15), seeded("tasks"))
    assert sum(numbers.numel() for numbers in drawn) < 256 * (20 + 2 * 5 * 16)


def test_small_classes_keep_the_tasks_of_a_seed():
    """Keys for every item, as always: results of earlier versions can be repeated."""
    counts = torch.tensor([[7, 20]])
    keys = torch.rand(1, 2, 20, generator=seeded("rows"))
    keys[0, 0, 7:] = -1
    found = different(counts, 5, 20, class_store.MANY_ITEMS, seeded("rows"))
    assert torch.equal(found, keys.topk(5).indices)
    assert torch.equal(found, by_keys(counts, 5, 20, seeded("rows")))
    assert not torch.equal(found, different(counts, 5, 20, 19, seeded("rows")))


def test_of_many_classes_all_of_a_task_are_from_one_dataset(monkeypatch):
    monkeypatch.setattr("metarun.datasets.mixture.MANY_CLASSES", 10)
    stores = {
        name: ClassStore(
            torch.zeros(n, 1, 1, 1, dtype=torch.uint8), [1] * n, [f"{name}{i}" for i in range(n)], name
        )
        for name, n in {"p": 4, "q": 9, "r": 6}.items()
    }
    mixture = MixtureStore(stores, [1.0, 0.5, 2.0], "mixture", "cpu").keeping(
        [*range(13), 14, 15, 16, 17, 18]
    )
    classes = mixture.draw_classes(4000, 3, seeded("tasks"))
    tasks = [[mixture.names[i] for i in row] for row in classes.tolist()]
    assert all(len(set(row)) == 3 and len({name[0] for name in row}) == 1 for row in tasks)
    shares = Counter(row[0][0] for row in tasks)
    for name, share in {"p": 1 / 3.5, "q": 0.5 / 3.5, "r": 2 / 3.5}.items():
        assert abs(shares[name] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert {name for row in tasks for name in row} == set(mixture.names)


def test_repeated_marks_all_but_the_first():
    found = repeated(torch.tensor([[3, 1, 3, 3, 1], [0, 1, 2, 3, 4]]))
    assert found.tolist() == [[False, False, True, True, True], [False] * 5]
