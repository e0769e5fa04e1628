"""Figures of results, written as PNG files."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from metarun.storage.files import atomic_write
from metarun.tasks.objectives import Metric

COLOURS = {"train": "#8c8c8c", "validation": "#1f77b4"}


def save(figure: Figure, path: Path) -> None:
    """Write a figure to a PNG file atomically, and close it."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # drawn as a box
        figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    plt.close(figure)
    atomic_write(path, lambda file: file.write(buffer.getvalue()))


def learning_curve(rows: Sequence[dict[str, Any]], metrics: Sequence[Metric], title: str, path: Path) -> None:
    """Plot each metric and the loss, for training and validation, over iterations."""
    figure, axes = plt.subplots(
        1, len(metrics) + 1, figsize=(5 * (len(metrics) + 1), 3.8), layout="constrained"
    )
    for axis, metric in zip(axes, [*metrics, None], strict=True):
        key, scale = (metric.name, metric.scale) if metric else ("loss", 1)
        for split, colour in COLOURS.items():
            own = [row for row in rows if row["split"] == split and key in row]
            x = [row["iteration"] for row in own]
            y = scale * np.array([row[key] for row in own])
            axis.plot(x, y, color=colour, label=split, linewidth=1.5, marker="." if len(x) < 30 else None)
            if metric is metrics[0] and split == "validation" and len(own) > 0:
                half = scale * np.array([row["interval"] for row in own])
                axis.fill_between(
                    x, y - half, y + half, color=colour, alpha=0.2, linewidth=0, label="95 % interval"
                )
        axis.set_xlabel("iteration")
        axis.set_title(metric.label if metric else "loss")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title)
    save(figure, path)


MOST_COLOURS = 6  # the most models that colours can distinguish


def evaluation_grid(rows: Sequence[dict[str, Any]], metric: Metric, path: Path) -> None:
    """Plot a bar for each checkpoint in each cell of ways and shots, with 95 % intervals."""
    rows = [row for row in rows if row.get("mean") is not None]
    if not rows:
        return
    if len({row["dataset"] for row in rows}) > 1:
        rows = [row | {"cell": f"{row['dataset']}\n{row['cell']}"} for row in rows]
    cells = list(dict.fromkeys(row["cell"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    if len(models) > MOST_COLOURS:
        evaluation_panels(rows, metric, cells, models, path)
        return
    width = 0.8 / len(models)
    figure, axis = plt.subplots(figsize=(max(4.0, 1.2 * len(cells) * max(1.0, len(models) / 2) + 2), 3.8))
    percent, scale = metric.percent, metric.scale
    for i, model in enumerate(models):
        own = [row for row in rows if row["model"] == model]
        x = np.array([cells.index(row["cell"]) + (i - (len(models) - 1) / 2) * width for row in own])
        y = np.array([scale * row["mean"] for row in own])
        bars = axis.bar(
            x, y, width * 0.92, yerr=[scale * row["interval"] for row in own], capsize=3, label=model
        )
        axis.bar_label(bars, fmt="%.1f" if percent else "%.3f", padding=3, fontsize=8)
    if metric.chance:
        for position, cell in enumerate(cells):
            chance = scale * metric.chance(next(row["ways"] for row in rows if row["cell"] == cell))
            label = "" if position else "chance"
            axis.hlines(
                chance, position - 0.45, position + 0.45, colors="k", linestyles="dotted", label=label
            )
    if percent:
        axis.set_ylim(0, 109)
    axis.set_xticks(range(len(cells)), cells)
    axis.set_ylabel(metric.label)
    axis.set_title(f"{datasets_of(rows)}, {rows[0]['split']}, {rows[0]['episodes']} episodes, 95 % intervals")
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    save(figure, path)


def evaluation_panels(
    rows: Sequence[dict[str, Any]], metric: Metric, cells: list[str], models: list[str], path: Path
) -> None:
    """Plot one panel for each cell with a labelled bar for each checkpoint; the best bar is coloured."""
    percent, scale = metric.percent, metric.scale
    columns = min(3, len(cells))
    lines = math.ceil(len(cells) / columns)
    size = (3.6 * columns + 2, (0.24 * len(models) + 0.9) * lines)
    figure, axes = plt.subplots(
        lines, columns, figsize=size, sharey=True, layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(cells) :]:
        axis.set_visible(False)
    for cell, axis in zip(cells, axes.flat, strict=False):
        own = {row["model"]: row for row in rows if row["cell"] == cell}
        y = [models.index(model) for model in own]
        means = [scale * row["mean"] for row in own.values()]
        best = max(means) if metric.higher_is_better else min(means)
        colours = ["C0" if mean == best else "C7" for mean in means]
        halves = [scale * row["interval"] for row in own.values()]
        bars = axis.barh(y, means, 0.8, xerr=halves, capsize=2, color=colours)
        axis.bar_label(bars, fmt="%.1f" if percent else "%.3f", padding=3, fontsize=7)
        axis.set_title(cell, fontsize=9)
        if metric.chance:
            chance = scale * metric.chance(next(iter(own.values()))["ways"])
            axis.axvline(chance, color="k", linestyle="dotted")
        if percent:
            axis.set_xlim(0, 115)
    for first in axes[:, 0]:
        first.set_yticks(range(len(models)), models, fontsize=8)
    axes[0, 0].invert_yaxis()
    unit = metric.label + (", chance dotted" if metric.chance else "")
    figure.suptitle(
        f"{datasets_of(rows)}, {rows[0]['split']}, {rows[0]['episodes']} episodes, {unit}", fontsize=10
    )
    save(figure, path)


def datasets_of(rows: Sequence[dict[str, Any]]) -> str:
    """The names of the datasets in the rows, for a title."""
    return ", ".join(dict.fromkeys(row["dataset"] for row in rows))


def step_curves(rows: Sequence[dict[str, Any]], metric: Metric, path: Path) -> None:
    """Plot the score over inner steps: a panel for each task, a line for each checkpoint, 95 % intervals."""
    rows = [row for row in rows if row.get("mean") is not None]
    tasks = list(dict.fromkeys((row["dataset"], row["ways"], row["shots"]) for row in rows))
    several = len({dataset for dataset, *_ in tasks}) > 1
    percent, scale = metric.percent, metric.scale
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(5.2 * len(tasks) + 1.5, 4), layout="constrained", squeeze=False
    )
    models = list(dict.fromkeys(row["model"] for row in rows))
    labels = {}  # collected over all panels, since a model may be missing in some
    for axis, task in zip(axes[0], tasks, strict=True):
        own = [row for row in rows if (row["dataset"], row["ways"], row["shots"]) == task]
        finite = [row["mean"] for row in own if math.isfinite(row["mean"])]
        logarithmic = not percent and not metric.higher_is_better and min(finite, default=0.0) > 0
        for i, model in enumerate(models):
            if all(row["model"] != model for row in own):
                continue
            line = sorted(
                (row["steps"], scale * row["mean"], scale * row["interval"])
                for row in own
                if row["model"] == model and row["steps"] is not None
            )
            if not line:  # a method without inner steps
                score = next(scale * row["mean"] for row in own if row["model"] == model)
                labels[f"{model} (no steps)"] = axis.axhline(score, color=f"C{i}", linestyle="--")
                continue
            x, y, half = (np.array(values, dtype=float) for values in zip(*line, strict=True))
            (labels[model],) = axis.plot(x, y, ".-", color=f"C{i}")
            # A logarithmic axis cannot show values below zero.
            low = np.maximum(y - half, y / 10) if logarithmic else y - half
            axis.fill_between(x, low, y + half, color=f"C{i}", alpha=0.2, linewidth=0)
        if logarithmic:
            axis.set_yscale("log")
            # An inner loop with more steps than in training may diverge, which would flatten other curves.
            fewest = min(row["steps"] for row in own if row["steps"] is not None)
            axis.set_ylim(top=2 * max(row["mean"] for row in own if row["steps"] in (None, fewest)))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_xlabel("inner steps")
        dataset, ways, shots = task
        axis.set_title((f"{dataset}, " if several else "") + f"{ways}-way {shots}-shot")
        axis.grid(alpha=0.3, which="both")
    axes[0, 0].set_ylabel(metric.label)
    axes[0, -1].legend(labels.values(), labels, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.suptitle(
        f"{datasets_of(rows)}, {rows[0]['split']}, {rows[0]['episodes']} episodes, 95 % intervals",
        fontsize=10,
    )
    save(figure, path)


def confusion_matrix(counts: Tensor, names: Sequence[str], title: str, path: Path) -> None:
    """Plot a confusion matrix: counts of examples of each class (row) predicted as each class (column)."""
    shares = (counts / counts.sum(1, keepdim=True).clamp_min(1)).numpy(force=True)
    side = 2.5 + 0.34 * len(names)
    figure, axis = plt.subplots(figsize=(side, side), layout="constrained")
    axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 20:
        for i, row in enumerate(counts.tolist()):
            for j, count in enumerate(row):
                if count:
                    colour = "white" if shares[i, j] > 0.6 else "black"
                    axis.text(j, i, str(count), ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    axis.set_xlabel("predicted class")
    axis.set_ylabel("class")
    axis.set_title(title, fontsize=9)
    save(figure, path)


def contact_sheet(rows: dict[str, Tensor], title: str, path: Path, mark: int = 0) -> None:
    """Plot a row of images [n, C, H, W] (uint8 or in [0, 1]) for each name; the first `mark` are support."""
    columns = max(len(images) for images in rows.values())
    figure, axes = plt.subplots(
        len(rows), columns, figsize=(1.1 * columns + 1.5, 1.15 * len(rows) + 0.5), squeeze=False
    )
    for line, (name, images) in zip(axes, rows.items(), strict=True):
        for column, axis in enumerate(line):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_frame_on(False)
            if column >= len(images):
                continue
            pixels = images[column].permute(1, 2, 0).numpy(force=True)
            top = 255 if pixels.dtype == np.uint8 else 1
            axis.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=top, interpolation="nearest")
            if column < mark:
                axis.set_xlabel("support", fontsize=7)
        line[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    save(figure, path)


def predictions(
    images: Tensor, titles: Sequence[str], right: Sequence[bool | None], path: Path, most: int = 60
) -> None:
    """Plot queries [B, C, H, W] in [0, 1] with predictions: right (green), wrong (red), unknown (black)."""
    shown = min(len(images), most)
    columns = min(10, shown)
    lines = -(-shown // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(1.5 * columns, 1.75 * lines), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, title, ok in zip(axes.flat, images, titles, right, strict=False):
        pixels = image.permute(1, 2, 0).numpy(force=True)
        axis.imshow(pixels.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_title(title, fontsize=7, color="black" if ok is None else "green" if ok else "red")
    if len(images) > shown:
        figure.suptitle(f"the first {shown} of {len(images)} queries", fontsize=8)
    figure.tight_layout()
    save(figure, path)


def regression_curves(
    support: tuple[Tensor, Tensor], query: tuple[Tensor, Tensor], curves: dict[str, Tensor], path: Path
) -> None:
    """Plot a regression task: support points, the true curve, and the predicted curves by name."""
    x, truth = (tensor.flatten().numpy(force=True) for tensor in query)
    order = x.argsort()
    figure, axis = plt.subplots(figsize=(6, 4))
    axis.plot(x[order], truth[order], "k-", label="truth")
    for name, y in curves.items():
        axis.plot(x[order], y.flatten().numpy(force=True)[order], "--", label=name)
    points_x, points_y = (tensor.flatten().numpy(force=True) for tensor in support)
    axis.plot(points_x, points_y, "m^", label="support")
    axis.set_xlabel("x")
    axis.set_ylabel("y")
    axis.set_title("one task, before and after adapting")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, path)
