"""What the cache folder holds: listed, verified and removed, one entry at a time."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metarun.files import CHUNK, cache_dir, locked

# What `mapped` and `unpacked` are called by: nothing else in the folder is ever touched.
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

    @property
    def split(self) -> str:
        """What it holds of the dataset, where its name tells."""
        return "-".join(self.path.name.split("-")[1:-1]) or "all"


def kept(dataset: str | None = None) -> list[Kept]:
    """The entries of one dataset, or of all, by name."""
    if not cache_dir().is_dir():
        return []
    found = []
    for path in sorted(cache_dir().iterdir()):
        name = NAME.fullmatch(path.name) or LEFT.fullmatch(path.name)
        if name and not path.is_symlink():
            own = name[1] if NAME.fullmatch(path.name) else name[2]
            if dataset in (None, own):
                found.append(_entry(path, own))
    newest: dict[str, float] = {}
    for entry in found:
        if what := entry.notes.get("what"):
            newest[what] = max(newest.get(what, 0.0), entry.path.stat().st_mtime)
    return [_judged(entry, newest) for entry in found]


def _entry(path: Path, dataset: str) -> Kept:
    try:
        notes = json.loads(path.with_name(path.name + ".json").read_text("utf-8"))
    except (OSError, ValueError):
        notes = {}
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    size = sum(each.stat().st_size for each in files)
    return Kept(path, dataset, size, notes if isinstance(notes, dict) else {}, "")


def _judged(entry: Kept, newest: dict[str, float]) -> Kept:
    """The entry, with the reason why it is of no more use."""
    notes = entry.notes
    if entry.path.name.startswith("."):
        why = "left by a run that was stopped"
    elif not notes.get("what"):
        why = "unfinished, or of an earlier metarun"
    elif notes["source"] and not os.path.exists(notes["source"]):
        why = f"{notes['source']} is gone"
    elif entry.path.stat().st_mtime < newest[notes["what"]]:
        why = "the files have changed since"
    else:
        why = ""
    return Kept(entry.path, entry.dataset, entry.size, notes, why)


def damage(entry: Kept, advance: Callable[[int], object] = lambda count: None) -> str:
    """What is wrong with an entry, byte for byte by its recorded SHA-256 sum; empty where it is whole."""
    if entry.stale:
        return entry.stale
    if entry.path.is_dir():
        return ""  # an unpacked archive, whose images are decoded once only
    digest = hashlib.sha256()
    with open(entry.path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk))
    found, right = digest.hexdigest(), str(entry.notes.get("sha256"))
    return (
        "" if found == right else f"damaged: its sha256 sum is {found[:12]}..., recorded was {right[:12]}..."
    )


def remove(entry: Kept) -> bool:
    """Remove an entry and its notes; not while a process works on it."""
    name = entry.path.name if NAME.fullmatch(entry.path.name) else LEFT.fullmatch(entry.path.name)[1]  # type: ignore[index]
    with locked(entry.path.with_name(name)) as alone:
        if alone:
            notes = entry.path.with_name(entry.path.name + ".json")
            notes.unlink(missing_ok=True)  # first: without them the bytes count for nothing
            if entry.path.is_dir():
                shutil.rmtree(entry.path)
            else:
                entry.path.unlink(missing_ok=True)
            entry.path.with_name(f".{name}.lock").unlink(missing_ok=True)
    return alone


def human(size: int) -> str:
    """Bytes for people."""
    amount, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if amount < 1000:
            break
        amount, unit = amount / 1000, larger
    return f"{amount:.0f} {unit}" if amount >= 10 or unit == "B" else f"{amount:.1f} {unit}"
