"""Fixed tasks of files, scored one by one: one table, a total with its interval over tasks, and files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

from metarun.commands.one_task import Task, adapt_to, user_task
from metarun.commands.predictions import SHOWN, class_rows, known_targets, note_dependence, value_rows
from metarun.config.schema import AdaptConfig
from metarun.datasets import images
from metarun.errors import DataError, MetarunError, counted
from metarun.inference.model import Model
from metarun.reporting.console import Bar, console, inform, naming, relative
from metarun.storage.files import user_path, write_csv, write_json
from metarun.tasks.objectives import Metric
from metarun.training.evaluation import interval


@dataclass(frozen=True)
class Scored:
    """One model on one task.

    Args:
        name: of the task.
        facts: the numbers of its classes, support examples and queries.
        scores: of the queries with known targets, by the name of the metric; empty if there are none.
        predictions: a row for each query.
    """

    name: str
    facts: Mapping[str, int]
    scores: Mapping[str, float]
    predictions: Sequence[Mapping[str, Any]]


Results = dict[str, tuple[Model, list[Scored]]]  # a model and its scores on all tasks, by its name


def run(command: AdaptConfig, model: Model, folder: Path) -> float:
    """Adapt to each task in `tasks`, predict its queries, and report all; returns the mean score."""
    assert command.tasks is not None
    found = task_paths(user_path(command.tasks))
    scored: list[Scored] = []
    said: set[str] = set()
    with Bar("adapt", len(found), "tasks") as bar:
        for name, (support, query) in found.items():
            with naming(name, said), errors_naming(name):
                task = user_task(replace(command, support=str(support), query=str(query)), model)
                scored.append(score(name, task, model, command.seed, command.reject, command.views))
            bar.advance()
    metrics = model.objective(command.metrics).metrics
    console.print(table_of(scored, metrics, f"{model.name}: {counted(len(scored), 'task')}"))
    note_dependence(model.algorithm)
    write(folder, {model.name: (model, scored)}, [metric.name for metric in metrics])
    write_csv(folder / "predictions.csv", [{"task": s.name, **row} for s in scored for row in s.predictions])
    inform(f"saved results.csv, results.json and predictions.csv in {relative(folder)}")
    return mean_and_interval(scored, metrics[0].name)[0]


def task_paths(root: Path) -> dict[str, tuple[Path, Path]]:
    """The support and the query of each task below a folder, by the name of its sub-folder.

    Raises:
        DataError: there are no sub-folders, or one of them is no task.
    """
    images.require_folder(root)
    if (root / "support").exists():
        raise DataError(
            f"{root}: is one task; name the folder of its folder, or set support and query instead"
        )
    folders = [path for path in images.visible(root) if path.is_dir()]
    if not folders:
        raise DataError(
            f"{root}: has no sub-folders; it needs one for each task, with support and query in it"
        )
    return {folder.name: (part(folder, "support"), part(folder, "query")) for folder in folders}


def part(folder: Path, name: str) -> Path:
    """The folder of this name in the folder of a task, or the file such as NAME.csv. Raises DataError."""
    found = [path for path in images.visible(folder) if name in (path.name, path.stem)]
    if not found:
        raise DataError(
            f"{folder}: has no {name}; add a folder {name}, or for texts and tables a file {name}.csv"
        )
    if len(found) > 1:
        raise DataError(f"{folder}: has {found[0].name} and {found[1].name}; remove one of them")
    return found[0]


@contextmanager
def errors_naming(task: str) -> Iterator[None]:
    """Name the task in errors whose message does not."""
    try:
        yield
    except MetarunError as error:
        if task in str(error):
            raise
        raise type(error)(f"task {task}: {error}") from error


def score(
    name: str, task: Task, model: Model, seed: int, reject: float | None = None, views: int = 1
) -> Scored:
    """Adapt a model to a task and score its queries. Raises as `adapt_to`, and DataError without queries."""
    if not task.has_queries:
        raise DataError(f"task {name}: has no queries; add some")
    steps, _, outputs = adapt_to(task, model, seed, views)
    assert outputs is not None
    episode, names = task.episode, [metric.name for metric in task.objective.metrics]
    scores = {each: steps[-1][f"query {each}"] for each in names if f"query {each}" in steps[-1]}
    classes, queries = list(task.classes), episode.query_x.shape[1]
    facts = {"classes": len(classes)} if classes else {}
    facts |= {"support": episode.support_x.shape[1], "queries": queries}
    facts |= {"scored": int(known_targets(episode.query_y).sum())}
    if classes:
        rows = class_rows(task.query_names, classes, outputs, episode.query_y, reject)
        kept = ("query", "prediction", "probability", "class")  # the other columns are of the task's classes
        return Scored(name, facts, scores, [{key: row[key] for key in kept} for row in rows])
    units = task.objective.to_units
    return Scored(name, facts, scores, value_rows(task.query_names, units(outputs), units(episode.query_y)))


def mean_and_interval(scored: Sequence[Scored], metric: str) -> tuple[float, float]:
    """The mean over the tasks that have a score, NaN if none has, and half of its 95 % interval."""
    values = torch.tensor([each.scores[metric] for each in scored if each.scores], dtype=torch.float64)
    return values.mean().item(), interval(values)


def shown(mean: float, half: float, metric: Metric) -> str:
    """A mean with its interval, which one task does not have."""
    if math.isnan(mean):
        return ""
    return metric.show(mean, 2) if math.isnan(half) else metric.show_interval(mean, half)


def table_of(scored: Sequence[Scored], metrics: Sequence[Metric], title: str) -> Table:
    """A row for each of the first tasks, and one for their mean."""
    more = len(scored) > SHOWN
    caption = f"the first {SHOWN} tasks; all are in results.csv" if more else None
    table = Table(title=Text(title), caption=caption)
    table.add_column("task", overflow="fold")
    for heading in [*scored[0].facts, *(metric.name for metric in metrics)]:
        table.add_column(heading, justify="right", no_wrap=True)
    for each in scored[:SHOWN]:
        figures = [metric.show(each.scores[metric.name]) if each.scores else "" for metric in metrics]
        table.add_row(Text(each.name), *map(str, each.facts.values()), *figures)
    table.add_section()
    means = [shown(*mean_and_interval(scored, metric.name), metric) for metric in metrics]
    table.add_row("mean, 95 % interval", *[""] * len(scored[0].facts), *means)
    return table


def write(
    folder: Path,
    results: Results,
    metrics: Sequence[str],
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write results.csv, a row for each model and task, and results.json, also with the means.

    Args:
        folder: the output folder.
        results: the scores of each model, by its name.
        metrics: the names of those that were scored.
        about: further entries of results.json.
    """
    rows = [
        {"model": name, "task": each.name, **each.facts, **each.scores}
        for name, (_, scored) in results.items()
        for each in scored
    ]
    means = []
    for name, (model, scored) in results.items():
        facts = {"model": name, "checkpoint": str(model.path), "tasks": len(scored)}
        dependent = model.algorithm.uses_query_statistics
        for metric in metrics:
            mean, half = (None if math.isnan(v) else v for v in mean_and_interval(scored, metric))
            figures = {"metric": metric, "mean": mean, "interval": half}
            means.append(facts | figures | {"uses_query_statistics": dependent})
    write_json(folder / "results.json", {"results": means, "tasks": rows, **(about or {})})
    write_csv(folder / "results.csv", rows)
