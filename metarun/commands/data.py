"""`metarun data`: lists datasets, prepares one, and verifies or deletes cached data."""

from __future__ import annotations

import math
import re
import time
from dataclasses import replace
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from metarun.commands.described import describe_tasks
from metarun.config.build import build_dataset, build_source, instantiate
from metarun.config.check import check
from metarun.config.comments import DATASET_FACTS, description, facts
from metarun.config.schema import DataConfig, typed
from metarun.config.targets import trusted_modules
from metarun.errors import ConfigError, DataError, counted
from metarun.reporting import pictures
from metarun.reporting.console import Bar, console, inform, print_line, relative
from metarun.storage import cache
from metarun.storage.files import cache_dir
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import Episodes, EpisodeShape
from metarun.tasks.sampling import sample
from metarun.tasks.source import EpisodeSource

CITATION = re.compile(r" \([^()]*\d{4}[^()]*\)")  # such as " (Finn et al. 2017, section 5.1)"


def run(cfg: DictConfig) -> None:
    """Print the table of datasets, or prepare one; with `verify` or `clean`, maintain cached data."""
    name = HydraConfig.get().runtime.choices["dataset"]
    typed_now = HydraConfig.get().overrides.task
    check(cfg, "data", complete=not (cfg.verify or cfg.clean), typed=typed_now)
    if cfg.verify or cfg.clean:
        return clean(name, root_of(cfg)) if cfg.clean else verify(name)
    command: DataConfig = typed(cfg)
    if not command.dataset:
        console.print(catalogue())
        inform(
            "metarun data dataset=NAME shows the source and the licence of one and prepares it; " + place()
        )
    elif "_target_" not in command.dataset:
        raise ConfigError(
            "dataset: not chosen; name one, as in metarun data dataset=image_folder dataset.root=FOLDER"
        )
    else:
        if path := option_files().get(name):
            describe(path)
        if command.describe:
            hardware = instantiate(command.hardware, "hardware")
            describe_tasks(command, hardware, trusted_modules(cfg), name)
        else:
            prepare(command, name)
    return None


def prepare(command: DataConfig, name: str) -> None:
    """Load the splits of a dataset, count them, and draw a contact sheet and an episode of images."""
    hardware = instantiate(command.hardware, "hardware")
    table = Table(title=name)
    for heading in ("split", "classes", "items", "per class", "shape", "seconds"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    sources: dict[str, EpisodeSource] = {}
    dataset = build_dataset(command.dataset)
    shape = EpisodeShape(command.ways, command.shots, command.queries)
    dataset.check_shape(command.split, shape)  # type: ignore[arg-type]
    for split in dataset.splits():
        began = time.perf_counter()
        sources[split] = build_source(dataset, split, hardware)
        table.add_row(split, *counts(sources[split]), f"{time.perf_counter() - began:.1f}")
        for part, own in sources[split].parts.items():
            table.add_row(f"  {part}", *counts(own), "")
    console.print(table)
    drawn = command.split if command.split in sources else next(iter(sources))
    source = sources[drawn]
    if not any(override.startswith("ways=") for override in HydraConfig.get().overrides.task):
        shape = replace(shape, ways=source.usual_ways(shape.ways))
    inform(place(None if source.parts else name))  # a mixture caches nothing itself
    for line in source.remarks():
        inform(line)
    if isinstance(source, ClassStore) and source.spec.kind == "images":
        draw(source, shape, command.seed, f"{name} {drawn}")
    elif source.readable:
        show(source, shape, command.seed, f"{name} {drawn}")


def verify(dataset: str | None) -> None:
    """Compare every cache entry with its checksum. Raises DataError if any is damaged.

    Args:
        dataset: the dataset whose entries are verified; None: all.
    """
    entries = cache.cache_entries(dataset)
    table = Table(title=f"prepared data of {dataset or 'all datasets'}")
    for heading in ("dataset", "split", "size", "state"):
        table.add_column(heading, overflow="fold")
    bad = 0
    with Bar("verify", sum(entry.size for entry in entries), "bytes") as bar:
        for entry in entries:
            damage = cache.damage(entry, bar.advance)
            bad += damage.startswith("damaged")
            table.add_row(entry.dataset, entry.split, decimal(entry.size), damage or "intact")
    console.print(table)
    inform(place(dataset))
    if bad:
        raise DataError(
            f"{bad} of {len(entries)} cache entries are damaged; they are rebuilt when next used, "
            "or deleted by metarun data dataset=NAME clean=true"
        )


def root_of(cfg: DictConfig) -> str | None:
    """The setting `dataset.root`, or None."""
    return OmegaConf.select(cfg, "dataset.root", throw_on_missing=False) or None


def clean(dataset: str | None, root: str | None = None) -> None:
    """Delete cache entries and print their names.

    Args:
        dataset: delete all entries of this dataset; None: only stale entries, of all datasets.
        root: only delete entries that were built from this path.
    """
    for entry in cache.cache_entries(dataset, root):
        if dataset or entry.stale:
            reason = entry.stale or "requested"
            done = "removed" if cache.remove(entry) else "kept, in use by another run:"
            print_line(f"{done} {entry.path.name}, {decimal(entry.size)} ({reason})")
    inform(place(dataset))


def place(dataset: str | None = None) -> str:
    """The number, size and location of cache entries, for a message."""
    entries = cache.cache_entries(dataset)
    whose = f" of {dataset}" if dataset else ""
    size = decimal(sum(entry.size for entry in entries))
    return f"prepared data{whose}: {counted(len(entries), 'entry', 'entries')}, {size}, in {cache_dir()}"


def option_files() -> dict[str, Path]:
    """The YAML file of each option of the group `dataset`, by name; also of the folder of --config-dir."""
    sources = HydraConfig.get().runtime.config_sources
    folders = [Path(source.path) / "dataset" for source in sources if source.schema == "file"]
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def catalogue() -> Table:
    """A table of all datasets with one line for each, cut to the width of the terminal."""
    table = Table(title="datasets")
    entries, files = cache.cache_entries(), option_files()
    table.add_column("dataset=", no_wrap=True)
    table.add_column("what it is")
    table.add_column("on this disk", no_wrap=True, justify="right")
    for name, path in sorted(files.items()):
        size = sum(entry.size for entry in entries if entry.dataset == name)
        text = CITATION.sub("", description(path))  # the line has no space for it
        table.add_row(
            Text(name), Text(text, no_wrap=True, overflow="ellipsis"), decimal(size) if size else ""
        )
    return table


def describe(path: Path) -> None:
    """Print what the YAML file of a dataset says about it: a description, its source and its licence."""
    stated = facts(path)
    print_line(description(path))
    for name in DATASET_FACTS:
        if name in stated:
            print_line(f"  {name}: {stated[name]}")


def counts(source: EpisodeSource) -> list[str]:
    """Table cells: the numbers of classes, items, and items per class, and the shape of an item."""
    shape = "x".join(map(str, source.spec.item_shape))
    if not (sizes := source.item_counts()):
        return ["", "drawn anew", "", shape]
    least, most = min(sizes), max(sizes)
    each = str(least) if least == most else f"{least} to {most}"
    if not isinstance(source, ClassStore):  # tasks may have items in common
        return [counted(len(sizes), "task"), f"{len(source.items):,}", each, shape]  # type: ignore[attr-defined]
    return [f"{len(source.names):,}", f"{len(source.items):,}", each, shape]


def draw(source: ClassStore, shape: EpisodeShape, seed: int, title: str) -> None:
    """Write two figures: contact.png (ten classes, ten images of each) and episode.png (one task).

    The classes of a mixture are divided equally among its parts.
    """
    source.check(shape)
    folder = Path(HydraConfig.get().runtime.output_dir)
    generator = torch.Generator().manual_seed(seed)
    chosen, first = [], 0
    parts = list(source.parts.values()) or [source]
    for part in parts:
        order = torch.randperm(len(part.names), generator=generator) + first
        chosen += order[: math.ceil(10 / len(parts))].sort().values.tolist()
        first += len(part.names)
    rows = {
        source.names[i]: source.items[source.starts[i] : source.starts[i] + min(int(source.counts[i]), 10)]
        for i in chosen
    }
    pictures.contact_sheet(rows, title, folder / "contact.png")
    episode = sample(source, 1, shape, generator)
    assert isinstance(episode, Episodes) and episode.classes is not None
    names = [source.names[i] for i in episode.classes[0].tolist()]
    support = episode.support_x[0].unflatten(0, (shape.ways, shape.shots))
    query = episode.query_x[0].unflatten(0, (shape.ways, shape.queries))
    examples = {name: torch.cat([support[i], query[i]]) for i, name in enumerate(names)}
    pictures.contact_sheet(
        examples, f"{title}, {source.spec.task_name(shape)}", folder / "episode.png", mark=shape.shots
    )
    inform(f"saved contact.png and episode.png in {relative(folder)}")


def show(source: EpisodeSource, shape: EpisodeShape, seed: int, title: str) -> None:
    """Print the examples of one task as a table."""
    source.check(shape)
    rows = source.examples(source.draw(1, shape, torch.Generator().manual_seed(seed)), shape)
    table = Table(title=Text(f"{title}, {source.spec.task_name(shape)}"))
    for heading in rows[0]:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row.values()))
    console.print(table)
