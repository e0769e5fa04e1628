"""The command line on a GPU: the results of the CPU, and runs that resume bit-exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.runs import TINY

from metarun.config.paths import CONF
from metarun.training import checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
SMALL = [
    word for word in TINY if not word.startswith(("hardware", "iterations", "checkpoint", "valid", "test"))
]
NAMES = sorted({path.stem for path in (CONF / "algorithm").glob("*.yaml")} - {"leo", "rl2", "zero_shot"})
RUNS = {name: [f"algorithm={name}", *SMALL] for name in NAMES} | {
    "zero_shot": ["algorithm=zero_shot", "shots=0", *SMALL],
    "dropblock": ["algorithm=protonet", "backbone=resnet12", "backbone.widths=[8,8,8,8]", *SMALL[:4]],
    "sinusoid": ["dataset=sinusoid"],
    "navigation2d": ["dataset=navigation2d", "meta_batch=2"],
    "bandit": ["dataset=bandit", "meta_batch=4", "algorithm.annealed=12"],
    "phrases": ["dataset=phrases", "algorithm=protonet"],
}
SHORT = ["checkpoint.every=5", "validation.every=10", "validation.episodes=4", "test.episodes=8"]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_a_gpu_resumes_bit_exactly(metarun, tmp_path: Path, name: str):
    # Random numbers too: some steps of either part are eager, others are a CUDA graph.
    words = [*RUNS[name], *SHORT, "hardware=gpu", "scheduler=null"]
    whole = metarun("train", *words, "iterations=12", "hydra.run.dir=whole")
    assert "NVIDIA" in whole.stderr
    metarun("train", *words, "iterations=6", "hydra.run.dir=halves")
    metarun("train", "resume=halves", "iterations=12")
    first, second = (checkpoint.load(tmp_path / folder / "last.pt") for folder in ("whole", "halves"))
    for key, tensor in first["algorithm"].items():
        assert torch.equal(tensor, second["algorithm"][key]), key


@pytest.mark.parametrize(
    "name", ["maml", "protonet", "cnaps", "sinusoid", "navigation2d", "bandit", "phrases"]
)
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
