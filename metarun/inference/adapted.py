"""A model that was adapted to a task: its predictions, and the file that keeps it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from metarun.algorithms.base import Adapted
from metarun.datasets.preparation import Preparation
from metarun.errors import CheckpointError, ConfigError, DataError, TrainingError, first_line
from metarun.inference import examples as inputs
from metarun.inference.images import Ink
from metarun.inference.model import Model, restore
from metarun.reporting.console import silent
from metarun.storage.files import user_path
from metarun.tasks.episodes import Episodes
from metarun.training import checkpoint
from metarun.training.hardware import Hardware

AT_ONCE = 512  # examples predicted in one pass, unless they depend on each other


class Prediction(NamedTuple):
    """What was predicted of one example.

    Args:
        label: its class, None where that was rejected; of a regression, its value, or a list of several.
        probability: of the class; NaN of a regression.
    """

    label: Any
    probability: float


@dataclass(frozen=True)
class Predictions(Sequence[Prediction]):
    """What was predicted of some examples: a sequence of `Prediction`.

    Args:
        classes: the classes that the model was adapted to.
        probabilities: of each class, float32 [B, N]; each row sums to 1. Of a regression, [B, 0].
        reject: see `AdaptedModel.predict`.
        values: of a regression, the predicted values in the units of the data, float64 [B], or [B, V] if an
            example has several; None of classes.
    """

    classes: Sequence[Any]
    probabilities: np.ndarray
    reject: float | None = None
    values: np.ndarray | None = None

    @property
    def labels(self) -> list[Any]:
        """The most probable class of each example, None if less probable than `reject`; or its value."""
        return [prediction.label for prediction in self]

    def __len__(self) -> int:
        return len(self.probabilities)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if self.values is not None:
            return Prediction(self.values[index].tolist(), math.nan)
        row = self.probabilities[index]
        best = int(row.argmax())
        rejected = is_rejected(float(row[best]), self.reject)
        return Prediction(None if rejected else self.classes[best], float(row[best]))

    def __iter__(self) -> Iterator[Prediction]:
        return (self[i] for i in range(len(self)))


@dataclass
class AdaptedModel:
    """A model that was adapted to a task, which predicts new examples.

    `Model.adapt` and `metarun.load_adapted` return it, and `metarun adapt` saves it.

    Args:
        model: the model.
        classes: the classes, in the order of the outputs; empty for a regression.
        state: the task-specific state that the algorithm made of the support.
        support_x: the support examples [1, S, *item] that each query is predicted beside, if the network
            normalises by statistics of the batch or of the support.
        ink: of drawings, as for `Model.adapt`.
        preparation: how the images of the support were prepared; None for other examples.
    """

    model: Model
    classes: Sequence[Any]
    state: Adapted
    support_x: Tensor
    ink: Ink = "auto"
    preparation: Preparation | None = None

    def __repr__(self) -> str:
        names = ", ".join(map(str, self.classes))
        names = names or ("an environment" if self.model.is_policy else "a regression")
        return f"<{self.model.name} model adapted to {names}>"

    def predict(self, examples: Sequence[Any], *, reject: float | None = None) -> Predictions:
        """Predict the classes of examples, or their values if the model was trained on a regression.

        Args:
            examples: as for `Model.adapt`.
            reject: the probability, from 0 to 1, that the most probable class must reach; an example without
                such a class is predicted as None, since it may belong to none of the classes.

        Raises:
            MetarunError: examples cannot be read, or do not fit the model; `reject` of a regression.
            TrainingError: the predictions are not finite.
        """
        self.model.refuse_policy("predict")
        check_reject(reject, predicts_values=not self.classes)
        outputs = self.outputs(torch.from_numpy(self.inputs(examples)).unsqueeze(0))[0]
        if not self.classes:
            values = self.model.objective(None).to_units(outputs).double().cpu().numpy()
            nothing = np.empty((len(values), 0), np.float32)
            return Predictions([], nothing, values=values[:, 0] if values.shape[1] == 1 else values)
        probabilities = outputs.softmax(-1)
        return Predictions(list(self.classes), probabilities.float().cpu().numpy(), reject)

    def inputs(self, examples: Sequence[Any]) -> np.ndarray:
        """Examples as the inputs of the network, [B, *item], which an exported model takes.

        Args:
            examples: as for `predict`.
        """
        with silent():
            return inputs.query_of(self.model, examples, self.ink, self.preparation)[0].numpy()

    def outputs(self, x: Tensor) -> Tensor:
        """Logits [1, B, N], or values [1, B, V], of prepared examples [1, B, *item].

        Raises:
            TrainingError: they are not finite.
        """
        model = self.model
        predict = predictor(model, self.state, self.support_x)
        together = x.shape[1] if model.algorithm.uses_query_statistics else AT_ONCE
        with model.computing():
            parts = [predict(placed(model, part)) for part in x.split(together, 1)]
        outputs = torch.cat(parts, 1)
        check_finite(outputs, model)
        return outputs

    def save(self, path: str | Path) -> None:
        """Write the adapted model to a file, which `metarun.load_adapted` and `metarun predict` read."""
        model = self.model
        support = self.support_x if model.algorithm.predicts_beside_support else self.support_x[:, :0]
        kept = ("config", "choices", "algorithm", "files")
        copied = {key: model.content[key] for key in kept if key in model.content}
        checkpoint.save(
            user_path(str(path)),
            copied
            | {
                "adapted": checkpoint.to_cpu(self.state),
                "classes": [plain(each) for each in self.classes],
                "trained_classes": model.content["classes"],
                "description": model.content.get("description"),
                "transductive": model.algorithm.transductive,
                "support": support.cpu(),
                "ink": self.ink,
                "preparation": asdict(self.preparation) if self.preparation else None,
            },
            kind="adapted",
        )


def load_adapted(path: str | Path, *, device: str = "auto", trust: Collection[str] = ()) -> AdaptedModel:
    """Load an adapted model, which `metarun adapt` saved as adapted.pt, or `AdaptedModel.save`.

    Args:
        path: of the file, or the output folder of `metarun adapt`.
        device, trust: as for `metarun.load`.

    Raises:
        MetarunError: there is no such file, it is damaged, or it is something else.
    """
    return restore_adapted(str(path), tuple(trust), Hardware(device))


def restore_adapted(reference: str, trusted: Collection[str], hardware: Hardware) -> AdaptedModel:
    """Restore an adapted model.

    Args:
        reference: the file, or the folder of its adapted.pt.
        trusted: the modules that it may name (`trusted_modules`).
        hardware: the device, the precision and the batching.

    Raises:
        CheckpointError: there is no such file, it is damaged, or it is something else.
    """
    path = checkpoint.find(reference, "adapted", ("adapted.pt",))
    content = checkpoint.load(path, "adapted")
    body = {**content, "classes": content["trained_classes"]}
    model = restore(path, trusted, hardware, transductive=content["transductive"] or None, content=body)
    model.algorithm.transductive = content["transductive"]
    try:
        known = content["preparation"]
        preparation = None if known is None else Preparation(**known)
        place = (hardware.device, hardware.dtype)
        state = on_device(content["adapted"], *place)
        adapted = AdaptedModel(
            model,
            content["classes"],
            state,
            on_device(content["support"], *place),
            content["ink"],
            preparation,
        )
        trial = torch.zeros(1, 1, *model.spec.item_shape, dtype=model.spec.item_dtype)
        width = adapted.outputs(trial).shape[-1]
    except TrainingError:
        return adapted  # zeros are no example; a real one may have finite predictions
    except Exception as error:  # an edited file may fail anywhere
        raise broken(path, first_line(error)) from error
    if adapted.classes and width != len(adapted.classes):
        raise broken(path, f"{len(adapted.classes)} classes, {width} outputs")
    return adapted


def broken(path: Path, why: str) -> CheckpointError:
    """The error for an adapted state that its model cannot use."""
    return CheckpointError(f"{path}: its adapted state does not fit its model ({why}); adapt again")


def adapt_to_examples(
    model: Model, examples: Sequence[Any], labels: Sequence[Any], ink: Ink, seed: int
) -> AdaptedModel:
    """Adapt to examples in memory; see `Model.adapt`."""
    model.refuse_policy("adapt")
    if model.spec.tasks is not Episodes:
        raise ConfigError("the tasks of this model have no labelled examples; use metarun adapt")
    x, preparation = inputs.support_of(model, examples, ink)
    if len(labels) != x.shape[1]:
        raise DataError(f"labels: there are {len(labels)} for {x.shape[1]} examples; pass one for each")
    classes: list[Any] = []
    if model.predicts_values:
        y, ways = model.dataset.targets(labels).unsqueeze(0), None
    else:
        classes, numbers = numbered(labels, model.dataset.fixed_labels)
        y, ways = torch.tensor([numbers]), torch.arange(len(classes)).unsqueeze(0)
    episode = Episodes(x, y, x, y, ways, model.objective(None)).balanced()
    return adapt(model, episode, classes, preparation, ink, seed)


def numbered(labels: Sequence[Any], fixed: Sequence[str] | None) -> tuple[list[Any], list[int]]:
    """The classes and the number of each label.

    Args:
        labels: of the examples.
        fixed: the labels of all tasks of the model, in order, if it has such.

    Raises:
        DataError: there are too few classes, or a label is not one of `fixed`.
    """
    own = [plain(each) for each in labels]
    try:
        classes = sorted(set(own))
    except TypeError:
        raise DataError("labels: cannot be sorted; use text or numbers, and one type for all") from None
    if fixed is not None:
        known, own = [str(each) for each in fixed], [str(each) for each in own]
        if wrong := [each for each in own if each not in known]:
            raise DataError(f"labels: {wrong[0]!r} is not one of {', '.join(known)}; correct it")
        if absent := [each for each in known if each not in own]:
            raise DataError(f"labels: no example has the label {absent[0]!r}; add at least one")
        classes = known
    if len(classes) < 2:
        raise DataError(f"labels: all examples are of one class, {classes[0]!r}; a task needs two")
    return classes, [classes.index(each) for each in own]


def adapt(
    model: Model,
    episode: Episodes,
    classes: Sequence[Any],
    preparation: Preparation | None = None,
    ink: Ink = "auto",
    seed: int = 0,
) -> AdaptedModel:
    """Adapt to the support of an episode with T = 1. Raises ConfigError if its ways do not fit."""
    model.check(episode.outputs)
    with model.computing(seed):
        balanced = model.algorithm.balanced(episode.map(lambda tensor: placed(model, tensor)))
        state = deque(model.algorithm.trajectory(balanced), maxlen=1).pop()
    return AdaptedModel(model, classes, state, balanced.support_x, ink, preparation)


def predictor(model: Model, state: Adapted, support_x: Tensor) -> Any:
    """How queries [1, B, *item] are predicted; see `Algorithm.predictor`."""
    none = torch.zeros(1, support_x.shape[1], dtype=torch.long, device=support_x.device)
    return model.algorithm.predictor(state, Episodes(support_x, none, support_x[:, :0], none[:, :0]))


def placed(model: Model, tensor: Tensor) -> Tensor:
    """A tensor on the device of the model, floating point numbers in its type."""
    return on_device(tensor, model.hardware.device, model.hardware.dtype)


def on_device(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Nested containers with every tensor on a device, floating point numbers in a type."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, Mapping):
        return {key: on_device(item, device, dtype) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(on_device(item, device, dtype) for item in value)
    return value


def check_finite(outputs: Tensor, model: Model, after: str = "") -> None:
    """Raise TrainingError if predictions are not finite, so that they mean nothing."""
    if bool((outputs.isnan() | (outputs == math.inf)).any()):  # minus infinity may be the log of 0
        raise TrainingError(f"{model.path}: its predictions for this task are not finite{after}")


def is_rejected(probability: float, reject: float | None) -> bool:
    """Whether the most probable class of an example is too improbable, so that it may belong to none."""
    return reject is not None and probability < reject


def check_reject(reject: float | None, predicts_values: bool = False) -> None:
    """Raise ConfigError unless this is a probability, of a model that predicts classes."""
    if reject is not None and predicts_values:
        raise ConfigError(f"reject={reject}: the model predicts values, not classes; leave it out")
    if reject is not None and not 0 <= reject <= 1:
        raise ConfigError(f"reject={reject}: must be a probability, from 0 to 1")


def plain(label: Any) -> Any:
    """A label as a value of Python, without the type that NumPy gave it."""
    return label.item() if isinstance(label, (np.generic, Tensor)) else label
