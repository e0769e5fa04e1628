"""Checkpoint files: plain containers and tensors, written atomically, loaded with weights_only=True."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

import metarun
from metarun.errors import CheckpointError
from metarun.storage.files import atomic_write, user_path

FORMAT = 3  # the version of the format, incremented when older checkpoints can no longer be read


def save(path: Path, content: Mapping[str, Any], kind: str = "run") -> None:
    """Write a checkpoint atomically.

    Args:
        path: the file, which is replaced if it exists.
        content: plain containers and tensors.
        kind: a key of `KINDS`.
    """
    marked = {"format": FORMAT, "metarun": metarun.__version__, "kind": kind, **content}
    atomic_write(path, lambda file: torch.save(marked, file))


# The entries that are needed and their types; a checkpoint of a run also has those of `TRAINING`.
ENTRIES: dict[str, Any] = {"kind": str, "config": dict, "choices": dict, "algorithm": dict}
TRAINING: dict[str, Any] = {
    "iteration": int,
    "seconds": float,
    "classes": (int, NoneType),
    "description": (list, NoneType),  # older ones have none
    "best": (dict, NoneType),
    "overrides": list,
    "optimizer": dict,
    "scheduler": (dict, NoneType),
    "random": Tensor,
    "cuda_random": (Tensor, NoneType),
    "running_totals": Tensor,
    "tasks": int,
}
ADAPTED: dict[str, Any] = {
    "classes": list,
    "trained_classes": (int, NoneType),
    "description": (list, NoneType),
    "transductive": bool,
    "support": Tensor,
    "ink": str,
    "preparation": (dict, NoneType),
}
STREAM: dict[str, Any] = {"done": int, "learners": dict, "random": Tensor, "data": str}
# Entries without tensors, and the most values in one and their depth: no real config comes near.
PLAIN = (
    *("config", "choices", "classes", "description", "best", "overrides", "iteration", "seconds", "tasks"),
    *("trained_classes", "ink", "preparation", "done", "data"),
)
MOST_VALUES, MOST_LEVELS = 100_000, 30
MOST_TEXT = 10_000_000  # characters; the means of vectors in 17 languages (`dataset.learned`) have 200,000


def load(path: Path, kind: str = "run") -> dict[str, Any]:
    """Read a checkpoint file.

    Args:
        path: the file.
        kind: the kind of checkpoint that is needed, a key of `KINDS`.

    Returns:
        The content, with tensors on the CPU.

    Raises:
        CheckpointError: if the file is missing, damaged, of another format or of another kind.
    """
    try:
        check_bytes(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.load warns about files of other formats; we raise below
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; name a run folder or a .pt file") from None
    except IsADirectoryError:
        raise CheckpointError(
            f"{path}: this is a folder, not a checkpoint file; name a .pt file in it"
        ) from None
    except PermissionError:
        raise CheckpointError(f"{path}: permission denied; make the file readable") from None
    except (
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        ValueError,
        LookupError,
        OSError,
    ):
        raise CheckpointError(f"{path}: damaged, or not a metarun checkpoint; {INSTEAD[kind]}") from None
    if not isinstance(content, dict) or "format" not in content:
        raise CheckpointError(
            f"{path}: a PyTorch file, but not a metarun checkpoint; name a run folder or its .pt file"
        )
    needed = ENTRIES | (
        {"run": TRAINING, "adapted": ADAPTED, "stream": STREAM}[kind] if kind == content.get("kind") else {}
    )
    wrong = sorted(key for key, of in needed.items() if not isinstance(content.get(key), of))
    wrong += [key for key in PLAIN if not is_plain(content.get(key))]
    if not wrong and any(type(size) is not int for size in content.get("description") or []):
        wrong = ["description"]
    if not wrong:
        names = [content["choices"].get(key) for key in ("algorithm", "dataset")]
        texts = {"choices": names, "overrides": content.get("overrides") or []}
        wrong = [key for key, values in texts.items() if not all(isinstance(text, str) for text in values)]
    wrong += [] if wrong or are_weights(content["algorithm"]) else ["algorithm"]
    if content["format"] == FORMAT and wrong:
        raise CheckpointError(
            f"{path}: damaged, or not a metarun checkpoint: it has no usable entry {wrong[0]!r}; "
            + INSTEAD[kind]
        )
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{path}: written by metarun {content.get('metarun')} in checkpoint format {content['format']}; "
            f"this is metarun {metarun.__version__}, which reads format {FORMAT}; install the other version"
        )
    if content["kind"] != kind:
        found = KINDS.get(content["kind"], "another kind of file")
        hint = USE_OF.get(content["kind"], "").format(path)
        raise CheckpointError(f"{path}: this is {found}; name {KINDS[kind]} instead{hint}")
    return content


def is_plain(value: Any) -> bool:
    """Whether a value is text, a number, a truth value, None, or nested lists and dicts of these by name.

    A value that contains itself, or the same value many times, has no end for code that walks through it.
    """
    waiting, seen = [(value, 0)], 0
    while waiting:
        value, level = waiting.pop()
        seen += 1
        if seen > MOST_VALUES or level > MOST_LEVELS:
            return False
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                return False
            value = list(value.values())
        if isinstance(value, (list, tuple)):
            waiting += [(item, level + 1) for item in value[:MOST_VALUES]]
        elif not isinstance(value, (str, int, float, NoneType)) or is_endless(value):
            return False
    return True


def is_endless(value: object) -> bool:
    """Whether a text or a whole number is longer than any that a run has."""
    if isinstance(value, str):
        return len(value) > MOST_TEXT
    return isinstance(value, int) and abs(value) >> 64 > 0


def are_weights(state: Mapping[Any, Any]) -> bool:
    """Whether the values are tensors that are all in the file: a view may repeat a few numbers endlessly."""
    return all(
        isinstance(name, str)
        and isinstance(tensor, Tensor)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
        for name, tensor in state.items()
    )


def broken_weight(module: torch.nn.Module) -> str | None:
    """The name of a parameter that is not finite or of a buffer with a NaN, or None."""
    for name, tensor in module.named_parameters():
        if not tensor.isfinite().all():
            return name
    return next((name for name, tensor in module.named_buffers() if tensor.isnan().any()), None)


def check_weights(module: torch.nn.Module, path: Path) -> None:
    """Raise CheckpointError if a weight that was loaded from a checkpoint is not finite."""
    if name := broken_weight(module):
        raise CheckpointError(
            f"{path}: its weight {name} is not finite, since the training diverged or the file is damaged; "
            "use another checkpoint, or train again with a lower learning rate"
        )


def check_bytes(path: Path) -> None:
    """Verify the checksums of the zip file, which torch.load ignores, and that it has no more bytes unpacked.

    Raises:
        zipfile.BadZipFile: if it is damaged, or would become larger in memory.
    """
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
            raise zipfile.BadZipFile("compressed")
        if (member := archive.testzip()) is not None:
            raise zipfile.BadZipFile(member)


KINDS = {
    "run": "a checkpoint of a training run",
    "adapted": "an adapted model",
    "stream": "a checkpoint of metarun online",
}
INSTEAD = {
    "run": "use another of the run's files or train again",
    "adapted": "adapt again, or name another adapted file",
    "stream": "start the stream again",
}
FOLDERS = {  # by the file that is looked for
    "adapted.pt": "an output folder of metarun adapt",
    "stream.pt": "an output folder of metarun online",
}
# The file of each kind in a folder, the commands that need it, and how to use it instead.
FILE_OF = {"adapted": "adapted.pt", "stream": "stream.pt", "run": "last.pt"}
USE_OF = {
    "adapted": ", or predict with it: metarun predict adapted={} query=...",
    "stream": ", or continue it: metarun online resume={}",
    "run": ", or continue it: metarun train resume={}",
}


def find(
    reference: str, setting: str = "checkpoint", names: tuple[str, ...] = ("best.pt", "last.pt")
) -> Path:
    """The checkpoint file that a setting names.

    Args:
        reference: the value of the setting: a checkpoint file or a run folder.
        setting: the name of the setting, for messages.
        names: the files to look for in a run folder, in this order.

    Raises:
        CheckpointError: if there is no such file or folder, or the folder has none of `names`.
    """
    path = user_path(reference)
    of_run = not set(names).isdisjoint(("best.pt", "last.pt"))
    folder = FOLDERS.get(names[0], "a run folder")
    if not path.exists():
        raise CheckpointError(f"{setting}={reference}: no such checkpoint; name {folder} or a .pt file")
    if not path.is_dir():
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    if of_run and (path / "metrics.jsonl").is_file():
        raise CheckpointError(
            f"{setting}={reference}: the run stopped before its first checkpoint; start it again"
        )
    others = [kind for kind, name in FILE_OF.items() if name not in names and (path / name).is_file()]
    found, hint = f"this folder has no {' or '.join(names)}", ""
    if others:
        found, hint = f"this folder has {KINDS[others[0]]}", USE_OF[others[0]].format(reference)
    raise CheckpointError(f"{setting}={reference}: {found}; name {folder} or a .pt file{hint}")


def to_cpu(value: Any) -> Any:
    """Copy nested containers, with every tensor detached and moved to the CPU, for a checkpoint."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, Mapping):
        return {key: to_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(to_cpu, value))
    return value


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimizer, but keep the options that depend on the machine.

    The state may come from a machine with other hardware.
    """
    machine_options = ("fused", "capturable", "foreach")
    own = [dict(group) for group in optimizer.param_groups]
    groups = [
        saved | {key: group[key] for key in machine_options if key in group}
        for saved, group in zip(state["param_groups"], own, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})
    keep_rate_tensors(optimizer, own)


def keep_rate_tensors(optimizer: Optimizer, before: Sequence[Mapping[str, Any]]) -> None:
    """Move changed learning rates into the tensors that held them before: a captured graph reads these.

    Args:
        optimizer: its groups have the new rates.
        before: the groups with the objects that held the rates before.
    """
    for group, old in zip(optimizer.param_groups, before, strict=True):
        rate = float(group["lr"])
        is_tensor = isinstance(old["lr"], Tensor)
        group["lr"] = old["lr"].fill_(rate) if is_tensor else rate
