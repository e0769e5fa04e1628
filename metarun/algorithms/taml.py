"""Task-agnostic meta-learning (Jamal and Qi 2019, "Task-Agnostic Meta-Learning for Few-Shot Learning")."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

from torch import Tensor, nn

from metarun.algorithms.maml import MAML
from metarun.errors import ConfigError, check_least
from metarun.inner_loops.base import InnerLoop
from metarun.tasks.episodes import Episodes, EpisodeShape, Outcome
from metarun.tasks.source import EpisodeSource

Measure = Literal["entropy", "theil", "generalised_entropy", "atkinson", "gini", "variance_of_logarithms"]


class TAML(MAML):
    """MAML with a penalty of the meta-loss for initial weights that favour some tasks or classes.

    - `measure: entropy` (entropy-maximisation/reduction, algorithm 1): the penalty of a task is the entropy
      of the predicted classes of its queries after adaptation minus that before, each the mean over queries.
      It is for tasks with classes.
    - The others (inequality-minimisation, algorithm 2): the penalty is the inequality of the query losses of
      the tasks of a meta-batch before adaptation, by the measure of this name (`inequality`).

    With `weight: 0` it is MAML. The tasks of a meta-batch whose losses are compared run at once, whatever
    `hardware.tasks_at_once` is.

    Args:
        backbone, inner_loop, outputs, head, adapts, transductive, constants: see `MAML`.
        measure: see above.
        weight: of the penalty (lambda in the paper), at least 0.
        parameter: the order of `generalised_entropy` (alpha), or the aversion of `atkinson` (epsilon, at
            least 0).

    Raises:
        ConfigError: if a setting is out of range.
    """

    needs = Episodes
    plays = False
    uncoupled = "algorithm.measure=entropy"
    unread: ClassVar = {
        "parameter": tuple(
            f"measure={each}" for each in ("entropy", "theil", "gini", "variance_of_logarithms")
        )
    }

    def __init__(
        self,
        backbone: nn.Module,
        inner_loop: InnerLoop,
        outputs: int,
        head: Literal["fixed", "shared"] = "fixed",
        adapts: Literal["all", "head", "body"] = "all",
        transductive: bool = True,
        measure: Measure = "entropy",
        weight: float = 0.1,
        parameter: float = 0.5,
        constants: int = 0,
    ) -> None:
        check_least("algorithm", 0, weight=weight)
        super().__init__(backbone, inner_loop, outputs, head, adapts, transductive, constants)
        if measure == "atkinson":
            check_least("algorithm", 0, parameter=parameter)
        self.measure: Measure = measure
        self.weight, self.parameter = weight, parameter
        self.couples_tasks = measure != "entropy" and weight > 0

    def check_source(self, source: EpisodeSource, shape: EpisodeShape) -> None:
        super().check_source(source, shape)
        if source.spec.objective.numbers > 1:
            raise ConfigError(
                "algorithm=taml: compares positive losses, and a log-likelihood may have any sign; choose "
                "dataset.likelihood=null with algorithm.measure=theil, or algorithm=maml"
            )
        if self.measure == "entropy" and source.spec.outputs is not None:
            raise ConfigError(
                "algorithm.measure=entropy: needs tasks with classes, which this dataset does not have; "
                "choose algorithm.measure=theil"
            )

    def meta_loss(self, tasks: Episodes) -> Outcome:
        """The query loss plus the weighted penalty."""
        outcome = super().meta_loss(tasks)
        if not self.weight:
            return outcome
        before = self.outcome({"params": self.start(tasks)}, tasks)
        if self.measure != "entropy":
            penalty = inequality(before.loss, self.measure, self.parameter)
        else:
            assert outcome.outputs is not None
            assert before.outputs is not None
            penalty = entropy(outcome.outputs) - entropy(before.outputs)
        return replace(outcome, loss=outcome.loss + self.weight * penalty)


def entropy(logits: Tensor) -> Tensor:
    """The mean entropy in nats of the classes that logits [T, B, N] predict, [T]."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean(1)


def inequality(losses: Tensor, measure: Measure, parameter: float = 0.5) -> Tensor:
    """How unequal positive losses [T] are, a scalar; 0 if they are all the same.

    With r the ratio of a loss to their mean:

    - theil: mean(r log r)
    - generalised_entropy, of order a: mean(r^a - 1) / (a (a - 1)); for a = 1 Theil's, for a = 0 -mean(log r)
    - atkinson, of aversion e: 1 - mean(r^(1 - e))^(1 / (1 - e)); for e = 1, one minus the geometric mean of r
    - gini: half the mean of |r_i - r_j| over all pairs
    - variance_of_logarithms: the mean square of log r - mean(log r)
    """
    ratio = losses / losses.mean()
    logs = ratio.log()
    if measure == "gini":
        return (ratio.unsqueeze(0) - ratio.unsqueeze(1)).abs().mean() / 2
    if measure == "variance_of_logarithms":
        return (logs - logs.mean()).square().mean()
    if measure == "atkinson":
        power = 1 - parameter
        return 1 - (logs.mean().exp() if power == 0 else ratio.pow(power).mean().pow(1 / power))
    if measure == "theil" or parameter == 1:
        return (ratio * logs).mean()
    if parameter == 0:
        return -logs.mean()
    return (ratio.pow(parameter) - 1).mean() / (parameter * (parameter - 1))
