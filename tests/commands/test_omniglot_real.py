"""The main job on real Omniglot, where METARUN_TEST_DATA has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.mark.xdist_group("real")
@pytest.mark.parametrize(
    ("words", "least"),
    [
        (["algorithm=protonet", "ways=20", "validation.ways=5", "meta_batch=1", "backbone.width=32"], 0.90),
        (["algorithm=maml", "backbone.downsample=stride", "backbone.width=16"], 0.78),
    ],
    ids=["protonet", "maml"],
)
def test_it_trains_and_evaluates_on_omniglot(
    metarun, real_cache, tmp_path: Path, test_data: Path, words: list[str], least: float
):
    data = ["dataset=omniglot", f"dataset.root={test_data}/omniglot"]
    run = ["iterations=400", "test.episodes=200", "log.tensorboard=false", "hydra.run.dir=run"]
    metarun("train", *words, *data, *run)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["test"]["mean"] > least
    metarun("eval", "checkpoint=run", "shots=[1,5]", "episodes=200", "queries=5", "hydra.run.dir=out")
    one, five = json.loads((tmp_path / "out/results.json").read_text())["results"]
    assert least - 0.02 < one["mean"] < five["mean"]
