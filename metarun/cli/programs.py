"""`metarun.train`: the command `metarun train`, run by a program."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metarun.cli.explain import explain
from metarun.cli.main import execute
from metarun.cli.overrides import Failed
from metarun.errors import ConfigError, MetarunError
from metarun.training.interrupts import begin


@dataclass(frozen=True)
class Run:
    """A training run that has ended.

    Args:
        folder: the run folder, which `metarun.load` takes.
        score: the best validation score, which the command returns to Hydra's sweepers.
        result: what its `result.json` contains: the figures of the validation and of the test, the iterations
            and the seconds.
    """

    folder: Path
    score: float
    result: dict[str, Any]


def train(settings: Sequence[str] = ()) -> Run:
    """Train as `metarun train SETTINGS` does, with the same output, files and seeded results.

    Args:
        settings: what follows `metarun train`, one word each, such as
            `["algorithm=maml", "dataset=omniglot", "ways=5"]`.

    Returns:
        The run.

    Raises:
        MetarunError: for what the command reports as an error, in the same words.
        KeyboardInterrupt: the run was stopped, and has saved.
    """
    words = [str(word) for word in settings]
    if flags := [word for word in words if word.startswith("-")]:
        raise ConfigError(f"{flags[0]}: flags are for the command line; a sweep is a loop over metarun.train")
    with own_hydra():
        try:
            folder, score = execute("train", words, raw=True)
        except Failed as failed:
            raise ConfigError(failed.message) from None
        except MetarunError:
            raise
        except Exception as error:
            if (message := explain(error, "train", sys.argv[1:])) is None:
                raise
            raise ConfigError(message) from error
    return Run(folder, score, json.loads((folder / "result.json").read_text("utf-8")))


@contextmanager
def own_hydra() -> Iterator[None]:
    """A context for a command in a program, which has its own arguments, warnings and use of Hydra."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    kept = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    hydra, config = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    GlobalHydra.instance().clear()
    begin()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        sys.argv = kept[0]
        os.environ.pop("HYDRA_FULL_ERROR", None)
        if kept[1] is not None:
            os.environ["HYDRA_FULL_ERROR"] = kept[1]
        GlobalHydra.instance().hydra, HydraConfig.instance().cfg = hydra, config
