"""`dataset=table` as a person types it."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest

import metarun as metarun_in_python
from metarun.errors import MetarunError
from metarun.training import checkpoint

TINY = ("hardware=cpu", "iterations=3", "meta_batch=2", "validation.every=3", "validation.episodes=3")
SMALL = (*TINY, "test.episodes=0", "backbone.hidden=[8]", "log.tensorboard=false")
ROWS = ("shots=3", "queries=3", "dataset.root=table.csv", "dataset.task=no.")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Eight tasks of twelve rows: a straight line of each, and whether it is above its middle."""
    draw = random.Random(0)
    lines = ["no.;x (m);site;y;high"]
    for task in range(8):
        slope, start = draw.uniform(1, 3), draw.uniform(100, 200)
        for row in range(12):
            x = draw.uniform(-1, 1)
            lines.append(f"{task};{x:.4f};{'ab'[row % 2]};{start + slope * x:.4f};{int(x > 0)}")
    path = tmp_path / "table.csv"
    path.write_text("\n".join(lines))
    return path


def read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_regression_is_trained_and_adapted_to_new_rows(metarun, table: Path, tmp_path: Path):
    words = ("dataset=table", *ROWS, "dataset.target=y", "dataset.drop=[high]")
    metarun("train", *words, "algorithm=r2d2", "ways=1", *SMALL, "hydra.run.dir=run")
    lines = table.read_text().splitlines()
    (tmp_path / "support.csv").write_text("\n".join([lines[0], *lines[1:7]]))
    (tmp_path / "query.csv").write_text("\n".join([lines[0], *lines[7:12], ";0,5;b;?;"]))
    table.unlink()  # what was learned of its columns is in the checkpoint
    words = ("adapt", "checkpoint=run", "support=support.csv", "query=query.csv", "hardware=cpu")
    done = metarun(*words, "hydra.run.dir=out")
    assert "6 queries" in done.stdout and "line 7" in done.stdout
    rows = read(tmp_path / "out/predictions.csv")
    assert [row["value"] for row in rows][-1] == ""
    errors = [float(row["prediction"]) - float(row["value"]) for row in rows[:-1]]
    assert abs(errors[0]) < 100  # in the units of the file
    support, asked = ([line.split(";") for line in lines[a:b]] for a, b in ((1, 7), (7, 12)))
    x, queries = ([{"x (m)": row[1], "site": row[2]} for row in own] for own in (support, asked))
    adapted = metarun_in_python.load("run", device="cpu").adapt(x, [float(row[3]) for row in support])
    for model in (adapted, metarun_in_python.load_adapted("out/adapted.pt", device="cpu")):
        found = model.predict(queries)
        assert found.labels == [pytest.approx(float(row["prediction"]), rel=1e-6) for row in rows[:-1]]
    assert found.values.shape == (5,) and found[0].label == found.values[0]
    with pytest.raises(MetarunError, match="labels: must be a finite number for each example"):
        metarun_in_python.load("run", device="cpu").adapt(x, ["high"] * 6)
    steps = json.loads((tmp_path / "out/steps.json").read_text())
    assert steps[-1]["query mse"] == pytest.approx(sum(e * e for e in errors) / len(errors), rel=1e-4)


def test_labels_are_trained_listed_and_evaluated(metarun, table: Path, tmp_path: Path):
    words = ("dataset=table", *ROWS, "dataset.label=high", "dataset.drop=[y]")
    metarun("train", *words, *SMALL, "metrics=[roc_auc]", "hydra.run.dir=run")
    assert not any("pairing" in word for word in json.loads(Path("run/result.json").read_text())["overrides"])
    done = metarun("data", *words, "hardware=cpu")  # its ways are its two labels
    assert "tasks of 12 to 12 rows" in done.stderr and "support" in done.stdout and "x (m)" in done.stdout
    done = metarun(
        "eval", "checkpoint=run", "episodes=4", "queries=3", "shots=2", "hardware=cpu", "split=all"
    )
    assert "roc_auc" in done.stdout
    assert "trained on tasks of the same names as 4 of the 8 tasks of table all" in done.stderr
    assert "left out" in done.stderr and "4 tasks of all splits" in done.stdout
    few = ("checkpoint=run", "episodes=4", "queries=3", "shots=2", "hardware=cpu", "hydra.run.dir=kept")
    done = metarun("eval", *few, "split=all", "trained_classes=keep")
    assert "8 tasks of all splits" in done.stdout and "trained_classes=keep keeps them" in done.stderr
    lines = table.read_text().splitlines()
    trained = checkpoint.load(Path("run/best.pt"))["train_tasks"]
    own = [line for line in lines if line.split(";")[0] in ("no.", *trained)]
    Path("again.csv").write_text("\n".join(own))
    other = ("dataset=table", "dataset.root=again.csv", "dataset.task=no.", "dataset.label=high")
    done = metarun("eval", *few, "split=all", *other, status=1)
    assert "trained on tasks of the names of all of its 4 tasks" in done.stderr
    done = metarun("eval", *few, *other, "dataset.drop=[site]", status=1)
    assert "dataset.drop=[site]: the model was trained with dataset.drop=['y']" in done.stderr
    done = metarun("train", *words, "ways=5", *TINY, status=1)
    assert "set ways=2" in done.stderr and len(done.stderr.strip().splitlines()) == 2
    classes = [f"dataset.{key}" for key in ("root=table.csv", "label=no.", "drop=[y,high]")]
    done = metarun("train", "dataset=table", *classes, "augment=standard", *TINY, status=1)
    assert "augment: dataset=table has no images to augment" in done.stderr
    done = metarun("train", *words, "dataset.task=no", *TINY, status=1)
    assert "no column 'no'; did you mean 'no.'?" in done.stderr


@pytest.mark.long
def test_a_patients_score_is_learned_from_ten_recordings(metarun, test_data: Path, tmp_path: Path):
    """As in docs/tables_and_molecules.md, with fewer iterations; a straight line in time reaches 1.1."""
    root = test_data / "tables/parkinsons_updrs.csv.gz"
    words = ["dataset=table", f"dataset.root={root}", "dataset.task=subject#", "dataset.target=total_UPDRS"]
    words += ["dataset.drop=[motor_UPDRS]", "algorithm=r2d2", "backbone.hidden=[64,32]", "ways=1", "shots=10"]
    metarun("train", *words, "queries=15", "meta_batch=16", "iterations=600", "hydra.run.dir=run")
    assert json.loads((tmp_path / "run/result.json").read_text())["test"]["mean"] < 1.0


@pytest.mark.long
def test_assays_are_learned_from_molecules(metarun, test_data: Path, tmp_path: Path):
    """Fingerprints alone reach 58 % with 5 shots."""
    pytest.importorskip("rdkit", reason="RDKit is not installed: pip install 'metarun[molecules]'")
    words = ["dataset=tox21", f"dataset.root={test_data / 'molecules'}", "shots=5", "optimizer.lr=0.0003"]
    metarun("train", *words, "iterations=300", "validation.episodes=50", "hydra.run.dir=run")
    assert json.loads((tmp_path / "run/result.json").read_text())["test"]["mean"] > 0.7
