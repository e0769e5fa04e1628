"""The cache folder listed, verified and cleaned."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_image_datasets import NAMES, picture, tree

from metarun import cache
from metarun.datasets.image_folder import ImageFolder
from metarun.files import mapped


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def prepared(root: Path, **settings) -> None:
    ImageFolder(root=str(root), size=8, **settings).split("train")


def names(entries: list[cache.Kept]) -> list[tuple[str, str, bool]]:
    return [(entry.dataset, entry.split, bool(entry.stale)) for entry in entries]


def test_what_is_current_what_is_not_and_why(tmp_path: Path, folder: Path):
    assert cache.kept() == []
    root = tree(tmp_path / "mine", NAMES)
    prepared(root)
    prepared(root, fit="crop")
    assert names(cache.kept()) == [("image_folder", "train", False)] * 2
    assert cache.kept("glyphs") == []
    assert sum(entry.size for entry in cache.kept()) == 2 * 4 * 3 * 3 * 8 * 8
    time.sleep(0.01)
    for name in NAMES:
        picture(root / name / "0.png", 250)
    prepared(root)
    assert sorted(entry.stale for entry in cache.kept()) == ["", "", "the files have changed since"]
    (folder / f".image_folder-train-{'0' * 24}.{'1' * 32}.tmp").write_bytes(b"half")
    (folder / f"glyphs-{'0' * 24}").write_bytes(b"without notes")
    root.rename(tmp_path / "moved")
    assert {entry.stale for entry in cache.kept()} == {
        f"{root} is gone",
        "left by a run that was stopped",
        "unfinished, or of an earlier metarun",
    }


def test_only_what_metarun_made_is_ever_removed(tmp_path: Path, folder: Path):
    root = tree(tmp_path / "mine", NAMES)
    prepared(root)
    (entry,) = cache.kept()
    strangers = ["thesis.txt", "data", f"x-{'0' * 23}", ".hidden", f"photo-{'g' * 24}"]
    for name in strangers:
        (folder / name).write_text("precious")
    (tmp_path / "outside").write_text("precious")
    (folder / f"link-{'0' * 24}").symlink_to(tmp_path / "outside")
    inside = folder / f"cub-unpacked-{'0' * 24}"
    inside.mkdir()
    (inside / "way out").symlink_to(tmp_path / "mine", target_is_directory=True)
    for each in cache.kept():
        assert cache.remove(each)
    left = {path.name for path in folder.iterdir()}
    assert left == {*strangers, f"link-{'0' * 24}"}
    assert (tmp_path / "outside").read_text() == "precious"
    assert len(list(root.rglob("*.png"))) == 24
    assert not entry.path.exists()


def test_every_flipped_byte_is_found(tmp_path: Path):
    prepared(tree(tmp_path / "mine", NAMES))
    (entry,) = cache.kept()
    seen = []
    assert cache.damage(entry, seen.append) == ""
    assert sum(seen) == entry.size
    content = bytearray(entry.path.read_bytes())
    for place in (0, len(content) // 2, len(content) - 1):
        content[place] ^= 1
        entry.path.write_bytes(content)
        assert cache.damage(entry).startswith("damaged: its sha256 sum is")
        content[place] ^= 1
    entry.path.write_bytes(content)
    assert cache.damage(entry) == ""


def test_an_entry_being_made_is_left_alone(folder: Path):
    pytest.importorskip("fcntl")
    name = f"slow-{'0' * 24}"
    code = (
        "import time; from metarun import files\n"
        "def build(write):\n"
        "    write(b'a'); print('building', flush=True); time.sleep(60); return {}\n"
        f"files.mapped({name!r}, build)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "building\n"
        (left,) = cache.kept()
        assert left.stale == "left by a run that was stopped"
        assert not cache.remove(left)
        assert left.path.exists()
    finally:
        process.kill()
        process.communicate()
    assert cache.remove(left)
    assert os.listdir(folder) == []


def test_sizes_for_people():
    assert [cache.human(size) for size in (0, 999, 1000, 118_000_000, 9_490_000_000)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "118 MB",
        "9.5 GB",
    ]


def test_an_entry_keeps_what_it_is(folder: Path):
    mapped(f"a-{'0' * 24}", lambda write: {"n": write(b"x")}, what="a", source=str(folder))
    (entry,) = cache.kept("a")
    assert (entry.notes["what"], entry.notes["source"], entry.stale) == ("a", str(folder), "")
