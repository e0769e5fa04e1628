"""Images in class folders, in folders or zips: decoded once, into a memory-mapped cache."""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from PIL.Image import Image
from torch import Tensor

from metarun.datasets import images
from metarun.datasets.base import ImageDataset
from metarun.datasets.preparation import Preparation
from metarun.errors import DataError, counted
from metarun.reporting.console import Bar, inform
from metarun.storage.archives import Archive
from metarun.storage.cached_arrays import LARGE, Metadata, memmap_cached
from metarun.storage.files import encoded, read_regular, user_path
from metarun.tasks.class_store import ClassStore, hashes_of, marks_of

BLOCK = 256  # images decoded before they are written: bounds the memory
VERSION = 3  # of the decoding: with another one, images are decoded again


class Entry(NamedTuple):
    """One file, in a folder or in a zip."""

    parts: tuple[str, ...]  # its path below the root, a zip counting as a folder
    path: Path  # of the file, or of its zip
    archive: Archive | None = None
    member: str = ""  # its name in the zip

    def __str__(self) -> str:
        return f"{self.path}: {self.member}" if self.archive else str(self.path)

    def read(self) -> bytes:
        """The file's content. Raises DataError."""
        if self.archive:
            return self.archive.read(self.member)
        try:
            return read_regular(self.path)
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be read ({error.strerror}); replace or remove it"
            ) from error

    @contextmanager
    def opened(self) -> Iterator[Image]:
        """The image in this file, see `images.opened`. Raises DataError."""
        with images.opened(io.BytesIO(self.read()), str(self)) as image:
            yield image

    @property
    def own_name(self) -> tuple[str, ...]:
        """The names of its folder and of itself: they do not depend on where a zip was unpacked."""
        return self.parts[-2:]


def entries(root: Path) -> list[Entry]:
    """Every file in a zip or below a folder, also in zips there, sorted by path.

    Of files that are there twice, packed and unpacked, one is left. Raises DataError if there are no files.
    """
    if not root.exists():
        raise DataError(f"dataset.root={root}: no such folder or zip")
    if root.is_file() and root.suffix.lower() != ".zip":
        raise DataError(f"dataset.root={root}: is neither a folder nor a zip")
    every = _in_zip(root, ()) if root.is_file() else _below(root, (), set())
    found = sorted(every, key=_order)
    if not found:
        raise DataError(f"dataset.root={root}: has no files")
    return once_each(found)


def classes_of(
    files: list[Entry], above: int, root: Path, depth: int, setting: str = "dataset.depth"
) -> dict[str, list[Entry]]:
    """The files of each class, by its name, sorted; a message says if class folders contain folders.

    Args:
        files: all files below `root`.
        above: how many folders are above all classes.
        root: the folder or zip.
        depth: how many folders down from there the class folders are; a class's name is the path to it.
        setting: what sets the depth, for the message.

    Raises:
        DataError: a file is not in a class folder, or a class folder has no files.
    """
    first, last = above, above + depth
    classes: dict[str, list[Entry]] = {}
    for entry in files:
        if len(entry.parts) <= last:
            raise DataError(f"{entry}: is beside the class folders; move it into one, or away")
        classes.setdefault("/".join(entry.parts[first:last]), []).append(entry)
    for folder in {root.joinpath(*entry.parts[: last - 1]) for entry in files}:
        for path in images.visible(folder) if folder.is_dir() else []:
            if path.is_dir() and "/".join(path.relative_to(root).parts[first:]) not in classes:
                raise DataError(f"{path}: this class has no images; add some or remove the folder")
    inner = {entry.parts[: last + 1] for entry in files if len(entry.parts) > last + 1}
    direct = any(len(entry.parts) == last + 1 for entry in files)
    if inner and (direct or len(inner) > len(classes)):  # not a zip for each class that contains its folder
        deeper = f"; {setting}={depth + 1} makes the {len(inner):,} inner folders classes"
        inform(
            f"{root}: {counted(len(classes), 'class', 'classes')}, whose folders contain folders such as "
            f"{'/'.join(min(inner))}{'' if direct else deeper}"
        )
    return dict(sorted(classes.items()))


def support_files(folder: Path, depth: int) -> dict[str, list[Path]]:
    """The files of each class of a task, by the rule of `classes_of`.

    Raises DataError if a task cannot be made of them.
    """
    classes = classes_of(loose_files(folder), 0, folder, depth, "depth")
    if len(classes) < 2:
        raise DataError(f"{folder}: has {counted(len(classes), 'class folder')}; at least 2 are needed")
    return {name: [entry.path for entry in own] for name, own in classes.items()}


def known_labels(labels: Sequence[int | None]) -> Tensor:
    """Class numbers [1, files], -1 where none is known."""
    return torch.tensor([[-1 if label is None else label for label in labels]])


def query_files(folder: Path, classes: Sequence[str], depth: int) -> tuple[list[Path], list[int | None]]:
    """The images to predict, and the index of each one's class, None where no folder names it.

    Args:
        folder: an image, or a folder of images, of class folders named as those of the support, or of both.
        classes: the names of the support's classes.
        depth: how many folders make a class, see `classes_of`.

    Raises:
        DataError: a folder is not named after a class, or there are no images.
    """
    if folder.is_file():
        return [folder], [None]
    files = loose_files(folder)
    labels: list[int | None] = []
    for entry in files:
        name = "/".join(entry.parts[:-1][:depth])
        if name and name not in classes:
            raise DataError(
                f"{folder / name}: is not a class of the support ({', '.join(classes)}); "
                "rename it, or put its images directly into the query folder"
            )
        labels.append(list(classes).index(name) if name else None)
    return [entry.path for entry in files], labels


def loose_files(folder: Path) -> list[Entry]:
    """Every file below a folder, sorted by path. Raises DataError if there is none, and for a zip."""
    images.require_folder(folder)
    files = sorted(_below(folder, (), set()), key=_order)
    if not files:
        raise DataError(f"{folder}: has no images; name an image, or a folder with images in it or below it")
    if packed := [entry for entry in files if entry.archive]:
        raise DataError(f"{packed[0].path}: is an archive; extract it")
    return files


def once_each(files: list[Entry]) -> list[Entry]:
    """The files without those of a zip that are also in a folder or in another zip.

    A task's support and query must not share an image. Two files are the same if their folders' names,
    their names, sizes and CRC-32 checksums are.
    """
    packed = [entry for entry in files if entry.archive]
    if not packed:
        return files
    kept = [entry for entry in files if not entry.archive]
    loose: dict[tuple[str, ...], list[Entry]] = {}
    for entry in kept:
        loose.setdefault(entry.own_name, []).append(entry)
    first: dict[tuple[object, ...], Entry] = {}  # the first packed file with some name and checksum
    twice: dict[Path, list[Path]] = {}  # by zip, where else its files are
    for entry in packed:
        stamp = entry.archive.stamp(entry.member)  # type: ignore[union-attr]
        twin = next((each for each in loose.get(entry.own_name, []) if _has(each, stamp)), None)
        twin = twin or first.setdefault((entry.own_name, stamp), entry)
        if twin.archive is entry.archive:
            kept.append(entry)
        else:
            twice.setdefault(entry.path, []).append(twin.path)
    for path, twins in twice.items():
        inform(f"{path}: {len(twins):,} of its files are also elsewhere ({twins[0]}), and counted once")
    return sorted(kept, key=_order) if twice else files


def _has(entry: Entry, stamp: tuple[int, int]) -> bool:
    """Whether `stamp` is the file's size and CRC-32 checksum."""
    try:
        return os.stat(entry.path).st_size == stamp[0] and zlib.crc32(entry.read()) == stamp[1]
    except (OSError, DataError):
        return False


def _order(entry: Entry) -> tuple[tuple[str, ...], str]:
    return entry.parts, str(entry.path)


def _below(folder: Path, parts: tuple[str, ...], above: set[str]) -> Iterator[Entry]:
    """The files below a folder. Links to folders are followed, unless they lead to one of those `above`."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as listing:
        found = [each for each in listing if images.is_visible(each.name)]
    for each in found:
        path = folder / each.name
        if os.path.isdir(each) if each.is_symlink() else each.is_dir():
            yield from _below(path, (*parts, each.name), above | {real})
        elif path.suffix.lower() == ".zip":
            yield from _in_zip(path, (*parts, path.stem))
        else:
            yield Entry((*parts, each.name), path)


def _in_zip(path: Path, parts: tuple[str, ...]) -> Iterator[Entry]:
    archive = Archive(path)
    for member in archive.names():
        names = tuple(member.split("/"))
        if all(map(images.is_visible, names)):
            yield Entry((*parts, *names), path, archive, member)


def class_store(
    dataset: ImageDataset,
    title: str,
    classes: Mapping[str, Sequence[Entry]],
    root: Path,
    device: torch.device | str = "cpu",
    cached_as: str = "",
    about: Tensor | None = None,
) -> ClassStore:
    """The images of some classes, decoded into the cache unless the same files are there already.

    Args:
        dataset: says how to decode: item shape, resize, what to do about unreadable files, and so on.
        title: the name of the store in messages, such as "cub train".
        classes: the image files of each class, by name.
        root: the folder or zip that the files are below.
        device: where the images are stored.
        cached_as: the name in the cache, DATASET-SPLIT; by default made of the title.
        about: descriptions of the classes, see `ClassStore`.

    Raises:
        DataError: a file cannot be decoded, or a class has no images.
    """
    files = [entry for name in classes for entry in classes[name]]
    cached_as = cached_as or title.replace(" ", "-")
    source = os.path.abspath(user_path(str(root)))
    settings = f"{VERSION} {dataset.item_shape} {dataset.resize} {dataset.unreadable or 'stop'}"
    settings += " inverted" if dataset.invert else ""
    decoding = dataset.decoding
    if decoding != Preparation(dataset.resize):
        settings += f" {decoding}"
    digest = hashlib.sha256(settings.encode())
    for name, own in classes.items():
        digest.update(encoded(f"\0{name}\0{len(own)}"))
    identity = cache(_identity)  # of a zip with all its images, once
    for entry in files:
        digest.update(encoded(f"\0{entry.member}\0{identity(entry.path)}"))

    def build(write: Callable[[bytes], object]) -> Metadata:
        skipped: list[int] = []  # by number, because two files may have the same path below the root
        hashes: list[Tensor] = []  # of an entry that should not be read again as a whole
        large = len(files) * prod(dataset.item_shape) > LARGE
        with ThreadPoolExecutor(os.cpu_count()) as pool, Bar(f"decode {title}", len(files), "images") as bar:
            run = pool.map if dataset.threaded else map
            for start in range(0, len(files), BLOCK):
                block = files[start : start + BLOCK]
                decoded = list(run(partial(decode, dataset, decoding), block))
                skipped += [number for number, pixels in enumerate(decoded, start) if pixels is None]
                kept = [pixels for pixels in decoded if pixels is not None]
                for pixels in kept:
                    write(pixels)
                if large and kept:
                    items = torch.frombuffer(bytearray().join(kept), dtype=torch.uint8)
                    hashes.append(hashes_of(items.view(len(kept), *dataset.item_shape)))
                bar.advance(len(block))
        if len(skipped) == len(files):
            raise DataError(
                f"{title}: none of its {counted(len(files), 'file')} is an image that can be read"
            )
        if not hashes:
            return {"skipped": skipped}
        parts = torch.cat(hashes).split(kept_counts(classes, set(skipped)))
        return {"skipped": skipped, "marks": marks_of(part for part in parts if len(part)).tolist()}

    what = f"{cached_as} {settings} {source}"
    content, made = memmap_cached(f"{cached_as}-{digest.hexdigest()[:24]}", build, what, source)
    skipped = set(made["skipped"])
    if skipped:
        inform(f"{title}: {counted(len(skipped), 'unreadable file')} left out, such as {files[min(skipped)]}")
    counts = kept_counts(classes, skipped)
    if empty := [name for name, count in zip(classes, counts, strict=True) if not count]:
        raise DataError(f"{title}: class {empty[0]!r} has no images; add some, or remove the class")
    shown = [encoded(name).decode("utf-8", "backslashreplace") for name in classes]
    images = content.view(-1, *dataset.item_shape)
    store = ClassStore(images, counts, shown, title, device, fingerprint=made["sha256"], about=about)
    if "marks" in made:
        store.marks = torch.tensor(made["marks"])
    return store


def kept_counts(classes: Mapping[str, Sequence[Entry]], skipped: set[int]) -> list[int]:
    """The number of images of each class, without those whose numbers are in `skipped`."""
    numbers = iter(range(sum(map(len, classes.values()))))
    return [sum(next(numbers) not in skipped for _ in own) for own in classes.values()]


def note_counts(store: ClassStore, least: int, most: int) -> ClassStore:
    """The store of a known benchmark; print a note if its classes have more or fewer images than there."""
    smallest, largest = store.smallest_class, store.largest_class
    if smallest < least or largest > most:
        there, right = (
            str(low) if low == high else f"{low} to {high}"
            for low, high in ((smallest, largest), (least, most))
        )
        inform(f"{store.name}: {there} images a class here, {right} in the benchmark")
    return store


def _identity(path: Path) -> str:
    """A text that changes when the file is written again."""
    try:
        status = os.stat(path)
    except OSError as error:  # such as a dangling link, which `decode` reports
        return f"{os.path.abspath(path)}\0{error.strerror}"
    return f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}"


def decode(dataset: ImageDataset, decoding: Preparation, entry: Entry) -> bytes | None:
    """An image as C x H x W bytes; None if it cannot be read and may be skipped, else DataError."""
    try:
        image = images.read(io.BytesIO(entry.read()), str(entry))
        pixels = decoding.array(image, dataset.item_shape)
    except DataError as error:
        if dataset.unreadable == "skip":
            return None
        advice = ", or set dataset.unreadable=skip" if dataset.unreadable else ""
        raise DataError(f"{error}{advice}") from error
    return (255 - pixels if dataset.invert else pixels).tobytes()
