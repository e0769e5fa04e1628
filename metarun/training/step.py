"""One outer step: in chunks of tasks, from a compiled trace, or as a CUDA graph.

All ways use the same episodes and give the same result up to rounding (tests/unit/test_engine.py).
"""

from __future__ import annotations

import copy
import functools
import itertools
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from metarun.algorithms.base import Algorithm
from metarun.errors import TrainingError, counted, first_line, is_out_of_memory
from metarun.tasks.class_store import ClassStore
from metarun.tasks.curriculum import PrioritizedReplay
from metarun.tasks.episodes import EpisodeShape, Outcome, Tasks, run_parts
from metarun.tasks.numbers import TaskNumbers, drawn_from
from metarun.tasks.rollouts import Rollouts
from metarun.tasks.sampling import fetched_ahead, seed_of, training_draws
from metarun.tasks.source import Draw, EpisodeSource, Fetched, split_draw
from metarun.training.compiled import (
    Gradient,
    GradientOfDraw,
    MetaLoss,
    add,
    can_trace,
    end_capture,
    explained_derivatives,
    traced_gradient,
)
from metarun.training.hardware import Hardware
from metarun.training.memory import peak_bytes
from metarun.training.outer_loops import Clip, OuterLoop, check_fit
from metarun.training.outer_loops import Gradient as GradientStep
from metarun.training.shared_gradient import SharedGradient

WARM_UP = 3  # eager steps before a CUDA graph is captured, as PyTorch recommends


class OuterStep:
    """Runs outer steps: the meta-gradient of a meta-batch, followed by a step of the optimizer.

    Call `prepare` before the first `step`.

    Args:
        algorithm: the algorithm, on the hardware's device.
        optimizer: the optimizer of the algorithm's parameters.
        source: the training split.
        shape: the shape of a task.
        meta_batch: the number of tasks in a step, which the ranks of `hardware` share.
        seed: of the training tasks.
        hardware: the number of tasks at once, compilation and CUDA graphs.
        clip: gradient clipping, if any.
        outer_loop: what is done with the meta-gradient.
        sampler: which tasks are drawn again; None: each step has new tasks.

    Attributes:
        running_totals: sums over tasks of the loss and of each metric since they were last reset,
            float64 [1 + metrics], on the device.

    Raises:
        ConfigError: there are fewer tasks than ranks, or the rule of the outer loop needs all in one process.
    """

    def __init__(
        self,
        algorithm: Algorithm,
        optimizer: Optimizer,
        source: EpisodeSource,
        shape: EpisodeShape,
        meta_batch: int,
        seed: int,
        hardware: Hardware,
        clip: Clip | None = None,
        outer_loop: OuterLoop | None = None,
        sampler: PrioritizedReplay | None = None,
    ) -> None:
        self.algorithm, self.optimizer, self.source = algorithm, optimizer, source
        self.shape, self.meta_batch, self.seed = shape, meta_batch, seed
        self.static = source.spec.static and not shape.varied  # the same operations and shapes in every step
        self.hardware, self.clip, self.outer_loop = hardware, clip, outer_loop or GradientStep()
        self.sampler = sampler
        self.task_scores: list[Tensor] = []  # of the current step, for the sampler
        self.metrics = source.spec.objective.metrics
        self.params = [p for p in algorithm.parameters() if p.requires_grad]
        self.running_totals = torch.zeros(1 + len(self.metrics), dtype=torch.float64, device=hardware.device)
        self.ranks, self.share = hardware.ranks, hardware.ranks.share(meta_batch)
        check_fit(self.outer_loop, self.ranks, algorithm)
        self.shared = SharedGradient(self.ranks, algorithm, self.params, meta_batch)
        self.generator: torch.Generator | None = None  # of the numbers of tasks, if there are ranks
        self.numbers: TaskNumbers | None = None
        self.place = 0  # of the tasks that are run, in the meta-batch
        self.at_once = self.most_at_once = 1 if shape.varied else self.shared.own  # lowered without memory
        self.traced: dict[int, GradientOfDraw] = {}  # by number of tasks; other numbers run eagerly
        self.say: Callable[[str], object] = lambda text: None
        self.iteration, self.capturing = 0, False
        self.draws: Iterator[Draw] = iter(())
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static_draw: Draw = ()  # the input tensors of the graph
        self.static_share: Gradient | None = None  # its results, if ranks add them up
        self.eager_steps_left: int | None = None  # until the graph is captured; None: it will not be captured

    def prepare(self, start: int, say: Callable[[str], object] = lambda text: None) -> None:
        """Choose how to run the steps from iteration `start` on; call it within `hardware.compute()`.

        Args:
            start: the next iteration.
            say: called with a message for each decision that a user should know.
        """
        self.say, self.iteration, self.capturing = say, start, False
        self.generator = self.generator or self.ranks.generator()
        algorithm = self.algorithm
        algorithm.start_step(start)
        self.traced.clear()
        # Release an earlier graph before memory is measured: it holds memory.
        self.graph, self.static_draw, self.static_share, self.numbers = None, (), None, None
        self.optimizer.zero_grad()
        self.draws = self.draws_from(start)
        bytes_of_one, on_gpu = functools.cache(self.bytes_of_one_task), self.hardware.device.type == "cuda"
        static = self.static and not self.sampler  # which has to know the score of each task
        if not algorithm.couples_tasks:
            self.at_once = self.ranks.least(self.hardware.tasks_at_once(self.most_at_once, bytes_of_one))
        on_host = self.host_store() is not None
        wants_graph = self.hardware.graph and on_gpu and static and not on_host
        if on_gpu and on_host:  # capture is not possible while another thread copies to the device
            say("images are kept in host memory, each meta-batch is copied ahead of its step; no CUDA graph")
        self.eager_steps_left = WARM_UP if wants_graph else None
        if self.at_once < self.shared.own and not self.shape.varied:
            say(f"{self.at_once} of {self.shared.own} tasks at once")
        if static and (
            self.hardware.compile is True or (can_trace(algorithm) and self.hardware.traces(bytes_of_one))
        ):
            self.trace(compiles=self.hardware.compile is True)

    def draws_from(self, start: int) -> Iterator[Draw]:
        """The draws of this rank's share of the meta-batches from iteration `start` on."""
        if self.sampler is not None:
            drawn = (self.source, self.meta_batch, self.shape, self.seed)
            whole = (self.sampler.draw(*drawn, iteration) for iteration in itertools.count(start))
            return map(self.part_of, whole)
        store = self.host_store()
        # The random numbers of environments are drawn by the CPU, from the seeds of their tasks.
        device = "cpu" if store or not self.static else self.hardware.device
        every = training_draws(self.source, self.meta_batch, self.shape, self.seed, start, device)
        draws = map(self.part_of, every)
        return fetched_ahead(draws, store) if store else draws

    def part_of(self, draw: Draw) -> Draw:
        """This rank's share of a draw."""
        return draw if self.ranks.count == 1 else tuple(tensor[self.share] for tensor in draw)

    def random_state(self) -> torch.Tensor:
        """The state of the random numbers of the CPU, which is the same on all ranks between two steps."""
        return torch.get_rng_state() if self.generator is None else self.generator.get_state()

    def host_store(self) -> ClassStore | None:
        """The source if its items are kept in host memory and fetched for all tasks at once, else None."""
        if self.source.host_for is None or self.shape.varied:
            return None
        assert isinstance(self.source, ClassStore)
        return self.source

    def bytes_of_one_task(self) -> int:
        """The peak memory of the meta-gradient of one task, in bytes.

        Measured on a copy, so that weights, running averages and the random state do not change.
        """
        draw = next(split_draw(next(self.draws_from(0)), 1))
        # `place` joins the weights of recurrent layers, which a copy leaves apart.
        clone = self.hardware.place(copy.deepcopy(self.algorithm))
        params = [p for p in clone.parameters() if p.requires_grad]
        with self.hardware.forked_random():
            return peak_bytes(lambda: self.meta_gradient(clone.meta_loss, params, draw), self.hardware.device)

    # one step

    def step(self) -> None:
        """Run one outer step on the next meta-batch, without copying anything from the device to the host."""
        if self.algorithm.start_step(self.iteration):
            self.prepare(self.iteration, self.say)
        if self.generator is not None:  # for numbers of no task, as of dropout: the iteration and the rank
            torch.manual_seed(seed_of(f"step {self.seed} {self.iteration} {self.ranks.rank}"))
        self.numbers = TaskNumbers(self.meta_batch, self.generator)
        self.iteration += 1
        self.task_scores.clear()
        draw = next(self.draws)
        if self.graph is not None:
            self.replay(draw)
        elif self.eager_steps_left == 0:
            self.capture(draw)
        else:
            self.outer_loop.step(self, draw)
            if self.eager_steps_left:
                self.eager_steps_left -= 1
        if self.sampler is not None:
            scores = self.ranks.whole(torch.cat(self.task_scores), self.meta_batch)
            self.sampler.update(scores, self.iteration)

    def backward(self, draw: Draw) -> None:
        """Write the meta-gradient to each weight's `.grad`; if memory runs out, halve the tasks at once."""
        while True:
            share, reason = None, "in another process"
            self.shared.begin()
            try:
                share = self.summed_gradient(draw)
            except (RuntimeError, MemoryError) as error:
                if self.capturing or not is_out_of_memory(error):
                    raise  # a graph that is captured already contains part of the failed step
                reason = first_line(error)
            if not self.shared.any_failed(share and share[0]):
                break
            self.task_scores.clear()
            self.halve(reason)
        assert share is not None
        self.write_share(share)

    def write_share(self, share: Gradient) -> None:
        """Add up the shares of all ranks, and write the gradient to each weight's `.grad`."""
        grads, figures = self.shared.combined(*share)
        self.write_gradient(grads)
        self.running_totals += figures

    def backward_again(self, batches: Sequence[Rollouts], count: int) -> None:
        """Write the gradient on collected trajectories to each weight's `.grad`.

        Args:
            batches: chunks of tasks whose trajectories are recorded.
            count: the number of tasks in them.
        """
        total: Gradient | None = None
        for tasks in batches:
            outcome, grads = self.gradient_of(self.algorithm.meta_loss, self.params, tasks, count)
            part = grads, outcome.loss.detach().sum()
            total = part if total is None else add(total, part)
        assert total is not None
        self.write_gradient(total[0])

    def write_gradient(self, grads: Sequence[Tensor | None]) -> None:
        """Write a gradient to each weight's `.grad`, clipped."""
        for p, grad in zip(self.params, grads, strict=True):
            # Optimizers expect the memory layout of the weight. Clipping works in place, so it needs a copy:
            # two weights may share a gradient tensor.
            fits = grad is None or (grad.stride() == p.stride() and not self.clip)
            p.grad = grad if fits else torch.empty_like(p).copy_(grad)  # type: ignore[arg-type]
        if self.clip:
            self.clip.apply(self.params)

    def halve(self, reason: str) -> None:
        """Halve the tasks at once. Raises TrainingError if a single task does not fit, or all have to."""
        together = self.algorithm.couples_tasks and self.at_once > 1
        if self.at_once == 1 or together:
            how, advice = ("all tasks", "meta_batch, ") if together else ("one task at a time", "")
            raise TrainingError(
                f"out of memory with {how} ({reason}); lower {advice}shots, queries, ways or inner_loop.steps"
            )
        self.at_once = self.most_at_once = (self.at_once + 1) // 2
        if self.hardware.device.type == "cuda":
            torch.cuda.empty_cache()
        self.say(f"out of memory: continuing with {counted(self.at_once, 'task')} at once")

    def summed_gradient(self, draw: Draw) -> Gradient:
        """The gradient of a meta-batch, added up over chunks of tasks; it does not depend on their size."""
        total: Gradient | None = None
        store, self.place = self.host_store(), self.share.start
        for chunk in split_draw(draw, self.at_once):
            if store and not isinstance(chunk, Fetched):  # there was no memory to fetch the whole draw ahead
                chunk = store.fetch(chunk)
            part = self.traced.get(len(chunk[0]), self.eager_gradient)(chunk)
            total = part if total is None else add(total, part)
            self.place += len(chunk[0])
        assert total is not None
        return total

    def eager_gradient(self, draw: Draw) -> Gradient:
        return self.meta_gradient(self.algorithm.meta_loss, self.params, draw)

    def meta_gradient(self, meta_loss: MetaLoss, params: Sequence[Tensor], draw: Draw) -> Gradient:
        """The share of these tasks in the meta-gradient, and the sums of their losses and scores."""
        tasks = self.source.gather(draw, self.shape).to(self.hardware.dtype)
        with drawn_from(self.numbers, self.place, tasks):
            outcome, grads = self.gradient_of(meta_loss, params, tasks, self.meta_batch)
        return grads, self.figures(outcome, len(tasks))

    def gradient_of(
        self, meta_loss: MetaLoss, params: Sequence[Tensor], tasks: Tasks, of: int
    ) -> tuple[Outcome, list[Tensor | None]]:
        """The outcome of tasks, and their share in the meta-gradient of `of` tasks."""
        with explained_derivatives():
            outcome = run_parts(meta_loss, tasks)
            loss, count = outcome.loss.mean(), len(tasks)
            share = loss if count == of else loss * (count / of)
            grads = torch.autograd.grad(share, params, allow_unused=True)
        return outcome, list(grads)

    def figures(self, outcome: Outcome, count: int) -> Tensor:
        """The sums of the losses and the scores of `count` tasks, float64 [1 + metrics]."""
        if self.sampler is not None:
            score = outcome.loss.detach().expand(count) if outcome.gain is None else outcome.gain
            self.task_scores.append(score)
        loss = outcome.loss.detach().mean()
        scores = [outcome.scores[metric.name].mean().to(loss.dtype) for metric in self.metrics]
        return torch.stack([loss, *scores]).double() * count

    # environments

    @torch.no_grad()
    def collect(self, draw: Draw) -> list[Rollouts]:
        """Let the current weights act in the environments of a draw, and keep the trajectories.

        Returns:
            The tasks in chunks of `at_once`, with the credit of each if the estimator takes it into account.
        """
        batches = []
        for chunk in split_draw(draw, self.at_once):
            tasks = self.source.gather(chunk, self.shape).to(self.hardware.dtype)
            assert isinstance(tasks, Rollouts)
            self.running_totals += self.figures(self.algorithm.meta_loss(tasks), len(tasks))
            batches.append(tasks)
        self.algorithm.on_collected(batches)
        if batches[0].estimator.credit and self.meta_batch > 1:
            total = torch.stack([tasks.mean_returns().sum() for tasks in batches]).sum()
            for tasks in batches:  # the mean of the other tasks keeps the estimate unbiased
                tasks.give_credit((total - tasks.mean_returns()) / (self.meta_batch - 1))
        return batches

    # one CUDA graph

    def capture(self, draw: Draw) -> None:
        """Capture gather, gradient and optimizer as one graph; if that fails, report it and run eagerly."""
        self.eager_steps_left = None
        self.static_draw = tuple(tensor.clone() for tensor in draw)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()
        self.capturing = True
        torch.cuda.synchronize(self.hardware.device)
        try:
            with torch.cuda.graph(graph, capture_error_mode=self.ranks.capture_mode):
                if self.ranks.joined:  # what they exchange is not part of the graph
                    self.static_share = self.summed_gradient(self.static_draw)
                else:
                    self.backward(self.static_draw)
                    if self.hardware.captures_optimizer(self.optimizer):
                        self.optimizer.step()
        except Exception as error:
            # Ending a failed capture raises another error; the context is the first one.
            reason = first_line(error.__context__ or error)
            self.say(f"no CUDA graph, continuing with eager steps: {reason}")
            self.capturing = False
            end_capture(self.hardware.device)
            self.outer_loop.step(self, draw)
            return
        self.capturing = False
        self.graph = graph
        self.replay(draw)

    def replay(self, draw: Draw) -> None:
        """Run the captured graph on a draw."""
        assert self.graph is not None
        for static, fresh in zip(self.static_draw, draw, strict=True):
            static.copy_(fresh)
        self.shared.begin()
        self.graph.replay()
        if self.ranks.joined:
            assert self.static_share is not None
            self.shared.any_failed(self.static_share[0])
            self.write_share(self.static_share)
        if self.ranks.joined or not self.hardware.captures_optimizer(self.optimizer):
            self.optimizer.step()

    # the gradient from a trace

    def trace(self, compiles: bool) -> None:
        """Trace, and optionally compile, the gradient for each size of chunk; if that fails, run eagerly."""
        began, random = time.perf_counter(), False
        if not compiles:
            self.hardware.spare_threads(self.say)
        try:
            for chunk in split_draw(next(self.draws_from(0)), self.at_once):
                if len(chunk[0]) not in self.traced:
                    self.numbers = TaskNumbers(self.meta_batch, self.ranks.generator())
                    self.traced[len(chunk[0])] = traced_gradient(
                        self.algorithm, self.meta_gradient, chunk, self.hardware, compiles
                    )
                    random = random or bool(self.numbers.drawn)
        except Exception as error:
            self.traced.clear()
            if compiles:
                self.say(f"compilation failed, continuing without: {first_line(error)}")
        else:
            if random and (self.ranks.joined or self.at_once < self.meta_batch):
                self.traced.clear()  # a trace of a part would hold its numbers, or draw those of all again
            elif compiles:
                self.say(f"compiled in {time.perf_counter() - began:.0f} s")
        self.numbers = None
