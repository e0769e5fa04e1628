"""Training on several datasets and testing on others, as a person types it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SMALL = (
    "backbone.width=8 iterations=4 meta_batch=4 validation.every=2 validation.episodes=10 test.episodes=10"
)
WORDS = [*SMALL.split(), "queries=2", "log.tensorboard=false", "log.every=2"]
WORDS += ["hardware=cpu", "hardware.compile=false"]


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
    # The method needs the number of classes of all datasets together.
    words = ["train", *two, *WORDS, "algorithm=pretrain", "inner_loop.test_steps=3"]
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
    one = ["dataset.parts={glyphs:1}", "hydra.run.dir=one"]
    metarun("eval", "checkpoint=whole", "episodes=10", "queries=2", *one)
    assert [row["mean"] for row in results(tmp_path / "one")] == [rows[0]["mean"]]


def test_another_dataset_is_converted_to_the_models_images(metarun, two: list[str], tmp_path: Path):
    mixed = [*two, *WORDS, "dataset.size=16", "test.episodes=0", "hardware.compile=auto"]
    metarun("train", *mixed, "hydra.run.dir=mixed")
    own = ["dataset.train_classes=12", "dataset.validation_classes=6", "dataset.test_classes=6", "ways=2"]
    metarun("train", *own, *WORDS, "test.episodes=0", "hydra.run.dir=glyphs")
    glyphs = ["dataset=glyphs", "dataset.test_classes=6", "episodes=10", "queries=2"]
    done = metarun("eval", "checkpoint=[mixed,glyphs]", *glyphs, "hydra.run.dir=out")
    assert "glyphs test: images converted from 1x28x28 to the model's 3x16x16" in done.stderr
    content = json.loads((tmp_path / "out/results.json").read_text())
    # In a mixture that is larger than the model, glyphs are what they are alone.
    larger = ["dataset=mixture", "dataset.parts={glyphs:1}", "dataset.size=35", "episodes=10", "queries=2"]
    done = metarun(
        "eval", "checkpoint=glyphs", *larger, "dataset.settings.glyphs.test_classes=6", "hydra.run.dir=in"
    )
    assert "mixture: images converted from 1x35x35 to the model's 1x28x28" in done.stderr
    (row,) = results(tmp_path / "in")
    same = next(each for each in content["results"] if each["model"].endswith("glyphs"))
    assert [row[key] for key in ("episodes_hash", "mean")] == [same[key] for key in ("episodes_hash", "mean")]
    # The same episodes at two sizes, so that the two are compared.
    assert len({row["episodes_hash"] for row in content["results"]}) == 1
    assert len(content["comparisons"]) == 1
    assert "images converted" in metarun("adapt", "checkpoint=mixed", *glyphs[:2], "queries=2").stderr
    # Several models on several datasets are a grid, too.
    parts = [*two[:5], "dataset.settings.glyphs.test_classes=6", "ways=2", "episodes=4", "queries=2"]
    done = metarun("eval", "checkpoint=[mixed,glyphs]", *parts, "hydra.run.dir=grid")
    assert "accuracy by the trained model (rows) and the dataset of the test" in done.stdout
    with (tmp_path / "grid/domains.csv").open(newline="") as file:
        grid = [float(row[name]) for row in csv.DictReader(file) for name in ("glyphs", "image_folder")]
    assert grid == [row["mean"] for row in results(tmp_path / "grid")]
    assert not (tmp_path / "in/domains.csv").exists()
    done = metarun("eval", "checkpoint=mixed", "dataset=sinusoid", status=1)
    assert "has vectors, and the model was trained on images; choose a dataset of images" in done.stderr


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
        (["dataset.parts={glyphs:1,glyphs:2}"], "dataset.parts: glyphs is listed twice"),
        (
            ["dataset.parts={image_folder:1,glyphs:1}", "dataset.settings.image_folder.root=gone"],
            "dataset.settings.image_folder.root=gone: no such folder",
        ),
        (
            ["dataset.parts={image_folder:1}", "dataset.settings.image_folder={root:gone,size:0}"],
            "dataset.settings.image_folder.size=0: choose",
        ),
        (
            ["-m", "dataset=glyphs,mixture", "dataset.parts={glyphs:1}"],
            "must not include mixture; run it separately",
        ),
        (["dataset.parts=glyphs:1"], "dataset.parts=glyphs:1: must be names, each with a number"),
        (["dataset.parts={glyphs:1,sinusoid:1}"], "a mixture is of images, and sinusoid has vectors"),
        (["dataset.parts={glyphs:1,image_folder:1}"], "dataset.settings.image_folder.root is not set"),
        ([], "dataset.parts is not set"),
    ],
)
def test_mistakes(metarun, words: list[str], says: str):
    assert says in metarun("train", "dataset=mixture", *words, status=1).stderr


@pytest.mark.parametrize(
    "words",
    [["dataset.parts={glyphs:1}", "+dataset.parts.cifar_fs=2"], ["dataset.parts.glyphs=1"]],
)
def test_parts_may_be_typed_one_by_one(metarun, words: list[str]):
    done = metarun("train", "dataset=mixture", *words, "--cfg", "job")
    assert ("metarun.datasets.cifar.CifarFS" in done.stdout) == (len(words) == 2)
    assert "metarun.datasets.glyphs.Glyphs" in done.stdout


def test_data_of_one_name_that_differ_have_a_hash_each(metarun, tmp_path: Path):
    own = ["dataset.train_classes=12", "dataset.validation_classes=6", "dataset.test_classes=6", "ways=2"]
    for seed in (0, 1):
        words = [f"dataset.seed={seed}", "test.episodes=0", f"hydra.run.dir=run{seed}"]
        metarun("train", *own, *WORDS, *words)
    done = metarun("eval", "checkpoint=[run0,run1]", "episodes=10", "queries=2", "hydra.run.dir=out")
    for row in results(tmp_path / "out"):
        assert f"of {row['model']} {row['episodes_hash']}" in done.stdout


@pytest.mark.pictures
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
