"""The class store and its sampler."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from metarun.datasets.sinusoid import Sinusoid
from metarun.errors import DataError
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import Episodes, EpisodeShape
from metarun.tasks.sampling import TRAINING_BLOCK, sample, training_draws
from metarun.tasks.source import split_draw

pytestmark = pytest.mark.quick

COUNTS = [5, 9, 4, 6]


def store(counts: list[int] = COUNTS) -> ClassStore:
    """Images whose pixels tell their class (first pixel) and place in it (second)."""
    rows = [(k, i) for k, count in enumerate(counts) for i in range(count)]
    images = torch.zeros(len(rows), 1, 1, 2, dtype=torch.uint8)
    images[:, 0, 0] = torch.tensor(rows, dtype=torch.uint8)
    return ClassStore(images, counts, [f"class {k}" for k in range(len(counts))], "made up")


def drawn(tasks: int = 300, seed: int = 0) -> Episodes:
    return sample(store(), tasks, EpisodeShape(3, 1, 3), torch.Generator().manual_seed(seed))


def identity(x: Tensor) -> Tensor:
    """(class, place) of images [T, B, 1, 1, 2]."""
    return (x * 255).round().long().flatten(2)


def test_episodes_have_the_shapes_and_labels_of_their_geometry():
    episodes = drawn()
    assert episodes.support_x.shape == (300, 3, 1, 1, 2)
    assert episodes.query_x.shape == (300, 9, 1, 1, 2)
    assert episodes.support_y.tolist()[0] == [0, 1, 2]
    assert episodes.query_y.tolist()[0] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    classes = identity(episodes.query_x)[..., 0]
    assert torch.equal(classes, episodes.classes.gather(1, episodes.query_y))


def test_nothing_is_drawn_twice_in_a_task():
    episodes = drawn()
    assert all(len(set(row)) == 3 for row in episodes.classes.tolist())
    images = torch.cat([identity(episodes.support_x), identity(episodes.query_x)], 1)
    assert all(len({tuple(pair) for pair in task}) == 12 for task in images.tolist())


def test_every_class_and_image_is_drawn_as_often_as_the_others():
    """Class frequencies, and in the largest class image frequencies, within four standard errors."""
    episodes = drawn(tasks=4000)
    share = torch.bincount(episodes.classes.flatten(), minlength=4) / 4000
    assert (share - 0.75).abs().max() < 4 * (0.75 * 0.25 / 4000) ** 0.5
    shots = identity(episodes.support_x).flatten(0, 1)
    places = shots[shots[:, 0] == 1, 1]
    share = torch.bincount(places, minlength=9) / len(places)
    assert (share - 1 / 9).abs().max() < 4 * (1 / 9 * 8 / 9 / len(places)) ** 0.5


def test_the_generator_decides():
    assert torch.equal(drawn(seed=1).query_x, drawn(seed=1).query_x)
    assert not torch.equal(drawn(seed=1).query_x, drawn(seed=2).query_x)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (EpisodeShape(5, 1, 1), "ways=5: made up has 4 classes; lower ways to at most 4"),
        (EpisodeShape(2, 2, 3), "class 'class 2' of made up has 4"),
    ],
)
def test_impossible_geometries_are_refused(shape: EpisodeShape, message: str):
    with pytest.raises(DataError, match=message):
        store().check(shape)
    store().check(EpisodeShape(4, 1, 3))


def test_the_fingerprint_tells_data_apart():
    assert store().fingerprint == store().fingerprint
    assert store().fingerprint != store([9, 5, 4, 6]).fingerprint


def test_the_parts_of_a_draw_are_even_and_the_whole():
    shape = EpisodeShape(3, 1, 3)
    draw = store().draw(7, shape, torch.Generator().manual_seed(0))
    parts = list(split_draw(draw, 3))
    assert [len(part[0]) for part in parts] == [3, 2, 2]
    for whole, *pieces in zip(draw, *parts, strict=True):
        assert torch.equal(torch.cat(pieces), whole)


def test_what_is_drawn_at_an_iteration_depends_on_the_seed_and_the_iteration_alone():
    shape = EpisodeShape(3, 1, 3)

    def drawn(seed: int, start: int, count: int) -> list[Tensor]:
        draws = training_draws(store(), 2, shape, seed, start)
        return [torch.cat([t.flatten() for t in draw]) for draw in itertools.islice(draws, count)]

    whole = drawn(0, 0, 2 * TRAINING_BLOCK)
    for start in (1, TRAINING_BLOCK - 1, TRAINING_BLOCK):
        for a, b in zip(whole[start:], drawn(0, start, 2 * TRAINING_BLOCK - start), strict=True):
            assert torch.equal(a, b)
    assert len({tuple(t.tolist()) for t in whole}) == len(whole)
    assert not torch.equal(whole[0], drawn(1, 0, 1)[0])


def test_sinusoids_are_what_the_paper_says():
    source = Sinusoid().split("train")
    shape = EpisodeShape(1, 10, 10)
    draw = source.draw(5000, shape, torch.Generator().manual_seed(0))
    amplitude, phase, x = draw
    for values, low, high in ((amplitude, 0.1, 5.0), (phase, 0.0, torch.pi), (x, -5.0, 5.0)):
        assert low <= values.min() < low + 0.05 * (high - low)
        assert high >= values.max() > high - 0.05 * (high - low)
    episodes = source.gather(draw, shape)
    torch.testing.assert_close(episodes.query_y[7, 3], amplitude[7, 0] * torch.sin(x[7, 13] + phase[7, 0]))
    assert episodes.support_x.shape == episodes.support_y.shape == (5000, 10, 1)
    varied = Sinusoid(frequency=(0.8, 1.2)).split("train")
    *same, frequency = varied.draw(5000, shape, torch.Generator().manual_seed(0))
    assert all(map(torch.equal, same, draw)) and varied.fingerprint != source.fingerprint
    assert 0.8 <= frequency.min() < 0.81 and 1.19 < frequency.max() <= 1.2
    wave = amplitude[7, 0] * torch.sin(frequency[7, 0] * x[7, 13] + phase[7, 0])
    torch.testing.assert_close(varied.gather((*draw, frequency), shape).query_y[7, 3], wave)
