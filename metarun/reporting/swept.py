"""The figure of a sweep: scores over a setting that is a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from metarun.reporting import drawing
from metarun.reporting.drawing import fitted, headline, logarithmic, panels, style, width_of
from metarun.reporting.plots import band
from metarun.tasks.objectives import Metric

Curve = Sequence[Mapping[str, Any]]  # points: the value `x` of the setting, `mean` and `interval`
FAR = 20  # the ratio of the largest to the smallest value from which an axis is logarithmic


def setting_curves(
    curves: Mapping[str, Mapping[str, Curve]], metric: Metric, title: str, path: Path, joined: bool = True
) -> None:
    """Plot the score over each setting, with 95 % intervals: a panel for each setting.

    Args:
        curves: for each setting, the points of each combination of the other settings.
        metric: the score.
        title: of the figure.
        path: of the PNG file.
        joined: whether the points of a curve differ in this setting only.
    """
    names = list(dict.fromkeys(name for own in curves.values() for name in own))
    figure, axes = panels(len(curves), 3, (5, 3.8))
    for axis, (setting, own) in zip(axes, curves.items(), strict=True):
        for name, points in own.items():
            ordered = sorted(points, key=lambda point: point["x"])
            x, y, half = (np.array([point[key] for point in ordered]) for key in ("x", "mean", "interval"))
            y, half = metric.scale * y, metric.scale * half
            low, high = band(y, half, metric)
            look = style(names.index(name))
            axis.plot(x, y, **look, markersize=5, linewidth=1.2 if joined else 0)
            axis.vlines(x, low, high, colors=look["color"], linewidth=0.9, alpha=0.6)
        values = [point["x"] for points in own.values() for point in points]
        if min(values) > 0 and max(values) >= FAR * min(values):
            logarithmic(axis, "x")
        axis.set_xlabel(fitted(setting, 4.5, 10))
        axis.set_ylabel(fitted(metric.label, 3, 9), fontsize=9)
        axis.grid(alpha=0.3, which="both")
    if len(names) > 1:
        size = 8 if len(names) <= 20 else 6
        labels = [fitted(name, 3, size) for name in names]
        legend = max(width_of(label, size) for label in labels) + 0.8  # inches
        figure.set_figwidth(figure.get_figwidth() + legend)
        lines = [axes[0].plot([], [], **style(i))[0] for i in range(len(names))]
        figure.legend(lines, labels, fontsize=size, loc="outside right upper", handlelength=3.5)
        headline(figure, title, beside=legend)
    else:
        headline(figure, title)
    drawing.save(figure, path)
