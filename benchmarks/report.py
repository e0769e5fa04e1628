"""The Markdown of a report of `python -m benchmarks.gpu`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.contestants import PEERS
from benchmarks.table import compiled


def markdown(report: dict[str, Any]) -> str:
    """One section for each part that was run."""
    facts = report["machine"]
    lines = [
        f"# {facts['device']}",
        "",
        f"{facts['cores']} CPU cores, Python {facts['python']}, PyTorch {facts['torch']}, "
        f"CUDA {facts['cuda']}, {facts['date']}, commit {(facts['commit'] or 'unknown')[:9]}.",
        "",
    ]
    for name, section in SECTIONS.items():
        if name not in report:
            continue
        part = report[name]
        lines += [f"## {name.capitalize()} ({report['seconds'][name]:.0f} s)", ""]
        if isinstance(part, dict):
            lines += [f"{word}: {part[word]}\n" for word in ("skipped", "failed") if word in part]
        lines += [section(part), ""]
    return "\n".join(lines)


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines) + "\n"


def tests(part: dict[str, Any]) -> str:
    return "\n".join(["```", *part["end"], "```"]) if "end" in part else ""


def agreement(rows: Any) -> str:
    """The differences of every case."""
    if not isinstance(rows, list):
        return ""
    heads = (
        "case",
        "GPU float64",
        "CPU, weights + 1e-14",
        "CPU float32",
        "GPU float32",
        "graph",
        "graph - eager",
        "agrees",
    )
    lines, notes = [], []
    for row in sorted(rows, key=lambda row: row["case"]):
        if "failed" in row:
            lines.append([row["case"], *[""] * 6, f"failed: {row['failed']} {row.get('where', '')}"])
            continue
        keys = ("device_float64", "carried", "cpu_float32", "device_float32")
        numbers = [f"{row[key]:.0e}" if key in row else "" for key in keys]
        captured = {True: "yes", False: "no"}.get(row.get("captured"), "")  # type: ignore[call-overload]
        apart = f"{row['graph_difference']:.0e}" if "graph_difference" in row else ""
        lines.append([row["case"], *numbers, captured, apart, "yes" if row["agrees"] else "**no**"])
        if row.get("nondeterministic"):
            notes.append(f"- {row['case']}: not deterministic: {', '.join(row['nondeterministic'])}")
        if row.get("said") and not row["captured"]:
            notes.append(f"- {row['case']}: {'; '.join(row['said'])}")
    return table(heads, lines) + "\n" + "\n".join(notes)


def speed(part: dict[str, Any]) -> str:
    """Milliseconds of all contestants; workloads are rows."""
    workloads = part.get("workloads", {})
    names = list(dict.fromkeys(name for each in workloads.values() for name in each["contestants"]))
    lines = []
    for key, each in workloads.items():
        rows = each["contestants"]
        own = rows.get("metarun", {})
        cells = [cell(rows.get(name, {})) for name in names]
        best = f"{own['ratio']:.2f}" if own.get("ratio") else ""
        limit = f"{own['of_limit']:.2f}" if "of_limit" in own else ""
        lines.append([f"{key} {each['title']}", *cells, best, limit, memory(rows)])
    heads = ("ms", *names, "best peer / metarun", "of the limit", "MiB (best peer's)")
    facts = part.get("machine", {})
    peaks = ""
    if "peak_gflops" in facts:
        peaks = (
            f"Measured peaks: float32 product {facts['peak_gflops']:,.0f} GFLOP/s, copy "
            f"{facts['peak_gbytes']:,.0f} GB/s. Peers: {facts['versions']}.\n\n"
        )
    return peaks + table(heads, lines)


def cell(row: dict[str, Any]) -> str:
    if "ms" in row:
        return f"{row['ms']:.3g}"
    return "wrong gradient" if row else ""


def memory(rows: dict[str, Any]) -> str:
    """The peak memory of metarun, and of the fastest peer."""
    peers = [row for name, row in rows.items() if name in PEERS and "ms" in row and "peak_mib" in row]
    own = rows.get("metarun", {})
    if "peak_mib" not in own or not peers:
        return ""
    return f"{own['peak_mib']:,.0f} ({min(peers, key=lambda row: row['ms'])['peak_mib']:,.0f})"


def kernels(rows: Any) -> str:
    if not isinstance(rows, list):
        return ""
    heads = ("workload", "way", "ms", "kernels", "sum of kernels, ms", "GPU busy", "most time")
    lines = []
    for row in rows:
        most = "; ".join(f"{100 * share:.0f} % {name}" for name, share in list(row["most"].items())[:3])
        lines.append(
            [
                *(row["workload"], row["way"], f"{row['ms']:.3g}", f"{row['kernels']:.0f}"),
                *(f"{row['kernel_ms']:.3g}", f"{100 * row['busy']:.0f} %", most.replace("|", "\\|")),
            ]
        )
    return table(heads, lines)


def training(part: dict[str, Any]) -> str:
    if "command" not in part:
        return ""
    test = part["test"]
    return (
        f"`{part['command']}`: {part['wall_s']:.0f} s, of which {part['seconds']:.0f} s for "
        f"{part['iterations']:,} iterations; "
        f"test {part['metric']} {test['mean']:.4f} ± {test['interval']:.4f}.\n"
    )


SECTIONS = {
    "tests": tests,
    "agreement": agreement,
    "speed": speed,
    "kernels": kernels,
    "training": training,
    "compiled": lambda part: compiled(part) if "workloads" in part else "",
}
