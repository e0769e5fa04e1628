"""The cache folder as a whole: its entries listed, verified and removed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from metarun.errors import DataError
from metarun.storage.archives import tree_digest
from metarun.storage.cached_arrays import Metadata, metadata_path, read_metadata
from metarun.storage.files import add_bytes, cache_dir
from metarun.storage.locks import locked


@dataclass(frozen=True)
class CacheEntry:
    """One entry of the cache (bytes or an extracted archive), or what a killed process left of one."""

    path: Path  # which need not exist: its metadata is written first
    size: int  # bytes
    metadata: Metadata
    made: float  # when, in seconds since the epoch
    stale: str = ""  # why it is no longer needed; empty if it may be

    @property
    def dataset(self) -> str:
        return self.metadata["dataset"]

    @property
    def split(self) -> str:
        """The split of the dataset that it holds, "all" or "unpacked"."""
        return self.metadata["split"]


def cache_entries(dataset: str | None = None, root: str | None = None) -> list[CacheEntry]:
    """The entries of the cache, sorted by name. Files without metarun's metadata are not among them.

    Args:
        dataset: only entries of this dataset; None: of all.
        root: only entries made from this path or from files below it; None: from any.

    Raises:
        DataError: the cache folder is a file.
    """
    if cache_dir().exists() and not cache_dir().is_dir():
        raise DataError(f"{cache_dir()} is a file: set the variable METARUN_CACHE to a folder")
    files = sorted(cache_dir().glob("*.json")) if cache_dir().is_dir() else []
    found = [entry for file in files if (entry := _entry(file)) and dataset in (None, entry.dataset)]
    newest: dict[str, float] = {}
    for entry in found:
        key = entry.metadata["key"]
        newest[key] = max(newest.get(key, 0.0), entry.made)
    found = [replace(entry, stale=_stale(entry, newest)) for entry in found]
    return [entry for entry in found if root is None or _is_below(entry.metadata["source"], root)]


def _is_below(path: str, root: str) -> bool:
    above = os.path.abspath(os.path.expanduser(root))
    return path == above or path.startswith(os.path.join(above, ""))


def _entry(file: Path) -> CacheEntry | None:
    """The entry whose metadata is in `file`; None if it is another program's file."""
    path = file.with_name(file.name.removesuffix(".json"))
    metadata = read_metadata(path)
    if metadata is None or path.is_symlink():
        return None
    try:
        files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
        return CacheEntry(path, sum(each.stat().st_size for each in files), metadata, file.stat().st_mtime)
    except OSError:  # removed at this moment, by another process
        return None


def _stale(entry: CacheEntry, newest: dict[str, float]) -> str:
    """Why an entry is no longer needed; empty if it may be."""
    source, key = entry.metadata["source"], entry.metadata["key"]
    if entry.path.name.startswith(".") or not entry.path.exists():
        return "left by a run that was stopped"
    if source and not os.path.exists(source):
        return f"{source} is gone"
    if key and entry.made < newest[key]:
        return "the files have changed since"
    return ""


def damage(entry: CacheEntry, advance: Callable[[int], object] = lambda count: None) -> str:
    """Compare an entry, byte for byte, with the SHA-256 sum in its metadata.

    Args:
        entry: the entry to verify.
        advance: `advance(n)` is called after every n bytes.

    Returns:
        What is wrong: why it is stale, or "damaged: ..."; empty if nothing is.
    """
    if entry.stale:
        return entry.stale
    try:
        found = _digest(entry.path, advance)
    except OSError as error:
        return f"damaged: it cannot be read ({error.strerror})"
    right = str(entry.metadata.get("sha256"))
    return (
        "" if found == right else f"damaged: its sha256 sum is {found[:12]}..., recorded was {right[:12]}..."
    )


def _digest(path: Path, advance: Callable[[int], object]) -> str:
    if path.is_dir():
        return tree_digest(path, contents=True, advance=advance)
    digest = hashlib.sha256()
    add_bytes(digest, path, advance)
    return digest.hexdigest()


def remove(entry: CacheEntry) -> bool:
    """Remove an entry and its metadata, unless another process is working on it.

    The lock file stays, for another process may wait for it.

    Returns:
        Whether the entry was removed.

    Raises:
        DataError: a file cannot be removed.
    """
    try:
        with locked(entry.path.with_name(entry.metadata["entry"])) as alone:
            if alone:
                if entry.path.is_dir():
                    shutil.rmtree(entry.path)
                else:
                    entry.path.unlink(missing_ok=True)
                metadata_path(entry.path).unlink(missing_ok=True)  # last: it says whose the entry is
    except OSError as error:
        where = error.filename or entry.path
        raise DataError(f"{where}: cannot be removed ({error.strerror}); remove it yourself") from error
    return alone
