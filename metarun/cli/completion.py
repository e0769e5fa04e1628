"""Tab completion of commands and paths; Hydra completes groups and settings."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from metarun.config.schema import path_kind

RUNS = re.compile(r"checkpoint|init|resume")  # settings that are run folders or .pt files


def offered(commands: Sequence[str]) -> list[str] | None:
    """The completions of the line in COMP_LINE, whole words; None: Hydra knows them.

    Args:
        commands: the names of the commands.
    """
    line = os.environ.get("COMP_LINE", "")
    line = line[: int(os.environ.get("COMP_POINT", len(line)))]
    words = line.split()
    current = "" if line[-1:] in ("", " ") else words.pop()
    typed = [word for word in words if word in commands]
    if not typed:
        return [name for name in commands if name.startswith(current)]
    key, equals, value = current.partition("=")
    if not equals or not path_kind(typed[0], key.lstrip("+")):
        return None
    # In a list or a sweep, the last path is completed.
    start = max(value.rfind(mark) for mark in "[,") + 1
    return [f"{key}={value[:start]}{path}" for path in paths(value[start:], RUNS.fullmatch(key) is not None)]


def completed_command(commands: Sequence[str]) -> str:
    """The command in the line to be completed. It is removed from the line: Hydra has no subcommands."""
    line = os.environ.get("COMP_LINE", "")
    for name in commands:
        before, found, after = line.partition(f" {name} ")
        if found:
            os.environ["COMP_LINE"] = f"{before} {after}"
            point = int(os.environ.get("COMP_POINT", len(line)))
            os.environ["COMP_POINT"] = str(point - len(name) - 1)
            return name
    return commands[0]


def paths(start: str, of_runs: bool) -> list[str]:
    """The paths that begin with `start`, folders with a slash at their end.

    Args:
        start: what was typed; `~` stays in the result.
        of_runs: whether only folders and checkpoint files are offered.
    """
    folder, _, name = start.rpartition("/")
    place = Path(os.path.expanduser(folder + "/" if "/" in start else "."))
    kept = start[: len(start) - len(name)]
    entries = sorted(place.iterdir()) if place.is_dir() else []
    if of_runs:
        entries = [path for path in entries if path.is_dir() or path.suffix == ".pt"]
    return [
        f"{kept}{path.name}/" if path.is_dir() else f"{kept}{path.name}"
        for path in entries
        if path.name.startswith(name)
        and (name or not path.name.startswith("."))
        and not re.search(r"\s", path.name)  # the shell separates completions by spaces
    ]
