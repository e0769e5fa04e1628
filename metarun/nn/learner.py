"""A network with per-task weights: a backbone and a linear head."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from metarun.errors import ConfigError, counted
from metarun.nn.per_task import AUTO, Params, grouped_linear, run_on_tasks, shared_names


class Learner(nn.Module):
    """A backbone and a linear head, called with per-task weights.

    Args:
        backbone: a network for examples [B, *item] with an attribute `features`, the size of its output.
        outputs: ways of a training task, or the number of values of a regression.
        head: "fixed" learns one vector for each of `outputs` ways, as the papers do; a task with fewer ways
            uses the first ones. "shared" learns one vector that every way starts from, so that a
            task may have any number of ways (UnicornMAML, Ye and Chao 2022).
        constants: how many further outputs are learned numbers, 0 at the start, whatever the example is
            (`TaskSpec.constants`).

    Raises:
        ConfigError: if the backbone has running averages.
    """

    def __init__(
        self,
        backbone: nn.Module,
        outputs: int,
        head: Literal["fixed", "shared"] = "fixed",
        constants: int = 0,
    ) -> None:
        super().__init__()
        refuse_running_averages(backbone)
        self.backbone = backbone
        self.head = nn.Linear(backbone.features, 1 if head == "shared" else outputs)  # type: ignore[arg-type]
        if constants:
            self.head.register_parameter("constants", nn.Parameter(torch.zeros(constants)))
        self.outputs, self.constants = outputs, constants
        self.shares_head = head == "shared"
        self.batching = AUTO

    def task_params(self, tasks: int, ways: int) -> Params:
        """The meta-learned weights as the starting point of T tasks.

        Args:
            tasks: T.
            ways: the number of outputs that the tasks need.

        Returns:
            Weights by name, [T, *shape] each; views of the module's parameters, without a copy.

        Raises:
            ConfigError: if a fixed head has fewer outputs.
        """
        self.check(ways)
        params: Params = dict(self.own_parameters())
        for name in ("head.weight", "head.bias"):
            if self.shares_head:
                params[name] = params[name].expand(ways, *params[name].shape[1:])
            elif ways < self.outputs:
                params[name] = params[name][:ways]
        return {name: p.expand(tasks, *p.shape) for name, p in params.items()}

    def own_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of which every task has a copy of its own, by name."""
        shared = shared_names(self)
        return {name: p for name, p in self.named_parameters() if name not in shared}

    def check(self, ways: int, remedy: str = "algorithm.head=shared") -> None:
        """Raise ConfigError, naming the setting `remedy`, if a fixed head has fewer than `ways` outputs."""
        if not self.shares_head and ways > self.outputs:
            raise ConfigError(
                f"its fixed head has {counted(self.outputs, 'way')}, not {ways}; train with {remedy}"
            )

    def forward(self, params: Params, x: Tensor) -> Tensor:
        """Outputs [T, B, N] of examples [T, B, *item], by the weights `params` [T, *shape] of each task."""
        return self.classify(params, self.embed(params, x))

    def embed(self, params: Params, x: Tensor) -> Tensor:
        """Features [T, B, features] of examples [T, B, *item]."""
        prefix = "backbone."
        own = {name.removeprefix(prefix): p for name, p in params.items() if name.startswith(prefix)}
        return run_on_tasks(self.backbone, own, x, self.batching)

    def classify(self, params: Params, features: Tensor) -> Tensor:
        """Outputs [T, B, N] of features [T, B, features], the constants last."""
        outputs = grouped_linear(features, params["head.weight"], params["head.bias"])
        if not self.constants:
            return outputs
        constants = params["head.constants"].unsqueeze(1).expand(*outputs.shape[:2], self.constants)
        return torch.cat([outputs, constants], -1)


def refuse_running_averages(backbone: nn.Module) -> None:
    """Raise ConfigError if the backbone has running averages, unless it is frozen.

    They would carry statistics from one task to the next, and they belong to the weights before adaptation.
    """
    frozen = [each for each in backbone.modules() if getattr(each, "frozen", False)]
    fixed = {id(part) for each in frozen for part in each.modules()}
    for module in backbone.modules():
        if getattr(module, "running_mean", None) is not None and id(module) not in fixed:
            raise ConfigError(
                "norm=running keeps averages over tasks, which weights adapted per task cannot use; "
                "choose norm=batch, task, group, layer, instance or none (timm: backbone.frozen=true)"
            )
