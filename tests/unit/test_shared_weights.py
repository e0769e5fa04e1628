"""All tasks in one pass of a network with the same weights, against one task after another."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from metarun.backbones.conv4 import Conv4
from metarun.backbones.conv4_joined import Conv4Joined
from metarun.backbones.resnet12 import DropBlock, ResNet12
from metarun.nn.layers import StepNorm, move_average
from metarun.nn.per_task import TaskBatching
from metarun.nn.shared_weights import run_shared, runs_at_once

FIRST = TaskBatching(channels_last=False)


pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("float64")]


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "conv4": lambda: Conv4((3, 16, 16), width=4, norm="running"),
    "conv4, batch": lambda: Conv4((3, 16, 16), width=4, norm="batch"),
    "conv4, shift": lambda: Conv4((3, 16, 16), width=4, norm="batch_shift"),
    "conv4, one channel": lambda: Conv4((1, 16, 16), width=4, downsample="stride", norm="running"),
    "resnet12": lambda: ResNet12((3, 16, 16), widths=(4, 4, 6, 8), drop_rate=0.0, norm="running"),
    "joined": lambda: Conv4Joined((3, 16, 16), widths=(4, 4, 6, 8), drop_rate=0.0, norm="running"),
    "no weights": lambda: nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.Flatten()),
}


def by_loop(network: nn.Module, x: Tensor) -> Tensor:
    return torch.stack([network(task) for task in x])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batching", [FIRST, TaskBatching(channels_last=True)])
@pytest.mark.parametrize("name", NETWORKS)
def test_one_pass_is_the_loop(name: str, batching: TaskBatching, training: bool):
    """Outputs, gradients and running averages, after two batches; in any memory layout."""
    network = NETWORKS[name]().train(training)
    channels = 1 if "one" in name else 3
    reference = copy.deepcopy(network)
    for _ in range(2):
        x = torch.randn(3, 5, channels, 16, 16)
        x, again = x.clone().requires_grad_(), x.requires_grad_()
        y, expected = run_shared(network, x, batching), by_loop(reference, again)
        torch.testing.assert_close(y, expected)
        weights = torch.randn_like(y)
        (y * weights).sum().backward()
        (expected * weights).sum().backward()
        torch.testing.assert_close(x.grad, again.grad)
    for p, q in zip(network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert network.state_dict().keys() == reference.state_dict().keys()
    for name, found in network.state_dict().items():
        torch.testing.assert_close(found, reference.state_dict()[name])


def test_blocks_are_dropped_and_made_up_for_task_by_task():
    """What is left of each task is scaled up by its own share."""
    x = torch.ones(3, 5, 4, 8, 8)
    y = run_shared(nn.Sequential(DropBlock(0.3, 3)), x, FIRST)
    torch.testing.assert_close(y.mean((1, 2, 3, 4)), torch.ones(3))
    assert len(y.amax((1, 2, 3, 4)).unique()) == 3


def test_averages_are_not_rounded_in_bf16():
    """Autocast makes products of matrices coarse."""
    average, towards = torch.rand(4, dtype=torch.float32), torch.rand(3, 4, dtype=torch.float32)
    expected = average.clone()
    for row in towards:
        expected = 0.9 * expected + 0.1 * row
    with torch.autocast("cpu", torch.bfloat16):
        move_average(average, towards, 0.1)
    torch.testing.assert_close(average, expected)


class Mixed(nn.Module):
    """Not a chain of layers, so its layers cannot be run one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.net = NETWORKS["conv4"]()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize(
    ("network", "training", "batching", "expected"),
    [
        (NETWORKS["conv4"](), True, FIRST, True),
        (NETWORKS["conv4"](), True, TaskBatching(), False),  # a CPU is faster one by one
        (NETWORKS["conv4"](), True, TaskBatching("loop", channels_last=False), False),
        (NETWORKS["conv4"](), False, TaskBatching(), False),
        (NETWORKS["conv4"](), False, FIRST, True),
        (NETWORKS["conv4, batch"](), False, FIRST, True),
        (Conv4((3, 16, 16), norm="layer"), True, FIRST, True),
        (nn.Sequential(*[nn.BatchNorm2d(3)] * 2), True, FIRST, False),  # twice in the chain
        (Mixed(), True, FIRST, False),
        (Mixed(), False, FIRST, True),
        (nn.Sequential(nn.BatchNorm2d(3, momentum=None)), True, FIRST, False),
        (nn.Sequential(StepNorm(3, 1, 0, 1e-5)), True, FIRST, False),
    ],
)
def test_when_tasks_run_at_once(network: nn.Module, training: bool, batching: TaskBatching, expected: bool):
    assert runs_at_once(network.train(training), torch.zeros(2, 5, 3, 16, 16), batching) is expected


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["conv4", "conv4, one channel"])
def test_feature_maps_are_channels_last_on_a_cpu(name: str, training: bool):
    """Also those of grey images, whose one channel looks the same in every layout."""
    network = NETWORKS[name]().train(training)
    seen: list[Tensor] = []
    network[1][0].register_forward_hook(lambda layer, inputs, output: seen.append(inputs[0]))
    x = torch.rand(2, 5, 1 if "one" in name else 3, 16, 16)
    for task in x.split(1):
        run_shared(network, task)
    run_shared(network.eval(), x)
    assert len(seen) == 3
    assert all(maps.is_contiguous(memory_format=torch.channels_last) for maps in seen)
