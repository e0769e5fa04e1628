"""Files that are deleted or cannot be written while a run needs them, and results that mean nothing."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.runs import UNTESTED

from metarun.reporting.tracker import Events, Tracker
from metarun.storage.files import atomic_write, remove_temporary


@pytest.fixture
def run(trained, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return shutil.copytree(trained(*UNTESTED), tmp_path / "run")


def steps_in(folder: Path) -> list[int]:
    """The iterations of the validation accuracy in TensorBoard files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [event.step for event in events.Scalars("validation/accuracy")]


def test_a_run_without_its_best_checkpoint_goes_on(metarun, run: Path, tmp_path: Path):
    (run / "best.pt").unlink()
    done = metarun("train", "resume=run", "test.episodes=4")  # there is nothing left to train
    assert "best.pt: was deleted; replaced by the weights of iteration 12" in done.stderr
    best, last = (torch.load(run / f"{name}.pt", weights_only=True) for name in ("best", "last"))
    assert all(torch.equal(best["algorithm"][name], last["algorithm"][name]) for name in last["algorithm"])
    result = json.loads((run / "result.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validated = [row for row in rows if row["split"] == "validation"]
    assert [row["iteration"] for row in validated] == [0, 6, 12]
    assert result["validation"]["mean"] == pytest.approx(validated[-1]["accuracy"])
    (run / "best.pt").unlink()
    metarun("train", "resume=run", "iterations=18", "test.episodes=4")
    assert json.loads((run / "result.json").read_text())["validation"]["iteration"] == 18


def test_temporary_files_of_a_killed_save_are_removed(metarun, run: Path):
    def killed(file: object) -> None:
        raise KeyboardInterrupt

    left = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", lambda path, missing_ok: left.append(path))  # nothing cleans up
        atomic_write(run / "last.pt", killed)
    others = [run / ".last.pt.tmp", run / "notes.tmp", run / f".{'0' * 32}.pt"]
    for path in others:
        path.touch()
    assert left[0].exists()
    metarun("train", "resume=run")
    assert not left[0].exists() and all(path.exists() for path in others)
    remove_temporary(run / "no such folder")


def test_a_folder_that_is_deleted_while_training_is_written_again(tmp_path: Path, capsys):
    tracker = Tracker(tmp_path / "run")
    rows = [{"iteration": i, "split": "validation", "accuracy": i / 10} for i in (1, 2, 3)]
    for row in rows[:2]:
        tracker.log(row)
    shutil.rmtree(tmp_path / "run")
    tracker.log(rows[2])
    tracker.sync()
    tracker.close()
    assert "was deleted; the run goes on" in capsys.readouterr().err
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows
    assert steps_in(tmp_path / "run/tensorboard") == [1, 2, 3]


def test_rows_after_a_checkpoint_are_replaced_in_tensorboard(tmp_path: Path):
    for resumed_at in (0, 1):
        tracker = Tracker(tmp_path, resumed_at)
        for i in (1, 2, 3)[resumed_at:]:
            tracker.log({"iteration": i, "split": "validation", "accuracy": 0.5})
        tracker.close()
    assert steps_in(tmp_path / "tensorboard") == [1, 2, 3]


def test_a_full_disk_ends_tensorboard_but_not_the_run(tmp_path: Path, monkeypatch, capsys):
    row = {"iteration": 1, "split": "train", "loss": 1.0}

    def full(*arguments: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    events = Events(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", full)
        events.log(row)
        Events(tmp_path, 1).log(row)  # at the first write
        patch.setattr(Path, "mkdir", full)
        Events(tmp_path / "new", 1).log(row)  # before it
    events.log(row)
    events.close()
    assert capsys.readouterr().err.count("No space left on device") == 3


def test_predictions_that_are_not_finite_are_not_reported_as_results(metarun, run: Path):
    content = torch.load(run / "best.pt", weights_only=True)
    for weight in content["algorithm"].values():
        if weight.is_floating_point():
            weight *= 1e19
    torch.save(content, run / "best.pt")
    done = metarun("eval", "checkpoint=run", "episodes=4", "queries=1", "hydra.run.dir=out", status=1)
    assert done.stderr.strip().endswith("error: 4 of 4 episodes have a loss that is not finite")
    assert not (run.parent / "out/results.json").exists()
    done = metarun("adapt", "checkpoint=run", "hydra.run.dir=out", status=1)
    assert "run/best.pt: its predictions for this task are not finite" in done.stderr
    assert not (run.parent / "out/steps.json").exists()
