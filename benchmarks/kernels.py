"""python -m benchmarks.kernels WORKLOAD ...: the kernels of a step on a GPU, and the gaps between them.

Each workload is profiled with a CUDA graph and without one, and printed as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.contestants import metarun
from benchmarks.limit import seconds
from benchmarks.workloads import WORKLOADS, Workload

STEPS = 10
SHOWN = 6  # of the kernels that take the most time


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; all")
    for name in parser.parse_args().workloads or WORKLOADS:
        for way, settings in {"graph": {}, "eager": {"graph": False}}.items():
            print(
                json.dumps({"workload": name, "way": way, **profiled(WORKLOADS[name], settings)}), flush=True
            )


def profiled(workload: Workload, settings: dict[str, Any]) -> dict[str, Any]:
    """The time of a step, and what the GPU does in it.

    Args:
        workload: the workload.
        settings: of the hardware.

    Returns:
        `ms` of a step without the profiler; `busy`: the share of that time in which a kernel runs; `kernels`
        of a step; and those that take the most time with their shares.
    """
    device = torch.device("cuda")
    contestant = metarun(**settings)(workload, workload.meta_batch, torch.float32, device)
    for _ in range(5):  # a graph is captured at the fourth
        contestant.step()
    took = seconds(lambda: [contestant.step() for _ in range(STEPS)], device) / STEPS
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        seconds(lambda: [contestant.step() for _ in range(STEPS)], device)
    spans: list[tuple[float, float]] = []
    by_name: dict[str, float] = defaultdict(float)
    for event in found.events():
        if event.device_type == DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end))
            by_name[event.name] += event.time_range.elapsed_us()
    if not spans:
        raise RuntimeError("the profiler has no events of the GPU; it may need permissions")
    total, most = sum(by_name.values()), sorted(by_name.items(), key=lambda pair: -pair[1])[:SHOWN]
    return {
        "ms": 1e3 * took,
        "kernels": len(spans) / STEPS,
        "busy": covered(spans) / STEPS / 1e6 / took,  # the profiler delays the CPU, not the kernels
        "kernel_ms": total / STEPS / 1e3,
        "most": {name[:90]: time / total for name, time in most},
    }


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    length, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, until))
        until = max(until, end)
    return length


if __name__ == "__main__":
    main()
