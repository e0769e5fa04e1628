"""Rebuilds the objects of a training run from its checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from torch.overrides import TorchFunctionMode

from metarun.algorithms.base import Algorithm
from metarun.config.build import build_algorithm, build_dataset
from metarun.config.check import check
from metarun.config.paths import CONF
from metarun.config.schema import FRAMES, Node, TrainConfig
from metarun.config.targets import naming_options
from metarun.datasets.base import Dataset
from metarun.errors import CheckpointError, ConfigError, DataError, MetarunError, first_line, without_bounds
from metarun.nn.frozen import frozen_part
from metarun.tasks.spec import TaskSpec
from metarun.training.checkpoint import check_weights
from metarun.training.hardware import Hardware
from metarun.training.online import Followers
from metarun.training.trainer import Trainer

# The groups that evaluation builds; the classes of others are not imported.
EVALUATED = ("dataset", "backbone", "normalise", "inner_loop", "algorithm")


@contextmanager
def naming(path: Path, content: Mapping[str, Any]) -> Iterator[None]:
    """A context in which errors of settings name the checkpoint that they are from, and its options."""
    try:
        with naming_options(content["config"], content["choices"]):
            yield
    except (ConfigError, DataError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def config_of(
    content: Mapping[str, Any],
    path: Path,
    trusted: Collection[str],
    nodes: Collection[str] | None = None,
    command: str = "train",
) -> DictConfig:
    """The config in a checkpoint, checked like one from the command line, but with less trust.

    Settings that were introduced after it was written have the values of the command's YAML file.

    Args:
        content: the content of the checkpoint file.
        path: of the file, for messages.
        trusted: the modules that its classes may be from (`trusted_modules`).
        nodes: the groups whose classes are imported and checked; None: all.
        command: that wrote it, a key of `FRAMES`.

    Raises:
        CheckpointError: if a setting is unknown or invalid, or names a class of a module that is not trusted.
    """
    config, frame = content["config"], FRAMES[command]
    known = [field.name for field in fields(frame)]
    with naming(path, content):
        if unknown := [key for key in config if key not in known]:
            raise ConfigError(f"its config has an unknown setting {unknown[0]!r}; use another checkpoint")
        try:
            defaults = OmegaConf.load(CONF / f"{command}.yaml")
            newer = {key: value for key, value in defaults.items() if key in known and key not in config}
            cfg: Any = OmegaConf.merge(OmegaConf.structured(frame), newer, as_data(config))
        except OmegaConfBaseException as error:
            raise ConfigError(f"its config is not usable: {first_line(error)} ({error.full_key})") from None
        check(cfg, command, trusted=trusted, nodes=nodes)
    return cfg


def as_data(value: Any) -> Any:
    """Plain values, in which OmegaConf has nothing to resolve: a `${...}` could read environment variables.

    Raises:
        ConfigError: for such a value. metarun writes configs with all values resolved.
    """
    if isinstance(value, dict):
        return {key: as_data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_data(item) for item in value]
    if isinstance(value, str) and "${" in value:
        raise ConfigError(f"its config contains {value!r}, which is not a value; use another checkpoint")
    return value


def rebuild(
    content: Mapping[str, Any], settings: TrainConfig, hardware: Hardware, path: Path
) -> tuple[Algorithm, Dataset, TaskSpec]:
    """Rebuild the algorithm and the dataset of a checkpoint.

    Args:
        content: the content of the checkpoint file.
        settings: its checked settings (`config_of`), or an adjusted copy of them.
        hardware: the device, the precision and the batching.
        path: of the file, for messages.

    Returns:
        The algorithm with its weights, the dataset, and the kind of tasks that it was trained on.

    Raises:
        CheckpointError: if the settings do not fit each other, or the weights do not fit the settings.
    """
    weights = content["algorithm"]
    most = BUILDING + sum(tensor.numel() for tensor in weights.values())
    try:
        with naming(path, content):
            dataset = restored_dataset(content, settings.dataset)
            about = content.get("description")  # None in older checkpoints, and where there are none
            described = tuple(about) if about else dataset.spec.description
            spec = replace(dataset.spec, classes=content["classes"], description=described)
            with Limited(most), without_bounds():
                algorithm = build_algorithm(settings, spec, hardware)
    except MetarunError:
        raise
    except Exception as error:  # a config that is no longer that of the run may fail anywhere
        raise CheckpointError(f"{path}: its config cannot be used ({first_line(error)})") from error
    try:
        algorithm.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).split("\n")[1].strip() if "\n" in str(error) else str(error)
        raise CheckpointError(
            f"{path}: its weights do not fit its config ({reason}); use another checkpoint or train again"
        ) from None
    check_weights(algorithm, path)
    return algorithm, dataset, spec


def restored_dataset(content: Mapping[str, Any], node: Node) -> Dataset:
    """A dataset with the files that a checkpoint kept, see `Dataset.files`. Raises ConfigError, DataError."""
    files = content.get("files") or {}
    if not isinstance(files, dict) or not all(
        isinstance(each, str) for pair in files.items() for each in pair
    ):
        raise ConfigError("its files are damaged; use another checkpoint")
    return build_dataset(node).with_files(files)


BUILDING = 10_000_000  # elements of a tensor that building a network may need beside its weights


class Limited(TorchFunctionMode):
    """A context that refuses a tensor with more than `most` elements, before its memory is filled.

    A network is not larger than its weights in the checkpoint. Otherwise a number in a config could exhaust
    the memory of the machine.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and made.numel() > self.most:
            raise ConfigError(
                "its config describes a larger network than its weights; use another checkpoint"
            )
        return made


def restore_state(trainer: Trainer | Followers, state: dict[str, Any], path: Path | None) -> None:
    """Restore the state of a training. Raises CheckpointError if it does not fit the checkpoint's config."""
    try:
        trainer.load_state(state)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: its state does not fit its config ({first_line(error)}); use another checkpoint"
        ) from error


def start_from(algorithm: Algorithm, path: Path, content: Mapping[str, Any]) -> str:
    """Load the backbone of a checkpoint into the backbone of an algorithm (`init=`).

    Weights are matched by order, not by name, since an algorithm may insert layers into its backbone. Running
    averages are copied if both backbones have them.

    Args:
        algorithm: the algorithm whose backbone is changed.
        path: of the checkpoint, for messages.
        content: the content of the checkpoint.

    Returns:
        A description of the origin of the weights, for a message.

    Raises:
        ConfigError: if the backbones do not match.
    """
    backbone = algorithm.own_backbone()
    if backbone is None:
        name = type(algorithm).__name__
        raise ConfigError(f"init={path}: algorithm={name} has no backbone; leave init out")
    choices = content["choices"]
    run = f"{choices.get('algorithm')} on {choices.get('dataset')}"
    offered, wanted = backbone_of(content["algorithm"]), dict(backbone.state_dict())
    has, wants = (any(map(is_average, names)) for names in (offered, wanted))
    if wants and not has and (algorithm.frozen or frozen_part(backbone)):
        raise ConfigError(
            f"init={path}: a frozen backbone needs running averages, and the checkpoint ({run}) has none; "
            "choose a run with norm=running"
        )
    if is_normalised(offered) != is_normalised(wanted):
        inputs = "normalised images; set normalise=train, which then takes the numbers of that run"
        if is_normalised(wanted):
            inputs = "images in [0, 1]; set normalise=none"
        raise ConfigError(f"init={path}: its backbone ({run}) was trained on {inputs}")
    if has != wants:
        offered, wanted = ({n: x for n, x in d.items() if not is_average(n)} for d in (offered, wanted))
    if [x.shape for x in offered.values()] != [x.shape for x in wanted.values()]:
        raise ConfigError(
            f"init={path}: its backbone ({choices.get('backbone')}, {run}) does not fit this one; "
            "choose the backbone, its settings and the image size of that run (algorithm=cavia and "
            "maml_plus_plus change their backbone)"
        )
    backbone.load_state_dict(dict(zip(wanted, offered.values(), strict=True)), strict=False)
    check_weights(backbone, path)
    return f"backbone of {run}, iteration {content.get('iteration', '?')}"


def backbone_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the backbone in the state of an algorithm, by the names in the backbone."""
    names = {name: name.removeprefix("learner.") for name in state}
    return {
        own.removeprefix("backbone."): state[name]
        for name, own in names.items()
        if own.startswith("backbone.")
    }


def is_normalised(state: Mapping[str, Tensor]) -> bool:
    """Whether the state of a backbone has the numbers of `normalise=`."""
    return any(name.rpartition(".")[2] == "deviation" for name in state)


def is_average(name: str) -> bool:
    """Whether a tensor in the state of a backbone belongs to running averages."""
    return name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
