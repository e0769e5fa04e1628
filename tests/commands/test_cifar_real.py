"""CIFAR-100's 60,000 images from METARUN_TEST_DATA: trained on, and what preparing them costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

COSTS = r"""
import json, re, sys, time
from pathlib import Path
from metarun.datasets.cifar import CifarFS
from metarun.config.build import build_source
from metarun.training.hardware import Hardware

def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])

dataset, hardware = CifarFS(root=sys.argv[1]), Hardware("cpu")
before, began = peak(), time.perf_counter()
sizes = [build_source(dataset, split, hardware).items.nbytes for split in sys.argv[2:]]
print(json.dumps({"seconds": time.perf_counter() - began, "above": peak() - before - sum(sizes)}))
"""


@pytest.fixture
def cifar(test_data: Path) -> Path:
    if not (folder := test_data / "cifar_fs").is_dir():
        pytest.skip("METARUN_TEST_DATA names no folder that holds cifar_fs/")
    return folder


@pytest.mark.long
def test_training_on_fc100(metarun, real_cache: Path, cifar: Path, tmp_path: Path):
    words = (
        "iterations=40 meta_batch=4 queries=5 validation.every=40 validation.episodes=40 backbone.width=16"
    )
    root = ["dataset=fc100", f"dataset.root={cifar}", "test.episodes=100", "log.tensorboard=false"]
    metarun("train", *root, *words.split(), "hardware=cpu", "hardware.threads=1", "hydra.run.dir=out")
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["test"]["mean"] > 0.22  # chance is 0.2
    assert {path.name.rsplit("-", 1)[0] for path in real_cache.glob("fc100-*[!n]")} == {
        f"fc100-{split}" for split in ("train", "validation", "test")
    }


@pytest.mark.long
def test_what_preparing_and_loading_cost(cifar: Path, tmp_path: Path):
    """60 s for all images on four cores, 1 s from the cache, 500 MB above the decoded split.

    Time is given three times as much, and in proportion where there are fewer cores.
    """
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells a process's own peak")
    slack = 3 * 4 / min(4, os.cpu_count() or 1)
    environment = os.environ | {"METARUN_CACHE": str(tmp_path / "cache")}

    def costs(*splits: str) -> dict[str, float]:
        command = [sys.executable, "-c", COSTS, str(cifar), *splits]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        print(splits, done.stdout)
        return json.loads(done.stdout)

    first = [costs(split) for split in ("train", "validation", "test")]
    assert sum(each["seconds"] for each in first) < 60 * slack
    assert max(each["above"] for each in first) < 500e6
    again = [costs(split) for split in ("train", "validation", "test")]
    assert max(each["above"] for each in again) < 500e6
    assert max(each["seconds"] for each in again) < 1 * slack
