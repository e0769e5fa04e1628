"""Image files of any size and mode: folders of them, decoding, and conversion to a model's shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from metarun.datasets.formats import not_an_image, register_plugins
from metarun.errors import ConfigError, DataError, first_line

Ink = Literal["dark", "light"]
Resize = Literal["pad", "crop", "stretch"]


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """The files of each sub-folder, by its name, sorted. DataError if a task cannot be made of them."""
    require_folder(folder)
    if stray := [path for path in visible(folder) if path.is_file()]:
        raise DataError(
            f"{stray[0]}: is beside the class folders; {folder} must have one sub-folder for each class"
        )
    classes = {path.name: visible(path) for path in visible(folder)}
    for name, files in classes.items():
        if not files:
            raise DataError(f"{folder / name}: this class has no images; add some or remove the folder")
    if len(classes) < 2:
        raise DataError(f"{folder}: has {len(classes)} class folders; at least 2 are needed")
    return classes


def query_files(folder: Path, classes: Sequence[str]) -> tuple[list[Path], list[int | None]]:
    """The images to predict, and the index of each one's class, None where no sub-folder names it.

    Args:
        folder: an image, or a folder of images, of sub-folders named after classes, or of both.
        classes: the names of the support's classes.

    Raises:
        DataError: a sub-folder is not named after a class, or there are no images.
    """
    if folder.is_file():
        return [folder], [None]
    require_folder(folder)
    files: list[Path] = []
    labels: list[int | None] = []
    for path in visible(folder):
        if path.is_dir():
            if path.name not in classes:
                raise DataError(
                    f"{path}: is not a class of the support ({', '.join(classes)}); "
                    "rename it, or put its images directly into the query folder"
                )
            inside = visible(path)
            files += inside
            labels += [list(classes).index(path.name)] * len(inside)
        else:
            files.append(path)
            labels.append(None)
    if not files:
        raise DataError(f"{folder}: has no images")
    return files, labels


def require_folder(folder: Path) -> None:
    if not folder.exists():
        raise DataError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise DataError(f"{folder}: is a file; name the folder that holds the images")


ADDED = {"Thumbs.db", "desktop.ini", "__MACOSX"}  # by operating systems


def is_visible(name: str) -> bool:
    """Whether a file of this name counts: it is neither hidden nor added by an operating system."""
    return not name.startswith(".") and name not in ADDED


def visible(folder: Path) -> list[Path]:
    """The visible files and folders in a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if is_visible(path.name))


def read(file: Path | BinaryIO, name: str = "") -> Image.Image:
    """Decode an image, upright and without transparency, to mode L or RGB.

    Args:
        file: a path, or an open file.
        name: the name of an open file in messages.

    Raises:
        DataError: it is not an image, or damaged.
    """
    name = name or str(file)
    if isinstance(file, Path) and file.is_dir():
        raise DataError(f"{file}: is a folder; images belong directly into a class folder")
    if isinstance(file, Path) and file.exists() and not file.is_file():
        raise DataError(f"{file}: is not a regular file; remove it")  # reading a pipe would block
    register_plugins()
    try:
        with Image.open(file) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return flatten(image)
    except UnidentifiedImageError:
        raise DataError(f"{name}: {not_an_image(file)}") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises exceptions of many types for damaged files
        why = first_line(error)
        raise DataError(f"{name}: cannot be read as an image ({why}); replace or remove it") from None


def flatten(image: Image.Image) -> Image.Image:
    """Convert to mode L or RGB: 16 bits to 8, palettes and CMYK to RGB, transparency to a background."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        top = 65535 if image.mode != "F" else max(float(values.max()), 1e-9)
        if image.mode == "I" and values.max() <= 255:
            top = 255
        return Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, contrasting_background(image))
        return Image.alpha_composite(background, image).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def contrasting_background(image: Image.Image) -> str:
    """White, or black if the opaque pixels are light, so that they stay visible."""
    levels = np.asarray(image.convert("L"), dtype=np.float64)
    opacity = np.asarray(image.getchannel("A"), dtype=np.float64)
    return "black" if (levels * opacity).sum() > 127 * max(opacity.sum(), 1.0) else "white"


def to_batch(images: Sequence[Image.Image], item_shape: tuple[int, ...]) -> Tensor:
    """Images as pixels [B, C, H, W] in [0, 1], padded to the proportions of `item_shape`, [C, H, W].

    Raises ConfigError if `item_shape` is not that of images.
    """
    if len(item_shape) != 3:
        raise ConfigError(f"this checkpoint's items have shape {tuple(item_shape)}: it does not take images")
    return torch.from_numpy(np.stack([to_array(image, item_shape) for image in images])).float() / 255


def to_array(image: Image.Image, item_shape: tuple[int, ...], how: Resize = "pad") -> np.ndarray:
    """An image in mode L or RGB as a uint8 array of shape `item_shape`, [C, H, W]; `how` as in `resized`."""
    channels, height, width = item_shape
    mode = "L" if channels == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)  # which would copy it
    pixels = resized(image, height, width, how)  # [H, W] or [H, W, C]
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def resized(image: Image.Image, height: int, width: int, how: Resize = "pad") -> np.ndarray:
    """An image of mode L or RGB resized with antialiasing, as a uint8 array [H, W] or [H, W, 3].

    Args:
        image: of any size.
        height, width: in pixels.
        how: what to do if the proportions differ. "pad" keeps the whole image and fills the rest with the
            colour of its border, "crop" keeps the middle, "stretch" changes the proportions.
    """
    if how == "stretch" or (image.width, image.height) == (width, height):
        return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    if how == "crop":
        return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
    border = tuple(int(value) for value in np.atleast_1d(border_level(image)))
    colour = border if len(border) > 1 else border[0]
    side = max(image.width / width, image.height / height)
    size = (max(round(image.width / side), 1), max(round(image.height / side), 1))
    canvas = Image.new(image.mode, (width, height), colour)
    resized = image.resize(size, Image.Resampling.LANCZOS)
    canvas.paste(resized, ((width - size[0]) // 2, (height - size[1]) // 2))
    return np.asarray(canvas)


def border_level(image: Image.Image) -> np.ndarray:
    """The median grey level, or colour, of an image's outermost pixels, which are mostly background."""
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.median(border, axis=0)


def ink_of(images: Sequence[Image.Image]) -> Ink:
    """Whether drawings are dark on light or light on dark, judged by the background of most of them."""
    levels = [float(border_level(image.convert("L"))) for image in images]
    return "dark" if np.median(levels) > 127 else "light"


def as_drawings(batch: Tensor, ink: Ink) -> Tensor:
    """Drawings [B, C, H, W] in the form of Omniglot and glyphs: bright ink on a dark ground, full contrast.

    Downscaling a large image makes thin strokes fade, so the range of each image is stretched to [0, 1].
    """
    batch = 1 - batch if ink == "dark" else batch
    low, high = batch.amin((1, 2, 3), keepdim=True), batch.amax((1, 2, 3), keepdim=True)
    return (batch - low) / (high - low).clamp(min=1e-3)
