"""`metarun train`: meta-trains an algorithm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from torch import nn

from metarun.algorithms.base import Algorithm
from metarun.commands import resuming
from metarun.commands.ending import check_ending, early_stopping
from metarun.commands.example import counts_confusion, write_example
from metarun.commands.shapes import check_before_loading, check_shape, training_split
from metarun.commands.starting import build_destinations, build_tracker, check_method
from metarun.commands.summary import report
from metarun.commands.trained_on import classes_before, load_split, note_weights, pretrained_by
from metarun.commands.training_tasks import with_training_tasks
from metarun.config import variants
from metarun.config.build import (
    build_algorithm,
    build_outer_loop,
    in_metarun,
    instantiate,
    load_weights,
    start_run,
    task_spec,
    training_shape,
    validation_settings,
    validation_shape,
)
from metarun.config.check import check
from metarun.config.comments import without_pairing
from metarun.config.optimizing import build_optimizer, build_scheduler, try_out
from metarun.config.restore import rebuild, restore_state, restored_dataset, start_from
from metarun.config.schema import TrainConfig, plain, typed
from metarun.config.unread import in_use
from metarun.config.variants import variant_name
from metarun.datasets.base import Dataset
from metarun.errors import ConfigError, RankLost, described
from metarun.reporting import plots
from metarun.reporting.console import Bar, inform, relative
from metarun.reporting.destinations import flat
from metarun.reporting.tracker import Row, Tracker
from metarun.storage.files import remove_temporary, write_json
from metarun.tasks.class_store import ClassStore
from metarun.tasks.objectives import Metric, Objective
from metarun.tasks.rollouts import Rollouts
from metarun.tasks.source import EpisodeSource
from metarun.training import checkpoint
from metarun.training.evaluation import EvalSettings, Result, evaluate
from metarun.training.features import on_features
from metarun.training.hardware import Hardware
from metarun.training.interrupts import OutOfTime, Requests, deadline
from metarun.training.outer_loops import Clip
from metarun.training.parallel import Ranks, current
from metarun.training.records import content_of, write_failure
from metarun.training.trainer import Best, Trainer, TrainSettings

GROUPS = ("algorithm", "dataset", "pairing", *variants.GROUPS)  # whose options are stored in a checkpoint


def run(cfg: DictConfig) -> float:
    """Meta-train as configured; returns the best validation score, for Hydra's sweepers."""
    resumed, folder = None, Path(HydraConfig.get().runtime.output_dir)
    automatic = resuming.is_automatic(cfg)
    if cfg.resume is not None and not automatic:
        resumed = checkpoint.find(cfg.resume, "resume", ("last.pt",))
        checkpoint.load(resumed)  # so that errors are reported before its folder is locked
        folder = resumed.parent
    ranks = current()
    with resuming.alone_in(folder) if ranks.first else nullcontext():
        found = resuming.found_in(folder) if automatic and ranks.first else resumed
        score = train(cfg, folder, ranks.from_first(found), ranks)
    ranks.any()  # all files are written
    return score


def train(cfg: DictConfig, folder: Path, resumed: Path | None, ranks: Ranks) -> float:
    """Train in a locked folder.

    Args:
        cfg: the composed config.
        folder: the run folder.
        resumed: the checkpoint to resume from, if any.
        ranks: the processes that share the tasks; the first one writes.

    Returns:
        The best validation score.
    """
    if ranks.first:
        remove_temporary(folder)
    state, chosen = None, HydraConfig.get()
    choices = {group: chosen.runtime.choices[group] for group in GROUPS if group in chosen.runtime.choices}
    overrides = without_pairing(chosen.overrides.task)
    automatic = resuming.is_automatic(cfg)
    if automatic:
        cfg.resume, overrides = None, [each for each in overrides if not resuming.is_resume(each)]
    if resumed is not None:
        state = checkpoint.load(resumed)
        if ranks.first:
            (folder / "failure.json").unlink(missing_ok=True)
        cfg = resuming.resumed_config(resumed, state, cfg, overrides, automatic)
        choices = state["choices"]
        overrides = overrides if automatic else state["overrides"]
        if automatic and (score := resuming.ended(folder, state, cfg)) is not None:
            return score
    elif existing := [name for name in ("last.pt", "best.pt") if (folder / name).exists()]:
        raise ConfigError(
            f"{folder / existing[0]}: this folder already contains a run; continue it with "
            f"resume={relative(folder)}, or choose another hydra.run.dir"
        )
    # A resumed config has values in place of references such as ${inner_rate}: what was typed at the start of
    # the run is read, although nothing refers to it any more.
    known = state["overrides"] if state else ()
    check(cfg, "train", typed=[each for each in chosen.overrides.task if each not in known])
    cfg = in_use(cfg)
    ranks.require_equal(dict(flat(plain(cfg))), "start the same command on all machines")
    if state is None and ranks.first:
        resuming.write_hydra_files(cfg, folder)
    settings: TrainConfig = typed(cfg)
    start = resuming.read_start(settings) if state is None else None
    hardware, destinations = instantiate(settings.hardware, "hardware"), build_destinations(settings)
    ranks.check_devices(hardware.device)
    if state is not None and resumed is not None:
        rebuild(state, settings, hardware, resumed)  # so that it is refused before any data is loaded
    torch.manual_seed(settings.seed)
    dataset = restored_dataset(state or {}, settings.dataset)
    check_before_loading(dataset, settings)
    check_method(settings, dataset, hardware, overrides if state is None else (), start)
    objective = dataset.spec.objective.choosing(settings.metrics, training=True)
    check_ending(settings, objective.metrics[0])
    record = {"choices": choices, "overrides": overrides, **classes_before(state, start and start[1])}
    trainer = build_trainer(settings, dataset, objective, hardware, folder, record, state or {})
    test_source = build_test_source(settings, dataset, objective, hardware, record, state or {})
    if state is not None:
        restore_state(trainer, state, resumed)
    else:
        load_weights(trainer.algorithm)
        note_weights("this run", settings, choices)
        if start is not None:
            inform(f"initialised from the {start_from(trainer.algorithm, *start)}")
        elif (where := frozen_by(trainer.algorithm, settings)) and not pretrained_by(settings):
            raise ConfigError(f"{where}: needs a pretrained backbone; add init=RUN or backbone.weights=FILE")
    shape = dataset.spec.task_name(training_shape(settings))
    name = f"{variant_name(choices, trainer.record['config'])} on {choices['dataset']}, {shape}"
    inform(f"{name}: {hardware.describe()}, {count_parameters(trainer)} parameters")
    if hint := hardware.unused():
        inform(hint)
    data = {"the training data": trainer.train_source.fingerprint}
    ranks.require_equal(data, "give all machines the same files")
    ranks.copy_first(trainer.algorithm)
    if state is not None:
        inform(f"resumed at iteration {trainer.iteration}")
    embed_images(trainer)
    tracker = build_tracker(settings, destinations, trainer, name)
    if ranks.first:
        write_json(folder / "machine.json", {"started": started_in(folder), **hardware.facts()})
    try:
        trainer.run(tracker)
        finish(trainer, tracker, test_source, settings, name)
    except KeyboardInterrupt as stopped:
        why = f"stop.minutes={settings.stop.minutes:g}: " if isinstance(stopped, OutOfTime) else ""
        resuming.say_how(trainer, f"{why}stopped and saved")
        raise
    except Exception as error:
        if isinstance(error, RankLost):
            resuming.say_how(trainer, "stopped; last.pt was saved")
        if ranks.first:
            write_failure(folder, overrides, described(error))
        raise
    finally:
        tracker.leave()
    assert trainer.best
    return trainer.best.score


def started_in(folder: Path) -> str:
    """When the run was started, by the record of its machine if it is resumed; else now."""
    before = content_of(folder / "machine.json").get("started")
    return before if isinstance(before, str) else f"{datetime.now():%Y-%m-%d %H:%M:%S}"


def finish(
    trainer: Trainer, tracker: Tracker, test_source: EpisodeSource | None, settings: TrainConfig, name: str
) -> None:
    """Write the learning curve, test the best checkpoint, and report."""
    if not trainer.ranks.first:
        if test_source:
            test_best(trainer, test_source, settings)
        return
    validation = trainer.train_source.spec.task_name(validation_shape(settings))
    label = "validation" if name.endswith(f", {validation}") else f"validation ({validation})"
    metrics = [each for each in trainer.metrics if not repeated(each, trainer.metrics[0], tracker.rows)]
    path, plays = trainer.folder / "learning_curve.png", issubclass(trainer.train_source.spec.tasks, Rollouts)
    plots.learning_curve(tracker.rows, metrics, name, path, label, with_loss=not plays)
    test = test_best(trainer, test_source, settings) if test_source else None
    report(trainer, test, name)
    if test is not None and test_source is not None:
        tasks = test_settings(settings)
        write_example(trainer.algorithm, test_source, tasks, test, trainer.hardware, trainer.folder)
    result = content_of(trainer.folder / "result.json")
    tracker.end(trainer.record["config"], result, path)


def repeated(metric: Metric, main: Metric, rows: Sequence[Row]) -> bool:
    """Whether a score before adaptation is always that after it: a policy played nothing before."""
    return metric.name == main.before and all(row[metric.name] == row[main.name] for row in rows)


def build_trainer(
    settings: TrainConfig,
    dataset: Dataset,
    objective: Objective,
    hardware: Hardware,
    folder: Path,
    record: dict[str, Any],
    resumed: Mapping[str, Any],
) -> Trainer:
    """Load the data, build the algorithm and the trainer, and check that they fit.

    Args:
        settings: the settings of the run.
        dataset: the dataset.
        objective: the loss and the metrics.
        hardware: the device, the precision and the batching.
        folder: the run folder.
        record: plain values to include in every checkpoint.
        resumed: the content of the checkpoint that is resumed; empty for a new run.

    Raises:
        ConfigError, DataError: if settings or data do not fit.
    """
    metric = objective.metrics[0]
    capturable = try_out(settings, metric, hardware)
    outer_loop = build_outer_loop(settings, dataset.spec)
    sampler = instantiate(settings.sampler, "sampler") if settings.sampler else None
    train, validation = (
        load_split(dataset, split, hardware, record, resumed).reporting(objective)
        for split in (training_split(settings), "validation")
    )
    if "_target_" in (settings.augment or {}):
        if not isinstance(train, ClassStore) or train.spec.kind != "images":
            raise ConfigError(
                f"augment: dataset={record['choices']['dataset']} has no images to augment; leave augment out"
            )
        train.augment = instantiate(settings.augment, "augment")
    train = with_training_tasks(train, settings, hardware)
    if settings.fixed_labels:
        if not isinstance(train, ClassStore):
            name = record["choices"]["dataset"]
            raise ConfigError(f"fixed_labels=true: dataset={name} has no classes with labels; leave it out")
        train.fixed_labels = True
    if dataset.decided:
        settings.dataset = OmegaConf.to_container(OmegaConf.merge(settings.dataset, dataset.decided))
    spec = task_spec(dataset, train)
    algorithm = build_algorithm(settings, spec, hardware)
    weights: list[torch.Tensor] = list(algorithm.parameters()) or [
        nn.Parameter(torch.empty(0))
    ]  # no optimizer takes none
    optimizer = build_optimizer(settings.optimizer, weights, hardware, capturable)
    scheduler = build_scheduler(settings.scheduler, optimizer, metric) if settings.scheduler else None
    clip = settings.clip
    plan = TrainSettings(
        iterations=settings.iterations,
        meta_batch=settings.meta_batch,
        shape=training_shape(settings),
        validation=validation_settings(settings),
        validation_every=settings.validation.every,
        checkpoint_every=settings.checkpoint.every,
        log_every=settings.log.every,
        seed=settings.seed,
        clip=None if clip.value is None and clip.norm is None else Clip(clip.value, clip.norm),
        stopping=early_stopping(settings),
        until=deadline(settings.stop.minutes),
        newest=settings.trainval,
    )
    train.check(plan.shape)
    check_shape(validation.check, "validation", settings)
    algorithm.check_source(train, plan.shape)
    algorithm.check_source(validation, plan.validation.shape)
    if not resumed:
        start_run(algorithm, train.undisturbed, settings.initial_weights)
    about = list(spec.description) if spec.description else None
    record = {"config": plain(settings), "classes": spec.classes, "description": about, **record}
    record |= {"files": dataset.files} if dataset.files else {}
    return Trainer(
        algorithm,
        optimizer,
        scheduler,
        train,
        validation,
        plan,
        hardware,
        folder,
        record,
        outer_loop,
        sampler,
    )


def build_test_source(
    settings: TrainConfig,
    dataset: Dataset,
    objective: Objective,
    hardware: Hardware,
    record: dict[str, Any],
    resumed: Mapping[str, Any],
) -> EpisodeSource | None:
    """The test split, or None if test.episodes=0; the arguments are those of `build_trainer`."""
    if not settings.test.episodes:
        return None
    source = load_split(dataset, "test", hardware, record, resumed).reporting(objective)
    check_shape(source.check, "test", settings)
    return source


def frozen_by(algorithm: Algorithm, settings: TrainConfig) -> str:
    """The setting that keeps the backbone as it is, as it is typed; "" if it is trained.

    A network that is not metarun's own gets its weights in its own way.
    """
    of_metarun = in_metarun(get_class(settings.backbone["_target_"]))
    frozen = of_metarun and settings.backbone.get("frozen")
    if algorithm.frozen:
        return (
            "algorithm.frozen=true"
            if "frozen" in settings.algorithm
            else f"algorithm={type(algorithm).__name__}"
        )
    return "backbone.frozen=true" if frozen else ""


def embed_images(trainer: Trainer) -> None:
    """Replace images by their features where a frozen network gives them; once its weights are loaded."""
    algorithm, hardware = trainer.algorithm, trainer.hardware
    trainer.validation_source = on_features(trainer.validation_source, algorithm, hardware)
    if trainer.iteration < trainer.settings.iterations:
        trainer.outer_step.source = on_features(trainer.train_source, algorithm, hardware)


def count_parameters(trainer: Trainer) -> str:
    """The number of parameters of the algorithm, formatted."""
    return f"{sum(p.numel() for p in trainer.algorithm.parameters()):,}"


def test_best(trainer: Trainer, source: EpisodeSource, settings: TrainConfig) -> Result:
    """Evaluate the best checkpoint on the test split, on tasks with the shape of validation tasks."""
    if trainer.ranks.first:
        best = checkpoint.load(trainer.folder / "best.pt")
        trainer.algorithm.load_state_dict(best["algorithm"])
        trainer.best = Best(**best["best"])  # the validation result of the tested weights
    trainer.ranks.copy_first(trainer.algorithm)
    source = on_features(source, trainer.algorithm, trainer.hardware)
    confusion, test = counts_confusion(source), test_settings(settings)
    requests = Requests(deadline(settings.stop.minutes))
    trainer.ranks.hear(requests)
    with Bar("test", max(len(source.parts), 1) * test.episodes, "episodes") as bar:

        def advance(count: int) -> None:
            bar.advance(count)
            trainer.ranks.any()
            if trainer.ranks.stopping:
                requests.stop()

        return evaluate(trainer.algorithm, source, test, trainer.hardware, advance, confusion)


def test_settings(settings: TrainConfig) -> EvalSettings:
    """The tasks of the test at the end of a run."""
    return EvalSettings(validation_shape(settings), settings.test.episodes, settings.test.seed)
