"""A user's images of every kind, as pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from metarun.datasets import images

pytestmark = pytest.mark.quick

RAMP = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)


def saved(tmp_path: Path, image: Image.Image, name: str = "a.png", **settings) -> Image.Image:
    image.save(tmp_path / name, **settings)
    return images.read(tmp_path / name)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "CMYK"])
def test_every_mode_gives_the_same_grey_levels(tmp_path: Path, mode: str):
    name = "a.tif" if mode == "CMYK" else "a.png"
    grey = Image.fromarray(RAMP)
    made = grey.convert(mode) if mode == "P" else grey.convert("RGB").convert(mode)
    image = saved(tmp_path, made, name)
    assert image.mode in ("L", "RGB")
    assert np.abs(np.asarray(image.convert("L")).astype(int) - RAMP).max() <= 2


def test_sixteen_bits_are_scaled_not_cut(tmp_path: Path):
    image = saved(tmp_path, Image.fromarray(RAMP.astype(np.uint16) * 257))
    assert np.abs(np.asarray(image).astype(int) - RAMP).max() <= 1


def test_transparency_is_laid_on_a_ground_that_shows_the_ink(tmp_path: Path):
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    clear.putpixel((1, 1), (10, 10, 10, 255))
    assert np.asarray(saved(tmp_path, clear).convert("L")).tolist()[0] == [255] * 4
    clear.putpixel((1, 1), (250, 250, 250, 255))  # white ink would vanish on white
    assert np.asarray(saved(tmp_path, clear).convert("L")).tolist()[0] == [0] * 4


def test_a_camera_held_sideways_is_turned_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    image = saved(tmp_path, Image.fromarray(np.vstack([RAMP, RAMP])), "a.jpg", exif=exif)
    assert image.size == (16, 8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "gif", "bmp"])
def test_an_image_can_be_used_after_its_file_was_closed(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RAMP).resize((32, 32)).save(path)
    image = images.read(path)
    path.unlink()
    assert images.to_array(image, (3, 8, 8)).shape == (3, 8, 8)
    assert np.abs(images.to_array(image, (1, 8, 8))[0].astype(int) - RAMP).mean() < 16


def test_proportions_are_kept_and_the_ground_filled(tmp_path: Path):
    wide = Image.new("L", (40, 10), 255)
    batch = images.to_batch([wide, Image.new("L", (3, 50), 0)], (1, 20, 20))
    assert batch.shape == (2, 1, 20, 20)
    assert batch[0].min() == 1 and batch[1].max() == 0
    colour = images.to_batch([wide.convert("RGB")], (3, 16, 16))
    assert colour.shape == (1, 3, 16, 16)


def test_polarity_is_seen_in_the_border_and_drawings_are_stretched():
    page = np.full((30, 30), 230, dtype=np.uint8)
    page[10:20, 14:16] = 60
    drawing = Image.fromarray(page)
    assert images.ink_of([drawing]) == "dark"
    assert images.ink_of([Image.fromarray(255 - page)]) == "light"
    dark = images.as_drawings(images.to_batch([drawing], (1, 30, 30)), "dark")
    light = images.as_drawings(images.to_batch([Image.fromarray(255 - page)], (1, 30, 30)), "light")
    torch.testing.assert_close(dark, light)
    assert dark.max() == 1 and dark.min() == 0 and dark[0, 0, 15, 15] == 1
