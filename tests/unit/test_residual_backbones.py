"""ResNet-12, ResNet-18 and wide residual networks: against published sizes, torchvision and plain loops."""

from __future__ import annotations

import urllib.error
from pathlib import Path

import pytest
import torch
from helpers.engines import engine_of
from helpers.methods import METHODS, episodes_of, gradient, relative_error
from helpers.runs import TINY
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.models import resnet18

from metarun.algorithms.cavia import CAVIA
from metarun.algorithms.protonet import ProtoNet
from metarun.backbones.conv4_joined import Conv4Joined
from metarun.backbones.resnet12 import DropBlock, ResNet12
from metarun.backbones.resnet18 import ResNet18
from metarun.backbones.wide_resnet import WideResNet
from metarun.errors import ConfigError
from metarun.inner_loops.sgd import SGD
from metarun.nn.layers import Residual
from metarun.nn.per_task import TaskBatching, is_groupable, run_on_tasks

SHAPE = (1, 16, 16)
NETWORKS = {
    "resnet12": lambda shape, **settings: ResNet12(shape, widths=(8, 8, 16, 16), **settings),
    "resnet18": lambda shape, **settings: ResNet18(shape, width=8, **settings),
    "wrn28_10": lambda shape, **settings: WideResNet(shape, depth=10, width=1, **settings),
}
PLAIN = {  # without random numbers, so that it can be compared
    "resnet12": lambda: ResNet12(SHAPE, widths=(2, 3, 4, 4), drop_rate=0.0),
    "resnet12-flat-layer": lambda: ResNet12(
        SHAPE, widths=(2, 3, 4, 4), drop_rate=0.0, pool=False, norm="layer"
    ),
    "resnet18": lambda: ResNet18(SHAPE, width=2),
    "resnet18-imagenet-stem": lambda: ResNet18(SHAPE, width=2, stem="imagenet", norm="layer"),
    "conv4_joined": lambda: Conv4Joined(SHAPE, widths=(2, 3, 4, 4), drop_rate=0.0, norm="layer"),
    "wrn28_10": lambda: WideResNet(SHAPE, depth=10, width=1, norm="group"),
    "wrn28_10-instance": lambda: WideResNet(SHAPE, depth=10, width=1, norm="instance"),
}


def own_weights(module: nn.Module, tasks: int) -> dict[str, Tensor]:
    """Weights that differ between tasks."""
    return {n: p.detach() + 0.1 * torch.randn(tasks, *p.shape) for n, p in module.named_parameters()}


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 84, 84)], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_features_of_every_size_and_number_of_channels(name: str, shape: tuple[int, ...]):
    for norm in ("batch", "running", "group", "layer", "instance", "none"):
        network = NETWORKS[name](shape, norm=norm).eval()
        features = network(torch.rand(2, *shape))
        assert features.shape == (2, network.features)
        assert features.isfinite().all()


def test_sizes_are_the_published_ones():
    """Without classifiers: MetaOptNet's 12.4 million; torchvision's; 36.5 million in Zagoruyko's table 4."""

    def size(network: nn.Module) -> int:
        return sum(p.numel() for p in network.parameters())

    with torch.device("meta"):
        assert size(ResNet12((3, 84, 84))) == 12_424_320
        assert ResNet12((3, 84, 84), pool=False).features == 16_000
        assert size(ResNet18((3, 84, 84))) == size(resnet18()) - (512 + 1) * 1000
        assert size(WideResNet((3, 32, 32))) == 36_479_194 - (640 + 1) * 10  # WRN-28-10 on CIFAR-10
        assert [WideResNet((3, 32, 32)).features, ResNet18((3, 32, 32)).features] == [640, 512]


@pytest.mark.parametrize("name", NETWORKS)
def test_too_small_images_are_reported_in_one_line(name: str):
    with pytest.raises(ConfigError, match=rf"^backbone={name} needs images of at least (\d+)x\1, and .* 6x7"):
        NETWORKS[name]((3, 6, 7))


@pytest.mark.parametrize("depth", [4, 12])
def test_an_impossible_depth_is_reported(depth: int):
    with pytest.raises(ConfigError, match=rf"backbone.depth={depth}: must be 10, 16"):
        WideResNet((3, 32, 32), depth=depth)


def test_a_resnet12_has_four_widths():
    with pytest.raises(ConfigError, match=r"backbone.widths=\[8, 8\]: must be four numbers"):
        ResNet12(SHAPE, widths=(8, 8))


# Many tasks at once


@pytest.mark.parametrize("how", ["grouped", "unfold", "vmap"])
@pytest.mark.parametrize("name", PLAIN)
def test_every_batching_is_the_loop_to_second_order(float64: None, name: str, how: str):
    """Outputs, gradients, and gradients of the gradients' length."""
    network = PLAIN[name]()
    assert is_groupable(network)
    x = torch.rand(3, 4, *SHAPE)
    start = own_weights(network, 3)

    def derivatives(batching: TaskBatching) -> list[Tensor]:
        params = {n: p.clone().requires_grad_() for n, p in start.items()}
        y = run_on_tasks(network, params, x, batching)
        first = torch.autograd.grad(y.pow(3).sum(), list(params.values()), create_graph=True)
        length = sum(g.square().sum() for g in first)
        return [y, *first, *torch.autograd.grad(length, list(params.values()))]

    for mine, plain in zip(derivatives(TaskBatching(how)), derivatives(TaskBatching("loop")), strict=True):
        assert (mine - plain).norm() <= 1e-10 * max(plain.norm(), 1)


@pytest.mark.parametrize("backbone", PLAIN)
@pytest.mark.parametrize("method", ["maml", "protonet", "pretrain"])
def test_gradient_is_the_references(float64: None, method: str, backbone: str):
    algorithm = METHODS[method].build(PLAIN[backbone](), 2)
    episodes = episodes_of()
    expected = METHODS[method].reference(algorithm, episodes, 2)
    assert relative_error(gradient(algorithm, episodes), expected) < 1e-10
    assert relative_error(gradient(algorithm, episodes, tasks_at_once=2), expected) < 1e-10


def test_a_traced_gradient_is_the_references(float64: None):
    algorithm, episodes = METHODS["maml"].build(PLAIN["resnet12"](), 1), episodes_of(shots=1, queries=1)
    expected = METHODS["maml"].reference(algorithm, episodes, 1)
    engine = engine_of(algorithm, episodes, compile="auto")
    assert engine.traced
    engine.backward(next(engine.draws))
    found = {name: p.grad for name, p in algorithm.named_parameters()}
    assert relative_error(found, expected) < 1e-10


@pytest.mark.parametrize("method", ["cavia", "maml_plus_plus"])
def test_methods_that_change_layers_reach_into_residual_blocks(float64: None, method: str):
    algorithm = METHODS[method].build(PLAIN["resnet12"](), 2)
    episodes = episodes_of()
    grads = [gradient(algorithm, episodes, batching=how) for how in ("grouped", "loop")]
    assert relative_error(*grads) < 1e-10


def test_contexts_are_found_in_residual_blocks():
    algorithm = CAVIA(PLAIN["resnet12"](), SGD(0.1, 1), outputs=3)
    assert [n for n in algorithm.learner.task_params(1, 3) if n.endswith("context")] == [
        "backbone.0.0.body.7.1.context"  # the third convolution's normalisation is body.7
    ]


def test_a_residual_block_of_any_kind():
    """Vectors, an identity, a branch that no batching knows."""
    inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
    network = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), Residual(inner), Residual(nn.Linear(6, 6)))
    unknown = nn.Sequential(nn.Flatten(), Residual(nn.Sequential(nn.Linear(9, 9), nn.Softmax(1))))
    assert is_groupable(network)
    assert not is_groupable(unknown)
    assert not is_groupable(nn.Sequential(Residual(inner), Residual(inner)))
    for module in (network, unknown):
        params, x = own_weights(module, 3), torch.rand(3, 5, 1, 3, 3)
        found = run_on_tasks(module, params, x)
        torch.testing.assert_close(found, run_on_tasks(module, params, x, TaskBatching("loop")))


# Random layers


@pytest.mark.parametrize("name", ["resnet12", "wrn28_10"])
def test_dropping_is_for_training_alone(name: str):
    network, x = NETWORKS[name](SHAPE, drop_rate=0.3, norm="layer"), torch.rand(4, *SHAPE)
    torch.manual_seed(1)
    first, second = network(x), network(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(network(x), first)
    network.eval()
    assert torch.equal(network(x), network(x))


@pytest.mark.parametrize(("side", "block_size"), [((10, 10), 5), ((6, 9), 3), ((5, 3), 5), ((1, 1), 5)])
def test_dropblock_drops_as_often_as_it_should(side: tuple[int, int], block_size: int):
    """A place stays where none of the squares that reach it begins: each (i, j) has that many chances."""
    torch.manual_seed(0)
    layer = DropBlock(0.1, block_size)
    size = min(block_size, *side)
    reach = [[sum(0 <= i - k <= n - size for k in range(size)) for i in range(n)] for n in side]
    chances = torch.outer(*(torch.tensor(r, dtype=torch.float32) for r in reach))  # [H, W]
    begins = 0.1 / size**2 * side[0] * side[1] / ((side[0] - size + 1) * (side[1] - size + 1))
    expected = (1 - begins) ** chances
    kept = layer.mask(torch.ones(4000, 8, *side))
    assert set(kept.unique().tolist()) <= {0.0, 1.0}
    torch.testing.assert_close(kept.mean((0, 1)), expected, rtol=0, atol=0.01)  # 6 standard errors
    assert 0.08 < 1 - kept.mean() < 0.105
    # The rest is scaled up, so that the mean of each task does not change.
    x = torch.ones(50, 3 * 8, *side)
    means = layer.on_tasks({}, x, 3).unflatten(1, (3, 8)).mean((0, 2, 3, 4))
    torch.testing.assert_close(means, torch.ones(3))


def test_dropblock_drops_whole_squares():
    torch.manual_seed(0)
    dropped = 1 - DropBlock(0.1, 3).mask(torch.ones(200, 1, 8, 8))
    squares = nn.functional.conv2d(dropped, torch.ones(1, 1, 3, 3)) == 9
    again = nn.functional.conv_transpose2d(squares.float(), torch.ones(1, 1, 3, 3)) > 0
    assert torch.equal(again, dropped > 0)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("how", ["grouped", "unfold", "vmap", "loop"])
def test_tasks_drop_places_of_their_own(how: str, channels_last: bool):
    """With the same images and weights, tasks differ by what they drop alone; a seed repeats it."""
    network = nn.Sequential(nn.Conv2d(1, 4, 1), DropBlock(0.3, 3), nn.Dropout(0.3), nn.Flatten())
    params = {n: p.detach().expand(3, *p.shape) for n, p in network.named_parameters()}
    x = torch.rand(1, 5, 1, 8, 8).expand(3, -1, -1, -1, -1)
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        found.append(run_on_tasks(network, params, x, TaskBatching(how, channels_last)))
    assert torch.equal(*found)
    zero = [(task == 0).float() for task in found[0]]
    for a, b in ((0, 1), (0, 2), (1, 2)):  # no more alike than chance: about half of the places are dropped
        assert abs(torch.corrcoef(torch.stack([zero[a].flatten(), zero[b].flatten()]))[0, 1]) < 0.15
    network.eval()
    assert torch.equal(*run_on_tasks(network, params, x, TaskBatching(how))[:2])


def test_the_rate_of_dropblock_rises_with_the_iteration_also_in_a_trace():
    """As in MetaOptNet's code: keep_rate = max(1 - rate * batches / ramp, 1 - rate)."""
    network = ResNet12(SHAPE, widths=(2, 2, 2, 2), drop_rate=0.4, block_size=1, ramp=4)
    protonet, x = ProtoNet(network), torch.ones(100, 10, 10, 10)
    layer = network[2][-1]
    traced = make_fx(lambda x: layer.mask(x))(x)
    for iteration, rate in ((0, 0.1), (2, 0.3), (3, 0.4), (50, 0.4)):
        protonet.start_step(iteration)
        for mask in (layer.mask, traced):
            torch.testing.assert_close(mask(x).mean().item(), 1 - rate, atol=0.01, rtol=0)
    assert not [name for name in protonet.state_dict() if "reached" in name]  # older checkpoints fit


def test_a_trace_draws_anew_every_time():
    """One that kept its mask would drop the same places for ever."""
    layer = DropBlock(0.3, 3)
    traced = make_fx(layer)(torch.ones(2, 2, 8, 8))
    x = torch.ones(2, 2, 8, 8)
    assert not torch.equal(traced(x), traced(x))
    torch.manual_seed(1)
    mine = layer(x)
    torch.manual_seed(1)
    assert torch.equal(traced(x), mine)


@pytest.mark.parametrize(
    "settings", [{"drop_rate": 1.0}, {"drop_rate": -0.1}, {"block_size": 0}, {"ramp": -1}]
)
def test_impossible_dropping_is_refused(settings: dict):
    (name, value), *_ = settings.items()
    with pytest.raises(ConfigError, match=f"backbone.{name}={value}: must be at least"):
        ResNet12(SHAPE, widths=(2, 2, 2, 2), **settings)


# torchvision's weights


@pytest.fixture
def theirs() -> nn.Module:
    """Torchvision's network, with averages that are not those it starts with."""
    torch.manual_seed(0)
    network = resnet18()
    network.train()(torch.rand(4, 3, 64, 64))
    return network.eval()


def test_a_file_of_weights_gives_torchvisions_features(tmp_path: Path, theirs: nn.Module):
    file = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), file)
    theirs.fc = nn.Identity()
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for channels in (1, 3):
        network = ResNet18((channels, 32, 32), weights=str(file), norm="running").eval()
        network.load_weights()
        x = torch.rand(2, channels, 32, 32)
        normalised = (x.expand(-1, 3, -1, -1) - mean.view(3, 1, 1)) / deviation.view(3, 1, 1)
        torch.testing.assert_close(network(x), theirs(normalised))
    ProtoNet(network)  # and is there in a method
    for name, wrong in (("none.pth", None), ("other.pth", {"x": torch.zeros(1)}), ("list.pth", [1])):
        if wrong is not None:
            torch.save(wrong, tmp_path / name)
        network.weights = str(tmp_path / name)
        with pytest.raises(ConfigError, match=rf"^backbone\.weights=\S*{name}: [^\n]*backbone\.weights=\w+$"):
            network.load_weights()


def test_imagenets_weights_without_a_network_are_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def offline(*arguments: object, **settings: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    network = ResNet18((3, 32, 32), weights="imagenet", norm="running")
    with pytest.raises(
        ConfigError,
        match=r"^backbone\.weights=imagenet: Name or service not known; .*resnet18-\w+\.pth.*=FILE$",
    ):
        network.load_weights()


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"norm": "batch"}, "norm=running"),
        ({"stem": "small"}, "backbone.stem=imagenet"),
        ({"width": 32}, "backbone.width=64"),
        ({"item_shape": (4, 64, 64)}, "backbone.weights=null"),
    ],
)
def test_networks_that_imagenets_weights_do_not_fit(settings: dict, remedy: str):
    with pytest.raises(ConfigError, match=rf"backbone\.weights=imagenet: .*; choose {remedy}"):
        ResNet18(**{"item_shape": (3, 64, 64), "weights": "imagenet", "norm": "running"} | settings)


def test_a_run_starts_from_weights_and_its_checkpoint_does_without_them(
    metarun, tmp_path: Path, theirs: nn.Module
):
    file = tmp_path / "weights.pth"
    torch.save(theirs.state_dict(), file)
    tiny = [word for word in TINY if not word.startswith(("backbone", "iterations", "validation"))]
    words = [*tiny, "backbone=resnet18", "ways=2", "queries=1", "hydra.run.dir=run", "test.episodes=0"]
    words += ["iterations=1", "validation.episodes=2", "optimizer.lr=1e-9"]
    metarun("train", *words, f"backbone.weights={file}")
    file.unlink()
    done = metarun("eval", "checkpoint=run", "episodes=2", "ways=2", "queries=1", "hardware=cpu")
    assert "weights.pth was trained on are not known" in done.stderr
    weights = torch.load(tmp_path / "run" / "last.pt", weights_only=True)["algorithm"]
    torch.testing.assert_close(weights["backbone.1.weight"], theirs.conv1.weight, rtol=0, atol=1e-6)
