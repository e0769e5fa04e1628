"""`metarun online`: learners that follow a stream of tasks."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.table import Table

from metarun.algorithms.maml import MAML
from metarun.commands import resuming
from metarun.config.build import build_backbone, build_dataset, build_source, instantiate
from metarun.config.check import check
from metarun.config.restore import config_of, restore_state
from metarun.config.schema import OnlineConfig, plain, typed
from metarun.config.targets import trust_words, trusted_modules
from metarun.datasets.rainbow import StreamTask, rainbow
from metarun.errors import ConfigError, counted
from metarun.inner_loops.sgd import SGD
from metarun.reporting.console import Bar, console, inform, relative
from metarun.reporting.online import stream_curves
from metarun.storage.files import write_json, write_text
from metarun.tasks.class_store import ClassStore
from metarun.tasks.spec import TaskSpec
from metarun.training import checkpoint
from metarun.training.hardware import Hardware
from metarun.training.online import LEARNERS, Followers, OnlineSettings, Row
from metarun.training.records import rows_of

ROWS, STATE = "online.jsonl", "stream.pt"


def run(cfg: DictConfig) -> None:
    """Follow a stream as configured; prints a table, and writes the figure and the results."""
    folder, path = Path(HydraConfig.get().runtime.output_dir), None
    if cfg.resume is not None:
        path = checkpoint.find(cfg.resume, "resume", (STATE,))
        folder = path.parent
    with resuming.alone_in(folder, "online"):
        online(cfg, folder, path)


def online(cfg: DictConfig, folder: Path, path: Path | None) -> None:
    """Follow a stream in a locked folder.

    Args:
        cfg: the composed config.
        folder: the output folder.
        path: the checkpoint to resume from, if any.
    """
    chosen = HydraConfig.get()
    choices = {"algorithm": "maml"} | {g: chosen.runtime.choices[g] for g in ("dataset", "backbone")}
    state = None
    if path is not None:
        state = checkpoint.load(path, "stream")
        now, cfg = cfg, config_of(state, path, trusted_modules(cfg), command="online")
        resuming.change(cfg, now, chosen.overrides.task)
        cfg.resume = cfg.trust = None
        choices = state["choices"]
    elif (folder / ROWS).exists():
        raise ConfigError(
            f"{relative(folder / ROWS)}: this folder already has the rows of a stream; continue it with "
            f"resume={relative(folder)}, or choose another hydra.run.dir"
        )
    check(cfg, "online", typed=[] if state else chosen.overrides.task)
    command: OnlineConfig = typed(cfg)
    check_command(command)
    hardware = instantiate(command.hardware, "hardware")
    dataset = build_dataset(command.dataset)
    if dataset.spec.kind != "images" or dataset.spec.outputs is not None:
        raise ConfigError("dataset: a stream is made of images; choose one with images, such as glyphs")
    algorithm = build_learner(command, dataset.spec.item_shape, hardware)
    source = build_source(dataset, "train", hardware)
    assert isinstance(source, ClassStore)
    sizes = command.classes, command.tasks, command.images, command.test_images
    stream = rainbow(source, *sizes, command.seed)
    settings = OnlineSettings(
        command.batch, command.meta_steps, command.meta_batch, command.minibatch, command.lr, command.seed
    )
    followers = Followers(list(dict.fromkeys(command.learners)), algorithm, command.classes, settings)
    record = {"config": plain(command), "choices": choices, "data": source.fingerprint}
    if state is None:
        resuming.write_hydra_files(cfg, folder)
        checkpoint.save(folder / STATE, followers.state() | record, "stream")
    elif state["data"] != source.fingerprint:
        raise ConfigError(f"{path}: the images are no longer those of this stream; give it the same files")
    else:
        restore_state(followers, state, path)
        inform(f"resumed after {followers.done} of {counted(len(stream), 'task')}")
    rows = follow(followers, stream, folder, record, hardware)
    report(rows, followers.kinds, command, folder, choices["dataset"])


def check_command(command: OnlineConfig) -> None:
    """Raise ConfigError for settings that do not fit each other."""
    if command.batch > command.images:
        raise ConfigError(f"batch={command.batch}: a task has images={command.images}; lower batch")
    if not 0 < command.threshold < 1:
        raise ConfigError(f"threshold={command.threshold}: must be between 0 and 1")
    if not command.learners or not set(command.learners) <= set(LEARNERS):
        raise ConfigError(f"learners={command.learners}: choose some of {', '.join(LEARNERS)}")


def build_learner(command: OnlineConfig, item_shape: tuple[int, ...], hardware: Hardware) -> MAML:
    """The learner with the first weights, for images of the dataset on coloured backgrounds."""
    torch.manual_seed(command.seed)
    spec = TaskSpec((3, *item_shape[1:]), classes=command.classes)
    inner_loop = SGD(command.rate, command.steps)
    return hardware.place(MAML(build_backbone(command.backbone, spec), inner_loop, command.classes))  # type: ignore[return-value]


def follow(
    followers: Followers,
    stream: Sequence[StreamTask],
    folder: Path,
    record: dict[str, Any],
    hardware: Hardware,
) -> Sequence[Row]:
    """Follow the stream from the next task to its end; the rows of all tasks, also those done before.

    Args:
        followers: the learners, which have done some tasks.
        stream: the tasks.
        folder: the output folder. Rows are written to it as they come, and after each task, what the
            command goes on from. Rows of a task that was not completed are dropped.
        record: plain values to include in that.
        hardware: the device.
    """
    rows = [row for row in rows_of(folder / ROWS) if row["task"] < followers.done]
    of_row = len(followers.kinds) * (len(stream[0].x) // followers.settings.batch)
    if len(rows) != of_row * followers.done:
        raise ConfigError(f"{relative(folder / ROWS)}: lacks rows of tasks that are done; start a new stream")
    write_text(folder / ROWS, "".join(json.dumps(row) + "\n" for row in rows))
    of_task = len(followers.learners) * (len(stream[0].x) // followers.settings.batch)
    bar = Bar("online", of_task * len(stream), "batches", start=of_task * followers.done)
    try:
        with bar, hardware.compute(), (folder / ROWS).open("a") as file:
            while followers.done < len(stream):
                for row in followers.next_task(stream, bar.advance):
                    rows.append(row)
                    file.write(json.dumps(row) + "\n")
                    file.flush()
                checkpoint.save(folder / STATE, checkpoint.to_cpu(followers.state() | record), "stream")
    except KeyboardInterrupt:
        words = [f"resume={relative(folder)}", *trust_words(record["config"])]
        inform(f"stopped after {counted(followers.done, 'task')}; continue with")
        inform(f"  metarun online {shlex.join(words)}")
        raise
    return rows


def report(
    rows: Sequence[Row], learners: Sequence[str], command: OnlineConfig, folder: Path, dataset: str
) -> None:
    """Print the table of learners, and write the summary and the figure."""
    title = f"{len({row['task'] for row in rows})} tasks made of {dataset}, {command.classes} classes"
    table = Table(title=title)
    for heading in ("learner", "accuracy", "second half", f"images until {command.threshold:.0%}", "reached"):
        table.add_column(heading.replace("%", " %"), justify="left" if heading == "learner" else "right")
    final: dict[str, list[float]] = {}
    arriving: dict[str, list[tuple[int, float]]] = {}
    summary: dict[str, dict[str, Any]] = {}
    for name in learners:
        own = [row for row in rows if row["learner"] == name]
        count = max(row["task"] for row in own) + 1
        curves = [[row for row in own if row["task"] == number] for number in range(count)]
        final[name] = [curve[-1]["accuracy"] for curve in curves]
        needed = [images_until(curve, command.threshold) for curve in curves]
        reached = [images for images in needed if not math.isnan(images)]
        arriving[name] = [
            (at[0]["images"], float(np.mean([row["accuracy"] for row in at])))
            for at in zip(*curves[count // 2 :], strict=True)
        ]
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
    stream_curves(final, arriving, command.threshold, title, folder / "online.png")
    inform(f"saved {ROWS}, results.json and online.png in {relative(folder)}")


def images_until(curve: Sequence[Row], threshold: float) -> float:
    """The images that had arrived when the accuracy was first above a threshold; NaN if it never was."""
    return next((float(row["images"]) for row in curve if row["accuracy"] >= threshold), math.nan)
