"""Checkpoints brought back to life, and the data they are tested on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from metarun import checkpoint
from metarun.algorithms.base import Algorithm
from metarun.build import build_dataset
from metarun.config import check_node
from metarun.episodes import ClassStore, EpisodeSource
from metarun.errors import ConfigError
from metarun.hardware import Hardware
from metarun.inner_loops.base import InnerLoop
from metarun.tracking import notes, say


@dataclass
class Model:
    """A checkpoint brought back to life."""

    name: str
    path: Path
    config: DictConfig
    algorithm: Algorithm


def load_models(cfg: DictConfig, hardware: Hardware) -> list[Model]:
    """The checkpoints named, each rebuilt by its own config and the settings asked of the test."""
    references = list(cfg.checkpoint) if OmegaConf.is_list(cfg.checkpoint) else [cfg.checkpoint]
    if not references:
        raise ConfigError("checkpoint=[]: name at least one run folder or .pt file")
    models = []
    for reference in references:
        path = checkpoint.find(str(reference))
        content = checkpoint.load(path)
        config = checkpoint.config_of(content)
        adjust(config, cfg, alone=len(references) == 1)
        algorithm = checkpoint.rebuild(content, config, hardware, path)
        models.append(Model(config.choices.algorithm, path, config, algorithm))
    # The algorithm names a model, its folder tells two of a kind apart, then its file, then the folder above.
    places = [model.path.resolve() for model in models]
    for parts in zip(*((p.parent.name, p.stem, p.parent.parent.name) for p in places), strict=True):
        names = [model.name for model in models]
        for model, part in zip(models, parts, strict=True):
            if names.count(model.name) > 1:
                model.name = f"{model.name} {part}"
    return models


def adjust(config: DictConfig, cfg: DictConfig, alone: bool = True) -> None:
    """Put what the test asks for into a checkpoint's config.

    A method without such a setting is an error where it stands alone; beside others it is said.
    """
    name = config.choices.algorithm
    asked = {"steps": (config.inner_loop, "test_steps"), "transductive": (config.algorithm, "transductive")}
    for key, (node, setting) in asked.items():
        if (value := cfg.get(key)) is None:
            continue
        if node and setting in node:
            node[setting] = choices(value)[0]  # a list is for the grid
        elif alone:
            raise ConfigError(f"{key}={value}: {name} has no such choice")
        else:
            say(notes, f"{name} has no such choice as {key}={value} and is tested as it is")


def choices(value: Any) -> list[Any]:
    """A setting that may be one value or a list of them."""
    return list(dict.fromkeys(value)) if OmegaConf.is_list(value) else [value]


def takes_steps(model: Model) -> bool:
    return isinstance(getattr(model.algorithm, "inner_loop", None), InnerLoop)


def dataset_config(cfg: DictConfig, trained: DictConfig) -> DictConfig:
    """The dataset to test on: another one, or the checkpoint's own with what was adjusted."""
    if cfg.dataset and "_target_" in cfg.dataset:
        return cfg.dataset
    own = OmegaConf.merge(trained.dataset, cfg.dataset or {})
    assert isinstance(own, DictConfig)
    if cfg.dataset and "parts" in cfg.dataset:  # a list of datasets, which replaces another
        own.parts = cfg.dataset.parts
    check_node("dataset", own)
    return own


def built_for(node: DictConfig, trained: DictConfig) -> Any:
    """The dataset; a mixture with the model's shape, lest a part's images be converted twice.

    Equal hashes mean equal pixels, however the dataset was named.
    """
    dataset = build_dataset(node)
    wanted, there = shape_of_model(trained), tuple(dataset.item_shape)
    reshaped = dataset if wanted == there or len(wanted) != 3 else dataset.reshaped(wanted)
    if reshaped is not dataset:
        say_converted(dataset_name(trained), there, wanted)
    return reshaped


def shape_of_model(trained: DictConfig) -> tuple[int, ...]:
    return tuple(build_dataset(trained.dataset).item_shape)


def say_converted(name: str, *shapes: tuple[int, ...]) -> None:
    told = ("x".join(map(str, shape)) for shape in shapes)
    say(notes, "{}: images converted from {} to the model's {}".format(name, *told))


def fitted(source: EpisodeSource, trained: DictConfig) -> EpisodeSource:
    """The source with its images as the model takes them; said where they had to be converted."""
    wanted, there = shape_of_model(trained), tuple(source.item_shape)
    if wanted == there:
        return source
    if not (isinstance(source, ClassStore) and len(wanted) == 3):
        raise ConfigError(
            f"the checkpoint was trained on items of shape {wanted}; this dataset's have {there}: "
            "only images can be converted"
        )
    say_converted(source.name, there, wanted)
    return source.converted(wanted)


def dataset_name(trained: DictConfig) -> str:
    chosen = HydraConfig.get().runtime.choices.get("dataset")
    return str(chosen or trained.choices.dataset)
