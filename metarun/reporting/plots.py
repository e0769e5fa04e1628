"""Figures of results, written as PNG files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from metarun.reporting import drawing
from metarun.reporting.drawing import (
    COLOURS,
    fitted,
    headline,
    logarithmic,
    panels,
    style,
    width_of,
)
from metarun.tasks.objectives import Metric

Rows = Sequence[Mapping[str, Any]]

SPLIT_COLOURS = {"train": "#8c8c8c", "validation": COLOURS[0]}
BANDS = 6  # the most curves whose intervals can be drawn as bands; of more, every interval is a bar


# training


def learning_curve(rows: Rows, metrics: Sequence[Metric], title: str, path: Path) -> None:
    """Plot each metric and the loss, for training and validation, over iterations; with 95 % intervals."""
    shown: list[Metric | None] = [*metrics, None]
    if any(is_loss(metric, rows) for metric in metrics):
        shown.remove(None)
    figure, axes = panels(len(shown), 3, (5, 3.8))
    for axis, metric in zip(axes, shown, strict=True):
        name, scale = (metric.name, metric.scale) if metric else ("loss", 1)
        for split, colour in SPLIT_COLOURS.items():
            own = [row for row in rows if row["split"] == split and name in row]
            x = [row["iteration"] for row in own]
            y = scale * np.array([row[name] for row in own])
            axis.plot(x, y, color=colour, label=split, linewidth=1.5, marker="." if len(x) < 30 else None)
            # A run that was started by an earlier version has the intervals of its main metric only.
            key = "interval" if metric is metrics[0] else f"{name} interval"
            if metric and own and split == "validation" and all(key in row for row in own):
                low, high = band(y, scale * np.array([row[key] for row in own]), metric)
                axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0, label="95 % interval")
        axis.set_xlabel("iteration")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.set_title(fitted(metric.label if metric else "loss", 4, 12))
        axis.grid(alpha=0.3)
        axis.legend()
    headline(figure, title, 12)
    drawing.save(figure, path)


def is_loss(metric: Metric, rows: Rows) -> bool:
    """Whether the scores of a metric are the losses, as the mean squared error is in a regression."""
    scored = [row for row in rows if metric.name in row]
    return bool(scored) and all(math.isclose(row[metric.name], row["loss"], rel_tol=1e-5) for row in scored)


def band(y: Any, half: Any, metric: Metric) -> tuple[Any, Any]:
    """The ends of intervals of scores (numbers or arrays), cut to the limits of the metric."""
    low, high = (metric.scale * limit for limit in metric.limits)
    return np.clip(y - half, low, high), np.clip(y + half, low, high)


# evaluation


def evaluation_grid(rows: Rows, metric: Metric, path: Path) -> None:
    """Plot the score of each model with its 95 % interval: a panel for each task."""
    rows = named_cells([row for row in rows if row.get("mean") is not None])
    if not rows:
        return
    unit = metric.label + (" (dotted: chance)" if metric.chance else "")
    best: dict[str, float] = {}
    for row in rows:
        if row["cell"] not in best or metric.is_better(row["mean"], than=best[row["cell"]]):
            best[row["cell"]] = row["mean"]
    rows = [{**row, "best": row["mean"] == best[row["cell"]]} for row in rows]
    figure, axes, cells = interval_panels(rows, metric, unit)
    scale = metric.scale
    means = [scale * row["mean"] for row in rows if math.isfinite(row["mean"])]
    if metric.percent:
        axes[0].set_xlim(-2, 102)
    elif metric.limits[0] == 0 and min(means, default=0) > 0 and max(means) > 50 * min(means):
        logarithmic(axes[0], "x")  # one diverged model must not hide the differences of the others
        axes[0].set_xlim(min(means) / 2, 2 * max(means))
    for axis, own in zip(axes, cells.values(), strict=True):
        if metric.chance:
            axis.axvline(scale * metric.chance(own[0]["ways"]), color="k", linestyle=":", linewidth=1)
    headline(figure, subject(rows))
    drawing.save(figure, path)


def differences(rows: Rows, metric: Metric, path: Path) -> None:
    """Plot the paired difference of each model to the best model of each task, with its 95 % interval.

    Args:
        rows: as of `evaluation_grid`, where `mean` and `interval` are of the difference. The row of the best
            model of a task has a true `best`, the difference 0 and the interval NaN.
        metric: the scores.
        path: of the PNG file.
    """
    rows = named_cells(rows)
    figure, axes, _ = interval_panels(
        rows, metric, f"difference to the best model, {metric.label}", signed=True
    )
    for axis in axes:
        axis.axvline(0, color="k", linewidth=1)
    headline(figure, f"{subject(rows)}, on the same tasks")
    drawing.save(figure, path)


def interval_panels(
    rows: Rows, metric: Metric, unit: str, signed: bool = False
) -> tuple[Figure, list[Axes], dict[str, list[Mapping[str, Any]]]]:
    """A panel for each cell, with a line for each model: a point with its interval, and the numbers.

    Args:
        rows: `model`, `cell`, `mean`, `interval`, and whether it is the `best` of its cell.
        metric: the scores.
        unit: the label of the x axes.
        signed: whether the numbers are differences, which have a sign and no limits.

    Returns:
        The figure, the axes, and the rows of each cell.
    """
    cells: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        cells.setdefault(row["cell"], []).append(row)
    models = list(dict.fromkeys(row["model"] for row in rows))
    labels = [fitted(model, 3, 8) for model in models]
    widest = max(width_of(label, 8) for label in labels)
    size = (3.6, 0.22 * len(models) + 0.95)
    figure, axes = panels(len(cells), 3, size, sharex=True, sharey=True)
    figure.set_figwidth(figure.get_figwidth() + widest)
    scale = metric.scale
    for axis, (cell, own) in zip(axes, cells.items(), strict=True):
        for row in own:
            i = models.index(row["model"])
            mean, half = scale * row["mean"], scale * row["interval"]
            ends = (mean - half, mean + half) if signed else band(mean, half, metric)
            axis.plot(mean, i, **style(i), markersize=5)
            axis.plot(ends, (i, i), color=style(i)["color"], linewidth=1.5)
            text = "best" if signed and row["best"] else shown_interval(mean, half, metric, signed)
            weight, place = "bold" if row["best"] else "normal", axis.get_yaxis_transform()
            axis.text(1.02, i, text, transform=place, va="center", fontsize=7, fontweight=weight)
        axis.set_title(fitted(cell, 3.4, 9), fontsize=9)
        axis.tick_params(labelsize=8, labelbottom=True)
        axis.grid(alpha=0.3, axis="x")
        axis.set_xlabel(fitted(unit, 3.4, 8), fontsize=8)
    axes[0].set_yticks(range(len(models)), labels)
    axes[0].set_ylim(len(models) - 0.4, -0.6)
    return figure, axes, cells


def shown_interval(mean: float, half: float, metric: Metric, signed: bool) -> str:
    """The numbers beside a point, in the unit of the axis."""
    digits = 1 if metric.percent else 3
    sign = "+" if signed else ""
    form = f".{digits}f" if abs(mean) < 1e4 else ".1e"
    return f"{mean:{sign}{form}} ± {half:{form}}"


def named_cells(rows: Rows) -> Rows:
    """The rows, whose cells name the dataset if there are several."""
    if len({row["dataset"] for row in rows}) <= 1:
        return rows
    return [{**row, "cell": f"{row['dataset']}, {row['cell']}"} for row in rows]


def subject(rows: Rows) -> str:
    """What was evaluated, for the title of a figure."""
    datasets = ", ".join(dict.fromkeys(row["dataset"] for row in rows))
    return f"{datasets}, {rows[0]['split']}, {rows[0]['episodes']} episodes, 95 % intervals"


def step_curves(rows: Rows, metric: Metric, path: Path) -> None:
    """Plot the score over inner steps: a panel for each task, a line for each model, 95 % intervals."""
    rows = [row for row in rows if row.get("mean") is not None]
    models = list(dict.fromkeys(row["model"] for row in rows))
    tasks: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        tasks.setdefault((row["dataset"], row["task"]), []).append(row)
    several = len({dataset for dataset, _ in tasks}) > 1
    figure, axes = panels(len(tasks), 3, (4.8, 3.8) if len(models) <= BANDS else (6.5, 5.2))
    lines: dict[str, Any] = {}  # collected over all panels, since a model may be missing in some
    for axis, ((dataset, task), own) in zip(axes, tasks.items(), strict=True):
        step_panel(axis, own, models, metric, lines)
        axis.set_title(fitted(f"{dataset}, {task}" if several else task, 4.5, 11), fontsize=11)
        axis.set_ylabel(fitted(metric.label, 3, 9), fontsize=9)
    size = 8 if len(lines) <= 20 else 6
    labels = [fitted(name, 3, size) for name in lines]
    legend = max(width_of(label, size) for label in labels) + 0.8  # inches
    figure.set_figwidth(figure.get_figwidth() + legend)
    figure.legend(lines.values(), labels, fontsize=size, loc="outside right upper", handlelength=3.5)
    headline(figure, subject(rows), beside=legend)
    drawing.save(figure, path)


def step_panel(axis: Axes, rows: Rows, models: Sequence[str], metric: Metric, lines: dict[str, Any]) -> None:
    """Plot the curves of one task.

    Args:
        axis: the panel.
        rows: `model`, `steps` (None for a model without inner steps), `mean` and `interval`.
        models: all models of the figure, in the order of their styles.
        metric: the scores.
        lines: receives the line of each model, by its label.
    """
    scale = metric.scale
    steps = sorted({row["steps"] for row in rows if row["steps"] is not None}) or [0]
    finite = [row["mean"] for row in rows if math.isfinite(row["mean"])]
    log = not metric.percent and not metric.higher_is_better and min(finite, default=0.0) > 0
    drawn = list(dict.fromkeys(row["model"] for row in rows))
    for model in drawn:
        own = [row for row in rows if row["model"] == model]
        if without := own[0]["steps"] is None:
            own = [{**own[0], "steps": step} for step in steps]
        own.sort(key=lambda row: row["steps"])
        x, y, half = (np.array([row[key] for row in own], float) for key in ("steps", "mean", "interval"))
        y, half = scale * y, scale * half
        low, high = band(y, half, metric)
        if log:  # a logarithmic axis cannot show values below zero
            low = np.maximum(low, y / 10)
        index, every = models.index(model), max(1, len(x) // 8)
        look = style(index)
        label = f"{model} (no steps)" if without else model
        (lines[label],) = axis.plot(
            x, y, **look, markersize=5, linewidth=1.2, markevery=(index % every, every)
        )  # the markers of equal curves are not on each other
        if len(drawn) <= BANDS:
            axis.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)
        else:
            axis.vlines(x, low, high, colors=look["color"], linewidth=0.6, alpha=0.6)
    if log:
        logarithmic(axis, "y")
        # An inner loop with more steps than in training may diverge, which would flatten other curves.
        first = [
            row["mean"] for row in rows if row["steps"] in (None, steps[0]) and math.isfinite(row["mean"])
        ]
        axis.set_ylim(min(finite) / 3, 2 * max(first, default=max(finite)))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("inner steps")
    axis.grid(alpha=0.3, which="both")


# tasks


def regression_curves(
    support: tuple[Tensor, Tensor], query: tuple[Tensor, Tensor], curves: Mapping[str, Tensor], path: Path
) -> None:
    """Plot a regression task: support points, the true curve, and the predicted curves by name."""
    x, truth = (tensor.flatten().numpy(force=True) for tensor in query)
    order = x.argsort()
    figure, (axis,) = panels(1, 1, (6, 4))
    axis.plot(x[order], truth[order], "k-", label="truth")
    for i, (name, y) in enumerate(curves.items()):
        look: dict[str, Any] = {"color": COLOURS[i % 6], "linestyle": ("--", "-.", ":")[i % 3]}
        axis.plot(x[order], y.flatten().numpy(force=True)[order], **look, label=name)
    points_x, points_y = (tensor.flatten().numpy(force=True) for tensor in support)
    axis.plot(points_x, points_y, "k^", label="support")
    axis.set_xlabel("x")
    axis.set_ylabel("y")
    axis.set_title("one task, before and after adapting")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    drawing.save(figure, path)
