"""Threads sleep early only where other processes need the cores."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from metarun.cli import waiting


@pytest.mark.parametrize(
    ("running", "usable", "cores", "busy"),
    [
        (1, 2, 2, False),  # this process alone
        (2, 2, 2, True),
        (1 + 20, 4, 64, False),  # the others have cores of their own
        (1 + 62, 4, 64, True),
        (9, 1, 2, False),  # one thread waits for no other
    ],
)
def test_a_machine_is_busy_if_threads_have_to_share_cores(
    running: int, usable: int, cores: int, busy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "loadavg").write_text(f"0.20 0.18 0.12 {running}/80 11206\n")
    monkeypatch.setattr(waiting, "LOADS", tmp_path / "loadavg")
    monkeypatch.setattr(waiting, "PAUSE", 0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(usable)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    environment: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", environment)
    waiting.wait_briefly_if_busy()
    assert environment == ({"GOMP_SPINCOUNT": "1000"} if busy else {})
    environment["GOMP_SPINCOUNT"] = "5"
    waiting.wait_briefly_if_busy()
    assert environment == {"GOMP_SPINCOUNT": "5"}


def test_without_the_file_of_linux_nothing_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(waiting, "LOADS", tmp_path / "none")
    assert not waiting.is_busy()
