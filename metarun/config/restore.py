"""Rebuilds the objects of a training run from its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from torch import Tensor

from metarun.algorithms.base import Algorithm
from metarun.config.build import build_algorithm, build_dataset
from metarun.config.check import check_node
from metarun.config.schema import TrainConfig
from metarun.datasets.base import Dataset
from metarun.errors import CheckpointError, ConfigError
from metarun.tasks.spec import TaskSpec
from metarun.training.hardware import Hardware


def rebuild(
    content: Mapping[str, Any], settings: TrainConfig, hardware: Hardware, path: Path
) -> tuple[Algorithm, Dataset, TaskSpec]:
    """Rebuild the algorithm and the dataset of a checkpoint.

    The settings are checked like settings from the command line, since a checkpoint must not name a class
    that is not an algorithm, backbone, inner loop or dataset.

    Args:
        content: the content of the checkpoint file.
        settings: its settings, or an adjusted copy of them.
        hardware: the device, the precision and the batching.
        path: of the file, for messages.

    Returns:
        The algorithm with its weights, the dataset, and the kind of tasks that it was trained on.

    Raises:
        ConfigError: if a setting is invalid.
        CheckpointError: if the weights do not fit the config.
    """
    for group in ("dataset", "backbone", "inner_loop", "algorithm"):
        if node := getattr(settings, group):
            check_node(group, OmegaConf.create(node))
    dataset = build_dataset(settings.dataset)
    spec = replace(dataset.spec, classes=content["classes"])
    algorithm = build_algorithm(settings, spec, hardware)
    try:
        algorithm.load_state_dict(content["algorithm"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).split("\n")[1].strip() if "\n" in str(error) else str(error)
        raise CheckpointError(
            f"{path}: its weights do not fit its config ({reason}); use another checkpoint or train again"
        ) from None
    return algorithm, dataset, spec


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
        raise ConfigError(f"init={path}: {type(algorithm).__name__} has no backbone; leave init out")
    choices = content["choices"]
    run = f"{choices.get('algorithm')} on {choices.get('dataset')}"
    offered, wanted = backbone_of(content["algorithm"]), dict(backbone.state_dict())
    has, wants = (any(map(is_average, names)) for names in (offered, wanted))
    if wants and not has and algorithm.frozen:
        raise ConfigError(
            f"init={path}: a frozen backbone needs running averages, and the checkpoint ({run}) has none; "
            "choose a run with norm=running"
        )
    if has != wants:
        offered, wanted = ({n: x for n, x in d.items() if not is_average(n)} for d in (offered, wanted))
    if [x.shape for x in offered.values()] != [x.shape for x in wanted.values()]:
        raise ConfigError(
            f"init={path}: its backbone ({choices.get('backbone')}, {run}) does not fit this one; "
            "choose the backbone, its settings and the image size of that run (algorithm=cavia and "
            "maml_plus_plus change their backbone)"
        )
    backbone.load_state_dict(dict(zip(wanted, offered.values(), strict=True)), strict=False)
    return f"backbone of {run}, iteration {content.get('iteration', '?')}"


def backbone_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of the backbone in the state of an algorithm, by the names in the backbone."""
    names = {name: name.removeprefix("learner.") for name in state}
    return {
        own.removeprefix("backbone."): state[name]
        for name, own in names.items()
        if own.startswith("backbone.")
    }


def is_average(name: str) -> bool:
    """Whether a tensor in the state of a backbone belongs to running averages."""
    return name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
