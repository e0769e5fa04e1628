"""Prioritized replay of tasks, against the rule of its paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from metarun.datasets.environments.navigation2d import Navigation2D
from metarun.datasets.sinusoid import Sinusoid
from metarun.errors import ConfigError
from metarun.tasks.curriculum import PrioritizedReplay
from metarun.tasks.episodes import EpisodeShape

pytestmark = pytest.mark.quick

SHAPE = EpisodeShape(1, 2, 2)
SOURCE = Sinusoid().split("train")


def run(sampler: PrioritizedReplay, iterations: range, seed: int = 0) -> list[torch.Tensor]:
    """The amplitudes of the tasks of each iteration, which are also their scores."""
    drawn = []
    for iteration in iterations:
        amplitudes = sampler.draw(SOURCE, 6, SHAPE, seed, iteration)[0].flatten()
        sampler.update(amplitudes, iteration + 1)
        drawn.append(amplitudes)
    return drawn


def test_the_chance_of_a_task_is_that_of_the_paper():
    sampler = PrioritizedReplay(temperature=0.5, staleness=0.3)
    sampler.scores = torch.tensor([0.2, 5.0, -1.0], dtype=torch.float64)
    sampler.drawn_at = torch.tensor([3, 8, 9])
    ranks, stale = np.array([2.0, 1.0, 3.0]), np.array([10 - 3 + 1, 10 - 8 + 1, 10 - 9 + 1.0])
    by_score = (1 / ranks) ** (1 / 0.5)
    expected = 0.7 * by_score / by_score.sum() + 0.3 * stale / stale.sum()
    np.testing.assert_allclose(sampler.chances(10), expected, rtol=1e-12)


def test_tasks_with_high_scores_are_drawn_again_and_kept():
    sampler = PrioritizedReplay(buffer=10)
    drawn = torch.stack(run(sampler, range(60)))
    anew = torch.stack(run(PrioritizedReplay(replay=0.0), range(60)))
    assert anew.unique().numel() == anew.numel()
    share = 1 - drawn.unique().numel() / drawn.numel()
    assert 0.35 < share < 0.6  # of half, without the first iteration
    assert drawn[20:].mean() > anew[20:].mean() + 0.5
    assert len(sampler.scores) == 10
    assert sampler.scores.min() >= drawn.flatten().unique().sort(descending=True).values[:10].min() - 1e-6


def test_a_meta_batch_has_no_task_twice_and_scores_are_renewed():
    sampler = PrioritizedReplay(replay=1.0)
    for iteration in range(20):
        amplitudes = sampler.draw(SOURCE, 6, SHAPE, 0, iteration)[0].flatten()
        assert amplitudes.unique().numel() == 6
        sampler.update(torch.full((6,), float(iteration)), iteration + 1)
    assert len(sampler.scores) == 6  # nothing new after the first meta-batch
    assert (sampler.scores == 19).all() and (sampler.drawn_at == 20).all()


def test_a_restored_buffer_goes_on_as_if_it_had_not_stopped():
    whole = PrioritizedReplay()
    expected = run(whole, range(12))
    first, second = PrioritizedReplay(), PrioritizedReplay()
    run(first, range(5))
    second.load_state_dict(first.state_dict())
    for mine, theirs in zip(run(second, range(5, 12)), expected[5:], strict=True):
        assert torch.equal(mine, theirs)
    assert not torch.equal(run(PrioritizedReplay(), range(1), seed=1)[0], expected[0])


def test_a_replayed_environment_has_new_noise():
    source, sampler = Navigation2D().split("train"), PrioritizedReplay(replay=1.0)
    seen = []
    for iteration in range(3):
        goals, seeds = sampler.draw(source, 4, SHAPE, 0, iteration)
        sampler.update(goals[:, 0], iteration + 1)
        seen.append((goals.sort(0).values, seeds))
    assert torch.equal(seen[1][0], seen[0][0]) and torch.equal(seen[2][0], seen[0][0])
    assert torch.cat([seeds for _, seeds in seen]).unique().numel() == 12


@pytest.mark.parametrize(
    "settings", [{"buffer": 0}, {"temperature": 0.0}, {"replay": 1.5}, {"staleness": -0.1}]
)
def test_settings_out_of_range(settings: dict):
    (name,) = settings
    with pytest.raises(ConfigError, match=rf"sampler\.{name}="):
        PrioritizedReplay(**settings)
