"""`stop.hopeless`: a trial of a search ends when its validations are worse than those of most others.

Optuna decides (`MedianPruner`). The plugin of Hydra tells a study the end of a trial only, so that the job
itself reports its validations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from metarun.config.comments import without_pairing

WARM_UP = 0.2  # the part of the iterations in which no trial is ended
TRIALS = 5  # trials that have ended before one is compared with them


class Hopeless:
    """Whether Optuna ends the trial of this job.

    Args:
        trial: of Optuna.
    """

    def __init__(self, trial: Any) -> None:
        self.trial = trial
        self.reported = -1  # the last iteration that Optuna knows

    def __call__(self, metric: str, rows: Iterable[Mapping[str, Any]]) -> bool:
        """Report the scores of new validations; whether the trial is to end."""
        for row in rows:
            if row["split"] == "validation" and row["iteration"] > self.reported:
                self.reported = row["iteration"]
                self.trial.report(row[metric], self.reported)
        return bool(self.trial.should_prune())


def is_search() -> bool:
    """Whether this run is a trial of a study that can be asked."""
    return HydraConfig.get().mode == RunMode.MULTIRUN and setting("storage") is not None


def setting(name: str) -> Any:
    """A setting of the sweeper, None if it has no such one."""
    return OmegaConf.select(HydraConfig.get(), f"sweeper.{name}")  # type: ignore[arg-type]


def hopeless(iterations: int) -> Hopeless | None:
    """The rule of this run; None if its trial is not in the study, as in a run that is resumed by hand."""
    if not is_search():
        return None
    import optuna

    pruner = optuna.pruners.MedianPruner(TRIALS, n_warmup_steps=max(1, round(WARM_UP * iterations)))
    study = optuna.load_study(study_name=setting("study_name"), storage=setting("storage"), pruner=pruner)
    trial = trial_of(study.get_trials(deepcopy=False), HydraConfig.get().overrides.task)
    return None if trial is None else Hopeless(optuna.trial.Trial(study, trial._trial_id))


def trial_of(trials: Sequence[Any], overrides: Iterable[str]) -> Any:
    """The running trial that has chosen the settings of a job; None if there is none."""
    typed = {*without_pairing(overrides)}
    for trial in trials:
        chosen = {f"{key}={value}" for key, value in trial.params.items()}
        if trial.state.name == "RUNNING" and chosen <= typed:
            return trial
    return None
