"""The outer loop: training steps, validation, checkpoints and logs."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from metarun.algorithms.base import Algorithm
from metarun.errors import TrainingError
from metarun.reporting.console import Bar, inform
from metarun.reporting.progress import live_line, validation_line
from metarun.reporting.tracker import Tracker
from metarun.tasks.curriculum import PrioritizedReplay
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.source import EpisodeSource
from metarun.training import checkpoint
from metarun.training.evaluation import EvalSettings, Result, evaluate
from metarun.training.hardware import Hardware
from metarun.training.interrupts import hold_interrupts, uninterrupted
from metarun.training.outer_loops import Clip, OuterLoop
from metarun.training.step import OuterStep
from metarun.training.stopping import EarlyStopping


@dataclass(frozen=True)
class TrainSettings:
    """The settings of the outer loop; an iteration is one outer step.

    Args:
        iterations: the total number of outer steps.
        meta_batch: the number of tasks in an outer step.
        shape: the shape of a training task.
        validation: the fixed validation tasks.
        validation_every, checkpoint_every, log_every: intervals, in iterations.
        seed: of the training tasks.
        stopping: when training ends before the last iteration.
        clip: gradient clipping, if any.
        until: the time at which this process stops, as `interrupts.deadline` gives it.
        newest: whether the weights of the last validation count as the best ones, because its classes are
            trained on.
    """

    iterations: int
    meta_batch: int
    shape: EpisodeShape
    validation: EvalSettings
    validation_every: int
    checkpoint_every: int
    log_every: int
    seed: int
    stopping: EarlyStopping
    clip: Clip | None = None
    until: float = math.inf
    newest: bool = False


@dataclass
class Best:
    """The best validation result so far, by the main metric.

    Args:
        iteration: when it was reached.
        score: the mean of the main metric.
        interval: half-width of its 95 % confidence interval.
        metric: the name of the main metric.
    """

    iteration: int
    score: float
    interval: float
    metric: str


class Stopped(Exception):
    """A validation was stopped by a signal."""


class Trainer:
    """Meta-trains an algorithm.

    `last.pt` contains the complete state, so that a killed run resumes bit-exactly; `best.pt` is the state
    with the best validation score, or of the last validation (`TrainSettings.newest`). The start of a run is
    validated too, as iteration 0: training may make good features worse.

    Args:
        algorithm: the algorithm, on the hardware's device.
        optimizer: the optimizer of its parameters.
        scheduler: changes the learning rate after every outer step, if any; one that needs a score gets the
            main metric after every validation but that of the start.
        train: the training split.
        validation: the validation split.
        settings: the settings of the outer loop.
        hardware: the device, the precision and how steps are run.
        folder: where checkpoints are written.
        record: plain values to include in every checkpoint.
        outer_loop: what is done with the meta-gradient; None: one step of the optimizer.
        sampler: which tasks are drawn again, if any are.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        optimizer: Optimizer,
        scheduler: LRScheduler | None,
        train: EpisodeSource,
        validation: EpisodeSource,
        settings: TrainSettings,
        hardware: Hardware,
        folder: Path,
        record: Mapping[str, Any],
        outer_loop: OuterLoop | None = None,
        sampler: PrioritizedReplay | None = None,
    ) -> None:
        self.algorithm, self.optimizer, self.scheduler = algorithm, optimizer, scheduler
        self.scheduled_by_score = scheduler is not None and needs_score(type(scheduler))
        self.train_source, self.validation_source = train, validation
        self.settings, self.hardware, self.folder, self.record = settings, hardware, folder, record
        self.ranks = hardware.ranks
        self.metrics = train.spec.objective.metrics
        self.outer_step = OuterStep(
            algorithm,
            optimizer,
            train,
            settings.shape,
            settings.meta_batch,
            settings.seed,
            hardware,
            settings.clip,
            outer_loop,
            sampler,
        )
        self.sampler = sampler
        self.tasks = 0  # the number of tasks in the running totals
        self.iteration = 0
        self.saved_at: int | None = None  # the iteration of last.pt, if there is one
        self.validation_due = True  # whether this iteration is still to be validated; the start is one
        self.seconds = 0.0  # the time spent in training, over all sessions
        self.best: Best | None = None
        self.stopped_by = ""  # the setting that has ended training early, if one has

    # state

    def state(self) -> dict[str, Any]:
        """The complete training state for a checkpoint, on the CPU."""
        cuda = self.hardware.device.type == "cuda"
        return checkpoint.to_cpu(
            {
                **self.record,
                "iteration": self.iteration,
                "seconds": self.seconds,
                "best": vars(self.best) if self.best else None,
                "algorithm": self.algorithm.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict() if self.scheduler else None,
                "random": self.outer_step.random_state(),
                "cuda_random": torch.cuda.get_rng_state(self.hardware.device) if cuda else None,
                "running_totals": self.outer_step.running_totals,
                "tasks": self.tasks,
                "validation_due": self.validation_due,
                "sampler": self.sampler.state_dict() if self.sampler else None,
            }
        )

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the training state from the content of a checkpoint."""
        self.iteration, self.seconds = state["iteration"], state["seconds"]
        self.saved_at = self.iteration
        self.best = Best(**state["best"]) if state["best"] else None
        self.algorithm.load_state_dict(state["algorithm"])
        checkpoint.load_optimizer(self.optimizer, state["optimizer"])
        if self.scheduler:
            self.scheduler.load_state_dict(state["scheduler"])
        torch.set_rng_state(state["random"])
        if state["cuda_random"] is not None and self.hardware.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random"], self.hardware.device)
        self.outer_step.running_totals.copy_(state["running_totals"])
        self.tasks = state["tasks"]
        if self.sampler and state.get("sampler"):
            self.sampler.load_state_dict(state["sampler"])
        self.validation_due = bool(state.get("validation_due"))  # older checkpoints have no such entry

    @property
    def unlogged(self) -> tuple[str, ...]:
        """The splits whose row of this iteration is still to be logged."""
        return ("validation",) if self.validation_due else ()

    # the loop

    def run(self, tracker: Tracker) -> None:
        """Train up to `settings.iterations`, or until `settings.stopping` ends it.

        Args:
            tracker: receives the rows of training and validation.

        Raises:
            KeyboardInterrupt: after Ctrl-C or another signal to stop, or at `settings.until`, once last.pt
                is saved; after Ctrl-C pressed again, immediately.
            TrainingError: if a loss or a weight is not finite, or a single task does not fit in memory.
        """
        self.algorithm.train()
        began = time.perf_counter() - self.seconds
        bar = Bar("train", self.settings.iterations, start=self.iteration)
        self.check_stopping(tracker)
        with hold_interrupts(self.settings.until) as interrupts:
            self.ranks.hear(interrupts)
            with suppress(Stopped), bar, self.hardware.compute():
                if self.settings.iterations:
                    self.outer_step.prepare(self.iteration, bar.line)
                while self.unfinished and not self.ranks.stopping:
                    self.iterate(tracker, bar, began)
            self.ranks.any()
            if self.ranks.stopping:
                self.save("last.pt", tracker)
                interrupts.stop()
        if self.lost_best():  # after its last improvement, perhaps in an earlier session
            with self.hardware.compute():
                self.save_best(self.measure(), tracker)

    @property
    def unfinished(self) -> bool:
        """Whether there is a validation or an iteration left to do."""
        return self.validation_due or (self.iteration < self.settings.iterations and not self.stopped_by)

    def check_stopping(self, tracker: Tracker) -> None:
        """Note which setting ends training early, after a validation or where a run resumes."""
        if self.best and not self.validation_due:
            best, rule = self.best, self.settings.stopping
            self.stopped_by = rule.reason(self.metrics[0], best.score, best.iteration, tracker.rows)

    def iterate(self, tracker: Tracker, bar: Bar, began: float) -> None:
        """Run one iteration, or the part of it that is left to do.

        Args:
            tracker: receives the rows of training and validation.
            bar: shows the progress.
            began: when training began, as if it had never stopped, in seconds.
        """
        if not self.validation_due:
            self.step()
            self.seconds = time.perf_counter() - began
            if self.due(self.settings.log_every):
                self.log_running_totals(tracker)
            self.validation_due = self.due(self.settings.validation_every)
        new = self.validation_due or self.due(self.settings.log_every)
        if self.validation_due:
            self.validate(tracker, bar)
            self.check_stopping(tracker)
        if self.due(self.settings.checkpoint_every) or self.stopped_by:
            self.save("last.pt", tracker)
        bar.advance(self.iteration - bar.done, live_line(tracker.rows, self.metrics[0]) if new else None)

    def due(self, every: int) -> bool:
        """Whether an action with this interval is due after the current iteration; always after the last."""
        return self.iteration % every == 0 or self.iteration == self.settings.iterations

    def step(self) -> None:
        """Run one outer step and one step of the scheduler."""
        self.outer_step.step()
        self.tasks += self.settings.meta_batch
        if self.scheduler and not self.scheduled_by_score:
            self.scheduler.step()
        self.iteration += 1

    def log_running_totals(self, tracker: Tracker) -> None:
        """Log the averages since the last row. Raises TrainingError if the loss is not finite."""
        loss, *scores = (self.outer_step.running_totals / self.tasks).tolist()
        self.outer_step.running_totals.zero_()
        self.tasks = 0
        if not math.isfinite(loss):
            raise TrainingError(self.not_finite("the training loss"))
        row = {
            "iteration": self.iteration,
            "split": "train",
            "loss": loss,
            **{metric.name: score for metric, score in zip(self.metrics, scores, strict=True)},
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
            "seconds": round(self.seconds, 2),
        }
        tracker.log(row)

    def validate(self, tracker: Tracker, bar: Bar) -> None:
        """Evaluate on the fixed validation tasks, and save best.pt if the main metric improved.

        A start whose loss is not finite is reported and left out: running averages, for example, may need
        some iterations before the network can be evaluated.

        Raises:
            Stopped: if there is a signal to stop; the validation is then still due.
            TrainingError: if the loss is not finite.
        """

        def stop_on_interrupt(count: int) -> None:
            self.ranks.any()
            if self.ranks.stopping:
                raise Stopped

        result = self.measure(stop_on_interrupt, refused=self.iteration > 0)
        self.validation_due = False
        main = result.metric
        if not math.isfinite(result.loss):
            bar.line("iteration      0   the validation loss is not finite; best.pt will be a later one")
            return
        row = {
            "iteration": self.iteration,
            "split": "validation",
            "loss": result.loss,
            **{metric.name: result.mean_of(metric) for metric in result.metrics},
            "interval": result.interval,
            **{f"{metric.name} interval": result.interval_of(metric) for metric in result.metrics[1:]},
            **{f"{main.name} {name}": part.mean for name, part in result.parts.items()},
            "seconds": round(self.seconds, 2),
        }
        tracker.log(row)
        bar.line(validation_line(tracker.rows, main))
        if self.scheduler and self.scheduled_by_score and self.iteration > 0:
            own = [dict(group) for group in self.optimizer.param_groups]
            self.scheduler.step(result.mean)  # type: ignore[arg-type]
            checkpoint.keep_rate_tensors(self.optimizer, own)
        if self.best is None or self.lost_best() or self.improves(result):
            self.save_best(result, tracker)

    def improves(self, result: Result) -> bool:
        """Whether the weights of a validation replace the best ones."""
        assert self.best
        return self.settings.newest or result.metric.is_better(result.mean, than=self.best.score)

    def measure(self, advance: Callable[[int], object] = lambda count: None, refused: bool = True) -> Result:
        """The result on the fixed validation tasks.

        Args:
            advance: called with n after every n tasks.
            refused: whether a loss that is not finite raises TrainingError.
        """
        validation = self.settings.validation
        self.algorithm.on_validation(self.train_source.undisturbed)
        result = evaluate(self.algorithm, self.validation_source, validation, self.hardware, advance)
        if refused and not math.isfinite(result.loss):
            raise TrainingError(self.not_finite("the validation loss"))
        return result

    def save_best(self, result: Result, tracker: Tracker) -> None:
        """Save the current weights, with this validation result, as best.pt."""
        self.best = Best(self.iteration, result.mean, result.interval, result.metric.name)
        self.save("best.pt", tracker)

    def lost_best(self) -> bool:
        """Whether best.pt was deleted, which is reported: the next validated weights replace it."""
        if self.ranks.from_first((self.folder / "best.pt").exists()):
            return False
        inform(
            f"{self.folder / 'best.pt'}: was deleted; replaced by the weights of iteration {self.iteration}"
        )
        return True

    def save(self, name: str, tracker: Tracker) -> None:
        """Write a checkpoint, on rank 0. Raises TrainingError instead if a weight is not finite."""
        if checkpoint.broken_weight(self.algorithm):
            raise TrainingError(self.not_finite("a weight"))
        with uninterrupted():
            if self.ranks.first:
                tracker.sync()
                checkpoint.save(self.folder / name, self.state())
            if name == "last.pt":
                self.saved_at = self.iteration

    def not_finite(self, what: str) -> str:
        """The error message for a quantity that is not finite."""
        saved = [name for name in ("best.pt", "last.pt") if (self.folder / name).exists()]
        where = f"the last good checkpoint is {self.folder / saved[-1]}" if saved else "nothing was saved yet"
        rates = self.outer_step.outer_loop.step_size
        rates = f"inner_loop.rate or {rates}" if self.algorithm.takes_steps else rates
        return f"{what} is no longer finite at iteration {self.iteration}; {where}; lower {rates}"


def needs_score(scheduler: type[LRScheduler]) -> bool:
    """Whether a scheduler is stepped with a validation score, as ReduceLROnPlateau is."""
    return "metrics" in inspect.signature(scheduler.step).parameters
