"""OML: what it learns online, in which order, and what is refused."""

from __future__ import annotations

import pytest
import torch
from helpers.online_references import learned_online

from metarun.algorithms.oml import OML
from metarun.backbones.mlp import MLP
from metarun.errors import ConfigError
from metarun.inner_loops.adam import Adam
from metarun.inner_loops.sgd import SGD
from metarun.tasks.episodes import EpisodeShape

pytestmark = pytest.mark.quick


def built(steps: int = 1, **settings) -> OML:
    torch.manual_seed(0)
    return OML(MLP((6,), hidden=(5,)), SGD(0.3, 1, test_steps=steps), classes=4, **settings).double().eval()


@pytest.mark.parametrize("passes", [1, 2])
def test_a_new_sequence_of_classes_is_learned_example_by_example(passes: int):
    algorithm, x, y = built(passes), torch.randn(1, 9, 6).double(), torch.arange(3).repeat_interleave(3)
    features = algorithm.embed(x)
    found = algorithm.fit(features, y[None], 3)
    weight, bias = (torch.zeros(size, dtype=torch.float64, requires_grad=True) for size in ((3, 5), (3,)))
    for _ in range(passes):
        weight, bias = learned_online(weight, bias, features[0], y, 0.3)
    torch.testing.assert_close(found["weight"][0], weight)
    torch.testing.assert_close(found["bias"][0], bias)
    other = algorithm.fit(features.flip(1), y.flip(0)[None], 3)
    assert not torch.allclose(other["weight"], found["weight"])  # what comes last weighs most


def test_what_cannot_be():
    with pytest.raises(ConfigError, match=r"^algorithm\.trajectory=0: must be at least 1"):
        built(trajectory=0)
    built(trajectory=3).check_training(EpisodeShape(4, 1, 1))
    with pytest.raises(ConfigError, match=r"^algorithm\.trajectory=3: leaves none of ways=3"):
        built(trajectory=3).check_training(EpisodeShape(3, 1, 1))
    with pytest.raises(ConfigError, match=r"^inner_loop: OML learns online by plain gradient descent"):
        OML(MLP((6,), hidden=(5,)), Adam(0.1, 1))
