"""What is known about a dataset's tasks before any file is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from metarun.tasks.episodes import Episodes, EpisodeShape, Tasks
from metarun.tasks.objectives import CLASSIFICATION, Objective

Kind = Literal["images", "texts", "vectors"]  # of examples: pixels, token ids, or rows of numbers


@dataclass(frozen=True)
class PretrainedNetwork:
    """The Hugging Face encoder that token ids are for.

    Args:
        config: its config.json.
        width: the size of an output.
        padding: the token id that pads texts, of the encoder's own ids.
        first_token: whether the vector of a text is the output for its first token; False: the mean.
        source: the folder with its weights, which is only read at the start of a run.
    """

    config: str
    width: int
    padding: int
    first_token: bool
    source: str


@dataclass(frozen=True)
class TaskSpec:
    """The kind of tasks that a dataset has; networks and methods are built from it.

    Args:
        item_shape: the shape of one example, as a network takes it.
        objective: the loss and the metrics.
        outputs: how many numbers a network predicts for an example; None: one for each way.
        constants: how many further outputs are learned numbers that do not depend on the example, such as the
            logarithms of the standard deviations of a policy's actions.
        classes: the number of classes of the training split; None where that is not known yet, or there are
            no classes.
        item_dtype: the type of an example's numbers: floating point, or int64 for token ids.
        vocabulary: the number of different token ids, with that of padding; None where examples are not
            token ids.
        static: whether the data of a task is the same whatever the weights are. Only then can a step be
            traced, or captured as a CUDA graph.
        tasks: the class of a batch of tasks; methods say which one they need.
        description: the shape of the description that each class has apart from its examples
            (`Episodes.about`); None where that is not known yet, or there are none.
        pretrained: the encoder that token ids are for; None where there is none.
    """

    item_shape: tuple[int, ...]
    objective: Objective = CLASSIFICATION
    outputs: int | None = None
    constants: int = 0
    classes: int | None = None
    item_dtype: torch.dtype = torch.float32
    vocabulary: int | None = None
    static: bool = True
    tasks: type[Tasks] = Episodes
    description: tuple[int, ...] | None = None
    pretrained: PretrainedNetwork | None = None

    @property
    def kind(self) -> Kind:
        """What examples are, as a network sees them."""
        if not self.item_dtype.is_floating_point:
            return "texts"
        return "images" if len(self.item_shape) == 3 else "vectors"

    def task_name(self, shape: EpisodeShape) -> str:
        """The shape of a task for people, such as "5-way 1-shot"; without the one way of a regression."""
        return f"{shape.shots}-shot" if self.outputs is not None and shape.ways == 1 else str(shape)
