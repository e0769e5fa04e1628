"""`--help` explains every setting, from the comments of conf/*.yaml."""

from __future__ import annotations

import copy
import re
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from metarun.cli.jobs import composing_jobs
from metarun.config.comments import (
    NOT_EXPLAINED,
    chosen_help,
    description,
    facts,
    option_settings,
    settings,
    settings_help,
)
from metarun.config.paths import CONF
from metarun.config.schema import FRAMES, register_frames

pytestmark = pytest.mark.quick
GROUPS = {path.name for path in CONF.iterdir() if path.is_dir()}


@pytest.mark.parametrize("command", FRAMES)
def test_every_setting_of_the_frame_is_in_the_help_with_its_explanation(
    metarun, monkeypatch: pytest.MonkeyPatch, command: str
):
    monkeypatch.setenv("COLUMNS", "80")
    text = metarun(command, "--help").stdout
    assert all(len(line) <= 80 for line in text.splitlines()), "wider than a terminal"
    assert "pairing" not in text.partition("Settings:")[0]
    section = text[text.index("\nSettings:\n") : text.index("\nCurrent values")]
    explained = dict(re.findall(r"^  ([\w.]+) {2,}(\S.*)$", section, re.MULTILINE))
    for each in fields(FRAMES[command]):
        if each.name in GROUPS - explained.keys():  # an option is chosen; its settings are in its own file
            assert re.search(rf"^{each.name}: \w+, ", text, re.MULTILINE), each.name
        elif is_dataclass(each.default_factory) and each.name not in explained:
            nested = [f"{each.name}.{inner.name}" for inner in fields(each.default_factory)]
            assert explained.keys() >= set(nested)
        else:
            assert len(explained[each.name]) > 5, each.name
    assert "Examples:" in text
    if command not in ("export", "report", "runs"):  # which have no groups
        assert re.search(r"^  hardware.precision=float32  float32 \| tf32 \|", section, re.MULTILINE)


@pytest.mark.parametrize("group", sorted(GROUPS - NOT_EXPLAINED))
def test_every_setting_of_an_option_is_in_its_help(group: str):
    for path in (CONF / group).glob("*.yaml"):
        found = {key: value for key, value, _ in option_settings(path)}
        content = OmegaConf.to_container(OmegaConf.load(path))
        prefix = "" if "# @package _global_" in path.read_text() else f"{group}."
        leaves = {f"{prefix}{key}": value for key, value in flat(content).items() if key != "defaults"}
        for key, value in leaves.items():
            name = next((each for each in found if f"{key}.".startswith(f"{each}.")), None)
            assert key.endswith("_target_") or name, f"{path}: {key}"
            assert name != key or yaml.safe_load(found[name]) == value, f"{path}: {key}"


def flat(content: Any, prefix: str = "") -> dict[str, Any]:
    """The values in nested mappings, by their dotted keys."""
    found = {}
    for key, value in (content or {}).items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def test_the_help_of_an_option_includes_what_it_is_made_of(tmp_path):
    folder = tmp_path / "algorithm"
    folder.mkdir()
    (folder / "base.yaml").write_text("# Base.\n_target_: a.B\nrate: 1  # of steps\nsize: 2\n")
    (folder / "own.yaml").write_text(
        "# @package _global_\ndefaults:\n  - /algorithm/base@algorithm\n  - override /inner_loop: none\n"
        "algorithm:\n  rate: ${inner_rate}\n  part: {a: 1}  # a part\nnorm: none  # no # norm\n"
    )
    assert list(option_settings(folder / "own.yaml")) == [
        ("algorithm.rate", "${inner_rate}", "of steps"),
        ("algorithm.size", "2", ""),
        ("algorithm.part", "{a: 1}", "a part"),
        ("norm", "none", "no # norm"),
    ]
    text = chosen_help({"algorithm": "own", "recipe": None}, [{"path": str(tmp_path), "schema": "file"}])
    assert text.splitlines()[:2] == ["algorithm=own:", "  algorithm.rate=$${inner_rate}  of steps"]


@pytest.mark.parametrize("columns", [60, 80, 90, 200])
def test_the_explanations_fit_on_a_terminal(monkeypatch: pytest.MonkeyPatch, columns: int):
    monkeypatch.setenv("COLUMNS", str(columns))
    widths = [len(line) for line in settings_help("train").splitlines()]
    assert max(widths) <= min(max(columns, 80), 100)


def test_explanations_are_read_from_the_comments(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(
        "# metarun own\n# Sentences.\n# licence: MIT\ndefaults:\n  - _self_  # not a setting\n\n"
        "ways: 5  # number of ways\nnested:\n  every: 1  # an interval\n  plain: 2\n# About the rest.\n"
        "root: ${a}#b  # a # mark\nhydra:\n  job: {name: own}  # not a setting\n"
    )
    assert description(path) == "Sentences."
    assert facts(path) == {"licence": "MIT"}
    assert [(each.name, each.comment) for each in settings(path)] == [
        ("ways", "number of ways"),
        ("nested.every", "an interval"),
        ("", "About the rest."),
        ("root", "a # mark"),
    ]


def test_every_explained_setting_is_one_of_the_frame():
    for command, frame in FRAMES.items():
        known = {each.name: each.default_factory for each in fields(frame)}
        for each in settings(CONF / f"{command}.yaml"):
            first, _, rest = each.name.partition(".")
            assert not first or first in known
            if rest:
                assert rest in [inner.name for inner in fields(known[first])]


def test_hydras_store_is_not_copied_for_each_group_by_the_commands_alone():
    register_frames()
    store = ConfigStore.instance()
    with composing_jobs():
        with composing_jobs():
            pass
        assert copy.deepcopy(store) is store
    assert copy.deepcopy(store) is not store, "a program that uses Hydra itself gets its own copy"
