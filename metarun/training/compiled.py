"""The meta-gradient as a single graph without a backward pass, which TorchInductor can compile.

`torch.compile` does not support double backward, and a second-order meta-gradient is the
derivative of a computation that contains derivatives. Therefore the computation is traced below autograd:
`make_fx` runs it once with autograd enabled and records the tensor operations of the forward, inner backward
and outer backward passes. The trace needs no further differentiation, so it can be run, or
compiled, like any forward pass.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metarun.algorithms.base import Algorithm
from metarun.errors import TrainingError
from metarun.tasks.episodes import Outcome, Tasks
from metarun.tasks.source import Draw
from metarun.training.hardware import Hardware

#: The gradient of each weight (None if the loss does not depend on it), and the sums over tasks of the loss
#: and of each score, float64 [1 + metrics].
Gradient = tuple[list[Tensor | None], Tensor]
GradientOfDraw = Callable[[Draw], Gradient]
MetaLoss = Callable[[Tasks], Outcome]
#: (meta-loss, weights, draw) -> the gradient, by autograd.
EagerGradient = Callable[[MetaLoss, Sequence[Tensor], Draw], Gradient]


def traced_gradient(
    algorithm: Algorithm, eager: EagerGradient, example: Draw, hardware: Hardware, compiles: bool
) -> GradientOfDraw:
    """Trace the meta-gradient for draws with the shapes of `example`.

    Args:
        algorithm: its meta-loss is differentiated. The trace reads its current weights at every call.
        eager: the function to trace: it computes the gradient by autograd.
        example: a draw with the shapes that the trace is made for; a trace has fixed shapes.
        hardware: the precision.
        compiles: whether TorchInductor compiles the trace, which takes from seconds to minutes.

    Returns:
        The function draw -> gradient that runs the trace.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    module = _MetaLoss(algorithm)
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    weights = [name for name, p in module.named_parameters() if p.requires_grad]
    used: list[bool] = []

    def flat(*inputs: Tensor) -> list[Tensor]:
        # The weights must be inputs of the trace; otherwise it would hold their current values as constants.
        # `functional_call` puts them into the module, detached, so that they are leaves of autograd.
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
        with one_fake_mode():
            traced = make_fx(flat, decomposition_table=VECTOR_PRODUCTS if compiles else None)(*inputs)
        for node in traced.graph.nodes:  # detach() is recorded as an alias operation, which is not needed
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
        with torch.no_grad(), hardware.without_autocast():  # the trace already contains the casts of autocast
            *grads, figures = run(*tensors.values(), *draw)
        rest = iter(grads)
        return [next(rest) if is_used else None for is_used in used], figures

    return gradient


def end_capture(device: torch.device) -> None:
    """Make the random numbers of a GPU usable again after a capture that failed.

    Its generator still takes itself for a part of that graph, and raises an error at the next random number
    (PyTorch 2.11). A capture that succeeds, of one operation here, sets it right.
    """
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device=device)


@contextlib.contextmanager
def explained_derivatives() -> Iterator[None]:
    """A context that raises TrainingError for an operation that PyTorch cannot differentiate twice."""
    try:
        yield
    except RuntimeError as error:
        if not (found := re.search(r"derivative for '?(?:aten::)?(\w+)'? is not implemented", str(error))):
            raise
        raise TrainingError(
            f"{found[1]}: PyTorch has no second derivative of this operation of the network, which the "
            "meta-gradient needs; choose inner_loop.order=1 or algorithm=protonet, or replace the layer "
            "(nn.EmbeddingBag by nn.Embedding and a mean)"
        ) from error


def add(a: Gradient, b: Gradient) -> Gradient:
    """The sum of two gradients, in which None counts as zero."""
    grads = [y if x is None else x if y is None else x + y for x, y in zip(a[0], b[0], strict=True)]
    return grads, a[1] + b[1]


class _MetaLoss(nn.Module):
    """The meta-loss as the forward of a module, so that `functional_call` can replace the weights."""

    def __init__(self, algorithm: Algorithm) -> None:
        super().__init__()
        self.algorithm = algorithm

    def forward(self, tasks: Tasks) -> Outcome:
        return self.algorithm.meta_loss(tasks)


def one_fake_mode() -> contextlib.AbstractContextManager:
    """A context in which a trace describes all its tensors in one fake mode.

    Otherwise PyTorch makes a new one for every operation, which takes about half of the time of a trace.
    These parts of PyTorch are not public; where a version lacks them, the trace is the same and takes longer.
    """
    try:
        from torch._guards import TracingContext, tracing
        from torch._subclasses.fake_tensor import FakeTensorMode

        return tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True)))
    except (ImportError, AttributeError, TypeError):
        return contextlib.nullcontext()


@contextlib.contextmanager
def restored(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[None]:
    """A context that restores the values of tensors on exit."""
    before = [(tensor, tensor.clone()) for _, tensor in tensors]
    try:
        yield
    finally:
        for tensor, value in before:
            tensor.copy_(value)


def can_trace(algorithm: Algorithm) -> bool:
    """Whether all modules are metarun's or PyTorch's; other modules may do what a trace does not record."""
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


# Decompositions of matrix products that involve a vector. TorchInductor calls a library for matrix products,
# and the call costs more than such a product; as pointwise operations they are fused with their neighbours.
VECTOR_PRODUCTS: dict[Any, Callable[..., Tensor]] = {
    torch.ops.aten.bmm.default: _bmm,
    torch.ops.aten.baddbmm.default: _baddbmm,
}
