"""`metarun train`: meta-train an algorithm."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.panel import Panel
from rich.text import Text

from metarun import checkpoint, plots
from metarun.build import (
    build_algorithm,
    build_dataset,
    build_hardware,
    build_optimizer,
    build_source,
    instantiate,
    load_weights,
    training_geometry,
    validation_geometry,
)
from metarun.config import check
from metarun.engine import Clip
from metarun.episodes import ClassStore, EpisodeSource, Geometry
from metarun.errors import ConfigError, DataError
from metarun.evaluation import Result, evaluate
from metarun.files import write_json, write_text
from metarun.hardware import Hardware
from metarun.locks import lock_path, locked
from metarun.tracking import Bar, Tracker, console, notes, relative, say, with_interval
from metarun.trainer import Best, Plan, Trainer

# What may change when a run is resumed; anything else would make it another run.
RESUMABLE = ("iterations", "resume", "hardware", "log", "checkpoint", "test", "dataset.root")
ROOT_OF_PART = re.compile(r"dataset\.settings\.\w+\.root")


def run(cfg: DictConfig) -> float:
    """Meta-train by the config; the best validation score, for sweepers."""
    resumed, folder = None, Path(HydraConfig.get().runtime.output_dir)
    if cfg.resume is not None:
        resumed = checkpoint.find(cfg.resume, ("last.pt",))
        checkpoint.load(resumed)  # what is wrong with it comes before any lock in its folder
        folder = resumed.parent
    with alone_in(folder):
        return train(cfg, folder, resumed)


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """A context in which no other process trains in the folder, since they would overwrite checkpoints.

    Raises ConfigError if another one does.
    """
    place = folder / "run"
    with locked(place) as alone:
        if not alone:
            raise ConfigError(
                f"{folder}: another metarun train is at work in this folder; wait for it to end, or "
                "choose another hydra.run.dir"
            )
        try:
            yield
        finally:
            with suppress(OSError):  # Windows deletes no open file; its lock is deleted on release
                # Nobody waits for this lock, so it may be deleted: a run's folder holds no files but its own.
                lock_path(place).unlink(missing_ok=True)


def train(cfg: DictConfig, folder: Path, resumed: Path | None) -> float:
    state = None
    if resumed is not None:
        state = checkpoint.load(resumed)
        cfg = resumed_config(state, cfg, list(HydraConfig.get().overrides.task))
    elif existing := [name for name in ("last.pt", "best.pt") if (folder / name).exists()]:
        raise ConfigError(
            f"{folder / existing[0]}: this folder already holds a run; go on with it by "
            f"resume={relative(folder)}, or choose another hydra.run.dir"
        )
    check(cfg, "train")
    if state is None:
        write_notes(cfg, folder)
    start = read_start(cfg) if state is None else None
    hardware = build_hardware(cfg)
    torch.manual_seed(cfg.seed)
    dataset = build_dataset(cfg.dataset)  # once, for its files are listed once
    trainer = build_trainer(cfg, dataset, hardware, folder)
    test_source = build_test_source(cfg, dataset, hardware)
    if state is not None:
        trainer.load_state(state)
    else:
        load_weights(trainer.algorithm)
        if start is not None:
            say(notes, f"starts with the {checkpoint.start_from(trainer.algorithm, *start)}")
        elif getattr(trainer.algorithm, "frozen", False) and not cfg.backbone.get("weights"):
            raise ConfigError("algorithm.frozen=true would keep a random backbone; add init=RUN")
    name = describe(cfg)
    say(notes, f"{name}: {hardware.describe()}, {count_parameters(trainer)} parameters")
    if trainer.iteration:
        say(notes, f"resumed at iteration {trainer.iteration}")
    tracker = Tracker(folder, trainer.iteration, cfg.log.tensorboard)
    try:
        trainer.run(tracker)
        finish(trainer, tracker, test_source, cfg, hardware, name)
    except KeyboardInterrupt:
        say(notes, f"stopped, and saved at iteration {trainer.saved_at}; go on with")
        say(notes, f"  metarun train {shlex.quote(f'resume={relative(folder)}')}")
        raise
    finally:
        tracker.close()
    assert trainer.best
    return trainer.best.score


def write_notes(cfg: DictConfig, folder: Path) -> None:
    """The config as Hydra would leave it in .hydra, but not before the folder is this run's own."""
    overrides = HydraConfig.get().overrides.task
    for name, node in {"config": cfg, "overrides": overrides, "hydra": HydraConfig.instance().cfg}.items():
        write_text(folder / ".hydra" / f"{name}.yaml", OmegaConf.to_yaml(node))


def read_start(cfg: DictConfig) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that a new run starts from, read before anything takes long."""
    if cfg.init is None:
        return None
    path = checkpoint.find(cfg.init)
    return path, checkpoint.load(path)


def finish(
    trainer: Trainer,
    tracker: Tracker,
    test_source: EpisodeSource | None,
    cfg: DictConfig,
    hardware: Hardware,
    name: str,
) -> None:
    """The learning curve, the test of the best checkpoint, and the report."""
    plots.learning_curve(tracker.rows, name, trainer.folder / "learning_curve.png")
    test = test_best(trainer, test_source, cfg, hardware) if test_source else None
    report(trainer, test, name, trainer.folder)


def build_trainer(cfg: DictConfig, dataset: Any, hardware: Hardware, folder: Path) -> Trainer:
    train, validation = (build_source(dataset, split, hardware) for split in ("train", "validation"))
    count_classes(cfg, train)
    if "_target_" in (cfg.augment or {}):
        if not isinstance(train, ClassStore):
            raise ConfigError(f"augment: {choices(cfg)['dataset']} has no images to change; leave it out")
        train.augment = instantiate(cfg.augment)
    algorithm = build_algorithm(cfg, hardware)
    optimizer = build_optimizer(cfg, list(algorithm.parameters()), hardware)
    scheduler = instantiate(cfg.scheduler, optimizer=optimizer) if cfg.scheduler else None
    plan = Plan(
        iterations=cfg.iterations,
        meta_batch=cfg.meta_batch,
        geometry=training_geometry(cfg),
        validation_geometry=validation_geometry(cfg),
        validation_episodes=cfg.validation.episodes,
        validation_seed=cfg.validation.seed,
        validation_every=cfg.validation.every,
        checkpoint_every=cfg.checkpoint.every,
        log_every=cfg.log.every,
        seed=cfg.seed,
        clip=None if cfg.clip.value is None and cfg.clip.norm is None else Clip(**cfg.clip),
    )
    # Loaded and checked before anything runs, so that an impossible task is told at once.
    train.check(plan.geometry)
    check_validation(validation, plan.validation_geometry, cfg)
    algorithm.check(plan.validation_geometry.ways)
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    config["choices"] = choices(cfg)
    config["overrides"] = overrides(cfg)
    return Trainer(algorithm, optimizer, scheduler, train, validation, plan, hardware, folder, config)


def check_validation(source: EpisodeSource, geometry: Geometry, cfg: DictConfig) -> None:
    """As in training unless it is told otherwise, which is not what everybody knows."""
    try:
        source.check(geometry)
    except DataError as error:
        if cfg.validation.ways is not None:
            raise
        raise DataError(f"{error}, or set validation.ways") from None


def count_classes(cfg: DictConfig, train: EpisodeSource) -> None:
    """Put the number of training classes into the config of a method that needs it.

    It goes into the checkpoint too, for the weights' shapes.
    """
    there = getattr(train, "names", None)  # a regression has none
    if "classes" not in cfg.algorithm or there is None:
        return
    if cfg.algorithm.classes is None:
        cfg.algorithm.classes = len(there)
    elif cfg.algorithm.classes < len(there):
        raise ConfigError(
            f"algorithm.classes={cfg.algorithm.classes}: there are {len(there)} training classes; "
            "leave it out to have them counted"
        )


def build_test_source(cfg: DictConfig, dataset: Any, hardware: Hardware) -> EpisodeSource | None:
    """The test split where a test is asked for."""
    if not cfg.test.episodes:
        return None
    source = build_source(dataset, "test", hardware)
    source.check(validation_geometry(cfg))
    return source


def resumed_config(state: dict[str, Any], typed: DictConfig, overrides: list[str]) -> DictConfig:
    """The config the run was started with, with what was typed now where that may change."""
    cfg = checkpoint.config_of(state)
    for key in typed:  # settings that came after the run was started, at their defaults
        if key not in cfg:
            OmegaConf.update(cfg, str(key), typed[key], force_add=True)
    for override in overrides:
        key = override.split("=")[0].lstrip("+~")
        kept = not any(key == name or key.startswith(name + ".") for name in RESUMABLE)
        if kept and not ROOT_OF_PART.fullmatch(key):
            raise ConfigError(
                f"{override}: a resumed run keeps its settings; only {', '.join(RESUMABLE)} may change"
            )
        OmegaConf.update(cfg, key, OmegaConf.select(typed, key), force_add=True)
    if cfg.iterations < state["iteration"]:
        raise ConfigError(f"iterations={cfg.iterations}: the run has already done {state['iteration']}")
    if cfg.scheduler and cfg.iterations != state["config"]["iterations"]:
        raise ConfigError(
            f"iterations={cfg.iterations}: this run's rate follows a schedule made for "
            f"{state['config']['iterations']} iterations; start a new run"
        )
    cfg.resume = None
    return cfg


def choices(cfg: DictConfig) -> dict[str, str]:
    """The group options chosen, such as {"algorithm": "maml"}; for names in tables."""
    if "choices" in cfg:
        return dict(cfg.choices)
    chosen = HydraConfig.get().runtime.choices
    return {
        group: chosen[group]
        for group in ("algorithm", "dataset", "backbone", "inner_loop")
        if group in chosen
    }


def overrides(cfg: DictConfig) -> list[str]:
    """What was typed when the run was started."""
    return list(cfg.overrides if "overrides" in cfg else HydraConfig.get().overrides.task)


def describe(cfg: DictConfig) -> str:
    chosen = choices(cfg)
    return f"{chosen['algorithm']} on {chosen['dataset']}, {training_geometry(cfg)}"


def count_parameters(trainer: Trainer) -> str:
    return f"{sum(p.numel() for p in trainer.algorithm.parameters()):,}"


def test_best(trainer: Trainer, source: EpisodeSource, cfg: DictConfig, hardware: Hardware) -> Result:
    """Score the best checkpoint on the test split, in validation's geometry."""
    best = checkpoint.load(trainer.folder / "best.pt")
    trainer.algorithm.load_state_dict(best["algorithm"])
    trainer.best = Best(**best["best"])  # of the very weights that are tested
    datasets = len(getattr(source, "parts", ())) or 1
    with Bar("test", datasets * cfg.test.episodes, "episodes") as bar:
        return evaluate(
            trainer.algorithm,
            source,
            validation_geometry(cfg),
            cfg.test.episodes,
            cfg.test.seed,
            hardware,
            bar.advance,
        )


def report(trainer: Trainer, test: Result | None, name: str, folder: Path) -> None:
    """result.json, and a closing panel with the result, the paths and the next command."""
    best = trainer.best
    assert best
    result: dict[str, Any] = {
        "name": name,
        "overrides": trainer.config["overrides"],
        "iterations": trainer.iteration,
        "seconds": round(trainer.seconds, 2),
        "metric": best.metric,
        "validation": {"iteration": best.iteration, "mean": best.score, "interval": best.interval},
        "checkpoint": str((folder / "best.pt").resolve()),
    }
    text = with_interval(best.metric, best.score, best.interval)
    lines = [f"validation  {best.metric} {text}  (best, iteration {best.iteration})"]
    if test is not None:
        result["test"] = {
            "geometry": str(test.geometry),
            "mean": test.mean,
            "interval": test.interval,
            "episodes": len(test.scores),
            "episodes_hash": test.episodes_hash,
            "uses_query_statistics": test.uses_query_statistics,
        }
        if test.parts:
            result["test"]["datasets"] = {
                part: {"mean": own.mean, "interval": own.interval, "episodes_hash": own.episodes_hash}
                for part, own in test.parts.items()
            }
        kind = "transductive" if test.uses_query_statistics else "each query by itself"
        text = with_interval(test.metric, test.mean, test.interval)
        lines.append(
            f"test        {test.metric} {text}  ({test.geometry}, {len(test.scores)} episodes, {kind})"
        )
        for part, own in test.parts.items():
            lines.append(f"            {with_interval(own.metric, own.mean, own.interval)}  {part}")
    write_json(folder / "result.json", result)
    (folder / "failure.json").unlink(missing_ok=True)  # of an earlier try in a sweep
    place = relative(folder)
    lines += [
        f"trained     {trainer.iteration} iterations in {trainer.seconds:.0f} s",
        f"folder      {place}",
        "            best.pt  last.pt  learning_curve.png  metrics.jsonl  result.json",
    ]
    console.print(Panel(Text("\n".join(lines), overflow="fold"), title=name, expand=False))
    # Below the panel, so that it can be copied in one piece.
    say(console, f"next: metarun eval {shlex.quote(f'checkpoint={place}')}")
