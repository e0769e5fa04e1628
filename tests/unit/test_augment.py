"""Augmentation, each change against what it is by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.transforms.v2.functional import resized_crop

from metarun.datasets.augment import OF_BOX, Augment, boxes
from metarun.errors import ConfigError
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.sampling import sample

pytestmark = pytest.mark.quick

IMAGES = torch.rand(3, 3, 8, 10, generator=torch.Generator().manual_seed(0))
STILL = [0.5] * 7  # no rotation, no mirror, no shift, no change of colour


def changed(augment: Augment, **numbers: float) -> torch.Tensor:
    places = {"angle": 0, "mirror": 1, "right": 2, "down": 3, "brightness": 4, "contrast": 5, "saturation": 6}
    row = list(STILL)
    for name, value in numbers.items():
        row[places[name]] = value
    return augment(IMAGES, torch.tensor([row] * 3))


def test_half_of_every_number_changes_nothing():
    torch.testing.assert_close(changed(Augment(crop=2, rotation=30)), IMAGES)


def test_a_shift_is_a_crop_of_the_padded_image():
    found = changed(Augment(crop=2, flip=False, colour=0), right=0.999, down=0.0)
    padded = torch.nn.functional.pad(IMAGES, (2, 2, 2, 2))
    torch.testing.assert_close(found, padded[:, :, 0:8, 4:14], atol=1e-5, rtol=0)


def test_a_mirror_image():
    torch.testing.assert_close(changed(Augment(crop=0, colour=0), mirror=0.1), IMAGES.flip(-1))


def test_a_quarter_turn_of_a_square():
    augment = Augment(crop=0, flip=False, colour=0, rotation=90)
    square = IMAGES[..., :8]
    found = augment(square, torch.tensor([[1.0, *STILL[1:]]] * 3))
    either = [square.rot90(k, (-2, -1)) for k in (1, 3)]
    assert any(torch.allclose(found, turned, atol=1e-5) for turned in either)


def test_colours():
    augment = Augment(crop=0, flip=False, colour=0.5)
    brighter = changed(augment, brightness=1.0)
    torch.testing.assert_close(brighter, (1.5 * IMAGES).clamp(0, 1))
    mean = IMAGES.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(changed(augment, contrast=0.0), mean + 0.5 * (IMAGES - mean))
    grey = IMAGES.mean(1, keepdim=True)
    torch.testing.assert_close(changed(augment, saturation=0.0), grey + 0.5 * (IMAGES - grey))


def test_settings_that_cannot_be():
    for settings in ({"crop": -1}, {"rotation": -1.0}, {"colour": 1.5}, {"scale": [0, 2]}, {"ratio": [2, 1]}):
        with pytest.raises(ConfigError, match=f"augment.{next(iter(settings))}"):
            Augment(**settings)


def test_a_store_changes_each_image_by_numbers_of_its_draw():
    pixels = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    store = ClassStore(pixels, [10] * 4, list("abcd"), "test")
    shape = EpisodeShape(2, 1, 3)
    plain = sample(store, 2, shape, torch.Generator().manual_seed(1))
    store.augment = Augment()
    first, again = (sample(store, 2, shape, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first.support_x, again.support_x)
    assert torch.equal(first.classes, plain.classes)  # the same tasks
    assert not torch.equal(first.support_x, plain.support_x)


def test_a_smaller_image_is_in_the_middle():
    whole = torch.ones(1, 1, 20, 20)
    small = Augment(crop=0, flip=False, colour=0, zoom=0.5)(whole, torch.tensor([[*STILL, 0.0]]))
    assert small[..., 6:14, 6:14].min() == 1 and small.sum() == pytest.approx(100, abs=25)
    assert small[..., :4, :].sum() == small[..., :, -4:].sum() == 0
    larger = Augment(crop=0, flip=False, colour=0, zoom=0.5)(small, torch.tensor([[*STILL, 1.0]]))
    assert larger.sum() > 1.5 * small.sum()


def test_pixels_are_dropped_by_chance():
    numbers = torch.rand(400, 8, generator=torch.Generator().manual_seed(0))
    kept = Augment(crop=0, flip=False, colour=0, drop=0.3)(torch.ones(400, 2, 9, 11), numbers)
    assert ((kept == 0) | (kept == 1)).all() and (kept[:, 0] == kept[:, 1]).all()  # all channels of a pixel
    own = kept[:, 0].flatten(1)
    error = 4 * (0.21 / 400) ** 0.5
    assert (own.mean(0) - 0.7).abs().max() < error  # of every pixel, over images
    assert abs(own.mean().item() - 0.7) < 0.01 and len(own.unique(dim=0)) == 400
    both = torch.corrcoef(own.T) - torch.eye(99)
    assert both.abs().max() < 0.3  # pixels are independent of each other


def test_rows_are_moved_in_proportion_to_their_distance_from_the_middle():
    line = torch.zeros(1, 1, 21, 41)
    line[..., 20] = 1
    found = Augment(crop=0, flip=False, colour=0, shear=0.5)(line, torch.tensor([[*STILL, 1.0]]))
    centres = (found[0, 0] * torch.arange(41)).sum(1) / found[0, 0].sum(1)
    torch.testing.assert_close(centres, 20 - 0.5 * (torch.arange(21.0) - 10), atol=1e-3, rtol=0)


def box_of_torchvision(row: list[float], height: int, width: int, scale, ratio) -> tuple[int, int, int, int]:
    """`RandomResizedCrop.make_params` of torchvision with given random numbers: top, left, height, width."""
    sizes = iter(row[2:])
    for share, place in zip(sizes, sizes, strict=True):
        area = height * width * (scale[0] + share * (scale[1] - scale[0]))
        aspect = math.exp(math.log(ratio[0]) + place * (math.log(ratio[1]) - math.log(ratio[0])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(row[0] * (height - h + 1)), int(row[1] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(
    ("shape", "scale", "ratio"),
    [
        ((12, 12), (0.08, 1.0), (0.75, 4 / 3)),
        ((9, 14), (0.9, 1.0), (0.5, 1.2)),
        ((14, 9), (1.0, 1.0), (1, 1)),
    ],
)
def test_crops_of_random_sizes_are_those_of_torchvision(shape, scale, ratio):
    """The later ones of these are parts of which hardly any, or none, of ten sizes fits."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(50, 2, *shape, generator=generator, dtype=torch.float64)
    numbers = torch.rand(50, 7 + OF_BOX, generator=generator, dtype=torch.float64)
    found = Augment(crop=0, flip=False, colour=0, scale=scale, ratio=ratio)(images, numbers)
    for row, image, changed in zip(numbers[:, 7:].tolist(), images, found, strict=True):
        box = box_of_torchvision(row, *shape, scale, ratio)
        torch.testing.assert_close(changed, resized_crop(image, *box, size=list(shape), antialias=True))


@pytest.mark.parametrize("settings", [{}, {"crop": 0, "scale": [0.2, 1.0]}])
def test_images_are_changed_in_full_precision_under_autocast(settings):
    """In bfloat16, pixels would come from places that are wrong by a part of a pixel."""
    augment = Augment(**settings)
    images = torch.rand(4, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    numbers = torch.rand(4, augment.numbers, generator=torch.Generator().manual_seed(1))
    expected = augment(images, numbers)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(images, numbers), expected)


@pytest.mark.parametrize("scale", [[], [0.5], [0.8, 0.2]])
def test_bounds_of_a_crop_are_two_numbers(scale):
    with pytest.raises(ConfigError, match=r"augment\.scale=\[.*must be two numbers above 0"):
        Augment(scale=scale)


def test_a_crop_has_the_numbers_behind_those_of_zoom_and_shear():
    augment = Augment(crop=0, flip=False, colour=0, zoom=0.1, shear=0.1, drop=0.5, scale=[0.5, 0.5])
    assert augment.numbers == 7 + 2 + OF_BOX + 1
    whole = [0.0, 0.0, *[0.5] * (OF_BOX - 2)]
    (top, left, height, width) = boxes(torch.tensor([whole]), 8, 8, (1.0, 1.0), (1.0, 1.0))
    assert [each.item() for each in (top, left, height, width)] == [0, 0, 8, 8]
    numbers = torch.tensor([[*STILL, 0.5, 0.5, *whole, 0.0]] * 3)
    augment.drop = 0.0
    corner = augment(IMAGES[..., :8], numbers)
    torch.testing.assert_close(corner, resized_crop(IMAGES[..., :8], 0, 0, 6, 6, [8, 8], antialias=True))
