"""Small data sets of images on disk, and archives of them."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from metarun.datasets import mini_imagenet

NAMES = [f"class {i}" for i in range(8)]


def picture(path: Path, level: int, size: tuple[int, int] = (8, 8), mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colour: int | tuple[int, ...] = (
        level if mode in ("L", "1", "P") else (level,) * len(Image.new(mode, (1, 1)).getbands())
    )
    Image.new(mode, size, colour).save(path)


def tree(root: Path, names: list[str], each: int = 3, suffix: str = "png") -> Path:
    """Class folders of flat grey images; a class's number is its images' grey level."""
    for i, name in enumerate(names):
        for k in range(each):
            picture(root / name / f"{k}.{suffix}", 10 * i + k)
    return root


def zipped(folder: Path, target: Path) -> None:
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            archive.write(path, path.relative_to(folder.parent))


def levels(store) -> dict[str, list[int]]:
    """The grey level of every image, by class name."""
    means = store.items.float().mean((1, 2, 3)).round().int().tolist()
    found = {}
    for name, start, count in zip(store.names, store.starts.tolist(), store.counts.tolist(), strict=True):
        found[name] = means[start : start + count]
    return found


def mini_tree(root: Path, layout: str) -> Path:
    """Two tiny images of each of the 100 classes."""
    flat = root / "images"
    for split, wnids in mini_imagenet.class_split().items():
        folder = {"validation": "val"}.get(split, split)
        lines = ["filename,label"]
        for i, wnid in enumerate(wnids):
            for k in range(2):
                name = f"{wnid}{k:08}.jpg"
                picture((root / folder / wnid / name) if layout == "folders" else (flat / name), 2 * i + k)
                lines.append(f"{name},{wnid}")
        if layout != "folders":
            (root / f"{folder}.csv").write_text("\n".join(lines))
    return root


def mnist_files(root: Path, each: int = 4) -> Path:
    """Files in MNIST's own format (IDX), read by torchvision itself: digit d is of level 20 d."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        labels = np.arange(10, dtype=np.uint8).repeat(each)
        pixels = (20 * labels)[:, None, None].repeat(28, 1).repeat(28, 2)
        header = np.array([2051, len(labels), 28, 28], ">i4").tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
        header = np.array([2049, len(labels)], ">i4").tobytes()
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return root


def cub_tree(root: Path) -> Path:
    """CUB_200_2011 with two tiny photographs of each species, whose number is their grey level."""
    for number in range(1, 201):
        for k in range(2):
            picture(root / "CUB_200_2011" / "images" / f"{number:03}.Bird_{number}" / f"B_{k}.jpg", number)
    (root / "CUB_200_2011" / "images.txt").write_text("1 001.Bird_1/B_0.jpg\n")
    picture(root / "segmentations" / "001.Bird_1" / "B_0.png", 255)
    return root


def packed(folder: Path, target: Path) -> None:
    with tarfile.open(target, "w:gz") as tar:
        tar.add(folder, folder.name)


def member(name: str, **settings) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for key, value in settings.items():
        setattr(info, key, value)
    return info
