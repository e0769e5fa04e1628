"""`metarun online`: its table, its results, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from metarun.training.online import Followers

SMALL = [
    *("dataset.train_classes=4", "dataset.images_per_class=20", "dataset.size=12", "backbone.width=4"),
    *("backbone.halvings=2", "classes=4", "tasks=3", "images=8", "test_images=6", "batch=4", "minibatch=4"),
    *("meta_steps=1", "hardware.threads=1", "hydra.run.dir=out"),
]


def test_learners_follow_a_stream(metarun, tmp_path: Path):
    done = metarun("online", *SMALL, "learners=[ftml,everything]")
    assert "3 tasks made of glyphs, 4 classes" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "out" / "online.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 2 * 2
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    last = [row["accuracy"] for row in rows if row["learner"] == "ftml" and row["images"] == 8]
    assert results["learners"]["ftml"]["accuracy"] == sum(last) / 3
    for command in ("train resume=out", "train init=out", "eval checkpoint=out"):
        error = metarun(*command.split(), status=1).stderr
        assert "has a checkpoint of metarun online" in error and "metarun online resume=out" in error
    again = metarun("online", *SMALL, status=1)  # does not overwrite it
    assert "out/online.jsonl: this folder already has the rows of a stream" in again.stderr
    assert len((tmp_path / "out" / "online.jsonl").read_text().splitlines()) == len(rows)


def test_a_killed_stream_goes_on_bit_identical(metarun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = [*SMALL[:-1], "learners=[ftml,everything,scratch]", "backbone._target_=own_dropout.Small"]
    write_network(tmp_path)
    metarun("online", *words, "hydra.run.dir=whole")
    original = Followers.next_task

    def killed(self, *arguments):
        for number, row in enumerate(original(self, *arguments)):
            if self.done == 1 and number == 1:
                raise KeyboardInterrupt
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(Followers, "next_task", killed)
        stopped = metarun("online", *words, "hydra.run.dir=out", status=130).stderr
    assert (
        "stopped after 1 task; continue with\n  metarun online resume=out 'trust=[own_dropout]'\n" in stopped
    )
    with (tmp_path / "out" / "online.jsonl").open("a") as file:
        file.write('{"learner": "ftml", "ta')  # as kill -9 may leave it
    assert "trust=[own_dropout]" in metarun("online", "resume=out", status=1).stderr
    refused = metarun("online", "resume=out", "trust=[own_dropout]", "batch=2", status=1).stderr
    assert "batch=2: a resumed run keeps its settings; only resume, hardware, trust, dataset.root" in refused
    again = metarun("online", "resume=out", "trust=[own_dropout]")
    assert "resumed after 1 of 3 tasks" in again.stderr
    for name in ("online.jsonl", "results.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    states = [torch.load(tmp_path / name / "stream.pt") for name in ("out", "whole")]
    torch.testing.assert_close(*(state["algorithm"] for state in states), rtol=0, atol=0)
    assert (
        "this is a checkpoint of metarun online"
        in metarun("eval", "checkpoint=out/stream.pt", status=1).stderr
    )


def write_network(folder: Path) -> None:
    """A network that draws random numbers in training, of which the state must be kept, too."""
    (folder / "own_dropout.py").write_text(
        "from torch import nn\n"
        "class Small(nn.Sequential):\n"
        "    def __init__(self, item_shape, width, **settings):\n"
        "        super().__init__(nn.Flatten(), nn.Dropout(0.2), nn.Linear(432, width))\n"
    )


def test_mistakes(metarun, tmp_path: Path):
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / "last.pt").touch()
    error = metarun("online", "resume=run", status=1).stderr
    assert "resume=run: this folder has a checkpoint of a training run" in error
    assert "metarun train resume=run" in error
    for word, message in {
        "learners=[maml]": "learners=['maml']: choose some of ftml, joint, everything, scratch",
        "batch=9": "batch=9: a task has images=8; lower batch",
        "threshold=1.5": "threshold=1.5: must be between 0 and 1",
        "dataset=sinusoid": "a stream is made of images",
        "resume=auto": "resume=auto: is for metarun train; name the output folder of the stream",
        "norm=running": "error: norm=running keeps averages over tasks",
    }.items():
        words = [word] if word.startswith(("dataset", "resume")) else [*SMALL, word]
        assert message in metarun("online", *words, status=1).stderr
