"""`metarun online`: its table, its results, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

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
    again = metarun("online", *SMALL, status=1)  # does not overwrite it
    assert "out/online.jsonl: this folder already has the rows of a stream" in again.stderr
    assert len((tmp_path / "out" / "online.jsonl").read_text().splitlines()) == len(rows)


def test_mistakes(metarun):
    for word, message in {
        "learners=[maml]": "learners=['maml']: choose some of ftml, joint, everything, scratch",
        "batch=9": "batch=9: a task has images=8; lower batch",
        "threshold=1.5": "threshold=1.5: must be between 0 and 1",
        "dataset=sinusoid": "a stream is made of images",
    }.items():
        words = [word] if word.startswith("dataset") else [*SMALL, word]
        assert message in metarun("online", *words, status=1).stderr
