"""Errors in one line: what, where, how to mend."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator

from metarun.errors import MetarunError, first_line


def explain(error: BaseException, command: str, arguments: list[str]) -> str | None:
    """One line for an error the user can mend; None for a fault of ours, which keeps its traceback."""
    for cause in causes(error):
        if isinstance(cause, MetarunError):
            return str(cause)
    for cause in causes(error):
        if isinstance(cause, OSError) and (message := explain_os(cause)):
            return message
    if found := re.search(r"Ambiguous value for argument '(\S+?)=(.*?)'", str(error)):
        key, value = found.groups()
        return f"{key}={value}: a list is typed {key}=[{value}], a sweep over the values needs -m"
    if type(error).__module__.startswith("yaml") or "yaml" in type(error.__cause__).__module__:
        return "a YAML file cannot be read: " + " ".join(str(error).split())
    if is_config_error(error):
        return explain_config(error, command, arguments)
    if "Config group override must be" in str(error):
        empty = [a.partition("=")[0] for a in arguments if a.endswith("=null")]
        return (
            f"{', '.join(empty)}=null: a group needs one of its options; metarun {command} --help lists them"
        )
    for cause in causes(error):
        if "out of memory" in str(cause).lower() or isinstance(cause, MemoryError):
            return "out of memory; lower hardware.tasks_at_once, meta_batch, ways or backbone.width"
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def explain_os(error: OSError) -> str | None:
    where = error.filename or "the output folder"
    match error.errno:
        case errno.ENOSPC | errno.EDQUOT:
            return f"{where}: the disk is full; make room, or choose another folder with hydra.run.dir=FOLDER"
        case errno.EACCES | errno.EPERM | errno.EROFS:
            return f"{where}: cannot be written; choose another folder with hydra.run.dir=FOLDER"
        case errno.ENOTDIR | errno.EEXIST:
            return (
                f"{where}: is in the way of a folder of that name; choose another with hydra.run.dir=FOLDER"
            )
    return None


def is_config_error(error: BaseException) -> bool:
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    return any(isinstance(cause, (HydraException, OmegaConfBaseException)) for cause in causes(error))


def explain_config(error: BaseException, command: str, arguments: list[str]) -> str:
    """Hydra's and OmegaConf's messages, many lines long, told in one."""
    causes_list = list(causes(error))
    texts = [str(cause) for cause in causes_list]
    whole = "\n".join(texts)
    if found := re.search(r"Could not find '([\w@:./-]+)'", whole):
        return explain_choice(found.group(1), whole)
    if found := re.search(r"Could not override '([^']+)'", whole):
        return explain_key(found.group(1), command, arguments)
    if found := re.search(r"Key '([^']+)' (?:is not in struct|not in '\w+')", whole):
        full = re.search(r"full_key: (\S+)", whole)
        return explain_key(full.group(1) if full else found.group(1), command, arguments)
    if found := re.search(r"full_key: (\S+)", texts[-1]):
        return f"{found.group(1)}: {first_line(causes_list[-1])}"
    if found := re.search(r"Error parsing override '(.*)'", whole):
        return (
            f"{found.group(1)}: not understood; quote a value with special characters, as in 'key=\"a (b)\"'"
        )
    return " ".join(texts[0].split())


def explain_choice(name: str, whole: str) -> str:
    """`group/option` that does not exist, with the closest that does."""
    from metarun.config.check import did_you_mean

    group, _, option = name.rpartition("/")
    options = re.findall(r"^\t(\S+)$", whole, re.MULTILINE)
    return f"{group}={option}: no such {group or 'config'}{did_you_mean(option, options)}"


def explain_key(key: str, command: str, arguments: list[str]) -> str:
    """A key that does not exist, with the closest one that does."""
    from metarun.config.check import did_you_mean

    parent, _, last = key.rpartition(".")
    known = known_keys(parent, command, arguments)
    if parent and not known and parent in known_keys("", command, arguments):  # such as scheduler: null
        return f"{key}: {parent} is null, so its settings are new and need a plus: +{key}=..."
    return (
        f"{key}: there is no such setting{did_you_mean(last, known)} (metarun {command} --cfg job shows all)"
    )


def known_keys(parent: str, command: str, arguments: list[str]) -> list[str]:
    """The settings under `parent` in the config that the chosen group options give."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    from metarun.config.paths import CONF

    groups = [a for a in arguments if (CONF / re.split("[=@]", a.lstrip("+"))[0]).is_dir()]
    GlobalHydra.instance().clear()
    with contextlib.suppress(Exception), initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(command, groups)
        node = OmegaConf.select(cfg, parent) if parent else cfg
        return [str(name) for name in node if name != "_target_"]
    return []
