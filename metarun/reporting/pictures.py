"""Figures that show many examples or classes: confusion matrices, and sheets of images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from metarun.reporting import drawing
from metarun.reporting.drawing import COLOURS, SMALLEST, class_ticks, fitted, headline, panels, width_of
from metarun.tasks.objectives import Metric

RIGHT, WRONG = COLOURS[0], COLOURS[5]
WIDEST, SHOWN = 320, 60  # points in width of an animation; milliseconds of a picture
NUMBERED = 40  # the most classes of a confusion matrix with numbers in its cells


def confusion_matrix(counts: Tensor, names: Sequence[str], title: str, path: Path) -> None:
    """Write the figure of a confusion matrix, see `confusion_figure`."""
    drawing.save(confusion_figure(counts, names, title), path)


def confusion_figure(counts: Tensor, names: Sequence[str], title: str) -> Figure:
    """Plot a confusion matrix: how many examples of each class (row) were predicted as each class (column).

    Up to 40 classes have numbers in their cells. Where there is no space for the names of the classes, every
    tenth or hundredth class has the number of its row in the CSV file.
    """
    shares = (counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy(force=True)
    side = max(2.5, min(0.34 * len(names), 11))
    named = side / len(names) >= SMALLEST
    margin = min(2.5, max(width_of(name, 7) for name in names)) if named else 0.3
    figure, (axis,) = panels(1, 1, (side + margin + 1.5, side + margin + 1.4))
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    if len(names) <= NUMBERED:
        for i, j in zip(*counts.numpy(force=True).nonzero(), strict=True):
            count = int(counts[i, j])
            text = str(count) if count < 100_000 else f"{count:.0e}"
            colour = "white" if shares[i, j] > 0.6 else "black"
            axis.text(j, i, text, ha="center", va="center", fontsize=6, color=colour)
    class_ticks(axis.xaxis, names, side / len(names), rotation=90)
    class_ticks(axis.yaxis, names, side / len(names))
    number = "" if named else ", by its number in the CSV file"
    axis.set_xlabel(f"predicted class{number}")
    axis.set_ylabel(f"class{number}")
    if title:
        headline(figure, title)
    bar = figure.colorbar(image, ax=axis, shrink=min(1.0, 4 / side), label="share of the examples of a class")
    bar.ax.tick_params(labelsize=7)
    return figure


def score_grid(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    axes: tuple[str, str],
    metric: Metric,
    title: str,
    path: Path,
) -> None:
    """Plot scores by what rows and columns are (`axes`); NaN: not evaluated."""
    shown = metric.scale * np.asarray(values)
    width, height = (max(2.0, min(0.5 * len(names), 12)) for names in (columns, rows))
    figure, (axis,) = panels(1, 1, (width + 2.5, height + 1.5))
    image = axis.imshow(shown, cmap="Blues", interpolation="nearest")
    middle = (np.nanmin(shown) + np.nanmax(shown)) / 2
    for i, j in zip(*np.isfinite(shown).nonzero(), strict=True):
        colour = "white" if shown[i, j] > middle else "black"
        axis.text(j, i, f"{shown[i, j]:.3g}", ha="center", va="center", fontsize=7, color=colour)
    class_ticks(axis.xaxis, columns, width / len(columns), rotation=90)
    class_ticks(axis.yaxis, rows, height / len(rows))
    axis.set_ylabel(axes[0])
    axis.set_xlabel(axes[1])
    headline(figure, title)
    # As high as the grid, whatever its shape.
    bar = figure.colorbar(
        image, cax=axis.inset_axes((1 + 0.1 / width, 0, 0.2 / width, 1)), label=metric.label
    )
    bar.ax.tick_params(labelsize=7)
    drawing.save(figure, path)


def contact_sheet(rows: Mapping[str, Tensor], title: str, path: Path, mark: int = 0) -> None:
    """Plot a row of images [n, C, H, W] (uint8 or in [0, 1]) for each name; the first `mark` are support."""
    columns = max(len(images) for images in rows.values())
    cell = min(1.0, 40 / len(rows), 40 / columns)
    names = list(rows)
    widest = min(2.0, max(width_of(name, 8) for name in names))
    size = (cell * columns + widest + 0.4, cell * len(rows) + 0.9)
    figure, (axis,) = panels(1, 1, size)
    for line, images in enumerate(rows.values()):
        for column, image in enumerate(images):
            show(axis, image, column - 0.46, line - 0.46, 0.92)
    axis.set_xlim(-0.5, columns - 0.5)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    class_ticks(axis.yaxis, names, cell, 2.0)
    groups = {"support": (0, mark), "query": (mark, columns)} if mark else {}
    middles = [(first + last - 1) / 2 for first, last in groups.values()]
    axis.set_xticks(middles, list(groups), fontsize=min(8, 40 * cell))
    if mark:
        axis.axvline(mark - 0.5, color="k", linewidth=1)
    axis.tick_params(length=0)
    axis.set_frame_on(False)
    headline(figure, title)
    drawing.save(figure, path)


def show(axis: Axes, image: Tensor, x: float, y: float, side: float) -> None:
    """Draw an image [C, H, W] (uint8 or in [0, 1]) into a square of an axis whose y grows downwards."""
    pixels = image.permute(1, 2, 0).numpy(force=True)
    top = 255 if pixels.dtype == np.uint8 else 1
    extent = (x, x + side, y + side, y)
    axis.imshow(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels, "gray", vmin=0, vmax=top,
                interpolation="nearest", extent=extent, aspect="auto")  # fmt: skip


def animation(pictures: Sequence[np.ndarray], path: Path) -> None:
    """Write pictures, uint8 [height, width, 3], as an animated GIF of at most 320 points in width."""
    shown = [Image.fromarray(picture) for picture in pictures]
    for image in shown:
        image.thumbnail((WIDEST, WIDEST))
    shown[0].save(path, save_all=True, append_images=shown[1:], duration=SHOWN, loop=0)


def predictions(
    images: Tensor, titles: Sequence[Sequence[str]], right: Sequence[bool | None], path: Path, most: int = 60
) -> None:
    """Plot queries with their predictions: right (blue), wrong (orange) or of an unknown class (black).

    Args:
        images: [B, C, H, W] in [0, 1].
        titles: the lines of text above each query.
        right: whether the prediction is right; None: unknown.
        path: of the PNG file.
        most: the most queries that are drawn.
    """
    shown = min(len(images), most)
    columns = min(10, shown)
    size, line, side, gap = 7, 0.13, 1.15, 0.15  # a font size, and lengths in inches
    head = line * max(map(len, titles[:shown])) + 0.05
    width, height = columns * (side + gap), math.ceil(shown / columns) * (head + side + gap)
    top = 0.3 if len(images) > shown else 0.0
    figure = Figure((width, height + top))
    axis = figure.add_axes((0, 0, 1, 1))
    for i, (image, lines, ok) in enumerate(zip(images[:shown], titles, right, strict=False)):
        x = (i % columns) * (side + gap) + gap / 2
        y = top + (i // columns) * (head + side + gap) + head
        show(axis, image, x, y, side)
        text = "\n".join(fitted(each, side + gap - 0.1, size) for each in lines)
        colour = "black" if ok is None else RIGHT if ok else WRONG
        axis.text(x + side / 2, y - 0.03, text, ha="center", va="bottom", fontsize=size, color=colour)
    if top:
        axis.text(
            width / 2, 0.05, f"the first {shown} of {len(images)} queries", ha="center", va="top", fontsize=8
        )
    axis.set_xlim(0, width)
    axis.set_ylim(height + top, 0)
    axis.axis("off")
    drawing.save(figure, path)
