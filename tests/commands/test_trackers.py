"""Where the rows of a run go: several trackers at once, one of your own, and ones that fail or hang."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.runs import TINY

from metarun.reporting import destinations
from metarun.reporting.destinations import Background, Destination, RunFacts
from metarun.reporting.tracker import Tracker

WORDS = [word for word in TINY if not word.startswith("log.tensorboard")]
SEEN: list[tuple] = []


class Listed(Destination):
    """Keeps what it gets in a list."""

    def __init__(self, label: str = "mine") -> None:
        self.label = label

    def start(self, run: RunFacts) -> None:
        SEEN.append(("start", self.label, run.config["seed"]))

    def log(self, row: dict) -> None:
        SEEN.append(("row", row["iteration"], row["split"]))

    def finish(self, result: dict) -> None:
        SEEN.append(("finish", result["iterations"]))

    def close(self) -> None:
        SEEN.append(("close",))


class Broken(Listed):
    """Fails where a test asks for it."""

    def start(self, run: RunFacts) -> None:
        self.at("start")

    def log(self, row: dict) -> None:
        self.at("log")

    def close(self) -> None:
        self.at("close")

    def at(self, place: str) -> None:
        if self.label == place:
            raise SystemExit("no such host")
        if self.label == f"hang in {place}":
            time.sleep(60)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_of_your_own_beside_others(metarun):
    SEEN.clear()
    own = "{mine:{_target_:commands.test_trackers.Listed,label:x},jsonl:null}"
    own = own.replace("commands.test_trackers", __name__)
    metarun("train", *WORDS, "tracker=jsonl", f"++tracker={own}", "seed=3", "hydra.run.dir=run")
    logged = [("row", row["iteration"], row["split"]) for row in rows(Path("run/metrics.jsonl"))]
    assert [("start", "x", 3), *logged, ("finish", 12), ("close",)] == SEEN
    assert not Path("run/tensorboard").exists()


@pytest.mark.parametrize("place", ["start", "log", "close", "hang in start", "hang in log"])
def test_a_dead_tracker_neither_stops_nor_slows_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
):
    monkeypatch.setattr(destinations, "PATIENCE", 0.2)
    monkeypatch.setattr(destinations, "MOST_WAITING", 50)
    run = RunFacts(tmp_path, "run", {})
    began = time.perf_counter()
    tracker = Tracker(tmp_path, tensorboard=False, others=[Background("dead", Broken(place), run)])
    for iteration in range(200):
        tracker.log({"iteration": iteration, "split": "train", "loss": 0.5})
    tracker.end({}, {"iterations": 200}, tmp_path / "none.png")
    tracker.leave()
    assert time.perf_counter() - began < 2
    assert len(rows(tmp_path / "metrics.jsonl")) == 200
    said = capsys.readouterr().err
    assert said.count("tracker=dead: ") == 1 and "the run goes on without it" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tracker=wand"], "tracker=wand: no such tracker; did you mean 'wandb'?"),
        (["tracker=[wandb,mlfloww]"], "tracker=mlfloww: no such tracker; did you mean 'mlflow'?"),
        (["tracker=wandb,mlflow"], "several are typed as a list, tracker=[wandb,mlflow]"),
        (["tracker=mlflow", "tracker.mlflow.url=x"], "did you mean 'uri'?"),
        (["+tracker.x._target_=torch.nn.ReLU"], "is not a metarun.reporting.destinations.Destination"),
    ],
)
def test_mistakes(metarun, words: list[str], message: str):
    assert message in metarun("train", *words, status=1).stderr.splitlines()[-1]


@pytest.mark.parametrize("option", ["wandb", "mlflow"])
def test_a_missing_package_is_named(metarun, monkeypatch: pytest.MonkeyPatch, option: str):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = [*TINY, "dataset.seed=77", f"tracker={option}"]  # which would be drawn
    done = metarun("train", *words, status=1)
    assert "draw glyphs" not in done.stderr
    error = done.stderr.splitlines()[-1]
    assert error.endswith(f'tracker={option}: needs {option}; pip install "metarun[{option}]"')


@pytest.mark.pictures
def test_tensorboard_shows_figures_settings_and_the_curve(metarun):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metarun("train", *WORDS, "hydra.run.dir=run")
    read = EventAccumulator("run/tensorboard")
    read.Reload()
    tags = read.Tags()
    expected = [row["accuracy"] for row in rows(Path("run/metrics.jsonl")) if row["split"] == "validation"]
    assert [each.value for each in read.Scalars("validation/accuracy")] == pytest.approx(expected)
    assert read.Scalars("best/test")[0].value == pytest.approx(
        json.loads(Path("run/result.json").read_text())["test"]["mean"]
    )
    assert {"config", "_hparams_/session_start_info"} <= {*tags["tensors"]} and tags["images"]
    assert b"| meta_batch | 2 |" in read.Tensors("config")[0].tensor_proto.string_val[0]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_mlflow_reads_its_store(metarun):
    pytest.importorskip("mlflow", reason="mlflow is not installed: metarun[mlflow]")
    metarun("train", *WORDS, "tracker=[jsonl,mlflow]", "hydra.run.dir=run")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(Path("mlruns").resolve().as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("metarun").experiment_id])
    assert run.info.status == "FINISHED" and run.data.params["meta_batch"] == "2"
    history = client.get_metric_history(run.info.run_id, "validation/accuracy")
    logged = [row for row in rows(Path("run/metrics.jsonl")) if row["split"] == "validation"]
    assert {(each.step, each.value) for each in history} == {
        (row["iteration"], row["accuracy"]) for row in logged
    }


def records(path: Path) -> Iterator[bytes]:
    """The records of a .wandb file: a LevelDB log of blocks of 32 KiB after a header of 7 bytes."""
    data, at, parts = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_offline_files_of_wandb_contain_the_rows(metarun, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb", reason="wandb is not installed: metarun[wandb]")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    metarun("train", *WORDS, "tracker=[jsonl,wandb]", "hydra.run.dir=run")
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = Path("run").glob("wandb/offline-run-*/*.wandb")
    found = {}
    for content in records(path):
        record = Record()
        record.ParseFromString(content)
        values = {
            item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
        }
        if "validation/accuracy" in values:
            found[values["_step"]] = values["validation/accuracy"]
    logged = [row for row in rows(Path("run/metrics.jsonl")) if row["split"] == "validation"]
    assert found == {row["iteration"]: row["accuracy"] for row in logged}
