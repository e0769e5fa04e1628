"""python -m benchmarks.gpu: everything that a machine with a GPU can tell about metarun, within ten minutes.

The tests marked `gpu`; whether CPU and GPU agree, for every method; the speed table with the installed
libraries; the kernels of a step and the gaps between them; the compiled step; one short training. Each part
runs in a process of its own, and the rest goes on if it fails or takes too long. The results are one JSON
file and one Markdown file. It needs a clone of the repository, metarun's requirements, and PyTorch 2.6.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import agreement
from benchmarks.report import markdown
from benchmarks.workloads import WORKLOADS
from metarun.storage.files import write_json, write_text

ROOT = Path(__file__).resolve().parents[1]
QUICK_CASES = ["protonet", "maml", "reptile", "maml, sinusoid", "rl2, bandit"]
QUICK_WORKLOADS = ["W5a"]
WORKLOADS_OF_A_GPU = sorted(WORKLOADS, key=lambda name: ("W1", "W3", "W4", "W5", "W2").index(name[:2]))
COMPILED = ["W5a", "W5b", "W1c", "W4a"]
PROFILED = ["W1a", "W1b", "W3a", "W4a", "W4b", "W5b"]
PROCESSES = 8  # of the check of the methods
TRAINING = [
    *("algorithm=maml", "dataset=glyphs", "iterations=2000", "meta_batch=32", "queries=15"),
    *("validation.every=1000", "checkpoint.every=1000", "log.tensorboard=false"),
]
QUICK_TRAINING = ["dataset=sinusoid", "iterations=200", "test.episodes=100", "log.tensorboard=false"]


class Parts:
    """Runs the parts and keeps their results.

    Args:
        args: the arguments of the command.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.device, self.quick = args.device, args.quick
        self.ends = time.monotonic() + 60 * args.minutes
        self.scratch = Path(tempfile.mkdtemp(prefix="metarun-gpu-"))
        self.on_gpu = torch.device(args.device).type == "cuda"

    def known(self) -> dict[str, Callable[[], Any]]:
        """The parts by name, the most important first."""
        return {
            "tests": self.tests,
            "agreement": self.agreement,
            "speed": self.speed,
            "kernels": self.kernels,
            "training": self.training,
            "compiled": self.compiled,
        }

    def tests(self) -> dict[str, Any]:
        if not self.on_gpu:
            return {"skipped": "no GPU"}
        if find_spec("pytest") is None:
            return {"skipped": "pytest is not installed"}
        words = ["pytest", "-m", "gpu", "-q", "-ra", "-p", "no:cacheprovider", "-o", "addopts=", "tests"]
        words += ["-W", "default", "--tb=short"] + (["-n", "6"] if find_spec("xdist") else [])
        done = self.python(words, 120, check=False)
        return {"passed": done.returncode == 0, "end": done.stdout.splitlines()[-60:]}

    def agreement(self) -> list[dict[str, Any]]:
        names = QUICK_CASES if self.quick else list(agreement.cases())[::-1]  # large networks first
        processes = min(PROCESSES, os.cpu_count() or 1)
        shares = [share for i in range(2 * processes) if (share := names[i :: 2 * processes])]

        def rows(share: Sequence[str]) -> list[dict[str, Any]]:
            words = ["benchmarks.agreement", *share, "--device", self.device]
            found = json_lines(self.python(words, 170, check=False).stdout)
            missing = [name for name in share if name not in {row["case"] for row in found}]
            return found + [{"case": name, "failed": "no result in time"} for name in missing]

        with ThreadPoolExecutor(processes) as pool:
            return [row for each in pool.map(rows, shares) for row in each]

    def speed(self) -> dict[str, Any]:
        names = QUICK_WORKLOADS if self.quick else WORKLOADS_OF_A_GPU
        return self.benchmark(names, 60 if self.quick else 260)

    def compiled(self) -> dict[str, Any]:
        only = ["--compile", "--no-sampling", "--only", "metarun", "metarun compiled", "plain loop"]
        return self.benchmark(QUICK_WORKLOADS if self.quick else COMPILED, 100, *only)

    def benchmark(self, names: Sequence[str], limit: float, *more: str) -> dict[str, Any]:
        """The report of `python -m benchmarks`: of as many workloads as fit."""
        out = self.scratch / f"{len(list(self.scratch.iterdir()))}.json"
        words = ["benchmarks", *names, "--device", self.device, "--rounds", "4", "--seconds", "0.1"]
        done = self.python([*words, "--no-memory", "--out", str(out), *more], limit, check=False)
        report = json.loads(out.read_text()) if out.exists() else {}
        return report if done.returncode == 0 else report | {"failed": last_line(done.stderr)}

    def kernels(self) -> Any:
        if not self.on_gpu:
            return {"skipped": "no GPU"}
        done = self.python(["benchmarks.kernels", *PROFILED], 90, check=False)
        return json_lines(done.stdout) or {"failed": last_line(done.stderr)}

    def training(self) -> dict[str, Any]:
        folder = self.scratch / "run"
        words = [*(QUICK_TRAINING if self.quick else TRAINING), f"hardware.device={self.device}"]
        began = time.perf_counter()
        self.python(["metarun", "train", *words, f"hydra.run.dir={folder}"], 120)
        took, result = time.perf_counter() - began, json.loads((folder / "result.json").read_text())
        kept = {key: result[key] for key in ("iterations", "seconds", "metric", "validation", "test")}
        return {"command": f"metarun train {' '.join(words)}", "wall_s": took, **kept}

    def python(
        self, words: Sequence[str], limit: float, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run `python -m WORDS` for at most `limit` seconds; what it has printed by then is kept.

        Raises:
            RuntimeError: if it fails and `check` is set.
        """
        left = min(limit, self.ends - time.monotonic())
        if left < 5:
            raise RuntimeError("no time left")
        environment = {**os.environ, "METARUN_CACHE": str(self.scratch / "cache"), "PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", *words]
        files = [(self.scratch / f"{time.monotonic_ns()}.{end}").open("w+") for end in ("out", "err")]
        with files[0] as out, files[1] as err:
            child = subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT, env=environment)
            try:
                status = child.wait(left)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
                status = -9
                err.write(f"\nstopped after {left:.0f} s\n")
            texts = [file.seek(0) or file.read() for file in (out, err)]
        if check and status:
            raise RuntimeError(last_line(texts[1]))
        return subprocess.CompletedProcess(command, status, *texts)


def json_lines(text: str) -> list[dict[str, Any]]:
    """The rows of the lines that are complete."""
    rows = []
    for line in text.splitlines():
        with suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")


def machine(device: str) -> dict[str, Any]:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    facts = {
        "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "CPU",
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip() or None,
    }
    return facts


def main() -> None:
    args = arguments()
    parts = Parts(args)
    report: dict[str, Any] = {"machine": machine(args.device)}
    for name, run in parts.known().items():
        if args.only and name not in args.only:
            continue
        began = time.perf_counter()
        try:
            report[name] = run()
        except Exception as error:  # the other parts are still to be run
            report[name] = {"failed": f"{type(error).__name__}: {error}"}
        report.setdefault("seconds", {})[name] = round(time.perf_counter() - began, 1)
        print(f"{name}: {report['seconds'][name]:.0f} s", file=sys.stderr, flush=True)
        write_json(args.out.with_suffix(".json"), report)
        write_text(args.out.with_suffix(".md"), markdown(report))
    print(markdown(report))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu to try the command")
    parser.add_argument("--quick", action="store_true", help="a few cases of each part")
    parser.add_argument("--minutes", type=float, default=10, help="no part goes on after so many minutes")
    parser.add_argument("--only", nargs="+", metavar="PART", help="tests agreement speed ...")
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu"), help="without .json and .md")
    args = parser.parse_args()
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: PyTorch finds no GPU; add --device cpu --quick to try it")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    main()
