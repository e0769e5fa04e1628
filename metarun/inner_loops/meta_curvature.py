"""Meta-Curvature (Park and Oliva 2019)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from metarun.inner_loops.base import InnerLoop, Loss, PerWeight, rows
from metarun.nn.per_task import Params


class MetaCurvature(InnerLoop):
    """theta <- theta - rate * MC(gradient), with MC learned (section 3, equation 8).

    MC multiplies a gradient [out, in, kernel] by one matrix in each of its dimensions, and the gradient of a
    vector elementwise. All start as the identity, so that training starts as MAML does.

    Args:
        rate: the learning rate.
        steps, test_steps, order: see `InnerLoop`.
    """

    learned = True

    def __init__(
        self, rate: float = 0.4, steps: int = 1, test_steps: int | None = None, order: int = 2
    ) -> None:
        super().__init__(steps, test_steps, order)
        self.rate = rate

    def attach(self, weights: Params) -> None:
        vectors = {name: torch.ones_like(w) for name, w in weights.items() if w.dim() == 1}
        # [out, in] for a linear layer, [out, in, kernel] for a convolution
        shapes = {
            name: w.flatten(2).shape if w.dim() > 2 else w.shape for name, w in weights.items() if w.dim() > 1
        }
        self.scales = PerWeight(vectors)
        self.matrices = nn.ModuleList(
            PerWeight(
                {
                    name: torch.eye(shape[dim], dtype=weights[name].dtype)
                    for name, shape in shapes.items()
                    if dim < len(shape)
                }
            )
            for dim in range(3)
        )

    def trajectory(self, loss: Loss, params: Params) -> Iterator[Params]:
        for step in range(self.step_count()):
            grads = self.gradients(loss, params, step)
            params = {name: p - self.rate * self.curved(name, grads[name]) for name, p in params.items()}
            yield params

    def curved(self, name: str, grad: Tensor) -> Tensor:
        """MC applied to a gradient [T, *shape], one dimension after the other; returns the same shape."""
        if grad.dim() == 2:
            return rows(self.scales(name), grad) * grad
        out = self.matrices[0](name)
        ways = min(len(out), grad.shape[1])  # the head of a task with fewer ways has fewer rows
        g = grad.flatten(3) if grad.dim() > 3 else grad.unsqueeze(3)  # [T, out, in, kernel]
        # A shared head has one vector for all ways, so this matrix is 1 x 1.
        g = out * g if len(out) == 1 else torch.einsum("ao,toik->taik", out[:ways, :ways], g)
        g = torch.einsum("bi,toik->tobk", self.matrices[1](name), g)
        if grad.dim() > 3:
            g = torch.einsum("ck,toik->toic", self.matrices[2](name), g)
        return g.reshape(grad.shape)
