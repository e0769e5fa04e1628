"""User errors, printed as one line that says what is wrong, where, and how to fix it."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any


class MetarunError(Exception):
    """Base class of user errors. The command line prints the message as one line and exits with status 1."""


class ConfigError(MetarunError):
    """A setting is invalid, or does not fit the other settings."""


class DataError(MetarunError):
    """Data is missing, damaged, or too small for the requested tasks."""


class CheckpointError(MetarunError):
    """A checkpoint is missing, damaged, or written by an incompatible version."""


class TrainingError(MetarunError):
    """Training failed, for example because the loss is not finite."""


class RankLost(TrainingError):
    """Another process of the same run has failed or was killed."""


@contextlib.contextmanager
def naming_part(part: str, settings: Iterable[str]) -> Iterator[None]:
    """In errors of one dataset of a mixture, write `dataset.x` as it is typed, `dataset.settings.PART.x`.

    Args:
        part: the name of the dataset in the mixture.
        settings: the names of that dataset's settings.
    """
    try:
        yield
    except (ConfigError, DataError) as error:
        names = "|".join(map(re.escape, settings))
        # The lookbehind skips the same words inside a path.
        setting = re.compile(rf"(?<![\w./\\-])dataset\.(?=(?:{names})\b)")
        text = setting.sub(lambda found: f"dataset.settings.{part}.", str(error))
        raise type(error)(text) from error


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun: "1 class" or "2 classes". The plural is the noun with an s unless given."""
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


# What PyTorch (CPU, CUDA and its libraries), NumPy, the C++ library and the system say when memory runs out.
NO_MEMORY = re.compile(
    r"out of memory|not enough memory|insufficient (memory|resources)|memory allocation|mmap failed"
    r"|(can't|cannot|unable to|failed to|could not) (allocate|mmap|map segment)|bad_?\s?alloc|alloc_failed"
    r"|can't start new thread|storage size calculation overflowed|array is too big|multiplication overflow",
    re.IGNORECASE,
)


BOUNDED = ContextVar("BOUNDED", default=True)


@contextlib.contextmanager
def without_bounds() -> Iterator[None]:
    """A context in which `check_bound` accepts any number.

    For a checkpoint that was trained, perhaps with an earlier version that had fewer bounds.
    """
    before = BOUNDED.set(False)
    try:
        yield
    finally:
        BOUNDED.reset(before)


def check_bound(setting: str, values: Mapping[str, Any], fits: Callable[[Any], bool], must: str) -> None:
    """Raise ConfigError for the first value that is out of its bounds, naming that one alone.

    Args:
        setting: the group of the settings, such as "outer_loop".
        values: by the names of the settings.
        fits: whether a value is in its bounds.
        must: how it must be, in words.
    """
    for name, value in values.items():
        if BOUNDED.get() and not fits(value):
            raise ConfigError(f"{setting}.{name}={value}: must be {must}")


def check_least(setting: str, least: int, **values: float) -> None:
    """Raise ConfigError for the first value below `least`."""
    check_bound(setting, values, lambda value: value >= least, f"at least {least}")


def check_above_0(setting: str, **values: float) -> None:
    """Raise ConfigError for the first value that is not above 0."""
    check_bound(setting, values, lambda value: value > 0, "above 0")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device and in the wording of any library."""
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    if type(error).__name__ == "OutOfMemoryError":  # torch's own, which is not imported here
        return True
    return isinstance(error, MemoryError) or (
        not isinstance(error, MetarunError) and NO_MEMORY.search(str(error)) is not None
    )


CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")  # also marks that reorder text
LONGEST = 4000  # characters of a message


def printable(text: str, instead: str = "") -> str:
    """Text from outside, such as a file name, without codes that a terminal would obey.

    Args:
        text: the text.
        instead: what replaces each code; "" for its escape, such as `\\x1b`.
    """
    return CONTROLS.sub(lambda found: instead or found[0].encode("unicode_escape").decode(), text)


def message_line(text: str) -> str:
    """A message as one line that a terminal can show; the middle of a very long one is left out."""
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    return printable(text)


def listed(names: Sequence[str], most: int = 3) -> str:
    """Names for a title: all if there are a few, else the first one and how many more there are."""
    return ", ".join(names) if len(names) <= most else f"{names[0]} and {len(names) - 1} more"


def described(error: BaseException) -> str:
    """An error in one line: a user error by its message, another one also by its type."""
    kind = "" if isinstance(error, MetarunError) else f"{type(error).__name__}: "
    return f"{kind}{first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if the message is empty."""
    return str(error).strip().split("\n")[0] or type(error).__name__
