"""The settings of each command: their types and bounds. The default values are in conf/*.yaml.

A setting that describes an object (the dataset, the algorithm, ...) is a node with a `_target_`, which is
checked against the signature of that class (metarun.config.check).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from metarun.config.comments import settings_help

Node = Any  # {"_target_": class, setting: value, ...}
OneOrMore = Any  # a number, or a list of numbers


def whole(least: int, default: Any = MISSING) -> Any:
    """A field for a whole number of at least `least`, or a list of such numbers."""
    return field(default=default, metadata={"least": least})


def positive(default: Any = MISSING) -> Any:
    """A field for a finite number above zero."""
    return field(default=default, metadata={"positive": True})


@dataclass
class Validation:
    every: int = whole(1)
    episodes: int = whole(2)  # a confidence interval needs two
    ways: int | None = whole(1, None)
    shots: int | None = whole(1, None)
    queries: int | None = whole(1, None)
    seed: int = whole(0)


@dataclass
class Test:
    episodes: int = whole(0)
    seed: int = whole(0)


@dataclass
class Clipping:
    value: float | None = positive(None)
    norm: float | None = positive(None)


@dataclass
class Checkpointing:
    every: int = whole(1)


@dataclass
class Log:
    every: int = whole(1)
    tensorboard: bool = MISSING


@dataclass
class TrainConfig:
    dataset: Node = MISSING
    algorithm: Node = MISSING
    backbone: Node = MISSING
    inner_loop: Node = None
    augment: Node = None
    hardware: Node = MISSING
    ways: int = whole(1)
    shots: int = whole(1)
    queries: int = whole(1)
    meta_batch: int = whole(1)
    iterations: int = whole(1)
    inner_rate: float = positive()
    norm: str = MISSING
    metrics: list[str] | None = None
    optimizer: Node = MISSING
    scheduler: Node = None
    clip: Clipping = field(default_factory=Clipping)
    validation: Validation = field(default_factory=Validation)
    test: Test = field(default_factory=Test)
    checkpoint: Checkpointing = field(default_factory=Checkpointing)
    log: Log = field(default_factory=Log)
    seed: int = whole(0)
    init: str | None = None
    resume: str | None = None


@dataclass
class EvalConfig:
    checkpoint: Any = MISSING
    dataset: Node = None  # a dataset, or settings that adjust the checkpoint's own
    hardware: Node = MISSING
    ways: OneOrMore = whole(1, None)  # noqa: RUF009
    shots: OneOrMore = whole(1, None)  # noqa: RUF009
    queries: int = whole(1)
    episodes: int = whole(2)
    split: str = MISSING
    trained_classes: str = MISSING
    steps: OneOrMore = whole(0, None)  # noqa: RUF009
    metrics: list[str] | None = None
    confusion: bool = MISSING
    instances: int | None = whole(2, None)
    transductive: bool | None = None
    seed: int = whole(0)


@dataclass
class AdaptConfig:
    checkpoint: str = MISSING
    support: str | None = None
    query: str | None = None
    ink: str = MISSING
    dataset: Node = None  # a dataset, or settings that adjust the checkpoint's own
    hardware: Node = MISSING
    ways: int | None = whole(1, None)
    shots: int | None = whole(1, None)
    queries: int = whole(1)
    split: str = MISSING
    trained_classes: str = MISSING
    steps: int | None = whole(0, None)
    metrics: list[str] | None = None
    transductive: bool = False
    seed: int = whole(0)


@dataclass
class DataConfig:
    dataset: Node = None
    verify: bool = False
    clean: bool = False
    hardware: Node = MISSING
    split: str = MISSING
    ways: int = whole(1)
    shots: int = whole(1)
    queries: int = whole(1)
    seed: int = whole(0)


FRAMES: dict[str, Any] = {"train": TrainConfig, "eval": EvalConfig, "adapt": AdaptConfig, "data": DataConfig}


def register_frames() -> None:
    """Register what conf/*.yaml refers to: the frames, and `${metarun.settings:COMMAND}` in help texts."""
    OmegaConf.register_new_resolver("metarun.settings", settings_help, replace=True)
    store = ConfigStore.instance()
    for name, frame in FRAMES.items():
        store.store(name=f"{name}_frame", node=frame)


def typed(cfg: DictConfig) -> Any:
    """Convert a checked config to its frame: dataclasses, with nodes as plain dicts."""
    return OmegaConf.to_object(cfg)


def plain(settings: Any) -> dict[str, Any]:
    """Convert a frame to plain dicts and lists, for a checkpoint."""
    return OmegaConf.to_container(OmegaConf.structured(settings), resolve=True)  # type: ignore[return-value]


def from_plain(config: dict[str, Any]) -> TrainConfig:
    """Convert the plain settings in a checkpoint to a frame."""
    return typed(OmegaConf.merge(OmegaConf.structured(TrainConfig), config))  # type: ignore[arg-type]
