"""A user's own images: folders read, any size and mode, made into what a model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from metarun.errors import ConfigError, DataError, first_line

Ink = Literal["dark", "light"]
Fit = Literal["pad", "crop", "stretch"]


def class_folders(folder: Path) -> dict[str, list[Path]]:
    """Each sub-folder's files, by class name, sorted. DataError where they cannot make a task."""
    require_folder(folder)
    if stray := [path for path in visible(folder) if path.is_file()]:
        raise DataError(
            f"{stray[0]}: lies beside the class folders; {folder} must hold one sub-folder a class"
        )
    classes = {path.name: visible(path) for path in visible(folder)}
    for name, files in classes.items():
        if not files:
            raise DataError(f"{folder / name}: this class has no images; add some or remove the folder")
    if len(classes) < 2:
        raise DataError(f"{folder}: has {len(classes)} class folders; at least 2 are needed to tell apart")
    return classes


def query_files(folder: Path, classes: Sequence[str]) -> tuple[list[Path], list[int | None]]:
    """The images to predict and their classes where sub-folders tell them, else None."""
    if folder.is_file():
        return [folder], [None]
    require_folder(folder)
    files: list[Path] = []
    labels: list[int | None] = []
    for path in visible(folder):
        if path.is_dir():
            if path.name not in classes:
                raise DataError(
                    f"{path}: is no class of the support ({', '.join(classes)}); "
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


UNASKED = {"Thumbs.db", "desktop.ini", "__MACOSX"}  # files that operating systems add


def is_visible(name: str) -> bool:
    return not name.startswith(".") and name not in UNASKED


def visible(folder: Path) -> list[Path]:
    """The files and folders in a folder, sorted by name, without hidden ones and those of `UNASKED`."""
    return sorted(path for path in folder.iterdir() if is_visible(path.name))


def read(file: Path | BinaryIO, name: str = "") -> Image.Image:
    """An image upright and without transparency, in mode L or RGB. DataError where it is none.

    `name` is what messages call it where it is not a path.
    """
    name = name or str(file)
    if isinstance(file, Path) and file.is_dir():
        raise DataError(f"{file}: is a folder; images belong directly into a class folder")
    if isinstance(file, Path) and file.exists() and not file.is_file():
        raise DataError(f"{file}: is no regular file; remove it")  # reading a pipe would wait for ever
    try:
        with Image.open(file) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            return flatten(image)
    except UnidentifiedImageError:
        raise DataError(f"{name}: is not an image; remove it from the folder") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises many kinds for damaged files
        why = first_line(error)
        raise DataError(f"{name}: cannot be read as an image ({why}); replace or remove it") from None


def flatten(image: Image.Image) -> Image.Image:
    """Mode L or RGB: 16 bits to 8, palettes and CMYK to RGB, transparency onto a ground."""
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64))
        top = 65535 if image.mode != "F" else max(float(values.max()), 1e-9)
        if image.mode == "I" and values.max() <= 255:
            top = 255
        return Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, contrasting_ground(image))
        return Image.alpha_composite(ground, image).convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def contrasting_ground(image: Image.Image) -> str:
    """White, or black where what is not transparent is light: what is drawn must stay visible."""
    levels = np.asarray(image.convert("L"), dtype=np.float64)
    opacity = np.asarray(image.getchannel("A"), dtype=np.float64)
    return "black" if (levels * opacity).sum() > 127 * max(opacity.sum(), 1.0) else "white"


def to_batch(images: Sequence[Image.Image], item_shape: tuple[int, ...]) -> Tensor:
    """Pixels [B, C, H, W] in [0, 1] of the model's size; padded to its proportions, not stretched."""
    if len(item_shape) != 3:
        raise ConfigError(f"this checkpoint's items have shape {tuple(item_shape)}: it cannot take images")
    return torch.from_numpy(np.stack([to_array(image, item_shape) for image in images])).float() / 255


def to_array(image: Image.Image, item_shape: tuple[int, ...], how: Fit = "pad") -> np.ndarray:
    """An image in mode L or RGB as a uint8 array of shape `item_shape`, [C, H, W]; `how` as in `fit`."""
    channels, height, width = item_shape
    mode = "L" if channels == 1 else "RGB"
    image = image if image.mode == mode else image.convert(mode)  # which would copy it
    pixels = fit(image, height, width, how)  # [H, W] or [H, W, C]
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


LUMA = (0.299, 0.587, 0.114)  # what red, green and blue add to grey, as in Pillow's mode L
BLOCK = 1024  # images converted at a time


def converted(pixels: Tensor, item_shape: tuple[int, ...]) -> Tensor:
    """Images [B, C, H, W] uint8 in another size, antialiased and stretched to it, and in grey or colour."""
    if tuple(pixels.shape[1:]) == tuple(item_shape):
        return pixels
    channels, *size = item_shape
    result = torch.empty(len(pixels), *item_shape, dtype=torch.uint8, device=pixels.device)
    for source, target in zip(pixels.split(BLOCK), result.split(BLOCK), strict=True):
        block = source.float()
        if channels < block.shape[1]:
            block = (block * block.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
        if list(block.shape[2:]) != size:
            block = F.interpolate(block, size, mode="bilinear", antialias=True)
        target.copy_(block.round_().clamp_(0, 255))  # grey goes into every channel
    return result


def fit(image: Image.Image, height: int, width: int, how: Fit = "pad") -> np.ndarray:
    """Resize to the height and width with antialiasing.

    `pad` keeps everything, with the ground's colour around it; `crop` keeps the middle; `stretch`
    changes the proportions.
    """
    if how == "stretch" or (image.width, image.height) == (width, height):
        return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))
    if how == "crop":
        return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
    ground = tuple(int(value) for value in np.atleast_1d(border_level(image)))
    colour = ground if len(ground) > 1 else ground[0]
    side = max(image.width / width, image.height / height)
    size = (max(round(image.width / side), 1), max(round(image.height / side), 1))
    canvas = Image.new(image.mode, (width, height), colour)
    resized = image.resize(size, Image.Resampling.LANCZOS)
    canvas.paste(resized, ((width - size[0]) // 2, (height - size[1]) // 2))
    return np.asarray(canvas)


def border_level(image: Image.Image) -> np.ndarray:
    """The median grey level, or colour, of an image's outermost pixels: what it is drawn on."""
    pixels = np.asarray(image)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return np.median(border, axis=0)


def ink_of(images: Sequence[Image.Image]) -> Ink:
    """Whether drawings are dark on light or light on dark, by the ground most of them have."""
    levels = [float(border_level(image.convert("L"))) for image in images]
    return "dark" if np.median(levels) > 127 else "light"


def as_drawings(batch: Tensor, ink: Ink) -> Tensor:
    """Drawings as Omniglot and glyphs hold them: bright ink on a dark ground, each at full contrast.

    Thin strokes of a large image fade when it is made small, so each image's range is stretched.
    """
    batch = 1 - batch if ink == "dark" else batch
    low, high = batch.amin((1, 2, 3), keepdim=True), batch.amax((1, 2, 3), keepdim=True)
    return (batch - low) / (high - low).clamp(min=1e-3)
