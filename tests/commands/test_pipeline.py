"""Pretrain, meta-train from that checkpoint, adapt: as the README says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers.runs import TINY, UNTESTED

from metarun.config.restore import backbone_of, is_average
from metarun.training import checkpoint

SMALL = [
    "dataset.train_classes=60",
    "dataset.validation_classes=20",
    "dataset.test_classes=20",
    "dataset.size=20",
    "backbone.width=16",
    "validation.episodes=2",
    "test.episodes=0",
    "log.tensorboard=false",
    "hardware.compile=false",
    "hardware.threads=1",
]


@pytest.fixture(scope="module")
def pretrained(trained) -> Path:
    return trained("algorithm=baseline", *SMALL, "iterations=60", "meta_batch=4")


def accuracy(folder: Path) -> float:
    return json.loads((folder / "result.json").read_text())["test"]["mean"]


def backbone(folder: Path, name: str = "last.pt") -> dict[str, torch.Tensor]:
    return backbone_of(checkpoint.load(folder / name)["algorithm"])


def test_the_pipeline(metarun, pretrained: Path, tmp_path: Path):
    """Each stage by the command line; starting from a checkpoint beats starting from nothing."""
    words = ["algorithm=meta_baseline", *SMALL, "iterations=3", "validation.every=3", "test.episodes=40"]
    done = metarun("train", *words, f"init={pretrained}", "hydra.run.dir=meta")
    assert "initialised from the backbone of baseline on glyphs, iteration 60" in done.stderr
    metarun("train", *words, "hydra.run.dir=scratch")
    assert accuracy(tmp_path / "meta") > accuracy(tmp_path / "scratch") + 0.05
    grid = metarun("eval", f"checkpoint=[{pretrained},meta]", "ways=[3,7]", "shots=[1,2]", "episodes=2")
    assert "7-way 2-shot" in grid.stdout and "differences" in grid.stdout
    assert "10 queries" in metarun("adapt", "checkpoint=meta", "queries=2").stdout
    assert "10 queries" in metarun("adapt", f"checkpoint={pretrained}", "queries=2", "steps=3").stdout


def test_a_backbone_that_does_not_fit_is_refused_before_data_is_drawn(metarun, pretrained: Path):
    words = ["algorithm=maml", *SMALL, "dataset.seed=77", f"init={pretrained}", "backbone.width=12"]
    done = metarun("train", *words, status=1)
    assert "does not fit this one" in done.stderr and "draw glyphs" not in done.stderr


@pytest.mark.parametrize("algorithm", ["maml", "cnaps", "relation", "meta_networks", "r2d2", "leo"])
def test_any_method_starts_with_a_backbone(metarun, pretrained: Path, tmp_path: Path, algorithm: str):
    """Its weights are the checkpoint's, with running averages where both have them."""
    words = [f"algorithm={algorithm}", *SMALL, "iterations=1", "optimizer.lr=1e-30", "meta_batch=1"]
    if algorithm == "meta_networks":  # which has no normalisation, and another has as many weights
        words.append("norm=layer")
    metarun("train", *words, f"init={pretrained}", "backbone=conv4", "hydra.run.dir=run")
    offered, started = (
        [x for name, x in backbone(folder).items() if not is_average(name)]
        for folder in (pretrained, tmp_path / "run")
    )
    assert len(offered) == len(started) == 16
    for a, b in zip(offered, started, strict=True):
        torch.testing.assert_close(a, b)


def test_cnaps_freezes_what_it_starts_with(metarun, pretrained: Path, tmp_path: Path):
    words = ["algorithm=cnaps", "algorithm.frozen=true", *SMALL, "iterations=3", f"init={pretrained}"]
    metarun("train", *words, "hydra.run.dir=run")
    for a, b in zip(backbone(pretrained).values(), backbone(tmp_path / "run").values(), strict=True):
        assert torch.equal(a, b)


def test_a_resumed_run_does_not_start_again(metarun, pretrained: Path, tmp_path: Path):
    words = ["train", "algorithm=protonet", *SMALL, "iterations=4", "checkpoint.every=2"]
    metarun(*words, f"init={pretrained}", "hydra.run.dir=run")
    done = metarun("train", "resume=run", "iterations=6")
    assert "starts with" not in done.stderr and "resumed at iteration 4" in done.stderr


@pytest.mark.parametrize("algorithm", ["snail", "mann", "versa", "simpleshot", "metaoptnet"])
def test_a_stopped_run_ends_as_one_that_never_was(metarun, tmp_path: Path, algorithm: str):
    """Random orders and samples, averages and all: the same weights, bit by bit."""
    words = ["train", f"algorithm={algorithm}", *UNTESTED, "validation.every=4", "validation.episodes=2"]
    metarun(*words, "iterations=4", "hydra.run.dir=whole")
    metarun(*words, "iterations=2", "hydra.run.dir=parts")
    metarun("train", "resume=parts", "iterations=4")
    whole, parts = (checkpoint.load(tmp_path / name / "last.pt")["algorithm"] for name in ("whole", "parts"))
    for name, tensor in whole.items():
        assert torch.equal(tensor, parts[name]), name


@pytest.mark.parametrize("algorithm", ["gnn", "meta_networks", "snail"])
def test_more_ways_than_it_has_are_refused_everywhere(metarun, tmp_path: Path, algorithm: str):
    words = ["train", f"algorithm={algorithm}", *UNTESTED, "validation.episodes=2", "ways=3", "iterations=1"]
    assert "the network has 3 ways" in metarun(*words, "validation.ways=5", status=1).stderr
    metarun(*words, "hydra.run.dir=run")
    assert "the network has 3 ways, not 5" in metarun("adapt", "checkpoint=run", "ways=5", status=1).stderr


def test_a_frozen_backbone_needs_a_start(metarun, tmp_path: Path):
    frozen = ["train", "algorithm=cnaps", "algorithm.frozen=true", *TINY, "iterations=1"]
    assert "add init=RUN" in metarun(*frozen, status=1).stderr
    metarun("train", "algorithm=maml", *TINY, "iterations=1", "hydra.run.dir=run")
    assert "needs running averages" in metarun(*frozen, "init=run", status=1).stderr


@pytest.mark.parametrize("algorithm", ["protonet", "lrd2", "metaoptnet", "meta_networks", "gnn"])
def test_bf16_trains(metarun, tmp_path: Path, algorithm: str):
    """Solvers keep to the types they need."""
    words = ["train", f"algorithm={algorithm}", *TINY, "iterations=2", "hardware.precision=bf16"]
    metarun(*words, "hydra.run.dir=run")
    assert 0 < accuracy(tmp_path / "run") < 1


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["backbone.width=8"], "does not fit this one; choose the backbone"),
        (["dataset.size=16", "backbone=mlp"], "does not fit this one"),
    ],
)
def test_another_backbone_is_refused_in_a_line(metarun, pretrained: Path, words: list[str], error: str):
    small = [word for word in SMALL if not word.startswith("backbone")]
    done = metarun("train", "algorithm=protonet", *small, *words, f"init={pretrained}", status=1)
    assert error in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_init_that_is_no_run_is_refused(metarun, tmp_path: Path):
    done = metarun("train", "init=nowhere", "iterations=1", status=1)
    assert "nowhere" in done.stderr and "Traceback" not in done.stderr


def test_accuracy_at_each_instance(metarun, tmp_path: Path):
    """Of MANN alone; in a table and a file."""
    metarun("train", "algorithm=mann", *SMALL, "iterations=3", "meta_batch=2", "hydra.run.dir=run")
    metarun("eval", "checkpoint=run", "episodes=10", "instances=4", "hydra.run.dir=eval")
    rows = (tmp_path / "eval/instances.csv").read_text().splitlines()
    assert [row.split(",")[3] for row in rows[1:]] == ["1", "2", "3", "4"]
    assert all(0 < float(row.split(",")[4]) < 1 for row in rows[1:])
    metarun("train", "algorithm=protonet", *SMALL, "iterations=3", "hydra.run.dir=other")
    done = metarun("eval", "checkpoint=other", "episodes=10", "instances=4", status=1)
    assert "algorithm=mann" in done.stderr
