"""From a config to the objects it names. The only place besides the commands that knows Hydra."""

from __future__ import annotations

import inspect
from typing import Any

import hydra.utils
import torch
from hydra.utils import get_class
from omegaconf import DictConfig
from torch import Tensor
from torch.optim import Optimizer

from metarun.algorithms.base import Algorithm
from metarun.episodes import ClassStore, EpisodeSource, Geometry
from metarun.errors import ConfigError, naming_part
from metarun.hardware import Hardware


def instantiate(node: DictConfig, **passed: Any) -> Any:
    """The object a node names, with its settings as plain values and `passed` as it is.

    A value the class itself refuses (ValueError) is the user's to mend; any other fault inside
    the class keeps its traceback.
    """
    make = hydra.utils.instantiate(node, _partial_=True, _convert_="all", _recursive_=False)
    try:
        return make(**passed)
    except ValueError as error:
        raise ConfigError(f"{node._target_}: {error}") from error


def build_hardware(cfg: DictConfig) -> Hardware:
    return instantiate(cfg.hardware)


def build_dataset(node: DictConfig) -> Any:
    """A dataset; one that draws on others is passed those, each built from its own checked node."""
    if "datasets" not in inspect.signature(get_class(node._target_)).parameters:
        return instantiate(node)
    datasets = {}
    for name, part in node.settings.items():
        with naming_part(str(name), inspect.signature(get_class(part._target_)).parameters):
            datasets[str(name)] = build_dataset(part)
    return instantiate(node, datasets=datasets)


def build_algorithm(cfg: DictConfig, hardware: Hardware) -> Algorithm:
    """The algorithm on its device, from the train config alone: the data is not needed."""
    dataset = build_dataset(cfg.dataset)
    regression = getattr(dataset, "outputs", None)
    offered: dict[str, Any] = {
        "backbone": instantiate(cfg.backbone, item_shape=tuple(dataset.item_shape)),
        "item_shape": tuple(dataset.item_shape),
        "outputs": regression or cfg.ways,
        "classification": regression is None,
    }
    wanted = inspect.signature(get_class(cfg.algorithm._target_)).parameters
    if "inner_loop" in wanted:
        if not cfg.inner_loop:
            raise ConfigError("this algorithm needs an inner loop; choose inner_loop=sgd or adam")
        offered["inner_loop"] = instantiate(cfg.inner_loop)
    elif "_target_" in (cfg.inner_loop or {}):
        raise ConfigError(
            "this algorithm takes no inner steps; leave inner_loop out, or choose inner_loop=none"
        )
    algorithm = instantiate(cfg.algorithm, **{name: x for name, x in offered.items() if name in wanted})
    return hardware.place(algorithm)


def load_weights(algorithm: Algorithm) -> None:
    """Give a new run the weights that its backbone says it starts from; a checkpoint brings its own."""
    for part in algorithm.modules():
        load = getattr(part, "load_weights", None)
        if callable(load):
            load()


def build_optimizer(cfg: DictConfig, parameters: list[Tensor], hardware: Hardware) -> Optimizer:
    """The outer loop's optimizer: one kernel for all weights, and fit for a CUDA graph, where it can be."""
    known = inspect.signature(get_class(cfg.optimizer._target_)).parameters
    captured = hardware.graph and hardware.device.type == "cuda"
    wanted = ["capturable"] if captured else []
    if not (cfg.optimizer.get("foreach") or cfg.optimizer.get("differentiable")):
        wanted.append("fused")
    chosen: dict[str, Any] = {name: True for name in wanted if name in known and name not in cfg.optimizer}
    if captured and chosen and "lr" in cfg.optimizer:
        chosen["lr"] = torch.tensor(
            float(cfg.optimizer.lr), device=hardware.device
        )  # a schedule may change it
    return instantiate(cfg.optimizer, params=parameters, **chosen)


def build_source(dataset: Any, split: str, hardware: Hardware) -> EpisodeSource:
    """One split of a dataset, on the device; its images in host memory where they do not fit there."""
    source = dataset.split(split, torch.device("cpu"))
    if not isinstance(source, ClassStore):
        return source if hardware.device.type == "cpu" else dataset.split(split, hardware.device)
    if hardware.keeps_on_host(source.images.nbytes):
        return source.with_images(source.images, hardware.device)
    return source.with_images(source.images.to(hardware.device))


def training_geometry(cfg: DictConfig) -> Geometry:
    return Geometry(cfg.ways, cfg.shots, cfg.queries)


def validation_geometry(cfg: DictConfig) -> Geometry:
    """Validation's own ways, shots and queries where set, else training's."""
    own = cfg.validation
    return Geometry(own.ways or cfg.ways, own.shots or cfg.shots, own.queries or cfg.queries)
