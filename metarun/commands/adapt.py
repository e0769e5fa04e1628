"""`metarun adapt`: one new task, of a user's own images or of a dataset."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_class
from omegaconf import DictConfig
from PIL.Image import Image
from rich.table import Table
from rich.text import Text
from torch import Tensor

from metarun import checkpoint, images, plots
from metarun.algorithms.base import Adapted, Algorithm
from metarun.build import build_dataset, build_hardware, build_source
from metarun.commands.models import Model, adjust, built_for, dataset_config, fitted
from metarun.config import check
from metarun.episodes import SPLITS, Episodes, Geometry
from metarun.errors import ConfigError
from metarun.evaluation import fixed_draws
from metarun.files import write_csv, write_json
from metarun.hardware import Hardware
from metarun.objectives import is_classification, metric_name, task_loss, task_score
from metarun.tracking import console, notes, relative, say

SHOWN = 30  # predictions listed on screen; all are in predictions.csv


@dataclass
class Task:
    """One task, batched as T = 1."""

    support_x: Tensor  # [1, S, *item]
    support_y: Tensor  # [1, S] or [1, S, outputs]
    query_x: Tensor | None  # [1, B, *item]
    query_y: Tensor | None  # [1, B] or [1, B, outputs]; -1 where a class is unknown
    classes: list[str]  # names of the ways
    query_names: list[str]


def run(cfg: DictConfig) -> float:
    """Adapt by the config; the query score after the last step, or the support's."""
    check(cfg, "adapt")
    if cfg.query is not None and cfg.support is None:
        raise ConfigError("query= needs support=: a folder with one sub-folder of images a class")
    if cfg.support is not None:
        for key in ("dataset", "ways", "shots"):
            if cfg[key] is not None:
                raise ConfigError(f"{key}= is for a task of a dataset; support= brings its own")
    if cfg.ink not in ("auto", "dark", "light"):
        raise ConfigError(f"ink={cfg.ink}: must be auto, dark or light")
    hardware = build_hardware(cfg)
    path = checkpoint.find(cfg.checkpoint)
    content = checkpoint.load(path)
    config = checkpoint.config_of(content)
    adjust(config, cfg)
    task = user_task(cfg, config) if cfg.support is not None else dataset_task(cfg, config, hardware)
    algorithm = checkpoint.rebuild(content, config, hardware, path).eval()
    model = Model(config.choices.algorithm, path, config, algorithm)
    algorithm.check(len(task.classes))
    task = move(task, hardware)
    torch.manual_seed(cfg.seed)
    with torch.no_grad(), hardware.compute():
        steps, adapted = follow(algorithm, task)
        outputs = algorithm.predict(adapted, task.query_x) if task.query_x is not None else None
    folder = Path(HydraConfig.get().runtime.output_dir)
    report(model, task, steps, outputs, folder)
    save_adapted(content, task, adapted, folder)
    return steps[-1].get("query score", steps[-1]["support score"])


def user_task(cfg: DictConfig, config: DictConfig) -> Task:
    """A task of the user's folders, converted to what the checkpoint was trained on."""
    item_shape = tuple(build_dataset(config.dataset).item_shape)
    classes = images.class_folders(Path(cfg.support).expanduser())
    support = [images.read(file) for files in classes.values() for file in files]
    labels = [i for i, files in enumerate(classes.values()) for _ in files]
    query_files: list[Path] = []
    query_labels: list[int | None] = []
    if cfg.query is not None:
        query_files, query_labels = images.query_files(Path(cfg.query).expanduser(), list(classes))
    query = [images.read(file) for file in query_files]
    support_x = prepare(cfg, config, "support", support, item_shape)
    query_x = prepare(cfg, config, "query", query, item_shape) if query else None
    known = torch.tensor([[-1 if label is None else label for label in query_labels]])
    return Task(
        support_x=support_x,
        support_y=torch.tensor([labels]),
        query_x=query_x,
        query_y=known if query else None,
        classes=list(classes),
        query_names=[str(file) for file in query_files],
    )


def prepare(
    cfg: DictConfig, config: DictConfig, name: str, pictures: list[Image], item_shape: tuple[int, ...]
) -> Tensor:
    """A folder's pictures as the model's [1, B, C, H, W].

    For a model of drawings their polarity is changed where it must be; said, never silent.
    """
    batch = images.to_batch(pictures, item_shape)
    if getattr(build_dataset(config.dataset), "drawings", False):
        ink = images.ink_of(pictures) if cfg.ink == "auto" else cfg.ink
        how = "assumed from their borders; ink=dark or ink=light decides" if cfg.ink == "auto" else "as typed"
        ground = "light" if ink == "dark" else "dark"
        say(notes, f"{name} drawings: {ink} ink on a {ground} ground ({how})")
        batch = images.as_drawings(batch, ink)
    if blank := int((batch.amax((1, 2, 3)) - batch.amin((1, 2, 3)) < 0.05).sum()):
        say(notes, f"{name}: {blank} of {len(batch)} images are blank at the model's size")
    return batch.unsqueeze(0)


def dataset_task(cfg: DictConfig, config: DictConfig, hardware: Hardware) -> Task:
    """The first task that seed `cfg.seed` gives of the checkpoint's dataset, or of another."""
    if cfg.split not in SPLITS:
        raise ConfigError(f"split={cfg.split}: must be one of {', '.join(SPLITS)}")
    ways, shots = (cfg[key] or config.validation[key] or config[key] for key in ("ways", "shots"))
    dataset = dataset_config(cfg, config)
    regression = hasattr(get_class(dataset._target_), "outputs")
    # A curve is drawn through its queries.
    geometry = Geometry(ways, shots, max(cfg.queries, 200) if regression else cfg.queries)
    source = fitted(build_source(built_for(dataset, config), cfg.split, hardware), config)
    source.check(geometry)
    episodes: Episodes = source.gather(next(fixed_draws(source, geometry, 1, cfg.seed)), geometry)
    names = getattr(source, "names", None)
    classes = [names[i] for i in episodes.classes[0].tolist()] if names else ["value"]
    return Task(
        episodes.support_x,
        episodes.support_y,
        episodes.query_x,
        episodes.query_y,
        classes,
        [f"query {i}" for i in range(episodes.query_x.shape[1])],
    )


def move(task: Task, hardware: Hardware) -> Task:
    def to(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        tensor = tensor.to(hardware.device)
        return tensor.to(hardware.dtype) if tensor.is_floating_point() else tensor

    moved = {key: to(getattr(task, key)) for key in ("support_x", "support_y", "query_x", "query_y")}
    return replace(task, **moved)  # type: ignore[arg-type]


def follow(algorithm: Algorithm, task: Task) -> tuple[list[dict[str, Any]], Adapted]:
    """The loss and score before the first inner step, after it, ...; and what was learned."""
    rows: list[dict[str, Any]] = []
    adapted = None
    ways = len(task.classes)
    for step, adapted in enumerate(algorithm.trajectory(task.support_x, task.support_y, ways)):
        row: dict[str, Any] = {"step": step}
        row |= figures("support", algorithm.predict(adapted, task.support_x), task.support_y)
        if task.query_x is not None and task.query_y is not None:
            row |= figures("query", algorithm.predict(adapted, task.query_x), task.query_y)
        rows.append(row)
    return rows, adapted


def figures(name: str, outputs: Tensor, targets: Tensor) -> dict[str, float]:
    """Loss and score over the examples whose target is known; nothing where none is."""
    if is_classification(targets):
        known = targets[0] >= 0
        if not known.any():
            return {}
        outputs, targets = outputs[:, known], targets[:, known]
    return {
        f"{name} loss": task_loss(outputs, targets).item(),
        f"{name} score": task_score(outputs, targets).item(),
    }


def report(
    model: Model, task: Task, steps: list[dict[str, Any]], outputs: Tensor | None, folder: Path
) -> None:
    """Tables on screen; steps.json, predictions.csv and a picture in the folder."""
    metric = metric_name(task.support_y)
    ways = f"{len(task.classes)} classes, " if metric == "accuracy" else ""
    title = f"{model.name}: {ways}{task.support_x.shape[1]} support examples"
    console.print(step_table(steps, metric, title))
    saved = ["steps.json", "adapted.pt"]
    write_json(folder / "steps.json", steps)
    if outputs is not None and metric == "accuracy":
        rows = prediction_rows(task, outputs)
        console.print(prediction_table(rows, task))
        write_csv(folder / "predictions.csv", rows)
        draw_predictions(rows, task, folder / "predictions.png")
        saved += ["predictions.csv", "predictions.png"]
        if model.algorithm.uses_query_statistics:
            say(notes, "the queries were predicted together, with each other's statistics (transductive)")
    elif task.query_x is not None and task.query_x.shape[-1] == 1:
        draw_regression(model.algorithm, task, folder / "curves.png")
        saved.append("curves.png")
    say(notes, f"saved {', '.join(saved)} in {relative(folder)}")


def step_table(steps: list[dict[str, Any]], metric: str, title: str) -> Table:
    table = Table(title=title)
    # The mean squared error is loss and score at once.
    keys = [key for key in steps[-1] if key != "step" and not (metric == "mse" and key.endswith("loss"))]
    table.add_column("inner step", justify="right")
    for key in keys:
        table.add_column(key.replace("score", metric), justify="right")
    for row in steps:
        cells = [
            f"{100 * row[key]:.1f} %" if key.endswith("score") and metric == "accuracy" else f"{row[key]:.4f}"
            for key in keys
        ]
        table.add_row(str(row["step"]), *cells)
    return table


def prediction_rows(task: Task, outputs: Tensor) -> list[dict[str, Any]]:
    """One row a query: its prediction, the probability of every class, and the truth where known."""
    assert task.query_y is not None
    rows = []
    for name, probabilities, label in zip(
        task.query_names, outputs[0].softmax(-1).tolist(), task.query_y[0].tolist(), strict=True
    ):
        best = max(range(len(probabilities)), key=probabilities.__getitem__)
        rows.append(
            {
                "query": name,
                "prediction": task.classes[best],
                "probability": probabilities[best],
                "class": task.classes[label] if label >= 0 else "",
                **{f"p({c})": p for c, p in zip(task.classes, probabilities, strict=True)},
            }
        )
    return rows


def prediction_table(rows: list[dict[str, Any]], task: Task) -> Table:
    known = [row for row in rows if row["class"]]
    right = sum(row["prediction"] == row["class"] for row in known)
    title = f"{len(rows)} queries" + (
        f", {right} of {len(known)} right ({right / len(known):.1%})" if known else ""
    )
    caption = f"the first {SHOWN}; all are in predictions.csv" if len(rows) > SHOWN else None
    table = Table(title=title, caption=caption)
    for heading in ("query", "prediction", "probability", *(["class"] if known else [])):
        table.add_column(heading, overflow="fold")
    for row in rows[:SHOWN]:
        wrong = row["class"] and row["prediction"] != row["class"]
        cells = [
            row["query"],
            row["prediction"],
            f"{row['probability']:.3f}",
            *([row["class"]] if known else []),
        ]
        table.add_row(*map(Text, cells), style="red" if wrong else None)
    return table


def draw_predictions(rows: list[dict[str, Any]], task: Task, path: Path) -> None:
    assert task.query_x is not None
    if task.query_x.dim() != 5:
        return
    titles = [title_of(row) for row in rows]
    right = [row["prediction"] == row["class"] if row["class"] else None for row in rows]
    plots.predictions(task.query_x[0].float(), titles, right, path)


def title_of(row: dict[str, Any]) -> str:
    """A query's prediction and its probability; where it is wrong, the truth too."""
    wrong = row["class"] and row["prediction"] != row["class"]
    truth = f" (is {shorten(row['class'])})" if wrong else ""
    return f"{shorten(row['prediction'])}{truth}\n{row['probability']:.2f}"


def shorten(name: str, most: int = 14) -> str:
    """The end of a long name, where names of a kind differ."""
    return name if len(name) <= most else "…" + name[-most + 1 :]


@torch.no_grad()
def draw_regression(algorithm: Algorithm, task: Task, path: Path) -> None:
    """The model's curve before and after its inner steps, over the queries' points."""
    assert task.query_x is not None and task.query_y is not None
    trajectory = list(algorithm.trajectory(task.support_x, task.support_y, 1))
    shown = sorted({0, 1, len(trajectory) - 1} & set(range(len(trajectory))))
    names = {i: "before adapting" if i == 0 else f"after step {i}" for i in shown}
    curves = {names[i]: algorithm.predict(trajectory[i], task.query_x) for i in shown}
    plots.regression_curves((task.support_x, task.support_y), (task.query_x, task.query_y), curves, path)


def save_adapted(content: dict[str, Any], task: Task, adapted: Adapted, folder: Path) -> None:
    """adapted.pt: what was learned of the task beside the algorithm it belongs to."""
    body = {
        "config": content["config"],
        "algorithm": content["algorithm"],
        "adapted": checkpoint.to_cpu(adapted),
        "classes": task.classes,
    }
    checkpoint.save(folder / "adapted.pt", body, kind="adapted")
