"""Published sets of texts with the class splits of few-shot papers.

The files are those of the authors of the splits, at fixed commits:

- clinc150 (Larson et al. 2019), banking77 (Casanueva et al. 2020), hwu64 and liu57 (Liu et al. 2019), in
  the five folds of ProtAugment (Dopierre, Gravier and Logerais 2021);
- huffpost (Misra 2018), reuters (Lewis 1997) and fewrel (Han et al. 2018), with the splits of Bao et al.
  2020, "Few-shot Text Classification with Distributional Signatures";
- injongo (Yu et al. 2025), 40 intents in 17 languages, without a published class split: 20/5/15 by digest.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from metarun.datasets.base import Split, and_more, split_by_digest
from metarun.datasets.text import reading
from metarun.datasets.text.base import Reading, TextDataset, readable
from metarun.datasets.text.store import Corpus
from metarun.errors import ConfigError, DataError, first_line
from metarun.storage.downloads import download as fetch
from metarun.storage.files import data_dir, read_text, user_path

Name = Literal["clinc150", "banking77", "hwu64", "liu57", "huffpost", "reuters", "fewrel", "injongo"]
GITHUB = "https://raw.githubusercontent.com"
PROTAUGMENT = f"{GITHUB}/tdopierre/ProtAugment/4233bbae0d7544e632692c4d2c185b2ed2a19eef/data"
PROMPTER = f"{GITHUB}/ws-jiang/MetaPrompter_public/dea17d573a5eb4f31b3366ba1fe88b1beb865c50/data"
RELATIONS = f"{GITHUB}/hongwang600/Lifelong_Relation_Detection/436c983fa71129579a0ea53b3229a4e167d90506/data"
MASAKHANE = f"{GITHUB}/masakhane-io/masakhane-nlu/1f8be590da6699aee3dc23de6f63e801e2352eff"
LISTS = Path(__file__).with_name("classes")
OF_LETTER: dict[str, Split] = {"r": "train", "v": "validation", "e": "test"}
INJONGO = (20, 5, 15)  # classes
NUMBER = re.compile(r"\d\d ")  # in front of the names of the classes that Bao et al. number


class Labelled(NamedTuple):
    label: str
    language: str
    text: str


@dataclass(frozen=True)
class Published:
    """The files of a set.

    Args:
        file: its name as `Texts` would take it, a line `label<TAB>text` for each text, without .gz.
        urls: of the authors' files.
        md5: their MD5 sums, in the order of `urls`.
        read: reads one of the authors' files.
    """

    file: str
    urls: tuple[str, ...]
    md5: tuple[str, ...]
    read: Callable[[Path], Iterator[Labelled]]


def sentences(path: Path) -> Iterator[Labelled]:
    """ProtAugment's full.jsonl."""
    for row in reading.rows_of(path):
        text = reading.cell(row, "sentence")
        yield Labelled(reading.cell(row, "label"), "", text)


def numbered(path: Path) -> Iterator[Labelled]:
    """Bao's sets: the number of the class and the text."""
    for row in reading.rows_of(path):
        text = reading.cell(row, "raw")
        yield Labelled(f"{int(row.cells['label']):02}", "", text)


def relations(path: Path) -> Iterator[Labelled]:
    """FewRel's sentences: the number of the relation from 1, candidates, and the text."""
    for line in read_text(path).split("\n"):
        if line.strip():
            number, _, text, *_ = line.split("\t")
            yield Labelled(f"{int(number) - 1:02}", "", text.strip())


def utterances(path: Path) -> Iterator[Labelled]:
    """Injongo's files of one language, in the folder of its name."""
    for line in read_text(path).split("\n"):
        if line.strip():
            row = json.loads(line)
            yield Labelled(row["intent"], path.parent.name, row["text"].strip())


def _intents(folder: str, md5: str, name: str) -> Published:
    return Published(f"{name}.tsv", (f"{PROTAUGMENT}/{folder}/full.jsonl",), (md5,), sentences)


def _injongo() -> Published:
    listed = [line.split() for line in (LISTS / "injongo_files.txt").read_text("utf-8").splitlines()]
    urls, sums = zip(*((f"{MASAKHANE}/{path}", md5) for path, md5 in listed), strict=True)
    return Published("injongo.tsv", urls, sums, utterances)


PUBLISHED: dict[str, Published] = {
    "clinc150": _intents("OOS", "7eb75cc1f85047a483c8411e4196faf8", "clinc150"),
    "banking77": _intents("BANKING77", "ebfbb5aede987be58891691d66a8220d", "banking77"),
    "hwu64": _intents("HWU64", "22e44fbfb18fc5ee2b69c2d8dee8c3d6", "hwu64"),
    "liu57": _intents("Liu", "e5641379ee136a254d36a936f7ea9719", "liu57"),
    "huffpost": Published(
        "huffpost.tsv", (f"{PROMPTER}/huffpost.json",), ("e04dab1034df38f9bb4a62a4439ec2af",), numbered
    ),
    "reuters": Published(
        "reuters.tsv", (f"{PROMPTER}/reuters.json",), ("08571a6b1b2e40dfeae92ed49f546485",), numbered
    ),
    "fewrel": Published(
        "fewrel80_plain.tsv", (f"{RELATIONS}/val_data.txt",), ("4d43365343244c9e0da8c7261e8f3b8e",), relations
    ),
    "injongo": _injongo(),
}
COLUMNS = {"injongo": ("language", "part", "label", "text")}  # of the files in `dataset.root`


class PublishedTexts(TextDataset):
    """A published set of texts.

    Args:
        name: which.
        root: a folder with NAME.tsv or NAME.tsv.gz, or with the authors' files. None: these are downloaded.
        fold: of the sets of ProtAugment, which of the five splits; others have one.
        ngrams, length, vectors, encoder, finetune, centred, learned, descriptions, names_as_shots,
            support_language, query_language: see `Reading`.
        languages: of injongo, those that are used; None: all.
        download: whether files may be downloaded.

    Raises:
        ConfigError: a setting is out of range, or of another set.
    """

    def __init__(
        self,
        *,
        name: Name,
        root: str | None = None,
        fold: Literal[1, 2, 3, 4, 5] = 1,
        ngrams: list[int] | tuple[int, ...] = (3, 4),
        length: int = 256,
        vectors: str | None = None,
        encoder: str | None = None,
        finetune: bool = False,
        centred: bool | None = None,
        learned: str | None = None,
        descriptions: str | None = None,
        names_as_shots: bool = False,
        languages: list[str] | None = None,
        support_language: str | list[str] | None = None,
        query_language: str | list[str] | None = None,
        download: bool = True,
    ) -> None:
        super().__init__(
            Reading(
                ngrams=ngrams,
                length=length,
                vectors=vectors,
                encoder=encoder,
                finetune=finetune,
                centred=centred,
                learned=learned,
                descriptions=descriptions,
                names_as_shots=names_as_shots,
                support_language=support_language,
                query_language=query_language,
            )
        )
        if name != "injongo" and (languages or support_language or query_language):
            raise ConfigError(
                f"dataset.support_language, dataset.query_language: {name} has one language; leave them out"
            )
        if languages == []:
            raise ConfigError("dataset.languages=[]: name at least one language, or null for all")
        self.name, self.root, self.fold = name, root, fold
        self.languages, self.download = languages, download

    @property
    def title(self) -> str:
        return self.name

    def corpora(self) -> Mapping[Split, Corpus]:
        found: dict[str, dict[str, list[str]]] = {}
        for label, language, text in self.rows():
            if self.languages is None or language in self.languages:
                found.setdefault(label, {}).setdefault(language, []).append(text)
        if self.languages and (unknown := sorted({*self.languages} - {*next(iter(found.values()), {})})):
            raise ConfigError(f"dataset.languages: injongo has no {and_more(unknown)}")
        return {
            split: {label: self.texts_of(label, found) for label in labels}
            for split, labels in self.classes.items()
        }

    def description_of(self, label: str) -> str:
        return readable(label.removeprefix(number[0]) if (number := NUMBER.match(label)) else label)

    def texts_of(self, label: str, found: Mapping[str, dict[str, list[str]]]) -> dict[str, list[str]]:
        """The texts of a class, by language. Classes with a number are found by it."""
        for name in (label, label[:2]):
            if name in found:
                return found[name]
        raise DataError(f"{self.place()}: has no texts of class {label!r}; the file is not complete")

    @cached_property
    def classes(self) -> Mapping[Split, list[str]]:
        """The names of the classes of each split."""
        if self.name == "injongo":
            names = (LISTS / "injongo.txt").read_text("utf-8").split()
            return split_by_digest(names, INJONGO, "0 ")
        lines = (LISTS / f"{self.name}.txt").read_text("utf-8").splitlines()
        pairs = [line.split("\t") for line in lines]
        if self.fold > len(pairs[0][1]):
            raise ConfigError(f"dataset.fold={self.fold}: {self.name} has one split; leave it out")
        splits = {name: OF_LETTER[letters[self.fold - 1]] for name, letters in pairs}
        return {s: [name for name in splits if splits[name] == s] for s in OF_LETTER.values()}

    def rows(self) -> Iterator[Labelled]:
        """Every text. Raises DataError if files are missing, or a line is not as expected."""
        place = self.place()
        if place.is_file():
            columns = COLUMNS.get(self.name, ("label", "text"))
            for row in reading.rows_of(place, columns):
                label, text = (reading.cell(row, column) for column in ("label", "text"))
                yield Labelled(label, row.cells.get("language", ""), text)
            return
        for path in self.paths(place):
            try:
                yield from PUBLISHED[self.name].read(path)
            except (ValueError, KeyError) as error:
                raise DataError(
                    f"{path}: is not as its authors published it ({first_line(error)})"
                ) from error

    def place(self) -> Path:
        """The file of all texts, or the folder of the authors' files, downloaded if that is allowed."""
        made = PUBLISHED[self.name]
        if self.root is None:
            return self.downloaded()
        root = user_path(self.root)
        for folder in (root, root / self.name):
            for path in (folder / made.file, folder / f"{made.file}.gz"):
                if path.is_file():
                    return path
            if self.paths(folder):
                return folder
        raise DataError(
            f"dataset.root={self.root}: has no {made.file} or {made.file}.gz, a line LABEL<TAB>TEXT for each "
            f"text, and not the file{'s' * (len(made.urls) > 1)} of {made.urls[0]}; put one there, or leave "
            "dataset.root out"
        )

    def paths(self, folder: Path) -> list[Path]:
        """The authors' files below a folder; empty if one is missing."""
        found = [folder / self.file_of(url) for url in PUBLISHED[self.name].urls]
        return found if all(path.is_file() for path in found) else []

    def file_of(self, url: str) -> str:
        """Where a file is below the folder of its set: the languages of injongo are folders."""
        return "/".join(url.split("/")[-2 if self.name == "injongo" else -1 :])

    def downloaded(self) -> Path:
        folder, made = data_dir() / self.name, PUBLISHED[self.name]
        for url, md5 in zip(made.urls, made.md5, strict=True):
            path = folder / self.file_of(url)
            if not (self.download or path.exists()):
                raise DataError(
                    f"{self.name} is not at {path}, and dataset.download=false: put {url} there, or set "
                    "dataset.root to the folder that has it"
                )
            fetch(url, path, md5)
        return folder
