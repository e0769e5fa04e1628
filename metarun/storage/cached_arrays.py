"""Entries of the cache folder: bytes or extracted archives, each made once and verified at every use.

Beside every entry NAME is its metadata, NAME.json, which is written before the entry itself. So whatever is
in the cache folder can be recognised as metarun's, also what a killed process left there.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from metarun.errors import DataError
from metarun.storage.archives import tree_digest, unpack
from metarun.storage.files import blaming, cache_dir, encoded, md5_sum, write_json
from metarun.storage.locks import once

Metadata = dict[str, Any]

# An entry that is larger than this may not fit in memory. It is read as it is needed, so at each use only
# some pieces of it are compared with their sum; `metarun data verify=true` compares all of it.
LARGE = 1 << 30
PIECES, PIECE = 64, 1 << 20  # evenly spaced; bytes of each


def memmap_cached(
    name: str, build: Callable[[Callable[[bytes], object]], Metadata], key: str = "", source: str = ""
) -> tuple[torch.Tensor, Metadata]:
    """Bytes of the cache folder, memory-mapped; built if they are missing or damaged.

    Processes that need the same entry at the same time wait for the first one to build it.

    Args:
        name: of the entry, DATASET-SPLIT-DIGEST or DATASET-DIGEST; the digest covers all that the bytes
            depend on.
        build: `build(write)` writes the bytes piece by piece and returns what is to be known of them, as a
            dictionary that JSON can hold.
        key: identifies dataset, split and settings, whatever the input files. Of several entries with one
            key, all but the newest are stale.
        source: path of the input files, without which the entry is stale.

    Returns:
        The bytes, uint8 [bytes]; and the entry's metadata: what `build` returned, the `sha256` sum of the
        bytes, and how the entry was made (see `read_metadata`). Bytes of an entry above `LARGE` must not be
        written to.

    Raises:
        DataError: the cache folder cannot be written, or `build` failed to read a file.
    """
    path = cache_dir() / name

    def make() -> tuple[torch.Tensor, Metadata] | None:
        def produce(staging: Path) -> Metadata:
            return _write(staging, build)

        _replace(path, key, source, produce)
        return _map(path)

    return once(path, lambda: _map(path), make)


def extract_cached(
    archive: Path, dataset: str, on_start: Callable[[], object], md5: str | None = None
) -> Path:
    """The folder of the cache that holds the content of a tar archive; extracted if missing or changed.

    The names and sizes of all files are checked at every use.

    Args:
        archive: the tar archive, compressed or not.
        dataset: the dataset it belongs to.
        on_start: called before the archive is checked and extracted.
        md5: the sum that the archive must have, in hexadecimal; None: any.

    Raises:
        DataError: the archive is damaged, has another sum or a member that is not safe to extract (see
            `archives.unpack`); or the cache folder cannot be written.
    """
    status = archive.stat()
    mark = f"{archive.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    folder = cache_dir() / f"{dataset}-unpacked-{hashlib.sha256(encoded(mark)).hexdigest()[:24]}"

    def load() -> Path | None:
        metadata = read_metadata(folder)
        try:
            return folder if metadata and metadata.get("tree") == tree_digest(folder) else None
        except OSError:
            return None

    def produce(staging: Path) -> Metadata:
        with blaming(folder.parent, "METARUN_CACHE"):
            unpack(archive, staging)
        return {"tree": tree_digest(staging), "sha256": tree_digest(staging, contents=True)}

    def make() -> Path:
        on_start()
        if md5 is not None and (found := md5_sum(archive)) != md5:
            raise DataError(
                f"{archive} has the md5 sum {found}, and the authors' archive {md5}: get it again, or unpack "
                "it yourself and set dataset.root to that folder"
            )
        _replace(folder, f"{dataset} unpacked {archive}", os.path.abspath(archive), produce)
        return folder

    return once(folder, load, make)


def metadata_path(path: Path) -> Path:
    """The file with the metadata of the entry at `path`."""
    return path.with_name(path.name + ".json")


def read_metadata(path: Path) -> Metadata | None:
    """The metadata of the entry at `path`, which need not exist; None if it has none that metarun wrote.

    It has `entry` (the name that the entry has, or was to get), `dataset`, `split`, `key` and `source`, all
    strings; if the entry was finished also `sha256`.
    """
    try:
        metadata = json.loads(metadata_path(path).read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(metadata, dict) or metadata.get("made_by") != "metarun":
        return None
    texts = [metadata.get(field) for field in ("entry", "dataset", "split", "key", "source")]
    if not all(isinstance(text, str) for text in texts):
        return None
    own = path.name == texts[0] or path.name.startswith(f".{texts[0]}.")
    return metadata if own else None


def _replace(path: Path, key: str, source: str, produce: Callable[[Path], Metadata]) -> None:
    """Create or replace an entry with what `produce` writes to the path it gets; whole or not at all."""
    dataset, *split = path.name.split("-")[:-1] or [path.name]
    metadata = {"made_by": "metarun", "entry": path.name, "dataset": dataset}
    metadata |= {"split": "-".join(split) or "all", "key": key, "source": source}
    staging = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with blaming(path.parent, "METARUN_CACHE"):
            for left in path.parent.glob(f".{glob.escape(path.name)}.*tmp*"):  # by a process that was killed
                _delete(left)
            write_json(metadata_path(staging), metadata)
        made = produce(staging)
        with blaming(path.parent, "METARUN_CACHE"):
            write_json(metadata_path(path), made | metadata)  # its sums do not fit an older entry
            if path.is_dir():
                shutil.rmtree(path)
            os.replace(staging, path)
    finally:
        _delete(staging)
        _delete(metadata_path(staging))


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _write(path: Path, build: Callable[[Callable[[bytes], object]], Metadata]) -> Metadata:
    """Write what `build` gives to a file; its metadata and `sha256`. Raises DataError."""
    digest = hashlib.sha256()
    with blaming(path.parent, "METARUN_CACHE"), open(path, "xb") as file:

        def write(piece: bytes) -> None:
            digest.update(piece)
            with blaming(path.parent, "METARUN_CACHE"):
                file.write(piece)

        try:
            made = build(write)
        except OSError as error:  # of what is read, not of what is written
            raise DataError(f"{error.filename or path.name}: {error.strerror or error}") from error
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    sums: Metadata = {"sha256": digest.hexdigest()}
    if size > LARGE:
        sums |= {"size": size, "sample": sample_sum(np.memmap(path, np.uint8, mode="r"))}
    return made | sums


def sample_sum(content: np.ndarray) -> str:
    """The SHA-256 sum of evenly spaced pieces, with the first and the last bytes among them."""
    digest = hashlib.sha256()
    for start in np.linspace(0, max(0, len(content) - PIECE), PIECES).astype(int):
        digest.update(content[start : start + PIECE].data)
    return digest.hexdigest()


def is_intact(content: np.ndarray, metadata: Metadata) -> bool:
    """Whether the bytes are those that were written; of an entry above `LARGE`, some of them."""
    if len(content) > LARGE and "sample" in metadata:
        return len(content) == metadata.get("size") and sample_sum(content) == metadata["sample"]
    return hashlib.sha256(content.data).hexdigest() == metadata.get("sha256")


def _map(path: Path) -> tuple[torch.Tensor, Metadata] | None:
    """The bytes and the metadata of an entry, or None if they are missing or damaged."""
    metadata = read_metadata(path)
    try:
        # "c": changes would stay in memory, which Linux then reserves; more than there is, it refuses.
        content = np.memmap(path, np.uint8, mode="c" if path.stat().st_size <= LARGE else "r")
    except (OSError, ValueError):  # also an empty file, which cannot be mapped
        return None
    if metadata is None or not is_intact(content, metadata):
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(content), metadata
