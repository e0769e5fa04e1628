"""A user's own folder in all commands: which classes are evaluated, and what happens if they change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metarun.datasets.image_folder import ImageFolder
from metarun.training import checkpoint

WORDS = [
    "dataset=image_folder",
    "dataset.size=16",
    "backbone.width=4",
    "ways=2",
    "queries=2",
    "iterations=2",
    "meta_batch=1",
    "validation.every=2",
    "validation.episodes=2",
    "test.episodes=2",
    "log.tensorboard=false",
    "hardware=cpu",
    "hardware.threads=1",
    "hardware.compile=false",
]
EVAL = ["eval", "queries=2", "episodes=2", "hydra.run.dir=out"]
OWN = ["dataset=image_folder", "dataset.size=16"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of noise of each of 20 classes."""
    root = tmp_path_factory.mktemp("own") / "mine"
    for i in range(20):
        (root / f"kind {i}").mkdir(parents=True)
        for k in range(3):
            pixels = np.random.default_rng(3 * i + k).integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(root / f"kind {i}" / f"{k}.png")
    return root


@pytest.fixture(scope="module")
def run(trained, root: Path) -> Path:
    return trained(*WORDS, f"dataset.root={root}")


def splits_of(root: Path, seed: int = 0) -> dict[str, set[str]]:
    dataset = ImageFolder(root=str(root), size=16, seed=seed)
    return {split: set(dataset.split(split).names) for split in dataset.splits()}


def another_split(root: Path) -> int:
    """A seed with which two of the four test classes, and two or more for validation, are new to the run."""
    trained = splits_of(root)["train"]
    for seed in range(1, 100):
        others = splits_of(root, seed)
        if len(others["test"] - trained) == 2 <= len(others["validation"] - trained):
            return seed
    raise AssertionError


def evaluated(folder: Path) -> int:
    """The number of classes that were evaluated."""
    return json.loads((folder / "out/results.json").read_text())["results"][0]["classes"]


def test_training_classes_are_left_out(metarun, run: Path, root: Path, tmp_path: Path):
    other = [f"dataset.root={root}", f"dataset.seed={another_split(root)}"]
    said = "was trained on 2 of the 4 classes of mine test"
    done = metarun(*EVAL, f"checkpoint={run}", *OWN, *other)
    assert f"protonet {said}" in done.stderr
    assert "2 test classes" in done.stdout
    assert evaluated(tmp_path) == 2
    assert said in metarun("adapt", f"checkpoint={run}", "queries=2", *OWN, *other).stderr
    metarun(*EVAL, f"checkpoint={run}", *OWN, *other, "trained_classes=keep")
    assert evaluated(tmp_path) == 4
    done = metarun(*EVAL, f"checkpoint={run}", "split=all")
    assert "trained on 12 of the 20 classes of mine all" in done.stderr
    assert evaluated(tmp_path) == 8
    done = metarun("train", *WORDS, *other, f"init={run}/last.pt", "hydra.run.dir=second")
    assert f"this run {said}" in done.stderr
    assert "trained on 16 of the 20" in metarun(*EVAL, "checkpoint=second", "split=all").stderr


def test_a_folder_that_has_changed_is_noticed(metarun, run: Path, root: Path, tmp_path: Path):
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(root, tmp_path / "mine")
    words = [*EVAL, "checkpoint=run", "dataset.root=mine"]
    assert "changed" not in (same := metarun(*words).stderr)
    assert "trained on" not in same
    splits = splits_of(root)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "mine" / min(splits["test"]) / "0.png")
    assert "mine test: its data has changed since" in metarun(*words).stderr
    (tmp_path / "mine" / min(splits["train"])).rename(tmp_path / "mine" / "renamed")
    done = metarun("train", "resume=run", "iterations=3", "dataset.root=mine", status=1)
    assert "mine train: the training classes have changed since the run was started" in done.stderr
    content = checkpoint.load(tmp_path / "run/best.pt")
    for entry in ("train_classes", "init_classes", "fingerprints"):  # as in earlier versions
        del content[entry]
    checkpoint.save(tmp_path / "run/best.pt", content)
    assert "protonet: this checkpoint has no record of its training classes" in metarun(*words).stderr
