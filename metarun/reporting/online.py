"""The figure of a stream of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator

from metarun.reporting import drawing
from metarun.reporting.drawing import headline, panels, style

WINDOW = 5  # tasks that a curve is averaged over
MOST_TICKS = 10


def stream_curves(
    final: Mapping[str, Sequence[float]],
    arriving: Mapping[str, Sequence[tuple[int, float]]],
    threshold: float,
    title: str,
    path: Path,
) -> None:
    """Plot the accuracy on each task, and how it rises while the images of a task arrive.

    Args:
        final: the accuracy after all images of each task, by learner.
        arriving: images that have arrived, each with the mean accuracy on the tasks of the second half.
        threshold: the accuracy from which a task counts as learned.
        title: of the figure.
        path: of the PNG file.
    """
    figure, axes = panels(2, 2, (5.2, 3.8), sharey=True)
    for i, name in enumerate(final):
        look: dict[str, Any] = style(i)
        y = 100 * np.asarray(final[name], dtype=float)
        x = np.arange(1, len(y) + 1)
        axes[0].plot(x, y, **{**look, "linestyle": ""}, markersize=5, alpha=0.6, markeredgewidth=0)
        axes[0].plot(x, smoothed(y), color=look["color"], linewidth=1.8, label=name)
        images, accuracies = zip(*arriving[name], strict=True)
        axes[1].plot(images, 100 * np.asarray(accuracies), **look, linewidth=1.8)
    axes[1].set_xticks(images if len(images) <= MOST_TICKS else images[:: -(-len(images) // MOST_TICKS)])
    headings = (
        f"task; lines: means of {WINDOW}",
        "images of a task so far; mean of the second half of the tasks",
    )
    for axis, heading in zip(axes, headings, strict=True):
        axis.axhline(100 * threshold, color="0.5", linewidth=1, linestyle=":")
        axis.set_xlabel(heading)
        axis.grid(alpha=0.3)
    axes[0].xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("accuracy, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    headline(figure, title, 12)
    drawing.save(figure, path)


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of each value and those before it, in a window; NaN counts as missing."""
    rows = [values[max(0, i - WINDOW + 1) : i + 1] for i in range(len(values))]
    return np.array([np.nan if np.isnan(row).all() else np.nanmean(row) for row in rows])
