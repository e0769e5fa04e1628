"""`metarun adapt`: adapts a checkpoint to a task, from files or from a dataset, or to a folder of tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.table import Table
from rich.text import Text
from torch import Tensor

from metarun.algorithms.base import Algorithm
from metarun.commands import environments, task_folders
from metarun.commands.models import TestData, dataset_for, queries_of
from metarun.commands.one_task import Task, adapt_to, user_task
from metarun.commands.predictions import note_dependence, report_queries
from metarun.commands.views import check_views
from metarun.config.build import instantiate, validation_shape
from metarun.config.check import check
from metarun.config.schema import AdaptConfig, typed
from metarun.config.targets import trusted_modules
from metarun.datasets.base import OwnQueries
from metarun.datasets.pixels import Pixels, image_of
from metarun.errors import ConfigError, counted
from metarun.inference.adapted import AdaptedModel, check_reject
from metarun.inference.images import check_ink
from metarun.inference.model import Model, find, restore, set_transductive
from metarun.reporting import pictures, task_plots
from metarun.reporting.console import console, inform, relative
from metarun.storage.files import write_json
from metarun.tasks.episodes import Episodes, EpisodeShape
from metarun.tasks.objectives import Metric
from metarun.tasks.sampling import fixed_draws
from metarun.training.hardware import Hardware


def run(cfg: DictConfig) -> float:
    """Adapt as configured; returns the query score after the last step, without queries the support score."""
    check(cfg, "adapt", typed=HydraConfig.get().overrides.task)
    command: AdaptConfig = typed(cfg)
    check_ink(command.ink)
    hardware: Hardware = instantiate(command.hardware, "hardware")
    path, trusted = find(command.checkpoint), trusted_modules(cfg)
    model = restore(path, trusted, hardware, command.steps)
    own_files = f"support={command.support}" if command.tasks is None else f"tasks={command.tasks}"
    if command.support is None and command.tasks is None:
        dataset_for(command, model)  # another kind of data is said first
    set_transductive(model.algorithm, command.transductive, model.name, alone=True)
    check_reject(command.reject, model.predicts_values)
    check_views(model, command.views)
    model.algorithm.eval()
    folder = Path(HydraConfig.get().runtime.output_dir)
    if command.support is not None or command.tasks is not None:
        model.refuse_policy(own_files)
    if command.tasks is not None:
        return task_folders.run(command, model, folder)
    if model.is_policy:
        return environments.adapt(command, model, hardware, folder)
    for name, value in {"task": command.task, "video": command.video or None}.items():
        if value is not None:
            raise ConfigError(f"{name}: the model was not trained on an environment; leave it out")
    task = (
        user_task(command, model) if command.support is not None else dataset_task(command, model, hardware)
    )
    steps, adapted, outputs = adapt_to(task, model, command.seed, command.views)
    report(model, task, steps, outputs, folder, command.reject)
    support_x = model.algorithm.balanced(task.episode).support_x
    AdaptedModel(model, task.classes, adapted, support_x, command.ink, task.preparation).save(  # type: ignore[arg-type]
        folder / "adapted.pt"
    )
    main = task.objective.metrics[0].name
    return steps[-1].get(f"query {main}", steps[-1].get(f"support {main}", math.nan))


def dataset_task(command: AdaptConfig, model: Model, hardware: Hardware) -> Task:
    """The first task of the seed from the dataset of the checkpoint, or from another dataset."""
    own = validation_shape(model.settings)
    ways = command.ways or own.ways
    shots = own.shots if command.shots is None else command.shots
    queries, data = queries_of(command, model), TestData(command, hardware, [model])
    data.dataset(model).check_shape(command.split, EpisodeShape(ways, shots, queries))  # type: ignore[arg-type]
    source = data.source(model)
    shape = source.pictured(EpisodeShape(ways, shots, queries))
    source.check(shape)
    model.check_source(source, shape)
    draw = next(fixed_draws(source, shape, 1, command.seed))
    episode = source.gather(draw, shape)
    if not isinstance(episode, Episodes):
        raise ConfigError(
            f"dataset={source.name}: has no labelled support and query examples, which adapt needs; "
            "choose another dataset"
        )
    classes = [] if episode.classes is None else [source.names[i] for i in episode.classes[0].tolist()]
    names = [f"query {i}" for i in range(episode.query_x.shape[1])]
    references: dict[str, Tensor] = {}
    if of_function := not (source.names or source.item_counts()):
        outcomes = {name: score(draw, shape) for name, score in source.references(shape, {}).items()}
        references = {name: each.outputs for name, each in outcomes.items() if each.outputs is not None}
    return Task(episode, True, classes, names, references=references, of_function=of_function)


def report(
    model: Model,
    task: Task,
    steps: list[dict[str, Any]],
    outputs: Tensor | None,
    folder: Path,
    reject: float | None = None,
) -> None:
    """Print tables; write steps.json, predictions.csv and figures to the folder."""
    ways = f"{counted(len(task.classes), 'class', 'classes')}, " if task.classes else ""
    title = f"{model.name}: {ways}{counted(task.episode.support_x.shape[1], 'support example')}"
    metrics, loss = task.objective.metrics, model.algorithm.loss_of(task.episode)
    # A loss that is one of the metrics is shown once.
    hidden = "loss" if loss in [metric.score for metric in metrics] else ""
    for table in step_tables(steps, metrics, title, hidden):
        console.print(table)
    saved = ["steps.json", "adapted.pt"]
    write_json(folder / "steps.json", steps)
    if outputs is not None:
        queries = OwnQueries(task.episode.query_x, task.episode.query_y, task.query_names)
        points = task.episode.query_x if task.of_function else None
        saved += report_queries(queries, task.classes, outputs, task.objective, folder, reject, points)
        if task.classes:
            note_dependence(model.algorithm)
        elif task.episode.query_x.shape[2:] == (1,):
            draw_regression(model.algorithm, task, folder / "curves.png")
            saved.append("curves.png")
        elif isinstance(model.dataset, Pixels):
            draw_completion(task, outputs, model.dataset.size, folder / "completion.png")
            saved.append("completion.png")
    inform(f"saved {', '.join(saved)} in {relative(folder)}")


def step_tables(
    steps: list[dict[str, Any]], metrics: Sequence[Metric], title: str, hidden: str = ""
) -> list[Table]:
    """One row for each inner step; support and query apart where they would not fit a terminal together."""
    keys = [key for key in steps[-1] if key != "step" and not (hidden and key.endswith(hidden))]
    if len(metrics) == 1:
        return [step_table(steps, metrics, title, keys)]
    groups = ([key for key in keys if key.startswith(part)] for part in ("support", "query"))
    return [step_table(steps, metrics, title, group) for group in groups if group]


def step_table(
    steps: list[dict[str, Any]], metrics: Sequence[Metric], title: str, keys: Sequence[str]
) -> Table:
    """The figures of these keys after each inner step."""
    table = Table(title=Text(title))
    by_name = {f"{part} {metric.name}": metric for part in ("support", "query") for metric in metrics}
    for key in ["inner step", *keys]:
        table.add_column(key.replace(" ", "\n"), justify="right", overflow="fold")
    for row in steps:
        cells = [
            by_name[key].show(row[key], None if by_name[key].percent else 4)
            if key in by_name
            else f"{row[key]:.4f}"
            for key in keys
        ]
        table.add_row(str(row["step"]), *cells)
    return table


UNKNOWN = (0.2, 0.4, 0.8)  # the colour of unknown pixels, which no grey value has


def draw_completion(task: Task, outputs: Tensor, size: int, path: Path) -> None:
    """Write the figure of an image: the support, the predicted values, their deviations, and the truth."""
    episode, objective = task.episode, task.objective
    x = torch.cat([episode.support_x[0], episode.query_x[0]])

    def whole(queries: Tensor, support: Tensor) -> Tensor:
        return image_of(x, torch.cat([support, queries]), size)[None, None].expand(1, 3, -1, -1)

    known, values = episode.support_y[0], objective.to_units(outputs)[0]
    unknown = whole(torch.ones_like(values), torch.zeros_like(known)) > 0
    blue = values.new_tensor(UNKNOWN).view(3, 1, 1)
    rows = {
        "support": torch.where(unknown, blue, whole(values, known) + 0.5),
        "prediction": whole(values, known) + 0.5,
        "truth": whole(episode.query_y[0], known) + 0.5,
    }
    if objective.spread:
        spread = objective.spread(outputs)[0]
        rows["deviation"] = whole(spread / spread.max(), torch.zeros_like(known))
    shown = {name: image.clamp(0, 1).float() for name, image in rows.items()}
    pictures.contact_sheet(shown, f"{len(known)} of {len(x)} pixels", path)


@torch.no_grad()
def draw_regression(algorithm: Algorithm, task: Task, path: Path) -> None:
    """Write the figure of the predicted curve before and after the inner steps, and of the references."""
    episode = task.episode
    trajectory = list(algorithm.trajectory(episode))
    shown = sorted({0, 1, len(trajectory) - 1} & set(range(len(trajectory))))
    names = {i: f"after step {i}" if i else "before adapting" for i in shown}
    if len(trajectory) == 1:
        names = {0: "prediction"}
    outputs = {names[i]: algorithm.predictor(trajectory[i], episode)(episode.query_x) for i in shown}
    outputs |= task.references
    curves = {name: task.objective.to_units(each) for name, each in outputs.items()}
    spread = task.objective.spread
    bands = {name: spread(each) for name, each in outputs.items()} if spread else {}
    support = episode.support_x, task.objective.to_units(episode.support_y)
    query = episode.query_x, task.objective.to_units(episode.query_y)
    task_plots.regression_curves(support, query, curves, path, bands)
