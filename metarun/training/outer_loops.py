"""Rules of the outer loop: what is done with the meta-gradient of a meta-batch.

One step of an optimizer serves all tasks. PPO and TRPO are for environments: they take larger steps on the
trajectories that were collected, as far as these can be trusted.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from metarun.errors import ConfigError, check_above_0, check_bound, check_least
from metarun.tasks.rollouts import Rollouts
from metarun.tasks.source import Draw
from metarun.training.parallel import Ranks

if TYPE_CHECKING:
    from metarun.algorithms.base import Algorithm
    from metarun.training.step import OuterStep


@dataclass(frozen=True)
class Clip:
    """Gradient clipping of the meta-gradient.

    Args:
        value: the largest absolute value of an entry, if any.
        norm: the largest global norm, if any; applied after `value`.
    """

    value: float | None = None
    norm: float | None = None

    def apply(self, params: Sequence[Tensor]) -> None:
        """Clip the `.grad` of the parameters in place."""
        if self.value is not None:
            nn.utils.clip_grad_value_(params, self.value)
        if self.norm is not None:
            nn.utils.clip_grad_norm_(params, self.norm)


class OuterLoop(ABC):
    """The base class of the rules of the outer loop; an extension point."""

    #: Whether the tasks must be environments.
    needs_rollouts: ClassVar[bool] = True
    #: Settings that nothing reads, see `Algorithm.unread`.
    unread: ClassVar[Mapping[str, str]] = {}
    #: Whether it can train a critic beside the policy.
    trains_critics: ClassVar[bool] = False
    #: Whether processes can share the tasks: it needs no more than the sum of their gradients.
    adds_up: ClassVar[bool] = False
    #: The setting that decides how large a step is.
    step_size: ClassVar[str] = "optimizer.lr"

    @abstractmethod
    def step(self, outer: OuterStep, draw: Draw) -> None:
        """Change the weights of `outer.algorithm` by the tasks of a draw."""


def check_fit(outer_loop: OuterLoop, ranks: Ranks, algorithm: Algorithm) -> None:
    """Raise ConfigError if an outer loop does not fit the processes or the method."""
    require_sum(outer_loop, ranks, algorithm)
    require_one_pass(outer_loop, algorithm)


def require_sum(outer_loop: OuterLoop, ranks: Ranks, algorithm: Algorithm) -> None:
    """Raise ConfigError if ranks share the tasks, and more is needed than the sum of their gradients."""
    if ranks.count > 1 and algorithm.couples_tasks:
        raise ConfigError(
            f"algorithm={type(algorithm).__name__}: needs all tasks of a meta-batch in one process; set "
            f"{algorithm.uncoupled}, or start it without torchrun"
        )
    if ranks.count > 1 and not outer_loop.adds_up:
        raise ConfigError(
            f"outer_loop={type(outer_loop).__name__.lower()}: needs the trajectories of all tasks in one "
            "process; start it without torchrun, or choose outer_loop=gradient"
        )


def require_one_pass(outer_loop: OuterLoop, algorithm: Algorithm) -> None:
    """Raise ConfigError if tasks leave something to later ones, and a task is adapted to several times."""
    inner_loop = getattr(algorithm, "inner_loop", None)
    if outer_loop.needs_rollouts and inner_loop is not None and inner_loop.carries:
        raise ConfigError(
            f"inner_loop.carry=true: outer_loop={type(outer_loop).__name__.lower()} takes the inner steps of "
            "a task several times; choose inner_loop=adam, or outer_loop=gradient"
        )


class Gradient(OuterLoop):
    """One step of the optimizer along the meta-gradient."""

    needs_rollouts = False
    adds_up = True

    def step(self, outer: OuterStep, draw: Draw) -> None:
        outer.backward(draw)
        outer.optimizer.step()


class PPO(OuterLoop):
    """Several steps of the optimizer on clipped ratios of probabilities (Schulman et al. 2017).

    With MAML and `dataset.estimator.surrogate=lvc` this is ProMP (Rothfuss et al. 2019, algorithm 1): the
    inner steps are taken again from the changed weights, on the same trajectories.

    Args:
        clip: how far a ratio of probabilities counts from 1, above 0.
        epochs: how often each trajectory is used.
        minibatches: the number of parts that tasks are divided into at random, in each epoch.
        inner_kl: the strength of a penalty on the divergence of the policies at the inner steps from those
            that acted (ProMP, section 6).
    """

    trains_critics = True

    def __init__(
        self, clip: float = 0.3, epochs: int = 5, minibatches: int = 1, inner_kl: float = 0.0
    ) -> None:
        check_above_0("outer_loop", clip=clip)
        check_least("outer_loop", 0, inner_kl=inner_kl)
        check_least("outer_loop", 1, epochs=epochs, minibatches=minibatches)
        self.clip, self.epochs, self.minibatches, self.inner_kl = clip, epochs, minibatches, inner_kl

    def step(self, outer: OuterStep, draw: Draw) -> None:
        batches = outer.collect(draw)
        for tasks in batches:
            tasks.clip, tasks.inner_kl = self.clip, self.inner_kl
        generator = torch.Generator().manual_seed(outer.seed * 1_000_003 + outer.iteration)
        for _ in range(self.epochs):
            for part in self.parts(batches, outer.meta_batch, generator):
                outer.backward_again(part, sum(map(len, part)))
                outer.optimizer.step()

    def parts(
        self, batches: Sequence[Rollouts], count: int, generator: torch.Generator
    ) -> Sequence[Sequence[Rollouts]]:
        """The tasks in minibatches, each in chunks no larger than they were collected in."""
        if self.minibatches == 1:
            return [batches]
        parts = []
        for numbers in torch.randperm(count, generator=generator).tensor_split(self.minibatches):
            start, chunks = 0, []
            for tasks in batches:
                own = numbers[(numbers >= start) & (numbers < start + len(tasks))] - start
                if len(own):
                    chunks.append(tasks.select(own))
                start += len(tasks)
            if chunks:
                parts.append(chunks)
        return parts


class TRPO(OuterLoop):
    """The largest step along the natural meta-gradient that keeps the adapted policies near those that acted.

    Trust region policy optimisation (Schulman et al. 2015) as in the code of MAML: the divergence is the mean
    over tasks of that of the adapted policies, and its second derivative passes through the inner steps.

    Args:
        max_kl: the largest mean divergence of the adapted policies.
        cg_steps: the number of conjugate gradient steps; 10 in the code, which takes almost twice as long and
            learns no faster here (docs/reinforcement.md).
        damping: added to the second derivative of the divergence.
        every: the second derivative is estimated from one of so many time steps; the line search takes all,
            so that the bound of the divergence is exact.
        backtracks: the largest number of tried step sizes.
        shrink: the factor between tried step sizes, in (0, 1).
    """

    step_size = "outer_loop.max_kl"
    unread: ClassVar = dict.fromkeys(("optimizer._target_", "optimizer.lr", "clip.norm", "clip.value"), "")

    def __init__(
        self,
        max_kl: float = 0.01,
        cg_steps: int = 5,
        damping: float = 1e-5,
        every: int = 10,
        backtracks: int = 15,
        shrink: float = 0.8,
    ) -> None:
        check_above_0("outer_loop", max_kl=max_kl)
        check_least("outer_loop", 0, damping=damping)
        check_bound("outer_loop", {"shrink": shrink}, lambda value: 0 < value < 1, "between 0 and 1")
        check_least("outer_loop", 1, cg_steps=cg_steps, every=every, backtracks=backtracks)
        self.max_kl, self.cg_steps, self.damping = max_kl, cg_steps, damping
        self.every, self.backtracks, self.shrink = every, backtracks, shrink

    def step(self, outer: OuterStep, draw: Draw) -> None:
        batches = outer.collect(draw)
        outer.backward_again(batches, outer.meta_batch)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in outer.params]
        gradient = torch.cat([grad.flatten() for grad in grads])
        product = self.fisher_product(outer, batches)
        direction = conjugate_gradient(product, gradient, self.cg_steps)
        curvature = direction @ product(direction)
        if not bool(curvature > 0):  # the gradient is zero
            return
        self.search(outer, batches, direction * (2 * self.max_kl / curvature).sqrt())

    def fisher_product(self, outer: OuterStep, batches: Sequence[Rollouts]) -> Callable[[Tensor], Tensor]:
        """Products of vectors with the damped second derivative of the mean divergence.

        At the policies that acted it is J' F J: F is the Fisher information of the networks' outputs, and J
        the derivative of the outputs with respect to the weights, through the inner steps. F is a mean over
        states, of which a part is enough.
        """
        chunks = [Linearised(outer, tasks.thinned(self.every)) for tasks in batches]

        def product(vector: Tensor) -> Tensor:
            total = self.damping * vector
            for chunk in chunks:
                total = total + chunk.product(vector)
                if len(chunks) > 1:  # several graphs would need the memory of all tasks at once
                    chunk.forget()
            return total

        return product

    @torch.no_grad()
    def search(self, outer: OuterStep, batches: Sequence[Rollouts], step: Tensor) -> None:
        """Take the largest tried step that lowers the loss and keeps the divergence, if there is one."""
        start = [p.clone() for p in outer.params]
        before = math.inf
        for attempt in range(-1, self.backtracks):
            size = 0.0 if attempt < 0 else self.shrink**attempt
            parts = step.split([p.numel() for p in outer.params])
            for p, old, part in zip(outer.params, start, parts, strict=True):
                p.copy_(old - size * part.view_as(p))
            outcomes = [outer.algorithm.meta_loss(tasks) for tasks in batches]
            losses = torch.cat([outcome.loss for outcome in outcomes]).double()
            pairs = zip(batches, outcomes, strict=True)
            divergences = torch.cat([tasks.divergence(outcome) for tasks, outcome in pairs]).double()
            loss, divergence = losses.mean().item(), divergences.mean().item()
            if attempt < 0:
                before = loss
            elif loss < before and divergence <= self.max_kl:
                return
        for p, old in zip(outer.params, start, strict=True):
            p.copy_(old)


class Linearised:
    """The outputs of the adapted policies of some tasks as a linear function of the weights.

    Products with its derivative are made by reverse mode alone: the product of the transposed derivative with
    a vector z is linear in z, and its derivative with respect to z gives products with the derivative itself.

    Args:
        outer: the algorithm and its weights.
        tasks: with recorded trajectories.
    """

    def __init__(self, outer: OuterStep, tasks: Rollouts) -> None:
        self.outer, self.tasks = outer, tasks
        self.graph: tuple[Tensor, Tensor, Tensor] | None = None

    def forget(self) -> None:
        """Free the graph; the next product makes it again."""
        self.graph = None

    def made(self) -> tuple[Tensor, Tensor, Tensor]:
        """The outputs, a vector z like them, and the transposed derivative times z, with a graph."""
        if self.graph is None:
            with torch.enable_grad():
                outputs = self.outer.algorithm.meta_loss(self.tasks).outputs
                assert outputs is not None
                z = torch.zeros_like(outputs, requires_grad=True)
                self.graph = outputs, z, self.transposed(outputs, z, create_graph=True)
        return self.graph

    def transposed(self, outputs: Tensor, z: Tensor, create_graph: bool = False) -> Tensor:
        """The product of the transposed derivative with z, as one vector of all weights."""
        grads = torch.autograd.grad(
            outputs,
            self.outer.params,
            z,
            retain_graph=True,
            create_graph=create_graph,
            materialize_grads=True,
        )
        return torch.cat([grad.flatten() for grad in grads])

    def product(self, vector: Tensor) -> Tensor:
        """The share of these tasks in the product of J' F J with a vector."""
        outputs, z, transposed = self.made()
        (change,) = torch.autograd.grad(transposed @ vector, z, retain_graph=True)
        with torch.no_grad():
            weighted = self.tasks.information(outputs, change) / self.outer.meta_batch
        return self.transposed(outputs, weighted)


def conjugate_gradient(product: Callable[[Tensor], Tensor], target: Tensor, steps: int) -> Tensor:
    """An approximate solution x of product(x) = target, for a symmetric positive definite product."""
    solution, residual, direction = torch.zeros_like(target), target.clone(), target.clone()
    square = residual @ residual
    for _ in range(steps):
        if not bool(square > 1e-10 * (target @ target)):
            break
        image = product(direction)
        length = square / (direction @ image)
        solution, residual = solution + length * direction, residual - length * image
        square, previous = residual @ residual, square
        direction = residual + (square / previous) * direction
    return solution
