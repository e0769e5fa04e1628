"""Runs that go on: which settings may change, and what `resume=auto` finds in the folder of a run."""

from __future__ import annotations

import shlex
import typing
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from metarun.algorithms.base import Algorithm
from metarun.config.changes import RESUMABLE, differing, key_of, may_change
from metarun.config.restore import config_of
from metarun.config.schema import TrainConfig
from metarun.config.targets import trust_words, trusted_modules
from metarun.errors import ConfigError
from metarun.reporting.console import inform, relative
from metarun.storage.files import write_text
from metarun.storage.locks import lock_path, locked
from metarun.training import checkpoint
from metarun.training.records import content_of
from metarun.training.trainer import Trainer

AUTO = "auto"  # of `resume`: go on if the output folder has a run, else start one


@contextmanager
def alone_in(folder: Path, command: str = "train") -> Iterator[None]:
    """A context that locks the folder of a command: two processes would overwrite each other's checkpoints.

    Raises:
        ConfigError: if another process trains in the folder.
    """
    place = folder / "run"
    with locked(place) as alone:
        if not alone:
            raise ConfigError(
                f"{folder}: another metarun {command} is running in this folder; wait for it to end, or "
                "choose another hydra.run.dir"
            )
        try:
            yield
        finally:
            # No process waits for this lock, so the file can be deleted. Windows does not delete open files;
            # there it is deleted when the lock is released.
            with suppress(OSError):
                lock_path(place).unlink(missing_ok=True)


def write_hydra_files(cfg: DictConfig, folder: Path) -> None:
    """Write the config files that Hydra usually writes to .hydra, now that the folder is locked."""
    overrides = HydraConfig.get().overrides.task
    for name, node in {"config": cfg, "overrides": overrides, "hydra": HydraConfig.instance().cfg}.items():
        write_text(folder / ".hydra" / f"{name}.yaml", OmegaConf.to_yaml(node))


def read_start(settings: TrainConfig) -> tuple[Path, dict[str, Any]] | None:
    """The path and content of the checkpoint `init`, if any; read first, so that errors appear early."""
    if settings.init is None:
        return None
    path = checkpoint.find(settings.init, "init")
    return path, checkpoint.load(path)


def say_how(trainer: Trainer, what: str) -> None:
    """Say how to go on with a run that has stopped; `what`: that it has, and saved."""
    if trainer.saved_at is None:
        inform(f"{what.partition('stopped')[0]}stopped before the first checkpoint; nothing was saved")
        return
    words = [f"resume={relative(trainer.folder)}", *trust_words(trainer.record["config"])]
    inform(f"{what} at iteration {trainer.saved_at}; continue with")
    inform(f"  {trainer.ranks.program} train {shlex.join(words)}")


def found_in(folder: Path) -> Path | None:
    """The checkpoint from which `resume=auto` goes on in a locked folder; None if a run starts there.

    A process that was killed early leaves at most the validated start, which a new run makes again.
    """
    if (path := folder / "last.pt").is_file():
        return path
    (folder / "best.pt").unlink(missing_ok=True)
    return None


def is_automatic(cfg: DictConfig) -> bool:
    """Whether a run goes on if its folder has one: with `resume=auto`, and in a sweep without `resume`."""
    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    return cfg.resume == AUTO or (sweep and cfg.resume is None)


def is_resume(override: str) -> bool:
    """Whether an override sets `resume`."""
    return override.partition("=")[0].lstrip("+") == "resume"


def check_same(folder: Path, before: Iterable[str], now: Iterable[str]) -> None:
    """Raise ConfigError if settings that define a run are not typed as they were when it was started."""
    changed = {key: values for key, values in differing(before, now).items() if not may_change(key)}
    for key, (then, typed) in changed.items():
        was = f"without {key}={typed}" if then is None else f"with {key}={then}"
        raise ConfigError(
            f"{relative(folder)}: the run in this folder was started {was}; type the same settings, or "
            "choose another folder"
        )


def ended(folder: Path, state: dict[str, Any], cfg: DictConfig) -> float | None:
    """The best validation score of a run that has nothing left to do; None if it has.

    Args:
        folder: the run folder.
        state: the content of its last.pt.
        cfg: the config with which it would go on.
    """
    result = content_of(folder / "result.json")
    before, now = state["config"], typing.cast(dict, OmegaConf.to_container(cfg, resolve=True))
    for config in (before, now):
        config.get("stop", {}).pop("minutes", None)  # which does not say what a complete run is
    if not result or any(now[key] != before.get(key) for key in ("iterations", "test", "stop")):
        return None
    inform(f"{relative(folder)}: this run has ended already")
    return float(result["validation"]["mean"])


def resumed_config(
    path: Path, state: dict[str, Any], now: DictConfig, overrides: list[str], automatic: bool
) -> DictConfig:
    """The config of a resumed run, with the typed settings that may change.

    Args:
        path: of the checkpoint.
        state: the content of the checkpoint.
        now: the config composed from the command line.
        overrides: the typed settings.
        automatic: whether all settings of the run are typed again, see `is_automatic`.

    Raises:
        ConfigError: if a setting must not change.
    """
    cfg = config_of(state, path, trusted_modules(now))
    if automatic:
        check_same(path.parent, state["overrides"], overrides)
        overrides = [each for each in overrides if may_change(key_of(each))]
    change(cfg, now, overrides)
    if cfg.iterations < state["iteration"]:
        raise ConfigError(
            f"iterations={cfg.iterations}: the run has already done {state['iteration']}; choose more"
        )
    if cfg.scheduler and cfg.iterations != state["config"]["iterations"]:
        raise ConfigError(
            f"iterations={cfg.iterations}: the learning rate schedule of this run is for "
            f"{state['config']['iterations']} iterations; start a new run"
        )
    say_what_stays(cfg, state["config"]["iterations"])
    cfg.resume = cfg.trust = None
    return cfg


def say_what_stays(cfg: DictConfig, before: int) -> None:
    """Say which settings of the method are still those of a run of `before` iterations, if it gets others."""
    algorithm: type[Algorithm] = get_class(cfg.algorithm._target_)
    for name in algorithm.of_all_iterations if cfg.iterations != before else ():
        if cfg.algorithm.get(name) == before:
            inform(
                f"iterations={cfg.iterations}: algorithm.{name} stays {before}, so that the weights will "
                f"differ from those of a new run of {cfg.iterations} iterations"
            )


def change(cfg: DictConfig, now: DictConfig, overrides: Iterable[str]) -> None:
    """Give the config of what is resumed the typed values. Raises ConfigError for one that must not change.

    Args:
        cfg: the config of a checkpoint, which is changed.
        now: the config composed from the command line.
        overrides: the typed settings.
    """
    for override in overrides:
        key = key_of(override)
        if not may_change(key):
            may = [name for name in RESUMABLE if name.partition(".")[0] in cfg]
            raise ConfigError(
                f"{override.lstrip('+')}: a resumed run keeps its settings; only {', '.join(may)} may change"
            )
        OmegaConf.update(cfg, key, OmegaConf.select(now, key), force_add=True)
