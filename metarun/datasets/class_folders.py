"""Images in class folders, in folders or zips: found, decoded once in parallel, memory-mapped ever after."""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from metarun import images
from metarun.archives import Archive
from metarun.entries import memmap_cached
from metarun.episodes import ClassStore
from metarun.errors import DataError
from metarun.files import encoded, read_regular
from metarun.tracking import Bar, notes, say

Fit = Literal["pad", "crop", "stretch"]
Unreadable = Literal["stop", "skip"]
BLOCK = 256  # images decoded before they are written: bounds the memory
VERSION = 2  # counts changes of what is decoded


class Entry(NamedTuple):
    """One file, in a folder or in a zip."""

    parts: tuple[str, ...]  # its path below the root, a zip counting as a folder
    path: Path  # of the file, or of its zip
    archive: Archive | None = None
    member: str = ""  # its name in the zip

    def __str__(self) -> str:
        return f"{self.path}: {self.member}" if self.archive else str(self.path)

    def read(self) -> bytes:
        if self.archive:
            return self.archive.read(self.member)
        try:
            return read_regular(self.path)
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be read ({error.strerror}); replace or remove it"
            ) from error

    @property
    def own_name(self) -> tuple[str, ...]:
        """The file's name and its folder's: what is the same wherever a zip was unpacked to."""
        return self.parts[-2:]


def entries(root: Path) -> list[Entry]:
    """Every file below a folder, also in zips there, or in a zip; sorted. DataError where there is none."""
    if not root.exists():
        raise DataError(f"dataset.root={root}: no such folder")
    if root.is_file() and root.suffix.lower() != ".zip":
        raise DataError(f"dataset.root={root}: is neither a folder nor a zip")
    every = _in_zip(root, ()) if root.is_file() else _below(root, (), set())
    found = sorted(every, key=_order)
    if not found:
        raise DataError(f"dataset.root={root}: has no files")
    return once_each(found)


def once_each(files: list[Entry]) -> list[Entry]:
    """The files without those of a zip that are also beside it, unpacked from it or in a copy of it.

    A task's support and query must not share an image. A file is taken for the same where its folder's
    name, its own, its size and its CRC-32 sum are.
    """
    packed = [entry for entry in files if entry.archive]
    if not packed:
        return files
    kept = [entry for entry in files if not entry.archive]
    loose: dict[tuple[str, ...], list[Entry]] = {}
    for entry in kept:
        loose.setdefault(entry.own_name, []).append(entry)
    first: dict[tuple[object, ...], Entry] = {}  # of the zips
    twice: dict[Path, list[Path]] = {}  # where the same files are, by zip
    for entry in packed:
        stamp = entry.archive.stamp(entry.member)  # type: ignore[union-attr]
        twin = next((each for each in loose.get(entry.own_name, []) if _has(each, stamp)), None)
        twin = twin or first.setdefault((entry.own_name, stamp), entry)
        if twin.archive is entry.archive:
            kept.append(entry)
        else:
            twice.setdefault(entry.path, []).append(twin.path)
    for path, twins in twice.items():
        say(notes, f"{path}: {len(twins):,} of its files are also elsewhere ({twins[0]}), and counted once")
    return sorted(kept, key=_order) if twice else files


def _has(entry: Entry, stamp: tuple[int, int]) -> bool:
    """Whether a file's size and CRC-32 sum are these."""
    try:
        return os.stat(entry.path).st_size == stamp[0] and zlib.crc32(entry.read()) == stamp[1]
    except (OSError, DataError):
        return False


def _order(entry: Entry) -> tuple[tuple[str, ...], str]:
    return entry.parts, str(entry.path)


def _below(folder: Path, parts: tuple[str, ...], above: set[Path]) -> Iterator[Entry]:
    """Links to folders are followed, unless they lead back to where they are."""
    real = folder.resolve()
    if real in above:
        return
    for path in images.visible(folder):
        if path.is_dir():
            yield from _below(path, (*parts, path.name), above | {real})
        elif path.suffix.lower() == ".zip":
            yield from _in_zip(path, (*parts, path.stem))
        else:
            yield Entry((*parts, path.name), path)


def _in_zip(path: Path, parts: tuple[str, ...]) -> Iterator[Entry]:
    archive, unasked = Archive(path), set(images.UNASKED)
    for member in archive.names():
        names = tuple(member.split("/"))
        if "/." not in f"/{member}" and unasked.isdisjoint(names):
            yield Entry((*parts, *names), path, archive, member)


def class_store(
    title: str,
    classes: Mapping[str, Sequence[Entry]],
    root: Path,
    item_shape: tuple[int, int, int],
    device: torch.device | str,
    fit: Fit = "pad",
    unreadable: Unreadable | None = None,
    kept_as: str = "",
) -> ClassStore:
    """The classes' images below `root`, decoded into the cache where these very files are not there yet.

    `unreadable`: stop at a file that is no image (DataError), or leave it out and say so; None: stop, for
    the dataset has no such setting. `kept_as`: what the cache calls them, DATASET-SPLIT; as the title
    where it is empty.
    """
    files = [entry for name in classes for entry in classes[name]]
    kept_as = kept_as or title.replace(" ", "-")
    source = os.path.abspath(root.expanduser())
    settings = f"{VERSION} {item_shape} {fit} {unreadable or 'stop'}"
    digest = hashlib.sha256(settings.encode())
    for name, own in classes.items():
        digest.update(encoded(f"\0{name}\0{len(own)}"))
    identity = cache(_identity)  # of a zip with all its images, once
    for entry in files:
        digest.update(encoded(f"\0{entry.member}\0{identity(entry.path)}"))

    def build(write: Callable[[bytes], object]) -> dict[str, list[int]]:
        skipped: list[int] = []  # by number, for two files may have one path below the root
        with ThreadPoolExecutor(os.cpu_count()) as pool, Bar(f"decode {title}", len(files), "images") as bar:
            for start in range(0, len(files), BLOCK):
                block = files[start : start + BLOCK]
                decoded = pool.map(lambda one: decode(one, item_shape, fit, unreadable), block)
                for number, pixels in enumerate(decoded, start):
                    if pixels is None:
                        skipped.append(number)
                    else:
                        write(pixels)
                bar.advance(len(block))
        if len(skipped) == len(files):
            raise DataError(f"{title}: none of its {len(files)} files is an image that can be read")
        return {"skipped": skipped}

    what = f"{kept_as} {settings} {source}"
    bytes_, made = memmap_cached(f"{kept_as}-{digest.hexdigest()[:24]}", build, what, source)
    skipped = set(made["skipped"])
    if skipped:
        say(notes, f"{title}: {len(skipped)} unreadable files left out, such as {files[min(skipped)]}")
    numbers = iter(range(len(files)))
    counts = [sum(next(numbers) not in skipped for _ in own) for own in classes.values()]
    if empty := [name for name, count in zip(classes, counts, strict=True) if not count]:
        raise DataError(f"{title}: class {empty[0]!r} has no images; add some, or take the class out")
    shown = [encoded(name).decode("utf-8", "backslashreplace") for name in classes]
    return ClassStore(bytes_.view(-1, *item_shape), counts, shown, title, device, fingerprint=made["sha256"])


def tell_counts(store: ClassStore, least: int, most: int) -> ClassStore:
    """The store of a known benchmark, and a note where it has more or fewer images a class than that."""
    smallest, largest = store.smallest_class, store.largest_class
    if smallest < least or largest > most:
        there, right = (
            str(low) if low == high else f"{low} to {high}"
            for low, high in ((smallest, largest), (least, most))
        )
        say(notes, f"{store.name}: {there} images a class here, {right} in the benchmark")
    return store


def _identity(path: Path) -> str:
    """Changes when the file is written again."""
    try:
        status = os.stat(path)
    except OSError as error:  # such as a link to nowhere, which `decode` names
        return f"{os.path.abspath(path)}\0{error.strerror}"
    return f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}"


def decode(
    entry: Entry, item_shape: tuple[int, int, int], fit: Fit, unreadable: Unreadable | None
) -> bytes | None:
    """An image as channels x height x width bytes; None where it may be skipped."""
    try:
        image = images.read(io.BytesIO(entry.read()), str(entry))
    except DataError as error:
        if unreadable == "skip":
            return None
        raise DataError(f"{error}, or set dataset.unreadable=skip" if unreadable else str(error)) from error
    channels, height, width = item_shape
    pixels = images.fit(image.convert("L" if channels == 1 else "RGB"), height, width, fit)
    return (pixels if channels == 1 else pixels.transpose(2, 0, 1)).tobytes()
