"""A stream of tasks made of one dataset: its images in other colours, scales and rotations."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.errors import ConfigError, DataError
from metarun.tasks.class_store import ClassStore
from metarun.tasks.sampling import seeded

# Red, orange, yellow, green, blue, indigo and violet backgrounds.
COLOURS = (
    *((1.0, 0.0, 0.0), (1.0, 0.5, 0.0), (1.0, 1.0, 0.0), (0.0, 0.8, 0.0), (0.0, 0.3, 1.0)),
    *((0.3, 0.0, 0.5), (0.8, 0.4, 1.0)),
)
SCALES = (1.0, 0.5)
MOST_TASKS = len(COLOURS) * len(SCALES) * 4


@dataclass(frozen=True)
class StreamTask:
    """A task of a stream: all have the same classes.

    Args:
        name: its colour, scale and rotation.
        x, y: training images [I, 3, H, W] in [0, 1], in the order of their arrival, and their classes [I].
        test_x, test_y: test images and their classes.
    """

    name: str
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def rainbow(
    store: ClassStore, classes: int, tasks: int, images: int, test_images: int, seed: int
) -> Sequence[StreamTask]:
    """Tasks as those of Rainbow MNIST (Finn, Rajeswaran, Kakade and Levine 2019, section 5.1).

    Each of the 56 combinations of seven background colours, two scales and four rotations is a task. The
    images of two tasks are different ones of the store. The order of tasks is random.

    Args:
        store: images with bright strokes on black, in at least `classes` classes.
        classes: how many, the first ones of the store.
        tasks: how many, at most 56.
        images, test_images: of each task.
        seed: of the choice and the order.

    Raises:
        ConfigError, DataError: there are not as many tasks, classes or images.
    """
    if tasks > MOST_TASKS:
        raise ConfigError(f"tasks={tasks}: there are {MOST_TASKS} combinations of colour, scale and rotation")
    if classes > len(store.names):
        raise DataError(f"classes={classes}: {store.name} has {len(store.names)}; lower classes")
    there, needed = int(store.counts[:classes].sum()), tasks * (images + test_images)
    if needed > there:
        raise DataError(
            f"tasks={tasks} with {images} + {test_images} images each need {needed:,} images: {classes} "
            f"classes of {store.name} have {there:,}; lower tasks, images or test_images"
        )
    generator = seeded(f"rainbow {seed}")
    labels = torch.arange(classes).repeat_interleave(store.counts[:classes].cpu())
    first = int(store.starts[0])
    chosen = torch.randperm(there, generator=generator)[:needed].split(images + test_images)
    kinds = list(itertools.product(range(len(COLOURS)), SCALES, range(4)))
    made = []
    for number, own in zip(
        torch.randperm(MOST_TASKS, generator=generator)[:tasks].tolist(), chosen, strict=True
    ):
        colour, scale, turns = kinds[number]
        x = changed(store.decode(store.items[first + own.to(store.items.device)]), colour, scale, turns)
        y = labels[own].to(x.device)
        parts = zip(x.split([images, test_images]), y.split([images, test_images]), strict=True)
        (train_x, train_y), (test_x, test_y) = parts
        name = f"colour {colour}, scale {scale:g}, rotation {90 * turns}"
        made.append(StreamTask(name, train_x, train_y, test_x, test_y))
    return made


def changed(images: Tensor, colour: int, scale: float, turns: int) -> Tensor:
    """Images [B, C, H, W] as white strokes on a colour, scaled about their middle, turned by quarters."""
    strokes = images.mean(1, keepdim=True)
    height, width = strokes.shape[-2:]
    if scale != 1:
        small = F.adaptive_avg_pool2d(strokes, (max(1, round(height * scale)), max(1, round(width * scale))))
        top, left = (height - small.shape[-2]) // 2, (width - small.shape[-1]) // 2
        right, bottom = width - small.shape[-1] - left, height - small.shape[-2] - top
        strokes = F.pad(small, (left, right, top, bottom))
    strokes = strokes.rot90(turns, (-2, -1))
    return strokes + (1 - strokes) * strokes.new_tensor(COLOURS[colour]).view(1, 3, 1, 1)
