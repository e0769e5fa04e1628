"""Omniglot on a small imitation with all 1,623 characters, and on the real data where there is any."""

import hashlib
import io
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.server import running
from PIL import Image, ImageDraw

from metarun.datasets import class_folders, omniglot
from metarun.datasets.omniglot import MD5, Omniglot, characters, class_split
from metarun.errors import ConfigError, DataError
from metarun.storage import downloads
from metarun.tasks.episodes import EpisodeShape

BACKGROUND, EVALUATION = MD5
SIZES = {
    "maml": (1100, 100, 423),
    "maml_plus_plus": (1150, 50, 423),
    "vinyals": (1028, 172, 423),
    "lake": (792, 172, 659),
}
SPLITS = ("train", "validation", "test")
DRAWINGS = 2  # of each character of the imitation


def drawing(character: int, number: int) -> bytes:
    """A PNG whose 12 fields, three a row, are the bits of the character and of the number; ink is 0."""
    image = Image.new("1", (105, 105), 1)
    pen = ImageDraw.Draw(image)
    for bit in range(12):
        if (character | number << 11) >> bit & 1:
            x, y = bit % 3 * 35, bit // 3 * 26
            pen.rectangle((x, y, x + 34, y + 25), fill=0)
    buffer = io.BytesIO()
    image.save(buffer, "png")
    return buffer.getvalue()


def bits(images: torch.Tensor) -> list[tuple[int, int]]:
    """The character and the number in each of the loaded 28x28 images."""
    places = [(bit // 3 * 26 + 13, bit % 3 * 35 + 17) for bit in range(12)]
    fields = torch.stack([images[:, 0, round(y * 28 / 105), round(x * 28 / 105)] for y, x in places], 1)
    values = ((fields > 127).long() << torch.arange(12)).sum(1).tolist()
    return [(value & 2047, value >> 11) for value in values]


@pytest.fixture(scope="session")
def imitation(tmp_path_factory):
    """A folder with two zips, their members in no good order and some that do not count."""
    folder = tmp_path_factory.mktemp("imitation")
    for piece in MD5:
        with zipfile.ZipFile(folder / f"{piece}.zip", "w") as archive:
            archive.writestr(f"{piece}/.DS_Store", b"x")
            archive.writestr(f"__MACOSX/{piece}/Greek/character01/._0001_01.png", b"x")
            for index, character in reversed(list(enumerate(characters()))):
                for number in reversed(range(DRAWINGS)):
                    if character.piece == piece:
                        name = f"{piece}/{character.name}/{index:04}_{number + 1:02}.png"
                        archive.writestr(name, drawing(index, number))
    return folder


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("METARUN_DATA", str(tmp_path / "data"))


@pytest.fixture
def changed(imitation, tmp_path):
    """Copies the imitation, letting a function rename or change the members of one piece."""

    def change(piece, edit):
        for other in MD5:
            if other != piece:
                shutil.copy(imitation / f"{other}.zip", tmp_path)
        with (
            zipfile.ZipFile(imitation / f"{piece}.zip") as old,
            zipfile.ZipFile(tmp_path / f"{piece}.zip", "w") as new,
        ):
            for name in old.namelist():
                if edited := edit(name, old.read(name)):
                    new.writestr(*edited)
        return tmp_path

    return change


def failing(**settings) -> str:
    with pytest.raises(DataError) as failure:
        Omniglot(**settings).split("train")
    message = str(failure.value)
    assert message and "\n" not in message and "<_io" not in message
    return message


def test_characters():
    names = [character.name for character in characters()]
    assert len(names) == len(set(names)) == 1623 and names == sorted(names)
    assert sum(character.piece == BACKGROUND for character in characters()) == 964


@pytest.mark.parametrize("classes", SIZES)
def test_class_splits(classes):
    parts = class_split(classes)
    assert tuple(len(parts[split]) for split in SPLITS) == SIZES[classes]
    assert set().union(*parts.values()) == {character.name for character in characters()}
    assert all(names == sorted(names) for names in parts.values())


def test_lake_split_is_by_alphabet():
    alphabets = {
        split: {name.split("/")[0] for name in names} for split, names in class_split("lake").items()
    }
    assert {split: len(names) for split, names in alphabets.items()} == {
        "train": 25, "validation": 5, "test": 20,
    }  # fmt: skip
    assert len(set().union(*alphabets.values())) == 50


def test_vinyals_split_divides_gurmukhi_only():
    parts = class_split("vinyals")
    alphabets = {split: {name.split("/")[0] for name in names} for split, names in parts.items()}
    assert alphabets["train"] & alphabets["test"] == {"Gurmukhi"}
    assert alphabets["validation"] == {
        "Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)",
    }  # fmt: skip
    assert "Gurmukhi/character41" in parts["train"] and "Gurmukhi/character42" in parts["test"]


def test_maml_split_stays_as_it_is():
    """Results are comparable only while this split is the same for everybody."""
    listing = "\n".join(f"{split} {name}" for split, names in class_split("maml").items() for name in names)
    assert hashlib.sha256(listing.encode()).hexdigest()[:16] == "788ebf300ce32974"


@pytest.mark.parametrize("kind", ["zips", "folders", "one above"])
def test_every_drawing_is_with_its_class(imitation, tmp_path, kind):
    root = imitation
    if kind != "zips":
        root = tmp_path / "omniglot"
        for piece in MD5:
            with zipfile.ZipFile(imitation / f"{piece}.zip") as archive:
                archive.extractall(root)
    dataset = Omniglot(root=str(tmp_path if kind == "one above" else root), rotations="none")
    numbers = {character.name: index for index, character in enumerate(characters())}
    for split in SPLITS:
        store = dataset.split(split)
        assert store.item_shape == dataset.item_shape == (1, 28, 28)
        assert store.items.dtype == torch.uint8 and store.name == f"omniglot {split}"
        assert store.names == class_split("maml")[split]
        assert store.counts.tolist() == [DRAWINGS] * len(store.names)
        expected = [(numbers[name], number) for name in store.names for number in range(DRAWINGS)]
        assert bits(store.items) == expected


def test_rotations_are_new_classes(imitation):
    plain = Omniglot(root=str(imitation), rotations="none").split("train")
    turned = Omniglot(root=str(imitation)).split("train")
    count, images = len(plain.names), len(plain.items)
    assert len(turned.names) == len(set(turned.names)) == 4 * count
    assert len(turned.items) == 4 * images
    assert turned.names[count] == plain.names[0] + "@90"
    assert turned.names[-1] == plain.names[-1] + "@270"
    for turn in range(4):
        part = turned.items[turn * images : (turn + 1) * images]
        assert torch.equal(part, torch.rot90(plain.items, turn, (2, 3)))


@pytest.mark.parametrize(
    ("rotations", "factors"), [("train", (4, 1, 1)), ("all", (4, 4, 4)), ("none", (1, 1, 1))]
)
def test_rotations_by_split(imitation, rotations, factors):
    dataset = Omniglot(root=str(imitation), classes="vinyals", rotations=rotations, size=4)
    for split, size, factor in zip(SPLITS, SIZES["vinyals"], factors, strict=True):
        assert len(dataset.split(split).names) == size * factor


@pytest.mark.parametrize("rotations", ["train", "none"])
def test_trained_validation_characters_are_rotated_as_training_characters_are(imitation, rotations):
    dataset = Omniglot(root=str(imitation), classes="vinyals", rotations=rotations, size=4)
    store, degrees = dataset.load("trainval"), ("", *["@90", "@180", "@270"] * (rotations == "train"))
    names = [name for split in ("train", "validation") for name in class_split("vinyals")[split]]
    assert store.names != sorted(store.names) and len(store.items) == DRAWINGS * len(store.names)
    assert sorted(store.names) == sorted(name + each for name in names for each in degrees)
    dataset.check_shape("trainval", EpisodeShape(len(store.names), 1, 1))
    with pytest.raises(DataError, match=rf"omniglot trainval has {len(store.names)} classes"):
        dataset.check_shape("trainval", EpisodeShape(len(store.names) + 1, 1, 1))
    assert len(dataset.split("validation").names) == 172  # as it was


def test_the_cache_is_used_until_the_files_change(imitation, changed, monkeypatch):
    root = changed(BACKGROUND, lambda name, content: (name, content))
    first = Omniglot(root=str(root), size=4).split("test")
    with monkeypatch.context() as patch:
        patch.setattr(class_folders, "decode", lambda *_: pytest.fail("decoded again"))
        assert Omniglot(root=str(root), size=4, classes="lake").split("test").names
        assert Omniglot(root=str(root), size=4).split("test").fingerprint == first.fingerprint
        with pytest.raises(pytest.fail.Exception):
            Omniglot(root=str(root), size=5).split("test")
    changed(BACKGROUND, lambda name, content: (name, drawing(0, 0)))
    assert Omniglot(root=str(root), size=4).split("test").fingerprint != first.fingerprint


def test_a_folder_with_a_changed_drawing_is_read_again(imitation, tmp_path):
    for piece in MD5:
        with zipfile.ZipFile(imitation / f"{piece}.zip") as archive:
            archive.extractall(tmp_path / "unpacked")
    root = tmp_path / "unpacked"
    fingerprints = [Omniglot(root=str(imitation), size=4).split("test").fingerprint]
    fingerprints.append(Omniglot(root=str(root), size=4).split("test").fingerprint)
    assert fingerprints[0] == fingerprints[1]  # of the pixels, wherever they come from
    name = class_split("maml")["test"][0]
    (character,) = root.glob(f"*/{name}")
    file = min(character.iterdir())
    file.write_bytes(drawing(2047, 1))
    assert Omniglot(root=str(root), size=4).split("test").fingerprint not in fingerprints
    file.unlink()
    file.symlink_to(tmp_path / "nowhere")
    assert str(file) in failing(root=str(root))


def test_a_damaged_cache_is_repaired(imitation, tmp_path):
    first = Omniglot(root=str(imitation), size=4).split("test")
    (entry,) = (path for path in (tmp_path / "cache").iterdir() if path.name[0] != "." and not path.suffix)
    content = bytearray(entry.read_bytes())
    content[len(content) // 2] ^= 64
    entry.write_bytes(content)
    assert Omniglot(root=str(imitation), size=4).split("test").fingerprint == first.fingerprint


def test_settings_are_checked_and_files_are_not():
    Omniglot(root="/nowhere")
    for wrong in ({"size": 0}, {"size": 28.5}):
        with pytest.raises(ConfigError, match=f"dataset.{next(iter(wrong))}="):
            Omniglot(**wrong)


@pytest.mark.parametrize("piece", MD5)
def test_one_piece_missing(imitation, tmp_path, piece):
    (other,) = set(MD5) - {piece}
    shutil.copy(imitation / f"{other}.zip", tmp_path)
    message = failing(root=str(tmp_path))
    assert f"{other} is in {tmp_path}, but {piece} is not" in message and f"/{piece}.zip" in message


def test_nothing_there(tmp_path):
    message = failing(root=str(tmp_path / "absent"))
    assert f"dataset.root={tmp_path / 'absent'}: neither" in message


@pytest.mark.parametrize(
    ("lost", "said"),
    [("Greek/character05", "no drawings of Greek/character05,"), ("Greek", "Greek/character01 and 23 more,")],
)
def test_characters_missing(changed, lost, said):
    root = changed(BACKGROUND, lambda name, content: None if f"/{lost}/" in name else (name, content))
    message = failing(root=str(root))
    assert said in message and str(root / f"{BACKGROUND}.zip") in message


def test_a_folder_of_a_character_that_is_empty(imitation, tmp_path):
    for piece in MD5:
        with zipfile.ZipFile(imitation / f"{piece}.zip") as archive:
            archive.extractall(tmp_path)
    for file in (tmp_path / EVALUATION / "Tengwar/character07").iterdir():
        file.unlink()
    assert "no drawings of Tengwar/character07," in failing(root=str(tmp_path))


def test_a_character_of_no_alphabet(changed):
    root = changed(EVALUATION, lambda name, content: (name.replace("Tengwar", "Klingon"), content))
    assert "no drawings of Tengwar/character01 and 24 more" in failing(root=str(root))
    extra = f"{EVALUATION}/Klingon/character01/1.png"
    root = changed(EVALUATION, lambda name, content: (extra if "DS_Store" in name else name, content))
    assert "Klingon/character01, which is not a character of images_evaluation" in failing(root=str(root))


@pytest.mark.parametrize("damage", ["empty", "text", "cut"])
def test_a_drawing_that_cannot_be_read(changed, damage):
    name = f"{EVALUATION}/ULOG/character26/1622_01.png"
    content = {"empty": b"", "text": b"not a drawing", "cut": drawing(5, 0)[:60]}[damage]
    root = changed(EVALUATION, lambda old, good: (old, content if old == name else good))
    message = failing(root=str(root))
    assert name in message and str(root / f"{EVALUATION}.zip") in message


def test_a_hostile_zip(changed):
    root = changed(EVALUATION, lambda name, content: (name.replace(f"{EVALUATION}/.", "../."), content))
    message = failing(root=str(root))
    assert "'../.DS_Store'" in message and str(root / f"{EVALUATION}.zip") in message


def test_a_zip_that_is_none(imitation, tmp_path):
    shutil.copy(imitation / f"{BACKGROUND}.zip", tmp_path)
    (tmp_path / f"{EVALUATION}.zip").write_text("<html>sign in</html>")
    assert str(tmp_path / f"{EVALUATION}.zip") in failing(root=str(tmp_path))


@pytest.fixture
def upstream(imitation, monkeypatch):
    """The imitation in upstream's place, on a loopback server."""
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    sums = {piece: hashlib.md5((imitation / f"{piece}.zip").read_bytes()).hexdigest() for piece in MD5}
    monkeypatch.setattr(omniglot, "MD5", sums)
    with running() as server:
        server.files = {f"{piece}.zip": (imitation / f"{piece}.zip").read_bytes() for piece in MD5}
        monkeypatch.setattr(omniglot, "URL", server.url.rstrip("/"))
        yield server


def test_download_and_then_without_network(upstream, imitation, tmp_path, monkeypatch):
    store = Omniglot(size=4).split("validation")
    for piece in MD5:
        there, fetched = imitation / f"{piece}.zip", tmp_path / "data/omniglot" / f"{piece}.zip"
        assert fetched.read_bytes() == there.read_bytes()
    monkeypatch.setattr(omniglot, "URL", "http://127.0.0.1:9/nothing")
    again = Omniglot(size=4, download=False).split("validation")
    assert again.fingerprint == store.fingerprint


def test_download_fails(upstream, tmp_path, monkeypatch):
    monkeypatch.setattr(omniglot, "URL", omniglot.URL + "/elsewhere")
    message = failing()
    folder = tmp_path / "data/omniglot"
    assert "404" in message and f"{folder / BACKGROUND}.zip" in message and f"{EVALUATION}.zip" in message


def test_download_not_allowed(imitation, tmp_path):
    folder = tmp_path / "data/omniglot"
    message = failing(download=False)
    assert f"no {BACKGROUND}.zip and {EVALUATION}.zip in {folder}" in message
    folder.mkdir(parents=True)
    shutil.copy(imitation / f"{EVALUATION}.zip", folder)
    assert f"no {BACKGROUND}.zip in {folder}" in failing(download=False)


@pytest.fixture(scope="session")
def real_root():
    root = os.environ.get("METARUN_TEST_DATA")
    if not root or not Path(root, "omniglot").is_dir():
        pytest.skip("METARUN_TEST_DATA names no folder that holds omniglot/")
    return root


@pytest.mark.xdist_group("real")
def test_the_fingerprints_of_the_real_data_stay_as_they_are(real_root, real_cache):
    """Episodes are named by them, so results are comparable only while they are the same."""
    for classes, rotations, split, fingerprint in (
        ("maml", "train", "test", "9a15ca97eee29a0a"),
        ("vinyals", "none", "validation", "48fcf30ce41f8baf"),
        ("lake", "train", "train", "f0f04e8c5ccb80fc"),
    ):
        store = Omniglot(root=real_root, classes=classes, rotations=rotations).split(split)
        assert store.fingerprint[:16] == fingerprint, (classes, rotations, split)


@pytest.mark.xdist_group("real")
def test_the_real_data(real_root, real_cache):
    for classes, sizes in SIZES.items():
        dataset = Omniglot(root=real_root, classes=classes, rotations="none")
        stores = {split: dataset.split(split) for split in SPLITS}
        assert tuple(len(store.names) for store in stores.values()) == sizes
        assert all(store.smallest_class == store.largest_class == 20 for store in stores.values())
        names = [name for store in stores.values() for name in store.names]
        assert len(set(names)) == len(names) == 1623
        if classes == "lake":
            assert len(stores["train"].items) + len(stores["validation"].items) == 19_280
            assert len(stores["test"].items) == 13_180
    for store in stores.values():
        assert 0.07 < store.items.float().mean() / 255 < 0.1  # ink is bright and little
        assert (store.items.flatten(1).amax(1) > 200).float().mean() > 0.99  # strokes are not washed out
