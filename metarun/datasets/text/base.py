"""What datasets of texts have in common, and one's own files of texts."""

from __future__ import annotations

import copy
import json
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from metarun.datasets.base import Dataset, OwnTask, Split, and_more, at_least
from metarun.datasets.text import reading
from metarun.datasets.text.store import Corpus, Encoding, Languages, TextStore, shortened
from metarun.datasets.text.tokens import Tokens
from metarun.errors import ConfigError, DataError
from metarun.storage.files import user_path
from metarun.tasks.spec import TaskSpec

NUMBER = re.compile(r"\d+ (?=\S)")  # in front of the name of a class that its publishers number


@dataclass(frozen=True)
class Reading:
    """How the texts of a dataset are used; each is the setting of the same name.

    Args:
        ngrams, length: see `Tokens`.
        descriptions: a file with a description of each class, columns `label` and `description`; None: the
            name of a class is its description.
        names_as_shots: whether the description of a class is also one of its support examples.
        support_language, query_language: the languages of the support and of the queries, drawn for each
            task. None: any, the same for both.
    """

    ngrams: Sequence[int] = (3, 4)
    length: int = 256
    descriptions: str | None = None
    names_as_shots: bool = False
    support_language: Sequence[str] | str | None = None
    query_language: Sequence[str] | str | None = None

    def encoding(self) -> Encoding:
        at_least(1, length=self.length, ngrams=list(self.ngrams))
        return Tokens(tuple(self.ngrams), self.length)

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
    def spec(self) -> TaskSpec:
        made = self.encoding
        return TaskSpec(made.item_shape, item_dtype=made.item_dtype, vocabulary=made.vocabulary)

    @property
    def preparation(self) -> Encoding:
        return self.encoding

    def prepared_like(self, trained: Encoding) -> TextDataset:
        twin = copy.copy(self)
        twin.encoding = trained
        return twin

    def splits(self) -> tuple[Split, ...]:
        return tuple(self._corpora)

    def split(self, name: Split, device: torch.device | str = "cpu") -> TextStore:
        """The classes of one split. Raises DataError."""
        if name not in self._corpora:
            raise DataError(
                f"{self.title}: has no classes for {name}, but for {', '.join(self._corpora)}; choose "
                "another file, or split=test in eval and adapt"
            )
        return self._store(self._corpora[name], name, device)

    def load(self, name: Split | Literal["all"], device: torch.device | str = "cpu") -> TextStore:
        if name != "all":
            return self.split(name, device)
        every = {label: texts for corpus in self._corpora.values() for label, texts in corpus.items()}
        return self._store(every, name, device)

    def _store(self, corpus: Corpus, name: str, device: torch.device | str) -> TextStore:
        descriptions = [self._descriptions.get(label, readable(label)) for label in corpus]
        languages, names_as_shots = self.options.languages(), self.options.names_as_shots
        return TextStore(
            corpus,
            descriptions,
            self.encoding,
            f"{self.title} {name}",
            device,
            languages,
            names_as_shots,
            self._corpora.get("train"),
        )

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
                examples; or class folders of .txt files.
            query: a file with a column `text`, and `label` where it is known; a folder of .txt files, also in
                class folders; or a list of texts as JSON.
        """
        examples = own_support(support)
        classes = list(dict.fromkeys(label for label, _ in examples))
        if len(classes) < 2:
            raise DataError(f"{support}: has one class, {classes[0]!r}, and a task needs two; add another")
        support_y = torch.tensor([[classes.index(label) for label, _ in examples]])
        support_x = self._items([text for _, text in examples])
        if query is None:
            return OwnTask(support_x, support_y, None, None, classes, [])
        queries = own_queries(query, classes)
        query_y = torch.tensor([[-1 if label is None else classes.index(label) for label, _ in queries]])
        names = [shortened(text) for _, text in queries]
        return OwnTask(support_x, support_y, self._items([t for _, t in queries]), query_y, classes, names)

    def _items(self, texts: Sequence[str]) -> Tensor:
        """Texts as a network takes them, as one task [1, texts, *item]."""
        return self.encoding.decode(self.encoding.encode(texts)[0]).unsqueeze(0)


def readable(label: str) -> str:
    """The name of a class as words: "next_holiday" is "next holiday"; without the number in front of it."""
    return " ".join(re.sub(r"[_/.-]+", " ", NUMBER.sub("", label, count=1)).split()) or label


def read_descriptions(path: Path) -> dict[str, str]:
    """The descriptions of classes in a file with columns `label` and `description`. Raises DataError."""
    found: dict[str, str] = {}
    for row in reading.rows_of(path):
        label = reading.cell(row, "label")
        if label in found:
            raise DataError(f"{row.place}: class {label!r} has a description already; remove one")
        found[label] = reading.cell(row, "description")
    return found


def own_support(path: Path) -> list[tuple[str, str]]:
    """Classes and texts of a user's support, or classes and their descriptions. Raises DataError."""
    if path.is_dir():
        return [(label, reading.whole_text(file)) for label, file in reading.text_files(path)]
    rows = list(reading.rows_of(path))
    if not rows:
        raise DataError(f"{path}: has no texts; write a line of headings, text,label, and a line for each")
    if "text" not in rows[0].cells and "description" in rows[0].cells:
        return list(read_descriptions(path).items())
    return [(reading.cell(row, "label"), reading.cell(row, "text")) for row in rows]


def own_queries(query: str, classes: Sequence[str]) -> list[tuple[str | None, str]]:
    """The classes, where they are known, and the texts of a user's queries. Raises DataError, ConfigError."""
    if query.lstrip().startswith("["):
        try:
            texts: Any = json.loads(query)
        except ValueError as error:
            raise ConfigError(f'query={query}: is not a list of texts as JSON, ["..."] ({error})') from None
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise ConfigError(f'query={query}: write a list of texts, ["..."]; none may be empty')
        return [(None, text) for text in texts]
    path = user_path(query)
    if not path.exists():
        raise DataError(f"query={query}: no such file; texts are typed as a list, query='[\"...\"]'")
    if path.is_dir():
        loose = [(None, file) for file in sorted(path.glob("*.txt"))]
        files: list[tuple[str | None, Path]] = [*loose] if loose else [*reading.text_files(path)]
        return [(known(label, classes, str(file)), reading.whole_text(file)) for label, file in files]
    rows = list(reading.rows_of(path))
    if not rows:
        raise DataError(f"{path}: has no texts; write a line of headings, text, and a line for each")
    labels = [row.cells["label"].strip() or None if "label" in row.cells else None for row in rows]
    return [
        (known(label, classes, row.place), reading.cell(row, "text"))
        for label, row in zip(labels, rows, strict=True)
    ]


def known(label: str | None, classes: Sequence[str], place: str) -> str | None:
    """The class of a query, or None. Raises DataError if the support has no such class."""
    if label is not None and label not in classes:
        raise DataError(
            f"{place}: class {label!r} is not in the support, which has {', '.join(classes)}; correct it, or "
            "leave the class of this query empty"
        )
    return label
