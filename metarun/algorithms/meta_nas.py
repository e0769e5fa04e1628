"""MetaNAS (Elsken, Staffler, Metzen and Hutter 2020, "Meta-Learning of Neural Architectures for Few-Shot
Learning")."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.reptile import Reptile
from metarun.backbones.cells import ARCHITECTURE
from metarun.errors import ConfigError
from metarun.inner_loops.adam import Adam
from metarun.inner_loops.base import InnerLoop, Loss
from metarun.nn.per_task import Params
from metarun.tasks.episodes import Tasks


class MetaNAS(Reptile):
    """Reptile that learns an architecture along with the weights, and adapts both to each task.

    The inner steps move weights and architecture (section 3.2, equations 7 and 8), and the outer step moves
    the meta-weights and the meta-architecture towards the adapted ones (equations 9 and 10). During the steps
    of a task the softmax over operations and inputs becomes sharp: its temperature falls linearly from
    `temperature` to `last_temperature` (section 3.3), so that the adapted network is almost discrete and is
    not trained again. Predictions use the last temperature.

    In training before `warm_up` is over, and in evaluation of such a checkpoint, the architecture is not
    adapted, and the first temperature is kept.

    Departures: the outer step of the architecture is `architecture_lr` times that of the weights, with one
    optimizer for both; the rates of the inner loop: see `ArchitectureAdam`.

    Args:
        backbone: a network with weights of an architecture, such as `backbone=cells`.
        inner_loop, outputs, head, transductive, batch: see `Reptile`.
        warm_up: the number of iterations in which the architecture stays as it is; the paper uses half of
            all.
        temperature, last_temperature: of the softmax at the first and the last step that adapts the
            architecture.
        test_share: the share of the inner steps in evaluation that adapt the architecture; the others adapt
            the weights alone.
        architecture_lr: the outer rate of the architecture, as a multiple of the outer rate of the weights.

    Raises:
        ConfigError: if the backbone has no architecture, or a number is impossible.
    """

    plays = False
    has_searched: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        inner_loop: InnerLoop,
        outputs: int,
        head: Literal["fixed", "shared"] = "fixed",
        transductive: bool = True,
        batch: int = 0,
        warm_up: int = 0,
        temperature: float = 1.0,
        last_temperature: float = 0.05,
        test_share: float = 0.5,
        architecture_lr: float = 0.6,
    ) -> None:
        positive = {
            "temperature": temperature,
            "last_temperature": last_temperature,
            "architecture_lr": architecture_lr,
        }
        for name, value in positive.items():
            if value <= 0:
                raise ConfigError(f"algorithm.{name}={value}: must be above 0")
        if not 0 <= test_share <= 1:
            raise ConfigError(f"algorithm.test_share={test_share}: must be between 0 and 1")
        if warm_up < 0:
            raise ConfigError(f"algorithm.warm_up={warm_up}: must be at least 0")
        if not any(self.is_architecture(f"backbone.{name}") for name, _ in backbone.named_parameters()):
            raise ConfigError("algorithm=meta_nas: the backbone has no architecture; choose backbone=cells")
        super().__init__(backbone, inner_loop, outputs, head, transductive, batch)
        self.warm_up, self.test_share, self.architecture_lr = warm_up, test_share, architecture_lr
        self.temperature, self.last_temperature = temperature, last_temperature
        if test_share < 1 and isinstance(inner_loop, Adam) and inner_loop.beta1:
            raise ConfigError(
                f"inner_loop.beta1={inner_loop.beta1}: momentum would move the architecture after the steps "
                "that adapt it; set inner_loop.beta1=0, or algorithm.test_share=1"
            )
        self.searches = warm_up == 0
        self.register_buffer("has_searched", torch.tensor(self.searches))  # `searches` in a checkpoint

    @staticmethod
    def is_architecture(name: str) -> bool:
        """Whether a weight of the learner belongs to the architecture."""
        return name.startswith(f"backbone.{ARCHITECTURE}.")

    def on_step_start(self, iteration: int) -> bool:
        before, self.searches = self.searches, iteration >= self.warm_up
        self.has_searched.fill_(self.searches)
        return self.searches != before

    def _load_from_state_dict(self, *args: Any, **named: Any) -> None:
        super()._load_from_state_dict(*args, **named)
        self.searches = bool(self.has_searched)

    def search_steps(self) -> int:
        """The number of inner steps that adapt the architecture in the current mode."""
        steps = self.inner_loop.step_count() if self.searches else 0
        return steps if self.training else int(steps * self.test_share)

    def temperature_at(self, step: int) -> float:
        """The temperature of the softmax at an inner step, from 0; it stays at that of the last one.

        If the architecture is adapted once, this is the last temperature; if never, the first one.
        """
        steps = self.search_steps()
        done = min(step / (steps - 1), 1) if steps > 1 else steps
        return self.temperature - done * (self.temperature - self.last_temperature)

    def sharpened(self, params: Params, temperature: float) -> Params:
        """Weights with the logits of the architecture divided by a temperature."""
        return {name: p / temperature if self.is_architecture(name) else p for name, p in params.items()}

    def inner_problem(self, tasks: Tasks) -> tuple[Loss, Params, Params]:
        loss, slow, fast = super().inner_problem(tasks)

        def annealed(params: Params, step: int) -> Tensor:
            if (
                step >= self.search_steps()
            ):  # a gradient of zero, by which Adam without momentum does not move
                params = {n: p.detach() if self.is_architecture(n) else p for n, p in params.items()}
            return loss(self.sharpened(params, self.temperature_at(step)), step)

        return annealed, slow, fast

    def predict(self, adapted: dict[str, Any], query_x: Tensor) -> Tensor:
        last = self.temperature_at(self.inner_loop.step_count())
        return self.learner(self.sharpened(adapted["params"], last), query_x)

    def trajectory(self, tasks: Tasks) -> Iterator[dict[str, Any]]:
        """The states after each step, which `predict` runs at the temperature of that step."""
        last = self.temperature_at(self.inner_loop.step_count())
        for step, state in enumerate(super().trajectory(tasks)):
            yield {"params": self.sharpened(state["params"], self.temperature_at(max(step - 1, 0)) / last)}

    def outer_rate(self, name: str) -> float:
        return self.architecture_lr if self.is_architecture(name) else 1.0
