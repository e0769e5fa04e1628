"""CAVIA (Zintgraf et al. 2019, "Fast Context Adaptation via Meta-Learning")."""

from __future__ import annotations

from typing import Literal

from torch import nn

from metarun.algorithms.maml import MAML
from metarun.errors import ConfigError
from metarun.inner_loops.base import InnerLoop
from metarun.nn.layers import NORMS, FiLM, is_called, replace_layers


class CAVIA(MAML):
    """The inner loop adapts only a context vector, which starts at zero for every task.

    The context modulates one weight layer: the channels of a convolution by FiLM (section 3.2), or a
    linear layer as additional inputs (section 3.1).

    Args:
        backbone, inner_loop, outputs, transductive, constants: see `MAML`.
        context: the size of the context vector.
        layer: the number of the modulated weight layer, from 1. None: the paper's choice, which is the
            third convolution, or the first layer of a network without convolutions.
        film: what FiLM comes after, always before the ReLU: the "norm", or the "pooling" as in the paper's
            code. They differ where a scale is negative.
    """

    embeds_first = False  # the context changes what the backbone computes

    def __init__(
        self,
        backbone: nn.Module,
        inner_loop: InnerLoop,
        outputs: int,
        transductive: bool = True,
        context: int = 100,
        layer: int | None = None,
        constants: int = 0,
        film: Literal["norm", "pooling"] = "norm",
    ) -> None:
        add_context(backbone, context, layer, film == "pooling")
        super().__init__(backbone, inner_loop, outputs, "fixed", "all", transductive, constants)

    def is_fast(self, name: str) -> bool:
        return name.endswith(".context")


def add_context(backbone: nn.Module, size: int, position: int | None, pooled: bool = False) -> None:
    """Insert FiLM after a weight layer of the backbone, behind its normalisation if there is one.

    With `pooled`, it is inserted behind the max pooling, too, which is moved before the ReLU that it follows:
    as ReLU is monotonic, that alone changes nothing.
    """
    if size < 1:
        raise ConfigError(f"algorithm.context={size}: must be at least 1")
    if any(getattr(module, "loops_over_tasks", False) for module in backbone.modules()):
        raise ConfigError(
            "algorithm=cavia: inserts a layer into the backbone, which a pretrained encoder cannot have; "
            "choose algorithm=anil"
        )
    # Each weight layer, and the module after which FiLM is inserted: its normalisation, or the layer itself.
    found: list[tuple[nn.Conv2d | nn.Linear, nn.Module]] = []
    for module in backbone.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and is_called(module):
            found.append((module, module))
        elif found and isinstance(module, NORMS):
            found[-1] = found[-1][0], module
    convolutions = sum(isinstance(weights, nn.Conv2d) for weights, _ in found)
    if position is None:
        position = min(3, convolutions) if convolutions else 1
    if not found:
        raise ConfigError(
            "algorithm=cavia: needs a backbone with a convolution or a linear layer, and "
            f"backbone={type(backbone).__name__} has none; choose another backbone"
        )
    if not 1 <= position <= len(found):
        raise ConfigError(
            f"algorithm.layer={position}: choose a weight layer of the backbone, 1 to {len(found)}"
        )
    weights, last = found[position - 1]
    if isinstance(weights, nn.Conv2d):
        film = FiLM(weights.out_channels, size)
    else:
        film = FiLM(weights.out_features, size, inputs=weights.in_features)
    new: dict[nn.Module, nn.Module] = {last: nn.Sequential(last, film)}
    if pooled:
        pooling = pooling_behind(backbone, last)
        new = {last: nn.Sequential(last, pooling, film), pooling: nn.Identity()}
    replace_layers(backbone, new.get)


def pooling_behind(backbone: nn.Module, layer: nn.Module) -> nn.MaxPool2d:
    """The max pooling that follows the layer in a chain of the backbone, with at most ReLUs in between."""
    monotonic = (nn.ReLU, nn.LeakyReLU, nn.Identity)
    for chain in backbone.modules():
        children = list(chain.children()) if isinstance(chain, nn.Sequential) else []
        if layer in children:
            behind = [m for m in children[children.index(layer) + 1 :] if not isinstance(m, monotonic)]
            if behind and isinstance(behind[0], nn.MaxPool2d):
                return behind[0]
    raise ConfigError(
        "algorithm.film=pooling: there is no max pooling behind the modulated layer; choose "
        "algorithm.film=norm, or a network that pools there, such as conv4 with downsample=max_pool"
    )
