"""The part of `metarun adapt` for environments: a policy before and after each inner step of one task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from metarun.algorithms.base import Adapted, Algorithm
from metarun.commands.models import TestData, queries_of
from metarun.config.build import validation_shape
from metarun.config.schema import AdaptConfig
from metarun.datasets.environments.base import EnvironmentSource, Parameters
from metarun.datasets.environments.camera import Camera
from metarun.errors import ConfigError, TrainingError, counted
from metarun.inference.adapted import AdaptedModel
from metarun.inference.model import Model
from metarun.reporting import pictures, task_plots
from metarun.reporting.console import console, inform, relative
from metarun.storage.files import write_json
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.rollouts import SCORED, Rollouts
from metarun.tasks.sampling import fixed_draws
from metarun.tasks.worlds import Trajectories
from metarun.training.evaluation import interval
from metarun.training.hardware import Hardware

DRAWN = 5  # episodes in a figure


def adapt(command: AdaptConfig, model: Model, hardware: Hardware, folder: Path) -> float:
    """Let a policy act and learn in one environment; returns the mean return after the last step."""
    source, tasks, parameters = one_task(command, model, hardware)
    camera = Camera(source.family, parameters) if command.video else None
    torch.manual_seed(command.seed)
    with torch.no_grad(), hardware.compute():
        rows, batches, adapted = follow(model.algorithm, tasks)
    check_finite(rows, model)
    report(model, tasks, rows, source, parameters)
    drawn = draw(source, parameters, batches, folder / "paths.png")
    write_json(folder / "steps.json", rows)
    nothing = torch.empty(1, 0, *model.spec.item_shape)
    AdaptedModel(model, [], adapted, nothing).save(folder / "adapted.pt")
    saved = ["steps.json", "adapted.pt", *([drawn] if drawn else [])]
    if camera:
        for name, batch in {"before.gif": batches[0], "after.gif": batches[-1]}.items():
            pictures.animation(camera.film(tasks, batch), folder / name)
            saved.append(name)
    inform(f"saved {', '.join(saved)} in {relative(folder)}")
    return float(rows[-1][tasks.objective.metrics[0].name])


def one_task(
    command: AdaptConfig, model: Model, hardware: Hardware
) -> tuple[EnvironmentSource, Rollouts, Parameters]:
    """The environment of `task`, or the first of the seed; its source, the task, and its parameters."""
    own = validation_shape(model.settings)
    shots = own.shots if command.shots is None else command.shots
    source = TestData(command, hardware, [model]).source(model)
    if not isinstance(source, EnvironmentSource):
        raise ConfigError(f"dataset={source.name}: is not an environment; choose another dataset")
    shape = EpisodeShape(command.ways or 1, shots, queries_of(command, model))
    source.check(shape)
    model.check_source(source, shape)
    *drawn, seeds = next(fixed_draws(source, shape, 1, command.seed))
    parameters = dict(zip(source.keys, drawn, strict=True)) | typed_parameters(command.task, source, drawn)
    tasks = source.gather((*parameters.values(), seeds), shape).to(hardware.dtype)
    return source, tasks, parameters


def typed_parameters(task: Any, source: EnvironmentSource, drawn: Sequence[Tensor]) -> dict[str, Tensor]:
    """The parameters of a typed task, batched with T = 1.

    Raises:
        ConfigError: the family has no such parameters.
    """
    if task is None:
        return {}
    known = dict(zip(source.keys, drawn, strict=True))
    if not isinstance(task, dict) or not set(task) <= set(known):
        raise ConfigError(
            f"task={task}: a task of {source.family.title} has the parameters {', '.join(known)}, as in "
            f"'task={{{task_in_words(known).replace(' ', ':', 1)}}}'"
        )
    found = {}
    for name, value in task.items():
        try:
            number = torch.tensor([value], dtype=known[name].dtype)
        except (TypeError, ValueError, RuntimeError):
            number = torch.empty(0)
        if number.shape != known[name].shape:
            size = " x ".join(map(str, known[name].shape[1:]))
            raise ConfigError(f"task.{name}={value}: must be {f'{size} numbers' if size else 'a number'}")
        found[name] = number
    if found:
        source.family.check_task(known | found)
    return found


def follow(algorithm: Algorithm, tasks: Rollouts) -> tuple[list[dict[str, Any]], list[Trajectories], Adapted]:
    """Adapt step by step.

    Returns:
        One row for the policy before the first inner step and after each step, with its scores; of a policy
        with a memory before and after the episodes that it sees. The trajectories of each. The final state.
    """
    rows: list[dict[str, Any]] = []
    batches: list[Trajectories] = []
    adapted = None
    for step, adapted in enumerate(algorithm.trajectory(tasks)):
        scored = tasks.scored_anew()
        outcome = algorithm.outcome(adapted, scored)
        batch = scored.recorded[SCORED]
        means = {name: values.item() for name, values in outcome.scores.items()}
        seen = {"step": step, "episodes seen": step * tasks.shape.shots}
        if not algorithm.takes_steps:
            del seen["step"]
        rows.append({**seen, **means, "interval": interval(batch.returns[0])})
        batches.append(batch)
    return rows, batches, adapted


def check_finite(rows: list[dict[str, Any]], model: Model) -> None:
    """Raise TrainingError if the policy is no longer finite after the last step."""
    scores = [value for name, value in rows[-1].items() if name != "interval"]  # NaN for one episode
    if not all(map(math.isfinite, scores)):
        if not model.algorithm.takes_steps:
            raise TrainingError(
                f"{model.path}: its policy is not finite; train again with a lower optimizer.lr"
            )
        after = counted(len(rows) - 1, "inner step")
        raise TrainingError(f"{model.path}: its policy is not finite after {after}; lower steps")


def report(
    model: Model,
    tasks: Rollouts,
    rows: list[dict[str, Any]],
    source: EnvironmentSource,
    parameters: Parameters,
) -> None:
    """Print the table of steps, the task and its optimum."""
    table = Table(title=Text(f"{model.name} on {source.family.title}: {task_in_words(parameters)}"))
    metrics = tasks.objective.metrics
    if model.algorithm.takes_steps:
        table.add_column("inner\nstep", justify="right")
    table.add_column("episodes\nseen", justify="right")
    for metric in metrics:
        table.add_column(f"{metric.name}, {counted(tasks.shape.queries, 'episode')}", justify="right")
    for row in rows:
        cells = [
            metric.show_interval(row[metric.name], row["interval"])
            if metric.name == "return" and tasks.shape.queries > 1
            else metric.show(row[metric.name])
            for metric in metrics
        ]
        step = [str(row["step"])] if "step" in row else []
        table.add_row(*step, str(row["episodes seen"]), *cells)
    console.print(table)
    best = source.family.optimum(parameters)
    if best is not None:
        inform(f"the best possible return of this task is {best.item():.4f}")


def task_in_words(parameters: Parameters) -> str:
    """The parameters of one task for people; large ones only by their shape."""
    words = []
    for name, values in parameters.items():
        one = values[0]
        few = one.numel() <= 6
        text = [round(x, 3) for x in one.flatten().tolist()] if few else "x".join(map(str, one.shape))
        words.append(f"{name} {text[0] if few and one.dim() == 0 else text}")
    return ", ".join(words)


def draw(
    source: EnvironmentSource, parameters: Parameters, batches: Sequence[Trajectories], path: Path
) -> str:
    """Write the figure of the paths before and after adaptation, if the environment has some; its name."""
    family = source.family
    last = len(batches) - 1
    paths = {}
    # Before adaptation, after the first step, and after the last.
    for step in sorted({0, min(1, last), last}):
        places = family.positions(batches[step])
        if places is None:
            return ""
        ended = batches[step].alive[0] == 0  # [H, E]
        points = places[0].masked_fill(ended.unsqueeze(-1), torch.nan)[:, :DRAWN]
        title = "before adapting" if step == 0 else f"after {counted(step, 'step')}"
        paths[title] = points.transpose(0, 1)
    task_plots.paths(paths, family.goal(parameters), path)
    return path.name
