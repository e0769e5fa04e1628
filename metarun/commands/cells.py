"""The cells of an evaluation: one checkpoint on tasks of one shape, with a number of inner steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from metarun.algorithms.base import Algorithm
from metarun.commands.models import TestData, dataset_name, queries_of, values_of
from metarun.config.build import validation_shape
from metarun.config.schema import EvalConfig, TrainConfig
from metarun.datasets.text.store import TextStore
from metarun.errors import DataError, MetarunError, counted
from metarun.inference.model import Model
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.objectives import Metric
from metarun.tasks.rollouts import Rollouts
from metarun.tasks.source import EpisodeSource
from metarun.training.evaluation import Result


class Reference(NamedTuple):
    """The name of what is evaluated without a checkpoint, beside the models."""

    name: str
    path: Path | str = ""


@dataclass
class Cell:
    """One checkpoint on tasks of one shape, with a number of inner steps.

    Args:
        model: the checkpoint, or what is shown beside checkpoints.
        shape: the shape of the tasks.
        steps: the number of inner steps; None: the setting of the checkpoint.
        source: the split.
        dataset: the name of the dataset.
        result: the result, once the cell is evaluated.
        rate: the inner rate, if it was chosen for this evaluation.
        names_queries: whether the number of queries is part of the name of the task, since other policies
            are scored on another number.
        reason: why the combination is not supported; "" if it is.
    """

    model: Model | Reference
    shape: EpisodeShape
    steps: int | None
    source: EpisodeSource
    dataset: str
    result: Result | None = None
    reason: str = ""
    rate: float | None = None
    names_queries: bool = False

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm of the checkpoint."""
        assert isinstance(self.model, Model)
        return self.model.algorithm

    @property
    def settings(self) -> TrainConfig:
        """The settings of the training run."""
        assert isinstance(self.model, Model)
        return self.model.settings

    def set_steps(self) -> None:
        """Let the algorithm take the inner steps of this cell, at its rate."""
        if self.steps is not None:
            self.algorithm.inner_loop.test_steps = self.steps  # type: ignore[union-attr, assignment]
        if self.rate is not None:
            self.algorithm.inner_loop.rate = self.rate  # type: ignore[union-attr, assignment]

    @property
    def episodes_seen(self) -> int | None:
        """How many episodes of an environment a policy sees before it is scored; None of other tasks."""
        if not isinstance(self.model, Model) or not issubclass(self.source.spec.tasks, Rollouts):
            return None
        if not self.algorithm.takes_steps:
            return self.shape.shots
        steps = self.algorithm.inner_loop.step_count() if self.steps is None else self.steps  # type: ignore[union-attr, operator]
        return steps * self.shape.shots  # type: ignore[no-any-return]

    @property
    def task(self) -> str:
        """The shape of the tasks, and the number of inner steps if it is set."""
        if self.steps is None:
            return self.shape_name
        return f"{self.shape_name}, {counted(self.steps, 'step')}"

    @property
    def shape_name(self) -> str:
        """The shape of the tasks, such as "5-way 1-shot"."""
        name = self.source.spec.task_name(self.shape)
        return f"{name}, {counted(self.shape.queries, 'query', 'queries')}" if self.names_queries else name

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return self.source.spec.objective.metrics


def shapes_for(model: Model, models: Sequence[Model], command: EvalConfig) -> list[EpisodeShape]:
    """The shapes of the tasks of one model: every combination of the requested ways and shots.

    What is not requested is as in the training of the model, and of the others on the same dataset, so that
    they are compared on the same tasks.
    """
    shapes: list[EpisodeShape] = []
    for each in (each for each in models if dataset_name(each) == dataset_name(model)):
        own = validation_shape(each.settings)
        ways = values_of(command.ways or own.ways)
        shots = values_of(own.shots if command.shots is None else command.shots)
        varied = own.varied if command.varied is None else command.varied
        queries = queries_of(command, each)
        shapes += [EpisodeShape(w, s, queries, varied) for w, s in itertools.product(ways, shots)]
    return list(dict.fromkeys(shapes))


def check_before_loading(models: Sequence[Model], data: TestData, command: EvalConfig) -> None:
    """Raise DataError if the settings of the datasets tell that no split has the tasks for any model."""
    errors = []
    for model in models:
        dataset = data.dataset(model)
        for shape in shapes_for(model, models, command):
            try:
                dataset.check_shape(command.split, shape)  # type: ignore[arg-type]
            except DataError as error:
                errors.append(error)
            else:
                return
    raise errors[0]


def cells_of(model: Model, data: TestData, shapes: Sequence[EpisodeShape], command: EvalConfig) -> list[Cell]:
    """The cells of one model; combinations that are not supported have a reason."""
    source = data.source(model)
    name = dataset_name(model)
    parts = source.parts or pairs_of_languages(source, name) or {name: source}
    several = isinstance(command.steps, list) and model.algorithm.takes_steps
    steps = values_of(command.steps) if several else [None]
    cells = [
        Cell(model, shape, step, part, name)
        for (name, part), shape, step in itertools.product(parts.items(), shapes, steps)
    ]
    for cell in cells:
        try:
            cell.source.check(cell.shape)
            model.check_source(cell.source, cell.shape)
        except MetarunError as error:
            cell.reason = str(error)
    return cells


def pairs_of_languages(source: EpisodeSource, name: str) -> dict[str, EpisodeSource]:
    """The source for each pair of languages, where languages are chosen and there are several pairs."""
    if not isinstance(source, TextStore) or source.languages.is_open:
        return {}
    pairs = source.pairs()
    return {f"{name} {a} to {b}": source.speaking(a, b) for a, b in pairs} if len(pairs) > 1 else {}
