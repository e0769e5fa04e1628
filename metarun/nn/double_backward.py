"""Batch norm, convolutions, max pooling and batched linear layers with short second derivatives.

MAML's outer gradient runs through the inner one, so the *backward* of every layer is differentiated
too. PyTorch does that for batch norm by some twenty passes over the feature map, for a convolution by a
loop over its groups, and keeps the input of a max pooling although its indices suffice. The formulas here
are exact (tests/unit/test_double_backward.py compares with finite differences); docs/speed.md has what
they gain.

Each operation is two autograd Functions: the layer, whose backward calls the second one, and the
layer's backward, whose own backward is written out. Linear layers, convolutions and pooling can be
differentiated any number of times, as TRPO needs; a third derivative of batch norm raises an error.
PyTorch's `once_differentiable` would not do that: `autograd.grad` leaves out the branch of the graph that
raises its error, and returns a wrong derivative without a word.

Everything keeps the memory layout of its input, so that feature maps stay channels-last, which
is what makes normalising and pooling fast on a CPU. These Functions have no rule for torch.vmap.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

native = torch.ops.aten
Pair = tuple[int, int]


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """F.batch_norm in training mode, without running averages, with a fast second derivative.

    Args:
        x: feature maps [B, C, H, W].
        weight, bias: [C], or both None.
        eps: added to the variance.
        statistics: two tensors [C] that are filled with the mean and the unbiased variance of x.
    """
    # The kernel for channels-last maps reads weights as contiguous: those of tasks that share one, with one
    # channel each, have stride 0, and it would read beyond them.
    weight, bias = (p if p is None else p.contiguous() for p in (weight, bias))
    return _BatchNorm.apply(x, weight, bias, eps, statistics)


class _BatchNorm(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        statistics: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        if statistics is None:
            y, mean, scale = native.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
        else:
            # With a momentum of 1 running averages become the statistics, which the kernel computes anyway.
            # This operation declares that it writes to them, which a compiler has to know.
            y, mean, scale = native._native_batch_norm_legit(x, weight, bias, *statistics, True, 1.0, eps)
        ctx.save_for_backward(x, weight, mean, scale)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, scale = ctx.saved_tensors
        g = like(g, x)
        # Gradients are enabled here only with create_graph=True. Otherwise PyTorch's own backward is used,
        # which saves nothing for another one.
        if torch.is_grad_enabled():
            dx, dw, db = _BatchNormBackward.apply(g, x, weight, mean, scale, ctx.eps)
        else:
            dx, dw, db = native.native_batch_norm_backward(
                g, x, weight, None, None, mean, scale, True, ctx.eps, [True, *[weight is not None] * 2]
            )
        affine = ctx.needs_input_grad[1:3]
        return dx, dw if affine[0] else None, db if affine[1] else None, None, None


class _BatchNormBackward(Function):
    """The gradients of batch norm as a function of g, x and the weight.

    With s = 1/sqrt(var + eps), n = (x - mean) s and means over a channel's N places, let
    P(g) = s (g - mean(g) - n mean(g n)), which is the transposed derivative of n. Then
    dx = weight P(g), dw = sum(g n), db = sum(g). For a cotangent v of dx, with
    k = mean(g v) - mean(g) mean(v) - mean(g n) mean(v n):

        to g:       weight P(v)                                        (P is symmetric)
        to weight:  N s k
        to x:       -weight s (s k n + mean(v n) P(g) + mean(g n) P(v))

    and a cotangent u of dw adds u n to g and u P(g) to x; one of db adds itself to g.

    Why this is short: P(g) with both of its sums is what PyTorch's batch norm backward computes for a weight
    of one, in one kernel. P(g) and its sums are kept from this forward pass, P(v) and its sums are one more
    call of that kernel, and sum(g v) is a third call (`inner_products`). All other quantities are numbers
    per channel; what is left is adding three maps for x and two for g, in place. Autograd would
    differentiate each sum and product of the formula separately: a pass over the maps for each.
    """

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        projected, dw, db = project(g, x, mean, scale, eps)
        ctx.save_for_backward(g, x, weight, mean, scale, projected, dw, db)
        ctx.eps = eps
        dx = projected if weight is None else (projected * column(weight)).to(x.dtype)
        return dx, dw, db

    @staticmethod
    def backward(ctx: Any, v: Tensor, u: Tensor, to_bias: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # of the statistics, only the values are kept
            raise RuntimeError("derivative for 'batch_norm' is not implemented: a third derivative")
        g, x, weight, mean, scale, projected, sum_gn, sum_g = ctx.saved_tensors
        v = like(v, x)
        count = x.numel() // x.shape[1]
        projected_v, sum_vn, sum_v = project(v, x, mean, scale, ctx.eps)
        mean_gn, mean_vn = sum_gn / count, sum_vn / count
        k = inner_products(g, v, scale) / count - sum_g * sum_v / count**2 - mean_gn * mean_vn
        w = torch.ones_like(scale) if weight is None else weight
        centred = x - column(mean)
        to_g = torch.addcmul(column(to_bias), centred, column(u * scale)).addcmul_(projected_v, column(w))
        to_x = centred.mul_(column(-w * scale.pow(3) * k))
        to_x.addcmul_(projected, column(u - w * scale * mean_vn))
        to_x.addcmul_(projected_v, column(-w * scale * mean_gn))
        return to_g, to_x, None if weight is None else count * scale * k, None, None, None


def project(g: Tensor, x: Tensor, mean: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """P(g) [B, C, H, W], and the sums of g n and of g over each channel's places [C], in one kernel."""
    one = torch.ones_like(scale)  # without a weight the CUDA kernel leaves the sums out
    return native.native_batch_norm_backward(g, x, one, None, None, mean, scale, True, eps, [True] * 3)


def inner_products(g: Tensor, v: Tensor, scale: Tensor) -> Tensor:
    """The sum of g v over each channel's places, [C].

    Batch norm's weight gradient, sum(g (v - mean) scale), for mean 0 and scale 1: no map g v is stored, and
    sums of bf16 maps are accumulated in the type of `scale`, float32.
    """
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    mask = [False, True, False]
    return native.native_batch_norm_backward(g, v, one, None, None, zero, one, True, 0.0, mask)[1]


def column(vector: Tensor) -> Tensor:
    """A vector [C] as [C, 1, 1], to be combined with maps [B, C, H, W]."""
    return vector[:, None, None]


def like(g: Tensor, x: Tensor) -> Tensor:
    """g in x's memory layout and type, without a copy if it has these already."""
    return g.to(x.dtype).contiguous(memory_format=layout(x))


def layout(x: Tensor) -> torch.memory_format:
    """The memory layout of maps x [B, C, H, W]; contiguous for one channel, where both look the same."""
    is_last = x.stride(1) == 1 and x.shape[1] > 1
    return torch.channels_last if is_last else torch.contiguous_format


def channels_last(images: Tensor) -> Tensor:
    """Images [B, C, H, W] in channels-last layout, also if there is one channel.

    PyTorch takes one channel for contiguous in both layouts and would leave its strides as they are. The
    strides set here make the convolution that follows return channels-last maps.
    """
    _, channels, height, width = images.shape
    if channels > 1:
        return images.contiguous(memory_format=torch.channels_last)
    return images.contiguous().as_strided(images.shape, (height * width, 1, width, 1))


class ConvSettings(NamedTuple):
    """What a convolution has besides its tensors, in the order of PyTorch's operations."""

    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int


def conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, settings: ConvSettings) -> Tensor:
    """F.conv2d of x [B, C, H, W] whose second derivative runs all groups at once.

    PyTorch's second derivative is a loop over the groups, with copies of the maps. But a convolution and both
    parts of its backward are linear in each of two of (x, weight, g), and the derivatives of one are the
    other two; all three have kernels for groups.
    """
    return _Conv.apply(x, weight, bias, settings)


class _Conv(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, settings: ConvSettings) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.settings, ctx.biased = settings, bias is not None
        return F.conv2d(x, weight, bias, *settings)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, dw = _ConvBackward.apply(g, x, weight, ctx.settings, ctx.needs_input_grad[:2])
        return dx, dw, g.sum((0, 2, 3)) if ctx.biased and ctx.needs_input_grad[2] else None, None


class _ConvBackward(Function):
    """The gradients of a convolution for x, bilinear in (g, weight), and for the weight, in (g, x)."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, settings: ConvSettings, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.save_for_backward(g, x, weight)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        g, x, weight = (tensor.to(g.dtype) for tensor in (g, x, weight))  # under autocast types differ
        stride, padding, dilation, groups = settings
        return native.convolution_backward(
            g, x, weight, None, stride, padding, dilation, False, (0, 0), groups, (*wanted, False)
        )[:2]

    @staticmethod
    def backward(ctx: Any, v: Tensor | None, u: Tensor | None) -> tuple[Tensor | None, ...]:
        g, x, weight = ctx.saved_tensors
        to_g = to_x = to_weight = None
        if v is not None:  # of the gradient for x
            to_g = conv2d(v, weight, None, ctx.settings)
            if ctx.needs_input_grad[2]:
                to_weight = _ConvBackward.apply(g, v, weight, ctx.settings, (False, True))[1]
        if u is not None:  # of the gradient for the weight
            part = conv2d(x, u, None, ctx.settings)
            to_g = part if to_g is None else to_g + part
            if ctx.needs_input_grad[1]:
                to_x = _ConvBackward.apply(g, x, u, ctx.settings, (True, False))[0]
        return to_g, to_x, to_weight, None, None


def max_pool(x: Tensor, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, ceil: bool) -> Tensor:
    """F.max_pool2d of x [B, C, H, W] that saves the indices of the largest values but not x itself.

    Given the indices, the output picks entries of x and the backward puts entries of g in their places. Both
    are linear, so no derivative needs the values of x; PyTorch saves x all the same.
    """
    return _MaxPool.apply(x, (kernel, stride, padding, dilation, ceil))


class _MaxPool(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, settings: tuple[Any, ...]) -> Tensor:
        y, places = native.max_pool2d_with_indices(x, *settings)
        ctx.save_for_backward(places)
        ctx.shape, ctx.layout, ctx.settings = x.shape, layout(x), settings
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _MaxPoolBackward.apply(g, *ctx.saved_tensors, ctx.shape, ctx.layout, ctx.settings), None


class _MaxPoolBackward(Function):
    """Each entry of g is added at the place of the largest value; linear in g, so v is picked from there."""

    @staticmethod
    def forward(
        ctx: Any,
        g: Tensor,
        places: Tensor,
        shape: torch.Size,
        form: torch.memory_format,
        settings: tuple[Any, ...],
    ) -> Tensor:
        ctx.save_for_backward(places)
        ctx.layout = form
        # The kernel asks for the pooling's input but uses its shape and layout only.
        like_input = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=form)
        return native.max_pool2d_with_indices_backward(
            g.contiguous(memory_format=form), like_input, *settings, places
        )

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        v = v.contiguous(memory_format=ctx.layout)
        if ctx.layout == torch.channels_last:
            v, where = v.permute(0, 2, 3, 1), places.permute(0, 2, 3, 1)  # [B, H, W, C], [B, h, w, C]
            picked = v.flatten(1, 2).gather(1, where.flatten(1, 2)).view(where.shape).permute(0, 3, 1, 2)
        else:
            picked = v.flatten(2).gather(2, places.flatten(2)).view(places.shape)
        return picked, None, None, None, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """T linear layers, twice differentiable: x [T, B, in], weight [T, out, in], bias [T, out] -> [T, B, out].

    Autograd's derivatives of torch.baddbmm are the same to rounding but take more operations. Here sums are
    part of the products, and a weight's gradient has the weight's memory layout. With one thread, the traced
    meta-gradient of MAML's sinusoid network (25 tasks) takes 1.07 ms instead of 1.43 with 1 inner step and
    4.97 instead of 6.71 with 5; if it is not traced, and in a Conv4, the difference is within the noise.
    """
    return _Linear.apply(x, weight, bias)


class _Linear(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.bmm(x, weight.mT) if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight.mT)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return _LinearBackward.apply(g, *ctx.saved_tensors, ctx.needs_input_grad)


class _LinearBackward(Function):
    """dx = g W, dW = g^T x, and db, the sum of g over B."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, ...]
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(g, x, weight)
        ctx.set_materialize_grads(False)
        g, x, weight = (tensor.to(g.dtype) for tensor in (g, x, weight))  # under autocast types differ
        dx = torch.bmm(g, weight) if wanted[0] else None
        return dx, torch.bmm(g.mT, x) if wanted[1] else None, g.sum(1) if wanted[2] else None

    @staticmethod
    def backward(
        ctx: Any, v: Tensor | None, u: Tensor | None, to_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        g, x, weight = ctx.saved_tensors
        to_g = g.new_zeros(()).expand_as(g) if to_bias is None else to_bias.unsqueeze(1).expand_as(g)
        if v is not None:
            to_g = torch.baddbmm(to_g, v, weight.mT)
        if u is not None:
            to_g = torch.baddbmm(to_g, x, u.mT)
        to_x = torch.bmm(g, u) if u is not None and ctx.needs_input_grad[1] else None
        return to_g, to_x, None if v is None else torch.bmm(g.mT, v), None
