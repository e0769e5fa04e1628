"""Classes known by descriptions only, in all commands."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import TINY, UNTESTED
from PIL import Image

from metarun.training import checkpoint

OWN = [
    *(
        "algorithm=zero_shot",
        "dataset=image_folder",
        "dataset.size=8",
        "backbone=mlp",
        "backbone.hidden=[32]",
    ),
    *("ways=4", "queries=2", "iterations=80", "validation.every=40", "validation.episodes=20"),
    *("test.episodes=50", "log.tensorboard=false", "hardware=cpu", "hardware.threads=1"),
    *("hardware.compile=false", "optimizer.lr=0.01", "algorithm.hidden=[16]"),
]


def colours(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, 3))


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty colours of four images each, described by their red, green and blue in units of their own."""
    folder = tmp_path_factory.mktemp("zero_shot")
    lines = ["name;red;green;blue"]
    for i, colour in enumerate(colours(40)):
        (folder / f"photos/colour {i}").mkdir(parents=True)
        for k in range(4):
            noise = np.random.default_rng(4 * i + k).integers(-9, 9, (8, 8, 3))
            pixels = (colour + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"photos/colour {i}/{k}.png")
        red, green, blue = colour
        lines.append(f"colour {i};{red * 1000};{green / 1000};{blue},5".replace(".", ","))
    (folder / "about.csv").write_text("\n".join(lines[:1] + lines[:0:-1]), encoding="utf-8-sig")
    return folder


@pytest.fixture(scope="module")
def run(trained, mine: Path) -> Path:
    return trained(*OWN, f"dataset.root={mine}/photos", f"dataset.descriptions={mine}/about.csv")


def test_own_classes_are_learned_from_their_descriptions(metarun, run: Path, mine: Path, tmp_path: Path):
    """Unseen classes are recognised, in the test, in eval, and among descriptions in a file."""
    test = json.loads((run / "result.json").read_text())["test"]
    assert test["task"] == "4-way 0-shot" and test["mean"] > 0.7
    about = torch.tensor(colours(40)) * torch.tensor([1000, 0.001, 1]) + torch.tensor([0, 0, 0.5])
    state = checkpoint.load(run / "best.pt")
    known = [int(name.split()[1]) for name in state["train_classes"]["names"]]
    torch.testing.assert_close(state["algorithm"]["mean"], about[known].float().mean(0))
    done = metarun(
        "eval", f"checkpoint={run}", "shots=[0,1]", "episodes=50", "queries=2", "hydra.run.dir=eval"
    )
    assert "4-way 0-shot" in done.stdout and "chance 25.0 % 4-way" in done.stdout
    rows = json.loads((tmp_path / "eval/results.json").read_text())["results"]
    assert all(row["mean"] > 0.7 for row in rows)
    new = sorted(set(range(40)) - set(known))[:3]
    table = (mine / "about.csv").read_text(encoding="utf-8-sig").splitlines()
    lines = [line for line in table if line.split(";")[0] in [f"colour {i}" for i in new]]
    (tmp_path / "new.csv").write_text("\n".join(lines))
    for i in new:
        (tmp_path / "queries").mkdir(exist_ok=True)
        (tmp_path / f"queries/colour {i}").symlink_to(mine / f"photos/colour {i}")
    words = ["adapt", f"checkpoint={run}", "support=new.csv", "query=queries", "hydra.run.dir=adapt"]
    assert "3 classes, 0 support examples" in " ".join(metarun(*words).stdout.split())
    rows = (tmp_path / "adapt/predictions.csv").read_text().splitlines()[1:]
    assert len(rows) == 12
    assert sum(row.split(",")[1] == row.split(",")[3] for row in rows) >= 8
    (tmp_path / "new.csv").write_text("\n".join(line.rpartition(";")[0] for line in lines))
    assert "has 2 numbers for each class" in metarun(*words, status=1).stderr
    assert "add query=FOLDER" in metarun(*words[:3], status=1).stderr


def test_glyphs_without_examples(metarun, tmp_path: Path):
    """Resumed bit-identical; a sampled task; other methods and other data are refused in a line."""
    words = ["train", "algorithm=zero_shot", *UNTESTED, "iterations=4", "validation.every=4"]
    metarun(*words, "hydra.run.dir=whole")
    metarun(*words[:-2], "iterations=2", "validation.every=4", "hydra.run.dir=parts")
    metarun("train", "resume=parts", "iterations=4")
    whole, parts = (checkpoint.load(tmp_path / name / "last.pt")["algorithm"] for name in ("whole", "parts"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())
    done = metarun("adapt", "checkpoint=whole", "ways=3", "queries=2")
    assert "6 queries" in done.stdout and "support accuracy" not in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["algorithm=maml", "shots=0", *TINY], "shots=0: algorithm=maml needs support examples; choose algo"),
        (
            ["validation.shots=0", *TINY],
            "shots=0: algorithm=protonet needs support examples; choose",
        ),
        (["algorithm=zero_shot", "dataset=sinusoid"], "algorithm=zero_shot: needs tasks with classes"),
        (["shots=-1"], "shots=-1: must be a whole number of at least 0"),
    ],
)
def test_who_needs_examples_is_refused_in_a_line(metarun, words: list[str], says: str):
    done = metarun("train", *words, status=1)
    assert says in done.stderr
    assert sum(line.startswith("metarun: error") for line in done.stderr.splitlines()) == 1
