"""The batchings' own kernels against PyTorch's, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from metarun.nn import double_backward
from metarun.nn.double_backward import ConvSettings
from metarun.nn.layers import Residual, StepNorm
from metarun.nn.per_task import TaskBatching, leaves, pooled_first, run_chain, run_on_tasks

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
    mine, theirs = (
        double_backward.batch_norm(*inputs, 1e-5),
        F.batch_norm(x, None, None, *inputs[1:], True, eps=1e-5),
    )
    torch.testing.assert_close(mine, theirs)
    checked = tuple(t for t in inputs if t is not None)

    def squared(x: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        return double_backward.batch_norm(x, w, b, 1e-5).square()

    assert gradcheck(squared, checked)
    assert gradgradcheck(squared, checked)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_norm_of_tasks_that_share_a_weight_for_their_one_channel(layout: str):
    """The weight has stride 0, beyond which PyTorch's kernel for channels-last maps would read."""
    x = images(layout)
    shared = [vector(seed, 1).expand(3) for seed in (1, 2)]
    found, expected = (
        torch.autograd.grad(double_backward.batch_norm(x, *each, 1e-5).pow(3).sum(), x)[0]
        for each in (shared, [p.clone() for p in shared])
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_norm_fills_in_the_statistics_of_its_input(layout: str):
    x, w, b = images(layout), vector(1), vector(2)
    mean, variance = torch.full((3,), 7.0).double(), torch.full((3,), 7.0).double()
    y = double_backward.batch_norm(x, w, b, 1e-5, (mean, variance))
    assert torch.equal(y, double_backward.batch_norm(x, w, b, 1e-5))
    torch.testing.assert_close(mean, x.mean((0, 2, 3)).detach())
    torch.testing.assert_close(variance, x.var((0, 2, 3)).detach())


def test_averages_of_a_step_are_those_of_pytorchs_batch_norm_task_by_task():
    torch.manual_seed(0)
    layer, theirs = StepNorm(3, affine=2, statistics=2, eps=1e-5).double(), nn.BatchNorm2d(3).double()
    layer.step = 1
    x = torch.randn(4, 5, 3, 6, 6).double() + 2  # [T, B, C, H, W]
    own = {name: p.expand(4, *p.shape) for name, p in layer.named_parameters()}
    y = layer.on_tasks(own, x.transpose(0, 1).flatten(1, 2), 4)
    expected = torch.stack([theirs(task) for task in x])
    torch.testing.assert_close(y.unflatten(1, (4, 3)).transpose(0, 1), expected)
    torch.testing.assert_close(layer.mean[1], theirs.running_mean)
    torch.testing.assert_close(layer.variance[1], theirs.running_var)
    assert torch.equal(layer.mean[0], torch.zeros(3).double())  # the other step's
    torch.testing.assert_close(layer.eval()(x[0]), theirs.eval()(x[0]))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "settings", [((2, 2), (2, 2), (0, 0), (1, 1), False), ((3, 2), (1, 2), (1, 0), (1, 1), True)]
)
def test_max_pool_and_its_first_and_second_derivatives(settings: tuple, layout: str, channels: int):
    x = images(layout, channels)
    kernel, stride, padding, dilation, ceil = settings
    expected = F.max_pool2d(x, kernel, stride, padding, dilation, ceil)
    torch.testing.assert_close(double_backward.max_pool(x, *settings), expected)
    assert gradcheck(lambda x: double_backward.max_pool(x, *settings), (x,))
    assert gradgradcheck(lambda x: double_backward.max_pool(x, *settings).pow(3), (x,))


def test_feature_maps_stay_channels_last_through_both_backward_passes():
    """One tensor in another layout is correct but several times slower."""
    x = images("channels_last")
    pooled = double_backward.max_pool(
        double_backward.batch_norm(x, vector(1), vector(2), 1e-5), (2, 2), (2, 2), (0, 0), (1, 1), False
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
        return double_backward.linear(x, w, b).square()

    expected = torch.stack([F.linear(x[t], w[t], b[t] if biased else None) for t in range(2)])
    torch.testing.assert_close(double_backward.linear(*inputs, *([] if biased else [None])), expected)
    assert gradcheck(squared, inputs)
    assert gradgradcheck(squared, inputs)


class Twice(nn.Module):
    """Not a container of the chain, although it has layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x)


def test_a_chain_is_run_as_its_forward_pass_and_layers_have_their_own_names():
    """Nested chains, residual blocks within residual blocks, and a module that is not a chain."""
    inner = Residual(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    block = Residual(nn.Sequential(nn.Sequential(Twice(), nn.ReLU()), inner), nn.Linear(4, 4))
    network = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(4, 4), block), nn.Linear(4, 2))
    seen: list[str] = []

    def apply(name: str, layer: nn.Module, x: Tensor) -> Tensor:
        assert network.get_submodule(name) is layer
        seen.append(name)
        return layer(x)

    x = torch.randn(3, 2, 2)
    assert torch.equal(run_chain(network, x, apply), network(x))
    called: list[nn.Module] = []
    for layer in leaves(network):
        layer.register_forward_hook(lambda layer, inputs, output: called.append(layer))
    network(x)
    assert [network.get_submodule(name) for name in seen] == called == leaves(network)
    assert run_chain(network, 0, lambda name, layer, n: n + 1, combine=max) == 3 + 2 + 2


@pytest.mark.parametrize("item", [(2, 6), (2, 3, 4, 6)], ids=str)
def test_items_that_are_neither_vectors_nor_images(item: tuple[int, ...]):
    """A linear layer acts on the last dimension, whatever is before it."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Flatten()).double()
    params = {name: torch.randn(4, *p.shape).double() for name, p in module.named_parameters()}
    x = torch.randn(4, 5, *item).double()
    torch.testing.assert_close(
        run_on_tasks(module, params, x), run_on_tasks(module, params, x, TaskBatching("loop"))
    )


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
    expected = run_on_tasks(module, params, x, TaskBatching("loop"))
    torch.testing.assert_close(run_on_tasks(module, params, x, TaskBatching(how, channels_last)), expected)


# Third derivatives, through which the trust region of TRPO looks at the inner loop.


def third_derivative(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The derivative of a product with the second derivative of f(x).sum()."""
    generator = torch.Generator().manual_seed(9)
    v, u = (torch.randn(x.shape, dtype=x.dtype, generator=generator) for _ in range(2))
    (first,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((first.tanh() * v).sum(), x, create_graph=True)
    return torch.autograd.grad((second.tanh() * u).sum(), x)[0]


CONVOLUTIONS = {
    "groups": ConvSettings((1, 1), (1, 1), (1, 1), 2),
    "strides": ConvSettings((2, 1), (0, 2), (1, 1), 1),
    "dilation": ConvSettings((1, 2), (2, 1), (2, 1), 4),
}


def conv_inputs(layout: str, settings: ConvSettings) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(4, 4 // settings.groups, 3, 2, dtype=torch.float64)
    return images(layout, 4), weight.requires_grad_(), vector(1, 4)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_convolutions_and_their_derivatives(layout: str, name: str):
    settings = CONVOLUTIONS[name]
    inputs = conv_inputs(layout, settings)
    y = double_backward.conv2d(*inputs, settings)
    torch.testing.assert_close(y, F.conv2d(*inputs, *settings))
    assert y.is_contiguous(memory_format=LAYOUTS[layout])

    def squared(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        return double_backward.conv2d(x, w, b, settings).square()

    assert gradcheck(squared, inputs, fast_mode=True)
    assert gradgradcheck(squared, inputs, fast_mode=True)
    assert gradgradcheck(squared, (inputs[0].detach(), inputs[1]), fast_mode=True)  # a first layer


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_third_derivatives_of_convolutions(name: str):
    settings = CONVOLUTIONS[name]
    x, weight, bias = conv_inputs("contiguous", settings)

    def f(conv: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: conv(x.sin(), weight * x.mean(), bias).tanh()

    own = third_derivative(f(lambda *inputs: double_backward.conv2d(*inputs, settings)), x)
    expected = third_derivative(f(lambda *inputs: F.conv2d(*inputs, *settings)), x)
    torch.testing.assert_close(own, expected)
    assert expected.abs().max() > 1e-4


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_third_derivative_of_linear_layers(with_bias: bool):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator)
    weight = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator, requires_grad=True)

    def f(linear: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        bias = lambda w: w.sum(2).sin() if with_bias else None  # noqa: E731
        return lambda w: linear(linear(x, w, bias(w)).tanh(), w.mT, None).tanh().square()

    def plain(x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return x @ w.mT + (0 if b is None else b.unsqueeze(1))

    expected = third_derivative(f(plain), weight)
    torch.testing.assert_close(third_derivative(f(double_backward.linear), weight), expected)
    assert expected.abs().max() > 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_third_derivative_of_pooling(layout: str):
    x = images(layout)
    own = third_derivative(
        lambda x: double_backward.max_pool(x.sin(), (2, 2), (2, 2), (0, 0), (1, 1), False).tanh(), x
    )
    expected = third_derivative(lambda x: F.max_pool2d(x.sin(), 2).tanh(), x)
    torch.testing.assert_close(own, expected)


def test_a_third_derivative_of_batch_norm_is_an_error():
    x = images("contiguous")
    with pytest.raises(RuntimeError, match="derivative for 'batch_norm' is not implemented"):
        third_derivative(lambda x: double_backward.batch_norm(x, None, None, 1e-5), x)
