"""Converts command line arguments to Hydra's grammar: flags first, paths quoted, parts of a mixture added."""

from __future__ import annotations

import difflib
import itertools
import os
import re
import sys
from typing import NoReturn

from metarun.config.comments import PAIRING, facts
from metarun.config.paths import CONF
from metarun.config.schema import path_kind
from metarun.errors import message_line
from metarun.storage.files import user_path

# Settings that name columns of a table, which may contain any character, and values that need no quotes.
COLUMNS = re.compile(r"\+*dataset\.(task|label|target|smiles|tasks|features|drop|categories|missing)")
PLAIN = re.compile(r"""[\w.+-]*|\$.*|'[^']*'|"[^"]*\"""")
# Options of conf/pairing, and the settings of datasets of texts that choose between them.
TEXTS, TEXT_VECTORS, TEXT_FINETUNE = "texts", "text_vectors", "text_finetune"
MAKE_VECTORS, FINETUNE = ("dataset.vectors", "dataset.encoder"), "dataset.finetune"

RESUMED = ("train", "online")  # commands with the setting `resume`
PART = re.compile(r"dataset\.parts\.([\w-]+)")  # one dataset of a mixture

# Settings that Hydra only reads in a sweep, and short names of some.
OF_SWEEPS = re.compile(r"\+*hydra(\.sweep\.|[./]sweeper|[./]launcher).*|(sweep|retry)=.*")
SHORT = {"sweep": "hydra.sweep.dir", "retry": "hydra.callbacks.table.retry"}
ITEM = re.compile(r"""(?:'[^']*'|"[^"]*"|\[[^\]]*\]|[^,])+""")  # of a list or a sweep: commas separate items

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

# The values of some of them.
CHOICES = dict.fromkeys(["-c", "--cfg"], ("job", "hydra", "all")) | dict.fromkeys(
    ["-i", "--info"], ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
)


def arrange(name: str, arguments: list[str]) -> list[str]:
    """Convert arguments to what Hydra's parser needs.

    Args:
        name: the command.
        arguments: as typed.

    Returns:
        Flags, then overrides. Paths are quoted, the parts of a mixture and the settings that a dataset needs
        are added, and the output folder of a resumed run is its own folder.
    """
    arguments = with_folders(name, arguments)
    flags, typed = separated(name, arguments)
    sweep = not {"-m", "--multirun", "hydra.mode=MULTIRUN"}.isdisjoint(arguments)
    for override in typed:
        check_override(override, sweep)
    typed = [with_long_name(override) for override in typed]
    overrides = [quote_column(quote_path(name, override, sweep), sweep) for override in typed]
    if name == "train":
        overrides = pairing(overrides) + overrides
    overrides += parts_of(overrides)
    # The names of parts are not in the config yet, so Hydra needs `++` to add them.
    overrides = [f"++{a}" if PART.fullmatch(a.partition("=")[0]) else a for a in overrides]
    resume = [a.partition("=")[2].strip("'\"") for a in typed if a.lstrip("+").startswith("resume=")]
    resume = resume if name in RESUMED else []
    if name == "online" and resume[-1:] == ["auto"]:
        fail("resume=auto: is for metarun train; name the output folder of the stream to continue", status=1)
    if name == "train" and resume[-1:] == ["auto"]:
        named = any(a.lstrip("+").startswith("hydra.run.dir=") for a in typed)
        if not sweep and not named and {"-cd", "--config-dir"}.isdisjoint(flags):
            fail("resume=auto: needs a folder that is the same each time; add hydra.run.dir=FOLDER", status=1)
        resume = []
    if name != "train" or resume:
        # `dataset.root=...` adjusts the dataset of the checkpoint, which is not in Hydra's config.
        overrides = [f"++{a}" if a.startswith("dataset.") else a for a in overrides]
    if resume:
        if typed_folder := [a for a in typed if a.lstrip("+").startswith("hydra.run.dir=")]:
            fail(f"{typed_folder[0]}: a resumed run stays in its folder; leave hydra.run.dir out", status=1)
        folder = user_path(resume[-1])
        folder = folder if folder.is_dir() else folder.parent
        overrides.append(f"hydra.run.dir={quoted(str(folder))}")
    return flags + overrides


def with_long_name(override: str) -> str:
    """An override of a sweep by the name that it has in Hydra's config."""
    key, equals, value = override.partition("=")
    return f"{SHORT.get(key, key)}{equals}{value}"


def with_folders(name: str, arguments: list[str]) -> list[str]:
    """The arguments of a command; of `runs` and `report`, folders may be typed alone."""
    if name not in ("runs", "report"):
        return arguments
    before = ["", *arguments]  # a word after some flags is their value
    words = [a for a, flag in zip(arguments, before, strict=False) if is_word(a) and flag not in VALUED_FLAGS]
    if not words:
        return arguments
    setting = f"runs=[{','.join(map(quoted, words))}]" if name == "report" else f"folder={words[-1]}"
    return [*(a for a in arguments if a not in words), setting]


def is_word(argument: str) -> bool:
    """Whether an argument is neither a flag nor a setting."""
    return not (argument.startswith(("-", "~")) or "=" in argument)


def pairing(overrides: list[str]) -> list[str]:
    """The override for the settings that the chosen dataset needs in other groups (conf/pairing), if any.

    Typed settings have precedence over them. Hydra's defaults lists do not support this: a list that depends
    on a choice must not override another group.
    """
    chosen = dict(a.split("=", 1) for a in overrides if not a.startswith("~"))
    if "pairing" in chosen:
        return []
    names = ("dataset", "backbone", "algorithm", FINETUNE)
    vectors = any(chosen.get(name, "null") != "null" for name in MAKE_VECTORS)
    values = (chosen.get(name, "").split(",") for name in names)
    every = {pairing_of(vectors, *each) for each in itertools.product(*values)}
    if len(every) > 1:
        swept = [f"{name}={chosen[name]}" for name in names if "," in chosen.get(name, "")]
        fail(
            f"{' '.join(swept)}: these need different settings of other groups; run them separately", status=1
        )
    (paired,) = every
    return [f"pairing={paired}"] if paired else []


def pairing_of(vectors: bool, dataset: str, backbone: str, algorithm: str, finetune: str) -> str:
    """The pairing of a dataset with a backbone or an algorithm, "" for none.

    The file of an algorithm may name a pairing, too. An environment then has settings for such algorithms in
    `DATASET_ALGORITHM.yaml`, if its own are for others.

    Args:
        vectors: whether a model makes vectors of texts.
        dataset, backbone, algorithm: the options.
        finetune: the value of dataset.finetune.
    """
    paired, of_backbone = of_option("dataset", dataset.strip()), of_option("backbone", backbone.strip())
    if paired == TEXTS and vectors:
        return TEXT_FINETUNE if finetune.strip().lower() == "true" else TEXT_VECTORS
    if paired == TEXTS and of_backbone:
        return f"{paired}_{of_backbone}"
    of_both = f"{paired}_{of_option('algorithm', algorithm.strip())}"
    return of_both if (CONF / "pairing" / f"{of_both}.yaml").is_file() else paired


def of_option(group: str, option: str) -> str:
    """The pairing that the file of an option names; "" if there is no such file, or it names none."""
    path = CONF / group / f"{option}.yaml"
    return facts(path).get(PAIRING, "") if path.is_file() else ""


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


def separated(name: str, arguments: list[str]) -> tuple[list[str], list[str]]:
    """The flags of a command line with their values, and its overrides; other words end the program."""
    flags, overrides = [], []
    rest = iter(arguments)
    for argument in rest:
        if argument.startswith("-"):
            flag, equals, value = argument.partition("=")
            check_flag(name, flag)
            if flag in VALUED_FLAGS and not equals:
                value = next(rest, "")
            if flag in VALUED_FLAGS and (not value or value.startswith("-")):
                fail(f"{flag} needs a value; see metarun {name} --help", status=2)
            if flag in CHOICES and value not in CHOICES[flag]:
                fail(f"{flag} {value}: must be one of {', '.join(CHOICES[flag])}", status=2)
            if flag in ("-cd", "--config-dir") and os.path.basename(os.path.abspath(value)) == ".hydra":
                # It may be somebody else's, and a typed folder of configs may name any class.
                fail(f"{flag} {value}: is the record of a run; continue the run with resume=RUN", status=2)
            if flag in PLAIN_FLAGS and equals:
                fail(f"{argument}: {flag} takes no value", status=2)
            flags += [argument] if equals or flag in PLAIN_FLAGS else [flag, value]
        elif argument.startswith(("=", "~hydra")):
            fail(f"{argument}: is not a setting; leave it out", status=2)
        elif argument.startswith("~") or "=" in argument:
            overrides.append(argument)
        else:
            message = f"{argument!r} is neither a setting (key=value) nor a flag; see metarun {name} --help"
            fail(message, status=2)
    if not {"-sc", "--shell-completion"}.isdisjoint(flags) and not (
        len(overrides) == 1 and re.fullmatch(r"(install|uninstall|query)=(bash|fish|zsh)", overrides[0])
    ):
        fail("-sc needs install=bash, fish or zsh (or uninstall=)", status=2)
    return flags, overrides


def check_override(override: str, sweep: bool) -> None:
    """Exit with status 1 for an override that Hydra would accept without effect, or with another meaning."""
    key, equals, value = override.partition("=")
    if equals and not value.strip() and not key.startswith("~"):
        fail(f"{override} is empty; type a value, or leave it out for the default", status=1)
    if key.lstrip("+") == "hydra.verbose" and value.lower() not in ("true", "false"):
        fail(f"{override}: must be true or false", status=1)
    if OF_SWEEPS.fullmatch(override) and not sweep:
        fail(f"{override}: is only read in a sweep; add -m, or leave it out", status=1)
    if sweep and key.lstrip("+") == "hydra.run.dir":
        fail(f"{override}: is not read in a sweep; set hydra.sweep.dir", status=1)
    if re.match(r"\+*hydra\.(runtime|overrides)\b", key):
        fail(f"{override}: is set by Hydra; leave it out", status=1)
    if key == "tracker":  # the only group of which several options may be chosen
        if "," in value and not value.startswith("[") and not sweep:
            fail(f"{override}: several are typed as a list, tracker=[{value}]", status=1)
        return
    if (CONF / key).is_dir() and (value.startswith("[") or value.endswith(".yaml")):
        option = value.strip("[]").removesuffix(".yaml")
        fail(f"{override}: a group has one option, as in {key}={option.partition(',')[0]}", status=1)
    if (CONF / key).is_dir() and "," in value and not sweep:
        fail(f"{override}: a group has one option; for a sweep over several add -m", status=1)


def check_flag(name: str, flag: str) -> None:
    """Exit with status 2 if Hydra has no such flag."""
    if flag not in VALUED_FLAGS + PLAIN_FLAGS:
        close = difflib.get_close_matches(flag, VALUED_FLAGS + PLAIN_FLAGS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"see metarun {name} --help"
        fail(f"{flag} is not a flag; {hint}", status=2)


def quote_path(name: str, override: str, sweep: bool) -> str:
    """Quote the value of an override if it is a path, and expand `~`.

    Values that are already quoted, null, and interpolations are not changed.

    Args:
        name: the command.
        override: as typed.
        sweep: whether commas separate the values of a sweep. Otherwise they are part of the path.
    """
    key, _, value = override.partition("=")
    kind = path_kind(name, key.lstrip("+"))
    if not kind or override.startswith("~") or value == "null" or value.startswith("$"):
        return override
    values = [each.strip() for each in ITEM.findall(value)] if sweep and kind != "folder" else [value]
    return f"{key}={','.join(quoted_item(each, kind) for each in values)}"


def quote_column(override: str, sweep: bool) -> str:
    """Quote the value of an override that names a column, or each of a list, where Hydra requires it.

    Args:
        override: as typed.
        sweep: whether commas separate the values of a sweep. Otherwise they are part of the name.
    """
    key, _, value = override.partition("=")
    if not COLUMNS.fullmatch(key):
        return override
    values = [each.strip() for each in ITEM.findall(value)] if sweep else [value]
    return f"{key}={','.join(map(quoted_column, values))}"


def quoted_column(value: str) -> str:
    """The name of a column in quotes, if it needs them, or a list of them."""
    if value.startswith("[") and value.endswith("]"):
        items = (item.strip() for item in ITEM.findall(value[1:-1]))
        return f"[{','.join(quoted(item) if item == 'null' else quoted_column(item) for item in items)}]"
    return value if PLAIN.fullmatch(value) else quoted(value)


def quoted_item(value: str, kind: str) -> str:
    """A path in quotes, or a list of paths if the setting can be a list."""
    if kind == "list" and value.startswith("[") and value.endswith("]"):
        return f"[{','.join(quoted(item.strip()) for item in ITEM.findall(value[1:-1]))}]"
    return quoted(value, interpolated=kind == "folder")


def quoted(path: str, interpolated: bool = False) -> str:
    """A path in single quotes, with `~` expanded.

    Args:
        path: as typed. It is not changed if it is in quotes.
        interpolated: whether `${` has the meaning it has in YAML files, instead of being part of the path.
    """
    if len(path) > 1 and path[0] == path[-1] and path[0] in ("'", '"'):
        return path
    path = os.path.expanduser(path)
    if not interpolated:
        path = re.sub(r"(\\*)\$\{", r"\1\1\\${", path)
    # Backslashes are doubled where Hydra takes them for an escape: before a quote, and at the end.
    path = re.sub(r"(\\*)'", r"\1\1\\'", path)
    return "'" + re.sub(r"(\\+)\Z", r"\1\1", path) + "'"


def unquoted(text: str) -> str:
    """A path without the quotes that were typed, or added by `quoted`."""
    if len(text) > 1 and text[0] == text[-1] and text[0] in ("'", '"'):
        text = re.sub(r"(\\+)\Z", lambda found: found[1][::2], text[1:-1])
        return re.sub(r"(\\+)'", lambda found: found[1][: len(found[1]) // 2] + "'", text)
    return text


class Failed(SystemExit):
    """The end of a command, whose `main` prints the message as one line.

    Args:
        message: what is wrong.
        status: the exit status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(status)
        self.message = message


def fail(message: str, status: int) -> NoReturn:
    """End the command with an error message of one line."""
    raise Failed(message, status)


def say(failed: Failed) -> None:
    """Print the message of a command that has failed."""
    prefix = "metarun: error: " if failed.code in (1, 2) else "metarun: "
    print(prefix + message_line(failed.message), file=sys.stderr)
