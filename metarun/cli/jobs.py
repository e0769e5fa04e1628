"""The jobs of a sweep: which are kept, continued or tried again, and which are refused.

Hydra composes the configs of all jobs before it starts the first, and ends the sweep if one of them cannot be
composed. `SweepLoader` makes such a job a config that its command refuses.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import hydra._internal.hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from metarun.cli.search import OPTUNA, trial_folder
from metarun.cli.shared import COMMAND, REFUSED, read_by_some, without_unread
from metarun.commands.sweeps import content_of_job
from metarun.config.changes import changes_the_end, differing, key_of, may_change
from metarun.config.comments import without_pairing
from metarun.config.unread import drop_leftovers, is_option
from metarun.errors import ConfigError
from metarun.training.records import NOT_FINISHED

SWEPT = re.compile(r"=.*(,|\b(choice|range|interval|tag|glob)\()")  # the values of a search
State = Literal["new", "stopped", "failed", "done"]


class SweepLoader(ConfigLoaderImpl):
    """Composes the configs of a sweep, which may have jobs that lack some of the settings.

    Attributes:
        shared: settings that some job of the sweep reads, so that others are composed without them.
    """

    shared: frozenset[str] = frozenset()

    def load_configuration(
        self,
        config_name: str | None,
        overrides: list[str],
        run_mode: RunMode,
        from_shell: bool = True,
        validate_sweep_overrides: bool = True,
    ) -> DictConfig:
        """Compose a config; that of a whole sweep without the settings, if the defaults lack some of them."""
        rest = (run_mode, from_shell, validate_sweep_overrides)
        try:
            config = super().load_configuration(config_name, overrides, *rest)
            drop_leftovers(config, config.hydra.overrides.task)
            name_classes(config)
            return config
        except Exception:
            if run_mode != RunMode.MULTIRUN:
                raise
            parsed = OverridesParser.create(config_loader=self).parse_overrides(overrides)
            of_jobs = [str(each.input_line) for each in parsed if not each.is_hydra_override()]
            if not of_jobs:
                raise
            of_hydra = [word for word in overrides if word not in of_jobs]
            config = super().load_configuration(config_name, of_hydra, *rest)
            config.hydra.overrides.task = of_jobs
            return config

    def load_sweep_config(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """Compose the config of a job. If that is not possible, it is the default config with the reason.

        The folder of the sweep is absolute in it: a process on another machine may be started in any folder.
        """
        _, config = self.without_unread(master_config, sweep_overrides)
        sweep: Any = OmegaConf.to_container(config.hydra.sweep)  # in which nothing is resolved yet
        config.hydra.sweep.dir = os.path.join(os.getcwd().replace("${", "\\${"), sweep["dir"])
        if config.hydra.sweeper["_target_"] == OPTUNA and sweep["subdir"] == "${hydra:job.num}":
            config.hydra.sweep.subdir = trial_folder(sweep_overrides)
        return config

    def share(self, master_config: DictConfig, jobs: Sequence[list[str]]) -> None:
        """Find out what jobs of a sweep may leave out; they are not known before a search."""
        if master_config.hydra.job.config_name != COMMAND:
            return
        if jobs:
            self.shared = read_by_some(jobs, lambda words: self.composed(master_config, words))
            return
        params = (
            f"{key}={value}" for key, value in (master_config.hydra.sweeper.get("params") or {}).items()
        )
        words = [*params, *master_config.hydra.overrides.task]
        if any(is_option(word) and SWEPT.search(word) for word in words):
            self.shared = frozenset(map(key_of, words))

    def without_unread(self, master_config: DictConfig, words: list[str]) -> tuple[list[str], DictConfig]:
        """The overrides of a job without those that other jobs are for, and its config with them."""
        try:
            return without_unread(words, self.shared, lambda kept: self.composed(master_config, kept))
        except Exception:  # of a setting that the job refuses
            return words, self.composed(master_config, words)

    def composed(self, master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        """The config of a job, as Hydra composes it or with the reason why that is not possible."""
        from metarun.cli.explain import explain

        try:
            return super().load_sweep_config(master_config, sweep_overrides)
        except Exception as error:
            message = explain(error, master_config.hydra.job.config_name, sweep_overrides)
            if message is None:
                raise
            config = super().load_sweep_config(master_config, [])
            with open_dict(config):
                config[REFUSED] = message
            config.hydra.overrides.task = sweep_overrides
            name_options(config, sweep_overrides)
            parsed = OverridesParser.create(config_loader=self).parse_overrides(sweep_overrides)
            look = config.hydra.job.config.override_dirname
            config.hydra.job.override_dirname = get_overrides_dirname(
                parsed, look.exclude_keys, look.item_sep, look.kv_sep
            )
            return config


def name_classes(config: DictConfig) -> None:
    """Note typed classes, `backbone._target_=my_package.Net`, as the choices of their groups."""
    choices = config.hydra.runtime.choices
    for word in config.hydra.overrides.task:
        group, _, name = key_of(word).rpartition(".")
        if name == "_target_" and group in choices:
            choices[group] = word.partition("=")[2]


def name_options(config: DictConfig, words: Sequence[str]) -> None:
    """Note the options of a job that cannot be composed, as far as its overrides tell them."""
    options = {key_of(word): word.partition("=")[2] for word in words if is_option(word)}
    with open_dict(config):
        if "recipe" in options:  # which has chosen others
            config.hydra.runtime.choices = {}
        config.hydra.runtime.choices.update(options)


@contextlib.contextmanager
def composing_jobs() -> Iterator[None]:
    """A context in which Hydra composes configs by `SweepLoader`; it has no setting for that.

    Hydra copies its only store whenever it looks at a group, more than a hundred times for a help text. It
    does so again after this context, because a program may use Hydra itself.
    """
    before, outer = hydra._internal.hydra.ConfigLoaderImpl, hasattr(ConfigStore, "__deepcopy__")
    hydra._internal.hydra.ConfigLoaderImpl = SweepLoader  # type: ignore[misc]
    ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]
    try:
        yield
    finally:
        hydra._internal.hydra.ConfigLoaderImpl = before  # type: ignore[misc]
        if not outer:  # a program may start a training inside another one
            del ConfigStore.__deepcopy__  # type: ignore[attr-defined]


def state_of(folder: Path, overrides: Sequence[str]) -> State:
    """What has become of a job so far.

    Args:
        folder: of the job.
        overrides: of the job. "new" is also one with other settings than that in the folder, such as more
            iterations.
    """
    content = content_of_job(folder)
    if str(content.get("error", "")).startswith(NOT_FINISHED):
        return "stopped"
    if "error" in content:
        return "failed"
    if not isinstance(content.get("overrides"), list):
        return "new"
    changed = differing(content["overrides"], without_pairing(overrides))
    trained = "validation" in content
    return "new" if any(not trained or changes_the_end(key) for key in changed) else "done"


def is_kept(state: State, retry: str) -> bool:
    """Whether a job in this state is left as it is; `retry` says what is done with failed ones."""
    return state == "done" or (state == "failed" and retry == "none")


def definition(overrides: Sequence[str], command: str) -> frozenset[str]:
    """The overrides of a job without those that may change when it goes on."""
    return frozenset(word for word in overrides if command != "train" or not may_change(key_of(word)))


def other_job(before: Sequence[str], now: Sequence[str], command: str) -> str:
    """A setting by which the job in a folder is another one; "" if it is the same, or goes on with more
    iterations, for example."""
    changed = differing(before, now)
    return next((key for key in changed if command != "train" or not may_change(key)), "")


def enter_folder(path: str) -> None:
    """Make the folder in which the sweep was started the current one, if this machine has it.

    Typed paths are relative to it, and a process of Ray starts in another one.
    """
    if os.path.isdir(path):
        os.chdir(path)


def check_composed(cfg: DictConfig) -> None:
    """Raise ConfigError if the config of a job could not be composed."""
    if REFUSED in cfg:
        raise ConfigError(cfg[REFUSED])


def value_of_job(folder: Path) -> float | None:
    """What the command of a job returned: the best validation score, or a first result; None if it failed."""
    content = content_of_job(folder)
    if "error" in content:
        return None
    return content["validation"]["mean"] if "validation" in content else content.get("result")
