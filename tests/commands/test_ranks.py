"""`torchrun -m metarun`: several processes make one run, and lose nothing when some of them are killed."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.runs import TINY, import_path

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")

RUN = [*TINY, "hardware.precision=float64", "meta_batch=5", "optimizer._target_=torch.optim.SGD"]


def torchrun(count: int, *words: str) -> list[str]:
    """The command that runs `metarun WORDS` in so many processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return [*launcher, "-m", "metarun", *words]


def started(folder: Path, count: int, *words: str, **streams) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": import_path()}
    if Path("/sys/class/net/lo").exists():  # also where there is no network
        environment |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(torchrun(count, *words), cwd=folder, env=environment, text=True, **streams)


def finished(folder: Path, count: int, *words: str, status: int = 0) -> str:
    """The standard error of a command that ends with a status, without what torchrun reports."""
    process = started(folder, count, *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == status, errors
    return errors


def state_of(folder: Path) -> dict:
    state = torch.load(folder / "last.pt", weights_only=True)
    return {key: value for key, value in state.items() if key not in ("seconds", "overrides")}


def assert_same_weights(a: Path, b: Path, within: float) -> None:
    first, second = (state_of(folder)["algorithm"] for folder in (a, b))
    assert all(float((first[key] - second[key]).abs().max()) <= within for key in first)


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The processes that torchrun has started, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return sorted(map(int, children))


@pytest.mark.long
def test_two_processes_write_the_files_of_one_run(metarun, tmp_path: Path):
    """The files, the figures and the weights of one process; one process resumes it, and tests the same."""
    metarun("train", *RUN, "hydra.run.dir=one")
    errors = finished(tmp_path, 2, "train", *RUN, "hydra.run.dir=two")
    assert errors.count("iteration      6 ") == 1  # one process speaks
    names = [
        sorted(str(path.relative_to(tmp_path / run)) for path in (tmp_path / run).rglob("*"))
        for run in ("one", "two")
    ]
    assert names[0] == [*names[1]] or {*names[1]} - {*names[0]} == {"learning_curve.png"}
    assert_same_weights(tmp_path / "one", tmp_path / "two", 1e-12)
    results = [json.loads((tmp_path / run / "result.json").read_text()) for run in ("one", "two")]
    assert results[0]["test"]["episodes_hash"] == results[1]["test"]["episodes_hash"]
    metarun("eval", "checkpoint=two", "episodes=30", "hardware=cpu", "hydra.run.dir=alone")
    words = ["checkpoint=two", "episodes=30", "hardware=cpu", "hardware.threads=1", "hydra.run.dir=shared"]
    finished(tmp_path, 2, "eval", *words)
    scores = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("alone", "shared")]
    assert scores[0]["results"][0]["scores"] == scores[1]["results"][0]["scores"]
    metarun("train", "resume=two", "iterations=14")
    metarun("train", "resume=one", "iterations=14")
    assert_same_weights(tmp_path / "one", tmp_path / "two", 1e-12)


@pytest.mark.long
def test_killed_at_random_it_ends_bit_identical(tmp_path: Path):
    """Any rank is killed, or is asked to stop, or all are killed, at any time."""
    words = ["algorithm=reptile", *RUN, "iterations=60", "checkpoint.every=7", "test.episodes=0"]
    finished(tmp_path, 2, "train", *words, "hydra.run.dir=whole")
    start, chance = [*words, "hydra.run.dir=killed"], random.Random(0)
    for turn in range(4):
        now = time.time()
        process = started(tmp_path, 2, "train", *start, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        wait_for(tmp_path / "killed/metrics.jsonl", now)
        time.sleep(chance.uniform(0, 0.5))
        victims = ranks_of(process)
        number = signal.SIGKILL if turn % 2 == 0 else signal.SIGTERM
        for victim in victims if turn == 2 else [chance.choice(victims)]:
            os.kill(victim, number)
        errors = process.communicate(timeout=120)[1]
        assert process.returncode == 1  # of torchrun, whatever the status of a rank is
        if turn != 2:
            assert len(re.findall("^metarun: ", errors, re.MULTILINE)) == 1, errors
        if (tmp_path / "killed/last.pt").exists():
            start = ["resume=killed"]
    finished(tmp_path, 2, "train", *start)
    whole, killed = state_of(tmp_path / "whole"), state_of(tmp_path / "killed")
    assert all(torch.equal(whole["algorithm"][key], killed["algorithm"][key]) for key in whole["algorithm"])
    assert torch.equal(whole["random"], killed["random"])
    assert torch.equal(whole["running_totals"], killed["running_totals"])


def wait_for(path: Path, time_before: float) -> None:
    """Wait until a file is written."""
    for _ in range(6000):
        if path.exists() and path.stat().st_mtime > time_before:
            return
        time.sleep(0.01)
    raise TimeoutError(f"{path} is not written")


@pytest.mark.gpu
def test_one_rank_on_a_gpu_ends_with_the_weights_of_a_plain_run(metarun, tmp_path: Path):
    """By NCCL, and with a CUDA graph of the gradient, which is added up outside of it."""
    words = [word for word in RUN if not word.startswith("hardware")]
    words += ["hardware=gpu", "hardware.precision=float64", "iterations=30"]
    for algorithm in ("maml", "protonet"):
        own = [f"algorithm={algorithm}", *words]
        plain = metarun("train", *own, f"hydra.run.dir={algorithm}-plain").stderr
        errors = finished(tmp_path, 1, "train", *own, f"hydra.run.dir={algorithm}-nccl")
        assert "no CUDA graph" not in plain + errors
        assert_same_weights(tmp_path / f"{algorithm}-plain", tmp_path / f"{algorithm}-nccl", 1e-9)
    finished(tmp_path, 1, "train", "resume=maml-nccl", "iterations=35")
    metarun("train", "resume=maml-plain", "iterations=35")
    assert_same_weights(tmp_path / "maml-plain", tmp_path / "maml-nccl", 1e-9)
