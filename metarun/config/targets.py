"""The gate before every import of a class that a config names (`_target_`).

A config on the command line is the user's own and may name any class. A config in a checkpoint may be
somebody else's: importing a module runs its code, so only classes of metarun and torch.optim are imported,
and those of modules that the user names on the command line.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from metarun.errors import ConfigError, MetarunError, first_line

OWN = ("metarun", "torch.optim")  # what a checkpoint may name without the user's consent


def trusted_modules(cfg: DictConfig) -> tuple[str, ...]:
    """The modules that the user's own config names: those in `trust`, and that of every `_target_`."""
    named = (target.rpartition(".")[0] for target in targets_in(OmegaConf.to_container(cfg)))
    return tuple(dict.fromkeys((*map(str, cfg.trust or ()), *filter(None, named))))


def targets_in(node: Any) -> Iterator[str]:
    """Every `_target_` in nested plain containers."""
    if isinstance(node, dict):
        yield from (str(value) for key, value in node.items() if key == "_target_")
    if isinstance(node, (dict, list)):
        for value in node.values() if isinstance(node, dict) else node:
            yield from targets_in(value)


def trust_words(config: Mapping[str, Any]) -> list[str]:
    """What to type with a checkpoint of this config: `trust=[...]`, or nothing if no class needs it."""
    others = (target for target in targets_in(config) if not is_in(target, OWN))
    packages = sorted({target.partition(".")[0] for target in others})
    return [f"trust=[{','.join(packages)}]"] if packages else []


@contextmanager
def naming_options(config: Mapping[str, Any], choices: Mapping[str, Any]) -> Iterator[None]:
    """A context in which errors name the option of a group, `algorithm=protonet`, where they name its class.

    A class does not know which option it was chosen by, so it writes `algorithm=ProtoNet` in its errors.

    Args:
        config: the groups, with the `_target_` of each.
        choices: the option of each group. One whose class is not in the config stays as it is.
    """
    try:
        yield
    except MetarunError as error:
        if (text := in_options(str(error), config, choices)) == str(error):
            raise
        raise type(error)(text) from error


def in_options(text: str, config: Mapping[str, Any], choices: Mapping[str, Any]) -> str:
    """A text with the options of groups in place of the names of their classes, see `naming_options`."""
    for group, option in ((str(name), option) for name, option in choices.items()):
        node = config.get(group) if "@" not in group else None
        target = str(node.get("_target_")) if isinstance(node, (Mapping, DictConfig)) else ""
        if target and option:
            name = re.escape(target.rpartition(".")[2])
            text = re.sub(rf"\b{group}={name}\b", f"{group}={option}", text)
    return text


def is_in(name: str, modules: Collection[str]) -> bool:
    """Whether a dotted name is one of these modules or inside of one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def load_class(path: str, target: Any, trusted: Collection[str] | None = None) -> type:
    """Import the class that a `_target_` names.

    Args:
        path: where the `_target_` is in the config, for messages.
        target: its value.
        trusted: the modules beside `OWN` that may be imported, if the config is from a checkpoint; None: all,
            because the config is the user's own.

    Raises:
        ConfigError: if the class may not be imported, or the import fails.
    """
    where = f"{path}._target_={target}"
    if not isinstance(target, str):
        raise ConfigError(f"{where}: is not the name of a class; write it as MODULE.CLASS")
    if "__main__" in target.split("."):  # importing it would start a program
        raise ConfigError(f"{where}: is a program; choose a class of an importable module")
    own = is_in(target, OWN)
    if not own:
        if trusted is not None and not is_in(target, trusted):
            raise untrusted(where, target)
        import_from_current_folder()
    log = logging.getLogger("hydra.utils")  # it would print the error, and so would we
    log.disabled = True
    try:
        cls = get_class(target)
    except Exception as error:
        reason = first_line(error.__cause__ or error)
        raise ConfigError(
            f"{where}: import failed ({reason}); check the name, and that the module is installed or in the "
            "current folder"
        ) from None
    finally:
        log.disabled = False
    # A module of metarun also has names of what it imports, such as torch.
    if own and trusted is not None and not is_in(cls.__module__, (*OWN, *trusted)):
        raise untrusted(where, f"{cls.__module__}.{cls.__name__}")
    return cls


def untrusted(where: str, target: str) -> ConfigError:
    """The error for a class that a checkpoint may not name."""
    return ConfigError(
        f"{where}: a checkpoint may only name classes of metarun and torch.optim; if you trust this module, "
        f"add trust=[{target.partition('.')[0]}]"
    )


def import_from_current_folder() -> None:
    """Let Python import modules in the current folder, after all others.

    Only for modules that the user asks for: other people's files may lie in that folder.
    """
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)
