"""The glyphs dataset: the same settings give the same drawings, and they are worth learning from."""

import pytest
import torch

from metarun.datasets.glyphs import BLOCK, STROKES, Glyphs, draw_tokens, render, sample_types
from metarun.errors import ConfigError
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.sampling import sample

pytestmark = pytest.mark.quick


def small(**settings):
    return Glyphs(**{"train_classes": 6, "validation_classes": 6, "test_classes": 6} | settings)


def test_shape_type_and_names():
    glyphs = small(images_per_class=5, size=20)
    store = glyphs.split("validation")
    assert glyphs.item_shape == store.item_shape == (1, 20, 20)
    assert store.items.shape == (30, 1, 20, 20) and store.items.dtype == torch.uint8
    assert store.names == [f"validation {index}" for index in range(6)]
    assert store.counts.tolist() == [5] * 6


def test_same_settings_same_images_whatever_the_number_of_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        once = small().split("train")
    finally:
        torch.set_num_threads(threads)
    torch.rand(3)  # the global generator plays no part
    assert small().split("train").fingerprint == once.fingerprint
    assert small(seed=1).split("train").fingerprint != once.fingerprint


def test_more_classes_keep_the_first():
    few = small(train_classes=BLOCK + 3).split("train").items
    more = small(train_classes=2 * BLOCK + 1).split("train").items
    assert len(few) == 20 * (BLOCK + 3) and len(more) == 20 * (2 * BLOCK + 1)
    assert torch.equal(more[: len(few)], few)


def test_no_image_comes_twice_in_any_split_or_seed():
    datasets = [small(train_classes=2 * BLOCK, images_per_class=5, seed=seed) for seed in (0, 1)]
    stores = [glyphs.split(split) for glyphs in datasets for split in ("train", "validation", "test")]
    images = torch.cat([store.items for store in stores]).flatten(1)
    assert len(images) == 2 * 5 * (2 * BLOCK + 6 + 6)
    assert len(images.unique(dim=0)) == len(images)


def test_every_image_has_ink_on_a_dark_ground():
    images = Glyphs(train_classes=100).split("train").items.float() / 255
    assert (images.amax((1, 2, 3)) > 0.9).all()
    assert images.mean((1, 2, 3)).max() < 0.4
    assert 0.06 < images.mean() < 0.12  # Omniglot's at this size is 0.08


def test_absent_strokes_leave_no_ink():
    types = sample_types(BLOCK, torch.Generator().manual_seed(0))
    strokes, pens = draw_tokens(types, 3, torch.Generator().manual_seed(1))
    present = (types.lengths > 0).any(-1).sum(1)  # strokes of each character
    assert set(present.tolist()) == {1, 2, 3, 4}
    for index in range(BLOCK):
        there, absent = strokes[index].tensor_split([int(present[index])], dim=1)  # each [e, s, n, 2]
        low, high = there.flatten(1, 2).aminmax(dim=1)
        lying = absent.flatten(1, 2)  # within the others' bounds, or the character would not be centred
        assert (lying >= low[:, None] - 1e-9).all() and (lying <= high[:, None] + 1e-9).all()
        assert torch.equal(render(there, pens[index], 28), render(strokes[index], pens[index], 28))
    assert strokes.shape[2] == STROKES


def test_ink_lies_where_the_pen_went():
    line = torch.stack([torch.linspace(0.25, 0.75, 9), torch.full((9,), 0.5)], -1).double()  # to the right
    image = render(line[None, None], torch.tensor([0.02]).double(), 21)[0]
    assert image[10, 6:15].eq(255).all()
    assert image[[8, 12]].max() < 60 and image[:, [3, 17]].max() < 60


def test_as_hard_as_omniglot_for_nearest_neighbours_in_pixels():
    store = Glyphs(train_classes=200).split("train")
    accuracy = nearest_neighbour_accuracy(store)
    assert 0.45 < accuracy < 0.58, accuracy  # Omniglot's is 0.44; chance is 0.2


def nearest_neighbour_accuracy(store):
    episodes = sample(store, 400, EpisodeShape(5, 1, 5), torch.Generator().manual_seed(0))
    distances = torch.cdist(episodes.query_x.flatten(2), episodes.support_x.flatten(2))  # [T, N*Q, N]
    return (distances.argmin(-1) == episodes.query_y).float().mean().item()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("train_classes", 0),
        ("validation_classes", -1),
        ("test_classes", 2.5),
        ("images_per_class", 1),
        ("size", 7),
        ("seed", -1),
        ("seed", True),
        ("size", "28"),
    ],
)
def test_settings_refused(setting, value):
    with pytest.raises(
        ConfigError, match=rf"^dataset\.{setting}={value!r}: choose a whole number of at least \d$"
    ):
        Glyphs(**{setting: value})
