"""Processes that share the tasks of a step end with the weights and the scores of one process."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import in_ranks
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm
from metarun.algorithms.maml import MAML
from metarun.algorithms.mr_maml import MRMAML
from metarun.algorithms.protonet import ProtoNet
from metarun.algorithms.reptile import Reptile
from metarun.algorithms.versa import Versa
from metarun.backbones.conv4 import Conv4
from metarun.errors import ConfigError, RankLost
from metarun.inner_loops.adam import Adam
from metarun.inner_loops.sgd import SGD
from metarun.tasks.class_store import ClassStore
from metarun.tasks.curriculum import PrioritizedReplay
from metarun.tasks.episodes import EpisodeShape
from metarun.training.evaluation import EvalSettings, evaluate
from metarun.training.hardware import Hardware
from metarun.training.interrupts import Requests
from metarun.training.outer_loops import PPO, require_sum
from metarun.training.parallel import Ranks, current, start
from metarun.training.step import OuterStep

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are copied by fork")

SHAPE = EpisodeShape(3, 2, 2)
TASKS = 5  # which two ranks do not share evenly
BYTES = torch.randint(0, 256, (48, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
STORE = ClassStore(BYTES, [8] * 6, list("abcdef"), "made up", fingerprint="x")


def backbone(norm: str) -> nn.Module:
    return Conv4((1, 8, 8), width=4, norm=norm, halvings=2)  # type: ignore[arg-type]


def algorithms() -> dict[str, Algorithm]:
    """Second-order, with random mini-batches and a carried moment, with running averages, with noise."""
    torch.manual_seed(0)
    return {
        "maml": MAML(backbone("batch"), SGD(0.1, 2), 3),
        "reptile": Reptile(backbone("layer"), Adam(0.01, 2, epsilon=1e-3, carry=True), 3, batch=2),
        "protonet": ProtoNet(backbone("running")),
        "versa": Versa(backbone("running")),
        "mr_maml": MRMAML(backbone("layer"), SGD(0.1, 1), 3, weight=0.1, deviation=0.1),
    }


def trained(algorithm: Algorithm, iterations: range = range(3), **how: Any) -> OuterStep:
    """The outer step after some iterations in float64, two tasks at once."""
    hardware = Hardware("cpu", precision="float64", tasks_at_once=2, compile=False)
    hardware.place(algorithm).train()
    optimizer = torch.optim.SGD(algorithm.parameters(), lr=0.1)
    engine = OuterStep(algorithm, optimizer, STORE, SHAPE, TASKS, 0, hardware, **how)
    engine.prepare(iterations.start)
    for _ in iterations:
        engine.step()
    return engine


def everything() -> dict[str, Any]:
    """For each method its state after training, the running totals, the random state, and an evaluation."""
    found = {}
    for name, algorithm in algorithms().items():
        torch.manual_seed(1)
        sampler = PrioritizedReplay(buffer=8) if name == "maml" else None
        engine = trained(algorithm, sampler=sampler)
        seen: list[int] = []
        result = evaluate(algorithm, STORE, EvalSettings(SHAPE, 7, 0), engine.hardware, seen.append, True)
        scores = {"loss": result.losses, **result.scores, "confusion": result.confusion}
        found[name] = {
            "weights": algorithm.state_dict(),
            "totals": engine.running_totals,
            "random": engine.random_state(),
            "scores": {key: value.clone() for key, value in scores.items()},
            "hash": result.episodes_hash,
            "counted": sum(seen),
            "replayed": sampler.state_dict()["scores"] if sampler else torch.empty(0),
        }
    return found


def failing() -> dict[str, Any]:
    """The second rank runs out of memory in its first chunk; then its settings differ, and it ends."""
    ranks, algorithm = current(), algorithms()["protonet"]
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        whole, calls = OuterStep.meta_gradient, iter(range(100))

        def meta_gradient(self: OuterStep, *arguments: Any) -> Any:
            found = whole(self, *arguments)
            if next(calls) == 0 and ranks.rank == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return found

        patch.setattr(OuterStep, "meta_gradient", meta_gradient)
        hardware = Hardware("cpu", precision="float64", tasks_at_once=2, compile=False)
        hardware.place(algorithm).train()
        optimizer = torch.optim.SGD(algorithm.parameters(), lr=0.1)
        engine = OuterStep(algorithm, optimizer, STORE, SHAPE, TASKS, 0, hardware)
        engine.prepare(0, said.append)
        for _ in range(3):
            engine.step()
    with pytest.raises(ConfigError) as differ:
        ranks.require_equal({"seed": ranks.rank}, "start the same command")
    if ranks.rank == 1:
        ranks.is_first_failure("images/3.png: damaged")
        os._exit(7)
    with pytest.raises(RankLost) as lost:
        ranks.any(True)
    return {
        "weights": algorithm.state_dict(),
        "said": said[-1],
        "differ": str(differ.value),
        "lost": str(lost.value),
        "quiet": not ranks.is_first_failure("another"),
    }


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return everything()


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


def test_two_ranks_end_with_the_weights_and_scores_of_one_process(one, tmp_path: Path):
    several = in_ranks(2, tmp_path, everything)
    for name, alone in one.items():
        first, second = (each[name] for each in several)
        for key, value in first["weights"].items():
            assert torch.equal(value, second["weights"][key]), key  # both take the same step
        assert torch.equal(first["random"], second["random"])
        assert first["hash"] == alone["hash"]
        assert first["counted"] == second["counted"] == 7
        assert largest_difference(first["weights"], alone["weights"]) < 1e-12, name
        assert torch.allclose(first["totals"][0], alone["totals"][0], rtol=1e-12)  # the loss
        assert torch.allclose(first["totals"], alone["totals"], rtol=1e-6)  # scores are float32
        assert torch.equal(first["random"], alone["random"]), name
        assert torch.allclose(first["replayed"], alone["replayed"], rtol=1e-10)
        for each in (first, second):
            assert torch.equal(each["scores"]["confusion"], alone["scores"]["confusion"])
            assert largest_difference(each["scores"], alone["scores"]) < 1e-10


def test_the_same_weights_have_the_very_same_scores(one, tmp_path: Path):
    """For any number of ranks, also of methods that draw random numbers; the last rank has few tasks."""

    def scores() -> dict[str, Tensor]:
        found = {}
        for name, algorithm in algorithms().items():
            hardware = Hardware("cpu", tasks_at_once=3, compile=False)
            hardware.place(algorithm)
            result = evaluate(algorithm, STORE, EvalSettings(SHAPE, 8, 0), hardware)
            found[name] = torch.stack([result.losses, result.scores["accuracy"]])
        return found

    alone = scores()
    for each in in_ranks(4, tmp_path, scores):
        assert all(torch.equal(each[name], alone[name]) for name in alone)


def test_a_rank_without_memory_halves_the_tasks_of_all_and_a_lost_one_ends_all(one, tmp_path: Path):
    first, status = in_ranks(2, tmp_path, failing)
    assert status == 7
    assert first["said"] == "out of memory: continuing with 1 task at once"
    assert largest_difference(first["weights"], one["protonet"]["weights"]) < 1e-12
    assert first["differ"] == "seed of rank 1 is 1 and that of rank 0 is 0; start the same command"
    assert first["lost"] == "images/3.png: damaged"  # as the other rank has said
    assert first["quiet"]


def test_shares_differ_by_one_task_at_most():
    parts = [Ranks(rank, 3).share(8) for rank in range(3)]
    assert [list(range(8))[part] for part in parts] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    with pytest.raises(ConfigError, match="meta_batch=2: fewer tasks than the 3 processes"):
        Ranks(0, 3).share(2)


def test_a_machine_with_several_gpus_says_how_to_use_them(monkeypatch: pytest.MonkeyPatch):
    hardware = Hardware("cpu")
    assert not hardware.unused()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    hardware.device = torch.device("cuda")
    assert hardware.unused() == "1 of 4 GPUs is used; `torchrun --nproc-per-node 4 -m metarun ...` uses all"
    hardware.device = torch.device("cuda:1")
    assert not hardware.unused()
    monkeypatch.setenv("LOCAL_RANK", "4")
    joined = Ranks(4, 5, store=object())
    with pytest.raises(ConfigError, match="has 4 GPUs, too few for a process with LOCAL_RANK=4"):
        joined.own_device(torch.device("cuda"))
    with pytest.raises(ConfigError, match="every process of torchrun has a GPU of its own"):
        joined.own_device(torch.device("cuda:1"))


def test_what_cannot_be_shared_is_refused(metarun, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(
        ConfigError, match="outer_loop=ppo: needs the trajectories of all tasks in one process"
    ):
        require_sum(PPO(), Ranks(0, 2), ProtoNet(Conv4((1, 16, 16), width=4)))
    monkeypatch.setenv("RANK", "0")
    missing = metarun("train", status=1).stderr
    assert "the environment sets RANK but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT" in missing
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "-m: the jobs of a sweep run one after the other" in metarun("train", "-m", status=1).stderr
    assert "metarun data runs in one process" in metarun("data", status=1).stderr
    monkeypatch.setenv("RANK", "1")  # the first rank has said so
    assert not metarun("train", "-m", status=1).stderr


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("RANK", "5", "RANK=5: must be below WORLD_SIZE=2"),
        ("RANK", "x", "RANK=x: must be a whole number"),
        ("MASTER_PORT", "abc", "MASTER_PORT=abc: must be a whole number"),
    ],
)
def test_impossible_variables_are_refused_at_once(monkeypatch, name: str, value: str, message: str):
    """Otherwise a process waits for others that cannot come."""
    right = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",
    }
    for variable, own in (right | {name: value}).items():
        monkeypatch.setenv(variable, own)
    with pytest.raises(ConfigError, match=message):
        start()


def test_a_copy_of_a_model_leaves_the_connections_of_its_process_behind():
    """After a run in the same process, a model can be sent to others, as joblib does."""
    hardware = Hardware("cpu")
    requests = Requests()
    requests.handlers = {2: lambda number, frame: None}
    hardware.ranks.hear(requests)
    assert pickle.loads(pickle.dumps(hardware)).ranks is hardware.ranks
    assert copy.deepcopy(hardware).ranks is hardware.ranks
