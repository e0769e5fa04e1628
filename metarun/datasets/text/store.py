"""The texts of one split, grouped by class and by language, as items of a class store."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from metarun.datasets.text.tfidf import tfidf_references
from metarun.datasets.text.tokens import normalised
from metarun.errors import DataError, counted
from metarun.storage.files import encoded
from metarun.tasks.choice import different
from metarun.tasks.class_store import MANY_ITEMS, MARKS, NO_MARK, ClassStore
from metarun.tasks.episodes import Episodes, EpisodeShape
from metarun.tasks.source import Draw, ReferenceOutcome

#: Texts by class and by language; the language is "" where a dataset has none.
Corpus = Mapping[str, Mapping[str, Sequence[str]]]


class Encoding(Protocol):
    """How texts become items; equal encodings give equal items. `Tokens`, or vectors of a trained model.

    Attributes:
        item_shape, item_dtype, vocabulary: as in `TaskSpec`.
        decode: stored items to what a network takes, see `ClassStore`.
    """

    @property
    def item_shape(self) -> tuple[int, ...]: ...
    @property
    def item_dtype(self) -> torch.dtype: ...
    @property
    def vocabulary(self) -> int | None: ...
    @property
    def decode(self) -> Callable[[Tensor], Tensor]: ...

    def encode(self, texts: Sequence[str], languages: Sequence[str] = ()) -> tuple[Tensor, list[int]]:
        """Items [texts, *stored], and the length of each text in tokens, before it was cut.

        Args:
            texts: the texts.
            languages: of each of them; empty: they are not known.
        """

    def knowing(self, texts: Iterable[str], cached_as: str) -> Encoding:
        """This encoding, with the items of these texts in a cache if they take long to compute.

        Args:
            texts: all texts of a dataset.
            cached_as: the name of the dataset in the cache.
        """

    def remarks(self, texts: Sequence[str], lengths: Sequence[int]) -> list[str]:
        """What users should know about texts of these lengths."""


@dataclass(frozen=True)
class Languages:
    """The languages that tasks are drawn in, by name.

    The support and the queries of a task are each in one language, drawn for the task.

    Args:
        support: the languages of the support; empty: all of the split.
        query: the languages of the queries; empty: the language of the support.
    """

    support: tuple[str, ...] = ()
    query: tuple[str, ...] = ()

    @property
    def is_open(self) -> bool:
        """Whether no language is chosen."""
        return not (self.support or self.query)


class TextStore(ClassStore):
    """Texts as items.

    The fingerprint depends on the texts alone, so that models with different encodings of them are evaluated
    on the same episodes.

    Args:
        corpus: the texts of each class.
        descriptions: of the classes in words, in the order of `corpus`.
        encoding: how texts become items.
        name: what messages call the split.
        device: where the items are kept.
        languages: which languages tasks are drawn in.
        background: texts that word frequencies are counted in, those of the training classes; None: `corpus`.
        names_as_shots: whether the description of a class is one of its support examples. Without shots it
            always is, in place of them.

    Raises:
        DataError: a class has no text in a language that tasks are drawn in.
    """

    readable = True
    described = True
    varies = False

    def __init__(
        self,
        corpus: Corpus,
        descriptions: Sequence[str],
        encoding: Encoding,
        name: str,
        device: torch.device | str = "cpu",
        languages: Languages = Languages(),
        names_as_shots: bool = False,
        background: Corpus | None = None,
    ) -> None:
        self.spoken = sorted({language for by_language in corpus.values() for language in by_language})
        ordered = [[by_language.get(each, ()) for each in self.spoken] for by_language in corpus.values()]
        self.texts = [text for by_language in ordered for texts in by_language for text in texts]
        counts = torch.tensor([[len(texts) for texts in by_language] for by_language in ordered])
        languages_of_texts = [
            each
            for by_language in ordered
            for each, texts in zip(self.spoken, by_language, strict=True)
            for _ in texts
        ]
        items, self.lengths = encoding.encode(self.texts, languages_of_texts)
        super().__init__(items, counts.sum(1).tolist(), list(corpus), name, device, "", encoding.decode)
        content = "\0".join([*self.names, str(counts.tolist()), *self.texts])
        self.fingerprint = hashlib.sha256(encoded(f"{languages} {content}")).hexdigest()
        self.spec = replace(self.spec, vocabulary=encoding.vocabulary)
        self.encoding, self.languages, self.names_as_shots = encoding, languages, names_as_shots
        self.background = self.texts if background is None else texts_of(background)
        self.by_language = counts  # [classes, languages]
        self.descriptions = list(descriptions)
        self.described_items = encoding.encode(self.descriptions)[0].to(device)  # [classes, *stored]
        self.drawn = self.languages_of(languages.support), self.languages_of(languages.query)

    def languages_of(self, names: Sequence[str]) -> Tensor:
        """The numbers of languages, or of all that the split has. Raises DataError for an unknown one."""
        if unknown := [name for name in names if name not in self.spoken]:
            listed = ", ".join(filter(None, self.spoken))
            rest = f"its languages are {listed}" if listed else "it has no languages; leave the setting out"
            raise DataError(f"{self.name}: has no texts in {unknown[0]!r}; {rest}")
        return torch.tensor([self.spoken.index(name) for name in names or self.spoken])

    @cached_property
    def marks(self) -> Tensor:
        """The content of each class, as in `ClassStore`: hashes of texts, whatever their encoding."""
        digests = [hashlib.sha256(encoded(normalised(text))).digest()[:8] for text in self.texts]
        hashes = torch.from_numpy(np.frombuffer(b"".join(digests), np.int64).copy())
        found = torch.full((len(self.names), MARKS), NO_MARK)
        for row, own in zip(found, hashes.split(self.counts.tolist()), strict=True):
            smallest = own.unique()[:MARKS]
            row[: len(smallest)] = smallest
        return found

    def keeping(self, classes: Sequence[int]) -> TextStore:
        twin = super().keeping(classes)
        assert isinstance(twin, TextStore)
        twin.by_language = self.by_language[classes]
        twin.descriptions = [self.descriptions[i] for i in classes]
        twin.described_items = self.described_items[classes]
        return twin

    def with_items(
        self,
        items: Tensor,
        host_for: torch.device | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> TextStore:
        twin = super().with_items(items, host_for, decode)
        assert isinstance(twin, TextStore)
        twin.described_items = self.described_items.to(host_for or items.device)
        return twin

    def described_by(self) -> str:
        return hashlib.sha256(encoded("\0".join(self.descriptions))).hexdigest()

    @property
    def pair(self) -> tuple[str, str] | None:
        """The languages of the support and of the queries, if there is one of each."""
        chosen = self.languages
        return (chosen.support[0], chosen.query[0]) if len(chosen.support) == len(chosen.query) == 1 else None

    def pairs(self) -> list[tuple[str, str]]:
        """The languages of the support and of the queries that tasks are drawn in."""
        support, query = ([self.spoken[i] for i in numbers.tolist()] for numbers in self.drawn)
        if not self.languages.query:
            return [(name, name) for name in support]
        return list(itertools.product(support, query))

    def speaking(self, support: str, query: str) -> TextStore:
        """The same texts, drawn in one language for the support and in one for the queries."""
        twin = copy.copy(self)
        twin.languages = Languages((support,), (query,))
        twin.drawn = self.languages_of([support]), self.languages_of([query])
        twin.name = f"{self.name} {support} to {query}"
        twin.fingerprint = hashlib.sha256(encoded(f"{self.fingerprint} {support} {query}")).hexdigest()
        return twin

    def numbered(self) -> TextStore:
        """The same classes with the number of a text as its item [1]; those of descriptions come after."""
        twin = self.with_items(torch.arange(len(self.texts)).unsqueeze(1))
        twin.described_items = torch.arange(len(self.descriptions)).unsqueeze(1) + len(self.texts)
        return twin

    def check(self, shape: EpisodeShape) -> None:
        if len(self.spoken) == 1:
            return super().check(shape)
        used = torch.cat(self.drawn if self.languages.query else self.drawn[:1]).unique()
        every = self.by_language[:, used]
        self.check_ways(shape.ways)
        wanted = shape.shots + shape.queries
        if wanted > int(every.min()):
            number, language = divmod(int(every.argmin()), every.shape[1])
            spoken = self.spoken[int(used[language])]
            raise DataError(
                f"shots={shape.shots} and queries={shape.queries} need {counted(wanted, 'text')} a class and "
                f"language: class {self.names[number]!r} of {self.name} has {int(every.min())} in {spoken}; "
                "lower shots or queries, or choose other languages"
            )

    def draw(self, tasks: int, shape: EpisodeShape, generator: torch.Generator) -> Draw:
        """Classes [T, N] and texts [T, N, K+Q]; of several languages, those of a task are drawn first."""
        if len(self.spoken) == 1:
            return super().draw(tasks, shape, generator)
        support, query = (self.one_of(numbers, tasks, generator) for numbers in self.drawn)
        if not self.languages.query:
            query = support
        classes = self.draw_classes(tasks, shape.ways, generator)
        ours, theirs = (self.places(classes, each, shape, generator) for each in (support, query))
        alike = (support == query).view(-1, 1, 1)  # then no query may be among the shots
        return classes, torch.cat(
            [ours[..., : shape.shots], torch.where(alike, ours, theirs)[..., shape.shots :]], -1
        )

    def one_of(self, numbers: Tensor, tasks: int, generator: torch.Generator) -> Tensor:
        """One of some languages for each task, [T]."""
        chosen = torch.randint(len(numbers), (tasks,), generator=generator, device=generator.device)
        return numbers.to(generator.device)[chosen]

    def places(
        self, classes: Tensor, language: Tensor, shape: EpisodeShape, generator: torch.Generator
    ) -> Tensor:
        """Texts of classes [T, N] in one language of each task [T], as numbers in their class [T, N, K+Q]."""
        counts = self.by_language.to(generator.device)
        first = counts.cumsum(1) - counts  # of each language in its class
        most = int(counts.max())
        at = classes, language.unsqueeze(1).expand_as(classes)
        chosen = different(counts[at], shape.shots + shape.queries, most, MANY_ITEMS, generator)
        return first[at].unsqueeze(-1) + chosen

    def gather(self, draw: Draw, shape: EpisodeShape) -> Episodes:
        episodes = self.gather_equal(draw, shape)
        if shape.shots and not self.names_as_shots:
            return episodes
        assert episodes.classes is not None
        about = self.decode(self.described_items[episodes.classes])  # [T, N, *item]
        ways = torch.arange(shape.ways, device=about.device).expand(len(about), -1)
        return replace(
            episodes,
            support_x=torch.cat([about, episodes.support_x], 1),
            support_y=torch.cat([ways, episodes.support_y], 1),
        )

    def references(self, shape: EpisodeShape, shared: dict[Any, Any]) -> Mapping[str, ReferenceOutcome]:
        return tfidf_references(self, shared)

    def remarks(self) -> Sequence[str]:
        repeated = Counter(normalised(text) for text in self.texts)
        lines = [
            *(f"{self.name}: {line}" for line in self.encoding.remarks(self.texts, self.lengths)),
            f"{self.name}: {len(self.texts) - len(repeated):,} texts are repetitions",
        ]
        counted = Counter(normalised(text) for text in self.descriptions)
        if alike := [text for text in self.descriptions if counted[normalised(text)] > 1]:
            lines.append(
                f"{self.name}: {len(alike)} classes have the description of another one, such as "
                f"{alike[0]!r}, and cannot be told apart with shots=0"
            )
        if len(self.spoken) > 1:
            lines.append(f"{self.name}: languages: {', '.join(self.spoken)}")
        return lines

    def examples(self, draw: Draw, shape: EpisodeShape) -> list[dict[str, str]]:
        classes, places = (tensor[0] for tensor in draw[:2])
        rows = []
        for number, own in zip(classes.tolist(), places.tolist(), strict=True):
            start = int(self.starts[number])
            texts = [self.texts[start + place] for place in own]
            roles = ["support"] * shape.shots + ["query"] * shape.queries
            if self.names_as_shots or not shape.shots:
                texts, roles = [self.descriptions[number], *texts], ["description", *roles]
            for role, text in zip(roles, texts, strict=True):
                rows.append({"class": self.names[number], "role": role, "text": shortened(text)})
        return rows


def texts_of(corpus: Corpus) -> list[str]:
    """All texts."""
    return [text for by_language in corpus.values() for texts in by_language.values() for text in texts]


def shortened(text: str, most: int = 200) -> str:
    """A text in one line of at most `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
