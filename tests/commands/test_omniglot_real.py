"""The main job on real Omniglot, where METARUN_TEST_DATA has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.mark.xdist_group("real")
@pytest.mark.parametrize(
    ("words", "least"),
    [
        (["algorithm=protonet", "ways=10", "validation.ways=5", "iterations=200"], 0.82),
        (["algorithm=maml", "backbone.downsample=stride", "backbone.width=32", "iterations=200"], 0.74),
    ],
    ids=["protonet", "maml"],
)
def test_it_trains_and_evaluates_on_omniglot(
    metarun, real_cache, tmp_path: Path, test_data: Path, words: list[str], least: float
):
    data = ["dataset=omniglot", f"dataset.root={test_data}/omniglot"]
    metarun("train", *words, *data, "hydra.run.dir=run", "test.episodes=100", "log.tensorboard=false")
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["test"]["mean"] > least
    metarun("eval", "checkpoint=run", "shots=[1,5]", "episodes=60", "queries=5", "hydra.run.dir=out")
    one, five = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert least - 0.06 < one["mean"] < five["mean"]
