"""Tasks that are environments: their data are the trajectories of the very policies that learn from them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from metarun.errors import ConfigError
from metarun.tasks.episodes import EpisodeShape, Model, Outcome, Tasks
from metarun.tasks.objectives import Objective, PerTask
from metarun.tasks.policy_gradient import Estimator, alive_mean, discounted, outer_loss
from metarun.tasks.worlds import Player, Trajectories, World, play, random_numbers, roll

SCORED = 0  # the phase of the episodes that are scored; inner step k is phase k + 1
BEFORE = SCORED + 1  # the phase of the episodes that a policy with a memory plays before them


class Rollouts(Tasks):
    """T environments in which a policy acts, learns, and acts again.

    The support of a task are the trajectories of the weights that an inner step is about to change, and its
    queries those of the adapted weights. Both are collected by the first model that asks for them, and are
    kept: any later model is given the same trajectories. So the first pass of an algorithm over these tasks
    collects data, and further passes, with a graph or at other weights, are differentiable functions of the
    weights on that data. This is what PPO and TRPO need.

    Args:
        world: the environments.
        seeds: of the tasks, int64 [T]; everything random in a task comes from its seed.
        shape: K shots are the trajectories that each inner step learns from, Q queries those that are scored.
        objective: the metrics.
        estimator: how gradients are estimated.

    Attributes:
        recorded: the trajectories by their phase.
        clip: the largest change of a ratio of probabilities in the loss of queries; None: any.
        credit: what the returns of a task count for in the term of `Estimator.credit`, [T]; None: not at all.
        inner_kl: the strength of a penalty on the divergence of the policy at each inner step from the one
            that acted.
        inner_terms: what the inner steps of the current pass add to the loss of the queries, [T] each.
    """

    unit = "tasks"  # an episode is a part of one

    def __init__(
        self, world: World, seeds: Tensor, shape: EpisodeShape, objective: Objective, estimator: Estimator
    ) -> None:
        self.world, self.seeds, self.shape = world, seeds.cpu(), shape
        self.objective, self.estimator = objective, estimator
        self.recorded: dict[int, Trajectories] = {}
        self.clip: float | None = None
        self.credit: Tensor | None = None
        self.inner_kl = 0.0
        self.inner_terms: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def outputs(self) -> int:
        return self.world.actions.outputs

    def twin(self) -> Rollouts:
        """The same tasks; a pass over one of the two adds nothing to the loss of the other."""
        other = copy.copy(self)
        other.inner_terms = []
        return other

    def to(self, dtype: torch.dtype) -> Rollouts:
        other = self.twin()
        other.world = self.world.to(dtype)
        return other

    def scored_anew(self) -> Rollouts:
        """The same tasks, whose queries are not collected yet."""
        other = self.twin()
        other.recorded = {phase: batch for phase, batch in self.recorded.items() if phase != SCORED}
        return other

    def joined(self) -> Rollouts:
        """The same tasks, in which all trajectories are scored and none are for inner steps."""
        other = self.twin()
        other.shape = replace(self.shape, shots=0, queries=self.shape.shots + self.shape.queries)
        return other

    def select(self, rows: Tensor) -> Rollouts:
        """The tasks of these numbers, of which all trajectories are recorded."""
        other = self.twin()
        other.seeds = self.seeds[rows.cpu()]
        other.recorded = {phase: batch.map(lambda x: x[rows]) for phase, batch in self.recorded.items()}
        other.credit = None if self.credit is None else self.credit[rows]
        return other

    def support_loss(self, model: Model, step: int) -> Tensor:
        if not self.shape.shots:
            raise ConfigError("shots=0: an inner step learns from trajectories; set shots to 1 or more")
        batch = self.collect(step + 1, self.shape.shots, lambda *numbers: roll(self.world, model, *numbers))
        outputs, log_probs = self.revisit(batch, model)
        if self.credit is not None:
            self.inner_terms.append(-self.credit * (log_probs * batch.alive).sum((1, 2)))
        if self.inner_kl:
            divergence = self.world.actions.divergence(batch.outputs, outputs)
            self.inner_terms.append(self.inner_kl * alive_mean(divergence, batch.alive))
        return self.estimator.inner_loss(log_probs, batch, self.world.actions)

    def query(self, model: Model, loss: PerTask | None = None) -> Outcome:
        batch = self.collect(SCORED, self.shape.queries, lambda *numbers: roll(self.world, model, *numbers))
        outputs, log_probs = self.revisit(batch, model)
        losses = outer_loss(log_probs, batch, self.world.actions, self.clip)
        losses, self.inner_terms = losses + sum(self.inner_terms), []
        return Outcome(losses, self.scores(), outputs.flatten(1, 2), self.gain())

    def divergence(self, outcome: Outcome) -> Tensor:
        """The mean divergence of a policy, by its outcome, from the one that acted in the queries, [T]."""
        batch = self.recorded[SCORED]
        assert outcome.outputs is not None
        outputs = outcome.outputs.view_as(batch.outputs)
        return alive_mean(self.world.actions.divergence(batch.outputs, outputs), batch.alive)

    def information(self, outputs: Tensor, vectors: Tensor) -> Tensor:
        """Products of the Fisher information of the mean divergence with vectors [T, H * E, N].

        Args:
            outputs: of a network in the recorded queries, [T, H * E, N].
            vectors: like them.
        """
        alive = self.recorded[SCORED].alive.flatten(1).unsqueeze(-1)
        return self.world.actions.information(outputs, vectors) * alive / alive.sum(1, keepdim=True)

    def thinned(self, every: int) -> Rollouts:
        """The same recorded tasks with one of so many time steps of the queries."""
        scored = self.recorded[SCORED].map(lambda x: x[:, ::every] if x.dim() > 2 else x)
        other = self.twin()
        other.recorded = self.recorded | {SCORED: scored}
        return other

    def collect(
        self, phase: int, episodes: int, play: Callable[[Tensor, Tensor], Trajectories]
    ) -> Trajectories:
        """The trajectories of a phase: those recorded, or else of `play(noise, chance)`, with advantages."""
        if phase not in self.recorded:
            device = self.world.device
            numbers = random_numbers(self.world, self.seeds, phase, episodes, device)
            self.recorded[phase] = self.estimator.with_advantages(play(*numbers))
        return self.recorded[phase]

    def played(self, player: Player, phase: int) -> Trajectories:
        """The episodes of a phase, which a player plays one after the other; they are not recorded."""
        episodes = self.shape.queries if phase == SCORED else self.shape.shots
        numbers = random_numbers(self.world, self.seeds, phase, episodes, self.world.device)
        return play(self.world, player, *numbers)

    def revisit(self, batch: Trajectories, model: Model) -> tuple[Tensor, Tensor]:
        """A model's outputs [T, H, E, N] in trajectories, and its log-probabilities of actions [T, H, E]."""
        outputs = model(batch.observations.flatten(1, 2)).unflatten(1, batch.rewards.shape[1:])
        return outputs, self.world.actions.log_prob(outputs, batch.actions)

    def gain(self) -> Tensor:
        """How much higher the return of the queries is than that before the first inner step, [T]."""
        first = self.recorded.get(SCORED + 1, self.recorded[SCORED])
        return self.recorded[SCORED].returns.mean(1) - first.returns.mean(1)

    def scores(self) -> dict[str, Tensor]:
        """The scores of the recorded trajectories, [T] each, by metric."""
        scored = self.recorded[SCORED]
        first = self.recorded.get(SCORED + 1, scored)
        return {metric.name: metric.score(scored, first) for metric in self.objective.metrics}

    def give_credit(self, others: Tensor) -> None:
        """Set `credit` by how much better the queries of each task were than `others`, [T].

        In the units of the query loss, which is a mean over time steps of advantages that may be normalised.
        """
        batch = self.recorded[SCORED]
        assert batch.scale is not None
        steps = batch.alive.sum((1, 2)) / batch.alive.shape[2]  # the mean length of an episode
        self.credit = (self.mean_returns() - others) / (steps * batch.scale)

    def mean_returns(self) -> Tensor:
        """The mean discounted return of the queries of each task, [T]."""
        return discounted(self.recorded[SCORED].rewards, self.estimator.discount)[:, 0].mean(1)
