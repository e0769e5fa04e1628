"""A user's images, prepared as those that a model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from metarun.datasets import images
from metarun.datasets.preparation import Preparation
from metarun.errors import ConfigError, counted
from metarun.inference.model import Model
from metarun.reporting.console import inform

Picture = Path | Image.Image  # a file, or an image in memory
Ink = Literal["auto", "dark", "light"]


def read_support(
    model: Model, ink: Ink, support: Sequence[Picture], query: Sequence[Picture] = ()
) -> tuple[Tensor, Preparation]:
    """The support images as inputs of the model, [1, S, C, H, W], and how they were prepared.

    The background of transparent images and the white level are decided over the images of both. Drawings are
    judged by themselves, because the support may be scanned and the queries drawn on a screen.

    Args:
        model: the model.
        ink: "auto" detects it.
        support: the images; none for classes that are only described.
        query: the images to predict, if they are known already.

    Raises:
        ConfigError: the model does not take images, or `ink` is set and it does not take drawings.
        DataError: a file cannot be read.
    """
    check_takes_images(model)
    trained = trained_with(model, ink)
    if not trained.draws:
        every = [partial(opened, each) for each in (*support, *query)]
        trained = trained.with_levels(every, "images")
    if not support:
        return torch.empty(1, 0, *model.spec.item_shape), trained
    ours = [partial(opened, each) for each in support]
    own = trained.with_levels(ours, "support").with_ink(ours, "support drawings", "ink")
    return pixels(own, model, "support", support), own


def read_query(model: Model, ink: Ink, like: Preparation, query: Sequence[Picture]) -> Tensor:
    """Images to predict as inputs of the model, [1, B, C, H, W].

    Args:
        model, ink: see `read_support`.
        like: how the support was prepared.
        query: the images, at least one.

    Raises:
        DataError: a file cannot be read.
    """
    theirs = [partial(opened, each) for each in query]
    trained = trained_with(model, ink)
    base = (trained if trained.draws else like).with_levels(theirs, "query")
    other = base.with_ink(theirs, "query drawings", "ink", like.majority)
    if like.majority and like.majority != other.majority:
        inform(
            f"warning: support has {like.majority} ink and query has {other.majority} ink; each folder was "
            "converted by itself; set ink=dark or ink=light if both are alike"
        )
    return pixels(other, model, "query", query)


def check_takes_images(model: Model) -> None:
    """Raise ConfigError for a model of something else."""
    if len(model.spec.item_shape) != 3:
        raise ConfigError(
            f"this checkpoint's items have shape {tuple(model.spec.item_shape)}: it does not take images"
        )


def check_ink(ink: str) -> None:
    """Raise ConfigError unless this is an `Ink`."""
    if ink not in ("auto", "dark", "light"):
        raise ConfigError(f"ink={ink}: must be auto, dark or light")


def trained_with(model: Model, ink: Ink) -> Preparation:
    """The preparation of the run's dataset, with the ink of the drawings. Raises ConfigError."""
    check_ink(ink)
    trained = model.dataset.preparation
    if not trained.draws and ink != "auto":
        raise ConfigError(f"ink={ink}: the model was not trained on drawings; leave it out")
    return replace(trained, ink=ink) if trained.draws else trained


def opened(picture: Picture) -> AbstractContextManager[Image.Image]:
    """A context with the image, see `images.opened`."""
    return images.opened(picture) if isinstance(picture, Path) else nullcontext(picture.copy())


def upright(picture: Picture) -> Image.Image:
    """The image with its pixels, upright. Raises DataError."""
    return images.read(picture) if isinstance(picture, Path) else ImageOps.exif_transpose(picture)


def pixels(preparation: Preparation, model: Model, name: str, pictures: Sequence[Picture]) -> Tensor:
    """Images in [0, 1] as one task, [1, B, C, H, W]; a message counts blank ones."""
    # One at a time: forty photographs of 24 megapixels need gigabytes.
    arrays = [preparation.array(upright(each), model.spec.item_shape) for each in pictures]
    batch = torch.from_numpy(np.stack(arrays)).float() / 255
    if blank := int((batch.amax((1, 2, 3)) - batch.amin((1, 2, 3)) < 0.05).sum()):
        inform(
            f"{name}: blank after resizing to the model's input: {blank} of {counted(len(batch), 'image')}"
        )
    return batch.unsqueeze(0)
