"""Run folders without a run: what `metarun runs` and `report` read of them."""

from __future__ import annotations

import json
from pathlib import Path

HYDRA = (
    "hydra:\n  job:\n    name: train\n  runtime:\n    choices:\n      algorithm: {}\n      dataset: glyphs\n"
)
ROW = '{{"iteration": {}, "split": "validation", "loss": 1.0, "accuracy": {}, "interval": 0.01}}\n'


def make(
    folder: Path, method: str = "maml", test: float | None = None, scores: tuple[float, ...] = ()
) -> Path:
    """A run folder, with what `metarun runs` reads."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra/config.yaml").write_text("ways: 5\n")
    (folder / ".hydra/hydra.yaml").write_text(HYDRA.format(method))
    rows = "".join(ROW.format(100 * i, score) for i, score in enumerate(scores))
    (folder / "metrics.jsonl").write_text(rows)
    if test is not None:
        result = {"name": f"{method} on glyphs, 5-way 1-shot", "metric": "accuracy", "overrides": []}
        result |= {split: {"mean": test, "interval": 0.01} for split in ("validation", "test")}
        (folder / "result.json").write_text(json.dumps(result))
    return folder
