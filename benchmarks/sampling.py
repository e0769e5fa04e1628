"""Workload D: sampling a meta-batch from the class store, compared with a loader of single images."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from benchmarks.limit import seconds
from benchmarks.workloads import WORKLOADS
from metarun.tasks.class_store import ClassStore
from metarun.tasks.sampling import training_draws

TASKS, ROUNDS, BATCHES = 32, 7, 16


class SingleImages(Dataset[tuple[Tensor, int]]):
    """A dataset of single images, as few-shot code with torch.utils.data usually reads them."""

    def __init__(self, store: ClassStore) -> None:
        self.images, self.per_class = store.items.cpu(), store.largest_class

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index].float().div_(255), index // self.per_class


class EpisodeSampler(Sampler[list[int]]):
    """The rows of one task: N classes, and K + Q images of each."""

    def __init__(self, classes: int, per_class: int, ways: int, images: int, episodes: int) -> None:
        self.classes, self.per_class, self.ways, self.images = classes, per_class, ways, images
        self.episodes = episodes

    def __len__(self) -> int:
        return self.episodes

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.episodes):
            rows = []
            for c in torch.randperm(self.classes)[: self.ways].tolist():
                rows += [
                    c * self.per_class + i for i in torch.randperm(self.per_class)[: self.images].tolist()
                ]
            yield rows


def sampling(device: torch.device) -> dict[str, dict[str, Any]]:
    """Milliseconds for a meta-batch of 32 tasks, in turns."""
    workload = WORKLOADS["W1a"]
    store, shape = workload.source(device), workload.shape
    assert isinstance(store, ClassStore)
    draws = training_draws(store, TASKS, shape, 0, device=device)
    sampler = EpisodeSampler(
        len(store.names), store.largest_class, shape.ways, shape.shots + shape.queries, TASKS
    )
    loader = DataLoader(SingleImages(store), batch_sampler=sampler)

    def from_store() -> None:
        for _ in range(BATCHES):
            store.gather(next(draws), shape)

    def from_loader() -> None:
        torch.stack([x for x, _ in loader]).to(device)

    times: dict[str, list[float]] = {"class store": [], "loader of single images": []}
    from_store()
    for _ in range(ROUNDS):
        times["class store"].append(seconds(from_store, device) / BATCHES)
        times["loader of single images"].append(seconds(from_loader, device))
    own = median(times["class store"])
    return {key: {"ms": 1e3 * median(t), "ratio": median(t) / own} for key, t in times.items()}
