"""python -m benchmarks.reproduced RUN EVALUATION: keeps a run of a recipe beside its published results.

It writes benchmarks/results/reproduced/RECIPE.json: the command, the config, the machine, the curve of the
validation, and the scores of every test task with the verdicts, as `metarun eval` has written them to the
folder EVALUATION. Typed settings that the published results are of are in the name, too, as in
cavia_sinusoid-context=2.json. `python docs/tables.py` then adds it to docs/published.md.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from metarun.storage.files import write_json
from metarun.training import checkpoint

FOLDER = Path(__file__).parent / "results" / "reproduced"
POINTS = 60  # of the curve that are kept
OF_RESULT = ("task", "mean", "interval", "episodes", "episodes_hash", "uses_query_statistics", "metric")


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.reproduced", description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of the training run")
    parser.add_argument("evaluation", type=Path, help="the folder of metarun eval on it")
    parser.add_argument("--note", default="", help="what a reader has to know, such as where it was stopped")
    args = parser.parse_args()
    record = kept(args.run, args.evaluation, args.note)
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"{name_of(record)}.json"
    write_json(path, record)
    print(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def name_of(record: dict[str, Any]) -> str:
    """The recipe with the typed settings that belong to its published results."""
    own = {word.partition("=")[0] for each in record["verdicts"] for word in each["settings"]}
    typed = (
        word.removeprefix("dataset.").removeprefix("algorithm.")
        for word in record["overrides"]
        if word.partition("=")[0] in own
    )
    return re.sub(r"[][ ]", "", "-".join([record["recipe"], *typed]))


def kept(run: Path, evaluation: Path, note: str = "") -> dict[str, Any]:
    """What is kept of a run.

    Args:
        run: its folder.
        evaluation: the folder of an evaluation of its best checkpoint on test tasks.
        note: see the command.

    Raises:
        SystemExit: the run is not one of a recipe, or the evaluation has no verdicts.
    """
    state = checkpoint.load(run / "last.pt")
    recipe = next((w.partition("=")[2] for w in state["overrides"] if w.startswith("recipe=")), None)
    results = json.loads((evaluation / "results.json").read_text("utf-8"))
    if recipe is None or not results.get("verdicts"):
        raise SystemExit(f"{run}: is not a run of a recipe with published results, evaluated on their tasks")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    curve = [row for row in rows if row["split"] == "validation"]
    every = -(-len(curve) // POINTS)
    metric = state["best"]["metric"]
    return {
        "recipe": recipe,
        "overrides": [word for word in state["overrides"] if not word.startswith("dataset.root=")],
        "note": note,
        "iterations": state["iteration"],
        "of": state["config"]["iterations"],
        "best": state["best"]["iteration"],
        "seconds": round(state["seconds"]),
        "seed": state["config"]["seed"],
        "machine": json.loads((run / "machine.json").read_text("utf-8")),
        "verdicts": results["verdicts"],
        "results": [
            {key: row[key] for key in OF_RESULT} | {"scores": rounded(row["scores"][row["metric"]])}
            for row in results["results"]
        ],
        "curve": {str(row["iteration"]): round(row[metric], 5) for row in curve[::every]},
        "config": without_paths(state["config"]),
    }


def rounded(scores: list[float]) -> list[float]:
    return [round(score, 4) for score in scores]


def without_paths(config: dict[str, Any]) -> dict[str, Any]:
    """The config without where files are on the machine."""
    dataset = {key: value for key, value in config["dataset"].items() if key != "root"}
    return config | {"dataset": dataset}


if __name__ == "__main__":
    main()
