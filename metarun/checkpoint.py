"""Checkpoints: plain containers and tensors, written atomically, loaded with weights_only=True."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

import metarun
from metarun.algorithms.base import Algorithm
from metarun.build import build_algorithm
from metarun.config import check_node
from metarun.errors import CheckpointError, ConfigError
from metarun.files import atomic_write
from metarun.hardware import Hardware

FORMAT = 2  # raised when older checkpoints can no longer be read


def save(path: Path, content: Mapping[str, Any], kind: str = "run") -> None:
    """Write plain content to `path`, whole or not at all."""
    marked = {"format": FORMAT, "metarun": metarun.__version__, "kind": kind, **content}
    atomic_write(path, lambda file: torch.save(marked, file))


def load(path: Path, kind: str = "run") -> dict[str, Any]:
    """The content of a checkpoint file, on the CPU. CheckpointError where it cannot be used."""
    try:
        check_bytes(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign files; the error below says it
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; name a run folder or a .pt file") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: is a folder, not a checkpoint file") from None
    except PermissionError:
        raise CheckpointError(f"{path}: cannot be read (permission denied)") from None
    except (
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        ValueError,
        LookupError,
        OSError,
    ):
        raise CheckpointError(
            f"{path}: damaged, or not a metarun checkpoint; use another of the run's files or train again"
        ) from None
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(f"{path}: a PyTorch file, but not a metarun checkpoint")
    if content["format"] == FORMAT and not content.keys() >= {"kind", "config", "algorithm"}:
        raise CheckpointError(f"{path}: damaged, or not a metarun checkpoint: it lacks what one holds")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: written by metarun {content.get('metarun')} in checkpoint format {content['format']}; "
            f"this is metarun {metarun.__version__}, which reads format {FORMAT}; install that version"
        )
    if content["kind"] != kind:
        raise CheckpointError(
            f"{path}: holds {KINDS.get(content['kind'], 'something else')}; {KINDS[kind]} is needed here"
        )
    return content


def check_bytes(path: Path) -> None:
    """Compare the stored checksums, which torch.load does not."""
    with zipfile.ZipFile(path) as archive:
        if (member := archive.testzip()) is not None:
            raise zipfile.BadZipFile(member)


KINDS = {"run": "a training run", "adapted": "an adapted model"}


def find(reference: str, names: tuple[str, ...] = ("best.pt", "last.pt")) -> Path:
    """The checkpoint file a person means: a file, or the first of `names` in a run folder."""
    path = Path(reference).expanduser()
    if not path.is_dir():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    if (path / "metrics.jsonl").is_file():
        raise CheckpointError(f"{path}: this run stopped before its first checkpoint; start it again")
    raise CheckpointError(f"{path}: this folder has no {' or '.join(names)}; name a run folder or a .pt file")


def rebuild(content: dict[str, Any], cfg: DictConfig, hardware: Hardware, path: Path) -> Algorithm:
    """The algorithm of a checkpoint, by the config it carries (or an adjusted copy, `cfg`).

    The config is checked like a typed one: a checkpoint must not name what is no algorithm,
    backbone or dataset.
    """
    for group in ("dataset", "backbone", "inner_loop", "algorithm"):
        if cfg[group]:
            check_node(group, cfg[group])
    algorithm = build_algorithm(cfg, hardware)
    try:
        algorithm.load_state_dict(content["algorithm"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).split("\n")[1].strip() if "\n" in str(error) else str(error)
        raise CheckpointError(f"{path}: its weights do not fit its config ({reason})") from None
    return algorithm


def start_from(algorithm: Algorithm, path: Path, content: Mapping[str, Any]) -> str:
    """Give an algorithm's backbone the weights of a checkpoint's; where they come from, in words.

    Weights are matched by their order, since a method may insert layers of its own. Running averages
    are taken over where both have them.
    """
    backbone: nn.Module | None = getattr(getattr(algorithm, "learner", algorithm), "backbone", None)
    if backbone is None:
        raise ConfigError(f"init={path}: {type(algorithm).__name__} has no backbone to start with it")
    choices = content["config"].get("choices", {})
    run = f"{choices.get('algorithm')} on {choices.get('dataset')}"
    offered, wanted = backbone_of(content["algorithm"]), dict(backbone.state_dict())
    has, wants = (any(map(is_average, names)) for names in (offered, wanted))
    if wants and not has and getattr(algorithm, "frozen", False):
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
    """A backbone's own part of an algorithm's state."""
    names = {name: name.removeprefix("learner.") for name in state}
    return {
        own.removeprefix("backbone."): state[name]
        for name, own in names.items()
        if own.startswith("backbone.")
    }


def is_average(name: str) -> bool:
    """Whether a tensor of a backbone's state is a running average, or counts what went into one."""
    return name.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")


def config_of(content: dict[str, Any]) -> DictConfig:
    return OmegaConf.create(content["config"])


def to_cpu(value: Any) -> Any:
    """Nested containers with every tensor detached and on the CPU, as saved checkpoints hold them."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_cpu, value))
    return value
