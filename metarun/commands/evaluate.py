"""`metarun eval`: checkpoints on a grid of ways, shots and inner steps."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.table import Table
from rich.text import Text

from metarun import plots
from metarun.build import build_hardware, build_source
from metarun.commands.cells import Cell, name_of, plan_cell
from metarun.commands.instances import instance_cells, instance_rows, report_instances
from metarun.commands.models import (
    built_for,
    choices,
    dataset_config,
    dataset_name,
    fitted,
    load_models,
    takes_steps,
)
from metarun.config import check
from metarun.episodes import SPLITS, EpisodeSource, Geometry
from metarun.errors import ConfigError
from metarun.evaluation import evaluate, paired_difference
from metarun.files import write_csv, write_json
from metarun.tracking import Bar, console, notes, relative, say, with_interval

MANY = 4  # models, of which not every pair is shown


def run(cfg: DictConfig) -> float:
    """Evaluate by the config; the first cell's mean, for sweepers."""
    check(cfg, "eval")
    if cfg.split not in SPLITS:
        raise ConfigError(f"split={cfg.split}: must be one of {', '.join(SPLITS)}")
    hardware = build_hardware(cfg)
    models = load_models(cfg, hardware)
    geometries = grid(cfg, models[0].config)
    datasets = [dataset_config(cfg, model.config) for model in models]
    sources: dict[tuple[str, tuple[int, ...]], EpisodeSource] = {}
    cells = []
    for model, dataset in zip(models, datasets, strict=True):
        built, name = built_for(dataset, model.config), OmegaConf.to_yaml(dataset, resolve=True)
        key = (name, tuple(built.item_shape))
        if key not in sources:
            sources[key] = build_source(built, cfg.split, hardware)
        source = fitted(sources[key], model.config)
        parts = getattr(source, "parts", None) or {dataset_name(model.config): source}
        asked = choices(cfg.steps) if OmegaConf.is_list(cfg.steps) and takes_steps(model) else [None]
        cells += [
            plan_cell(Cell(model, geometry, steps, part, name))
            for (name, part), geometry, steps in itertools.product(parts.items(), geometries, asked)
        ]
    if all(cell.reason for cell in cells):
        raise ConfigError(cells[0].reason)
    possible = [cell for cell in cells if not cell.reason]
    shown = instance_cells(possible, cfg)
    with Bar("eval", len(possible) * cfg.episodes, "episodes") as bar:
        for cell in possible:
            if cell.steps is not None:
                cell.model.algorithm.inner_loop.test_steps = cell.steps  # type: ignore[union-attr]
            cell.result = evaluate(
                cell.model.algorithm,
                cell.source,
                cell.geometry,
                cfg.episodes,
                cfg.seed,
                hardware,
                bar.advance,
            )
    if len({name for name, _ in sources}) > 1:
        say(notes, "on different datasets, so not compared; dataset=NAME tests all on one")
    folder = Path(HydraConfig.get().runtime.output_dir)
    report(cells, cfg, folder)
    if cfg.instances is not None:
        report_instances(instance_rows(shown, cfg, hardware), folder)
    return next(cell.result.mean for cell in cells if cell.result)


def grid(cfg: DictConfig, trained: DictConfig) -> list[Geometry]:
    """Every combination of the ways and shots asked for; by default those of training."""

    ways, shots = (
        choices(cfg[key] if cfg[key] is not None else trained.validation[key] or trained[key])
        for key in ("ways", "shots")
    )
    return [Geometry(w, s, cfg.queries) for w, s in itertools.product(ways, shots)]


def is_several(cells: list[Cell]) -> bool:
    """Whether the cells are of more than one dataset, so that each must name its own."""
    return len({cell.dataset for cell in cells}) > 1


def report(cells: list[Cell], cfg: DictConfig, folder: Path) -> None:
    """Tables on screen; results.json, results.csv and results.png in the folder."""
    rows = [row_of(cell, cfg) for cell in cells]
    datasets = ", ".join(dict.fromkeys(row["dataset"] for row in rows))
    pairs = comparisons(cells)
    console.print(
        table_of(cells, f"{datasets}, {cfg.split} classes, {cfg.episodes} episodes, seed {cfg.seed}")
    )
    # Not a caption, which a narrow table would cut.
    say(console, "episodes' hash: " + ", ".join(hashes(cells)))
    if pairs:
        shown = with_the_best(pairs, cells) if len({cell.model.name for cell in cells}) > MANY else pairs
        console.print(pair_table(shown))
        if len(shown) < len(pairs):
            say(notes, f"the best of each task beside the others; all {len(pairs)} pairs are in results.json")
    content = {"results": rows, "comparisons": pairs}
    write_json(folder / "results.json", content)
    write_csv(folder / "results.csv", rows)
    names = ["results.json", "results.csv", "results.png"]
    plots.evaluation_grid(rows, folder / names[-1])
    if len({row["steps"] for row in rows if row["steps"] is not None}) > 1:
        names.append("steps.png")
        plots.step_curves(rows, folder / names[-1])
    say(notes, f"saved {', '.join(names[:-1])} and {names[-1]} in {relative(folder)}")


def hashes(cells: list[Cell]) -> list[str]:
    """The hash of each task's episodes; of each model's where they met others under the same name."""
    several = is_several(cells)
    found: dict[str, dict[str, str]] = {}
    for cell in cells:
        if cell.result:
            task = f"{cell.dataset} {cell.geometry}" if several else str(cell.geometry)
            found.setdefault(task, {})[cell.model.name] = cell.result.episodes_hash
    told = []
    for task, own in found.items():
        if len(set(own.values())) == 1:
            told.append(f"{task} {min(own.values())}")
        else:
            told += [f"{task} of {model} {value}" for model, value in own.items()]
    return told


def row_of(cell: Cell, cfg: DictConfig) -> dict[str, Any]:
    """Plain figures of one cell; accuracies in [0, 1]."""
    result = cell.result
    return {
        "model": cell.model.name,
        "checkpoint": str(cell.model.path),
        "dataset": cell.dataset,
        "split": cfg.split,
        "cell": name_of(cell),
        "ways": cell.geometry.ways,
        "shots": cell.geometry.shots,
        "queries": cell.geometry.queries,
        "steps": cell.steps,
        "metric": result.metric if result else None,
        "mean": result.mean if result else None,
        "interval": result.interval if result else None,
        "episodes": len(result.scores) if result else 0,
        "uses_query_statistics": result.uses_query_statistics if result else None,
        "seconds": round(result.seconds, 3) if result else None,
        "episodes_hash": result.episodes_hash if result else None,
        "reason": cell.reason or None,
    }


def table_of(cells: list[Cell], title: str) -> Table:
    metric = next(cell.result.metric for cell in cells if cell.result)
    with_steps = any(cell.steps is not None for cell in cells)
    several = is_several(cells)
    # No time of each where there is much else: a terminal of 80 columns has no room for both.
    longest = max(len(cell.model.name) for cell in cells)
    timed = not (with_steps or several) and (longest <= 11 or console.width >= 100)
    table = Table(title=title)
    table.add_column("model", overflow="fold")
    if several:
        table.add_column("dataset", overflow="fold")
    table.add_column("task", no_wrap=True)
    if with_steps:
        table.add_column("steps", justify="right", no_wrap=True)
    table.add_column(f"{metric}, 95 % interval", min_width=21)
    for heading in ["transductive", "seconds"] if timed else ["transductive"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for cell in cells:
        row: list[str | Text] = [cell.model.name, *([cell.dataset] if several else []), str(cell.geometry)]
        if with_steps:
            row.append("" if cell.steps is None else str(cell.steps))
        if (result := cell.result) is None:
            table.add_row(*row, Text(cell.reason, style="yellow"))
            continue
        row.append(with_interval(metric, result.mean, result.interval))
        row.append("yes" if result.uses_query_statistics else "no")
        table.add_row(*row, *([f"{result.seconds:.1f}"] if timed else []))
    return table


def comparisons(cells: list[Cell]) -> list[dict[str, Any]]:
    """Every two checkpoints on every geometry where both have a result on the same episodes."""
    pairs = []
    for a, b in itertools.combinations([cell for cell in cells if cell.result], 2):
        assert a.result and b.result
        if (a.dataset, name_of(a)) != (
            b.dataset,
            name_of(b),
        ) or a.result.episodes_hash != b.result.episodes_hash:
            continue
        difference, half = paired_difference(a.result, b.result)
        pairs.append(
            {
                "dataset": a.dataset,
                "task": name_of(a),
                "a": a.model.name,
                "b": b.model.name,
                "metric": a.result.metric,
                "difference": difference,
                "interval": half,
            }
        )
    return pairs


def with_the_best(pairs: list[dict[str, Any]], cells: list[Cell]) -> list[dict[str, Any]]:
    """The pairs that the best model of their task is one of."""

    def goodness(cell: Cell) -> float:
        assert cell.result
        return cell.result.mean if cell.result.metric == "accuracy" else -cell.result.mean

    best: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        if cell.result:
            key = cell.dataset, name_of(cell)
            best[key] = max(best.get(key, cell), cell, key=goodness)
    names = {key: cell.model.name for key, cell in best.items()}
    return [pair for pair in pairs if names[pair["dataset"], pair["task"]] in (pair["a"], pair["b"])]


def pair_table(pairs: list[dict[str, Any]]) -> Table:
    table = Table(title="differences on the same episodes")
    for heading in ("task", "models", "difference, 95 % interval", ""):
        table.add_column(heading)
    for pair in pairs:
        clear = abs(pair["difference"]) > pair["interval"]
        text = with_interval(pair["metric"], pair["difference"], pair["interval"], signed=True)
        table.add_row(
            pair["task"], f"{pair['a']} - {pair['b']}", text, "" if clear else "within the interval"
        )
    return table
