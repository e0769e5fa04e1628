"""`torchrun ... -m metarun`: one command in several processes, of which the first alone writes and speaks.

PyTorch is imported only where the environment says that a launcher has started several processes.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import metarun
from metarun.cli.overrides import Failed, fail, quoted, say
from metarun.errors import message_line

STARTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK")  # a launcher sets all of these for each process
SHARING = ("train", "eval")  # the commands whose tasks processes can share
FOR_ONE = {
    "-h",
    "--help",
    "--hydra-help",
    "-c",
    "--cfg",
    "-i",
    "--info",
    "-sc",
    "--shell-completion",
    "--version",
}
SWEEPS = {"-m", "--multirun", "hydra.mode=MULTIRUN"}


def is_launched() -> bool:
    """Whether a launcher such as torchrun has started this process as one of several."""
    return any(os.environ.get(name) for name in STARTED)


def join(name: str, arguments: list[str]) -> list[str]:
    """Connect with the other processes.

    Args:
        name: the command.
        arguments: of Hydra.

    Returns:
        Further arguments of Hydra: all ranks have the output folder that the first one has chosen, which
        is known once that has read its settings.

    Raises:
        ConfigError: the processes cannot connect, or have other versions of metarun or PyTorch.
        RankLost: the first rank has failed before.
    """
    if not is_launched():
        return []
    if FOR_ONE & set(arguments):
        return [] if is_first() else sys.exit(0)
    if name not in SHARING:
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return []
        fail(f"metarun {name} runs in one process; start it without torchrun", status=1)
    if SWEEPS & set(arguments):
        fail("-m: the jobs of a sweep run one after the other; start torchrun once for each job", status=1)
    import torch

    from metarun.training import parallel

    ranks = parallel.start()
    facts = {"the version of metarun": metarun.__version__, "the version of PyTorch": torch.__version__}
    ranks.require_equal({**facts, "the command": name}, "start the same on all machines")
    if ranks.first:
        return []
    silence()
    folder = ranks.from_first()
    return [f"hydra.run.dir={quoted(folder)}", "hydra.output_subdir=null"]


def announce(folder: Path) -> None:
    """Give the other processes the output folder, in the first of them."""
    if is_launched():
        from metarun.training import parallel

        if parallel.current().first:
            parallel.current().from_first(str(folder.absolute()))


def end(status: object) -> None:
    """End this process, if it is connected with others.

    At once, without Python's cleaning up, in which NCCL may wait for a process that has ended, and threads of
    Gloo may abort.
    """
    if "metarun.training.parallel" in sys.modules:
        from metarun.training import parallel

        if parallel.current().joined:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(int(str(status)))


def silence() -> None:
    """Leave messages and results to the first process."""
    from metarun.reporting.console import console, messages
    from metarun.training.interrupts import say_nothing

    console.quiet = messages.quiet = True
    say_nothing()


def is_first() -> bool:
    """Whether this process is the first one, as far as the environment says."""
    return os.environ.get("RANK", "0") in ("", "0")


def speak(failed: Failed) -> None:
    """Print why the command has failed, in one of the processes."""
    if reports(failed.message, interrupted=failed.code == 130):
        if is_first():
            say(failed)
        else:
            say(Failed(f"rank {os.environ['RANK']}: {failed.message}", int(str(failed.code))))


def reports(message: str, interrupted: bool = False) -> bool:
    """Whether this process is the one that reports a failure."""
    if not is_launched():
        return True
    if "metarun.training.parallel" in sys.modules:
        from metarun.training import parallel

        if parallel.current().joined:
            if interrupted:  # all are; but torchrun also interrupts those that are left when one has failed
                return is_first() and not parallel.current().failure()
            return parallel.current().is_first_failure(message_line(message))
        if parallel.unreached:  # perhaps by this process alone
            return True
    return is_first()  # the arguments of all are wrong
