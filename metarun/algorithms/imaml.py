"""Implicit MAML (Rajeswaran, Finn, Kakade and Levine 2019)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.maml import MAML
from metarun.errors import ConfigError, check_least
from metarun.inner_loops.base import InnerLoop, Loss, refuse_learned, with_proximal_term
from metarun.nn.per_task import Params, flatten, unflatten
from metarun.tasks.episodes import Outcome, Tasks


class IMAML(MAML):
    """Implicit MAML (Rajeswaran, Finn, Kakade and Levine 2019, "Meta-Learning with Implicit Gradients").

    The inner loop (approximately) minimises the task's loss plus proximal/2 ||phi - theta||^2
    (equation 3). The meta-gradient at the adapted weights phi is (I + H / proximal)^-1 v, with H the Hessian
    of the support loss and v the gradient of the query loss (lemma 1), computed by the conjugate gradient
    method (algorithm 2). It does not depend on the optimisation path, so that memory does not grow
    with the number of inner steps.

    If I + H / proximal is not positive along a search direction, which can happen when the inner loop has
    not converged, conjugate gradient stops for that task.

    Args:
        backbone, inner_loop, outputs, head, transductive: see `MAML`.
        proximal: the strength of the proximal term, above 0.
        cg_steps: the number of conjugate gradient steps, at least 1.
        damping: added to `proximal` in the linear system only (the paper's code solves
            2 v + H v / (proximal + 10)).
        pull: None: the proximal term is part of every step. A number: the steps are plain, and in training
            the weights then go back by this share of the way to the initial ones, at most 1. The paper's
            code does so, with the inner rate times `proximal`.
    """

    plays = False
    unread: ClassVar = {"inner_loop.order": ""}  # the meta-gradient does not pass through the steps

    def __init__(
        self,
        backbone: nn.Module,
        inner_loop: InnerLoop,
        outputs: int,
        head: Literal["fixed", "shared"] = "fixed",
        transductive: bool = True,
        proximal: float = 2.0,
        cg_steps: int = 5,
        damping: float = 0.0,
        pull: float | None = None,
    ) -> None:
        refuse_learned(inner_loop, "the implicit gradient does not pass through its steps")
        if cg_steps < 1:
            raise ConfigError(f"algorithm.cg_steps={cg_steps}: must be at least 1")
        if proximal <= 0:
            raise ConfigError(f"algorithm.proximal={proximal}: must be above 0")
        if pull is not None and not 0 <= pull <= 1:
            raise ConfigError(f"algorithm.pull={pull}: must be 0 to 1, or null")
        check_least("algorithm", 0, damping=damping)
        super().__init__(backbone, inner_loop, outputs, head, "all", transductive)
        self.proximal, self.cg_steps, self.damping, self.pull = proximal, cg_steps, damping, pull

    def adapt(self, tasks: Tasks) -> dict[str, Any]:
        loss, slow, fast = self.inner_problem(tasks)
        adapted = self.inner_loop(loss, fast)
        if self.pull is not None and self.training:
            adapted = {name: torch.lerp(p, fast[name], self.pull) for name, p in adapted.items()}
        return {"params": slow | adapted}

    def meta_loss(self, tasks: Tasks) -> Outcome:
        """The query loss, with the implicit gradient as its gradient."""
        with torch.no_grad():
            end = self.adapt(tasks)
        phi = {name: p.detach().requires_grad_() for name, p in end["params"].items()}
        outcome = tasks.query(self.predictor(end | {"params": phi}, tasks), self.loss)
        weights = list(phi.values())
        v = torch.autograd.grad(outcome.loss.sum(), weights, materialize_grads=True)
        support = tasks.support_loss(partial(self.learner, phi), self.inner_loop.step_count())
        grads = torch.autograd.grad(support.sum(), weights, create_graph=True, materialize_grads=True)

        def system(direction: Tensor) -> Tensor:
            """(I + H / proximal) of directions [T, P]."""
            along = list(unflatten(direction, phi).values())
            product = torch.autograd.grad(grads, weights, along, retain_graph=True, materialize_grads=True)
            curved = flatten(dict(zip(phi, product, strict=True)))
            return direction + curved / (self.proximal + self.damping)

        implicit = conjugate_gradient(system, flatten(dict(zip(phi, v, strict=True))), self.cg_steps)
        start = flatten(self.learner.task_params(len(tasks), tasks.outputs))
        # The surrogate has the value zero, and the implicit gradient as its gradient.
        surrogate = ((start - start.detach()) * implicit.detach()).sum(1)
        return replace(outcome, loss=outcome.loss.detach() + surrogate)

    def inner_problem(self, tasks: Tasks) -> tuple[Loss, Params, Params]:
        loss, slow, fast = super().inner_problem(tasks)
        if self.pull is not None:
            return loss, slow, fast
        return with_proximal_term(loss, fast, self.proximal), slow, fast


def conjugate_gradient(system: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """Solve system(x) = b independently for each of T tasks (Hestenes and Stiefel 1952).

    A task stops early if the system is not positive along its search direction, or its residual is zero. If
    that holds at the first step, its solution is b.

    Args:
        system: the symmetric linear map of each task, [T, P] -> [T, P].
        b: the right-hand sides, [T, P].
        steps: the number of steps.

    Returns:
        x [T, P].
    """
    x, residual, direction = torch.zeros_like(b), b, b
    squared = residual.square().sum(1, keepdim=True)  # [T, 1]
    active = torch.ones_like(squared, dtype=torch.bool)
    for step in range(steps):
        image = system(direction)
        curvature = (direction * image).sum(1, keepdim=True)
        active = active & (curvature > 0)
        if step == 0:
            x = torch.where(active, x, b)
        length = torch.where(active, squared / torch.where(active, curvature, 1.0), 0.0)
        x = x + length * direction
        residual = residual - length * image
        before, squared = squared, residual.square().sum(1, keepdim=True)
        ratio = torch.where(active, squared / torch.where(active, before, 1.0), 0.0)
        direction = residual + ratio * direction
    return x
