"""Every YAML is composed, checked and built; each opens with the command that runs it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from helpers.build import built
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict

from metarun.cli.overrides import arrange
from metarun.config.build import instantiate
from metarun.config.check import check
from metarun.config.paths import CONF
from metarun.config.schema import register_frames
from metarun.errors import ConfigError

GROUPS = ("dataset", "algorithm", "backbone", "inner_loop", "hardware")
FILES = sorted(CONF.rglob("*.yaml"))
BACKBONES = sorted(path.stem for path in (CONF / "backbone").glob("*.yaml"))
SMALL = {  # a network of the same kind that is built in no time
    "resnet12": ["backbone.widths=[8,8,8,8]"],
    "resnet18": ["backbone.width=8"],
    "wrn28_10": ["backbone.depth=10", "backbone.width=1"],
}
#: One of each way in which an algorithm uses its network.
KINDS = ("maml", "maml_plus_plus", "cavia", "protonet", "cnaps", "meta_networks")


def composed(command: str, *words: str) -> DictConfig:
    return composed_with_choices(command, *words)[0]


def composed_with_choices(command: str, *words: str) -> tuple[DictConfig, dict[str, str]]:
    """The config of a command line, and which option each group has in it."""
    register_frames()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(command, arrange(command, list(words)), return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg.hydra
    return cfg, choices


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_every_yaml_opens_with_its_command_which_composes_and_checks(path: Path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# metarun "), lines[0]
    words = shlex.split(lines[0].removeprefix("# metarun "))
    command, words = words[0], [word for word in words[1:] if not word.startswith("checkpoint=")]
    words += ["checkpoint=x"] if command in ("eval", "adapt") else []
    words = [word for word in words if not word.startswith(("support=", "query="))]
    assert path.stem in " ".join([command, *words]) or path.stem == "none"
    cfg, choices = composed_with_choices(command, *words)
    check(cfg, command)
    group = path.parent.name
    if group in GROUPS:
        assert choices[group] == path.stem, "its command does not choose it"
    if group in GROUPS and "_target_" in (cfg[group] or {}):
        expected = "metarun.training.hardware." if group == "hardware" else f"metarun.{group}s."
        assert cfg[group]._target_.startswith(expected)


@pytest.mark.parametrize("algorithm", KINDS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_kind_of_algorithm_builds_on_every_backbone(algorithm: str, backbone: str):
    """Every algorithm on conv4 is in tests/commands/test_train.py."""
    words = [f"algorithm={algorithm}", f"backbone={backbone}", "hardware=cpu", *SMALL.get(backbone, [])]
    cfg = composed("train", *words)
    if algorithm == "meta_networks" and backbone in SMALL:  # its weights have a fast twin each
        with pytest.raises(ConfigError, match="chain of layers without shortcuts"):
            built(cfg)
        return
    assert sum(p.numel() for p in built(cfg).parameters()) > 1000


def test_what_is_typed_is_stronger_than_what_a_dataset_asks_for():
    cfg = composed("train", "dataset=sinusoid", "shots=5", "backbone=conv4")
    assert (cfg.ways, cfg.shots, cfg.backbone._target_.rsplit(".")[-1]) == (1, 5, "Conv4")


def test_reptile_brings_its_own_optimizers_which_can_be_replaced():
    cfg = composed("train", "algorithm=reptile")
    assert cfg.inner_loop._target_.endswith("Adam")
    assert cfg.optimizer._target_ == "torch.optim.SGD"
    cfg = composed("train", "algorithm=reptile", "inner_loop=sgd", "optimizer.lr=0.5")
    assert cfg.inner_loop._target_.endswith("inner_loops.sgd.SGD")
    assert cfg.optimizer.lr == 0.5


def test_lists_reach_their_class_as_plain_lists():
    """What a class keeps of its settings goes into checkpoints, which hold plain values only."""
    cfg = composed("train", "optimizer._target_=torch.optim.RAdam", "+optimizer.betas=[0.5,0.9]")
    optimizer = instantiate(cfg.optimizer, params=[torch.zeros(1, requires_grad=True)])
    assert type(optimizer.param_groups[0]["betas"]) is list
