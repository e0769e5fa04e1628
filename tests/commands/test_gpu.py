"""The command line on a GPU: the results of the CPU, and runs that resume bit-exactly, also on a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.build import ALGORITHMS, check_run
from helpers.runs import SMALLER, TINY, Died, at_call, die

from metarun.training import checkpoint
from metarun.training.trainer import Trainer

DEVICES = [pytest.param("gpu", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.long)]
SMALL = [
    word for word in TINY if not word.startswith(("hardware", "iterations", "checkpoint", "valid", "test"))
]
RUNS = {name: [f"algorithm={name}", *SMALL, *SMALLER.get(name, [])] for name in ALGORITHMS} | {
    "zero_shot": ["algorithm=zero_shot", "shots=0", *SMALL],
    "dropblock": ["algorithm=protonet", "backbone=resnet12", "backbone.widths=[8,8,8,8]", *SMALL[:4]],
    "sinusoid": ["dataset=sinusoid"],
    "np": ["dataset=gp", "algorithm=np", "meta_batch=2"],
    "anp": ["dataset=gp", "algorithm=anp", "meta_batch=2"],
    "cnp": ["dataset=gp", "algorithm=cnp", "meta_batch=2"],
    "navigation2d": ["dataset=navigation2d", "meta_batch=2"],
    "bandit": ["dataset=bandit", "meta_batch=4"],
    "phrases": ["dataset=phrases", "algorithm=protonet"],
}
HARDWARE = {"gpu": ["hardware=gpu"], "cpu": [word for word in TINY if word.startswith("hardware")]}
SHORT = ["checkpoint.every=5", "validation.every=10", "validation.episodes=4", "test.episodes=8"]
EVALUATED = ["maml", "protonet", "cnaps", "sinusoid", "navigation2d", "bandit", "phrases"]


@pytest.mark.parametrize("name", RUNS)
def test_the_runs_for_a_gpu_are_accepted(name: str):
    """Without a GPU, so that it is noticed where there is none."""
    check_run(*RUNS[name], *SHORT, "iterations=12", *HARDWARE["cpu"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_bit_exactly(metarun, tmp_path: Path, name: str, device: str):
    # Random numbers too: on a GPU, some steps of either part are eager, others are a CUDA graph. The run that
    # is killed has the same settings: what is annealed over all iterations differs in a run of fewer.
    words = [*RUNS[name], *SHORT, "iterations=12", *HARDWARE[device]]
    whole = metarun("train", *words, "hydra.run.dir=whole")
    assert ("NVIDIA" in whole.stderr) == (device == "gpu")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
        at_call(patch, Trainer, "step", 9, die)
        metarun("train", *words, "hydra.run.dir=killed")
    assert "resumed at iteration 5\n" in metarun("train", "resume=killed").stderr
    first, second = (checkpoint.load(tmp_path / folder / "last.pt") for folder in ("whole", "killed"))
    for key, tensor in first["algorithm"].items():
        assert torch.equal(tensor, second["algorithm"][key]), key


@pytest.mark.gpu
@pytest.mark.parametrize("name", EVALUATED)
def test_a_checkpoint_of_a_gpu_is_evaluated_on_either_device(metarun, tmp_path: Path, name: str):
    metarun("train", *RUNS[name], *SHORT, "iterations=4", "hydra.run.dir=run", "hardware=gpu")
    results = []
    for hardware in ("gpu", "cpu"):
        metarun("eval", "checkpoint=run", "episodes=8", f"hardware={hardware}", f"hydra.run.dir={hardware}")
        results.append(json.loads((tmp_path / hardware / "results.json").read_text())["results"][0])
    assert results[0]["episodes_hash"] == results[1]["episodes_hash"]
    # A class may change where two are equally likely; the tasks and the weights are the same.
    assert results[0]["mean"] == pytest.approx(results[1]["mean"], abs=0.02, rel=1e-3)
    metarun("adapt", "checkpoint=run", "hardware=gpu")
