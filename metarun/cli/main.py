"""The entry point of the command line: selects the command and runs it by Hydra.

PyTorch is not imported here, so that help and usage errors appear quickly.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import re
import shutil
import sys
import traceback
import warnings
from collections.abc import Collection, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import metarun
from metarun.cli.overrides import Failed, arrange, fail, unquoted
from metarun.cli.ranks import announce, end, is_first, is_launched, join, reports, speak
from metarun.cli.search_path import forget_current_folder
from metarun.cli.streams import output_that_never_fails
from metarun.cli.waiting import wait_briefly_if_busy
from metarun.config.paths import CONF
from metarun.errors import RankLost, described, first_line, message_line
from metarun.training.interrupts import OutOfTime, ending_on_signals, stop_requested

COMMANDS = {
    "train": "metarun.commands.train",
    "eval": "metarun.commands.evaluate",
    "adapt": "metarun.commands.adapt",
    "predict": "metarun.commands.predict",
    "export": "metarun.commands.export",
    "runs": "metarun.commands.runs",
    "report": "metarun.commands.report",
    "data": "metarun.commands.data",
    "online": "metarun.commands.online",
}

OUT_OF_TIME = 75  # the exit status that sysexits.h calls a temporary failure: try again

HELP = """\
metarun {version}: meta-learning experiments from the command line

  metarun train    meta-train an algorithm
                   [group=option ...] [key=value ...] [-m]
  metarun eval     evaluate checkpoints on a grid of tasks
                   checkpoint=RUN [ways=[5,20] shots=[1,5]]
  metarun adapt    adapt to a new task, also of your own images
                   checkpoint=RUN [support=FOLDER query=FOLDER]
  metarun predict  predict new examples by an adapted model
                   adapted=FILE query=FOLDER
  metarun export   write a model for programs without metarun
                   adapted=FILE|checkpoint=RUN [format=onnx]
  metarun runs     list runs, their figures and what became of them
                   [FOLDER] [status=failed] [sort=test]
  metarun report   write one HTML file of runs and evaluations
                   [RUN ...]
  metarun data     list datasets; prepare one and show examples
                   [dataset=NAME]
  metarun online   follow a stream of tasks, beside other learners
                   [dataset=NAME tasks=28]

A first result in two minutes, without any download:
  metarun train
  metarun eval checkpoint=outputs/...     the run's folder, as `train` prints it

More to type:
  metarun train algorithm=maml dataset=omniglot ways=20 shots=5
  metarun train -m algorithm=maml,protonet seed=0,1    a sweep over combinations
  metarun train --help                     every group, option and setting
  metarun train --cfg job                  the whole config, without running it
"""


def main(argv: list[str] | None = None) -> NoReturn:
    """Run a command and exit.

    The status is 0 (success), 1 (error), 2 (wrong usage), 75 (stop.minutes is over) or 130 (interrupted).
    """
    with ending_on_signals(), output_that_never_fails():
        try:
            dispatch(list(sys.argv[1:] if argv is None else argv))
            end(0)
        except KeyboardInterrupt as stopped:
            late = isinstance(stopped, OutOfTime)
            failed = Failed(*("stop.minutes is over", OUT_OF_TIME) if late else ("interrupted", 130))
            speak(failed)
            end(failed.code)
            sys.exit(failed.code)
        except Failed as failed:
            speak(failed)
            end(failed.code)
            raise
        except Exception as error:
            if is_launched():
                if reports(described(error)):
                    traceback.print_exception(error)
                end(1)
            raise
    sys.exit(0)


def dispatch(arguments: list[str]) -> None:
    """Run the command that the arguments name; exits with a status above 0 if that is not possible."""
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(HELP.format(version=metarun.__version__), end="")
        return None if arguments else sys.exit(2)
    if arguments[0] == "--version":
        print(f"metarun {metarun.__version__}")
        return
    name, *rest = arguments
    if name in ("-sc", "--shell-completion"):
        complete(arguments)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"commands: {', '.join(COMMANDS)}"
        fail(f"{name!r} is not a command; {hint}", status=2)
    wait_briefly_if_busy()  # before PyTorch is imported
    run(name, rest)


def complete(arguments: list[str]) -> NoReturn:
    """Answer the shell's question for completions, or print Hydra's script that makes it ask."""
    from metarun.cli.completion import completed_command, offered

    names = list(COMMANDS)
    if any(argument.startswith("query=") for argument in arguments) and (words := offered(names)) is not None:
        print(" ".join(words))
        sys.exit(0)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run(completed_command(names), arguments)
    print(re.sub(r"(?<!\S)\+?pairing\S*\s?", "", printed.getvalue()), end="")  # the command line sets it
    sys.exit(0)


def run(name: str, arguments: list[str]) -> None:
    """Compose the config of a command and run it; user errors are printed as one line."""
    forget_current_folder()
    raw = os.environ.get("HYDRA_FULL_ERROR") == "1"
    try:
        execute(name, arguments, raw)
    except Exception as error:
        if was_interrupted(error):
            raise KeyboardInterrupt from None
        if raw:
            raise
        fail(message_of(error, name), status=1)


def execute(name: str, arguments: list[str], raw: bool) -> tuple[Path, Any]:
    """Compose the config of a command and run it.

    Args:
        name: the command, a key of `COMMANDS`.
        arguments: the words after it.
        raw: whether errors of the command are raised as they are.

    Returns:
        The output folder and the result of the command; of a sweep, those of its last job.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig

    from metarun.cli.jobs import composing_jobs
    from metarun.cli.sweep import ending_sweep
    from metarun.config.schema import register_frames

    register_frames()
    warnings.filterwarnings("error", message="provider=hydra.searchpath")
    warnings.filterwarnings("ignore", message="The epoch parameter in")  # by SequentialLR of PyTorch 2.6
    warnings.filterwarnings("ignore", module=r"PIL\.")  # unreadable images raise errors that name the file
    # Hydra registers completion for the first word.
    program = "metarun" if "-sc" in arguments else f"metarun {name}"
    sys.argv = [program, *arrange(name, arguments)]
    kept = existing_folders(sys.argv[1:])
    check_output_folder(name, kept)
    sys.argv += join(name, sys.argv[1:])
    # Hydra must re-raise errors, so that they are formatted here; HYDRA_FULL_ERROR=1 shows the tracebacks.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    ended: tuple[Path, Any] = Path(), None

    def task(cfg: Any) -> Any:
        nonlocal ended
        announce(Path(HydraConfig.get().runtime.output_dir))
        result = run_command(name, cfg, raw, kept)
        ended = Path(HydraConfig.get().runtime.output_dir), result
        return result

    with ending_sweep(), composing_jobs():
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=name)(task)()
    return ended


def run_command(name: str, cfg: Any, raw: bool, kept: frozenset[Path] = frozenset()) -> Any:
    """Run a command on a composed config.

    A user error ends the program; in a sweep it only ends this job.

    Args:
        name: the command, a key of `COMMANDS`.
        cfg: the composed config.
        raw: whether errors are raised instead, to show their traceback.
        kept: folders that existed before, which an error does not remove.

    Returns:
        The result of the command.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from metarun.cli.jobs import check_composed, enter_folder, value_of_job
    from metarun.cli.sweep import in_worker, is_left, is_search, out_of_time_job, record_success
    from metarun.config.check import check_hydra
    from metarun.config.stated import naming_origins
    from metarun.config.targets import naming_options

    sweep = HydraConfig.get().mode == RunMode.MULTIRUN
    folder = Path(HydraConfig.get().runtime.output_dir)
    if sweep and not HydraConfig.get().job.chdir:
        enter_folder(HydraConfig.get().runtime.cwd)
    if sweep and is_left(cfg, folder):
        return value_of_job(folder)
    try:
        check_composed(cfg)
        check_hydra(HydraConfig.get())
        typed, choices = HydraConfig.get().overrides.task, HydraConfig.get().runtime.choices
        with naming_origins(typed), naming_options(cfg, choices):
            result = load(name).run(cfg)
    except BaseException as error:
        if sweep and isinstance(error, OutOfTime):
            out_of_time_job(name, folder)
        stopped = isinstance(error, OutOfTime) or (isinstance(error, KeyboardInterrupt) and in_worker())
        if sweep and stopped and not is_search():
            return None  # "not finished"; the other jobs go on
        if was_interrupted(error):
            remove_hydra_files(folder, kept)
            raise error if isinstance(error, (OutOfTime, SystemExit)) else KeyboardInterrupt from None
        if sweep:
            return failed_job(error, name, raw, folder)  # None: sweepers count it as a failure
        if raw or not isinstance(error, Exception):
            raise
        message = message_of(error, name)
        remove_hydra_files(folder, kept)
        fail(message, status=1)
    if sweep:
        record_success(folder, result)
    elif name in ("data", "runs"):  # which write figures at most
        remove_hydra_files(folder, kept)
    return result


def was_interrupted(error: BaseException) -> bool:
    """Whether an error is due to a signal: code that is interrupted, such as an import, may raise its own.

    When a process of several has ended, torchrun interrupts the others, which is not the reason.
    """
    return isinstance(error, KeyboardInterrupt) or (stop_requested() and not isinstance(error, RankLost))


def failed_job(error: BaseException, name: str, raw: bool, folder: Path) -> None:
    """Report an error of one job of a sweep, and record it for the table; the sweep continues.

    Args:
        error: any error; one that is not the user's is printed with its traceback.
        name: the command.
        raw: whether to print the traceback of every error.
        folder: the folder of the job.
    """
    from metarun.cli.explain import explain
    from metarun.cli.sweep import record_failure

    message = explain(error, name, sys.argv[1:])
    if raw or message is None:
        traceback.print_exception(error)
    message = message or f"internal error: {type(error).__name__}: {first_line(error)}"
    print(f"metarun: error: {message_line(message)}", file=sys.stderr)
    record_failure(folder, message)


def load(name: str) -> Any:
    """The module of a command. On a terminal, a status line is shown while PyTorch is imported."""
    from metarun.reporting.console import messages

    with nullcontext() if "torch" in sys.modules else messages.status("loading PyTorch"):
        return importlib.import_module(COMMANDS[name])


def message_of(error: Exception, name: str) -> str:
    """The message of a user error; an internal error is raised again with its traceback."""
    from metarun.cli.explain import explain

    message = explain(error, name, sys.argv[1:])
    if message is None:
        raise error
    return message


def existing_folders(arguments: list[str]) -> frozenset[Path]:
    """The typed output folders, their .hydra folders and their parents, as far as they exist now."""
    typed = (re.fullmatch(r"\+*hydra\.(?:run|sweep)\.dir=(.+)", argument) for argument in arguments)
    folders = [Path(os.path.abspath(unquoted(match[1]))) for match in typed if match]
    paths = {path for folder in folders for path in (folder / ".hydra", folder, folder.parent)}
    return frozenset(path for path in paths if os.path.isdir(path))


def check_output_folder(name: str, folders: Iterable[Path]) -> None:
    """Exit with status 1 if the output folder of a command other than `train` is a training run.

    That of a stream that goes on is checked when its checkpoint is read.
    """
    resumes = any(argument.startswith("resume=") for argument in sys.argv[1:])
    for folder in () if resumes else folders:
        if name != "train" and (folder / "last.pt").is_file() and (folder / ".hydra") in folders:
            fail(
                f"hydra.run.dir={folder}: has a training run, whose files this would replace; "
                "name another folder",
                status=1,
            )


def remove_hydra_files(folder: Path, kept: Collection[Path]) -> None:
    """Remove an output folder that contains nothing but .hydra, and its parent if that is empty then.

    Args:
        folder: the output folder.
        kept: folders that are not removed, nor what contains them.
    """
    folder = Path(os.path.abspath(folder))
    if not is_first():
        return
    if not folder.is_dir() or not {path.name for path in folder.iterdir()} <= {".hydra"}:
        return
    for path in (folder / ".hydra", folder, folder.parent):
        if path in kept or path == Path.cwd():
            return
        if path.name == ".hydra":
            shutil.rmtree(path, ignore_errors=True)
            continue
        try:
            path.rmdir()
        except OSError:  # it is not empty
            return
