"""Refuses typed settings that nothing reads, because they would be without effect."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import MISSING, fields
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict

from metarun.config.changes import key_of
from metarun.config.comments import METHODS, facts
from metarun.config.paths import CONF
from metarun.config.targets import load_class
from metarun.errors import ConfigError


def check_read(cfg: DictConfig, frame: type, typed: Collection[str]) -> None:
    """Raise ConfigError for the first typed setting that nothing reads."""
    check_methods(cfg, typed)
    for override, reason in without_effect(cfg, frame, typed):
        raise ConfigError(f"{override}: nothing reads it {reason}")


def without_effect(cfg: DictConfig, frame: type, typed: Collection[str]) -> Iterator[tuple[str, str]]:
    """The typed settings that nothing reads, each with the reason."""
    ignored = unread(cfg, frame, OmegaConf.to_yaml(in_use(cfg))) | unread_by_classes(cfg)
    exempt = {name for each in fields(frame) for name in each.metadata.get("but", ())}
    # That there is nothing, as in inner_loop=none, is true where nothing reads it.
    empty = {key_of(each) for each in typed if is_option(each) and not cfg.get(key_of(each), True)}
    yield from among(ignored, [each for each in typed if key_of(each) not in exempt | empty])


def check_methods(cfg: DictConfig, typed: Iterable[str]) -> None:
    """Raise ConfigError for a typed inner loop that is a method's own, with another method.

    Its file has the defaults of that method, whose steps differ from those of its class only there.
    """
    for group, _, option in (each.lstrip("+").partition("=") for each in typed):
        path = CONF / "inner_loop" / f"{option}.yaml"
        if group != "inner_loop" or not path.is_file() or METHODS not in (stated := facts(path)):
            continue
        methods = stated[METHODS].split(", ")
        if not issubclass(get_class(cfg.algorithm._target_), tuple(map(class_of_method, methods))):
            rule = OmegaConf.load(path).defaults[0]  # type: ignore[union-attr]
            raise ConfigError(
                f"inner_loop={option}: is inner_loop={rule} with the settings of algorithm="
                f"{' or '.join(methods)}, and not that method; choose inner_loop={rule} and set its steps "
                "and rate, or choose that algorithm"
            )


def class_of_method(option: str) -> type:
    """The class of an option of the group `algorithm`."""
    node: Any = OmegaConf.load(CONF / "algorithm" / f"{option}.yaml")
    return get_class(node.get("algorithm", node)._target_)


def refuse(ignored: Mapping[str, str], typed: Iterable[str]) -> None:
    """Raise ConfigError for the first typed setting among those that nothing reads, which have reasons."""
    for override, reason in among(ignored, typed):
        raise ConfigError(f"{override}: nothing reads it {reason}")


def among(settings: Mapping[str, str], typed: Iterable[str]) -> Iterator[tuple[str, str]]:
    """The typed settings that are among some, or in a group that is, each with the reason of that."""
    for override in typed:
        for name, reason in settings.items():
            if f"{key_of(override)}.".startswith(f"{name}."):
                yield override, reason
                break


def unread(cfg: DictConfig, frame: type, references: str, prefix: str = "") -> dict[str, str]:
    """The settings of a frame that nothing reads, each with the reason.

    Args:
        cfg: the settings of the frame.
        frame: the frame.
        references: a text with all references to other settings, as `${name}`.
        prefix: the path of a nested frame, with a dot at its end.
    """
    found: dict[str, str] = {}
    for each in fields(frame):
        name, facts = each.name, each.metadata
        if each.default_factory is not MISSING:
            nested: type = each.default_factory  # type: ignore[assignment]
            found |= unread(cfg[name], nested, references, f"{prefix}{name}.")
        needs = facts.get("needs", ())
        needs = (needs,) if isinstance(needs, str) else needs
        if needs and not any(cfg[other] for other in needs):
            others = " or ".join(prefix + other for other in needs)
            found[prefix + name] = f"without {others}; set that too, or leave {name} out"
        for other in facts.get("unless", ()):
            if cfg[other]:
                found[prefix + name] = f"with {prefix}{other}; leave one of them out"
        if "shared" in facts and not re.search(rf"\$\{{\.*{name}\}}", references):
            exists = value_of(cfg, facts["shared"]) is not None
            found[name] = f"here; {'set ' + facts['shared'] + ' instead' if exists else 'leave it out'}"
    return found


def unread_by_classes(cfg: DictConfig) -> dict[str, str]:
    """The settings of nodes that nothing reads because of other settings, each with the reason."""
    found = {}
    for group in map(str, cfg):
        if not OmegaConf.is_dict(cfg[group]) or "_target_" not in cfg[group]:
            continue
        cls = get_class(cfg[group]._target_)
        # The `unread` of an algorithm also has settings of other groups, whose names contain a dot.
        for name, condition in conditions(getattr(cls, "unread", {})):
            key = name if "." in name else f"{group}.{name}"
            other, _, wanted = condition.partition("=")
            negated, other = other.endswith("!"), f"{key.rpartition('.')[0]}.{other.rstrip('!')}"
            value = shown(value_of(cfg, other))
            if not condition or (value == wanted) != negated:
                reason = f"with {other}={value}" if condition else f"in {group}={cls.__name__}"
                found[key] = f"{reason}; leave it out"
        if group == "algorithm":
            found |= dict.fromkeys(unused_parts(cls), f"in {group}={cls.__name__}; leave it out")
    return found


def conditions(stated: Mapping[str, str | tuple[str, ...]]) -> Iterator[tuple[str, str]]:
    """Each setting in the `unread` of a class, with each of its conditions."""
    for name, each in stated.items():
        for condition in (each,) if isinstance(each, str) else each:
            yield name, condition


def unused_parts(algorithm: type) -> set[str]:
    """The groups whose objects an algorithm does not take."""
    unused = {"backbone", "inner_loop"} - inspect.signature(algorithm).parameters.keys()
    return unused | ({"normalise", "initial_weights"} if "backbone" in unused else set())


def in_use(cfg: DictConfig) -> DictConfig:
    """The config without the inner loop, which may be a default, if its algorithm does not take one."""
    twin = copy.copy(cfg)
    if "algorithm" in cfg and "inner_loop" in unused_parts(get_class(cfg.algorithm._target_)):
        twin.inner_loop = None
    return twin


def shown(value: Any) -> str:
    """A value as it is typed."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def value_of(cfg: DictConfig, key: str) -> Any:
    """The value of a dotted key, or None if there is no such key."""
    group, _, name = key.rpartition(".")
    node = cfg.get(group) if group else cfg
    return node.get(name) if OmegaConf.is_dict(node) else None


def is_typed(key: str, typed: Collection[str]) -> bool:
    """Whether a setting, or a group that contains it, has a typed value."""
    names = {override.partition("=")[0].lstrip("+~") for override in typed if not is_option(override)}
    return any(f"{key}.".startswith(f"{name}.") for name in names)


def drop_leftovers(cfg: DictConfig, typed: Collection[str]) -> None:
    """Remove what a recipe sets in a group for which an option without a class is typed, and settings of an
    option in whose place a class is typed that does not take them.

    Args:
        cfg: the composed config, which is changed.
        typed: the overrides of the command line; settings that are typed stay, to be refused by `check`.
    """
    for group in (override.partition("=")[0].lstrip("+") for override in typed if is_option(override)):
        node: Any = cfg.get(group) if group != "tracker" else None  # which consists of several nodes
        if OmegaConf.is_dict(node) and "_target_" not in node:
            with open_dict(cfg):
                for key in [key for key in node if not is_typed(f"{group}.{key}", typed)]:
                    del node[key]
    for group, _, name in (key_of(override).rpartition(".") for override in typed):
        if name == "_target_" and is_option(group) and OmegaConf.is_dict(cfg.get(group)):
            drop_unknown(cfg[group], group, typed)


def drop_unknown(node: DictConfig, group: str, typed: Collection[str]) -> None:
    """Remove the settings of a group that are not typed and that its class does not take."""
    try:
        parameters = inspect.signature(load_class(group, node.get("_target_"))).parameters
    except (ConfigError, ValueError):  # which `check` reports
        return
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return
    with open_dict(node):
        for key in [key for key in map(str, node) if key != "_target_" and key not in parameters]:
            if not is_typed(f"{group}.{key}", typed):
                del node[key]


def is_option(override: str) -> bool:
    """Whether an override chooses an option of a group."""
    return (CONF / override.partition("=")[0].lstrip("+")).is_dir()
