"""MAML and variants by configuration: FOMAML, ANIL, BOIL, Meta-SGD, Meta-Curvature, learned optimizers.

Finn, Abbeel and Levine 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep
Networks", algorithms 1 and 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from metarun.algorithms.base import Algorithm
from metarun.errors import ConfigError
from metarun.inner_loops.base import InnerLoop, Loss
from metarun.nn.layers import uses_batch_statistics
from metarun.nn.learner import Learner
from metarun.nn.per_task import Params
from metarun.tasks.episodes import Episodes, Tasks


class MAML(Algorithm):
    """Learn initial weights from which a few inner steps solve a task.

    The meta-loss is the query loss after the inner loop (equation 2). Its gradient is propagated
    through the inner steps; a first-order inner loop treats the inner gradients as constants instead
    (FOMAML, section 5.2).

    Batch norm uses the statistics of the current batch, as in the paper's code, so that predictions for
    queries in one batch depend on each other (transductive).

    Args:
        backbone, inner_loop, outputs: passed by the builder; see `Algorithm`.
        head: "fixed" or "shared"; see `Learner`.
        adapts: what the inner loop adapts: "all"; "head", which keeps the backbone constant (ANIL, Raghu et
            al. 2020); or "body", which keeps the head constant (BOIL, Oh et al. 2021).
        transductive: see `Algorithm`.
        constants: passed by the builder; see `Learner`.

    Raises:
        ConfigError: if a shared head is not adapted.
    """

    takes_steps = True
    plays = True
    embeds_first = True

    def __init__(
        self,
        backbone: nn.Module,
        inner_loop: InnerLoop,
        outputs: int,
        head: Literal["fixed", "shared"] = "fixed",
        adapts: Literal["all", "head", "body"] = "all",
        transductive: bool = True,
        constants: int = 0,
    ) -> None:
        super().__init__()
        self.learner = Learner(backbone, outputs, head, constants)
        self.inner_loop = inner_loop
        self.adapts = adapts
        self.normalises_batches = uses_batch_statistics(backbone)
        self.transductive = transductive
        learned = self.learner.own_parameters()
        adapted = {name: p.detach() for name, p in learned.items() if self.is_fast(name)}
        if not adapted:
            raise ConfigError(
                f"algorithm.adapts={adapts}: tasks share all of the backbone's weights and adapt none; set "
                "backbone.adapts=true (backbone=timm: backbone.frozen=false), or choose algorithm=maml"
            )
        inner_loop.attach(adapted)
        if head == "shared" and not self.is_fast("head.weight"):
            raise ConfigError(
                "algorithm.head=shared: gives every way the same output until the head is adapted, but this "
                "algorithm does not adapt its head; choose algorithm.head=fixed"
            )

    def own_backbone(self) -> nn.Module:
        return self.learner.backbone

    def own_heads(self) -> Sequence[nn.Module]:
        return [self.learner.head]

    def is_fast(self, name: str) -> bool:
        """Whether the inner loop adapts the weight of this name."""
        return self.adapts == "all" or name.startswith("head.") == (self.adapts == "head")

    def check(self, ways: int) -> None:
        can_share = self.is_fast("head.weight")
        self.learner.check(ways, "algorithm.head=shared" if can_share else f"ways={ways}")

    def adapt(self, tasks: Tasks) -> dict[str, Any]:
        """The adapted weights, {"params": Params}."""
        loss, slow, fast = self.inner_problem(tasks)
        return {"params": slow | self.inner_loop(loss, fast)}

    def trajectory(self, tasks: Tasks) -> Iterator[dict[str, Any]]:
        loss, slow, fast = self.inner_problem(tasks)
        yield {"params": slow | fast}
        for params in self.inner_loop.trajectory(loss, fast):
            yield {"params": slow | params}

    def predict(self, adapted: dict[str, Any], query_x: Tensor) -> Tensor:
        return self.learner(adapted["params"], query_x)

    def start(self, tasks: Tasks) -> Params:
        """The weights of each task before the first step, [T, *shape] each."""
        return self.learner.task_params(len(tasks), tasks.outputs)

    def inner_problem(self, tasks: Tasks) -> tuple[Loss, Params, Params]:
        """The support loss of the tasks, the constant weights, and the adapted weights, [T, *shape] each."""
        params = self.start(tasks)
        fast = {name: p for name, p in params.items() if self.is_fast(name)}
        slow = {name: p for name, p in params.items() if name not in fast}
        model = self.learner
        if self.adapts == "head" and isinstance(tasks, Episodes):
            # The backbone is constant in the inner loop, so the support is embedded once for all steps.
            features = self.learner.embed(slow, tasks.support_x)
            return lambda p, step: tasks.support_loss(lambda x: model.classify(p, features), step), slow, fast
        return lambda p, step: tasks.support_loss(partial(model, slow | p), step), slow, fast
