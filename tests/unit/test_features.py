"""Features of frozen networks: the scores are those of images, each of which is embedded once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm
from metarun.algorithms.baseline import Baseline, SimpleShot
from metarun.algorithms.cnaps import CNAPs
from metarun.algorithms.maml import MAML
from metarun.algorithms.protonet import ProtoNet
from metarun.algorithms.r2d2 import R2D2
from metarun.backbones.adapter import Adapter
from metarun.config.build import build_backbone
from metarun.config.restore import start_from
from metarun.datasets.augment import Augment
from metarun.datasets.mixture import MixtureStore
from metarun.errors import ConfigError
from metarun.inner_loops.sgd import SGD
from metarun.nn.frozen import Frozen
from metarun.nn.per_task import run_on_tasks
from metarun.nn.shared_weights import run_shared
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.spec import TaskSpec
from metarun.training.evaluation import EvalSettings, evaluate
from metarun.training.features import on_features
from metarun.training.hardware import Hardware

pytestmark = pytest.mark.quick
SHAPE = (3, 6, 6)
TASKS = EvalSettings(EpisodeShape(3, 2, 3), 20, 0)
CPU = Hardware("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path))
    return tmp_path


class Network(nn.Module):
    """A network with running averages, as people write them, that counts the images it is given."""

    features = 8

    def __init__(self, frozen: bool = True, gain: float = 1.0) -> None:
        super().__init__()
        self.frozen, self.gain, self.seen = frozen, gain, [0]
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout())
        self.body[1].running_mean.uniform_(-0.5, 0.5)

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return self.gain * self.body(x).mean((2, 3))


def backbone(seed: int = 0, **settings: object) -> nn.Module:
    torch.manual_seed(seed)
    node = {"_target_": f"{__name__}.Network", **settings}
    return build_backbone(node, TaskSpec(SHAPE))


def store(classes: int = 5, seed: int = 0, name: str = "some test") -> ClassStore:
    images = torch.randint(256, (classes * 9, *SHAPE), generator=torch.Generator().manual_seed(seed))
    return ClassStore(images.byte(), [9] * classes, [f"{name} {i}" for i in range(classes)], name)


def seen(algorithm: Algorithm) -> int:
    """How many images the network was given since the last call."""
    counts = algorithm.own_backbone()[0].network.seen
    total = sum(counts)
    counts.clear()
    return total


def adapted(net: nn.Module) -> nn.Module:
    """A frozen network with a trained layer behind it, as people compose them."""
    whole = nn.Sequential(net[0], Adapter((8,), hidden=4))
    whole.features = 8
    return whole


METHODS: dict[str, Callable[[nn.Module], Algorithm]] = {
    "protonet": lambda net: ProtoNet(net, learn_scale=True),
    "protonet-adapter": lambda net: ProtoNet(adapted(net)),
    "r2d2": lambda net: R2D2(net),
    "simpleshot": lambda net: SimpleShot(net, classes=5),
    "baseline": lambda net: Baseline(net, SGD(0.1, 0, test_steps=5), classes=5),
    "maml": lambda net: MAML(net, SGD(0.1, 2), outputs=3),
}


@pytest.mark.parametrize("name", METHODS)
def test_scores_and_gradients_are_those_of_images_and_each_image_is_embedded_once(name: str):
    algorithm, images = METHODS[name](backbone()), store()
    with_images = evaluate(algorithm, images, TASKS, CPU)
    assert seen(algorithm) >= 20 * 15
    features = on_features(images, algorithm, CPU)
    assert seen(algorithm) == len(images.items)
    with_features = evaluate(algorithm, features, TASKS, CPU)
    again = evaluate(algorithm, on_features(images, algorithm, CPU), TASKS, CPU)
    assert seen(algorithm) == 0
    assert with_features.episodes_hash == with_images.episodes_hash
    torch.testing.assert_close(with_features.losses, with_images.losses, rtol=1e-4, atol=1e-5)
    assert torch.equal(again.losses, with_features.losses)
    draw = images.draw(2, TASKS.shape, torch.Generator().manual_seed(1))
    losses = [algorithm.train().meta_loss(each.gather(draw, TASKS.shape)).loss for each in (images, features)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    own = [p for p in algorithm.parameters() if p.requires_grad]
    grads = [torch.autograd.grad(loss.mean(), own, materialize_grads=True) for loss in losses]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-5)


def test_other_weights_settings_images_or_precision_are_embedded_again():
    def embeds(images: ClassStore, net: nn.Module, hardware: Hardware = CPU) -> bool:
        algorithm = hardware.place(ProtoNet(net))
        seen(algorithm)
        features = on_features(images, algorithm, hardware)
        computed = seen(algorithm) > 0
        expected = net[0].network(images.decode(images.items).to(hardware.dtype))
        torch.testing.assert_close(features.items, expected, rtol=1e-4, atol=1e-6)
        return computed

    images = store()
    assert embeds(images, backbone())
    assert not embeds(images, backbone())
    changed = backbone()
    changed[0].network.body[0].bias.data[3] += 1e-3
    assert embeds(images, changed)
    assert embeds(images, backbone(gain=2.0))
    assert embeds(images, backbone(), Hardware("cpu", "float64"))
    assert embeds(store(seed=1), backbone())
    other = images.items.clone()
    other[-1, -1, -1, -1] ^= 1
    assert embeds(images.with_items(other), backbone())  # the fingerprint of a converted store is the same


def test_a_killed_embedding_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch):
    algorithm = ProtoNet(backbone())
    forward = Network.forward

    def killed(self: Network, x: Tensor) -> Tensor:
        if sum(self.seen) > 90:
            raise KeyboardInterrupt
        return forward(self, x)

    algorithm.eval()
    seen(algorithm)
    monkeypatch.setattr(Network, "forward", killed)
    with pytest.raises(KeyboardInterrupt):
        on_features(store(classes=20), algorithm, CPU)
    assert [path.suffix for path in cache.iterdir()] == [".lock"]
    monkeypatch.setattr(Network, "forward", forward)
    assert on_features(store(classes=20), algorithm, CPU).item_shape == (8,)


def augmented() -> ClassStore:
    images = store()
    images.augment = Augment()
    return images


def of_batches() -> nn.Module:
    network = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten())
    net = nn.Sequential(Frozen(network))
    net.features = 108
    return net


AS_THEY_ARE = {
    "augmented images": (lambda: ProtoNet(backbone()), augmented),
    "a trained network": (lambda: ProtoNet(backbone(frozen=False)), store),
    "a network changed by FiLM": (lambda: CNAPs(backbone(), SHAPE, width=4), store),
    "statistics of a batch": (lambda: ProtoNet(of_batches()), store),
}


@pytest.mark.parametrize("case", AS_THEY_ARE)
def test_features_that_may_change_are_not_kept(case: str, cache: Path):
    build, images = AS_THEY_ARE[case]
    algorithm, source = build(), images()
    assert on_features(source, algorithm, CPU) is source
    evaluate(algorithm, source, TASKS, CPU)
    assert not list(cache.iterdir())


def test_a_mixture_of_datasets():
    stores = {"a": store(name="a test"), "b": store(4, 1, "b test")}
    mixture, algorithm = MixtureStore(stores, [1.0, 2.0], "mixture test", "cpu"), ProtoNet(backbone())
    sources = mixture, on_features(mixture, algorithm, CPU)
    results = [evaluate(algorithm, each, TASKS, CPU) for each in sources]
    assert [*results[0].parts] == [*results[1].parts] == ["a", "b"]
    torch.testing.assert_close(results[1].losses, results[0].losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("run", [run_shared, lambda net, x: run_on_tasks(net, {}, x)])
def test_a_frozen_network_of_rows_is_run(run: Callable[[nn.Module, Tensor], Tensor]):
    net = build_backbone({"_target_": f"{__name__}.Rows"}, TaskSpec((5,)))
    x = torch.rand(2, 3, 5)
    torch.testing.assert_close(run(net, x), net[0].network(x))
    assert not any(p.requires_grad for p in net.parameters())


class Rows(nn.Linear):
    frozen = True

    def __init__(self) -> None:
        super().__init__(5, 4)


def test_weights_without_running_averages_do_not_start_a_frozen_network():
    class Net(nn.Sequential):
        features = 4

        def __init__(self, running: bool) -> None:
            super().__init__(nn.Conv2d(3, 4, 6), nn.BatchNorm2d(4, track_running_stats=running), nn.Flatten())

    frozen = nn.Sequential(Frozen(Net(running=True)))
    frozen.features = 4
    for running in (True, False):
        content = {"algorithm": ProtoNet(Net(running)).state_dict(), "choices": {}}
        if running:
            start_from(ProtoNet(frozen), Path("run/best.pt"), content)
            assert torch.equal(frozen[0].network[0].weight, content["algorithm"]["backbone.0.weight"])
        else:
            with pytest.raises(ConfigError, match=r"^init=run/best\.pt: a frozen backbone needs "):
                start_from(ProtoNet(frozen), Path("run/best.pt"), content)
