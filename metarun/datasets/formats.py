"""Files that Pillow does not read: which format they have, and the plugins that read some of them."""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import suppress
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import BinaryIO

# Plugins for Pillow, and the function of each that registers it; None: importing it does.
PLUGINS = {"pillow_heif": "register_heif_opener", "pillow_avif": None, "pillow_jxl": None}
CONVERT = "convert it to PNG or JPEG"
HEIF, AVIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"), (b"avif", b"avis")
# What a file of each kind begins with, what it is, and what to do.
BEGINNINGS: list[tuple[tuple[bytes, ...], str, str]] = [
    ((b"\xff\x0a", b"\0\0\0\x0cJXL "), "a JPEG XL image", f"pip install pillow-jxl-plugin, or {CONVERT}"),
    ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "a TIFF or camera raw image of an unsupported kind", CONVERT),
    ((b"<svg", b"<?xml"), "an SVG or other XML file", CONVERT),
    ((b"<!doctype html", b"<html"), "a web page, perhaps of a failed download", "get the image again"),
    ((b"version https://git-lfs",), "a Git LFS pointer instead of the image", "run git lfs pull"),
    ((b"%PDF",), "a PDF document", CONVERT),
    ((b"PK\x03\x04", b"\x1f\x8b", b"Rar!", b"7z\xbc\xaf"), "an archive", "extract it"),
    ((b"\x93NUMPY",), "a NumPy array", CONVERT),
]
LONGEST = 32  # bytes of a file that are enough to tell


def not_an_image(file: Path | BinaryIO) -> str:
    """What a file is that Pillow does not read, and what to do."""
    if isinstance(file, Path):
        with open(file, "rb") as opened:
            head = opened.read(LONGEST)
    else:
        file.seek(0)
        head = file.read(LONGEST)
    kind, advice = kind_of(head)
    return f"is {kind}; {advice}"


def kind_of(head: bytes) -> tuple[str, str]:
    """What a file is, by its first bytes, and what to do."""
    if not head:
        return "empty", "replace or remove it"
    if head[4:8] == b"ftyp":  # a container of ISO 14496-12, whose brand follows
        if head[8:12] in HEIF:
            return "a HEIC image", f"pip install pillow-heif, or {CONVERT}"
        if head[8:12] in AVIF:
            return "an AVIF image", f"pip install pillow-avif-plugin, or {CONVERT}"
        return "a video", "export its frames as images"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "a WebP image, damaged or unsupported by this Pillow", CONVERT
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    for beginnings, kind, advice in BEGINNINGS:
        if head.startswith(beginnings) or start.lower().startswith(beginnings):
            return kind, advice
    return "not an image", "replace or remove it"


@cache
def register_plugins() -> None:
    """Register the installed plugins for Pillow. A module in the working folder is not one."""
    installed = [path for path in sys.path if os.path.realpath(path or ".") != os.getcwd()]
    for name in [name for name in PLUGINS if PathFinder.find_spec(name, installed)]:
        with suppress(ImportError):  # a plugin for another version of Pillow
            module = importlib.import_module(name)
            if function := PLUGINS[name]:
                getattr(module, function)()
