"""From a checkpoint back to the objects that it was saved from."""

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
from metarun.errors import CheckpointError, ConfigError
from metarun.tasks.spec import TaskSpec
from metarun.training.hardware import Hardware


def rebuild(
    content: Mapping[str, Any], settings: TrainConfig, hardware: Hardware, path: Path
) -> tuple[Algorithm, TaskSpec]:
    """The algorithm of a checkpoint, and the kind of tasks that it was trained on.

    Its settings are checked like typed ones: a checkpoint must not name a class that is not an algorithm,
    backbone, inner loop or dataset.

    Args:
        content: what the checkpoint file holds.
        settings: the settings in it, or an adjusted copy of them.
        hardware: where to compute.
        path: of the file, for messages.
    """
    for group in ("dataset", "backbone", "inner_loop", "algorithm"):
        if node := getattr(settings, group):
            check_node(group, OmegaConf.create(node))
    spec = replace(build_dataset(settings.dataset).spec, classes=content["classes"])
    algorithm = build_algorithm(settings, spec, hardware)
    try:
        algorithm.load_state_dict(content["algorithm"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).split("\n")[1].strip() if "\n" in str(error) else str(error)
        raise CheckpointError(f"{path}: its weights do not fit its config ({reason})") from None
    return algorithm, spec


def start_from(algorithm: Algorithm, path: Path, content: Mapping[str, Any]) -> str:
    """Give an algorithm's backbone the weights of a checkpoint's backbone.

    Weights are matched by their order, since a method may insert layers of its own. Running averages
    are copied where both backbones have them.

    Returns:
        Where the weights come from, for a message.
    """
    backbone = algorithm.own_backbone()
    if backbone is None:
        raise ConfigError(f"init={path}: {type(algorithm).__name__} has no backbone to start with it")
    choices = content["choices"]
    run = f"{choices.get('algorithm')} on {choices.get('dataset')}"
    offered, wanted = backbone_of(content["algorithm"]), dict(backbone.state_dict())
    has, wants = (any(map(is_average, names)) for names in (offered, wanted))
    if wants and not has and algorithm.frozen:
        raise ConfigError(f"init={path}: a frozen backbone needs running averages, and it has none ({run})")
    if has != wants:
        offered, wanted = ({n: x for n, x in d.items() if not is_average(n)} for d in (offered, wanted))
    if [x.shape for x in offered.values()] != [x.shape for x in wanted.values()]:
        raise ConfigError(
            f"init={path}: its backbone ({choices.get('backbone')}, {run}) does not fit this one; "
            "choose the backbone, its settings and the image size of that run (algorithm=cavia and "
            "maml_plus_plus change theirs)"
        )
    backbone.load_state_dict(dict(zip(wanted, offered.values(), strict=True)), strict=False)
    return f"backbone of {run}, iteration {content.get('iteration', '?')}"


def backbone_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's part of an algorithm's state."""
    names = {name: name.removeprefix("learner.") for name in state}
    return {
        own.removeprefix("backbone."): state[name]
        for name, own in names.items()
        if own.startswith("backbone.")
    }


def is_average(name: str) -> bool:
    """Whether a tensor of a backbone's state is a running average, or counts what went into one."""
    return name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
