"""`hydra/sweeper=optuna`: the defaults of a search, and a study that goes on where it was stopped.

The plugin (hydra-optuna-sweeper) keeps a study in memory by default, starts `n_trials` more
when it is started again, and forgets the trial that was running.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from typing import Any

from omegaconf import DictConfig

from metarun.cli.overrides import quoted
from metarun.errors import ConfigError

OPTUNA = "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
# What is set unless it is typed, or set by a config. `train` returns the best validation score.
DEFAULTS = {
    "direction": "maximize",
    "storage": "sqlite:///${hydra.sweep.dir}/study.db",
    "study_name": "metarun",
    "n_jobs": 1,
    "max_failure_rate": 1.0,  # a trial that fails does not end the search
}
AGAIN = "started again"  # an attribute of a trial that was stopped, and whose settings are tried again


def prepare_search(config: DictConfig) -> None:
    """Prepare the study of a search; nothing for other sweepers.

    Args:
        config: of the sweep. The number of trials becomes that of those which are left.
    """
    sweeper = config.hydra.sweeper
    if sweeper["_target_"] != OPTUNA:
        return
    import optuna
    import sqlalchemy
    from hydra_plugins.hydra_optuna_sweeper.config import OptunaSweeperConf

    if int(sqlalchemy.__version__.partition(".")[0]) > 1 and optuna.__version__.startswith("2."):
        raise ConfigError('hydra/sweeper=optuna: needs an older SQLAlchemy; pip install "metarun[search]"')
    plain = OptunaSweeperConf()
    typed = [override.partition("=")[0].lstrip("+") for override in config.hydra.overrides.hydra]
    for name, value in DEFAULTS.items():
        if f"hydra.sweeper.{name}" not in typed and sweeper[name] == getattr(plain, name):
            sweeper[name] = value
    direction = str(getattr(sweeper.direction, "name", sweeper.direction))
    config.hydra.overrides.hydra.append(f"hydra.sweeper.direction={direction}")  # jobs check it
    for name in ("storage", "study_name") if sweeper.storage else ():  # for stop.hopeless
        config.hydra.overrides.hydra.append(f"hydra.sweeper.{name}={quoted(str(sweeper[name]))}")
    if sweeper.storage:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            storage=sweeper.storage, study_name=sweeper.study_name, direction=direction, load_if_exists=True
        )
        if sweeper.sampler.get("seed") is not None:
            sweeper.sampler.seed += len(study.trials)  # or it would repeat the random trials of the start
        try_again(study)
        ended = sum(each.state.is_finished() and AGAIN not in each.user_attrs for each in study.trials)
        sweeper.n_trials = max(sweeper.n_trials - ended, 0)


def trial_folder(overrides: Iterable[str]) -> str:
    """The name of the folder of a trial: short, and the same for the same settings.

    Trials are numbered from 0 in each session, so their numbers cannot name folders. A trial that is tried
    again finds the run that was stopped.
    """
    return hashlib.sha256(" ".join(sorted(overrides)).encode()).hexdigest()[:8]


def try_again(study: Any) -> None:
    """Put the settings of trials that were stopped into the queue of the study."""
    from optuna.exceptions import ExperimentalWarning
    from optuna.trial import Trial, TrialState

    warnings.simplefilter("ignore", ExperimentalWarning)  # that the queue may change in a later Optuna
    for trial in study.trials:
        if trial.state == TrialState.RUNNING:
            Trial(study, trial._trial_id).set_user_attr(AGAIN, True)
            study.tell(trial.number, state=TrialState.FAIL)
            study.enqueue_trial(trial.params)
