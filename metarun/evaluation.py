"""Accuracy over many episodes, its confidence interval, and paired comparison."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from metarun.algorithms.base import Algorithm
from metarun.episodes import Draw, EpisodeSource, Geometry, seeded, split_draw
from metarun.hardware import Hardware
from metarun.measure import peak_bytes
from metarun.objectives import metric_name, task_score

# Episodes are drawn in blocks of this size, each from its own seed, so that what is drawn does
# not depend on how many are run at once, and the first 100 of 600 are the first 100 of 200.
BLOCK = 50
TASKS_IN_TURN = 10  # at once, where examples are seen one by one


@dataclass(frozen=True)
class Result:
    """The scores of one algorithm on fixed episodes of one geometry."""

    geometry: Geometry
    metric: str  # "accuracy" in [0, 1], or "mse"
    scores: Tensor  # [episodes], on the CPU
    losses: Tensor  # [episodes]
    episodes_hash: str
    uses_query_statistics: bool
    seconds: float
    parts: Mapping[str, Result] = field(default_factory=dict)  # by dataset, where there were several

    @property
    def mean(self) -> float:
        return self.scores.mean().item()

    @property
    def loss(self) -> float:
        return self.losses.mean().item()

    @property
    def interval(self) -> float:
        """Of the mean; of a mean over datasets, from the intervals of theirs."""
        if self.parts:
            return math.hypot(*(part.interval for part in self.parts.values())) / len(self.parts)
        return interval(self.scores)


def interval(values: Tensor) -> float:
    """Half the width of the 95 % confidence interval of the mean over episodes: 1.96 s / sqrt(n)."""
    if len(values) < 2:
        return math.nan
    return 1.96 * values.double().std().item() / math.sqrt(len(values))


def paired_difference(a: Result, b: Result) -> tuple[float, float]:
    """Mean and 95 % interval of a's score minus b's on the same episodes."""
    if a.episodes_hash != b.episodes_hash:
        raise ValueError("results on different episodes cannot be paired")
    difference = a.scores - b.scores
    return difference.mean().item(), interval(difference)


def fixed_draws(source: EpisodeSource, geometry: Geometry, episodes: int, seed: int) -> Iterator[Draw]:
    """Blocks of episodes that depend on the source, the geometry and the seed alone.

    The generator is the CPU's, so that every device meets the same episodes.
    """
    for block, start in enumerate(range(0, episodes, BLOCK)):
        draw = source.draw(BLOCK, geometry, seeded(f"{seed} {block} {source.fingerprint}"))
        yield tuple(tensor[: episodes - start] for tensor in draw)


@contextmanager
def evaluating(algorithm: Algorithm, hardware: Hardware, seed: int) -> Iterator[None]:
    """In evaluation mode, without gradients, on random numbers of `seed`; afterwards all is as before."""
    training = algorithm.training
    algorithm.eval()
    try:
        with hardware.forked_random(), torch.no_grad(), hardware.compute():
            torch.manual_seed(seed)
            yield
    finally:
        algorithm.train(training)


def instance_scores(
    algorithm: Algorithm,
    source: EpisodeSource,
    geometry: Geometry,
    episodes: int,
    seed: int,
    hardware: Hardware,
    advance: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """Accuracy at a class's first, second, ... appearance, [episodes, K + Q], of a method that has it."""
    source.check(geometry)
    scores = []
    with evaluating(algorithm, hardware, seed):
        for draw in fixed_draws(source, geometry, episodes, seed):
            length = geometry.ways * (geometry.shots + geometry.queries)
            orders = torch.rand(len(draw[0]), length, dtype=torch.float32).argsort(1)
            for part in split_draw((*draw, orders), TASKS_IN_TURN):
                tasks = source.gather(part[:-1], geometry).to(hardware.dtype)
                order = part[-1].to(hardware.device)
                scores.append(algorithm.by_instance(tasks, order))  # type: ignore[operator]
                advance(len(tasks))
    return torch.cat(scores).cpu()


def evaluate(
    algorithm: Algorithm,
    source: EpisodeSource,
    geometry: Geometry,
    episodes: int,
    seed: int,
    hardware: Hardware,
    advance: Callable[[int], object] = lambda count: None,
) -> Result:
    """Adapt to and score `episodes` fixed episodes; `advance(n)` is told of every n done.

    Where the source has several datasets, the result is the mean over so many episodes of each. The
    algorithm is left in the mode it was in, and the global random state untouched.
    """
    if parts := getattr(source, "parts", None):
        results = {
            name: evaluate(algorithm, part, geometry, episodes, seed, hardware, advance)
            for name, part in parts.items()
        }
        return mean_of(results)
    source.check(geometry)
    began = time.perf_counter()
    digest = hashlib.sha256(f"{source.fingerprint} {geometry}".encode())
    scores, losses, metric = [], [], "accuracy"
    at_once = 0

    def judge(draw: Draw) -> tuple[Tensor, Tensor, str]:
        """Each task's loss and score, [T]."""
        tasks = source.gather(draw, geometry).to(hardware.dtype)
        adapted = algorithm.adapt(tasks.support_x, tasks.support_y, tasks.ways)
        outputs = algorithm.predict(adapted, tasks.query_x).to(hardware.dtype)
        return (
            algorithm.loss(outputs, tasks.query_y),
            task_score(outputs, tasks.query_y),
            metric_name(tasks.query_y),
        )

    def tasks_at_once(draw: Draw) -> int:
        one = next(split_draw(draw, 1))
        with hardware.forked_random():
            return hardware.tasks_at_once(BLOCK, lambda: peak_bytes(lambda: judge(one), hardware.device))

    with evaluating(algorithm, hardware, seed):
        for draw in fixed_draws(source, geometry, episodes, seed):
            for tensor in draw:
                digest.update(tensor.numpy().tobytes())
            at_once = at_once or tasks_at_once(draw)
            for part in split_draw(draw, at_once):
                loss, score, metric = judge(part)
                losses.append(loss)
                scores.append(score)
                advance(len(score))
    return Result(
        geometry=geometry,
        metric=metric,
        scores=torch.cat(scores).cpu(),
        losses=torch.cat(losses).cpu(),
        episodes_hash=digest.hexdigest()[:16],
        uses_query_statistics=algorithm.uses_query_statistics,
        seconds=time.perf_counter() - began,
    )


def mean_of(results: Mapping[str, Result]) -> Result:
    """One result of several datasets', each on as many episodes."""
    one, *_ = results.values()
    hashes = " ".join(result.episodes_hash for result in results.values())
    return Result(
        geometry=one.geometry,
        metric=one.metric,
        scores=torch.cat([result.scores for result in results.values()]),
        losses=torch.cat([result.losses for result in results.values()]),
        episodes_hash=hashlib.sha256(hashes.encode()).hexdigest()[:16],
        uses_query_statistics=one.uses_query_statistics,
        seconds=sum(result.seconds for result in results.values()),
        parts=results,
    )
