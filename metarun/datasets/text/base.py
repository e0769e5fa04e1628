"""What datasets of texts have in common, and one's own files of texts."""

from __future__ import annotations

import copy
import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from metarun.datasets.base import Dataset, OwnQueries, OwnTask, Split, Splits, and_more, at_least
from metarun.datasets.text import reading
from metarun.datasets.text.encoder import Encoder
from metarun.datasets.text.pieces import Pieces, Tokenizer
from metarun.datasets.text.store import Corpus, Encoding, Languages, TextStore, shortened
from metarun.datasets.text.tokens import Tokens
from metarun.datasets.text.vectors import Vectors
from metarun.datasets.text.word_vectors import WordVectors
from metarun.errors import ConfigError, DataError
from metarun.storage.files import user_path
from metarun.tasks.spec import TaskSpec

TOKENIZER = "tokenizer.json"  # in the files that a checkpoint keeps


@dataclass(frozen=True)
class Reading:
    """How the texts of a dataset are used; each is the setting of the same name.

    Args:
        ngrams, length: see `Tokens`; `length` also limits the tokens of an encoder.
        vectors: a file of word vectors, see `WordVectors`.
        encoder: a folder or a name, see `Encoder`. None, as of `vectors`: texts are token ids.
        finetune: whether the encoder is trained: texts are then its token ids, see `Pieces`.
        centred: whether the mean of the vectors of the training texts of a language is taken off the vectors
            of that language. None: of word vectors, which have much in common.
        learned: what a checkpoint keeps of vectors (`Vectors.dumps`) or of a tokenizer (`Tokenizer.dumps`).
        descriptions: a file with a description of each class, columns `label` and `description`; None: the
            name of a class is its description.
        names_as_shots: whether the description of a class is also one of its support examples.
        support_language, query_language: the languages of the support and of the queries, drawn for each
            task. None: any, the same for both.
    """

    ngrams: Sequence[int] = (3, 4)
    length: int = 256
    vectors: str | None = None
    encoder: str | None = None
    finetune: bool = False
    centred: bool | None = None
    learned: str | None = None
    descriptions: str | None = None
    names_as_shots: bool = False
    support_language: Sequence[str] | str | None = None
    query_language: Sequence[str] | str | None = None

    def encoding(self) -> Encoding:
        """Texts to items; without what is learned from the training texts, if that is not known.

        Raises:
            ConfigError: settings are out of range, or do not fit each other.
        """
        at_least(1, length=self.length, ngrams=list(self.ngrams))
        if self.vectors is not None and self.encoder is not None:
            raise ConfigError(
                "dataset.vectors, dataset.encoder: one of them makes the vectors; leave one out"
            )
        if self.finetune and self.encoder is None:
            raise ConfigError("dataset.finetune=true: needs dataset.encoder=FOLDER_OR_NAME; set it too")
        if self.finetune and self.centred:
            raise ConfigError(
                "dataset.centred=true: is for vectors, not for dataset.finetune=true; leave it out"
            )
        if self.vectors is not None:
            return Vectors.like(WordVectors(self.vectors), self.learned)
        if self.encoder is not None:
            encoder = Encoder(self.encoder, self.length)
            return Pieces(encoder) if self.finetune else Vectors.like(encoder, self.learned)
        if self.centred:
            raise ConfigError(
                "dataset.centred=true: is for dataset.vectors and dataset.encoder; leave it out"
            )
        return Tokens(tuple(self.ngrams), self.length)

    @property
    def is_centred(self) -> bool:
        return self.vectors is not None if self.centred is None else self.centred

    def languages(self) -> Languages:
        support, query = (several(each) for each in (self.support_language, self.query_language))
        return Languages(support, query)


def several(names: Sequence[str] | str | None) -> tuple[str, ...]:
    """The names in a setting that is a name, a list of names, or None."""
    return (names,) if isinstance(names, str) else tuple(names or ())


class TextDataset(Dataset):
    """Classes of texts. A subclass reads its files in `corpora`.

    Args:
        options: how the texts are used.

    Raises:
        ConfigError: a setting is out of range.
    """

    unread: ClassVar = {"ngrams": ("vectors!=null", "encoder!=null"), "length": "vectors!=null"}
    of_model = ("ngrams", "length", "finetune", "centred", "learned", "vectors", "encoder")
    relocates = ("vectors", "encoder")

    def __init__(self, options: Reading) -> None:
        self.options = options
        self.encoding = options.encoding()

    @abstractmethod
    def corpora(self) -> Mapping[Split, Corpus]:
        """The texts of each split that there is. Raises DataError, naming the file and the line."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What messages call the dataset."""

    @cached_property
    def _corpora(self) -> Mapping[Split, Corpus]:
        return self.corpora()

    @property
    def cached_as(self) -> str:
        """The name of the dataset in the cache."""
        return self.title

    @property
    def spec(self) -> TaskSpec:
        made = self.encoding
        spec = TaskSpec(made.item_shape, item_dtype=made.item_dtype, vocabulary=made.vocabulary)
        if not isinstance(made, Pieces):
            return spec
        return replace(spec, pretrained=made.tokenizer.network, static=False)  # its code cannot be traced

    @property
    def preparation(self) -> Encoding:
        return self.learned

    @property
    def decided(self) -> dict[str, Any]:
        made = self._known
        if isinstance(made, Pieces):
            return {"learned": made.tokenizer.dumps()}
        return {"learned": made.dumps()} if isinstance(made, Vectors) else {}

    @property
    def files(self) -> dict[str, str]:
        return {TOKENIZER: self.encoding.tokenizer.content} if isinstance(self.encoding, Pieces) else {}

    def with_files(self, files: Mapping[str, str]) -> TextDataset:
        made, learned = self.encoding, self.options.learned
        if not isinstance(made, Pieces) or learned is None or TOKENIZER not in files:
            return self
        return self.encoded_by(replace(made, given=Tokenizer.loads(learned, files[TOKENIZER])))

    def prepared_like(self, trained: Any) -> TextDataset:
        if not isinstance(trained, (Tokens, Vectors, Pieces)):  # of a model for something else
            return self
        own = self.encoding  # a dataset may say where the model of training is now
        if isinstance(own, Vectors) and isinstance(trained, Vectors):
            here, then = own.model, trained.model
            trained = replace(trained, model=then.at(here) if here.setting == then.setting else then)
        return self.encoded_by(trained)

    def encoded_by(self, encoding: Encoding) -> TextDataset:
        """This dataset with another encoding, which is complete."""
        twin = copy.copy(self)
        for name in ("learned", "_known"):  # what was made without it
            twin.__dict__.pop(name, None)
        twin.encoding, twin.options = encoding, replace(self.options, centred=False)
        return twin

    @cached_property
    def learned(self) -> Encoding:
        """The encoding, with the means of the training texts where they are taken off. Raises DataError."""
        if not (isinstance(self.encoding, Vectors) and self.options.is_centred) or self.encoding.means:
            return self.encoding
        if "train" not in self._corpora:
            raise DataError(
                f"{self.title}: has no training classes, whose mean dataset.centred takes off; set "
                "dataset.centred=false"
            )
        known = self.encoding.knowing(self._every_text, self.cached_as)
        pairs = [
            (text, language)
            for by_language in self._corpora["train"].values()
            for language, texts in by_language.items()
            for text in texts
        ]
        centred = known.centred(*map(list, zip(*pairs, strict=True)))
        return replace(centred, known=None)

    @cached_property
    def _known(self) -> Encoding:
        """The encoding with the items of all texts, if these are cached."""
        return self.learned.knowing(self._every_text, self.cached_as)

    @property
    def _every_text(self) -> Iterator[str]:
        """The texts and the descriptions of all splits."""
        for corpus in self._corpora.values():
            for label, by_language in corpus.items():
                yield self._description(label)
                for texts in by_language.values():
                    yield from texts

    def _description(self, label: str) -> str:
        return self._descriptions.get(label) or self.description_of(label)

    def splits(self) -> tuple[Split, ...]:
        return tuple(self._corpora)

    def split(self, name: Split, device: torch.device | str = "cpu") -> TextStore:
        """The classes of one split. Raises DataError."""
        return self.load(name, device)

    def _corpus(self, name: Split) -> Corpus:
        """The texts of one split. Raises DataError."""
        if name not in self._corpora:
            raise DataError(
                f"{self.title}: has no classes for {name}, but for {', '.join(self._corpora)}; choose "
                "another file, or split=test in eval and adapt"
            )
        return self._corpora[name]

    def load(self, name: Splits, device: torch.device | str = "cpu") -> TextStore:
        corpora = [self._corpus(each) for each in self.parts_of(name)]
        return self._store({label: texts for own in corpora for label, texts in own.items()}, name, device)

    def _store(self, corpus: Corpus, name: str, device: torch.device | str) -> TextStore:
        descriptions = [self._description(label) for label in corpus]
        languages, names_as_shots = self.options.languages(), self.options.names_as_shots
        return TextStore(
            corpus,
            descriptions,
            self._known,
            f"{self.title} {name}",
            device,
            languages,
            names_as_shots,
            self._corpora.get("train"),
        )

    def description_of(self, label: str) -> str:
        """The description of a class where no file has one: its name as words."""
        return readable(label)

    @cached_property
    def _descriptions(self) -> Mapping[str, str]:
        """The descriptions in the file that the setting names; empty without one. Raises DataError."""
        if self.options.descriptions is None:
            return {}
        path = user_path(self.options.descriptions)
        found = read_descriptions(path)
        labels = {label for corpus in self._corpora.values() for label in corpus}
        if missing := sorted(labels - found.keys()):
            raise DataError(f"{path}: has no description of class {and_more(missing)}; add a line for each")
        return found

    def own_task(self, support: Path, query: str | None) -> OwnTask:
        """The task in files of texts; see `Dataset.own_task`.

        Args:
            support: a file with columns `text` and `label`, or `label` and `description` for a task without
                examples; or class folders of .txt files. A column `language` is read where vectors are
                centred by language.
            query: a file with a column `text`, and `label` where it is known; a folder of .txt files, also in
                class folders; or a list of texts as JSON.
        """
        examples = own_support(support)
        classes = list(dict.fromkeys(each.label or "" for each in examples))
        if len(classes) < 2:
            raise DataError(f"{support}: has one class, {classes[0]!r}, and a task needs two; add another")
        queries = [] if query is None else own_queries(query, classes)
        # Together, since an encoder rounds by the texts that it encodes at once.
        support_x, query_x = self._encoded([*examples, *queries]).split([len(examples), len(queries)], 1)
        support_y = numbered(examples, classes)
        if query is None:
            return OwnTask(support_x, support_y, None, None, classes, [])
        names = [shortened(each.text) for each in queries]
        return OwnTask(support_x, support_y, query_x, numbered(queries, classes), classes, names)

    def own_queries(self, query: str, classes: Sequence[str]) -> OwnQueries:
        """The queries in a file, a folder or a list; see `own_task`."""
        queries = own_queries(query, classes)
        names = [shortened(each.text) for each in queries]
        return OwnQueries(self._encoded(queries), numbered(queries, classes), names)

    def examples(self, items: Sequence[Any]) -> Tensor:
        """Texts as inputs of the model. Raises DataError unless they are texts."""
        for item in items:
            if not isinstance(item, str) or not item.strip():
                raise DataError(
                    f"examples: {item!r} is not a text; this model takes texts that are not empty"
                )
        return self._encoded([OwnText(None, str(item)) for item in items])[0]

    def _encoded(self, texts: Sequence[OwnText]) -> Tensor:
        """Inputs of the model, [1, texts, *item]."""
        items, _ = self.learned.encode([each.text for each in texts], [each.language for each in texts])
        return self.learned.decode(items).unsqueeze(0)


class OwnText(NamedTuple):
    """A text of a user; its class is None and its language "" where they are not known."""

    label: str | None
    text: str
    language: str = ""


def numbered(texts: Sequence[OwnText], classes: Sequence[str]) -> Tensor:
    """Class numbers [1, texts]; -1 where the class is not known."""
    return torch.tensor([[-1 if each.label is None else classes.index(each.label) for each in texts]])


def readable(label: str) -> str:
    """The name of a class as words: "next_holiday" is "next holiday"."""
    return " ".join(re.sub(r"[_/.-]+", " ", label).split()) or label


def read_descriptions(path: Path) -> dict[str, str]:
    """The descriptions of classes in a file with columns `label` and `description`. Raises DataError."""
    found: dict[str, str] = {}
    for row in reading.rows_of(path):
        label = reading.cell(row, "label")
        if label in found:
            raise DataError(f"{row.place}: class {label!r} has a description already; remove one")
        found[label] = reading.cell(row, "description")
    return found


def own_support(path: Path) -> list[OwnText]:
    """Classes and texts of a user's support, or classes and their descriptions. Raises DataError."""
    if path.is_dir():
        return [OwnText(label, reading.whole_text(file)) for label, file in reading.text_files(path)]
    rows = list(reading.rows_of(path))
    if not rows:
        raise DataError(f"{path}: has no texts; write a line of headings, text,label, and a line for each")
    if "text" not in rows[0].cells and "description" in rows[0].cells:
        return [OwnText(*pair) for pair in read_descriptions(path).items()]
    return [OwnText(reading.cell(row, "label"), reading.cell(row, "text"), language_of(row)) for row in rows]


def own_queries(query: str, classes: Sequence[str]) -> list[OwnText]:
    """The classes, where they are known, and the texts of a user's queries. Raises DataError, ConfigError."""
    if query.lstrip().startswith("["):
        try:
            texts: Any = json.loads(query)
        except ValueError as error:
            raise ConfigError(f'query={query}: is not a list of texts as JSON, ["..."] ({error})') from None
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ConfigError(f'query={query}: write a list of texts, ["..."]; none may be empty')
        return [OwnText(None, text) for text in texts]
    path = user_path(query)
    if not path.exists():
        raise DataError(f"query={query}: no such file; texts are typed as a list, query='[\"...\"]'")
    if path.is_dir():
        loose = [(None, file) for file in sorted(path.glob("*.txt"))]
        files: list[tuple[str | None, Path]] = [*loose] if loose else [*reading.text_files(path)]
        return [OwnText(known(label, classes, str(file)), reading.whole_text(file)) for label, file in files]
    rows = list(reading.rows_of(path))
    if not rows:
        raise DataError(f"{path}: has no texts; write a line of headings, text, and a line for each")
    labels = [row.cells["label"].strip() or None if "label" in row.cells else None for row in rows]
    return [
        OwnText(known(label, classes, row.place), reading.cell(row, "text"), language_of(row))
        for label, row in zip(labels, rows, strict=True)
    ]


def language_of(row: reading.Row) -> str:
    """The language of a text in a user's file, "" if it says none."""
    return row.cells.get("language", "").strip()


def known(label: str | None, classes: Sequence[str], place: str) -> str | None:
    """The class of a query, or None. Raises DataError if the support has no such class."""
    if label is not None and label not in classes:
        raise DataError(
            f"{place}: class {label!r} is not in the support, which has {', '.join(classes)}; correct it, or "
            "leave the class of this query empty"
        )
    return label
