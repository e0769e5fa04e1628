"""Adam with another learning rate for the architecture, the inner loop of MetaNAS (Elsken et al. 2020)."""

from __future__ import annotations

from metarun.errors import ConfigError, check_above_0
from metarun.inner_loops.adam import Adam
from metarun.nn.per_task import Params


class ArchitectureAdam(Adam):
    """Adam whose rate differs for weights of the architecture (`backbone=cells`) and other weights.

    Both are moved by the gradient at the same point (Elsken et al. 2020, section 3.2). The paper's code moves
    the architecture first, and takes the gradient of the other weights at the new architecture. Its weight
    decay of the architecture (0.001) and its bound of the gradient are left out.

    Args:
        rate: the learning rate of weights.
        architecture_rate: the learning rate of the architecture.
        steps, test_steps, order, beta1, beta2, epsilon: see `Adam`.

    Raises:
        ConfigError: if there is no architecture among the adapted weights.
    """

    def __init__(
        self,
        rate: float = 0.005,
        architecture_rate: float = 0.005,
        steps: int = 5,
        test_steps: int | None = None,
        order: int = 1,
        beta1: float = 0.0,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
    ) -> None:
        super().__init__(rate, steps, test_steps, order, beta1, beta2, epsilon)
        check_above_0("inner_loop", architecture_rate=architecture_rate)
        self.architecture_rate = architecture_rate

    def attach(self, weights: Params) -> None:
        if not any(map(is_architecture, weights)):
            raise ConfigError(
                "inner_loop=architecture_adam: the backbone has no architecture to adapt; choose "
                "inner_loop=adam, or backbone=cells"
            )

    def rate_of(self, name: str) -> float:
        return self.architecture_rate if is_architecture(name) else self.rate


def is_architecture(name: str) -> bool:
    """Whether a weight of this name belongs to the architecture."""
    return ".architecture." in name
