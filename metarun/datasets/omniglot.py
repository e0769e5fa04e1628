"""Omniglot: handwritten characters of 50 alphabets, 20 drawings each.

Lake, Salakhutdinov and Tenenbaum, "Human-level concept learning through probabilistic program
induction", Science 2015; https://github.com/brendenlake/omniglot, MIT licence.
"""

from __future__ import annotations

import copy
from functools import cache, cached_property
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch

from metarun.datasets.base import ImageDataset, Split, and_more, by_digest, select
from metarun.datasets.class_folders import Entry, class_store, entries
from metarun.errors import DataError
from metarun.storage.downloads import download
from metarun.storage.files import data_dir, user_path
from metarun.tasks.class_store import ClassStore
from metarun.tasks.source import SPLITS

URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
MD5 = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
Classes = Literal["maml", "maml_plus_plus", "vinyals", "lake"]
# Training and validation characters of the splits at random; the others are to test on.
AT_RANDOM = {"maml": (1100, 100), "maml_plus_plus": (1150, 50)}
TURNED = {"train": ("train",), "all": SPLITS, "none": ()}  # splits with rotated drawings, by `rotations`


class Character(NamedTuple):
    name: str  # Alphabet/characterNN
    piece: str  # images_background or images_evaluation
    vinyals: Split  # its split in Vinyals et al. 2016


@cache
def characters() -> list[Character]:
    """All 1,623 characters in order of their names."""
    found = []
    for line in Path(__file__).with_name("omniglot_vinyals.txt").read_text("utf-8").splitlines():
        if line.startswith("#"):
            continue
        piece, alphabet, numbers, split = line.split()
        first, last = map(int, numbers.split("-"))
        for number in range(first, last + 1):
            name = f"{alphabet}/character{number:02}"
            found.append(Character(name, f"images_{piece}", cast(Split, split)))
    return sorted(found)


def class_split(classes: Classes) -> dict[Split, list[str]]:
    """The names of the characters of each split, sorted.

    - `lake`, by alphabet (792/172/659): test has the evaluation set's 20 alphabets, as the authors
      intended; validation has five of the background set's 30, the same as in `vinyals`: Armenian,
      Bengali, Early_Aramaic, Hebrew and Mkhedruli_(Georgian).
    - `vinyals` (1,028/172/423): see omniglot_vinyals.txt; by alphabet except for Gurmukhi.
    - `maml` (1,100/100/423) and `maml_plus_plus` (1,150/50/423): random characters of all alphabets, as in
      Finn et al. 2017 and Antoniou et al. 2019. They published no lists; here the order is that of
      `by_digest`, with the same test characters in both.
    """
    if classes in AT_RANDOM:
        order = by_digest(character.name for character in characters())
        train, validation = AT_RANDOM[classes]
        held_out = train + validation
        return {
            "train": sorted(order[:train]),
            "validation": sorted(order[train:held_out]),
            "test": sorted(order[held_out:]),
        }
    by_piece = {"lake": "images_evaluation", "vinyals": None}[classes]
    parts: dict[Split, list[str]] = {"train": [], "validation": [], "test": []}
    for character in characters():
        parts["test" if character.piece == by_piece else character.vinyals].append(character.name)
    return parts


class Omniglot(ImageDataset):
    """The three splits of Omniglot, bright ink (255) on a dark ground (0).

    Args:
        root: a folder that holds images_background and images_evaluation, each as a zip or as a folder, or
            that holds a folder `omniglot` with them. None: the authors' zips, downloaded to
            METARUN_DATA/omniglot if they are not there yet.
        classes: which classes each split has, see `class_split`.
        rotations: the splits in which the drawings rotated by 90, 180 and 270 degrees are classes of their
            own: the training split, all or none.
        size: pixels a side.
        download: whether missing files may be downloaded.

    Raises:
        ConfigError: `size` is out of range.
    """

    drawings = True
    invert = True  # in the files ink is 0
    threaded = False  # several threads are slower: passing the GIL on costs more than these small files

    def __init__(
        self,
        *,
        root: str | None = None,
        classes: Classes = "maml",
        rotations: Literal["train", "all", "none"] = "train",
        size: int = 28,
        download: bool = True,
    ) -> None:
        super().__init__(size, channels=1, resize="stretch")
        self.root, self.classes, self.rotations, self.download = root, classes, rotations, download

    def for_trainval(self) -> Omniglot:
        """With rotated drawings of the validation characters, too, where the training split has them."""
        twin = copy.copy(self)
        twin.rotations = "all" if self.rotations == "train" else self.rotations
        return twin

    def known_classes(self, split: Split) -> tuple[str, int]:
        turns = 4 if split in TURNED[self.rotations] else 1
        return f"omniglot {split}", turns * len(class_split(self.classes)[split])

    def split(self, name: Split, device: torch.device | str = "cpu") -> ClassStore:
        """The classes of one split, sorted by name, rotated ones ('@90' and so on) after the others.

        Raises DataError if files are missing or damaged.
        """
        names = class_split(self.classes)[name]
        images, counts = select(self._characters, names)
        if name in TURNED[self.rotations]:
            images = torch.cat([images.rot90(turn, (-2, -1)) for turn in range(4)])  # counterclockwise
            names = names + [f"{each}@{degrees}" for degrees in (90, 180, 270) for each in names]
            counts = counts * 4
        return ClassStore(images, counts, names, f"omniglot {name}", device)

    @cached_property
    def _characters(self) -> ClassStore:
        """All 1,623 characters, sorted by name."""
        pieces = self._pieces()
        found: dict[str, list[Entry]] = {}
        for piece, path in pieces.items():
            found |= drawings_of(piece, path)
        classes = {character.name: found[character.name] for character in characters()}
        folder = next(iter(pieces.values())).parent
        return class_store(self, "omniglot", classes, folder)

    def _pieces(self) -> dict[str, Path]:
        """The zips or folders of the two pieces, downloaded if that is allowed. Raises DataError."""
        if self.root is not None:
            return self._pieces_below(user_path(self.root))
        folder = data_dir() / "omniglot"
        missing = [piece for piece in MD5 if piece not in pieces_in(folder)]
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
                raise DataError(
                    f"{error} (Omniglot needs {wanted} there, or in a folder that dataset.root names)"
                ) from error
        return pieces_in(folder)

    def _pieces_below(self, root: Path) -> dict[str, Path]:
        for folder in (root, root / "omniglot"):
            if found := pieces_in(folder):
                if len(found) == len(MD5):
                    return found
                there, missing = next(iter(found)), next(piece for piece in MD5 if piece not in found)
                raise DataError(
                    f"dataset.root={self.root}: {there} is in {folder}, but {missing} is not, as a zip or as "
                    f"a folder: put {URL}/{missing}.zip there, or leave dataset.root out"
                )
        raise DataError(
            f"dataset.root={self.root}: neither images_background nor images_evaluation, as a zip or as a "
            f"folder, is in {root} or {root / 'omniglot'}: put both zips of {URL} there, "
            "or leave dataset.root out"
        )


def pieces_in(folder: Path) -> dict[str, Path]:
    """The pieces that are in a folder; a zip is preferred to a folder, because it is listed faster."""
    paths = ((piece, folder / name) for piece in MD5 for name in (piece, f"{piece}.zip"))
    return {piece: path for piece, path in paths if path.exists()}


def drawings_of(piece: str, path: Path) -> dict[str, list[Entry]]:
    """The drawings of each character of a piece, by name.

    Raises DataError if a character is missing, or if there is one that Omniglot does not have.
    """
    found: dict[str, list[Entry]] = {}
    for entry in entries(path):
        if len(entry.parts) > 2 and entry.parts[-1].endswith(".png"):
            found.setdefault("/".join(entry.parts[-3:-1]), []).append(entry)
    wanted = [character.name for character in characters() if character.piece == piece]
    if missing := [name for name in wanted if name not in found]:
        raise DataError(
            f"{path} has no drawings of {and_more(missing)}, of {len(wanted)} characters: "
            f"get {URL}/{piece}.zip again"
        )
    if foreign := sorted(found.keys() - set(wanted)):
        raise DataError(f"{path} has {foreign[0]}, which is not a character of {piece}: remove it")
    return found
