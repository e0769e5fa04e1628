"""Stand-in until the datasets branch is merged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch

from metarun.tasks.source import EpisodeSource
from metarun.tasks.spec import TaskSpec

Split = Literal["train", "validation", "test"]


class Dataset(ABC):
    drawings: bool = False

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec(tuple(self.item_shape))  # type: ignore[attr-defined]

    @abstractmethod
    def split(self, name: Split, device: torch.device | str = "cpu") -> EpisodeSource: ...

    def reshaped(self, item_shape: tuple[int, ...]) -> Dataset:
        return self
