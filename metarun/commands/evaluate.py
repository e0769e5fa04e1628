"""`metarun eval`: evaluates checkpoints on a grid of ways, shots and inner steps."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.table import Table
from rich.text import Text
from torch import Tensor

from metarun.commands import benchmarks
from metarun.commands.cells import Cell, cells_of, check_before_loading, shapes_for
from metarun.commands.differences import best_models, comparisons, difference_rows, plain_pair, report_pairs
from metarun.commands.grids import report_grids
from metarun.commands.instances import instance_cells, instance_rows, report_instances
from metarun.commands.models import TestData, load_models
from metarun.commands.rates import choose_rates
from metarun.commands.references import with_references
from metarun.commands.verdicts import report_verdicts, verdicts_of
from metarun.config.build import instantiate
from metarun.config.check import check
from metarun.config.schema import EvalConfig, typed
from metarun.config.targets import trusted_modules
from metarun.errors import ConfigError, TrainingError, listed
from metarun.reporting import plots
from metarun.reporting.classes import report_classes
from metarun.reporting.console import Bar, console, inform, print_line, relative
from metarun.storage.files import write_csv, write_json
from metarun.tasks.class_store import ClassStore
from metarun.tasks.objectives import Metric
from metarun.tasks.rollouts import Rollouts
from metarun.tasks.source import EpisodeSource
from metarun.training.evaluation import EvalSettings, Result, evaluate
from metarun.training.features import on_features
from metarun.training.hardware import Hardware

HASHES = 8  # the most hashes of episodes on screen


def run(cfg: DictConfig) -> float:
    """Evaluate as configured; returns the mean of the first cell, for Hydra's sweepers."""
    check(cfg, "eval", typed=HydraConfig.get().overrides.task)
    command: EvalConfig = typed(cfg)
    hardware: Hardware = instantiate(command.hardware, "hardware")
    hardware.ranks.check_devices(hardware.device)
    if command.benchmark is not None:
        return benchmarks.run(command, trusted_modules(cfg), hardware)
    models = load_models(command, trusted_modules(cfg), hardware)
    data = TestData(command, hardware, models)
    check_before_loading(models, data, command)
    cells = [
        cell
        for model in models
        for cell in cells_of(model, data, shapes_for(model, models, command), command)
    ]
    if all(cell.reason for cell in cells):
        raise ConfigError(cells[0].reason)
    possible = [cell for cell in cells if not cell.reason]
    for cell in cells:
        policy = issubclass(cell.source.spec.tasks, Rollouts)
        cell.names_queries = policy and len({each.shape.queries for each in cells}) > 1
    if command.confusion and not any(cell.source.names for cell in possible):
        raise ConfigError("confusion=true: these tasks have no classes; leave it out")
    shown = instance_cells(possible, command)
    choose_rates(possible, models, command, hardware)
    embed_images(possible, hardware)
    with Bar("eval", len(possible) * command.episodes, "episodes") as bar:
        for cell in possible:
            cell.set_steps()
            tasks = EvalSettings(cell.shape, command.episodes, command.seed)
            cell.result = evaluate(
                cell.algorithm, cell.source, tasks, hardware, bar.advance, command.confusion
            )
            check_finite(cell)
    if all(cell.reason for cell in cells):
        raise TrainingError(possible[0].reason)
    if data.datasets > 1:
        advice = (
            "; set dataset=NAME to test all models on the same classes, without those that any of them was "
            "trained on"
        )
        one_kind = len({model.spec.outputs for model in models}) == 1
        inform("results on different datasets are not compared" + (advice if one_kind else ""))
    if hardware.ranks.first:  # which alone writes
        folder = Path(HydraConfig.get().runtime.output_dir)
        report(with_references(cells, command), command, folder)
        if command.instances is not None:
            report_instances(instance_rows(shown, command, hardware), folder)
    hardware.ranks.any()  # all files are written
    return next(cell.result.mean for cell in cells if cell.result)


def embed_images(cells: Sequence[Cell], hardware: Hardware) -> None:
    """Replace images by their features where the backbone of a model is frozen, once for each split."""
    embedded: dict[tuple[int, int], EpisodeSource] = {}
    for cell in cells:
        key = id(cell.source), id(cell.algorithm)
        if key not in embedded:
            embedded[key] = on_features(cell.source, cell.algorithm, hardware)
    for cell in cells:
        cell.source = embedded[id(cell.source), id(cell.algorithm)]


def check_finite(cell: Cell) -> None:
    """Replace a result without any finite loss by the reason; report a result with some that are not."""
    assert cell.result is not None
    if not (count := cell.result.diverged):
        return
    advice = "; lower steps" if cell.algorithm.takes_steps else ""
    what = f"{count} of {cell.result.episodes} episodes have a loss that is not finite{advice}"
    if count < cell.result.episodes:
        inform(f"{cell.model.name}, {cell.task}: {what}")
        return
    cell.result, cell.reason = None, what


def is_several(cells: Sequence[Cell]) -> bool:
    """Whether the cells are from more than one dataset."""
    return len({cell.dataset for cell in cells}) > 1


def report(cells: Sequence[Cell], command: EvalConfig, folder: Path) -> None:
    """Print tables; write results.json, results.csv and figures to the folder."""
    rows = [row_of(cell, command) for cell in cells]
    title = f"{command.episodes} {unit_of(cells)}, seed {command.seed}"
    guesses = {f"{cell.shape.ways}-way": cell.shape.chance for cell in cells if cell.shape.chance}
    title += "".join(f", {chance} {ways}" for ways, chance in guesses.items())
    # One table for each set of metrics: tasks of different kinds have different metrics.
    for metrics in dict.fromkeys(cell.metrics for cell in cells):
        own = [cell for cell in cells if cell.metrics == metrics]
        console.print(table_of(own, metrics, f"{classes_in(own, command.split)}, {title}"))
    # Not a caption of the table, which would be wrapped to the width of the table.
    found = hashes(cells)
    print_line("episodes' hash: " + ", ".join(found if len(found) <= HASHES else ["see results.csv"]))
    beside = report_verdicts(verdicts_of(cells, command))
    pairs = comparisons(cells)
    report_pairs(pairs, cells)
    full = [row | scores_of(cell) for row, cell in zip(rows, cells, strict=True)]
    write_json(
        folder / "results.json",
        {"results": full, "comparisons": [plain_pair(p) for p in pairs]}
        | ({"verdicts": beside} if beside else {}),
    )
    write_csv(folder / "results.csv", rows)
    names = ["results.json", "results.csv", *draw(cells, rows, comparisons(cells, references=True), folder)]
    names += report_grids(cells, folder)
    if command.confusion:
        names += report_classes(matrices_of(cells), folder)
    inform(f"saved {', '.join(names[:-1])} and {names[-1]} in {relative(folder)}")


def unit_of(cells: Sequence[Cell]) -> str:
    """What the tasks of all cells are called."""
    units = {cell.source.spec.tasks.unit for cell in cells}
    return units.pop() if len(units) == 1 else "episodes"


def classes_in(cells: Sequence[Cell], split: str) -> str:
    """The datasets and the number of classes that are evaluated of each."""
    texts = {}
    for cell in cells:
        stored = isinstance(cell.source, ClassStore) or cell.source.item_counts()
        what = "classes" if isinstance(cell.source, ClassStore) else "tasks"
        kind = f"{what} of all splits" if split == "all" else f"{split} {what}"
        texts[cell.dataset] = f"{len(cell.source.item_counts()):,} {kind}" if stored else split
    named: dict[str, list[str]] = {}
    for name, text in texts.items():
        named.setdefault(text, []).append(name)
    return "; ".join(f"{listed(names)}, {text}" for text, names in named.items())


def draw(
    cells: Sequence[Cell], rows: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]], folder: Path
) -> list[str]:
    """Write the figures for each kind of tasks: the curves in steps.png if several numbers of steps were
    evaluated; else the scores in results.png, and their differences to the best model in differences.png.

    Returns:
        The names of the files.
    """
    names = []
    best, note = best_models(cells), common_settings()
    kinds = dict.fromkeys(cell.metrics[0] for cell in cells if cell.result)
    for kind in kinds:
        own = [
            (row, cell)
            for row, cell in zip(rows, cells, strict=True)
            if cell.result and cell.metrics[0] == kind
        ]
        metrics = dict.fromkeys(metric for _, cell in own for metric in cell.metrics)
        results = {
            metric: [row | of_metric(cell, metric) for row, cell in own if metric in cell.metrics]
            for metric in metrics
        }
        suffix = ".png" if len(kinds) == 1 else f"_{kind.name}.png"
        if len({row["episodes_seen"] for row, _ in own if row["episodes_seen"] is not None}) > 1:
            names.append(f"episodes{suffix}")  # one axis for policies that learn by steps and by memory
            seen = {metric: [row | over_episodes(row, own) for row in of] for metric, of in results.items()}
            plots.step_curves(seen, folder / names[-1], note, "episodes seen")
        elif len({row["steps"] for row, _ in own if row["steps"] is not None}) > 1:
            names.append(f"steps{suffix}")
            plots.step_curves(results, folder / names[-1], note)
        else:
            names.append(f"results{suffix}")
            plots.evaluation_grid(results, folder / names[-1], note)
            to_best = {metric: difference_rows(of, pairs, best, metric) for metric, of in results.items()}
            if to_best := {metric: of for metric, of in to_best.items() if of}:
                names.append(f"differences{suffix}")
                plots.differences(to_best, folder / names[-1], note)
    return names


def over_episodes(row: dict[str, Any], rows: Sequence[tuple[dict[str, Any], Cell]]) -> dict[str, Any]:
    """What replaces the steps and the task of a row in a figure over episodes.

    A player that is no checkpoint has seen the shots, where there are several numbers of these; else it is
    a line.
    """
    seen = row["episodes_seen"]
    if seen is None and len({each["shots"] for each, _ in rows}) > 1:
        seen = row["shots"]
    return {"steps": seen, "task": row["dataset"]}


def of_metric(cell: Cell, metric: Metric) -> dict[str, Any]:
    """The mean of a metric over the episodes of an evaluated cell, and half of its interval."""
    assert cell.result is not None
    mean, interval = cell.result.mean_of(metric), cell.result.interval_of(metric)
    return {"mean": mean, "interval": interval, "unit": unit_of([cell])}


def common_settings() -> str:
    """The typed settings that change all results and that neither tasks nor axes of figures show."""
    typed = HydraConfig.get().overrides.task
    shown = re.compile(r"(queries|trained_classes|transductive|seed)=.*|steps=(?!\[.*,).*")
    return ", ".join(each for each in typed if shown.fullmatch(each))


def matrices_of(cells: Sequence[Cell]) -> dict[str, tuple[Tensor, Sequence[str]]]:
    """The confusion matrix and the names of the classes of each cell that has one, by its title."""
    return {
        f"{cell.model.name}, {cell.dataset} {cell.task}": (cell.result.confusion, cell.source.names)
        for cell in cells
        if cell.result and cell.result.confusion is not None
    }


def hashes(cells: Sequence[Cell]) -> list[str]:
    """The hash of the episodes of each task; for each model separately if models had different episodes."""
    several = is_several(cells)
    found: dict[str, dict[str, str]] = {}
    for cell in cells:
        if cell.result:
            task = f"{cell.dataset} {cell.shape_name}" if several else cell.shape_name
            found.setdefault(task, {})[cell.model.name] = cell.result.episodes_hash
    texts = []
    for task, own in found.items():
        if len(set(own.values())) == 1:
            texts.append(f"{task} {min(own.values())}")
        else:
            texts += [f"{task} of {model} {value}" for model, value in own.items()]
    return texts


def row_of(cell: Cell, command: EvalConfig) -> dict[str, Any]:
    """The row of a cell in results.csv; accuracies are in [0, 1]. `mean` and `interval`: the main metric."""
    result = cell.result
    row = {
        "model": cell.model.name,
        "checkpoint": str(cell.model.path),
        "dataset": cell.dataset,
        "split": command.split,
        "classes": len(cell.source.names) or None,
        "cell": cell.task,
        "task": cell.shape_name,
        **{n: None if cell.shape.varied else getattr(cell.shape, n) for n in ("ways", "shots", "queries")},
        "steps": cell.steps,
        "rate": cell.rate,
        "episodes_seen": cell.episodes_seen,
        "metric": cell.metrics[0].name,
        "mean": result.mean if result else None,
        "interval": result.interval if result else None,
        "episodes": result.episodes if result else 0,
        "uses_query_statistics": result.uses_query_statistics if result else None,
        "seconds": round(result.seconds, 3) if result else None,
        "episodes_hash": result.episodes_hash if result else None,
        "reason": cell.reason or None,
    }
    for metric in cell.metrics[1:]:
        row[metric.name] = result.mean_of(metric) if result else None
        row[f"{metric.name} interval"] = result.interval_of(metric) if result else None
    return row


def scores_of(cell: Cell) -> dict[str, Any]:
    """The score of every episode by each metric, for results.json and other statistics."""
    if cell.result is None:
        return {}
    return {"scores": {name: scores.tolist() for name, scores in cell.result.scores.items()}}


def table_of(cells: Sequence[Cell], metrics: Sequence[Metric], title: str) -> Table:
    """A row for each cell; of several metrics a row for each, since columns would not fit a terminal."""
    with_steps = any(cell.steps is not None for cell in cells)
    several, many = is_several(cells), len(metrics) > 1
    # A terminal of 80 columns has no space for the column of seconds beside many other columns.
    longest = max(len(cell.model.name) for cell in cells)
    timed = not (with_steps or several or many) and (longest <= 11 or console.width >= 100)
    transductive = "trans-\nductive" if several or many else "transductive"
    if any(cell.episodes_seen is not None for cell in cells):
        transductive = "episodes\nseen"
    table = Table(title=title)
    table.add_column("model", overflow="fold")
    if several:
        table.add_column("dataset", overflow="fold")
    table.add_column("task", no_wrap=True)
    if with_steps:
        table.add_column("steps", justify="right", no_wrap=True)
    if with_rates := any(cell.rate is not None for cell in cells):
        table.add_column("inner\nrate", justify="right", no_wrap=True)
    if many:
        table.add_column("metric", no_wrap=True)
        table.add_column("95 % interval", min_width=16)
        table.add_column(transductive, justify="right", no_wrap=True)
    else:
        # Rich crops a table whose columns that wrap have a least width, which long reasons need.
        wraps = not several and any(cell.result is None for cell in cells)
        heading = f"{metrics[0].name},{chr(10) if several or longest > 11 else ' '}95 % interval"
        table.add_column(heading, min_width=21 if wraps else None, no_wrap=not wraps)
        for heading in [transductive, "seconds"] if timed else [transductive]:
            table.add_column(heading, justify="right", no_wrap=True)
    for cell in cells:
        row: list[str | Text] = [
            Text(cell.model.name),
            *([Text(cell.dataset)] if several else []),
            cell.shape_name,
        ]
        if with_steps:
            row.append("" if cell.steps is None else str(cell.steps))
        if with_rates:
            row.append("" if cell.rate is None else f"{cell.rate:g}")
        if (result := cell.result) is None:
            table.add_row(*row, *([""] if many else []), Text(cell.reason, style="yellow"))
            continue
        for i, metric in enumerate(metrics):
            cell_text = metric.show_interval(result.mean_of(metric), result.interval_of(metric))
            table.add_row(
                *(row if i == 0 else [""] * len(row)),
                *([metric.name] if many else []),
                cell_text,
                last_column(cell, result) if i == 0 else "",
                *([f"{result.seconds:.1f}"] if timed else []),
            )
    return table


def last_column(cell: Cell, result: Result) -> str:
    """How many episodes a policy saw; of other tasks, whether queries depend on each other."""
    if issubclass(cell.source.spec.tasks, Rollouts):
        return "" if cell.episodes_seen is None else str(cell.episodes_seen)
    return "yes" if result.uses_query_statistics else "no"
