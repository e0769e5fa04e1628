"""A batched solver on the device for the quadratic program of a multi-class support vector machine.

An interior point method in plain PyTorch operations with a fixed number of steps. It never copies a value
from the device to the host, as a trace or a CUDA graph of the whole meta-gradient requires, and it adds no
dependency. qpth, which MetaOptNet's authors used, copies the result of a convergence test at every step.
cvxpylayers passes general cone programs to solvers outside of PyTorch; since version 1.0 also to solvers that
run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

STEPS = 20  # steps of the interior point method; most problems need 10 to 15
STEP_SHARE = 0.99  # each step goes at most this share of the way to the boundary of the feasible set


def crammer_singer_dual(gram: Tensor, classes: Tensor, penalty: float, balance: Tensor) -> Tensor:
    """Solve the dual problem of Crammer and Singer's machine for T tasks.

    Minimises 1/2 sum_k a_k' K a_k - sum of a at each example's own class, subject to a <= penalty * balance
    at the own class, a <= 0 at the others, and sum_k a = 0 (Crammer and Singer 2001; Lee et al. 2019,
    equations 9 and 10).

    Args:
        gram: K, inner products of the support examples, [T, S, S], float64.
        classes: the examples' classes as one-hot vectors, [T, S, N].
        penalty: C, above 0.
        balance: the weight of each example in the sum of violated margins, [T, S], above 0.

    Returns:
        a [T, S, N], float64. The machine's weights are X' a. Once differentiable with respect to `gram`.

    The steps of the solver are not differentiated: that would store all of its factorisations, and give the
    derivative of an approximation. At the solution the optimality conditions F(a, K) = 0 hold for
    every K, so da = -(dF/da)^-1 dF/dK (implicit function theorem). (dF/da)^-1 is the linear system at the
    last point of the solver, whose factorisation is a constant, and K a is the only term of F that depends on
    K. So `step` below has the value zero and the derivative -da. In dF/da, z / s is very large for active
    bounds, whose entries of a therefore do not change, and about zero for the others.
    """
    shape = classes.shape
    gram = penalty * gram  # rescale a by 1 / C, so that the bounds are about 1
    own = classes.double()
    bounds = own * balance.double().unsqueeze(-1)
    with torch.no_grad():
        solution, inverse = interior_point(gram.detach(), own.flatten(1), bounds.flatten(1), shape[-1])
    change = (gram @ solution.view(shape)).flatten(1)  # K a, the only term of F that depends on K
    step = inverse(change - change.detach())
    return penalty * (solution - step).view(shape)


def interior_point(
    gram: Tensor, own: Tensor, bounds: Tensor, ways: int
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Mehrotra's predictor-corrector method (1992).

    Args:
        gram: K [T, S, S], for a penalty of 1.
        own: 1 at each example's own class and 0 elsewhere, [T, P] with P = S * ways.
        bounds: u, the upper bounds of a, [T, P].
        ways: N.

    Returns:
        The solution a [T, P], and the function r [T, P] -> da [T, P] with (dF/da) da = r at the solution.

    With slacks s, multipliers z of a <= u and v of the sums, the conditions are
    K a - own + z + A' v = 0,  A a = 0,  a + s = u,  s z = 0.

    K is singular if there are fewer features than examples, and so is its block of the free variables if
    more examples than that have a free variable at the same class. The whole system need not be: for its
    solutions A da = q, so that a multiple of A' A added to K, and of A' q to the right-hand side, changes
    nothing, and makes the block invertible.
    """
    tasks, size = own.shape
    shots = size // ways
    hessian = torch.einsum("tij,kl->tikjl", gram, torch.eye(ways, dtype=own.dtype, device=own.device))
    hessian = hessian.reshape(tasks, size, size)
    largest = gram.diagonal(dim1=1, dim2=2).amax(1, keepdim=True)  # [T, 1]
    ridge = 1e-13 * largest  # the whole system may still be singular
    spreads = torch.eye(shots, dtype=own.dtype, device=own.device).repeat_interleave(ways, 0)  # A' [P, S]
    regular = hessian + largest.unsqueeze(2) * (spreads @ spreads.mT)
    a, v = torch.zeros_like(own), own.new_zeros(tasks, shots)
    s, z = torch.ones_like(own), torch.ones_like(own)

    def sums(x: Tensor) -> Tensor:  # A x, [T, P] -> [T, S]
        return x.unflatten(1, (shots, ways)).sum(-1)

    def spread(x: Tensor) -> Tensor:  # A' x, [T, S] -> [T, P]
        return x.repeat_interleave(ways, 1)

    def solver(weights: Tensor) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(r, q) -> (da, dv) with (K + diag(weights)) da + A' dv = r and A da = q."""
        factor = torch.linalg.cholesky_ex(regular + torch.diag_embed(weights + ridge)).L
        through = solve_factored(spreads.expand(tasks, -1, -1), factor)  # M^-1 A'
        small = torch.linalg.cholesky_ex(sums(through.mT.flatten(0, 1)).unflatten(0, (tasks, shots))).L

        def solve(r: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
            r = r + largest * spread(q)
            first = solve_factored(r.unsqueeze(-1), factor).squeeze(-1)
            dv = solve_factored((sums(first) - q).unsqueeze(-1), small).squeeze(-1)
            return first - (through @ dv.unsqueeze(-1)).squeeze(-1), dv

        return solve

    for _ in range(STEPS):
        dual = (hessian @ a.unsqueeze(-1)).squeeze(-1) - own + z + spread(v)
        newton = Newton(solver(z / s), s, z, dual, a + s - bounds, sums(a))
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


def solve_factored(right: Tensor, factor: Tensor) -> Tensor:
    """The solution x of L L' x = right, with the lower triangle L."""
    if right.device.type == "cpu":
        return torch.cholesky_solve(right, factor)
    # On a GPU, cholesky_solve synchronises, and can therefore not be part of a CUDA graph.
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    return torch.linalg.solve_triangular(factor.mT, half, upper=True)


@dataclass(frozen=True)
class Newton:
    """The linear system and the residuals of the optimality conditions at one point (s, z > 0)."""

    solve: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    s: Tensor
    z: Tensor
    dual: Tensor
    bound: Tensor
    sums: Tensor

    def direction(self, complementarity: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(da, dv, ds, dz) for which, to first order, residuals vanish and s z falls by `complementarity`.

        ds and dz are eliminated first: z / s joins the diagonal of K.
        """
        da, dv = self.solve(-self.dual + (complementarity - self.z * self.bound) / self.s, -self.sums)
        ds = -self.bound - da
        return da, dv, ds, -(complementarity + self.z * ds) / self.s


TINY = 1e-14  # the least slack and multiplier, so that they stay positive and their ratio finite


def longest(x: Tensor, dx: Tensor) -> Tensor:
    """The largest step, at most 1, for which x + step * dx >= 0, with x > 0; [T, 1]."""
    steps = torch.where(dx < 0, -x / dx, torch.ones_like(x))
    return steps.amin(1, keepdim=True).clamp(max=1)
