"""Paired differences of models on the same episodes, as a table and for figures."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from metarun.commands.cells import Cell, Reference
from metarun.reporting.console import console, inform
from metarun.tasks.objectives import Metric
from metarun.training.evaluation import paired_difference

LINES = 100  # the most lines of the table of differences; with more, it is not printed
MANY = 4  # with more models than this, the table of differences only shows pairs with the best model


def comparisons(cells: Sequence[Cell], references: bool = False) -> list[dict[str, Any]]:
    """Paired differences by each metric, for every two checkpoints with results on the same episodes.

    Args:
        cells: with results or without.
        references: whether two references are compared, too.
    """
    pairs = []
    for a, b in itertools.combinations([cell for cell in cells if cell.result], 2):
        assert a.result and b.result
        same = (a.dataset, a.task, a.shape) == (b.dataset, b.task, b.shape)
        if not references and isinstance(a.model, Reference) and isinstance(b.model, Reference):
            continue
        if not same or a.result.episodes_hash != b.result.episodes_hash:
            continue
        for metric in (metric for metric in a.metrics if metric in b.metrics):
            difference, half = paired_difference(a.result, b.result, metric)
            pairs.append(
                {
                    "dataset": a.dataset,
                    "task": a.task,
                    "a": a.model.name,
                    "b": b.model.name,
                    "metric": metric,
                    "difference": difference,
                    "interval": half,
                }
            )
    return pairs


def plain_pair(pair: dict[str, Any]) -> dict[str, Any]:
    """A pair with the name of its metric, for JSON."""
    return pair | {"metric": pair["metric"].name}


def best_models(cells: Sequence[Cell]) -> dict[tuple[str, str, Metric], str]:
    """The name of the best checkpoint of each dataset, task and metric."""
    best: dict[tuple[str, str, Metric], tuple[float, str]] = {}
    models = [cell for cell in cells if cell.result and not isinstance(cell.model, Reference)]
    for cell in models:
        for metric in cell.metrics:
            mean = cell.result.mean_of(metric)  # type: ignore[union-attr]
            key = cell.dataset, cell.task, metric
            if key not in best or metric.is_better(mean, than=best[key][0]):
                best[key] = mean, cell.model.name
    return {key: name for key, (_, name) in best.items()}


def with_the_best(pairs: Sequence[dict[str, Any]], cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The pairs that include the best model of their task by their metric."""
    best = best_models(cells)
    return [p for p in pairs if best[p["dataset"], p["task"], p["metric"]] in (p["a"], p["b"])]


def with_few_references(pairs: Sequence[dict[str, Any]], cells: Sequence[Cell]) -> Sequence[dict[str, Any]]:
    """The pairs, in which several references, such as players, are only compared with the best model."""
    references = {cell.model.name for cell in cells if isinstance(cell.model, Reference)}
    if len(references) < 2:
        return pairs
    best = with_the_best(pairs, cells)
    return [pair for pair in pairs if pair in best or not references & {pair["a"], pair["b"]}]


def report_pairs(pairs: Sequence[dict[str, Any]], cells: Sequence[Cell]) -> None:
    """Print the table of paired differences; of many models, only the pairs with the best one."""
    if not pairs:
        return
    models = {cell.model.name for cell in cells if not isinstance(cell.model, Reference)}
    shown = with_the_best(pairs, cells) if len(models) > MANY else with_few_references(pairs, cells)
    if len(shown) > LINES:
        inform(f"results.json contains the differences of {len(pairs)} pairs of models")
        return
    console.print(pair_table(shown))
    if len(shown) < len(pairs):
        what = "differences" if len(models) > MANY else "differences of references"
        inform(f"{what} to the best model of each task; results.json contains all {len(pairs)} pairs")


def pair_table(pairs: Sequence[dict[str, Any]]) -> Table:
    """The table of paired differences on screen."""
    several = len({pair["metric"] for pair in pairs}) > 1
    datasets = len({pair["dataset"] for pair in pairs}) > 1
    table = Table(title="differences on the same episodes")
    metric = ["metric"] if several else []
    for heading in ("task", "models", *metric, "difference, 95 % interval", "excludes 0"):
        table.add_column(heading, overflow="fold")
    for pair in pairs:
        clear = abs(pair["difference"]) > pair["interval"]
        text = pair["metric"].show_interval(pair["difference"], pair["interval"], signed=True)
        names = [
            Text(f"{pair['dataset']} {pair['task']}" if datasets else pair["task"]),
            Text(f"{pair['a']} - {pair['b']}"),
            *([pair["metric"].name] if several else []),
        ]
        table.add_row(*names, text, "yes" if clear else "no")
    return table


def difference_rows(
    rows: Sequence[dict[str, Any]],
    pairs: Sequence[dict[str, Any]],
    best: Mapping[tuple[str, str, Metric], str],
    metric: Metric,
) -> list[dict[str, Any]]:
    """The rows with the difference to the best model of their task as `mean`; see `plots.differences`."""
    values: dict[tuple[str, str, str], dict[str, Any]] = {}
    for pair in (pair for pair in pairs if pair["metric"] == metric):
        dataset, task, a, b = (pair[key] for key in ("dataset", "task", "a", "b"))
        name, difference = best[dataset, task, metric], pair["difference"]
        if name in (a, b):
            other, value = (b, 0.0 - difference) if name == a else (a, difference)  # no -0.0
            values[dataset, task, other] = {"mean": value, "interval": pair["interval"], "best": False}
            values[dataset, task, name] = {"mean": 0.0, "interval": math.nan, "best": True}
    keys = [(row["dataset"], row["cell"], row["model"]) for row in rows]
    return [row | values[key] for row, key in zip(rows, keys, strict=True) if key in values]
