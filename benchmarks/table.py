"""python -m benchmarks.table FILE: converts a benchmark's JSON to the Markdown tables of docs/speed.md."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

PEERS = ("plain loop", "higher", "torchopt", "torchopt vmap", "learn2learn", "parallel-metalearn")


def markdown(report: dict[str, Any]) -> str:
    """A table with a row for each workload: time and memory of metarun and of the best exact peer."""
    heads = ("workload", "metarun, ms (quartiles)", "best exact peer, ms", "ratio", "of the limit")
    lines = [f"| {' | '.join(heads)} | memory, MiB (peer's) |", "|---|---|---|---|---|---|"]
    for name, result in report["workloads"].items():
        rows = result["contestants"]
        own, (peer, best) = rows["metarun"], best_peer(rows)
        lines.append(
            f"| {name} {result['title']} | {own['ms']:.4g} ({own['low_ms']:.4g} to {own['high_ms']:.4g}) "
            f"| {best['ms']:.4g} {peer} | {own['ratio']:.2f} | {own['of_limit']:.2f} "
            f"| {own['peak_mib']:,.0f} ({best['peak_mib']:,.0f}) |"
        )
    return "\n".join(lines) + "\n"


def best_peer(rows: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    timed = [(row["ms"], name) for name, row in rows.items() if name in PEERS and "ms" in row]
    name = min(timed)[1]
    return name, rows[name]


def compiled(report: dict[str, Any]) -> str:
    """A table with a row for each workload that was also run with the compiled step."""
    report = report.get("compiled", report)  # results of a separate run with --compile
    lines = ["| workload | compiled, ms | ratio | start-up, s | eager, ms |", "|---|---|---|---|---|"]
    for name, result in report["workloads"].items():
        rows = result["contestants"]
        if "ms" in (row := rows.get("metarun compiled", {})):
            eager = rows["metarun"]["ms"]
            lines.append(
                f"| {name} | {row['ms']:.4g} | {row['ratio']:.2f} | {row['start_up_s']:.0f} | {eager:.4g} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    report = json.loads(Path(sys.argv[1]).read_text())
    print(markdown(report))
    print(compiled(report))
