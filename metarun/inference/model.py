"""A trained model, restored from its checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from metarun.algorithms.base import Algorithm
from metarun.config.restore import EVALUATED, config_of, rebuild
from metarun.config.schema import TrainConfig, typed
from metarun.config.targets import naming_options, targets_in
from metarun.config.variants import variant_name
from metarun.datasets.base import Dataset
from metarun.errors import ConfigError, check_least
from metarun.reporting.console import inform
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.objectives import Objective
from metarun.tasks.rollouts import Rollouts
from metarun.tasks.source import EpisodeSource
from metarun.tasks.spec import TaskSpec
from metarun.training import checkpoint
from metarun.training.hardware import Hardware

if TYPE_CHECKING:
    from metarun.inference.adapted import AdaptedModel
    from metarun.inference.images import Ink


@dataclass
class Model:
    """A trained model: what `metarun.load(RUN)` returns.

    Args:
        name: its name in tables.
        path: of the checkpoint file.
        settings: the settings of its training run, adjusted by the settings of the command.
        dataset: the dataset of these settings.
        spec: the kind of tasks it was trained on.
        algorithm: the algorithm with its weights, on the device.
        content: the content of the checkpoint file.
        hardware: the device, the precision and the batching.
    """

    name: str
    path: Path
    settings: TrainConfig
    dataset: Dataset
    spec: TaskSpec
    algorithm: Algorithm
    content: Mapping[str, Any]
    hardware: Hardware

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.spec.item_shape))
        return f"<{self.name} model for {self.spec.kind} {shape}, from {self.path}>"

    def check(self, ways: int) -> None:
        """Raise ConfigError if the method, as it was trained, does not support tasks of so many ways."""
        with naming_options(self.content["config"], self.content["choices"]):
            self.algorithm.check(ways)

    def check_source(self, source: EpisodeSource, shape: EpisodeShape) -> None:
        """Raise ConfigError if the method does not support tasks of this shape from this source."""
        with naming_options(self.content["config"], self.content["choices"]):
            self.algorithm.check_source(source, shape)

    def __reduce__(self) -> tuple[Any, ...]:
        """How it is pickled: by the content of its checkpoint, from which it is restored."""
        config, algorithm = self.content["config"], self.algorithm
        trusted = tuple(target.rpartition(".")[0] for target in targets_in(config))  # as the pickle itself is
        steps = (self.settings.inner_loop or {}).get("test_steps")
        transductive = algorithm.transductive if algorithm.normalises_batches else None
        return restore, (self.path, trusted, self.hardware, steps, transductive, True, self.content)

    def __deepcopy__(self, memo: object) -> Model:
        """Itself, since it does not change: scikit-learn copies the parameters of every estimator."""
        return self

    @property
    def is_policy(self) -> bool:
        """Whether it acts in environments, instead of predicting examples."""
        return issubclass(self.spec.tasks, Rollouts)

    @property
    def predicts_values(self) -> bool:
        """Whether it predicts values (a regression), instead of classes."""
        return self.spec.outputs is not None and not self.is_policy and not self.dataset.fixed_labels

    def refuse_policy(self, setting: str) -> None:
        """Raise ConfigError, naming a setting or a method that is for predicting models, for a policy."""
        if self.is_policy:
            raise ConfigError(
                f"{setting}: {self.path} is a policy for an environment, and has no examples to predict; let "
                "it act by metarun adapt checkpoint=RUN 'task={...}'"
            )

    def objective(self, names: list[str] | None) -> Objective:
        """The objective of its tasks with the metrics of these names; None: the metrics of training."""
        return self.spec.objective.choosing(self.settings.metrics if names is None else names)

    def adapt(
        self, examples: Sequence[Any], labels: Sequence[Any], *, ink: Ink = "auto", seed: int = 0
    ) -> AdaptedModel:
        """Learn new classes from a few examples of each, or a regression from a few values.

        This is what `metarun adapt support=...` does.

        Args:
            examples: images as paths, PIL images, NumPy arrays or tensors (see
                `metarun.inference.examples.image`), of any size; texts for a model of texts; rows for a model
                of a table, as mappings, a data frame, or an array [rows, columns] with the columns of
                training; numbers x for a model of sinusoids. All classes may have different numbers of
                examples.
            labels: the class of each example: text, numbers, or any other values that can be compared. For a
                model that was trained on a regression, the value of each example in the units of the data.
            ink: of drawings, see `metarun adapt`; "auto" detects it.
            seed: of methods that draw at random when they adapt. The random state of the program is kept.

        Returns:
            The adapted model. Its classes are the labels, sorted; a regression has none.

        Raises:
            MetarunError: examples cannot be read, do not fit the model, or there are too many or too few
                classes.
        """
        from metarun.inference.adapted import adapt_to_examples

        return adapt_to_examples(self, examples, labels, ink, seed)

    @contextmanager
    def computing(self, seed: int = 0) -> Iterator[None]:
        """A context for predictions: evaluation, no gradients, the precision of the model, its own seed."""
        self.algorithm.eval()
        with torch.no_grad(), self.hardware.compute(), self.hardware.forked_random():
            torch.manual_seed(seed)
            yield


def load(
    checkpoint: str | Path,
    *,
    device: str = "auto",
    steps: int | None = None,
    transductive: bool = False,
    trust: Collection[str] = (),
) -> Model:
    """Load a trained model from a run.

    Args:
        checkpoint: a run folder (its `best.pt`), or a .pt file.
        device: "auto" (the GPU if there is one), "cpu", "cuda" or "cuda:INDEX".
        steps: the number of inner steps; None: as in the run.
        transductive: whether all examples of one call of `predict` are normalised as one batch, if the
            network normalises by batch statistics. False: each is predicted independently of the others.
        trust: modules beside metarun that the checkpoint may load classes from.

    Returns:
        The model, which `adapt` teaches new classes.

    Raises:
        MetarunError: there is no such checkpoint, it is damaged, or a setting does not fit it.
    """
    path = find(str(checkpoint))
    return restore(path, tuple(trust), Hardware(device), steps, transductive)


def find(reference: str) -> Path:
    """The checkpoint file of a run. Raises CheckpointError."""
    return checkpoint.find(reference)


def restore(
    path: Path,
    trusted: Collection[str],
    hardware: Hardware,
    steps: Any = None,
    transductive: bool | None = None,
    alone: bool = True,
    content: Mapping[str, Any] | None = None,
) -> Model:
    """Restore a model; `steps` and `transductive` have precedence over its settings.

    Args:
        path: of the checkpoint file.
        trusted: the modules that the checkpoint may name (`trusted_modules`).
        hardware: the device, the precision and the batching.
        steps: the number of inner steps, or a list, of which the first is set; None: as in the run.
        transductive: whether all queries of a task are predicted in one batch; None: as in the run.
        alone: whether an algorithm without these settings is an error instead of a message.
        content: of the file, if it was read already.

    Raises:
        MetarunError: the file is missing, damaged or of another kind, or a setting does not fit.
    """
    if content is None:
        content = checkpoint.load(path)
    settings: TrainConfig = typed(config_of(content, path, trusted, EVALUATED))
    name = content["choices"]["algorithm"]
    set_steps(settings, steps, name, alone)
    algorithm, dataset, spec = rebuild(content, settings, hardware, path)
    set_transductive(algorithm, transductive, name, alone)
    name = variant_name(content["choices"], content["config"])
    return Model(name, path, settings, dataset, spec, algorithm, content, hardware)


def set_steps(settings: TrainConfig, steps: Any, name: str, alone: bool) -> None:
    """Replace the inner steps in the settings of a checkpoint.

    Args:
        settings: the settings of the checkpoint, changed in place.
        steps: see `restore`.
        name: of the algorithm, for messages.
        alone: see `restore`.
    """
    if steps is None:
        return
    if settings.inner_loop and "test_steps" in settings.inner_loop:
        for number in steps if isinstance(steps, list) else [steps]:
            check_least("inner_loop", 0, test_steps=number)
        # Cells set the other values of a list.
        settings.inner_loop["test_steps"] = steps[0] if isinstance(steps, list) else steps
    elif alone:
        raise ConfigError(f"steps={steps}: {name} has no such setting; leave it out")
    else:
        inform(f"steps: {name} has no such setting and is evaluated without it")


def set_transductive(algorithm: Algorithm, transductive: bool | None, name: str, alone: bool) -> None:
    """Choose whether the queries of a task are predicted in one batch; None: as in training.

    Args:
        algorithm: a restored algorithm. One that does not normalise batches predicts each query
            independently in any case.
        transductive, name: the setting of the command, and the name of the algorithm for messages.
        alone: see `restore`.
    """
    if transductive is not None:
        algorithm.transductive = transductive
    if transductive and not algorithm.normalises_batches:
        why = f"{name} with this backbone does not normalise by batch statistics"
        if alone:
            raise ConfigError(f"transductive=true: {why}; leave it out")
        inform(f"transductive=true: {why} and predicts each query independently")
