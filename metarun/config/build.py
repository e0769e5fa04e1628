"""From settings to the objects that they name."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import hydra.utils
import torch
from hydra.utils import get_class
from torch import Tensor
from torch.optim import Optimizer

from metarun.algorithms.base import Algorithm
from metarun.config.schema import Node, TrainConfig
from metarun.datasets.base import Dataset
from metarun.errors import ConfigError, naming_part
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.source import EpisodeSource
from metarun.tasks.spec import TaskSpec
from metarun.training.evaluation import EvalSettings
from metarun.training.hardware import Hardware


def instantiate(node: Node, **passed: Any) -> Any:
    """The object a node names, with its settings as plain values and `passed` as it is.

    Raises:
        ConfigError: where the class refuses a value with ValueError. Any other error inside the class
            keeps its traceback.
    """
    make = hydra.utils.instantiate(node, _partial_=True, _convert_="all", _recursive_=False)
    try:
        return make(**passed)
    except ValueError as error:
        raise ConfigError(f"{node['_target_']}: {error}") from error


def parameters_of(node: Node) -> Any:
    """The parameters of a node's class, by name."""
    return inspect.signature(get_class(node["_target_"])).parameters


def build_dataset(node: Node) -> Dataset:
    """A dataset; one that is made of others is passed those, each built from its own node."""
    if "datasets" not in parameters_of(node):
        return instantiate(node)
    datasets = {}
    for name, part in node["settings"].items():
        with naming_part(str(name), parameters_of(part)):
            datasets[str(name)] = build_dataset(part)
    return instantiate(node, datasets=datasets)


def build_source(dataset: Dataset, split: str, hardware: Hardware) -> EpisodeSource:
    """One split of a dataset on the device; its items in host memory where they do not fit there."""
    source = dataset.split(split, torch.device("cpu"))  # type: ignore[arg-type]
    if not isinstance(source, ClassStore):
        return source if hardware.device.type == "cpu" else dataset.split(split, hardware.device)  # type: ignore[arg-type]
    if hardware.keeps_on_host(source.items.nbytes):
        return source.with_items(source.items, hardware.device)
    return source.with_items(source.items.to(hardware.device))


def build_algorithm(settings: TrainConfig, spec: TaskSpec, hardware: Hardware) -> Algorithm:
    """The algorithm on its device, for tasks of a kind; no data is needed.

    Raises:
        ConfigError: where the algorithm cannot learn such tasks, or the inner loop does not fit it.
    """
    cls: type[Algorithm] = get_class(settings.algorithm["_target_"])
    cls.check_tasks(spec)
    offered: dict[str, Any] = {
        "backbone": instantiate(settings.backbone, item_shape=spec.item_shape),
        "item_shape": spec.item_shape,
        "outputs": settings.ways if spec.outputs is None else spec.outputs,
        "classes": spec.classes,
    }
    wanted = parameters_of(settings.algorithm)
    if "inner_loop" in wanted:
        if not settings.inner_loop:
            raise ConfigError("this algorithm needs an inner loop; choose inner_loop=sgd or adam")
        offered["inner_loop"] = instantiate(settings.inner_loop)
    elif "_target_" in (settings.inner_loop or {}):
        raise ConfigError(
            "this algorithm takes no inner steps; leave inner_loop out, or choose inner_loop=none"
        )
    passed = {name: value for name, value in offered.items() if name in wanted}
    return hardware.place(instantiate(settings.algorithm, **passed))


def task_spec(dataset: Dataset, train: EpisodeSource | None = None) -> TaskSpec:
    """The kind of a dataset's tasks; with the number of training classes, where that split is loaded."""
    classes = len(train.names) if train is not None and train.names else None
    return dataset.spec if classes is None else replace(dataset.spec, classes=classes)


def load_weights(algorithm: Algorithm) -> None:
    """Give a new run the weights that its backbone starts from; a checkpoint brings its own."""
    for part in algorithm.modules():
        load = getattr(part, "load_weights", None)
        if callable(load):
            load()


def build_optimizer(node: Node, parameters: list[Tensor], hardware: Hardware) -> Optimizer:
    """The outer optimizer: one kernel for all weights, and ready for a CUDA graph, where that is possible."""
    known = parameters_of(node)
    captured = hardware.graph and hardware.device.type == "cuda"
    wanted = ["capturable"] if captured else []
    if not (node.get("foreach") or node.get("differentiable")):
        wanted.append("fused")
    chosen: dict[str, Any] = {name: True for name in wanted if name in known and name not in node}
    if captured and chosen and "lr" in node:
        chosen["lr"] = torch.tensor(float(node["lr"]), device=hardware.device)  # a schedule may change it
    return instantiate(node, params=parameters, **chosen)


def training_shape(settings: TrainConfig) -> EpisodeShape:
    """The shape of a training task."""
    return EpisodeShape(settings.ways, settings.shots, settings.queries)


def validation_shape(settings: TrainConfig) -> EpisodeShape:
    """The shape of a validation or test task: its own ways, shots and queries where set, else training's."""
    own = settings.validation
    return EpisodeShape(
        own.ways or settings.ways, own.shots or settings.shots, own.queries or settings.queries
    )


def validation_settings(settings: TrainConfig) -> EvalSettings:
    """The fixed validation tasks."""
    return EvalSettings(validation_shape(settings), settings.validation.episodes, settings.validation.seed)
