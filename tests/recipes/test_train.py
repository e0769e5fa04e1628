"""`metarun train` as a person types it, on small real runs."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY

FILES = {"best.pt", "last.pt", "metrics.jsonl", "learning_curve.png", "result.json"}
ALGORITHMS = ["protonet", "maml", "fomaml", "anil", "reptile"]


def run_folder(parent: Path) -> Path:
    (folder,) = parent.glob("outputs/*/*")
    return folder


def rows_of(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl without the times, which no two runs share."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same(a: object, b: object) -> bool:
    """Whether nested containers are equal bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_trains_evaluates_and_adapts(metarun, tmp_path: Path, algorithm: str):
    done = metarun("train", f"algorithm={algorithm}", *TINY)
    folder = run_folder(tmp_path)
    assert {path.name for path in folder.iterdir()} >= FILES
    assert f"metarun eval checkpoint={folder.relative_to(tmp_path)}" in done.stdout
    result = json.loads((folder / "result.json").read_text())
    assert result["iterations"] == 12
    assert 0 <= result["test"]["mean"] <= 1
    evaluated = metarun("eval", f"checkpoint={folder}", "episodes=10", "queries=3", "shots=[1,2]")
    assert "5-way 2-shot" in evaluated.stdout
    adapted = metarun("adapt", f"checkpoint={folder}", "queries=2")
    assert "10 queries" in adapted.stdout


@pytest.mark.parametrize("algorithm", ["maml", "reptile"])
def test_regression_trains_evaluates_and_adapts(metarun, tmp_path: Path, algorithm: str):
    words = ["train", "dataset=sinusoid", f"algorithm={algorithm}", "iterations=20", "test.episodes=20"]
    done = metarun(*words, "validation.every=10", "log.tensorboard=false")
    assert "mse" in done.stdout
    folder = run_folder(tmp_path)
    metarun("eval", f"checkpoint={folder}", "episodes=20", "steps=2", "hydra.run.dir=evaluated")
    results = json.loads((tmp_path / "evaluated/results.json").read_text())["results"]
    assert results[0]["metric"] == "mse"
    metarun("adapt", f"checkpoint={folder}", "hydra.run.dir=adapted")
    assert (tmp_path / "adapted/curves.png").stat().st_size > 5000


def test_training_learns(metarun, tmp_path: Path):
    """A minute's work at most, and well above both chance and the untrained network."""
    words = ["train", "backbone.width=16", "iterations=150", "ways=5", "validation.every=150"]
    data = ["dataset.train_classes=200", "dataset.validation_classes=50", "dataset.test_classes=100"]
    metarun(*words, *data, "test.episodes=200", "log.tensorboard=false", "hardware.threads=1")
    trained = json.loads((run_folder(tmp_path) / "result.json").read_text())["test"]["mean"]
    words[2] = "iterations=1"
    metarun(
        *words,
        *data,
        "test.episodes=200",
        "log.tensorboard=false",
        "optimizer.lr=1e-9",
        "hydra.run.dir=start",
    )
    untrained = json.loads((tmp_path / "start/result.json").read_text())["test"]["mean"]
    assert trained > max(untrained + 0.08, 0.7)


def test_the_same_seed_gives_the_same_run(metarun, tmp_path: Path):
    for folder in ("a", "b"):
        metarun("train", "algorithm=maml", *TINY, f"hydra.run.dir={folder}")
    metarun("train", "algorithm=maml", *TINY, "hydra.run.dir=c", "seed=1")
    assert rows_of(tmp_path / "a") == rows_of(tmp_path / "b") != rows_of(tmp_path / "c")


@pytest.mark.parametrize("algorithm", ["maml", "reptile"])
def test_killed_three_times_it_ends_bit_identical(metarun, tmp_path: Path, algorithm: str):
    """kill -9 at any moment; weights, optimizer, random state and metrics as if never stopped."""
    words = [f"algorithm={algorithm}", *TINY, "iterations=60", "validation.every=10", "log.every=4"]
    metarun("train", *words, "hydra.run.dir=whole")
    command = [sys.executable, "-m", "metarun", "train"]
    start = [*words, "hydra.run.dir=killed"]
    killed = 0
    for fraction in (0.15, 0.4, 0.7):
        resume = (tmp_path / "killed/last.pt").exists()
        process = subprocess.Popen(
            [*command, *(["resume=killed"] if resume else start)],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for_rows(tmp_path / "killed/metrics.jsonl", int(fraction * 60), process)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
    assert killed == 3
    metarun("train", "resume=killed")
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "killed")]
    for state in states:
        del state["seconds"]
    assert states[0]["iteration"] == 60
    assert same(*states)
    assert rows_of(tmp_path / "whole") == rows_of(tmp_path / "killed")


def wait_for_rows(path: Path, iteration: int, process: subprocess.Popen, seconds: float = 120) -> None:
    """Until the metrics have reached an iteration."""
    for _ in range(int(seconds / 0.01)):
        found = re.findall(r'"iteration": (\d+)', path.read_text()) if path.exists() else []
        if any(int(number) >= iteration for number in found) or process.poll() is not None:
            return
        time.sleep(0.01)
    raise TimeoutError(f"{path} did not reach iteration {iteration}")


def test_ctrl_c_saves_and_says_how_to_go_on(metarun, tmp_path: Path):
    process = subprocess.Popen(
        [sys.executable, "-m", "metarun", "train", *TINY, "iterations=100000", "hydra.run.dir=run"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    wait_for_rows(tmp_path / "run/metrics.jsonl", 6, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "metarun train resume=run" in errors
    assert "Traceback" not in errors
    stopped = torch.load(tmp_path / "run/last.pt", weights_only=True)["iteration"]
    metarun("train", "resume=run", f"iterations={stopped + 4}")
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["iteration"] == stopped + 4


def test_a_sweep_ends_with_one_table(metarun, tmp_path: Path):
    done = metarun("train", "-m", "algorithm=maml,protonet", "seed=0,1", *TINY, "hydra.sweep.dir=sweep")
    assert "4 jobs" in done.stdout
    lines = (tmp_path / "sweep/sweep.csv").read_text().splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("job,algorithm,seed")


def test_a_failed_job_is_a_row_and_the_sweep_goes_on(metarun, tmp_path: Path):
    words = ["train", "seed=0", "-m", "ways=5,50", *TINY, "hydra.sweep.dir=sweep"]
    done = metarun(*words, status=1)
    assert "ways=50: glyphs train has 40 classes" in " ".join(done.stderr.split())
    text = (tmp_path / "sweep/sweep.csv").read_text()
    assert len(text.splitlines()) == 3
    assert "ways=50" in text


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(metarun, tmp_path: Path):
    words = ["train", "algorithm=maml", *TINY, "hydra.run.dir=run", "iterations=200"]
    done = metarun(*words, "optimizer._target_=torch.optim.SGD", "optimizer.lr=1e30", status=1)
    assert "no longer finite" in done.stderr
    assert "Traceback" not in done.stderr
    for path in (tmp_path / "run").glob("*.pt"):
        weights = torch.load(path, weights_only=True)["algorithm"].values()
        assert all(weight.isfinite().all() for weight in weights)


def test_tensorboard_has_the_curves(metarun, tmp_path: Path):
    metarun("train", *TINY, "log.tensorboard=true", "hydra.run.dir=run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("validation/accuracy")] == [6, 12]
