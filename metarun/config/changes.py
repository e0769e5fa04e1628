"""Which settings may change when a run is resumed, and which of two command lines differ. Without PyTorch."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Settings that may change when a run is resumed; all others define the run.
RESUMABLE = (
    *("iterations", "stop", "resume", "hardware", "log", "tracker", "checkpoint", "test", "trust"),
    *("dataset.root", "dataset.descriptions", "dataset.vectors", "dataset.encoder"),
)
ROOT_OF_PART = re.compile(r"dataset\.settings\.[\w-]+\.root")
# Those of them that say when a run is complete.
OF_THE_END = ("iterations", "test", "stop.patience", "stop.at", "stop.hopeless")


def may_change(key: str) -> bool:
    """Whether a setting may change when a run is resumed."""
    return is_in(key, RESUMABLE) or ROOT_OF_PART.fullmatch(key) is not None


def changes_the_end(key: str) -> bool:
    """Whether a run that was complete may not be with another value of a setting."""
    return not may_change(key) or key == "stop" or is_in(key, OF_THE_END)


def is_in(key: str, names: Iterable[str]) -> bool:
    """Whether a setting is one of those named, or in a group of them."""
    return any(key == name or key.startswith(f"{name}.") for name in names)


def key_of(override: str) -> str:
    """The setting that an override sets."""
    return override.partition("=")[0].lstrip("+~")


def differing(before: Iterable[str], now: Iterable[str]) -> dict[str, tuple[str | None, str | None]]:
    """The settings whose overrides differ, each with its value in both; None where it is not typed."""
    then, typed = (
        {key_of(each): each.partition("=")[2] for each in overrides} for overrides in (before, now)
    )
    pairs = {key: (then.get(key), typed.get(key)) for key in {**then, **typed}}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
