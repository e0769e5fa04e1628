"""SimCLR and SupCon: limits of the loss, and what its runs are used for."""

from __future__ import annotations

import pytest
import torch
from helpers.contrastive_references import nt_xent

from metarun.algorithms.contrastive import Contrastive, contrastive_loss
from metarun.backbones.mlp import MLP
from metarun.errors import ConfigError

pytestmark = pytest.mark.quick


def test_one_image_a_class_in_two_views_is_simclr():
    first, second = torch.randn(2, 7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(7).repeat(2)
    found = contrastive_loss(torch.cat([first, second])[None], targets[None], 0.3)
    torch.testing.assert_close(found[0], nt_xent(first, second, 0.3), rtol=1e-12, atol=0)


def test_an_example_without_positives_adds_nothing():
    projected = torch.eye(3, dtype=torch.float64)[None]
    found = contrastive_loss(projected, torch.tensor([[0, 0, 1]]), 1.0)
    torch.testing.assert_close(found, torch.full((1,), 2 / 3 * torch.log(torch.tensor(2.0)).item()).double())


def test_a_task_is_solved_by_the_nearest_mean_direction_of_features():
    torch.manual_seed(0)
    algorithm = Contrastive(MLP((6,), hidden=(5,)), temperature=0.2).eval()
    x, y = torch.randn(1, 12, 6), torch.arange(3).repeat(4)[None]
    features = torch.nn.functional.normalize(algorithm.embed(x), dim=-1)[0].detach()
    logits = algorithm.score(algorithm.fit(algorithm.embed(x), y, 3), algorithm.embed(x))[0]
    means = torch.stack([features[y[0] == k].mean(0) for k in range(3)])
    angles = torch.nn.functional.cosine_similarity(features[:, None], means[None], dim=-1)
    torch.testing.assert_close(logits, angles / 0.2)


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"projection": 0}])
def test_settings_that_cannot_be(settings: dict[str, float]):
    with pytest.raises(ConfigError, match=rf"^algorithm\.{next(iter(settings))}="):
        Contrastive(MLP((6,), hidden=(5,)), **settings)
