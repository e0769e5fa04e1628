"""The classes that a model was trained on, as its checkpoint records them, and how others are compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metarun.tasks.class_store import MARKS, NO_MARK, ClassStore
from metarun.tasks.source import EpisodeSource

#: Marks that two classes share if they are the same. Two different classes may have an image in common:
#: `otter` and `seal` of CIFAR-100 share seven of 600.
ALIKE = 2


class Known(NamedTuple):
    """The numbers of the classes of a split that were training classes."""

    same_items: list[int]  # they have items of a training class, whatever their name
    same_name: list[int]  # they have the name of a training class, but other items

    @property
    def classes(self) -> list[int]:
        return sorted([*self.same_items, *self.same_name])


@dataclass(frozen=True)
class TrainedClasses:
    """Training classes by name and by content.

    Args:
        names: of the classes; several datasets may have a class of the same name.
        marks: int64 [classes, MARKS], see `ClassStore.marks`.
    """

    names: list[str]
    marks: Tensor

    @classmethod
    def of(cls, source: EpisodeSource) -> TrainedClasses | None:
        """The classes of a training split; None if it has none, as in a regression."""
        if not isinstance(source, ClassStore):
            return None
        return cls(plain_names(source), source.marks)

    @classmethod
    def from_plain(cls, record: Any) -> TrainedClasses | None:
        """The classes in an entry of a checkpoint; None if it is not such an entry."""
        names, marks = (record.get(key) for key in ("names", "marks")) if isinstance(record, dict) else (0, 0)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return None
        if not isinstance(marks, Tensor) or marks.shape != (len(names), MARKS) or marks.dtype != torch.int64:
            return None
        return cls(names, marks)

    def plain(self) -> dict[str, Any]:
        """The entry of a checkpoint."""
        return {"names": self.names, "marks": self.marks}

    def __add__(self, other: TrainedClasses) -> TrainedClasses:
        return TrainedClasses(self.names + other.names, torch.cat([self.marks, other.marks]))

    def among(self, store: ClassStore) -> Known:
        """The classes of a split that are among these."""
        owners: dict[int, list[int]] = {}  # the training classes that have a mark
        for number, own in enumerate(self.marks.tolist()):
            for mark in own:
                owners.setdefault(mark, []).append(number)
        owners.pop(NO_MARK, None)
        same_items = []
        for i, own in enumerate(store.marks.tolist()):
            shared = Counter(number for mark in own for number in owners.get(mark, []))
            if shared and max(shared.values()) >= min(ALIKE, len(set(own) - {NO_MARK})):
                same_items.append(i)
        names = set(self.names)
        named = {i for i, name in enumerate(plain_names(store)) if name in names}
        return Known(same_items, sorted(named - set(same_items)))


def plain_names(source: EpisodeSource) -> list[str]:
    """The names of the classes of a split, those of several datasets without the name of the dataset."""
    parts: Mapping[str, EpisodeSource] = source.parts or {"": source}
    return [name for part in parts.values() for name in part.names]
