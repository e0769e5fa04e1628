"""Shared by all tests: few threads, a cache of their own, the command line in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Before torch is imported: small tensors gain nothing from threads, and test processes share cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never the user's cache; one for all tests of a process."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("METARUN_CACHE", str(cache))
    monkeypatch.setenv("METARUN_DATA", str(cache / "data"))


Metarun = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def metarun(tmp_path: Path) -> Metarun:
    """`metarun(*words)` as a person types it, in an empty folder; the finished process."""

    def run(*words: str, status: int = 0, cwd: Path = tmp_path) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-W", "error::DeprecationWarning:metarun", "-m", "metarun", *words],
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == status, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Real data, where METARUN_TEST_DATA says."""
    if not (folder := os.environ.get("METARUN_TEST_DATA")):
        pytest.skip("METARUN_TEST_DATA is not set: no real data here")
    return Path(folder)


#: A training run of a few seconds; tests append to it.
TINY = (
    "dataset.train_classes=40 dataset.validation_classes=10 dataset.test_classes=20 backbone.width=8 "
    "iterations=12 meta_batch=2 validation.every=6 validation.episodes=20 test.episodes=20 "
    "checkpoint.every=3 log.every=3 log.tensorboard=false hardware=cpu hardware.threads=1"
).split()
