"""`trainval=true`: training on the validation classes, too."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from helpers.run_folders import make
from helpers.runs import UNTESTED
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import OmegaConf

from metarun.commands.ending import check_trainval
from metarun.commands.rates import choose_rates
from metarun.errors import ConfigError
from metarun.training import checkpoint
from metarun.training.records import record_of

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
    done = metarun("train", *UNTESTED, f"init={folder}", status=1)
    assert "all of its 10 classes; choose another dataset, or set trainval=true" in done.stderr
    result = json.loads((folder / "result.json").read_text())
    assert result["name"].startswith("protonet trainval=true on glyphs")
    assert result["validation"]["iteration"] == 12


def test_the_newest_validation_is_that_of_a_run_so_far(tmp_path):
    make(tmp_path, "anil", scores=(0.2, 0.5, 0.4))
    with (tmp_path / ".hydra/config.yaml").open("a") as file:
        file.write("\ntrainval: true\n")
    assert record_of(tmp_path).validation.mean == 0.4


def test_no_rate_is_chosen_on_classes_that_were_trained_on():
    loop = SimpleNamespace(rate=0.1, steps=1, test_steps=None, learned=False)
    cell = SimpleNamespace(
        algorithm=SimpleNamespace(takes_steps=True, inner_loop=loop),
        steps=None,
        model=SimpleNamespace(name="maml"),
        settings=SimpleNamespace(trainval=True),
    )
    with pytest.raises(ConfigError, match="maml was trained on the validation classes, so"):
        choose_rates([cell], [], SimpleNamespace(rates=[0.1, 0.2]), None)


def test_what_needs_held_out_classes_or_has_none_is_refused(metarun):
    done = metarun("train", *RUN, "stop.patience=3", status=1)
    assert "trainval=true: stop.patience needs the score of validation classes that are not" in done.stderr
    done = metarun("train", "dataset=sinusoid", "algorithm=maml", "trainval=true", status=1)
    assert "trainval=true: this dataset has no validation classes to train on" in done.stderr


PLATEAU = {"_target_": "torch.optim.lr_scheduler.ReduceLROnPlateau"}
STEPS = {"_target_": "torch.optim.lr_scheduler.StepLR"}


@pytest.mark.parametrize(
    ("name", "stop", "scheduler", "sweeper"),
    [
        ("stop.at", {"at": 0.9}, None, None),
        ("this scheduler", {}, PLATEAU, None),
        ("a search", {}, STEPS, {"direction": "maximize", "storage": None}),
        (None, {}, STEPS, {}),  # a grid
    ],
)
def test_what_depends_on_the_score_is_refused(monkeypatch, name, stop, scheduler, sweeper):
    mode = RunMode.RUN if sweeper is None else RunMode.MULTIRUN
    hydra = OmegaConf.create({"hydra": {"mode": mode, "sweeper": sweeper}})
    monkeypatch.setattr(HydraConfig.instance(), "cfg", hydra)
    stop = SimpleNamespace(**{"patience": None, "at": None} | stop)
    check_trainval(SimpleNamespace(trainval=False, stop=stop, scheduler=scheduler))
    settings = SimpleNamespace(trainval=True, stop=stop, scheduler=scheduler)
    if name is None:
        return check_trainval(settings)
    with pytest.raises(ConfigError, match=f"^trainval=true: {name} needs the score"):
        check_trainval(settings)
