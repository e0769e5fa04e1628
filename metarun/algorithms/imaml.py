"""Implicit MAML (Rajeswaran, Finn, Kakade and Levine 2019)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.maml import MAML
from metarun.errors import ConfigError
from metarun.inner_loops.base import InnerLoop, Loss, refuse_learned, with_proximal_term
from metarun.nn.per_task import Params, flatten, unflatten
from metarun.tasks.episodes import Outcome, Tasks


class IMAML(MAML):
    """Implicit MAML (Rajeswaran, Finn, Kakade and Levine 2019, "Meta-Learning with Implicit Gradients").

    The inner loop (approximately) minimises the task's loss plus proximal/2 ||phi - theta||^2
    (equation 3). The meta-gradient at its end phi is (I + H / proximal)^-1 v, with H the Hessian of
    the support loss and v the gradient of the query loss (lemma 1), found by `cg_steps` of
    conjugate gradient (algorithm 2). It does not depend on the path: memory does not grow
    with the number of inner steps. `damping` adds to proximal in that system alone (the paper's code
    solves 2 v + H v / (proximal + 10)). Where I + H / proximal is not positive along a search
    direction, as it may be where the inner loop is far from the minimum, the search ends for that task.
    """

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
    ) -> None:
        refuse_learned(inner_loop, "the implicit gradient does not pass through its steps")
        if cg_steps < 1:
            raise ConfigError(f"algorithm.cg_steps={cg_steps}: must be at least 1")
        if proximal <= 0:
            raise ConfigError(f"algorithm.proximal={proximal}: must be above 0")
        super().__init__(backbone, inner_loop, outputs, head, "all", transductive)
        self.proximal, self.cg_steps, self.damping = proximal, cg_steps, damping

    def meta_loss(self, tasks: Tasks) -> Outcome:
        """The query loss, as a function whose gradient is the implicit one."""
        with torch.no_grad():
            end = self.adapt(tasks)
        phi = {name: p.detach().requires_grad_() for name, p in end["params"].items()}
        outcome = tasks.query(partial(self.predict, end | {"params": phi}), self.loss)
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
        # Adds nothing to the value; its gradient is the implicit one.
        carried = ((start - start.detach()) * implicit.detach()).sum(1)
        return replace(outcome, loss=outcome.loss.detach() + carried)

    def inner_problem(self, tasks: Tasks) -> tuple[Loss, Params, Params]:
        loss, slow, fast = super().inner_problem(tasks)
        return with_proximal_term(loss, fast, self.proximal), slow, fast


def conjugate_gradient(system: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> Tensor:
    """x [T, P] with system(x) = b for every task by itself (Hestenes and Stiefel 1952).

    A task ends where the system is not positive along its direction, or nothing is left to do;
    where that is so from the start, x is b.
    """
    x, residual, direction = torch.zeros_like(b), b, b
    squared = residual.square().sum(1, keepdim=True)  # [T, 1]
    going = torch.ones_like(squared, dtype=torch.bool)
    for step in range(steps):
        image = system(direction)
        curvature = (direction * image).sum(1, keepdim=True)
        going = going & (curvature > 0)
        if step == 0:
            x = torch.where(going, x, b)
        length = torch.where(going, squared / torch.where(going, curvature, 1.0), 0.0)
        x = x + length * direction
        residual = residual - length * image
        before, squared = squared, residual.square().sum(1, keepdim=True)
        direction = residual + torch.where(going, squared / torch.where(going, before, 1.0), 0.0) * direction
    return x
