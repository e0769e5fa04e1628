"""One task in `adapt`: read from a user's files, adapted to step by step, and scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metarun.algorithms.base import Adapted, Algorithm
from metarun.commands.models import own_dataset
from metarun.commands.predictions import known_targets
from metarun.commands.views import averaged
from metarun.config.schema import AdaptConfig
from metarun.datasets import class_folders
from metarun.datasets.base import OwnTask
from metarun.datasets.descriptions import read_table
from metarun.datasets.preparation import Preparation
from metarun.errors import ConfigError, DataError, counted
from metarun.inference.adapted import check_finite, placed
from metarun.inference.images import Ink, Picture, read_query, read_support
from metarun.inference.model import Model
from metarun.storage.files import user_path
from metarun.tasks.episodes import Episodes
from metarun.tasks.objectives import Objective


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
        references: outputs for the queries that figures show beside those of the model, by name.
        of_function: whether examples are points of a function that was drawn, which nothing else names.
    """

    episode: Episodes
    has_queries: bool
    classes: Sequence[str]
    query_names: Sequence[str]
    preparation: Preparation | None = None
    references: Mapping[str, Tensor] = field(default_factory=dict)
    of_function: bool = False

    @property
    def objective(self) -> Objective:
        return self.episode.objective


@dataclass(frozen=True)
class Pictures:
    """The images of one task.

    Args:
        classes: the names of the ways.
        support: the images to adapt to.
        support_labels: the number of the class of each.
        query: the images to predict; there may be none.
        query_labels: the number of the class of each, None where it is unknown.
        query_names: the images to predict in words.
    """

    classes: Sequence[str]
    support: Sequence[Picture]
    support_labels: Sequence[int]
    query: Sequence[Picture]
    query_labels: Sequence[int | None]
    query_names: Sequence[str]


def user_task(command: AdaptConfig, model: Model) -> Task:
    """The task in `support` and `query`, with examples prepared as in the training of the model."""
    preparation = None
    if model.spec.kind == "images":
        own, preparation = own_images(command, model)
    else:
        own = own_examples(command, model)
    return task_of(own, model.objective(command.metrics), preparation)


def task_of(own: OwnTask, objective: Objective, preparation: Preparation | None) -> Task:
    """The task of examples that were read, whose classes may have different numbers of them."""
    has_queries = own.query_x is not None and own.query_y is not None
    episode = Episodes(
        support_x=own.support_x,
        support_y=own.support_y,
        query_x=own.query_x if has_queries else own.support_x,  # type: ignore[arg-type]
        query_y=own.query_y if has_queries else own.support_y,  # type: ignore[arg-type]
        classes=torch.arange(len(own.classes)).unsqueeze(0) if own.classes else None,
        objective=objective,
        about=own.about,
    )
    if own.support_x.shape[1]:
        episode = episode.balanced()
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
    query_files: list[Path] = []
    query_labels: list[int | None] = []
    if command.query is not None:
        folder = user_path(command.query)
        query_files, query_labels = class_folders.query_files(folder, list(classes), command.depth)
    found = Pictures(
        list(classes),
        [file for files in classes.values() for file in files],
        [number for number, files in enumerate(classes.values()) for _ in files],
        query_files,
        query_labels,
        [str(file) for file in query_files],
    )
    return prepared(found, model, command.ink)  # type: ignore[arg-type]


def prepared(pictures: Pictures, model: Model, ink: Ink) -> tuple[OwnTask, Preparation]:
    """Images as inputs of the model, and how those of the support were prepared."""
    support_x, how = read_support(model, ink, pictures.support, pictures.query)
    query_x = read_query(model, ink, how, pictures.query) if pictures.query else None
    labels, known = torch.tensor([pictures.support_labels]), class_folders.known_labels(pictures.query_labels)
    own = OwnTask(support_x, labels, query_x, known, pictures.classes, pictures.query_names)
    return own, how


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


def adapt_to(
    task: Task, model: Model, seed: int, views: int = 1
) -> tuple[list[dict[str, Any]], Adapted, Tensor | None]:
    """Place the task on the device of the model and adapt to it; see `follow`.

    Args:
        task: its episode is replaced.
        model: the model.
        seed: of methods that draw at random when they adapt, and of views.
        views: how many views of the task the predictions and their scores are averaged over; the steps and
            the loss are of the first one.

    Raises:
        ConfigError: the model does not take so many ways.
        TrainingError: the predictions are not finite.
    """
    model.algorithm.eval()
    model.check(task.episode.outputs)
    task.episode = task.episode.map(lambda tensor: placed(model, tensor))
    torch.manual_seed(seed)
    with torch.no_grad(), model.hardware.compute():
        steps, adapted, outputs = follow(model.algorithm, task)
        if views > 1 and outputs is not None:
            outputs = averaged(model, task.episode, outputs, views, seed)
            scores = figures("query", model.algorithm, task.episode, outputs, task.episode.query_y)
            steps[-1] |= {name: value for name, value in scores.items() if name != "query loss"}
    check_predictions(outputs, steps, model)
    return steps, adapted, outputs


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


def check_predictions(outputs: Tensor | None, steps: Sequence[dict[str, Any]], model: Model) -> None:
    """Raise TrainingError if the final predictions, or else the support loss, are not finite."""
    figures = torch.tensor(steps[-1].get("support loss", 0.0)) if outputs is None else outputs
    after = f" after {counted(len(steps) - 1, 'inner step')}; lower steps" if len(steps) > 1 else ""
    check_finite(figures, model, after)
