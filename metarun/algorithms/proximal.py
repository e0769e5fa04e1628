"""Methods whose inner problem is pulled towards the start: Meta-MinibatchProx and implicit MAML."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.maml import MAML
from metarun.algorithms.reptile import Reptile
from metarun.episodes import Episodes
from metarun.errors import ConfigError
from metarun.inner_loops.base import InnerLoop, Loss, refuse_learned
from metarun.lowering import Params, flatten, unflatten
from metarun.objectives import task_loss


class MinibatchProx(Reptile):
    """Meta-MinibatchProx (Zhou, Yuan, Xu, Yan and Feng 2019, "Efficient Meta Learning via Minibatch
    Proximal Update").

    Each task minimises its loss plus proximal/2 ||phi - theta||^2, by the inner loop's steps; the
    start then moves along theta - phi, which is the gradient of the tasks' minima with respect
    to it but for the factor `proximal`, part of the outer rate as in the paper's code
    (algorithm 1). As in Reptile, a task's support and query are its data.
    """

    def __init__(
        self,
        backbone: nn.Module,
        inner_loop: InnerLoop,
        outputs: int,
        head: Literal["fixed", "shared"] = "fixed",
        transductive: bool = True,
        batch: int = 10,
        proximal: float = 0.1,
    ) -> None:
        super().__init__(backbone, inner_loop, outputs, head, transductive, batch)
        self.proximal = positive(proximal)

    def inner_problem(self, support_x: Tensor, support_y: Tensor, ways: int) -> tuple[Loss, Params, Params]:
        loss, slow, fast = super().inner_problem(support_x, support_y, ways)
        return pulled(loss, fast, self.proximal), slow, fast


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
        super().__init__(backbone, inner_loop, outputs, head, "all", transductive)
        self.proximal, self.cg_steps, self.damping = positive(proximal), cg_steps, damping

    def meta_loss(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """The mean query loss, as a function whose gradient is the implicit one."""
        x, y, ways = episodes.support_x, episodes.support_y, episodes.ways
        with torch.no_grad():
            end = self.adapt(x, y, ways)["params"]
        phi = {name: p.detach().requires_grad_() for name, p in end.items()}
        outputs = self.predict({"params": phi, "support_x": x}, episodes.query_x)
        losses = task_loss(outputs, episodes.query_y)
        weights = list(phi.values())
        v = torch.autograd.grad(losses.sum(), weights, materialize_grads=True)
        support = task_loss(self.learner(phi, x), y)
        grads = torch.autograd.grad(support.sum(), weights, create_graph=True, materialize_grads=True)

        def system(direction: Tensor) -> Tensor:
            """(I + H / proximal) of directions [T, P]."""
            along = list(unflatten(direction, phi).values())
            product = torch.autograd.grad(grads, weights, along, retain_graph=True, materialize_grads=True)
            curved = flatten(dict(zip(phi, product, strict=True)))
            return direction + curved / (self.proximal + self.damping)

        implicit = conjugate_gradient(system, flatten(dict(zip(phi, v, strict=True))), self.cg_steps)
        start = flatten(self.learner.task_params(len(x), self.outputs_for(y, ways)))
        # Adds nothing to the value; its gradient is the implicit one.
        carried = ((start - start.detach()) * implicit.detach()).sum(1)
        return (losses.detach() + carried).mean(), outputs

    def inner_problem(self, support_x: Tensor, support_y: Tensor, ways: int) -> tuple[Loss, Params, Params]:
        loss, slow, fast = super().inner_problem(support_x, support_y, ways)
        return pulled(loss, fast, self.proximal), slow, fast


def positive(proximal: float) -> float:
    if proximal <= 0:
        raise ConfigError(f"algorithm.proximal={proximal}: must be above 0")
    return proximal


def pulled(loss: Loss, start: Params, strength: float) -> Loss:
    """The loss plus strength/2 ||phi - start||^2, for each task."""
    origin = flatten(start)  # [T, P]

    def regularised(p: Params, step: int) -> Tensor:
        return loss(p, step) + 0.5 * strength * (flatten(p) - origin).square().sum(1)

    return regularised


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
