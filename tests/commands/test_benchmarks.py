"""The benchmark's own promises; its figures are not tested."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.build import check_run
from torch import Tensor

from metarun.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT))  # it is no part of the installed package
    import benchmarks.__main__ as main

    return main


def test_the_command_times_checks_and_writes(
    benchmarks, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    out = tmp_path / "figures.json"
    words = ["W5a", "--only", "metarun", "plain loop", "--device", "cpu", "--no-memory"]
    words += ["--rounds", "2", "--seconds", "0.01", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *words])
    monkeypatch.setattr("benchmarks.sampling.ROUNDS", 1)
    monkeypatch.setattr("benchmarks.limit.SIZES", {"cpu": (512, 1 << 20)})
    benchmarks.main()
    assert "times the best peer" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["machine"]["versions"]["torch"] == torch.__version__
    rows = report["workloads"]["W5a"]["contestants"]
    assert set(rows) == {"metarun", "plain loop"}
    for row in rows.values():
        assert row["error"] < 1e-12
        assert 0 < row["low_ms"] <= row["ms"] <= row["high_ms"]
        assert 0 < row["of_limit"] < 1
    assert rows["metarun"]["sampling_share"] < 1  # below 0 by noise on a busy machine
    assert set(report["sampling"]) == {"class store", "loader of single images"}


@pytest.mark.long
def test_memory_is_measured_in_a_process_of_its_own(benchmarks, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    assert benchmarks.in_own_process("W5a", "metarun", CPU)["peak_mib"] > 100


def test_a_wrong_gradient_gets_no_number(benchmarks, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    class Wrong(benchmarks.PlainLoop):
        def gradient(self) -> list[Tensor]:
            return [g * 1.001 for g in super().gradient()]

    monkeypatch.setitem(benchmarks.PEERS, "wrong", Wrong)
    words = ["", "W5a", "--only", "wrong", "plain loop", "--no-memory", "--rounds", "2", "--seconds", "0.01"]
    monkeypatch.setattr(sys, "argv", [*words, "--out", str(tmp_path / "figures.json")])
    rows = benchmarks.run_workload("W5a", benchmarks.arguments(), CPU, benchmarks.Peak(1e11, 1e10))[
        "contestants"
    ]
    assert rows["wrong"].keys() == {"error"}
    assert rows["wrong"]["error"] == pytest.approx(1e-3)
    assert "ms" in rows["plain loop"]


@pytest.mark.parametrize("name", ["W1c", "W2c", "W4b", "W5b"])
def test_every_kind_of_workload_is_exact(benchmarks, name: str):
    """With a narrow network: the benchmark itself checks each gradient at its full size before timing it."""
    workload = replace(benchmarks.WORKLOADS[name], width=8)
    reference = benchmarks.PlainLoop(workload, 2, torch.float64, CPU).gradient()
    assert benchmarks.gradient_error(benchmarks.Metarun, workload, reference, CPU) < benchmarks.EXACT


def test_every_run_of_the_check_of_a_gpu_is_accepted(benchmarks):
    from benchmarks import agreement, gpu

    cases = agreement.cases()
    for name, words in {**cases, "training": gpu.TRAINING, "quick training": gpu.QUICK_TRAINING}.items():
        try:
            check_run(*words)
        except ConfigError as error:
            pytest.fail(f"{name}: {error}")
    assert {*gpu.QUICK_CASES} <= {*cases}


def test_the_limit_counts_the_operations_of_a_matrix_product(benchmarks):
    peak = benchmarks.Peak(flops=1e9, bytes=1e6)
    with benchmarks.Roofline(peak) as counter:
        torch.ones(10, 20) @ torch.ones(20, 30) + 1
    assert counter.flops == 2 * 10 * 20 * 30
    assert counter.bytes == 4 * (10 * 20 + 20 * 30 + 10 * 30)
    assert counter.seconds == pytest.approx(counter.bytes / peak.bytes)


@pytest.mark.parametrize("kind", ["markdown", "compiled"])
def test_the_tables_of_the_document_are_the_committed_figures(benchmarks, kind: str):
    from benchmarks import table

    report = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())
    assert getattr(table, kind)(report) in (ROOT / "docs" / "speed.md").read_text()
