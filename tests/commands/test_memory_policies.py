"""Policies with a memory through the command line, on one small run in tabular decision processes."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from metarun.commands import differences

pytestmark = pytest.mark.xdist_group("rl2")  # one process trains for all

SMALL = [
    "dataset=tabular",
    "dataset.horizon=3",
    "algorithm.size=8",
    "meta_batch=6",
    "iterations=4",
    "shots=1",
    "queries=2",
    "validation.every=2",
    "validation.episodes=6",
    "test.episodes=6",
    "checkpoint.every=1",
    "hardware=cpu",
    "log.tensorboard=false",
]


def test_evaluation_has_rows_of_players_and_the_optimum(metarun, trained):
    run = trained(*SMALL)
    done = metarun("eval", f"checkpoint={run}", "shots=[0,3]", "episodes=20", "hydra.run.dir=out")
    rows = list(csv.DictReader(Path("out/results.csv").read_text().splitlines()))
    names = ["rl2", "random", "greedy", "PSRL", "optimum, task known"]
    assert {(row["model"], row["shots"], row["queries"]) for row in rows} == {
        (name, shots, "2") for name in names for shots in ("0", "3")
    }
    assert len({row["episodes_hash"] for row in rows}) == 2  # one for each number of shots
    assert [row["episodes_seen"] for row in rows if row["model"] == "rl2"] == ["0", "3"]
    means = {(row["model"], row["shots"]): float(row["mean"]) for row in rows}
    assert means["optimum, task known", "0"] > means["greedy", "0"] > means["random", "0"]
    assert "rl2 - PSRL" in done.stdout


def test_players_are_compared_with_the_best_model_alone(metarun, trained, monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(differences, "console", Console(file=out, width=160))
    runs = f"checkpoint=[{trained(*SMALL)},{trained(*SMALL, 'seed=1')}]"
    metarun("eval", runs, "episodes=4", "hydra.run.dir=out")
    content = json.loads(Path("out/results.json").read_text())
    models = {row["model"]: row["mean"] for row in content["results"] if row["model"].startswith("rl2")}
    pairs = [line.split("│")[2].strip() for line in out.getvalue().splitlines() if " - " in line]
    assert pairs[0] == " - ".join(models) and len(pairs) == (len(content["comparisons"]) + 1) / 2
    assert all(pair.startswith(f"{max(models, key=models.get)} - ") for pair in pairs[1:])


def test_a_policy_that_remembers_is_adapted_by_playing(metarun, trained):
    run = trained(*SMALL)
    done = metarun("adapt", f"checkpoint={run}", "shots=2", "hydra.run.dir=out")
    assert "inner" not in done.stdout  # it takes no steps
    assert "the best possible return of this task is" in done.stderr + done.stdout
    rows = json.loads(Path("out/steps.json").read_text())
    assert [row["episodes seen"] for row in rows] == [0, 2]
    assert Path("out/adapted.pt").is_file()


def test_a_run_that_stopped_ends_like_one_that_did_not(metarun, trained):
    words = [*SMALL, "scheduler=null", "algorithm.annealed=4", "test.episodes=0"]
    whole = trained(*words)
    metarun("train", *words, "iterations=2", "hydra.run.dir=run")
    metarun("train", "resume=run", "iterations=4")
    states = [torch.load(each / "last.pt", weights_only=True) for each in (whole, Path("run"))]
    assert states[1]["iteration"] == 4
    for name, weight in states[0]["algorithm"].items():
        assert torch.equal(weight, states[1]["algorithm"][name]), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["algorithm=rl2"], "algorithm=rl2: acts in environments"),
        (["dataset=bandit", "algorithm=protonet"], "algorithm=protonet: learns from labelled examples"),
        (["dataset=bandit", "dataset.estimator.baseline=none"], "nothing reads it in algorithm=rl2"),
        (["dataset=bandit", "algorithm.longest=9"], "nothing reads it with algorithm.memory=gru"),
        (["dataset=bandit", "dataset.pulls=0"], "dataset.pulls=0: must be at least"),
        (["dataset=bandit", "ways=2"], "ways=2: a task of an environment has one way"),
    ],
)
def test_errors_are_one_line(metarun, words: list[str], message: str):
    done = metarun("train", *words, "hydra.run.dir=run", status=1)
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "algorithm"),
    [
        (["dataset=bandit", "dataset.pulls=3"], "RL2"),
        (["dataset=pendulum", "dataset.horizon=4"], "MAML"),
        (["dataset=navigation2d", "dataset.horizon=4", "algorithm=rl2"], "RL2"),
    ],
)
def test_other_environments_train_by_their_own_settings(metarun, words: list[str], algorithm: str):
    small = [word for word in SMALL[3:] if not word.startswith(("shots", "queries"))]
    metarun("train", *words, *small, "iterations=1", "test.episodes=0", "hydra.run.dir=run")
    config = torch.load("run/last.pt", weights_only=True)["config"]
    assert config["algorithm"]["_target_"].endswith(algorithm)
    assert config["outer_loop"]["_target_"].endswith("PPO" if algorithm == "RL2" else "TRPO")
