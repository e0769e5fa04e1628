"""The inner learning rate of each model in an evaluation, chosen on validation tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from metarun.commands.cells import Cell
from metarun.commands.models import TestData, values_of
from metarun.config.schema import EvalConfig
from metarun.errors import ConfigError
from metarun.inference.model import Model
from metarun.inner_loops.base import InnerLoop
from metarun.reporting.console import Bar, inform, silent
from metarun.training.evaluation import EvalSettings, evaluate
from metarun.training.features import on_features
from metarun.training.hardware import Hardware


def choose_rates(
    cells: Sequence[Cell], models: Sequence[Model], command: EvalConfig, hardware: Hardware
) -> None:
    """Set the inner rate of each cell that takes steps to the best of `rates` on validation tasks.

    The tasks are those that the run of the model was validated on, in the shape of the cell and with its
    number of steps. So a model that was trained without inner steps is not judged at the rate of another.

    Args:
        cells: of models; those without inner steps keep what they have.
        models: all models.
        command: the settings of the command.
        hardware: the device, the precision and the number of tasks at once.

    Raises:
        ConfigError: no model has an inner loop with a rate, or one was trained on the validation classes.
    """
    if command.rates is None:
        return
    own = [cell for cell in cells if steps_of(cell) and rate_of(cell) is not None]
    if not own:
        raise ConfigError(
            f"rates={command.rates}: no model takes inner steps with a rate; set steps, or leave rates out"
        )
    if trained := [cell.model.name for cell in own if cell.settings.trainval]:
        raise ConfigError(
            f"rates={command.rates}: {trained[0]} was trained on the validation classes, so that no tasks "
            "are left to choose its rate; leave rates out"
        )
    validation = TestData(replace(command, split="validation"), hardware, models)
    rates = values_of(command.rates)
    total = sum(cell.settings.validation.episodes for cell in own) * len(rates)
    with Bar("rates", total, "episodes") as bar:
        for cell in own:
            assert isinstance(cell.model, Model)
            with silent():
                source = on_features(validation.source(cell.model), cell.algorithm, hardware)
            own_settings = cell.settings.validation
            tasks = EvalSettings(cell.shape, own_settings.episodes, own_settings.seed)
            cell.set_steps()
            scores = {}
            for rate in rates:
                cell.algorithm.inner_loop.rate = rate  # type: ignore[union-attr, assignment]
                result = evaluate(cell.algorithm, source, tasks, hardware, bar.advance)
                scores[rate] = result.mean if math.isfinite(result.loss) else math.nan
            metric = cell.metrics[0]
            cell.rate = rates[0]
            for rate in rates[1:]:
                if metric.is_better(scores[rate], than=scores[cell.rate]):
                    cell.rate = rate
            shown = ", ".join(f"{rate:g}: {metric.show(score)}" for rate, score in scores.items())
            what = f"{cell.model.name}, {cell.task}: inner rate {cell.rate:g}"
            inform(f"{what}; {metric.name} on validation {shown}")


def steps_of(cell: Cell) -> int:
    """The number of inner steps of the model of a cell in evaluation; 0 if it has no inner loop."""
    if not cell.algorithm.takes_steps:
        return 0
    inner: InnerLoop = cell.algorithm.inner_loop  # type: ignore[assignment]
    chosen = inner.test_steps if cell.steps is None else cell.steps
    return inner.steps if chosen is None else chosen


def rate_of(cell: Cell) -> float | None:
    """The inner rate of the model of a cell; None if it has none."""
    if not cell.algorithm.takes_steps:
        return None
    rate = getattr(cell.algorithm.inner_loop, "rate", None)
    return rate if isinstance(rate, (int, float)) and not cell.algorithm.inner_loop.learned else None  # type: ignore[union-attr]
