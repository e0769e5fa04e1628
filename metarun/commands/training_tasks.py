"""Part of `metarun train`: the classes that training tasks are drawn from."""

from __future__ import annotations

from torch import Tensor

from metarun.config.build import instantiate, training_shape
from metarun.config.schema import TrainConfig
from metarun.datasets.training_tasks import TrainingTasks
from metarun.errors import ConfigError
from metarun.inference.model import restore
from metarun.nn.frozen import Frozen
from metarun.nn.layers import relates_examples
from metarun.reporting.console import inform
from metarun.tasks.class_store import ClassStore
from metarun.tasks.source import EpisodeSource
from metarun.training import checkpoint
from metarun.training.features import cached_features
from metarun.training.hardware import Hardware


def with_training_tasks(train: EpisodeSource, settings: TrainConfig, hardware: Hardware) -> EpisodeSource:
    """The training split with the classes that `train_tasks` makes of its images; as it is without.

    Raises:
        ConfigError, DataError: the split has no images, or settings do not fit.
    """
    if "_target_" not in (settings.train_tasks or {}):
        return train
    maker: TrainingTasks = instantiate(settings.train_tasks, "train_tasks")
    if settings.fixed_labels:
        raise ConfigError(
            "fixed_labels=true: is for the labelled classes of a dataset; choose train_tasks=labels, or "
            "leave it out"
        )
    images = train if isinstance(train, ClassStore) and train.spec.kind == "images" else None
    if maker.of_images and images is None:
        raise ConfigError(
            "train_tasks: makes tasks of images, and this dataset has none; choose train_tasks=labels"
        )

    def embed(run: str) -> Tensor:
        assert images is not None
        return embedded(images, run, settings, hardware)

    source = maker.source(train, training_shape(settings), embed)  # type: ignore[arg-type]
    labels = "" if maker.labelled else ", without their labels"
    if isinstance(source, ClassStore):
        inform(f"training tasks: {len(source.names):,} classes of {len(source.items):,} images{labels}")
    return source


def embedded(train: ClassStore, reference: str, settings: TrainConfig, hardware: Hardware) -> Tensor:
    """The features [items, F] of the images of a split by the backbone of a run.

    Args:
        train: the split.
        reference: the run, as `train_tasks.embedding` names it.
        settings: of the run that is trained.
        hardware: the device and the precision.
    """
    where = f"train_tasks.embedding={reference}"
    path = checkpoint.find(reference, "train_tasks.embedding")
    model = restore(path, settings.trust or (), hardware, alone=False)
    backbone = model.algorithm.own_backbone()
    if backbone is None or not model.algorithm.embeds_first or model.spec.kind != "images":
        raise ConfigError(f"{where}: {model.name} embeds no images alone; choose a run of simclr or protonet")
    if relates_examples(backbone):
        raise ConfigError(
            f"{where}: normalises an image by the others of its batch; choose a run with norm=running"
        )
    images = train if model.spec.item_shape == train.item_shape else train.resized(model.spec.item_shape)
    return cached_features(images, Frozen(backbone), hardware)
