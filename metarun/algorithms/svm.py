"""The quadratic program of a multi-class support vector machine, T at once and on the device.

Batched solvers that are kept up either run one problem after another on the CPU (cvxpylayers) or
read a convergence test back from the device at every step and cannot be part of a graph (qpth,
which MetaOptNet's authors used). This one takes a fixed number of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 20  # of the interior point method; most problems need 10 to 15
STEP_SHARE = 0.99  # of the way to the boundary


def crammer_singer_dual(gram: Tensor, classes: Tensor, penalty: float) -> Tensor:
    """The dual solution a [T, S, N] for gram [T, S, S] and classes [T, S, N] as one-hot vectors.

    Minimises 1/2 sum_k a_k' K a_k - sum of a at each example's own class, subject to a <= penalty at the
    own class, a <= 0 at the others, and sum_k a = 0 (Crammer and Singer 2001; Lee et al. 2019,
    equations 9 and 10), in float64. Machine weights are X' a.

    The derivative with respect to `gram` is the solution's own. At the solution, the optimality conditions
    F(a, K) = 0 give da = -(dF/da)^-1 dF/dK: one more Newton step, in which K alone is differentiated.
    """
    shape = classes.shape
    gram = penalty * gram  # in units of C the bounds are 1
    own = classes.double().flatten(1)  # [T, P] with P = S*N
    with torch.no_grad():
        solution, inverse = interior_point(gram.detach(), own, shape[-1])
    change = (gram @ solution.view(shape)).flatten(1)  # K a, the part of F that K is in
    step = inverse(change - change.detach())
    return penalty * (solution - step).view(shape)


def interior_point(gram: Tensor, own: Tensor, ways: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Mehrotra's predictor and corrector for gram [T, S, S]: solution [T, P] and linear system's inverse.

    With slacks s, multipliers z of a <= own and v of the sums, the conditions are
    K a - own + z + A' v = 0,  A a = 0,  a + s = own,  s z = 0.
    """
    tasks, size = own.shape
    shots = size // ways
    hessian = torch.einsum("tij,kl->tikjl", gram, torch.eye(ways, dtype=own.dtype, device=own.device))
    hessian = hessian.reshape(tasks, size, size)
    rounding = 1e-13 * gram.diagonal(dim1=1, dim2=2).amax(1, keepdim=True)  # K may have no full rank
    a, v = torch.zeros_like(own), own.new_zeros(tasks, shots)
    s, z = torch.ones_like(own), torch.ones_like(own)

    def sums(x: Tensor) -> Tensor:  # A x, [T, P] -> [T, S]
        return x.unflatten(1, (shots, ways)).sum(-1)

    def spread(x: Tensor) -> Tensor:  # A' x, [T, S] -> [T, P]
        return x.repeat_interleave(ways, 1)

    def solver(weights: Tensor):
        """(r, q) -> (da, dv) with (K + diag(weights)) da + A' dv = r and A da = q."""
        factor = torch.linalg.cholesky_ex(hessian + torch.diag_embed(weights + rounding)).L
        spreads = spread(torch.eye(shots, dtype=own.dtype, device=own.device)).mT  # [P, S], A'
        through = torch.cholesky_solve(spreads.expand(tasks, -1, -1), factor)  # M^-1 A'
        small = torch.linalg.cholesky_ex(sums(through.mT.flatten(0, 1)).unflatten(0, (tasks, shots))).L

        def solve(r: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
            first = torch.cholesky_solve(r.unsqueeze(-1), factor).squeeze(-1)
            dv = torch.cholesky_solve((sums(first) - q).unsqueeze(-1), small).squeeze(-1)
            return first - (through @ dv.unsqueeze(-1)).squeeze(-1), dv

        return solve

    for _ in range(STEPS):
        dual = (hessian @ a.unsqueeze(-1)).squeeze(-1) - own + z + spread(v)
        newton = Newton(solver(z / s), s, z, dual, a + s - own, sums(a))
        gap = (s * z).mean(1, keepdim=True)
        *_, ds, dz = newton.direction(s * z)
        reach = torch.minimum(longest(s, ds), longest(z, dz))
        after = ((s + reach * ds) * (z + reach * dz)).mean(1, keepdim=True)
        centre = (after / gap) ** 3 * gap
        da, dv, ds, dz = newton.direction(s * z + ds * dz - centre)
        reach = (STEP_SHARE * torch.minimum(longest(s, ds), longest(z, dz))).clamp(max=1)
        a, v = a + reach * da, v + reach * dv
        s, z = (s + reach * ds).clamp_min(TINY), (z + reach * dz).clamp_min(TINY)
    solve = solver(z / s)
    return a, lambda r: solve(r, torch.zeros_like(v))[0]


@dataclass(frozen=True)
class Newton:
    """A point's linear system and its residuals."""

    solve: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    s: Tensor
    z: Tensor
    dual: Tensor
    bound: Tensor
    sums: Tensor

    def direction(self, complementarity: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(da, dv, ds, dz) to where the residuals vanish to first order and s z is less by this much."""
        da, dv = self.solve(-self.dual + (complementarity - self.z * self.bound) / self.s, -self.sums)
        ds = -self.bound - da
        return da, dv, ds, -(complementarity + self.z * ds) / self.s


TINY = 1e-14  # slacks and multipliers stay positive, and their ratio finite


def longest(x: Tensor, dx: Tensor) -> Tensor:
    """How far x > 0 may go along dx until an entry is 0, at most 1; [T, 1]."""
    steps = torch.where(dx < 0, -x / dx, torch.ones_like(x))
    return steps.amin(1, keepdim=True).clamp(max=1)
