"""Converts command line arguments to Hydra's grammar: flags first, paths quoted, parts of a mixture added."""

from __future__ import annotations

import difflib
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

from metarun.config.paths import CONF

# Settings that are paths. Their values are quoted, since a path may contain characters of Hydra's grammar.
PATH_KEYS = re.compile(r"checkpoint|support|query|resume|dataset\.(settings\.\w+\.)?root")

PART = re.compile(r"dataset\.parts\.([\w-]+)")  # one dataset of a mixture

# Hydra's flags that take a value, and those that do not.
VALUED_FLAGS = [
    "-c",
    "--cfg",
    "-p",
    "--package",
    "-i",
    "--info",
    "-cn",
    "--config-name",
    "-cd",
    "--config-dir",
    "-cp",
    "--config-path",
    "-e",
    "--experimental-rerun",
]
PLAIN_FLAGS = [
    "-h",
    "--help",
    "--hydra-help",
    "--version",
    "--resolve",
    "-r",
    "--run",
    "-m",
    "--multirun",
    "-sc",
    "--shell-completion",
]


def arrange(name: str, arguments: list[str]) -> list[str]:
    """Convert arguments to what Hydra's parser needs.

    Args:
        name: the command.
        arguments: as typed.

    Returns:
        Flags, then overrides. Paths are quoted, the parts of a mixture and the settings that a dataset needs
        are added, and the output folder of a resumed run is its own folder.
    """
    flags = [a for a in arguments if not is_override(a)]
    overrides = [quote_path(a) for a in arguments if is_override(a)]
    for before, word in zip(["", *flags], flags, strict=False):
        if word.startswith("-"):
            check_flag(name, word.partition("=")[0])
        elif before not in VALUED_FLAGS:
            fail(f"{word!r} is neither a setting (key=value) nor a flag; see metarun {name} --help", status=2)
    if name == "train":
        overrides = pairing(overrides) + overrides
    overrides += parts_of(overrides)
    # The names of parts are not in the config yet, so Hydra needs `++` to add them.
    overrides = [f"++{a}" if PART.fullmatch(a.partition("=")[0]) else a for a in overrides]
    resume = [a.partition("=")[2].strip("'\"") for a in arguments if a.startswith("resume=")]
    if name != "train" or resume:
        # `dataset.root=...` adjusts the dataset of the checkpoint, which is not in Hydra's config.
        overrides = [f"++{a}" if a.startswith("dataset.") else a for a in overrides]
    if name == "train" and resume:
        folder = Path(resume[-1]).expanduser()
        folder = folder if folder.is_dir() else folder.parent
        overrides.append(f"hydra.run.dir={quoted(str(folder))}")
    return flags + overrides


def pairing(overrides: list[str]) -> list[str]:
    """The override for the settings that the chosen dataset needs in other groups (conf/pairing), if any.

    Typed settings have precedence over them. Hydra's defaults lists do not support this: a list that depends
    on a choice must not override another group.
    """
    chosen = dict(a.split("=", 1) for a in overrides if not a.startswith("~"))
    name = chosen.get("dataset", "")
    paired = "pairing" not in chosen and (CONF / "pairing" / f"{name}.yaml").is_file()
    return [f"pairing={name}"] if paired else []


def parts_of(overrides: list[str]) -> list[str]:
    """Overrides that add the config of each part of a mixture below `dataset.settings`.

    The settings of a part can then be typed, and they are checked like other settings.
    """
    chosen = dict(a.lstrip("+").split("=", 1) for a in overrides if not a.startswith("~"))
    dataset = chosen.get("dataset", "")
    if dataset != "mixture":
        if "mixture" in dataset.split(","):
            fail(
                f"dataset={dataset}: a sweep over datasets must not include mixture; run it separately",
                status=1,
            )
        return []
    names = [match[1] for key in chosen if (match := PART.fullmatch(key))]
    for parts in re.split(r"[}]", chosen.get("dataset.parts", "")):  # a sweep has several mappings
        own = re.findall(r"([\w-]+)[\"']?\s*:", parts)
        if twice := [name for name in own if own.count(name) > 1]:
            fail(f"dataset.parts: {twice[0]} is listed twice; name each dataset once", status=1)
        names += own
    packages = {f"dataset@dataset.settings.{name}": name for name in dict.fromkeys(names)}
    return [f"+{package}={name}" for package, name in packages.items() if package not in chosen]


def is_override(argument: str) -> bool:
    """Whether an argument is an override (key=value, ~key) and not a flag."""
    return argument.startswith("~") or ("=" in argument and not argument.startswith("-"))


def check_flag(name: str, flag: str) -> None:
    """Exit with status 2 if Hydra has no such flag."""
    if flag not in VALUED_FLAGS + PLAIN_FLAGS:
        close = difflib.get_close_matches(flag, VALUED_FLAGS + PLAIN_FLAGS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"see metarun {name} --help"
        fail(f"{flag} is not a flag; {hint}", status=2)


def quote_path(override: str) -> str:
    """Quote the value of an override if it is a path, and expand `~`.

    Values that are already quoted, null, and interpolations are not changed.
    """
    key, _, value = override.partition("=")
    if not PATH_KEYS.fullmatch(key) or value == "null" or value[:1] in ("'", '"', "$"):
        return override
    if value.startswith("[") and value.endswith("]"):
        return f"{key}=[{','.join(quoted(item.strip()) for item in value[1:-1].split(','))}]"
    if not value:
        fail(f"{key}= is empty; name a path", status=1)
    return f"{key}={quoted(value)}"


def quoted(path: str) -> str:
    """A path in single quotes, with `~` expanded."""
    if path[:1] in ("'", '"'):
        return path
    path = os.path.expanduser(path).replace("'", "\\'").replace("${", "\\${")
    return f"'{path}'"


def fail(message: str, status: int) -> NoReturn:
    """Print an error message of one line and exit."""
    prefix = "metarun: " if status == 130 else "metarun: error: "
    print(prefix + message, file=sys.stderr)
    sys.exit(status)
