"""The outer optimizer and its learning rate schedule, built from settings and tried out before training."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hydra.utils import get_class
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from metarun.config.build import instantiate, parameters_of
from metarun.config.schema import Node, TrainConfig
from metarun.errors import ConfigError, MetarunError, first_line
from metarun.tasks.objectives import Metric
from metarun.training.hardware import Hardware
from metarun.training.trainer import needs_score

MOST_STEPS = 1_000_000  # of a schedule that are tried out, which takes about three seconds


def build_optimizer(
    node: Node, parameters: list[Tensor], hardware: Hardware, capturable: bool = True
) -> Optimizer:
    """Build the outer optimizer, fused and ready for a CUDA graph if that is possible.

    Args:
        node: the class and its settings; settings in it have precedence.
        parameters: the meta-parameters.
        hardware: whether steps are captured as a CUDA graph.
        capturable: whether its step may be part of the graph.
    """
    known = parameters_of(node)
    graph = hardware.graph and hardware.device.type == "cuda"
    captured = graph and capturable
    wanted = ["capturable"] if captured else []
    # In a run with graphs, a fused optimizer would be captured (`Hardware.captures_optimizer`).
    if not (node.get("foreach") or node.get("differentiable")) and captured == graph:
        wanted.append("fused")
    chosen: dict[str, Any] = {name: True for name in wanted if name in known and name not in node}
    if captured and chosen and "lr" in node:
        # A tensor: a captured graph reads its current value, which a scheduler may change.
        chosen["lr"] = torch.tensor(float(node["lr"]), device=hardware.device)
    return instantiate(node, "optimizer", params=parameters, **chosen)


def build_scheduler(node: Node, optimizer: Optimizer, metric: Metric, path: str = "scheduler") -> LRScheduler:
    """Build a scheduler, and first the schedulers nested in it (SequentialLR, ChainedScheduler).

    Args:
        node: the class and its settings. Nested schedulers are nodes in the list `schedulers`.
        optimizer: the optimizer whose learning rate it changes.
        metric: the main metric; ReduceLROnPlateau waits for it to rise or to fall, unless `mode` is set.
        path: where the node is in the config, for messages.
    """
    passed: dict[str, Any] = {"optimizer": optimizer}
    known = parameters_of(node)
    if needs_score(get_class(node["_target_"])) and "mode" in known and "mode" not in node:
        passed["mode"] = "max" if metric.higher_is_better else "min"
    if "schedulers" in known:
        nested = node["schedulers"]
        if waiting := [each["_target_"] for each in nested if needs_score(get_class(each["_target_"]))]:
            raise ConfigError(
                f"{path}.schedulers: {waiting[0]} needs the validation score and cannot be nested; "
                "choose it as the only scheduler"
            )
        passed["schedulers"] = [
            build_scheduler(each, optimizer, metric, f"{path}.schedulers.{number}")
            for number, each in enumerate(nested)
        ]
        node = {key: value for key, value in node.items() if key != "schedulers"}
    return instantiate(node, path, **passed)


def try_out(settings: TrainConfig, metric: Metric, hardware: Hardware) -> bool:
    """Run the optimizer once and the schedule to its end, on one weight.

    Args:
        settings: the settings of the run.
        metric: the main metric.
        hardware: the device of the optimizer.

    Returns:
        Whether the optimizer's step may be captured: a captured step reads the current learning rate, but
        not other options that a schedule changes, such as the momentum.

    Raises:
        ConfigError: if the optimizer or the scheduler cannot be built or run with these settings.
    """
    with errors_of("optimizer", settings.optimizer):
        weight = torch.ones(2, 2, device=hardware.device, dtype=hardware.dtype, requires_grad=True)
        weight.grad = torch.ones_like(weight)
        build_optimizer(settings.optimizer, [weight], hardware).step()
    if not settings.scheduler:
        return True
    with errors_of("scheduler", settings.scheduler), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "step() before optimizer.step()"
        # Built on the CPU, and without the options of the device, where a step takes microseconds.
        optimizer = instantiate(settings.optimizer, "optimizer", params=[torch.ones(2, 2)])
        scheduler = build_scheduler(settings.scheduler, optimizer, metric)
        return run_schedule(optimizer, scheduler, min(settings.iterations, MOST_STEPS))


def run_schedule(optimizer: Optimizer, scheduler: LRScheduler, iterations: int) -> bool:
    """Run a schedule to its end; returns whether it changes nothing but the learning rate.

    Raises:
        ConfigError: if a learning rate is negative or not finite.
    """
    group = optimizer.param_groups[0]
    plain = (bool, int, float, tuple)
    before = {key: value for key, value in group.items() if key != "lr" and isinstance(value, plain)}
    step: Callable[..., None] = scheduler.step
    score = [0.0] if needs_score(type(scheduler)) else []
    only_rate = True
    for iteration in range(iterations + 1):
        if not 0 <= float(group["lr"]) < math.inf:  # also rejects NaN
            raise ConfigError(
                f"scheduler: the learning rate is {float(group['lr']):g} after iteration {iteration}; "
                "it must be at least 0 and finite; choose other settings"
            )
        only_rate = only_rate and all(group[key] == value for key, value in before.items())
        if iteration < iterations:
            step(*score)
    return only_rate


@contextlib.contextmanager
def errors_of(group: str, node: Node) -> Iterator[None]:
    """Turn any error of a class of PyTorch, or of the user's, into a ConfigError of one line."""
    try:
        yield
    except MetarunError:
        raise
    except Exception as error:
        own = ", ".join(f"{key}={value}" for key, value in node.items() if key != "_target_")
        raise ConfigError(
            f"{group}._target_={node['_target_']}: cannot be used{own and f' with {own}'} "
            f"({first_line(error)}); choose another class or other settings"
        ) from error
