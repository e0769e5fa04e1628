"""`trainval=true`: training on the validation classes, too."""

from __future__ import annotations

import json

from helpers.runs import UNTESTED

from metarun.training import checkpoint

RUN = [*UNTESTED, "trainval=true", "optimizer.lr=0.0"]


def test_validation_classes_are_trained_on_and_the_newest_weights_count(metarun, trained):
    """Weights that do not change are never better than the first ones, which would stay the best."""
    folder = trained(*RUN)
    best, last = (checkpoint.load(folder / name) for name in ("best.pt", "last.pt"))
    assert best["iteration"] == last["iteration"] == best["best"]["iteration"] == 12
    names = best["train_classes"]["names"]
    assert names == [f"train {i}" for i in range(40)] + [f"validation {i}" for i in range(10)]
    few = ["eval", f"checkpoint={folder}", "episodes=3", "queries=2"]
    assert "trained on 10 of" not in metarun(*few).stderr
    assert "trained on all of its 10 classes" in metarun(*few, "split=validation", status=1).stderr
    assert "data has changed" not in metarun(*few, "split=train").stderr
    result = json.loads((folder / "result.json").read_text())
    assert result["name"].startswith("protonet trainval=true on glyphs")
    assert result["validation"]["iteration"] == 12


def test_what_needs_held_out_classes_or_has_none_is_refused(metarun):
    done = metarun("train", *RUN, "stop.patience=3", status=1)
    assert "trainval=true: stop.patience needs the score of validation classes that are not" in done.stderr
    done = metarun("train", "dataset=sinusoid", "algorithm=maml", "trainval=true", status=1)
    assert "trainval=true: this dataset has no validation classes to train on" in done.stderr
