"""Which tasks are drawn when: meta-batches of training, and the fixed tasks of an evaluation.

What is drawn depends on names and numbers alone (the seed, the iteration, the split), never on what was
drawn before, so that a sampler has no state to save. It is drawn by the CPU's generator, which gives every
device the same tasks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import EpisodeShape, Tasks
from metarun.tasks.source import Draw, EpisodeSource

TRAINING_BLOCK = 16  # meta-batches drawn at once, so that the cost of a draw is shared by many small steps
# Tasks of an evaluation are drawn in blocks of this size, each from its own seed. So they do not depend on
# how many are run at once, and the first 100 of 600 are the first 100 of 200.
EVALUATION_BLOCK = 50


def seeded(name: str) -> torch.Generator:
    """A CPU generator whose numbers depend on `name` alone."""
    return torch.Generator().manual_seed(seed_of(name))


def seed_of(name: str) -> int:
    """A seed that depends on `name` alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "little")


def sample(source: EpisodeSource, tasks: int, shape: EpisodeShape, generator: torch.Generator) -> Tasks:
    """Draw and gather `tasks` tasks."""
    return source.gather(source.draw(tasks, shape, generator), shape)


def fixed_draws(source: EpisodeSource, shape: EpisodeShape, episodes: int, seed: int) -> Iterator[Draw]:
    """Blocks of `episodes` tasks that depend on the source, the shape and the seed alone."""
    for block, start in enumerate(range(0, episodes, EVALUATION_BLOCK)):
        draw = source.draw(EVALUATION_BLOCK, shape, seeded(f"{seed} {block} {source.fingerprint}"))
        yield tuple(tensor[: episodes - start] for tensor in draw)


def training_draws(
    source: EpisodeSource,
    tasks: int,
    shape: EpisodeShape,
    seed: int,
    start: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[Draw]:
    """The meta-batches of iterations `start`, `start` + 1, ... without end.

    Args:
        source: the training split.
        tasks: tasks of a meta-batch.
        shape: the shape of each task.
        seed: the run's seed.
        start: the first iteration.
        device: where the choices are put.
    """
    block, skip = divmod(start, TRAINING_BLOCK)
    on_gpu = torch.device(device).type == "cuda"
    while True:
        draws = source.draw(TRAINING_BLOCK * tasks, shape, seeded(f"training {seed} {block}"))
        if on_gpu:  # from pinned memory, so that the host does not wait for the device
            draws = tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in draws)
        meta_batches = list(zip(*(tensor.split(tasks) for tensor in draws), strict=True))
        yield from meta_batches[skip:]
        block, skip = block + 1, 0


def fetched_ahead(draws: Iterator[Draw], store: ClassStore) -> Iterator[Draw]:
    """The draws with their items, copied from host memory while the device works on the draw before.

    A thread gathers the items and, on a GPU, a CUDA stream of its own copies them. A draw that does not
    fit beside the one before is passed on as it is, to be fetched in the parts that it is run in.
    """
    assert store.host_for is not None
    stream = torch.cuda.Stream(store.host_for) if store.host_for.type == "cuda" else None

    def fetch(draw: Draw) -> Draw:
        try:
            with torch.cuda.stream(stream):  # None: the current stream
                return store.fetch(draw)
        except torch.OutOfMemoryError:
            return draw

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(fetch, next(draws))
        while True:
            ready = coming.result()
            if stream is not None:
                current = torch.cuda.current_stream(store.host_for)
                current.wait_stream(stream)  # before the next copy is put into it
                for tensor in ready:
                    if tensor.is_cuda:
                        tensor.record_stream(current)
            coming = pool.submit(fetch, next(draws))
            yield ready
