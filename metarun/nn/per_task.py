"""One network, T tasks, each task with its own weights, in one forward pass.

A backbone is written for one task. It is run with T sets of weights by one of four exact
ways (the same result to rounding):

- `grouped`: the tasks' channels are stacked, so that a convolution with T groups and a batch
  norm over T*C channels serve all tasks at once. For chains of the layers in `GROUPED`, and of
  residual blocks of these.
- `unfold`: the same, with a convolution as one batched matrix product of unfolded patches. On a GPU it is
  2.4 to 3.2 times as fast (MAML on Omniglot, float32 on an H100), and needs 1.3 to 1.7 times the memory.
- `vmap`: the forward pass alone is vectorised over tasks. For any network without recurrent layers
  (with wide attention, a CPU runs tasks one after another instead).
- `loop`: one task after another. The plain reference.

Attention is computed without fused kernels (`plain_attention`), which cannot be differentiated twice.

Differentiate outside, `autograd.grad(losses.sum(), params)`: tasks share no weights, so the
gradient of the sum is each task's own. Do not compute inner gradients by `torch.func.grad`
inside `vmap`: if `autograd.grad` then differentiates through them, the result is wrong for batch
norm with affine weights, and no error is raised. With PyTorch 2.14 the meta-gradient of two
convolutions with batch norm was off by 60 % of its norm. The batching rule of batch norm's
backward is at fault (functorch issue 534). Only the forward pass is therefore vectorised here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from metarun.nn import double_backward
from metarun.nn.double_backward import ConvSettings
from metarun.nn.layers import Residual

Params = dict[str, Tensor]  # each [T, *shape]: every task's own copy of the weights
Chain = list[tuple[str, nn.Module]]  # layers in the order in which they run, by name
FEW = 4  # tasks for which a GPU is faster with groups than with unfolded patches
WIDE = 64  # numbers for each position in an attention layer
State = TypeVar("State")  # what passes along a chain


@dataclass(frozen=True)
class TaskBatching:
    """How T tasks are run at once.

    Args:
        how: one of the ways of this module. "auto" is `grouped` on a CPU and `unfold` on a GPU for networks
            that have a grouped form, and `vmap` for others; so are "grouped" and "unfold" for networks
            without one. Networks with recurrent layers are run by `loop`.
        channels_last: keep feature maps in that memory layout. On a CPU normalising and pooling are
            then several times faster (docs/speed.md). "auto": on every device but CUDA.
    """

    how: Literal["auto", "grouped", "unfold", "vmap", "loop"] = "auto"
    channels_last: bool | Literal["auto"] = "auto"

    def is_channels_last(self, on: torch.device) -> bool:
        """Whether feature maps are channels-last on the device `on`."""
        return on.type != "cuda" if self.channels_last == "auto" else self.channels_last

    def unfolds(self, on: torch.device, tasks: int) -> bool:
        """Whether convolutions of so many tasks are products of unfolded patches on the device `on`."""
        return on.type == "cuda" and tasks > FEW if self.how == "auto" else self.how == "unfold"

    def laid_out(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in the chosen memory layout."""
        return double_backward.channels_last(images) if self.is_channels_last(images.device) else images


AUTO = TaskBatching()


@runtime_checkable
class OnTasks(Protocol):
    """A layer with a method for T tasks at once, for layers that are not in `GROUPED`.

    With an attribute `independent` that is true, the output for an example does not depend on the task that
    it is in: tasks with the same weights are then one batch of `forward`.
    """

    def on_tasks(self, own: Params, x: Tensor, tasks: int) -> Tensor:
        """The layer's output for T tasks, of the layout of x.

        Args:
            own: the layer's weights by name, [T, *shape] each.
            x: feature maps [B, T*C, H, W], or vectors [T, B, features].
            tasks: T.
        """


def flatten(params: Params) -> Tensor:
    """The weights [T, *shape] of T tasks as rows [T, P], P numbers in the order of `params`."""
    return torch.cat([p.flatten(1) for p in params.values()], 1)


def unflatten(rows: Tensor, like: Params) -> Params:
    """The inverse of `flatten`: rows [T, P] as weights of the names and shapes [T, *shape] of `like`."""
    parts = rows.split([p[0].numel() for p in like.values()], 1)
    return {name: part.view_as(p) for (name, p), part in zip(like.items(), parts, strict=True)}


def shared_names(module: nn.Module) -> set[str]:
    """The names of the weights that are the same for all tasks and that no task adapts.

    They are those of layers with a true attribute `shared_by_tasks`, such as large tables of embeddings.
    """
    shared = [(n, layer) for n, layer in module.named_modules() if getattr(layer, "shared_by_tasks", False)]
    return {f"{n}.{key}" for n, layer in shared for key, _ in layer.named_parameters()}


def run_on_tasks(module: nn.Module, params: Params, x: Tensor, batching: TaskBatching = AUTO) -> Tensor:
    """Run one network with the weights of T tasks.

    Args:
        module: the network, written for examples [B, *item]. Its own weights are not used.
        params: its weights by name, every task's own, [T, *shape] each; without those of layers that all
            tasks share (`shared_names`), which are the module's.
        x: each task's examples, [T, B, *item].
        batching: how tasks are run at once.

    Returns:
        [T, B, *out], differentiable twice with respect to `params` and `x`.
    """
    how = batching.how
    # The grouped form distinguishes maps and vectors by their number of dimensions; vmap takes other items.
    if how in ("auto", "grouped", "unfold") and x.dim() in (3, 5) and is_groupable(module):
        return run_grouped(module, params, x, batching)
    with plain_attention():
        slow = how == "auto" and x.device.type == "cpu" and has_wide_attention(module)
        if how != "loop" and not slow and not loops(module):
            return torch.vmap(lambda p, one: functional_call(module, p, (one,)), randomness="different")(
                params, x
            )
        tasks = [{name: p[t] for name, p in params.items()} for t in range(len(x))]
        return torch.stack([functional_call(module, p, (one,)) for p, one in zip(tasks, x, strict=True)])


def loops(module: nn.Module) -> bool:
    """Whether a network is run by `loop` in any case, because vmap has no rule for one of its layers.

    It has none for recurrent layers, nor for layers with an attribute `loops_over_tasks` that is true.
    """
    return any(
        isinstance(layer, nn.RNNBase) or getattr(layer, "loops_over_tasks", False)
        for layer in module.modules()
    )


def has_wide_attention(module: nn.Module) -> bool:
    """Whether a network has attention for which a CPU is faster in a loop over tasks than under vmap.

    The meta-gradient of MAML took 1.9 to 2.6 times as long under vmap with 128 numbers for each word, about
    as long with 48 to 64, and a third with 16 (text_transformer, 16 to 128 words, 1 thread).
    """
    return any(
        isinstance(layer, nn.MultiheadAttention) and layer.embed_dim >= WIDE for layer in module.modules()
    )


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """A context in which attention is computed by matrix products and a softmax.

    The fused kernels of `scaled_dot_product_attention` have no second derivative, and the fast path of
    `nn.TransformerEncoderLayer` in evaluation has no rule for vmap.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


# The grouped batching. Feature maps are [B, T*C, H, W] and vectors [T, B, features].
#
# Why tasks are in the channels: each task has weights of its own, and a convolution has no batch dimension
# for weights, but it has groups. T groups over T*C channels are T convolutions in one call. Every other
# layer for images works on each channel, or on a group of channels, independently. As a channel belongs to
# one task, batch norm over T*C channels takes the statistics of each task separately, and pooling,
# activations and dropout need no change. A linear layer has no groups; for vectors the tasks are therefore
# the batch dimension of a batched matrix product.


def is_groupable(module: nn.Module) -> bool:
    """Whether this is a chain of layers that all have a grouped form, none of them used twice.

    A layer used twice has one name among the parameters and two in the chain.
    """
    every = leaves(module)
    known = all(isinstance(layer, OnTasks) or (type(layer) in GROUPED and plain(layer)) for layer in every)
    once = len({id(layer) for layer in every}) == len(every)
    return isinstance(module, nn.Sequential) and known and once


def leaves(module: nn.Module) -> list[nn.Module]:
    """The layers of a chain and of its residual blocks' branches, in the order in which they run."""
    found: list[nn.Module] = []
    run_chain(module, None, lambda _, layer, __: found.append(layer), combine=lambda *_: None)
    return found


def layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers of nested nn.Sequentials in order, by name; a Residual counts as one layer."""
    if type(module).forward is not nn.Sequential.forward:
        yield prefix.removesuffix("."), module
        return
    for name, child in module._modules.items():
        assert child is not None
        yield from layers(child, f"{prefix}{name}.")


def pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    """A layer's setting for height and width."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def plain(layer: nn.Module) -> bool:
    """Whether the layer has only the options its grouped form implements."""
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if isinstance(layer, nn.Flatten):
        return (layer.start_dim, layer.end_dim) == (1, -1)
    if isinstance(layer, nn.GroupNorm):
        return layer.affine
    if isinstance(layer, nn.MaxPool2d):
        return not layer.return_indices
    return True


def run_chain(
    module: nn.Module,
    x: State,
    apply: Callable[[str, nn.Module, State], State],
    order: Callable[[Chain], Chain] = list,
    combine: Callable[[State, State], State] | None = None,
    prefix: str = "",
) -> State:
    """Run nested nn.Sequentials and Residuals: every interpreter of layers goes through this function.

    Args:
        module: the chain. Containers are opened; everything else is a layer.
        x: the state that passes along the chain, a tensor or whatever `apply` and `combine` take.
        apply: (name, layer, state) -> state, what one layer does. `name` is the layer's in `module`.
        order: rearranges the layers of one chain, or of one branch, before they run.
        combine: (body, shortcut) -> state, where the branches of a Residual join; None: as its own method
            `join` does. The body runs first, so that random layers draw in the order of Residual.forward.
        prefix: of the names, for a module that is part of another one ("body.").
    """
    for name, layer in order(list(layers(module, prefix))):
        if isinstance(layer, Residual) and type(layer).forward is Residual.forward:
            body = run_chain(layer.body, x, apply, order, combine, f"{name}.body.")
            shortcut = run_chain(layer.shortcut, x, apply, order, combine, f"{name}.shortcut.")
            x = (combine or layer.join)(body, shortcut)
        else:
            x = apply(name, layer, x)
    return x


def run_grouped(module: nn.Module, params: Params, x: Tensor, batching: TaskBatching) -> Tensor:
    """The ways `grouped` and `unfold` of x [T, B, features] or [T, B, C, H, W]: [T, B, *out]."""
    tasks = len(x)

    def apply(name: str, layer: nn.Module, x: Tensor) -> Tensor:
        own = {
            key: p for key, _ in layer.named_parameters() if (p := params.get(f"{name}.{key}")) is not None
        }
        if isinstance(layer, OnTasks):
            return layer.on_tasks(own, x, tasks)
        unfolds = isinstance(layer, nn.Conv2d) and layer.groups == 1 and batching.unfolds(x.device, tasks)
        return (_unfolded_conv2d if unfolds else GROUPED[type(layer)])(layer, own, x, tasks)

    if x.dim() == 5:
        x = batching.laid_out(x.transpose(0, 1).flatten(1, 2))  # [B, T*C, H, W]
    return by_task(run_chain(module, x, apply, pooled_first), tasks)


def by_task(x: Tensor, tasks: int) -> Tensor:
    """Feature maps [B, T*C, H, W] as [T, B, C, H, W]; vectors [T, B, features] as they are."""
    return x.unflatten(1, (tasks, -1)).transpose(0, 1) if x.dim() == 4 else x


def pooled_first(chain: Chain) -> Chain:
    """The chain with every max pooling moved before the ReLU, leaky or not, that it follows.

    The result is the same, as they are monotonic, and they then run on a quarter of the numbers (2x2).
    """
    for i in range(1, len(chain)):
        if type(chain[i][1]) is nn.MaxPool2d and is_monotonic(chain[i - 1][1]):
            chain[i - 1], chain[i] = chain[i], chain[i - 1]
    return chain


def is_monotonic(layer: nn.Module) -> bool:
    """Whether this is a ReLU, leaky or not, that never falls."""
    return type(layer) is nn.ReLU or (type(layer) is nn.LeakyReLU and layer.negative_slope >= 0)


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, B, in], weight [T, out, in], bias [T, out]: [T, B, out]."""
    return double_backward.linear(x, weight, bias)


def _linear(layer: nn.Module, own: Params, x: Tensor, tasks: int) -> Tensor:
    return grouped_linear(x, own["weight"], own.get("bias"))


def _conv2d(layer: nn.Module, own: Params, x: Tensor, tasks: int) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    bias = own["bias"].flatten() if "bias" in own else None
    weight = own["weight"].flatten(0, 1)  # [T*out, in/groups, k, k]
    sizes = pair(layer.stride), pair(layer.padding), pair(layer.dilation)  # type: ignore[arg-type]
    return double_backward.conv2d(x, weight, bias, ConvSettings(*sizes, tasks * layer.groups))


def _unfolded_conv2d(layer: nn.Module, own: Params, x: Tensor, tasks: int) -> Tensor:
    """Patches [T, C*k*k, B*H*W] times weights [T, out, C*k*k]: one batched matrix product.

    The patches take k*k times the memory of x. Meant for devices whose grouped convolution is slow.
    """
    assert isinstance(layer, nn.Conv2d)
    assert not isinstance(layer.padding, str)
    (pad_h, pad_w), (dilation_h, dilation_w) = pair(layer.padding), pair(layer.dilation)
    x = F.pad(x, (pad_w, pad_w, pad_h, pad_h)).unflatten(1, (tasks, -1))  # [B, T, C, H, W]
    for dim, size, step, gap in zip(
        (3, 4), pair(layer.kernel_size), pair(layer.stride), (dilation_h, dilation_w), strict=True
    ):
        x = x.unfold(dim, gap * (size - 1) + 1, step)
    patches = x[..., ::dilation_h, ::dilation_w]  # [B, T, C, H, W, k, k]
    batch, _, _, height, width = patches.shape[:5]
    columns = patches.permute(1, 2, 5, 6, 0, 3, 4).reshape(tasks, -1, batch * height * width)
    weight = own["weight"].flatten(2)  # [T, out, C*k*k]
    y = (
        torch.bmm(weight, columns)
        if "bias" not in own
        else torch.baddbmm(own["bias"].unsqueeze(2), weight, columns)
    )
    return y.unflatten(2, (batch, height, width)).permute(2, 0, 1, 3, 4).flatten(1, 2)  # [B, T*out, H, W]


def _batch_norm(layer: nn.Module, own: Params, x: Tensor, tasks: int) -> Tensor:
    """Batch norm over T*C channels: the statistics of each task, because a channel belongs to one task."""
    assert isinstance(layer, nn.BatchNorm2d)
    weight, bias = (own[key].flatten() if key in own else None for key in ("weight", "bias"))
    return double_backward.batch_norm(x, weight, bias, layer.eps)


def _max_pool2d(layer: nn.Module, own: Params, x: Tensor, tasks: int) -> Tensor:
    assert isinstance(layer, nn.MaxPool2d)
    kernel, stride, padding = pair(layer.kernel_size), pair(layer.stride), pair(layer.padding)
    return double_backward.max_pool(x, kernel, stride, padding, pair(layer.dilation), layer.ceil_mode)


def _group_norm(layer: nn.Module, own: Params, x: Tensor, tasks: int) -> Tensor:
    assert isinstance(layer, nn.GroupNorm)
    weight, bias = (own[key].flatten() for key in ("weight", "bias"))
    return F.group_norm(x, tasks * layer.num_groups, weight, bias, layer.eps)


def _flatten(layer: nn.Module, own: Params, x: Tensor, tasks: int) -> Tensor:
    return by_task(x, tasks).flatten(2)


def _unchanged(layer: nn.Module, own: Params, x: Tensor, tasks: int) -> Tensor:
    """A layer without weights that acts on each channel independently (a random one draws per channel)."""
    return layer(x)


GROUPED: dict[type[nn.Module], Callable[[nn.Module, Params, Tensor, int], Tensor]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.BatchNorm2d: _batch_norm,
    nn.GroupNorm: _group_norm,
    nn.MaxPool2d: _max_pool2d,
    nn.Flatten: _flatten,
}
UNCHANGED: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.LeakyReLU, nn.Softplus, nn.Tanh, nn.Identity),
    *(nn.Dropout, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
)
GROUPED |= dict.fromkeys(UNCHANGED, _unchanged)
