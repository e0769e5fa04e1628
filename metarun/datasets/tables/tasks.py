"""Tasks that are groups of rows of a table, such as patients or assays."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from metarun.errors import DataError, counted
from metarun.reporting.console import inform
from metarun.tasks.choice import different
from metarun.tasks.class_store import MANY_ITEMS, ClassStore, numbers
from metarun.tasks.episodes import Episodes, EpisodeShape
from metarun.tasks.source import Draw, EpisodeSource
from metarun.tasks.spec import TaskSpec


@dataclass(frozen=True)
class Group:
    """One task of a table.

    Args:
        name: of the task.
        rows: the numbers of its rows, by label; a regression has one list.
    """

    name: str
    rows: tuple[tuple[int, ...], ...]


class TableTasks(EpisodeSource):
    """Tasks that each draw their examples from rows of their own; several tasks may have a row in common.

    Args:
        items: the features of the rows, [rows, F].
        groups: the tasks.
        spec: of the tasks.
        labels: the names of the labels, in order; empty for a regression.
        values: the targets of the rows of a regression, [rows, 1].
        shuffled: whether a task's ways are its labels in random order, and may be some of them. False: way i
            is label i in every task.
        name: what messages call the split, such as "patients train".
        device: where the items are kept.
        show: the cells of a row by their headings, for `examples`.
        notes: remarks for the user.
    """

    readable = True

    def __init__(
        self,
        items: Tensor,
        groups: Sequence[Group],
        spec: TaskSpec,
        labels: Sequence[str],
        values: Tensor | None,
        shuffled: bool,
        name: str,
        device: torch.device | str,
        show: Callable[[int], dict[str, str]],
        notes: Sequence[str] = (),
    ) -> None:
        self.spec, self.name, self.names, self.shuffled = spec, name, list(labels), shuffled
        self.show, self.notes = show, notes
        self.tasks = [group.name for group in groups]
        rows = torch.tensor([row for group in groups for own in group.rows for row in own])
        used, self.index = rows.unique(return_inverse=True)  # the other rows belong to other splits
        self.rows = used.tolist()
        self.items, self.device = items[used], torch.device(device)
        self.values = None if values is None else values[used]
        self.counts = torch.tensor([[len(own) for own in group.rows] for group in groups])  # [tasks, labels]
        flat = self.counts.flatten()
        self.starts = (flat.cumsum(0) - flat).view_as(self.counts)
        self.fingerprint = self._digest()
        self.items, self.index, self.starts = (
            tensor.to(device) for tensor in (self.items, self.index, self.starts)
        )
        self.values = None if self.values is None else self.values.to(device)
        self.reported: set[tuple[int, int]] = set()  # shapes whose small tasks were named

    def _digest(self) -> str:
        digest = hashlib.sha256(f"{self.tasks} {self.names} {self.shuffled} {self.items.dtype}".encode())
        for tensor in (self.items, self.index, self.counts, *([] if self.values is None else [self.values])):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def remarks(self) -> Sequence[str]:
        sizes = self.counts.sum(1)
        what = f"{counted(len(self.tasks), 'task')} of {sizes.min()} to {sizes.max()} rows"
        shares = [
            f"{label}: {count:,}"
            for label, count in zip(self.names, self.counts.sum(0).tolist(), strict=False)
        ]
        return [f"{self.name}: {what}" + (f" ({', '.join(shares[:10])})" if shares else ""), *self.notes]

    def keeping(self, tasks: Sequence[int]) -> TableTasks:
        """The same rows, of which only those of some tasks are drawn, given by their numbers, ascending."""
        twin = copy.copy(self)
        twin.tasks = [self.tasks[i] for i in tasks]
        twin.name = f"{self.name} without {len(self.tasks) - len(tasks)} training tasks"
        twin.fingerprint = hashlib.sha256(f"{self.fingerprint} {twin.tasks}".encode()).hexdigest()
        twin.counts, twin.starts = self.counts[tasks], self.starts[tasks]
        twin.reported = set()
        return twin

    def item_counts(self) -> Sequence[int]:
        return self.counts.sum(1).tolist()

    def usual_ways(self, ways: int) -> int:
        return min(ways, self.counts.shape[1]) if self.shuffled else self.counts.shape[1]

    def possible(self, shape: EpisodeShape) -> Tensor:
        """Which tasks have enough rows, bool [tasks]."""
        enough = self.counts >= shape.shots + shape.queries  # [tasks, labels]
        return enough.sum(1) >= shape.ways if self.shuffled else enough.all(1)

    def check(self, shape: EpisodeShape) -> None:
        self.check_shots(shape.shots)
        most = self.counts.shape[1]
        if not self.names and shape.ways != 1:
            raise DataError(f"ways={shape.ways}: a regression task has one way; set ways=1")
        if self.names and not self.shuffled and shape.ways != most:
            raise DataError(
                f"ways={shape.ways}: each task of {self.name} has the labels {', '.join(self.names[:10])}; "
                f"set ways={most}, or dataset.labels=shuffled for some of them in random order"
            )
        if self.shuffled and not 2 <= shape.ways <= most:
            raise DataError(f"ways={shape.ways}: {self.name} has {most} labels; set ways from 2 to {most}")
        possible = self.possible(shape)
        small = [name for name, fits in zip(self.tasks, possible.tolist(), strict=True) if not fits]
        each = " of each label" if self.names else ""
        what = (
            f"shots={shape.shots} and queries={shape.queries} need {shape.shots + shape.queries} rows{each}"
        )
        if not possible.any():
            sizes = self.counts.min(1).values
            largest = int(sizes.argmax())
            raise DataError(
                f"{what}: none of the {counted(len(self.tasks), 'task')} of {self.name} has as many, task "
                f"{self.tasks[largest]!r} has {int(sizes[largest])}; lower shots or queries"
            )
        key = (shape.ways, shape.shots + shape.queries)
        if small and key not in self.reported:
            self.reported.add(key)
            inform(
                f"{self.name}: {what}; {len(small)} of {len(self.tasks)} tasks have fewer and are left out: "
                + ", ".join(small[:5])
                + (", ..." if len(small) > 5 else "")
            )

    def draw(self, tasks: int, shape: EpisodeShape, generator: torch.Generator) -> Draw:
        """Tasks [T], labels [T, N] without replacement in a task, and rows [T, N, K+Q] likewise."""
        device, wanted = generator.device, shape.shots + shape.queries
        possible = self.possible(shape).nonzero().squeeze(1).to(device)
        chosen = possible[torch.randint(len(possible), (tasks,), generator=generator, device=device)]
        counts = self.counts.to(device)[chosen]  # [T, labels]
        labels = torch.arange(counts.shape[1], device=device).repeat(tasks, 1)
        if self.shuffled:
            keys = torch.rand(counts.shape, generator=generator, device=device)
            labels = keys.masked_fill(counts < wanted, -1.0).topk(shape.ways).indices
        rows = different(counts.gather(1, labels), wanted, int(self.counts.max()), MANY_ITEMS, generator)
        return chosen, labels, rows

    def gather(self, draw: Draw, shape: EpisodeShape) -> Episodes:
        chosen, labels, places = (tensor.to(self.device) for tensor in draw)
        rows = self.index[self.starts[chosen].gather(1, labels).unsqueeze(-1) + places]  # [T, N, K+Q]
        support, query = (part.flatten(1) for part in rows.split([shape.shots, shape.queries], 2))
        if self.values is not None:
            support_y, query_y = self.values[support], self.values[query]
        else:
            y = torch.arange(shape.ways, device=self.device).expand(len(rows), -1)
            support_y, query_y = (y.repeat_interleave(n, 1) for n in (shape.shots, shape.queries))
        return Episodes(
            support_x=numbers(self.items[support]),
            support_y=support_y,
            query_x=numbers(self.items[query]),
            query_y=query_y,
            classes=labels if self.names else None,
            objective=self.spec.objective,
        )

    def examples(self, draw: Draw, shape: EpisodeShape) -> list[dict[str, str]]:
        task, labels, places = (tensor[0].to(self.device) for tensor in draw)
        rows = self.index[self.starts[task, labels].unsqueeze(-1) + places].tolist()  # [N, K+Q]
        names = [self.names[i] for i in labels.tolist()] if self.names else [""]
        shown = {name: [self.show(self.rows[i]) for i in own] for name, own in zip(names, rows, strict=True)}
        return [{"task": self.tasks[int(task)], **row} for row in example_rows(shown, shape.shots)]


class TableClasses(ClassStore):
    """Classes of rows of a table.

    Attributes:
        rows: the number of each item in the table.
        show: the cells of a row by their headings, for `examples`.
        notes: remarks for the user.
    """

    readable = True
    rows: Sequence[int]
    show: Callable[[int], dict[str, str]]
    notes: Sequence[str] = ()

    def remarks(self) -> Sequence[str]:
        return self.notes

    def examples(self, draw: Draw, shape: EpisodeShape) -> list[dict[str, str]]:
        classes, places = (tensor[0].to(self.starts.device) for tensor in draw[:2])
        rows = (self.starts[classes].unsqueeze(-1) + places).tolist()
        names = [self.names[i] for i in classes.tolist()]
        shown = {name: [self.show(self.rows[i]) for i in own] for name, own in zip(names, rows, strict=True)}
        return example_rows(shown, shape.shots)


def example_rows(shown: Mapping[str, Sequence[dict[str, str]]], shots: int) -> list[dict[str, str]]:
    """The examples of a task, the support first.

    Args:
        shown: the examples of each label, as rows of a table; one label "" for a regression.
        shots: how many of each are the support.
    """
    labelled = {
        label: [{"label": label, **row} if label else row for row in own] for label, own in shown.items()
    }
    support = [{"part": "support", **row} for own in labelled.values() for row in own[:shots]]
    return support + [{"part": "query", **row} for own in labelled.values() for row in own[shots:]]
