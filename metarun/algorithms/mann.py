"""MANN: memory-augmented networks (Santoro, Bartunov, Botvinick, Wierstra and Lillicrap 2016)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.feature_method import FeatureMethod, one_hot, require
from metarun.algorithms.sequences import order_of, reordered
from metarun.errors import check_above_0, check_bound, check_least
from metarun.tasks.episodes import Episodes, Outcome


@dataclass(frozen=True)
class State:
    """Recurrent state of T tasks: a memory of `slots` x `size` numbers, R read heads and an LSTM."""

    memory: Tensor  # [T, slots, size]
    usage: Tensor  # [T, slots]
    read_weights: Tensor  # [T, R, slots]
    read: Tensor  # [T, R * size]
    hidden: Tensor  # [T, controller]
    cell: Tensor  # [T, controller]
    label: Tensor  # [T, N], the one-hot label of the previous example; zeros at the start


class MANN(FeatureMethod):
    """An LSTM with an external memory processes the examples in sequence, each with the previous label.

    Reading is by content (equations 2 to 4); writing goes to the slots that were read last or to the least
    used slots (equations 5 to 8, "least recently used access"). The prediction is a linear function of the
    controller's state and the read vectors.

    Training follows the paper: the support and query examples of a task form one sequence in random order,
    with a loss at every step, including the first appearance of a class. In evaluation the support is
    processed in a fixed order, then each query as if it were the next example; predictions for queries do not
    depend on each other.

    Equation 6 selects as many least used slots as there are heads; all of them are cleared, and the
    j-th head writes to the j-th slot. Keys pass through a tanh, as in common implementations. Labels are
    one-hot vectors.

    Args:
        backbone, outputs: passed by the builder; see `Algorithm`.
        slots, size: the memory has `slots` vectors of `size` numbers.
        heads: the number of read and write heads, at most `slots`.
        controller: units of the LSTM.
        decay: the decay of the usage of a slot at each step (gamma of equation 5).
        sharpness: multiplies the cosines in reading; 1 in the paper.
        streams: train on sequences as the paper does; False trains as evaluation predicts, on the support
            followed by one query, which learns much faster.
        shuffles: whether the order of the examples is random in training.
    """

    sees_examples_in_turn = True

    def __init__(
        self,
        backbone: nn.Module,
        outputs: int,
        slots: int = 128,
        size: int = 40,
        heads: int = 4,
        controller: int = 200,
        decay: float = 0.99,
        sharpness: float = 1.0,
        streams: bool = True,
        shuffles: bool = True,
    ) -> None:
        super().__init__(backbone, most_ways=outputs)
        check_least("algorithm", 1, size=size, heads=heads, controller=controller)
        require(heads <= slots, f"algorithm.heads={heads}: must be at most algorithm.slots={slots}")
        check_bound("algorithm", {"decay": decay}, lambda value: 0 <= value <= 1, "from 0 to 1")
        check_above_0("algorithm", sharpness=sharpness)
        self.slots, self.size, self.heads, self.decay, self.shuffles = slots, size, heads, decay, shuffles
        self.outputs, self.sharpness, self.streams = outputs, sharpness, streams
        self.controller = nn.LSTMCell(self.features + outputs + heads * size, controller)
        self.keys = nn.Linear(controller, heads * size)
        self.gate = nn.Parameter(torch.zeros(()))  # alpha of equation 7
        self.last = nn.Linear(controller + heads * size, outputs)

    def fit(self, features: Tensor, targets: Tensor, ways: int) -> dict[str, Any]:
        """{"state": the state after the support, "ways": N}."""
        order = order_of(features, at_random=self.shuffles and self.training)
        features, targets = reordered(features, order), reordered(targets, order)
        return {"state": vars(self.see(features, targets)[1]), "ways": ways}

    def score(self, adapted: dict[str, Any], features: Tensor) -> Tensor:
        """Logits [T, B, N] of the queries, each processed as the next example after the support."""
        queries = features.shape[1]
        state = State(**{name: x.repeat_interleave(queries, 0) for name, x in adapted["state"].items()})
        logits, _ = self.step(state, features.flatten(0, 1))
        return logits.unflatten(0, features.shape[:2])[..., : adapted["ways"]]

    def meta_loss(self, tasks: Episodes) -> Outcome:
        """With `streams`, the mean loss over all steps of the sequence; the scores are of its queries."""
        if not self.streams:
            return super().meta_loss(tasks)
        support, query = self.embed_episodes(tasks)
        logits, targets = self.in_sequence(support, query, tasks)
        return tasks.outcome(logits[:, support.shape[1] :], self.loss_of(tasks)(logits, targets))

    def in_sequence(self, support: Tensor, query: Tensor, tasks: Episodes) -> tuple[Tensor, Tensor]:
        """Logits [T, S + B, N] and targets of all examples, processed as one sequence; support first."""
        features = torch.cat([support, query], 1)
        targets = torch.cat([tasks.support_y, tasks.query_y], 1)
        order = order_of(features, at_random=self.shuffles)
        logits, _ = self.see(reordered(features, order), reordered(targets, order))
        return reordered(logits, order.argsort(1))[..., : tasks.ways], targets

    def by_instance(self, tasks: Episodes, order: Tensor) -> Tensor:
        """Accuracy at the first, second, ... appearance of a class (table 1 of the paper).

        Args:
            tasks: their support and query examples form one sequence.
            order: the order of each sequence, int64 [T, S + B]. Each example is predicted before its label
                is given.

        Returns:
            Accuracies [T, K + Q].
        """
        features = torch.cat([self.embed(tasks.support_x), self.embed(tasks.query_x)], 1)
        targets = torch.cat([tasks.support_y, tasks.query_y], 1)
        features, targets = reordered(features, order), reordered(targets, order)
        right = (self.see(features, targets)[0][..., : tasks.ways].argmax(-1) == targets).float()
        classes = one_hot(targets, tasks.ways, right)
        before = (classes.cumsum(1) - classes).gather(2, targets.unsqueeze(-1)).squeeze(-1).long()  # [T, L]
        length = targets.shape[1] // tasks.ways
        return torch.zeros_like(right[:, :length]).scatter_add(1, before, right) / tasks.ways

    def see(self, features: Tensor, targets: Tensor) -> tuple[Tensor, State]:
        """Logits [T, L, N] of a sequence of features [T, L, F], and the state after it."""
        state = self.start(features)
        labels = one_hot(targets, self.outputs, features)
        logits = []
        for x, label in zip(features.unbind(1), labels.unbind(1), strict=True):
            answer, state = self.step(state, x)
            state = replace(state, label=label)
            logits.append(answer)
        return torch.stack(logits, 1), state

    def start(self, like: Tensor) -> State:
        """The initial state: all zeros, with the dtype and device of `like` [T, ...]."""
        tasks = len(like)

        def zeros(*shape: int) -> Tensor:
            return like.new_zeros(tasks, *shape)

        controller = self.controller.hidden_size
        return State(
            memory=zeros(self.slots, self.size),
            usage=zeros(self.slots),
            read_weights=zeros(self.heads, self.slots),
            read=zeros(self.heads * self.size),
            hidden=zeros(controller),
            cell=zeros(controller),
            label=zeros(self.outputs),
        )

    def step(self, state: State, x: Tensor) -> tuple[Tensor, State]:
        """Process one example x [T, F] of each task: logits [T, N] and the next state."""
        inputs = torch.cat([x, state.label, state.read], 1)
        hidden, cell = self.controller(inputs, (state.hidden, state.cell))
        keys = self.keys(hidden).unflatten(1, (self.heads, self.size)).tanh()
        memory, write_weights = write(state, keys, self.gate)
        read_weights, read = read_by_content(memory, keys, self.sharpness)
        usage = self.decay * state.usage + read_weights.sum(1) + write_weights.sum(1)  # equation 5
        logits = self.last(torch.cat([hidden, read.flatten(1)], 1))
        return logits, State(memory, usage, read_weights, read.flatten(1), hidden, cell, state.label)


def write(state: State, keys: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """Clear the least used slots and write the keys.

    Args:
        state: the current state.
        keys: what each head writes, [T, R, size].
        gate: a scalar; its sigmoid weighs the slots read last against the least used ones (equation 7).

    Returns:
        The new memory [T, slots, size] (equation 8) and the write weights [T, R, slots] (equation 7).
    """
    heads, slots = keys.shape[1], state.usage.shape[1]
    chosen = state.usage.detach().argsort(dim=1, stable=True)[:, :heads]  # [T, R], equation 6
    least_used = one_hot(chosen, slots, keys)  # [T, R, slots]
    share = gate.sigmoid()
    weights = share * state.read_weights + (1 - share) * least_used
    retained = 1 - least_used.sum(1)
    return state.memory * retained.unsqueeze(-1) + weights.mT @ keys, weights


def read_by_content(memory: Tensor, keys: Tensor, sharpness: float = 1.0) -> tuple[Tensor, Tensor]:
    """Read weights [T, R, slots] (equations 2 and 3), and the vectors read [T, R, size] (equation 4)."""
    similarity = F.normalize(keys, dim=-1) @ F.normalize(memory, dim=-1).mT
    weights = (sharpness * similarity).softmax(-1)
    return weights, weights @ memory
