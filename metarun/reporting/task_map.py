"""The picture of `metarun data describe=true`: tasks as points, close to each other if they are alike."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from metarun.reporting import drawing
from metarun.reporting.drawing import MARKERS, headline, panels


def task_map(
    points: np.ndarray, shade: Sequence[float], meaning: str, groups: Sequence[str], title: str, path: Path
) -> None:
    """Plot tasks as numbered points.

    Args:
        points: [tasks, 2].
        shade: a number for each task, shown as its colour.
        meaning: what this number is.
        groups: the dataset of each task, shown as its marker.
        title: of the figure.
        path: of the PNG file.
    """
    figure, (axis,) = panels(1, 1, (6.0, 5.0))
    shades = np.asarray(shade)
    names = list(dict.fromkeys(groups))
    scale = Normalize(np.nanmin(shades), np.nanmax(shades))
    for i, name in enumerate(names):
        chosen = np.asarray([group == name for group in groups])
        axis.scatter(
            points[chosen, 0],
            points[chosen, 1],
            c=shades[chosen],
            cmap="viridis",
            norm=scale,
            marker=MARKERS[i % len(MARKERS)],
            s=45,
            label=name,
        )
    for number, (x, y) in enumerate(points):
        axis.annotate(str(number), (x, y), (4, 4), textcoords="offset points", fontsize=6)
    axis.set_aspect("equal", "datalim")
    axis.set_xticks([])
    axis.set_yticks([])
    if len(names) > 1:
        axis.legend(fontsize=7)
    figure.colorbar(ScalarMappable(scale, "viridis"), ax=axis, label=meaning).ax.tick_params(labelsize=7)
    headline(figure, title)
    drawing.save(figure, path)
