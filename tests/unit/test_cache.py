"""The cache folder listed, verified and cleaned."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.images import NAMES, picture, tree

from metarun import cache, locks
from metarun.datasets.image_folder import ImageFolder
from metarun.entries import mapped
from metarun.errors import DataError

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def prepared(root: Path, **settings) -> None:
    ImageFolder(root=str(root), size=8, **settings).split("train")


def locked_file(folder: Path, name: str, of: str) -> None:
    """A file without notes, and the lock that metarun takes before it writes one."""
    (folder / name).write_bytes(b"half")
    (folder / f".{of}.lock").touch()


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
    locked_file(folder, f".image_folder-train-{'0' * 24}.{'1' * 32}.tmp", f"image_folder-train-{'0' * 24}")
    locked_file(folder, f"glyphs-{'0' * 24}", f"glyphs-{'0' * 24}")
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
    own, stranger = f"omniglot-{'0' * 24}", "507f1f77bcf86cd799439011"
    strangers = ["thesis.txt", "data", f"x-{'0' * 23}", ".hidden", f"photo-{'g' * 24}", f"photos-{stranger}"]
    strangers += [f"omniglot-{stranger}"]  # of a dataset's name, without a lock
    for name in strangers:
        (folder / name).write_text("precious")
    (folder / f"notes-{stranger}").write_text("precious")
    (folder / f"notes-{stranger}.json").write_text('{"title": "precious"}')
    (folder / f"export-{stranger}").mkdir()
    (folder / f"export-{stranger}" / "thesis.txt").write_text("precious")
    (folder / f"cub-unpacked-{'0' * 24}").mkdir()  # a folder without notes, though of a dataset's name
    (folder / f".cub-unpacked-{'0' * 24}.lock").touch()
    strangers += [f"notes-{stranger}", f"notes-{stranger}.json", f"export-{stranger}"]
    strangers += [f"cub-unpacked-{'0' * 24}", f".cub-unpacked-{'0' * 24}.lock"]
    locked_file(folder, own, own)
    (tmp_path / "outside").write_text("precious")
    (folder / f"link-{'0' * 24}").symlink_to(tmp_path / "outside")
    inside = folder / f"cub-unpacked-{'1' * 24}"
    inside.mkdir()
    (inside / "way out").symlink_to(tmp_path / "mine", target_is_directory=True)
    record = '{"what": "cub unpacked x", "source": "", "unpacked": "", "sha256": ""}'
    inside.with_name(inside.name + ".json").write_text(record)
    assert len(cache.kept()) == 3
    for each in cache.kept():
        assert cache.remove(each)
    left = {path.name for path in folder.iterdir()}
    assert left == {*strangers, f"link-{'0' * 24}"}
    assert (tmp_path / "outside").read_text() == "precious"
    assert len(list(root.rglob("*.png"))) == 24
    assert not entry.path.exists()


DAMAGED = [
    '{"what": "x"}',
    '{"what": ["x"], "source": "", "sha256": "0"}',
    '{"what": "x", "source": null, "sha256": "0"}',
    '{"what": "x", "source": 5, "sha256": "0"}',
    '{"what": {"a": 1}, "source": "", "sha256": "0"}',
    '{"what": "x", "source": "a\\u0000b", "sha256": "0"}',
    "[1]",
    "[" * 100_000,
    "nonsense",
    "\xff",
]


@pytest.mark.parametrize("text", DAMAGED)
def test_damaged_notes_are_none(folder: Path, text: str):
    name = f"omniglot-{'0' * 24}"
    folder.mkdir()
    locked_file(folder, name, name)
    (folder / f"{name}.json").write_bytes(text.encode("latin-1"))
    (entry,) = cache.kept()
    assert entry.stale
    assert cache.damage(entry) == entry.stale
    assert cache.remove(entry)
    assert not list(folder.iterdir())


def test_what_cannot_be_removed_is_said(folder: Path):
    name = f"omniglot-{'0' * 24}"
    folder.mkdir()
    locked_file(folder, name, name)
    (folder / f"{name}.json").mkdir()
    (entry,) = cache.kept()
    with pytest.raises(DataError, match=r"json: cannot be removed"):
        cache.remove(entry)


def test_a_cache_folder_that_is_a_file(folder: Path):
    folder.write_text("precious")
    with pytest.raises(DataError, match="is a file: set the variable METARUN_CACHE"):
        cache.kept()


def test_who_waited_for_a_lock_that_was_removed_takes_a_new_one(folder: Path):
    """Else it and the next one would work on one entry at once."""
    pytest.importorskip("fcntl")
    folder.mkdir()
    path, code = folder / "entry", "from metarun import locks; from pathlib import Path; import sys\n"
    code += "print('waits', flush=True); lock = locks._lock(Path(sys.argv[1])); print('has', flush=True)\n"
    code += "input()"
    with locks.locked(path) as alone:
        assert alone
        words = [sys.executable, "-c", code, str(path)]
        waiting = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert waiting.stdout and waiting.stdout.readline() == "waits\n"
        time.sleep(0.5)
        locks.lock_path(path).unlink()
    assert waiting.stdout.readline() == "has\n"
    with locks.locked(path) as alone:
        assert not alone
    waiting.communicate("\n")


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
    name = f"glyphs-{'0' * 24}"
    code = (
        "import time; from metarun.entries import mapped\n"
        "def build(write):\n"
        "    write(b'a'); print('building', flush=True); time.sleep(60); return {}\n"
        f"mapped({name!r}, build)"
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
