"""Reptile (Nichol, Achiam and Schulman 2018, "On First-Order Meta-Learning Algorithms")."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.maml import MAML
from metarun.episodes import Episodes
from metarun.inner_loops.base import InnerLoop, Loss, refuse_learned
from metarun.lowering import Params
from metarun.objectives import task_loss


class Reptile(MAML):
    """Move the weights towards where the inner loop takes each task (algorithm 2, batched).

    The meta-loss 0.5 * ||theta - phi||^2, phi held constant, has exactly Reptile's update
    theta - phi as its gradient, so plain SGD with rate 1 decaying to 0 is the paper's outer
    loop. A task's support and query together are its training set, of which every inner step
    takes the next `batch` examples of a shuffled order (0: all of them). Testing adapts as
    MAML does, with mini-batches too.
    """

    def __init__(
        self,
        backbone: nn.Module,
        inner_loop: InnerLoop,
        outputs: int,
        head: Literal["fixed", "shared"] = "fixed",
        transductive: bool = True,
        batch: int = 10,
    ) -> None:
        refuse_learned(inner_loop, "Reptile's update moves the weights alone")
        super().__init__(backbone, inner_loop, outputs, head, "all", transductive)
        self.batch = batch

    def meta_loss(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """Half the squared distance, averaged over tasks; and how phi fits the queries it saw."""
        x = torch.cat([episodes.support_x, episodes.query_x], 1)
        y = torch.cat([episodes.support_y, episodes.query_y], 1)
        with torch.no_grad():
            phi = self.adapt(x, y, episodes.ways)
            outputs = self.predict(phi, episodes.query_x)
        theta = self.learner.task_params(len(x), self.outputs_for(y, episodes.ways))
        learned = dict(self.learner.named_parameters())
        distance = torch.zeros((), device=x.device, dtype=x.dtype)
        for name, p in theta.items():
            # The copies of a shared head pull their one vector by their mean.
            copies = max(p[0].numel() // learned[name].numel(), 1)
            distance = distance + (p - phi["params"][name]).square().sum() / copies
        return 0.5 * distance / len(x), outputs

    def inner_problem(self, support_x: Tensor, support_y: Tensor, ways: int) -> tuple[Loss, Params, Params]:
        size = support_x.shape[1]
        if not 0 < self.batch < size:
            return super().inner_problem(support_x, support_y, ways)
        params = self.learner.task_params(len(support_x), self.outputs_for(support_y, ways))
        order = torch.rand(support_x.shape[:2], device=support_x.device).argsort(1)  # [T, S]
        tasks = torch.arange(len(support_x), device=support_x.device).unsqueeze(1)

        def loss(p: Params, step: int) -> Tensor:
            places = torch.arange(step * self.batch, (step + 1) * self.batch, device=order.device) % size
            rows = order[:, places]  # [T, batch]
            return task_loss(self.learner(p, support_x[tasks, rows]), support_y[tasks, rows])

        return loss, {}, params
