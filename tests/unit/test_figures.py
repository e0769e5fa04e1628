"""Figures can be read: no text covers another one or is cut off; colours distinguish the models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.text import Text

from metarun.commands.sweeps import curves_of
from metarun.reporting import drawing, pictures, plots
from metarun.reporting.swept import setting_curves
from metarun.tasks.objectives import ACCURACY, MSE, Metric, metric_named

LONG = "metaoptnet a_run_folder_with_a_very_long_name_$x$_"
Draw = Callable[[Path], None]


def boxes_of(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Text, np.ndarray]]:
    """Each text that is drawn, with its box [left, bottom, right, top] in pixels."""
    drawn: list[Text] = []
    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", lambda text, renderer: drawn.append(text))
        figure.draw_without_rendering()
    shown = (text for text in drawn if text.get_visible() and text.get_text().strip())
    return [(text, text.get_window_extent().extents) for text in dict.fromkeys(shown)]


def overlap(a: np.ndarray, b: np.ndarray, pixels: float = 1.0) -> bool:
    """Whether two boxes share an area of more than `pixels` in both directions."""
    return bool((np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]) > pixels).all())


def faults_of(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that cover each other or a panel of which they are no part, are cut off, or are too small."""
    found = boxes_of(figure, monkeypatch)
    assert found
    edge = figure.bbox.extents + np.array([-1, -1, 1, 1])
    areas = [(axis, axis.bbox.extents) for axis in figure.axes if axis.get_visible()]
    faults = [f"{text.get_text()!r} is small" for text, _ in found if text.get_fontsize() < 5]
    for text, box in found:
        if (box[:2] < edge[:2]).any() or (box[2:] > edge[2:]).any():
            faults.append(f"{text.get_text()!r} is cut off")
        for axis, area in areas:
            if text.axes is not axis and overlap(box, area):
                faults.append(f"{text.get_text()!r} is on another panel")
    order = sorted(found, key=lambda each: each[1][0])
    for i, (text, box) in enumerate(order):
        for other, its in itertools.takewhile(lambda each: each[1][0] < box[2], order[i + 1 :]):  # noqa: B023
            if overlap(box, its):
                faults.append(f"{text.get_text()!r} covers {other.get_text()!r}")
    return faults


@pytest.fixture
def drawn(monkeypatch, tmp_path: Path) -> Callable[[Draw], Figure]:
    """`drawn(draw)`: the figure that `draw` makes."""

    def figure_of(draw: Draw) -> Figure:
        figures: list[Figure] = []
        with monkeypatch.context() as patch:
            patch.setattr(drawing, "save", lambda figure, path: figures.append(figure))
            draw(tmp_path / "figure.png")
        (figure,) = figures
        return figure

    return figure_of


@pytest.fixture
def faults(drawn, monkeypatch) -> Callable[[Draw], list[str]]:
    """`faults(draw)`: what cannot be read in the figure that `draw` makes."""

    def check(draw: Draw) -> list[str]:
        return faults_of(drawn(draw), monkeypatch)

    return check


def rows_of(models: int, tasks: int, metric: Metric, steps: int = 0) -> list[dict]:
    """Made-up results; the first model has no inner steps."""
    random = np.random.default_rng(models)
    rows = []
    for i, task in itertools.product(range(models), range(tasks)):
        for step in [None] if i == 0 or not steps else range(steps):
            mean = random.uniform(0.1, 1.0) * (1 if metric.percent else 10.0 ** (i % 4))
            name = f"{LONG}{i}" if i % 2 else f"maml {i}"
            cell = f"20-way {task}-shot"
            row = {"model": name, "dataset": "omniglot", "split": "test", "ways": 20, "episodes": 600}
            row |= {"task": cell, "cell": cell, "steps": step, "mean": mean, "interval": 0.1 * mean}
            rows.append(row)
    return rows


@pytest.mark.parametrize("models", [1, 2, 6, 12, pytest.param(17, marks=pytest.mark.quick)])
def test_results_of_many_models_can_be_read(drawn, faults, monkeypatch, models: int):
    """A panel for each task and metric, whose axis is that of the metric; typed settings are in the title."""
    tasks = {1: 1, 2: 4, 6: 2, 12: 1, 17: 2}[models]
    metrics = {2: [ACCURACY, MSE, metric_named("ece")], 6: [MSE], 17: [MSE, ACCURACY]}.get(models, [ACCURACY])
    results = {metric: rows_of(models, tasks, metric) for metric in metrics}
    note = "steps=10, transductive=false"
    figure = drawn(lambda path: plots.evaluation_grid(results, path, note))
    shown = [axis for axis in figure.axes if axis.get_visible()]
    names = [axis.get_xlabel().removesuffix(" (dotted: chance)") for axis in shown]
    assert names == [metric.label for metric in metrics for _ in range(tasks)]
    assert len({axis.get_xlim() for axis in shown}) == len(metrics)
    assert note in figure.get_suptitle().replace("\n", " ")
    assert not faults_of(figure, monkeypatch)
    differences = {
        metric: [row | {"best": row["model"] == rows[0]["model"]} for row in rows]
        for metric, rows in results.items()
    }
    assert not faults(lambda path: plots.differences(differences, path))


@pytest.mark.parametrize(("models", "steps"), [(1, 2), (2, 5), (6, 11), (12, 3), (17, 30)])
def test_curves_over_inner_steps_can_be_read(faults, models: int, steps: int):
    metric = ACCURACY if models % 2 else MSE
    rows = rows_of(models, 2 if models == 6 else 1, metric, steps)
    assert not faults(lambda path: plots.step_curves({metric: rows}, path))


@pytest.mark.parametrize(("settings", "values", "others"), [(1, 2, 1), (3, 3, 12)])
def test_scores_over_the_settings_of_a_sweep_can_be_read(faults, settings: int, values: int, others: int):
    curves = {
        f"optimizer.{LONG}.setting{i}": {
            f"algorithm={LONG}{name}": [
                {"x": 10.0 ** (x * i), "mean": 0.5 + x / 50, "interval": 0.01 * name} for x in range(values)
            ]
            for name in range(others)
        }
        for i in range(1, settings + 1)
    }
    assert not faults(lambda path: setting_curves(curves, ACCURACY, "test, 95 % intervals", path))


def test_points_of_a_sweep_are_means_over_seeds_and_search_points_are_not_joined():
    def job(rate: float, other: str, seed: int) -> dict:
        words = [f"optimizer.lr={rate}", f"algorithm={other}", f"seed={seed}"]
        score = {"mean": rate + seed, "interval": 0.5}
        return {"overrides": words, "metric": "accuracy", "validation": score, "test": {**score, "mean": 9.0}}

    grid = [job(rate, other, seed) for rate in (0.1, 0.2) for other in ("maml", "anil") for seed in (0, 2)]
    split, curves = curves_of({str(i): each for i, each in enumerate(grid)})
    assert (split, list(curves)) == (
        "test",
        ["optimizer.lr"],
    )  # an algorithm is no number, and seeds are averaged
    points = curves["optimizer.lr"]
    assert {name: [point["x"] for point in own] for name, own in points.items()} == {
        "algorithm=maml": [0.1, 0.2],
        "algorithm=anil": [0.1, 0.2],
    }
    without = {**job(0, "protonet", 0), "overrides": ["algorithm=protonet", "seed=0"]}  # which reads no rate
    assert curves_of({str(i): each for i, each in enumerate([*grid, without])})[1] == curves
    del grid[0]["test"]
    split, curves = curves_of({str(i): each for i, each in enumerate(grid)})
    assert split == "validation"
    assert [point["mean"] for point in curves["optimizer.lr"]["algorithm=maml"]] == pytest.approx([1.1, 1.2])
    tried = [job(0.1, "maml", 0), job(0.3, "anil", 0), job(0.2, "boil", 0)]
    (own,) = curves_of({str(i): each for i, each in enumerate(tried)})[1].values()
    assert list(own) == ["other settings differ"] and len(own["other settings differ"]) == 3


@pytest.mark.parametrize("classes", [2, 30, 100, 423])
def test_a_confusion_matrix_can_be_read(faults, classes: int):
    """Numbers up to 40 classes, names up to about 110, and a colour bar always."""
    counts = (torch.eye(classes) + torch.eye(classes).roll(1, 0)) * 23456
    names = [f"Malayalam_(Grantha)/character{i:02d} {'W' * (i % 30)}" for i in range(classes)]
    title = f"{LONG}, omniglot {classes}-way 1-shot"
    assert not faults(lambda path: pictures.confusion_matrix(counts.long(), names, title, path))


@pytest.mark.parametrize("count", [1, 3, 17])
def test_titles_of_predictions_stay_above_their_own_image(faults, count: int):
    titles = [["W" * (4 * i), f"(is {LONG})", "0.98"][: 1 + i % 3] for i in range(1, count + 1)]
    right = [None if i % 3 == 0 else i % 3 == 1 for i in range(count)]
    assert not faults(lambda path: pictures.predictions(torch.rand(count, 3, 8, 8), titles, right, path, 12))


@pytest.mark.parametrize(("classes", "images", "mark"), [(1, 2, 1), (5, 16, 1), (45, 2, 1)])
def test_a_contact_sheet_can_be_read(faults, classes: int, images: int, mark: int):
    rows = {f"{LONG}{i}": torch.rand(images, 1, 4, 4) for i in range(classes)}
    assert not faults(lambda path: pictures.contact_sheet(rows, f"omniglot {LONG}", path, mark))


def training_rows(names: list[str], loss: str | None = None) -> list[dict]:
    rows = []
    for i, split in itertools.product(range(1, 40), ("train", "validation")):
        row = {"iteration": 50 * i, "split": split, **dict.fromkeys(names, i / 40)}
        row |= {"loss": row[loss] if loss else 5.0 / i}
        if split == "validation":
            row |= {"interval": 0.2, **{f"{name} interval": 0.3 for name in names[1:]}}
        rows.append(row)
    return rows


@pytest.mark.parametrize(
    ("names", "titles"),
    [
        (
            ["accuracy", "macro_f1", "ece"],
            ["accuracy, %", "macro F1, %", "expected calibration error, %", "loss"],
        ),
        (["accuracy", "nll"], ["accuracy, %", "negative log-likelihood"]),  # the loss itself
        (["mse"], ["mean squared error"]),
    ],
)
def test_a_learning_curve_has_a_panel_and_a_band_within_bounds_for_each_metric(
    drawn, monkeypatch, names, titles
):
    metrics = [metric_named(name) for name in names]
    same = next((name for name in names if name in ("nll", "mse")), None)
    title, label = f"{LONG * 2} on omniglot, 5-way 1-shot", "validation (20-way 1-shot)"
    rows = training_rows(names, same)
    figure = drawn(lambda path: plots.learning_curve(rows, metrics, title, path, label))
    assert not faults_of(figure, monkeypatch)
    assert [axis.get_title() for axis in figure.axes if axis.get_visible()] == titles
    for axis, metric in zip(figure.axes, metrics, strict=False):
        low, high = (metric.scale * limit for limit in metric.limits)
        (band,) = axis.collections
        y = band.get_paths()[0].vertices[:, 1]
        half = metric.scale * (0.2 if metric is metrics[0] else 0.3)
        assert y.min() == pytest.approx(max(low, metric.scale / 40 - half))
        assert y.max() == pytest.approx(min(high, metric.scale * 39 / 40 + half))


def test_a_single_validation_has_its_interval_and_no_curve_that_is_not_there(drawn, monkeypatch):
    rows = [row for row in training_rows(["accuracy"]) if row["split"] == "validation"][-1:]
    figure = drawn(lambda path: plots.learning_curve(rows, [ACCURACY], "a run", path, "validation (5-way)"))
    assert not faults_of(figure, monkeypatch)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["validation (5-way)", "95 % interval"]
    (bar,) = figure.axes[0].collections
    low, high = bar.get_segments()[0][:, 1]
    assert [low, high] == pytest.approx([77.5, 100])  # 97.5 and 20 above and below, cut at 100 %
    assert all(tick == int(tick) for tick in figure.axes[0].get_xticks())


#: Colours as seen without one of the three kinds of cones, a matrix for linear RGB (Machado, Oliveira and
#: Fernandes 2009).
VISION = {
    "full": [1, 0, 0, 0, 1, 0, 0, 0, 1],
    "protanopia": [
        0.152286,
        1.052583,
        -0.204868,
        0.114503,
        0.786281,
        0.099216,
        -0.003882,
        -0.048116,
        1.051998,
    ],
    "deuteranopia": [
        0.367322,
        0.860646,
        -0.227968,
        0.280085,
        0.672501,
        0.047413,
        -0.01182,
        0.04294,
        0.968881,
    ],
    "tritanopia": [1.255528, -0.076749, -0.178779, -0.078411, 0.930809, 0.147602, 0.004733, 0.691367, 0.3039],
}


def lab_of(colour: str, vision: str) -> np.ndarray:
    """CIE L*a*b* coordinates (D65), in which 2.3 is the least difference that can be seen."""
    rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.reshape(VISION[vision], (3, 3)) @ linear, 0, 1)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    xyz = np.array(to_xyz) @ linear / [0.9505, 1.0, 1.089]
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("vision", VISION)
def test_twenty_models_can_be_told_apart_with_any_colour_vision(vision: str):
    looks = [drawing.style(i) for i in range(20)]
    for a, b in itertools.combinations(looks, 2):
        far = math.dist(lab_of(a["color"], vision), lab_of(b["color"], vision))
        assert far > 15 or (a["marker"] != b["marker"] and a["linestyle"] != b["linestyle"]), (a, b, far)


def test_a_long_name_is_cut_in_its_middle_to_the_width():
    assert drawing.fitted("maml", 3, 8) == "maml"
    short = drawing.fitted("a" * 60 + "b" * 60, 1.5, 8)
    assert short.startswith("a") and short.endswith("b") and "…" in short
    assert 1.3 < drawing.width_of(short, 8) <= 1.5
    assert drawing.fitted("two\nlines\tof $text$", 3, 8) == "two lines of $text$"
