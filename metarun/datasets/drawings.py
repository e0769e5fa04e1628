"""Scans and photographs of drawings as strokes: bright ink on a dark ground, as in Omniglot and glyphs.

The paper is what a smooth surface through the border explains; ink is what differs from it to one side. The
paper is subtracted before an image is reduced: Lanczos reduction overshoots beside strokes, which would
otherwise raise the paper of a drawing whose contrast is stretched afterwards. Noise is removed before, too,
because it looks like the edges of strokes in the reduced image.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from metarun.datasets.images import Resize

Ink = Literal["dark", "light"]

DETAIL = 8  # pixels of a drawing for each pixel of the result, above which it is first reduced by averaging
SAMPLES = 1024  # pixels that the surface of the paper is fitted to
NOISE = 2.5  # standard deviations of the paper's noise that are cut off
CLEAR = 5.0  # standard deviations above which the strongest stroke is not noise
ONE_SIDED = 0.5  # the `one_sidedness` of a small image, above which its strokes are not noise
FAINT = 8.0  # the least contrast of a stroke, of 255 levels
STEEP = 4.0  # a contrast of fewer standard deviations of the noise is reduced to ink and paper
SURVEYED = 48  # pixels a side at which the polarity of a drawing is judged


def strokes(image: Image.Image, ink: Ink, height: int, width: int, how: Resize = "pad") -> np.ndarray:
    """The ink of a drawing as uint8 [height, width]: 0 for paper, 255 for full ink; all 0 for a blank sheet.

    Args:
        image: of mode L.
        ink: whether the ink is darker or lighter than the paper.
        height, width: in pixels.
        how: what to do if the proportions differ, as in `images.resized`; padding is paper.
    """
    levels = averaged(image, DETAIL * max(height, width))
    above = levels - paper(levels)
    above = without_lines(-above if ink == "dark" else above)
    small, top, noise = reduced(above, height, width, how)
    if top < FAINT or (top < CLEAR * noise and one_sidedness(small - np.median(small)) < ONE_SIDED):
        return np.zeros((height, width), np.uint8)
    grain = spread(above[above < 0])  # strokes are on the other side of the paper
    side = min(above.shape[0] // height, above.shape[1] // width)
    if grain > 1 and side > 2:
        above = without_grain(above, grain, side)
        small, top, noise = reduced(above, height, width, how)
        top = max(top, FAINT)
    floor = NOISE * noise
    return ((small - floor) / (top - floor) * 255).round().clip(0, 255).astype(np.uint8)


def balance(image: Image.Image) -> float:
    """On which side of the paper the ink of an image of mode L is: 1 dark, -1 light, about 0: it is blank."""
    levels = averaged(image, SURVEYED)
    return one_sidedness(paper(levels) - levels)


def one_sidedness(differences: np.ndarray) -> float:
    """1 if large differences from the paper are positive, -1 if they are negative, about 0 if there are none.

    By their cubes, in which noise on both sides cancels out.
    """
    cubes = differences**3
    total = float(np.abs(cubes).sum())
    return float(cubes.sum()) / total if total > FAINT**3 else 0.0


def other(ink: Ink) -> Ink:
    """The opposite polarity."""
    return "light" if ink == "dark" else "dark"


def averaged(image: Image.Image, most: int) -> np.ndarray:
    """The levels of an image of mode L as float32, reduced by averaging to about `most` pixels a side."""
    factor = max(image.size) // most
    return np.asarray(image.reduce(factor) if factor > 1 else image, np.float32)


def paper(levels: np.ndarray) -> np.ndarray:
    """The level of the paper at each pixel [H, W]: a quadratic surface, robust to strokes.

    It starts at the median of the border, which is mostly paper, and is then fitted by iterated least
    squares, in which pixels far from the surface have little weight.
    """
    height, width = levels.shape
    step = max(int((height * width / SAMPLES) ** 0.5), 1)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    basis = surface(y[::step, ::step].ravel() / height - 0.5, x[::step, ::step].ravel() / width - 0.5)
    sample = levels[::step, ::step].ravel()
    found = np.zeros(basis.shape[1], np.float32)
    found[0] = np.median(np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]]))
    for _ in range(12):
        distance = np.abs(sample - basis @ found)
        weight = 1 / np.maximum(distance, 1.0) ** 2
        weighted = basis * weight[:, None]
        # A little of the identity: a constant image of one row does not determine a surface.
        found = np.linalg.solve(weighted.T @ basis + 1e-6 * np.eye(len(found)), weighted.T @ sample)
    return (surface(y.ravel() / height - 0.5, x.ravel() / width - 0.5) @ found).reshape(height, width)


def surface(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The terms of a quadratic surface, [pixels, 6]."""
    return np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], 1)


def spread(values: np.ndarray) -> float:
    """The standard deviation of normal noise around 0, robust to outliers."""
    return 1.4826 * float(np.median(np.abs(values))) if values.size else 0.0


def ink_level(above: np.ndarray) -> float:
    """The typical level of strokes above the paper, the median of what is above half of the highest."""
    high = np.quantile(above, 0.998)
    strong = above[above > high / 2]
    return float(np.median(strong)) if high > 0 and strong.size else 0.0


def without_lines(above: np.ndarray) -> np.ndarray:
    """Ink [H, W] without the lines of ruled paper: rows and columns that are raised at both margins alike.

    Lines are fainter than strokes; a stroke that reaches both margins is kept.
    """
    most = 0.6 * ink_level(above)
    for axis in (0, 1):
        lines = above if axis == 0 else above.T
        margin = max(lines.shape[1] // 25, 1)
        sides = [np.median(side, 1) for side in (lines[:, :margin], lines[:, -margin:])]
        raised = np.minimum(*sides)
        raised[(raised < NOISE * spread(raised)) | (raised > most) | (raised < FAINT)] = 0
        lines -= raised[:, None]
    return above


def without_grain(above: np.ndarray, grain: float, side: int) -> np.ndarray:
    """Ink [H, W] without the noise of each pixel, which the means of small windows separate from strokes.

    The stronger the noise, the more is taken from these means instead of the pixels, and the steeper the step
    between paper and full ink.

    Args:
        above: the ink.
        grain: the standard deviation of the noise.
        side: of the largest window, which is a pixel of the reduced drawing. Strokes are about as wide.
    """
    side -= 1 - side % 2
    share = min(STEEP * grain / ink_level(above), 1.0)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(above, side // 2, mode="edge"), (side, side))
    mixed = above + share * (windows.mean((2, 3)) - above)
    full = ink_level(mixed)
    half = max(full / 2, NOISE * grain / side)
    low, high = share * half, full - share * (full - half)
    return full * ((mixed - low) / max(high - low, 1.0)).clip(0, 1)


def reduced(above: np.ndarray, height: int, width: int, how: Resize) -> tuple[np.ndarray, float, float]:
    """Ink [H, W] as `fitted`, the level of full ink in it, and the noise of the paper."""
    small = fitted(above, height, width, how)
    top = min(ink_level(above), float(small.max()))
    return small, top, spread(small[small < top / 2]) if top > 0 else 0.0


def fitted(above: np.ndarray, height: int, width: int, how: Resize) -> np.ndarray:
    """Ink [H, W] reduced or enlarged to [height, width], padded with paper (0) or cropped as `how` says."""
    image, size = Image.fromarray(above.astype(np.float32)), (width, height)
    if how == "crop":
        return np.asarray(ImageOps.fit(image, size, Image.Resampling.LANCZOS))
    side = max(image.width / width, image.height / height)
    if how == "pad":
        size = max(round(image.width / side), 1), max(round(image.height / side), 1)
    canvas = np.zeros((height, width), np.float32)
    top, left = (height - size[1]) // 2, (width - size[0]) // 2
    part = canvas[top : top + size[1], left : left + size[0]]
    part[:] = np.asarray(image.resize(size, Image.Resampling.LANCZOS))
    return canvas
