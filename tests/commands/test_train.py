"""`metarun train` as a person types it, on small real runs."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.build import ALGORITHMS
from helpers.runs import LEARNED, SMALLER, TINY, UNTESTED, some_quick
from omegaconf import OmegaConf
from scipy import stats

from metarun.commands.sweeps import jobs_in, over_seeds
from metarun.storage.locks import locked
from metarun.training import checkpoint, trainer

# A run of every algorithm needs no more than a validation, a checkpoint and what follows them.
TWO = "iterations=2 validation.every=2 validation.episodes=3 test.episodes=3 checkpoint.every=2 log.every=2"
FILES = {"best.pt", "last.pt", "metrics.jsonl", "result.json"}


def run_folder(parent: Path) -> Path:
    (folder,) = parent.glob("outputs/*/*")
    return folder


def rows_of(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl without the times, which no two runs share."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("algorithm", some_quick(ALGORITHMS, "maml", "protonet"))
def test_every_algorithm_trains_evaluates_and_adapts(metarun, tmp_path: Path, algorithm: str):
    done = metarun("train", f"algorithm={algorithm}", *TINY, *TWO.split(), *SMALLER.get(algorithm, []))
    folder = run_folder(tmp_path)
    assert {path.name for path in folder.iterdir()} >= FILES
    assert f"metarun eval checkpoint={folder.relative_to(tmp_path)}" in done.stdout
    result = json.loads((folder / "result.json").read_text())
    assert result["iterations"] == 2
    assert 0 <= result["test"]["mean"] <= 1
    evaluated = metarun("eval", f"checkpoint={folder}", "episodes=3", "queries=2", "shots=[1,2]")
    ways = int(re.search(r"(\d+)-way 2-shot", evaluated.stdout)[1])
    adapted = metarun("adapt", f"checkpoint={folder}", "queries=2")
    assert f"{2 * ways} queries" in adapted.stdout


@pytest.mark.parametrize("algorithm", ["maml", "pretrain", "matching"])
def test_regression_trains_evaluates_and_adapts(metarun, tmp_path: Path, algorithm: str):
    """Every other algorithm is in tests/unit/test_regression.py."""
    words = ["train", "dataset=sinusoid", f"algorithm={algorithm}", "meta_batch=2", *TWO.split()]
    words += ["hardware=cpu", f"hardware.compile={'auto' if algorithm == 'maml' else 'false'}"]
    done = metarun(*words, "log.tensorboard=false")
    assert "mse" in done.stdout
    folder = run_folder(tmp_path)
    steps = [] if algorithm == "matching" else ["steps=2"]
    metarun("eval", f"checkpoint={folder}", "episodes=10", *steps, "hydra.run.dir=evaluated")
    results = json.loads((tmp_path / "evaluated/results.json").read_text())["results"]
    assert results[0]["metric"] == "mse"
    assert "mse" in metarun("adapt", f"checkpoint={folder}", "hydra.run.dir=adapted").stdout


@pytest.mark.pictures
def test_a_run_and_an_adaptation_leave_pictures(metarun, tmp_path: Path):
    words = ["train", "dataset=gp", "algorithm=cnp", "algorithm.width=8", "iterations=4", "test.episodes=2"]
    words += ["validation.every=2", "validation.episodes=5"]
    metarun(*words, "log.tensorboard=false", "hydra.run.dir=run")
    metarun("adapt", "checkpoint=run", "hydra.run.dir=adapted")
    for name in ("run/learning_curve.png", "adapted/curves.png"):
        assert (tmp_path / name).stat().st_size > 5000
    metarun("eval", "checkpoint=run", "episodes=20", "hydra.run.dir=seen")
    rows = json.loads((tmp_path / "seen/results.json").read_text())["results"]
    assert [row["model"] for row in rows] == ["cnp", "exact GP", "exact GP, joint"]
    with (tmp_path / "adapted/predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(float(row["deviation"]) > 0.1 for row in rows)
    assert all(-2 <= float(row["x"]) <= 2 for row in rows) and len({row["x"] for row in rows}) == len(rows)


def test_a_method_that_classifies_says_so(metarun):
    done = metarun("train", "dataset=sinusoid", "algorithm=protonet", status=1)
    assert "algorithm=protonet: needs tasks with classes" in done.stderr


@pytest.mark.xdist_group("learned")
def test_training_learns(trained):
    """Well above both chance and the untrained network."""
    folders = trained(*LEARNED), trained(*LEARNED, "iterations=1", "optimizer.lr=1e-9")
    learned, start = (json.loads((run / "result.json").read_text())["test"]["mean"] for run in folders)
    assert learned > max(start + 0.08, 0.7)


def test_the_same_seed_gives_the_same_run(metarun, trained, tmp_path: Path):
    metarun("train", "algorithm=maml", *UNTESTED, "hydra.run.dir=again")
    metarun("train", "algorithm=maml", *UNTESTED, "hydra.run.dir=other", "seed=1")
    first = rows_of(trained("algorithm=maml", *UNTESTED))
    assert first == rows_of(tmp_path / "again") != rows_of(tmp_path / "other")


def test_a_sweep_ends_with_one_table_and_is_not_overwritten_by_another(metarun, tmp_path: Path):
    words = ["train", "-m", "algorithm=maml,protonet", "seed=0,1", *TINY, "iterations=2"]
    done = metarun(*words, "hydra.sweep.dir=sweep")
    assert "4 jobs" in done.stdout
    lines = (tmp_path / "sweep/sweep.csv").read_text().splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("job,algorithm,seed")
    before = everything(tmp_path / "sweep")
    again = metarun(*words, "sweep=sweep")
    assert "job 4 of 4: algorithm=protonet seed=1 (done before)" in again.stderr
    assert done.stdout.endswith(again.stdout)
    other = metarun(*words, "ways=4", "sweep=sweep", status=1).stderr
    assert "contains another sweep, whose job 0 has another ways;" in other
    with locked(tmp_path / "sweep/sweep"):
        assert "another process runs this sweep" in metarun(*words, "sweep=sweep", status=1).stderr
    assert everything(tmp_path / "sweep") == before
    scores = [float(row["validation accuracy"]) for row in csv.DictReader(lines)]
    means = over_seeds(jobs_in(tmp_path / "sweep"))
    for row, own in zip(means, (scores[:2], scores[2:]), strict=True):
        low, high = stats.t.interval(0.95, 1, np.mean(own), stats.sem(own))
        assert row["validation"] == pytest.approx({"mean": (low + high) / 2, "interval": (high - low) / 2})
        assert f"{100 * np.mean(own):.2f} ± {50 * (high - low):.2f} %" in done.stdout
    tables = again.stdout.split("saved")[0].partition("\n")[2]
    assert tables in metarun("runs", "sweep").stdout
    assert metarun("runs", "-m", "folder=sweep", "show=1,2").stdout.count("4 runs in sweep") == 2


def test_a_job_runs_without_settings_that_only_other_jobs_read(metarun, tmp_path: Path):
    """Its config lacks inner_loop.steps; nothing in it reads inner_rate, nor an inner loop."""
    only = ["inner_loop=sgd", "inner_loop.steps=2", "inner_rate=0.1"]
    words = ["train", "-m", *UNTESTED, "iterations=1", *only, "sweep=sweep"]
    done = metarun(*words, "algorithm=matching,anil")
    for word in only:
        assert done.stderr.count(f"{word}: nothing reads it in this job, which runs without it") == 1
    first, second = csv.DictReader((tmp_path / "sweep/sweep.csv").read_text().splitlines())
    assert (first["inner_rate"], second["inner_rate"]) == ("", "0.1")
    notes = checkpoint.load(tmp_path / "sweep/0/last.pt")
    assert not set(only) & set(notes["overrides"]) and notes["config"]["inner_loop"] is None
    again = metarun(*words, "algorithm=matching,anil")
    assert "job 1 of 2: algorithm=matching (done before)" in again.stderr and again.stderr.count("\n") == 2
    other = metarun(*words, "algorithm=protonet,anil", status=1).stderr
    assert "contains another sweep, whose job 0 has another algorithm;" in other


def test_settings_that_no_job_reads_are_refused_in_the_rows_of_all(metarun, tmp_path: Path):
    words = ["train", "-m", *UNTESTED, "iterations=1", "sweep=sweep", "algorithm=matching,protonet,nosuch"]
    metarun(*words, "inner_rate=0.1", status=1)
    rows = list(csv.DictReader((tmp_path / "sweep/sweep.csv").read_text().splitlines()))
    refused = "inner_rate=0.1: nothing reads it here; leave it out"
    assert [row["error"] for row in rows[:2]] == [refused, refused]
    assert "algorithm=nosuch: no such algorithm" in rows[2]["error"]
    listed = metarun("runs", "sweep").stdout
    for method, error in {"matching": refused, "protonet": refused, "nosuch": "algorithm=nosuch: no"}.items():
        assert re.search(rf" {method} +glyphs +failed\n +sweep/\d: {error}", listed)
    again = metarun(*words, "inner_rate=0.1", "retry=none", status=1)
    assert "job 1 of 3: algorithm=matching (failed before)" in again.stderr
    assert "error" not in again.stderr
    typo = metarun("train", "-m", *UNTESTED, "algorithm=maml,matching", "inner_loop.stps=2", status=1)
    assert "no such setting" in typo.stderr and not typo.stdout
    assert "retry=all: must be failed" in metarun(*words, "retry=all", status=1).stderr
    assert "retry=none: is only read in a sweep" in metarun("train", "retry=none", status=1).stderr


def test_a_failed_job_is_a_row_and_the_sweep_goes_on(metarun, tmp_path: Path):
    words = ["train", "seed=0", "-m", "ways=5,50", *TINY, "iterations=2", "hydra.sweep.dir=sweep"]
    done = metarun(*words, status=1)
    assert "ways=50: glyphs train has 40 classes" in " ".join(done.stderr.split())
    text = (tmp_path / "sweep/sweep.csv").read_text()
    assert len(text.splitlines()) == 3
    assert "ways=50" in text


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(metarun, tmp_path: Path):
    words = ["train", "algorithm=maml", *TINY, "hydra.run.dir=run", "iterations=200"]
    done = metarun(*words, "optimizer._target_=torch.optim.SGD", "optimizer.lr=1e30", status=1)
    assert "no longer finite" in done.stderr
    assert "Traceback" not in done.stderr
    for path in (tmp_path / "run").glob("*.pt"):
        weights = torch.load(path, weights_only=True)["algorithm"].values()
        assert all(weight.isfinite().all() for weight in weights)


def test_tensorboard_has_the_curves(metarun, tmp_path: Path):
    metarun("train", *TINY, "log.tensorboard=true", "hydra.run.dir=run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("validation/accuracy")] == [0, 6, 12]


def test_bf16_learns_too(metarun, tmp_path: Path):
    """Autocast must not keep the first step's weights."""
    words = ["train", "backbone.width=16", "iterations=120", "validation.every=60", "test.episodes=0"]
    data = ["dataset.train_classes=100", "log.tensorboard=false", "hardware.threads=1", "log.every=10"]
    data.append("validation.episodes=5")
    metarun(*words, *data, "hardware.precision=bf16", "hydra.run.dir=run")
    losses = [row["loss"] for row in rows_of(tmp_path / "run") if row["split"] == "train"]
    assert sum(losses[-3:]) < 0.75 * sum(losses[:3])


def test_best_is_the_best_validation(metarun, tmp_path: Path):
    for words, key, best in ((TINY, "accuracy", max), (["dataset=sinusoid"], "mse", min)):
        more = ["iterations=30", "validation.every=3", "log.tensorboard=false", "optimizer.lr=0.05"]
        more.append("validation.episodes=20")
        folder = tmp_path / key
        metarun("train", *words, *more, "test.episodes=20", f"hydra.run.dir={folder}")
        rows = [row for row in rows_of(folder) if row["split"] == "validation"]
        wanted = best(row[key] for row in rows)
        result = json.loads((folder / "result.json").read_text())
        assert result["validation"]["mean"] == pytest.approx(wanted)
        first = next(row["iteration"] for row in rows if row[key] == wanted)
        assert torch.load(folder / "best.pt", weights_only=True)["iteration"] == first
        assert result["test"]["mean"] != result["validation"]["mean"]


def test_best_is_the_start_where_training_does_not_help(metarun, tmp_path: Path):
    words = ["dataset=sinusoid", "algorithm=maml", "iterations=3", "hydra.run.dir=run", "test.episodes=20"]
    words += ["validation.episodes=20", "log.tensorboard=false", "hardware=cpu", "hardware.compile=false"]
    done = metarun("train", *words, "optimizer.lr=0.5")
    assert "training did not help: best.pt is the start of the run" in done.stdout
    start, end = (row for row in rows_of(tmp_path / "run") if row["split"] == "validation")
    assert (start["iteration"], end["iteration"]) == (0, 3) and start["mse"] < end["mse"]
    best, last = (checkpoint.load(tmp_path / f"run/{name}.pt") for name in ("best", "last"))
    assert (best["iteration"], best["best"]["score"], last["best"]) == (0, start["mse"], best["best"])
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["validation"]["iteration"] == 0
    metarun("eval", "checkpoint=run", "episodes=20", "queries=10", "hydra.run.dir=evaluated")
    evaluated = json.loads((tmp_path / "evaluated/results.json").read_text())["results"][0]
    assert (evaluated["episodes_hash"], evaluated["mean"]) == (
        result["test"]["episodes_hash"],
        result["test"]["mean"],
    )


def test_a_start_that_cannot_be_evaluated_is_no_candidate(metarun, tmp_path: Path, monkeypatch):
    """Such as with running averages that no training step has filled yet."""
    losses = iter([torch.tensor([float("nan")])])
    measure = trainer.evaluate

    def evaluate(*args):
        result = measure(*args)
        return replace(result, losses=next(losses, result.losses))

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    done = metarun("train", *UNTESTED, "iterations=2", "hydra.run.dir=run")
    assert "the validation loss is not finite; best.pt will be a later one" in done.stderr
    assert [row["iteration"] for row in rows_of(tmp_path / "run") if "interval" in row] == [2]
    assert checkpoint.load(tmp_path / "run/best.pt")["iteration"] == 2


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.iterdir() if path.is_file()]
    return {path.name: path.read_bytes() for path in files}


def test_a_folder_that_holds_a_run_is_not_overwritten(metarun, trained, tmp_path: Path):
    shutil.copytree(trained(*UNTESTED), tmp_path / "run")
    before = contents(tmp_path / "run")
    done = metarun("train", *TINY, "hydra.run.dir=run", "ways=3", status=1)
    assert "already contains a run" in done.stderr and "resume=run" in done.stderr
    assert contents(tmp_path / "run") == before


def test_two_do_not_train_in_one_folder(metarun, trained, tmp_path: Path):
    """Nor does one go on with a run that has not stopped; nothing there changes."""
    pytest.importorskip("fcntl", reason="no locks on this system")
    shutil.copytree(trained(*UNTESTED), tmp_path / "run")
    before = everything(tmp_path / "run")
    assert not any("lock" in name for name in before)
    with locked(tmp_path / "run/run") as alone:
        assert alone
        for words in (["resume=run", "iterations=14"], [*TINY, "hydra.run.dir=run"]):
            assert "another metarun train is running" in metarun("train", *words, status=1).stderr
        assert everything(tmp_path / "run") == before
    metarun("train", "resume=run", "iterations=14")


def test_a_sweep_leaves_a_folder_in_use_as_it_is(metarun, tmp_path: Path):
    pytest.importorskip("fcntl", reason="no locks on this system")
    words = ["train", "-m", "seed=0,1", *TINY, "iterations=2", "hydra.sweep.dir=sweep"]
    (tmp_path / "sweep/0").mkdir(parents=True)
    (tmp_path / "sweep/0/result.json").write_text("{}")
    with locked(tmp_path / "sweep/0/run"):
        done = metarun(*words, status=1)
    assert "another metarun train is running" in done.stderr
    assert "2 jobs" in done.stdout
    after = everything(tmp_path / "sweep/0")
    assert after.pop("result.json") == b"{}"
    assert "is running" in json.loads(after.pop("failure.json"))["error"]
    assert not after


def test_one_way_and_width_zero_are_refused(metarun):
    for word, message in (
        ("ways=1", "ways=1: classification needs at least 2 classes; set ways to 2 or more"),
        ("backbone.width=0", "backbone.width=0: must be above 0"),
    ):
        words = [other for other in TINY if other.split("=")[0] != word.split("=")[0]]
        assert message in metarun("train", *words, word, status=1).stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("ways=12", "ways=12: .* 10 classes; lower ways to at most 10, or set validation.ways"),
        ("validation.ways=11", "validation.ways=11: .*; lower validation.ways to at most 10"),
        (
            "validation.shots=20",
            "validation.shots=20 and .*; lower validation.shots or queries, or set valid",
        ),
        ("dataset.test_classes=4", "at most 4, or set validation.ways, or set test.episodes=0 for no test"),
    ],
)
def test_small_splits_name_the_settings_of_their_tasks(metarun, words: str, says: str):
    assert re.search(says, metarun("train", *TINY, words, status=1).stderr)


def test_a_run_that_never_saved_is_distinguished_from_a_missing_folder(metarun, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text("")
    assert "before its first checkpoint; start it again" in metarun("train", "resume=run", status=1).stderr


def everything(folder: Path) -> dict[str, bytes]:
    """All files but the open lock's."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_hydras_notes_are_there(trained):
    run = trained(*UNTESTED)
    notes = {path.stem: OmegaConf.load(path) for path in (run / ".hydra").iterdir()}
    assert notes["config"].meta_batch == torch.load(run / "last.pt")["config"]["meta_batch"]
    assert set(TINY) <= set(notes["overrides"])
    assert notes["hydra"].hydra.job.name == "train"


def test_a_sweep_over_a_run_that_is_not_there_tells_of_each_job(metarun):
    done = metarun("train", "-m", "resume=nowhere/last.pt", "iterations=3,4", status=1)
    assert "2 jobs" in done.stdout
    assert done.stderr.count("no such checkpoint") == 2


def test_a_schedule_cannot_be_stretched_and_iterations_cannot_be_undone(metarun, tmp_path: Path):
    metarun("train", "algorithm=reptile", *TINY, "hydra.run.dir=run", "test.episodes=0")
    assert (
        "schedule of this run is for 12" in metarun("train", "resume=run", "iterations=24", status=1).stderr
    )
    assert "already done 12" in metarun("train", "resume=run", "iterations=3", status=1).stderr


def test_a_plateau_lowers_the_rate_by_the_validation_scores(metarun, tmp_path: Path):
    """As PyTorch's scheduler does with the scores of metrics.jsonl, but for that of the start."""
    words = ["scheduler={_target_:torch.optim.lr_scheduler.ReduceLROnPlateau,patience:0,threshold:0.1}"]
    words += [*UNTESTED, "optimizer.lr=1e-6", "validation.every=2", "log.every=1", "hydra.run.dir=run"]
    metarun("train", *words)
    rows = rows_of(tmp_path / "run")
    optimizer = torch.optim.SGD([torch.ones(1)], lr=1e-6)
    expected = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", patience=0, threshold=0.1)
    rates = []
    for row in rows:
        if row["split"] == "train":
            assert row["learning_rate"] == optimizer.param_groups[0]["lr"]
            rates.append(row["learning_rate"])
        elif row["iteration"]:
            expected.step(row["accuracy"])
    assert len(set(rates)) > 2


def test_a_mistake_removes_no_folder_of_the_users(metarun, tmp_path: Path):
    metarun("train", "resume=nowhere", status=1)
    assert tmp_path.is_dir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    metarun("train", "ways=0", "hydra.run.dir=mine", status=1)
    assert (tmp_path / "mine/notes.txt").read_text() == "keep"


def test_an_optimizer_keeps_the_way_of_running_that_was_typed(metarun):
    metarun("train", *UNTESTED, "iterations=2", "+optimizer.foreach=true")
    metarun("train", *UNTESTED, "iterations=2", "optimizer._target_=torch.optim.RAdam", "hydra.run.dir=other")


def test_an_optimizer_with_lists_of_its_own_leaves_readable_checkpoints(metarun, tmp_path: Path):
    words = ["optimizer._target_=torch.optim.RAdam", "+optimizer.betas=[0.5,0.9]"]
    metarun("train", *TINY, *words, "hydra.run.dir=run", "test.episodes=0")
    metarun("eval", "checkpoint=run", "episodes=5", "queries=2")
    metarun("train", "resume=run", "iterations=14")


def test_a_users_own_class_from_a_folder_beside(metarun, tmp_path: Path):
    """A backbone and its YAML in the working folder: no fork, no install."""
    (tmp_path / "own_net.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, item_shape, width: int = 4):\n"
        "        super().__init__()\n"
        "        assert item_shape == (1, 16, 16), item_shape\n"
        "        self.features = width * 16\n"
        "        self.conv = nn.Conv2d(1, width, 4, stride=4)\n"
        "    def forward(self, x):\n"
        "        return self.conv(x).relu().flatten(1)\n"
    )
    (tmp_path / "conf/backbone").mkdir(parents=True)
    (tmp_path / "conf/backbone/own.yaml").write_text("_target_: own_net.Net\nwidth: 4\n")
    tiny = [word for word in TINY if not word.startswith("backbone.")]
    metarun("train", "-cd", "conf", "backbone=own", "algorithm=maml", *tiny, "hydra.run.dir=run")
    done = metarun("train", "-cd", "conf", "backbone=own", "+backbone.widht=3", *tiny, status=1)
    assert "backbone=own has no setting 'widht'; did you mean 'width'?" in done.stderr


def test_a_run_from_before_a_setting_came_is_resumed_at_its_default(metarun, trained, tmp_path: Path):
    shutil.copytree(trained("algorithm=maml", *UNTESTED), tmp_path / "old")
    path = tmp_path / "old/last.pt"
    content = checkpoint.load(path)
    for key in ("clip", "inner_rate"):
        del content["config"][key]
    checkpoint.save(path, content)
    metarun("train", "resume=old", "iterations=15")
    assert json.loads((tmp_path / "old/result.json").read_text())["iterations"] == 15


def test_a_run_with_more_iterations_says_what_stays(metarun, trained, tmp_path: Path):
    says = "iterations=13: algorithm.auxiliary stays 12, so that the weights will differ from"
    for word, count in (("algorithm.auxiliary=12", 1), ("algorithm.auxiliary=11", 0)):
        run = tmp_path / str(count)
        shutil.copytree(trained("algorithm=tadam", *UNTESTED, word), run)
        assert says not in metarun("train", f"resume={run}").stderr
        assert metarun("train", f"resume={run}", "iterations=13").stderr.count(says) == count
