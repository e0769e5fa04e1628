"""Networks of timm: against timm's own transform and forward pass, with weights of files, and frozen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from helpers.methods import SHAPE, episodes_of, gradient, relative_error
from torch import Tensor, nn

from metarun.algorithms.baseline import SimpleShot
from metarun.algorithms.cnaps import CNAPs
from metarun.algorithms.maml import MAML
from metarun.algorithms.protonet import ProtoNet
from metarun.backbones.timm_network import TimmNetwork, check_name
from metarun.commands.starting import check_trains
from metarun.config.schema import TrainConfig
from metarun.errors import ConfigError
from metarun.inner_loops.sgd import SGD

timm = pytest.importorskip("timm", reason="needs the extra metarun[timm]")

#: What the configs of timm state of its networks for tests.
HALF, IMAGENET = (0.5,) * 3, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATED = {
    "test_resnet": {"mean": HALF, "std": HALF, "interpolation": "bilinear"},
    "test_vit": {"mean": HALF, "std": HALF, "interpolation": "bicubic"},
    "test_efficientnet": {"mean": IMAGENET[0], "std": IMAGENET[1], "interpolation": "bicubic"},
}


def theirs(name: str) -> nn.Module:
    """A network of timm with its classifier, and averages that are not those it starts with."""
    torch.manual_seed(1)
    network = timm.create_model(name)
    network.train()(torch.rand(4, 3, 160, 160))
    return network.eval()


def saved(network: nn.Module, file: Path) -> str:
    if file.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(network.state_dict(), file)
    else:
        torch.save(network.state_dict(), file)
    return str(file)


@pytest.mark.parametrize(
    ("name", "file"),
    [("test_resnet", "a.safetensors"), ("test_vit", "a.pth"), ("test_efficientnet", "a.pth")],
)
def test_features_are_timms_of_images_by_its_own_transform(name: str, file: str, tmp_path: Path):
    from torchvision.transforms.functional import to_pil_image

    network = theirs(name)
    mine = TimmNetwork(SHAPE, name, saved(network, tmp_path / file)).eval()
    mine[0].load_weights()
    network.reset_classifier(0)
    transform = timm.data.create_transform((3, 160, 160), crop_pct=1.0, **STATED[name])
    torch.manual_seed(2)
    for channels in (3, 1):
        image = (torch.rand(channels, 16, 16) * 255).round() / 255
        pixels = to_pil_image(image).convert("RGB")  # of 256 values each, also after they are scaled
        with torch.no_grad():
            expected, found = network(transform(pixels)[None]), mine(image[None])
            plain = network(torch.zeros(1, 3, 160, 160))
        assert found.shape == (1, mine.features)
        assert (found - expected).norm() < 0.02 * (plain - expected).norm()


def test_weights_that_do_not_fit_are_reported_in_one_line(tmp_path: Path):
    other = saved(theirs("test_vit"), tmp_path / "other.pth")
    (tmp_path / "damaged.safetensors").write_bytes(b"damaged")
    torch.save([1], tmp_path / "list.pth")
    network = TimmNetwork(SHAPE, "test_resnet")
    for name in (other, "none.pth", "damaged.safetensors", "list.pth"):
        network[0].weights = str(tmp_path / name)
        with pytest.raises(ConfigError, match=r"^backbone\.weights=[^\n]+; [^\n]+$"):
            network[0].load_weights()
    network[0].weights = other
    with pytest.raises(ConfigError, match=r"not the weights of backbone\.name=test_resnet \(Missing"):
        network[0].load_weights()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "resnet81"}, r"^backbone\.name=resnet81: .* no such network; did you mean 'resnet18'\?$"),
        ({"name": "resnet18.a9_in1k"}, r"did you mean 'resnet18.a\d_in1k'\?$"),
        ({"name": "hf-hub:timm/resnet18"}, "no such network"),
        ({"item_shape": (4, 16, 16)}, "for images of 3 channels, and these have 4"),
        ({"item_shape": (16,)}, r"^backbone=timm takes images"),
        ({"weights": "x", "pretrained": True}, "leave one of them out$"),
    ],
)
def test_settings_that_timm_cannot_use(settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        TimmNetwork(**{"item_shape": SHAPE, "name": "test_resnet"} | settings)


def test_pretrained_weights_without_a_network_are_reported_in_one_line(monkeypatch: pytest.MonkeyPatch):
    network, create = TimmNetwork(SHAPE, "test_resnet", pretrained=True), timm.create_model

    def offline(name: str, pretrained: bool, **settings: object) -> nn.Module:
        if pretrained:
            raise OSError("Name or service not known\nmore of it")
        return create(name, **settings)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        ConfigError, match=r"^backbone\.pretrained=true: .*\(Name or service not known\); .*=FILE$"
    ):
        network[0].load_weights()


def test_without_timm(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match=r'^backbone=timm: needs .*; pip install "metarun\[timm\]"$'):
        check_name("resnet18")


# Frozen


def state_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.parametrize("frozen", [True, False])
def test_a_frozen_network_keeps_weights_and_averages(frozen: bool):
    backbone = TimmNetwork(SHAPE, "test_efficientnet", frozen=frozen)
    for algorithm in (ProtoNet(backbone, learn_scale=True), CNAPs(backbone, SHAPE, width=4)):
        before = state_of(backbone)
        optimizer = torch.optim.AdamW(algorithm.train().parameters(), lr=0.1)
        algorithm.meta_loss(episodes_of(tasks=1)).loss.sum().backward()
        optimizer.step()
        kept = [torch.equal(value, before[name]) for name, value in state_of(backbone).items()]
        assert all(kept) if frozen else not any(kept[:10])
        assert algorithm.backbone[0].network.training is not frozen


def test_nothing_to_train_is_reported():
    settings = TrainConfig(iterations=5)
    frozen = TimmNetwork(SHAPE, "test_resnet", frozen=True)
    check_trains(ProtoNet(frozen, learn_scale=True), settings)
    with pytest.raises(ConfigError, match=r"^iterations=5: the backbone is frozen, .*iterations=0"):
        check_trains(ProtoNet(frozen), settings)
    settings.iterations = 0
    check_trains(ProtoNet(frozen), settings)
    check_trains(SimpleShot(frozen, classes=5, transform="L2N"), settings)
    with pytest.raises(ConfigError, match=r"^algorithm\.transform=CL2N: .*; choose \S+=L2N, or"):
        check_trains(SimpleShot(frozen, classes=5), settings)


@pytest.mark.parametrize(("name", "frozen"), [("test_resnet", True), ("test_vit", True), ("test_vit", False)])
def test_maml_adapts_the_head_or_all_as_in_a_plain_loop(float64: None, name: str, frozen: bool):
    algorithm = MAML(TimmNetwork(SHAPE, name, frozen=frozen), SGD(0.1, 1), outputs=3).double()
    episodes = episodes_of(tasks=2, shots=1, queries=1)
    names = {n for n, p in algorithm.named_parameters() if p.requires_grad}
    assert (names == {"learner.head.weight", "learner.head.bias"}) is frozen
    grads = [gradient(algorithm, episodes, batching=how) for how in ("grouped", "loop")]
    assert relative_error(*grads) < 1e-10


def test_running_averages_need_a_frozen_network_where_tasks_adapt_weights():
    with pytest.raises(ConfigError, match=r"backbone\.frozen=true"):
        MAML(TimmNetwork(SHAPE, "test_resnet"), SGD(0.1, 1), outputs=3)
