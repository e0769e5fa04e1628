"""Sets that torchvision downloads, from a loopback server: resumed, refused, never half."""

from __future__ import annotations

import gzip
import hashlib
import inspect
import io
import socket
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets as sets
from helpers.images import mnist_files
from helpers.server import Server, running
from PIL import Image

from metarun.datasets.cifar import CifarFS
from metarun.datasets.from_torchvision import SETS, FromTorchvision
from metarun.datasets.torchvision_sources import SOURCES, Source
from metarun.errors import DataError
from metarun.storage import archives, downloads


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("METARUN_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    with running() as server:
        yield server


@pytest.fixture
def mnist(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """MNIST's four files on the loopback server, with their true sums."""
    raw = mnist_files(tmp_path / "made") / "MNIST" / "raw"
    for path in raw.iterdir():
        server.files[f"{path.name}.gz"] = gzip.compress(path.read_bytes(), mtime=0)
    sources = [
        Source((server.url + name,), hashlib.md5(body).hexdigest(), "MNIST/raw", "gzip")
        for name, body in sorted(server.files.items())
    ]
    monkeypatch.setitem(SOURCES, "MNIST", sources)
    return server


def split(name: str = "mnist", **settings) -> int:
    """The number of training images."""
    classes = (5, 2, 3) if name == "mnist" else (2, 2, 2)
    return len(FromTorchvision(name=name, classes=classes, size=8, **settings).split("train").items)


def refused(name: str = "mnist", **settings) -> str:
    with pytest.raises(DataError) as failure:
        split(name, **settings)
    assert "\n" not in str(failure.value)
    return str(failure.value)


def leftovers(tmp_path: Path) -> list[str]:
    """What is in the folder of torchvision's files besides locks and downloads to go on with."""
    folder = tmp_path / "data" / "torchvision"
    return sorted(path.name for path in folder.iterdir() if path.suffix not in (".lock", ".downloads"))


def pending(tmp_path: Path) -> list[Path]:
    """Downloads, whole ones and parts, that wait for a later run."""
    found = (tmp_path / "data" / "torchvision").glob("*.downloads/*")
    return sorted(path for path in found if path.suffix != ".lock")


@pytest.mark.parametrize("script", [["good"], ["redirect"], ["cut", "good"], ["503", "cut", "good"]])
def test_a_set_is_downloaded(mnist: Server, tmp_path: Path, script: list[str]):
    mnist.script = script
    assert split() == 5 * 8
    assert leftovers(tmp_path) == ["MNIST"]
    if "cut" in script:
        assert any(start and start != "bytes=0-" for start in mnist.ranges)
    assert not pending(tmp_path)
    asked = len(mnist.ranges)
    assert split(resize="stretch") == 5 * 8  # from the files that are there
    assert len(mnist.ranges) == asked


def test_what_stopped_goes_on_in_a_later_run(mnist: Server, tmp_path: Path):
    mnist.script = ["cut", "503"]
    assert "503" in refused()
    assert leftovers(tmp_path) == []
    (part,) = pending(tmp_path)
    assert part.suffix == ".part" and part.stat().st_size > 0
    mnist.script, mnist.ranges = ["good"], []
    assert split() == 5 * 8
    assert mnist.ranges[0] not in (None, "bytes=0-")
    assert not pending(tmp_path)


def test_what_cannot_be_downloaded_is_said_in_one_line(mnist: Server, tmp_path: Path, monkeypatch):
    name = sorted(mnist.files)[0]
    good, mnist.files[name] = mnist.files[name], b"something else"
    assert "mnist is not in" in (message := refused())
    assert f"gave a file with md5 sum {hashlib.md5(b'something else').hexdigest()} where" in message
    assert "or set dataset.root" in message
    mnist.files[name], mnist.script = good, ["404"]
    assert "404" in refused()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}/"
    sources = SOURCES["MNIST"]
    monkeypatch.setitem(SOURCES, "MNIST", [each._replace(urls=(closed + each.name,)) for each in sources])
    assert "refused" in refused()
    asked = len(mnist.ranges)
    assert "mnist is not in" in (message := refused(download=False))
    assert "dataset.download=false" in message and "cannot download" not in message
    assert len(mnist.ranges) == asked
    assert leftovers(tmp_path) == []


def test_a_second_mirror_is_tried(mnist: Server, tmp_path: Path, monkeypatch):
    gone = [each._replace(urls=(mnist.url + "gone/" + each.name, *each.urls)) for each in SOURCES["MNIST"]]
    monkeypatch.setitem(SOURCES, "MNIST", gone)
    assert split() == 5 * 8
    assert leftovers(tmp_path) == ["MNIST"]


def test_files_that_were_put_there_by_hand(mnist: Server, tmp_path: Path):
    mnist.script = ["404"]
    place = tmp_path / "data" / "torchvision" / "MNIST.downloads"
    assert f"and 3 more in {place}" in refused(download=False)
    place.mkdir(parents=True)
    for name, body in mnist.files.items():
        (place / name).write_bytes(body)
    first = place / min(mnist.files)
    first.write_bytes(b"another")
    assert f"{first} has the md5 sum" in refused(download=False)
    first.write_bytes(mnist.files[first.name])
    assert split(download=False) == 5 * 8
    assert not mnist.ranges


def test_damaged_files_are_got_again_but_a_users_own_are_left(mnist: Server, tmp_path: Path):
    assert split() == 5 * 8
    raw = tmp_path / "data" / "torchvision" / "MNIST" / "raw"
    (raw / "train-images-idx3-ubyte").unlink()
    assert split(resize="crop") == 5 * 8
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
            tar.addfile(extra, io.BytesIO(bytes(extra.size)))
    return buffer.getvalue()


@pytest.fixture
def textures(server: Server, monkeypatch: pytest.MonkeyPatch):
    def serve(body: bytes, verified: bool = True) -> None:
        server.files["dtd.tar.gz"] = body
        md5 = hashlib.md5(body).hexdigest() if verified else None
        source = Source((server.url + "dtd.tar.gz",), md5, "dtd", "tar")
        monkeypatch.setitem(SOURCES, "DTD", [source])

    return serve


def test_an_unpacking_that_was_stopped_is_not_taken_for_whole(textures, tmp_path: Path, monkeypatch):
    textures(texture_archive())
    extract = tarfile.TarFile.extractall

    def stopped(tar: tarfile.TarFile, path: str, **settings) -> None:
        extract(tar, path, **(settings | {"members": tar.getmembers()[:5]}))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tarfile.TarFile, "extractall", stopped)
        split("dtd")
    assert leftovers(tmp_path) == []
    half = tmp_path / "data" / "torchvision" / ".DTD.tmp" / "dtd" / "dtd" / "images"  # as after kill -9
    half.mkdir(parents=True)
    assert split("dtd") == 2 * 3
    assert leftovers(tmp_path) == ["dtd"]


def odd_member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


HOSTILE = {
    "a name that leads out": odd_member("../../../evil"),
    "a name that leads out on Windows": odd_member("dtd\\..\\..\\evil"),
    "an absolute name": odd_member(f"{tempfile.gettempdir()}/evil-of-metarun"),
    "a drive": odd_member("C:/evil"),
    "a link that leads out": odd_member("dtd/images/link", tarfile.SYMTYPE, "../../../../outside"),
    "a link that stays inside": odd_member("dtd/images/link", tarfile.SYMTYPE, "kind1"),
    "a hard link that leads out": odd_member("dtd/images/link", tarfile.LNKTYPE, "../outside"),
    "a device": odd_member("dtd/images/device", tarfile.CHRTYPE),
    "a pipe": odd_member("dtd/images/pipe", tarfile.FIFOTYPE),
    "an absurd header": odd_member("dtd/long", tarfile.GNUTYPE_LONGNAME, size=3 << 20),
    "an absurd size": odd_member("dtd/images/bomb", size=3 << 20),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("filtered", [True, False], ids=["with tarfile's filter", "without"])
def test_a_hostile_archive_is_refused(textures, tmp_path: Path, monkeypatch, name: str, filtered: bool):
    """By our own checks: also where tarfile's filter lets everything pass."""
    monkeypatch.setattr(archives, "SIZE_LIMIT", 1 << 20)
    if not filtered:
        monkeypatch.setattr(tarfile, "data_filter", tarfile.fully_trusted_filter)
        extract = tarfile.TarFile.extractall

        def trusting(tar: tarfile.TarFile, path: Path, **settings) -> None:
            extract(tar, path, **(settings | {"filter": "fully_trusted"}))

        monkeypatch.setattr(tarfile.TarFile, "extractall", trusting)
    textures(texture_archive(HOSTILE[name]))
    message = refused("dtd")
    assert "dtd is not in" in message and "gave a file that cannot be used (it" in message
    assert leftovers(tmp_path) == pending(tmp_path) == []
    assert not [path for path in tmp_path.rglob("*") if path.name in ("evil", "outside", "link", "bomb")]
    assert not Path(HOSTILE["an absolute name"].name).exists()
    textures(texture_archive())
    assert split("dtd") == 2 * 3  # got again, and now good


def test_a_damaged_archive_is_refused(textures, tmp_path: Path):
    whole = texture_archive()
    foreign = io.BytesIO()
    with tarfile.open(fileobj=foreign, mode="w:gz") as tar:
        tar.addfile(odd_member("something/else"))
    for body in (whole[: len(whole) // 2], b"no archive", foreign.getvalue()):
        textures(body, verified=False)
        assert "it was deleted: try again later" in refused("dtd")
        assert leftovers(tmp_path) == pending(tmp_path) == []


ODD_ZIPS = {
    "a name that leads out": ("../evil", b"", 0, "leads out"),
    "an absolute name": ("/evil", b"", 0, "leads out"),
    "a link": ("link", b"/etc/passwd", 0o120777 << 16, "is a link"),
    "an absurd size": ("bomb", bytes(3 << 20), 0, "unpacks to more than"),
    "one name twice": ("good/evil", b"", 0, "have one name"),
}


@pytest.mark.parametrize("name", ODD_ZIPS)
def test_a_hostile_zip_is_refused(tmp_path: Path, monkeypatch, name: str):
    monkeypatch.setattr(archives, "SIZE_LIMIT", 1 << 20)
    path, body, mode, says = ODD_ZIPS[name]
    info = zipfile.ZipInfo(path)
    info.create_system, info.external_attr, info.compress_type = 3, mode, zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("good", b"good")
        packed.writestr(info, body)
    with pytest.raises(archives.BadArchive, match=says) as failure:
        archives.unzip(tmp_path / "a.zip", tmp_path / "in" / "side")
    assert "\n" not in str(failure.value) and str(tmp_path / "a.zip") in str(failure.value)
    assert {path.name for path in tmp_path.rglob("*")} <= {"a.zip", "in", "side", "good"}


def test_zips_and_gzips_are_unpacked_to_their_end_or_refused(tmp_path: Path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("b/c.txt", b"content")
        packed.writestr("d/", b"")
    archives.unzip(tmp_path / "a.zip", tmp_path / "good")
    assert (tmp_path / "good" / "b" / "c.txt").read_bytes() == b"content"
    assert (tmp_path / "good" / "d").is_dir()
    (tmp_path / "a.zip").write_bytes((tmp_path / "a.zip").read_bytes().replace(b"content", b"contend"))
    with pytest.raises(archives.BadArchive, match="is damaged"):
        archives.unzip(tmp_path / "a.zip", tmp_path / "bad")
    body = gzip.compress(bytes(3 << 20))
    (tmp_path / "a.gz").write_bytes(body)
    archives.gunzip(tmp_path / "a.gz", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == bytes(3 << 20)
    for spoilt in (body[:-1], body[:-6] + b"?" + body[-5:], b"no gzip", body[:40] + b"???" + body[43:]):
        (tmp_path / "b.gz").write_bytes(spoilt)
        with pytest.raises(archives.BadArchive, match=r"b\.gz is damaged"):
            archives.gunzip(tmp_path / "b.gz", tmp_path / "b")
    monkeypatch.setattr(archives, "SIZE_LIMIT", 1 << 20)
    with pytest.raises(archives.BadArchive, match="unpacks to more than"):
        archives.gunzip(tmp_path / "a.gz", tmp_path / "c")


# what torchvision itself would download


def theirs(kind: str) -> set[tuple[str, str | None]]:
    """Each file's URLs and md5 sum by the installed torchvision; skips where it has other attributes."""
    own = getattr(sets, kind)
    try:
        if issubclass(own, sets.CIFAR10):
            return {(own.url, own.tgz_md5)}
        if kind == "EMNIST":
            return {(own.url, own.md5)}
        if issubclass(own, sets.MNIST):
            return {(mirror + name, md5) for mirror in own.mirrors for name, md5 in own.resources}
        if kind == "SVHN":
            return {(own.split_list[part][0], own.split_list[part][2]) for part in ("train", "test")}
        if kind == "Flowers102":
            return {(own._download_url_prefix + name, md5) for name, md5 in own._file_dict.values()}
        return {(own._URL, getattr(own, "_MD5", None))}
    except AttributeError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("kind", SOURCES)
def test_urls_and_sums_are_torchvisions(kind: str):
    assert {*SOURCES} == {kind for kind, _ in SETS.values()} | {"CIFAR100"}
    ours = {(source.urls[0], source.md5) for source in SOURCES[kind]}
    if kind != "GTSRB":
        other = theirs(kind)
        assert ours <= other
        assert {md5 for _, md5 in ours} == {md5 for _, md5 in other}
        return
    text = inspect.getsource(sets.GTSRB.download)  # has them inside the function
    for url, md5 in ours:
        folder, _, name = url.rpartition("/")
        assert md5 in text and name in text and folder in text


# every set's own files, tiny, in the layout of the real archives


def idx(*shape: int) -> bytes:
    """A file in MNIST's format: images of zeros, or the labels 1 to 9 in turn."""
    header = np.array([2048 + len(shape), *shape], ">i4").tobytes()
    size = int(np.prod(shape))
    return header + (bytes(size) if len(shape) > 1 else (np.arange(size) % 9 + 1).astype(np.uint8).tobytes())


def image(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, kind)
    return buffer.getvalue()


def tar_of(content: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, body in content.items():
            tar.addfile(odd_member(name, size=len(body)), io.BytesIO(body))
    return buffer.getvalue()


def zip_of(content: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, body in content.items():
            packed.writestr(name, body)
    return buffer.getvalue()


def aircraft_files() -> dict[str, bytes]:
    data = "fgvc-aircraft-2013b/data/"
    names = [f"plane {i}" for i in range(6)]
    content = {f"{data}variants.txt": "\n".join(names).encode()}
    for part in ("trainval", "test"):
        lines = [f"{part}{i} {name}" for i, name in enumerate(names)]
        content[f"{data}images_variant_{part}.txt"] = "\n".join(lines).encode()
        content |= {f"{data}images/{part}{i}.jpg": image("JPEG") for i in range(6)}
    return {"fgvc-aircraft-2013b.tar.gz": tar_of(content)}


def emnist_files() -> dict[str, bytes]:
    content = {"gzip/emnist-digits-train-images-idx3-ubyte.gz": gzip.compress(idx(9, 28, 28))}
    for part in ("train", "test"):
        content[f"gzip/emnist-letters-{part}-images-idx3-ubyte.gz"] = gzip.compress(idx(9, 28, 28))
        content[f"gzip/emnist-letters-{part}-labels-idx1-ubyte.gz"] = gzip.compress(idx(9))
    return {"gzip.zip": zip_of(content)}


def gtsrb_files() -> dict[str, bytes]:
    train = {f"GTSRB/Training/{i:05}/a.ppm": image("PPM") for i in range(6)}
    test = {f"GTSRB/Final_Test/Images/{i:05}.ppm": image("PPM") for i in range(6)}
    table = "\n".join(["Filename;ClassId", *(f"{i:05}.ppm;{i}" for i in range(6))])
    return {
        "GTSRB-Training_fixed.zip": zip_of(train),
        "GTSRB_Final_Test_Images.zip": zip_of(test),
        "GTSRB_Final_Test_GT.zip": zip_of({"GT-final_test.csv": table.encode()}),
    }


@pytest.mark.parametrize(
    ("name", "kind", "files", "images", "there"),
    [
        ("aircraft", "FGVCAircraft", aircraft_files, 2 * 2, ["fgvc-aircraft-2013b"]),
        ("emnist", "EMNIST", emnist_files, 2 * 2, ["EMNIST"]),
        ("gtsrb", "GTSRB", gtsrb_files, 2 * 2, ["gtsrb"]),
    ],
)
def test_sets_of_several_archives_and_layouts(
    server: Server, tmp_path: Path, monkeypatch, name, kind, files, images, there
):
    server.files = files()
    sources = [
        each._replace(urls=(server.url + each.name,), md5=hashlib.md5(server.files[each.name]).hexdigest())
        for each in SOURCES[kind]
    ]
    monkeypatch.setitem(SOURCES, kind, sources)
    assert split(name) == images
    assert leftovers(tmp_path) == there
    assert pending(tmp_path) == []
    if kind == "EMNIST":  # what torchvision does not need for the letters is not kept
        raw = tmp_path / "data" / "torchvision" / "EMNIST" / "raw"
        assert len(list(raw.iterdir())) == 4


def test_files_that_are_used_as_they_are(server: Server, tmp_path: Path, monkeypatch):
    """SVHN, which torchvision verifies by its own sums: these refuse our little files, unless replaced."""
    server.files = {"train_32x32.mat": b"one", "test_32x32.mat": b"two"}
    sources = [
        each._replace(urls=(server.url + each.name,), md5=hashlib.md5(server.files[each.name]).hexdigest())
        for each in SOURCES["SVHN"]
    ]
    monkeypatch.setitem(SOURCES, "SVHN", sources)
    assert "torchvision cannot read what was downloaded (Dataset not found or corrupted" in refused("svhn")
    wanted = {
        part: ["", f"{part}_32x32.mat", each.md5]
        for part, each in zip(("train", "test"), sources, strict=True)
    }
    monkeypatch.setattr(sets.SVHN, "split_list", wanted)
    scipy_io = pytest.importorskip("scipy.io")
    labels = np.arange(1, 9, dtype=np.uint8)[:, None]
    monkeypatch.setattr(
        scipy_io, "loadmat", lambda path: {"X": np.zeros((9, 9, 3, 8), np.uint8), "y": labels}
    )
    assert split("svhn") == 2 * 2
    assert leftovers(tmp_path) == ["test_32x32.mat", "train_32x32.mat"]


def test_cifar_is_not_blamed_on_the_network_when_that_may_not_be_used(server: Server):
    with pytest.raises(
        DataError, match=r"CIFAR-100 is not in .*, and dataset\.download=false: allow it, or put"
    ):
        CifarFS(download=False).split("train")
