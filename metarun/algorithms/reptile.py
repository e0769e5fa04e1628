"""Reptile (Nichol, Achiam and Schulman 2018, "On First-Order Meta-Learning Algorithms") and
Meta-MinibatchProx (Zhou, Yuan, Xu, Yan and Feng 2019, "Efficient Meta Learning via Minibatch Proximal
Update").
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.maml import MAML
from metarun.errors import ConfigError
from metarun.inner_loops.base import InnerLoop, Loss, refuse_learned, with_proximal_term
from metarun.nn.per_task import Params
from metarun.tasks.episodes import Episodes, Outcome, Tasks
from metarun.tasks.numbers import uniform


class Reptile(MAML):
    """Move the weights towards the adapted weights of each task (algorithm 2, batched).

    The meta-loss 0.5 * ||theta - phi||^2, with the adapted weights phi held constant, has exactly Reptile's
    update theta - phi as its gradient, so plain SGD with a rate that decays from 1 to 0 is the paper's outer
    loop. The support and the query of a task together are its training set. Evaluation adapts as
    MAML does, also with mini-batches.

    With `proximal` > 0 each task minimises its loss plus proximal/2 ||phi - theta||^2: Meta-MinibatchProx
    (algorithm 1 of Zhou et al.). The gradient of the tasks' minima with respect to theta is then
    proximal * (theta - phi); the factor is part of the outer rate, as in the paper's code.

    Args:
        backbone, inner_loop, outputs, head, transductive: see `MAML`.
        batch: the mini-batch size: each inner step uses the next `batch` examples of a shuffled order.
            0: every step uses all examples.
        constants: see `MAML`.
        proximal: the strength of the proximal term; 0 is Reptile.
    """

    minimises_query_loss = False
    unread: ClassVar = {"inner_loop.order": ""}  # the meta-gradient does not pass through the steps

    def __init__(
        self,
        backbone: nn.Module,
        inner_loop: InnerLoop,
        outputs: int,
        head: Literal["fixed", "shared"] = "fixed",
        transductive: bool = True,
        batch: int = 10,
        proximal: float = 0.0,
        constants: int = 0,
    ) -> None:
        refuse_learned(inner_loop, "Reptile's update moves the weights alone")
        if batch < 0:
            raise ConfigError(f"algorithm.batch={batch}: must be at least 0")
        if proximal < 0:
            raise ConfigError(f"algorithm.proximal={proximal}: must be at least 0")
        super().__init__(backbone, inner_loop, outputs, head, "all", transductive, constants)
        self.batch, self.proximal = batch, proximal

    def meta_loss(self, tasks: Tasks) -> Outcome:
        """0.5 * ||theta - phi||^2, the mean over tasks; the scores are those of phi on the queries."""
        whole = tasks.joined() if isinstance(tasks, Episodes) else tasks
        with torch.no_grad():
            phi = self.adapt(whole)
            outcome = tasks.query(self.predictor(phi, whole))
        theta = self.learner.task_params(len(tasks), tasks.outputs)
        learned = self.learner.own_parameters()
        first = next(iter(theta.values()))
        distance = torch.zeros((), device=first.device, dtype=first.dtype)
        for name, p in theta.items():
            # The N rows of a shared head are copies of one vector, which moves by the mean of their updates.
            copies = max(p[0].numel() // learned[name].numel(), 1)
            divisor = copies / self.outer_rate(name)
            distance = distance + (p - phi["params"][name]).square().sum() / divisor
        return replace(outcome, loss=0.5 * distance / len(tasks))

    def outer_rate(self, name: str) -> float:
        """What the outer learning rate is multiplied by for the weight of a name."""
        return 1.0

    def inner_problem(self, tasks: Tasks) -> tuple[Loss, Params, Params]:
        loss, slow, fast = super().inner_problem(tasks)
        if isinstance(tasks, Episodes) and 0 < self.batch < tasks.support_x.shape[1]:
            loss = self.batch_loss(tasks)
        return (with_proximal_term(loss, fast, self.proximal) if self.proximal else loss), slow, fast

    def batch_loss(self, tasks: Episodes) -> Loss:
        """The loss of the next `batch` support examples at each step, in a random order for each task."""
        x, y = tasks.support_x, tasks.support_y
        size = x.shape[1]
        order = uniform(len(x), size, x.device).argsort(1)  # [T, S]
        each = torch.arange(len(x), device=x.device).unsqueeze(1)

        def loss(params: Params, step: int) -> Tensor:
            places = torch.arange(step * self.batch, (step + 1) * self.batch, device=x.device) % size
            rows = order[:, places]  # [T, batch]
            part = replace(tasks, support_x=x[each, rows], support_y=y[each, rows])
            if tasks.support_weights is not None:
                part = replace(part, support_weights=tasks.support_weights[each, rows])
            return part.support_loss(partial(self.learner, params), step)

        return loss
