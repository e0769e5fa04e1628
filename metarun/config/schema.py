"""The settings of each command: their types and bounds. The default values are in conf/*.yaml.

A setting that describes an object (the dataset, the algorithm, ...) is a node with a `_target_`, which is
checked against the signature of that class (metarun.config.check).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, fields
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from metarun.config.comments import chosen_help, options_help, settings_help

# The settings of nodes that are paths, and Hydra's folders, in which `${...}` may occur.
PATHS = re.compile(
    r"dataset\.(settings\.[\w-]+\.)?(root|descriptions|vectors|encoder)|backbone\.weights|train_tasks\.embedding"
)
FOLDERS = re.compile(r"hydra\.(run|sweep)\.dir")

Node = Any  # {"_target_": class, setting: value, ...}
OneOrMore = Any  # a number, or a list of numbers


def setting(default: Any = MISSING, **facts: Any) -> Any:
    """A field with facts that the checks and the command line use.

    Args:
        default: the default value.
        facts: `least`: the bound of a whole number, or of a list of such numbers.
            `positive=True`: a number above zero; with `zero=True`, or zero.
            `path`: "path": a path, which is typed without quotes; "list": a path or a list of them.
            `needs`: another setting of the same frame, or several; without all of these nothing reads it.
            `unless`: other settings of the same frame, with which nothing reads this one.
            `but`: parts of this one that are read nevertheless.
            `shared`: only read by settings that refer to it; the name of the setting that mostly does.
    """
    return field(default=default, metadata=facts)


def whole(least: int, default: Any = MISSING, **facts: Any) -> Any:
    """A field for a whole number of at least `least`, or a list of such numbers."""
    return setting(default, least=least, **facts)


def positive(default: Any = MISSING, **facts: Any) -> Any:
    """A field for a finite number above zero."""
    return setting(default, positive=True, **facts)


@dataclass
class Validation:
    every: int = whole(1)
    episodes: int = whole(2)  # a confidence interval needs two
    ways: int | None = whole(1, None)
    shots: int | None = whole(0, None)
    queries: int | None = whole(1, None)
    seed: int = whole(0)


@dataclass
class Test:
    episodes: int = whole(0)
    seed: int = whole(0, needs="episodes")


@dataclass
class Clipping:
    value: float | None = positive(None)
    norm: float | None = positive(None)


@dataclass
class Checkpointing:
    every: int = whole(1)


@dataclass
class Stop:
    patience: int | None = whole(1, None)
    at: float | None = None
    minutes: float | None = positive(None)
    hopeless: bool = False


@dataclass
class Log:
    every: int = whole(1)
    tensorboard: bool = MISSING


@dataclass
class TrainConfig:
    dataset: Node = MISSING
    algorithm: Node = MISSING
    backbone: Node = MISSING
    normalise: Node = None
    initial_weights: Node = None
    inner_loop: Node = None
    outer_loop: Node = None
    sampler: Node = None
    augment: Node = None
    train_tasks: Node = None
    hardware: Node = MISSING
    ways: int = whole(1)
    shots: int = whole(0)
    queries: int = whole(1)
    fixed_labels: bool = False
    varied: bool = False
    trainval: bool = False
    meta_batch: int = whole(1)
    iterations: int = whole(0)
    inner_rate: float = positive(shared="inner_loop.rate")
    inner_decay: float = positive(shared="inner_loop.test_decay")
    norm: str = setting(shared="backbone.norm")
    metrics: list[str] | None = None
    optimizer: Node = MISSING
    scheduler: Node = None
    clip: Clipping = field(default_factory=Clipping)
    validation: Validation = field(default_factory=Validation)
    test: Test = field(default_factory=Test)
    checkpoint: Checkpointing = field(default_factory=Checkpointing)
    stop: Stop = field(default_factory=Stop)
    log: Log = field(default_factory=Log)
    seed: int = whole(0)
    init: str | None = setting(None, path="path")
    resume: str | None = setting(None, path="path")
    tracker: Any = None  # {name: node}; None, in older checkpoints: TensorBoard
    published: Any = None  # a list of results, see metarun.config.published
    trust: list[str] | None = None


OF_DRAWN: dict[str, Any] = {"unless": ("benchmark",)}  # settings of tasks that are drawn


@dataclass
class EvalConfig:
    checkpoint: Any = setting(path="list")  # noqa: RUF009
    benchmark: str | None = None
    views: int = whole(1, needs=("benchmark",))
    # A dataset, or settings that adjust the checkpoint's own.
    dataset: Node = setting(None, **OF_DRAWN, but=("dataset.root", "dataset.download"))  # noqa: RUF009
    hardware: Node = MISSING
    ways: OneOrMore = whole(1, None, **OF_DRAWN)  # noqa: RUF009
    shots: OneOrMore = whole(0, None, **OF_DRAWN)  # noqa: RUF009
    queries: int | None = whole(1, None, **OF_DRAWN)
    varied: bool | None = setting(None, **OF_DRAWN)
    episodes: int = whole(2, **OF_DRAWN)
    split: str = setting(**OF_DRAWN)
    trained_classes: str = setting(**OF_DRAWN)
    steps: OneOrMore = whole(0, None)  # noqa: RUF009
    rates: list[float] | None = positive(None, zero=True, **OF_DRAWN)  # noqa: RUF009
    metrics: list[str] | None = setting(None, **OF_DRAWN)  # noqa: RUF009
    confusion: bool = setting(**OF_DRAWN)
    instances: int | None = whole(2, None, **OF_DRAWN)
    transductive: bool | None = None
    seed: int = whole(0)
    trust: list[str] | None = None


FILES = ("support", "tasks")  # what makes a task of files


@dataclass
class AdaptConfig:
    checkpoint: str = setting(path="path")
    support: str | None = setting(None, path="path", unless=("tasks",))
    query: str | None = setting(None, path="path", needs="support")
    tasks: str | None = setting(None, path="path")
    depth: int = whole(1, needs=FILES)
    ink: str = setting(needs=FILES)
    views: int = whole(1)
    # A dataset, or settings that adjust the checkpoint's own.
    dataset: Node = setting(  # noqa: RUF009
        None, unless=FILES, but=("dataset.vectors", "dataset.encoder")
    )
    hardware: Node = MISSING
    task: Any = setting(None, unless=FILES)  # noqa: RUF009
    video: bool = setting(False, unless=FILES)
    ways: int | None = whole(1, None, unless=FILES)
    shots: int | None = whole(0, None, unless=FILES)
    queries: int | None = whole(1, None, unless=FILES)
    split: str = setting(unless=FILES)
    trained_classes: str = setting(unless=FILES)
    steps: int | None = whole(0, None)
    metrics: list[str] | None = None
    reject: float | None = None
    transductive: bool = False
    seed: int = whole(0)
    trust: list[str] | None = None


@dataclass
class PredictConfig:
    adapted: str = setting(path="path")
    query: str = setting(path="path")
    depth: int = whole(1)
    ink: str | None = None
    reject: float | None = None
    dataset: Node = None  # settings that adjust the model's own
    hardware: Node = MISSING
    trust: list[str] | None = None


@dataclass
class ExportConfig:
    checkpoint: str | None = setting(None, path="path")
    adapted: str | None = setting(None, path="path")
    format: str = MISSING
    trust: list[str] | None = None


@dataclass
class RunsConfig:
    folder: str = setting(path="path")
    status: str | None = None
    method: str | None = None
    data: str | None = None
    sort: str = MISSING
    show: int | None = whole(1)


@dataclass
class ReportConfig:
    runs: Any = setting(path="list")  # noqa: RUF009


OF_ONE_DATASET: dict[str, Any] = {"needs": "dataset", "unless": ("verify", "clean")}


@dataclass
class DataConfig:
    dataset: Node = None
    verify: bool = setting(False, unless=("clean",))
    clean: bool = False
    hardware: Node = setting(**OF_ONE_DATASET)  # noqa: RUF009
    split: str = setting(**OF_ONE_DATASET)
    ways: int = whole(1, **OF_ONE_DATASET)
    shots: int = whole(0, **OF_ONE_DATASET)
    queries: int = whole(1, **OF_ONE_DATASET)
    seed: int = whole(0, **OF_ONE_DATASET)
    describe: bool = setting(False, **OF_ONE_DATASET)
    tasks: int = whole(1, needs="describe")
    checkpoint: str | None = setting(None, path="path", needs="describe")
    probe: str | None = setting(None, path="path", needs="describe")
    trust: list[str] | None = setting(None, needs=("checkpoint", "probe"))  # noqa: RUF009


@dataclass
class OnlineConfig:
    dataset: Node = MISSING
    backbone: Node = MISSING
    hardware: Node = MISSING
    learners: list[str] = MISSING
    classes: int = whole(2)
    tasks: int = whole(1)
    images: int = whole(1)
    test_images: int = whole(1)
    batch: int = whole(1)
    steps: int = whole(0)
    rate: float = positive()
    meta_steps: int = whole(1)
    meta_batch: int = whole(1)
    minibatch: int = whole(1)
    lr: float = positive()
    threshold: float = positive()
    norm: str = setting(shared="backbone.norm")
    seed: int = whole(0)
    resume: str | None = setting(None, path="path")
    trust: list[str] | None = setting(None, needs="resume")  # noqa: RUF009


FRAMES: dict[str, Any] = {
    "train": TrainConfig,
    "eval": EvalConfig,
    "adapt": AdaptConfig,
    "predict": PredictConfig,
    "export": ExportConfig,
    "runs": RunsConfig,
    "report": ReportConfig,
    "data": DataConfig,
    "online": OnlineConfig,
}


def path_kind(command: str, key: str) -> str:
    """What a setting holds: "path"; "list": paths, or one; "folder": one of Hydra's; "": no path."""
    if FOLDERS.fullmatch(key):
        return "folder"
    if PATHS.fullmatch(key):
        return "path"
    return next((each.metadata.get("path", "") for each in fields(FRAMES[command]) if each.name == key), "")


def register_frames() -> None:
    """Register what conf/*.yaml refers to: the frames, and the resolvers in help texts."""
    OmegaConf.register_new_resolver("metarun.settings", settings_help, replace=True)
    OmegaConf.register_new_resolver("metarun.options", options_help, replace=True)
    OmegaConf.register_new_resolver("metarun.chosen", chosen_help, replace=True)
    store = ConfigStore.instance()
    for name, frame in FRAMES.items():
        if f"{name}_frame.yaml" not in store.repo:  # several commands may run in one process
            store.store(name=f"{name}_frame", node=frame)


def typed(cfg: DictConfig) -> Any:
    """Convert a checked config to its frame: dataclasses, with nodes as plain dicts."""
    return OmegaConf.to_object(cfg)


def plain(settings: Any) -> dict[str, Any]:
    """Convert a frame to plain dicts and lists, for a checkpoint."""
    return OmegaConf.to_container(OmegaConf.structured(settings), resolve=True)  # type: ignore[return-value]
