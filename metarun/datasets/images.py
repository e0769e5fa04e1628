"""Image files of any size and mode: folders of them, decoding, and conversion to a model's shape."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from metarun.datasets.formats import not_an_image, register_plugins
from metarun.errors import DataError, first_line

Resize = Literal["pad", "crop", "stretch"]


def require_folder(folder: Path) -> None:
    if not folder.exists():
        raise DataError(f"{folder}: no such folder or file; name the folder that holds the images")
    if not folder.is_dir():
        raise DataError(f"{folder}: is a file; name the folder that holds the images")


ADDED = {"Thumbs.db", "desktop.ini", "__MACOSX"}  # by operating systems


def is_visible(name: str) -> bool:
    """Whether a file of this name counts: it is neither hidden nor added by an operating system."""
    return not name.startswith(".") and name not in ADDED


def visible(folder: Path) -> list[Path]:
    """The visible files and folders in a folder, sorted by name."""
    return sorted(path for path in folder.iterdir() if is_visible(path.name))


@contextmanager
def opened(file: Path | BinaryIO, name: str = "") -> Iterator[Image.Image]:
    """An image whose mode and size are known, and whose pixels are read when they are needed.

    Args:
        file: a path, or an open file.
        name: the name of an open file in messages.

    Raises:
        DataError: it is not an image, or damaged; also if the block finds it damaged.
    """
    name = name or str(file)
    if isinstance(file, Path) and file.is_dir():
        raise DataError(f"{file}: is a folder; images belong directly into a class folder")
    if isinstance(file, Path) and file.exists() and not file.is_file():
        raise DataError(f"{file}: is not a regular file; remove it")  # reading a pipe would block
    register_plugins()
    try:
        with Image.open(file) as image:
            yield image
    except UnidentifiedImageError:
        raise DataError(f"{name}: {not_an_image(file)}") from None
    except (MemoryError, DataError):
        raise
    except Exception as error:  # Pillow raises exceptions of many types for damaged files
        why = first_line(error)
        raise DataError(f"{name}: cannot be read as an image ({why}); replace or remove it") from None


def read(file: Path | BinaryIO, name: str = "") -> Image.Image:
    """Decode an image, upright, in the mode of the file; see `opened` for arguments and errors."""
    with opened(file, name) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return image


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
