"""Checkpoints: plain containers and tensors, written atomically, loaded with weights_only=True."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import metarun
from metarun.errors import CheckpointError
from metarun.storage.files import atomic_write

FORMAT = 3  # raised when older checkpoints can no longer be read


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
    if content["format"] == FORMAT and not content.keys() >= {"kind", "config", "choices", "algorithm"}:
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


def to_cpu(value: Any) -> Any:
    """Nested containers with every tensor detached and on the CPU, as saved checkpoints hold them."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_cpu, value))
    return value
