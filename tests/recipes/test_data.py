"""`metarun data` as a person types it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from metarun import cli


def test_what_there_is(metarun):
    done = metarun("data")
    for path in (cli.CONF / "dataset").glob("*.yaml"):
        assert path.stem in done.stdout
    assert "MIT licence" in " ".join(done.stdout.split())


def test_one_is_prepared_and_drawn(metarun, tmp_path: Path):
    words = ["data", "dataset=glyphs", "dataset.train_classes=12", "dataset.validation_classes=5"]
    done = metarun(*words, "dataset.test_classes=6", "hydra.run.dir=seen")
    assert "12" in done.stdout
    assert "240" in done.stdout
    for name in ("contact.png", "episode.png"):
        assert np.asarray(Image.open(tmp_path / "seen" / name)).std() > 10
    done = metarun(*words, "dataset.test_classes=6", "split=validation", "ways=6", status=1)
    assert "validation has 5 classes" in done.stderr


def test_tasks_without_images_have_no_pictures(metarun, tmp_path: Path):
    assert "drawn anew" in metarun("data", "dataset=sinusoid", "hydra.run.dir=seen").stdout
    assert not list(tmp_path.rglob("*.png"))


def test_mistakes(metarun):
    assert "dataset.root is not set" in metarun("data", "dataset=image_folder", status=1).stderr
    assert "name one, as in metarun data" in metarun("data", "dataset.root=x", status=1).stderr
    assert "split=tests: must be one of train" in metarun("data", "split=tests", status=1).stderr


def test_training_images_are_changed_and_a_run_with_them_resumes(metarun, tmp_path: Path):
    from conftest import TINY

    metarun("train", "augment=standard", *TINY, "hydra.run.dir=whole")
    metarun("train", "augment=standard", *TINY, "hydra.run.dir=parts", "iterations=6", "validation.every=6")
    metarun("train", "resume=parts", "iterations=12")
    metarun("train", *TINY, "hydra.run.dir=plain")
    rows = [
        (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts", "plain")
    ]
    losses = [[line.split('"loss": ')[1].split(",")[0] for line in lines] for lines in rows]
    assert losses[0] == losses[1] != losses[2]
    done = metarun("train", "dataset=sinusoid", "augment=standard", "iterations=2", status=1)
    assert "sinusoid has no images to change" in done.stderr
