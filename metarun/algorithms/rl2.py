"""RL2 (Duan, Schulman, Chen, Bartlett, Sutskever and Abbeel 2016, "RL^2: Fast Reinforcement Learning via Slow
Reinforcement Learning"; Wang et al. 2016, "Learning to Reinforcement Learn").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm
from metarun.algorithms.memories import Attentive, Recurrent, State
from metarun.errors import check_above_0, check_least
from metarun.nn.learner import refuse_running_averages
from metarun.tasks.episodes import Outcome
from metarun.tasks.policy_gradient import alive_mean, generalised_advantages, outer_loss
from metarun.tasks.rollouts import BEFORE, SCORED, Rollouts
from metarun.tasks.worlds import Player, Trajectories, in_sequence, joined

SLOWEST = 0.01  # the least weight of an iteration in the running statistics of returns


class RL2(Algorithm):
    """A policy whose memory lasts over the episodes of a task, so that it learns the task by acting in it.

    A task is a trial: K shots, then Q queries, which are episodes played one after the other. At each step,
    the memory reads the observation, the action and the reward of the step before, their product, and whether
    an episode begins. Training maximises the discounted return of the whole trial by PPO, with generalised
    advantages over the trial from a critic, which is a second head. Scores are of the queries.

    Departures from Duan et al.: PPO in the place of TRPO; a critic that shares the memory in the place of a
    linear baseline; the product of action and reward as a further input, which saves half of the training
    on bandits. The critic predicts returns that are scaled by running statistics of them; advantages are
    scaled by those of all tasks of an iteration. The memory also reads the idle steps of an episode that
    ended before the horizon.

    Args:
        backbone, outputs, constants: passed by the builder; see `Algorithm`.
        memory: "gru", "lstm", or "snail", the layers of SNAIL (Mishra et al. 2018, section 5.2).
        size: units of the GRU or LSTM.
        width: scales the layers of SNAIL.
        longest: the number of steps of a trial that the convolutions of SNAIL cover.
        value: the weight of the critic's squared error in the loss.
        entropy: the weight of the entropy of the policy in the loss, at the start of training.
        entropy_end: its weight from the iteration `annealed` on; it changes linearly.
        annealed: an iteration.
    """

    needs = Rollouts
    plays = True
    trains_critic = True
    of_all_iterations = ("annealed",)
    unread: ClassVar = {
        **{f"dataset.estimator.{name}": "" for name in ("baseline", "normalise", "surrogate", "credit")},
        "outer_loop.inner_kl": "",
        "size": "memory=snail",
        "width": "memory!=snail",
        "longest": "memory!=snail",
    }
    return_mean: Tensor
    return_std: Tensor
    updates: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        outputs: int,
        constants: int = 0,
        memory: Literal["gru", "lstm", "snail"] = "gru",
        size: int = 64,
        width: float = 0.25,
        longest: int = 100,
        value: float = 0.5,
        entropy: float = 0.01,
        entropy_end: float = 0.0,
        annealed: int = 1000,
    ) -> None:
        super().__init__()
        check_least("algorithm", 1, size=size, longest=longest, annealed=annealed)
        check_above_0("algorithm", width=width)
        check_least("algorithm", 0, value=value, entropy=entropy, entropy_end=entropy_end)
        refuse_running_averages(backbone)
        self.backbone, self.outputs = backbone, outputs
        inputs = int(backbone.features) + 2 * outputs + 2  # type: ignore[arg-type]
        self.memory = (
            Attentive(inputs, width, longest) if memory == "snail" else Recurrent(inputs, size, memory)
        )
        self.policy = nn.Linear(self.memory.features, outputs)
        self.critic = nn.Linear(self.memory.features, 1)
        for head in (self.policy, self.critic):  # at the start, the policy hardly depends on what it sees
            nn.init.normal_(head.weight, std=0.01 / self.memory.features**0.5)
            nn.init.zeros_(head.bias)
        self.constants = nn.Parameter(torch.zeros(constants)) if constants else None
        self.value, self.entropies, self.annealed = value, (entropy, entropy_end), annealed
        self.entropy = entropy
        self.register_buffer("return_mean", torch.zeros(()))
        self.register_buffer("return_std", torch.ones(()))
        self.register_buffer("updates", torch.zeros(()))

    def own_backbone(self) -> nn.Module:
        return self.backbone

    def on_step_start(self, iteration: int) -> bool:
        start, end = self.entropies
        self.entropy = start + (end - start) * min(1.0, iteration / self.annealed)
        return False

    # acting

    def adapt(self, tasks: Rollouts) -> dict[str, Any]:
        """The memory after the K shots, {"state": its tensors, "fed": what it reads of the last step}."""
        player = Remembering(self, len(tasks))
        if tasks.shape.shots:
            tasks.recorded[BEFORE] = tasks.played(player, BEFORE)
        return player.adapted()

    def trajectory(self, tasks: Rollouts) -> Iterator[dict[str, Any]]:
        """The memory before and after the K shots."""
        yield Remembering(self, len(tasks)).adapted()
        if tasks.shape.shots:
            yield self.adapt(tasks)

    def predict(self, adapted: dict[str, Any], query_x: Tensor) -> Tensor:
        """Outputs [T, B, N] for B first observations of a next episode, [T, B, *o], each on its own."""
        count = query_x.shape[1]
        player = Remembering(self, len(query_x) * count)
        player.state = [each.repeat_interleave(count, 0) for each in adapted["state"]]
        player.fed = adapted["fed"].repeat_interleave(count, 0)
        player.begin()
        return player(query_x.flatten(0, 1).unsqueeze(1)).squeeze(1).unflatten(0, query_x.shape[:2])

    def outcome(self, adapted: dict[str, Any], tasks: Rollouts, dtype: torch.dtype | None = None) -> Outcome:
        """The scores of the queries, played one after the other; the loss is minus their mean return."""
        player = Remembering(self, len(tasks))
        player.state, player.fed = adapted["state"], adapted["fed"]
        batch = tasks.recorded[SCORED] = tasks.played(player, SCORED)
        return Outcome(-batch.returns.mean(1), tasks.scores())

    def play(self, tasks: Rollouts) -> None:
        """Play the trials, and record their trajectories with advantages over the whole trial."""
        player, estimator = Remembering(self, len(tasks)), tasks.estimator
        phases = (BEFORE, SCORED) if tasks.shape.shots else (SCORED,)
        parts = [tasks.played(player, phase) for phase in phases]
        whole = joined(parts)
        steps, episodes = whole.rewards.shape[1:]
        values = torch.stack(player.values, 1).unflatten(1, (episodes, steps)).transpose(1, 2)
        trial = in_sequence(replace(whole, values=values))
        assert trial.values is not None
        advantages = generalised_advantages(
            trial.rewards, trial.values, trial.alive, estimator.discount, estimator.gae
        )
        targets = advantages + trial.values
        counts = [part.rewards.shape[2] for part in parts]
        shares = (
            x.split(counts, 2) for x in (values, *(in_episodes(x, episodes) for x in (advantages, targets)))
        )
        for phase, part, *own in zip(phases, parts, *shares, strict=True):
            names = ("values", "advantages", "targets")
            tasks.recorded[phase] = replace(part, **dict(zip(names, own, strict=True)))

    # learning

    def meta_loss(self, tasks: Rollouts) -> Outcome:
        """The loss of PPO over the trial, with those of critic and entropy; the scores are of the queries."""
        if fresh := SCORED not in tasks.recorded:
            self.play(tasks)
        trial = self.trial(tasks)
        assert trial.values is not None and trial.targets is not None
        outputs, values = (
            (trial.outputs, trial.values)
            if fresh and not torch.is_grad_enabled()
            else self.along(tasks, trial)
        )
        actions = tasks.world.actions
        losses = outer_loss(actions.log_prob(outputs, trial.actions), trial, actions, tasks.clip)
        errors = ((values - trial.targets) / self.return_std).square()
        losses = losses + self.value * alive_mean(errors, trial.alive)
        if self.entropy:
            losses = losses - self.entropy * alive_mean(actions.entropy(outputs), trial.alive)
        return Outcome(losses, tasks.scores())

    def trial(self, tasks: Rollouts) -> Trajectories:
        """All recorded time steps of each task in turn, [T, L, 1, ...]."""
        parts = [tasks.recorded[phase] for phase in (BEFORE, SCORED) if phase in tasks.recorded]
        return in_sequence(joined(parts) if len(parts) > 1 else parts[0])

    def along(self, tasks: Rollouts, trial: Trajectories) -> tuple[Tensor, Tensor]:
        """Outputs [T, L, 1, N] and values [T, L, 1] in a trial, of the current weights."""
        observations = trial.observations.squeeze(2)
        embedded = self.backbone(observations.flatten(0, 1)).unflatten(0, observations.shape[:2])
        before = self.feedback(trial.actions, trial.rewards.unsqueeze(-1)).squeeze(2)
        before = torch.cat([torch.zeros_like(before[:, :1]), before[:, :-1]], 1)
        starts = 1 - trial.alive.squeeze(2)
        starts[:, :: tasks.world.horizon] = 1
        fed = torch.cat([embedded, before, starts.unsqueeze(-1)], -1)
        outputs, values = self.heads(self.memory.along(fed))
        return outputs.unsqueeze(2), values.unsqueeze(2)

    @torch.no_grad()
    def on_collected(self, batches: Sequence[Rollouts]) -> None:
        """Scale the advantages of all tasks together, and update the running statistics of returns."""
        parts = [(tasks, phase) for tasks in batches for phase in tasks.recorded]
        every = [tasks.recorded[phase] for tasks, phase in parts]
        mean, std = statistics([(x.advantages, x.alive) for x in every])
        for (tasks, phase), batch in zip(parts, every, strict=True):
            assert batch.advantages is not None
            tasks.recorded[phase] = replace(batch, advantages=(batch.advantages - mean) / std * batch.alive)
        self.updates += 1
        share = (1 / self.updates).clamp_min(SLOWEST)
        for own, new in zip(
            (self.return_mean, self.return_std),
            statistics([(x.targets, x.alive) for x in every]),
            strict=True,
        ):
            own.lerp_(new.to(own), share)

    def feedback(self, actions: Tensor, rewards: Tensor) -> Tensor:
        """What the memory reads of actions [..., *a] and their rewards [..., 1], [..., 2 N + 1]."""
        if not actions.is_floating_point():
            actions = F.one_hot(actions, self.outputs).to(rewards.dtype)
        return torch.cat([actions, actions * rewards, rewards], -1)

    def heads(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [..., N] and values [...] for outputs of the memory [..., D]."""
        outputs = self.policy(memory)
        if self.constants is not None:
            outputs = torch.cat([outputs, self.constants.expand(*outputs.shape[:-1], -1)], -1)
        return outputs, self.critic(memory).squeeze(-1) * self.return_std + self.return_mean


class Remembering(Player):
    """The policy of `RL2` with its memory of T tasks.

    Args:
        algorithm: the policy.
        tasks: T.

    Attributes:
        state: of the memory; None before the first step.
        fed: what the memory reads of the step before, [T, 2 N + 2].
        values: the critic's values at the steps so far, [T] each.
    """

    def __init__(self, algorithm: RL2, tasks: int) -> None:
        self.algorithm, self.tasks = algorithm, tasks
        self.state: State | None = None
        self.values: list[Tensor] = []
        like = next(algorithm.parameters())
        self.fed = like.new_zeros(tasks, 2 * algorithm.outputs + 2)

    def begin(self) -> None:
        self.fed = self.fed.clone()
        self.fed[:, -1] = 1

    def __call__(self, observations: Tensor) -> Tensor:
        algorithm = self.algorithm
        fed = torch.cat([algorithm.backbone(observations.squeeze(1)), self.fed], -1)
        state = algorithm.memory.start(fed) if self.state is None else self.state
        memory, self.state = algorithm.memory.step(fed, state)
        outputs, values = algorithm.heads(memory)
        self.values.append(values)
        return outputs.unsqueeze(1)

    def see(self, actions: Tensor, rewards: Tensor, following: Tensor, alive: Tensor) -> None:
        self.fed = torch.cat(
            [self.algorithm.feedback(actions, rewards.unsqueeze(-1)).squeeze(1), 1 - alive], -1
        )

    def adapted(self) -> dict[str, Any]:
        """The state of the memory and what it reads next, see `RL2.adapt`."""
        start = self.algorithm.memory.start(self.fed) if self.state is None else self.state
        return {"state": start, "fed": self.fed}


def in_episodes(x: Tensor, episodes: int) -> Tensor:
    """A value of each step of a trial [T, E * H, 1] as [T, H, E], the inverse of `in_sequence`."""
    return x.squeeze(2).unflatten(1, (episodes, -1)).transpose(1, 2)


def statistics(parts: Sequence[tuple[Tensor | None, Tensor]]) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation of values [T, H, E] at the steps that are alive, over all parts."""
    pairs = [(values.double(), alive.double()) for values, alive in parts if values is not None]
    count = torch.stack([alive.sum() for _, alive in pairs]).sum()
    mean = torch.stack([(values * alive).sum() for values, alive in pairs]).sum() / count
    squares = torch.stack([((values - mean).square() * alive).sum() for values, alive in pairs]).sum()
    std = (squares / count).sqrt() + 1e-8
    like = parts[0][1]
    return mean.to(like), std.to(like)
