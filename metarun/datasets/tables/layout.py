"""What the columns of a table are used for: its tasks, labels and features."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from metarun.datasets.base import Split
from metarun.datasets.image_folder import SPLIT_OF
from metarun.datasets.tables.columns import in_order, is_missing, label_of
from metarun.datasets.tables.reading import Cells
from metarun.datasets.tables.tasks import Group
from metarun.errors import ConfigError, DataError
from metarun.reporting.console import inform

SPLIT = "split"  # the column that says the split of a row, if a table has it
BINARY = ("0", "1")  # the labels of columns that are tasks


@dataclass(frozen=True)
class Roles:
    """The use of columns, as in the settings of `Table`; the words of `missing` as `is_missing` has them."""

    task: str | None = None
    label: str | None = None
    target: str | None = None
    tasks: Sequence[str] = ()
    smiles: str | None = None
    features: Sequence[str] | None = None
    drop: Sequence[str] = ()
    categories: Sequence[str] = ()
    missing: frozenset[str] = field(default_factory=frozenset)

    def check(self) -> None:
        """Raise ConfigError if they do not fit each other."""
        answers = {"label": self.label, "target": self.target, "tasks": self.tasks}
        given = [name for name, value in answers.items() if value]
        if len(given) != 1:
            what = "none is set" if not given else f"{' and '.join(given)} are set"
            raise ConfigError(
                "dataset.label, dataset.target, dataset.tasks: choose one of them, the column of the label, "
                f"the column of the number to predict, or the columns that are tasks ({what})"
            )
        if self.target and not self.task:
            raise ConfigError(
                f"dataset.target={self.target}: add dataset.task=COLUMN, which says the task of a row"
            )
        if self.tasks and self.task:
            raise ConfigError(f"dataset.task={self.task}: leave it out, since dataset.tasks names the tasks")

    @property
    def answer(self) -> str | None:
        """The column of the label or the target."""
        return self.label or self.target

    @property
    def named(self) -> dict[str, str]:
        """The columns that have a use of their own, by the setting."""
        roles = {name: getattr(self, name) for name in ("task", "label", "target", "smiles")}
        return {name: column for name, column in roles.items() if column}


class Layout:
    """The rows of a table with the uses of its columns.

    Args:
        roles: the uses.
        cells: the table. Rows without a label or a target are left out, and a message says so.

    Raises:
        DataError: a column is missing; the message names one that may be meant.
    """

    def __init__(self, roles: Roles, cells: Cells) -> None:
        for setting, name in roles.named.items():
            cells.column(name, f"dataset.{setting}")
        self.roles = roles
        self.cells = answered(cells, roles)
        self.dropped = set(cells.matching(roles.drop, "dataset.drop"))
        self.categories = set(cells.matching(roles.categories, "dataset.categories"))

    @cached_property
    def task_columns(self) -> list[str]:
        """The columns that are tasks. Raises DataError if one has other values than 0, 1 and empty."""
        cells = self.cells
        if list(self.roles.tasks) == ["columns"]:
            others = {*self.dropped, *self.roles.named.values()}
            found = [name for name in cells.columns if name not in others and self._not_binary(name) is None]
            if not found:
                raise DataError(
                    f"dataset.tasks=columns: {cells.path} has no column of 0, 1 and empty cells; name the "
                    "columns that are tasks"
                )
            return found
        found = cells.matching(self.roles.tasks, "dataset.tasks")
        for name in found:
            if (row := self._not_binary(name)) is not None:
                raise DataError(
                    f"{cells.at(row)}: column {name!r} has {cells.columns[name][row]!r}, and a task has "
                    "only 0, 1 and empty cells; correct it, or leave the column out of dataset.tasks"
                )
        return found

    def _not_binary(self, name: str) -> int | None:
        """The first row of a column that is not 0, 1 or missing; None if there is none."""
        own = self.cells.columns[name]
        bad = {cell for cell in set(own) if not self.missing(cell) and label_of(cell) not in BINARY}
        return next((row for row, cell in enumerate(own) if cell in bad), None)

    def missing(self, cell: str) -> bool:
        return is_missing(cell, self.roles.missing)

    @cached_property
    def labels(self) -> list[str]:
        """The labels of the table, in order; empty for a regression."""
        if self.roles.label is None:
            return list(BINARY) if self.roles.tasks else []
        return in_order({label_of(cell) for cell in self.cells.columns[self.roles.label]})

    @cached_property
    def groups(self) -> dict[str, Group]:
        """The tasks by their names, with rows by label; without a task column, the classes."""
        roles, columns = self.roles, self.cells.columns
        if roles.tasks:
            return {
                name: grouped(name, range(len(self.cells)), columns[name], BINARY)
                for name in self.task_columns
            }
        owner = roles.task or roles.label
        assert owner is not None
        rows: dict[str, list[int]] = {}
        for row, cell in enumerate(columns[owner]):
            if self.missing(cell):
                raise DataError(
                    f"{self.cells.at(row)}: column {owner!r} is empty; fill it, or remove the line"
                )
            rows.setdefault(label_of(cell), []).append(row)
        if roles.label is None or roles.task is None:
            return {name: Group(name, (tuple(own),)) for name, own in rows.items()}
        return {name: grouped(name, own, columns[roles.label], self.labels) for name, own in rows.items()}

    @cached_property
    def splits(self) -> dict[Split, list[str]] | None:
        """The tasks or classes of each split by the column `split`; None if the table has no such column."""
        if not self.has_splits:
            return None
        cells, of_row = self.cells, self.cells.columns[SPLIT]
        for row, cell in enumerate(of_row):
            if cell.lower() not in SPLIT_OF:
                raise DataError(
                    f"{cells.at(row)}: column 'split' has {cell!r}; its values are train, validation and "
                    "test; if it is something else, name it in dataset.features or in dataset.drop"
                )
        found: dict[Split, list[str]] = {}
        what = "task" if self.roles.task else "class"
        for name, group in self.groups.items():
            own = {SPLIT_OF[of_row[row].lower()] for rows in group.rows for row in rows}
            if len(own) > 1:
                raise DataError(
                    f"{cells.path}: {what} {name!r} is in {' and in '.join(sorted(own))} by the column "
                    f"'split'; a {what} must be in one split only"
                )
            found.setdefault(own.pop(), []).append(name)
        return found

    @property
    def has_splits(self) -> bool:
        """Whether a column says the split of each row."""
        others = {*self.dropped, *self.roles.named.values(), *(self.roles.features or ())}
        return not self.roles.tasks and SPLIT in self.cells.columns and SPLIT not in others

    @cached_property
    def features(self) -> list[str]:
        """The columns that are features."""
        used = {*self.roles.named.values(), *(self.task_columns if self.roles.tasks else [])}
        if self.roles.features is not None:
            chosen = self.cells.matching(self.roles.features, "dataset.features")
            return [name for name in chosen if name not in used and name not in self.dropped]
        others = {*used, *self.dropped, *([SPLIT] if self.has_splits else [])}
        self._refuse_split(others)
        return [name for name in self.cells.columns if name not in others]

    def _refuse_split(self, others: Collection[str]) -> None:
        """Raise DataError if the column `split` would be a feature and says the splits of rows."""
        own = self.cells.columns.get(SPLIT, []) if SPLIT not in others else []
        if own and all(cell.lower() in SPLIT_OF for cell in own):
            raise DataError(
                f"{self.cells.path}: column 'split' says the splits of rows, and tasks that are columns have "
                "rows in common; leave it out (dataset.drop=[split]), or name it in dataset.features"
            )

    @property
    def row_names(self) -> list[str]:
        """What each row is, so that equal rows are recognised: its molecule, or the text of its features."""
        if self.roles.smiles is not None:
            return self.cells.columns[self.roles.smiles]
        columns = [self.cells.columns[name] for name in self.features]
        return ["\0".join(cells) for cells in zip(*columns, strict=True)]


def answered(cells: Cells, roles: Roles) -> Cells:
    """The rows that have a label or a target; a message says how many have none."""
    if roles.answer is None:
        return cells
    own = cells.columns[roles.answer]
    known = [row for row, cell in enumerate(own) if not is_missing(cell, roles.missing)]
    if not known:
        raise DataError(f"{cells.path}: column {roles.answer!r} has no values; choose another column")
    if len(known) == len(cells):
        return cells
    inform(
        f"{cells.path}: {len(cells) - len(known):,} of {len(cells):,} rows have no {roles.answer}; left out"
    )
    return cells.keeping(known)


def grouped(name: str, rows: Sequence[int], cells: Sequence[str], labels: Sequence[str]) -> Group:
    """A task of these rows, divided by the labels that are in the cells of a column."""
    own: dict[str, list[int]] = {label: [] for label in labels}
    for row in rows:
        if (label := label_of(cells[row])) in own:
            own[label].append(row)
    return Group(name, tuple(map(tuple, own.values())))
