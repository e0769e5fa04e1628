"""Every example of docs/adding_an_algorithm.md, as a stranger runs it: in an empty folder, without a fork."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "adding_an_algorithm.md").read_text("utf-8")
FILES = re.findall(r"^```(?:python|yaml)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^```bash\nmetarun (train .*?)\n```", PAGE, re.MULTILINE | re.DOTALL)
SMALL = [
    *("iterations=4", "meta_batch=2", "validation.every=2", "validation.episodes=4", "test.episodes=4"),
    *("log.every=2", "log.tensorboard=false", "hardware=cpu", "hardware.threads=1", "hydra.run.dir=run"),
]
GLYPHS = [
    *("dataset.train_classes=20", "dataset.validation_classes=10", "dataset.test_classes=10"),
    *("dataset.size=16", "backbone.width=8"),
]


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The page's files in the folder in which `metarun` runs."""
    for text in FILES:
        path = tmp_path / re.findall(r"^# (my_\S+)$", text, re.MULTILINE)[0]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    for module in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        monkeypatch.delitem(sys.modules, module)  # that of an earlier test's folder
    return tmp_path


def test_every_code_block_is_a_file_or_a_command():
    assert len(FILES) + len(COMMANDS) == PAGE.count("\n```") / 2
    assert len(FILES) >= 12 and len(COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_trains_tests_and_evaluates(metarun, own_folder: Path, command: str):
    words = shlex.split(command)
    small = SMALL if any(word.startswith("dataset=") for word in words) else [*SMALL, *GLYPHS]
    hint = shlex.split(metarun(*words, *small).stdout.strip().splitlines()[-1])
    result = json.loads((own_folder / "run" / "result.json").read_text())
    assert result["test"]["episodes"] == 4
    if "metrics=[accuracy,top2]" in words:
        scores = result["test"]["metrics"]
        assert scores["top2"]["mean"] >= scores["accuracy"]["mean"] > 0
    assert hint[:4] == ["next:", "metarun", "eval", "checkpoint=run"]
    metarun("eval", *hint[3:], "episodes=4", "queries=5", "hydra.run.dir=tested")
    (row,) = json.loads((own_folder / "tested" / "results.json").read_text())["results"]
    assert row["episodes"] == 4


FIXED = """
import torch
from torch import nn

class Fixed(nn.Module):
    frozen, features = True, 9

    def __init__(self):
        super().__init__()
        self.register_buffer("filters", torch.zeros(9, 1, 8, 8))

    def load_weights(self):
        self.filters.copy_(torch.randn(9, 1, 8, 8, generator=torch.Generator().manual_seed(0)))

    def forward(self, x):
        return nn.functional.conv2d(x, self.filters, stride=4).relu().amax((2, 3))
"""


def test_a_typed_class_gets_no_settings_that_it_does_not_take(metarun, own_folder: Path):
    (own_folder / "my_package" / "fixed.py").write_text(FIXED)
    words = [
        "backbone._target_=my_package.fixed.Fixed",
        *SMALL,
        *GLYPHS[:1],
        "dataset.size=17",
        "iterations=0",
    ]
    done = metarun("train", *words)
    assert "protonet backbone=my_package.fixed.Fixed on glyphs" in done.stderr
    backbone = OmegaConf.load(own_folder / "run" / ".hydra" / "config.yaml").backbone
    assert backbone == {"_target_": "my_package.fixed.Fixed"}
    done = metarun("train", *words, "backbone.slope=0.1", "hydra.run.dir=other", status=1)
    assert "backbone.slope: backbone=my_package.fixed.Fixed has no setting 'slope'" in done.stderr
    done = metarun("train", "backbone._target_=my_package.fixed.Lost", status=1)
    assert "backbone._target_=my_package.fixed.Lost: import failed" in done.stderr


def test_a_frozen_network_is_tested_without_training_and_embeds_each_image_once(metarun, own_folder: Path):
    (own_folder / "my_package" / "fixed.py").write_text(FIXED)
    (own_folder / "my_conf" / "backbone" / "fixed.yaml").write_text("_target_: my_package.fixed.Fixed\n")
    words = ["-cd", "my_conf", "backbone=fixed", "algorithm=protonet", *SMALL, *GLYPHS[:-1]]
    done = metarun("train", *words, status=1)
    assert "iterations=4: the backbone is frozen" in done.stderr
    assert "set iterations=0 to test it as it is" in done.stderr
    done = metarun("train", *words, "iterations=0", "queries=15", "test.episodes=20")
    assert "backbone=fixed was trained on are not known" in done.stderr
    assert [done.stderr.count(f"{n}/{n} ") for n in (400, 200)] == [0, 2]  # the training split is left out
    test = json.loads((own_folder / "run" / "result.json").read_text())["test"]
    done = metarun("eval", "checkpoint=run", "trust=[my_package]", "episodes=20", "hydra.run.dir=tested")
    assert "features" not in done.stderr
    (row,) = json.loads((own_folder / "tested" / "results.json").read_text())["results"]
    assert (row["mean"], row["episodes_hash"]) == (test["mean"], test["episodes_hash"])
    assert row["mean"] > 0.22


def test_a_method_that_needs_examples_refuses_bandits_in_one_line(metarun, own_folder: Path):
    done = metarun("train", "-cd", "my_conf", "dataset=bandits", "algorithm=protonet", status=1)
    (line,) = done.stderr.strip().splitlines()
    assert (
        line.startswith("metarun: error: ")
        and "needs labelled support and query examples" in line
        and "algorithm=maml" in line
    )


@pytest.mark.parametrize("word", ["inner_loop=adam", "inner_loop.steps=3", "inner_rate=0.1"])
def test_a_method_without_inner_steps_refuses_their_settings(metarun, own_folder: Path, word: str):
    done = metarun("train", "-cd", "my_conf", "algorithm=nearest", word, status=1)
    assert done.stderr.startswith(f"metarun: error: {word}: nothing reads it")


@pytest.mark.parametrize("name", ["clusters", "topics"])
def test_datasets_without_images_are_counted_by_metarun_data(metarun, own_folder: Path, name: str):
    assert "30" in metarun("data", "-cd", "my_conf", f"dataset={name}").stdout


def test_a_sweep_shows_a_datasets_own_metric(metarun, own_folder: Path):
    words = [*("-cd", "my_conf", "dataset=bandits", "algorithm=maml,reptile", "backbone=mlp"), *SMALL[:-1]]
    done = metarun("train", "-m", *words)
    mean = json.loads(next(own_folder.glob("outputs/sweep/*/0/result.json")).read_text())["test"]["mean"]
    assert f"{mean:.4f} ±" in done.stdout
