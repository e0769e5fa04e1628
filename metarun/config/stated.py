"""Which typed option sets a setting: one that a recipe sets cannot be left out by its user."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from metarun.config.changes import key_of
from metarun.config.paths import CONF
from metarun.config.unread import is_option, shown
from metarun.errors import MetarunError

LEAVE_OUT = re.compile(r"leave (?:it|[\w.]+) out\b")
OF_ALL = "# @package _global_"  # the first line of a file that may set anything


@contextmanager
def naming_origins(typed: Collection[str]) -> Iterator[None]:
    """A context in which an error that asks to leave a setting out says how, if an option has set it.

    Args:
        typed: the overrides of the command line.
    """
    try:
        yield
    except MetarunError as error:
        if (text := with_origin(str(error), typed)) == str(error):
            raise
        raise type(error)(text) from error


def with_origin(text: str, typed: Collection[str]) -> str:
    """A message about a setting, `key=value: ...`; where it is not typed, with the option that has set it."""
    setting = re.split("[=:]", text, maxsplit=1)[0]
    if setting in map(key_of, typed) or not (origin := origin_of(setting, typed)):
        return text
    default = default_of(setting)
    advice = f"set {setting}={default}, since {origin} sets it" if default else f"leave {origin} out"
    return LEAVE_OUT.sub(advice, text, count=1)


def origin_of(key: str, typed: Collection[str]) -> str:
    """The typed option whose file sets a setting of another group, such as `recipe=maml_mini`, or ""."""
    for override in reversed([*typed]):
        group, _, option = override.lstrip("+").partition("=")
        if is_option(override) and sets(CONF / group / f"{option}.yaml", key):
            return f"{group}={option}"
    return ""


def sets(path: Path, key: str) -> bool:
    """Whether the file of an option, or one that it includes, sets something in another group."""
    if not path.is_file() or not path.read_text().startswith(OF_ALL):
        return False
    content: Any = OmegaConf.load(path)
    for each in content.get("defaults", ()):
        if isinstance(each, str) and sets(path.parent / f"{each.removesuffix('@_global_')}.yaml", key):
            return True
        if not isinstance(each, str) and f"override /{key}" in each:
            return True
    return OmegaConf.select(content, key, default=content) is not content


def default_of(key: str) -> str:
    """The value of a setting in `metarun train`, or the option of a group, as it is typed; "" if unknown."""
    content: Any = OmegaConf.load(CONF / "train.yaml")
    for each in content.defaults:
        if not isinstance(each, str) and key in each:
            return shown(each[key])
    value = OmegaConf.select(content, key, default=content)
    return "" if OmegaConf.is_config(value) else shown(value)
