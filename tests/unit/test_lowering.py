"""The lowerings' own kernels against PyTorch's, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from metarun import fused
from metarun.lowering import Lowering, pooled_first, run_on_tasks

pytestmark = pytest.mark.quick

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def images(layout: str, channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, channels, 6, 5, dtype=torch.float64, generator=generator)
    return x.clone(memory_format=LAYOUTS[layout]).requires_grad_()


def vector(seed: int, size: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_norm_and_its_first_and_second_derivatives(layout: str, affine: bool):
    x, w, b = images(layout), vector(1), vector(2)
    inputs = (x, w, b) if affine else (x, None, None)
    mine, theirs = fused.batch_norm(*inputs, 1e-5), F.batch_norm(x, None, None, *inputs[1:], True, eps=1e-5)
    torch.testing.assert_close(mine, theirs)
    checked = tuple(t for t in inputs if t is not None)

    def squared(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        return fused.batch_norm(x, w, b, 1e-5).square()

    assert gradcheck(squared, checked)
    assert gradgradcheck(squared, checked)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "settings", [((2, 2), (2, 2), (0, 0), (1, 1), False), ((3, 2), (1, 2), (1, 0), (1, 1), True)]
)
def test_max_pool_and_its_first_and_second_derivatives(settings: tuple, layout: str, channels: int):
    x = images(layout, channels)
    kernel, stride, padding, dilation, ceil = settings
    expected = F.max_pool2d(x, kernel, stride, padding, dilation, ceil)
    torch.testing.assert_close(fused.max_pool(x, *settings), expected)
    assert gradcheck(lambda x: fused.max_pool(x, *settings), (x,))
    assert gradgradcheck(lambda x: fused.max_pool(x, *settings).pow(3), (x,))


def test_feature_maps_stay_channels_last_through_both_backward_passes():
    """One tensor in another layout is correct but several times slower."""
    x = images("channels_last")
    pooled = fused.max_pool(
        fused.batch_norm(x, vector(1), vector(2), 1e-5), (2, 2), (2, 2), (0, 0), (1, 1), False
    )
    (g,) = torch.autograd.grad(pooled.pow(3).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.pow(3).sum(), x)
    for tensor in (pooled, g, h):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("biased", [True, False])
def test_linear_and_its_first_and_second_derivatives(biased: bool):
    torch.manual_seed(0)
    x, w, b = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 5, 3), (2, 4, 3), (2, 4))
    )
    inputs = (x, w, b) if biased else (x, w)

    def squared(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return fused.linear(x, w, b).square()

    expected = torch.stack([F.linear(x[t], w[t], b[t] if biased else None) for t in range(2)])
    torch.testing.assert_close(fused.linear(*inputs, *([] if biased else [None])), expected)
    assert gradcheck(squared, inputs)
    assert gradgradcheck(squared, inputs)


def test_pooling_moves_before_the_relu_it_follows():
    chain = [("a", nn.Conv2d(1, 2, 3)), ("b", nn.ReLU()), ("c", nn.MaxPool2d(2)), ("d", nn.ReLU())]
    assert [name for name, _ in pooled_first(chain)] == ["a", "c", "b", "d"]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("how", ["grouped", "unfold"])
@pytest.mark.parametrize(
    "settings", [{}, {"stride": 2, "padding": (1, 2)}, {"dilation": (2, 1), "bias": False}]
)
def test_convolutions_of_every_kind(settings: dict, how: str, channels_last: bool):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 3, **settings), nn.LeakyReLU(), nn.Flatten()).double()
    params = {name: torch.randn(3, *p.shape).double() for name, p in module.named_parameters()}
    x = torch.randn(3, 2, 2, 8, 9).double()
    expected = run_on_tasks(module, params, x, Lowering("loop"))
    torch.testing.assert_close(run_on_tasks(module, params, x, Lowering(how, channels_last)), expected)
