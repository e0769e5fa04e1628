"""A GPU's rules without a GPU: every tensor on one device, and none read back while a step runs.

On PyTorch's `meta` device tensors have shapes and no values. An operation on tensors of two devices
raises there, and so does anything that needs a value: `.item()`, a branch, a mask of unknown size. On a
GPU the first is an error too, and the second makes every step wait for the device and cannot be part of
a CUDA graph.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers.methods import EVERY_BATCHING, METHODS, episodes_of
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm
from metarun.algorithms.protonet import ProtoNet
from metarun.datasets.augment import Augment
from metarun.tasks.class_store import ClassStore, numbers, pixels, tokens
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.objectives import CLASSIFICATION, REGRESSION, Objective
from metarun.training.hardware import Hardware

pytestmark = pytest.mark.quick

#: "unfold" is what hardware.batching=auto is on a GPU.
CASES = [(name, "unfold") for name in METHODS] + [
    (name, how) for name in EVERY_BATCHING for how in ("grouped", "vmap", "loop")
]


class OneBlock(nn.Sequential):
    """The layers of Conv4, once each: every operation on `meta` takes a millisecond of Python."""

    features = 16

    def __init__(self) -> None:
        norm = nn.BatchNorm2d(4, track_running_stats=False)
        super().__init__(nn.Conv2d(1, 4, 3, padding=1), norm, nn.ReLU(), nn.MaxPool2d(8), nn.Flatten())


@pytest.fixture(autouse=True)
def no_autocast_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has no autocast for `meta`; where it is switched off for a solver, nothing is lost."""
    autocast = torch.autocast

    def replaced(device_type: str, *args, **settings):
        if device_type == "meta":
            return contextlib.nullcontext()
        return autocast(device_type, *args, **settings)

    monkeypatch.setattr(torch, "autocast", replaced)


def without_values(algorithm: Algorithm, batching: str) -> Algorithm:
    """The algorithm on the meta device, its networks run in one way."""
    Hardware("cpu", batching=batching).place(algorithm)
    for name in ("noise", "draws"):
        vars(algorithm).pop(name, None)  # random numbers are fixed for the references, on the CPU
    return algorithm.to("meta")


def everything_of(algorithm: Algorithm) -> list[Tensor]:
    """What one meta-gradient, and one adaptation and prediction in evaluation, give on meta episodes.

    They are as small as they can be, because loops over tasks and examples repeat the same operations.
    """
    episodes = episodes_of(tasks=2, shots=1, queries=1).map(lambda tensor: tensor.to("meta"))
    algorithm.on_step_start(0)
    outcome = algorithm.train().meta_loss(episodes)
    params = [p for p in algorithm.parameters() if p.requires_grad]
    grads = torch.autograd.grad(outcome.loss.mean(), params, allow_unused=True)
    with torch.no_grad():
        adapted = algorithm.eval().adapt(episodes)
        predictions = algorithm.predict(adapted, episodes.query_x)
    made = [outcome.loss, outcome.outputs, predictions, *outcome.scores.values()]
    return made + [grad for grad in grads if grad is not None]


@pytest.mark.parametrize(("name", "batching"), CASES)
def test_tensors_are_on_one_device_and_never_read(name: str, batching: str):
    algorithm = without_values(METHODS[name].build(OneBlock(), 2), batching)
    for tensor in everything_of(algorithm):
        assert tensor.device.type == "meta"


class ReadsBack(ProtoNet):
    def score(self, adapted: Tensor, features: Tensor) -> Tensor:
        scores = super().score(adapted, features)
        return scores / scores.abs().max().item()


class Mixes(ProtoNet):
    def score(self, adapted: Tensor, features: Tensor) -> Tensor:
        scores = super().score(adapted, features)
        return scores + torch.ones(scores.shape[-1])


@pytest.mark.parametrize("kind", [ReadsBack, Mixes])
def test_what_breaks_the_rules_is_noticed(kind: type[ProtoNet]):
    with pytest.raises(RuntimeError, match=r"meta|device"):
        everything_of(without_values(kind(OneBlock()), "grouped"))


@pytest.mark.parametrize("decode", [pixels, tokens, numbers])
def test_sampling_and_gathering_keep_these_rules(decode):
    """Choices are drawn by the CPU's generator; what is done with them is done on the device."""
    items = torch.zeros(24, 3, 8, 8, dtype=torch.uint8) if decode is pixels else torch.ones(24, 5)
    store = ClassStore(items, [4, 8, 6, 6], list("abcd"), "made up", fingerprint="x", decode=decode)
    if decode is pixels:
        store.augment = Augment(rotation=10.0)
    shape = EpisodeShape(3, 1, 2)
    draw = store.draw(2, shape, torch.Generator().manual_seed(0))
    there = store.with_items(items.to("meta"))
    episodes = there.gather(tuple(tensor.to("meta") for tensor in draw), shape)
    assert episodes.support_x.shape == (2, 3, *items.shape[1:])
    devices = {tensor.device.type for tensor in (episodes.query_x, episodes.query_y, episodes.classes)}
    assert devices == {"meta"}


@pytest.mark.parametrize("objective", [CLASSIFICATION, REGRESSION])
def test_losses_and_metrics_keep_these_rules(objective: Objective):
    outputs = torch.zeros(2, 6, 3, device="meta")
    whole = torch.zeros(2, 6, dtype=torch.long, device="meta")
    targets = whole if objective is CLASSIFICATION else torch.zeros(2, 6, 3, device="meta")
    for score in (objective.loss, *(metric.score for metric in objective.available)):
        assert score(outputs, targets).shape == (2,)


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_the_precision_of_the_process_is_restored(monkeypatch: pytest.MonkeyPatch, precision: str):
    """Set for a computation on a GPU, and restored after it; also if it fails."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    hardware = Hardware("cpu")
    hardware.device, hardware.precision = torch.device("cuda"), precision
    torch.set_float32_matmul_precision("medium")
    try:
        with contextlib.suppress(ZeroDivisionError), hardware.compute():
            allowed = precision == "tf32"
            assert torch.get_float32_matmul_precision() == ("high" if allowed else "highest")
            assert torch.backends.cudnn.allow_tf32 is allowed
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.allow_tf32 is True
    finally:
        torch.set_float32_matmul_precision("highest")
