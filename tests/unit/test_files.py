"""Downloads from a loopback server, zips and folders read in place, and the cache."""

import hashlib
import os
import socket
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.server import running

from metarun.errors import DataError
from metarun.storage import archives, downloads
from metarun.storage.archives import Archive
from metarun.storage.cached_arrays import memmap_cached
from metarun.storage.downloads import download
from metarun.storage.files import atomic_write, cache_dir, data_dir

pytestmark = pytest.mark.quick

BODY = bytes(range(256)) * 4096  # 1 MiB: several chunks
MD5 = hashlib.md5(BODY).hexdigest()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    with running() as server:
        server.url += "file.zip"
        server.files["file.zip"] = BODY
        yield server


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("METARUN_DATA", str(tmp_path / "data"))


def one_line(failure) -> str:
    message = str(failure.value)
    assert message and "\n" not in message
    return message


def names_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


@pytest.mark.parametrize("checksum", [MD5, hashlib.sha256(BODY).hexdigest(), None])
def test_download_good(server, tmp_path, checksum):
    path = tmp_path / "new" / "file.zip"
    download(server.url, path, checksum)
    assert path.read_bytes() == BODY
    assert names_in(path.parent) == ["file.zip"]


def test_download_leaves_an_existing_file_alone(server, tmp_path):
    path = tmp_path / "file.zip"
    path.write_bytes(b"mine")
    download(server.url, path, MD5)
    assert path.read_bytes() == b"mine" and not server.ranges


def test_download_goes_on_after_a_lost_connection(server, tmp_path):
    server.script = ["cut", "good"]
    download(server.url, tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip").read_bytes() == BODY
    assert server.ranges == [None, f"bytes={len(BODY) // 3}-"]


def test_download_goes_on_where_an_earlier_run_stopped(server, tmp_path):
    (tmp_path / "file.zip.part").write_bytes(BODY[:1000])
    download(server.url, tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip").read_bytes() == BODY
    assert server.ranges == ["bytes=1000-"]


def test_download_from_a_server_without_ranges_starts_over(server, tmp_path):
    server.script = ["cut", "whole"]
    download(server.url, tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip").read_bytes() == BODY


@pytest.mark.parametrize("passing", ["416", "503", "429", "stall"])
def test_download_tries_again(server, tmp_path, monkeypatch, passing):
    monkeypatch.setattr(downloads, "TIMEOUT", 0.2)
    (tmp_path / "file.zip.part").write_bytes(BODY[:1000])
    server.script = [passing, "good"]
    download(server.url, tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip").read_bytes() == BODY
    assert server.ranges == ["bytes=1000-", None if passing == "416" else "bytes=1000-"]


def test_download_follows_a_redirect(server, tmp_path):
    server.script = ["redirect", "good"]
    download(server.url, tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip").read_bytes() == BODY


@pytest.mark.parametrize(("wrong", "right"), [("0" * 32, MD5), ("0" * 64, hashlib.sha256(BODY).hexdigest())])
def test_download_of_a_wrong_file(server, tmp_path, wrong, right):
    with pytest.raises(DataError) as failure:
        download(server.url, tmp_path / "file.zip", wrong)
    message = one_line(failure)
    assert server.url in message and right in message and str(tmp_path / "file.zip") in message
    assert names_in(tmp_path) == []


def test_download_that_never_gets_through_keeps_what_it_has(server, tmp_path):
    server.script = ["cut", "503"]
    with pytest.raises(DataError, match="503"):
        download(server.url, tmp_path / "file.zip", MD5)
    assert len(server.ranges) == downloads.TRIES
    assert (tmp_path / "file.zip.part").read_bytes() == BODY[: len(BODY) // 3]
    assert not (tmp_path / "file.zip").exists()


def test_download_of_what_is_not_there_is_not_tried_again(server, tmp_path):
    server.script = ["404"]
    with pytest.raises(DataError) as failure:
        download(server.url, tmp_path / "file.zip", MD5)
    message = one_line(failure)
    assert "404" in message and server.url in message and f"at {tmp_path / 'file.zip'} yourself" in message
    assert len(server.ranges) == 1


def test_download_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/file.zip"
    with pytest.raises(DataError, match="refused") as failure:
        download(url, tmp_path / "file.zip", MD5)
    assert url in one_line(failure) and "urlopen" not in one_line(failure)


def test_download_into_a_folder_that_cannot_be_made(server, tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(DataError, match="METARUN_DATA") as failure:
        download(server.url, tmp_path / "taken" / "file.zip", MD5)
    assert str(tmp_path / "taken") in one_line(failure)


def test_folders_follow_their_variables(tmp_path, monkeypatch):
    assert (cache_dir(), data_dir()) == (tmp_path / "cache", tmp_path / "data")
    monkeypatch.setenv("METARUN_CACHE", "~/here")
    monkeypatch.setenv("METARUN_DATA", "")
    assert str(cache_dir()) == os.path.expanduser("~/here")
    assert str(data_dir()) == os.path.expanduser("~/.cache/metarun/data")


def test_atomic_write_replaces(tmp_path):
    path = tmp_path / "new" / "file"
    for content in (b"one", b"two"):
        atomic_write(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
    assert names_in(path.parent) == ["file"]


def test_atomic_write_that_fails_changes_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, write)
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


class Builder:
    def __init__(self, pause=0.0):
        self.calls, self.pause = 0, pause

    def __call__(self, write):
        self.calls += 1
        time.sleep(self.pause)
        write(b"some")
        write(b"bytes")
        return {"names": ["a", "b"]}


def mapped_text(build):
    content, made = memmap_cached("entry", build)
    assert made["names"] == ["a", "b"]
    return bytes(content.tolist())


@pytest.mark.parametrize("where", ["first", "last", "cut", "empty", "notes"])
def test_a_damaged_entry_is_built_again(where):
    build = Builder()
    assert mapped_text(build) == mapped_text(build) == b"somebytes"
    assert build.calls == 1
    assert names_in(cache_dir()) == ["entry", "entry.json"]
    path = cache_dir() / ("entry.json" if where == "notes" else "entry")
    content = bytearray(path.read_bytes())
    if where in ("cut", "empty", "notes"):
        del content[0 if where == "empty" else len(content) // 2 :]
    else:
        content[{"first": 0, "last": -1}[where]] ^= 1
    path.write_bytes(content)
    assert mapped_text(build) == mapped_text(build) == b"somebytes"
    assert build.calls == 2


def test_an_entry_is_built_by_one_of_many_at_once():
    build = Builder(pause=0.2)
    # A lock belongs to an opened file, so threads compete for it as processes do.
    with ThreadPoolExecutor(4) as pool:
        values = list(pool.map(lambda _: mapped_text(build), range(4)))
    assert build.calls == 1
    assert values == [b"somebytes"] * 4


def test_an_entry_in_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "taken"))
    build = Builder()
    with pytest.raises(DataError, match="METARUN_CACHE") as failure:
        memmap_cached("entry", build)
    assert str(tmp_path / "taken") in one_line(failure)
    assert build.calls == 0  # said before the work, not after it


def make_zip(path, members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return path


def test_archive_is_read_in_place(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"b/": b"", "b/2.png": b"two", "a/1.png": b"one"})
    archive = Archive(path)
    assert archive.names() == ["a/1.png", "b/2.png"]
    assert archive.read("b/2.png") == b"two"
    assert names_in(tmp_path) == ["a.zip"]


@pytest.mark.parametrize(
    "name", ["../evil.png", "a/../../evil.png", "/evil.png", "C:/evil.png", "a\\..\\evil.png"]
)
def test_archive_with_a_name_that_leads_out(tmp_path, name):
    path = make_zip(tmp_path / "a.zip", {"a/1.png": b"one", name: b"evil"})
    with pytest.raises(DataError) as failure:
        Archive(path).names()
    assert str(path) in one_line(failure) and repr(name) in one_line(failure)


def test_archive_with_a_link(tmp_path):
    link = zipfile.ZipInfo("a/link.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match=r"its member 'a/link\.png' is a link") as failure:
        Archive(tmp_path / "a.zip").names()
    assert str(tmp_path / "a.zip") in one_line(failure)


def test_archive_member_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MEMBER_LIMIT", 10)
    path = make_zip(tmp_path / "a.zip", {"bomb.png": bytes(11)})
    with pytest.raises(DataError, match=r"bomb\.png"):
        Archive(path).read("bomb.png")


def test_archive_damaged(tmp_path):
    path = make_zip(tmp_path / "a.zip", {"a/1.png": b"a drawing"})
    good = path.read_bytes()
    path.write_bytes(good.replace(b"a drawing", b"a drowing"))
    with pytest.raises(DataError, match=r"a/1\.png") as failure:
        Archive(path).read("a/1.png")
    assert str(path) in one_line(failure)
    for content in (b"", good[: len(good) // 2], b"<html>sign in first</html>"):
        path.write_bytes(content)
        with pytest.raises(DataError, match="get it again") as failure:
            Archive(path).names()
        assert str(path) in one_line(failure)
