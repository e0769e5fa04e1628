"""`metarun online`: learners that follow a stream of tasks."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.table import Table

from metarun.algorithms.maml import MAML
from metarun.config.build import build_backbone, build_dataset, build_source, instantiate
from metarun.config.check import check
from metarun.config.schema import OnlineConfig, plain, typed
from metarun.datasets.rainbow import rainbow
from metarun.errors import ConfigError
from metarun.inner_loops.sgd import SGD
from metarun.reporting.console import Bar, console, inform, relative
from metarun.reporting.online import stream_curves
from metarun.storage.files import write_json
from metarun.tasks.class_store import ClassStore
from metarun.tasks.spec import TaskSpec
from metarun.training.online import LEARNERS, OnlineSettings, Row, follow

ROWS = "online.jsonl"


def run(cfg: DictConfig) -> None:
    """Follow a stream as configured; prints a table, and writes the figure and the results."""
    check(cfg, "online", typed=HydraConfig.get().overrides.task)
    command: OnlineConfig = typed(cfg)
    if command.batch > command.images:
        raise ConfigError(f"batch={command.batch}: a task has images={command.images}; lower batch")
    if not 0 < command.threshold < 1:
        raise ConfigError(f"threshold={command.threshold}: must be between 0 and 1")
    folder = Path(HydraConfig.get().runtime.output_dir)
    if (folder / ROWS).exists():
        raise ConfigError(
            f"{relative(folder / ROWS)}: this folder already has the rows of a stream; choose another "
            "hydra.run.dir"
        )
    hardware = instantiate(command.hardware, "hardware")
    source = build_source(build_dataset(command.dataset), "train", hardware)
    if not isinstance(source, ClassStore) or source.spec.kind != "images":
        raise ConfigError("dataset: a stream is made of images; choose one with images, such as glyphs")
    sizes = command.classes, command.tasks, command.images, command.test_images
    stream = rainbow(source, *sizes, command.seed)
    torch.manual_seed(command.seed)
    backbone = build_backbone(
        command.backbone, TaskSpec(tuple(stream[0].x.shape[1:]), classes=command.classes)
    )
    inner_loop = SGD(command.rate, command.steps)
    algorithm = hardware.place(MAML(backbone, inner_loop, command.classes))
    settings = OnlineSettings(
        command.batch, command.meta_steps, command.meta_batch, command.minibatch, command.lr, command.seed
    )
    learners = list(dict.fromkeys(command.learners))
    if not learners or not set(learners) <= set(LEARNERS):
        raise ConfigError(f"learners={learners}: choose some of {', '.join(LEARNERS)}")
    trained = len({LEARNERS[name][0] for name in learners})
    batches = trained * len(stream) * (command.images // command.batch)
    rows = []
    with Bar("online", batches, "batches") as bar, hardware.compute(), (folder / ROWS).open("w") as file:
        for row in follow(learners, algorithm, stream, command.classes, settings, bar.advance):
            rows.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()  # the rows so far are left if the command is interrupted
    report(rows, learners, command, folder, HydraConfig.get().runtime.choices["dataset"])


def report(
    rows: Sequence[Row], learners: Sequence[str], command: OnlineConfig, folder: Path, dataset: str
) -> None:
    """Print the table of learners, and write the summary and the figure."""
    title = f"{len({row['task'] for row in rows})} tasks made of {dataset}, {command.classes} classes"
    table = Table(title=title)
    for heading in ("learner", "accuracy", "second half", f"images until {command.threshold:.0%}", "reached"):
        table.add_column(heading.replace("%", " %"), justify="left" if heading == "learner" else "right")
    final: dict[str, list[float]] = {}
    needed: dict[str, list[float]] = {}
    summary: dict[str, dict[str, Any]] = {}
    for name in learners:
        own = [row for row in rows if row["learner"] == name]
        count = max(row["task"] for row in own) + 1
        curves = [[row for row in own if row["task"] == number] for number in range(count)]
        final[name] = [curve[-1]["accuracy"] for curve in curves]
        needed[name] = [images_until(curve, command.threshold) for curve in curves]
        reached = [images for images in needed[name] if not math.isnan(images)]
        half = final[name][count // 2 :]
        mean = float(np.mean(reached)) if reached else None
        summary[name] = {
            "accuracy": float(np.mean(final[name])),
            "interval": 1.96 * float(np.std(final[name], ddof=1)) / math.sqrt(count) if count > 1 else None,
            "second half": float(np.mean(half)),
            "images": mean,
            "reached": len(reached),
        }
        shown = f"{100 * summary[name]['accuracy']:.1f} %", f"{100 * summary[name]['second half']:.1f} %"
        table.add_row(name, *shown, "-" if mean is None else f"{mean:.0f}", f"{len(reached)} of {count}")
    console.print(table)
    write_json(folder / "results.json", {"config": plain(command), "learners": summary})
    stream_curves(final, needed, command.threshold, title, folder / "online.png")
    inform(f"saved {ROWS}, results.json and online.png in {relative(folder)}")


def images_until(curve: Sequence[Row], threshold: float) -> float:
    """The images that had arrived when the accuracy was first above a threshold; NaN if it never was."""
    return next((float(row["images"]) for row in curve if row["accuracy"] >= threshold), math.nan)
