"""`metarun adapt`: adapts a checkpoint to one new task, from image folders or from a dataset."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.table import Table
from rich.text import Text
from torch import Tensor

from metarun.algorithms.base import Adapted, Algorithm
from metarun.commands import environments
from metarun.commands.models import TestData, dataset_for, own_dataset, queries_of
from metarun.commands.predictions import known_targets, note_dependence, report_queries
from metarun.config.build import instantiate, validation_shape
from metarun.config.check import check
from metarun.config.schema import AdaptConfig, typed
from metarun.config.targets import trusted_modules
from metarun.datasets import class_folders
from metarun.datasets.base import OwnQueries, OwnTask
from metarun.datasets.descriptions import read_table
from metarun.datasets.preparation import Preparation
from metarun.errors import ConfigError, DataError, counted
from metarun.inference.adapted import AdaptedModel, check_finite, check_reject, placed
from metarun.inference.images import check_ink, read_query, read_support
from metarun.inference.model import Model, find, restore, set_transductive
from metarun.reporting import plots
from metarun.reporting.console import console, inform, relative
from metarun.storage.files import user_path, write_json
from metarun.tasks.episodes import Episodes, EpisodeShape
from metarun.tasks.objectives import Metric, Objective
from metarun.tasks.sampling import fixed_draws
from metarun.training.hardware import Hardware

CURVE = 200  # the least number of queries of a regression task, so that its curve can be drawn


@dataclass
class Task:
    """One task, batched with T = 1.

    Args:
        episode: the support and the queries; queries of an unknown class have the target -1, those of an
            unknown value NaN. If there are no queries, the support is used in their place.
        has_queries: whether there are queries.
        classes: the names of the ways; empty for a regression.
        query_names: the names of the queries.
        preparation: how the images of the support were prepared.
    """

    episode: Episodes
    has_queries: bool
    classes: Sequence[str]
    query_names: Sequence[str]
    preparation: Preparation | None = None

    @property
    def objective(self) -> Objective:
        return self.episode.objective


def run(cfg: DictConfig) -> float:
    """Adapt as configured; returns the query score after the last step, without queries the support score."""
    check(cfg, "adapt", typed=HydraConfig.get().overrides.task)
    command: AdaptConfig = typed(cfg)
    check_ink(command.ink)
    hardware: Hardware = instantiate(command.hardware, "hardware")
    path, trusted = find(command.checkpoint), trusted_modules(cfg)
    model = restore(path, trusted, hardware, command.steps)
    if command.support is None:
        dataset_for(command, model)  # another kind of data is said first
    set_transductive(model.algorithm, command.transductive, model.name, alone=True)
    check_reject(command.reject, model.predicts_values)
    model.algorithm.eval()
    folder = Path(HydraConfig.get().runtime.output_dir)
    if command.support is not None:
        model.refuse_policy(f"support={command.support}")
    if model.is_policy:
        return environments.adapt(command, model, hardware, folder)
    for name, value in {"task": command.task, "video": command.video or None}.items():
        if value is not None:
            raise ConfigError(f"{name}: the model was not trained on an environment; leave it out")
    task = (
        user_task(command, model) if command.support is not None else dataset_task(command, model, hardware)
    )
    model.algorithm.check(task.episode.outputs)
    task.episode = task.episode.map(lambda tensor: placed(model, tensor))
    torch.manual_seed(command.seed)
    with torch.no_grad(), hardware.compute():
        steps, adapted, outputs = follow(model.algorithm, task)
    check_predictions(outputs, steps, model)
    report(model, task, steps, outputs, folder, command.reject)
    support_x = model.algorithm.balanced(task.episode).support_x
    AdaptedModel(model, task.classes, adapted, support_x, command.ink, task.preparation).save(  # type: ignore[arg-type]
        folder / "adapted.pt"
    )
    main = task.objective.metrics[0].name
    return steps[-1].get(f"query {main}", steps[-1].get(f"support {main}", math.nan))


def check_predictions(outputs: Tensor | None, steps: Sequence[dict[str, Any]], model: Model) -> None:
    """Raise TrainingError if the final predictions, or else the support loss, are not finite."""
    figures = torch.tensor(steps[-1].get("support loss", 0.0)) if outputs is None else outputs
    after = f" after {counted(len(steps) - 1, 'inner step')}; lower steps" if len(steps) > 1 else ""
    check_finite(figures, model, after)


def user_task(command: AdaptConfig, model: Model) -> Task:
    """The task in `support` and `query`, with examples prepared as in the training of the model."""
    preparation = None
    if model.spec.kind == "images":
        own, preparation = own_images(command, model)
    else:
        own = own_examples(command, model)
    has_queries = own.query_x is not None and own.query_y is not None
    episode = Episodes(
        support_x=own.support_x,
        support_y=own.support_y,
        query_x=own.query_x if has_queries else own.support_x,  # type: ignore[arg-type]
        query_y=own.query_y if has_queries else own.support_y,  # type: ignore[arg-type]
        classes=torch.arange(len(own.classes)).unsqueeze(0) if own.classes else None,
        objective=model.objective(command.metrics),
        about=own.about,
    )
    if own.support_x.shape[1]:
        episode = episode.balanced()  # the classes may have different numbers of examples
    return Task(episode, has_queries, own.classes, own.query_names, preparation)


def own_examples(command: AdaptConfig, model: Model) -> OwnTask:
    """The task in files that are no images, read by the dataset of the checkpoint."""
    assert command.support is not None
    for name, unset in (("depth", 1), ("ink", "auto")):
        if (value := getattr(command, name)) != unset:
            raise ConfigError(f"{name}={value}: the model does not take images; leave it out")
    return own_dataset(command, model).own_task(user_path(command.support), command.query)


def own_images(command: AdaptConfig, model: Model) -> tuple[OwnTask, Preparation]:
    """The task in folders of images, and how those of the support were prepared."""
    assert command.support is not None
    if command.dataset:
        raise ConfigError("dataset: the model does not take texts; leave its settings out")
    if model.algorithm.reads_descriptions and user_path(command.support).is_file():
        return described_images(command, model)
    classes = class_folders.support_files(user_path(command.support), command.depth)
    labels = torch.tensor([[i for i, files in enumerate(classes.values()) for _ in files]])
    query_files: list[Path] = []
    query_labels: list[int | None] = []
    if command.query is not None:
        folder = user_path(command.query)
        query_files, query_labels = class_folders.query_files(folder, list(classes), command.depth)
    support_files = [file for files in classes.values() for file in files]
    support_x, prepared = read_support(model, command.ink, support_files, query_files)  # type: ignore[arg-type]
    query_x = read_query(model, command.ink, prepared, query_files) if query_files else None  # type: ignore[arg-type]
    known = class_folders.known_labels(query_labels)
    names = [str(file) for file in query_files]
    return OwnTask(support_x, labels, query_x, known, list(classes), names), prepared


def described_images(command: AdaptConfig, model: Model) -> tuple[OwnTask, Preparation]:
    """The task of classes that are described in the file `support`, without examples."""
    assert command.support is not None
    if command.query is None:
        raise ConfigError(f"support={command.support}: has no images to predict; add query=FOLDER")
    table = read_table(command.support)
    about = torch.tensor([[numbers for _, numbers in table.values()]])
    if about.shape[2:] != model.spec.description:
        raise ConfigError(
            f"support={command.support}: has {counted(about.shape[2], 'number')} for each class, and the "
            f"model takes descriptions of shape {model.spec.description}"
        )
    if len(table) < 2:
        raise DataError(f"support={command.support}: has one class; at least 2 are needed")
    files, labels = class_folders.query_files(user_path(command.query), list(table), command.depth)
    support_x, prepared = read_support(model, command.ink, [], files)  # type: ignore[arg-type]
    query_x = read_query(model, command.ink, prepared, files)  # type: ignore[arg-type]
    known = class_folders.known_labels(labels)
    none = torch.empty(1, 0, dtype=torch.long)
    return OwnTask(support_x, none, query_x, known, list(table), list(map(str, files)), about), prepared


def dataset_task(command: AdaptConfig, model: Model, hardware: Hardware) -> Task:
    """The first task of the seed from the dataset of the checkpoint, or from another dataset."""
    own = validation_shape(model.settings)
    ways = command.ways or own.ways
    shots = own.shots if command.shots is None else command.shots
    queries, data = queries_of(command, model), TestData(command, hardware, [model])
    data.dataset(model).check_shape(command.split, EpisodeShape(ways, shots, queries))  # type: ignore[arg-type]
    source = data.source(model)
    drawn_anew = not (source.names or source.item_counts())
    shape = EpisodeShape(ways, shots, max(queries, CURVE) if drawn_anew else queries)
    source.check(shape)
    model.algorithm.check_source(source, shape)
    episode = source.gather(next(fixed_draws(source, shape, 1, command.seed)), shape)
    if not isinstance(episode, Episodes):
        raise ConfigError(
            f"dataset={source.name}: has no labelled support and query examples, which adapt needs; "
            "choose another dataset"
        )
    classes = [] if episode.classes is None else [source.names[i] for i in episode.classes[0].tolist()]
    names = [f"query {i}" for i in range(episode.query_x.shape[1])]
    return Task(episode, True, classes, names)


def follow(algorithm: Algorithm, task: Task) -> tuple[list[dict[str, Any]], Adapted, Tensor | None]:
    """Adapt step by step.

    Returns:
        One row for the state before the first inner step and after each step, with the loss and the scores;
        the final state; and its predictions for the queries, [1, B, N], if there are queries.
    """
    rows: list[dict[str, Any]] = []
    adapted, outputs = None, None
    episode = task.episode
    balanced = algorithm.balanced(episode)
    scored = task.has_queries and bool(known_targets(episode.query_y).any())
    for step, adapted in enumerate(algorithm.trajectory(balanced)):
        row: dict[str, Any] = {"step": step}
        support = algorithm.predict(adapted, balanced.support_x)[:, : episode.support_x.shape[1]]
        row |= figures("support", algorithm, episode, support, episode.support_y)
        if scored:
            outputs = algorithm.predictor(adapted, balanced)(episode.query_x)
            row |= figures("query", algorithm, episode, outputs, episode.query_y)
        rows.append(row)
    if task.has_queries and outputs is None:
        outputs = algorithm.predictor(adapted, balanced)(episode.query_x)
    return rows, adapted, outputs


def figures(
    name: str, algorithm: Algorithm, episode: Episodes, outputs: Tensor, targets: Tensor
) -> dict[str, float]:
    """The loss and the scores over the examples with a known target; empty if there are none.

    Args:
        name: the first word of each key.
        algorithm: its loss is used.
        episode: the task.
        outputs: predictions [1, B, N].
        targets: [1, B], or [1, B, V]; -1 is an unknown class, NaN an unknown value.
    """
    known = known_targets(targets)
    if not known.any():
        return {}
    outputs, targets = outputs[:, known], targets[:, known]
    loss = algorithm.loss_of(episode)(outputs, targets).item()
    scores = {f"{name} {m.name}": m.score(outputs, targets).item() for m in episode.objective.metrics}
    return {f"{name} loss": loss} | scores


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
        saved += report_queries(queries, task.classes, outputs, task.objective, folder, reject)
        if task.classes:
            note_dependence(model.algorithm)
        elif task.episode.query_x.shape[2:] == (1,):
            draw_regression(model.algorithm, task, folder / "curves.png")
            saved.append("curves.png")
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


@torch.no_grad()
def draw_regression(algorithm: Algorithm, task: Task, path: Path) -> None:
    """Write the figure of the predicted curve before and after the inner steps."""
    episode = task.episode
    trajectory = list(algorithm.trajectory(episode))
    shown = sorted({0, 1, len(trajectory) - 1} & set(range(len(trajectory))))
    names = {i: "before adapting" if i == 0 else f"after step {i}" for i in shown}
    curves = {
        names[i]: task.objective.to_units(algorithm.predictor(trajectory[i], episode)(episode.query_x))
        for i in shown
    }
    support = episode.support_x, task.objective.to_units(episode.support_y)
    query = episode.query_x, task.objective.to_units(episode.query_y)
    plots.regression_curves(support, query, curves, path)
