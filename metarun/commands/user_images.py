"""Reads a user's images for `metarun adapt`, prepared as those that the model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metarun.commands.models import Model
from metarun.config.schema import AdaptConfig
from metarun.datasets import images
from metarun.datasets.preparation import Preparation
from metarun.errors import ConfigError, counted
from metarun.reporting.console import inform


def read_folders(
    command: AdaptConfig, model: Model, support: Sequence[Path], query: Sequence[Path]
) -> tuple[Tensor, Tensor | None]:
    """The images of both folders as inputs of the model, [1, S, C, H, W] and [1, B, C, H, W].

    The background of transparent images and the white level are decided over both folders. Drawings are
    judged folder by folder, because the support may be scanned and the queries drawn on a screen.

    Args:
        command: the settings of the command.
        model: the model.
        support, query: the files of each; the second tensor is None if there are no queries. One of them may
            be empty.

    Raises:
        ConfigError: the model does not take images, or `ink` is set and it does not take drawings.
        DataError: a file cannot be read.
    """
    if len(model.spec.item_shape) != 3:
        raise ConfigError(
            f"this checkpoint's items have shape {tuple(model.spec.item_shape)}: it does not take images"
        )
    trained = preparation_of(command, model)
    ours, theirs = ([partial(images.opened, file) for file in files] for files in (support, query))
    if not trained.draws:
        trained = trained.with_levels([*ours, *theirs], "images")
    if not support:  # classes that are only described
        other = trained.with_levels(theirs, "query").with_ink(theirs, "query drawings", "ink")
        return torch.empty(1, 0, *model.spec.item_shape), pixels(other, model, "query", query)
    own = trained.with_levels(ours, "support").with_ink(ours, "support drawings", "ink")
    support_x = pixels(own, model, "support", support)
    if not query:
        return support_x, None
    other = trained.with_levels(theirs, "query").with_ink(theirs, "query drawings", "ink", own.majority)
    if own.majority != other.majority:
        inform(
            f"warning: support has {own.majority} ink and query has {other.majority} ink; each folder was "
            "converted by itself; set ink=dark or ink=light if both are alike"
        )
    return support_x, pixels(other, model, "query", query)


def preparation_of(command: AdaptConfig, model: Model) -> Preparation:
    """The preparation of the run's dataset, with the typed ink. Raises ConfigError."""
    trained = model.dataset.preparation
    if not trained.draws and command.ink != "auto":
        raise ConfigError(f"ink={command.ink}: the model was not trained on drawings; leave it out")
    return replace(trained, ink=command.ink) if trained.draws else trained  # type: ignore[arg-type]


def pixels(preparation: Preparation, model: Model, name: str, files: Sequence[Path]) -> Tensor:
    """Images in [0, 1] as one task, [1, B, C, H, W]; a message counts blank ones."""
    # One at a time: forty photographs of 24 megapixels need gigabytes.
    arrays = [preparation.array(images.read(file), model.spec.item_shape) for file in files]
    batch = torch.from_numpy(np.stack(arrays)).float() / 255
    if blank := int((batch.amax((1, 2, 3)) - batch.amin((1, 2, 3)) < 0.05).sum()):
        inform(
            f"{name}: blank after resizing to the model's input: {blank} of {counted(len(batch), 'image')}"
        )
    return batch.unsqueeze(0)
