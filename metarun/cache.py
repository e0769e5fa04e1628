"""What the cache folder holds: listed, verified and removed, one entry at a time."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metarun.archives import tree_digest
from metarun.cli import CONF
from metarun.errors import DataError
from metarun.files import add_bytes, cache_dir
from metarun.locks import lock_path, locked

# What `mapped` and `unpacked` are called by. A stranger's file may be called so too: see `_entry`.
NAME = re.compile(r"(\w+)-(?:.+-)?[0-9a-f]{24}")
LEFT = re.compile(rf"\.({NAME.pattern})(?:\.json)?(?:\.[0-9a-f]{{32}})?\.tmp")


@dataclass(frozen=True)
class Kept:
    """One entry of the cache: bytes or an unpacked archive, with its notes; or what a killed process left."""

    path: Path
    dataset: str
    size: int  # bytes
    notes: dict[str, Any]
    stale: str  # why it is of no more use; empty where it may be
    made: float  # when, in seconds

    @property
    def split(self) -> str:
        """What it holds of the dataset, where its name tells."""
        return "-".join(self.path.name.split("-")[1:-1]) or "all"


def kept(dataset: str | None = None, root: str | None = None) -> list[Kept]:
    """The entries of one dataset, or of all, by name; of those made from files below `root`, where given."""
    if cache_dir().exists() and not cache_dir().is_dir():
        raise DataError(f"{cache_dir()} is a file: set the variable METARUN_CACHE to a folder")
    paths = sorted(cache_dir().iterdir()) if cache_dir().is_dir() else []
    found = [entry for path in paths if (entry := _entry(path)) and dataset in (None, entry.dataset)]
    newest: dict[str, float] = {}
    for entry in found:
        if what := entry.notes.get("what"):
            newest[what] = max(newest.get(what, 0.0), entry.made)
    judged = [_judged(entry, newest) for entry in found]
    return [entry for entry in judged if root is None or _is_below(entry.notes.get("source", ""), root)]


def _is_below(path: str, root: str) -> bool:
    above = os.path.abspath(os.path.expanduser(root))
    return path == above or path.startswith(os.path.join(above, ""))


def _entry(path: Path) -> Kept | None:
    """An entry that metarun surely made: its notes say so, or for a file its lock does."""
    name = NAME.fullmatch(path.name) or LEFT.fullmatch(path.name)
    if name is None or path.is_symlink():
        return None
    notes, dataset = _notes(path), _own_name(path.name).partition("-")[0]
    locks = lock_path(path.with_name(_own_name(path.name)))
    if not notes and not (path.is_file() and dataset in known() and locks.is_file()):
        return None
    try:
        files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
        size = sum(each.stat().st_size for each in files)
        return Kept(path, dataset, size, notes, "", path.stat().st_mtime)
    except OSError:  # removed in this moment, by another process
        return None


def _own_name(name: str) -> str:
    """Of what a stopped process left, the name of what it was to become."""
    left = LEFT.fullmatch(name)
    return left[1] if left else name


def _notes(path: Path) -> dict[str, Any]:
    """An entry's notes; none where they are not what metarun writes."""
    try:
        notes = json.loads(path.with_name(path.name + ".json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    texts = isinstance(notes, dict) and [notes.get(key) for key in ("what", "source")]
    made = isinstance(notes, dict) and any(isinstance(notes.get(key), str) for key in ("sha256", "unpacked"))
    return notes if made and texts and all(isinstance(text, str) for text in texts) and texts[0] else {}


@functools.cache
def known() -> set[str]:
    """The datasets' names."""
    return {path.stem for path in (CONF / "dataset").glob("*.yaml")}


def _judged(entry: Kept, newest: dict[str, float]) -> Kept:
    """The entry, with the reason why it is of no more use."""
    notes = entry.notes
    if entry.path.name.startswith("."):
        why = "left by a run that was stopped"
    elif not notes:
        why = "unfinished, or of an earlier metarun"
    elif notes["source"] and not os.path.exists(notes["source"]):
        why = f"{notes['source']} is gone"
    elif entry.made < newest[notes["what"]]:
        why = "the files have changed since"
    else:
        why = ""
    return replace(entry, stale=why)


def damage(entry: Kept, advance: Callable[[int], object] = lambda count: None) -> str:
    """What is wrong with an entry, byte for byte by its recorded SHA-256 sum; empty where it is whole."""
    if entry.stale:
        return entry.stale
    try:
        found = _digest(entry.path, advance)
    except OSError as error:
        return f"damaged: it cannot be read ({error.strerror})"
    right = str(entry.notes.get("sha256"))
    return (
        "" if found == right else f"damaged: its sha256 sum is {found[:12]}..., recorded was {right[:12]}..."
    )


def _digest(path: Path, advance: Callable[[int], object]) -> str:
    if path.is_dir():
        return tree_digest(path, contents=True, advance=advance)
    digest = hashlib.sha256()
    add_bytes(digest, path, advance)
    return digest.hexdigest()


def remove(entry: Kept) -> bool:
    """Remove an entry and its notes; not while a process is known to work on it.

    DataError where it cannot be.
    """
    place = entry.path.with_name(_own_name(entry.path.name))
    try:
        with locked(place) as alone:
            if alone:
                notes = entry.path.with_name(entry.path.name + ".json")
                notes.unlink(missing_ok=True)  # first: without them the bytes count for nothing
                if entry.path.is_dir():
                    shutil.rmtree(entry.path)
                else:
                    entry.path.unlink(missing_ok=True)
    except OSError as error:
        where = error.filename or entry.path
        raise DataError(f"{where}: cannot be removed ({error.strerror}); remove it yourself") from error
    return alone


def human(size: int) -> str:
    """Bytes for people."""
    amount, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if amount >= 10 or unit == "B" else f"{amount:.1f} {unit}"
