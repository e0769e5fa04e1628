"""`metarun data` as a person types it."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import UNTESTED
from PIL import Image

from metarun.config.paths import CONF


@pytest.mark.quick
def test_what_there_is(metarun, tmp_path: Path):
    """One line for each dataset; more about one of them is shown before it is prepared."""
    lines = metarun("data").stdout.splitlines()
    names = sorted(path.stem for path in (CONF / "dataset").glob("*.yaml"))
    assert [line.split("│")[1].strip() for line in lines if "│" in line] == names
    assert max(map(len, lines)) <= 80
    done = metarun("data", "dataset=sinusoid")
    assert done.stdout.startswith("Sinusoid regression (Finn et al. 2017, section 5.1)")
    assert "licence: none needed" in done.stdout
    assert "0 entries, 0 bytes" in done.stderr
    assert not list((tmp_path / "outputs").iterdir())  # a listing leaves no empty folder


@pytest.mark.pictures
def test_one_is_prepared_and_drawn(metarun, tmp_path: Path):
    words = ["data", "dataset=glyphs", "dataset.train_classes=12", "dataset.validation_classes=5"]
    done = metarun(*words, "dataset.test_classes=6", "hydra.run.dir=seen")
    assert "12" in done.stdout
    assert "240" in done.stdout
    for name in ("contact.png", "episode.png"):
        assert np.asarray(Image.open(tmp_path / "seen" / name)).std() > 10
    done = metarun(*words, "dataset.test_classes=6", "split=validation", "ways=6", status=1)
    assert "validation has 5 classes" in done.stderr


@pytest.mark.long
@pytest.mark.pictures
def test_tasks_are_described_and_drawn_as_a_map(metarun, trained, tmp_path: Path):
    """With a model's scores of the same tasks as `eval` has them; with batch statistics there is no map."""
    words = ["data", "dataset=glyphs", "describe=true", "dataset.test_classes=20", "dataset.size=16"]
    words += ["dataset.train_classes=40", "dataset.validation_classes=10", "split=test", "tasks=6"]
    run = trained("algorithm=protonet", "norm=running", *UNTESTED)
    done = metarun(*words, f"checkpoint={run}", "hydra.run.dir=seen")
    assert "Task2Vec norm" in done.stdout and "the hardest and the easiest tasks by accuracy" in done.stdout
    assert np.asarray(Image.open(tmp_path / "seen/task_map.png")).std() > 10
    with (tmp_path / "seen/tasks.csv").open() as file:
        rows = list(csv.DictReader(file))
    metarun("eval", f"checkpoint={run}", "episodes=6", "queries=5", "shots=1", "hydra.run.dir=evaluated")
    mean = json.loads((tmp_path / "evaluated/results.json").read_text())["results"][0]["mean"]
    scores = [float(row["accuracy of protonet"]) for row in rows]
    assert len(scores) == 6 and np.mean(scores) == pytest.approx(mean)
    other = trained("algorithm=maml", *UNTESTED)
    done = metarun(*words, f"probe={other}", status=1)
    assert "normalises an example by the others of its batch; name a run" in done.stderr
    assert "are no numbers" in metarun("data", "dataset=phrases", "describe=true", status=1).stderr


@pytest.mark.pictures
def test_tasks_without_images_have_no_pictures(metarun, tmp_path: Path):
    assert "drawn anew" in metarun("data", "dataset=sinusoid", "hydra.run.dir=seen").stdout
    assert not list(tmp_path.rglob("*.png"))


@pytest.mark.quick
def test_mistakes(metarun):
    assert "dataset.root is not set" in metarun("data", "dataset=image_folder", status=1).stderr
    assert "name one, as in metarun data" in metarun("data", "dataset.root=x", status=1).stderr
    assert "split=tests: must be one of train" in metarun("data", "split=tests", status=1).stderr


def test_training_images_are_changed_and_a_run_with_them_resumes(metarun, trained, tmp_path: Path):
    clusters = ["train_tasks=cactus", "train_tasks.clusters=30", "train_tasks.partitions=2"]
    words = ["augment=standard", *clusters, *UNTESTED]
    metarun("train", *words, "hydra.run.dir=parts", "iterations=6", "validation.every=6")
    metarun("train", "resume=parts", "iterations=12")
    folders = trained(*words), tmp_path / "parts", trained(*UNTESTED)
    rows = [(folder / "metrics.jsonl").read_text().splitlines() for folder in folders]
    losses = [[line.split('"loss": ')[1].split(",")[0] for line in lines] for lines in rows]
    assert losses[0] == losses[1] != losses[2]
    done = metarun("train", "dataset=sinusoid", "augment=standard", "iterations=2", status=1)
    assert "dataset=sinusoid has no images to augment" in done.stderr
    done = metarun("train", "dataset=sinusoid", clusters[0], "iterations=2", status=1)
    assert "train_tasks: makes tasks of images, and this dataset has none" in done.stderr
    done = metarun("train", *UNTESTED, clusters[0], "train_tasks.embedding=nowhere", status=1)
    assert "train_tasks.embedding=nowhere: no such checkpoint" in done.stderr


def folder_of_classes(root: Path) -> Path:
    for i in range(6):
        (root / f"class {i}").mkdir(parents=True)
        for k in range(6):
            Image.new("L", (8, 8), 20 * i + k).save(root / f"class {i}" / f"{k}.png")
    return root


def test_prepared_data_is_listed_verified_and_removed(metarun, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    assert "0 entries, 0 bytes" in metarun("data", "verify=true").stderr
    root = folder_of_classes(tmp_path / "mine")
    done = metarun("data", "dataset=image_folder", f"dataset.root={root}", "dataset.size=8", "ways=2")
    assert f"prepared data of image_folder: 3 entries, 6.9 kB, in {tmp_path / 'cache'}" in done.stderr
    assert "6.9 kB" in metarun("data").stdout
    (tmp_path / "one").mkdir()
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "one"))
    for path in (tmp_path / "cache").glob("image_folder-test-*"):
        shutil.copy(path, tmp_path / "one")
    assert "1 entry, " in metarun("data").stderr
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    assert metarun("data", "dataset=image_folder", "verify=true").stdout.count("intact") == 3
    entry = next((tmp_path / "cache").glob("image_folder-test-*[!n]"))
    content = bytearray(entry.read_bytes())
    content[-1] ^= 1
    entry.write_bytes(content)
    done = metarun("data", "verify=true", status=1)
    assert "1 of 3 cache entries are damaged" in done.stderr
    assert done.stdout.count("intact") == 2
    assert "damaged" in done.stdout
    done = metarun("data", "clean=true")
    assert "removed" not in done.stdout
    assert "3 entries" in done.stderr
    root.rename(tmp_path / "moved")
    done = metarun("data", "dataset=glyphs", "clean=true")
    assert "removed" not in done.stdout
    done = metarun("data", "clean=true")
    assert done.stdout.count("removed image_folder-") == 3
    assert f"{root} is gone" in done.stdout
    assert "0 entries" in done.stderr
    left = {path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"}
    assert left <= {tmp_path / "cache" / "data"}


def test_pillows_warnings_are_no_lines_of_ours(metarun, tmp_path: Path, monkeypatch):
    root = folder_of_classes(tmp_path / "mine")
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)  # it warns of larger ones, and refuses twice as many
    done = metarun("data", "dataset=image_folder", f"dataset.root={root}", "dataset.size=8", "ways=2")
    assert "Warning" not in done.stderr


def test_only_what_was_made_of_the_named_files_is_removed(metarun, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    for name in ("a", "b"):
        root = folder_of_classes(tmp_path / name)
        metarun("data", "dataset=image_folder", f"dataset.root={root}", "dataset.size=8", "ways=2")
    done = metarun("data", "dataset=glyphs", "dataset.foo=3", "clean=true", status=1)
    assert "dataset.foo: dataset=glyphs has no setting 'foo'" in done.stderr
    done = metarun("data", "dataset=image_folder", "dataset.root=a", "clean=true")
    assert done.stdout.count("removed image_folder-") == 3
    assert "image_folder: 3 entries" in done.stderr
    done = metarun("data", "dataset=image_folder", "clean=true")
    assert done.stdout.count("removed image_folder-") == 3


def test_every_dataset_says_what_it_holds_where_it_is_from_and_its_licence():
    for path in (CONF / "dataset").glob("*.yaml"):
        text = path.read_text()
        for fact in ("classes", "items", "from", "licence"):
            assert f"\n# {fact}: " in text, (path.name, fact)
