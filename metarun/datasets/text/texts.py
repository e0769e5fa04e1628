"""A user's own texts as a dataset: a file of labelled texts, or class folders of text files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from metarun.datasets.base import Split, check_shares, split_by_rule
from metarun.datasets.text import reading
from metarun.datasets.text.base import Reading, TextDataset
from metarun.datasets.text.store import Corpus
from metarun.errors import DataError
from metarun.storage.files import user_path

LANGUAGE = "language"  # the default name of a column that files need not have
SPLITS: dict[str, Split] = {
    "train": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
}


class Texts(TextDataset):
    """Texts of your own.

    A column `split` (train, validation or test) says which split a class is in; a class is in one split
    only. Without it, classes are split by the digests of their names; fewer than 6 are all test classes.

    Args:
        root: a .csv, .tsv or .jsonl file, also with .gz; or a folder with class folders of .txt files.
        text, label, language: the names of the columns of the texts, of their classes and of their languages;
            a file without languages needs no such column.
        ngrams, length, vectors, encoder, finetune, centred, learned, descriptions, names_as_shots,
            support_language, query_language: see `Reading`.
        validation, test: the shares of the classes to validate and to test on.
        seed: another one gives another split.
    """

    def __init__(
        self,
        *,
        root: str,
        text: str = "text",
        label: str = "label",
        language: str = LANGUAGE,
        ngrams: list[int] | tuple[int, ...] = (3, 4),
        length: int = 256,
        vectors: str | None = None,
        encoder: str | None = None,
        finetune: bool = False,
        centred: bool | None = None,
        learned: str | None = None,
        descriptions: str | None = None,
        names_as_shots: bool = False,
        support_language: str | list[str] | None = None,
        query_language: str | list[str] | None = None,
        validation: float = 0.2,
        test: float = 0.2,
        seed: int = 0,
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
        check_shares(validation, test)
        self.root, self.columns = root, (text, label, language)
        self.shares, self.seed = (validation, test), seed

    @property
    def title(self) -> str:
        return Path(self.root).name

    @property
    def cached_as(self) -> str:
        return "texts"

    def corpora(self) -> Mapping[Split, Corpus]:
        path = user_path(self.root)
        if path.is_dir():
            classes = reading.grouped(
                (label, reading.whole_text(file)) for label, file in reading.text_files(path)
            )
            return self.by_rule({label: {"": texts} for label, texts in classes.items()})
        return self.by_column(path, reading.rows_of(path))

    def by_column(self, path: Path, rows: Iterable[reading.Row]) -> Mapping[Split, Corpus]:
        """The texts of a file, split by its column `split`, or by the rule if it has none."""
        found: dict[str, dict[str, list[str]]] = {}
        owners: dict[str, Split] = {}
        for label, language, split, text, place in self.read(rows):
            found.setdefault(label, {}).setdefault(language, []).append(text)
            if split and owners.setdefault(label, split) != split:
                raise DataError(
                    f"{place}: class {label!r} is in {owners[label]} and in {split}; a class must be in one "
                    "split only"
                )
        if not found:
            raise DataError(f"{path}: has no texts")
        if not owners:
            return self.by_rule(found)
        splits = dict.fromkeys(SPLITS.values())
        parts = {s: {label: found[label] for label in found if owners.get(label) == s} for s in splits}
        return {split: corpus for split, corpus in parts.items() if corpus}

    def read(self, rows: Iterable[reading.Row]) -> Iterator[tuple[str, str, Split | None, str, str]]:
        """The class, the language, the split, the text and the place of each row. Raises DataError."""
        text, label, language = self.columns
        for row in rows:
            split = row.cells.get("split", "").strip().lower()
            if split and split not in SPLITS:
                raise DataError(f"{row.place}: split {split!r} must be train, validation or test")
            yield (
                reading.cell(row, label, "dataset.label"),
                self.language_of(row, language),
                SPLITS.get(split),
                reading.cell(row, text, "dataset.text"),
                row.place,
            )

    def language_of(self, row: reading.Row, column: str) -> str:
        """The language of a row; "" without the column, which only a file of languages must have."""
        if column != LANGUAGE and column not in row.cells:
            return reading.cell(row, column, "dataset.language")
        return row.cells.get(column, "").strip()

    def by_rule(self, classes: Corpus) -> Mapping[Split, Corpus]:
        parts = split_by_rule(classes, self.shares, self.seed, self.root)
        return {split: {name: classes[name] for name in names} for split, names in parts.items()}
