"""`metarun eval` as a person types it."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.runs import UNTESTED
from rich.console import Console
from torch import nn

from metarun.commands.cells import Cell, Reference, shapes_for
from metarun.commands.differences import (
    best_models,
    comparisons,
    difference_rows,
    report_pairs,
    with_the_best,
)
from metarun.commands.evaluate import classes_in, row_of, table_of
from metarun.config.schema import EvalConfig, TrainConfig
from metarun.datasets.glyphs import Glyphs
from metarun.inference.model import Model
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.objectives import ACCURACY, CLASSIFICATION, metric_named
from metarun.training.evaluation import Result


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, trained) -> Path:
    """Two small runs, `maml` and `protonet`."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("maml", "protonet"):
        shutil.copytree(trained(f"algorithm={name}", *UNTESTED), folder / name)
    return folder


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_a_checkpoints_dataset_is_built_once(metarun, runs: Path, monkeypatch: pytest.MonkeyPatch):
    built, make = [], Glyphs.__init__
    monkeypatch.setattr(Glyphs, "__init__", lambda self, **own: (built.append(own), make(self, **own))[1])
    metarun("eval", f"checkpoint={runs}/protonet", "episodes=2", "queries=1")
    assert len(built) == 1


@pytest.mark.pictures
def test_a_grid_with_a_cell_that_cannot_be(metarun, runs: Path, tmp_path: Path):
    done = metarun(
        "eval",
        f"checkpoint=[{runs}/maml,{runs}/protonet]",
        "ways=[5,8]",
        "shots=[1,3]",
        "episodes=20",
        "queries=4",
        "hydra.run.dir=out",
    )
    assert "algorithm.head=shared" in done.stdout
    content = results_of(tmp_path / "out")
    assert len(content["results"]) == 8
    refused = [row for row in content["results"] if row["reason"]]
    assert {(row["model"], row["ways"]) for row in refused} == {("maml", 8)}
    assert len(content["comparisons"]) == 2
    with (tmp_path / "out/results.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 8
    assert (tmp_path / "out/results.png").stat().st_size > 5000


def test_the_same_episodes_whatever_the_checkpoint_and_however_many_at_once(
    metarun, runs: Path, tmp_path: Path
):
    hashes, means = set(), set()
    for i, words in enumerate((["hardware.tasks_at_once=1"], ["hardware.tasks_at_once=50"])):
        metarun(
            "eval",
            f"checkpoint=[{runs}/maml,{runs}/protonet]",
            "episodes=60",
            *words,
            f"hydra.run.dir=out{i}",
        )
        rows = results_of(tmp_path / f"out{i}")["results"]
        hashes |= {row["episodes_hash"] for row in rows}
        means.add(tuple(round(row["mean"], 4) for row in rows))
    assert len(hashes) == 1
    assert len(means) == 1
    metarun("eval", f"checkpoint={runs}/maml", "episodes=60", "seed=1", "hydra.run.dir=other")
    assert results_of(tmp_path / "other")["results"][0]["episodes_hash"] not in hashes


def test_another_domain_other_steps_and_one_query_at_a_time(metarun, runs: Path, tmp_path: Path):
    words = ["eval", f"checkpoint={runs}/maml/last.pt", "episodes=10", "queries=2"]
    metarun(*words, "dataset=glyphs", "dataset.seed=5", "steps=3", "transductive=false", "hydra.run.dir=out")
    row = results_of(tmp_path / "out")["results"][0]
    assert row["uses_query_statistics"] is False
    metarun(*words, "hydra.run.dir=own")
    own = results_of(tmp_path / "own")["results"][0]
    assert own["uses_query_statistics"] is True
    assert own["episodes_hash"] != row["episodes_hash"]


def test_steps_and_one_query_at_a_time_change_what_they_should(metarun, runs: Path, tmp_path: Path):
    means = {}
    for name, words in {"own": [], "more": ["steps=10"], "none": ["steps=0"]}.items():
        metarun("eval", f"checkpoint={runs}/maml", "episodes=60", *words, f"hydra.run.dir={name}")
        means[name] = results_of(tmp_path / name)["results"][0]["mean"]
    assert means["none"] == pytest.approx(0.2, abs=0.04)  # an unadapted head knows no class
    assert len(set(means.values())) == 3
    done = metarun("eval", f"checkpoint={runs}/protonet", "steps=3", status=1)
    assert "protonet has no such setting" in done.stderr
    done = metarun("eval", f"checkpoint=[{runs}/maml,{runs}/protonet]", "steps=3", "episodes=5", "queries=2")
    assert "steps: protonet has no such setting" in done.stderr


def test_splits_of_a_dataset_without_classes_differ_too(metarun, tmp_path: Path):
    words = ["dataset=sinusoid", "iterations=3", "log.tensorboard=false", "test.episodes=0"]
    metarun("train", *words, "hydra.run.dir=run")
    hashes = set()
    for split in ("train", "validation", "test"):
        metarun("eval", "checkpoint=run", f"split={split}", "episodes=10", f"hydra.run.dir={split}")
        hashes.add(results_of(tmp_path / split)["results"][0]["episodes_hash"])
    assert len(hashes) == 3


def test_every_row_names_its_own_dataset(metarun, runs: Path, tmp_path: Path):
    words = ["dataset=sinusoid", "iterations=3", "log.tensorboard=false", "test.episodes=0"]
    metarun("train", *words, "hydra.run.dir=sinus")
    metarun(
        "eval", f"checkpoint=[{runs}/maml,sinus]", "ways=[1,5]", "shots=1", "episodes=5", "hydra.run.dir=out"
    )
    rows = results_of(tmp_path / "out")["results"]
    assert [row["dataset"] for row in rows] == ["glyphs", "glyphs", "sinusoid", "sinusoid"]


@pytest.mark.pictures
def test_a_curve_over_inner_steps(metarun, runs: Path, tmp_path: Path):
    """A method without steps is evaluated once; the same steps as asked for alone give the same."""
    words = ["eval", f"checkpoint=[{runs}/maml,{runs}/protonet]", "episodes=20", "queries=4"]
    done = metarun(*words, "steps=[0,1,3]", "hydra.run.dir=curve")
    rows = results_of(tmp_path / "curve")["results"]
    assert [(row["model"], row["steps"]) for row in rows] == [
        ("maml", 0),
        ("maml", 1),
        ("maml", 3),
        ("protonet", None),
    ]
    assert re.search(r"maml +│ 5-way 1-shot │ +3 │", done.stdout)
    assert "steps: protonet has no such setting" in done.stderr
    assert (tmp_path / "curve/steps.png").stat().st_size > 5000
    metarun(*words, "steps=3", "hydra.run.dir=alone")
    alone = results_of(tmp_path / "alone")["results"]
    assert alone[0]["mean"] == rows[2]["mean"] != rows[0]["mean"]
    assert len(results_of(tmp_path / "alone")["comparisons"]) == 1
    assert not (tmp_path / "alone/steps.png").exists()


def test_models_of_one_kind_are_distinguished_by_their_path(metarun, runs: Path, tmp_path: Path):
    for name in ("one", "two"):
        shutil.copytree(runs / "protonet", tmp_path / name / "run")
    paths = "one/run/best.pt,one/run/last.pt,two/run/best.pt"
    metarun("eval", f"checkpoint=[{paths}]", "episodes=5", "queries=2", "hydra.run.dir=out")
    names = [row["model"] for row in results_of(tmp_path / "out")["results"]]
    assert names == ["protonet run best one", "protonet run last", "protonet run best two"]


def result_of(shape: EpisodeShape, scores: torch.Tensor) -> Result:
    return Result(shape, (ACCURACY,), {"accuracy": scores}, scores, "same", False, 1.0)


def test_models_with_other_metrics_are_compared_by_those_that_they_share():
    """The best of each metric is the best by that metric, whichever is the main metric of a model."""
    own = {"a": (0.9, 0.3), "b": (0.8, 0.1), "c": (0.7, None)}  # accuracy and calibration error
    cells = []
    for name, (accuracy, error) in own.items():
        cell = cell_of(name, result_of(EpisodeShape(5, 1, 5), torch.full((4,), accuracy)))
        if error is not None:
            metrics = (metric_named("ece"), ACCURACY)
            scores = cell.result.scores | {"ece": torch.full((4,), error)}
            cell.result = replace(cell.result, metrics=metrics, scores=scores)
            cell.source = cell.source.reporting(replace(CLASSIFICATION, metrics=metrics))
        cells.append(cell)
    pairs = comparisons(cells)
    assert [(pair["a"], pair["b"], pair["metric"].name) for pair in pairs] == [
        ("a", "b", "ece"),
        ("a", "b", "accuracy"),
        ("a", "c", "accuracy"),
        ("b", "c", "accuracy"),
    ]
    assert [round(pair["difference"], 3) for pair in pairs] == [0.2, 0.1, 0.2, 0.1]
    assert with_the_best(pairs, cells) == pairs[:3]


def test_what_is_not_typed_is_as_in_the_training_of_models_on_the_same_dataset(monkeypatch):
    monkeypatch.setattr("metarun.commands.cells.dataset_name", lambda model: model.content["dataset"])
    trained = {"a": ("glyphs", 5, 1), "b": ("glyphs", 20, 1), "c": ("sinusoid", 1, 10)}
    models = [
        Model(
            name,
            Path(name),
            TrainConfig(ways=ways, shots=shots, queries=9),
            None,
            None,
            None,
            {"dataset": data},
            None,
        )  # type: ignore[arg-type]
        for name, (data, ways, shots) in trained.items()
    ]

    def shapes(**typed: object) -> list[str]:
        command = EvalConfig(queries=15, **typed)  # type: ignore[arg-type]
        return [" ".join(map(str, shapes_for(model, models, command))) for model in models]

    assert shapes() == ["5-way 1-shot 20-way 1-shot"] * 2 + ["1-way 10-shot"]
    assert shapes(shots=[2, 3])[1:] == [
        "5-way 2-shot 5-way 3-shot 20-way 2-shot 20-way 3-shot",
        "1-way 2-shot 1-way 3-shot",
    ]
    assert shapes(ways=7, shots=1) == ["7-way 1-shot"] * 3


def cell_of(name: str, result: Result) -> Cell:
    """A result of a model of which only the name counts."""
    source = ClassStore(torch.zeros(2, 1, 1, 1, dtype=torch.uint8), [1, 1], ["a", "b"], "glyphs")
    model = Model(name, Path(name), TrainConfig(), None, source.spec, nn.Identity(), {}, None)  # type: ignore[arg-type]
    return Cell(model, result.shape, None, source, "glyphs", result)


def test_the_table_fits_eighty_columns_with_long_names_and_reasons(monkeypatch):
    console = Console(width=80)
    monkeypatch.setattr("metarun.commands.evaluate.console", console)
    result = result_of(EpisodeShape(20, 1, 5), torch.ones(4))
    cells = []
    for name in ("gnn", "baseline_plus_plus", "metaoptnet run last a_folder_of_a_long_name"):
        cells.append(cell_of(name, result))
        cells.append(replace(cells[-1], result=None, reason="a reason of many words " * 4))
    with console.capture() as captured:
        console.print(table_of(cells, (ACCURACY,), "title"))
    lines = captured.get().splitlines()
    assert all(line[-1] in "┓┩┫┃│┘┛" for line in lines[1:])
    varied = replace(result, shape=EpisodeShape(5, 1, 5, True))
    with console.capture() as captured:
        console.print(table_of([cell_of("protonet norm=layer", varied)], (ACCURACY,), "title"))
    assert all(line[-1] in "┓┩┫┃│┘┛" for line in captured.get().splitlines()[1:])
    pairs = [replace(cells[0], dataset=f"injongo eng to {name}") for name in ("eng", "swa", "yor", "zul")]
    title = classes_in(pairs, "test")
    assert title == "injongo eng to eng and 3 more, 2 test classes"
    with console.capture() as captured:
        console.print(table_of(pairs, (ACCURACY,), title))
    lines = captured.get().splitlines()
    assert all(line[-1] in "┓┩┫┃│┘┛" for line in lines[1:]) and "100.00 ± 0.00 %" in captured.get()


def test_of_many_models_the_best_stands_beside_the_others():
    """Every pair is in results.json; fifteen pairs a task would push the table off the screen."""
    means = {"a": 0.5, "b": 0.9, "c": 0.7, "d": 0.1, "e": 0.3}
    cells = []
    for name, mean in means.items():
        scores = torch.full((4,), mean)
        cells.append(cell_of(name, result_of(EpisodeShape(5, 1, 5), scores)))
    pairs = comparisons(cells)
    assert len(pairs) == 10
    shown = with_the_best(pairs, cells)
    assert [{pair["a"], pair["b"]} for pair in shown] == [{"a", "b"}, {"b", "c"}, {"b", "d"}, {"b", "e"}]
    rows = [row_of(cell, EvalConfig(split="test")) for cell in cells]
    drawn = difference_rows(rows, pairs, best_models(cells), ACCURACY)
    assert {row["model"]: round(row["mean"], 3) for row in drawn} == {
        name: round(mean - 0.9, 3) for name, mean in means.items()
    }
    assert [row["model"] for row in drawn if row["best"]] == ["b"]
    # Two references are compared in the figure alone, so that it has each model of a task.
    for cell in cells[1:3]:
        cell.model = Reference(cell.model.name)
    assert len(comparisons(cells)) == 9
    same = difference_rows(rows, comparisons(cells, references=True), best_models(cells), ACCURACY)
    assert [row["model"] for row in same] == list(means)
    # Where lower is better, the differences to the best are positive.
    lower = replace(ACCURACY, higher_is_better=False)
    for cell in cells:
        cell.result = replace(cell.result, metrics=(lower,))
        cell.source = cell.source.reporting(replace(CLASSIFICATION, metrics=(lower,)))
    drawn = difference_rows(rows, comparisons(cells), best_models(cells), lower)
    assert {row["model"]: round(row["mean"], 3) for row in drawn} == {
        name: round(mean - 0.1, 3) for name, mean in means.items()
    }


def test_differences_on_several_datasets_name_them_and_very_many_are_not_printed(monkeypatch, capsys):
    cells = []
    for dataset in ("glyphs", "omniglot"):
        for name, mean in (("a", 0.5), ("b", 0.9)):
            cell = cell_of(name, result_of(EpisodeShape(5, 1, 5), torch.full((4,), mean)))
            cells.append(replace(cell, dataset=dataset))
    pairs = comparisons(cells)
    report_pairs(pairs, cells)
    shown = capsys.readouterr().out
    assert "glyphs 5-way 1-shot" in shown and "omniglot 5-way 1-shot" in shown
    monkeypatch.setattr("metarun.commands.differences.LINES", 1)
    report_pairs(pairs, cells)
    done = capsys.readouterr()
    assert not done.out and "results.json contains the differences of 2 pairs of models" in done.err
