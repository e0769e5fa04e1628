"""Shared by all tests: few threads, a cache of their own, the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from metarun import cli

# Before torch is imported: small tensors gain nothing from threads, and test processes share cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def own_surroundings(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never the user's cache, one for all tests of a process; no variable left by another test."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("METARUN_CACHE", str(cache))
    monkeypatch.setenv("METARUN_DATA", str(cache / "data"))
    # `cli` sets it for Hydra, and a command run inside this process leaves it set.
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


@pytest.fixture
def float64() -> Iterator[None]:
    """Numbers of double precision, and the same random ones each time."""
    import torch

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@dataclass
class Done:
    """What a finished command left behind."""

    stdout: str
    stderr: str


Metarun = Callable[..., Done]


@pytest.fixture
def metarun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Metarun:
    """`metarun(*words)` as a person types it, in an empty folder.

    It calls the console script's own function, since a new process would spend seconds on
    importing torch; test_cli.py runs new processes.
    """
    monkeypatch.chdir(tmp_path)

    def run(*words: str, status: int = 0) -> Done:
        capsys.readouterr()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(sys, "argv", ["metarun"])
            patch.delenv("HYDRA_FULL_ERROR", raising=False)
            cli.main(list(words))
        GlobalHydra.instance().clear()
        done = Done(*capsys.readouterr())
        code = stopped.value.code or 0
        assert code == status, f"exit {code}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Real data, where METARUN_TEST_DATA says."""
    if not (folder := os.environ.get("METARUN_TEST_DATA")):
        pytest.skip("METARUN_TEST_DATA is not set: no real data here")
    return Path(folder)
