"""`metarun data describe=true`: the tasks of a dataset, which of them are alike, and which are hard."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from rich.table import Table
from rich.text import Text
from scipy import stats
from torch import Tensor, nn

from metarun.commands.models import fitted
from metarun.config.build import build_dataset, build_source
from metarun.config.schema import DataConfig
from metarun.errors import ConfigError
from metarun.inference.model import Model, restore
from metarun.nn.layers import relates_examples
from metarun.reporting.console import Bar, console, inform, relative
from metarun.reporting.task_map import task_map
from metarun.storage.files import write_csv
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import Episodes, EpisodeShape
from metarun.tasks.meta_features import MEANINGS, landmarkers, meta_features
from metarun.tasks.sampling import fixed_draws
from metarun.tasks.source import EpisodeSource
from metarun.training import checkpoint
from metarun.training.evaluation import EvalSettings, evaluate
from metarun.training.hardware import Hardware
from metarun.training.task2vec import distances, positions, task_vector

Row = dict[str, float | str]
NORM = "Task2Vec norm"
SHOWN = 3  # the hardest and the easiest tasks on screen


def describe_tasks(command: DataConfig, hardware: Hardware, trusted: Sequence[str], name: str) -> None:
    """Print and save meta-features of tasks, their Task2Vec map, and how both go with a model's accuracy.

    Args:
        command: the settings of the command.
        hardware: the device.
        trusted: the modules that a checkpoint may name.
        name: of the dataset.
    """
    shape = EpisodeShape(command.ways, command.shots, command.queries)
    model, probe = (model_of(each, trusted, hardware) for each in (command.checkpoint, command.probe))
    probe = probe or model
    network = None if probe is None else network_of(probe, asked=command.probe is not None)
    source = source_for(command, hardware, probe)
    rows, vectors = [], []
    with Bar("describe", command.tasks * max(len(source.parts), 1), "tasks") as bar:
        for group, task in tasks_of(source, shape, command):
            rows.append(row_of(task, group or name, (source.parts[group] if group else source).names))
            if network is not None:
                vectors.append(task_vector(network, *examples_of(task), task.outputs).cpu())
                rows[-1][NORM] = vectors[-1].norm().item()
            bar.advance(1)
    score = ""
    if model is not None:
        own = source if probe is model else source_for(command, hardware, model)
        score, scores = scores_of(model, own, shape, command)
        for row, value in zip(rows, scores, strict=True):
            row[score] = value
    title = f"{name} {command.split}, {source.spec.task_name(shape)}, {len(rows)} tasks"
    report(rows, torch.stack(vectors) if vectors else None, score, title)


def model_of(reference: str | None, trusted: Sequence[str], hardware: Hardware) -> Model | None:
    """The model of a run, or None. Raises MetarunError."""
    return None if reference is None else restore(checkpoint.find(reference), trusted, hardware)


def network_of(probe: Model, asked: bool) -> nn.Module | None:
    """The network of a model as a probe, in evaluation mode; None if it cannot be one, and need not."""
    network = probe.algorithm.own_backbone()
    if network is not None and not relates_examples(network):
        return network.eval()
    why = "has none" if network is None else "normalises an example by the others of its batch"
    advice = "name a run with a network that does not as probe=RUN, such as algorithm=baseline norm=running"
    message = f"no map of tasks: the network of {probe.path} {why}; {advice}"
    if asked:
        raise ConfigError(message)
    inform(message)
    return None


def source_for(command: DataConfig, hardware: Hardware, model: Model | None) -> EpisodeSource:
    """The split, with examples as a model needs them. Raises MetarunError."""
    dataset = build_dataset(command.dataset)
    if model is not None:
        if dataset.spec.kind != model.spec.kind:
            raise ConfigError(
                f"{model.path}: was trained on {model.spec.kind}, and this dataset has {dataset.spec.kind}"
            )
        dataset = dataset.prepared_like(model.dataset.preparation)
        dataset = dataset.reshaped(model.spec.item_shape) if len(model.spec.item_shape) == 3 else dataset
    dataset.check_shape(command.split, EpisodeShape(command.ways, command.shots, command.queries))  # type: ignore[arg-type]
    source = build_source(dataset, command.split, hardware)
    if not isinstance(source, ClassStore):
        raise ConfigError("describe=true: needs tasks that are drawn from classes; leave it out")
    return source if model is None else fitted(source, model.spec)


def tasks_of(
    source: EpisodeSource, shape: EpisodeShape, command: DataConfig
) -> Iterator[tuple[str, Episodes]]:
    """The tasks that `eval` would draw, one by one, of each dataset of a mixture in turn, with its name."""
    for group, part in (source.parts or {"": source}).items():
        part.check(shape)
        for draw in fixed_draws(part, shape, command.tasks, command.seed):
            for i in range(len(draw[0])):
                task = part.gather(tuple(tensor[i : i + 1] for tensor in draw), shape)
                assert isinstance(task, Episodes)
                if not task.support_x.is_floating_point():
                    raise ConfigError(
                        "describe=true: these examples are no numbers, and have no distances; choose "
                        "dataset.encoder or dataset.vectors for texts"
                    )
                yield group, task


def examples_of(task: Episodes) -> tuple[Tensor, Tensor]:
    """All examples [n, ...] and classes [n] of one task."""
    return torch.cat([task.support_x, task.query_x], 1)[0], torch.cat([task.support_y, task.query_y], 1)[0]


def row_of(task: Episodes, group: str, names: Sequence[str]) -> Row:
    x, y = examples_of(task)
    assert task.classes is not None
    classes = ", ".join(names[i] for i in task.classes[0].tolist())
    return {"dataset": group, "names": classes, **meta_features(x, y), **landmarkers(x, y)}


def scores_of(
    model: Model, source: EpisodeSource, shape: EpisodeShape, command: DataConfig
) -> tuple[str, list[float]]:
    """The name of a model's main metric, and its value for each of the same tasks."""
    source = source.reporting(model.objective(None))
    model.check_source(source, shape)
    metric = source.spec.objective.metrics[0]
    parts = list((source.parts or {"": source}).values())
    settings = EvalSettings(shape, command.tasks, command.seed)
    with Bar("evaluate", command.tasks * len(parts), "tasks") as bar:
        results = [evaluate(model.algorithm, part, settings, model.hardware, bar.advance) for part in parts]
    scores = torch.cat([result.scores[metric.name] for result in results])
    return f"{metric.name} of {model.name}", scores.tolist()


def correlation(a: Sequence[float], b: Sequence[float]) -> tuple[float, float, float] | None:
    """Spearman's rank correlation with its 95 % interval (Bonett and Wright 2000); None: not defined."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if math.isfinite(x) and math.isfinite(y)]
    if len(pairs) < 4 or any(len(set(values)) < 2 for values in zip(*pairs, strict=True)):
        return None
    rho = float(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    if abs(rho) > 1 - 1e-12:
        return rho, rho, rho
    half = 1.96 * math.sqrt((1 + rho**2 / 2) / (len(pairs) - 3))
    return rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)


def report(rows: Sequence[Row], vectors: Tensor | None, score: str, title: str) -> None:
    """Print the tables, and write tasks.csv and task_map.png."""
    hardness = score or "nearest neighbour"
    print_features(rows, score, title)
    print_extremes(rows, hardness)
    if "linear" not in rows[0]:
        installed = find_spec("sklearn") is not None
        why = "a class has a single example; raise queries" if installed else 'pip install "metarun[sklearn]"'
        inform(f"no landmarkers, which are accuracies of simple classifiers: {why}")
    folder = Path(HydraConfig.get().runtime.output_dir)
    write_csv(folder / "tasks.csv", [{"task": i, **row} for i, row in enumerate(rows)])
    saved = "tasks.csv"
    if vectors is not None:
        points, kept = positions(distances(vectors))
        shade = [float(row[hardness]) for row in rows]
        groups = [str(row["dataset"]) for row in rows]
        note = f"{title}, Task2Vec distances ({kept:.0%} of their variance)"
        task_map(points.numpy(), shade, hardness, groups, note, folder / "task_map.png")
        saved = "tasks.csv and task_map.png"
    inform(f"saved {saved} in {relative(folder)}")


def print_features(rows: Sequence[Mapping[str, float | str]], score: str, title: str) -> None:
    """A line for each meta-feature: its mean and range, and its correlation with the score of a model."""
    table = Table(title=Text(title))
    table.add_column("meta-feature")
    for heading in ("mean", "least", "most", *([f"with {score}"] if score else [])):
        table.add_column(heading, justify="right")
    for feature in [*(each for each in MEANINGS if each in rows[0]), NORM, score]:
        if feature not in rows[0]:
            continue
        values = [float(row[feature]) for row in rows]
        finite = [value for value in values if math.isfinite(value)]
        if not finite:
            continue
        cells = [f"{number:.4g}" for number in (sum(finite) / len(finite), min(finite), max(finite))]
        if score:
            found = None if feature == score else correlation(values, [float(row[score]) for row in rows])
            cells.append("" if found is None else f"{found[0]:+.2f} ({found[1]:+.2f} to {found[2]:+.2f})")
        table.add_row(feature, *cells)
    console.print(table)
    if score:
        inform(f"with {score}: Spearman's rank correlation over tasks, with its 95 % interval")


def print_extremes(rows: Sequence[Row], hardness: str) -> None:
    """The hardest and the easiest tasks, with their classes."""
    order = sorted(range(len(rows)), key=lambda i: float(rows[i][hardness]))
    table = Table(title=Text(f"the hardest and the easiest tasks by {hardness}"))
    for heading in ("task", hardness, "classes"):
        table.add_column(heading, overflow="fold")
    for i in dict.fromkeys([*order[:SHOWN], *order[-SHOWN:]]):
        table.add_row(str(i), f"{float(rows[i][hardness]):.3f}", Text(str(rows[i]["names"])))
    console.print(table)
