"""Omniglot: handwritten characters of 50 alphabets, 20 drawings each.

Lake, Salakhutdinov and Tenenbaum, "Human-level concept learning through probabilistic program
induction", Science 2015; https://github.com/brendenlake/omniglot, MIT licence.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from metarun.archives import Archive, Folder
from metarun.downloads import download
from metarun.entries import memmap_cached
from metarun.episodes import ClassStore
from metarun.errors import ConfigError, DataError
from metarun.files import data_dir, encoded
from metarun.tracking import Bar

URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
MD5 = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
CHOICES = {"classes": ("maml", "vinyals", "lake"), "rotations": ("train", "all", "none")}


class Character(NamedTuple):
    name: str  # Alphabet/characterNN
    piece: str  # images_background or images_evaluation
    vinyals: str  # train, validation or test in the split of Vinyals et al. 2016


@cache
def characters() -> list[Character]:
    """All 1,623 characters in order of their names."""
    found = []
    for line in Path(__file__).with_name("omniglot_vinyals.txt").read_text("utf-8").splitlines():
        if line.startswith("#"):
            continue
        piece, alphabet, numbers, part = line.split()
        first, last = map(int, numbers.split("-"))
        for number in range(first, last + 1):
            found.append(Character(f"{alphabet}/character{number:02}", f"images_{piece}", part))
    return sorted(found)


def class_split(classes: str) -> dict[str, list[str]]:
    """The names of the characters to train on, for validation and to test, each sorted.

    - `lake`, by alphabet (792/172/659): test is the evaluation set's 20 alphabets, as the authors
      meant; validation is five of the background set's 30, the ones `vinyals` holds out: Armenian,
      Bengali, Early_Aramaic, Hebrew and Mkhedruli_(Georgian).
    - `vinyals` (1,028/172/423): see omniglot_vinyals.txt; by alphabet but for Gurmukhi.
    - `maml` (1,100/100/423): characters at random whatever their alphabet, as Finn et al. 2017 do.
      They published no list; here it is the order of the SHA-256 digests of the names.
    """
    if classes == "maml":
        order = sorted((character.name for character in characters()), key=_digest)
        return {
            "train": sorted(order[:1100]),
            "validation": sorted(order[1100:1200]),
            "test": sorted(order[1200:]),
        }
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for character in characters():
        evaluation = classes == "lake" and character.piece == "images_evaluation"
        parts["test" if evaluation else character.vinyals].append(character.name)
    return parts


def _digest(name: str) -> str:
    return hashlib.sha256(encoded(name)).hexdigest()


class Omniglot:
    """The three splits of Omniglot, bright ink (255) on a dark ground (0)."""

    drawings = True

    def __init__(
        self,
        *,
        root: str | None = None,
        classes: Literal["maml", "vinyals", "lake"] = "maml",
        rotations: Literal["train", "all", "none"] = "train",
        size: int = 28,
        download: bool = True,
    ) -> None:
        """Only notes the settings; `split` reads files. Raises ConfigError.

        `root`: a folder that holds images_background and images_evaluation, each as a zip or as the
        folder in it, or that holds a folder `omniglot` that does; None: upstream's zips, downloaded
        to METARUN_DATA/omniglot where they are not there yet. `rotations`: in which splits the
        drawings turned by 90, 180 and 270 degrees are classes of their own.
        """
        for setting, value in (("classes", classes), ("rotations", rotations)):
            if value not in CHOICES[setting]:
                raise ConfigError(f"dataset.{setting}={value!r}: choose one of {', '.join(CHOICES[setting])}")
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"dataset.size={size}: choose a whole number of pixels, such as 28")
        self.root = root
        self.classes = classes
        self.rotations = rotations
        self.size = size
        self.download = download
        self._decoded: dict[str, Any] | None = None

    @property
    def item_shape(self) -> tuple[int, int, int]:
        return (1, self.size, self.size)

    def split(
        self, name: Literal["train", "validation", "test"], device: torch.device | str = "cpu"
    ) -> ClassStore:
        """The classes of one split, sorted by name, turned ones ('@90' and so on) after the others.

        Raises DataError where files are missing or damaged.
        """
        if self._decoded is None:
            self._decoded = self._load()
        images, counts, names = _choose(self._decoded, class_split(self.classes)[name])
        if self.rotations == "all" or (self.rotations == "train" and name == "train"):
            images = torch.cat([images.rot90(turn, (-2, -1)) for turn in range(4)])  # counterclockwise
            names = names + [f"{each}@{degrees}" for degrees in (90, 180, 270) for each in names]
            counts = counts * 4
        return ClassStore(images, counts, names, f"omniglot {name}", device)

    def _load(self) -> dict[str, Any]:
        """All characters, as `decode` gives them, from the cache where these very files are in it."""
        sources = self._sources()
        identities = "\n".join(source.identity() for source in sources.values())
        # The 1 counts changes of what `decode` does.
        settings = f"1 {self.size}"

        def build(write: Callable[[bytes], object]) -> dict[str, Any]:
            decoded = decode(sources, self.size)
            write(decoded.pop("images").numpy().tobytes())
            return decoded

        source = os.path.commonpath([os.path.abspath(each.path) for each in sources.values()])
        name = f"omniglot-{_digest(settings + identities)[:24]}"
        content, made = memmap_cached(name, build, f"omniglot {settings} {source}", source)
        return made | {"images": content.view(-1, *self.item_shape)}

    def _sources(self) -> dict[str, Archive | Folder]:
        """Where the two pieces are; downloads them where that is allowed. Raises DataError."""
        if self.root is not None:
            return self._sources_below(Path(self.root).expanduser())
        folder = data_dir() / "omniglot"
        missing = [piece for piece in MD5 if _source(folder, piece) is None]
        wanted = " and ".join(f"{piece}.zip" for piece in missing)
        if missing and not self.download:
            raise DataError(
                f"Omniglot: no {wanted} in {folder}: put them there from {URL}, "
                "or set dataset.download=true, or dataset.root to the folder that has them"
            )
        for piece in missing:
            try:
                download(f"{URL}/{piece}.zip", folder / f"{piece}.zip", MD5[piece])
            except DataError as error:
                raise DataError(f"{error} (Omniglot lacks {wanted} there)") from error
        return _found(folder)

    def _sources_below(self, root: Path) -> dict[str, Archive | Folder]:
        for folder in (root, root / "omniglot"):
            if found := _found(folder):
                if len(found) == len(MD5):
                    return found
                there, lacking = next(iter(found)), next(piece for piece in MD5 if piece not in found)
                raise DataError(
                    f"dataset.root={self.root}: {there} is in {folder}, but {lacking} is not, as a zip or as "
                    f"a folder: put {URL}/{lacking}.zip there, or leave dataset.root out"
                )
        raise DataError(
            f"dataset.root={self.root}: neither images_background nor images_evaluation, as a zip or as a "
            f"folder, is in {root} or {root / 'omniglot'}: put both zips of {URL} there, "
            "or leave dataset.root out"
        )


def _source(folder: Path, piece: str) -> Archive | Folder | None:
    """One piece in a folder; a zip goes before a folder, for its listing is quicker."""
    if (folder / f"{piece}.zip").is_file():
        return Archive(folder / f"{piece}.zip")
    return Folder(folder / piece) if (folder / piece).is_dir() else None


def _found(folder: Path) -> dict[str, Archive | Folder]:
    pieces = {piece: _source(folder, piece) for piece in MD5}
    return {piece: source for piece, source in pieces.items() if source is not None}


def _choose(decoded: dict[str, Any], names: list[str]) -> tuple[Tensor, list[int], list[str]]:
    """Images [images, 1, size, size] and counts of the named classes, in their order, and the names."""
    images = dict(zip(decoded["names"], decoded["images"].split(decoded["counts"]), strict=True))
    chosen = [images[name] for name in names]
    return torch.cat(chosen), [len(each) for each in chosen], names


def decode(sources: dict[str, Archive | Folder], size: int) -> dict[str, Any]:
    """Read every drawing: `images` [images, 1, size, size] uint8, `counts` and `names` of the classes.

    Sorted by the name of the class, then of the file. Raises DataError for a character without
    drawings, one that is not Omniglot's, and a drawing that cannot be read.
    """
    members = {piece: _members(piece, source) for piece, source in sources.items()}
    pixels, counts = bytearray(), []
    # One thread: two are slower, since each drawing is too small to be worth letting go of the GIL.
    with Bar("decode Omniglot", len(characters()), "characters") as bar:
        for character in characters():
            files = members[character.piece][character.name]
            for file in files:
                pixels += _pixels(sources[character.piece], file, size)
            counts.append(len(files))
            bar.advance()
    images = 255 - torch.frombuffer(pixels, dtype=torch.uint8).view(-1, 1, size, size)  # upstream's ink is 0
    return {"images": images, "counts": counts, "names": [character.name for character in characters()]}


def _members(piece: str, source: Archive | Folder) -> dict[str, list[str]]:
    """The drawings of each character, by its name. Raises DataError unless all are there and no other."""
    found: dict[str, list[str]] = defaultdict(list)
    for file in source.names():
        parts = file.split("/")
        hidden = any(part.startswith((".", "__")) for part in parts)  # macOS adds __MACOSX/ and ._*
        if len(parts) > 2 and file.endswith(".png") and not hidden:
            found["/".join(parts[-3:-1])].append(file)
    wanted = [character.name for character in characters() if character.piece == piece]
    if missing := [name for name in wanted if name not in found]:
        others = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        raise DataError(
            f"{source.path} has no drawings of {missing[0]}{others}, of {len(wanted)} characters: "
            f"get {URL}/{piece}.zip again"
        )
    if foreign := sorted(set(found) - set(wanted)):
        raise DataError(f"{source.path} has {foreign[0]}, which is no character of {piece}: take it out")
    return found


def _pixels(source: Archive | Folder, file: str, size: int) -> bytes:
    """One drawing as size * size grey values. Raises DataError."""
    content = source.read(file)
    try:
        # As grey, since Pillow never antialiases 1-bit images; Lanczos keeps strokes bright and their
        # edges smooth at 28 pixels (Bilinear dims them, Box leaves steps).
        image = Image.open(io.BytesIO(content)).convert("L")
        return image.resize((size, size), Image.Resampling.LANCZOS).tobytes()
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise DataError(f"{source.path}: {file} is not an image that can be read: get it again") from error
