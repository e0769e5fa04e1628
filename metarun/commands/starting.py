"""Parts of `metarun train`: what can be refused before data is loaded, and where the rows of a run go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.utils import get_class

from metarun.config.build import build_algorithm, instantiate
from metarun.config.restore import start_from
from metarun.config.schema import TrainConfig
from metarun.datasets.base import Dataset
from metarun.errors import MetarunError
from metarun.reporting.destinations import Background, Destination, RunFacts
from metarun.reporting.tracker import Events, Tracker, Unwritten
from metarun.training.hardware import Hardware
from metarun.training.trainer import Trainer

Start = tuple[Path, dict[str, Any]]


def check_start(start: Start | None, settings: TrainConfig, dataset: Dataset, hardware: Hardware) -> None:
    """Raise ConfigError if the backbone of the checkpoint `init` does not fit, before data is loaded.

    It is tried on an algorithm that is built for this alone; the random state of the run is kept.
    """
    if start is None:
        return
    with hardware.forked_random():
        try:
            spec = dataset.spec
            algorithm = build_algorithm(settings, replace(spec, classes=spec.classes or 2), hardware)
        except MetarunError:
            return  # which is said when all is known of the data
        start_from(algorithm, *start)


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
