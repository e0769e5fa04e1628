"""The whole meta-gradient as one graph without a backward pass, which TorchInductor may compile.

`torch.compile` cannot differentiate twice what it compiled, and a meta-gradient of second order is the
derivative of a computation that holds derivatives. So the computation is traced below autograd: `make_fx`
runs it once with autograd at work and records the tensor operations that the forward, inner backward and
outer backward passes come to. Nothing in that record is left to differentiate, so it can be run, or
compiled, like any forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metarun.algorithms.base import Algorithm
from metarun.tasks.episodes import Outcome, Tasks
from metarun.tasks.source import Draw
from metarun.training.hardware import Hardware

#: The gradient of each weight, None for a weight without; and sums over tasks of the loss and each score,
#: float64 [1 + metrics].
Gradient = tuple[list[Tensor | None], Tensor]
GradientOfDraw = Callable[[Draw], Gradient]
MetaLoss = Callable[[Tasks], Outcome]
#: (meta-loss, weights, draw) -> the gradient, by autograd.
EagerGradient = Callable[[MetaLoss, Sequence[Tensor], Draw], Gradient]


def traced_gradient(
    algorithm: Algorithm, eager: EagerGradient, example: Draw, hardware: Hardware, compiles: bool
) -> GradientOfDraw:
    """The gradient of draws like `example`, from a trace.

    Args:
        algorithm: whose meta-loss is differentiated. Its weights are read anew at every call.
        eager: computes the gradient by autograd; this is what is traced.
        example: a draw of the size that the trace is made for: a trace has fixed shapes.
        hardware: the precision.
        compiles: whether TorchInductor compiles the trace, which takes from seconds to minutes.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    module = _MetaLoss(algorithm)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    weights = [name for name, p in module.named_parameters() if p.requires_grad]
    used: list[bool] = []

    def flat(*inputs: Tensor) -> list[Tensor]:
        # The weights must be inputs of the trace, or it would hold today's values as constants. They are
        # put into the module by `functional_call`, detached, so that autograd starts at them.
        state = dict(zip(tensors, inputs, strict=False))
        state |= {name: state[name].detach().requires_grad_() for name in weights}
        grads, figures = eager(
            lambda tasks: functional_call(module, state, (tasks,)),
            [state[name] for name in weights],
            type(example)(inputs[len(tensors) :]),
        )
        used[:] = [grad is not None for grad in grads]
        return [grad for grad in grads if grad is not None] + [figures]

    inputs: list[Any] = [tensor.detach() for tensor in tensors.values()] + list(example)
    with hardware.forked_random(), restored(module.named_buffers()):
        traced = make_fx(flat, decomposition_table=VECTOR_PRODUCTS if compiles else None)(*inputs)
        for node in traced.graph.nodes:  # what is left of detach()
            if node.target is torch.ops.aten.alias.default:
                node.replace_all_uses_with(node.args[0])
                traced.graph.erase_node(node)
        traced.recompile()
        run: Callable[..., Any] = traced.forward
        if compiles:
            from torch._inductor import compile as inductor

            run = inductor(traced, inputs, options={"fallback_random": True})  # type: ignore[arg-type]
            run(*inputs)

    def gradient(draw: Draw) -> Gradient:
        with torch.no_grad(), hardware.without_autocast():  # its casts are in the trace already
            *grads, figures = run(*tensors.values(), *draw)
        rest = iter(grads)
        return [next(rest) if is_used else None for is_used in used], figures

    return gradient


class _MetaLoss(nn.Module):
    """The meta-loss as a module's forward, to be called with other weights."""

    def __init__(self, algorithm: Algorithm) -> None:
        super().__init__()
        self.algorithm = algorithm

    def forward(self, tasks: Tasks) -> Outcome:
        return self.algorithm.meta_loss(tasks)


@contextlib.contextmanager
def restored(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
    """Give tensors back the values they had before."""
    before = [(tensor, tensor.clone()) for _, tensor in tensors]
    try:
        yield
    finally:
        for tensor, value in before:
            tensor.copy_(value)


def can_trace(algorithm: Algorithm) -> bool:
    """Whether all of its modules are metarun's or PyTorch's; a user's may do what a trace does not show."""
    return all(type(part).__module__.split(".")[0] in ("metarun", "torch") for part in algorithm.modules())


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    if a.shape[2] == 1:
        return a * b
    if a.shape[1] == 1 or b.shape[2] == 1:
        return (a.unsqueeze(3) * b.unsqueeze(1)).sum(2)
    return NotImplemented


def _baddbmm(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    product = _bmm(a, b)
    return product if product is NotImplemented else c + product


# TorchInductor fuses products of vectors with what is around them, but leaves matrix products to a library,
# whose call costs more than such a product.
VECTOR_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.bmm.default: _bmm,
    torch.ops.aten.baddbmm.default: _baddbmm,
}
