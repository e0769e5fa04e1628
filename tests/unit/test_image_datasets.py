"""Datasets of image files: a user's own, CIFAR-FS, FC100 and miniImageNet, in every accepted layout."""

from __future__ import annotations

import inspect
import shutil
import signal
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.forks import Fork
from helpers.images import NAMES, levels, mini_tree, mnist_files, picture, tree, zipped
from PIL import Image

from metarun.config.paths import CONF
from metarun.datasets import mini_imagenet
from metarun.datasets.cifar import FC100, CifarFS, labels
from metarun.datasets.from_torchvision import SETS, FromTorchvision
from metarun.datasets.image_folder import ImageFolder
from metarun.datasets.mini_imagenet import MiniImageNet
from metarun.datasets.sinusoid import Sinusoid
from metarun.errors import ConfigError, DataError
from metarun.storage.cached_arrays import memmap_cached
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.sampling import sample


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# a user's own folder


def test_a_folder_of_classes_is_split_by_a_printed_rule(tmp_path: Path, capsys):
    root = tree(tmp_path / "mine", NAMES)
    dataset = ImageFolder(root=str(root), size=8)
    parts = {name: dataset.split(name) for name in ("train", "validation", "test")}
    assert {name: len(part.names) for name, part in parts.items()} == {"train": 4, "validation": 2, "test": 2}
    assert sorted(name for part in parts.values() for name in part.names) == NAMES
    assert "classes split 4/2/2 into train, validation and test by dataset.seed=0" in capsys.readouterr().err
    for part in parts.values():
        for name, found in levels(part).items():
            assert found == [10 * NAMES.index(name) + k for k in range(3)]
    again = ImageFolder(root=str(root), size=8).split("train")
    assert again.names == parts["train"].names
    assert again.fingerprint == parts["train"].fingerprint
    other = [ImageFolder(root=str(root), size=8, seed=seed).split("train").names for seed in range(1, 5)]
    assert any(names != again.names for names in other)


def test_train_val_and_test_folders_in_folders_and_zips(tmp_path: Path):
    root = tmp_path / "mine"
    for i, split in enumerate(("train", "val", "test")):
        tree(root / split, NAMES[2 * i : 2 * i + 2])
    folders = {split: levels(ImageFolder(root=str(root), size=8).split(split)) for split in ("train", "test")}
    assert list(folders["train"]) == NAMES[:2]
    zipped(root / "test", root / "test.zip")
    shutil.rmtree(root / "test")
    # A zip counts as a folder of its name; what was packed with its own folder has that folder too.
    (root / "test.zip").rename(tmp_path / "t.zip")
    with zipfile.ZipFile(tmp_path / "t.zip") as packed, zipfile.ZipFile(root / "test.zip", "w") as flat:
        for name in packed.namelist():
            flat.writestr(name.removeprefix("test/"), packed.read(name)) if name != "test/" else None
    assert levels(ImageFolder(root=str(root), size=8).split("test")) == folders["test"]
    zipped(root, tmp_path / "all.zip")


def test_images_of_every_kind(tmp_path: Path):
    """Sizes, modes, EXIF rotation, names with spaces and of any alphabet, links; each becomes 3 x 16 x 16."""
    root = tree(tmp_path / "mine", ["a", "b", "c", "d", "e", "Ф ы 猫"], each=1)
    for i, mode in enumerate(("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK")):
        if mode == "I;16":
            Image.fromarray(np.full((30, 20), 40000, np.uint16)).save(root / "a" / f"{i}.png")
        else:
            picture(root / "a" / (f"{i}.jpg" if mode == "CMYK" else f"{i}.png"), 1, (20 + i, 30), mode)
    turned = Image.new("RGB", (40, 20), "black")
    turned.paste("white", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees clockwise
    turned.save(root / "b" / "turned.jpg", exif=exif, quality=95)
    (root / "c" / "link.png").symlink_to(root / "a" / "0.png")
    (root / "linked").symlink_to(root / "e", target_is_directory=True)
    (root / "e" / "round").symlink_to(root, target_is_directory=True)  # leads back up
    (root / "d" / ".hidden").write_text("x")
    (root / "d" / "Thumbs.db").write_text("x")
    dataset = ImageFolder(root=str(root), size=16)
    with pytest.raises(DataError, match=r"note\.txt: is not an image"):
        (root / "e" / "note.txt").write_text("no image")
        for split in ("train", "validation", "test"):
            dataset.split(split)
    (root / "e" / "note.txt").unlink()
    (root / "e" / "round").unlink()
    dataset = ImageFolder(root=str(root), size=16)
    parts = [dataset.split(name) for name in ("train", "validation", "test")]
    assert {name for part in parts for name in part.names} == {"a", "b", "c", "d", "e", "Ф ы 猫", "linked"}
    assert all(part.item_shape == (3, 16, 16) for part in parts)
    (store,) = [part for part in parts if "b" in part.names]
    image = store.items[store.starts[store.names.index("b")] + 1].float()
    # Lying, its left half is white; upright, the top half is.
    assert image[:, :8, 4:12].mean() > 200 > 60 > image[:, 8:, 4:12].mean()


def test_an_unreadable_file_stops_or_is_skipped_by_name(tmp_path: Path, capsys):
    root = tree(tmp_path / "mine", NAMES)
    for name in NAMES:
        (root / name / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    with pytest.raises(DataError, match=r"class \d/broken\.png: .*; .*or set dataset\.unreadable=skip"):
        ImageFolder(root=str(root), size=8).split("train")
    assert not list((tmp_path / "cache").glob("[!.]*"))  # nothing half-written
    store = ImageFolder(root=str(root), size=8, unreadable="skip").split("train")
    assert set(store.counts.tolist()) == {3}
    assert f"4 unreadable files left out, such as {root}" in capsys.readouterr().err
    for path in (root / store.names[0]).glob("[0-9].png"):
        path.unlink()
    with pytest.raises(DataError, match=f"class {store.names[0]!r} has no images"):
        ImageFolder(root=str(root), size=8, unreadable="skip").split("train")
    for path in root.glob("*/[0-9].png"):
        path.unlink()
    with pytest.raises(DataError, match="none of its 4 files is an image that can be read"):
        ImageFolder(root=str(root), size=8, unreadable="skip").split("train")


BROKEN_TREES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "no such folder"),
    "an empty folder": (lambda root: (shutil.rmtree(root), root.mkdir()), "has no files"),
    "an empty class": (lambda root: (root / "empty").mkdir(), "empty: this class has no images"),
    "a stray file": (lambda root: picture(root / "stray.png", 1), "stray.png: is beside the class folders"),
    "few classes": (
        lambda root: [shutil.rmtree(root / name) for name in NAMES[:3]],
        "has 5 classes; at least 6",
    ),
    "only test": (
        lambda root: [shutil.move(root / name, root / "test" / name) for name in NAMES],
        "has a folder test, but none named train; .*dataset.root=.*/mine/test to split",
    ),
}


@pytest.mark.parametrize("name", BROKEN_TREES)
def test_what_is_wrong_with_a_folder_is_said_in_one_line(tmp_path: Path, name: str):
    root = tree(tmp_path / "mine", NAMES)
    spoil, says = BROKEN_TREES[name]
    spoil(root)
    with pytest.raises(DataError, match=says) as error:
        ImageFolder(root=str(root), size=8).split("train")
    assert "\n" not in str(error.value)


def found(root: Path, **settings) -> dict[str, list[str]]:
    """The classes of each split that there is."""
    dataset = ImageFolder(root=str(root), size=8, **settings)
    return {split: sorted(dataset.split(split).names) for split in dataset.splits()}


def all_classes(root: Path, **settings) -> list[str]:
    return sorted(name for names in found(root, **settings).values() for name in names)


def test_folders_of_some_splits_are_those_splits(tmp_path: Path, capsys):
    for split in ("Test", "valid"):
        tree(tmp_path / "mine" / split, NAMES[:3] if split == "Test" else NAMES[3:])
    assert found(tmp_path / "mine") == {"validation": NAMES[3:], "test": NAMES[:3]}
    tree(tmp_path / "one" / "outer" / "test", NAMES)
    assert found(tmp_path / "one") == {"test": NAMES}
    tree(tmp_path / "more" / "train", NAMES[:4])
    tree(tmp_path / "more" / "test", NAMES[4:])
    tree(tmp_path / "more", ["unlabelled"])
    (tmp_path / "more" / "labels.csv").write_text("x")
    assert found(tmp_path / "more") == {"train": NAMES[:4], "test": NAMES[4:]}
    assert "folder unlabelled beside test, train left out" in capsys.readouterr().err


@pytest.mark.parametrize("inner", ["", "/a"])
def test_a_class_may_have_the_name_of_a_split(tmp_path: Path, inner: str):
    expected = ["train", "bus", "car", "ship", "plane", "tram"]
    root = tree(tmp_path / "mine", [name + inner for name in expected])
    assert all_classes(root) == sorted(expected)


def test_few_classes_are_all_test_classes_and_all_splits_can_be_joined(tmp_path: Path, capsys):
    assert found(tree(tmp_path / "few", NAMES[:4])) == {"test": NAMES[:4]}
    assert "4 classes are too few for three splits, so all are test classes" in capsys.readouterr().err
    root = tree(tmp_path / "mine", NAMES)
    every = ImageFolder(root=str(root), size=8).load("all")
    assert levels(every) == {name: [10 * i + k for k in range(3)] for i, name in enumerate(NAMES)}
    assert every.name == "mine all"
    with pytest.raises(ConfigError, match="split=all: this dataset has no classes"):
        Sinusoid().load("all")


def test_classes_may_be_any_number_of_folders_down(tmp_path: Path, capsys):
    names = [f"{group}/{inner}" for group in "abcdef" for inner in ("one", "two")]
    root = tree(tmp_path / "mine", names)
    assert all_classes(root) == list("abcdef")
    assert "6 classes, whose folders contain folders such as a/one; dataset.depth=2 makes the 12 inner" in (
        capsys.readouterr().err
    )
    assert all_classes(root, depth=2) == names
    assert "contain folders" not in capsys.readouterr().err
    picture(root / "a" / "stray.png", 1)
    with pytest.raises(DataError, match=r"a/stray\.png: is beside the class folders"):
        found(root, depth=2)
    found(root)
    assert "contain folders such as a/one\n" in capsys.readouterr().err  # no depth fits all
    (root / "a" / "stray.png").unlink()
    (root / "b" / "empty").mkdir()
    with pytest.raises(DataError, match="b/empty: this class has no images"):
        found(root, depth=2)
    for split in ("train", "val", "test"):
        tree(tmp_path / "split" / split, [f"{split}{i}/{j}" for i in range(2) for j in range(2)])
    assert found(tmp_path / "split", depth=2)["validation"] == ["val0/0", "val0/1", "val1/0", "val1/1"]


def test_a_class_in_two_splits_is_refused(tmp_path: Path):
    for split in ("train", "val", "test"):
        tree(tmp_path / "mine" / split, NAMES[:2])
    with pytest.raises(DataError, match="class 'class 0' is in train and in validation"):
        ImageFolder(root=str(tmp_path / "mine")).split("train")


def test_settings_of_a_folder_that_cannot_be():
    for settings in ({"size": 0}, {"validation": 0.5, "test": 0.5}, {"test": 0.0}):
        with pytest.raises(ConfigError):
            ImageFolder(root="x", **settings)


@pytest.mark.parametrize(
    ("resize", "corner", "left"), [("pad", 9, 200), ("crop", 200, 90), ("stretch", 200, 200)]
)
def test_how_other_proportions_are_made_square(tmp_path: Path, resize: str, corner: int, left: int):
    """A wide image: a bright left third, the rest of level 90 inside a border of level 9."""
    root = tree(tmp_path / "mine", NAMES)
    pixels = np.full((20, 60), 90, np.uint8)
    pixels[:, :20] = 200
    if resize == "pad":
        pixels[0], pixels[-1] = 9, 9
    for name in NAMES:
        for path in (root / name).iterdir():
            path.unlink()
        Image.fromarray(pixels).save(root / name / "wide.png")
    store = ImageFolder(root=str(root), size=18, channels=1, resize=resize).split("train")
    image = store.items[0, 0].int()
    assert abs(image[0, 0] - (corner if resize != "crop" else left)) < 12
    assert abs(image[9, 2] - left) < 12


# the cache


def test_the_cache_serves_and_a_flipped_byte_or_a_changed_file_is_noticed(tmp_path: Path, empty_cache: Path):
    root = tree(tmp_path / "mine", NAMES)
    first = ImageFolder(root=str(root), size=8).split("train")
    (entry,) = [path for path in empty_cache.glob("image_folder-train-*") if path.suffix != ".json"]
    stamp, pixels = entry.stat().st_mtime_ns, first.items.clone()  # they are mapped from the file
    assert ImageFolder(root=str(root), size=8).split("train").fingerprint == first.fingerprint
    assert entry.stat().st_mtime_ns == stamp
    content = bytearray(entry.read_bytes())
    content[100] ^= 1
    entry.write_bytes(content)
    repaired = ImageFolder(root=str(root), size=8).split("train")
    assert torch.equal(repaired.items, pixels)
    assert entry.stat().st_mtime_ns != stamp
    picture(root / first.names[0] / "0.png", 250)
    changed = ImageFolder(root=str(root), size=8).split("train")
    assert changed.fingerprint != first.fingerprint


def test_mapped_bytes_are_built_once_and_never_half(tmp_path: Path, empty_cache: Path):
    built = []

    def build(write):
        built.append(1)
        write(b"abc")
        write(b"de")
        return {"of": "letters"}

    content, made = memmap_cached("entry", build)
    assert bytes(content.tolist()) == b"abcde"
    assert made["of"] == "letters"
    memmap_cached("entry", build)
    assert len(built) == 1

    def fails(write):
        write(b"half")
        raise RuntimeError("stopped half-way")

    with pytest.raises(RuntimeError):
        memmap_cached("other", fails)
    with pytest.raises(DataError, match="nowhere: No such file"):  # not the cache's fault
        memmap_cached("other", lambda write: {"n": len(Path("nowhere").read_bytes())})
    assert {path.name for path in empty_cache.glob("[!.]*")} == {"entry", "entry.json"}
    (empty_cache / "entry.json").unlink()  # as if killed before the notes were written
    memmap_cached("entry", build)
    assert len(built) == 2


def test_two_processes_preparing_one_cache_do_the_work_once(tmp_path: Path, empty_cache: Path):
    """Also after one that was killed half-way."""

    def prepare(say: Callable[[str], None], seconds: float) -> None:
        def build(write: Callable[[bytes], object]) -> dict:
            write(b"a")
            say("building")
            time.sleep(seconds)
            write(b"b")
            return {}

        say(bytes(memmap_cached("entry", build)[0].tolist()).decode())

    first = Fork(partial(prepare, seconds=60))
    assert first.output.readline() == "building\n"
    first.kill()
    assert first.ended() == (-signal.SIGKILL, "")
    both = [Fork(partial(prepare, seconds=0.5)) for _ in range(2)]
    assert sorted(process.ended() for process in both) == [(0, "ab\n"), (0, "building\nab\n")]


# CIFAR-FS and FC100


@pytest.mark.parametrize("layout", ["folders", "zips", "one zip"])
def test_cifar_from_class_folders_in_any_arrangement(tmp_path: Path, layout: str):
    root = tmp_path / "cifar"
    names = [label.name for label in labels()]
    tree(root / "somewhere", names[:50], each=2)
    tree(root / "elsewhere" / "deeper", names[50:], each=2)
    target = root
    if layout != "folders":
        target = tmp_path / "packed"
        target.mkdir()
        for part in ("somewhere", "elsewhere"):
            zipped(root / part, target / f"{part}.zip")
    if layout == "one zip":
        zipped(root, tmp_path / "all.zip")
        target = tmp_path / "all.zip"
    for dataset, counts in (
        (CifarFS(root=str(target)), (64, 16, 20)),
        (FC100(root=str(target)), (60, 20, 20)),
    ):
        parts = [dataset.split(name) for name in ("train", "validation", "test")]
        assert tuple(len(part.names) for part in parts) == counts
        assert sorted(name for part in parts for name in part.names) == sorted(names)
        assert len(parts[0].items) == 2 * counts[0]
    superclasses = {label.superclass for label in labels() if label.fc100 == "train"}
    assert len(superclasses) == 12
    assert not superclasses & {label.superclass for label in labels() if label.fc100 != "train"}


def test_a_missing_class_of_cifar_is_named(tmp_path: Path):
    root = tree(tmp_path / "cifar", [label.name for label in labels() if label.name != "apple"], each=1)
    with pytest.raises(DataError, match=r"no images of apple, of the 64 classes of cifar_fs train"):
        CifarFS(root=str(root)).split("train")


def test_cifar_that_is_not_there_and_may_not_be_downloaded(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("METARUN_DATA", str(tmp_path / "data"))
    with pytest.raises(DataError, match=r"CIFAR-100 is not in .*or set dataset\.root") as error:
        CifarFS(download=False).split("train")
    assert "\n" not in str(error.value)


@pytest.fixture
def real_cifar(test_data: Path) -> Path:
    if not (root := test_data / "cifar_fs").is_dir():
        pytest.skip("no cifar_fs in METARUN_TEST_DATA")
    return root


@pytest.mark.xdist_group("real")
def test_a_split_of_the_real_cifar(real_cifar: Path, real_cache):
    """Each class has its 600 images, among them those that Pillow reads in any of the three zips."""
    store = FC100(root=str(real_cifar)).split("validation")
    assert store.counts.tolist() == [600] * 20
    images = dict(zip(store.names, store.items.view(20, 600, 3, 32, 32), strict=True))
    compared = set()
    for archive in map(zipfile.ZipFile, real_cifar.glob("*.zip")):
        for path in archive.namelist()[::100]:
            if (name := path.split("/")[-2]) in images:
                pixels = torch.from_numpy(np.array(Image.open(archive.open(path)))).movedim(-1, 0)
                assert (images[name] == pixels).flatten(1).all(1).any(), path
                compared.add(name)
    assert compared == set(images)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["zips", "folders"])
@pytest.mark.parametrize("dataset", [CifarFS, FC100])
@pytest.mark.xdist_group("real")
def test_the_real_cifar(real_cifar: Path, real_cache, tmp_path: Path, dataset, layout: str):
    """Counts, and mean and standard deviation of each channel, of CIFAR-100's 60,000 images."""
    root = real_cifar
    if layout == "folders":
        for path in root.glob("*.zip"):
            zipfile.ZipFile(path).extractall(tmp_path / "unpacked")
        root = tmp_path / "unpacked"
    source = dataset(root=str(root))
    parts = [source.split(name) for name in ("train", "validation", "test")]
    assert [len(part.names) for part in parts] == ([64, 16, 20] if dataset is CifarFS else [60, 20, 20])
    assert all(set(part.counts.tolist()) == {600} for part in parts)
    assert sum(len(part.items) for part in parts) == 60000
    count = 60000 * 32 * 32
    channels = [[part.items[:, i].int() for part in parts] for i in range(3)]
    sums = torch.tensor([sum(int(x.sum()) for x in each) for each in channels]).double()
    squares = torch.tensor([sum(int((x * x).sum()) for x in each) for each in channels]).double()
    mean = sums / (255 * count)
    spread = (squares / (255**2 * count) - mean**2).sqrt()
    # Of the 50,000 training images, as everyone normalises by them; those of all are within 0.0003 of these.
    torch.testing.assert_close(mean, torch.tensor([0.5071, 0.4865, 0.4409]).double(), atol=5e-4, rtol=0)
    torch.testing.assert_close(spread, torch.tensor([0.2673, 0.2564, 0.2762]).double(), atol=5e-4, rtol=0)
    episodes = sample(parts[0], 2, EpisodeShape(5, 1, 3), torch.Generator().manual_seed(0))
    assert episodes.support_x.shape == (2, 5, 3, 32, 32)


# miniImageNet


@pytest.mark.parametrize("layout", ["folders", "csv", "zips of folders", "zips of csv", "flat without csv"])
def test_mini_imagenet_in_every_layout(tmp_path: Path, layout: str):
    root = mini_tree(tmp_path / "mini", "folders" if "folders" in layout else "csv")
    if "zips" in layout:
        for folder in [path for path in root.iterdir() if path.is_dir()]:
            zipped(folder, root / f"{folder.name}.zip")
            shutil.rmtree(folder)
    if "without" in layout:
        for path in root.glob("*.csv"):
            path.unlink()
    dataset = MiniImageNet(root=str(root), size=8)
    assert dataset.item_shape == (3, 8, 8)
    for split, count in (("train", 64), ("validation", 16), ("test", 20)):
        store = dataset.split(split)
        assert len(store.names) == count
        for i, wnid in enumerate(store.names):
            assert [abs(level - 2 * i - k) <= 2 for k, level in enumerate(levels(store)[wnid])] == [
                True,
                True,
            ]


def test_what_is_missing_of_mini_imagenet_is_said(tmp_path: Path):
    root = mini_tree(tmp_path / "mini", "csv")
    lost = next((root / "images").iterdir())
    lost.unlink()
    with pytest.raises(
        DataError, match=rf"{lost.name} is in a CSV file and not among the images \(1 of 200 such\)"
    ):
        MiniImageNet(root=str(root)).split("train")
    (root / "train.csv").write_text("a,b\n1,2")
    with pytest.raises(DataError, match="needs the columns filename and label"):
        MiniImageNet(root=str(root)).split("train")
    shutil.rmtree(root)
    root = mini_tree(tmp_path / "mini", "folders")
    shutil.rmtree(root / "test" / "n01930112")
    with pytest.raises(
        DataError, match="no images of class n01930112, of the 20 test classes; it may hold train"
    ):
        MiniImageNet(root=str(root)).split("test")


@pytest.mark.parametrize("layout", ["folders", "csv", "zips of folders", "several zips of a split"])
def test_each_missing_piece_of_mini_imagenet_is_named(tmp_path: Path, layout: str):
    """A class, and a split's folder, zip or list; what is left can still be used."""
    root = mini_tree(tmp_path / "mini", "csv" if layout == "csv" else "folders")
    first, *others = mini_imagenet.class_split()["validation"]
    if layout == "csv":
        (root / "val.csv").unlink()
        says = f"val.csv is missing beside test.csv, so no images of class {first} and 15 more, of the 16 val"
    elif layout == "several zips of a split":
        for part, wnids in (("val_a", others[:5]), ("val_b", others[5:])):
            with zipfile.ZipFile(root / f"{part}.zip", "w") as archive:
                for path in (path for wnid in wnids for path in (root / "val" / wnid).iterdir()):
                    archive.write(path, path.relative_to(root / "val"))
        shutil.rmtree(root / "val")
        says = f"no images of class {first}, of the 16 validation classes; it may hold"
    else:
        if layout == "zips of folders":
            zipped(root / "test", root / "test.zip")
            shutil.rmtree(root / "test")
        shutil.rmtree(root / "val")
        says = f"no images of class {first} and 15 more, of the 16 validation classes; it may hold"
    dataset = MiniImageNet(root=str(root), size=4)
    with pytest.raises(DataError, match=says) as error:
        dataset.split("validation")
    assert "\n" not in str(error.value)
    assert len(dataset.split("test").names) == 20


# through torchvision


def test_a_set_of_torchvision_is_split_by_class(tmp_path: Path):
    root = mnist_files(tmp_path / "data")

    def dataset(**settings) -> FromTorchvision:
        return FromTorchvision(name="mnist", classes=(5, 2, 3), channels=1, root=str(root), **settings)

    parts = {name: dataset(size=28, download=False).split(name) for name in ("train", "validation", "test")}
    assert [len(part.names) for part in parts.values()] == [5, 2, 3]
    assert len({name for part in parts.values() for name in part.names}) == 10
    for part in parts.values():
        assert set(part.counts.tolist()) == {8}
        for name, found in levels(part).items():
            assert set(found) == {20 * int(name[0])}  # "3 - three"
    shutil.rmtree(root)  # the cache has everything
    again = dataset(size=28, download=False).split("train")
    assert torch.equal(again.items, parts["train"].items)
    with pytest.raises(DataError, match=r"mnist is not in .*or set dataset\.root") as error:
        dataset(size=14, download=False).split("train")
    assert "\n" not in str(error.value)


def test_a_root_is_one_however_it_is_typed(tmp_path: Path, monkeypatch, empty_cache: Path):
    root = mnist_files(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for typed in (str(root), "data", "data/../data"):
        FromTorchvision(name="mnist", classes=(5, 2, 3), size=28, channels=1, root=typed).split("train")
    assert len(list(empty_cache.glob("mnist-*.json"))) == 1
    elsewhere = mnist_files(tmp_path / "b" / "data", each=3)
    monkeypatch.chdir(elsewhere.parent)
    other = FromTorchvision(name="mnist", classes=(5, 2, 3), size=28, channels=1, root="data").split("train")
    assert set(other.counts.tolist()) == {6}


def test_a_cache_that_is_a_file_is_said(tmp_path: Path, empty_cache: Path):
    empty_cache.write_text("x")
    root = tree(tmp_path / "mine", NAMES)
    with pytest.raises(DataError, match="set the variable METARUN_CACHE to a folder"):
        ImageFolder(root=str(root), size=8).split("train")


def test_every_yaml_of_torchvision_names_a_set_there_is():
    import torchvision.datasets

    options = {
        path.stem for path in (CONF / "dataset").glob("*.yaml") if "from_torchvision" in path.read_text()
    }
    assert options == set(SETS)
    for kind, parts in SETS.values():
        accepted = inspect.signature(getattr(torchvision.datasets, kind)).parameters
        passes_on = any(p.kind is p.VAR_KEYWORD for p in accepted.values())  # EMNIST to MNIST
        assert passes_on or {name for part in parts for name in part} <= accepted.keys()
    with pytest.raises(ConfigError, match="mnist has 10 classes in all"):
        FromTorchvision(name="mnist", classes=(5, 5, 3), size=28)._chosen(
            [str(i) for i in range(10)], "train"
        )


def test_a_folder_around_the_classes_does_no_harm(tmp_path: Path):
    """As in most zips; also around train, val and test."""
    plain = tree(tmp_path / "mine", NAMES)
    expected = levels(ImageFolder(root=str(plain), size=8).split("train"))
    tree(tmp_path / "outer" / "inner" / "mine", NAMES)
    zipped(tmp_path / "outer", tmp_path / "outer.zip")
    for root in (tmp_path / "outer", tmp_path / "outer.zip"):
        assert levels(ImageFolder(root=str(root), size=8).split("train")) == expected
    for i, split in enumerate(("train", "val", "test")):
        tree(tmp_path / "around" / "parts" / split, NAMES[2 * i : 2 * i + 2])
    assert list(levels(ImageFolder(root=str(tmp_path / "around"), size=8).split("test"))) == NAMES[4:6]


def test_what_a_killed_process_left_in_the_cache_is_removed(tmp_path: Path, empty_cache: Path):
    empty_cache.mkdir()
    (empty_cache / ".[en]try.0123.tmp").write_bytes(b"half")
    memmap_cached("[en]try", lambda write: {"n": write(b"abc")})
    assert not list(empty_cache.glob("*.tmp")) + list(empty_cache.glob(".*.tmp"))
