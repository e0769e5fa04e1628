"""What distinguishes a run from its method as it is by default, as in "maml norm=task train_tasks=umtra"."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from metarun.config.comments import PAIRING, facts
from metarun.config.paths import CONF
from metarun.config.unread import shown
from metarun.errors import printable
from metarun.training.records import Record

GROUPS = (
    *("backbone", "normalise", "initial_weights", "inner_loop", "outer_loop", "augment"),
    *("train_tasks", "sampler"),
)
SETTINGS = ("norm", "fixed_labels", "varied", "trainval")
# What the file of a method may choose: of a method that is not metarun's own, its default is not known.
OF_METHODS = ("backbone", "inner_loop", "augment", "norm")
# What a pairing may choose: without the pairing, as in older checkpoints, it is no choice of the user's.
OF_PAIRINGS = ("backbone", "outer_loop", "norm")


def variant_name(choices: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """The method of a run, and the options and settings that are not its defaults, as they are typed.

    Args:
        choices: the options of the groups; what is missing, as in older checkpoints, is not named.
        config: the settings of the run.
    """
    defaults = defaults_of(str(choices.get("algorithm")), str(choices.get("pairing")))
    now = {group: choices.get(group) for group in GROUPS} | {name: config.get(name) for name in SETTINGS}
    if "pairing" not in choices and may_be_paired(str(choices.get("dataset"))):
        now |= dict.fromkeys(OF_PAIRINGS)
    words = [f"{key}={shown(now[key])}" for key in now if now[key] not in (None, defaults.get(key, now[key]))]
    return printable(" ".join([str(choices.get("algorithm")), *words]))


def method_of(run: Record) -> str:
    """The method of a run by its files, as `variant_name`; "?" if it is not known."""
    return variant_name(run.choices, run.settings) if "algorithm" in run.choices else "?"


@cache
def defaults_of(algorithm: str, pairing: str) -> dict[str, Any]:
    """The options and settings of a method on a dataset for which nothing is typed.

    Args:
        algorithm: the option of the method.
        pairing: that of the settings which the dataset needs; "None" if it needs none.
    """
    method, paired = (CONF / "algorithm" / f"{algorithm}.yaml", CONF / "pairing" / f"{pairing}.yaml")
    found = stated_in(CONF / "train.yaml")
    if not is_own(method):
        found = {key: value for key, value in found.items() if key not in OF_METHODS}
    for path in (method, paired):
        found |= stated_in(path) if is_own(path) else {}
    return found


def may_be_paired(dataset: str) -> bool:
    """Whether a dataset needs settings of other groups, or is not one of metarun's."""
    path = CONF / "dataset" / f"{dataset}.yaml"
    return not is_own(path) or PAIRING in facts(path)


def is_own(path: Path) -> bool:
    """Whether a name that a checkpoint may contain is that of a file of metarun."""
    return re.fullmatch(r"[\w-]+", path.stem) is not None and path.is_file()


def stated_in(path: Path) -> dict[str, Any]:
    """The options and settings that a YAML file chooses, itself or by the options that it includes."""
    content: Any = OmegaConf.load(path)
    found: dict[str, Any] = {}
    for each in content.get("defaults", ()):
        if isinstance(each, str):
            parent = path.parent / f"{each.removesuffix('@_global_')}.yaml"
            found |= stated_in(parent) if is_own(parent) else {}
        else:
            found |= {key.removeprefix("override ").lstrip("/"): option for key, option in each.items()}
    found |= {name: content[name] for name in SETTINGS if name in content}
    return {key: value for key, value in found.items() if key in (*GROUPS, *SETTINGS)}
