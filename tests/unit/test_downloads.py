"""Sets that torchvision downloads, from a loopback server: resumed, refused, never half."""

from __future__ import annotations

import gzip
import hashlib
import io
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets as sets
from helpers.images import mnist_files
from helpers.server import Server, running
from PIL import Image

from metarun import downloads
from metarun.datasets.cifar import CifarFS
from metarun.datasets.from_torchvision import FromTorchvision
from metarun.errors import DataError


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("METARUN_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    with running() as server:
        yield server


@pytest.fixture
def mnist(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """torchvision's MNIST with its four files on the loopback server."""
    raw = mnist_files(tmp_path / "made") / "MNIST" / "raw"
    for path in raw.iterdir():
        server.files[f"{path.name}.gz"] = gzip.compress(path.read_bytes(), mtime=0)
    resources = [(name, hashlib.md5(body).hexdigest()) for name, body in sorted(server.files.items())]
    monkeypatch.setattr(sets.MNIST, "resources", resources)
    monkeypatch.setattr(sets.MNIST, "mirrors", [server.url])
    return server


def split(name: str = "mnist", **settings) -> int:
    """The number of training images."""
    classes = (5, 2, 3) if name == "mnist" else (2, 2, 2)
    return len(FromTorchvision(name=name, classes=classes, size=8, **settings).split("train").images)


def refused(name: str = "mnist", **settings) -> str:
    with pytest.raises(DataError) as failure:
        split(name, **settings)
    assert "\n" not in str(failure.value)
    return str(failure.value)


def leftovers(tmp_path: Path) -> list[str]:
    folder = tmp_path / "data" / "torchvision"
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith((".lock", ".part")))


@pytest.mark.parametrize("script", [["good"], ["redirect"], ["cut", "good"], ["503", "cut", "good"]])
def test_a_set_is_downloaded(mnist: Server, tmp_path: Path, script: list[str]):
    mnist.script = script
    assert split() == 5 * 8
    assert leftovers(tmp_path) == ["MNIST"]
    if "cut" in script:
        assert any(start and start != "bytes=0-" for start in mnist.ranges)
    asked = len(mnist.ranges)
    assert split(fit="stretch") == 5 * 8  # from the files that are there
    assert len(mnist.ranges) == asked


def test_what_stopped_goes_on_in_a_later_run(mnist: Server, tmp_path: Path):
    mnist.script = ["cut", "503"]
    assert "503" in refused()
    assert leftovers(tmp_path) == []
    assert [path.stat().st_size > 0 for path in (tmp_path / "data" / "torchvision").glob(".*.part")] == [True]
    mnist.script, mnist.ranges = ["good"], []
    assert split() == 5 * 8
    assert mnist.ranges[0] not in (None, "bytes=0-")
    assert not list((tmp_path / "data" / "torchvision").glob(".*.part"))


def test_what_cannot_be_downloaded_is_said_in_one_line(mnist: Server, tmp_path: Path, monkeypatch):
    name = sorted(mnist.files)[0]
    good, mnist.files[name] = mnist.files[name], b"something else"
    assert "could not be downloaded (Error downloading" in (message := refused())
    assert "what arrived has a wrong checksum" in message
    assert "or set dataset.root" in message
    mnist.files[name], mnist.script = good, ["404"]
    assert "404" in refused()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(sets.MNIST, "mirrors", [f"http://127.0.0.1:{free.getsockname()[1]}/"])
    assert "refused" in refused()
    asked = len(mnist.ranges)
    assert "mnist is not in" in (message := refused(download=False))
    assert "dataset.download=false" in message and "could not be downloaded" not in message
    assert len(mnist.ranges) == asked
    assert leftovers(tmp_path) == []


def test_damaged_files_are_got_again_but_a_users_own_are_left(mnist: Server, tmp_path: Path):
    assert split() == 5 * 8
    raw = tmp_path / "data" / "torchvision" / "MNIST" / "raw"
    (raw / "train-images-idx3-ubyte").unlink()
    assert split(fit="crop") == 5 * 8
    (raw / "train-labels-idx1-ubyte").unlink()
    root = tmp_path / "data" / "torchvision"
    assert "MNIST: damaged or incomplete, and yours" in refused(root=str(root))
    assert (raw / "train-images-idx3-ubyte").exists()


# archives


def texture_archive(extra: tarfile.TarInfo | None = None) -> bytes:
    """A tiny DTD: seven textures, two images in each of its three parts."""
    content: dict[str, bytes] = {}
    for part in ("train", "val", "test"):
        lines = []
        for i in range(7):
            buffer = io.BytesIO()
            Image.fromarray(np.full((9, 9, 3), 30 * i, np.uint8)).save(buffer, "JPEG")
            content[f"dtd/images/kind{i}/{part}.jpg"] = buffer.getvalue()
            lines.append(f"kind{i}/{part}.jpg")
        content[f"dtd/labels/{part}1.txt"] = "\n".join(lines).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, body in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
        if extra is not None:
            tar.addfile(extra, io.BytesIO())
    return buffer.getvalue()


@pytest.fixture
def textures(server: Server, monkeypatch: pytest.MonkeyPatch):
    def serve(body: bytes, verified: bool = True) -> None:
        server.files["dtd.tar.gz"] = body
        monkeypatch.setattr(sets.DTD, "_URL", server.url + "dtd.tar.gz")
        monkeypatch.setattr(sets.DTD, "_MD5", hashlib.md5(body).hexdigest() if verified else None)

    return serve


def test_an_unpacking_that_was_stopped_is_not_taken_for_whole(textures, tmp_path: Path, monkeypatch):
    textures(texture_archive())
    extract = tarfile.TarFile.extractall

    def stopped(tar: tarfile.TarFile, path: str, **settings) -> None:
        extract(tar, path, members=tar.getmembers()[:5], **settings)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tarfile.TarFile, "extractall", stopped)
        split("dtd")
    assert leftovers(tmp_path) == []
    half = tmp_path / "data" / "torchvision" / ".DTD.tmp" / "dtd" / "dtd" / "images"  # as after kill -9
    half.mkdir(parents=True)
    assert split("dtd") == 2 * 3
    assert leftovers(tmp_path) == ["dtd"]


def test_a_hostile_or_damaged_archive_is_refused(textures, tmp_path: Path):
    link = tarfile.TarInfo("dtd/images/link")
    link.type, link.linkname = tarfile.SYMTYPE, "../../../../outside"
    for extra in (tarfile.TarInfo("../../../evil"), link):
        textures(texture_archive(extra))
        assert "dtd is not in" in refused("dtd")
    whole = texture_archive()
    for body in (whole[: len(whole) // 2], b"no archive"):
        textures(body, verified=False)
        assert "could not be downloaded" in refused("dtd")
    assert leftovers(tmp_path) == []
    assert not list(tmp_path.rglob("evil*"))


def test_cifar_is_not_blamed_on_the_network_when_that_may_not_be_used(server: Server):
    with pytest.raises(
        DataError, match=r"CIFAR-100 is not in .*, and dataset\.download=false: allow it, or put"
    ):
        CifarFS(download=False).split("train")
