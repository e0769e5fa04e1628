"""Metrics as a person chooses them: in training, in tables and files of `eval`, and in `adapt`."""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sklearn.metrics
import torch
from helpers.runs import UNTESTED
from PIL import Image
from torch import Tensor

from metarun.algorithms.base import Algorithm
from metarun.config.build import build_dataset
from metarun.config.restore import config_of, rebuild
from metarun.config.schema import typed
from metarun.datasets.glyphs import Glyphs
from metarun.reporting import drawing, plots
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.objectives import metric_named
from metarun.tasks.sampling import fixed_draws
from metarun.training import checkpoint
from metarun.training.evaluation import EvalSettings, evaluate
from metarun.training.hardware import Hardware

pytestmark = pytest.mark.xdist_group("metrics")  # one process trains for all

PROTONET = ["algorithm=protonet", *UNTESTED]
OFTEN = ["validation.every=2", "test.episodes=20"]
SINUSOID = [
    "dataset=sinusoid",
    "iterations=4",
    "validation.every=4",
    "validation.episodes=20",
    "test.episodes=0",
    "hardware=cpu",
    "hardware.compile=false",
    "log.tensorboard=false",
]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def results_of(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["results"]


def only_line(text: str) -> str:
    (line,) = text.strip().splitlines()
    return line


# train


@pytest.mark.parametrize(("names", "better"), [(["macro_f1", "accuracy"], max), (["ece", "accuracy"], min)])
def test_training_reports_the_metrics_asked_for_and_keeps_the_best_by_the_first(
    trained, names: list[str], better
):
    run = trained(*PROTONET, *OFTEN, f"metrics=[{','.join(names)}]")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        own = [key for key in row if key in ("accuracy", "balanced_accuracy", "macro_f1", "ece", "nll")]
        assert own == names
        assert all(0 <= row[name] <= 1 for name in names)
    validations = {row["iteration"]: row[names[0]] for row in rows if row["split"] == "validation"}
    assert list(validations) == [0, 2, 4, 6, 8, 10, 12]
    result = json.loads((run / "result.json").read_text())
    assert result["metric"] == names[0]
    assert result["validation"]["mean"] == better(validations.values())
    assert validations[result["validation"]["iteration"]] == better(validations.values())
    assert len(set(validations.values())) > 1
    best = checkpoint.load(run / "best.pt")
    assert (best["best"]["metric"], best["best"]["score"]) == (names[0], better(validations.values()))
    test = result["test"]
    assert list(test["metrics"]) == names
    assert test["metrics"][names[0]] == {"mean": test["mean"], "interval": test["interval"]}
    if names[0] == "macro_f1":
        assert test["metrics"]["macro_f1"] != test["metrics"]["accuracy"]


def test_a_metric_that_does_not_exist_is_one_line(metarun, trained, tmp_path: Path):
    names = "accuracy, balanced_accuracy, macro_f1, roc_auc, ece, nll"
    done = metarun("train", *PROTONET, "metrics=[accuracy,f1]", "hydra.run.dir=run", status=1)
    assert f"metrics: these tasks have no 'f1'; choose from {names}" in only_line(done.stderr)
    assert not (tmp_path / "run/last.pt").exists()
    done = metarun("train", *PROTONET, "metrics=[accuracy,accuracy]", status=1)
    assert "each only once" in only_line(done.stderr)
    run = trained(*PROTONET)
    for command in ("eval", "adapt"):
        done = metarun(command, f"checkpoint={run}", "metrics=[mse]", status=1)
        assert f"no 'mse'; choose from {names}" in only_line(done.stderr)
    sinusoid = trained(*SINUSOID)
    done = metarun("eval", f"checkpoint={sinusoid}", "confusion=true", status=1)
    assert "confusion=true: these tasks have no classes" in done.stderr
    done = metarun("eval", f"checkpoint={sinusoid}", "metrics=[accuracy]", status=1)
    assert "no 'accuracy'; choose from mse, mae, r2" in only_line(done.stderr)


# eval


def test_every_figure_of_an_evaluation_follows_from_the_scores_of_its_episodes(
    metarun, trained, tmp_path: Path
):
    names = ["accuracy", "macro_f1", "ece", "nll"]
    words = [f"checkpoint={trained(*PROTONET)}", "episodes=30", "queries=5", "ways=[3,5]"]
    done = metarun("eval", *words, f"metrics=[{','.join(names)}]", "hydra.run.dir=out")
    rows = results_of(tmp_path / "out")
    table = rows_of(tmp_path / "out/results.csv")
    assert len(rows) == len(table) == 2
    for row, plain in zip(rows, table, strict=True):
        assert list(row["scores"]) == names
        assert row["metric"] == "accuracy"
        for name in names:
            scores = np.array(row["scores"][name])
            assert len(scores) == 30
            mean, half = scores.mean(), 1.96 * scores.std(ddof=1) / math.sqrt(30)
            keys = ("mean", "interval") if name == "accuracy" else (name, f"{name} interval")
            assert [row[key] for key in keys] == pytest.approx([mean, half], rel=1e-5)
            assert [float(plain[key]) for key in keys] == pytest.approx([mean, half], rel=1e-5)
            shown = f"{mean:.4f} ± {half:.4f}" if name == "nll" else f"{100 * mean:.2f} ± {100 * half:.2f} %"
            assert shown in " ".join(done.stdout.split()) or all(
                part in done.stdout for part in shown.split()
            )
        assert "scores" not in plain
    assert all(name in done.stdout for name in names)
    assert max(map(len, done.stdout.splitlines())) <= 80 and "…" not in done.stdout
    # The same tasks as without: choosing metrics changes nothing else.
    metarun("eval", *words, "hydra.run.dir=default")
    for row, other in zip(rows, results_of(tmp_path / "default"), strict=True):
        assert other["episodes_hash"] == row["episodes_hash"]
        assert other["scores"] == {"accuracy": row["scores"]["accuracy"]}


def test_an_evaluation_takes_the_metrics_of_training_unless_others_are_typed(
    metarun, trained, tmp_path: Path
):
    run = trained(*PROTONET, *OFTEN, "metrics=[macro_f1,accuracy]")
    metarun("eval", f"checkpoint={run}", "episodes=5", "queries=2", "hydra.run.dir=own")
    assert list(results_of(tmp_path / "own")[0]["scores"]) == ["macro_f1", "accuracy"]
    metarun("eval", f"checkpoint={run}", "episodes=5", "queries=2", "metrics=[nll]", "hydra.run.dir=other")
    assert list(results_of(tmp_path / "other")[0]["scores"]) == ["nll"]


@pytest.mark.pictures
def test_each_kind_of_task_is_shown_by_its_own_metric(metarun, trained, tmp_path: Path):
    """Without `ways` and `shots`, each model has the tasks of its own training, not those of the first."""
    runs = [trained(*PROTONET), trained(*SINUSOID)]
    done = metarun(
        "eval",
        f"checkpoint=[{runs[0]},{runs[1]}]",
        "episodes=6",
        "queries=4",
        "confusion=true",
        "hydra.run.dir=out",
    )
    rows = results_of(tmp_path / "out")
    assert [(row["dataset"], row["metric"], row["task"]) for row in rows] == [
        ("glyphs", "accuracy", "5-way 1-shot"),
        ("sinusoid", "mse", "10-shot"),
    ]
    assert "10-shot" in done.stdout and "1-way" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if "±" in line]
    (glyphs,) = (line for line in lines if "protonet" in line)
    (sinusoid,) = (line for line in lines if "maml" in line)
    assert f"{100 * rows[0]['mean']:.2f} ± {100 * rows[0]['interval']:.2f} %" in glyphs
    assert f"{rows[1]['mean']:.4f} ± {rows[1]['interval']:.4f}" in sinusoid
    assert "%" not in sinusoid
    assert "accuracy, 95 % interval" in done.stdout and "mse, 95 % interval" in done.stdout
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert {"results_accuracy.png", "results_mse.png"} <= names
    words = ["ways=1", "shots=1", "steps=[0,1]", "episodes=6", "queries=4", "hydra.run.dir=steps"]
    done = metarun("eval", f"checkpoint=[{runs[0]},{runs[1]}]", *words)  # no result of Prototypical networks
    figures = {path.name for path in (tmp_path / "steps").glob("*.png")}
    assert figures == {"steps.png"} and "results.csv and steps.png in" in done.stderr
    assert not [name for name in names if "sinusoid" in name]  # it has no classes to confuse
    for name in names:
        with Image.open(tmp_path / "out" / name) as picture:
            picture.verify()


@pytest.mark.parametrize("means", [[-1.0, -0.5, 0.2], [0.1, 0.6, 0.9]])
def test_a_curve_of_r_squared_is_drawn_as_it_is(monkeypatch, means: list[float]):
    """Negative scores have their interval on both sides, and no good score is cut off."""
    drawn = []
    monkeypatch.setattr(drawing, "save", lambda figure, path: drawn.append(figure))
    row = {"model": "maml", "dataset": "d", "split": "test", "task": "5-shot", "episodes": 9}
    rows = [row | {"steps": i, "mean": mean, "interval": 0.05} for i, mean in enumerate(means)]
    plots.step_curves({metric_named("r2"): rows}, Path("steps.png"))
    (axis,) = drawn[0].axes
    low, high = (f(y for _, y in axis.collections[0].get_paths()[0].vertices) for f in (min, max))
    assert [low, high] == pytest.approx([means[0] - 0.05, means[-1] + 0.05])
    assert axis.get_yscale() == "linear"
    assert axis.get_ylim()[0] <= low and axis.get_ylim()[1] >= high


@pytest.mark.pictures
def test_a_confusion_matrix_counts_every_query_once(metarun, trained, tmp_path: Path):
    words = [
        "episodes=30",
        "queries=3",
        "ways=[5,7]",
        "confusion=true",
        "metrics=[accuracy,balanced_accuracy]",
    ]
    done = metarun("eval", f"checkpoint={trained(*PROTONET)}", *words, "hydra.run.dir=out")
    rows = results_of(tmp_path / "out")
    store = Glyphs(train_classes=40, validation_classes=10, test_classes=20, size=16).split("test")
    for row in rows:
        stem = f"protonet_glyphs_{row['ways']}-way_1-shot"
        matrix = rows_of(tmp_path / f"out/confusion_{stem}.csv")
        names = [line["class"] for line in matrix]
        assert [line["number"] for line in matrix] == [str(i + 1) for i in range(len(names))]
        assert names == [name for name in store.names if name in names]
        counts = np.array([[int(line[f"as {name}"]) for name in names] for line in matrix])
        assert counts.sum() == 30 * 3 * row["ways"]
        assert np.trace(counts) / counts.sum() == pytest.approx(row["mean"], abs=1e-6)
        classes = rows_of(tmp_path / f"out/classes_{stem}.csv")
        assert [line["class"] for line in classes] == [
            n for n, own in zip(names, counts, strict=True) if own.any()
        ]
        for line in classes:
            i = names.index(line["class"])
            assert int(line["queries"]) == counts[i].sum()
            assert counts[i].sum() % 3 == 0  # each time that a class is drawn it has three queries
            assert float(line["recall"]) == pytest.approx(counts[i, i] / counts[i].sum())
            taken = counts[:, i].sum()
            assert float(line["precision"]) == pytest.approx(counts[i, i] / taken if taken else 0)
            assert float(line["f1"]) == pytest.approx(2 * counts[i, i] / (counts[i].sum() + taken))
            others = np.where(np.arange(len(names)) == i, -1, counts[i])
            most = {name for name, count in zip(names, others, strict=True) if count == others.max()}
            assert line["most often taken for"] in (most if others.max() else {""})
        with Image.open(tmp_path / f"out/confusion_{stem}.png") as picture:
            assert picture.format == "PNG" and min(picture.size) > 200
        assert f"confusion_{stem}.csv" in done.stderr.replace("\n", "")
        scores = row["scores"]  # as many queries of each class: the mean of the recalls is the accuracy
        assert scores["balanced_accuracy"] == pytest.approx(scores["accuracy"], abs=1e-6)


# adapt


def drawings(folder: Path) -> None:
    """support/ and query/ of three characters, of unequal shots and queries."""
    store = Glyphs(test_classes=3, seed=11).split("test")
    for k, (name, shots, queries) in enumerate((("alpha one", 2, 6), ("beta", 3, 3), ("gamma", 4, 4))):
        for i in range(shots + queries):
            place = folder / ("support" if i < shots else "query") / name
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(store.items[20 * k + i, 0].numpy()).save(place / f"{i}.png")


def test_adapting_reports_each_class_of_a_users_queries(metarun, trained, tmp_path: Path):
    drawings(tmp_path)
    names = ["macro_f1", "accuracy", "balanced_accuracy", "nll"]
    words = [f"checkpoint={trained(*PROTONET)}", "support=support", "ink=light"]
    done = metarun("adapt", *words, "query=query", f"metrics=[{','.join(names)}]", "hydra.run.dir=out")
    predictions = rows_of(tmp_path / "out/predictions.csv")
    truth = [Path(row["query"]).parent.name for row in predictions]
    predicted = [row["prediction"] for row in predictions]
    assert Counter(truth) == {"alpha one": 6, "beta": 3, "gamma": 4}
    assert truth == [row["class"] for row in predictions]
    classes = sorted(set(truth))
    expected = sklearn.metrics.confusion_matrix(truth, predicted, labels=classes)
    matrix = rows_of(tmp_path / "out/confusion_queries_by_class.csv")
    assert [row["class"] for row in matrix] == classes
    assert [[int(row[f"as {name}"]) for name in classes] for row in matrix] == expected.tolist()
    figures = sklearn.metrics.precision_recall_fscore_support(
        truth, predicted, labels=classes, zero_division=0
    )
    rows = rows_of(tmp_path / "out/classes_queries_by_class.csv")
    for row, *own in zip(rows, *figures, strict=True):
        assert [float(row[key]) for key in ("precision", "recall", "f1", "queries")] == pytest.approx(own)
    last = json.loads((tmp_path / "out/steps.json").read_text())[-1]
    assert [key for key in last if key.startswith("query")] == ["query loss", *(f"query {n}" for n in names)]
    assert last["query accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(truth, predicted))
    f1 = sklearn.metrics.f1_score(truth, predicted, average="macro")
    assert last["query macro_f1"] == pytest.approx(f1, abs=1e-6)
    balanced = sklearn.metrics.balanced_accuracy_score(truth, predicted)
    assert last["query balanced_accuracy"] == pytest.approx(balanced, abs=1e-6)
    nll = -np.mean([math.log(float(row[f"p({row['class']})"])) for row in predictions])
    assert last["query nll"] == last["query loss"] == pytest.approx(nll, rel=1e-4)
    assert "queries by class" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80 and "…" not in done.stdout
    assert f"{100 * last['query balanced_accuracy']:.1f} %" in done.stdout
    # Queries without classes are predicted, and nothing is reported by class.
    (tmp_path / "flat").mkdir()
    for i, path in enumerate(sorted((tmp_path / "query").glob("*/*.png"))):
        shutil.copy(path, tmp_path / f"flat/{i}.png")
    metarun("adapt", *words, "query=flat", "hydra.run.dir=flat_out")
    assert len(rows_of(tmp_path / "flat_out/predictions.csv")) == 13
    assert not list((tmp_path / "flat_out").glob("c*_queries_by_class*"))
    assert "query loss" not in json.loads((tmp_path / "flat_out/steps.json").read_text())[-1]


def squared_error_of_relations(logits: Tensor, targets: Tensor) -> float:
    wanted = np.eye(logits.shape[1])[targets.numpy()]
    return float(np.mean((1 / (1 + np.exp(-logits.numpy())) - wanted) ** 2))


def smoothed_cross_entropy(logits: Tensor, targets: Tensor) -> float:
    wanted = 0.7 * np.eye(logits.shape[1])[targets.numpy()] + 0.3 / logits.shape[1]
    shares = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    return float(-(wanted * np.log(shares)).sum(1).mean())


def restored(run: Path, hardware: Hardware) -> tuple[Algorithm, Glyphs]:
    content = checkpoint.load(run / "best.pt")
    settings = typed(config_of(content, run / "best.pt", ()))
    algorithm, _, _ = rebuild(content, settings, hardware, run / "best.pt")
    return algorithm.eval(), build_dataset(settings.dataset)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("words", "loss"),
    [
        (["algorithm=relation", "algorithm.width=8"], squared_error_of_relations),
        (["algorithm=metaoptnet", "algorithm.label_smoothing=0.3"], smoothed_cross_entropy),
    ],
)
def test_adapting_and_evaluating_report_a_methods_own_loss(metarun, trained, tmp_path: Path, words, loss):
    run = trained(*words, *UNTESTED)
    metarun("adapt", f"checkpoint={run}", "queries=4", "seed=3", "hydra.run.dir=out")
    row = json.loads((tmp_path / "out/steps.json").read_text())[-1]
    hardware, shape = Hardware("cpu"), EpisodeShape(5, 1, 4)
    algorithm, dataset = restored(run, hardware)
    source = dataset.split("test")
    episodes = source.gather(next(fixed_draws(source, shape, 1, 3)), shape)
    with torch.no_grad():
        logits = algorithm.predict(algorithm.adapt(episodes), episodes.query_x)[0].double()
    assert row["query loss"] == pytest.approx(loss(logits, episodes.query_y[0]), rel=1e-4)
    assert evaluate(algorithm, source, EvalSettings(shape, 1, 3), hardware).loss == pytest.approx(
        row["query loss"], rel=1e-5
    )
    shares = logits.softmax(-1)[torch.arange(len(logits)), episodes.query_y[0]]
    assert row["query loss"] != pytest.approx(-shares.log().mean().item(), rel=1e-2)
