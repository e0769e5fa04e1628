"""tieredImageNet and CUB-200-2011, from generated files in each accepted layout, and hostile archives."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.images import cub_tree, levels, member, packed, picture, zipped
from PIL import Image

from metarun.datasets import cub
from metarun.datasets.cub import Cub, split_of
from metarun.datasets.mini_imagenet import MiniImageNet, class_split
from metarun.datasets.tiered_imagenet import TieredImageNet
from metarun.errors import ConfigError, DataError

pytestmark = pytest.mark.quick

SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("METARUN_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(cub, "MD5", None)  # archives of a few birds


# tieredImageNet


def tiered_tree(root: Path) -> Path:
    """One tiny image of each of the 608 classes."""
    for split, wnids in class_split("tiered_imagenet").items():
        for i, wnid in enumerate(wnids):
            picture(root / {"validation": "val"}.get(split, split) / wnid / f"{wnid}_1.JPEG", i % 200)
    return root


def test_the_split_of_tiered_imagenet():
    parts = class_split("tiered_imagenet")
    assert [len(parts[split]) for split in SPLITS] == [351, 97, 160]
    assert len({wnid for split in SPLITS for wnid in parts[split]}) == 608
    assert all(parts[split] == sorted(parts[split]) for split in SPLITS)


@pytest.mark.parametrize("layout", ["folders", "zips"])
def test_tiered_imagenet(tmp_path: Path, layout: str):
    root = tiered_tree(tmp_path / "tiered")
    if layout == "zips":
        for folder in list(root.iterdir()):
            zipped(folder, root / f"{folder.name}.zip")
            shutil.rmtree(folder)
    dataset = TieredImageNet(root=str(root), size=4)
    for split, count in zip(SPLITS, (351, 97, 160), strict=True):
        store = dataset.split(split)
        assert len(store.names) == count
        assert all(abs(levels(store)[wnid][0] - i % 200) <= 2 for i, wnid in enumerate(store.names))
    if layout == "folders":
        shutil.rmtree(root / "val" / "n02099267")
        shutil.rmtree(root / "val" / "n02099429")
        with pytest.raises(
            DataError,
            match="no images of class n02099267 and 1 more, of the 97 validation classes; it may hold",
        ) as error:
            TieredImageNet(root=str(root)).split("validation")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("dataset", [MiniImageNet, TieredImageNet])
def test_pickles_are_refused_and_nothing_is_run(tmp_path: Path, dataset: type[MiniImageNet]):
    for name in ("train_images_png.pkl", "train_labels.pkl"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises(
        DataError, match=r"train_images_png\.pkl: a pickle, which could run any program"
    ) as error:
        dataset(root=str(tmp_path)).split("train")
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="size=0"):
        dataset(root=str(tmp_path), size=0)


# CUB


def test_the_split_of_cub_is_every_second_then_every_fourth_species():
    assert [split_of(number) for number in (1, 2, 3, 4, 5, 200)] == [
        "train",
        "validation",
        "train",
        "test",
        "train",
        "test",
    ]
    assert Counter(map(split_of, range(1, 201))) == {"train": 100, "validation": 50, "test": 50}


@pytest.mark.parametrize("layout", ["folder", "images alone", "zip", "archive in a folder", "archive"])
def test_cub_in_every_layout(tmp_path: Path, layout: str, capsys):
    root = cub_tree(tmp_path / "birds")
    source = root / "CUB_200_2011"
    if layout == "images alone":
        root = source / "images"
    elif layout == "zip":
        zipped(source, tmp_path / "birds.zip")
        root = tmp_path / "birds.zip"
    elif "archive" in layout:
        packed(source, tmp_path / cub.ARCHIVE)
        root = tmp_path / cub.ARCHIVE if layout == "archive" else tmp_path
        shutil.rmtree(tmp_path / "birds")
    dataset = Cub(root=str(root), size=8)
    for split, count in zip(SPLITS, (100, 50, 50), strict=True):
        store = dataset.split(split)
        assert len(store.names) == count
        assert set(store.counts.tolist()) == {2}
        for name, found in levels(store).items():
            assert all(abs(level - int(name[:3])) <= 2 for level in found)
            assert split_of(int(name[:3])) == split
    if "archive" in layout:
        assert capsys.readouterr().err.count("unpack ") == 1
        Cub(root=str(root), size=8).split("test")
        assert "unpack" not in capsys.readouterr().err


def attributes(root: Path, lines: list[str]) -> None:
    file = root / "CUB_200_2011/attributes" / cub.ATTRIBUTES
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


def test_species_of_cub_are_described_by_their_attributes(tmp_path: Path):
    """As the archive has them: of species n, here, n and then 311 numbers."""
    root = cub_tree(tmp_path / "birds")
    assert Cub(root=str(root), size=8).split("test").about is None
    good = [f"{n} " + " ".join(["0.5"] * 311) for n in range(1, 201)]
    attributes(root, good)
    packed(root / "CUB_200_2011", tmp_path / cub.ARCHIVE)
    for place in (root, tmp_path / cub.ARCHIVE):
        store = Cub(root=str(place), size=8).split("validation")
        assert store.about.shape == (50, 312) and store.spec.description == Cub().spec.description == (312,)
        assert store.about[:, 0].tolist() == [int(name[:3]) for name in store.names]
    for lines, says in (
        (good[1:], "has not 200 lines of 312"),
        ([*good[:9], "x 1"], r", line 10: 'x' in col"),
    ):
        attributes(root, lines)
        with pytest.raises(DataError, match=rf"{cub.ATTRIBUTES}.*{says}"):
            Cub(root=str(root), size=8).split("train")


def test_what_is_missing_of_cub_is_said(tmp_path: Path):
    root = cub_tree(tmp_path / "birds")
    shutil.rmtree(root / "CUB_200_2011" / "images" / "002.Bird_2")
    with pytest.raises(
        DataError, match="no photographs of species 002, of the 50 validation species; put http"
    ):
        Cub(root=str(root)).split("validation")
    assert len(Cub(root=str(root), size=8).split("train").names) == 100
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "note.txt").write_text("x")
    with pytest.raises(DataError, match=r"has neither species folders nor CUB_200_2011\.tgz; put http"):
        Cub(root=str(tmp_path / "none")).split("train")
    with pytest.raises(DataError, match=r"CUB-200-2011 is not at .*, and dataset\.download=false: put http"):
        Cub(download=False).split("train")


HOSTILE = {
    "a name that leads out": member("../evil.jpg"),
    "an absolute name": member("/evil.jpg"),
    "an absolute link": member("CUB/link", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "a link that leads out": member("CUB/link", type=tarfile.SYMTYPE, linkname="../../outside"),
    "a hard link that leads out": member("CUB/link", type=tarfile.LNKTYPE, linkname="../outside"),
    "a device": member("CUB/device", type=tarfile.CHRTYPE),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_an_archive_that_leads_out_of_its_folder_is_refused(tmp_path: Path, name: str):
    archive = tmp_path / "in" / cub.ARCHIVE
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.addfile(member("CUB/good.jpg", size=4), io.BytesIO(b"good"))
        tar.addfile(HOSTILE[name], io.BytesIO())
    with pytest.raises(DataError, match=r"CUB_200_2011\.tgz cannot be used") as error:
        Cub(root=str(archive.parent)).split("train")
    assert "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")]
    assert {path.name for path in tmp_path.iterdir()} == {"in", "cache"}


def test_a_damaged_archive_leaves_nothing_behind(tmp_path: Path):
    packed(cub_tree(tmp_path / "birds") / "CUB_200_2011", tmp_path / cub.ARCHIVE)
    shutil.rmtree(tmp_path / "birds")
    good = (tmp_path / cub.ARCHIVE).read_bytes()
    for content in (good[: len(good) // 2], b"no archive", b""):
        (tmp_path / cub.ARCHIVE).write_bytes(content)
        with pytest.raises(DataError, match=r"CUB_200_2011\.tgz is damaged") as error:
            Cub(root=str(tmp_path)).split("train")
        assert "\n" not in str(error.value)
        assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")]


def test_photographs_are_cropped_to_a_square(tmp_path: Path):
    root = cub_tree(tmp_path / "birds")
    wide = Image.new("RGB", (30, 10), "black")
    wide.paste("white", (10, 0, 20, 10))
    wide.save(root / "CUB_200_2011" / "images" / "001.Bird_1" / "B_0.jpg", quality=95)
    image = Cub(root=str(root), size=8).split("train").items[0].float()
    assert torch.all(image[:, :, 1:7] > 220)
