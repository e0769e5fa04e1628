"""Scores over many tasks, their confidence intervals, and paired comparison."""

from __future__ import annotations

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from metarun.algorithms.base import Algorithm
from metarun.tasks.episodes import Episodes, EpisodeShape, Outcome, Tasks, run_parts
from metarun.tasks.numbers import TaskNumbers, drawn_from
from metarun.tasks.objectives import Metric
from metarun.tasks.sampling import EVALUATION_BLOCK, fixed_draws
from metarun.tasks.source import Draw, EpisodeSource, split_draw
from metarun.training.hardware import Hardware
from metarun.training.memory import peak_bytes
from metarun.training.parallel import Ranks

Item = TypeVar("Item")
INSTANCE_TASKS = 10  # tasks at once in `instance_scores`


@dataclass(frozen=True)
class EvalSettings:
    """The tasks of an evaluation: fixed tasks, which depend only on the seed and the data.

    Args:
        shape: the shape of the tasks.
        episodes: the number of tasks.
        seed: of the tasks.
    """

    shape: EpisodeShape
    episodes: int
    seed: int


@dataclass(frozen=True)
class Result:
    """The scores of one algorithm on fixed tasks.

    Args:
        shape: the shape of the tasks.
        metrics: the computed metrics, the main metric first.
        scores: the score of each task [episodes] on the CPU, by the name of the metric.
        losses: the loss of each task, [episodes].
        episodes_hash: identifies the tasks: results with the same hash can be compared task by task.
        uses_query_statistics: whether predictions for the queries of a task depend on each other.
        seconds: the duration of the evaluation.
        parts: the results by dataset, if there were several.
        confusion: int64 [classes, classes], how many queries of class i were predicted as class j, if
            requested.
    """

    shape: EpisodeShape
    metrics: tuple[Metric, ...]
    scores: Mapping[str, Tensor]
    losses: Tensor
    episodes_hash: str
    uses_query_statistics: bool
    seconds: float
    parts: Mapping[str, Result] = field(default_factory=dict)
    confusion: Tensor | None = None

    @property
    def metric(self) -> Metric:
        """The main metric."""
        return self.metrics[0]

    @property
    def episodes(self) -> int:
        return len(self.losses)

    @property
    def loss(self) -> float:
        return self.losses.mean().item()

    @property
    def diverged(self) -> int:
        """The number of tasks whose loss is not finite, so that their scores mean nothing."""
        return int((~self.losses.isfinite()).sum())

    @property
    def mean(self) -> float:
        """The mean of the main metric."""
        return self.mean_of(self.metric)

    @property
    def interval(self) -> float:
        """Half-width of the 95 % confidence interval of the mean of the main metric."""
        return self.interval_of(self.metric)

    def mean_of(self, metric: Metric) -> float:
        return self.scores[metric.name].mean().item()

    def interval_of(self, metric: Metric) -> float:
        """Half-width of the 95 % interval of the mean; for several datasets, of the mean of their means."""
        if self.parts:
            halves = (part.interval_of(metric) for part in self.parts.values())
            return math.hypot(*halves) / len(self.parts)
        return interval(self.scores[metric.name])


def interval(values: Tensor) -> float:
    """Half-width of the 95 % interval of the mean over tasks, 1.96 s / sqrt(n); NaN for one task."""
    if len(values) < 2:
        return math.nan
    return 1.96 * values.double().std().item() / math.sqrt(len(values))


def paired_difference(a: Result, b: Result, metric: Metric) -> tuple[float, float]:
    """The mean over tasks of a's score minus b's, and the half-width of its 95 % confidence interval."""
    if a.episodes_hash != b.episodes_hash:
        raise ValueError("the results are on different episodes; a paired comparison needs the same episodes")
    difference = a.scores[metric.name] - b.scores[metric.name]
    return difference.mean().item(), interval(difference)


@contextmanager
def evaluating(algorithm: Algorithm, hardware: Hardware, seed: int) -> Iterator[None]:
    """A context for evaluation: evaluation mode, no gradients, and the random seed `seed`.

    On exit, the mode and the global random state are restored.
    """
    training = algorithm.training
    algorithm.eval()
    try:
        with hardware.forked_random(), torch.no_grad(), hardware.compute():
            torch.manual_seed(seed)
            yield
    finally:
        algorithm.train(training)


def adapted_outcome(algorithm: Algorithm, tasks: Tasks, dtype: torch.dtype) -> Outcome:
    """Adapt to each task's support and predict its queries, with outputs in `dtype`."""

    def run(part: Tasks) -> Outcome:
        part = algorithm.balanced(part)
        return algorithm.outcome(algorithm.adapt(part), part, dtype)

    return run_parts(run, tasks)


def evaluate(
    algorithm: Algorithm,
    source: EpisodeSource,
    settings: EvalSettings,
    hardware: Hardware,
    advance: Callable[[int], object] = lambda count: None,
    confusion: bool = False,
    shared: bool = True,
) -> Result:
    """Adapt to fixed tasks and score their queries.

    The mode of the algorithm and the global random state are restored. Ranks run the chunks of tasks that a
    single process would run, in turns, so that every task has the same scores for any number of ranks.

    Args:
        algorithm: the algorithm, on the hardware's device.
        source: the split. If it mixes datasets, the same number of tasks is evaluated on each, and the
            result is the mean.
        settings: the tasks.
        hardware: the device, the precision and the number of tasks at once.
        advance: called with n after every n tasks; the ranks call it at the same time.
        confusion: whether to compute the confusion matrix.
        shared: whether the ranks share the tasks; if not, each runs all of them.

    Returns:
        The scores of every task.

    Raises:
        DataError: if the split is too small for the shape of the tasks.
    """
    if source.parts:
        results = {
            name: evaluate(algorithm, part, settings, hardware, advance, confusion, shared)
            for name, part in source.parts.items()
        }
        return mean_of(results)
    shape, ranks = settings.shape, hardware.ranks if shared else Ranks()
    source.check(shape)
    began = time.perf_counter()
    digest = hashlib.sha256(f"{source.fingerprint} {shape}".encode())
    counts = ClassCounts(len(source.names), hardware.device) if confusion and source.names else None
    generator = torch.Generator().manual_seed(settings.seed)
    on_gpu = hardware.device.type != "cpu"  # whose own numbers depend on how many tasks run at once
    shared = hardware.ranks.joined or on_gpu
    numbers = TaskNumbers(settings.episodes, generator, on_gpu) if shared else None

    def judge(place: int, draw: Draw, counts: ClassCounts | None = None) -> Outcome:
        tasks = source.gather(draw, shape).to(hardware.dtype)
        with drawn_from(numbers, place, tasks):
            outcome = adapted_outcome(algorithm, tasks, hardware.dtype)
        if counts is not None and isinstance(tasks, Episodes) and outcome.outputs is not None:
            counts.add(tasks, outcome.outputs)
        return Outcome(outcome.loss, outcome.scores)

    def tasks_at_once(draw: Draw) -> int:
        if shape.varied:
            return 1
        one = next(split_draw(draw, 1))
        with hardware.forked_random():
            found = hardware.tasks_at_once(
                EVALUATION_BLOCK, lambda: peak_bytes(lambda: judge(0, one), hardware.device)
            )
        return hardware.ranks.least(found)

    def chunks() -> Iterator[tuple[int, Draw]]:
        """The tasks that are run at once, with the number of the first of them."""
        at_once = place = 0
        for draw in fixed_draws(source, shape, settings.episodes, settings.seed):
            for tensor in draw:
                digest.update(tensor.numpy().tobytes())
            at_once = at_once or tasks_at_once(draw)
            for part in split_draw(draw, at_once):
                yield place, part
                place += len(part[0])

    outcomes: dict[int, Outcome] = {}  # of this process, by the number of their first task
    like: Outcome | None = None
    random = False  # whether the algorithm draws numbers that do not belong to a task
    with evaluating(algorithm, hardware, settings.seed):
        before = hardware.random_states()
        for turn in in_turns(chunks(), ranks.count):
            place, part = turn[ranks.rank % len(turn)]
            own = ranks.rank < len(turn)
            if own or like is None:
                outcome = judge(place, part, counts if own else None)
                outcomes |= {place: outcome} if own else {}
            if like is None:
                like, after = outcome, hardware.random_states()
                random = ranks.any(not all(map(torch.equal, before, after)))[0]
                if random and ranks.count > 1:
                    break
            advance(sum(len(draw[0]) for _, draw in turn))
    assert like is not None
    if random and ranks.count > 1:  # they would not be those of a single process
        return evaluate(algorithm, source, settings, hardware, advance, confusion, shared=False)
    metrics = source.spec.objective.metrics
    values = [({place: each.loss for place, each in outcomes.items()}, like.loss)]
    for name in (metric.name for metric in metrics):
        values.append(({place: each.scores[name] for place, each in outcomes.items()}, like.scores[name]))
    columns = [joined(parts, example, settings.episodes, ranks) for parts, example in values]
    if counts is not None:
        columns.append(counts.total.cpu())
    columns = ranks.sum(columns) if shared else hardware.ranks.from_first(columns)
    confused = columns.pop() if counts is not None else None
    return Result(
        shape=shape,
        metrics=metrics,
        scores=dict(zip((metric.name for metric in metrics), columns[1:], strict=True)),
        losses=columns[0],
        episodes_hash=digest.hexdigest()[:16],
        uses_query_statistics=algorithm.uses_query_statistics,
        seconds=time.perf_counter() - began,
        confusion=confused,
    )


def in_turns(items: Iterable[Item], count: int) -> Iterator[list[Item]]:
    """The items, `count` at a time; the last list may be shorter."""
    rest = iter(items)
    while turn := list(itertools.islice(rest, count)):
        yield turn


def joined(parts: Mapping[int, Tensor], like: Tensor, tasks: int, ranks: Ranks) -> Tensor:
    """The values [tasks] of all tasks on the CPU; of several ranks, zeros where another one has the value.

    Args:
        parts: values by the number of their first task, in order.
        like: an example of such values.
        tasks: the number of all tasks.
        ranks: the processes that share the tasks.
    """
    if ranks.count == 1:
        return torch.cat(list(parts.values())).cpu()
    whole = torch.zeros(tasks, dtype=like.dtype)
    for place, values in parts.items():
        whole[place : place + len(values)] = values
    return whole


class ClassCounts:
    """Accumulates a confusion matrix: how many queries of each class of a split were predicted as each class.

    Args:
        classes: the number of classes of the split.
        device: of the counts.

    Attributes:
        total: int64 [classes, classes].
    """

    def __init__(self, classes: int, device: torch.device) -> None:
        self.total = torch.zeros(classes, classes, dtype=torch.long, device=device)

    def add(self, tasks: Episodes, outputs: Tensor) -> None:
        """Add the predictions for the queries of tasks, given their logits [T, B, N]."""
        assert tasks.classes is not None
        true = tasks.classes.gather(1, tasks.query_y)  # [T, B], indices of classes of the split
        predicted = tasks.classes.gather(1, outputs.argmax(-1))
        cells = (true * len(self.total) + predicted).flatten()
        self.total += torch.bincount(cells, minlength=self.total.numel()).view_as(self.total)


def instance_scores(
    algorithm: Algorithm,
    source: EpisodeSource,
    settings: EvalSettings,
    hardware: Hardware,
    advance: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """Accuracy at the first, second, ... appearance of a class, for an algorithm with `by_instance` (MANN).

    Args:
        algorithm, source, settings, hardware, advance: see `evaluate`.

    Returns:
        [episodes, K + Q].
    """
    shape = settings.shape
    source.check(shape)
    scores = []
    with evaluating(algorithm, hardware, settings.seed):
        for draw in fixed_draws(source, shape, settings.episodes, settings.seed):
            length = shape.ways * (shape.shots + shape.queries)
            orders = torch.rand(len(draw[0]), length, dtype=torch.float32).argsort(1)
            for part in split_draw((*draw, orders), INSTANCE_TASKS):
                tasks = source.gather(part[:-1], shape).to(hardware.dtype)
                scores.append(algorithm.by_instance(tasks, part[-1].to(hardware.device)))  # type: ignore[operator]
                advance(len(tasks))
    return torch.cat(scores).cpu()


def mean_of(results: Mapping[str, Result]) -> Result:
    """Combine the results on several datasets, with the same number of tasks each, into one."""
    one, *_ = results.values()
    hashes = " ".join(result.episodes_hash for result in results.values())
    return Result(
        shape=one.shape,
        metrics=one.metrics,
        scores={
            metric.name: torch.cat([result.scores[metric.name] for result in results.values()])
            for metric in one.metrics
        },
        losses=torch.cat([result.losses for result in results.values()]),
        episodes_hash=hashlib.sha256(hashes.encode()).hexdigest()[:16],
        uses_query_statistics=one.uses_query_statistics,
        seconds=sum(result.seconds for result in results.values()),
        parts=results,
    )
