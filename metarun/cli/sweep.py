"""The results table of a sweep: a Hydra callback, so that it works with every launcher."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from metarun.cli.jobs import SWEPT, SweepLoader, definition, is_kept, other_job, state_of
from metarun.cli.search import OPTUNA, prepare_search
from metarun.cli.shared import REFUSED
from metarun.commands.sweeps import (
    Row,
    content_of_job,
    draw,
    is_sweep,
    jobs_in,
    print_tables,
    record_files,
    row_of,
    version_of,
)
from metarun.config.changes import key_of
from metarun.config.comments import without_pairing
from metarun.errors import counted, described, message_line
from metarun.reporting.console import inform, print_line, relative
from metarun.training.interrupts import OutOfTime, Requests, deadline, stop_requested
from metarun.training.records import NOT_FINISHED, write_failure

OUT_OF_TIME = f"{NOT_FINISHED}: stop.minutes is over"
LOCK = contextlib.ExitStack()  # holds the lock of the sweep of this process; locks cannot be sent to workers
LOCKED = ".sweep.lock"


class SweepTable(Callback):
    """Keeps sweep.csv, with one row for each job, and prints it as a table when the sweep ends or is stopped.

    The rows come from files in the folders of the jobs (`metarun.commands.sweeps`), which also say what is
    left to do if the same sweep is started again in its folder.

    Args:
        retry: what is done with jobs that have failed before: "failed": they are tried again; "none": left.
    """

    running: ClassVar[SweepTable | None] = None  # the sweep of this process, until it has ended
    in_command: ClassVar[bool] = (
        False  # whether a command runs in this process, and not a job of one elsewhere
    )

    def __init__(self, retry: str = "failed") -> None:
        self.retry = retry

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        from metarun.cli.explain import explain

        try:
            self.start(config)
        except Exception as error:  # Hydra would make it a warning and start the jobs
            stop_with(explain(error, config.hydra.job.config_name, sys.argv[1:]) or described(error))

    def start(self, config: DictConfig) -> None:
        """Find out what there is in the folder of the sweep, and lock it; exits if it cannot be started."""
        from metarun.storage.locks import locked

        if self.retry not in ("failed", "none"):
            stop_with(f"retry={self.retry}: must be failed (try failed jobs again) or none (leave them)")
        self.folder, self.command = (folder := Path(config.hydra.sweep.dir)), config.hydra.job.config_name
        jobs, loader = planned_jobs(config), loader_of_sweep()
        loader.share(config, jobs)
        self.fixed = [word for word in config.hydra.overrides.task if not SWEPT.search(word)]
        self.planned = [without_pairing(words) for words in jobs]
        self.again = is_sweep(folder)
        if self.again:  # the records of jobs say with which settings they ran
            jobs = [loader.without_unread(config, words)[0] for words in jobs]
        self.jobs = [without_pairing(words) for words in jobs]
        sweep: Any = OmegaConf.to_container(config.hydra.sweep)  # in which nothing is resolved
        if self.again and sweep["subdir"] == "${hydra:job.num}":
            self.check_same_jobs()
        check_one_composes(config, self.planned)
        prepare_launcher(config.hydra.launcher)
        folder.mkdir(parents=True, exist_ok=True)
        if not LOCK.enter_context(locked(folder / "sweep")):
            stop_with(f"{folder}: another process runs this sweep; wait for it, or choose another folder")
        prepare_search(config)
        # Files of an earlier sweep. Not by their times: the clock of a file server may be another one.
        self.before = {path: version_of(path) for path in record_files(folder)}
        SweepTable.running = self

    def check_same_jobs(self) -> None:
        """Exit with status 1 if the folder of a numbered job has another one."""
        for number, words in enumerate(self.jobs):
            before = content_of_job(self.folder / str(number)).get("overrides")
            if isinstance(before, list) and (key := other_job(before, words, self.command)):
                stop_with(
                    f"{self.folder}: contains another sweep, whose job {number} has another {key}; type the "
                    "same command to continue it, or choose another folder"
                )

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        if config.hydra.mode != RunMode.MULTIRUN:
            return
        number, jobs = config.hydra.job.num, self.jobs
        words = without_pairing(config.hydra.overrides.task)
        folder = Path(config.hydra.runtime.output_dir)
        state = state_of(folder, words)
        kept = is_kept(state, self.retry)
        if jobs:
            words = [word for word in words if not all(word in job for job in jobs)]
        else:
            words = [word for word in words if key_of(word) not in map(key_of, self.fixed)]
        name = f"job {number + 1}{f' of {len(jobs)}' if jobs else ''}: {' '.join(words)}".rstrip(": ")
        inform(f"{name} ({state} before)" if kept else name)
        if not kept:
            self.say_what_is_left_out(number, config.hydra.overrides.task)
            again = f"; metarun train resume={relative(folder)} continues it"
            train = config.hydra.job.config_name == "train"
            record_failure(folder, NOT_FINISHED + (again if train else ""))
        self.write()

    def say_what_is_left_out(self, number: int, words: Iterable[str]) -> None:
        """Print a line for each typed setting that a job runs without."""
        typed, kept = self.planned[number] if self.planned else self.fixed, set(map(key_of, words))
        for word in (each for each in typed if key_of(each) not in kept):
            inform(f"{word}: nothing reads it in this job, which runs without it")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        if config.hydra.mode == RunMode.MULTIRUN:
            self.write()

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        errors = [str(result["error"]) for result in self.end().values() if "error" in result]
        if errors and all(error.startswith(OUT_OF_TIME) for error in errors):
            raise OutOfTime
        if errors:
            sys.exit(1)

    def end(self) -> dict[str, Row]:
        """Write and print the table, and return the results by job."""
        SweepTable.running = None
        results = self.results()
        if results:
            part = f"{len(results)} of " if len(results) < len(self.jobs) else ""
            jobs = counted(max(len(self.jobs), len(results)), "job")
            print_line(f"{part}{jobs} in {self.folder}")  # no title, which would be wrapped inside the path
            print_tables(results)
            if self.write():
                print_line(f"saved {self.folder / 'sweep.csv'}")
            if self.draw(results):
                print_line(f"saved {self.folder / 'sweep.png'}")
        elif {path.name for path in self.folder.glob("*")} <= {"multirun.yaml", LOCKED}:
            for path in self.folder.iterdir():  # no job was started
                path.unlink()
            with contextlib.suppress(OSError):  # a folder that contains something else stays
                self.folder.rmdir()
                self.folder.parent.rmdir()
        return results

    def results(self) -> dict[str, Row]:
        """The content of the files of this sweep's jobs, by the folder of the job."""
        changed = {
            str(path.parent.relative_to(self.folder))
            for path in record_files(self.folder)
            if version_of(path) != self.before.get(path)
        }
        planned = {definition(words, self.command) for words in self.jobs}
        everything = self.again and not planned  # a sweeper that chose its jobs while it ran
        return {
            name: content
            for name, content in jobs_in(self.folder).items()
            if everything or name in changed or definition(content["overrides"], self.command) in planned
        }

    def write(self) -> bool:
        """Write sweep.csv, and return whether that was possible; a full disk must not end the sweep."""
        from metarun.storage.files import write_csv

        path = self.folder / "sweep.csv"
        try:
            write_csv(path, [row_of(job, result) for job, result in self.results().items()])
        except OSError as error:
            inform(f"{path}: cannot be written ({error.strerror})")
            return False
        return True

    def draw(self, results: dict[str, Row]) -> bool:
        """Draw sweep.png, and return whether there was something to draw and it could be written."""
        path = self.folder / "sweep.png"
        try:
            return draw(results, path)
        except OSError as error:
            inform(f"{path}: cannot be written ({error.strerror})")
            return False


@contextlib.contextmanager
def ending_sweep() -> Iterator[None]:
    """A context that prints the table of a sweep also if the sweep is stopped, and releases its folder."""
    SweepTable.running, SweepTable.in_command = None, True
    with LOCK:
        try:
            yield
        finally:
            SweepTable.in_command = False
            if (stopped := SweepTable.running) is not None and stopped.end():
                inform(f"the same command with sweep={relative(stopped.folder)} continues this sweep")


def stop_with(message: str) -> NoReturn:
    """Print an error as one line and exit with status 1: Hydra would print the traceback of an exception."""
    print(f"metarun: error: {message_line(message)}", file=sys.stderr)
    sys.exit(1)


def prepare_launcher(launcher: DictConfig) -> None:
    """Exit with status 1 if a launcher cannot work here, and correct what the one of Ray gets wrong."""
    name = launcher["_target_"].rpartition(".")[2]
    if name == "SlurmLauncher" and not shutil.which("srun"):
        stop_with(
            "hydra/launcher=submitit_slurm: this machine has no Slurm (no srun in PATH); use a login node of "
            "the cluster, or choose submitit_local or joblib"
        )
    if name == "RayLauncher" and launcher.ray.init.get("address"):
        with open_dict(launcher.ray.init):  # its default of this is refused by an existing cluster
            launcher.ray.init.setdefault("object_store_memory", None)


def loader_of_sweep() -> SweepLoader:
    """What composes the configs of the jobs, also in processes that a launcher starts."""
    loader = GlobalHydra.instance().config_loader()
    assert isinstance(loader, SweepLoader)
    return loader


def check_one_composes(config: DictConfig, jobs: list[list[str]]) -> None:
    """Exit with status 1 if the settings of every job are refused, which is no sweep but a mistake."""
    loader, reason = loader_of_sweep(), ""
    for words in jobs:
        message = loader.load_sweep_config(config, words).get(REFUSED)
        if message is None:
            return
        reason = reason or message
    if reason:
        stop_with(reason)


def planned_jobs(config: DictConfig) -> list[list[str]]:
    """The overrides of each job; empty for a sweeper that chooses its jobs while it runs."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    sweeper = config.hydra.sweeper
    if not sweeper._target_.endswith(".BasicSweeper"):
        return []
    words = [f"{key}={value}" for key, value in (sweeper.params or {}).items()]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    overrides = parser.parse_overrides([*words, *config.hydra.overrides.task])
    (jobs,) = BasicSweeper.split_arguments(overrides, None)
    if not jobs:
        swept = [str(each.input_line) for each in overrides if each.is_sweep_override()]
        stop_with(f"{', '.join(swept)}: no values, so there are no jobs")
    return jobs


def is_left(cfg: DictConfig, folder: Path) -> bool:
    """Whether a job is not run: it was before, there is no time left, which is noted, or a signal came."""
    overrides, table = HydraConfig.get().overrides.task, HydraConfig.get().callbacks.get("table")
    if table is None:  # of a command that writes no results, such as `data`
        return False
    if is_kept(state_of(folder, overrides), table.retry):
        return True
    if late := bool(Requests(deadline(OmegaConf.select(cfg, "stop.minutes")))):
        record_failure(folder, OUT_OF_TIME)
        if is_search():
            raise OutOfTime
    return late or stop_requested()


def is_search() -> bool:
    """Whether the jobs depend on the results of others: without one of them, the sweep ends."""
    return HydraConfig.get().sweeper["_target_"] == OPTUNA


def in_worker() -> bool:
    """Whether this is a process that a launcher has started for some jobs of a sweep."""
    return not SweepTable.in_command


def out_of_time_job(name: str, folder: Path) -> None:
    """Note that the time of a job was over before it had finished."""
    record_failure(folder, f"{OUT_OF_TIME}; metarun {name} resume={relative(folder)} continues it")


def record_failure(folder: Path, message: str) -> None:
    """Write failure.json for a job, so that the sweep continues and its table shows the error.

    Other files in the folder of the job are not changed. A full disk leaves the file as it was.
    """
    hydra = HydraConfig.get()
    choices = {
        str(group): option
        for group, option in hydra.runtime.choices.items()
        if isinstance(option, str) and not str(group).startswith("hydra/")
    }
    write_failure(folder, without_pairing(hydra.overrides.task), message, choices)


def record_success(folder: Path, value: float | None) -> None:
    """Replace the failure.json of a job that has ended, by job.json if its command writes no result.json.

    Args:
        folder: of the job.
        value: what the command returned: the first result of `metarun eval` or `adapt`, None of `data`.
    """
    from metarun.storage.files import write_json

    (folder / "failure.json").unlink(missing_ok=True)
    if not (folder / "result.json").exists():
        with contextlib.suppress(OSError):
            overrides = without_pairing(HydraConfig.get().overrides.task)
            write_json(folder / "job.json", {"overrides": overrides, "result": value})
