"""One outer step on this hardware: in chunks of tasks, compiled, as one CUDA graph.

Whatever is chosen, the episodes are the same, and the arithmetic is to rounding
(tests/unit/test_engine.py).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from metarun.algorithms.base import Algorithm
from metarun.episodes import (
    ClassStore,
    Draw,
    Episodes,
    EpisodeSource,
    Geometry,
    fetched_ahead,
    split_draw,
    training_draws,
)
from metarun.errors import TrainingError, first_line
from metarun.hardware import Hardware
from metarun.measure import peak_bytes
from metarun.objectives import metric_name, task_score

WARM_UP = 3  # eager steps before a CUDA graph is captured, as PyTorch asks
Gradient = tuple[list[Tensor | None], Tensor]  # of each weight; sums of losses and scores, float64 [2]
GradientOfDraw = Callable[[Draw], Gradient]
MetaLoss = Callable[[Episodes], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Clip:
    """Bounds of the meta-gradient: of every entry (`value`), of its length (`norm`)."""

    value: float | None = None
    norm: float | None = None

    def apply(self, params: Sequence[Tensor]) -> None:
        if self.value is not None:
            nn.utils.clip_grad_value_(params, self.value)
        if self.norm is not None:
            nn.utils.clip_grad_norm_(params, self.norm)


class Engine:
    """Makes outer steps. `window` adds up the losses and scores of tasks, on the device."""

    def __init__(
        self,
        algorithm: Algorithm,
        optimizer: Optimizer,
        source: EpisodeSource,
        geometry: Geometry,
        meta_batch: int,
        seed: int,
        hardware: Hardware,
        clip: Clip | None = None,
    ) -> None:
        self.clip = clip
        self.algorithm, self.optimizer, self.source = algorithm, optimizer, source
        self.geometry, self.meta_batch, self.seed = geometry, meta_batch, seed
        self.hardware = hardware
        self.params = [p for p in algorithm.parameters() if p.requires_grad]
        self.window = torch.zeros(2, dtype=torch.float64, device=hardware.device)
        self.at_once = self.most_at_once = meta_batch  # the latter lower once memory ran out
        self.lowered: dict[int, GradientOfDraw] = {}  # by number of tasks; what is missing is run eagerly

    def prepare(self, start: int, say: Callable[[str], object] = lambda text: None) -> None:
        """Choose how to run from iteration `start` on, and `say` it; within `hardware.compute()`."""
        self.say, self.iteration = say, start
        self.algorithm.advance(start)
        self.lowered.clear()
        # Before memory is measured: a graph of before holds its own.
        self.graph: torch.cuda.CUDAGraph | None = None
        self.static_draw: Draw = ()
        self.optimizer.zero_grad()
        self.draws = self.draws_from(start)
        bytes_of_one = functools.cache(self.bytes_of_one_task)
        self.at_once = self.hardware.tasks_at_once(self.most_at_once, bytes_of_one)
        self.captures = False  # at this moment
        on_gpu, on_host = self.hardware.device.type == "cuda", self.host_store() is not None
        wants_graph = self.hardware.graph and on_gpu and not on_host
        if on_gpu and on_host:  # a graph cannot be captured beside the thread that fetches
            say("images stay in host memory, each meta-batch copied ahead of its step; no CUDA graph")
        self.eager_steps_left = WARM_UP if wants_graph else None
        if self.at_once < self.meta_batch:
            say(f"{self.at_once} of {self.meta_batch} tasks at once")
        if self.hardware.compile is True or (is_ours(self.algorithm) and self.hardware.traces(bytes_of_one)):
            self.lower(compiles=self.hardware.compile is True)

    def draws_from(self, start: int) -> Iterator[Draw]:
        store = self.host_store()
        device = "cpu" if store else self.hardware.device
        draws = training_draws(self.source, self.meta_batch, self.geometry, self.seed, start, device)
        return fetched_ahead(draws, store) if store else draws

    def host_store(self) -> ClassStore | None:
        """The source, where its images stay in host memory."""
        source = self.source
        return source if isinstance(source, ClassStore) and source.host_for is not None else None

    def bytes_of_one_task(self) -> int:
        """Measured on a copy, so that weights, averages and random numbers stay as they are."""
        draw = next(split_draw(next(self.draws_from(0)), 1))
        twin = copy.deepcopy(self.algorithm)
        params = [p for p in twin.parameters() if p.requires_grad]
        with self.hardware.forked_random():
            return peak_bytes(lambda: self.meta_gradient(twin.meta_loss, params, draw), self.hardware.device)

    # one step

    def step(self) -> None:
        """One outer step on the next meta-batch; nothing is read back from the device."""
        if self.algorithm.advance(self.iteration):
            self.prepare(self.iteration, self.say)
        self.iteration += 1
        draw = next(self.draws)
        if self.graph is not None:
            self.replay(draw)
        elif self.eager_steps_left == 0:
            self.capture(draw)
        else:
            self.eager_step(draw)
            if self.eager_steps_left:
                self.eager_steps_left -= 1

    def eager_step(self, draw: Draw) -> None:
        self.backward(draw)
        self.optimizer.step()

    def backward(self, draw: Draw) -> None:
        """The meta-gradient into each weight's `.grad`; half as many tasks at once where memory runs out."""
        while True:
            try:
                grads, figures = self.summed_gradient(draw)
                break
            except torch.OutOfMemoryError as error:
                if self.captures:
                    raise  # what was captured so far would stay in the graph
                failed = first_line(error)
            self.halve(failed)
        for p, grad in zip(self.params, grads, strict=True):
            # Optimizers expect the weight's own layout; bounds are put in place, on no tensor that two share.
            fits = grad is None or (grad.stride() == p.stride() and not self.clip)
            p.grad = grad if fits else torch.empty_like(p).copy_(grad)  # type: ignore[arg-type]
        if self.clip:
            self.clip.apply(self.params)
        self.window += figures

    def halve(self, reason: str) -> None:
        if self.at_once == 1:
            raise TrainingError(
                f"out of memory with one task at a time ({reason}); "
                "lower shots, queries, ways or inner_loop.steps"
            )
        self.at_once = self.most_at_once = (self.at_once + 1) // 2
        if self.hardware.device.type == "cuda":
            torch.cuda.empty_cache()
        self.say(f"out of memory: going on with {self.at_once} tasks at once")

    def summed_gradient(self, draw: Draw) -> Gradient:
        """Over chunks of tasks; the same gradient however many there are at once."""
        total: Gradient | None = None
        store = self.host_store()
        for chunk in split_draw(draw, self.at_once):
            if store and chunk[1].dtype != torch.uint8:  # the whole draw did not fit beside the last
                chunk = store.fetch(chunk)
            part = self.lowered.get(len(chunk[0]), self.eager_gradient)(chunk)
            total = part if total is None else add(total, part)
        assert total is not None
        return total

    def eager_gradient(self, draw: Draw) -> Gradient:
        return self.meta_gradient(self.algorithm.meta_loss, self.params, draw)

    def meta_gradient(self, meta_loss: MetaLoss, params: Sequence[Tensor], draw: Draw) -> Gradient:
        """These tasks' share of the meta-batch's gradient, None for a weight without; and their figures."""
        episodes = self.source.gather(draw, self.geometry).to(self.hardware.dtype)
        loss, outputs = meta_loss(episodes)
        self.metric = metric_name(episodes.query_y)
        tasks = len(episodes)
        share = loss if tasks == self.meta_batch else loss * (tasks / self.meta_batch)
        grads = torch.autograd.grad(share, params, allow_unused=True)
        score = task_score(outputs.detach(), episodes.query_y).mean()
        figures = torch.stack([loss.detach(), score.to(loss.dtype)]).double() * tasks
        return list(grads), figures

    # one CUDA graph

    def capture(self, draw: Draw) -> None:
        """Record sampling, gradient and optimizer as one graph; eager, and said why, where that fails."""
        self.eager_steps_left = None
        self.static_draw = tuple(tensor.clone() for tensor in draw)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()
        self.captures = True
        torch.cuda.synchronize(self.hardware.device)
        try:
            with torch.cuda.graph(graph):
                self.backward(self.static_draw)
                if self.hardware.captures_optimizer(self.optimizer):
                    self.optimizer.step()
        except Exception as error:
            reason = first_line(error.__context__ or error)  # ending a failed capture raises anew
            self.say(f"no CUDA graph, steps run one kernel after another: {reason}")
            self.captures = False
            self.eager_step(draw)
            return
        self.captures = False
        self.graph = graph
        self.replay(draw)

    def replay(self, draw: Draw) -> None:
        assert self.graph is not None
        for static, fresh in zip(self.static_draw, draw, strict=True):
            static.copy_(fresh)
        self.graph.replay()
        if not self.hardware.captures_optimizer(self.optimizer):
            self.optimizer.step()

    # the gradient as one graph

    def lower(self, compiles: bool) -> None:
        """Trace, and compile, the gradient for each size of chunk; eager, and said why, where that fails."""
        began = time.perf_counter()
        draw = next(self.draws_from(0))
        try:
            for chunk in split_draw(draw, self.at_once):
                if len(chunk[0]) not in self.lowered:
                    self.lowered[len(chunk[0])] = self.lowered_gradient(chunk, compiles)
        except Exception as error:
            self.lowered.clear()
            if compiles:
                self.say(f"not compiled, going on without: {first_line(error)}")
        else:
            if compiles:
                self.say(f"compiled in {time.perf_counter() - began:.0f} s")

    def lowered_gradient(self, example: Draw, compiles: bool) -> GradientOfDraw:
        """The whole meta-gradient as one graph without a backward pass; TorchInductor may compile it.

        torch.compile cannot differentiate twice what it compiled; a trace taken below autograd
        has nothing left to differentiate.
        """
        from torch.fx.experimental.proxy_tensor import make_fx

        module = _MetaLoss(self.algorithm)
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        weights = [name for name, p in module.named_parameters() if p.requires_grad]
        used: list[bool] = []

        def flat(*inputs: Tensor) -> list[Tensor]:
            state = dict(zip(tensors, inputs, strict=False))
            state |= {name: state[name].detach().requires_grad_() for name in weights}
            grads, figures = self.meta_gradient(
                lambda episodes: functional_call(module, state, (episodes,)),
                [state[name] for name in weights],
                inputs[len(tensors) :],
            )
            used[:] = [grad is not None for grad in grads]
            return [grad for grad in grads if grad is not None] + [figures]

        inputs: list[Any] = [tensor.detach() for tensor in tensors.values()] + list(example)
        with self.hardware.forked_random(), kept(module.named_buffers()):
            traced = make_fx(flat, decomposition_table=VECTOR_PRODUCTS if compiles else None)(*inputs)
            for node in traced.graph.nodes:  # what is left of detach()
                if node.target is torch.ops.aten.alias.default:
                    node.replace_all_uses_with(node.args[0])
                    traced.graph.erase_node(node)
            traced.recompile()
            run: Callable[..., Any] = traced.forward
            if compiles:
                from torch._inductor import compile as inductor

                run = inductor(traced, inputs, options={"fallback_random": True})  # type: ignore[arg-type]
                run(*inputs)

        def gradient(draw: Draw) -> Gradient:
            with torch.no_grad(), self.hardware.without_autocast():  # its casts are in the graph already
                *grads, figures = run(*tensors.values(), *draw)
            rest = iter(grads)
            return [next(rest) if is_used else None for is_used in used], figures

        return gradient


class _MetaLoss(nn.Module):
    """The meta-loss as a module's forward, to be called with other weights."""

    def __init__(self, algorithm: Algorithm) -> None:
        super().__init__()
        self.algorithm = algorithm

    def forward(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        return self.algorithm.meta_loss(episodes)


@contextlib.contextmanager
def kept(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
    """Give tensors back the values they had."""
    before = [(tensor, tensor.clone()) for _, tensor in tensors]
    try:
        yield
    finally:
        for tensor, value in before:
            tensor.copy_(value)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[2] == 1:
        return a * b
    if a.shape[1] == 1 or b.shape[2] == 1:
        return (a.unsqueeze(3) * b.unsqueeze(1)).sum(2)
    return NotImplemented


def _baddbmm(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    product = _bmm(a, b)
    return product if product is NotImplemented else c + product


# TorchInductor fuses products of vectors with what is around them, but leaves matrix products to a library,
# whose call costs more than such a product.
VECTOR_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.bmm.default: _bmm,
    torch.ops.aten.baddbmm.default: _baddbmm,
}


def is_ours(algorithm: Algorithm) -> bool:
    """Whether nothing in it is a user's, which may do more than a trace of it shows."""
    return all(type(part).__module__.split(".")[0] in ("metarun", "torch") for part in algorithm.modules())


def add(a: Gradient, b: Gradient) -> Gradient:
    grads = [y if x is None else x if y is None else x + y for x, y in zip(a[0], b[0], strict=True)]
    return grads, a[1] + b[1]
