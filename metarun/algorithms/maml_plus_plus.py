"""MAML++ (Antoniou, Edwards and Storkey 2019, "How to train your MAML")."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.maml import MAML
from metarun.errors import ConfigError
from metarun.inner_loops.base import InnerLoop, Loss
from metarun.nn.layers import StepNorm, replace_layers
from metarun.nn.per_task import Params
from metarun.tasks.episodes import Outcome, Tasks


class MAMLPlusPlus(MAML):
    """MAML with the paper's improvements (section 4), which can be turned on separately.

    Learned rates per layer and step (LSLR) are inner_loop=layer_rates, and the cosine-annealed rate of
    the outer loop (CA) is a scheduler. Departure: annealed values change at every iteration, in the paper at
    every epoch of 500 iterations.

    Args:
        backbone, inner_loop, outputs, head, transductive: see `MAML`.
        multi_step_loss: (MSL) the number of iterations in which the query loss is computed after every inner
            step. The weights of these losses are annealed from equal weights to the last loss alone; until
            then the other losses keep at least 3 % of 1/steps, as in the paper's code. 0: only the last loss
            from the start.
        first_order: (DA) the number of iterations in first order before training switches to second order.
        step_statistics: (BNRS) batch norm keeps running averages for each inner step and uses them in
            evaluation, so that predictions for a query do not depend on other queries. The paper's code
            keeps the averages but normalises by the batch; that is `false`.
        step_affine: (BNWB) batch norm has weights and biases for each step, which are meta-learned and not
            adapted, as in the paper's code.
    """

    plays = False
    loss_weights: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        inner_loop: InnerLoop,
        outputs: int,
        head: Literal["fixed", "shared"] = "fixed",
        transductive: bool = True,
        multi_step_loss: int = 0,
        first_order: int = 0,
        step_statistics: bool = False,
        step_affine: bool = True,
    ) -> None:
        if min(multi_step_loss, first_order) < 0:
            raise ConfigError(
                f"algorithm.multi_step_loss={multi_step_loss}, algorithm.first_order={first_order}: "
                "must be numbers of iterations, 0 or more"
            )
        rows = max(inner_loop.steps, 1)

        def per_step(layer: nn.Module) -> nn.Module | None:
            if not isinstance(layer, nn.BatchNorm2d) or layer.running_mean is not None:
                return None
            affine, statistics = (rows if step_affine else 1), (rows if step_statistics else 0)
            return StepNorm(layer.num_features, affine, statistics, layer.eps)

        if step_statistics or step_affine:
            replace_layers(backbone, per_step)
        self.step_affine = step_affine
        super().__init__(backbone, inner_loop, outputs, head, "all", transductive)
        self.multi_step_loss, self.first_order = multi_step_loss, first_order
        self.final_order = inner_loop.order
        self.phase = (self.final_order, False)  # the order, and whether the losses of all steps are used
        self.norms = [layer for layer in backbone.modules() if isinstance(layer, StepNorm)]
        if step_statistics and not self.norms:
            raise ConfigError(
                "algorithm.step_statistics=true: the backbone has no batch norm; choose norm=batch"
            )
        self.register_buffer("loss_weights", torch.zeros(rows), persistent=False)

    @property
    def unused_settings(self) -> Mapping[str, str]:
        found = dict(super().unused_settings)
        if not self.norms:
            found |= {"algorithm.step_affine": "where the backbone has no batch norm"}
        if self.final_order == 1:
            found |= {"algorithm.first_order": "with inner_loop.order=1"}
        if self.inner_loop.steps < 2:
            found |= {"algorithm.multi_step_loss": "with fewer than 2 inner steps"}
        return found

    def is_fast(self, name: str) -> bool:
        layer, _, _ = name.rpartition(".")
        is_norm = isinstance(self.learner.get_submodule(layer), StepNorm)
        return not (self.step_affine and is_norm)

    def on_step_start(self, iteration: int) -> bool:
        before = self.phase
        self.inner_loop.order = 1 if iteration < self.first_order else self.final_order
        self.phase = self.inner_loop.order, iteration < self.multi_step_loss
        if self.phase[1]:
            steps = len(self.loss_weights)
            other = max(1 - iteration / self.multi_step_loss, 0.03) / steps
            self.loss_weights.fill_(other)[-1] = 1 - (steps - 1) * other
        return self.phase != before

    def meta_loss(self, tasks: Tasks) -> Outcome:
        """The weighted sum of the query losses of all steps while it is annealed, then the last loss."""
        if not self.phase[1] or self.inner_loop.steps < 2:
            return super().meta_loss(tasks)
        states = self.trajectory(tasks)
        next(states)  # skip the state before the first step
        outcomes = [tasks.query(self.predictor(adapted, tasks), self.loss) for adapted in states]
        losses = torch.stack([outcome.loss.mean() for outcome in outcomes])
        return replace(outcomes[-1], loss=(self.loss_weights * losses).sum())

    def adapt(self, tasks: Tasks) -> dict[str, Any]:
        return deque(self.trajectory(tasks), maxlen=1).pop()

    def trajectory(self, tasks: Tasks) -> Iterator[dict[str, Any]]:
        for steps, adapted in enumerate(super().trajectory(tasks)):
            yield adapted | {"steps": steps}

    def predict(self, adapted: dict[str, Any], query_x: Tensor) -> Tensor:
        """Predict with the normalisation of the last inner step, as in the paper's code."""
        self.at_step(max(adapted["steps"] - 1, 0))
        return super().predict(adapted, query_x)

    def inner_problem(self, tasks: Tasks) -> tuple[Loss, Params, Params]:
        task, slow, fast = super().inner_problem(tasks)

        def loss(p: Params, step: int) -> Tensor:
            self.at_step(step)
            return task(p, step)

        return loss, slow, fast

    def at_step(self, step: int) -> None:
        """Select the statistics and affine weights of an inner step in every batch norm layer."""
        for norm in self.norms:
            norm.step = step
