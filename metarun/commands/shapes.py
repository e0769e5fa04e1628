"""Checks that the splits of a dataset can have tasks of the shapes that a run needs."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Literal

from metarun.config.build import training_shape, validation_shape
from metarun.config.schema import TrainConfig
from metarun.datasets.base import Dataset
from metarun.errors import DataError
from metarun.tasks.episodes import EpisodeShape

# What else can be done if a split has too few classes or examples.
OTHERWISE = {"validation": "", "test": ", or set test.episodes=0 for no test"}


def training_split(settings: TrainConfig) -> Literal["train", "trainval"]:
    """The split that a run is trained on."""
    return "trainval" if settings.trainval else "train"


def check_before_loading(dataset: Dataset, settings: TrainConfig) -> None:
    """Raise DataError if the settings of the dataset tell that a split cannot have the tasks of the run."""
    if "_target_" not in (settings.train_tasks or {}):  # others may have more classes than there are labels
        dataset.check_shape(training_split(settings), training_shape(settings))
    for split in ("validation", "test") if settings.test.episodes else ("validation",):
        check_shape(partial(dataset.check_shape, split), split, settings)


def check_shape(check: Callable[[EpisodeShape], None], split: str, settings: TrainConfig) -> None:
    """Check a split for validation or test tasks; the error names the settings that their shape is set by.

    Args:
        check: raises DataError if the split cannot have tasks of a shape.
        split: "validation" or "test".
        settings: of the run.
    """
    try:
        check(validation_shape(settings))
    except DataError as error:
        text, otherwise = str(error), OTHERWISE[split]
        named = [name for name in ("ways", "shots", "queries") if re.search(rf"(?<!\S){name}\b", text)]
        for name in named:
            if getattr(settings.validation, name) is None:
                otherwise = f", or set validation.{name}{otherwise}"
            else:
                text = re.sub(rf"(?<!\S){name}\b", f"validation.{name}", text)
        raise DataError(text + otherwise) from None
