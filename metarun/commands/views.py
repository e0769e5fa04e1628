"""Predictions that are averaged over views of a task: its images, augmented as in training."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from metarun.config.build import instantiate
from metarun.datasets.augment import Augment
from metarun.errors import ConfigError
from metarun.inference.model import Model
from metarun.tasks.episodes import Episodes


def check_views(model: Model, views: int) -> None:
    """Raise ConfigError if a task cannot have so many views."""
    if views == 1:
        return
    if model.spec.kind != "images" or model.predicts_values:
        raise ConfigError(f"views={views}: {model.path} does not take classes of images; leave views out")
    if "_target_" not in (model.settings.augment or {}):
        raise ConfigError(
            f"views={views}: {model.path} was trained without augment=, by which views differ; leave views "
            "out, or train with augment=standard"
        )


def averaged(model: Model, episode: Episodes, outputs: Tensor, views: int, seed: int) -> Tensor:
    """The logarithm of the mean probabilities of the queries over all views of a task, [1, B, N].

    In each view, the model adapts to the support and predicts the queries anew.

    Args:
        model: trained with an augmentation.
        episode: the task, T = 1; its images are the first view.
        outputs: the logits of the first view, [1, B, N].
        views: their number, at least 1.
        seed: of the random numbers of the augmentation.
    """
    augment: Augment = instantiate(model.settings.augment, "augment")
    generator = torch.Generator().manual_seed(seed)

    def changed(x: Tensor) -> Tensor:
        """Images [1, B, C, H, W], each augmented by random numbers of its own."""
        numbers = torch.rand(x.shape[1], augment.numbers, generator=generator)
        return augment(x[0], numbers.to(x.device)).unsqueeze(0) if x.shape[1] else x

    algorithm, total = model.algorithm, outputs.softmax(2)
    for _ in range(views - 1):
        view = replace(episode, support_x=changed(episode.support_x), query_x=changed(episode.query_x))
        balanced = algorithm.balanced(view)
        predict = algorithm.predictor(algorithm.adapt(balanced), balanced)
        total = total + predict(view.query_x).softmax(2)
    return (total / views).log()
