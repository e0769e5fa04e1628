"""Figures of results, written as PNG files."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from metarun.errors import listed
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
Results = Mapping[Metric, Rows]  # rows with the `mean` and the `interval` of each metric

SPLIT_COLOURS = {"train": "#8c8c8c", "validation": COLOURS[0]}
BANDS = 6  # the most curves whose intervals can be drawn as bands; of more, they are bars at the markers


# training


def learning_curve(
    rows: Rows,
    metrics: Sequence[Metric],
    title: str,
    path: Path,
    validation: str = "validation",
    with_loss: bool = True,
) -> None:
    """Plot each metric and the loss, for training and validation, over iterations; with 95 % intervals.

    Args:
        rows: of metrics.jsonl.
        metrics: have a panel each.
        title: of the figure: the run and its training tasks.
        path: of the PNG file.
        validation: the label of the validation curve, which may be of other tasks.
        with_loss: whether the loss has a panel. That of a policy is about its own trajectories, and does not
            fall as the policy gets better.
    """
    shown: list[Metric | None] = [*metrics, None]
    if not with_loss or any(is_loss(metric, rows) for metric in metrics):
        shown.remove(None)
    figure, axes = panels(len(shown), 3, (5, 3.8))
    for axis, metric in zip(axes, shown, strict=True):
        for split, colour in SPLIT_COLOURS.items():
            own = [
                row for row in rows if row["split"] == split and (metric.name if metric else "loss") in row
            ]
            if own:
                curve(axis, own, metric, metrics, colour, validation if split == "validation" else split)
        axis.set_xlabel("iteration")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axis.set_title(fitted(metric.label if metric else "loss", 4, 12))
        axis.grid(alpha=0.3)
    # Below the panels, where it covers no curve; the panel of the loss has no intervals.
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    headline(figure, title, 12)
    drawing.save(figure, path)


def curve(
    axis: Axes, rows: Rows, metric: Metric | None, metrics: Sequence[Metric], colour: str, label: str
) -> None:
    """Plot a metric (None: the loss) of the rows of a split over iterations, with its intervals."""
    name, scale = (metric.name, metric.scale) if metric else ("loss", 1)
    x = [row["iteration"] for row in rows]
    y = scale * np.array([row[name] for row in rows])
    axis.plot(x, y, color=colour, label=label, linewidth=1.5, marker="." if len(x) < 30 else None)
    # A run that was started by an earlier version has the intervals of its main metric only.
    key = "interval" if metric is metrics[0] else f"{name} interval"
    if metric is None or not all(key in row for row in rows):
        return
    low, high = band(y, scale * np.array([row[key] for row in rows]), metric)
    if len(x) == 1:  # a band of one point has no area
        axis.vlines(x, low, high, colors=colour, alpha=0.4, linewidth=3, label="95 % interval")
    else:
        axis.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0, label="95 % interval")


def is_loss(metric: Metric, rows: Rows) -> bool:
    """Whether the scores of a metric are the losses, as the mean squared error is in a regression."""
    scored = [row for row in rows if metric.name in row]
    return bool(scored) and all(math.isclose(row[metric.name], row["loss"], rel_tol=1e-5) for row in scored)


def band(y: Any, half: Any, metric: Metric) -> tuple[Any, Any]:
    """The ends of intervals of scores (numbers or arrays), cut to the limits of the metric."""
    low, high = (metric.scale * limit for limit in metric.limits)
    return np.clip(y - half, low, high), np.clip(y + half, low, high)


# evaluation


def evaluation_grid(results: Results, path: Path, note: str = "") -> None:
    """Plot the score of each model with its 95 % interval: a panel for each metric and task.

    Args:
        results: the rows of results.csv, with the `mean` and the `interval` of each metric.
        path: of the PNG file.
        note: settings that all results have in common, for the title.
    """
    results = {metric: marked_best(named_cells(rows), metric) for metric, rows in results.items()}
    figure, axes = interval_panels(
        results, lambda metric: metric.label + (" (dotted: chance)" if metric.chance else "")
    )
    for metric, rows in results.items():
        own = axes[metric]
        limit_scores(next(iter(own.values())), rows, metric)
        if metric.chance:
            for cell, axis in own.items():
                ways = next(row["ways"] for row in rows if row["cell"] == cell)
                if ways is not None:  # of tasks of different ways
                    axis.axvline(metric.scale * metric.chance(ways), color="k", linestyle=":", linewidth=1)
    headline(figure, subject(results, note))
    drawing.save(figure, path)


def marked_best(rows: Rows, metric: Metric) -> Rows:
    """The rows, with `best` of those that have the best mean of their cell."""
    best: dict[str, float] = {}
    for row in rows:
        if row["cell"] not in best or metric.is_better(row["mean"], than=best[row["cell"]]):
            best[row["cell"]] = row["mean"]
    return [{**row, "best": row["mean"] == best[row["cell"]]} for row in rows]


def limit_scores(axis: Axes, rows: Rows, metric: Metric) -> None:
    """Choose the limits of the x axis of scores."""
    means = [metric.scale * row["mean"] for row in rows if math.isfinite(row["mean"])]
    if metric.percent and metric.higher_is_better:  # errors of calibration are small
        axis.set_xlim(-2, 102)
    elif metric.limits[0] == 0 and min(means, default=0) > 0 and max(means) > 50 * min(means):
        logarithmic(axis, "x")  # one diverged model must not hide the differences of the others
        axis.set_xlim(min(means) / 2, 2 * max(means))


def differences(results: Results, path: Path, note: str = "") -> None:
    """Plot the paired difference of each model to the best model of each task, with its 95 % interval.

    Args:
        results: as of `evaluation_grid`, where `mean` and `interval` are of the difference. The row of the
            best model of a task has a true `best`, the difference 0 and the interval NaN.
        path: of the PNG file.
        note: see `evaluation_grid`.
    """
    results = {metric: named_cells(rows) for metric, rows in results.items()}
    figure, axes = interval_panels(
        results, lambda metric: f"difference to the best model, {metric.label}", signed=True
    )
    for axis in (axis for own in axes.values() for axis in own.values()):
        axis.axvline(0, color="k", linewidth=1)
    headline(figure, f"{subject(results, note)}, on the same tasks")
    drawing.save(figure, path)


def interval_panels(
    results: Results, unit: Callable[[Metric], str], signed: bool = False
) -> tuple[Figure, dict[Metric, dict[str, Axes]]]:
    """A panel for each metric and cell, with a line a model: a point with its interval, and the numbers.

    Args:
        results: rows of each metric: `model`, `cell`, `mean`, `interval`, and whether it is the `best` of its
            cell.
        unit: the label of the x axes of a metric. The panels of a metric have one x axis.
        signed: whether the numbers are differences, which have a sign and no limits.

    Returns:
        The figure, and the axes by metric and cell.
    """
    cells = [(metric, cell) for metric, rows in results.items() for cell in dict.fromkeys(cells_in(rows))]
    models = list(dict.fromkeys(row["model"] for rows in results.values() for row in rows))
    labels = [fitted(model, 3, 8) for model in models]
    widest = max(width_of(label, 8) for label in labels)
    size = (3.6, 0.22 * len(models) + 0.95)
    figure, drawn = panels(len(cells), columns_for(results), size, sharey=True)
    figure.set_figwidth(figure.get_figwidth() + widest)
    axes: dict[Metric, dict[str, Axes]] = {}
    for axis, (metric, cell) in zip(drawn, cells, strict=True):
        own = axes.setdefault(metric, {})
        if own:
            axis.sharex(next(iter(own.values())))
        own[cell] = axis
        for row in (row for row in results[metric] if row["cell"] == cell):
            draw_interval(axis, models.index(row["model"]), row, metric, signed)
        axis.set_title(fitted(cell, 3.4, 9), fontsize=9)
        axis.tick_params(labelsize=8, labelbottom=True)
        axis.grid(alpha=0.3, axis="x")
        axis.set_xlabel(fitted(unit(metric), 3.4, 8), fontsize=8)
    drawn[0].set_yticks(range(len(models)), labels)
    drawn[0].set_ylim(len(models) - 0.4, -0.6)
    return figure, axes


def draw_interval(axis: Axes, line: int, row: Mapping[str, Any], metric: Metric, signed: bool) -> None:
    """Draw the score or the difference of a model on its line of a panel; see `interval_panels`."""
    mean, half = metric.scale * row["mean"], metric.scale * row["interval"]
    ends = (mean - half, mean + half) if signed else band(mean, half, metric)
    axis.plot(mean, line, **style(line), markersize=5)
    axis.plot(ends, (line, line), color=style(line)["color"], linewidth=1.5)
    text = "best" if signed and row["best"] else shown_interval(mean, half, metric, signed)
    weight, place = "bold" if row["best"] else "normal", axis.get_yaxis_transform()
    axis.text(1.02, line, text, transform=place, va="center", fontsize=7, fontweight=weight)


def cells_in(rows: Rows) -> list[str]:
    """The cell of each row."""
    return [row["cell"] for row in rows]


def columns_for(results: Results) -> int:
    """The most panels in a row: those of one metric if there are several metrics and two to four cells."""
    cells = max(len(set(cells_in(rows))) for rows in results.values())
    return cells if len(results) > 1 and 2 <= cells <= 4 else 3


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


def subject(results: Results, note: str) -> str:
    """What was evaluated, for the title of a figure."""
    rows = [row for own in results.values() for row in own]
    datasets = listed(list(dict.fromkeys(row["dataset"] for row in rows)))
    what = [
        datasets,
        rows[0]["split"],
        f"{rows[0]['episodes']} {rows[0].get('unit', 'episodes')}",
        note,
        "95 % intervals",
    ]
    return ", ".join(part for part in what if part)


def step_curves(results: Results, path: Path, note: str = "", unit: str = "inner steps") -> None:
    """Plot the score over inner steps, with 95 % intervals: a panel for each metric and task, a line a model.

    Args:
        results, path, note: those of `evaluation_grid`.
        unit: what `steps` of the rows are.
    """
    every = [row for rows in results.values() for row in rows]
    models = list(dict.fromkeys(row["model"] for row in every))
    several = len({row["dataset"] for row in every}) > 1
    tasks: dict[tuple[Metric, str, str], list[Mapping[str, Any]]] = {}
    for metric, rows in results.items():
        for row in rows:
            tasks.setdefault((metric, row["dataset"], row["task"]), []).append(row)
    figure, axes = panels(len(tasks), 3, (4.8, 3.8) if len(models) <= BANDS else (6.5, 5.2))
    lines: dict[str, Any] = {}  # collected over all panels, since a model may be missing in some
    for axis, ((metric, dataset, task), own) in zip(axes, tasks.items(), strict=True):
        step_panel(axis, own, models, metric, lines)
        axis.set_xlabel(unit)
        axis.set_title(fitted(f"{dataset}, {task}" if several else task, 4.5, 11), fontsize=11)
        axis.set_ylabel(fitted(metric.label, 3, 9), fontsize=9)
    size = 8 if len(lines) <= 20 else 6
    labels = [fitted(name, 3, size) for name in lines]
    legend = max(width_of(label, size) for label in labels) + 0.8  # inches
    figure.set_figwidth(figure.get_figwidth() + legend)
    figure.legend(lines.values(), labels, fontsize=size, loc="outside right upper", handlelength=3.5)
    headline(figure, subject(results, note), beside=legend)
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
        marked, look = slice(index % every, None, every), style(index)
        label = f"{model} (no steps)" if without else model
        (lines[label],) = axis.plot(
            x, y, **look, markersize=5, linewidth=1.2, markevery=marked
        )  # the markers of equal curves are not on each other
        if len(drawn) <= BANDS:
            axis.fill_between(x, low, high, color=look["color"], alpha=0.2, linewidth=0)
        else:
            axis.vlines(x[marked], low[marked], high[marked], colors=look["color"], linewidth=0.9, alpha=0.6)
    if log:
        logarithmic(axis, "y")
        # An inner loop with more steps than in training may diverge, which would flatten other curves.
        first = [
            row["mean"] for row in rows if row["steps"] in (None, steps[0]) and math.isfinite(row["mean"])
        ]
        ends = [row["mean"] + side * row["interval"] for row in rows for side in (-1, 1)]
        ends = finite + [end for end in ends if math.isfinite(end)]
        low, high = min(finite) / 3, 2 * max(first, default=max(finite))
        axis.set_ylim(max(low, 0.9 * min(ends)), min(high, 1.1 * max(ends)))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3, which="both")
