"""The outer optimizer and its schedule: built from settings, refused early, and resumed exactly."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import optim
from torch.optim import lr_scheduler

from metarun.config.check import check_group, check_node
from metarun.config.optimizing import build_optimizer, build_scheduler, try_out
from metarun.errors import ConfigError, is_out_of_memory
from metarun.tasks.objectives import ACCURACY, MSE
from metarun.training import checkpoint
from metarun.training.checkpoint import load_optimizer
from metarun.training.hardware import Hardware
from metarun.training.trainer import needs_score

WARM_UP = {"_target_": "torch.optim.lr_scheduler.LinearLR", "start_factor": 0.25, "total_iters": 4}
COSINE = {"_target_": "torch.optim.lr_scheduler.CosineAnnealingLR", "T_max": 8}
# Settings of every scheduler of PyTorch that needs no function.
SCHEDULERS = {
    "StepLR": {"step_size": 3},
    "MultiStepLR": {"milestones": [2, 7]},
    "ConstantLR": {},
    "LinearLR": {},
    "ExponentialLR": {"gamma": 0.9},
    "PolynomialLR": {"total_iters": 9, "power": 2.0},
    "CosineAnnealingLR": {"T_max": 5},
    "CosineAnnealingWarmRestarts": {"T_0": 3},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.1, "step_size_up": 3},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 12},
    "ReduceLROnPlateau": {"patience": 1},
    "SequentialLR": {"schedulers": [WARM_UP, COSINE], "milestones": [4]},
    "ChainedScheduler": {"schedulers": [WARM_UP, COSINE]},
}
UNUSABLE = {"LBFGS", "SparseAdam", "Optimizer"}
OPTIMIZERS = sorted(name for name in optim.__all__ if isinstance(getattr(optim, name), type))


def settings(optimizer: dict, scheduler: dict | None = None) -> SimpleNamespace:
    return SimpleNamespace(optimizer=optimizer, scheduler=scheduler, iterations=12)


def node(name: str, **own) -> dict:
    return {"_target_": f"torch.optim.{name}", **own}


def test_all_schedulers_are_tried_here():
    functions = {"LambdaLR", "MultiplicativeLR", "LRScheduler"}
    assert set(lr_scheduler.__all__) - functions == set(SCHEDULERS)


class Session:
    """One weight with its optimizer and schedule, trained on gradients that depend on the step."""

    def __init__(self, optimizer: dict, scheduler: dict) -> None:
        check_node("scheduler", OmegaConf.create(scheduler))
        self.weight = torch.ones(2, 2, requires_grad=True)
        self.optimizer = build_optimizer(optimizer, [self.weight], Hardware("cpu"))
        self.scheduler = build_scheduler(scheduler, self.optimizer, ACCURACY)

    def steps(self, start: int, end: int) -> list:
        seen = []
        for step in range(start, end):
            self.weight.grad = torch.full((2, 2), 1.0 / (step + 1))
            self.optimizer.step()
            self.scheduler.step(*[0.5] if needs_score(type(self.scheduler)) else [])
            group = self.optimizer.param_groups[0]
            seen.append([group["lr"], group.get("momentum"), group.get("betas"), self.weight.tolist()])
        return seen


@pytest.mark.parametrize(
    "optimizer, scheduler",
    [("Adam", name) for name in SCHEDULERS]
    + [(name, "SequentialLR") for name in OPTIMIZERS if name not in UNUSABLE | {"Adam"}],
)
def test_it_resumes_exactly(tmp_path: Path, optimizer: str, scheduler: str):
    nodes = node(optimizer, lr=0.05), node(f"lr_scheduler.{scheduler}", **SCHEDULERS[scheduler])
    whole = Session(*nodes)
    expected = whole.steps(0, 12)
    first, second = Session(*nodes), Session(*nodes)
    assert first.steps(0, 5) == expected[:5]
    state = {"optimizer": first.optimizer.state_dict(), "scheduler": first.scheduler.state_dict()}
    checkpoint.save(tmp_path / "state.pt", checkpoint.to_cpu({**state, "weight": first.weight}))
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    second.weight.data.copy_(loaded["weight"])
    load_optimizer(second.optimizer, loaded["optimizer"])
    second.scheduler.load_state_dict(loaded["scheduler"])
    assert second.steps(5, 12) == expected[5:]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_schedule_is_tried_out_to_its_end(scheduler: str):
    scheduled = node(f"lr_scheduler.{scheduler}", **SCHEDULERS[scheduler])
    only_rate = try_out(settings(node("Adam", lr=0.05), scheduled), ACCURACY, Hardware("cpu"))
    assert only_rate == (scheduler not in ("CyclicLR", "OneCycleLR"))  # these change betas, too


def test_a_warm_up_before_a_cosine_is_what_its_formula_says():
    session = Session(node("SGD", lr=1.0), node("lr_scheduler.SequentialLR", **SCHEDULERS["SequentialLR"]))
    rates = torch.tensor([row[0] for row in session.steps(0, 12)])
    warm = [0.25 + 0.75 * (step + 1) / 4 for step in range(3)]
    cosine = [(1 + torch.cos(torch.tensor(torch.pi * step / 8))) / 2 for step in range(9)]
    assert torch.allclose(rates, torch.tensor([*warm, *cosine]))


@pytest.mark.parametrize("metric, mode", [(ACCURACY, "max"), (MSE, "min")])
def test_a_plateau_is_of_the_score_in_its_own_direction(metric, mode: str):
    optimizer = optim.SGD([torch.ones(1)], lr=1.0)
    plateau = node("lr_scheduler.ReduceLROnPlateau")
    assert build_scheduler(plateau, optimizer, metric).mode == mode
    assert build_scheduler({**plateau, "mode": "min"}, optimizer, metric).mode == "min"


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_that_cannot_be_used_are_refused_before_training(name: str):
    chosen = settings(node(name, lr=0.1) if name != "Optimizer" else node(name, defaults={}))
    if name not in UNUSABLE:
        assert try_out(chosen, ACCURACY, Hardware("cpu"))
        return
    with pytest.raises(ConfigError, match=f"optimizer._target_=torch.optim.{name}: cannot be used"):
        try_out(chosen, ACCURACY, Hardware("cpu"))


@pytest.mark.parametrize(
    "name, own, message",
    [
        ("CosineAnnealingLR", {"T_max": 0}, "cannot be used with T_max=0 "),
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 11}, "specified number of total steps is 11"),
        ("ExponentialLR", {"gamma": -1.0}, "the learning rate is -0.1 after iteration 1"),
        ("ExponentialLR", {"gamma": 1e300}, "the learning rate is inf after iteration 2"),
        ("LambdaLR", {"lr_lambda": 0.9}, "not callable"),
        ("SequentialLR", {"schedulers": [COSINE], "milestones": [3, 4]}, "expects number of schedulers"),
        (
            "SequentialLR",
            {"schedulers": [{**COSINE, "T_max": 0}, COSINE], "milestones": [3]},
            "modulo by zero",
        ),
        ("ChainedScheduler", {"schedulers": [node("lr_scheduler.ReduceLROnPlateau")]}, "cannot be nested"),
    ],
)
def test_impossible_schedules_are_refused_in_one_line(name: str, own: dict, message: str):
    chosen = settings(node("Adam", lr=0.1), node(f"lr_scheduler.{name}", **own))
    with pytest.raises(ConfigError, match=message) as refused:
        try_out(chosen, ACCURACY, Hardware("cpu"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "own, message",
    [
        ({"schedulers": 5, "milestones": [3]}, "schedulers=5: must be a list of classes"),
        ({"schedulers": [{"T_max": 5}], "milestones": [3]}, "must be a list of classes"),
        (
            {"schedulers": [{"_target_": "torch.nn.Linear"}], "milestones": [3]},
            r"schedulers\.0\._target_=.*not a",
        ),
        (
            {"schedulers": [{**COSINE, "T_mx": 1}], "milestones": [3]},
            r"schedulers\.0\.T_mx.*did you mean 'T_max'",
        ),
        ({"schedulers": [COSINE], "milestones": ["x"]}, "milestones=.*: must be a list of whole numbers"),
    ],
)
def test_nested_schedulers_are_checked(own: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        check_node("scheduler", OmegaConf.create(node("lr_scheduler.SequentialLR", **own)))


@pytest.mark.parametrize(
    "key, word, suggestion",
    [
        ("scheduler", "cosine", "as in +scheduler._target_=torch.optim.lr_scheduler.CosineAnnealingLR"),
        ("scheduler", 5, "scheduler=5: is a group of settings; set scheduler._target_"),
        ("optimizer", "sgd", "as in optimizer._target_=torch.optim.SGD"),
        ("optimizer", None, "optimizer=null: is a group of settings; set optimizer._target_"),
    ],
)
def test_a_word_instead_of_a_class(key: str, word: object, suggestion: str):
    with pytest.raises(ConfigError) as refused:
        check_group(key, word, required=key == "optimizer")
    assert suggestion in str(refused.value)


def test_a_captured_step_is_only_for_schedules_of_the_rate():
    """Other options that a schedule changes would be constants in a CUDA graph."""
    gpu = SimpleNamespace(graph=True, device=torch.device("cuda"))
    weight = torch.ones(2, requires_grad=True)
    for name in ("Adam", "SGD"):
        group = build_optimizer(node(name, lr=0.1), [weight], gpu, capturable=False).param_groups[0]
        assert not group.get("capturable", group.get("fused"))


OUT_OF_MEMORY = [
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"
    ),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("std::bad_alloc"),
    RuntimeError("bad allocation"),
    RuntimeError("unable to mmap 1024 bytes from file </x>: Cannot allocate memory (12)"),
    RuntimeError("can't start new thread"),
    RuntimeError("Storage size calculation overflowed with sizes=[2147483648, 2147483648]"),
    ValueError("array is too big; `arr.size * arr.dtype.itemsize` is larger than the maximum possible size."),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    MemoryError("Unable to allocate 3.64 TiB for an array with shape (1, 2) and data type float64"),
    OSError(12, "Cannot allocate memory"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_out_of_memory_in_all_its_wordings(error: Exception):
    assert is_out_of_memory(error)


def test_other_errors_are_not_out_of_memory():
    for error in (RuntimeError("expected 2 dimensions"), OSError(28, "No space left"), ConfigError("memory")):
        assert not is_out_of_memory(error)
