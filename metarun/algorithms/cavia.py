"""CAVIA (Zintgraf et al. 2019, "Fast Context Adaptation via Meta-Learning")."""

from __future__ import annotations

from torch import nn

from metarun.algorithms.maml import MAML
from metarun.errors import ConfigError
from metarun.inner_loops.base import InnerLoop
from metarun.nn.layers import NORMS, FiLM, is_called, replace_layers


class CAVIA(MAML):
    """The inner loop adapts only a context vector, which starts at zero for every task.

    The context modulates one weight layer: the channels of a convolution by FiLM (section 3.2), or a
    linear layer as additional inputs (section 3.1). FiLM comes after normalisation and before ReLU and
    pooling; the paper's code pools first.

    Args:
        backbone, inner_loop, outputs, transductive, constants: see `MAML`.
        context: the size of the context vector.
        layer: the number of the modulated weight layer, from 1. None: the paper's choice, which is the
            third convolution, or the first layer of a network without convolutions.
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
    ) -> None:
        add_context(backbone, context, layer)
        super().__init__(backbone, inner_loop, outputs, "fixed", "all", transductive, constants)

    def is_fast(self, name: str) -> bool:
        return name.endswith(".context")


def add_context(backbone: nn.Module, size: int, position: int | None) -> None:
    """Insert FiLM after a weight layer of the backbone, behind its normalisation if there is one."""
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
    replace_layers(backbone, lambda layer: nn.Sequential(layer, film) if layer is last else None)
