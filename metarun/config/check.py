"""Validates a config before data and models are loaded.

Every node with a `_target_` is checked against the signature and the type hints of its class, so that user
classes are checked like metarun's classes, without a schema.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import typing
from collections.abc import Collection
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from omegaconf import MISSING as UNSET
from omegaconf import DictConfig, OmegaConf

from metarun.config.hints import describe, did_you_mean, matches, type_hints
from metarun.config.published import published_in
from metarun.config.schema import FRAMES
from metarun.config.stated import origin_of
from metarun.config.targets import load_class
from metarun.config.unread import check_read, is_option, is_typed, shown, value_of
from metarun.errors import ConfigError

# Constructor arguments that the builder passes, by group; the config must not set them.
SUPPLIED = {
    "dataset": {"datasets"},
    "algorithm": {
        "backbone",
        "inner_loop",
        "outputs",
        "item_shape",
        "classes",
        "shots",
        "description",
        "constants",
    },
    "backbone": {"item_shape", "vocabulary", "encoder"},
    "normalise": {"spec"},
    "optimizer": {"params"},
    "tracker": {"folder", "first"},
    "scheduler": {"optimizer"},
}
# The base class of each group. By name, so that torch is imported only if a node is checked.
KINDS = {
    "dataset": "metarun.datasets.base.Dataset",
    "algorithm": "metarun.algorithms.base.Algorithm",
    "backbone": "torch.nn.Module",
    "normalise": "metarun.backbones.input_norm.InputNorm",
    "initial_weights": "metarun.nn.initial.InitialWeights",
    "augment": "metarun.datasets.augment.Augment",
    "train_tasks": "metarun.datasets.training_tasks.TrainingTasks",
    "inner_loop": "metarun.inner_loops.base.InnerLoop",
    "outer_loop": "metarun.training.outer_loops.OuterLoop",
    "sampler": "metarun.tasks.curriculum.PrioritizedReplay",
    "hardware": "metarun.training.hardware.Hardware",
    "tracker": "metarun.reporting.destinations.Destination",
    "optimizer": "torch.optim.Optimizer",
    "scheduler": "torch.optim.lr_scheduler.LRScheduler",
}
# Nodes that are not groups with options but name a class of PyTorch, and where these are.
CLASSES_OF_TORCH = {"optimizer": "torch.optim", "scheduler": "torch.optim.lr_scheduler"}
# Settings of nodes that must be above zero.
POSITIVE = (
    *("inner_loop.rate", "inner_loop.hidden", "backbone.width", "backbone.widths", "backbone.hidden"),
    *("algorithm.width", "algorithm.hidden"),
)
# The largest whole numbers: a network or an inner loop of more than a million parts never ends; a seed is no
# size and may be any int64.
MOST, MOST_OF_PARTS, MOST_SEED = (1 << 31) - 1, 1_000_000, (1 << 63) - 1
PARTS = ("algorithm", "backbone", "inner_loop", "steps")
LARGEST = 3.4e38  # the range of float32
SWITCHES = ("true", "false", "yes", "no", "on", "off", "1", "0", "null")
NORMS = (
    *("batch", "batch_shift", "running", "group", "layer", "instance"),
    *("task", "task_layer", "support", "none"),
)


def check(
    cfg: DictConfig,
    command: str,
    complete: bool = True,
    typed: Collection[str] = (),
    trusted: Collection[str] | None = None,
    nodes: Collection[str] | None = None,
) -> None:
    """Validate a composed config.

    Args:
        cfg: the config.
        command: the name of the command, a key of `FRAMES`.
        complete: whether all mandatory settings must be set.
        typed: the overrides of the command line, such as "ways=5"; none of them may be without effect.
        trusted: see `load_class`.
        nodes: the groups whose classes are checked, and so imported; None: all.

    Raises:
        ConfigError: for the first setting that is invalid, missing, or not read by anything.
    """
    frame = FRAMES[command]
    check_names(cfg, frame)
    if complete and (missing := sorted(OmegaConf.missing_keys(cfg))):
        raise ConfigError(f"{missing[0]} is not set; add {missing[0]}=VALUE to the command line")
    values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    check_numbers(values)
    check_values(values, frame)
    for key in POSITIVE:
        check_positive(key, value_of(cfg, key))
    if "norm" in cfg and cfg.norm not in NORMS:
        raise ConfigError(f"norm={cfg.norm}: must be one of {', '.join(NORMS)}")
    if "split" in cfg:
        from metarun.tasks.source import SPLITS  # imports torch

        splits = (*SPLITS, "all") if command in ("eval", "adapt") else SPLITS
        if cfg.split not in splits:
            raise ConfigError(f"split={cfg.split}: must be one of {', '.join(splits)}")
    if "trained_classes" in cfg and cfg.trained_classes not in ("leave_out", "keep"):
        raise ConfigError(f"trained_classes={cfg.trained_classes}: must be leave_out or keep")
    published_in(values)
    for name, node in (cfg.get("tracker") or {}).items() if nodes is None else ():
        check_group(f"tracker.{name}", node, required=False, trusted=trusted)
    for each in fields(frame):
        if each.name not in KINDS or each.name == "tracker" or (nodes is not None and each.name not in nodes):
            continue
        if not (command != "train" and each.name == "dataset" and no_class(cfg)):
            check_group(each.name, cfg[each.name], each.default is UNSET, trusted, typed)
    if typed:
        check_switches(frame, typed)
        check_read(cfg, frame, typed)


def check_switches(frame: type, typed: Collection[str], prefix: str = "") -> None:
    """Check that a switch is typed as true or false: OmegaConf takes any whole number for one."""
    hints = typing.get_type_hints(frame)
    for each in fields(frame):
        key = f"{prefix}{each.name}"
        if each.default_factory is not MISSING:
            check_switches(each.default_factory, typed, f"{key}.")  # type: ignore[arg-type]
        elif hints[each.name] in (bool, bool | None):
            for override in typed:
                name, _, value = override.partition("=")
                if name.lstrip("+") == key and value.lower() not in SWITCHES:
                    raise ConfigError(f"{override}: must be {describe(hints[each.name])}")


def no_class(cfg: DictConfig) -> bool:
    """Whether the settings of the dataset only adjust that of a checkpoint."""
    return OmegaConf.is_dict(cfg.dataset) and "_target_" not in cfg.dataset


def check_names(cfg: DictConfig, frame: type, prefix: str = "") -> None:
    """Check that a config has the settings of a frame and of its nested frames, and no others."""
    known, present = {each.name: each for each in fields(frame)}, set(map(str, cfg))
    for key in present - known.keys():
        raise ConfigError(f"{prefix}{key}: there is no such setting{did_you_mean(key, known)}")
    for name, each in known.items():
        if name not in present:
            raise ConfigError(f"~{prefix}{name}: {prefix}{name} is needed; set another value instead")
        if each.default_factory is not MISSING:
            if not OmegaConf.is_dict(cfg[name]):
                raise ConfigError(f"{prefix}{name}={cfg[name]}: is a group of settings; set one of them")
            check_names(cfg[name], each.default_factory, f"{prefix}{name}.")  # type: ignore[arg-type]


def check_hydra(hydra: Any) -> None:
    """Raise ConfigError for a typed setting that Hydra does not have; a plus adds any name."""
    for override in hydra.overrides.hydra:
        if not override.startswith("+"):  # Hydra itself has checked it
            continue
        node: Any = hydra
        for name in override.partition("=")[0].lstrip("+~").split(".")[1:]:
            kind = OmegaConf.get_type(node)
            known = [each.name for each in fields(kind)] if is_dataclass(kind) else [name]
            if name not in known:
                raise ConfigError(f"{override}: Hydra has no such setting{did_you_mean(name, known)}")
            node = node._get_node(name) if OmegaConf.is_dict(node) else None


def check_numbers(value: Any, key: str = "") -> None:
    """Check that every number below a key is in the range that PyTorch computes with."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            check_numbers(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, int) and not isinstance(value, bool):
        of_parts = key.partition(".")[0] in PARTS
        most = MOST_SEED if key.endswith("seed") else MOST_OF_PARTS if of_parts else MOST
        if not -most <= value <= most:
            raise ConfigError(f"{key}={value}: is out of range; choose a number of at most {most}")
    elif isinstance(value, float) and not abs(value) <= LARGEST:  # also rejects NaN
        raise ConfigError(f"{key}={value}: must be a finite number, of at most {LARGEST}")


def check_group(
    name: str,
    node: Any,
    required: bool,
    trusted: Collection[str] | None = None,
    typed: Collection[str] = (),
) -> None:
    """Check the node of a group: a class with its settings, or nothing if it is not required."""
    if OmegaConf.is_dict(node) and "_target_" in node:
        check_node(name, node, trusted, typed)
    elif not OmegaConf.is_dict(node) and (node or required):
        word = "null" if node is None else node
        how = f"set {name}._target_ and its settings{example(name, word)}"
        raise ConfigError(f"{name}={word}: is a group of settings; {how}")
    elif required:
        raise ConfigError(f"{name}: has no class; set {name}._target_, or leave {name} out")
    elif node:
        setting = next(iter(node))
        key, options = f"{name}.{setting}", [each for each in typed if is_option(each)]
        if option := next((each for each in options if each.lstrip("+").startswith(f"{name}=")), ""):
            raise ConfigError(f"{key}: {option} has no setting {setting!r}; leave {key} out")
        raise ConfigError(
            f"{key}: nothing reads it, because {name} has no class ({name}._target_); leave {key} out, with "
            "the recipe if that sets it"
        )


def example(group: str, word: Any) -> str:
    """The end of a message: the class of PyTorch that a word means, as it is typed; "" if there is none."""
    module = CLASSES_OF_TORCH.get(group)
    names = importlib.import_module(module).__all__ if module else []
    close = sorted((name for name in names if str(word).lower() in name.lower()), key=len)
    if not (close := close or difflib.get_close_matches(str(word), names, n=1)):
        return ""
    plus = "+" if group == "scheduler" else ""  # it is null by default, so its settings are new
    return f", as in {plus}{group}._target_={module}.{close[0]} +{group}.SETTING=VALUE"


def check_values(values: dict[str, Any], frame: type, prefix: str = "") -> None:
    """Check the values of a frame and of its nested frames: numbers by the bounds of their fields."""
    hints = typing.get_type_hints(frame)
    for each in fields(frame):
        key, value = f"{prefix}{each.name}", values.get(each.name)
        if each.default_factory is not MISSING and isinstance(value, dict):
            check_values(value, each.default_factory, f"{key}.")  # type: ignore[arg-type]
        elif "least" in each.metadata:
            check_number(key, value, each.metadata["least"])
        elif "positive" in each.metadata:
            if value == []:
                raise ConfigError(f"{key}=[]: must name at least one number")
            check_positive(key, value, each.metadata.get("zero", False))
        elif value != "???" and not matches(value, hints[each.name]):
            raise ConfigError(f"{key}={shown(value)}: must be {describe(hints[each.name])}")


def check_positive(key: str, value: Any, zero: bool = False) -> None:
    for number in value if isinstance(value, list) or OmegaConf.is_list(value) else [value]:
        if isinstance(number, (int, float)) and not (0 < number < math.inf or (zero and number == 0)):
            raise ConfigError(f"{key}={number}: must be {'at least' if zero else 'above'} 0 and finite")


def check_number(key: str, value: Any, least: int) -> None:
    if value == []:
        raise ConfigError(f"{key}=[]: must name at least one number")
    for number in value if isinstance(value, list) else [value]:
        if number is not None and not (matches(number, int) and number >= least):
            raise ConfigError(f"{key}={number}: must be a whole number of at least {least}")


def check_node(
    path: str, node: DictConfig, trusted: Collection[str] | None = None, typed: Collection[str] = ()
) -> None:
    """Check the settings of a `_target_` node against the signature of its class.

    The parts of a mixture (the nodes in `settings`) are checked in the same way.

    Args:
        path: where the node is in the config, such as "backbone" or "dataset.settings.NAME".
        node: the class (`_target_`) and its settings.
        trusted: see `load_class`.
        typed: the overrides of the command line, to tell where an unknown setting comes from.

    Raises:
        ConfigError: if the class cannot be imported or does not belong to the group, or if a setting is
            unknown, of the wrong type, missing, or passed by the builder.
    """
    group = path.partition(".")[0]
    cls = load_class(path, node._target_, trusted)
    check_kind(path, group, cls)
    for key in map(str, node):
        if key.startswith("_") and key != "_target_":  # Hydra's instructions, such as _args_
            raise ConfigError(f"{path}.{key}: there is no such setting; leave it out")
    parameters = inspect.signature(cls).parameters
    supplied = SUPPLIED.get(group, set())
    if "datasets" in supplied & parameters.keys():
        for name, part in node.get("settings", {}).items():
            if not (OmegaConf.is_dict(part) and "_target_" in part):
                raise ConfigError(
                    f"{path}.settings.{name}: is not a dataset; choose it by {path}.parts={{...}}"
                )
            check_node(f"{path}.settings.{name}", part, trusted)
    if "schedulers" in parameters:  # of SequentialLR and ChainedScheduler
        for number, nested in enumerate(nested_schedulers(path, node)):
            check_node(f"{path}.schedulers.{number}", nested, trusted)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    allowed = [name for name in parameters if name not in supplied]
    hints = type_hints(cls)
    settings: dict[str, Any] = OmegaConf.to_container(node, resolve=True)  # type: ignore[assignment]
    for key, value in settings.items():
        if key == "_target_" or value == "???":
            continue
        if key in supplied:
            raise ConfigError(f"{path}.{key}={value}: is set by metarun; leave it out")
        if key not in allowed and typed and not is_typed(f"{path}.{key}", typed):
            origin = origin_of(f"{path}.{key}", typed)
            raise ConfigError(
                f"{path}.{key}: {owner(path, cls)} has no setting {key!r}, which "
                f"{origin or 'another option here'} sets; leave {owner(path, cls)} out, or "
                f"{origin or 'choose other options'}"
            )
        if key not in allowed:
            raise ConfigError(
                f"{path}.{key}: {owner(path, cls)} has no setting {key!r}{did_you_mean(key, allowed)}"
            )
        hint = hints.get(key, Any)
        if is_dataclass(hint) and isinstance(value, dict):  # a group of settings
            check_fields(f"{path}.{key}", value, hint)  # type: ignore[arg-type]
        elif not matches(value, hint):
            raise ConfigError(f"{path}.{key}={shown(value)}: must be {describe(hint)}")
    for name in allowed:
        if parameters[name].default is inspect.Parameter.empty and name not in settings:
            raise ConfigError(f"{path}.{name} is not set; add {path}.{name}=VALUE")


def check_fields(path: str, values: dict[str, Any], cls: type) -> None:
    """Check a group of settings in a node, such as `dataset.estimator`, by the fields of a dataclass."""
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(f"{path}.{key}: there is no such setting{did_you_mean(key, hints)}")
        if not matches(value, hints[key]):
            raise ConfigError(f"{path}.{key}={shown(value)}: must be {describe(hints[key])}")


def owner(path: str, cls: type) -> str:
    """What has the settings of a node, for messages: an option of a group, or a class of PyTorch."""
    group, *inside = path.split(".")
    if inside[:1] == ["settings"]:  # a part of a mixture is named like its option
        return inside[-1]
    return cls.__name__ if group in CLASSES_OF_TORCH else f"{group}={cls.__name__}"


def nested_schedulers(path: str, node: DictConfig) -> list[DictConfig]:
    """The schedulers in the list `schedulers` of a node. Raises ConfigError if it is not such a list."""
    nested = node.get("schedulers")
    is_list = OmegaConf.is_list(nested) and len(nested)
    if not is_list or not all(OmegaConf.is_dict(each) and "_target_" in each for each in nested):
        target = f"{CLASSES_OF_TORCH['scheduler']}.StepLR"
        raise ConfigError(
            f"{path}.schedulers={nested}: must be a list of classes with their settings, "
            f"as in '{path}.schedulers=[{{_target_:{target},step_size:10}}]'"
        )
    return list(nested)


def check_kind(path: str, group: str, cls: type) -> None:
    """Raise ConfigError unless the class is a subclass of the base class of its group.

    The config in a checkpoint must not be able to call arbitrary functions.
    """
    if group not in KINDS:
        raise ConfigError(f"{path}._target_: {path} takes no class; leave _target_ out")
    module, _, name = KINDS[group].rpartition(".")
    what = f"{path}._target_={cls.__module__}.{cls.__name__}"
    if not issubclass(cls, getattr(importlib.import_module(module), name)):
        raise ConfigError(f"{what}: is not a {KINDS[group]}")
    if inspect.isabstract(cls):
        raise ConfigError(f"{what}: is an abstract class; choose a subclass")
