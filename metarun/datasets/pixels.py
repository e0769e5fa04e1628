"""Image completion as regression: the grey values of an image by the places of its pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from metarun.datasets.base import Dataset, ImageDataset, Split, at_least
from metarun.datasets.glyphs import Glyphs
from metarun.datasets.gp import left_out
from metarun.datasets.omniglot import Omniglot
from metarun.errors import DataError
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import Episodes, EpisodeShape
from metarun.tasks.objectives import DISTRIBUTIONS, REGRESSION
from metarun.tasks.source import Draw, EpisodeSource
from metarun.tasks.spec import TaskSpec


class Pixels(Dataset):
    """A task is an image: predict the grey values of its pixels from those of some (Garnelo et al. 2018a).

    Inputs are the row and the column of a pixel, from -1 to 1, and values from -0.5 to 0.5, as in Kim et al.
    2019, section 4.2. Training, validation and test have images of different classes.

    Args:
        images: "glyphs" or "omniglot".
        root: the files of Omniglot; see `Omniglot`.
        size: pixels a side, at least 8.
        fewest: training tasks have from this many to `shots` support pixels, or `shots` if that
            is less; None: always `shots`.
        likelihood: see `metarun.datasets.gp.GaussianProcess`.
    """

    unread: ClassVar = {"root": "images=glyphs"}

    def __init__(
        self,
        *,
        images: Literal["glyphs", "omniglot"] = "glyphs",
        root: str | None = None,
        size: int = 14,
        fewest: int | None = 3,
        likelihood: Literal["gaussian"] | None = "gaussian",
    ) -> None:
        at_least(8, size=size)
        if fewest is not None:
            at_least(1, fewest=fewest)
        self.images, self.root, self.size = images, root, size
        self.fewest, self.likelihood = fewest, likelihood

    @property
    def spec(self) -> TaskSpec:
        objective = DISTRIBUTIONS if self.likelihood else REGRESSION
        return TaskSpec(item_shape=(2,), objective=objective, outputs=objective.numbers)

    def split(self, name: Split, device: torch.device | str = "cpu") -> PixelSource:
        images: ImageDataset = Glyphs(size=self.size)
        if self.images == "omniglot":
            images = Omniglot(root=self.root, size=self.size, rotations="none")
        store = images.split(name, "cpu")
        assert isinstance(store, ClassStore)
        return PixelSource(self.spec, store, self.fewest if name == "train" else None, device)


class PixelSource(EpisodeSource):
    """Tasks of single images, with one way.

    Args:
        spec: of the tasks.
        store: the images, uint8 [items, 1, H, W], of which all pixels are tasks' examples.
        fewest: the least number of support pixels of a task; None: always all shots.
        device: of the tasks.
    """

    def __init__(
        self, spec: TaskSpec, store: ClassStore, fewest: int | None, device: torch.device | str
    ) -> None:
        self.spec, self.fewest, self.device = spec, fewest, device
        self.images = store.items[:, 0].to(device)
        self.name, self.fingerprint = f"pixels of {store.name}", f"pixels {store.fingerprint}"

    def check(self, shape: EpisodeShape) -> None:
        self.check_shots(shape.shots)
        if shape.ways != 1:
            raise DataError(f"ways={shape.ways}: an image is a task of one way; set ways=1")
        if shape.shots + shape.queries > (count := self.images[0].numel()):
            raise DataError(
                f"shots={shape.shots}, queries={shape.queries}: an image of {self.name} has {count} pixels; "
                "lower one of them"
            )

    def pictured(self, shape: EpisodeShape) -> EpisodeShape:
        return replace(shape, queries=max(self.images[0].numel() - shape.shots, 1))

    def draw(self, tasks: int, shape: EpisodeShape, generator: torch.Generator) -> Draw:
        """The images [T, 1], K+Q of the pixels of each, and the numbers of support pixels [T, 1]."""
        where = generator.device
        images = torch.randint(len(self.images), (tasks, 1), generator=generator, device=where)
        keys = torch.rand(tasks, self.images[0].numel(), generator=generator, device=where)
        least = min(self.fewest or shape.shots, shape.shots)
        counts = torch.randint(least, shape.shots + 1, (tasks, 1), generator=generator, device=where)
        return images, keys.argsort(1)[:, : shape.shots + shape.queries], counts

    def gather(self, draw: Draw, shape: EpisodeShape) -> Episodes:
        images, pixels, counts = (tensor.to(self.device) for tensor in draw)
        x, y = places(pixels, self.images.shape[1:]), self.values(images, pixels)
        sizes = [shape.shots, shape.queries]
        (support_x, query_x), (support_y, query_y) = x.split(sizes, 1), y.split(sizes, 1)
        weights = None if self.fewest is None else left_out(counts, shape.shots).to(x.dtype)
        return Episodes(
            support_x, support_y, query_x, query_y, objective=self.spec.objective, support_weights=weights
        )

    def values(self, images: Tensor, pixels: Tensor) -> Tensor:
        """The values [T, P, 1] of pixels [T, P] of images [T, 1]."""
        grey = self.images.flatten(1)[images, pixels].float()
        return (grey / 255 - 0.5).unsqueeze(-1)


def places(pixels: Tensor, size: tuple[int, ...]) -> Tensor:
    """The rows and columns [T, P, 2] of pixels [T, P] by number, from -1 to 1."""
    height, width = size
    rows, columns = pixels // width, pixels % width
    return torch.stack([2 * rows / (height - 1) - 1, 2 * columns / (width - 1) - 1], -1)


def image_of(x: Tensor, values: Tensor, size: int, empty: float = 0.0) -> Tensor:
    """An image [H, W] of values [P, 1] at places x [P, 2]; `empty` where there is no value."""
    rows, columns = ((x + 1) * (size - 1) / 2).round().long().unbind(-1)
    image = torch.full((size, size), empty, dtype=values.dtype, device=values.device)
    image[rows, columns] = values[:, 0]
    return image
