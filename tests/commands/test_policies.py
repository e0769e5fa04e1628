"""Environments through the command line, on one small run of 2D navigation."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from metarun.reporting import drawing

pytestmark = pytest.mark.xdist_group("environments")  # one process trains for all

SMALL = [
    "dataset=navigation2d",
    "dataset.horizon=8",
    "backbone.hidden=[16]",
    "shots=4",
    "queries=4",
    "meta_batch=4",
    "iterations=4",
    "validation.every=2",
    "validation.episodes=6",
    "test.episodes=6",
    "checkpoint.every=1",
    "hardware=cpu",
    "log.tensorboard=false",
]


def test_training_reports_the_return_before_and_after_adaptation(trained):
    run = trained(*SMALL)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows if row["split"] == "validation"] == [0, 2, 4]
    assert all(math.isfinite(row["return"]) and math.isfinite(row["return_before"]) for row in rows)
    result = json.loads((run / "result.json").read_text())
    assert result["metric"] == "return"
    assert result["test"]["metrics"].keys() == {"return", "return_before"}


def test_progress_lines_and_the_learning_curve_show_returns_without_the_loss(metarun, monkeypatch):
    drawn: list[int] = []

    def panels(count: int, *words: object) -> object:
        drawn.append(count)
        return drawing.panels(count, *words)

    monkeypatch.setattr("metarun.reporting.plots.panels", panels)
    done = metarun("train", *SMALL, "iterations=1", "test.episodes=0", "hydra.run.dir=run")
    assert drawn == [2]  # after adaptation, and before it
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("iteration      1"))
    assert line.count(" to ") == 2 and "loss" not in line


@pytest.mark.parametrize("sampler", ["uniform", "plr"])
def test_a_run_that_stopped_ends_like_one_that_did_not(metarun, trained, sampler: str):
    words = [*SMALL, f"sampler={sampler}", "test.episodes=0"]
    whole = trained(*words)
    metarun("train", *words, "iterations=2", "hydra.run.dir=run")
    metarun("train", "resume=run", "iterations=4")
    states = [torch.load(each / "last.pt", weights_only=True) for each in (whole, Path("run"))]
    for name, weight in states[0]["algorithm"].items():
        assert torch.equal(weight, states[1]["algorithm"][name]), name
    if sampler == "plr":
        assert torch.equal(*(state["sampler"]["scores"] for state in states))
    logs = [(each / "metrics.jsonl").read_text().splitlines() for each in (whole, Path("run"))]
    rows = [[{**json.loads(line), "seconds": 0} for line in log] for log in logs]
    assert rows[0] == rows[1]


def test_evaluation_over_steps_with_a_rate_for_each(metarun, trained):
    run = trained(*SMALL)
    done = metarun(
        "eval", f"checkpoint={run}", "steps=[0,1,2]", "rates=[0.01,0.1]", "episodes=6", "queries=3",
        "hydra.run.dir=out",
    )  # fmt: skip
    assert done.stderr.count("inner rate 0.") == 2  # there is nothing to choose without a step
    assert "navigation2d, test, 6 tasks, seed 0" in done.stdout and "transductive" not in done.stdout
    rows = list(csv.DictReader(Path("out/results.csv").read_text().splitlines()))
    assert rows.pop()["model"] == "optimum, task known"
    assert [row["episodes_seen"] for row in rows] == ["0", "4", "8"]
    assert len({row["episodes_hash"] for row in rows}) == 1
    assert [bool(row["rate"]) for row in rows] == [False, True, True]
    shown = [line.split("│")[1:7] for line in done.stdout.splitlines() if line.startswith("│ maml ")]
    assert [line[3].strip() for line in shown[:3]] == [row["rate"] for row in rows]


def test_the_chosen_rate_is_the_one_that_is_evaluated(metarun, trained):
    run = trained(*SMALL)
    scores = {}
    for name, words in {
        "chosen": ["rates=[0.001,0.1]"],
        "small": ["rates=[0.001]"],
        "large": ["rates=[0.1]"],
    }.items():
        metarun("eval", f"checkpoint={run}", "episodes=6", *words, f"hydra.run.dir={name}")
        row, _ = json.loads(Path(name, "results.json").read_text())["results"]
        scores[name] = row["rate"], row["mean"]
    assert scores["small"][1] != scores["large"][1]
    assert scores["chosen"] in (scores["small"], scores["large"])


METHODS = {  # and the inner loop that each has
    "fomaml": "SGD",
    "anil": "SGD",
    "boil": "SGD",
    "meta_sgd": "MetaSGD",
    "meta_curvature": "MetaCurvature",
    "cavia": "SGD",
    "pretrain inner_loop.test_steps=1": "SGD",
    "reptile outer_loop=gradient": "Adam",
    "maml outer_loop=ppo": "SGD",
    "maml outer_loop=gradient backbone.activation=tanh": "SGD",
    "maml dataset.estimator.credit=true dataset.reward=sparse dataset.radius=0.5": "SGD",
}


@pytest.mark.parametrize("words", METHODS)
def test_methods_with_inner_steps_learn_a_policy(metarun, words: str):
    words_of_run = [*SMALL, "iterations=1", "test.episodes=0", *f"algorithm={words}".split()]
    metarun("train", *words_of_run, "hydra.run.dir=run")
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    splits = [(row["split"], row["iteration"]) for row in rows]
    assert splits == [("validation", 0), ("train", 1), ("validation", 1)]
    assert all(math.isfinite(row["return"]) for row in rows)
    last = torch.load("run/last.pt", weights_only=True)
    assert all(torch.isfinite(weight).all() for weight in last["algorithm"].values())
    inner_loop = last["config"]["inner_loop"]
    assert inner_loop["_target_"].rpartition(".")[2] == METHODS[words]
    assert inner_loop.get("test_decay", 0.5) == 0.5
    if "pretrain" not in words:  # adaptation changes what a policy does
        assert rows[0]["return"] != rows[0]["return_before"]


def test_models_are_compared_on_the_same_number_of_queries_only(metarun, trained):
    run = trained(*SMALL)
    other = trained(*SMALL, "validation.queries=3")
    metarun("eval", f"checkpoint=[{run},{other}]", "episodes=4", "hydra.run.dir=out")
    content = json.loads(Path("out/results.json").read_text())
    by_task = {row["cell"] for row in content["results"]}
    assert by_task == {"4-shot, 4 queries", "4-shot, 3 queries"}
    names = {row["model"] for row in content["results"]} - {"optimum, task known"}
    pairs = [pair for pair in content["comparisons"] if pair["a"] in names and pair["b"] in names]
    assert len(names) == 2 and len(pairs) == 2  # one for each number of queries


@pytest.mark.pictures
def test_adapting_to_one_task_shows_each_step_and_the_paths(metarun, trained):
    run = trained(*SMALL)
    words = ["adapt", f"checkpoint={run}", "task={goal:[0.3,-0.4]}", "steps=2"]
    done = metarun(*words, "hydra.run.dir=out")
    assert "goal [0.3, -0.4]" in done.stdout
    assert "best possible return" in done.stderr
    rows = json.loads(Path("out/steps.json").read_text())
    assert [(row["step"], row["episodes seen"]) for row in rows] == [(0, 0), (1, 4), (2, 8)]
    assert Path("out/paths.png").stat().st_size > 5000
    content = torch.load("out/adapted.pt", weights_only=True)
    assert content["adapted"]["params"]["head.constants"].shape == (1, 2)
    metarun(*words, "hydra.run.dir=again")
    assert json.loads(Path("again/steps.json").read_text()) == rows


def test_a_policy_that_is_not_finite_is_refused(metarun, trained):
    broken = shutil.copytree(trained(*SMALL), "broken")
    metarun("adapt", f"checkpoint={broken}", "steps=1")  # it was sound
    state = torch.load("broken/best.pt", weights_only=True)
    state["algorithm"]["learner.head.constants"] += 200.0  # deviations that overflow
    torch.save(state, "broken/best.pt")
    done = metarun("adapt", f"checkpoint={broken}", "steps=1", status=1)
    assert "not finite" in done.stderr and done.stderr.count("\n") == 1


ERRORS = {
    "train dataset=navigation2d algorithm=protonet": "and this dataset is an environment",
    "train dataset=navigation2d algorithm=maml_plus_plus": "learns from labelled examples",
    "train dataset=navigation2d ways=5": "a task of an environment has one way",
    "train dataset=navigation2d backbone=conv4": "backbone=conv4 takes images",
    "train dataset=navigation2d shots=0": "shots=0: algorithm=maml learns by inner steps",
    "train dataset=navigation2d augment=standard": "has no images to augment",
    "train dataset=navigation2d optimizer.lr=0.1": "nothing reads it in outer_loop=trpo",
    "train dataset=navigation2d dataset.estimator.credt=true": "did you mean 'credit'",
    "train dataset=navigation2d dataset.estimator.surrogate=foo": "must be one of log_prob, lvc, dice",
    "train dataset=navigation2d outer_loop=gradient dataset.estimator.credit=true": "choose outer_loop=trpo",
    "train dataset=navigation2d algorithm=reptile": "choose outer_loop=gradient",
    "train dataset=navigation2d metrics=[accuracy]": "have no 'accuracy'; choose from return",
    "train outer_loop=ppo": "is for environments",
    "train sampler=plr sampler.replay=2": "error: sampler.replay=2: must be from 0 to 1",
    "train dataset=navigation2d outer_loop.max_kl=-1": "error: outer_loop.max_kl=-1: must be above 0",
    "train dataset=bandit dataset.pulls=0": "error: dataset.pulls=0: must be at least 1",
    "train dataset=bandit algorithm=maml": "from the trajectories of the shots; set shots, as in shots=20",
    "train dataset=navigation2d algorithm=maml inner_loop=adam_carried": "a task several times",
    "train dataset=bandit outer_loop=trpo": "another option here sets; leave outer_loop=trpo out",
}


@pytest.mark.parametrize("words", ERRORS)
def test_errors_are_one_line(metarun, words: str):
    done = metarun(*words.split(), status=1)
    assert ERRORS[words] in done.stderr
    assert done.stderr.strip().count("\n") == 0


def test_a_diverged_policy_names_the_settings_that_its_steps_depend_on(metarun):
    done = metarun("train", *SMALL, "inner_rate=1e30", status=1)
    assert "lower inner_loop.rate or outer_loop.max_kl" in done.stderr.splitlines()[-1]


def test_errors_of_other_commands(metarun, trained):
    run = trained(*SMALL)
    for words, message in {
        "adapt task={gaol:[1,2]}": "has the parameters goal, as in",
        "adapt task={goal:[1]}": "task.goal=[1]: must be 2 numbers",
        "adapt task={goal:near}": "task.goal=near: must be 2 numbers",
        "adapt support=. task={goal:[1,2]}": "nothing reads it with support",
        "adapt support=.": "support=.: ",
        "export format=safetensors": "is a policy for an environment",
        "adapt dataset=glyphs transductive=true": "dataset=glyphs: is examples",
        "eval dataset=glyphs transductive=true": "dataset=glyphs: is examples",
        "eval rates=[]": "rates=[]: must name at least one number",
        "eval rates=[-1.0]": "rates=-1.0: must be at least 0",
    }.items():
        command, *rest = words.split()
        done = metarun(command, f"checkpoint={run}", *rest, status=1)
        assert message in done.stderr, (words, done.stderr)
        assert done.stderr.strip().count("\n") == 0, done.stderr
