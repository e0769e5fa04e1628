"""Which training tasks are drawn again: a curriculum of tasks on which there is most to learn."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metarun.errors import check_above_0, check_bound, check_least
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.sampling import seeded
from metarun.tasks.source import Draw, EpisodeSource


class PrioritizedReplay:
    """Prioritized level replay (Jiang, Grefenstette and Rocktäschel 2021), with tasks as levels.

    A part of each meta-batch are tasks of a buffer, drawn again with the probability
    (1 - staleness) * P_score + staleness * P_stale (section 3): P_score falls with the rank of a task by its
    score as rank^(-1 / temperature), and P_stale grows with the number of iterations since it was drawn. The
    others are drawn anew, and enter the buffer in the place of the task with the lowest score.

    Departures: the paper scores a level by the errors of its value function. Here the score of an environment
    is how much adaptation raised its return, which is what meta-learning is about; of other tasks, it is the
    loss of the queries. The chance of replay is constant, as in later work (Jiang et al. 2021, "Replay-Guided
    Adversarial Environment Design"), and the order of tasks is not that of levels.

    Args:
        buffer: the largest number of stored tasks.
        replay: the share of a meta-batch that is drawn from the buffer, in [0, 1].
        temperature: of the ranks, above 0; small values prefer the best.
        staleness: the share of `P_stale`, in [0, 1].
    """

    def __init__(
        self, buffer: int = 500, replay: float = 0.5, temperature: float = 0.1, staleness: float = 0.1
    ) -> None:
        check_least("sampler", 1, buffer=buffer)
        check_above_0("sampler", temperature=temperature)
        shares = {"replay": replay, "staleness": staleness}
        check_bound("sampler", shares, lambda value: 0 <= value <= 1, "from 0 to 1")
        self.buffer, self.replay, self.temperature, self.staleness = buffer, replay, temperature, staleness
        self.draws: Draw = ()  # of the stored tasks, [stored, ...] each
        self.scores, self.drawn_at = torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.long)
        self.latest: tuple[Draw, Tensor] = ((), torch.empty(0))

    def draw(self, source: EpisodeSource, tasks: int, shape: EpisodeShape, seed: int, iteration: int) -> Draw:
        """The meta-batch of an iteration, which depends on the seed, the iteration and the buffer alone.

        Args:
            source: the training split.
            tasks: T.
            shape: of each task.
            seed: of the run.
            iteration: the number of the outer step.
        """
        generator = seeded(f"curriculum {seed} {iteration}")
        draw = source.draw(tasks, shape, generator)
        places = torch.full((tasks,), -1)  # in the buffer; -1: drawn anew
        chosen = torch.rand(tasks, generator=generator) < self.replay
        if count := min(int(chosen.sum()), len(self.scores)):
            slots = chosen.nonzero().flatten()[:count]
            places[slots] = torch.multinomial(self.chances(iteration), count, generator=generator)
            again = tuple(
                x.index_copy(0, slots, stored[places[slots]])
                for x, stored in zip(draw, self.draws, strict=True)
            )
            draw = source.with_new_noise(again, draw)
        self.latest = draw, places
        return draw

    def chances(self, iteration: int) -> Tensor:
        """The probability of each stored task, float64 [stored]."""
        order = self.scores.argsort(descending=True, stable=True)
        ranks = torch.empty_like(order)
        ranks[order] = torch.arange(1, len(order) + 1)
        by_score = ranks.double() ** (-1 / self.temperature)
        stale = (iteration - self.drawn_at + 1).double()
        return (1 - self.staleness) * by_score / by_score.sum() + self.staleness * stale / stale.sum()

    def update(self, scores: Tensor, iteration: int) -> None:
        """Store the scores of the tasks that were drawn last, [T]."""
        draw, places = self.latest
        scores = scores.detach().double().cpu()
        again = places >= 0
        self.scores[places[again]] = scores[again]
        self.drawn_at[places[again]] = iteration
        new = ~again
        columns = [x[new] for x in draw]
        old = self.draws or tuple(x[:0] for x in columns)
        draws = [torch.cat(pair) for pair in zip(old, columns, strict=True)]
        all_scores = torch.cat([self.scores, scores[new]])
        drawn_at = torch.cat([self.drawn_at, torch.full((int(new.sum()),), iteration)])
        kept = all_scores.argsort(descending=True, stable=True)[: self.buffer].sort().values
        self.draws = tuple(x[kept] for x in draws)
        self.scores, self.drawn_at = all_scores[kept], drawn_at[kept]

    def state_dict(self) -> dict[str, Any]:
        """The buffer, for a checkpoint."""
        return {"draws": list(self.draws), "scores": self.scores, "drawn_at": self.drawn_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the buffer."""
        self.draws = tuple(state["draws"])
        self.scores, self.drawn_at = state["scores"], state["drawn_at"]
