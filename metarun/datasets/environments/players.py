"""Classical players of bandits and of tabular Markov decision processes, beside which policies are evaluated.

They know the distribution that tasks are drawn from, and play all episodes of a task in turn as one trial.
T tasks, k arms, S states, A actions; computed by NumPy on the CPU.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from metarun.tasks.worlds import Player

Array = np.ndarray
MakePlayer = Callable[[Tensor], Player]  # from the seeds of the tasks, int64 [T]
GITTINS = 0.99  # the discount of Gittins indices
MOST_STATES = 20_000  # of the exact solution of a bandit, about
GRID, AHEAD = 501, 300  # of Gittins indices: values of a known arm, and pulls that are looked ahead


class Chooser(Player):
    """A player that chooses one action in each task.

    Args:
        seeds: of the tasks; the random choices in a task depend on its seed alone.
        actions: their number.
    """

    def __init__(self, seeds: Tensor, actions: int) -> None:
        self.seeds, self.actions = seeds.tolist(), actions
        self.streams: list[np.random.Generator] = []

    def begin(self) -> None:
        pass

    def __call__(self, observations: Tensor) -> Tensor:
        """Logits that leave no other action than the chosen one."""
        chosen = torch.from_numpy(self.choose(observations[:, 0].cpu().numpy()))
        logits = torch.full((len(chosen), self.actions), -torch.inf)
        return logits.scatter_(1, chosen.unsqueeze(1), 0.0).unsqueeze(1).to(observations)

    @abstractmethod
    def choose(self, observations: Array) -> Array:
        """The actions [T] for observations [T, *o]."""

    @property
    def random(self) -> list[np.random.Generator]:
        """A stream of random numbers for each task."""
        if not self.streams:
            self.streams = [np.random.default_rng(seed) for seed in self.seeds]
        return self.streams


class Uniform(Player):
    """All actions are equally probable.

    Args:
        actions: their number.
    """

    def __init__(self, actions: int) -> None:
        self.actions = actions

    def begin(self) -> None:
        pass

    def __call__(self, observations: Tensor) -> Tensor:
        return observations.new_zeros(*observations.shape[:2], self.actions)

    def see(self, actions: Tensor, rewards: Tensor, following: Tensor, alive: Tensor) -> None:
        pass


# Bandits.


class BanditPlayer(Chooser):
    """Pulls the arm of the largest index; of equal ones the first.

    Args:
        seeds: of the tasks.
        arms: k.
        gaussian: whether rewards are Gaussian; the prior of their means is then standard normal, and that of
            probabilities else uniform.
        index: the indices [T, k], given the player.

    Attributes:
        pulls: how often each arm was pulled, [T, k].
        total: the sum of its rewards, [T, k].
    """

    def __init__(
        self, seeds: Tensor, arms: int, gaussian: bool, index: Callable[[BanditPlayer], Array]
    ) -> None:
        super().__init__(seeds, arms)
        self.gaussian, self.index = gaussian, index
        self.pulls, self.total = np.zeros((2, len(seeds), arms))

    def choose(self, observations: Array) -> Array:
        return self.index(self).argmax(1)

    def see(self, actions: Tensor, rewards: Tensor, following: Tensor, alive: Tensor) -> None:
        rows, arms = np.arange(len(actions)), actions[:, 0].cpu().numpy()
        self.pulls[rows, arms] += 1
        self.total[rows, arms] += rewards[:, 0].cpu().numpy()

    @property
    def means(self) -> Array:
        """The posterior mean of each arm."""
        return self.total / (1 + self.pulls) if self.gaussian else (1 + self.total) / (2 + self.pulls)


def thompson(player: BanditPlayer) -> Array:
    """A draw from the posterior of each arm (Thompson 1933)."""
    if player.gaussian:
        deviations = 1 / np.sqrt(1 + player.pulls)
        return player.means + deviations * np.stack(
            [own.standard_normal(player.actions) for own in player.random]
        )
    won, lost = 1 + player.total, 1 + player.pulls - player.total
    return np.stack([own.beta(a, b) for own, a, b in zip(player.random, won, lost, strict=True)])


def upper_bound(constant: float) -> Callable[[BanditPlayer], Array]:
    """UCB1 (Auer, Cesa-Bianchi and Fischer 2002), whose constant is 1: the mean of the rewards of an arm,
    plus the constant times sqrt(2 log(time) / pulls); each arm is pulled once before."""

    def index(player: BanditPlayer) -> Array:
        time = player.pulls.sum(1, keepdims=True).clip(1)
        pulls = player.pulls.clip(1)
        bounds = player.total / pulls + constant * np.sqrt(2 * np.log(time) / pulls)
        return np.where(player.pulls == 0, np.inf, bounds)

    return index


def gittins(pulls: int) -> Callable[[BanditPlayer], Array]:
    """The Gittins index of each arm (Gittins 1979) for a discount of 0.99 and so many Bernoulli rewards."""

    def index(player: BanditPlayer) -> Array:
        ones = player.total.astype(int)
        return gittins_table(pulls)[ones, player.pulls.astype(int) - ones]

    return index


@cache
def gittins_table(pulls: int) -> Array:
    """Indices by the numbers of ones and of zeros, up to `pulls` each, [pulls + 1, pulls + 1].

    The index of an arm is the reward of a known arm to which one is indifferent. The value of an arm beside
    a known one is computed backwards from `AHEAD` further pulls on, where the better one is kept.
    """
    known = np.linspace(0, 1, GRID)  # [G]
    kept = known / (1 - GITTINS)
    last = pulls + AHEAD
    ones = np.arange(last + 1)[:, None]
    values = np.maximum(kept, (1 + ones) / (2 + last) / (1 - GITTINS))  # [last + 1, G], by the number of ones
    table = np.full((pulls + 1, pulls + 1), np.nan)
    for total in range(last - 1, -1, -1):
        chances = (1 + np.arange(total + 1)[:, None]) / (2 + total)
        pulled = chances * (1 + GITTINS * values[1:]) + (1 - chances) * GITTINS * values[:-1]
        if total <= pulls:
            gains = pulled - kept  # falls with the known arm
            place = (gains > 0).sum(1).clip(1, GRID - 1)
            rows = np.arange(total + 1)
            high, low = gains[rows, place - 1], gains[rows, place]
            table[rows, total - rows] = known[place - 1] + high / (high - low) / (GRID - 1)
        values = np.maximum(kept, pulled)
    return table


@cache
def bayes_value(arms: tuple[tuple[int, int], ...], pulls: int) -> float:
    """The largest expected reward of so many further pulls of Bernoulli arms, by dynamic programming.

    Args:
        arms: the numbers of ones and of zeros of each arm, sorted.
        pulls: how many are left.
    """
    return max(bayes_values(arms, pulls)) if pulls else 0.0


def bayes_values(arms: tuple[tuple[int, int], ...], pulls: int) -> list[float]:
    """The expected reward of the next pulls if each arm is pulled first, and the best ones are afterwards."""
    values: list[float] = []
    for i, (ones, zeros) in enumerate(arms):
        if i and arms[i] == arms[i - 1]:
            values.append(values[-1])
            continue
        chance = (1 + ones) / (2 + ones + zeros)
        after = [
            bayes_value(tuple(sorted((*arms[:i], seen, *arms[i + 1 :]))), pulls - 1)
            for seen in ((ones + 1, zeros), (ones, zeros + 1))
        ]
        values.append(chance * (1 + after[0]) + (1 - chance) * after[1])
    return values


def bayes(pulls: int) -> Callable[[BanditPlayer], Array]:
    """The expected rewards of each arm in a Bernoulli bandit of so many pulls, by dynamic programming."""

    def index(player: BanditPlayer) -> Array:
        found = np.empty_like(player.pulls)
        left = pulls - int(player.pulls[0].sum())
        ones = player.total.astype(int)
        zeros = player.pulls.astype(int) - ones
        for row, counts in enumerate(zip(ones.tolist(), zeros.tolist(), strict=True)):
            arms = list(zip(*counts, strict=True))
            order = sorted(range(len(arms)), key=arms.__getitem__)
            found[row, order] = bayes_values(tuple(arms[i] for i in order), left)
        return found

    return index


def bandit_players(arms: int, pulls: int, gaussian: bool, every_counts: bool = True) -> dict[str, MakePlayer]:
    """The players of a bandit, by name.

    Args:
        arms: k.
        pulls: of a whole trial.
        gaussian: see `BanditPlayer`.
        every_counts: whether the rewards of all pulls count.
    """
    indices: dict[str, Callable[[BanditPlayer], Array]] = {
        "greedy": lambda player: player.means,
        "Thompson": thompson,
        "UCB1": upper_bound(1.0),
        "UCB1, constant 0.2": upper_bound(0.2),
    }
    if not gaussian:
        indices["Gittins (0.99)"] = gittins(pulls)
        if every_counts and math.comb(pulls + 2 * arms, pulls) / math.factorial(arms) <= MOST_STATES:
            indices["Bayes optimum"] = bayes(pulls)

    def maker(index: Callable[[BanditPlayer], Array]) -> MakePlayer:
        return lambda seeds: BanditPlayer(seeds, arms, gaussian, index)

    return {"random": lambda seeds: Uniform(arms)} | {name: maker(index) for name, index in indices.items()}


# Tabular Markov decision processes.


class Planner(Chooser):
    """Plans each episode in a decision process that is estimated from the episodes before.

    With the prior that tasks are drawn from: rewards of variance 1 whose means are normal with mean 1 and
    variance 1, and a flat Dirichlet distribution over the next state.

    Args:
        seeds: of the tasks.
        states, actions, horizon: S, A and the steps of an episode.
        samples: True draws the process from the posterior (PSRL: Strens 2000; Osband, Russo and Van Roy
            2013); False takes its mean.
    """

    def __init__(self, seeds: Tensor, states: int, actions: int, horizon: int, samples: bool) -> None:
        super().__init__(seeds, actions)
        self.horizon, self.samples = horizon, samples
        self.visits, self.total = np.zeros((2, len(seeds), states, actions))
        self.moves = np.ones((len(seeds), states, actions, states))
        self.plan: list[Array] = []  # values [T, S, A] of the steps that are left, the last step first
        self.state = np.zeros(len(seeds), dtype=int)

    def begin(self) -> None:
        means, spread = (1 + self.total) / (1 + self.visits), 1 / np.sqrt(1 + self.visits)
        moves = self.moves
        if self.samples:
            means = means + spread * np.stack([own.standard_normal(means.shape[1:]) for own in self.random])
            moves = np.stack([own.standard_gamma(a) for own, a in zip(self.random, moves, strict=True)])
        moves = moves / moves.sum(-1, keepdims=True)
        self.plan = [means]
        for _ in range(self.horizon - 1):
            best = self.plan[-1].max(-1)
            self.plan.append(means + np.einsum("tsan,tn->tsa", moves, best))

    def choose(self, observations: Array) -> Array:
        self.state = observations.argmax(1)
        return self.plan.pop()[np.arange(len(self.state)), self.state].argmax(1)

    def see(self, actions: Tensor, rewards: Tensor, following: Tensor, alive: Tensor) -> None:
        place = np.arange(len(actions)), self.state, actions[:, 0].cpu().numpy()
        self.visits[place] += 1
        self.total[place] += rewards[:, 0].cpu().numpy()
        self.moves[(*place, following[:, 0].argmax(1).cpu().numpy())] += 1


def tabular_players(states: int, actions: int, horizon: int) -> dict[str, MakePlayer]:
    """The players of a tabular Markov decision process, by name; the arguments are those of `Planner`."""
    return {
        "random": lambda seeds: Uniform(actions),
        "greedy": lambda seeds: Planner(seeds, states, actions, horizon, samples=False),
        "PSRL": lambda seeds: Planner(seeds, states, actions, horizon, samples=True),
    }
