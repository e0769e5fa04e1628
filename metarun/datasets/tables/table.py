"""A user's own table as a dataset: with a task column, with classes, or with a column for each task."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from metarun.datasets.base import (
    Dataset,
    OwnQueries,
    OwnTask,
    Split,
    Splits,
    by_digest,
    number_rows,
    split_by_digest,
)
from metarun.datasets.preparation import Preparation
from metarun.datasets.tables import own_files
from metarun.datasets.tables.columns import Learned, label_of, learn_columns, listed, numbers_of
from metarun.datasets.tables.layout import Layout, Roles
from metarun.datasets.tables.molecules import BITS, Fingerprints
from metarun.datasets.tables.reading import Cells, read_table
from metarun.datasets.tables.tasks import Group, TableClasses, TableTasks
from metarun.errors import ConfigError, DataError, counted
from metarun.reporting.console import inform
from metarun.storage.files import user_path
from metarun.tasks.class_store import numbers
from metarun.tasks.objectives import CLASSIFICATION, REGRESSION, Objective
from metarun.tasks.source import EpisodeSource
from metarun.tasks.spec import TaskSpec

MISSING = ("?", "NA", "N/A", "NaN", "null")
LEAST, LEAST_CLASSES = 3, 6  # tasks, and classes, that can be split into three
SHOWN = 5  # features of a row in the table of an episode


@dataclass(frozen=True)
class TablePreparation(Preparation):
    """How the rows of another table are prepared for a model: as those of the table it was trained on.

    Args:
        learned: what was learned of the columns, see `Learned`.
    """

    learned: str = ""


class Table(Dataset):
    """Rows of a csv or tsv file, as vectors of numbers.

    Tasks are the values of the column `task`, or the columns `tasks`; without either, every label is a class.
    They are split by the column `split` if there is one, otherwise by the digests of their names, see
    `split_by_digest`. What the vectors depend on (means, deviations, the values of categories) is learned
    from the rows of the training tasks.

    Args:
        root: the file; also compressed with gzip.
        task: the column that says which task a row belongs to.
        label: the column of the label.
        target: the column of the number to predict.
        tasks: columns, or patterns such as `NR-*`, that are tasks with the labels 0 and 1, empty where a row
            does not belong to the task. "columns": all columns of which that is true.
        features: the columns, or patterns of them, that are features. None: all that have no other use.
        drop: columns, or patterns of them, that are not used.
        categories: columns, or patterns of them, that are categories although they contain numbers.
        missing: words for a missing value, in upper or lower case; an empty cell is one in any case.
        labels: "fixed": way i of every task is label i. "shuffled": the ways are labels of the task in random
            order; a task may have more labels than ways.
        smiles: the column of molecules as SMILES strings; their fingerprints are features, and rows that
            RDKit cannot read are left out.
        disjoint: whether rows are new in the test, where `tasks` have rows in common: half of the rows, by
            their digests, are only used in training tasks, and the others only to validate and to test.
        validation, test: the shares of the tasks or classes to validate and to test on.
        seed: of the split.
        learned: what was learned from the table that a model was trained on; a checkpoint keeps it.

    Raises:
        ConfigError: settings do not fit each other.
    """

    unread: ClassVar = {"labels": "task=null", "disjoint": "tasks=null"}
    of_model = ("features", "drop", "categories", "learned")
    kind: str = "table"  # whose entries of the cache its fingerprints are

    def __init__(
        self,
        *,
        root: str,
        task: str | None = None,
        label: str | None = None,
        target: str | None = None,
        tasks: str | list[str] | None = None,
        smiles: str | None = None,
        features: list[str] | None = None,
        drop: list[str] | None = None,
        categories: list[str] | None = None,
        missing: list[str | int | float] | None = None,
        labels: Literal["fixed", "shuffled"] = "fixed",
        disjoint: bool = False,
        validation: float = 0.2,
        test: float = 0.2,
        seed: int = 0,
        learned: str | None = None,
    ) -> None:
        self.roles = Roles(
            task=task,
            label=label,
            target=target,
            tasks=[tasks] if isinstance(tasks, str) else tasks or [],
            smiles=smiles,
            features=features,
            drop=drop or [],
            categories=categories or [],
            missing=frozenset(
                label_of(str(word).lower()) for word in (MISSING if missing is None else missing)
            ),
        )
        self.roles.check()
        if min(validation, test) <= 0 or validation + test >= 1:
            raise ConfigError(
                f"dataset.validation={validation}, dataset.test={test}: choose shares above 0 that are less "
                "than 1 together"
            )
        self.root, self.shares, self.seed = root, (validation, test), seed
        self.shuffled = labels == "shuffled" and task is not None and label is not None
        self.disjoint = disjoint
        self.notes: Sequence[str] = ()  # on the columns, for the user
        self.fingerprints = Fingerprints(self.kind)
        self._given = None if learned is None else learned_from(learned)

    @property
    def spec(self) -> TaskSpec:
        """The kind of its tasks. The file is read for it, unless `learned` is set."""
        return TaskSpec((self.width,), self.objective, outputs=1 if self.roles.target else None)

    @property
    def width(self) -> int:
        """The number of features of a row."""
        return self.learned.width + (BITS if self.roles.smiles else 0)

    @property
    def objective(self) -> Objective:
        if not self.roles.target:
            return CLASSIFICATION
        mean, deviation = self.learned.mean, self.learned.deviation
        # In float64: float32 would round values that are far from 0 and differ little, such as dates.
        return REGRESSION.in_units(lambda values: values.double() * deviation + mean)

    @property
    def decided(self) -> dict[str, Any]:
        return {"learned": self.learned.dumps()}

    @property
    def preparation(self) -> Preparation:
        return TablePreparation(learned=self.learned.dumps())

    def prepared_like(self, trained: Preparation) -> Dataset:
        if self._given is not None or not isinstance(trained, TablePreparation):
            return self
        twin = copy.copy(self)
        for name in ("learned", "items"):  # what was computed without it
            twin.__dict__.pop(name, None)
        twin._given = Learned.loads(trained.learned)
        return twin

    @cached_property
    def layout(self) -> Layout:
        """The file. Raises DataError."""
        return Layout(self.roles, self.read(self.file(user_path(self.root))))

    def file(self, path: Path) -> Path:
        """The file of the dataset. Raises DataError."""
        return path

    def read(self, path: Path) -> Cells:
        """The rows of a file that can be used. Raises DataError."""
        cells, smiles = read_table(path), self.roles.smiles
        return cells if smiles is None else self.fingerprints.readable(cells, smiles)

    @property
    def title(self) -> str:
        """The name of the table, for messages."""
        return user_path(self.root).name.partition(".")[0]

    # Splits

    def splits(self) -> tuple[Split, ...]:
        return tuple(split for split in super().splits() if self.parts.get(split))

    @cached_property
    def parts(self) -> dict[Split, list[str]]:
        """The names of the tasks or classes of each split."""
        return self.layout.splits or self.split_names(list(self.layout.groups))

    def split_names(self, names: Sequence[str]) -> dict[Split, list[str]]:
        """The names of each split by their digests; a few are all for the test."""
        of_tasks = bool(self.roles.task or self.roles.tasks)
        what, each, least = ("tasks", 1, LEAST) if of_tasks else ("classes", 2, LEAST_CLASSES)
        count = len(names)
        if count < least:
            inform(f"{self.root}: {count} {what} are too few for three splits, so all are test {what}")
            return {"test": list(names)}
        validation, test = (max(each, round(share * count)) for share in self.shares)
        sizes = (max(count - validation - test, 0), validation, test)
        inform(
            f"{self.root}: {count} {what} split {'/'.join(map(str, sizes))} into train, validation and test "
            f"by dataset.seed={self.seed}"
        )
        return split_by_digest(names, sizes, f"{self.seed} ")

    @cached_property
    def of_test(self) -> frozenset[int]:
        """The rows that are not trained on, with `disjoint`."""
        names = self.layout.row_names
        order = by_digest(set(names), f"{self.seed} ")
        chosen = set(order[: len(order) // 2])
        return frozenset(row for row, name in enumerate(names) if name in chosen)

    def groups(self, split: Splits) -> list[Group]:
        """The tasks or classes of a split, with the rows that they have there."""
        if missing := [each for each in self.parts_of(split) if each not in self.splits()]:
            there = " and ".join(self.splits())
            raise DataError(
                f"dataset.root={self.root}: there is nothing in the split {missing[0]}, only in {there}; "
                f"eval and adapt take another one, as split={self.splits()[0]}"
            )
        every = self.layout.groups
        names = dict.fromkeys(name for each in self.parts_of(split) for name in self.parts[each])
        groups = [every[name] for name in (every if split == "all" else names)]
        if not self.disjoint or split == "all":
            return groups
        tested = split not in ("train", "trainval")
        return [
            Group(one.name, tuple(tuple(r for r in own if (r in self.of_test) == tested) for own in one.rows))
            for one in groups
        ]

    # Features

    @cached_property
    def learned(self) -> Learned:
        """What was learned of the columns: as given, or from the rows of the training tasks."""
        return self._given or self._learn()

    def _learn(self) -> Learned:
        layout = self.layout
        groups = self.groups("train" if "train" in self.splits() else self.splits()[0])
        rows = sorted({row for group in groups for own in group.rows for row in own})
        columns, self.notes = learn_columns(layout, rows)
        for note in self.notes:
            inform(f"{layout.cells.path}: {note}")
        mean, deviation, labels = 0.0, 1.0, list(layout.labels)
        if self.roles.target:
            values = numbers_of(layout.cells, self.roles.target, self.roles.missing)[rows]
            mean, deviation = float(values.mean()), float(values.std())
            if values.min() == values.max():  # the deviation is rounded, and may be just above 0
                deviation = 1.0
        elif self.roles.task:
            labels = [label for i, label in enumerate(labels) if any(group.rows[i] for group in groups)]
        return self.checked(Learned(columns, tuple(labels), mean, deviation))

    def checked(self, learned: Learned) -> Learned:
        """Raise DataError unless there are features."""
        if not learned.columns and self.roles.smiles is None:
            cells = self.layout.cells
            raise DataError(
                f"{cells.path}: no feature is left of its columns {listed(list(cells.columns), 10)}"
            )
        return learned

    @cached_property
    def items(self) -> Tensor:
        """The features of all rows, [rows, F]."""
        return self.encode(self.layout.cells)

    def encode(self, cells: Cells) -> Tensor:
        """The features of rows, [rows, F]: fingerprints as bytes, all else as float32. Raises DataError."""
        others = self.learned.encode(cells, self.roles.missing)
        if self.roles.smiles is None:
            return others
        bits = self.fingerprints.of(cells.columns[self.roles.smiles])
        return torch.cat([others, bits.float()], 1) if self.learned.columns else bits

    # Sources

    def load(self, name: Splits, device: torch.device | str = "cpu") -> EpisodeSource:
        groups, title = self.groups(name), f"{self.title} {name}"
        if self.roles.target:
            return self._tasks(groups, [], title, device)
        if self.roles.task or self.roles.tasks:
            labels = self.layout.labels if self.shuffled else self.learned.labels or self.layout.labels
            return self._tasks(self._labelled(groups, labels, title), labels, title, device)
        groups = sorted(groups, key=lambda group: group.name)
        rows = [row for group in groups for row in group.rows[0]]
        sizes, names = [len(group.rows[0]) for group in groups], [group.name for group in groups]
        store = TableClasses(self.items[rows], sizes, names, title, device, decode=numbers)
        store.rows, store.show, store.notes = rows, self.show, self.notes
        return store

    def split(self, name: Split, device: torch.device | str = "cpu") -> EpisodeSource:
        return self.load(name, device)

    def _tasks(
        self, groups: Sequence[Group], labels: Sequence[str], title: str, device: torch.device | str
    ) -> TableTasks:
        values = None
        if self.roles.target:
            answers = numbers_of(self.layout.cells, self.roles.target, self.roles.missing)
            values = self.standard(torch.from_numpy(answers))
        return TableTasks(
            self.items, groups, self.spec, labels, values, self.shuffled, title, device, self.show, self.notes
        )

    def standard(self, values: Tensor) -> Tensor:
        """Targets [rows] as they are learned, float32 [rows, 1]."""
        return ((values - self.learned.mean) / self.learned.deviation).float().unsqueeze(1)

    def _labelled(self, groups: Sequence[Group], labels: Sequence[str], title: str) -> list[Group]:
        """The tasks with their rows in the order of these labels, without tasks of one label."""
        if self.roles.task:
            there = self.layout.labels
            for i, label in enumerate(there):
                if label not in labels and any(group.rows[i] for group in groups):
                    raise DataError(
                        f"{title}: no training task has the label {label!r}, only {', '.join(labels)}; "
                        "remove its rows, or set dataset.labels=shuffled"
                    )
            empty: dict[str, tuple[int, ...]] = dict.fromkeys(labels, ())
            groups = [
                Group(
                    one.name,
                    tuple((empty | dict(zip(there, one.rows, strict=True)))[name] for name in labels),
                )
                for one in groups
            ]
        single = [group.name for group in groups if sum(map(bool, group.rows)) < 2]
        if len(single) == len(groups):
            raise DataError(f"{title}: no task has two labels; choose another dataset.task or dataset.label")
        if single:
            inform(f"{title}: {counted(len(single), 'task')} of one label left out: {listed(single)}")
        return [group for group in groups if group.name not in single]

    def show(self, row: int) -> dict[str, str]:
        """A row for a table: the target, the molecule and the first features."""
        names, columns = self.layout.features, self.layout.cells.columns
        first = [name for name in (self.roles.target, self.roles.smiles) if name]
        shown = [*first, *names[:SHOWN]]
        more = {f"... {len(names) - SHOWN} more": ""} if len(names) > SHOWN else {}
        return {name: columns[name][row] for name in shown} | more

    def own_task(self, support: Path, query: str | None) -> OwnTask:
        """The task in a file of rows with labels or targets, and a file of rows to predict."""
        return own_files.own_task(
            self, support, None if query is None else user_path(query), self.fixed_labels
        )

    def own_queries(self, query: str, classes: Sequence[str]) -> OwnQueries:
        """The rows to predict in a file."""
        return own_files.own_queries(self, self.read(user_path(query)), classes)

    @property
    def fixed_labels(self) -> Sequence[str] | None:
        return self.learned.labels if self.roles.tasks or (self.roles.task and not self.shuffled) else None

    def examples(self, items: Sequence[Any]) -> Tensor:
        """Rows as inputs of the model; see `own_files.cells_of`."""
        cells = own_files.cells_of(self, items)
        if self.roles.smiles is not None and len(self.fingerprints.readable(cells, self.roles.smiles)) < len(
            cells
        ):
            raise DataError("examples: RDKit cannot read all molecules; leave those out")
        return numbers(self.encode(cells))

    def targets(self, values: Sequence[Any]) -> Tensor:
        return self.standard(number_rows(values, "labels", 1).squeeze(1))

    def row_name(self, cells: Cells, row: int) -> str:
        """A row of a user's file in words: the molecule, or its line."""
        return cells.columns[self.roles.smiles][row] if self.roles.smiles else f"line {cells.lines[row]}"


def learned_from(text: str) -> Learned:
    """What a checkpoint keeps. Raises ConfigError."""
    try:
        return Learned.loads(text)
    except ValueError as error:
        raise ConfigError(f"dataset.learned: {error}; leave it out") from None
