"""The errors a person can mend: one line that says what, where and how; never a traceback."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator


class MetarunError(Exception):
    """Something the user can put right. `cli` prints it as one line and exits with status 1."""


class ConfigError(MetarunError):
    """A setting that cannot work."""


class DataError(MetarunError):
    """Data that is missing, damaged or too small for what was asked."""


class CheckpointError(MetarunError):
    """A checkpoint that is missing, damaged or from another version."""


class TrainingError(MetarunError):
    """Training that cannot go on, such as a loss that is not finite."""


@contextlib.contextmanager
def naming_part(part: str, settings: Iterable[str]) -> Iterator[None]:
    """Errors of one of several datasets name its `settings` as they are typed, dataset.settings.PART.x."""
    try:
        yield
    except (ConfigError, DataError) as error:
        names = "|".join(map(re.escape, settings))
        # Not within a path.
        text = re.sub(rf"(?<![\w./\\-])dataset\.(?=(?:{names})\b)", f"dataset.settings.{part}.", str(error))
        raise type(error)(text) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its name where it has none."""
    return str(error).strip().split("\n")[0] or type(error).__name__
