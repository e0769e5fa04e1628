"""P>M>F: fine-tuning as in a plain loop over tasks, steps of torch.optim and pixels."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from helpers.methods import episodes_of
from torch import Tensor, nn

from metarun.algorithms.pmf import PMF, augmented
from metarun.backbones.conv4 import Conv4
from metarun.errors import ConfigError
from metarun.inner_loops.adam import Adam
from metarun.nn.frozen import Frozen
from metarun.tasks.spec import TaskSpec

pytestmark = pytest.mark.quick
SHAPE = (1, 16, 16)
STEPS, RATE = 4, 0.003


def pmf(**settings: object) -> PMF:
    backbone = Conv4(SHAPE, width=8, norm="running")
    for layer in backbone.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.uniform_(-0.2, 0.2)
    return PMF(backbone, Adam(RATE, 0, test_steps=STEPS, beta1=0.9), **settings).eval()


def one_changed(image: Tensor, numbers: list[float]) -> Tensor:
    """DiffAugment's colour and translation of one image [C, H, W]: loops over pixels."""
    brightness, saturation, contrast, down, right = numbers
    image = image + 0.25 * (brightness - 0.5)
    grey = image.mean(0)
    image = torch.stack([(channel - grey) * (saturation * 2) + grey for channel in image])
    image = (image - image.mean()) * (contrast + 0.5) + image.mean()
    most = round(0.125 * image.shape[1])
    moved, rows, columns = torch.zeros_like(image), *image.shape[1:]
    by = [int(number * (2 * most + 1)) - most for number in (down, right)]
    for row in range(rows):
        for column in range(columns):
            if 0 <= row + by[0] < rows and 0 <= column + by[1] < columns:
                moved[:, row, column] = image[:, row + by[0], column + by[1]]
    return moved


def expected_images(images: Tensor, step: int, probability: float) -> Tensor:
    """The images [S, C, H, W] of a step."""
    random = torch.Generator().manual_seed(step)
    changes, mirrors = torch.rand(2, generator=random).tolist()
    if changes >= probability:
        return images
    images = images.flip(3) if mirrors < 0.5 else images
    numbers = torch.rand(len(images), 5, generator=random).tolist()
    return torch.stack([one_changed(*pair) for pair in zip(images, numbers, strict=True)])


def logits_of(net: nn.Module, support: Tensor, targets: Tensor, x: Tensor, scale: float) -> Tensor:
    features, ways = net(support), int(targets.max()) + 1
    means = torch.stack([features[targets == way].mean(0) for way in range(ways)])
    return scale * F.cosine_similarity(net(x).unsqueeze(1), means.unsqueeze(0), dim=-1)


@pytest.mark.parametrize("augment", [0.9, 0.0])
def test_fine_tuning_is_that_of_a_plain_loop(float64: None, augment: float):
    algorithm, tasks = pmf(augment=augment), episodes_of(tasks=2)
    state = copy.deepcopy(algorithm.state_dict())
    with torch.no_grad():
        found = algorithm.predict(algorithm.adapt(tasks), tasks.query_x)
        *_, last = algorithm.trajectory(tasks)
        torch.testing.assert_close(algorithm.predict(last, tasks.query_x), found)
    for task in range(2):
        net = copy.deepcopy(algorithm.backbone)
        support, targets = tasks.support_x[task], tasks.support_y[task]
        optimizer = torch.optim.Adam(net.parameters(), RATE)
        for step in range(STEPS):
            optimizer.zero_grad()
            queries = expected_images(support, step, augment)
            F.cross_entropy(logits_of(net, support, targets, queries, 10.0), targets).backward()
            optimizer.step()
        expected = logits_of(net, support, targets, tasks.query_x[task], 10.0)
        torch.testing.assert_close(found[task], expected, rtol=1e-6, atol=1e-8)
    assert all(torch.equal(value, state[name]) for name, value in algorithm.state_dict().items())


def test_most_steps_augment_each_in_another_way(float64: None):
    images = torch.rand(2, 3, 3, 16, 16)
    steps = [augmented(images, step, 0.9) for step in range(50)]
    kept = sum(each is images for each in steps)
    assert 1 <= kept <= 11
    assert not any(torch.equal(a, b) for a, b in itertools.pairwise(steps) if a is not images)
    for task in range(2):
        torch.testing.assert_close(steps[1][task], expected_images(images[task], 1, 0.9))


def test_without_steps_it_is_a_prototypical_network_with_cosines():
    algorithm, tasks = pmf(), episodes_of(tasks=2)
    algorithm.inner_loop.test_steps = 0
    with torch.no_grad():
        adapted = algorithm.adapt(tasks)
        found = algorithm.predict(adapted, tasks.query_x)
        expected = [
            logits_of(algorithm.backbone, support, targets, x, 10.0)
            for support, targets, x in zip(tasks.support_x, tasks.support_y, tasks.query_x, strict=True)
        ]
    assert "params" not in adapted
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_fine_tuned_is_reported():
    frozen = nn.Sequential(Frozen(Conv4(SHAPE, width=8)))
    frozen.features = 8
    with pytest.raises(ConfigError, match=r"^algorithm=pmf: fine-tunes the backbone, which is frozen"):
        PMF(frozen, Adam(RATE))
    with pytest.raises(ConfigError, match=r"^algorithm=pmf: is for images, and this dataset has vectors"):
        PMF.check_tasks(TaskSpec((5,)))
    with pytest.raises(ConfigError, match=r"^algorithm\.augment=2: must be from 0 to 1"):
        pmf(augment=2)
