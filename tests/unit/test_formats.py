"""Image files that Pillow does not read: the message names the format, and plugins are used."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from metarun.datasets import formats, images
from metarun.errors import DataError

pytestmark = pytest.mark.quick

BOX = b"\0\0\0\x18ftyp"  # the first box of HEIC, AVIF and videos


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty; replace or remove it"),
        (BOX + b"heic\0\0\0\0mif1heic", "is a HEIC image; pip install pillow-heif, or convert it to PNG"),
        (BOX + b"mif1\0\0\0\0mif1", "is a HEIC image"),
        (BOX + b"mp42\0\0\0\0", "is a video; export its frames"),
        (b"\xff\x0a\xfa\x1f", "is a JPEG XL image; pip install pillow-jxl-plugin"),
        (b'\xef\xbb\xbf<?xml version="1.0"?><svg/>', "is an SVG or other XML file"),
        (b"\n<!DOCTYPE html><html>", "is a web page, perhaps of a failed download; get the image again"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer instead of the image"),
        (b"%PDF-1.7\n", "is a PDF document"),
        (b"PK\x03\x04....", "is an archive; extract it"),
        (b"a note", "is not an image; replace or remove it"),
    ],
)
def test_the_message_names_the_format(tmp_path: Path, content: bytes, says: str):
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    for file, name in ((path, ""), (io.BytesIO(content), str(path))):
        with pytest.raises(DataError) as error:
            images.read(file, name)
        assert str(error.value).startswith(f"{path}: {says}")


def test_formats_of_which_pillow_reads_some_kinds():
    assert formats.kind_of(b"MM\0*\0\0\0\x08")[0] == "a TIFF or camera raw image of an unsupported kind"
    assert formats.kind_of(b"RIFF\x10\0\0\0WEBPVP8 ")[0].startswith("a WebP image")
    assert formats.kind_of(BOX + b"avis")[1].startswith("pip install pillow-avif-plugin")


def test_installed_plugins_are_registered_but_nothing_from_the_working_folder(tmp_path: Path, monkeypatch):
    """`metarun` adds the working folder to the path, for a user's own classes."""
    package = "from pathlib import Path\ndef register_heif_opener(): Path({!r}).write_text('x')\n"
    for place in ("installed", "here"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "pillow_heif.py").write_text(package.format(str(tmp_path / f"{place}.txt")))
    monkeypatch.chdir(tmp_path / "here")
    others = [path for path in sys.path if not os.path.exists(os.path.join(path, "pillow_heif"))]
    for folder, traces in ((tmp_path / "here", []), ("", []), (tmp_path / "installed", ["installed.txt"])):
        monkeypatch.setattr(sys, "path", [*others, str(folder)])
        formats.register_plugins.cache_clear()
        formats.register_plugins()
        assert [each.name for each in tmp_path.glob("*.txt")] == traces
    monkeypatch.undo()
    sys.modules.pop("pillow_heif", None)
    formats.register_plugins.cache_clear()
