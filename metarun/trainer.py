"""The outer loop: sample, backward, step; validate, checkpoint and log on the way."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from metarun import checkpoint
from metarun.algorithms.base import Algorithm
from metarun.engine import Clip, Engine
from metarun.episodes import EpisodeSource, Geometry
from metarun.errors import TrainingError
from metarun.evaluation import Result, evaluate
from metarun.hardware import Hardware
from metarun.tracking import Bar, Tracker


@dataclass(frozen=True)
class Plan:
    """What the outer loop is to do; iterations are outer steps."""

    iterations: int
    meta_batch: int
    geometry: Geometry
    validation_geometry: Geometry
    validation_episodes: int
    validation_seed: int
    validation_every: int
    checkpoint_every: int
    log_every: int
    seed: int
    clip: Clip | None


@dataclass
class Best:
    iteration: int
    score: float
    interval: float
    metric: str


class Trainer:
    """Meta-trains an algorithm; its whole state is in `last.pt`, so that a killed run resumes bit-exactly."""

    def __init__(
        self,
        algorithm: Algorithm,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        train: EpisodeSource,
        validation: EpisodeSource,
        plan: Plan,
        hardware: Hardware,
        folder: Path,
        config: dict[str, Any],  # plain; goes into every checkpoint
    ) -> None:
        self.algorithm, self.optimizer, self.scheduler = algorithm, optimizer, scheduler
        self.train_source, self.validation_source = train, validation
        self.plan, self.hardware, self.folder, self.config = plan, hardware, folder, config
        self.engine = Engine(
            algorithm, optimizer, train, plan.geometry, plan.meta_batch, plan.seed, hardware, plan.clip
        )
        self.tasks = 0  # since the last row
        self.iteration = 0
        self.saved_at = 0  # the iteration that last.pt holds
        self.seconds = 0.0  # of training so far, over all sessions
        self.best: Best | None = None

    # state

    def state(self) -> dict[str, Any]:
        cuda = self.hardware.device.type == "cuda"
        return checkpoint.to_cpu(
            {
                "config": self.config,
                "iteration": self.iteration,
                "seconds": self.seconds,
                "best": vars(self.best) if self.best else None,
                "algorithm": self.algorithm.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict() if self.scheduler else None,
                "random": torch.get_rng_state(),
                "cuda_random": torch.cuda.get_rng_state(self.hardware.device) if cuda else None,
                "window": self.engine.window,
                "tasks": self.tasks,
            }
        )

    def load_state(self, state: dict[str, Any]) -> None:
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        self.saved_at = self.iteration
        self.best = Best(**state["best"]) if state["best"] else None
        self.algorithm.load_state_dict(state["algorithm"])
        load_optimizer(self.optimizer, state["optimizer"])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"])
        if state["cuda_random"] is not None and self.hardware.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random"], self.hardware.device)
        self.engine.window.copy_(state["window"])
        self.tasks = state["tasks"]

    # the loop

    def run(self, tracker: Tracker) -> None:
        """Train to `plan.iterations`.

        KeyboardInterrupt after Ctrl-C and a save; TrainingError for a loss that is not finite.
        """
        plan = self.plan
        self.algorithm.train()
        began = time.perf_counter() - self.seconds
        bar = Bar("train", plan.iterations, start=self.iteration)
        with bar, hold_interrupts() as interrupts, self.hardware.compute():
            self.engine.prepare(self.iteration, bar.line)
            while self.iteration < plan.iterations and not interrupts:
                self.step()
                self.seconds = time.perf_counter() - began
                if self.due(plan.log_every):
                    self.flush_window(tracker)
                if self.due(plan.validation_every):
                    self.validate(tracker, bar)
                if self.due(plan.checkpoint_every):
                    self.save("last.pt", tracker)
                told = self.due(plan.log_every) or self.due(plan.validation_every)
                bar.advance(1, describe_live(tracker.rows) if told else None)
        if interrupts and self.iteration < plan.iterations:
            self.save("last.pt", tracker)
            raise KeyboardInterrupt

    def due(self, every: int) -> bool:
        return self.iteration % every == 0 or self.iteration == self.plan.iterations

    def step(self) -> None:
        self.engine.step()
        self.tasks += self.plan.meta_batch
        if self.scheduler:
            self.scheduler.step()
        self.iteration += 1

    def flush_window(self, tracker: Tracker) -> None:
        """Log the averages since the last row. TrainingError where the loss is not finite."""
        loss, score = (self.engine.window / self.tasks).tolist()
        self.engine.window.zero_()
        self.tasks = 0
        if not math.isfinite(loss):
            raise TrainingError(self.not_finite("the training loss"))
        row = {
            "iteration": self.iteration,
            "split": "train",
            "loss": loss,
            self.engine.metric: score,
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "seconds": round(self.seconds, 2),
        }
        tracker.log(row)

    def validate(self, tracker: Tracker, bar: Bar) -> None:
        """Score the fixed validation episodes; the best so far becomes best.pt."""
        plan = self.plan
        result = evaluate(
            self.algorithm,
            self.validation_source,
            plan.validation_geometry,
            plan.validation_episodes,
            plan.validation_seed,
            self.hardware,
        )
        if not math.isfinite(result.loss):
            raise TrainingError(self.not_finite("the validation loss"))
        row = {
            "iteration": self.iteration,
            "split": "validation",
            "loss": result.loss,
            result.metric: result.mean,
            "interval": result.interval,
            **{f"{result.metric} {name}": part.mean for name, part in result.parts.items()},
            "seconds": round(self.seconds, 2),
        }
        tracker.log(row)
        bar.line(describe_validation(tracker.rows))
        if self.best is None or is_better(result, self.best):
            self.best = Best(self.iteration, result.mean, result.interval, result.metric)
            self.save("best.pt", tracker)

    def save(self, name: str, tracker: Tracker) -> None:
        """Write a checkpoint; one with weights that are not finite never replaces a good one."""
        if not all(p.isfinite().all() for p in self.algorithm.parameters()):
            raise TrainingError(self.not_finite("a weight"))
        tracker.sync()
        checkpoint.save(self.folder / name, self.state())
        if name == "last.pt":
            self.saved_at = self.iteration

    def not_finite(self, what: str) -> str:
        kept = [name for name in ("best.pt", "last.pt") if (self.folder / name).exists()]
        where = f"the last good checkpoint is {self.folder / kept[-1]}" if kept else "nothing was saved yet"
        rates = "inner_loop.rate or optimizer.lr" if hasattr(self.algorithm, "inner_loop") else "optimizer.lr"
        return f"{what} is no longer finite at iteration {self.iteration}; {where}; lower {rates}"


def load_optimizer(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Load what was learned, and keep what belongs to this machine: the state may come from another."""
    machine = ("fused", "capturable", "foreach")
    own = [dict(group) for group in optimizer.param_groups]
    groups = [
        saved | {key: group[key] for key in machine if key in group}
        for saved, group in zip(state["param_groups"], own, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for group, before in zip(optimizer.param_groups, own, strict=True):
        rate = float(group["lr"])
        is_tensor = isinstance(before["lr"], torch.Tensor)
        group["lr"] = before["lr"].fill_(rate) if is_tensor else rate


def is_better(result: Result, best: Best) -> bool:
    return result.mean > best.score if result.metric == "accuracy" else result.mean < best.score


def latest(rows: list[dict[str, Any]], split: str) -> dict[str, Any] | None:
    return next((row for row in reversed(rows) if row["split"] == split), None)


def show(row: dict[str, Any] | None) -> str:
    """A row's score for people."""
    if row is None:
        return "-"
    return f"{100 * row['accuracy']:.1f} %" if "accuracy" in row else f"{row['mse']:.3f}"


def describe_live(rows: list[dict[str, Any]]) -> str:
    """What stands behind the progress bar: loss, and the training and validation score."""
    train, validation = latest(rows, "train"), latest(rows, "validation")
    loss = f"{train['loss']:.3f}" if train else "-"
    return f"loss {loss} train {show(train)} val {show(validation)}".replace(" %", "%")


def describe_validation(rows: list[dict[str, Any]]) -> str:
    """The lasting line of a validation."""
    train, validation = latest(rows, "train"), latest(rows, "validation")
    assert validation
    metric = "accuracy" if "accuracy" in validation else "mse"
    before = f"train loss {train['loss']:.4f} {metric} {show(train)}   " if train else ""
    after = f"validation loss {validation['loss']:.4f} {metric} {show(validation)}"
    return f"iteration {validation['iteration']:>6}   {before}{after}"


@contextlib.contextmanager
def hold_interrupts() -> Iterator[list[int]]:
    """Collect the first Ctrl-C or SIGTERM instead of stopping midway; a second stops at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def handler(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        # Not through rich, which may be interrupted in the middle of drawing.
        os.write(2, b"\nstopping and saving (once more: stop at once)\n")

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)
