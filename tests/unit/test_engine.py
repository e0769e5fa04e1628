"""However a step is run, the losses are the same."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers.engines import engine_of, uncompiled
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm
from metarun.algorithms.maml import MAML
from metarun.algorithms.protonet import ProtoNet
from metarun.algorithms.reptile import Reptile
from metarun.backbones.conv4 import Conv4
from metarun.backbones.mlp import MLP
from metarun.errors import TrainingError
from metarun.inner_loops.adam import Adam
from metarun.inner_loops.sgd import SGD
from metarun.tasks.episodes import Episodes, Outcome
from metarun.training.checkpoint import load_optimizer
from metarun.training.compiled import one_fake_mode
from metarun.training.hardware import Hardware
from metarun.training.memory import peak_bytes

SHAPE = (1, 16, 16)


def algorithms(name: str) -> Algorithm:
    torch.manual_seed(1)
    if name == "protonet":
        return ProtoNet(Conv4(SHAPE, 4, norm="running")).double()
    if name == "reptile":
        inner_loop = Adam(0.01, 2, epsilon=1e-3, carry=True)
        return Reptile(Conv4(SHAPE, 4, norm="layer"), inner_loop, 3, batch=4).double()
    if name == "tiny":
        return ProtoNet(MLP(SHAPE, hidden=(4,))).double()
    return MAML(Conv4(SHAPE, 4), SGD(0.1, 2), 3).double()


def episodes() -> Episodes:
    torch.manual_seed(0)
    labels = torch.arange(3).repeat_interleave(2).expand(5, -1)
    x = torch.rand(2, 5, 6, *SHAPE, dtype=torch.float64)
    return Episodes(x[0], labels, x[1], labels, torch.zeros(5, 3, dtype=torch.long))


def losses(name: str, **hardware) -> list[float]:
    """The training losses of four outer steps."""
    algorithm = algorithms(name)
    optimizer = torch.optim.Adam(algorithm.parameters(), lr=0.01)
    engine = engine_of(algorithm, episodes(), optimizer, **hardware)
    assert bool(engine.traced) == (hardware.get("compile", False) is not False)
    found = []
    torch.manual_seed(2)  # Reptile's order
    for _ in range(4):
        engine.running_totals.zero_()
        engine.step()
        loss, score = engine.running_totals.tolist()
        assert 0 <= score <= 5
        found.append(loss)
    return found


@cache
def plain_losses(name: str) -> list[float]:
    return losses(name)


WAYS_TO_RUN = {
    "two tasks at once": {"tasks_at_once": 2},
    "chosen": {"tasks_at_once": "auto"},
    "loop": {"batching": "loop"},
    "unfold": {"batching": "unfold"},
    "channels first": {"channels_last": False},
    "traced": {"compile": "auto"},
}


@pytest.mark.parametrize("how", WAYS_TO_RUN)
@pytest.mark.parametrize("name", ["maml", "protonet", "reptile"])
def test_losses_do_not_depend_on_how_a_step_is_run(name: str, how: str):
    """To 1e-9, relative, over four outer steps in float64."""
    expected = plain_losses(name)
    assert expected[3] < expected[0]
    assert losses(name, **WAYS_TO_RUN[how]) == pytest.approx(expected, rel=1e-9)


def test_a_trace_does_not_need_parts_of_pytorch_that_are_not_public(monkeypatch):
    expected = losses("protonet", compile="auto")
    monkeypatch.delattr("torch._guards.tracing")
    assert isinstance(one_fake_mode(), contextlib.nullcontext)
    assert losses("protonet", compile="auto") == expected


def test_gradients_have_the_memory_layout_of_their_weights():
    """A fused optimizer pairs them up as they lie in memory, and takes another layout without a word."""
    algorithm = algorithms("protonet")
    engine = engine_of(algorithm, episodes())
    engine.backward(next(engine.draws))
    for p in engine.params:
        assert p.grad.stride() == p.stride()


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs a C++ compiler (g++)")
@pytest.mark.long
@pytest.mark.parametrize("name", ["tiny", "maml", "protonet", "reptile"])
def test_the_compiled_gradient_gives_the_same_losses(name: str):
    """A small network, second derivatives, running averages and random numbers."""
    expected = losses(name, tasks_at_once=5)
    assert losses(name, tasks_at_once=5, compile=True) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("name", ["maml", "protonet", "reptile"])
def test_the_graph_given_to_the_compiler_gives_the_same_losses(name: str, monkeypatch: pytest.MonkeyPatch):
    """All but the compiler itself, which takes half a minute for a network."""
    compiler = uncompiled(monkeypatch)
    assert losses(name, compile=True) == pytest.approx(plain_losses(name), rel=1e-9)
    assert len(compiler) == 1


class Hungry(ProtoNet):
    """Fits `room` tasks into memory."""

    error: Exception = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")

    def __init__(self, room: int) -> None:
        super().__init__(nn.Flatten())
        self.room, self.scale = room, nn.Parameter(torch.ones((), dtype=torch.float64))

    def meta_loss(self, tasks: Episodes) -> Outcome:
        if len(tasks) > self.room:
            raise self.error
        outcome = super().meta_loss(tasks)
        return replace(outcome, loss=outcome.loss * self.scale)


def test_only_what_metarun_knows_is_traced_unasked():
    """A user's class may do what one trace of it does not show."""
    assert engine_of(algorithms("protonet"), episodes(), compile="auto").traced
    assert not engine_of(Hungry(5), episodes(), compile="auto").traced


def test_one_thread_for_tiny_tasks_if_the_number_is_not_set():
    threads = torch.get_num_threads()
    try:
        for hardware, during in ((Hardware("cpu", threads=3), 3), (Hardware("cpu"), 1)):
            torch.set_num_threads(3)
            with hardware.compute():
                hardware.spare_threads(lambda text: None)
                assert torch.get_num_threads() == during
            assert torch.get_num_threads() == 3  # what runs next in this process may not be tiny
        torch.set_num_threads(3)
        engine_of(algorithms("protonet"), episodes(), compile="auto")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_a_backbone_that_views_its_maps_as_vectors_gets_plain_images():
    class Viewing(nn.Module):
        features = 4 * 14 * 14

        def __init__(self) -> None:
            super().__init__()
            self.convolution = nn.Conv2d(1, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.convolution(x).view(len(x), -1)

    for algorithm in (ProtoNet(Viewing()), MAML(Viewing(), SGD(0.1, 1), 3)):
        engine_of(algorithm, episodes()).step()
        engine_of(algorithm.eval(), episodes()).step()


def test_an_optimizer_keeps_what_belongs_to_this_machine():
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    saved = torch.optim.Adam([weight], lr=0.5, foreach=True)
    saved.step()
    mine = torch.optim.Adam([weight], lr=torch.tensor(0.1), fused=True)
    load_optimizer(mine, saved.state_dict())
    (group,) = mine.param_groups
    assert group["fused"]
    assert group["lr"].item() == 0.5
    torch.testing.assert_close(mine.state[weight]["exp_avg"], saved.state[weight]["exp_avg"])
    mine.step()


@pytest.mark.parametrize("error", [Hungry.error, RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_halves_the_tasks_at_once_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, error: Exception
):
    monkeypatch.setattr(Hungry, "error", error)
    said: list[str] = []
    expected = engine_of(Hungry(5), episodes())
    expected.step()
    engine = engine_of(Hungry(2), episodes())
    engine.say = said.append
    engine.step()
    assert engine.at_once == 2
    assert said == [
        "out of memory: continuing with 3 tasks at once",
        "out of memory: continuing with 2 tasks at once",
    ]
    torch.testing.assert_close(engine.running_totals, expected.running_totals)
    torch.testing.assert_close(engine.algorithm.scale, expected.algorithm.scale)


def test_out_of_memory_for_one_task_ends_in_one_line():
    with pytest.raises(TrainingError, match=r"one task at a time .*2 GiB.*lower shots"):
        engine_of(Hungry(0), episodes()).step()


def test_tasks_at_once_follow_the_memory_that_one_needs():
    hardware = Hardware("cpu")
    assert hardware.tasks_at_once(32, lambda: 60 << 20) == 3
    assert hardware.tasks_at_once(32, lambda: 10 << 20) == 25
    assert hardware.tasks_at_once(32, lambda: 1 << 30) == 1
    assert hardware.tasks_at_once(32, lambda: 0) == 32
    assert Hardware("cpu", tasks_at_once=3).tasks_at_once(32, lambda: 0) == 3


def test_measuring_memory_counts_what_is_alive_at_once():
    x = torch.ones(1 << 18)  # 1 MiB, not made by the function

    def three_in_a_row() -> None:
        for _ in range(3):
            (x + 1).mul_(2)  # 1 MiB, freed each time

    def three_together() -> list[Tensor]:
        return [(x + 1).view(-1)[1:] for _ in range(3)]

    cpu = torch.device("cpu")
    assert peak_bytes(three_in_a_row, cpu) == 1 << 20
    assert peak_bytes(three_together, cpu) == 3 << 20
    assert peak_bytes(lambda: x.view(2, -1).relu_(), cpu) == 0


def test_measuring_leaves_weights_averages_and_random_numbers_alone():
    algorithm, tasks = algorithms("protonet"), episodes()
    before = {name: tensor.clone() for name, tensor in algorithm.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    engine_of(algorithm, tasks, tasks_at_once="auto")
    assert torch.equal(torch.rand(2), expected)
    for name, tensor in algorithm.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so(monkeypatch: pytest.MonkeyPatch):
    said: list[str] = []
    algorithm = algorithms("maml")
    engine = engine_of(algorithm, episodes())

    def refuse(*arguments: object) -> None:
        raise RuntimeError("no compiler\nlong story")

    monkeypatch.setattr("metarun.training.step.traced_gradient", refuse)
    engine.hardware.compile = True
    engine.prepare(0, said.append)
    engine.step()
    assert said == ["compilation failed, continuing without: no compiler"]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["maml", "protonet", "reptile"])
def test_a_captured_step_gives_the_losses_of_an_eager_one(name: str):
    """On a GPU: ten steps, three of them before the capture."""
    found = []
    for graph in (False, True):
        algorithm = algorithms(name).cuda()
        rate = torch.tensor(0.01, device="cuda")
        optimizer = torch.optim.Adam(algorithm.parameters(), lr=rate, fused=True, capturable=True)
        engine = engine_of(algorithm, episodes(), optimizer, device="cuda", graph=graph)
        torch.manual_seed(2)
        for _ in range(10):
            engine.step()
        assert (engine.graph is not None) == graph
        found.append(engine.running_totals.tolist())
    assert found[1] == pytest.approx(found[0], rel=1e-6)
