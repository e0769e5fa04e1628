"""The checkpoints of `metarun eval`, and the data to evaluate models on."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from metarun.commands.trained_on import (
    compare_with,
    note_weights,
    trained_classes,
    without_trained,
    without_trained_tasks,
)
from metarun.config.build import build_dataset, build_source, validation_shape
from metarun.config.check import check_node
from metarun.config.schema import AdaptConfig, EvalConfig, Node, PredictConfig
from metarun.config.targets import naming_options
from metarun.config.unread import shown
from metarun.datasets.base import Dataset
from metarun.datasets.preparation import Preparation
from metarun.errors import ConfigError, counted
from metarun.inference.model import Model, restore, set_transductive
from metarun.reporting.console import inform
from metarun.tasks.class_store import ClassStore
from metarun.tasks.rollouts import Rollouts
from metarun.tasks.source import EpisodeSource
from metarun.tasks.spec import TaskSpec
from metarun.training import checkpoint
from metarun.training.hardware import Hardware

Command = EvalConfig | AdaptConfig
QUERIES = 15  # examples of each class, if the number is not set


def load_models(command: EvalConfig, trusted: Collection[str], hardware: Hardware) -> list[Model]:
    """Restore all checkpoints of `checkpoint=`, with unique names."""
    references = values_of(command.checkpoint)
    if not references:
        raise ConfigError("checkpoint=[]: name at least one run folder or .pt file")
    alone = len(references) == 1
    paths = [checkpoint.find(str(each)) for each in references]
    models = [restore(path, trusted, hardware, command.steps, None, alone) for path in paths]
    for model in models:
        dataset_for(command, model)  # another kind of data is said first
        set_transductive(model.algorithm, command.transductive, model.name, alone)
    # The name is the algorithm. Equal names are extended by the folder, the file, and the folder above.
    places = [model.path.resolve() for model in models]
    for parts in zip(*((p.parent.name, p.stem, p.parent.parent.name) for p in places), strict=True):
        names = [model.name for model in models]
        for model, part in zip(models, parts, strict=True):
            if names.count(model.name) > 1:
                model.name = f"{model.name} {part}"
    return models


def values_of(setting: Any) -> list[Any]:
    """The values of a setting that is a single value or a list, without repetitions."""
    return list(dict.fromkeys(setting)) if isinstance(setting, list) else [setting]


def queries_of(command: Command, model: Model) -> int:
    """The number of queries: typed, or else `QUERIES`, of environments that of the model's training."""
    if command.queries is not None:
        return command.queries
    return validation_shape(model.settings).queries if issubclass(model.spec.tasks, Rollouts) else QUERIES


def dataset_node(command: Command | PredictConfig, model: Model) -> Node:
    """The dataset to evaluate a model on: another one, or that of its training with the typed settings."""
    if command.dataset and "_target_" in command.dataset:
        return command.dataset
    own = OmegaConf.merge(model.settings.dataset, command.dataset or {})
    if command.dataset and "parts" in command.dataset:  # replace the parts of a mixture, do not merge them
        own.parts = command.dataset["parts"]
    with naming_options(model.content["config"], model.content["choices"]):
        check_node("dataset", own)  # type: ignore[arg-type]
    return OmegaConf.to_container(own)


def dataset_for(command: Command | PredictConfig, model: Model) -> Dataset:
    """The dataset to evaluate a model on, with its examples prepared as in training; no files are read.

    Raises:
        ConfigError: a typed setting says that examples are prepared in another way.
    """
    node = dataset_node(command, model)
    if node == model.settings.dataset:
        return model.dataset
    dataset = build_dataset(node)
    for override in HydraConfig.get().overrides.task:
        name = override.partition("=")[0].lstrip("+").removeprefix("dataset.")
        if name in dataset.of_model and not same_preparation(name, node, model):
            kept = shown(model.settings.dataset.get(name))
            raise ConfigError(
                f"{override.lstrip('+')}: the model was trained with dataset.{name}={kept}, and takes "
                "examples like those of its training; leave it out"
            )
    dataset = dataset.prepared_like(model.dataset.preparation)  # its own encoder may be gone
    if issubclass(dataset.spec.tasks, Rollouts) != issubclass(model.spec.tasks, Rollouts):
        specs = dataset.spec, model.spec
        kinds = ["an environment" if issubclass(spec.tasks, Rollouts) else "examples" for spec in specs]
        raise ConfigError(
            f"dataset={dataset_name(model)}: is {kinds[0]}, and the model was trained on {kinds[1]}; choose "
            "another dataset, or leave dataset out for that of its training"
        )
    if dataset.spec.kind != model.spec.kind:
        kind = model.spec.kind
        raise ConfigError(
            f"dataset={dataset_name(model)}: has {dataset.spec.kind}, and the model was trained on {kind}; "
            f"choose a dataset of {kind}, or leave dataset out for that of its training"
        )
    return dataset


def same_preparation(name: str, node: Node, model: Model) -> bool:
    """Whether a setting of a dataset is that of a model, or says where the same files are now."""
    now, then = node.get(name), model.settings.dataset.get(name)
    return now == then or (name in model.dataset.relocates and None not in (now, then))


def own_dataset(command: AdaptConfig | PredictConfig, model: Model) -> Dataset:
    """The dataset that reads a user's files: that of training, with the place of its encoder or vectors now.

    Raises:
        ConfigError: they are not those of training.
    """
    dataset = dataset_for(command, model)
    if dataset.spec.item_shape != model.spec.item_shape:
        raise ConfigError(
            f"dataset: gives examples of shape {dataset.spec.item_shape}, and the checkpoint needs "
            f"{model.spec.item_shape}; name the encoder or the word vectors of training"
        )
    return dataset


def dataset_name(model: Model) -> str:
    """The name of the dataset to evaluate on."""
    return str(HydraConfig.get().runtime.choices.get("dataset") or model.content["choices"]["dataset"])


class TestData:
    """The data to evaluate models on; data that several models share is loaded once.

    Args:
        command: the settings of the command: dataset, split and metrics.
        hardware: the device.
        models: all models. Those on the same dataset get the same classes, without those that any of them
            was trained on, so that their results can be compared.
    """

    def __init__(self, command: Command, hardware: Hardware, models: Sequence[Model]) -> None:
        self.command, self.hardware, self.models = command, hardware, models
        self.sources: dict[tuple[str, tuple[int, ...], Preparation], EpisodeSource] = {}

    def dataset(self, model: Model) -> Dataset:
        """The dataset to evaluate one model on, without files read."""
        return dataset_for(self.command, model)

    def source(self, model: Model) -> EpisodeSource:
        """The split for one model, with items of the model's shape and the model's objective.

        A mixture converts each part's own images to that shape, so that equal hashes mean equal pixels,
        however the dataset was named.
        """
        node = dataset_node(self.command, model)
        dataset = self.dataset(model)
        wanted = model.spec.item_shape
        shaped = dataset.reshaped(wanted) if len(wanted) == 3 else dataset
        if shaped.spec.item_shape != dataset.spec.item_shape:
            inform_resized(dataset_name(model), dataset.spec.item_shape, wanted)
        key = OmegaConf.to_yaml(node), shaped.spec.item_shape, shaped.preparation
        if key not in self.sources:
            source = build_source(shaped, self.command.split, self.hardware)
            if (
                "_target_" in (self.command.dataset or {})
                and self.command.split == "test"
                and isinstance(source, ClassStore)
            ):
                inform(f"{source.name}: {len(source.names):,} classes; split=all takes those of all splits")
            same = [each for each in self.models if dataset_node(self.command, each) == node]
            if {*(self.command.dataset or {})} <= {"root", "download"}:  # the data of training
                compare_with([each.content for each in same], self.command.split, source)
            for each in same if source.names else []:
                note_weights(each.name, each.settings, each.content["choices"])
            contents = {each.name: each.content for each in same}
            source = without_trained_tasks(source, contents, self.kept_by)
            trained = {each.name: trained_classes(each.content) for each in same}
            self.sources[key] = without_trained(source, trained, self.kept_by)
        source = fitted(self.sources[key], model.spec)
        return source.reporting(model.objective(self.command.metrics))

    @property
    def kept_by(self) -> str:
        """The setting that keeps training classes among the classes to test on; "" if there is none."""
        if self.command.split == "train":
            return "split=train"
        return "trained_classes=keep" if self.command.trained_classes == "keep" else ""

    @property
    def datasets(self) -> int:
        """The number of loaded datasets; the same dataset with different item shapes counts once.

        Environments that differ in how gradients are estimated are the same.
        """
        return len({self.identity(name, source) for (name, *_), source in self.sources.items()})

    @staticmethod
    def identity(name: str, source: EpisodeSource) -> str:
        """What distinguishes the data of a source: its settings, or the fingerprint of environments."""
        return source.fingerprint if issubclass(source.spec.tasks, Rollouts) else name


def fitted(source: EpisodeSource, trained: TaskSpec) -> EpisodeSource:
    """The source, which has the right kind of examples, with items of the shape that the model needs.

    Raises:
        ConfigError: that is not possible.
    """
    wanted, there = trained.item_shape, source.spec.item_shape
    if wanted != there and not (isinstance(source, ClassStore) and trained.kind == "images"):
        raise ConfigError(
            f"dataset: {source.name} has examples of {'x'.join(map(str, there))} numbers, and the model "
            f"takes {'x'.join(map(str, wanted))}; leave dataset out for that of its training"
        )
    if source.spec.outputs != trained.outputs:
        outputs = [
            "one output for each class" if n is None else counted(n, "output")
            for n in (source.spec.outputs, trained.outputs)
        ]
        raise ConfigError(
            f"dataset: the tasks of {source.name} need {outputs[0]}, and the model has {outputs[1]}; "
            "leave dataset out for that of its training"
        )
    if wanted == there:
        return source
    inform_resized(source.name, there, wanted)
    assert isinstance(source, ClassStore)
    return source.resized(wanted)


def inform_resized(name: str, *shapes: tuple[int, ...]) -> None:
    """Report that images are converted from one shape to another."""
    sizes = ("x".join(map(str, shape)) for shape in shapes)
    inform("{}: images converted from {} to the model's {}".format(name, *sizes))
