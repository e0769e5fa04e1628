"""Glyphs: procedurally generated characters that look handwritten, no download.

The generative model follows B. Lake, R. Salakhutdinov and J. Tenenbaum, "Human-level
concept learning through probabilistic program induction" (Science, 2015), the model of
Omniglot. A class, a character type, is one to four pen strokes, each made of sub-strokes,
with relations between strokes; an example, a token, is the type drawn again by an unsteady hand.
Departures from the paper: nothing is learned from human drawings, so there is no library of
strokes to draw on and every number here is set by hand; sub-strokes are arcs, straight or bent up
to a full turn; a stroke may also cross an earlier one; the affine change also rotates and shears.

Shape legend: c classes, e examples of each, s strokes of a character, b sub-strokes of a stroke,
p control points of a sub-stroke, n points on a stroke, i images, m points on all ink of an image,
h and w pixels. A vector is (x, y), y downwards. Where a character has fewer strokes or
sub-strokes, the absent ones have length zero: they are where ink is already and add none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from metarun.datasets.base import ImageDataset, Split, Splits, at_least
from metarun.errors import ConfigError
from metarun.reporting.console import Bar
from metarun.tasks.class_store import ClassStore, check_examples
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.source import SPLITS
from metarun.tasks.spec import TaskSpec

MOST_BYTES = 64 << 30  # of the images of a split; more would be drawn for hours
BLOCK = 20  # classes drawn from one generator; a block is always drawn whole
MANY = 200  # classes that take more than a second to draw, so that progress is shown
STROKES, SUBSTROKES, CONTROLS, SAMPLES = 4, 3, 6, 20  # the largest s and b; p; points on a sub-stroke
# Double precision, and always on the CPU: rounding errors differ between machines and numbers of threads,
# and are then too small to change a grey level, so the same settings give the same images.
DTYPE = torch.float64
# The numbers of a description: of each stroke the lengths and the control points of its sub-strokes, the
# earlier stroke that it is placed by, two joints and a gap; and the size of the character.
DESCRIPTION = STROKES * (SUBSTROKES + SUBSTROKES * CONTROLS * 2 + STROKES + 2 + 2) + 1


class Glyphs(ImageDataset):
    """Procedurally generated characters, with any number of classes.

    A class depends only on the seed, its split and its index, so that with more classes the first ones stay
    the same. Its description is the program that it is drawn by (`describe`), for tasks without examples.

    Args:
        train_classes, validation_classes, test_classes: classes of each split, at least 1.
        images_per_class: at least 2.
        size: pixels a side, at least 8.
        seed: another one gives other characters.

    Raises:
        ConfigError: a setting is out of range.
    """

    drawings = True

    def __init__(
        self,
        *,
        train_classes: int = 1000,
        validation_classes: int = 100,
        test_classes: int = 400,
        images_per_class: int = 20,
        size: int = 28,
        seed: int = 0,
    ) -> None:
        super().__init__(size, channels=1)
        self.classes = {"train": train_classes, "validation": validation_classes, "test": test_classes}
        at_least(0, seed=seed)
        at_least(1, **{f"{split}_classes": count for split, count in self.classes.items()})
        at_least(2, images_per_class=images_per_class)
        at_least(8, size=size)
        self.images_per_class, self.seed = images_per_class, seed
        need = max(self.classes.values()) * images_per_class * size**2
        if need > MOST_BYTES:
            raise ConfigError(
                f"dataset.train_classes={train_classes}, dataset.images_per_class={images_per_class}, "
                f"dataset.size={size}: a split would need {need / 1e9:,.0f} GB; lower one of them"
            )

    @property
    def spec(self) -> TaskSpec:
        return replace(super().spec, description=(DESCRIPTION,))

    def known_classes(self, split: Split) -> tuple[str, int]:
        return f"glyphs {split}", self.classes[split]

    def check_shape(self, split: Splits, shape: EpisodeShape) -> None:
        super().check_shape(split, shape)
        check_examples(f"glyphs {split}", "each class", self.images_per_class, shape)

    def split(self, name: Split, device: torch.device | str = "cpu") -> ClassStore:
        """Draw the images of one split and store them on `device`."""
        count = self.classes[name]
        blocks = []
        with (
            Bar(f"draw glyphs {name}", count, "classes", transient=True)
            if count >= MANY
            else nullcontext() as bar
        ):
            for block in range(math.ceil(count / BLOCK)):
                blocks.append(self._draw_block(name, block))
                if bar:
                    bar.advance(BLOCK)
        images = torch.cat([images for images, _ in blocks])[:count].flatten(0, 1)
        about = torch.cat([about for _, about in blocks])[:count]
        names = [f"{name} {index}" for index in range(count)]
        counts = [self.images_per_class] * count
        return ClassStore(images, counts, names, f"glyphs {name}", device, about=about)

    def _draw_block(self, name: Split, block: int) -> tuple[Tensor, Tensor]:
        """The images [c, e, 1, h, w] and the descriptions of one block of classes, from its own generator."""
        stream = 1_000_003 * self.seed + len(SPLITS) * block + SPLITS.index(name)
        generator = torch.Generator().manual_seed(stream % 2**32)  # the generator ignores higher bits
        types = sample_types(BLOCK, generator)
        strokes, pens = draw_tokens(types, self.images_per_class, generator)
        images = render(strokes.flatten(0, 1), pens.flatten(), self.size)
        return images.view(BLOCK, self.images_per_class, *self.item_shape), describe(types)


@dataclass(frozen=True)
class CharacterTypes:
    """What all drawings of a character share; the unit of length is about a long straight line."""

    lengths: Tensor  # [c, s, b] how large the sub-strokes are, zero where absent
    substrokes: Tensor  # [c, s, b, p, 2] control points, each sub-stroke from its own start
    earlier: Tensor  # [c, s] int64: the stroke that this one is placed by; the first has none
    joints: Tensor  # [c, s, 2] how far along the earlier stroke, and along this one, the two meet
    gaps: Tensor  # [c, s, 2] the offset between them there; zero unless the stroke stands free
    sizes: Tensor  # [c] the character's longer side as a part of the image's


def sample_types(classes: int, generator: torch.Generator) -> CharacterTypes:
    """Sample `classes` characters."""
    strokes = _choose((classes, 1), (1, 2, 3, 4), (0.2, 0.37, 0.29, 0.14), generator)  # [c, 1]
    # a character of one stroke has more sub-strokes, otherwise it would often be just a line
    alone = _choose((classes, STROKES), (1, 2, 3), (0.05, 0.4, 0.55), generator)
    among = _choose((classes, STROKES), (1, 2, 3), (0.48, 0.36, 0.16), generator)
    present = torch.where(strokes == 1, alone, among) * (torch.arange(STROKES) < strokes)  # [c, s]
    # characters with more strokes are larger
    sizes = 0.46 + 0.04 * present.sum(1) + 0.09 * _normal((classes,), generator)
    return CharacterTypes(
        *_sample_substrokes(present, generator),
        *_sample_relations(present, generator),
        sizes=sizes.clamp(0.36, 0.74),
    )


def describe(types: CharacterTypes) -> Tensor:
    """Characters as vectors of numbers, float32 [c, DESCRIPTION]; those of absent strokes are zero."""
    present = types.lengths.sum(-1, keepdim=True) > 0  # [c, s, 1]
    relations = torch.nn.functional.one_hot(types.earlier, STROKES) * present
    parts = (types.lengths, types.substrokes, relations, types.joints, types.gaps, types.sizes[:, None])
    return torch.cat([part.flatten(1).float() for part in parts], 1)


def _sample_substrokes(present: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lengths [c, s, b] and control points [c, s, b, p, 2]; stroke s has `present` [c, s] sub-strokes."""
    shape = (*present.shape, SUBSTROKES)
    # within a sub-stroke the pen goes straight, bends, turns back or goes round
    turns = _choose(shape, (0.0, 0.9, 1.9, 3.1, 5.8), (0.42, 0.2, 0.14, 0.14, 0.1), generator)
    turns = _left_or_right(turns * (1 + 0.12 * _normal(shape, generator)), generator)
    # between sub-strokes it goes on smoothly or makes a corner
    corners = _choose(shape, (0.0, 1.6, 2.4), (0.4, 0.4, 0.2), generator)
    corners = _left_or_right(corners + 0.15 * _normal(shape, generator), generator)
    # hands start rightwards or downwards; each stroke of a character another way, to avoid retracing
    ways, weights = torch.tensor([0.0, 0.8, 1.6, 2.2, 3.1], dtype=DTYPE), torch.tensor([6, 2, 6, 3, 1])
    keys = _uniform((len(present), len(ways)), generator).log() / weights  # the largest: a weighted choice
    corners[..., 0] = ways[keys.topk(STROKES).indices] + 0.1 * _normal(shape[:2], generator)
    headings = corners.cumsum(-1) + turns.cumsum(-1) - turns  # [c, s, b] the direction each starts in

    dots = (_uniform(shape[:2], generator) < 0.08) & (torch.arange(STROKES) > 0)  # [c, s]
    lengths = torch.where(dots[..., None], 0.07, 0.35 + 0.65 * _uniform(shape, generator))
    lengths *= torch.arange(SUBSTROKES) < torch.where(dots, present.clamp(max=1), present)[..., None]

    steps = CONTROLS - 1
    middles = (torch.arange(steps) + 0.5) / steps
    angles = headings[..., None] + turns[..., None] * middles  # [c, s, b, p-1]
    strides = lengths * (1 + 0.3 * turns.abs()) / steps  # otherwise round strokes would be small
    moves = torch.stack([angles.cos(), angles.sin()], -1) * strides[..., None, None]
    return lengths, torch.nn.functional.pad(moves.cumsum(-2), (0, 0, 1, 0))


def _sample_relations(present: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Where strokes meet: the earlier stroke [c, s], the joints [c, s, 2] and the gaps [c, s, 2]."""
    shape = present.shape
    earlier = (_uniform(shape, generator) * torch.arange(STROKES)).long()
    # a stroke stands free, crosses the earlier one, or starts along it, at its start or at its end
    kinds = _choose(shape, (0, 1, 2, 3, 4), (0.22, 0.22, 0.26, 0.16, 0.14), generator)
    least = torch.tensor([[0.25, 0.25], [0.25, 0.25], [0.25, 0.0], [0.0, 0.0], [1.0, 0.0]])
    most = torch.tensor([[0.75, 0.75], [0.75, 0.75], [0.75, 0.0], [0.0, 0.0], [1.0, 0.0]])
    joints = least[kinds] + (most - least)[kinds] * _uniform((*shape, 2), generator)
    # a stroke ends where the last of its present sub-strokes ends
    joints = joints * torch.stack([present.gather(1, earlier), present], -1) / SUBSTROKES
    # a free stroke stands to the right of the earlier one, below it, to the left or above
    angles = _choose(shape, (0.0, 1.6, 3.1, 4.7), (0.4, 0.3, 0.1, 0.2), generator)
    angles = angles + 0.2 * _normal(shape, generator)
    distances = (0.35 + 0.3 * _uniform(shape, generator)) * ((kinds == 0) & (present > 0))
    return earlier, joints, torch.stack([angles.cos(), angles.sin()], -1) * distances[..., None]


def draw_tokens(types: CharacterTypes, examples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw each type `examples` times: strokes [c, e, s, n, 2] in an image of side 1, pen widths [c, e]."""
    classes, strokes, substrokes, controls, _ = types.substrokes.shape
    each = (classes, examples)
    stretch = 1 + 0.13 * _normal((*each, strokes, substrokes, 1, 2), generator)
    # the longer the stroke, the less steady the hand
    unsteady = 0.05 * types.lengths[:, None, ..., None, None]  # [c, 1, s, b, 1, 1]
    tremble = unsteady * _normal((*each, strokes, substrokes, controls, 2), generator)
    paths = types.substrokes[:, None] * stretch + tremble  # [c, e, s, b, p, 2]
    paths = paths - paths[..., :1, :]
    ends = paths[..., -1, :]
    paths = paths + (ends.cumsum(-2) - ends)[..., None, :]  # each sub-stroke starts where the last one ends
    curves = (_spline(controls, SAMPLES) @ paths).flatten(3, 4)  # [c, e, s, n, 2]
    curves = _join(curves, types, generator).flatten(2, 3)  # [c, e, s*n, 2]

    low, high = curves.aminmax(dim=-2, keepdim=True)
    extent = (high - low).amax(-1, keepdim=True)
    curves = (curves - (low + high) / 2) / extent * types.sizes[:, None, None, None]
    curves = curves @ _affine(each, generator) + 0.5 + 0.045 * _normal((*each, 1, 2), generator)
    pens = 0.018 * (0.08 * _normal(each, generator)).exp()
    return curves.unflatten(2, (strokes, -1)), pens


def _join(curves: Tensor, types: CharacterTypes, generator: torch.Generator) -> Tensor:
    """Move each stroke of [c, e, s, n, 2] to the place given by its relation to an earlier one."""
    classes, examples, strokes, points, _ = curves.shape
    joints = types.joints[:, None] + 0.03 * _normal((classes, examples, strokes, 2), generator)
    index = (joints.clamp(0, 1) * (points - 1)).round().long()  # [c, e, s, 2]
    gaps = types.gaps[:, None] * (1 + 0.2 * _normal((classes, examples, strokes, 2), generator))
    c, e = torch.arange(classes)[:, None], torch.arange(examples)
    placed = curves.clone()
    for s in range(1, strokes):
        target = placed[c, e, types.earlier[:, s, None], index[:, :, s, 0]]  # [c, e, 2]
        own = curves[c, e, s, index[:, :, s, 1]]
        placed[:, :, s] += (target + gaps[:, :, s] - own)[:, :, None]
    return placed


def _affine(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Small random linear maps [*shape, 2, 2]: a stretch each way, a slant and a rotation."""
    wide, high = (0.12 * _normal((2, *shape), generator)).exp()
    slant, angle = 0.12 * _normal((2, *shape), generator)
    cos, sin = angle.cos(), angle.sin()
    slanted = torch.stack([wide, torch.zeros_like(wide), slant, high], -1).unflatten(-1, (2, 2))
    return slanted @ torch.stack([cos, sin, -sin, cos], -1).unflatten(-1, (2, 2))


def _spline(controls: int, points: int) -> Tensor:
    """The matrix [points, controls] that takes control points to points on their cubic B-spline.

    One more control point beyond each end, the second mirrored in the first, makes the curve begin
    and end on its control points.
    """
    places = torch.linspace(0, controls - 1, points, dtype=DTYPE)[:, None]
    away = (places - torch.arange(-1, controls + 1)).abs()
    basis = torch.where(away < 1, 2 / 3 - away**2 + away**3 / 2, (2 - away).clamp(min=0) ** 3 / 6)
    weights = basis[:, 1:-1].clone()
    for end, inner, beyond in ((0, 1, 0), (-1, -2, -1)):
        weights[:, end] += 2 * basis[:, beyond]
        weights[:, inner] -= basis[:, beyond]
    return weights


def render(strokes: Tensor, pens: Tensor, size: int) -> Tensor:
    """Ink strokes [i, s, n, 2], with pens of width [i], as uint8 images [i, size, size].

    The ink on a pixel is the integral along the strokes of a Gaussian about the pen. That is one
    Gaussian in x times one in y, so the integral, a sum over points, is a matrix product.
    """
    points, spacing = _evenly_spaced(strokes, 6 * size)  # [i, m, 2] and [i]
    pixels = (torch.arange(size, dtype=DTYPE) + 0.5) / size
    pens = pens.clamp(min=0.4 / size)[:, None, None]  # a finer pen would pass between pixels' centres
    points, pixels = points / pens, pixels / pens  # lengths are now in pens
    across, down = ((points[..., axis, None] - pixels).square_().mul_(-0.5).exp_() for axis in (0, 1))
    ink = down.mT @ across * (spacing[:, None, None] / pens / math.sqrt(2 * math.pi))  # [i, h, w]
    # along a line it is 1; half of that counts as full ink, so that adjacent strokes do not become wider
    return ((2 * ink).clamp_(max=1) * 255).round_().to(torch.uint8)


def _evenly_spaced(strokes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """`count` points [i, m, 2] evenly spaced along the strokes [i, s, n, 2], and their spacing [i]."""
    starts, moves = strokes[..., :-1, :].flatten(1, 2), strokes.diff(dim=-2).flatten(1, 2)
    lengths = moves.norm(dim=-1)  # [i, s*(n-1)], zero for absent strokes, which get no points
    reached = lengths.cumsum(-1)
    spacing = reached[:, -1] / count
    wanted = spacing[:, None] * (torch.arange(count) + 0.5)  # [i, m]
    index = torch.searchsorted(reached, wanted)
    part = 1 - (reached.gather(1, index) - wanted) / lengths.gather(1, index)
    index = index[..., None].expand(-1, -1, 2)
    return starts.gather(1, index) + part[..., None] * moves.gather(1, index), spacing


def _normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=DTYPE)


def _uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=DTYPE)


def _choose(
    shape: Sequence[int], values: Sequence[float], weights: Sequence[float], generator: torch.Generator
) -> Tensor:
    """One of `values`, with probabilities `weights`, in each place of a tensor."""
    edges = torch.tensor(weights, dtype=DTYPE).cumsum(0)[:-1]
    return torch.tensor(values)[torch.bucketize(_uniform(shape, generator), edges)]


def _left_or_right(angles: Tensor, generator: torch.Generator) -> Tensor:
    return angles * _choose(angles.shape, (-1, 1), (0.5, 0.5), generator)
