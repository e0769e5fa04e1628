"""The cache folder listed, verified and cleaned."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.forks import Fork
from helpers.images import NAMES, picture, tree

from metarun.datasets import class_folders
from metarun.datasets.image_folder import ImageFolder
from metarun.errors import DataError
from metarun.storage import cache, cached_arrays, locks
from metarun.storage.cached_arrays import memmap_cached

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def prepared(root: Path, **settings) -> None:
    ImageFolder(root=str(root), size=8, **settings).split("train")


def record(name: str, **fields: object) -> dict[str, object]:
    """The metadata of an entry, as metarun writes it."""
    dataset = name.partition("-")[0]
    right = {"made_by": "metarun", "entry": name, "dataset": dataset, "split": "all", "key": name}
    return right | {"source": "", "sha256": "0"} | fields


def half(folder: Path, name: str, of: str) -> None:
    """What a killed process leaves of the entry `of`."""
    (folder / name).write_bytes(b"half")
    (folder / f"{name}.json").write_text(json.dumps(record(of)))


def names(entries: list[cache.CacheEntry]) -> list[tuple[str, str, bool]]:
    return [(entry.dataset, entry.split, bool(entry.stale)) for entry in entries]


def test_what_is_current_what_is_not_and_why(tmp_path: Path, folder: Path):
    assert cache.cache_entries() == []
    root = tree(tmp_path / "mine", NAMES)
    prepared(root)
    prepared(root, resize="crop")
    assert names(cache.cache_entries()) == [("image_folder", "train", False)] * 2
    assert cache.cache_entries("glyphs") == []
    assert sum(entry.size for entry in cache.cache_entries()) == 2 * 4 * 3 * 3 * 8 * 8
    time.sleep(0.01)
    for name in NAMES:
        picture(root / name / "0.png", 250)
    prepared(root)
    assert sorted(entry.stale for entry in cache.cache_entries()) == ["", "", "the files have changed since"]
    half(folder, f".image_folder-train-{'0' * 24}.{'1' * 32}.tmp", f"image_folder-train-{'0' * 24}")
    (folder / f"glyphs-{'0' * 24}.json").write_text(json.dumps(record(f"glyphs-{'0' * 24}")))  # no bytes yet
    root.rename(tmp_path / "moved")
    assert len(cache.cache_entries()) == 5
    assert {entry.stale for entry in cache.cache_entries()} == {
        f"{root} is gone",
        "left by a run that was stopped",
    }


def test_only_what_metarun_made_is_ever_removed(tmp_path: Path, folder: Path):
    root = tree(tmp_path / "mine", NAMES)
    prepared(root)
    (entry,) = cache.cache_entries()
    own, stranger = f"omniglot-{'0' * 24}", "507f1f77bcf86cd799439011"
    strangers = ["thesis.txt", "data", f"x-{'0' * 23}", ".hidden", f"photo-{'g' * 24}", f"photos-{stranger}"]
    strangers += [f"omniglot-{stranger}", f".omniglot-{stranger}.{'1' * 32}.tmp"]  # of a dataset's name
    for name in strangers:
        (folder / name).write_text("precious")
    (folder / f"notes-{stranger}").write_text("precious")
    (folder / f"notes-{stranger}.json").write_text('{"title": "precious"}')
    (folder / f"export-{stranger}").mkdir()
    (folder / f"export-{stranger}" / "thesis.txt").write_text("precious")
    (folder / f"cub-unpacked-{'0' * 24}").mkdir()  # a folder without metadata, though of a dataset's name
    (folder / "renamed").write_text("precious")
    (folder / "renamed.json").write_text(json.dumps(record(own)))  # the metadata of another entry
    strangers += [f"notes-{stranger}", f"notes-{stranger}.json", f"export-{stranger}"]
    strangers += [f"cub-unpacked-{'0' * 24}", "renamed", "renamed.json"]
    half(folder, own, own)
    (tmp_path / "outside").write_text("precious")
    link = f"link-{'0' * 24}"
    (folder / link).symlink_to(tmp_path / "outside")
    (folder / f"{link}.json").write_text(json.dumps(record(link)))
    inside = folder / f"cub-unpacked-{'1' * 24}"
    inside.mkdir()
    (inside / "way out").symlink_to(tmp_path / "mine", target_is_directory=True)
    inside.with_name(inside.name + ".json").write_text(json.dumps(record(inside.name)))
    assert len(cache.cache_entries()) == 3
    for each in cache.cache_entries():
        assert cache.remove(each)
    left = {path.name for path in folder.iterdir() if path.suffix != ".lock"}
    assert left == {*strangers, link, f"{link}.json"}
    assert (tmp_path / "outside").read_text() == "precious"
    assert len(list(root.rglob("*.png"))) == 24
    assert not entry.path.exists()


NAME = f"omniglot-{'0' * 24}"
DAMAGED = [
    '{"what": "x"}',
    *(json.dumps(record(NAME, **fields)) for fields in ({"key": ["x"]}, {"source": None}, {"source": 5})),
    *(json.dumps(record(NAME, **fields)) for fields in ({"entry": "../x"}, {"dataset": {"a": 1}})),
    json.dumps(record(NAME, made_by="another program")),
    json.dumps(record(NAME))[:-1],
    "[1]",
    "[" * 100_000,
    "nonsense",
    "\xff",
]


@pytest.mark.parametrize("text", DAMAGED)
def test_what_has_damaged_metadata_is_not_touched_but_built_again_when_needed(folder: Path, text: str):
    folder.mkdir()
    (folder / NAME).write_bytes(b"bytes")
    (folder / f"{NAME}.json").write_bytes(text.encode("latin-1"))
    assert cache.cache_entries() == []
    content, _ = memmap_cached(NAME, lambda write: {"n": write(b"right")})
    assert bytes(content.tolist()) == b"right"
    (entry,) = cache.cache_entries("omniglot")
    assert cache.damage(entry) == ""
    assert cache.remove(entry)
    assert [path.name for path in folder.iterdir()] == [f".{NAME}.lock"]


@pytest.mark.parametrize("source", ["gone", "a\0b"])
def test_an_entry_whose_source_is_gone(folder: Path, source: str):
    memmap_cached(NAME, lambda write: {"n": write(b"x")}, "key", source)
    (entry,) = cache.cache_entries()
    assert cache.damage(entry) == entry.stale == f"{source} is gone"


def test_what_cannot_be_removed_is_said(folder: Path, monkeypatch):
    folder.mkdir()
    half(folder, NAME, NAME)
    (entry,) = cache.cache_entries()

    def fails(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "unlink", fails)
    with pytest.raises(
        DataError, match=rf"{NAME}: cannot be removed \(Permission denied\); remove it yourself"
    ):
        cache.remove(entry)


STOPS = ["the bytes", "the metadata", "the last rename"]


@pytest.mark.parametrize("where", STOPS)
def test_a_process_killed_at_any_point_leaves_only_what_is_recognised(folder: Path, where: str):
    """And the old entry, if there was one, is never taken for the new one."""

    def killed(*arguments: object) -> None:
        os._exit(9)

    def build(write: Callable[[bytes], object]) -> dict:
        write(b"new")
        if where == "the bytes":
            killed()
        if where == "the metadata":
            cached_arrays.write_json = killed
        if where == "the last rename":
            replace = os.replace
            os.replace = lambda a, b: killed() if str(b).endswith("0") else replace(a, b)
        return {}

    memmap_cached(NAME, lambda write: {"n": write(b"old")})
    (folder / NAME).write_bytes(b"odd")  # so that it is built again
    assert Fork(lambda say: memmap_cached(NAME, build)).ended() == (9, "")
    left = {path.name for path in folder.iterdir() if path.suffix not in (".json", ".lock")}
    listed = cache.cache_entries()
    assert {entry.path.name for entry in listed} == left and len(left) == 2
    assert [bool(entry.stale) for entry in listed] == [True, False]
    content, _ = memmap_cached(NAME, lambda write: {"n": write(b"again")})
    assert bytes(content.tolist()) == b"again"
    assert {path.name for path in folder.iterdir()} == {NAME, f"{NAME}.json", f".{NAME}.lock"}


def test_a_cache_folder_that_is_a_file(folder: Path):
    folder.write_text("precious")
    with pytest.raises(DataError, match="is a file: set the variable METARUN_CACHE"):
        cache.cache_entries()


def test_who_waits_for_a_lock_says_so_and_gets_it(folder: Path):
    """Only after a while, once, and on standard error; the lock file stays, for others may wait for it."""
    path, code = folder / "entry", "from metarun.storage import locks; from pathlib import Path; import sys\n"
    code += "locks.PATIENCE = 0.2; print('waits', flush=True)\n"
    code += "print(locks.once(Path(sys.argv[1]), lambda: None, lambda: 'made'), flush=True)"
    folder.mkdir()
    words = [sys.executable, "-c", code, str(path)]
    with locks.locked(path) as alone:
        assert alone
        waiting = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert waiting.stdout and waiting.stdout.readline() == "waits\n"
        assert waiting.stderr and waiting.stderr.readline() == (
            f"waiting for another process that prepares {path} ...\n"
        )
        assert waiting.poll() is None
        with locks.locked(path) as second:
            assert not second
    out, err = waiting.communicate(timeout=60)
    assert (out, err) == ("made\n", "")
    assert [each.name for each in folder.iterdir()] == [".entry.lock"]
    with locks.locked(path) as alone:
        assert alone


def test_where_there_are_no_locks_the_work_is_done_all_the_same(folder: Path, monkeypatch):
    def fails(*args: object, **settings: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.FileLock, "acquire", fails)
    assert locks.once(folder / "entry", lambda: None, lambda: "made") == "made"
    with locks.locked(folder / "entry") as alone:
        assert alone


def test_every_flipped_byte_is_found(tmp_path: Path):
    prepared(tree(tmp_path / "mine", NAMES))
    (entry,) = cache.cache_entries()
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
    name = f"glyphs-{'0' * 24}"

    def make(say: Callable[[str], None]) -> None:
        def build(write: Callable[[bytes], object]) -> dict:
            write(b"a")
            say("building")
            time.sleep(60)
            return {}

        memmap_cached(name, build)

    process = Fork(make)
    try:
        assert process.output.readline() == "building\n"
        (left,) = cache.cache_entries()
        assert left.stale == "left by a run that was stopped"
        assert not cache.remove(left)
        assert left.path.exists()
    finally:
        process.kill()
        process.ended()
    assert cache.remove(left)
    assert os.listdir(folder) == [f".{name}.lock"]


def test_an_entry_keeps_what_it_is(folder: Path):
    memmap_cached(f"a-{'0' * 24}", lambda write: {"n": write(b"x")}, key="a", source=str(folder))
    (entry,) = cache.cache_entries("a")
    assert (entry.metadata["key"], entry.metadata["source"], entry.stale) == ("a", str(folder), "")


def test_a_large_entry_is_compared_in_places_and_never_read_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(cached_arrays, "LARGE", 1000)
    monkeypatch.setattr(cached_arrays, "PIECES", 3)
    monkeypatch.setattr(cached_arrays, "PIECE", 10)
    built = []

    def build(write) -> dict[str, int]:
        built.append(1)
        return {"n": write(bytes(range(200)) * 10)}

    content, metadata = memmap_cached(NAME, build)
    assert bytes(content[:5]) == b"\0\1\2\3\4" and metadata["size"] == 2000
    path = folder / NAME
    right = path.read_bytes()

    def again(changed: bytes) -> int:
        path.write_bytes(changed)
        built.clear()
        memmap_cached(NAME, build)
        return len(built)

    assert again(right) == 0
    for place in (0, 1000, 1999):  # the pieces are at the start, in the middle and at the end
        assert again(right[:place] + b"\xff" + right[place + 1 :]) == 1
    assert again(right[:-1]) == again(right + b"\0") == 1
    elsewhere = right[:500] + b"\xff" + right[501:]
    assert again(elsewhere) == 0
    (entry,) = cache.cache_entries()
    assert cache.damage(entry).startswith("damaged")  # verify=true reads all of it


def test_classes_of_a_large_entry_are_hashed_while_it_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = tree(tmp_path / "mine", NAMES)
    small = ImageFolder(root=str(root), size=8).split("train")
    for module in (cached_arrays, class_folders):
        monkeypatch.setattr(module, "LARGE", 100)
    monkeypatch.setattr(class_folders, "BLOCK", 2)
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "other"))
    large = ImageFolder(root=str(root), size=8).split("train")
    assert "marks" in vars(large) and "marks" not in vars(small)
    assert large.fingerprint == small.fingerprint
    assert large.marks.tolist() == small.marks.tolist()
