"""The figure of a stream of tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metarun.reporting import drawing
from metarun.reporting.drawing import headline, panels, style

WINDOW = 5  # tasks that a curve is averaged over


def stream_curves(
    final: Mapping[str, Sequence[float]],
    needed: Mapping[str, Sequence[float]],
    threshold: float,
    title: str,
    path: Path,
) -> None:
    """Plot the accuracy on each task, and the images that it took to reach a threshold.

    Args:
        final: the accuracy after all images of each task, by learner.
        needed: the images after which the accuracy was above the threshold, NaN where it never was.
        threshold: the accuracy.
        title: of the figure.
        path: of the PNG file.
    """
    figure, axes = panels(2, 2, (5.2, 3.8))
    headings = ("accuracy, %", f"images until {100 * threshold:g} %")
    for axis, curves, heading in zip(axes, (final, needed), headings, strict=True):
        for i, (name, values) in enumerate(curves.items()):
            look: dict[str, Any] = style(i)
            y = np.asarray(values, dtype=float) * (100 if axis is axes[0] else 1)
            x = np.arange(1, len(y) + 1)
            axis.plot(x, y, **{**look, "linestyle": ""}, markersize=3, alpha=0.4)
            axis.plot(x, smoothed(y), color=look["color"], linewidth=1.8, label=name)
        axis.set_xlabel("task")
        axis.set_ylabel(heading)
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=9)
    headline(figure, title, 12)
    drawing.save(figure, path)


def smoothed(values: np.ndarray) -> np.ndarray:
    """The mean of each value and those before it, in a window; NaN counts as missing."""
    rows = [values[max(0, i - WINDOW + 1) : i + 1] for i in range(len(values))]
    return np.array([np.nan if np.isnan(row).all() else np.nanmean(row) for row in rows])
