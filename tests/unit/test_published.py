"""Published results are complete and belong to their recipes; verdicts, by hand."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from metarun.commands.verdicts import report_verdicts
from metarun.config.paths import CONF
from metarun.config.published import Outcome, Published, published_in, verdict, verdicts
from metarun.config.schema import register_frames
from metarun.errors import ConfigError
from metarun.reporting.console import TextConsole
from metarun.training.records import record_of

RECIPES = sorted((CONF / "recipe").glob("*.yaml"))
PAPER = Published("A et al. 2020", "table 1", "maml", "omniglot", "conv4", 5, 1, 98.7, 0.4, 600, True)
CHOICES = {"algorithm": "maml", "dataset": "omniglot", "backbone": "conv4"}
HERE = Outcome("accuracy", 100, True, 0.981, 0.004, 5, 1, True, CHOICES, ["recipe=x", "dataset.root=y"])


def test_long_settings_and_names_of_models_are_not_broken(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr("metarun.commands.verdicts.console", TextConsole())
    model, choices = "maml_plus_plus norm=task train_tasks=umtra", CHOICES | {"backbone": "long_network" * 4}
    outcomes = [replace(HERE, model=model, choices=choices), replace(HERE, model="maml")]
    report_verdicts([verdict(PAPER, each) for each in outcomes])
    lines = capsys.readouterr().out.splitlines()
    assert f"{model} beside the paper" in [line.strip() for line in lines]
    assert f"another protocol (5-way 1-shot): backbone={'long_network' * 4}" in lines
    assert all(len(line) <= 80 for line in lines if not line.startswith("another protocol ("))
    first, second = (line.rstrip() for line in lines if " ± " in line)
    assert first.endswith("  another protocol") and second.endswith("  short by 0.60 %")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_results_of_a_recipe_are_those_of_its_header_and_of_its_protocol(path: Path):
    register_frames()
    text = path.read_text("utf-8")
    content = OmegaConf.to_container(OmegaConf.load(path))
    assert "published" in content, "has no `published:`; write [] if the paper states no number"
    if not (own := published_in(content)):
        return
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"recipe={path.stem}"], return_hydra_config=True)
    choices, shape = cfg.hydra.runtime.choices, cfg.validation
    shots = cfg.shots if shape.shots is None else shape.shots
    assert (shape.ways or cfg.ways, shots) in {(each.ways, each.shots) for each in own}
    header = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    for each in own:
        for group in ("algorithm", "dataset", "backbone"):
            assert getattr(each, group) == choices[group]
        for key in each.settings or {}:
            assert OmegaConf.select(cfg, key) is not None, f"there is no setting {key}"
        assert re.search(r"et al\. \d{4}|and \w+ \d{4}", each.paper)
        if each.metric == "accuracy":  # the sinusoid's header states no number
            assert re.search(rf"\b{re.escape(f'{each.value:g}')}0?\b", header), each.value
            if each.interval is not None:
                assert re.search(rf"± {re.escape(f'{each.interval:g}')}0?\b", header), each.interval


@pytest.mark.parametrize(
    ("mean", "interval", "words"),
    [
        (0.987, 0.001, "reproduced"),
        (0.9831, 0.004, "reproduced"),  # 98.7 is just inside
        (0.995, 0.001, "reproduced"),  # better
        (0.9829, 0.004, "short by 0.41 %"),
        (0.5, 0.01, "short by 48.70 %"),
        (math.nan, math.nan, "short by nan %"),
    ],
)
def test_verdicts_by_hand(mean: float, interval: float, words: str):
    assert verdict(PAPER, replace(HERE, mean=mean, interval=interval)).words == words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ways": 20}, "20-way 1-shot, not 5-way 1-shot"),
        ({"shots": 5}, "5-way 5-shot, not 5-way 1-shot"),
        ({"transductive": False}, "not transductive"),
        ({"split": "validation"}, "split=validation"),
        ({"choices": CHOICES | {"backbone": "resnet12"}}, "backbone=resnet12"),
        ({"choices": CHOICES | {"dataset": "glyphs"}}, "dataset=glyphs"),
        ({"overrides": ["backbone.width=32"]}, "backbone.width=32"),
        ({"overrides": ["++dataset.rotations=all", "norm=group"]}, "dataset.rotations=all, norm=group"),
        ({"metric": "macro_f1"}, "macro_f1, not accuracy"),
        ({"rate": 0.3}, "inner rate 0.3, chosen for the test"),
        ({"steps": 3, "config": {"inner_loop": {"steps": 1, "test_steps": None}}}, "3 inner steps, not 1"),
    ],
)
def test_another_protocol_is_named(change: dict, words: str):
    assert verdict(PAPER, replace(HERE, **change)).words == f"another protocol: {words}"


def test_a_lower_result_of_a_shorter_training_and_an_error_that_is_lower():
    short = replace(HERE, overrides=["iterations=10", "seed=1", "dataset.root=/data"], mean=0.5)
    assert verdict(PAPER, short).words == "short by 48.70 % (iterations=10)"
    error = replace(PAPER, metric="mse", value=0.19, interval=None)
    here = replace(HERE, metric="mse", scale=1, higher_is_better=False)
    assert verdict(error, replace(here, mean=0.15, interval=0.01)).words == "reproduced"
    assert verdict(error, replace(here, mean=0.2, interval=0.02)).words == "reproduced"
    assert verdict(error, replace(here, mean=0.5, interval=0.02)).words == "short by 0.31"
    assert verdict(replace(PAPER, differs="an ensemble"), HERE).words == "another protocol: an ensemble"


def test_each_task_is_compared_with_its_own_result():
    two = [PAPER, replace(PAPER, ways=20, value=95.0), replace(PAPER, transductive=False, value=97.0)]
    here = [HERE, replace(HERE, ways=20), replace(HERE, shots=5), replace(HERE, transductive=False)]
    assert [each.published.value for each in verdicts(two, here)] == [98.7, 95.0, 97.0]
    (only,) = verdicts(two, here[2:3])
    assert only.kind == "another protocol"
    assert verdicts([], here) == []


def test_results_after_several_numbers_of_inner_steps():
    some = [replace(PAPER, value=98.0), *(replace(PAPER, steps=n, value=90.0 + n) for n in (0, 1, 3))]
    here = replace(HERE, config={"inner_loop": {"steps": 1, "test_steps": 2}})
    found = verdicts(some, [here, *(replace(here, steps=n) for n in (0, 1, 2, 3, 4))])
    assert [each.published.value for each in found[:-1]] == [98.0, 90.0, 91.0, 98.0, 93.0]
    assert [each.kind for each in found] == ["reproduced"] * 5 + ["another protocol"]
    assert some[3].task == "5-way 1-shot, 3 steps"


def test_a_result_of_further_settings_is_that_of_runs_with_them():
    two = [
        replace(PAPER, settings={"algorithm.context": 5, "dataset.rate": [1, 2]}, value=v)
        for v in (90.0, 80.0)
    ]
    two[1] = replace(two[1], settings={"algorithm.context": 2})
    config = {"algorithm": {"context": 5}, "dataset": {"rate": [1.0, 2.0]}}
    five = replace(HERE, config=config, overrides=["algorithm.context=5", "dataset.rate=[1,2]"])
    assert [(v.published.value, v.words) for v in verdicts(two, [five])] == [(90.0, "reproduced")]
    two_here = replace(HERE, config={"algorithm": {"context": 2}}, overrides=["dataset.rate=3"])
    (found,) = verdicts(two, [two_here])
    assert (found.published.value, found.words) == (80.0, "another protocol: dataset.rate=3")
    (other,) = verdicts(two, [replace(HERE, config={"algorithm": {"context": 3}})])
    assert other.words == "another protocol: algorithm.context=3, not 2"
    short = replace(PAPER, settings={"meta_batch": 4}, value=99.9)
    typed = replace(HERE, config={"meta_batch": 4}, overrides=["meta_batch=4", "iterations=9"])
    assert verdict(short, typed).words == "short by 1.80 % (iterations=9)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("settings=context", "published.0.settings=context: is not of the right type"),
        ("~interval", "published.0: has no interval; add it, as null"),
        ("+price=3", "published.0.price: there is no such fact"),
        ("ways=five", "published.0.ways=five: is not of the right type"),
        ("transductive=1", "published.0.transductive=1: is not of the right type"),
        ("value=null", "published.0.value=None: is not of the right type"),
    ],
)
def test_an_incomplete_result_is_an_error(change: str, message: str):
    entry = dict(vars(PAPER))
    key, _, value = change.lstrip("~+").partition("=")
    entry.pop(key, None)
    if not change.startswith("~"):
        entry[key] = json.loads(value) if value in ("1", "3", "null") else value
    with pytest.raises(ConfigError, match=re.escape(message)):
        published_in({"published": [entry]})
    with pytest.raises(ConfigError, match="must be a list of results"):
        published_in({"published": "98.7 %"})


def test_train_eval_and_runs_put_them_beside_each_other(metarun, tmp_path: Path):
    words = [
        "recipe=cavia_sinusoid",
        "iterations=2",
        "validation.episodes=2",
        "test.episodes=20",
        "hardware=cpu",
    ]
    done = metarun("train", *words, "log.tensorboard=false", "hydra.run.dir=outputs/run")
    assert "Zintgraf et al. 2019, table 1" in done.stdout
    (found,) = json.loads(Path("outputs/run/result.json").read_text())["verdicts"]
    assert found["published"] == 0.19 and found["here"] == pytest.approx(0.19 + found["difference"])
    assert found["verdict"] == f"short by {found['difference']:.4g} (iterations=2)"
    assert record_of(Path("outputs/run")).verdicts == (found["verdict"],)
    assert found["verdict"] in metarun("runs").stdout
    metarun(
        "eval", "checkpoint=outputs/run", "shots=[5,10]", "episodes=20", "hydra.run.dir=out", "hardware=cpu"
    )
    (again,) = json.loads(Path("out/results.json").read_text())["verdicts"]
    assert again["shots"] == 10 and again["published"] == 0.19
