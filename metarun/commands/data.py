"""`metarun data`: what datasets there are; one prepared ahead of time and looked at."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.table import Table

from metarun import plots
from metarun.build import build_hardware, build_source
from metarun.config import check
from metarun.episodes import SPLITS, ClassStore, EpisodeSource, Geometry, sample
from metarun.errors import ConfigError
from metarun.files import cache_dir
from metarun.tracking import console, notes, relative, say


def run(cfg: DictConfig) -> None:
    """The table of datasets, or one dataset's splits and pictures."""
    check(cfg, "data")
    if cfg.split not in SPLITS:
        raise ConfigError(f"split={cfg.split}: must be one of {', '.join(SPLITS)}")
    if not cfg.dataset:
        console.print(catalogue())
        say(notes, "metarun data dataset=NAME prepares one; prepared data is kept in " + str(cache_dir()))
        return
    if "_target_" not in cfg.dataset:
        raise ConfigError("dataset: name one, as in metarun data dataset=image_folder dataset.root=FOLDER")
    hardware = build_hardware(cfg)
    name = HydraConfig.get().runtime.choices["dataset"]
    table = Table(title=name)
    for heading in ("split", "classes", "images", "a class", "shape", "seconds"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    sources: dict[str, EpisodeSource] = {}
    for split in SPLITS:
        began = time.perf_counter()
        sources[split] = build_source(cfg.dataset, split, hardware)
        table.add_row(split, *counts(sources[split]), f"{time.perf_counter() - began:.1f}")
        for part, own in getattr(sources[split], "parts", {}).items():
            table.add_row(f"  {part}", *counts(own), "")
    console.print(table)
    source = sources[cfg.split]
    if isinstance(source, ClassStore):
        draw(source, Geometry(cfg.ways, cfg.shots, cfg.queries), cfg.seed, f"{name} {cfg.split}")


def catalogue() -> Table:
    """Every option of the group, with what its YAML says of it."""
    table = Table(title="datasets", show_lines=True)
    for heading in ("dataset=", "what it is", "prepared here"):
        table.add_column(heading)
    sources = HydraConfig.get().runtime.config_sources  # also a user's own, of --config-dir
    folders = [Path(source.path) / "dataset" for source in sources if source.schema == "file"]
    for path in sorted(path for folder in folders for path in folder.glob("*.yaml")):
        lines = path.read_text("utf-8").splitlines()
        words = " ".join(line.removeprefix("# ") for line in lines[1:] if line.startswith("# "))
        there = any(cache_dir().glob(f"{path.stem}-*"))
        table.add_row(path.stem, words, "yes" if there else "")
    return table


def counts(source: EpisodeSource) -> list[str]:
    """Classes, images, images a class and the shape of one, for people."""
    shape = "x".join(map(str, source.item_shape))
    if not isinstance(source, ClassStore):
        return ["", "drawn anew", "", shape]
    least, most = source.smallest_class, source.largest_class
    each = str(least) if least == most else f"{least} to {most}"
    return [f"{len(source.names):,}", f"{len(source.images):,}", each, shape]


def draw(source: ClassStore, geometry: Geometry, seed: int, title: str) -> None:
    """contact.png: ten classes, ten images of each; episode.png: one task."""
    source.check(geometry)
    folder = Path(HydraConfig.get().runtime.output_dir)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(source.names), generator=generator)[:10].sort().values.tolist()
    rows = {
        source.names[i]: source.images[source.starts[i] : source.starts[i] + min(int(source.counts[i]), 10)]
        for i in chosen
    }
    plots.contact_sheet(rows, title, folder / "contact.png")
    episode = sample(source, 1, geometry, generator)
    names = [source.names[i] for i in episode.classes[0].tolist()]
    support = episode.support_x[0].unflatten(0, (geometry.ways, geometry.shots))
    query = episode.query_x[0].unflatten(0, (geometry.ways, geometry.queries))
    pictures = {name: torch.cat([support[i], query[i]]) for i, name in enumerate(names)}
    plots.contact_sheet(pictures, f"{title}, {geometry}", folder / "episode.png", mark=geometry.shots)
    say(notes, f"saved contact.png and episode.png in {relative(folder)}")
