"""Fixed tasks in files: `metarun adapt tasks=FOLDER`, and `metarun eval benchmark=lake`."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.runs import LEARNED, UNTESTED
from helpers.server import running
from PIL import Image

import metarun as package
from metarun.commands import benchmarks, task_folders, views
from metarun.datasets import lake_challenge
from metarun.datasets.augment import Augment
from metarun.datasets.glyphs import Glyphs
from metarun.errors import DataError
from metarun.tasks.episodes import Episodes

pytestmark = pytest.mark.xdist_group("learned")  # one process trains for all

Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def run(trained) -> Path:
    return trained(*LEARNED)


@cache
def characters() -> torch.Tensor:
    """Unseen characters, uint8 [9, 20, 28, 28]."""
    return Glyphs(test_classes=9, seed=11).split("test").items.view(9, 20, 28, 28)


def drawing(character: int, number: int) -> Image.Image:
    """A dark drawing."""
    return Image.fromarray(255 - characters()[character, number].numpy())


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def challenge(folder: Path, ways: int = 5) -> None:
    """Two runs in the authors' layout; the classes of the queries are in reverse order."""
    for task in (1, 2):
        lines = []
        for i in range(ways):
            item, label = (
                f"run{task:02}/test/item{i + 1:02}.png",
                f"run{task:02}/training/class{ways - i:02}.png",
            )
            save(drawing(ways - 1 - i, 2 * task), folder / item)
            save(drawing(ways - 1 - i, 2 * task + 1), folder / label)
            lines.append(f"{item} {label}\n")
        (folder / f"run{task:02}/class_labels.txt").write_text("".join(lines))


def packed(folder: Path, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, str(file.relative_to(folder)))


def tasks(folder: Path) -> None:
    """A task of two classes, and one of three with unequal shots."""
    for name, ways in (("few", 2), ("many", 3)):
        for k in range(ways):
            for i in range(6):
                part = "support" if i < 1 + k else "query"
                save(drawing(k, i), folder / name / part / f"c{k}" / f"{i}.png")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_tasks_of_a_folder_are_those_of_single_commands(metarun, run: Path, tmp_path: Path):
    tasks(tmp_path / "tasks")
    words = ["adapt", f"checkpoint={run}"]
    done = metarun(*words, "tasks=tasks", "hydra.run.dir=all")
    expected = []
    for name in ("few", "many"):
        parts = [f"{part}=tasks/{name}/{part}" for part in ("support", "query")]
        metarun(*words, *parts, f"hydra.run.dir={name}")
        expected.append(json.loads(Path(name, "steps.json").read_text())[-1]["query accuracy"])
    rows = rows_of(tmp_path / "all/results.csv")
    assert [float(row["accuracy"]) for row in rows] == pytest.approx(expected)
    facts = [tuple(row[key] for key in ("task", "classes", "support", "queries", "scored")) for row in rows]
    assert facts == [("few", "2", "3", "9", "9"), ("many", "3", "6", "12", "12")]
    result = json.loads((tmp_path / "all/results.json").read_text())["results"][0]
    half = 1.96 * np.std(expected, ddof=1) / np.sqrt(2)
    assert (result["mean"], result["interval"]) == pytest.approx((np.mean(expected), half))
    assert f"{100 * result['mean']:.2f} ± {100 * result['interval']:.2f} %" in done.stdout
    predictions = rows_of(tmp_path / "all/predictions.csv")
    single = rows_of(tmp_path / "few/predictions.csv") + rows_of(tmp_path / "many/predictions.csv")
    assert [(row["query"], row["prediction"]) for row in predictions] == [
        (row["query"], row["prediction"]) for row in single
    ]
    assert done.stderr.count("support drawings: dark ink") == 1  # a message of all tasks is printed once


def test_a_task_without_known_classes_is_predicted_and_not_in_the_mean(metarun, run: Path, tmp_path: Path):
    tasks(tmp_path / "tasks")
    for path in sorted((tmp_path / "tasks/many/query").glob("*/*")):
        path.rename(tmp_path / "tasks/many/query" / f"{path.parent.name}_{path.name}")
    for folder in (tmp_path / "tasks/many/query").glob("c?"):
        folder.rmdir()
    metarun("adapt", f"checkpoint={run}", "tasks=tasks", "hydra.run.dir=all")
    few, many = rows_of(tmp_path / "all/results.csv")
    result = json.loads((tmp_path / "all/results.json").read_text())["results"][0]
    assert many["accuracy"] == "" and (many["queries"], many["scored"]) == ("12", "0")
    assert result["mean"] == float(few["accuracy"]) and result["interval"] is None
    assert len(rows_of(tmp_path / "all/predictions.csv")) == 21


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "few/query"), "tasks/few: has no query; add a folder query"),
        (
            lambda folder: save(drawing(0, 0), folder / "few/query.png"),
            "few: has query and query.png; remove",
        ),
        (lambda folder: (folder / "few").rename(folder / "support"), "tasks: is one task"),
        (lambda folder: [shutil.rmtree(path) for path in folder.iterdir()], "tasks: has no sub-folders"),
        (shutil.rmtree, "tasks: no such folder"),
    ],
)
def test_folders_that_are_no_tasks(tmp_path: Path, change: Change, message: str):
    tasks(tmp_path / "tasks")
    change(tmp_path / "tasks")
    with pytest.raises(DataError, match=message):
        task_folders.task_paths(tmp_path / "tasks")


def test_a_task_that_cannot_be_read_is_named(metarun, run: Path, tmp_path: Path):
    tasks(tmp_path / "tasks")
    words = ["adapt", f"checkpoint={run}", "tasks=tasks", "hydra.run.dir=all"]
    (tmp_path / "tasks/many/support/c1/1.png").write_bytes(b"no")
    done = metarun(*words, status=1)
    assert "error: tasks/many/support/c1/1.png: is not an image" in done.stderr.splitlines()[-1]
    shutil.rmtree(tmp_path / "tasks/many")
    for path in (tmp_path / "tasks/few/query").glob("*/*"):
        path.unlink()
    assert "tasks/few/query: has no images" in metarun(*words, status=1).stderr.splitlines()[-1]
    assert not (tmp_path / "all").exists()


def test_lakes_challenge(metarun, run: Path, tmp_path: Path):
    challenge(tmp_path / "runs")
    (tmp_path / "zipped").mkdir()
    packed(tmp_path / "runs", tmp_path / "zipped/all_runs.zip")
    model, errors = package.load(run, device="cpu"), []
    for task in ("run01", "run02"):
        support, query = (
            sorted((tmp_path / "runs" / task / part).iterdir()) for part in ("training", "test")
        )
        adapted = model.adapt(support, range(5), ink="dark")
        errors.append(np.mean(np.array(adapted.predict(query).labels) != np.arange(5)[::-1]))
    for root in ("runs", "zipped"):
        out = f"out_{len(root)}"
        done = metarun(
            "eval", f"checkpoint={run}", "benchmark=lake", f"dataset.root={root}", f"hydra.run.dir={out}"
        )
        written = json.loads((tmp_path / out / "results.json").read_text())
        assert written["errors"][0]["error"] == pytest.approx(np.mean(errors))
        assert f"{100 * np.mean(errors):.1f} ± " in done.stdout and "13.7 %" in done.stdout
        assert "not the 20 published tasks" in done.stderr
        assert [row["task"] for row in written["tasks"]] == ["run01", "run02"]


def test_predictions_are_averaged_over_views(run: Path):
    """Of Prototypical networks, by hand: each view has its own prototypes and its own queries."""
    model = package.load(run, device="cpu")
    settings = {"crop": 2, "flip": False, "rotation": 20, "colour": 0}
    model.settings.augment = {"_target_": "metarun.datasets.augment.Augment", **settings}
    images = characters()[:3, :5].float().flatten(0, 1).unsqueeze(1) / 255
    support_x, query_x = images.unflatten(0, (3, 5)).split([2, 3], 1)
    support_y, query_y = (torch.arange(3).repeat_interleave(n).unsqueeze(0) for n in (2, 3))
    support_x, query_x = support_x.flatten(0, 1), query_x.flatten(0, 1)
    episode = Episodes(support_x[None], support_y, query_x[None], query_y, torch.arange(3)[None])
    embed, generator = model.algorithm.backbone.eval(), torch.Generator().manual_seed(7)
    change, probabilities = Augment(**settings), []
    with torch.no_grad():
        for view in range(4):
            parts = [support_x, query_x]
            if view:
                parts = [change(x, torch.rand(len(x), 7, generator=generator)) for x in parts]
            prototypes = embed(parts[0]).view(3, 2, -1).mean(1)
            distances = (embed(parts[1])[:, None] - prototypes).square().sum(2)
            probabilities.append((-distances).softmax(1))
        first = probabilities[0].log()[None]
        found = views.averaged(model, episode, first, views=4, seed=7)
    torch.testing.assert_close(found[0].exp(), torch.stack(probabilities).mean(0), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, first, atol=1e-2)


def test_views_need_an_augmentation_and_fixed_tasks(metarun, run: Path, tmp_path: Path):
    challenge(tmp_path / "runs")
    words = ["eval", f"checkpoint={run}", "views=2"]
    done = metarun(*words, "benchmark=lake", "dataset.root=runs", status=1)
    assert "was trained without augment=" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert "views" in metarun(*words, status=1).stderr
    model = package.load(run, device="cpu")
    model.settings.augment = {
        "_target_": "metarun.datasets.augment.Augment",
        **{"crop": 0, "flip": False, "colour": 0},
    }
    scored = [
        benchmarks.score_on(benchmarks.pictures_of(task), model, 0, views)
        for task in lake_challenge.runs(str(tmp_path / "runs"), False)
        for views in (1, 3)
    ]
    assert scored[0].scores == scored[1].scores and scored[2].scores == scored[3].scores


def test_models_that_cannot_do_the_challenge(metarun, run: Path, trained, tmp_path: Path):
    """A fixed head has as many ways as in training; other models are evaluated."""
    fixed = trained("algorithm=maml", *UNTESTED)
    challenge(tmp_path / "runs")
    words = ["eval", "benchmark=lake", "dataset.root=runs", "hydra.run.dir=out"]
    done = metarun(*words, f"checkpoint={fixed}", status=1)
    assert "fixed head has 5 ways, not 20" in done.stderr and len(done.stderr.strip().splitlines()) == 1
    done = metarun(*words, f"checkpoint=[{fixed},{run}]")
    assert "fixed head has 5" in done.stdout
    assert {row["model"] for row in rows_of(tmp_path / "out/results.csv")} == {"protonet"}


def no_labels(folder: Path) -> None:
    (folder / "run02/class_labels.txt").unlink()


def wrong_label(folder: Path) -> None:
    path = folder / "run01/class_labels.txt"
    path.write_text(path.read_text().replace("class01", "class41"))


def missing_label(folder: Path) -> None:
    path = folder / "run01/class_labels.txt"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_labels, "run02 has no class_labels.txt"),
        (lambda folder: shutil.rmtree(folder / "run02/test"), "run02 has too few queries"),
        (
            wrong_label,
            "run01/class_labels.txt, line 5: 'run01/test/item05.png run01/training/class41.png' does",
        ),
        (missing_label, "has no class for test/item05.png"),
    ],
)
def test_runs_that_cannot_be_used(tmp_path: Path, change: Change, message: str):
    challenge(tmp_path / "runs")
    change(tmp_path / "runs")
    with pytest.raises(DataError, match=message):
        lake_challenge.runs(str(tmp_path / "runs"))


def test_zips_and_folders_that_cannot_be_used(tmp_path: Path):
    def message(root: Path | None, may_download: bool = True) -> str:
        with pytest.raises(DataError) as caught:
            lake_challenge.runs(root and str(root), may_download)
        return str(caught.value)

    path = tmp_path / "all_runs.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("run01/../../class_labels.txt", "")
    assert "leads out of it" in message(tmp_path) and "leads out of it" in message(path)
    path.write_bytes(b"no zip")
    assert "cannot be used" in message(tmp_path)
    path.unlink()
    assert "has no files" in message(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    assert "has no folders run01" in message(tmp_path)
    assert "dataset.download=true" in message(None, may_download=False)


def test_the_zip_is_downloaded_once_with_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    challenge(tmp_path / "runs")
    packed(tmp_path / "runs", tmp_path / "all_runs.zip")
    content = (tmp_path / "all_runs.zip").read_bytes()
    monkeypatch.setenv("METARUN_DATA", str(tmp_path / "data"))
    with running() as server:
        server.files["all_runs.zip"] = content
        monkeypatch.setattr(lake_challenge, "ARCHIVE", f"{server.url}all_runs.zip")
        with pytest.raises(DataError, match=f"where {lake_challenge.SHA256} is right"):
            lake_challenge.runs(None)
        monkeypatch.setattr(lake_challenge, "SHA256", hashlib.sha256(content).hexdigest())
        found = lake_challenge.runs(None)
    assert lake_challenge.runs(None)[1].labels == found[1].labels  # the server is gone
    assert [(run.name, run.labels) for run in found] == [
        ("run01", [4, 3, 2, 1, 0]),
        ("run02", [4, 3, 2, 1, 0]),
    ]


def test_settings_of_a_benchmark(metarun, run: Path):
    words = ["eval", f"checkpoint={run}"]
    assert "benchmark=lakes: must be lake" in metarun(*words, "benchmark=lakes", status=1).stderr
    assert "nothing reads it with benchmark" in metarun(*words, "benchmark=lake", "ways=5", status=1).stderr


def test_training_on_the_evaluation_set_is_said(capsys: pytest.CaptureFixture[str]):
    def note(*names: str) -> str:
        record = {"names": list(names), "marks": torch.zeros(len(names), 8, dtype=torch.int64)}
        settings = SimpleNamespace(backbone={"_target_": "metarun.backbones.conv4.Conv4"})
        model = SimpleNamespace(
            name="maml", settings=settings, content={"train_classes": record, "choices": {}}
        )
        benchmarks.note_trained(model)
        return capsys.readouterr().err

    assert note("Latin/character01", "Greek/character02@90") == ""
    # Two characters of an evaluation alphabet, of which one is rotated, and the alphabet as a class.
    assert "trained on 3 classes" in note(
        "Angelic/character01", "Tibetan/character02@180", "Atlantean", "Latin"
    )
