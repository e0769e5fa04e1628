"""What ends training before its last iteration, and in which direction a search goes."""

from __future__ import annotations

from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from hydra.utils import get_class
from omegaconf import OmegaConf

from metarun.commands.pruning import hopeless, is_search
from metarun.config.schema import TrainConfig
from metarun.errors import ConfigError
from metarun.tasks.objectives import Metric
from metarun.training.stopping import EarlyStopping
from metarun.training.trainer import needs_score


def early_stopping(settings: TrainConfig) -> EarlyStopping:
    """When training ends before its last iteration."""
    stop = settings.stop
    return EarlyStopping(stop.patience, stop.at, hopeless(settings.iterations) if stop.hopeless else None)


def check_ending(settings: TrainConfig, metric: Metric) -> None:
    """Check what depends on the main metric before data is loaded.

    Raises:
        ConfigError: if it cannot have the score of `stop.at`, or a search goes in its wrong direction; or if
            the classes of the validation are trained on, and something depends on its score.
    """
    check_trainval(settings)
    EarlyStopping(settings.stop.patience, settings.stop.at).check(metric)
    typed = any(word.startswith("stop.hopeless=") for word in HydraConfig.get().overrides.task)
    if settings.stop.hopeless and typed and not is_search():
        raise ConfigError(
            "stop.hopeless=true: only a search compares its runs; add -m hydra/sweeper=optuna, or leave it "
            "out"
        )
    hydra, direction = HydraConfig.get(), direction_of_search()
    name = str(getattr(direction, "name", direction))
    wanted, better = ("maximize", "higher") if metric.higher_is_better else ("minimize", "lower")
    if hydra.mode == RunMode.MULTIRUN and name in {"maximize", "minimize"} - {wanted}:
        raise ConfigError(
            f"hydra.sweeper.direction={name}: {metric.name} is better if {better}; set "
            f"hydra.sweeper.direction={wanted}, and another folder"
        )


def check_trainval(settings: TrainConfig) -> None:
    """Raise ConfigError if a score of validation classes that are trained on would decide something."""
    if not settings.trainval:
        return
    scheduler = settings.scheduler and needs_score(get_class(settings.scheduler["_target_"]))
    search = HydraConfig.get().mode == RunMode.MULTIRUN and direction_of_search() is not None
    for name, decides, otherwise in (
        ("stop.patience", settings.stop.patience is not None, "stop.patience=null"),
        ("stop.at", settings.stop.at is not None, "stop.at=null"),
        ("this scheduler", scheduler, "scheduler=null"),
        ("a search", search, "hydra/sweeper=basic"),
    ):
        if decides:
            raise ConfigError(
                f"trainval=true: {name} needs the score of validation classes that are not trained on; set "
                f"{otherwise} or trainval=false"
            )


def direction_of_search() -> Any:
    """The direction of a sweeper whose jobs depend on the scores of others; None for one without."""
    return OmegaConf.select(HydraConfig.get(), "sweeper.direction")  # type: ignore[arg-type]
