"""MedMNIST: several sets as one benchmark, from small files in its form, and from a real one."""

from __future__ import annotations

import hashlib
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.runs import UNTESTED
from helpers.server import running

from metarun.datasets import medmnist
from metarun.datasets.medmnist import MedMnist
from metarun.datasets.medmnist_sets import OTHERS, SETS
from metarun.datasets.mixture import Mixture, MixtureStore
from metarun.errors import ConfigError, DataError
from metarun.storage.files import data_dir
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.sampling import sample

FOUR = ["organamnist", "pathmnist", "dermamnist", "bloodmnist"]


def arrays_of(name: str, size: int = 28, each: int = 2) -> dict[str, np.ndarray]:
    """The arrays of a set's file. Pixel 0 of image i of label k is of level 10 k + i, the rest is noise."""
    known, arrays = SETS[name], {}
    noise = np.random.default_rng(list(SETS).index(name))
    for number, part in enumerate(("train", "val", "test")):
        labels = np.tile(np.arange(len(known.classes), dtype=np.uint8), each)
        level = 10 * labels + each * number + np.arange(len(labels), dtype=np.uint8) // len(known.classes)
        images = np.zeros((len(labels), size, size, known.channels), np.uint8)
        images[..., 0] = noise.integers(1, 256, images.shape[:3])
        images[:, 0, 0, 0] = level
        arrays[f"{part}_images"] = images if known.channels == 3 else images[..., 0]
        arrays[f"{part}_labels"] = labels[:, None]
    return arrays


def write(folder: Path, name: str, size: int = 28, **changed: np.ndarray | None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (f"{name}.npz" if size == 28 else f"{name}_{size}.npz")
    arrays = arrays_of(name, size) | changed
    np.savez_compressed(path, **{key: array for key, array in arrays.items() if array is not None})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four sets of the default, and two more."""
    made = tmp_path_factory.mktemp("medmnist")
    for name in (*FOUR, "octmnist", "pneumoniamnist"):
        write(made, name)
    return made


def test_a_class_has_the_images_of_all_three_parts_of_a_file(folder: Path):
    store = MedMnist(sets=["bloodmnist"], root=str(folder)).split("test")
    assert store.names == list(SETS["bloodmnist"].classes)
    assert store.items.shape == (48, 3, 28, 28)
    assert store.counts.tolist() == [6] * 8
    wanted = [10 * label + image for label in range(8) for image in range(6)]
    assert store.items[:, 0, 0, 0].tolist() == wanted
    assert not store.items[:, 1:].any()  # red is the first channel


def test_a_task_has_classes_of_one_set_and_grey_becomes_colour(folder: Path):
    dataset = MedMnist(sets=FOUR, root=str(folder))
    train = dataset.split("train")
    assert list(train.parts) == ["organamnist", "pathmnist"] and train.item_shape == (3, 28, 28)
    organs = train.parts["organamnist"].items
    assert torch.equal(organs[:, 0], organs[:, 2]) and organs.any()
    classes = sample(train, 200, EpisodeShape(5, 1, 1), torch.Generator().manual_seed(0)).classes
    first = classes < 11  # organs
    assert (first.all(1) | (~first).all(1)).all()
    assert 70 < int(first.all(1).sum()) < 130
    assert dataset.split("validation").names == list(SETS["dermamnist"].classes)
    assert dataset.split("test").names == list(SETS["bloodmnist"].classes)
    everything = dataset.load("all")
    assert isinstance(everything, MixtureStore) and list(everything.parts) == FOUR
    assert list(dataset.load("trainval").parts) == ["organamnist", "pathmnist", "dermamnist"]
    grey = MedMnist(sets=FOUR, root=str(folder), channels=1).split("train")
    assert grey.item_shape == (1, 28, 28)
    assert dataset.reshaped((1, 14, 14)).split("test").item_shape == (1, 14, 14)


def test_in_a_mixture_a_task_has_classes_of_one_set_too(folder: Path):
    sets = MedMnist(sets=FOUR, root=str(folder))
    other = MedMnist(sets=["octmnist"], validation=["dermamnist"], test=["bloodmnist"], root=str(folder))
    other.by_split = {"train": ["octmnist"]}
    mixed = Mixture(datasets={"med": sets, "oct": other}, parts={"med": 3, "oct": 1}).split("train")
    assert list(mixed.parts) == ["med organamnist", "med pathmnist", "oct"]
    assert mixed.weights.tolist() == [1.0, 1.0, pytest.approx(2 / 3)]


@pytest.mark.parametrize(
    ("settings", "by_split"),
    [
        ({"sets": FOUR}, {"train": FOUR[:2], "validation": FOUR[2:3], "test": FOUR[3:]}),
        (
            {"sets": FOUR[:2], "validation": FOUR[2:3], "test": FOUR[3:]},
            {"train": FOUR[:2], "validation": FOUR[2:3], "test": FOUR[3:]},
        ),
        (
            {"sets": FOUR[:3], "test": FOUR[3:]},
            {"train": FOUR[:2], "validation": FOUR[2:3], "test": FOUR[3:]},
        ),
        ({"sets": FOUR[:1]}, {"test": FOUR[:1]}),
        ({"sets": FOUR[:2]}, {"test": FOUR[:2]}),
        ({"sets": FOUR[:1], "validation": FOUR[1:2]}, {"validation": FOUR[1:2], "test": FOUR[:1]}),
        ({"sets": ["organamnist", "organsmnist", *FOUR[2:]]}, {"train": ["organamnist", "organsmnist"]}),
    ],
)
def test_which_sets_are_in_which_split(settings: dict, by_split: dict):
    found = MedMnist(**settings).by_split
    assert {split: found[split] for split in by_split} == by_split
    if "train" not in found:
        with pytest.raises(DataError, match="no set is left for train; name three sets or more"):
            MedMnist(**settings).split("train")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sets": ["bloodmist"]}, "no set 'bloodmist'; did you mean 'bloodmnist'"),
        ({"sets": ["cats"]}, "no set 'cats'; choose among bloodmnist, breastmnist"),
        ({"sets": ["chestmnist"]}, "chestmnist has several labels an image"),
        ({"sets": FOUR, "test": ["organmnist3d"]}, "dataset.test: organmnist3d has volumes"),
        ({"sets": []}, "name at least one"),
        ({"sets": FOUR, "validation": []}, r"dataset.validation=\[\]: name at least one"),
        ({"sets": [*FOUR, "pathmnist"]}, "pathmnist is in train and in test"),
        ({"sets": ["octmnist", "octmnist", *FOUR]}, "octmnist is twice in train"),
        ({"sets": FOUR, "test": ["pathmnist"]}, "pathmnist is in train and in test"),
        ({"sets": [*FOUR, "organcmnist"]}, r"organamnist \(train\) and organcmnist \(test\) have the same"),
    ],
)
def test_sets_that_cannot_be_chosen(settings: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        MedMnist(**settings)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"val_images": None}, "has no array val_images; replace it with https://zenodo"),
        ({"test_labels": np.array([{}], object)}, "test_labels is a pickled object, which could run any"),
        ({"train_images": np.zeros((16, 28, 28, 3))}, r"train_images is float64 \[16, 28, 28, 3\], and must"),
        ({"train_images": np.zeros((16, 28, 28), "u1")}, r"must be uint8 \[n, 28, 28, 3\]"),
        ({"train_images": np.zeros((16, 64, 64, 3), "u1")}, r"uint8 \[16, 64, 64, 3\], and must"),
        ({"val_labels": np.zeros((16, 14), int)}, r"val_labels is int64 \[16, 14\], and must be one whole"),
        ({"val_labels": np.zeros((15, 1), int)}, "each of 16 images"),
        ({"val_labels": np.zeros(16)}, "val_labels is float64"),
        ({"val_labels": np.arange(16) - 1}, "goes from -1 to 14, and bloodmnist has the labels 0 to 7"),
    ],
)
def test_arrays_that_are_not_the_sets(tmp_path: Path, changed: dict, says: str):
    path = write(tmp_path, "bloodmnist", **changed)
    with pytest.raises(DataError, match=says) as error:
        MedMnist(sets=["bloodmnist"], root=str(tmp_path)).split("test")
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_damaged_and_missing_files(tmp_path: Path):
    path = write(tmp_path, "bloodmnist")
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[good.index(b"train_images.npy") + 60] ^= 255
    for content, says in (
        (good[:900], "is not an npz file, or damaged; replace it with https://zenodo"),
        (bytes(flipped), "bloodmnist.npz: train_images cannot be read ("),
        (pickle.dumps({"a": 1}), "is not an npz file"),
        (b"", "is not an npz file"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=re.escape(says)):
            MedMnist(sets=["bloodmnist"], root=str(tmp_path)).split("test")
    for settings, says in (
        (
            {"size": 64},
            "has no bloodmnist_64.npz; set dataset.size=28 for bloodmnist.npz, put https://zenodo",
        ),
        (
            {"sets": ["octmnist"]},
            "has no octmnist.npz; put https://zenodo.org/records/10519652/files/octmnist",
        ),
        ({"root": str(path)}, "is a file; name the folder"),
        ({"root": None, "download": False}, "dataset.download=false: put https://zenodo"),
    ):
        with pytest.raises(DataError, match=says):
            MedMnist(**{"sets": ["bloodmnist"], "root": str(tmp_path), **settings}).split("test")


def test_larger_images_are_other_files(tmp_path: Path):
    write(tmp_path, "pneumoniamnist", 64)
    store = MedMnist(sets=["pneumoniamnist"], size=64, root=str(tmp_path)).split("test")
    assert store.item_shape == (1, 64, 64) and store.names == ["normal chest", "pneumonia"]


def test_a_download_is_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """By the sum of the file of that size; a wrong file is not kept."""
    monkeypatch.setenv("METARUN_DATA", str(tmp_path / "data"))
    body = write(tmp_path / "server", "octmnist", 64).read_bytes()
    dataset = MedMnist(sets=["octmnist"], size=64)
    with running() as server:
        server.files["octmnist_64.npz?download=1"] = body
        monkeypatch.setattr(medmnist, "URL", server.url)
        with pytest.raises(DataError, match=f"where {SETS['octmnist'].md5[1]} is right"):
            dataset.split("test")
        assert not (data_dir() / "medmnist/octmnist_64.npz").exists()
        right = SETS["octmnist"]._replace(md5=("", hashlib.md5(body).hexdigest(), "", ""))
        monkeypatch.setitem(medmnist.SETS, "octmnist", right)
        assert len(dataset.split("test").items) == 24
    assert (data_dir() / "medmnist/octmnist_64.npz").read_bytes() == body


def test_the_sets_are_those_of_the_package():
    """With its counts; ambiguous names of classes belong to sets of one split."""
    assert len(SETS) == 11 and len(OTHERS) == 7
    assert sum(known.images for known in SETS.values()) == 595_842
    sums = [md5 for known in SETS.values() for md5 in known.md5]
    assert len(set(sums)) == 44 and all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in sums)
    names = [name for classes in {known.classes for known in SETS.values()} for name in classes]
    assert len(names) == len(set(names)) == 56


def test_a_run_on_it_is_evaluated_and_adapted(metarun, folder: Path):
    words = [word for word in UNTESTED if not word.startswith("dataset.")]
    words += ["dataset=medmnist", f"dataset.root={folder}", "queries=2", "iterations=2"]
    assert "protonet on medmnist, 5-way 1-shot" in metarun("train", *words, "hydra.run.dir=run").stderr
    target = ["dataset=medmnist", f"dataset.root={folder}", "dataset.sets=[pneumoniamnist]", "ways=2"]
    done = metarun("eval", "checkpoint=run", *target, "episodes=5", "queries=2")
    assert "2-way 1-shot" in done.stdout
    assert "pneumonia" in metarun("adapt", "checkpoint=run", *target, "queries=2").stdout


def test_the_real_file(test_data: Path, real_cache: Path, capsys: pytest.CaptureFixture[str]):
    """PneumoniaMNIST of MedMNIST v1, which has fewer images than that of v2."""
    store = MedMnist(sets=["pneumoniamnist"], root=str(test_data / "medical")).split("test")
    assert store.items.shape == (5030, 1, 28, 28) and store.counts.tolist() == [757, 4273]
    assert "5,030 images here, 5,856 in MedMNIST v2" in capsys.readouterr().err
