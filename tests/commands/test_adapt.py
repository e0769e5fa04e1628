"""`metarun adapt` on a user's own images, of many kinds."""

from __future__ import annotations

import csv
import json
import shutil
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.runs import LEARNED, UNTESTED
from PIL import Image

from metarun.datasets import images
from metarun.datasets.glyphs import Glyphs
from metarun.datasets.preparation import Preparation
from metarun.inference.images import pixels

pytestmark = pytest.mark.xdist_group("learned")  # one process trains for all


@pytest.fixture(scope="module")
def run(trained) -> Path:
    """A network that has learned something, so that its predictions mean something."""
    return trained(*LEARNED)


def draw(
    folder: Path, dark: bool, sizes: tuple[int, ...] = (28, 90, 61), modes: tuple[str, ...] = ("L",)
) -> None:
    """support/ (unequal shots) and query/ of three unseen characters, as a person would save them."""
    store = Glyphs(test_classes=3, seed=11).split("test")
    for k, name in enumerate(("alpha one", "βήτα", "gamma")):
        for i in range(8):
            pixels = store.items[20 * k + i, 0]
            image = Image.fromarray((255 - pixels if dark else pixels).numpy())
            side = sizes[i % len(sizes)]
            image = image.resize((side, side), Image.Resampling.BICUBIC)
            mode = modes[i % len(modes)]
            if mode == "I;16":  # of which convert() would use the lowest 8 bits alone
                image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
            else:
                image = image.convert(mode)
            place = folder / ("support" if i < 2 + k else "query") / name
            place.mkdir(parents=True, exist_ok=True)
            image.save(place / f"{i}.png")


def predicted(out: Path) -> dict[str, list[float]]:
    """The probabilities of every class, by query."""
    with (out / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {row["query"]: [float(v) for key, v in row.items() if key.startswith("p(")] for row in rows}


@pytest.mark.pictures
@pytest.mark.parametrize("dark", [True, False])
def test_a_users_drawings_of_either_polarity(metarun, run: Path, tmp_path: Path, dark: bool):
    draw(tmp_path, dark, modes=("L", "RGB", "RGBA", "LA", "P", "1", "I;16") if dark else ("L", "RGB"))
    done = metarun("adapt", f"checkpoint={run}", "support=support", "query=query", "hydra.run.dir=out")
    assert f"{'dark' if dark else 'light'} ink" in done.stderr
    with (tmp_path / "out/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15
    assert sum(row["prediction"] == row["class"] for row in rows) >= 11  # chance: 5
    for row in rows:
        assert sum(float(value) for key, value in row.items() if key.startswith("p(")) == pytest.approx(
            1, abs=1e-4
        )
    assert (tmp_path / "out/predictions.png").stat().st_size > 5000
    adapted = torch.load(tmp_path / "out/adapted.pt", weights_only=True)
    assert adapted["classes"] == ["alpha one", "gamma", "βήτα"]
    assert json.loads((tmp_path / "out/steps.json").read_text())[-1]["query accuracy"] >= 0.7


def test_ink_on_paper_beside_chalk_on_a_board(metarun, run: Path, tmp_path: Path):
    """Support and query of opposite polarity: each folder is looked at by itself."""
    draw(tmp_path, dark=True)
    shutil.rmtree(tmp_path / "query")
    draw(tmp_path / "chalk", dark=False)
    done = metarun("adapt", f"checkpoint={run}", "support=support", "query=chalk/query", "hydra.run.dir=out")
    assert "support drawings: dark ink" in done.stderr and "query drawings: light ink" in done.stderr
    assert "warning: support has dark ink and query has light ink" in done.stderr
    assert json.loads((tmp_path / "out/steps.json").read_text())[-1]["query accuracy"] >= 0.7


def test_a_single_query_and_what_systems_leave_behind(metarun, trained, tmp_path: Path):
    """A prediction does not depend on the other queries, though the model normalises batches."""
    draw(tmp_path, dark=True)
    (tmp_path / "support/.DS_Store").write_bytes(b"x")
    (tmp_path / "support/gamma/Thumbs.db").write_bytes(b"x")
    words = ["adapt", f"checkpoint={trained('algorithm=maml', *UNTESTED)}", "support=support"]
    done = metarun(*words, "query=query/gamma/7.png", "hydra.run.dir=one")
    assert "1 query" in done.stdout
    ((one, alone),) = predicted(tmp_path / "one").items()
    metarun(*words, "query=query", "hydra.run.dir=all")
    assert predicted(tmp_path / "all")[one] == pytest.approx(alone, abs=1e-5)
    metarun(*words, "query=query", "transductive=true", "hydra.run.dir=all")
    assert predicted(tmp_path / "all")[one] != pytest.approx(alone, abs=1e-5)


def test_eval_prepares_a_folder_of_drawings_as_adapt_does(metarun, run: Path, tmp_path: Path):
    """Dark on light, for a model that was trained on light on dark: chance without a conversion."""
    store = Glyphs(test_classes=8, seed=12).split("test")
    for k, split in enumerate(("train", "train", "val", "val", *["test"] * 4)):
        for i in range(8):
            place = tmp_path / "sheets" / split / str(k)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(200 - store.items[20 * k + i, 0].numpy() // 2).resize((70, 70)).save(
                place / f"{i}.png"
            )
    words = ["dataset=image_folder", "dataset.root=sheets", "ways=4", "queries=4", "episodes=50"]
    done = metarun("eval", f"checkpoint={run}", *words, "hydra.run.dir=out")
    assert "sheets: dark ink on a light background" in done.stderr
    assert json.loads((tmp_path / "out/results.json").read_text())["results"][0]["mean"] > 0.7
    done = metarun("eval", f"checkpoint={run}", *words, "dataset.ink=none", "hydra.run.dir=raw")
    assert json.loads((tmp_path / "raw/results.json").read_text())["results"][0]["mean"] < 0.7


def test_a_checkpoint_keeps_what_was_decided_of_its_images(metarun, tmp_path: Path):
    """White logos in training: a darker one, alone, is laid on the same background later."""
    for k in range(12):
        for i in range(4):
            logo = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
            logo.putpixel((k % 8, i + k // 8 * 4), (250, 250, 250, 255))
            place = tmp_path / "logos" / str(k)
            place.mkdir(parents=True, exist_ok=True)
            logo.save(place / f"{i}.png")
    words = ["dataset=image_folder", "dataset.root=logos", "dataset.size=8", "backbone=mlp"]
    sizes = [
        "ways=2",
        "queries=1",
        "iterations=1",
        "meta_batch=1",
        "validation.episodes=2",
        "test.episodes=0",
    ]
    done = metarun("train", *words, *sizes, "hardware=cpu", "log.tensorboard=false", "hydra.run.dir=run")
    assert "logos: transparent images are laid on black" in done.stderr
    content = torch.load(tmp_path / "run/best.pt", weights_only=True)
    assert content["config"]["dataset"]["background"] == "black"
    for k in ("0", "1"):
        logo = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
        logo.putpixel((1, 1), (100, 100, 100, 255))
        (tmp_path / "support" / k).mkdir(parents=True)
        logo.save(tmp_path / "support" / k / "0.png")
    done = metarun("adapt", "checkpoint=run", "support=support")
    assert "laid on" not in done.stderr
    done = metarun("adapt", "checkpoint=run", "support=support", "ink=dark", status=1)
    assert "ink=dark: the model was not trained on drawings" in done.stderr


def test_images_are_read_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    draw(tmp_path, dark=True)
    alive: list[weakref.ref] = []
    most = 0

    def read(path: Path, original=images.read) -> Image.Image:
        nonlocal most
        image = original(path)
        alive.append(weakref.ref(image))
        most = max(most, sum(each() is not None for each in alive))
        return image

    monkeypatch.setattr(images, "read", read)
    model = SimpleNamespace(spec=SimpleNamespace(item_shape=(1, 8, 8)))
    files = sorted((tmp_path / "query").glob("*/*.png"))
    assert pixels(Preparation(), model, "query", files).shape == (1, len(files), 1, 8, 8)
    assert most <= 2


def test_a_flat_query_folder_is_predicted_but_not_scored(metarun, run: Path, tmp_path: Path):
    draw(tmp_path, dark=True)
    flat = tmp_path / "some (new) images"
    flat.mkdir()
    for i, path in enumerate(sorted((tmp_path / "query").glob("*/*.png"))):
        path.rename(flat / f"{i}.png")
    done = metarun("adapt", f"checkpoint={run}", "support=support", f"query={flat.name}")
    assert "15 queries" in done.stdout
    assert "right" not in done.stdout


def test_class_folders_may_contain_folders(metarun, run: Path, tmp_path: Path):
    """The same rule as in `dataset=image_folder`: a class has all images below its folder."""
    draw(tmp_path, dark=True)
    words = ["adapt", f"checkpoint={run}", "support=support", "query=query", "hydra.run.dir=out"]
    flat = metarun(*words).stdout
    for part in ("support", "query"):
        for i, path in enumerate(sorted((tmp_path / part).glob("*/*.png"))):
            inner = path.parent / f"{'left' if i % 2 else 'right'}"
            inner.mkdir(exist_ok=True)
            path.rename(inner / path.name)
    done = metarun(*words)
    assert "support: 3 classes, whose folders contain folders such as alpha one/left; depth=2" in done.stderr
    assert flat.split("queries, ")[1].split()[:4] == done.stdout.split("queries, ")[1].split()[:4]
    metarun(*words[:3], "depth=2", "hydra.run.dir=deep")
    classes = torch.load(tmp_path / "deep/adapted.pt", weights_only=True)["classes"]
    assert classes[:2] == ["alpha one/left", "alpha one/right"]
    (tmp_path / "query/gamma").rename(tmp_path / "query/delta")
    assert "query/delta/left: is not a class" in metarun(*words, "depth=2", status=1).stderr


def spoil_nothing(folder: Path) -> str:
    return "no such folder"


def one_class(folder: Path) -> str:
    (folder / "support/a").mkdir(parents=True)
    Image.new("L", (8, 8)).save(folder / "support/a/1.png")
    return "at least 2"


def empty_class(folder: Path) -> str:
    draw(folder, dark=True)
    (folder / "support/nothing").mkdir()
    return "support/nothing: this class has no images"


def text_file(folder: Path) -> str:
    draw(folder, dark=True)
    (folder / "support/gamma/notes.txt").write_text("hello")
    return "support/gamma/notes.txt: is not an image"


def cut_off(folder: Path) -> str:
    draw(folder, dark=True)
    path = folder / "support/gamma/0.png"
    path.write_bytes(path.read_bytes()[:60])
    return "support/gamma/0.png: cannot be read as an image"


def stray(folder: Path) -> str:
    draw(folder, dark=True)
    (folder / "support/image.png").write_bytes(b"")
    return "is beside the class folders"


def unknown_query_class(folder: Path) -> str:
    draw(folder, dark=True)
    (folder / "query/gamma").rename(folder / "query/delta")
    return "query/delta: is not a class of the support"


@pytest.mark.parametrize(
    "spoil", [spoil_nothing, one_class, empty_class, text_file, cut_off, stray, unknown_query_class]
)
def test_folders_that_cannot_be_used(metarun, run: Path, tmp_path: Path, spoil):
    message = spoil(tmp_path)
    done = metarun(
        "adapt", f"checkpoint={run}", "support=support", "query=query", "hydra.run.dir=out", status=1
    )
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()
