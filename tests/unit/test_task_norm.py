"""TaskNorm: its formula value by value, its limits, and every method with it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import references
from helpers.methods import METHODS, RATE, SHAPE, episodes_of, gradient, maml, relative_error, rename
from torch import Tensor, nn
from torch.func import functional_call

from metarun.algorithms.protonet import ProtoNet
from metarun.algorithms.relation import RelationNet
from metarun.backbones.conv4 import Conv4
from metarun.errors import ConfigError
from metarun.nn.layers import norm_layer
from metarun.nn.task_norm import TaskNorm, support_first, task_norms
from metarun.tasks.episodes import Episodes, EpisodeShape
from metarun.training.evaluation import adapted_outcome

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("float64")]
KINDS = {"task": (2, 3), "task_layer": (1, 2, 3)}  # over what an example alone is averaged
ALL = [*KINDS, "support"]


def moved(norm: str) -> Conv4:
    """A small network whose mixtures and affine weights are not those of the start."""
    network = Conv4(SHAPE, width=8, norm=norm)
    for layer in task_norms(network):
        for p in layer.parameters():
            nn.init.normal_(p, p.mean().item(), 0.2)
    return network


def plain_norm(layer: TaskNorm, x: Tensor, shots: int) -> Tensor:
    """The mixture's moments as averages of values and of their squares, from the maps themselves."""
    others = KINDS["task" if layer.alone == "instance" else "task_layer"]
    share = 1.0
    if layer.share is not None:
        share = 1 / (1 + torch.exp(-(layer.share.scale * shots + layer.share.offset)))
    first, second = (
        share * y[:shots].mean((0, 2, 3), keepdim=True) + (1 - share) * y.mean(others, keepdim=True)
        for y in (x, x * x)
    )
    normalised = (x - first) / (second - first**2 + 1e-5).sqrt()
    return normalised * layer.weight[:, None, None] + layer.bias[:, None, None]


class PlainConv4(nn.Module):
    """The layers of a Conv4 one after the other, with `plain_norm`; the first `shots` are the support."""

    def __init__(self, network: Conv4, shots: int) -> None:
        super().__init__()
        self.network, self.shots = copy.deepcopy(network), shots

    def forward(self, x: Tensor) -> Tensor:
        for layer in leaves_of(self.network):
            x = plain_norm(layer, x, self.shots) if isinstance(layer, TaskNorm) else layer(x)
        return x


def leaves_of(network: nn.Module) -> list[nn.Module]:
    if not isinstance(network, nn.Sequential):
        return [network]
    return [leaf for child in network for leaf in leaves_of(child)]


@pytest.mark.parametrize("norm", KINDS)
def test_the_ends_of_the_mixture_are_norms_of_pytorch(norm: str):
    """Share 0: instance or layer norm, whatever the support. Share 1: batch norm by the support's moments."""
    x, layer = torch.randn(6, 8, 4, 4), norm_layer(norm, 8)
    for p in (layer.weight, layer.bias):
        nn.init.normal_(p)
    support = x[:4].transpose(0, 1).flatten(1)
    moments = support.mean(1), support.var(1, correction=0)
    alone = F.group_norm(x, 8 if norm == "task" else 1, layer.weight, layer.bias)
    metabn = norm_layer("support", 8)
    metabn.load_state_dict({name: p for name, p in layer.state_dict().items() if "share" not in name})
    by_support = F.batch_norm(x, *moments, layer.weight, layer.bias)
    with support_first(layer, 4):
        for offset, expected in ((-60.0, alone), (60.0, by_support)):
            nn.init.constant_(layer.share.offset, offset)
            torch.testing.assert_close(layer(x), expected)
    assert layer.support is None
    with support_first(metabn, 4):
        torch.testing.assert_close(metabn(x), by_support)


@pytest.mark.parametrize("batching", ["grouped", "unfold", "vmap", "loop"])
@pytest.mark.parametrize("norm", ALL)
def test_mamls_gradient_is_that_of_a_plain_loop(norm: str, batching: str):
    """Second order through the moments; the mixture is meta-learned and not adapted."""
    algorithm, episodes = maml()(moved(norm), 2), episodes_of()
    shots = episodes.support_x.shape[1]
    net = nn.Sequential(PlainConv4(algorithm.learner.backbone, shots), copy.deepcopy(algorithm.learner.head))
    params = dict(net.named_parameters())
    losses = []
    for t in range(len(episodes)):
        own = dict(params)
        names = [name for name in own if ".share." not in name]
        for _ in range(2):
            loss = F.cross_entropy(functional_call(net, own, (episodes.support_x[t],)), episodes.support_y[t])
            grads = torch.autograd.grad(loss, [own[name] for name in names], create_graph=True)
            own |= {name: own[name] - RATE * g for name, g in zip(names, grads, strict=True)}
        both = torch.cat([episodes.support_x[t], episodes.query_x[t]])
        outputs = functional_call(net, own, (both,))[shots:]
        losses.append(F.cross_entropy(outputs, episodes.query_y[t]))
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(params.values()))
    expected = {name.replace("0.network.", "0."): g for name, g in zip(params, grads, strict=True)}
    expected = rename(expected, {"0": "learner.backbone", "1": "learner.head"})
    found = gradient(algorithm, episodes, batching=batching)
    assert relative_error(found, expected) < 1e-10
    assert all(found[name].abs() > 1e-6 for name in found if ".share." in name)


@pytest.mark.parametrize("channels_last", [True, False])
def test_prototypical_networks_gradient_is_that_of_a_plain_loop(channels_last: bool):
    """Task after task, and all tasks in one pass as on a GPU."""
    algorithm, episodes = ProtoNet(moved("task")), episodes_of()
    net = PlainConv4(algorithm.backbone, episodes.support_x.shape[1])
    loss = references.protonet_loss(net, episodes, together=True)
    grads = torch.autograd.grad(loss, list(net.parameters()))
    names = [name.replace("network.", "backbone.", 1) for name, _ in net.named_parameters()]
    expected = dict(zip(names, grads, strict=True))
    found = gradient(algorithm, episodes, channels_last=channels_last)
    assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("name", [name for name in METHODS if name != "meta_nas"])  # on cells of its own
def test_a_query_is_normalised_by_the_support_and_itself(name: str):
    """Whether it is alone or among others; by the support, which another one shows; and as in training."""
    algorithm = METHODS[name].build(moved("task"), 1)
    for parent in list(algorithm.modules()):
        for key, layer in list(parent.named_children()):
            if isinstance(layer, nn.BatchNorm2d):  # of the method's own networks
                setattr(parent, key, nn.GroupNorm(1, layer.num_features))
    assert not algorithm.eval().uses_query_statistics
    episodes = episodes_of(tasks=2)
    state = algorithm.adapt(episodes)
    predict = algorithm.predictor(state, episodes)
    with torch.no_grad():
        together, alone = predict(episodes.query_x), predict(episodes.query_x[:, 1:2])
    torch.testing.assert_close(together[:, 1:2], alone)
    if name != "meta_networks":  # which runs each query with weights of its own
        other = algorithm.predictor(state, episodes.map(lambda x: x**3 if x.is_floating_point() else x))
        assert (other(episodes.query_x[:, 1:2]) - alone).abs().max() > 1e-9
    if name in ("protonet", "relation", "r2d2", "gnn", "snail", "versa", "cnaps"):
        torch.testing.assert_close(algorithm.meta_loss(episodes).outputs.detach(), together)


@pytest.mark.parametrize(
    "name", ["maml", "anil", "mr_maml-weights", "mr_maml-activations", "platipus", "protonet", "tadam"]
)
def test_training_normalises_no_query_by_another(name: str):
    algorithm, episodes = METHODS[name].build(moved("task"), 1), episodes_of(tasks=2)
    if name == "platipus":
        nn.init.zeros_(algorithm.posterior_rate)  # by which the queries change the weights
    changed = episodes.query_x.clone()
    changed[:, -1] = changed[:, -1] ** 2
    found = []
    for query_x in (episodes.query_x, changed):
        torch.manual_seed(0)
        found.append(copy.deepcopy(algorithm).meta_loss(replace(episodes, query_x=query_x)).outputs)
    torch.testing.assert_close(found[0][:, :-1], found[1][:, :-1])


def test_unequal_shots_are_normalised_alike_in_training_and_evaluation():
    algorithm = ProtoNet(moved("task"))
    support_y, query_y = torch.tensor([[0, 0, 0, 0, 1, 2]]), torch.tensor([[0, 1, 2]])
    tasks = Episodes(torch.rand(1, 6, *SHAPE), support_y, torch.rand(1, 3, *SHAPE), query_y, query_y)
    trained = algorithm.meta_loss(tasks).outputs
    torch.testing.assert_close(adapted_outcome(algorithm.eval(), tasks, torch.float64).outputs, trained)


@pytest.mark.parametrize(
    ("norm", "shots", "message"),
    [("running", 0, "shots=0: norm=task"), ("batch", 1, "choose algorithm.norm")],
)
def test_a_task_needs_a_support_and_no_other_batch_norm(norm: str, shots: int, message: str):
    algorithm = RelationNet(moved("task"), width=4, norm=norm)
    with pytest.raises(ConfigError, match=message):
        algorithm.check_norms(EpisodeShape(3, shots, 1))
