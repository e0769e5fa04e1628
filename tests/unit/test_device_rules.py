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
from helpers.methods import BACKBONES, METHODS, episodes_of
from torch import Tensor

from metarun.algorithms.base import Algorithm
from metarun.algorithms.protonet import ProtoNet
from metarun.episodes import Episodes
from metarun.hardware import Hardware

pytestmark = pytest.mark.quick

#: Methods of each kind that run a network with the weights of each task, for the other lowerings.
PER_TASK = ("maml", "cavia", "maml_plus_plus", "meta_networks")
CASES = [(name, "grouped") for name in METHODS]
CASES += [(name, how) for name in PER_TASK for how in ("unfold", "vmap", "loop")]


@pytest.fixture(autouse=True)
def no_autocast_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch has no autocast for `meta`; where it is switched off for a solver, nothing is lost."""
    autocast = torch.autocast

    def replaced(device_type: str, *args, **settings):
        if device_type == "meta":
            return contextlib.nullcontext()
        return autocast(device_type, *args, **settings)

    monkeypatch.setattr(torch, "autocast", replaced)


def without_values(algorithm: Algorithm, lowering: str) -> Algorithm:
    """The algorithm on the meta device, its networks run by a lowering."""
    Hardware("cpu", lowering=lowering).place(algorithm)
    vars(algorithm).pop("noise", None)  # VERSA's samples are fixed for the references, on the CPU
    return algorithm.to("meta")


def everything_of(algorithm: Algorithm) -> list[Tensor]:
    """What one meta-gradient, and one adaptation and prediction in evaluation, give on meta episodes."""
    episodes = Episodes(*(tensor.to("meta") for tensor in episodes_of().tensors()))
    algorithm.advance(0)
    loss, outputs = algorithm.train().meta_loss(episodes)
    params = [p for p in algorithm.parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, params, allow_unused=True)
    with torch.no_grad():
        adapted = algorithm.eval().adapt(episodes.support_x, episodes.support_y, episodes.ways)
        predictions = algorithm.predict(adapted, episodes.query_x)
    return [loss, outputs, predictions, *(grad for grad in grads if grad is not None)]


@pytest.mark.parametrize(("name", "lowering"), CASES)
def test_tensors_are_on_one_device_and_never_read(name: str, lowering: str):
    algorithm = without_values(METHODS[name].build(BACKBONES["conv4"](), 2), lowering)
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
        everything_of(without_values(kind(BACKBONES["conv4"]()), "grouped"))
