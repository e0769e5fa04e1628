"""`metarun eval benchmark=...`: published lists of tasks, scored as they are, beside published results."""

from __future__ import annotations

import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from rich.table import Table
from rich.text import Text

from metarun.commands.models import load_models
from metarun.commands.one_task import Pictures, prepared, task_of
from metarun.commands.task_folders import Scored, mean_and_interval, score, write
from metarun.commands.trained_on import note_weights, trained_classes
from metarun.config.schema import EvalConfig
from metarun.datasets import images, lake_challenge
from metarun.errors import ConfigError, counted
from metarun.inference.model import Model
from metarun.reporting.console import Bar, console, inform, relative, silent
from metarun.tasks.objectives import Metric
from metarun.training.hardware import Hardware

BENCHMARKS = ("lake",)
#: Errors in percent on Lake's tasks of models trained on the background set, and where they are from.
PUBLISHED = {
    "BPL": (3.3, "Lake et al. 2015"),
    "people": (4.5, "Lake et al. 2015"),
    "ConvNet": (13.5, "Lake et al. 2019"),
    "Prototypical networks": (13.7, "Lake et al. 2019"),
    "Hausdorff distance": (38.8, "the authors' demo"),
}


def run(command: EvalConfig, trusted: Collection[str], hardware: Hardware) -> float:
    """Evaluate the checkpoints on the benchmark; returns the accuracy of the first one."""
    if command.benchmark not in BENCHMARKS:
        raise ConfigError(f"benchmark={command.benchmark}: must be {' or '.join(BENCHMARKS)}")
    if isinstance(command.steps, list) and len(command.steps) != 1:
        raise ConfigError(f"steps={command.steps}: benchmark={command.benchmark} takes one number of steps")
    files: dict[str, Any] = command.dataset or {}
    # Queries are answered one by one, as people did it, unless it is set otherwise.
    own = replace(command, dataset=None, transductive=bool(command.transductive))
    models = load_models(own, trusted, hardware)
    for model in models:
        if model.spec.kind != "images" or model.predicts_values:
            raise ConfigError(
                f"benchmark={command.benchmark}: has classes of images, and {model.path} takes something else"
            )
    tasks = list(map(pictures_of, lake_challenge.runs(files.get("root"), files.get("download", True))))
    note_other_tasks(tasks)
    for model in models:
        note_trained(model)
    results: dict[str, tuple[Model, list[Scored]]] = {}
    with Bar("eval", len(models) * len(tasks), "tasks") as bar:
        for model in models:
            results[model.name] = model, []
            for task in tasks:
                results[model.name][1].append(score_on(task, model, command.seed))
                bar.advance()
    if hardware.ranks.first:  # which alone writes
        report(results, tasks, Path(HydraConfig.get().runtime.output_dir))
    hardware.ranks.any()  # all files are written
    model, scored = results[models[0].name]
    return mean_and_interval(scored, accuracy(model))[0]


def pictures_of(run: lake_challenge.Run) -> tuple[str, Pictures]:
    """The name and the images of a task. Raises DataError if one of them cannot be read."""
    support, query = (
        [images.read(io.BytesIO(entry.read()), str(entry)) for entry in part]
        for part in (run.support, run.query)
    )
    names = list(map(str, run.query))
    return run.name, Pictures(run.classes, support, list(range(len(support))), query, run.labels, names)


def score_on(task: tuple[str, Pictures], model: Model, seed: int) -> Scored:
    """The score of a model on a task, with images prepared as those of `adapt`, whose ink is known."""
    name, pictures = task
    with silent():
        own, preparation = prepared(pictures, model, "dark" if model.dataset.preparation.draws else "auto")
    return score(name, task_of(own, model.objective(["accuracy"]), preparation), model, seed)


def accuracy(model: Model) -> Metric:
    """The metric of which the error is what is missing to 1."""
    return model.objective(["accuracy"]).metrics[0]


def note_other_tasks(tasks: Sequence[tuple[str, Pictures]]) -> None:
    """Report tasks that are not those which the published results are of."""
    sizes = {(len(pictures.support), len(pictures.query)) for _, pictures in tasks}
    ways = lake_challenge.WAYS
    if len(tasks) != lake_challenge.TASKS or sizes != {(ways, ways)}:
        inform(
            f"warning: these are not the {lake_challenge.TASKS} published tasks of {ways} classes and {ways} "
            "queries: the published results are of other tasks"
        )


def note_trained(model: Model) -> None:
    """Report whether a model was trained on characters of the evaluation set."""
    note_weights(model.name, model.settings)
    classes = trained_classes(model.content)
    if classes is None:
        inform(
            f"{model.name}: this checkpoint has no record of its training classes; they may be in the tasks"
        )
    elif known := lake_challenge.evaluation_classes(classes.names):
        inform(
            f"warning: {model.name} was trained on {counted(len(known), 'class', 'classes')} of the "
            f"evaluation set, such as {known[0]!r}: this is no result for new characters; train with "
            "dataset=omniglot dataset.classes=lake"
        )


def report(
    results: Mapping[str, tuple[Model, Sequence[Scored]]], tasks: Sequence[tuple[str, Pictures]], folder: Path
) -> None:
    """Print the errors beside published ones; write results.csv and results.json."""
    ways = lake_challenge.WAYS
    table = Table(title=f"Lake's challenge: {len(tasks)} tasks, {ways}-way 1-shot within an alphabet")
    table.add_column("model", overflow="fold")
    table.add_column("error, 95 % interval", justify="right", no_wrap=True)
    table.add_column("trans-\nductive", justify="right", no_wrap=True)
    errors = []
    for name, (model, scored) in results.items():
        right, half = mean_and_interval(scored, accuracy(model))
        dependent = model.algorithm.uses_query_statistics
        table.add_row(Text(name), error_text(1 - right, half), "yes" if dependent else "no")
        errors.append({"model": name, "error": 1 - right, "interval": None if math.isnan(half) else half})
    table.add_section()
    for name, (error, source) in PUBLISHED.items():
        table.add_row(f"{name} ({source})", f"{error:.1f} %", "")
    console.print(table)
    published = [{"name": name, "error": error / 100} for name, (error, _) in PUBLISHED.items()]
    write(
        folder,
        results,
        [accuracy(model) for model, _ in results.values()][:1],
        {"errors": errors, "published": published},
    )
    inform(f"saved results.csv and results.json in {relative(folder)}")


def error_text(error: float, half: float) -> str:
    """An error in percent with its interval over tasks, which one task does not have."""
    return f"{100 * error:.1f} %" if math.isnan(half) else f"{100 * error:.1f} ± {100 * half:.1f} %"
