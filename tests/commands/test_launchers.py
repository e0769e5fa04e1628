"""Sweeps with the plugins of Hydra, for real: jobs run by joblib, submitit and Ray, chosen by Optuna."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import TINY, UNTESTED

LAUNCHERS = {
    "joblib": ["hydra.launcher.n_jobs=2"],
    "submitit_local": ["hydra.launcher.timeout_min=5"],
    "ray": ["+hydra.launcher.ray.init.num_cpus=2"],
}


def needs(plugin: str) -> None:
    package = f"hydra_plugins.hydra_{plugin}"
    if not importlib.util.find_spec("hydra_plugins") or not importlib.util.find_spec(package):
        pytest.skip(f"{package} is not installed")


def command(launcher: str, *words: str) -> list[str]:
    options = [f"hydra/launcher={launcher}", *LAUNCHERS[launcher], "sweep=sweep"]
    return [sys.executable, "-m", "metarun", "train", "-m", *UNTESTED, *options, *words]


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "sweep/sweep.csv").read_text().splitlines()))


@pytest.mark.long
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_jobs_of_a_launcher_are_rows_and_are_kept(launcher: str, tmp_path: Path):
    needs(f"{launcher.partition('_')[0]}_launcher")
    words = command(launcher, "algorithm=protonet,maml", "inner_loop.steps=2", "seed=0,1", "iterations=3")
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "4 jobs in sweep" in done.stdout, done.stderr
    rows = table(tmp_path)
    assert [row["inner_loop.steps"] for row in rows] == [""] * 2 + ["2"] * 2
    files = [path.stat().st_mtime_ns for path in sorted((tmp_path / "sweep").glob("*/last.pt"))]
    again = subprocess.run([*words, "retry=none"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0 and table(tmp_path) == rows, again.stderr
    assert files == [path.stat().st_mtime_ns for path in sorted((tmp_path / "sweep").glob("*/last.pt"))]


@pytest.mark.long
@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_job_that_submitit_queues_again_goes_on_by_itself(tmp_path: Path):
    needs("submitit_launcher")
    words = command("submitit_local", "seed=0,1", "iterations=400", "checkpoint.every=400")
    with open(tmp_path / "log.txt", "w") as log:
        process = subprocess.Popen(words, cwd=tmp_path, stdout=log, stderr=log)
    rows = tmp_path / "sweep/1/metrics.jsonl"
    while process.poll() is None and not (rows.exists() and len(rows.read_text().splitlines()) > 8):
        time.sleep(0.05)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        words = path.read_bytes().split(b"\0")
        if b"submitit.core._submit" in words and str(tmp_path).encode() in words[-2]:
            os.kill(int(path.parent.name), signal.SIGUSR2)  # Slurm's warning that the time is over
    assert process.wait() == 0, (tmp_path / "log.txt").read_text()
    logs = [path.read_text() for path in (tmp_path / "sweep/.submitit").glob("*/*_log.err")]
    assert sum("resumed at iteration" in text for text in logs) >= 1
    assert [row["validation accuracy"] != "" for row in table(tmp_path)] == [True, True]


@pytest.mark.long
def test_a_search_that_is_killed_goes_on_with_its_study(tmp_path: Path):
    needs("optuna_sweeper")
    optuna = pytest.importorskip("optuna")
    space = ["optimizer.lr=tag(log,interval(1e-3,1e-1))", "ways=choice(3,5)", "backbone.width=4"]
    options = ["hydra/sweeper=optuna", "search=protonet", "hydra.sweeper.n_trials=3", "sweep=sweep"]
    tiny = [word for word in TINY if not word.startswith("backbone.width")]
    words = ["train", "-m", *tiny, *options, *space, "iterations=60", "checkpoint.every=3"]
    words = [sys.executable, "-m", "metarun", *words]
    process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(tmp_path.glob("sweep/*/result.json"))) < 1:
        time.sleep(0.05)
    while process.poll() is None and len(list(tmp_path.glob("sweep/*/last.pt"))) < 2:
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("resumed at iteration") == 1, done.stderr
    trials = optuna.load_study(study_name="metarun", storage=f"sqlite:///{tmp_path}/sweep/study.db").trials
    complete = [trial.value for trial in trials if trial.state.name == "COMPLETE"]
    scores = [float(row["validation accuracy"]) for row in table(tmp_path)]
    assert sorted(complete) == sorted(scores) and len(scores) == 3 and len(trials) == 4
    assert f"best_value: {max(scores)}" in (tmp_path / "sweep/optimization_results.yaml").read_text()
    wrong = [*words, "hydra.sweeper.direction=minimize", "sweep=wrong", "hydra.sweeper.n_trials=1"]
    refused = subprocess.run(wrong, cwd=tmp_path, capture_output=True, text=True)
    assert (
        refused.returncode == 1
        and "accuracy is better if higher; set hydra.sweeper.direction=max" in refused.stderr
    )
    assert refused.stderr.splitlines()[-1] == (
        "metarun: error: no trial of the search has succeeded; the table shows why"
    )


@pytest.mark.long
def test_hopeless_trials_end_early(tmp_path: Path):
    """Those, and only those, whose best validation is below the median of the trials before at that time."""
    needs("optuna_sweeper")
    optuna = pytest.importorskip("optuna")
    options = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.sampler.seed=3",
        "hydra.sweeper.n_trials=9",
        "sweep=sweep",
    ]
    space = ["optimizer.lr=tag(log,interval(1e-5,1e-1))", "iterations=18", "stop.hopeless=true"]
    words = [sys.executable, "-m", "metarun", "train", "-m", *UNTESTED, *options, *space]
    subprocess.run(words, cwd=tmp_path, capture_output=True, check=True)
    study = optuna.load_study(study_name="metarun", storage=f"sqlite:///{tmp_path}/sweep/study.db")
    curves: list[dict[int, float]] = []
    ended = []
    for trial in study.trials:
        (folder,) = (
            path.parent
            for path in tmp_path.glob("sweep/*/result.json")
            if f"optimizer.lr={trial.params['optimizer.lr']}" in json.loads(path.read_text())["overrides"]
        )
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        curve = {row["iteration"]: row["accuracy"] for row in rows if row["split"] == "validation"}
        below = [
            step
            for step in (6, 12, 18)
            if len(curves) >= 5
            and step in curve
            and max(curve[each] for each in curve if each <= step)
            < np.median([other[step] for other in curves if step in other])
        ]
        stopped = "stopped_by" in json.loads((folder / "result.json").read_text())
        assert stopped == bool(below) and (not stopped or max(curve) == below[0]), (trial.number, curve)
        ended.append(stopped)
        curves.append(curve)
    assert sum(ended) >= 2
    assert all(trial.value == max(curve.values()) for trial, curve in zip(study.trials, curves, strict=True))
