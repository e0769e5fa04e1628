"""Parts of `metarun train`: what can be refused before data is loaded, and where the rows of a run go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.utils import get_class

from metarun.algorithms.base import Algorithm
from metarun.commands.shapes import training_split
from metarun.config.build import (
    build_algorithm,
    draw_weights,
    instantiate,
    training_shape,
    validation_shape,
)
from metarun.config.restore import start_from
from metarun.config.schema import TrainConfig
from metarun.config.unread import refuse
from metarun.datasets.base import Dataset
from metarun.errors import ConfigError
from metarun.nn.frozen import frozen_part
from metarun.reporting.destinations import Background, Destination, RunFacts
from metarun.reporting.tracker import Events, Tracker, Unwritten
from metarun.tasks.rollouts import Rollouts
from metarun.tasks.spec import TaskSpec
from metarun.training.hardware import Hardware
from metarun.training.trainer import Trainer

Start = tuple[Path, dict[str, Any]]


CLASSES = 1000  # of the training split, for a method that is built before these are known


def check_method(
    settings: TrainConfig,
    dataset: Dataset,
    hardware: Hardware,
    typed: Iterable[str] = (),
    start: Start | None = None,
) -> None:
    """Build the method once before data is loaded, and check what does not need data.

    The random state of the run is kept.

    Args:
        settings: of the run.
        dataset: the dataset.
        hardware: the device, the precision and the batching.
        typed: the overrides of the command line.
        start: the checkpoint `init`, whose backbone must fit.

    Raises:
        ConfigError: if a setting is out of its bounds or has no effect, or the parts do not fit each other.
    """
    for group in ("sampler", "augment", "train_tasks"):
        if "_target_" in (node := getattr(settings, group) or {}):
            instantiate(node, group)
    with hardware.forked_random():
        classes = known_classes(dataset, settings)
        algorithm = build_algorithm(settings, spec_before_loading(dataset, classes), hardware)
        if classes is not None:
            algorithm.check_classes()
        refuse(unused_by(algorithm), typed)
        check_trains(algorithm, settings)
        for shape in (training_shape(settings), validation_shape(settings)):
            # The split itself checks the ways of tasks without classes, once it is loaded.
            (algorithm.check_shape if has_classes(dataset.spec) else algorithm.check_norms)(shape)
        if settings.iterations:
            algorithm.check_training(training_shape(settings))
        draw_weights(algorithm, settings.initial_weights)
        if start is not None:
            start_from(algorithm, *start)


def check_trains(algorithm: Algorithm, settings: TrainConfig) -> None:
    """Raise ConfigError if a frozen backbone leaves an algorithm nothing to train, or it needs training."""
    if not settings.iterations:
        algorithm.check_untrained()
    elif frozen_part(algorithm.own_backbone()) and not any(p.requires_grad for p in algorithm.parameters()):
        raise ConfigError(
            f"iterations={settings.iterations}: the backbone is frozen, and "
            f"algorithm={type(algorithm).__name__} has no other weights to train; set iterations=0 to test "
            "it as it is, or choose algorithm=simpleshot or baseline (or with algorithm=protonet "
            "algorithm.learn_scale=true)"
        )


def known_classes(dataset: Dataset, settings: TrainConfig) -> int | None:
    """The number of training classes, as far as the settings tell."""
    made = "_target_" in (settings.train_tasks or {})  # of images in other classes than their labels
    known = None if made else dataset.known_size(training_split(settings))
    return known and known[1]


def spec_before_loading(dataset: Dataset, known: int | None = None) -> TaskSpec:
    """The kind of tasks of a dataset, with an assumption about what its files would tell.

    Args:
        dataset: the dataset.
        known: the number of its training classes, if it is known.
    """
    spec = dataset.spec
    classes = (known or spec.classes or CLASSES) if has_classes(spec) else None
    return replace(spec, classes=classes, description=spec.description or (1,))


def has_classes(spec: TaskSpec) -> bool:
    """Whether tasks are made of classes, not of one function or environment."""
    return spec.outputs is None and not issubclass(spec.tasks, Rollouts)


def unused_by(algorithm: Algorithm) -> dict[str, str]:
    """The settings that nothing reads in an algorithm as it is built, each with the reason."""
    found: dict[str, str] = {}
    for part in algorithm.modules():
        stated = getattr(part, "unused_settings", None)
        if isinstance(stated, Mapping):
            found |= {name: f"{reason}; leave it out" for name, reason in stated.items()}
    return found


def build_destinations(settings: TrainConfig) -> dict[str, Destination]:
    """The services that rows go to, by option; they are not started.

    Raises:
        ConfigError: a setting is wrong, or a package is not installed.
    """
    nodes = settings.tracker or {}
    return {
        option: instantiate(node, f"tracker.{option}")
        for option, node in nodes.items()
        if node and not is_tensorboard(node)
    }


def build_tracker(
    settings: TrainConfig, destinations: Mapping[str, Destination], trainer: Trainer, name: str
) -> Tracker:
    """Where the rows of the run go; the destinations are started.

    Args:
        settings: of the run.
        destinations: of `build_destinations`.
        trainer: the trainer.
        name: the run in words.
    """
    if not trainer.ranks.first:
        return Unwritten(trainer.folder, trainer.ranks.from_first())
    run = RunFacts(trainer.folder, name, trainer.record["config"])
    chosen = settings.tracker is None or any(
        node and is_tensorboard(node) for node in settings.tracker.values()
    )
    others = [Background(option, destination, run) for option, destination in destinations.items()]
    tensorboard = chosen and settings.log.tensorboard
    tracker = Tracker(trainer.folder, trainer.iteration, tensorboard, trainer.unlogged, others)
    trainer.ranks.from_first(tracker.rows)
    return tracker


def is_tensorboard(node: Mapping[str, Any]) -> bool:
    """Whether a node of the group `tracker` is TensorBoard, which is no service."""
    return issubclass(get_class(node["_target_"]), Events)
