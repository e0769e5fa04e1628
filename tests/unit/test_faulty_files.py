"""What files people really have: doubled, dangling, damaged, oddly named; each is reported in one line."""

from __future__ import annotations

import errno
import io
import lzma
import os
import shutil
import tarfile
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers.images import NAMES, cub_tree, member, mini_tree, packed, picture, tree
from PIL import Image

from metarun.datasets import cub, images
from metarun.datasets.cifar import CifarFS, labels
from metarun.datasets.class_folders import entries
from metarun.datasets.cub import Cub
from metarun.datasets.image_folder import ImageFolder
from metarun.datasets.mini_imagenet import MiniImageNet
from metarun.datasets.preparation import Preparation
from metarun.errors import DataError
from metarun.storage import cache
from metarun.storage.cached_arrays import extract_cached
from metarun.storage.files import md5_sum

SPLITS = ("train", "validation", "test")


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(cub, "MD5", None)  # archives of a few birds


def folder(root: Path, **settings) -> ImageFolder:
    return ImageFolder(root=str(root), size=8, **settings)


def count(root: Path, **settings) -> int:
    dataset = folder(root, **settings)
    return sum(len(dataset.split(split).items) for split in SPLITS)


# the same images twice


def noisy(root: Path, names: list[str], each: int = 3) -> Path:
    numbers = np.random.default_rng(0)
    for name in names:
        for k in range(each):
            (root / name).mkdir(parents=True, exist_ok=True)
            pixels = numbers.integers(0, 255, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{k}.png")
    return root


@pytest.mark.parametrize("where", ["in a folder of the zip's name", "beside the zip", "in another folder"])
def test_a_zip_and_what_was_unpacked_from_it_count_once(tmp_path: Path, where: str, capsys):
    names = [label.name for label in labels()]
    root = noisy(tmp_path / "cifar" / "data", names, each=2).parent
    with zipfile.ZipFile(root / "data.zip", "w") as archive:
        for path in sorted((root / "data").rglob("*.png")):
            archive.write(path, path.relative_to(root if where == "beside the zip" else root / "data"))
    if where == "in another folder":
        (root / "data").rename(root / "mine")
    shutil.copy(root / "data.zip", root / "data (1).zip")
    store = CifarFS(root=str(root)).split("test")
    assert set(store.counts.tolist()) == {2}
    printed = capsys.readouterr().err
    assert "data.zip: 200 of its files are also elsewhere" in printed
    assert "data (1).zip: 200 of its files are also elsewhere" in printed
    picture(root / ("mine" if "another" in where else "data") / names[0] / "0.png", 3)  # no more the same
    assert len([entry for entry in entries(root) if entry.own_name == (names[0], "0.png")]) == 2


def test_a_folder_and_its_zip_of_ones_own_images(tmp_path: Path):
    root = noisy(tmp_path / "mine", NAMES)
    alone = folder(root).split("train")
    with zipfile.ZipFile(root / "all.zip", "w") as archive:
        for path in sorted(root.rglob("*.png")):
            archive.write(path, path.relative_to(root))
    assert folder(root).split("train").fingerprint == alone.fingerprint


# what is no file, or none that can be read


def odd(root: Path, kind: str) -> None:
    path = root / NAMES[0] / "odd.png"
    if kind == "a link to nowhere":
        path.symlink_to(root / "gone.png")
    elif kind == "a link to itself":
        path.symlink_to(path)
    else:
        os.mkfifo(path)


@pytest.mark.parametrize("kind", ["a link to nowhere", "a link to itself", "a pipe"])
def test_an_odd_file_is_named_or_skipped(tmp_path: Path, kind: str):
    if kind == "a pipe" and not hasattr(os, "mkfifo"):
        pytest.skip("no pipes here")
    root = tree(tmp_path / "mine", NAMES)
    odd(root, kind)
    with pytest.raises(DataError, match=r"odd\.png: .*or set dataset\.unreadable=skip") as error:
        count(root)
    assert "\n" not in str(error.value)
    assert count(root, unreadable="skip") == 24


def test_whatever_pillow_raises_names_the_file(tmp_path: Path, monkeypatch):
    picture(tmp_path / "a.png", 3)

    def fails(image, **settings):
        raise TypeError("inside Pillow\nand more")

    monkeypatch.setattr(images.ImageOps, "exif_transpose", fails)
    with pytest.raises(DataError, match=r"a\.png: cannot be read as an image \(inside Pillow\)"):
        images.read(tmp_path / "a.png")


def test_a_bad_file_and_a_good_one_of_one_path(tmp_path: Path):
    root = tree(tmp_path / "mine", NAMES)
    (root / NAMES[0] / "x.png").write_bytes(b"no image")
    picture(tmp_path / "x.png", 77)
    with zipfile.ZipFile(root / f"{NAMES[0]}.zip", "w") as archive:
        archive.write(tmp_path / "x.png", "x.png")
    assert count(root, unreadable="skip") == 25


@pytest.mark.parametrize("kind", ["a file", "a class", "a skipped file"])
def test_names_that_are_not_utf8(tmp_path: Path, kind: str):
    root = tree(tmp_path / "mine", NAMES)
    name = os.fsdecode(b"caf\xe9")
    try:
        if kind == "a class":
            (root / NAMES[0]).rename(root / name)
        elif kind == "a file":
            picture(root / NAMES[0] / f"{name}.png", 3)
        else:
            (root / NAMES[0] / f"{name}.png").write_bytes(b"no image")
    except (OSError, ValueError):
        pytest.skip("this disk has no such names")
    right = 25 if kind == "a file" else 24
    assert count(root, unreadable="skip") == count(root, unreadable="skip") == right
    if kind == "a class":
        names = [name for split in SPLITS for name in folder(root).split(split).names]
        assert "caf\\xe9" in names
        "".join(names).encode()


def test_advice_is_of_a_setting_there_is(tmp_path: Path):
    root = mini_tree(tmp_path / "mini", "folders")
    path = next((root / "train").rglob("*.jpg"))
    path.write_bytes(b"no image")
    with pytest.raises(DataError, match=rf"{path.name}: is not an image") as error:
        MiniImageNet(root=str(root), size=8).split("train")
    assert "unreadable" not in str(error.value)


def test_lists_with_a_byte_order_mark_and_damaged_ones(tmp_path: Path):
    root = mini_tree(tmp_path / "mini", "csv")
    path = root / "train.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(MiniImageNet(root=str(root), size=8).split("train").names) == 64
    path.write_text('filename,label\n"' + "a" * 200_000)
    with pytest.raises(DataError, match=r"train\.csv: cannot be read as a CSV file \(field larger"):
        MiniImageNet(root=str(root)).split("train")


def test_another_count_than_the_benchmarks_is_said(tmp_path: Path, capsys):
    MiniImageNet(root=str(mini_tree(tmp_path / "mini", "folders")), size=8).split("test")
    assert "mini_imagenet test: 2 images a class here, 600 in the benchmark" in capsys.readouterr().err
    Cub(root=str(cub_tree(tmp_path / "birds")), size=8).split("test")
    assert "cub test: 2 images a class here, 41 to 60 in the benchmark" in capsys.readouterr().err


def test_images_that_pillow_or_numpy_would_warn_of(tmp_path: Path):
    Image.fromarray(np.array([[np.nan, 1.0], [0.0, 0.5]], np.float32)).save(tmp_path / "a.tiff")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = images.read(tmp_path / "a.tiff")
        assert np.asarray(Preparation().flat(image)).tolist() == [[0, 255], [0, 127]]


# archives


@pytest.mark.parametrize("kind", ["damaged LZMA", "a version of the future"])
def test_zips_that_cannot_be_read(tmp_path: Path, kind: str):
    root = tree(tmp_path / "mine", NAMES[1:])
    path = root / f"{NAMES[0]}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("a.png", np.random.default_rng(0).bytes(400))
    content = bytearray(path.read_bytes())
    if kind == "damaged LZMA":
        content[50:300] = b"\xff" * 250
    else:
        content[content.index(b"PK\x01\x02") + 6] = 99
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"class 0\.zip.* cannot be used") as error:
        count(root)
    assert "\n" not in str(error.value)
    assert issubclass(lzma.LZMAError, Exception)


def test_a_tar_that_is_damaged_is_never_taken_for_whole(tmp_path: Path):
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as tar:
        for k in range(3):
            tar.addfile(member(f"{k}.jpg", size=600), io.BytesIO(bytes([k]) * 600))
    content = whole.getvalue()
    second = 3 * 512  # the header of the second member, each 512 bytes with 1,024 of data
    bad = {
        "header": content[:second] + b"?" + content[second + 1 :],
        "cut between members": content[: 2 * second],
        "cut in a member": content[: 2 * second - 700],
    }
    archive = tmp_path / "a.tar"
    for name, spoilt in bad.items():
        archive.write_bytes(spoilt)
        with pytest.raises(DataError, match=r"a\.tar is damaged"):
            extract_cached(archive, "a", lambda: None)
        assert not list((tmp_path / "cache").glob("[!.]*")), name
    archive.write_bytes(content)
    assert len(list(extract_cached(archive, "a", lambda: None).iterdir())) == 3


def test_the_sum_at_the_end_of_a_packed_tar_is_checked(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        tar.addfile(member("a.jpg", size=600), io.BytesIO(bytes(600)))
    content = bytearray((tmp_path / "a.tgz").read_bytes())
    content[-6] ^= 1  # in the CRC-32 sum, which comes after the members
    (tmp_path / "a.tgz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.tgz is damaged"):
        extract_cached(tmp_path / "a.tgz", "a", lambda: None)


ODD_MEMBERS = {
    "a hard link to nothing": (member("link", type=tarfile.LNKTYPE, linkname="none"), "is damaged"),
    "a name of 300 characters": (member("n" * 300 + ".jpg"), "a name that is too long: nnn"),
}


@pytest.mark.parametrize("name", ODD_MEMBERS)
def test_odd_members_of_a_tar(tmp_path: Path, name: str):
    info, says = ODD_MEMBERS[name]
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        tar.addfile(info, io.BytesIO())
    with pytest.raises(DataError, match=says) as error:
        extract_cached(tmp_path / "a.tgz", "a", lambda: None)
    assert "METARUN_CACHE" not in str(error.value)
    assert "\n" not in str(error.value)


def test_a_disk_that_is_full_while_an_archive_is_unpacked(tmp_path: Path, monkeypatch):
    def full(*args: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.jpg")

    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        tar.addfile(member("a.jpg", size=600), io.BytesIO(bytes(600)))
    monkeypatch.setattr(tarfile.TarFile, "extractall", full)
    with pytest.raises(DataError, match=r"No space left on device.*METARUN_CACHE") as error:
        extract_cached(tmp_path / "a.tgz", "a", lambda: None)
    assert str(error.value).startswith(f"cannot write to {tmp_path / 'cache'} (")
    assert not list((tmp_path / "cache").glob("[!.]*"))


def test_an_archive_that_is_not_the_authors_is_refused(tmp_path: Path, monkeypatch):
    packed(cub_tree(tmp_path / "birds") / "CUB_200_2011", tmp_path / cub.ARCHIVE)
    shutil.rmtree(tmp_path / "birds")
    right = md5_sum(tmp_path / cub.ARCHIVE)
    monkeypatch.setattr(cub, "MD5", "0" * 32)
    with pytest.raises(DataError, match=f"has the md5 sum {right}, and the authors' archive 0000"):
        Cub(root=str(tmp_path), size=8).split("train")
    monkeypatch.setattr(cub, "MD5", right)
    assert len(Cub(root=str(tmp_path), size=8).split("train").names) == 100


def test_an_unpacked_folder_is_verified_and_made_again(tmp_path: Path):
    packed(cub_tree(tmp_path / "birds") / "CUB_200_2011", tmp_path / "birds.tgz")
    root = tmp_path / "birds.tgz"
    Cub(root=str(root), size=8).split("train")
    (entry,) = [each for each in cache.cache_entries("cub") if each.split == "unpacked"]
    assert cache.damage(entry) == ""
    photograph = next(entry.path.rglob("B_0.jpg"))
    good = photograph.read_bytes()
    photograph.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    assert cache.damage(entry).startswith("damaged")
    photograph.unlink()
    assert cache.damage(entry).startswith("damaged")
    Cub(root=str(root), size=8).split("train")
    assert photograph.read_bytes() == good
    (entry,) = [each for each in cache.cache_entries("cub") if each.split == "unpacked"]
    assert cache.damage(entry) == ""
