"""`dataset=pixels` against the images themselves."""

from __future__ import annotations

import pytest
import torch

from metarun.datasets.pixels import Pixels, PixelSource, image_of
from metarun.errors import DataError
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.sampling import sample

pytestmark = pytest.mark.quick
SIZE = 5


def source(fewest: int | None = None) -> PixelSource:
    items = torch.randint(256, (6, 1, SIZE, SIZE), generator=torch.Generator().manual_seed(0))
    store = ClassStore(items.to(torch.uint8), [3, 3], names=["a", "b"], name="mine", device="cpu")
    return PixelSource(Pixels().spec, store, fewest, "cpu")


def test_the_pixels_of_a_task_are_those_of_one_image():
    own = source()
    shape = own.pictured(EpisodeShape(1, 7, 3))
    assert shape.queries == SIZE * SIZE - 7
    draw = own.draw(20, shape, torch.Generator().manual_seed(0))
    tasks = own.gather(draw, shape)
    for t in range(20):
        x, y = (
            torch.cat([tasks.support_x[t], tasks.query_x[t]]),
            torch.cat([tasks.support_y[t], tasks.query_y[t]]),
        )
        found = (image_of(x, y, SIZE) + 0.5) * 255
        torch.testing.assert_close(found, own.images[draw[0][t, 0]].float())
    assert len(draw[0].unique()) == 6
    corner = tasks.query_x.flatten(0, 1).amin(0), tasks.query_x.flatten(0, 1).amax(0)
    assert [each.tolist() for each in corner] == [[-1, -1], [1, 1]]


def test_training_tasks_leave_pixels_out_and_too_many_are_refused():
    tasks = sample(source(fewest=2), 200, EpisodeShape(1, 5, 4), torch.Generator().manual_seed(0))
    assert set(tasks.there.sum(1).tolist()) == {2, 3, 4, 5}
    torch.testing.assert_close(tasks.support_weights.mean(1), torch.ones(200))
    with pytest.raises(DataError, match="shots=20, queries=6: an image of pixels of mine has 25 pixels"):
        source().check(EpisodeShape(1, 20, 6))
