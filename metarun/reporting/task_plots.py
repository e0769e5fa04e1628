"""Figures of one task: predicted curves, and where the episodes of a policy went."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from metarun.reporting import drawing
from metarun.reporting.drawing import COLOURS, panels


def regression_curves(
    support: tuple[Tensor, Tensor],
    query: tuple[Tensor, Tensor],
    curves: Mapping[str, Tensor],
    path: Path,
    bands: Mapping[str, Tensor],
) -> None:
    """Plot a regression task: support points, the true curve, and the predicted curves by name.

    Args:
        support, query: x and y of the examples.
        curves: predictions for the queries.
        path: of the PNG file.
        bands: their standard deviations, if there are some; each curve then has a panel with a band of 1.96
            standard deviations on both sides.
    """
    x, truth = (tensor.flatten().numpy(force=True) for tensor in query)
    order = x.argsort()
    figure, axes = panels(len(curves), 3, (4, 3.4), sharey=True) if bands else panels(1, 1, (6, 4))
    for axis in axes:
        axis.plot(x[order], truth[order], "k-", label="truth", linewidth=1)
    for i, (name, y) in enumerate(curves.items()):
        axis, mean = axes[i % len(axes)], y.flatten().numpy(force=True)[order]
        colour = COLOURS[i % 6]
        axis.plot(x[order], mean, color=colour, linestyle=("--", "-.", ":")[i % 3], label=name)
        if name in bands:
            half = 1.96 * bands[name].flatten().numpy(force=True)[order]
            axis.fill_between(x[order], mean - half, mean + half, color=colour, alpha=0.2, linewidth=0)
            axis.set_title(f"{name}, ±1.96 deviations")
    points_x, points_y = (tensor.flatten().numpy(force=True) for tensor in support)
    for axis in axes:
        axis.plot(points_x, points_y, "k^", label="support")
        axis.set_xlabel("x")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axes[0].set_ylabel("y")
    if not bands:
        axes[0].set_title("one task, before and after adapting" if len(curves) > 1 else "one task")
    drawing.save(figure, path)


def paths(ways: Mapping[str, Tensor], goal: Tensor | None, path: Path) -> None:
    """Plot where the episodes of one task went: a panel for each policy, with common axes.

    Args:
        ways: by the titles of the panels, [E, H, 2]; NaN after the end of an episode.
        goal: where the goal is, [2]; None if there is none.
        path: of the PNG file.
    """
    figure, axes = panels(len(ways), 3, (3.6, 3.6))
    points = torch.cat([each.reshape(-1, 2) for each in ways.values()])
    points = points[points.isfinite().all(1)].cpu()
    low, high = points.quantile(0.01, dim=0), points.quantile(0.99, dim=0)
    if goal is not None:
        low, high = torch.minimum(low, goal.cpu()), torch.maximum(high, goal.cpu())
    middle, half = (low + high) / 2, 0.6 * (high - low).max().item() + 1e-6
    for axis, (title, each) in zip(axes, ways.items(), strict=True):
        for i, episode in enumerate(each.numpy(force=True)):
            axis.plot(*episode.T, color=COLOURS[i % len(COLOURS)], linewidth=1, alpha=0.8)
        axis.plot(*each[0, 0].numpy(force=True), "ko", markersize=5, label="start")
        if goal is not None:
            axis.plot(*goal.numpy(force=True), "k*", markersize=12, label="goal")
        axis.set_xlim(middle[0].item() - half, middle[0].item() + half)
        axis.set_ylim(middle[1].item() - half, middle[1].item() + half)
        axis.set_aspect("equal")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=9)
    drawing.save(figure, path)
