"""What the comments of conf/*.yaml say: facts of an option, and an explanation of every setting.

The comments are read where they are needed (`--help`, `metarun data`, the tables of the documents), so that
nothing is written twice. Torch is not imported here: help must be fast.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from metarun.config.paths import CONF

# The facts that the header of an option's file may state, as in `# licence: MIT`.
DATASET_FACTS = ("classes", "items", "from", "licence")
ALGORITHM_FACTS = (
    *("family", "inner step", "meta-gradient", "memory in steps", "support", "query", "paper"),
    *("memory", "reads", "task", "trained by", "critic"),
    *("deterministic path", "latent path", "predictions", "likelihood"),
)
NOTE = "note"  # of any option: a few words in the table of options
PAIRING = "pairing"  # of a dataset: the file in conf/pairing with the settings that it needs in other groups
METHODS = "for"  # of an inner loop: the only methods that it has defaults for
FACT = re.compile(rf"# ({'|'.join((*DATASET_FACTS, *ALGORITHM_FACTS, NOTE, PAIRING, METHODS))}): (.*)")
# The groups of the commands other than `train`.
OTHERS = {"dataset", "hardware"}
OF_COMMAND = {"predict": {"hardware"}, "online": {*OTHERS, "backbone"}}
HIDDEN = {"pairing"}  # groups that only the command line chooses options of
NOT_EXPLAINED = {*HIDDEN, "recipe", "search"}  # groups whose options set other groups' settings
# A line of an option's file: what it includes from its own group, and a setting or a group of settings.
INCLUDED = re.compile(r"  - (?:/algorithm/)?(\w+)(?:@\w+)?")
NODE = re.compile(r"(?P<indent> *)(?P<name>\w+):(?P<value>(?: (?!# )\S+)*) *(?:# (?P<comment>.*))?")
SETTING = re.compile(r"(?P<indent> *)(?P<name>\w+):.*?(?:\s# (?P<comment>.*))?")


@dataclass(frozen=True)
class Setting:
    """A setting with its explanation; or a line that introduces the settings below it, without a name."""

    name: str
    comment: str


def without_pairing(overrides: Iterable[str]) -> list[str]:
    """Overrides as they were typed: the command line adds the pairing of the chosen dataset."""
    return [each for each in overrides if not each.startswith(f"{PAIRING}=")]


def header(path: Path) -> list[str]:
    """The comment lines at the top of a YAML file, the command that uses it first; without `@package`."""
    lines = []
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            break
        if not line.startswith("# @package"):
            lines.append(line)
    return lines


def facts(path: Path) -> dict[str, str]:
    """The facts that the header of an option's file states, by their names."""
    return dict(found.groups() for line in header(path) if (found := FACT.fullmatch(line)))  # type: ignore[misc]


def description(path: Path) -> str:
    """What the header says in sentences: without the command and the facts."""
    return " ".join(line.removeprefix("# ") for line in header(path)[1:] if not FACT.fullmatch(line))


def settings(path: Path) -> Iterator[Setting]:
    """The explained settings of a command's YAML file, nested ones as `validation.every`, in their order."""
    body = path.read_text("utf-8").splitlines()[len(header(path)) :]
    parent, skipping = "", False
    for line in body:
        if line.startswith("# "):
            yield Setting("", line.removeprefix("# "))
        if (found := SETTING.fullmatch(line)) is None:
            continue
        name = found["name"]
        if not found["indent"]:
            parent, skipping = name, name in ("defaults", "hydra")
        if found["comment"] and not skipping:
            yield Setting(f"{parent}.{name}" if found["indent"] else name, found["comment"])


def settings_help(command: str) -> str:
    """The explanation of every setting of a command, for its `--help`.

    Args:
        command: its name, such as "train".

    Returns:
        Lines of two columns, as wide as the terminal but 80 to 100 characters; `$` is doubled, because Hydra
        takes a help text for a `string.Template`.
    """
    every = list(settings(CONF / f"{command}.yaml"))
    width = help_width()
    column = 4 + max(len(setting.name) for setting in every)
    lines = []
    for setting in every:
        first = f"  {setting.name}".ljust(column) if setting.name else "  "
        indent = " " * (column if setting.name else 2)
        lines += textwrap.wrap(setting.comment, width, initial_indent=first, subsequent_indent=indent)
    return "\n".join(lines).replace("$", "$$")


def chosen_help(choices: Mapping[str, str | None], sources: Sequence[Mapping[str, str]]) -> str:
    """The settings of the chosen options, for the `--help` of a command: name, default and explanation.

    Args:
        choices: the option of each group.
        sources: Hydra's config sources, which include the folder of --config-dir.
    """
    folders = [Path(each["path"]) for each in sources if each["schema"] == "file"]
    lines: list[str] = []
    for group, option in sorted(choices.items()):
        paths = [path for folder in folders if (path := folder / group / f"{option}.yaml").is_file()]
        if group in NOT_EXPLAINED or not paths:
            continue
        own = [each for each in option_settings(paths[0]) if each[0] not in ("defaults", "hydra")]
        lines += [f"{group}={option}:"] * bool(own)
        for key, value, comment in own:
            explained = f"  {key}={value}" + (f"  {comment}" if comment else "")
            lines += textwrap.wrap(explained, help_width(), subsequent_indent=" " * 6, break_on_hyphens=False)
    return "\n".join(lines).replace("$", "$$")


def option_settings(path: Path) -> Iterator[tuple[str, str, str]]:
    """The settings in an option's file and in the options that it includes: name, default, explanation."""
    lines = path.read_text("utf-8").splitlines()
    found: dict[str, tuple[str, str]] = {}
    for each in (match[1] for line in lines if (match := INCLUDED.fullmatch(line))):
        if (included := path.parent / f"{each}.yaml").is_file():
            found |= {key: (value, comment) for key, value, comment in option_settings(included)}
    above = [(-1, "" if "# @package _global_" in lines else f"{path.parent.name}.")]
    for match in filter(None, map(NODE.fullmatch, lines)):
        indent, value = len(match["indent"]), match["value"].strip()
        while above[-1][0] >= indent:
            above.pop()
        key = f"{above[-1][1]}{match['name']}"
        if not value:
            above.append((indent, f"{key}."))
        elif match["name"] != "_target_":
            found[key] = value, match["comment"] or found.get(key, ("", ""))[1]
    return ((key, *rest) for key, rest in found.items())


def options_help(command: str, sources: Sequence[Mapping[str, str]]) -> str:
    """The groups of a command with their options, for its `--help`.

    Args:
        command: its name, such as "train".
        sources: Hydra's config sources, which include the folder of --config-dir.
    """
    folders = [Path(each["path"]) for each in sources if each["schema"] == "file"]
    found: dict[str, set[str]] = {}
    for path in (path for folder in folders for path in folder.glob("*/*.yaml")):
        found.setdefault(path.parent.name, set()).add(path.stem)
    shown = found.keys() - HIDDEN if command == "train" else found.keys() & OF_COMMAND.get(command, OTHERS)
    lines = []
    for group in sorted(shown):
        options = f"{group}: {', '.join(sorted(found[group]))}"
        lines += textwrap.wrap(options, help_width(), subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines).replace("$", "$$")


def help_width() -> int:
    """The width of help texts: that of the terminal, but 80 to 100 characters."""
    return min(max(shutil.get_terminal_size().columns, 80), 100)
