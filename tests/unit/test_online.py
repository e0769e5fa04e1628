"""Streams of tasks, and the learners that follow them, against a plain loop."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.stream_references import fine_tuned, meta_update
from torch import nn

from metarun.algorithms.maml import MAML
from metarun.backbones.conv4 import Conv4
from metarun.backbones.mlp import MLP
from metarun.datasets.rainbow import COLOURS, MOST_TASKS, StreamTask, changed, rainbow
from metarun.errors import ConfigError, DataError
from metarun.inner_loops.sgd import SGD
from metarun.reporting.online import smoothed
from metarun.tasks.class_store import ClassStore
from metarun.training.online import Followers, OnlineLearner, OnlineSettings

pytestmark = pytest.mark.quick

SETTINGS = OnlineSettings(batch=4, meta_steps=2, meta_batch=3, minibatch=3, lr=0.01, seed=0)
RATE, STEPS = 0.3, 2


def stream(tasks: int = 3, images: int = 8) -> list[StreamTask]:
    torch.manual_seed(1)

    def labels(count: int) -> torch.Tensor:
        return torch.randint(3, (count,))

    return [
        StreamTask(str(t), torch.randn(images, 5), labels(images), torch.randn(6, 5), labels(6))
        for t in range(tasks)
    ]


def maml() -> MAML:
    torch.manual_seed(0)
    return MAML(MLP((5,), hidden=(4,)), SGD(RATE, STEPS), outputs=3)


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", ["ftml", "joint", "scratch"])
def test_learners_are_a_plain_loop(kind: str, monkeypatch: pytest.MonkeyPatch):
    tasks, given = stream(), []
    original = OnlineLearner.minibatches

    def recorded(self, *arguments):
        given.append(original(self, *arguments))
        return given[-1]

    monkeypatch.setattr(OnlineLearner, "minibatches", recorded)
    learner = OnlineLearner(kind, maml(), 3, SETTINGS)
    net = nn.Sequential(
        *(copy.deepcopy(part) for part in (learner.start.learner.backbone, learner.start.learner.head))
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for arrived in (4, 8):
        learner.learn(tasks, arrived)
    steps = STEPS if kind == "ftml" else 0
    for each in given:
        rows = list(zip(each.support_x, each.support_y, each.query_x, each.query_y, strict=True))
        meta_update(net, optimizer, rows, RATE, steps)
    own = fine_tuned(net, dict(net.named_parameters()), tasks[2].x[:8], tasks[2].y[:8], RATE, STEPS)
    for adapts, weights in ((True, own), (False, dict(net.named_parameters()))):
        expected = torch.func.functional_call(net, weights, (tasks[2].test_x,))
        torch.testing.assert_close(learner.predict(tasks[2], 8, adapts), expected)


@pytest.mark.parametrize("kind", ["ftml", "scratch"])
def test_minibatches_are_of_what_has_arrived(kind: str):
    tasks = stream()
    learner = OnlineLearner(kind, maml(), 3, SETTINGS)
    owners = {tuple(x.tolist()): (t, i) for t, task in enumerate(tasks) for i, x in enumerate(task.x)}
    seen = set()
    for _ in range(60):
        found = learner.minibatches(tasks, 4)
        for x, y in ((found.support_x, found.support_y), (found.query_x, found.query_y)):
            for example, label in zip(x.flatten(0, 1), y.flatten(), strict=True):
                t, i = owners[tuple(example.tolist())]
                assert tasks[t].y[i] == label
                seen.add((t, i))
    of_last = {(2, i) for i in range(4)}
    assert seen == (of_last if kind == "scratch" else of_last | {(t, i) for t in (0, 1) for i in range(8)})


def follow(names: list[str], tasks: list[StreamTask]) -> list[dict]:
    followers = Followers(names, maml(), 3, SETTINGS)
    return [row for _ in tasks for row in followers.next_task(tasks)]


def test_a_stream_is_followed():
    names = ["ftml", "joint", "everything", "scratch"]
    rows = follow(names, stream())
    assert [(row["task"], row["images"], row["learner"]) for row in rows] == [
        (task, images, name) for task in range(3) for images in (4, 8) for name in names
    ]
    alone = follow(["scratch"], stream()[2:])
    assert len(alone) == 2 and {row["task"] for row in alone} == {0}
    again = follow(["everything", "ftml"], stream())
    assert [row for row in rows if row["learner"] == "ftml"] == [
        row for row in again if row["learner"] == "ftml"
    ]


def test_images_of_a_stream():
    torch.set_default_dtype(torch.float32)
    image = torch.zeros(1, 1, 8, 8)
    image[..., 0, :4] = 1
    whole = changed(image, 1, 1.0, 1)
    background = torch.tensor(COLOURS[1])
    assert (whole[0, :, 4:, 0] == 1).all()  # a quarter turn anticlockwise: the top left is at the bottom left
    assert (whole[0, :, :, 5] == background[:, None]).all()
    small = changed(torch.ones(1, 1, 8, 8), 1, 0.5, 0)
    assert (small[0, :, 2:6, 2:6] == 1).all() and small[0].sum() == 3 * 16 + 48 * background.sum()

    items = torch.arange(120, dtype=torch.uint8).view(120, 1, 1, 1).expand(120, 1, 8, 8).contiguous()
    store = ClassStore(items, [40, 40, 40], list("abc"), "digits train")
    tasks = rainbow(store, classes=2, tasks=5, images=10, test_images=6, seed=0)
    found = [round(255 * level) for task in tasks for level in levels_of(task)]
    assert len(set(found)) == len(found) == 50 and max(found) < 80  # of two classes, none twice
    labels = torch.cat([task.y for task in tasks])
    assert labels.tolist() == [number // 40 for number in found]
    assert len({task.name for task in tasks}) == 5
    with pytest.raises(ConfigError, match=rf"^tasks=57: there are {MOST_TASKS} combinations"):
        rainbow(store, 2, 57, 1, 1, 0)
    with pytest.raises(DataError, match=r"^tasks=5 with 10 \+ 7 images each need 85 images: 2 classes"):
        rainbow(store, 2, 5, 10, 7, 0)
    with pytest.raises(DataError, match=r"^classes=4: digits train has 3"):
        rainbow(store, 4, 1, 1, 1, 0)


def levels_of(task: StreamTask) -> list[float]:
    """The grey level of the stroke in the middle of each image, from the channel that shows it best."""
    colour = COLOURS[int(task.name.split(",")[0].split()[1])]
    channel = colour.index(min(colour))
    return ((task.x[:, channel, 4, 4] - colour[channel]) / (1 - colour[channel])).tolist()


def test_smoothed_values_leave_out_what_is_missing():
    nan = float("nan")
    found = smoothed(torch.tensor([nan, 2.0, 4.0, nan, 6.0, 8.0, 10.0]).numpy())
    assert str(found[0]) == "nan" and found[1:].tolist() == [2, 3, 3, 4, 5, 7]


@pytest.mark.parametrize("norm", ["task", "support"])
def test_a_test_image_is_normalised_by_the_images_that_have_arrived(norm: str):
    torch.manual_seed(0)
    images, labels = torch.rand(14, 1, 8, 8), torch.arange(14) % 3
    backbone = Conv4((1, 8, 8), width=4, halvings=2, norm=norm)
    learner = OnlineLearner("ftml", MAML(backbone, SGD(RATE, STEPS), outputs=3), 3, SETTINGS)
    task = StreamTask("0", images[:8], labels[:8], images[8:], labels[8:])
    alone = StreamTask("0", images[:8], labels[:8], images[8:9], labels[8:9])
    for adapts in (True, False):
        torch.testing.assert_close(learner.predict(task, 8, adapts)[:1], learner.predict(alone, 8, adapts))
    assert not torch.allclose(learner.predict(task, 8, False), learner.predict(task, 4, False))
