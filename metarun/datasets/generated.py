"""Training tasks made of others: rotated classes, and interpolations of two tasks."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from metarun.datasets.mixture import MixtureStore
from metarun.datasets.training_tasks import Embed, TrainingTasks
from metarun.errors import ConfigError, check_least
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import Episodes, EpisodeShape
from metarun.tasks.source import Draw, EpisodeSource


class Rotations(TrainingTasks):
    """The images of each class, rotated by 90, 180 and 270 degrees, are three further classes.

    Santoro et al. 2016 on Omniglot; Liu, Chao and Lin 2020, "Task Augmentation by Rotating for
    Meta-Learning", on photographs. The images are copied: the split takes four times its memory.
    """

    labelled = True

    def source(self, train: ClassStore, shape: EpisodeShape, embed: Embed) -> ClassStore:
        height, width = train.item_shape[-2:]
        if height != width:
            raise ConfigError(
                f"train_tasks=rotations: needs square images, not {height}x{width}; leave train_tasks out"
            )
        if isinstance(train, MixtureStore):
            raise ConfigError(
                "train_tasks=rotations: makes classes of one dataset, not of a mixture; leave train_tasks out"
            )
        if any(name.endswith("@90") for name in train.names):
            raise ConfigError(
                f"train_tasks=rotations: rotated images of {train.name} are classes already "
                "(dataset.rotations); leave train_tasks out, or set dataset.rotations=none"
            )
        return turned(train)


def turned(store: ClassStore) -> ClassStore:
    """The classes of a store, and after them those of its images rotated by 90, 180 and 270 degrees."""
    rows = torch.cat(
        [
            torch.arange(start, start + count)
            for start, count in zip(store.starts.tolist(), store.counts.tolist(), strict=True)
        ]
    )
    items = store.items[rows.to(store.items.device)]
    about = None if store.about is None else store.about.repeat(4, *[1] * (store.about.dim() - 1))
    twin = ClassStore(
        torch.cat([items.rot90(turn, (-2, -1)) for turn in range(4)]),
        store.counts.tolist() * 4,
        [*store.names, *(f"{name}@{degrees}" for degrees in (90, 180, 270) for name in store.names)],
        store.name,
        store.items.device,
        fingerprint=f"{store.fingerprint} rotations",
        decode=store.decode,
        about=about,
    )
    twin.host_for, twin.augment = store.host_for, store.augment
    twin.spec = replace(twin.spec, objective=store.spec.objective)
    return twin


class Interpolation(TrainingTasks):
    """Training tasks that are each an interpolation of two tasks (MLTI).

    Yao, Zhang and Finn 2022, "Meta-Learning with Fewer Tasks through Task Interpolation", section 4: examples
    are lambda * those of one task + (1 - lambda) * those of another, with one lambda from Beta(alpha, alpha)
    for the support and the queries of a task. Each way of the new task is made of a way of both, and is a
    class of its own (tasks that do not share labels); the values of a regression are interpolated like the
    examples (tasks that share labels). With lambda 1, a task is itself.

    Departures: the paper interpolates the outputs of a random layer; here it is always layer 0, the examples,
    so that any method and any network can be trained on them. The authors' code for images does the same,
    and pastes a rectangle with a share of 1 - lambda of the area instead of mixing pixels (CutMix): `how`.
    The rectangle is that of a task; theirs differ between support and queries. There, the other half of the
    tasks is mixed with the same task in another order of its classes; here, it stays as it is drawn.
    `alpha` is a whole number.

    Args:
        alpha: of the Beta distribution, at least 1; the authors' code has 2.
        share: the share of interpolated tasks; the others are as drawn.
        how: "mixup": sums of pixels or numbers; "cutmix": rectangles, for images.
    """

    def __init__(self, alpha: int = 2, share: float = 0.5, how: Literal["mixup", "cutmix"] = "mixup") -> None:
        check_least("train_tasks", 1, alpha=alpha)
        if not 0 <= share <= 1:
            raise ConfigError(f"train_tasks.share={share}: must be from 0 to 1")
        self.alpha, self.share, self.how = alpha, share, how

    labelled = True
    of_images = False

    def source(self, train: EpisodeSource, shape: EpisodeShape, embed: Embed) -> Interpolated:  # type: ignore[override]
        spec = train.spec
        if not issubclass(spec.tasks, Episodes) or not spec.item_dtype.is_floating_point:
            raise ConfigError(
                f"train_tasks=mlti: {train.name} has no examples made of numbers, to interpolate; "
                "leave train_tasks out"
            )
        if self.how == "cutmix" and spec.kind != "images":
            raise ConfigError(
                f"train_tasks.how=cutmix: {train.name} has no images; choose train_tasks.how=mixup"
            )
        return Interpolated(train, self)


class Interpolated(EpisodeSource):
    """The tasks of a source, some of which are interpolated with a second one.

    A draw holds the choices of two tasks, and three numbers [T, 3]: lambda, and where the rectangle is.
    """

    def __init__(self, base: EpisodeSource, rule: Interpolation) -> None:
        self.base, self.rule = base, rule
        self.spec, self.name, self.names = base.spec, base.name, base.names
        self.described, self.has_fixed_classes = base.described, not base.names
        self.fingerprint = f"{base.fingerprint} interpolated {rule.alpha} {rule.share} {rule.how}"

    @property
    def undisturbed(self) -> EpisodeSource:
        return self.base

    def check(self, shape: EpisodeShape) -> None:
        self.base.check(shape)

    def draw(self, tasks: int, shape: EpisodeShape, generator: torch.Generator) -> Draw:
        pair = [self.base.draw(tasks, shape, generator) for _ in range(2)]
        uniform = torch.rand(tasks, 2 * self.rule.alpha + 2, generator=generator, device=generator.device)
        # The median of 2 alpha - 1 uniform numbers has the distribution Beta(alpha, alpha).
        share = uniform[:, 3:].median(1).values
        share = torch.where(uniform[:, 0] < self.rule.share, share, 1.0)
        return *pair[0], *pair[1], torch.stack([share, uniform[:, 1], uniform[:, 2]], 1)

    def gather(self, draw: Draw, shape: EpisodeShape) -> Episodes:
        *choices, numbers = draw
        half = len(choices) // 2
        one, other = (self.base.gather(tuple(each), shape) for each in (choices[:half], choices[half:]))
        assert isinstance(one, Episodes) and isinstance(other, Episodes)
        numbers = numbers.to(one.support_x)
        mix = cut if self.rule.how == "cutmix" else mixed
        made = {
            name: mix(getattr(one, name), getattr(other, name), numbers) for name in ("support_x", "query_x")
        }
        if one.classes is None:
            made |= {
                name: mixed(getattr(one, name), getattr(other, name), numbers)
                for name in ("support_y", "query_y")
            }
        if one.about is not None and other.about is not None:
            made["about"] = mixed(one.about, other.about, numbers)
        return replace(one, **made)  # type: ignore[arg-type]


def mixed(one: Tensor, other: Tensor, numbers: Tensor) -> Tensor:
    """lambda * one + (1 - lambda) * other, of tensors [T, ...] and numbers [T, 3]."""
    share = numbers[:, 0].view(-1, *[1] * (one.dim() - 1)).to(one.dtype)
    return share * one + (1 - share) * other


def cut(one: Tensor, other: Tensor, numbers: Tensor) -> Tensor:
    """Images [T, B, C, H, W], with a rectangle of each task from the other one; numbers [T, 3].

    Its sides are sqrt(1 - lambda) of those of the image. Its middle is anywhere in the image, so that it may
    be cut off at the border.
    """
    size = (1 - numbers[:, :1]).sqrt()  # [T, 1]
    inside = []
    for middle, length in zip(numbers[:, 1:].unbind(1), one.shape[-2:], strict=True):
        places = (torch.arange(length, device=one.device, dtype=numbers.dtype) + 0.5) / length
        inside.append((places - middle.unsqueeze(1)).abs() < size / 2)  # [T, length]
    rectangle = inside[0].unsqueeze(2) & inside[1].unsqueeze(1)  # [T, H, W]
    return torch.where(rectangle[:, None, None], other, one)
