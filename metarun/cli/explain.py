"""Converts errors to messages of one line: what is wrong, where, and how to fix it."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import cache
from typing import Any, get_type_hints

from metarun.config.paths import CONF
from metarun.errors import MetarunError, first_line, is_out_of_memory


def explain(error: BaseException, command: str, arguments: list[str]) -> str | None:
    """The message of a user error.

    Args:
        error: the error.
        command: the name of the command.
        arguments: the arguments that Hydra received.

    Returns:
        One line; None for an internal error, which keeps its traceback.
    """
    for cause in causes(error):
        if isinstance(cause, MetarunError):
            return str(cause)
    if any(map(is_out_of_memory, causes(error))):
        return "out of memory; lower hardware.tasks_at_once, meta_batch, ways or backbone.width"
    for cause in causes(error):
        if isinstance(cause, OSError) and (message := explain_os(cause)):
            return message
    if found := re.search(r"Ambiguous value for argument '(\S+?)=(.*?)'", str(error)):
        key, value = found.groups()
        if takes_one(key, command):
            return f"{key}={value}: takes one value; for a sweep over several add -m"
        return f"{key}={value}: type a list as {key}=[{value}]; for a sweep over the values add -m"
    if type(error).__module__.startswith("yaml") or "yaml" in type(error.__cause__).__module__:
        return "invalid YAML: " + " ".join(str(error).split())
    if is_config_error(error):
        return explain_config(error, command, arguments)
    if found := re.search(r"provider=hydra.searchpath .*path=(.*) is not available", str(error)):
        return f"hydra.searchpath: {found[1]} is not a folder of config files"
    if "Unexpected type for root" in str(error):  # OmegaConf's assertion about `+a.b=1` if a is null
        added = [argument for argument in reversed(arguments) if re.match(r"\+[^=]*\.", argument)]
        return f"{added[0]}: it is not part of a group of settings; leave it out"
    if str(error) in ("Record does not exist.", "No trials are completed yet."):  # of Optuna
        return "no trial of the search has succeeded; the table shows why"
    if "Config group override must be" in str(error):
        words = [a for a in arguments if NO_OPTION.search(a) and (CONF / a.partition("=")[0]).is_dir()]
        return f"{', '.join(words)}: a group needs one of its options; metarun {command} --help lists them"
    return None


# A value that is no text, which an option of a group must be.
NO_OPTION = re.compile(r"=(null|true|false|[-+.\d]+)$", re.IGNORECASE)


def takes_one(key: str, command: str) -> bool:
    """Whether a setting of a command is one number or text, and never a list."""
    from metarun.config.schema import FRAMES

    *groups, name = key.split(".")
    frame = FRAMES[command]
    for group in groups:
        frame = get_type_hints(frame).get(group)
        if not is_dataclass(frame):
            return False
    hint = str(get_type_hints(frame).get(name))
    return bool(re.match(r"<class '(int|float|str|bool)'>|(int|str|bool) \|", hint))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and its chain of causes, as a traceback shows them."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def explain_os(error: OSError) -> str | None:
    """The message for a full disk or a path that cannot be used; None for other errors."""
    where = error.filename or "the output folder"
    if isinstance(where, (str, bytes)) and os.path.islink(where) and not os.path.exists(where):
        return f"{os.fsdecode(where)}: is a link that leads nowhere; remove it or name another path"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"{where}: the disk is full; make room, or choose another folder with hydra.run.dir=FOLDER"
        case errno.EACCES | errno.EPERM if error.filename and cannot_read(error.filename):
            return f"{where}: no permission to read; make it readable, or name another path"
        case errno.EISDIR:
            return f"{where}: is a folder, not a file; name another path"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"{where}: no permission to write; choose another folder with hydra.run.dir=FOLDER"
        case errno.ENOTDIR | errno.EEXIST:
            return f"{where}: is a file, not a folder; choose another folder with hydra.run.dir=FOLDER"
        case errno.ENAMETOOLONG:
            return f"{where}: the name is too long; choose a shorter one"
        case errno.ELOOP:
            return f"{where}: its links lead in a circle; name another path"
        case errno.ENOENT if error.filename:
            return f"{where}: no such file or folder, or its parent cannot have one; name another path"
    return None


def cannot_read(path: str | bytes) -> bool:
    """Whether a path exists but may not be read, or is in a folder that may not be looked into."""
    if os.path.lexists(path):
        return not os.access(path, os.R_OK)
    parent = os.path.dirname(os.path.abspath(path))
    return os.path.isdir(parent) and not os.access(parent, os.X_OK)


def is_config_error(error: BaseException) -> bool:
    """Whether Hydra or OmegaConf raised the error."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return any(isinstance(cause, (HydraException, OmegaConfBaseException)) for cause in causes(error))


def explain_config(error: BaseException, command: str, arguments: list[str]) -> str:
    """Convert the messages of Hydra and OmegaConf, which have many lines, to one line."""
    from hydra.errors import OverrideParseException

    causes_list = list(causes(error))
    texts = [str(cause) for cause in causes_list]
    whole = "\n".join(texts)
    if found := re.search(r"Could not (?:find|load) '([\w@:./-]+)'", whole):
        return explain_choice(found.group(1), whole)
    if found := re.search(r"Could not override '([^']+)'", whole):
        return explain_key(found.group(1), command, arguments)
    if found := re.search(r"Key '([^']+)' (?:is not in struct|not in '\w+')", whole):
        full = re.search(r"full_key: (\S+)", whole)
        return explain_key(full.group(1) if full else found.group(1), command, arguments)
    references = [argument for argument in reversed(arguments) if "${" in argument]
    if "nterpolation" in whole and references:
        return f"{references[0]}: {first_line(causes_list[0])}; check what is between ${{ and }}"
    if found := re.search(r"full_key: (\S+)", texts[-1]):
        return explain_value(found.group(1), first_line(causes_list[-1]), command, arguments)
    for cause in causes_list:
        if isinstance(cause, OverrideParseException):
            return explain_grammar(cause.override)
    for pattern, message in OF_HYDRA.items():
        if found := re.search(pattern, whole):
            return found.expand(message)
    return " ".join(texts[0].split())


# What Hydra says about overrides that it understands but cannot apply, and what we say instead.
OF_HYDRA = {
    r"Multiple values for ([\w/]+)\.": r"+\1: this group has an option already; leave the plus out",
    r"An item is already at '([^']+)'": r"+\1: is set already; leave the plus out",
    r"Could not delete (?:from config\. )?'([^']+)'": r"~\1: there is no such setting to delete",
    r"The value of '(\S+)' is (.+) and not (.+)\.": r"~\1=\3: its value is \2",
    r"force-add of config groups is not supported: '\++([^']+)'": r"++\1: leave the plus signs out",
    r"Override (\S+) looks like .* but config group '(\S+)'": r"\1: there is no group \2",
    r"Cannot find primary config '(\S+)'": r"-cn \1: there is no such config; leave -cn out",
    r"Sweeping over Hydra's configuration .* '\+*(.*)'": r"\1: cannot be swept; name one value",
    r"BasicSweeper does not support sweep type": "a sweep lists its values, as in seed=0,1,2; for a search "
    "in intervals add hydra/sweeper=optuna",
    r"Sweep parameters '(.+)' requires --multirun": r"\1: has several values; for a sweep over them add -m",
    r"You must specify '(\S+)'": r"\1 is not set; add \1=OPTION to the command line",
}


def explain_grammar(override: str) -> str:
    """The message for an override that Hydra's grammar does not contain."""
    key, _, value = override.partition("=")
    if not re.fullmatch(r"[~+]*[\w./@$-]+", key):
        return f"{override}: {key!r} is not the name of a setting; type key=value"
    count = value.count
    unpaired = any(count(left) != count(right) for left, right in (("(", ")"), ("[", "]"), ("{", "}")))
    if unpaired or count("'") % 2 or count('"') % 2:
        return f"{override}: not understood; a bracket or a quote is not closed"
    return f"{override}: not understood; quote a value with special characters, as in 'key=\"a (b)\"'"


# What OmegaConf's messages say, and how a value must be.
EXPECTED = {
    "could not be converted to Integer": "must be a whole number",
    "could not be converted to Float": "must be a number",
    "is not a valid bool": "must be true or false",
    "is not a ListConfig": "must be a list, as in {key}=[{value}]",
    "Cannot merge DictConfig with ListConfig": "must be a list, as in {key}=[a,b]",
    "does not support deletion": "must not be deleted; set another value instead",
    "is not Optional": "must have a value; leave it out for the default",
    "NoneType is not a subclass": "must not be null",
    "Incompatible value 'None'": "must not be null",
    "Cannot convert": "must be text",
}


def explain_value(key: str, message: str, command: str, arguments: list[str]) -> str:
    """The message for a value of the wrong type.

    Args:
        key: the setting.
        message: the first line of OmegaConf's message.
        command, arguments: see `explain`.
    """
    pairs = [argument.lstrip("+").partition("=") for argument in reversed(arguments)]
    values = [value.strip("'\"") for name, _, value in pairs if name == key]  # the last one first
    value = next((each for each in values if f"'{each}'" in message), next(iter(values), None))
    where = key if value is None else f"{key}={value}"
    for text, expected in EXPECTED.items():
        if text in message:
            return f"{where}: {expected.format(key=key, value=value)}"
    if "Invalid type assigned" in message:
        settings = known_keys(key, setting_names(command, [])) or ["NAME"]
        hint = "; to continue a run set resume=RUN, to start from its backbone init=RUN"
        hint = hint if (command, key) == ("train", "checkpoint") else ""
        return f"{where}: is a group of settings; set one of them, as in {key}.{settings[0]}=VALUE{hint}"
    return f"{where}: {message}"


# Options of Hydra that are packages of their own, and the extra that installs them.
PLUGINS = {
    "hydra/launcher=joblib": "launchers",
    "hydra/launcher=submitit": "launchers",
    "hydra/launcher=ray": "ray",
    "hydra/sweeper=optuna": "search",
    "hydra/sweeper/sampler": "search",
}


def explain_choice(name: str, whole: str) -> str:
    """The message for an option of a group, `group/option`, that does not exist."""
    from metarun.config.hints import did_you_mean

    group, _, option = name.rpartition("/")
    options = list(dict.fromkeys(re.findall(r"^\t(\S+)$", whole, re.MULTILINE)))  # one may be found twice
    options = options or sorted(path.stem for path in (CONF / group).glob("*.yaml"))
    options += [plugin.partition("=")[2] for plugin in PLUGINS if plugin.startswith(f"{group}=")]
    for plugin, extra in PLUGINS.items():
        if f"{group}={option}".startswith(plugin):
            return f'{group}={option}: is not installed; pip install "metarun[{extra}]"'
    return f"{group}={option}: no such {group or 'config'}{did_you_mean(option, options)}"


def explain_key(key: str, command: str, arguments: list[str]) -> str:
    """The message for a setting that does not exist, with the one that is probably meant."""
    from metarun.config.check import CLASSES_OF_TORCH
    from metarun.config.hints import did_you_mean
    from metarun.config.schema import FRAMES

    parent, _, last = key.rpartition(".")
    names = setting_names(command, arguments)
    known = known_keys(parent, names)
    if parent and not known and parent in names:
        if (CONF / parent).is_dir():
            return f"{key}: no option of {parent} is chosen, so it has no settings; leave it out"
        return f"{key}: {parent} is null, so its settings are new and need a plus: +{key}=VALUE"
    everything = f" (metarun {command} --cfg job shows all)"
    if same := [name for name in names if name.rpartition(".")[2] == last]:
        return f"{key}: there is no such setting; did you mean {quoted_names(same, key)}?{everything}"
    if parent and known and (chosen := [a for a in arguments if a.startswith(f"{parent}=")]):
        return f"{key}: {chosen[-1]} has no setting {last!r}{did_you_mean(last, known)}"
    others = {other: default_names(other) for other in FRAMES if other != command}
    if meant := OTHER_NAMES.get((command, parent.partition(".")[0] or last)):
        value = next((a.partition("=")[2] for a in arguments if a.partition("=")[0] == key), "NAME")
        return f"{key}: is called {meant} in metarun {command}; type {meant}={value}"
    of = [f"metarun {other}" for other, own in others.items() if key in own]
    hint = did_you_mean(last, known or known_keys("", names))
    if parent in CLASSES_OF_TORCH and "did you mean" not in hint:
        return f"{key}: is not set so far; a further argument of its class needs a plus: +{key}=VALUE"
    if not of and "did you mean" not in hint:  # such as a setting of an option that is not the default
        of = [f"metarun {o}" for o, own in others.items() if parent and parent.partition(".")[0] in own]
    if of:
        where = " and ".join([", ".join(of[:-1]), of[-1]] if of[1:] else of)
        return f"{key}: is a setting of {where}, not of metarun {command}; leave it out"
    return f"{key}: there is no such setting{hint}{everything}"


# Settings of other commands that have another name in a command.
OTHER_NAMES = {
    ("runs", "dataset"): "data",
    ("runs", "algorithm"): "method",
    ("runs", "runs"): "folder",
    ("report", "folder"): "runs",
    ("report", "checkpoint"): "runs",
    ("predict", "checkpoint"): "adapted",
}


def quoted_names(names: list[str], key: str) -> str:
    """The names that are closest to a key, at most three; only the first if it is very close."""
    near = {name: difflib.SequenceMatcher(None, name, key).ratio() for name in names}
    best = sorted(names, key=near.__getitem__, reverse=True)[:3]
    return repr(best[0]) if near[best[0]] > 0.85 else " or ".join(map(repr, best))


def known_keys(parent: str, names: list[str]) -> list[str]:
    """The names of the settings under `parent` ("": at the top)."""
    return [name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == parent]


@cache
def default_names(command: str) -> list[str]:
    """The dotted names of all settings of a command with its default options."""
    return setting_names(command, [])


def setting_names(command: str, arguments: list[str]) -> list[str]:
    """The dotted names of all settings of a command, with the group options in `arguments`."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    groups = [a for a in arguments if (CONF / re.split("[=@]", a.lstrip("+"))[0]).is_dir()]
    hydra = GlobalHydra.instance().hydra  # of a sweep, which goes on
    GlobalHydra.instance().clear()
    try:
        with contextlib.suppress(Exception), initialize_config_dir(str(CONF), version_base="1.3"):
            return list(dotted(OmegaConf.to_container(compose(command, groups))))
        return []
    finally:
        GlobalHydra.instance().hydra = hydra


def dotted(node: Any, prefix: str = "") -> Iterator[str]:
    """The dotted names in nested dicts, without those of classes."""
    for name, value in node.items() if isinstance(node, dict) else []:
        if name != "_target_":
            yield f"{prefix}{name}"
            yield from dotted(value, f"{prefix}{name}.")
