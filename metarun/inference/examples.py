"""Examples that a program has in memory, as inputs of a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from metarun.datasets.preparation import Preparation
from metarun.errors import ConfigError, DataError
from metarun.inference import images
from metarun.inference.model import Model
from metarun.storage.files import user_path

CHANNELS = (1, 3, 4)


def support_of(model: Model, examples: Sequence[Any], ink: images.Ink) -> tuple[Tensor, Preparation | None]:
    """Support examples as inputs of the model, [1, S, *item], and how images were prepared."""
    if model.spec.kind != "images":
        return other_examples(model, examples, ink), None
    return images.read_support(model, ink, list(map(image, items_of(examples))))


def query_of(model: Model, examples: Sequence[Any], ink: images.Ink, like: Preparation | None) -> Tensor:
    """Examples to predict as inputs of the model, [1, B, *item].

    Args:
        model: the model.
        examples: see `Model.adapt`; at least one.
        ink: of drawings.
        like: how the images of the support were prepared.

    Raises:
        ConfigError: the model takes something else.
        DataError: a file cannot be read, or there are no examples.
    """
    if model.spec.kind != "images":
        return other_examples(model, examples, ink)
    assert like is not None
    return images.read_query(model, ink, like, list(map(image, items_of(examples))))


def other_examples(model: Model, examples: Sequence[Any], ink: images.Ink) -> Tensor:
    """Texts or rows as inputs of the model, [1, B, *item]."""
    if ink != "auto":
        raise ConfigError(f"ink={ink}: the model does not take images; leave it out")
    tabular = hasattr(examples, "columns")  # a data frame, which iterates over its columns
    return model.dataset.examples(examples if tabular else items_of(examples)).unsqueeze(0)


def items_of(examples: Sequence[Any]) -> list[Any]:
    """The examples one by one. Raises DataError if there are none, ConfigError for a single one."""
    if isinstance(examples, (str, bytes, Path, Image.Image)) or not hasattr(examples, "__len__"):
        raise ConfigError(
            f"examples: is a single {type(examples).__name__}; pass a list of examples, also of one"
        )
    if not len(examples):
        raise DataError("examples: there are none; pass at least one")
    return list(examples)


def image(item: Any) -> images.Picture:
    """An example as an image.

    Args:
        item: a path; a PIL image; or an array or tensor [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4
            channels, of whole numbers from 0 to 255, floats from 0 to 1, or truth values.

    Raises:
        ConfigError: it is something else.
        DataError: there is no such file.
    """
    if isinstance(item, (str, Path)):
        path = user_path(str(item))
        if not path.exists():
            raise DataError(f"{path}: no such file")
        return path
    if isinstance(item, Image.Image):
        return item
    array = item.detach().cpu().numpy() if isinstance(item, Tensor) else np.asarray(item)
    if array.ndim == 3 and array.shape[-1] not in CHANNELS and array.shape[0] in CHANNELS:
        array = array.transpose(1, 2, 0)
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in CHANNELS or not array.size:
        raise ConfigError(
            f"examples: {type(item).__name__} of shape {tuple(array.shape)} is not an image; an image is a "
            "path, a PIL image, or an array [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels"
        )
    return Image.fromarray(bytes_of(array[:, :, 0] if channels == 1 and array.ndim == 3 else array))


def bytes_of(array: np.ndarray) -> np.ndarray:
    """Values of pixels as uint8. Raises ConfigError if they are not in the range of their type."""
    if array.dtype.kind not in "buif":
        raise ConfigError(f"examples: an image must contain numbers, not {array.dtype}")
    floats, top = array.dtype.kind in "fb", 1.0 if array.dtype.kind in "fb" else 255
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= top):  # also refuses NaN
        raise ConfigError(
            f"examples: an image of {array.dtype} has values from {low:g} to {high:g}; whole numbers are "
            "from 0 to 255, and floats from 0 to 1"
        )
    scaled = np.rint(array.astype(np.float64) * 255) if floats else array
    return np.ascontiguousarray(scaled.astype(np.uint8))
