"""How long CPU threads wait for each other, which depends on whether other processes need the cores.

A thread of PyTorch's OpenMP (libgomp) that waits for others spins for 300,000 loops before it sleeps. Where
all cores are free, that is fastest. Where they are not, it takes time from the threads it waits for, and a
run becomes many times slower (docs/speed.md).
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

SPINS = 1000  # before a thread sleeps, on a busy machine
LOADS = Path("/proc/loadavg")  # of Linux; the fourth entry is "running/all", of threads that run now
SAMPLES, PAUSE = 10, 0.005  # seconds


def wait_briefly_if_busy() -> None:
    """Let threads sleep early if other processes use the cores, unless the user has set how they wait.

    It has to be called before PyTorch is imported. Results do not depend on it.
    """
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys() and is_busy():
        os.environ["GOMP_SPINCOUNT"] = str(SPINS)


def is_busy() -> bool:
    """Whether other processes run on so many cores that a thread for each core of this one finds too few."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):  # not Linux, or other files
        usable, running = len(os.sched_getaffinity(0)), 0
        for _ in range(SAMPLES):
            running += int(LOADS.read_text("ascii").split()[3].partition("/")[0]) - 1  # this process itself
            time.sleep(PAUSE)
        return usable > 1 and running / SAMPLES + usable > (os.cpu_count() or 1) + 0.5
    return False
