"""A user's images of every kind, as pixels: the preparation is decided over a whole set."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metarun.datasets import images
from metarun.datasets.drawings import balance, strokes
from metarun.datasets.glyphs import Glyphs
from metarun.datasets.image_folder import ImageFolder
from metarun.datasets.mini_imagenet import MiniImageNet
from metarun.datasets.omniglot import Omniglot
from metarun.datasets.preparation import Preparation

pytestmark = pytest.mark.quick

RAMP = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)


def saved(folder: Path, *pictures: Image.Image) -> list[partial]:
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i}.png")
    return [partial(images.opened, folder / f"{i}.png") for i in range(len(pictures))]


def flat(folder: Path, picture: Image.Image, name: str = "a.png", **settings) -> Image.Image:
    picture.save(folder / name, **settings)
    return Preparation().flat(images.read(folder / name))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "LA", "P", "CMYK"])
def test_every_mode_gives_the_same_grey_levels(tmp_path: Path, mode: str):
    name = "a.tif" if mode == "CMYK" else "a.png"
    grey = Image.fromarray(RAMP)
    made = grey.convert(mode) if mode == "P" else grey.convert("RGB").convert(mode)
    image = flat(tmp_path, made, name)
    assert image.mode in ("L", "RGB")
    assert np.abs(np.asarray(image.convert("L")).astype(int) - RAMP).max() <= 2


@pytest.mark.parametrize("white", [255, 4095, 65535])
def test_the_depth_of_dark_images_is_that_of_their_set(tmp_path: Path, capsys, white: int):
    levels = np.linspace(0, white, 64).astype(np.uint16).reshape(8, 8)
    sources = saved(tmp_path, Image.fromarray(levels // 20), Image.fromarray(levels))
    made = Preparation().with_levels(sources, "scans")
    assert made.white == white and f"{white:g} is white" in capsys.readouterr().err
    dark, light = (np.asarray(made.flat(images.read(tmp_path / f"{i}.png"))).astype(int) for i in (0, 1))
    assert np.abs(light - RAMP).max() <= 1 and np.abs(dark - RAMP / 20).max() <= 1
    assert Preparation(white=100.0).with_levels(sources, "scans").white == 100


def clear(level: int) -> Image.Image:
    """A transparent image with one opaque pixel."""
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 1), (level, level, level, 255))
    return image


@pytest.mark.parametrize(("levels", "background"), [((10, 126, 127, 128), 255), ((250, 126, 127, 128), 0)])
def test_all_transparent_images_of_a_set_get_one_background(tmp_path: Path, capsys, levels, background: int):
    sources = saved(tmp_path, *map(clear, levels))
    made = Preparation().with_levels(sources, "logos")
    assert f"laid on {made.background}" in capsys.readouterr().err
    for i, level in enumerate(levels):
        pixels = np.asarray(made.flat(images.read(tmp_path / f"{i}.png")).convert("L"))
        assert pixels[1, 1] == level and pixels[0].tolist() == [background] * 4
    asked = Preparation(background="white").with_levels(sources, "logos")
    assert asked.background == "white"


def test_a_camera_held_sideways_is_turned_upright(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    image = flat(tmp_path, Image.fromarray(np.vstack([RAMP, RAMP])), "a.jpg", exif=exif)
    assert image.size == (16, 8)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "gif", "bmp"])
def test_an_image_can_be_used_after_its_file_was_closed(tmp_path: Path, suffix: str):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RAMP).resize((32, 32)).save(path)
    image = images.read(path)
    path.unlink()
    assert images.to_array(image, (3, 8, 8)).shape == (3, 8, 8)
    assert np.abs(images.to_array(image, (1, 8, 8))[0].astype(int) - RAMP).mean() < 16


def test_proportions_are_kept_and_the_ground_filled():
    wide, high = Image.new("L", (40, 10), 255), Image.new("L", (3, 50), 0)
    made = Preparation()
    assert made.array(wide, (1, 20, 20)).min() == 255 and made.array(high, (1, 20, 20)).max() == 0
    assert made.array(wide.convert("RGB"), (3, 16, 16)).shape == (3, 16, 16)


SIDE = 84


@cache
def sketches() -> np.ndarray:
    """Six drawings of glyphs, in which ink is 1."""
    return Glyphs(test_classes=3, seed=11, size=SIDE).split("test").items[::7, 0].numpy()[:6] / 255


Y, X = np.mgrid[0:SIDE, 0:SIDE] / SIDE


def drawn(kind: str, ink: np.ndarray) -> Image.Image:
    """A drawing with ink in [0, 1] on paper as people photograph and scan it."""
    rng = np.random.default_rng(0)
    levels = {
        "dark": lambda: 255 - 255 * ink,
        "light": lambda: 255 * ink,
        "grey": lambda: 200 - 110 * ink,
        "dark grey": lambda: 100 - 70 * ink,  # the paper is darker than 127
        "board": lambda: 140 + 90 * ink,
        "noisy": lambda: 200 - 110 * ink + rng.normal(0, 15, ink.shape),
        "grainy": lambda: 200 - 110 * ink + rng.normal(0, 40, ink.shape),
        "shaded": lambda: (230 - 150 * ink) * (1 - 0.3 * X - 0.2 * Y * Y),
        "ruled": lambda: np.where(
            ink > 0.3, 235 - 175 * ink, np.where((Y * SIDE).round() % 12 == 8, 170, 235)
        ),
    }[kind]()
    return Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [(kind, 0.9, 4.0) for kind in ("light", "grey", "dark grey", "board", "shaded", "ruled")]
    + [("noisy", 0.9, 2.8), ("grainy", 0.5, 5.0)],
)
def test_ink_is_the_same_on_any_paper(kind: str, least: float, most: float):
    """Against the clean drawing as a plain reduction: dark ink on any paper and light ink on a board."""
    for ink in sketches():
        image = drawn(kind, ink)
        side = balance(image)
        assert side < -least if kind in ("light", "board") else side > least
        found = strokes(image, "light" if side < 0 else "dark", 28, 28).astype(float)
        plain = images.to_array(drawn("light", ink), (1, 28, 28))[0]
        assert np.abs(found - plain).mean() < most  # stretching after the reduction: 5 to 30
        assert (found == 0).mean() > (plain == 0).mean() - 0.05


def test_a_blank_sheet_stays_blank_and_faint_pencil_does_not():
    noise = np.random.default_rng(0).normal(0, 10, (SIDE, SIDE))
    sheet = Image.fromarray((200 + noise).clip(0, 255).astype(np.uint8))
    assert strokes(sheet, "dark", 28, 28).max() == 0 and abs(balance(sheet)) < 0.5
    assert strokes(Image.new("L", (9, 9), 77), "dark", 28, 28).max() == 0
    for side in (28, 105):
        noise = np.random.default_rng(0).normal(0, 20, (side, side))
        sheet = Image.fromarray((200 + noise).clip(0, 255).astype(np.uint8))
        assert strokes(sheet, "dark", 28, 28).max() == 0
    small = drawn("light", sketches()[0]).resize((28, 28), Image.Resampling.LANCZOS)
    noise = np.random.default_rng(0).normal(0, 20, (28, 28))
    grainy = Image.fromarray((200 - 110 / 255 * np.asarray(small) + noise).clip(0, 255).astype(np.uint8))
    assert np.corrcoef(strokes(grainy, "dark", 28, 28).ravel(), np.asarray(small).ravel())[0, 1] > 0.85
    pencil = Image.fromarray((220 - 30 * sketches()[0]).round().astype(np.uint8))
    assert strokes(pencil, "dark", 28, 28).max() == 255


def test_other_proportions_of_a_drawing():
    image = Image.fromarray(
        np.pad(255 - 255 * sketches()[0], ((0, 0), (SIDE // 2, SIDE // 2)), constant_values=255)
    )
    image = image.convert("L")
    padded, cropped = (strokes(image, "dark", 28, 28, how) for how in ("pad", "crop"))
    assert not padded[:7].any() and not padded[21:].any() and padded[7:21].any()
    plain = images.to_array(drawn("light", sketches()[0]), (1, 28, 28))[0]
    assert np.abs(cropped.astype(float) - plain).mean() < 4
    assert strokes(image, "dark", 28, 28, "stretch")[:7].any()


def test_the_polarity_of_a_set_and_one_sheet_that_differs(tmp_path: Path, capsys):
    sources = saved(
        tmp_path, *(drawn("grey", ink) for ink in sketches()[:-1]), drawn("light", sketches()[-1])
    )
    made = Preparation(ink="auto").with_ink(sources, "sheets")
    said = capsys.readouterr().err
    assert made.majority == "dark" and "sheets: dark ink on a light background" in said
    assert "1 of 6 drawings are of the other polarity" in said
    for i, ink in enumerate(sketches()):
        found = made.array(images.read(tmp_path / f"{i}.png"), (3, 28, 28))
        plain = images.to_array(drawn("light", ink), (3, 28, 28))
        assert np.abs(found.astype(float) - plain).mean() < 4
    Preparation().suggest_ink(sources[:5], "sheets")
    assert "sheets: looks like drawings; dataset.ink=auto" in capsys.readouterr().err
    # A set whose polarity does not show is like the one it belongs to; a typed one is not questioned.
    blank = saved(tmp_path, Image.new("L", (9, 9), 40))
    assert Preparation(ink="auto").with_ink(blank, "blank", like="light").majority == "light"
    asked = Preparation(ink="light").with_ink(sources, "sheets")
    assert not asked.array(drawn("grey", sketches()[0]), (1, 28, 28)).any()


def test_a_models_images_are_prepared_as_in_its_training_unless_set():
    assert MiniImageNet(root="x").preparation == Preparation("stretch")
    assert Omniglot().preparation == Preparation(ink="auto")
    photographs = ImageFolder(root="x", resize="crop", background="black", white=4095.0).preparation
    other = ImageFolder(root="y", resize="stretch").prepared_like(photographs)
    assert other.preparation == Preparation("stretch", "none", "black", 4095.0)
    assert ImageFolder(root="y").prepared_like(photographs).resize == "crop"
    drawn_dark = ImageFolder(root="x", ink="dark").preparation
    assert ImageFolder(root="y").prepared_like(drawn_dark).preparation.ink == "auto"  # of its own polarity
    shaped = ImageFolder(root="y").prepared_like(photographs).reshaped((1, 28, 28))
    assert shaped.item_shape == (1, 28, 28) and shaped.preparation.background == "black"
