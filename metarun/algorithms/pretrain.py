"""Joint training on all tasks, then plain gradient descent on a new one: the honest baseline."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.maml import MAML
from metarun.episodes import Episodes
from metarun.inner_loops.base import InnerLoop, refuse_learned
from metarun.objectives import task_loss


class Pretrain(MAML):
    """Multi-task pretraining followed by fine-tuning, with no inner loop in training.

    Training is ordinary supervised learning on the tasks' support and query examples: of values
    by one network for all tasks (the joint training of Finn et al. 2017, section 5.1), of
    images by one classifier over all training classes (as the Baseline of Chen et al. 2019, which
    fine-tunes the head alone: `adapts="head"`). A new task fine-tunes the network by the inner
    loop, in evaluation only; images with a new head that starts at zero. Examples of a task are
    normalised together, as they will be then.
    """

    def __init__(
        self,
        backbone: nn.Module,
        inner_loop: InnerLoop,
        outputs: int,
        classification: bool = True,
        classes: int | None = None,
        adapts: Literal["all", "head"] = "all",
        transductive: bool = True,
    ) -> None:
        refuse_learned(inner_loop, "pretraining takes no inner steps")
        super().__init__(
            backbone, inner_loop, outputs, "shared" if classification else "fixed", adapts, transductive
        )
        self.classifier: nn.Linear | None = None
        if classification:
            self.classifier = nn.Linear(self.learner.backbone.features, classes or outputs)  # type: ignore[arg-type]
            for p in self.learner.head.parameters():
                nn.init.zeros_(p).requires_grad_(False)

    def meta_loss(self, episodes: Episodes) -> tuple[Tensor, Tensor]:
        """The loss of all examples, a mean over tasks; the query outputs among a task's ways [T, N*Q, N]."""
        x = torch.cat([episodes.support_x, episodes.query_x], 1)
        y = torch.cat([episodes.support_y, episodes.query_y], 1)
        queries = episodes.query_x.shape[1]
        params = self.learner.task_params(len(x), self.outputs_for(y, episodes.ways))
        features = self.learner.embed(params, x)
        if self.classifier is None:
            outputs = self.learner.classify(params, features)
            return task_loss(outputs, y).mean(), outputs[:, -queries:]
        logits = self.classifier(features)  # [T, N*(K+Q), classes]
        loss = task_loss(logits, episodes.classes.gather(1, y)).mean()
        own = episodes.classes.unsqueeze(1).expand(-1, queries, -1)
        return loss, logits[:, -queries:].gather(2, own)
