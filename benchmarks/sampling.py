"""Workload D: sampling a meta-batch from the class store, compared with a loader of single images.

`python -m benchmarks.sampling` compares images in memory with a memory-mapped file that is larger.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from benchmarks.limit import seconds
from benchmarks.workloads import MINI, WORKLOADS
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.sampling import fetched_ahead, training_draws

TASKS, ROUNDS, BATCHES = 32, 7, 16
SHAPE, PER_CLASS = EpisodeShape(5, 5, 15), 600  # of miniImageNet


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


# a split that is larger than the memory


def larger_than_memory(device: torch.device, gigabytes: float) -> dict[str, dict[str, Any]]:
    """Milliseconds for a meta-batch of 84x84 images from memory and from mapped files, in turns.

    The large file is sparse: it takes no place on the disk, and its pages are cached as they are read.

    Args:
        device: where the meta-batches are needed.
        gigabytes: the size of the large file.

    Returns:
        For each: `ms`, the `ratio` to images in memory, and `mib`: by how much the memory grew that the
        system cannot take back (Linux).
    """
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, dict[str, Any]] = {}
        turns: dict[str, list[float]] = {}
        steps = {}
        for name, size in {
            "memory": 1.0,
            "mapped, 1 GB": 1.0,
            f"mapped, {gigabytes:g} GB": gigabytes,
        }.items():
            before = unshared()
            images = mapped(Path(folder) / f"{len(turns)}", size)
            images = images.clone() if name == "memory" else images
            steps[name] = meta_batches(images, device)
            for _ in range(2 * BATCHES):
                next(steps[name])
            turns[name] = []
            found[name] = {"mib": (unshared() - before) / 2**20}
        for _ in range(ROUNDS):
            for name, step in steps.items():
                turns[name].append(
                    seconds(lambda s=step: [next(s) for _ in range(BATCHES)], device) / BATCHES
                )
        own = median(turns["memory"])
        return {
            name: row | {"ms": 1e3 * median(turns[name]), "ratio": median(turns[name]) / own}
            for name, row in found.items()
        }


def mapped(path: Path, gigabytes: float) -> Tensor:
    """A sparse file of 84x84 images."""
    count = int(gigabytes * 1e9) // int(np.prod(MINI)) // PER_CLASS * PER_CLASS
    content = np.memmap(path, np.uint8, "w+", shape=(count, *MINI))
    return torch.from_numpy(content)


def meta_batches(images: Tensor, device: torch.device) -> Iterator[Tensor]:
    """The supports of the meta-batches of a split with these images in host memory."""
    classes = len(images) // PER_CLASS
    store = ClassStore(
        images, [PER_CLASS] * classes, [str(i) for i in range(classes)], "mapped", fingerprint="sparse"
    )
    draws: Any = training_draws(store, 4, SHAPE, 0)
    if device.type == "cuda":
        store = store.with_items(images, device)
        draws = fetched_ahead(draws, store)
    for draw in draws:
        yield store.gather(draw, SHAPE).support_x


def unshared() -> int:
    """The bytes of the process that are not a file's (Linux); elsewhere 0."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.sampling", description=larger_than_memory.__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--gigabytes", type=float, default=30)
    args = parser.parse_args()
    for name, row in larger_than_memory(torch.device(args.device), args.gigabytes).items():
        print(f"{name:16} {row['ms']:8.2f} ms  {row['ratio']:5.2f}  {row['mib']:8.0f} MiB")


if __name__ == "__main__":
    main()
