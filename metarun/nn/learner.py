"""A network that is run with per-task weights: a backbone and a linear head."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from metarun.errors import ConfigError
from metarun.nn.per_task import AUTO, Params, grouped_linear, run_on_tasks


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
        self.batching = AUTO

    def task_params(self, tasks: int, ways: int) -> Params:
        """The meta-learned weights as T tasks' starting point, [T, *shape] each, without a copy.

        `ways` is the number of outputs the tasks need.
        """
        self.check(ways)
        params: Params = dict(self.named_parameters())
        for name in ("head.weight", "head.bias"):
            if self.shares_head:
                params[name] = params[name].expand(ways, *params[name].shape[1:])
            elif ways < self.outputs:
                params[name] = params[name][:ways]
        return {name: p.expand(tasks, *p.shape) for name, p in params.items()}

    def check(self, ways: int, remedy: str = "algorithm.head=shared") -> None:
        """Raise ConfigError where the head cannot have so many outputs, naming a setting that mends it."""
        if not self.shares_head and ways > self.outputs:
            raise ConfigError(f"its fixed head has {self.outputs} ways, not {ways}; train with {remedy}")

    def forward(self, params: Params, x: Tensor) -> Tensor:
        """Outputs [T, B, N] of examples [T, B, *item], each task by its own weights."""
        return self.classify(params, self.embed(params, x))

    def embed(self, params: Params, x: Tensor) -> Tensor:
        """Features [T, B, features] of examples [T, B, *item]."""
        prefix = "backbone."
        own = {name.removeprefix(prefix): p for name, p in params.items() if name.startswith(prefix)}
        return run_on_tasks(self.backbone, own, x, self.batching)

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
