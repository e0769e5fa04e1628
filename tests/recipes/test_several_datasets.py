"""Training on several datasets and testing on others, as a person types it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SMALL = (
    "backbone.width=8 iterations=4 meta_batch=4 validation.every=2 validation.episodes=10 test.episodes=10"
)
WORDS = [*SMALL.split(), "queries=2", "log.tensorboard=false", "hardware=cpu", "log.every=2"]


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """Glyphs, and a folder of ten classes of coloured images; for `metarun train`."""
    numbers = np.random.default_rng(0)
    for i in range(10):
        (tmp_path / "own" / f"class {i}").mkdir(parents=True)
        for k in range(4):
            pixels = (numbers.random((20, 20, 3)) * 60 + 18 * i).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "own" / f"class {i}" / f"{k}.png")
    return [
        "dataset=mixture",
        "dataset.parts={glyphs:1,image_folder:2}",
        f"dataset.settings.image_folder.root={tmp_path / 'own'}",
        "dataset.settings.image_folder.size=20",
        "dataset.settings.glyphs.train_classes=12",
        "dataset.settings.glyphs.validation_classes=6",
        "dataset.settings.glyphs.test_classes=6",
        "ways=2",
        "validation.ways=2",
    ]


def results(folder: Path) -> list[dict]:
    return json.loads((folder / "results.json").read_text())["results"]


def test_train_resume_and_a_row_for_each_dataset(metarun, two: list[str], tmp_path: Path):
    words = ["train", *two, *WORDS, "algorithm=pretrain"]  # which needs the count of all classes
    metarun(*words, "hydra.run.dir=whole")
    metarun(*words, "hydra.run.dir=parts", "iterations=2")
    (tmp_path / "own").rename(tmp_path / "moved")
    root = f"dataset.settings.image_folder.root={tmp_path / 'moved'}"
    metarun("train", "resume=parts", "iterations=4", root)
    whole, again = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("whole", "parts"))
    assert whole["test"] | {"seconds": 0} == again["test"] | {"seconds": 0}
    figures = whole["test"]["datasets"]
    assert whole["test"]["mean"] == pytest.approx(sum(each["mean"] for each in figures.values()) / 2)
    row = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"accuracy", "accuracy glyphs", "accuracy image_folder"} <= row.keys()

    done = metarun("eval", "checkpoint=whole", "episodes=10", "queries=2", root, "hydra.run.dir=out")
    rows = results(tmp_path / "out")
    assert [row["dataset"] for row in rows] == ["glyphs", "image_folder"]
    assert [row["mean"] for row in rows] == pytest.approx([each["mean"] for each in figures.values()])
    assert "image_folder 2-way 1-shot" in done.stdout
    assert (tmp_path / "out/results.png").stat().st_size > 5000


def test_another_dataset_is_converted_to_the_models_images(metarun, two: list[str], tmp_path: Path):
    metarun("train", *two, *WORDS, "dataset.size=16", "test.episodes=0", "hydra.run.dir=mixed")
    own = ["dataset.train_classes=12", "dataset.validation_classes=6", "dataset.test_classes=6", "ways=2"]
    metarun("train", *own, *WORDS, "test.episodes=0", "hydra.run.dir=own")
    glyphs = ["dataset=glyphs", "dataset.test_classes=6", "episodes=10", "queries=2"]
    done = metarun("eval", "checkpoint=[mixed,own]", *glyphs, "hydra.run.dir=out")
    assert "glyphs test: images converted from 1x28x28 to the model's 3x16x16" in done.stderr
    content = json.loads((tmp_path / "out/results.json").read_text())
    # The same episodes at two sizes, so that the two are compared.
    assert len({row["episodes_hash"] for row in content["results"]}) == 1
    assert len(content["comparisons"]) == 1
    assert "images converted" in metarun("adapt", "checkpoint=mixed", *glyphs[:2], "queries=2").stderr
    done = metarun("eval", "checkpoint=mixed", "dataset=sinusoid", status=1)
    assert "only images can be converted" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["dataset.parts={glyph:1}"], "dataset=glyph: no such dataset; did you mean 'glyphs'?"),
        (
            ["dataset.parts={glyphs:1}", "dataset.settings.glyphs.sise=3"],
            "dataset.settings.glyphs.sise: there is no such setting; did you mean 'size'?",
        ),
        (
            ["dataset.parts={glyphs:1}", "dataset.settings.omniglot.size=3"],
            "dataset.settings.omniglot.size: there is no such setting",
        ),
        (["dataset.parts={glyphs:0}"], "dataset.parts.glyphs=0: a weight must be above 0"),
        (["dataset.parts=glyphs:1"], "dataset.parts=glyphs:1: must be names, each with a number"),
        (["dataset.parts={glyphs:1,sinusoid:1}"], "dataset.parts: sinusoid has no images"),
        (["dataset.parts={glyphs:1,image_folder:1}"], "dataset.settings.image_folder.root is not set"),
        ([], "dataset.parts is not set"),
    ],
)
def test_mistakes(metarun, words: list[str], says: str):
    assert says in metarun("train", "dataset=mixture", *words, status=1).stderr


def test_one_dataset_twice_under_names_of_ones_own(metarun, two: list[str], tmp_path: Path):
    done = metarun(
        "data",
        "dataset=mixture",
        "dataset.parts={ours:1,theirs:1}",
        *(f"+dataset@dataset.settings.{name}=image_folder" for name in ("ours", "theirs")),
        *(f"dataset.settings.{name}.root={tmp_path / 'own'}" for name in ("ours", "theirs")),
        "dataset.settings.theirs.seed=1",
        "ways=2",
        "queries=3",
        "hydra.run.dir=seen",
    )
    assert "ours" in done.stdout
    assert np.asarray(Image.open(tmp_path / "seen" / "contact.png")).std() > 10
