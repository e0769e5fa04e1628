"""Builds the objects that the settings describe."""

from __future__ import annotations

import copy
import inspect
import re
from dataclasses import replace
from numbers import Integral
from typing import Any

import hydra.utils
import torch
from hydra.utils import get_class
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm
from metarun.backbones.input_norm import normalise_inputs
from metarun.config.schema import Node, TrainConfig
from metarun.datasets.base import Dataset
from metarun.errors import ConfigError, first_line, naming_part
from metarun.nn.frozen import Frozen
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.rollouts import Rollouts
from metarun.tasks.source import EpisodeSource
from metarun.tasks.spec import TaskSpec
from metarun.training.evaluation import EvalSettings
from metarun.training.hardware import Hardware
from metarun.training.outer_loops import Gradient, OuterLoop


def instantiate(node: Node, group: str = "", /, **passed: Any) -> Any:
    """Build the object that a node describes.

    Args:
        node: the class (`_target_`) and its settings, which are passed as plain values.
        group: where the node is in the config, for messages.
        passed: further arguments, passed unchanged.

    Raises:
        ConfigError: if the class raises ValueError. Any other error inside the class keeps its traceback.
    """
    make = hydra.utils.instantiate(node, _partial_=True, _convert_="all", _recursive_=False)
    try:
        return make(**passed)
    except ValueError as error:
        where = rejected_setting(node, group, str(error)) or group or "config"
        raise ConfigError(f"{where}: {error} ({node['_target_']}); choose another value") from error


def rejected_setting(node: Node, group: str, message: str) -> str:
    """The setting whose value occurs last in an error message, as it is typed; "" if there is none."""
    found = {}
    for name, value in node.items():
        places = list(re.finditer(rf"(?<![\w.-]){re.escape(str(value))}(?![\w.])", message))
        if places and not str(name).startswith("_"):
            found[f"{group}.{name}={value}"] = places[-1].start()
    return max(found, key=found.__getitem__) if found else ""


def parameters_of(node: Node) -> Any:
    """The parameters of a node's class, by name."""
    return inspect.signature(get_class(node["_target_"])).parameters


def build_dataset(node: Node) -> Dataset:
    """Build a dataset, and first its parts if it is a mixture of several datasets."""
    if "datasets" not in parameters_of(node):
        return instantiate(node, "dataset")
    datasets = {}
    for name, part in node["settings"].items():
        with naming_part(str(name), parameters_of(part)):
            datasets[str(name)] = build_dataset(part)
    return instantiate(node, "dataset", datasets=datasets)


def build_source(dataset: Dataset, split: str, hardware: Hardware) -> EpisodeSource:
    """One split of a dataset, or "all", on the device; items that do not fit there stay in host memory."""
    source = dataset.load(split, torch.device("cpu"))  # type: ignore[arg-type]
    if not isinstance(source, ClassStore):
        return source if hardware.device.type == "cpu" else dataset.load(split, hardware.device)  # type: ignore[arg-type]
    if hardware.keeps_on_host(source.items.nbytes):
        return source.with_items(source.items, hardware.device)
    return source.with_items(source.items.to(hardware.device))


def build_algorithm(settings: TrainConfig, spec: TaskSpec, hardware: Hardware) -> Algorithm:
    """Build the algorithm; this needs no data.

    Args:
        settings: the settings of the training run.
        spec: the kind of tasks.
        hardware: the device, the precision and the batching.

    Returns:
        The algorithm, on the device.

    Raises:
        ConfigError: if the algorithm does not support these tasks, or the inner loop does not fit it.
    """
    cls: type[Algorithm] = get_class(settings.algorithm["_target_"])
    cls.check_tasks(spec)
    offered: dict[str, Any] = {
        "backbone": build_backbone(settings.backbone, spec, settings.normalise),
        "item_shape": spec.item_shape,
        "outputs": settings.ways if spec.outputs is None else spec.outputs,
        "classes": spec.classes,
        "shots": max(settings.shots, 1),  # a description takes the place of a support example
        "description": spec.description,
        "constants": spec.constants,
    }
    wanted = parameters_of(settings.algorithm)
    if "inner_loop" in wanted:
        if not settings.inner_loop:
            raise ConfigError(
                f"inner_loop=none: algorithm={cls.__name__} needs one; choose inner_loop=sgd or adam"
            )
        offered["inner_loop"] = instantiate(settings.inner_loop, "inner_loop")
    elif "_target_" in (settings.inner_loop or {}):
        raise ConfigError(f"inner_loop: algorithm={cls.__name__} has no inner loop; choose inner_loop=none")
    passed = {name: value for name, value in offered.items() if name in wanted}
    return hardware.place(instantiate(settings.algorithm, "algorithm", **passed))


def build_outer_loop(settings: TrainConfig, spec: TaskSpec) -> OuterLoop:
    """Build the rule of the outer loop. Raises ConfigError if it does not fit the tasks or the algorithm."""
    if not settings.outer_loop:  # of a checkpoint that was written before there were others
        return Gradient()
    rule: OuterLoop = instantiate(settings.outer_loop, "outer_loop")
    algorithm: type[Algorithm] = get_class(settings.algorithm["_target_"])
    algorithm.check_kind(spec)
    environments = issubclass(spec.tasks, Rollouts)
    if rule.needs_rollouts and not environments:
        raise ConfigError(
            f"outer_loop={type(rule).__name__}: is for environments, such as dataset=navigation2d; choose "
            "outer_loop=gradient"
        )
    if rule.needs_rollouts and not algorithm.minimises_query_loss:
        raise ConfigError(
            f"outer_loop={type(rule).__name__}: algorithm={algorithm.__name__} moves its weights by a "
            "rule of its own; choose outer_loop=gradient"
        )
    if algorithm.trains_critic and not rule.trains_critics:
        raise ConfigError(
            f"outer_loop={type(rule).__name__}: algorithm={algorithm.__name__} trains a critic beside its "
            "policy; choose outer_loop=ppo"
        )
    if environments and not rule.needs_rollouts and settings.dataset.get("estimator", {}).get("credit"):
        raise ConfigError(
            "dataset.estimator.credit=true: needs the returns of all tasks of an iteration at once; choose "
            "outer_loop=trpo, or outer_loop=ppo, which with outer_loop.epochs=1 is one gradient step"
        )
    return rule


def build_backbone(node: Node, spec: TaskSpec, normalise: Node = None) -> nn.Module:
    """Build the network, and check by a forward pass that it maps examples to vectors.

    The networks of metarun are not checked: tests do that, and it would take a second for a large one.

    Args:
        node: the class and its settings.
        spec: the kind of tasks.
        normalise: the layer before it, if it has a class.
    """
    takes, cls = parameters_of(node), get_class(node["_target_"])
    offered = {"item_shape": spec.item_shape, "vocabulary": spec.vocabulary, "encoder": spec.pretrained}
    passed = {name: value for name, value in offered.items() if name in takes}
    if any(each.kind is each.VAR_KEYWORD for each in takes.values()):
        passed["item_shape"] = spec.item_shape
    if in_metarun(cls):
        check_kind(cls, spec, takes_texts=not {"vocabulary", "encoder"}.isdisjoint(takes))
    backbone: nn.Module = instantiate(node, "backbone", **passed)
    if not in_metarun(cls):
        where = f"backbone: {cls.__module__}.{cls.__qualname__}"
        set_features(backbone, forward_on_zeros(backbone, spec, where).shape[1], where)
    if "_target_" in (normalise or {}):
        normalise_inputs(backbone, instantiate(normalise, "normalise", spec=spec))
    if not in_metarun(cls) and getattr(backbone, "frozen", False) is True:
        frozen = nn.Sequential(Frozen(backbone, len(spec.item_shape)))
        frozen.features = backbone.features
        return frozen
    return backbone


def check_kind(cls: type, spec: TaskSpec, takes_texts: bool) -> None:
    """Raise ConfigError if a network of metarun is for texts and examples are something else, or reversed."""
    if takes_texts and spec.kind != "texts":
        choice = "conv4" if spec.kind == "images" else "adapter or mlp"
        raise ConfigError(
            f"backbone={cls.__name__}: takes texts, and this dataset has {spec.kind}; "
            f"choose backbone={choice}"
        )
    if spec.kind == "texts" and not takes_texts:
        raise ConfigError(
            f"backbone={cls.__name__}: does not take texts; choose backbone=bag, text_cnn or text_transformer"
        )


def in_metarun(cls: type) -> bool:
    """Whether a class is one of metarun's own."""
    return cls.__module__.partition(".")[0] == "metarun"


def forward_on_zeros(backbone: nn.Module, spec: TaskSpec, where: str) -> Tensor:
    """The outputs for two examples of zeros, [2, features]. Raises ConfigError if they are not vectors."""
    examples = torch.zeros(2, *spec.item_shape, dtype=spec.item_dtype)
    try:
        with torch.random.fork_rng([]), torch.no_grad():
            outputs = copy.deepcopy(backbone)(examples)  # a copy, whose running averages may change
    except Exception as error:
        raise ConfigError(
            f"{where}: fails on two examples, a {spec.item_dtype} tensor of shape {tuple(examples.shape)} "
            f"({type(error).__name__}: {first_line(error)}); adapt its forward method to such tensors"
        ) from error
    if not isinstance(outputs, Tensor):
        raise ConfigError(
            f"{where}: returns a {type(outputs).__name__}; it must return a tensor [B, features]"
        )
    if outputs.dim() != 2 or len(outputs) != 2:
        raise ConfigError(
            f"{where}: maps two examples {tuple(examples.shape)} to outputs {tuple(outputs.shape)}; it must "
            "return one vector for each example, [B, features], for example with nn.Flatten() at its end"
        )
    return outputs


def set_features(backbone: nn.Module, size: int, where: str) -> None:
    """Set the attribute `features` if there is none. Raises ConfigError if it is not the outputs' size."""
    features = getattr(backbone, "features", None)
    if features is None:
        backbone.features = size  # type: ignore[assignment]
    elif not isinstance(features, Integral):
        raise ConfigError(
            f"{where}: its attribute features is a {type(features).__name__}; give it another name, since "
            "metarun reads the size of the output vectors from it"
        )
    elif features != size:
        raise ConfigError(
            f"{where}: has features={features}, and its outputs are vectors of {size} numbers; set "
            f"self.features = {size} in its constructor"
        )


def task_spec(dataset: Dataset, train: EpisodeSource | None = None) -> TaskSpec:
    """The kind of tasks of a dataset, with what is known of its training classes if that split is given."""
    if train is None or not train.names:
        return dataset.spec
    return replace(dataset.spec, classes=len(train.names), description=train.spec.description)


def load_weights(algorithm: Algorithm) -> None:
    """Load pretrained weights into modules that have a method `load_weights()`, at the start of a new run.

    A method of this name that needs arguments is another one, which a network may have for its own use.
    """
    for part in algorithm.modules():
        load = getattr(part, "load_weights", None)
        if callable(load) and not any(map(is_required, inspect.signature(load).parameters.values())):
            load()


def start_run(algorithm: Algorithm, train: EpisodeSource, initial_weights: Node) -> None:
    """Draw the initial weights, if they are not PyTorch's, and call `on_run_start(train)`, in a new run.

    It is called of the algorithm and of its parts that have it. The backbone `bag` sets the weights of its
    tokens by their frequencies in the training texts.
    """
    draw_weights(algorithm, initial_weights)
    for part in algorithm.modules():
        if callable(start := getattr(part, "on_run_start", None)):
            start(train)


def draw_weights(algorithm: Algorithm, initial_weights: Node) -> None:
    """Draw the initial weights again, if they are not PyTorch's. Raises ConfigError if there are none."""
    if "_target_" not in (initial_weights or {}):
        return
    backbone = algorithm.own_backbone()
    if backbone is None:
        raise ConfigError(
            f"initial_weights: algorithm={type(algorithm).__name__} has no backbone; leave it out"
        )
    instantiate(initial_weights, "initial_weights")(backbone, algorithm.own_heads())


def is_required(parameter: inspect.Parameter) -> bool:
    """Whether a call must pass this parameter."""
    variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    return parameter.default is parameter.empty and not variadic


def training_shape(settings: TrainConfig) -> EpisodeShape:
    """The shape of a training task."""
    return EpisodeShape(settings.ways, settings.shots, settings.queries, settings.varied)


def validation_shape(settings: TrainConfig) -> EpisodeShape:
    """The shape of a validation or test task: ways, shots and queries of training, unless set separately."""
    own = settings.validation
    return EpisodeShape(
        own.ways or settings.ways,
        settings.shots if own.shots is None else own.shots,
        own.queries or settings.queries,
        settings.varied,
    )


def validation_settings(settings: TrainConfig) -> EvalSettings:
    """The fixed validation tasks."""
    return EvalSettings(validation_shape(settings), settings.validation.episodes, settings.validation.seed)
