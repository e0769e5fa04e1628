"""What is known about a dataset's tasks before any file is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from metarun.tasks.episodes import Episodes, Tasks
from metarun.tasks.objectives import CLASSIFICATION, Objective


@dataclass(frozen=True)
class TaskSpec:
    """The kind of tasks that a dataset has; networks and methods are built from it.

    Args:
        item_shape: the shape of one example, as a network takes it.
        objective: the loss and the metrics.
        outputs: how many numbers a network predicts for an example; None: one for each way.
        classes: the number of classes of the training split; None where that is not known yet, or there are
            no classes.
        item_dtype: the type of an example's numbers: floating point, or int64 for token ids.
        static: whether the data of a task is the same whatever the weights are. Only then can a step be
            traced, or captured as a CUDA graph.
        tasks: the class of a batch of tasks; methods say which one they need.
    """

    item_shape: tuple[int, ...]
    objective: Objective = CLASSIFICATION
    outputs: int | None = None
    classes: int | None = None
    item_dtype: torch.dtype = torch.float32
    static: bool = True
    tasks: type[Tasks] = Episodes
