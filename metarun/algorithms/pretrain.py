"""A baseline: joint training on all tasks, then fine-tuning on each new task."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Literal

from torch import nn

from metarun.algorithms.maml import MAML
from metarun.inner_loops.base import InnerLoop, refuse_trained
from metarun.tasks.episodes import Episodes, Outcome
from metarun.tasks.rollouts import Rollouts


class Pretrain(MAML):
    """Supervised pretraining followed by fine-tuning, with no inner loop in training.

    Training is ordinary supervised learning on the support and query examples of the tasks. For regression
    one network fits all tasks (the joint training of Finn et al. 2017, section 5.1); for classification there
    is one classifier over all training classes (as in the Baseline of Chen et al. 2019, which fine-tunes only
    the head: `adapts="head"`). In evaluation the inner loop fine-tunes the network on each task; for
    classification with a new head that starts at zero. Batch statistics are computed over the examples of one
    task, as in evaluation.

    Args:
        backbone, inner_loop, outputs, classes: passed by the builder; see `Algorithm`.
        adapts: what fine-tuning changes: "all" or "head".
        transductive: see `MAML`.
    """

    classifies_training_classes = True
    # Steps are only taken in evaluation, without a gradient through them.
    unread: ClassVar = {"inner_loop.order": "", "inner_loop.steps": "test_steps!=null"}

    def __init__(
        self,
        backbone: nn.Module,
        inner_loop: InnerLoop,
        outputs: int,
        classes: int | None = None,
        adapts: Literal["all", "head"] = "all",
        transductive: bool = True,
        constants: int = 0,
    ) -> None:
        refuse_trained(inner_loop, "pretraining takes no inner steps")
        super().__init__(
            backbone,
            inner_loop,
            outputs,
            "fixed" if classes is None else "shared",
            adapts,
            transductive,
            constants,
        )
        self.classifier: nn.Linear | None = None
        if classes is not None:
            self.classifier = nn.Linear(self.learner.backbone.features, classes)  # type: ignore[arg-type]
            for p in self.learner.head.parameters():
                nn.init.zeros_(p).requires_grad_(False)

    def own_heads(self) -> Sequence[nn.Module]:
        return [] if self.classifier is not None else super().own_heads()  # a new head starts at zero

    def meta_loss(self, tasks: Episodes | Rollouts) -> Outcome:
        """The loss of all examples; the scores are those of the queries, restricted to the task's ways.

        In environments, one policy acts in all tasks: all trajectories of a task are scored.
        """
        if isinstance(tasks, Rollouts):
            params = self.learner.task_params(len(tasks), tasks.outputs)
            return tasks.joined().query(partial(self.learner, params))
        whole = tasks.joined()
        x, y = whole.support_x, whole.support_y
        queries = tasks.query_x.shape[1]
        params = self.learner.task_params(len(x), tasks.outputs)
        features = self.learner.embed(params, x)
        if self.classifier is None:
            outputs = self.learner.classify(params, features)
            return tasks.outcome(outputs[:, -queries:], self.loss_of(tasks)(outputs, y))
        logits = self.classifier(features)  # [T, N*(K+Q), classes]
        assert tasks.classes is not None
        loss = self.loss_of(tasks)(logits, tasks.classes.gather(1, y))
        own = tasks.classes.unsqueeze(1).expand(-1, queries, -1)
        return tasks.outcome(logits[:, -queries:].gather(2, own), loss)
