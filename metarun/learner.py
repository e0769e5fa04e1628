"""One network, T tasks, each task with its own weights, in one forward pass.

A backbone is written for one task. Here it meets T sets of weights, by one of three exact
lowerings (the same result to rounding):

- `grouped`: the tasks lie side by side in the channel dimension, so that a convolution with
  T groups and a batch norm over T*C channels serve all tasks at once. For chains of the
  layers in `GROUPED`.
- `vmap`: the forward pass alone is vectorised over tasks. For any network.
- `loop`: one task after another. The plain reference.

Differentiate outside, `autograd.grad(losses.sum(), params)`: tasks share no weights, so the
gradient of the sum is each task's own. Never put `torch.func.grad` inside `vmap` around fused
batch norm: its second derivative is silently wrong (functorch issue 534).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metarun.errors import ConfigError

Params = dict[str, Tensor]  # each [T, *shape]: every task's own copy of the weights
Lowering = Literal["auto", "grouped", "vmap", "loop"]


class Learner(nn.Module):
    """A backbone and a linear head; called with per-task weights.

    `head="fixed"` learns one vector for each of `outputs` ways, as the papers do; a task with
    fewer ways uses the first ones. `head="shared"` learns one vector that every way starts
    from, so any number of ways can be met (UnicornMAML, Ye and Chao 2022).
    """

    def __init__(self, backbone: nn.Module, outputs: int, head: Literal["fixed", "shared"] = "fixed") -> None:
        super().__init__()
        refuse_running_averages(backbone)
        self.backbone = backbone
        self.head = nn.Linear(backbone.features, 1 if head == "shared" else outputs)  # type: ignore[arg-type]
        self.outputs = outputs
        self.shares_head = head == "shared"
        self.lowering: Lowering = "auto"

    def task_params(self, tasks: int, ways: int) -> Params:
        """The meta-learned weights as T tasks' starting point, [T, *shape] each, without a copy.

        `ways` is the number of outputs the tasks need.
        """
        self.check(ways)
        params = {name: p.expand(tasks, *p.shape) for name, p in self.named_parameters()}
        for name in ("head.weight", "head.bias"):
            p = params[name]
            params[name] = p.expand(tasks, ways, *p.shape[2:]) if self.shares_head else p[:, :ways]
        return params

    def check(self, ways: int) -> None:
        """Raise ConfigError where the head cannot have so many outputs."""
        if not self.shares_head and ways > self.outputs:
            raise ConfigError(
                f"its fixed head has {self.outputs} ways, not {ways}; train with algorithm.head=shared"
            )

    def forward(self, params: Params, x: Tensor) -> Tensor:
        """Outputs [T, B, N] of examples [T, B, *item], each task by its own weights."""
        return self.classify(params, self.embed(params, x))

    def embed(self, params: Params, x: Tensor) -> Tensor:
        """Features [T, B, features] of examples [T, B, *item]."""
        prefix = "backbone."
        own = {name.removeprefix(prefix): p for name, p in params.items() if name.startswith(prefix)}
        return run_on_tasks(self.backbone, own, x, self.lowering)

    def classify(self, params: Params, features: Tensor) -> Tensor:
        """Outputs [T, B, N] of features [T, B, features]."""
        return grouped_linear(features, params["head.weight"], params["head.bias"])


def refuse_running_averages(backbone: nn.Module) -> None:
    """Averages over tasks would leak from task to task: adapted networks use the batch's statistics."""
    for module in backbone.modules():
        if getattr(module, "running_mean", None) is not None:
            raise ConfigError(
                "norm=running keeps averages over tasks, which weights adapted per task cannot use; "
                "choose norm=batch, group, layer, instance or none"
            )


def uses_batch_statistics(backbone: nn.Module) -> bool:
    """Whether a prediction depends on the other examples beside it (transductive)."""
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
        for module in backbone.modules()
    )


def run_on_tasks(module: nn.Module, params: Params, x: Tensor, lowering: Lowering = "auto") -> Tensor:
    """`module` on x [T, B, *item] with weights params [T, *shape]: [T, B, *out]."""
    if lowering == "auto":
        lowering = "grouped" if is_groupable(module) else "vmap"
    if lowering == "grouped":
        return run_grouped(module, params, x)
    if lowering == "vmap":
        return torch.vmap(lambda p, one: functional_call(module, p, (one,)), randomness="different")(
            params, x
        )
    tasks = [{name: p[t] for name, p in params.items()} for t in range(len(x))]
    return torch.stack([functional_call(module, p, (one,)) for p, one in zip(tasks, x, strict=True)])


# The grouped lowering. Images travel as [B, T*C, H, W] and vectors as [T, B, features].


def is_groupable(module: nn.Module) -> bool:
    """Whether this is a chain of layers that all have a grouped form, none of them used twice."""
    chain = list(layers(module))
    known = all(type(layer) in GROUPED and plain(layer) for _, layer in chain)
    once = len({id(layer) for _, layer in chain}) == len(chain)
    return isinstance(module, nn.Sequential) and known and once


def layers(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The layers of nested nn.Sequentials in order, by name."""
    if type(module).forward is not nn.Sequential.forward:
        yield prefix.removesuffix("."), module
        return
    for name, child in module._modules.items():
        assert child is not None
        yield from layers(child, f"{prefix}{name}.")


def plain(layer: nn.Module) -> bool:
    """Whether the layer has only the options its grouped form knows."""
    if isinstance(layer, nn.Conv2d):
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if isinstance(layer, nn.Flatten):
        return (layer.start_dim, layer.end_dim) == (1, -1)
    if isinstance(layer, nn.GroupNorm):
        return layer.affine
    return True


def run_grouped(module: nn.Module, params: Params, x: Tensor) -> Tensor:
    tasks = len(x)
    if is_image := x.dim() == 5:
        x = x.transpose(0, 1).flatten(1, 2)  # [B, T*C, H, W]
    for name, layer in layers(module):
        if is_image and isinstance(layer, nn.Flatten):
            x, is_image = x.unflatten(1, (tasks, -1)).transpose(0, 1), False  # [T, B, C, H, W]
        own = {key: params[f"{name}.{key}"] for key, _ in layer.named_parameters()}
        x = GROUPED[type(layer)](layer, own, x, tasks)
    return x.unflatten(1, (tasks, -1)).transpose(0, 1) if is_image else x


def grouped_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, B, in], weight [T, out, in], bias [T, out]: [T, B, out]."""
    if bias is None:
        return torch.bmm(x, weight.mT)
    return torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def _linear(layer: nn.Module, own: Params, x: Tensor, tasks: int) -> Tensor:
    return grouped_linear(x, own["weight"], own.get("bias"))


def _conv2d(layer: nn.Module, own: Params, x: Tensor, tasks: int) -> Tensor:
    assert isinstance(layer, nn.Conv2d)
    bias = own["bias"].flatten() if "bias" in own else None
    weight = own["weight"].flatten(0, 1)  # [T*out, in/groups, k, k]
    groups = tasks * layer.groups
    return F.conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, groups)


def _batch_norm(layer: nn.Module, own: Params, x: Tensor, tasks: int) -> Tensor:
    """Batch statistics of each task by itself: its channels are its own."""
    assert isinstance(layer, nn.BatchNorm2d)
    weight, bias = (own[key].flatten() if key in own else None for key in ("weight", "bias"))
    return F.batch_norm(x, None, None, weight, bias, training=True, eps=layer.eps)


def _group_norm(layer: nn.Module, own: Params, x: Tensor, tasks: int) -> Tensor:
    assert isinstance(layer, nn.GroupNorm)
    weight, bias = (own[key].flatten() for key in ("weight", "bias"))
    return F.group_norm(x, tasks * layer.num_groups, weight, bias, layer.eps)


def _flatten(layer: nn.Module, own: Params, x: Tensor, tasks: int) -> Tensor:
    return x.flatten(2)


def _unchanged(layer: nn.Module, own: Params, x: Tensor, tasks: int) -> Tensor:
    """A layer without weights that treats channels alike."""
    return layer(x)


GROUPED: dict[type[nn.Module], Callable[[nn.Module, Params, Tensor, int], Tensor]] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.BatchNorm2d: _batch_norm,
    nn.GroupNorm: _group_norm,
    nn.Flatten: _flatten,
}
for _layer in (nn.ReLU, nn.LeakyReLU, nn.Softplus, nn.Tanh, nn.Identity, nn.MaxPool2d, nn.AvgPool2d):
    GROUPED[_layer] = _unchanged
