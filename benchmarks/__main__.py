"""python -m benchmarks: compares the speed of metarun, a plain loop and the installed libraries."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import warnings
from math import isfinite
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.contestants import PEERS, Contestant, Metarun, PlainLoop, contestants, version
from benchmarks.limit import Peak, Roofline, measured_peak, seconds
from benchmarks.sampling import sampling
from benchmarks.workloads import WORKLOADS, Workload
from metarun.errors import first_line
from metarun.storage.files import write_json

SLOW = 0.3  # seconds: a step that takes longer is warm after one, and has two turns only
TIE = 0.1  # ratios within 10 % of 1 are treated as a tie
EXACT = 1e-6  # the largest relative error of the gradient in float64 with which a contestant is timed
CHECKED_TASKS = 2
INEXACT = ("tf32", "bf16")  # precisions that are timed in spite of their error, which is shown

console = Console(width=None if sys.stdout.isatty() else 140)


def main() -> None:
    warnings.simplefilter("ignore")  # warnings of the compared libraries
    args = arguments()
    device = torch.device(args.device)
    if args.memory_of:
        print(json.dumps(peak_memory(WORKLOADS[args.workloads[0]], args.memory_of, device)))
        return
    peak = measured_peak(device)
    report = {"machine": machine(device, peak), "workloads": {}}
    console.print(describe_machine(report["machine"]), highlight=False)
    for name in args.workloads:
        rows = run_workload(name, args, device, peak)
        report["workloads"][name] = rows
        show(name, rows)
        write_json(args.out, report)
    if not args.no_sampling:
        report["sampling"] = sampling(device)
        show_sampling(report["sampling"])
        write_json(args.out, report)
    console.print(f"written to {args.out}", highlight=False)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7, help="turns of every contestant")
    parser.add_argument("--seconds", type=float, default=0.3, help="the least that a turn takes")
    parser.add_argument("--only", nargs="+", help="contestants, by name")
    parser.add_argument("--compile", action="store_true", help="the compiled step too: minutes of start-up")
    parser.add_argument("--no-memory", action="store_true", help="no run in a process of its own")
    parser.add_argument("--no-sampling", action="store_true", help="no comparison of samplers")
    parser.add_argument("--out", type=Path, default=Path("outputs/benchmark.json"))
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := sorted(set(args.workloads) - set(WORKLOADS)):
        parser.error(f"{unknown[0]}: no such workload; there are {', '.join(WORKLOADS)}")
    if args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: quartiles need at least 2")
    args.workloads = args.workloads or list(WORKLOADS)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return args


# one workload


def run_workload(name: str, args: argparse.Namespace, device: torch.device, peak: Peak) -> dict[str, Any]:
    """Check the gradient of every contestant, then time those with an exact gradient in turns."""
    workload = WORKLOADS[name]
    known = contestants(device, args.compile)
    takes_part = {
        key: make
        for key, make in known.items()
        if (not args.only or key in args.only)
        and (not issubclass(make, tuple(PEERS.values())) or make.fits(workload))
    }
    reference = PlainLoop(workload, CHECKED_TASKS, torch.float64, device).gradient()
    rows: dict[str, dict[str, Any]] = {}
    running: dict[str, Contestant] = {}
    for key, make in takes_part.items():
        rows[key] = row = {"error": gradient_error(make, workload, reference, device)}
        if row["error"] < EXACT or (isfinite(row["error"]) and any(word in key for word in INEXACT)):
            before = allocated(device)
            try:
                running[key] = make(workload, workload.meta_batch, torch.float32, device)
                warm_up(running[key], device)
            except Exception as error:  # out of memory; a compiler that is missing
                running.pop(key, None)
                row["failed"] = first_line(error)
                console.print(f"{key} fails: {row['failed']}", style="yellow")
                continue
            if device.type == "cuda":
                row["peak_mib"] = (torch.cuda.max_memory_allocated(device) - before) / 2**20
            if isinstance(engine := running[key], Metarun):
                row |= {"start_up_s": engine.start_up, "said": engine.said}
    for key, times in take_turns(running, args, device).items():
        low, _, high = quantiles(times, n=4)
        rows[key] |= {"ms": 1e3 * median(times), "low_ms": 1e3 * low, "high_ms": 1e3 * high}
    if "metarun" in running:
        rows["metarun"]["sampling_share"] = sampling_share(running["metarun"], rows["metarun"]["ms"], device)
    running.clear()
    for key in () if args.no_memory or device.type == "cuda" else rows:
        if "ms" in rows[key]:
            rows[key] |= in_own_process(name, key, device)
    limit = least_time(workload, device, peak)
    best = min((row["ms"] for key, row in rows.items() if key in PEERS and "ms" in row), default=None)
    for row in rows.values():
        if "ms" in row:
            row["of_limit"] = 1e3 * limit["seconds"] / row["ms"]
            row["ratio"] = best / row["ms"] if best else None
    return {"title": workload.title, "limit": limit, "contestants": rows}


def gradient_error(
    make: type[Contestant], workload: Workload, reference: list[Tensor], device: torch.device
) -> float:
    """The relative error of the whole gradient, compared with the plain loop; infinite if it fails."""
    try:
        found = make(workload, CHECKED_TASKS, torch.float64, device).gradient()
    except Exception as error:
        console.print(f"{make.__name__} fails: {str(error).splitlines()[0]}", style="yellow")
        return float("inf")
    a, b = (torch.cat([g.flatten().double() for g in grads]) for grads in (found, reference))
    return ((a - b).norm() / b.norm()).item()


def take_turns(
    running: dict[str, Contestant], args: argparse.Namespace, device: torch.device
) -> dict[str, list[float]]:
    """Time contestants that are warm alternately (A B C A B C ...): seconds of a step in every turn."""
    counts, times = {}, {key: [] for key in running}
    for key, contestant in running.items():
        counts[key] = max(1, round(args.seconds / seconds(contestant.step, device)))
    for turn in range(args.rounds):
        for key, contestant in running.items():
            if turn > 1 and times[key][0] > SLOW:
                continue
            took = seconds(lambda c=contestant, n=counts[key]: [c.step() for _ in range(n)], device)
            times[key].append(took / counts[key])
    return times


def warm_up(contestant: Contestant, device: torch.device) -> None:
    """Run the first steps: a CUDA graph is captured at the fourth."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(5 if device.type == "cuda" and isinstance(contestant, Metarun) else 2):
        if seconds(contestant.step, device) > SLOW and not isinstance(contestant, Metarun):
            return


def allocated(device: torch.device) -> int:
    """The bytes of tensors on a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def sampling_share(contestant: Contestant, ms: float, device: torch.device) -> float:
    """The share of a step that is spent on drawing and gathering its episodes."""
    assert isinstance(contestant, Metarun)
    rounds = [seconds(lambda: [contestant.sample() for _ in range(32)], device) / 32 for _ in range(9)]
    return 1e3 * median(rounds) / ms


def least_time(workload: Workload, device: torch.device, peak: Peak) -> dict[str, float]:
    """The lower bound of benchmarks/limit.py, for one task of the plain loop times the number of tasks."""
    loop = PlainLoop(workload, 1, torch.float32, device)
    with Roofline(peak) as counter:
        loop.gradient()
    tasks = workload.meta_batch
    return {
        "gflop": tasks * counter.flops / 1e9,
        "gbyte": tasks * counter.bytes / 1e9,
        "seconds": tasks * counter.seconds,
    }


# memory


def in_own_process(name: str, key: str, device: torch.device) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks", name, "--memory-of", key, "--device", str(device)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory(workload: Workload, key: str, device: torch.device) -> dict[str, float]:
    """The peak memory of a process that runs a few steps on the CPU, in MiB."""
    make = contestants(device, "compiled" in key)[key]
    warm_up(make(workload, workload.meta_batch, torch.float32, device), device)
    try:  # ru_maxrss below includes the peak of the parent process
        lines = Path("/proc/self/status").read_text().splitlines()
        return {"peak_mib": int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024}
    except OSError:
        return {"peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


# output


def machine(device: torch.device, peak: Peak) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__}
        | {peer.package: version(peer.package, peer.module) for peer in PEERS.values() if peer.package},
        "commit": commit.stdout.strip() or None,
        "peak_gflops": peak.flops / 1e9,
        "peak_gbytes": peak.bytes / 1e9,
    }


def processor() -> str:
    """The name of the CPU, if Linux reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "CPU")


def describe_machine(facts: dict[str, Any]) -> str:
    peers = ", ".join(f"{name} {number or 'not found'}" for name, number in facts["versions"].items())
    return (
        f"{facts['device']}, {facts['cores']} cores, {facts['threads']} threads; {peers}\n"
        f"peaks: matrix product {facts['peak_gflops']:,.0f} GFLOP/s, copy {facts['peak_gbytes']:,.0f} GB/s"
    )


def show(name: str, result: dict[str, Any]) -> None:
    limit = result["limit"]
    title = f"{name}: {result['title']} ({limit['gflop']:.3g} GFLOP, limit {1e3 * limit['seconds']:.3g} ms)"
    table = Table(
        "",
        "ms",
        "quartiles",
        "times the best peer",
        "of the limit",
        "peak MiB",
        "start s",
        "error",
        title=title,
    )
    for key, row in result["contestants"].items():
        error = f"{row['error']:.0e}"
        if "ms" not in row:
            table.add_row(key, "-", "", row.get("failed", "not timed: gradient wrong"), "", "", "", error)
            continue
        ratio = row["ratio"]
        tie = " (tie)" if ratio and key not in PEERS and abs(ratio - 1) < TIE else ""
        table.add_row(
            key,
            f"{row['ms']:.4g}",
            f"{row['low_ms']:.4g} - {row['high_ms']:.4g}",
            f"{ratio:.2f}{tie}" if ratio else "",
            f"{row['of_limit']:.2f}",
            f"{row['peak_mib']:,.0f}" if "peak_mib" in row else "",
            f"{row['start_up_s']:.1f}" if "start_up_s" in row else "",
            error,
        )
    console.print(table)
    own = result["contestants"].get("metarun", {})
    if "sampling_share" in own:
        said = "; ".join(own["said"])
        console.print(
            f"sampling: {100 * own['sampling_share']:.2f} % of metarun's step; {said}", highlight=False
        )


def show_sampling(rows: dict[str, Any]) -> None:
    table = Table("", "ms", "ratio", title="D: 32 tasks, 5-way 1-shot, 15 queries, 28x28")
    for key, row in rows.items():
        table.add_row(key, f"{row['ms']:.2f}", f"{row['ratio']:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
