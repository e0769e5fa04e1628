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
from metarun.commands.task_folders import Results, Scored, mean_and_interval, score, write
from metarun.commands.trained_on import note_weights, trained_classes
from metarun.commands.views import check_views
from metarun.config.schema import EvalConfig
from metarun.datasets import images, lake_challenge
from metarun.errors import ConfigError, counted
from metarun.inference.model import Model
from metarun.reporting.console import Bar, console, inform, relative, silent
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
    reasons = {model.name: unsupported(model) for model in models}
    if all(reasons.values()):
        raise ConfigError(f"benchmark={command.benchmark}: {models[0].path}: {reasons[models[0].name]}")
    possible = [model for model in models if not reasons[model.name]]
    for model in possible:
        check_views(model, command.views)
    tasks = list(map(pictures_of, lake_challenge.runs(files.get("root"), files.get("download", True))))
    note_other_tasks(tasks)
    for model in possible:
        note_trained(model)
    results: Results = {model.name: (model, []) for model in models}
    with Bar("eval", len(possible) * len(tasks), "tasks") as bar:
        for model in possible:
            for task in tasks:
                results[model.name][1].append(score_on(task, model, command.seed, command.views))
                bar.advance()
    if hardware.ranks.first:  # which alone writes
        report(results, reasons, len(tasks), Path(HydraConfig.get().runtime.output_dir))
    hardware.ranks.any()  # all files are written
    return mean_and_interval(results[possible[0].name][1], "accuracy")[0]


def unsupported(model: Model) -> str:
    """Why a model cannot be evaluated on the tasks; "" if it can."""
    if model.spec.kind != "images" or model.predicts_values or model.is_policy:
        return "does not take classes of images"
    try:
        model.check(lake_challenge.WAYS)
    except ConfigError as error:
        return str(error)
    return ""


def pictures_of(run: lake_challenge.Run) -> tuple[str, Pictures]:
    """The name and the images of a task. Raises DataError if one of them cannot be read."""
    support, query = (
        [images.read(io.BytesIO(entry.read()), str(entry)) for entry in part]
        for part in (run.support, run.query)
    )
    names = list(map(str, run.query))
    return run.name, Pictures(run.classes, support, list(range(len(support))), query, run.labels, names)


def score_on(task: tuple[str, Pictures], model: Model, seed: int, views: int = 1) -> Scored:
    """The score of a model on a task, with images prepared as those of `adapt`, whose ink is known."""
    name, pictures = task
    with silent():
        own, preparation = prepared(pictures, model, "dark" if model.dataset.preparation.draws else "auto")
    return score(name, task_of(own, model.objective(["accuracy"]), preparation), model, seed, views=views)


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
    note_weights(model.name, model.settings, model.content["choices"])
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


def report(results: Results, reasons: Mapping[str, str], tasks: int, folder: Path) -> None:
    """Print the errors beside published ones; write results.csv and results.json.

    Args:
        results: the scores of each model, by its name.
        reasons: why a model has none, by its name.
        tasks: the number of tasks.
        folder: the output folder.
    """
    ways = lake_challenge.WAYS
    table = Table(title=f"Lake's challenge: {tasks} tasks, {ways}-way 1-shot within an alphabet")
    table.add_column("model", overflow="fold")
    table.add_column("error, 95 % interval", justify="right")
    table.add_column("trans-\nductive", justify="right", no_wrap=True)
    errors = []
    for name, (model, scored) in results.items():
        if reasons[name]:
            table.add_row(Text(name), Text(reasons[name], style="yellow"))
            continue
        right, half = mean_and_interval(scored, "accuracy")
        dependent = model.algorithm.uses_query_statistics
        table.add_row(Text(name), error_text(1 - right, half), "yes" if dependent else "no")
        errors.append({"model": name, "error": 1 - right, "interval": None if math.isnan(half) else half})
    table.add_section()
    for name, (error, source) in PUBLISHED.items():
        table.add_row(f"{name} ({source})", f"{error:.1f} %")
    console.print(table)
    published = [{"name": name, "error": error / 100} for name, (error, _) in PUBLISHED.items()]
    write(folder, results, ["accuracy"], {"errors": errors, "published": published})
    inform(f"saved results.csv and results.json in {relative(folder)}")


def error_text(error: float, half: float) -> str:
    """An error in percent with its interval over tasks, which one task does not have."""
    return f"{100 * error:.1f} %" if math.isnan(half) else f"{100 * error:.1f} ± {100 * half:.1f} %"
