"""Runs that are stopped lose nothing: by any signal, at any moment, whether or not they can print."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.runs import TINY, UNTESTED, Died, at_call, die

from metarun.cli.streams import Output
from metarun.commands import train
from metarun.training import interrupts, trainer
from metarun.training.records import runs_in
from metarun.training.trainer import Trainer

pytestmark = pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """The handlers that were there before: an interrupted command leaves the default ones.

    Signals that the process ignores, as under nohup, would stay ignored; the tests start without that.
    """
    before = {number: signal.getsignal(number) for number in interrupts.SIGNALS}
    for number, handler in before.items():
        if handler == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    yield
    interrupts._last_request.clear()
    for number, handler in before.items():
        signal.signal(number, handler)


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


def assert_same_run(whole: Path, stopped: Path) -> None:
    """Weights, optimizer, scheduler, random state and metrics are equal bit by bit."""
    for file in ("last.pt", "best.pt"):
        states = [torch.load(folder / file, weights_only=True) for folder in (whole, stopped)]
        for state in states:
            del state["seconds"], state["overrides"], state["config"]["stop"]
        assert same(*states), file
    assert rows_of(whole) == rows_of(stopped)


class Late:
    """Stands for the module time after the time of stop.minutes."""

    @staticmethod
    def monotonic() -> float:
        return 1e12


TIME = "time"

# What stops a run: the call of a function before which it happens, the signal, TIME for stop.minutes, or None
# for a death, and the iteration at which the run goes on. The tests are of different runs.
STOPS = {
    "reptile": [  # shuffles batches
        (trainer.OuterStep, "prepare", 1, signal.SIGHUP, 0),
        (trainer, "evaluate", 1, signal.SIGINT, 0),  # the validation of the start
        (Trainer, "save_best", 1, None, 0),  # its row is written, and is not to be written twice
        (Trainer, "step", 5, None, 4),
        (trainer, "evaluate", 1, TIME, 5),  # in a validation, which is still to be done
        (trainer, "evaluate", 1, signal.SIGTERM, 5),  # in the same validation
        (train, "evaluate", 1, signal.SIGUSR2, 14),  # in the test
    ],
    "maml_plus_plus": [  # anneals its loss, and has a scheduler
        (Trainer, "log_running_totals", 1, signal.SIGUSR1, 3),
        (trainer.checkpoint, "save", 1, signal.SIGXCPU, 4),
        (trainer, "evaluate", 3, signal.SIGINT, 14),  # the last validation
        (train, "evaluate", 1, TIME, 14),  # in the test
    ],
}


@pytest.mark.parametrize("algorithm", STOPS)
def test_stopped_at_every_stage_it_ends_bit_identical(metarun, tmp_path: Path, algorithm: str):
    words = [f"algorithm={algorithm}", *TINY, "iterations=14", "validation.every=5", "checkpoint.every=2"]
    words += ["validation.episodes=4", "test.episodes=4", "inner_loop.steps=3", "stop.minutes=1000"]
    metarun("train", *words, "hydra.run.dir=whole")
    start = [*words, "hydra.run.dir=stopped"]
    for owner, name, count, number, iteration in STOPS[algorithm]:
        interrupts._last_request.clear()
        with pytest.MonkeyPatch.context() as patch:
            actions = {None: die, TIME: partial(patch.setattr, interrupts, "time", Late)}
            at_call(patch, owner, name, count, actions.get(number) or partial(signal.raise_signal, number))
            if number is None:
                with pytest.raises(Died):
                    metarun("train", *start)
            else:
                errors = metarun("train", *start, status=75 if number == TIME else 130).stderr
                assert ("stop.minutes=1000: stopped" in errors) == (number == TIME)
                assert f"stopped and saved at iteration {iteration}; continue with" in errors
                assert "metarun train resume=stopped\n" in errors
        assert torch.load(tmp_path / "stopped/last.pt", weights_only=True)["iteration"] == iteration
        start = ["resume=stopped"]
    metarun("train", *start)
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_run_that_ends_early_goes_on_as_if_it_had_not(metarun, tmp_path: Path):
    words = [*TINY, "validation.every=2", "optimizer.lr=0.03"]
    metarun("train", *words, "hydra.run.dir=whole")
    scores = [row["accuracy"] for row in rows_of(tmp_path / "whole") if row["split"] == "validation"]
    ends = [i for i in range(1, 7) if max(scores[: i + 1]) in scores[:i]]  # no new best score
    at = round(sorted(scores)[3], 2)
    reached = [i for i, score in enumerate(scores) if score >= at]
    expected = {"stop.patience=1": 2 * ends[0], f"stop.at={at:g}": 2 * reached[0]}
    for word, iteration in expected.items():
        done = metarun("train", *words, word, "hydra.run.dir=early")
        assert f"{iteration} iterations in" in done.stdout and f"ended by {word}" in done.stdout
        result = json.loads((tmp_path / "early/result.json").read_text())
        assert 0 < result["iterations"] == iteration < 12 and result["stopped_by"] == word
        metarun("train", "resume=early", "stop={patience:null,at:null}")
        assert_same_run(tmp_path / "whole", tmp_path / "early")
        shutil.rmtree(tmp_path / "early")


def test_the_same_command_starts_a_run_goes_on_and_ends(metarun, tmp_path: Path):
    # Others refer to `norm`, which a checkpoint has resolved.
    words = ["train", *TINY, "checkpoint.every=4", "norm=layer", "resume=auto"]
    metarun(*words, "hydra.run.dir=whole")
    words += ["hydra.run.dir=stopped"]
    for owner, name, count, left in (
        (trainer.checkpoint, "save", 2, ["best.pt", "metrics.jsonl"]),
        (Trainer, "step", 6, ["best.pt", "last.pt", "metrics.jsonl"]),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Died):
            at_call(patch, owner, name, count, die)
            metarun(*words)
        assert sorted(path.name for path in (tmp_path / "stopped").glob("*.*[lt]")) == left
    assert "resumed at iteration 4\n" in metarun(*words).stderr
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    done = metarun(*words)
    assert (done.stdout, done.stderr) == ("", "stopped: this run has ended already\n")
    assert "was started with dataset.size=16;" in metarun(*words, "dataset.size=20", status=1).stderr
    assert "was started without ways=4;" in metarun(*words, "ways=4", status=1).stderr
    assert "resumed at iteration 12\n" in metarun(*words, "iterations=14").stderr
    assert "add hydra.run.dir=FOLDER" in metarun("train", "resume=auto", status=1).stderr
    hopeless = metarun("train", *TINY, "stop.hopeless=true", status=1)
    assert "only a search compares its runs" in hopeless.stderr


def started(tmp_path: Path, *words: str, **streams) -> subprocess.Popen:
    """A run in a process of its own that has written a few rows."""
    command = [sys.executable, "-m", "metarun", "train", *UNTESTED, "hydra.run.dir=run", *words]
    process = subprocess.Popen(command, cwd=tmp_path, **streams)
    path = tmp_path / "run/metrics.jsonl"
    for _ in range(6000):
        if process.poll() is not None or (path.exists() and len(path.read_text().splitlines()) > 4):
            return process
        time.sleep(0.01)
    raise TimeoutError(f"{path} has too few rows")


def finished_like_a_whole_run(metarun, tmp_path: Path) -> None:
    """Resume the run and compare it with one that was never stopped."""
    iterations = torch.load(tmp_path / "run/last.pt", weights_only=True)["iteration"] + 3
    metarun("train", "resume=run", f"iterations={iterations}")
    metarun("train", *UNTESTED, f"iterations={iterations}", "hydra.run.dir=whole")
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "run")]
    assert same(*(state["algorithm"] for state in states))


@pytest.mark.long
def test_killed_it_goes_on_from_its_last_checkpoint(metarun, tmp_path: Path):
    nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = started(tmp_path, "iterations=100000", **nowhere)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    finished_like_a_whole_run(metarun, tmp_path)


@pytest.mark.long
def test_robots_killed_three_times_end_bit_identical(metarun, tmp_path: Path):
    pytest.importorskip("mujoco", reason="MuJoCo is not installed: pip install 'metarun[mujoco]'")
    words = ["dataset=half_cheetah_dir", "dataset.horizon=20", "shots=4", "queries=4", "meta_batch=4"]
    words += ["validation.every=7", "validation.episodes=4", "test.episodes=4", "checkpoint.every=3"]
    words += ["iterations=60", "hardware=cpu", "hardware.threads=1"]
    start, path = [*words, "hydra.run.dir=run"], tmp_path / "run/metrics.jsonl"
    for rows in (8, 25, 45):
        command = [sys.executable, "-m", "metarun", "train", *start]
        process = subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while not path.exists() or len(path.read_text().splitlines()) < rows:
            assert process.poll() is None, "it ended too early"
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        start = ["resume=run"]
    metarun("train", *start)
    metarun("train", *words, "hydra.run.dir=whole")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_ctrl_c_saves_also_when_the_reader_of_the_pipe_has_gone(metarun, tmp_path: Path):
    """`metarun train 2>&1 | tee log`: Ctrl-C ends tee first."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = started(tmp_path, "iterations=100000", "checkpoint.every=100000", **streams)
    process.stdout.close()
    time.sleep(0.1)  # lines are written into the broken pipe
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    finished_like_a_whole_run(metarun, tmp_path)


def test_ctrl_c_again_stops_at_once_but_not_a_save(monkeypatch: pytest.MonkeyPatch):
    clock = [0.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: clock[0])
    with interrupts.hold_interrupts() as caught:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)  # from the shell and from the terminal
        clock[0] = 5.0
        signal.raise_signal(signal.SIGTERM)
        assert caught.signals == [signal.SIGHUP]
        clock[0] = 10.0
        with pytest.raises(KeyboardInterrupt), interrupts.uninterrupted():
            signal.raise_signal(signal.SIGINT)
            clock[0] = 20.0  # reached


def test_stopped_before_its_first_checkpoint_a_run_says_so(metarun, monkeypatch: pytest.MonkeyPatch):
    """By Ctrl-C pressed twice."""

    def stop() -> None:
        raise KeyboardInterrupt

    at_call(monkeypatch, trainer, "evaluate", 1, stop)
    errors = metarun("train", *UNTESTED, "iterations=3", status=130).stderr
    assert "stopped before the first checkpoint; nothing was saved" in errors
    assert "resume=" not in errors


def test_the_handler_of_a_launcher_is_called_after_the_save():
    """That of submitit queues the job again, and exits with a status of its own."""
    calls: list[int] = []

    def handler(number: int, frame: object) -> None:
        calls.append(number)
        raise SystemExit(122) if len(calls) > 1 else ValueError("it cannot")

    signal.signal(signal.SIGUSR2, handler)
    for expected in (KeyboardInterrupt, SystemExit):
        with pytest.raises(expected), interrupts.hold_interrupts() as caught:
            signal.raise_signal(signal.SIGUSR2)
            assert len(calls) < 2
            caught.stop()
    assert calls == [signal.SIGUSR2] * 2


def test_nohup_is_respected():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with interrupts.hold_interrupts() as caught:
        signal.raise_signal(signal.SIGHUP)
    assert not caught


def test_output_that_cannot_be_written_is_dropped(monkeypatch: pytest.MonkeyPatch):
    """Closed, without a reader, on a full disk; in a full pipe, only once the run must stop."""
    reader, writer = os.pipe()
    full = Output(writer)
    while interrupts.select.select([], [writer], [], 0)[1]:
        assert full.write(b"x" * 4096) > 0
    assert full.error is None
    monkeypatch.setattr(interrupts, "_last_request", [0.0])
    assert full.write(b"message") == len(b"message")
    assert isinstance(full.error, BlockingIOError)
    os.close(reader)
    gone = Output(writer)
    assert (gone.write(b"ab"), type(gone.error)) == (2, BrokenPipeError)
    os.close(writer)
    closed = Output(writer)
    assert (closed.write(b"ab"), type(closed.error)) == (2, OSError)
    if os.path.exists("/dev/full"):
        with open("/dev/full", "wb") as file:
            disk = Output(file.fileno())
            assert (disk.write(b"ab"), disk.write(b"c")) == (2, 1)
        assert "No space" in str(disk.error)


@pytest.mark.parametrize("redirected, status", [(">&- 2>&- <&-", 0), (">/dev/full 2>&1", 1), ("| true", 1)])
def test_streams_that_are_closed_full_or_gone(tmp_path: Path, redirected: str, status: int):
    command = f"{{ {sys.executable} -m metarun --version; echo $? >status; }} {redirected}"
    subprocess.run(["sh", "-c", f"sleep 0.05; {command}"], cwd=tmp_path, check=False)
    assert (tmp_path / "status").read_text() in (f"{status}\n", "0\n" if "|" in redirected else "")


# sweeps


def table(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))


def test_a_stopped_sweep_lists_what_was_done(metarun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = ["train", "-m", "seed=0,1,2", *UNTESTED, "iterations=2", "sweep=sweep"]
    at_call(monkeypatch, Trainer, "step", 3, lambda: signal.raise_signal(signal.SIGTERM))
    done = metarun(*words, status=130)
    assert "the same command with sweep=sweep continues this sweep" in done.stderr
    assert "job 2 of 3: seed=1\n" in done.stderr and "job 3" not in done.stderr
    assert "2 of 3 jobs in sweep" in done.stdout
    finished, stopped = table(tmp_path / "sweep")
    assert (finished["seed"], finished["error"], stopped["seed"]) == ("0", "", "1")
    assert "metarun train resume=sweep/1 continues it" in stopped["error"]
    (run,) = (each for each in runs_in(tmp_path / "sweep") if each.folder.name == "1")
    assert (run.status, run.why) == ("stopped", "")
    assert metarun(*words, "stop.minutes=1e-9", status=75).stderr.endswith("metarun: stop.minutes is over\n")
    late = "not finished: stop.minutes is over"
    assert [row["error"] for row in table(tmp_path / "sweep")] == ["", late, late]
    again = metarun(*words).stderr
    assert "job 1 of 3: seed=0 (done before)" in again and again.count("resumed at") == 1
    assert [row.get("error") for row in table(tmp_path / "sweep")] == [None, None, None]


def test_a_job_that_fails_in_any_way_is_a_row(metarun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of an error of torch and of an exit; while a job runs, its row is there too, in case it is killed."""
    meanwhile: list[dict[str, str]] = []

    def act(seed: int) -> None:
        if seed == 2:
            meanwhile.extend(table(tmp_path / "sweep"))
        else:
            raise [RuntimeError("a fault inside\nof torch"), SystemExit(3)][seed]

    for seed in range(3):
        at_call(monkeypatch, Trainer, "step", 1 + seed, partial(act, seed))
    words = [*UNTESTED, "iterations=1", "hydra.sweep.dir=sweep"]
    assert "Traceback" in metarun("train", "-m", "seed=0,1,2", *words, status=1).stderr
    errors = [row["error"] for row in table(tmp_path / "sweep")]
    assert errors == ["internal error: RuntimeError: a fault inside", "internal error: SystemExit: 3", ""]
    assert meanwhile[2]["error"] == "not finished; metarun train resume=sweep/2 continues it"


def test_a_sweep_of_evaluations_lists_them_all(metarun, trained, tmp_path: Path):
    words = ["eval", "-m", f"checkpoint={trained(*UNTESTED)}", "episodes=2", "split=test,nothing"]
    done = metarun(*words, "hydra.sweep.dir=sweep", status=1)
    assert "2 jobs in sweep" in done.stdout
    good, bad = table(tmp_path / "sweep")
    assert (good["error"], bad["error"][:14]) == ("", "split=nothing:")
    mean = json.loads((tmp_path / "sweep/0/results.json").read_text())["results"][0]["mean"]
    assert float(good["result"]) == mean
    assert f"{mean:.4f}" in done.stdout


def test_the_clock_of_the_file_server_does_not_matter(
    metarun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nor the depth of the jobs' folders; files of an earlier sweep are no rows."""
    old = tmp_path / "sweep/7"
    old.mkdir(parents=True)
    (old / "failure.json").write_text('{"overrides": [], "error": "old"}')
    replace = os.replace

    def late(source: Path, target: Path) -> None:
        replace(source, target)
        os.utime(target, (1e9, 1e9))

    monkeypatch.setattr(os, "replace", late)
    words = ["train", "-m", "seed=0,1", *UNTESTED, "iterations=2", "hydra.sweep.dir=sweep"]
    metarun(*words, "hydra.sweep.subdir='${hydra:job.num}/run'")
    assert [row["job"] for row in table(tmp_path / "sweep")] == ["0/run", "1/run"]
