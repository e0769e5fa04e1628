"""Where the rows of a run go besides metrics.jsonl and TensorBoard: services, each in a thread of its own."""

from __future__ import annotations

import importlib.util
import os
import queue
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metarun.errors import ConfigError, described
from metarun.reporting.console import inform
from metarun.storage.files import write_text

Row = dict[str, Any]
MOST_WAITING = 10_000  # rows that may wait for a service
PATIENCE = 20.0  # seconds that a finished run waits for a service


@dataclass(frozen=True)
class RunFacts:
    """What a service receives about a run.

    Args:
        folder: the run folder.
        name: the run in words, such as "maml on omniglot, 5-way 1-shot".
        config: all settings, as plain containers.
    """

    folder: Path
    name: str
    config: Mapping[str, Any]


class Destination(ABC):
    """Where rows go: derive from this class for a service of your own, and name it in conf/tracker.

    The constructor takes settings and checks them; it raises ConfigError. The other methods are called in a
    thread, one after the other, and may take their time or raise any error: the run neither waits nor stops.
    """

    @abstractmethod
    def start(self, run: RunFacts) -> None:
        """Called once, before any row."""

    @abstractmethod
    def log(self, row: Row) -> None:
        """Take a row.

        Args:
            row: `iteration`, `split` ("train" or "validation"), and values; see `figures`.
        """

    def finish(self, result: Mapping[str, Any]) -> None:  # noqa: B027
        """Called at the end of a run that was not interrupted, with the content of result.json."""

    def close(self) -> None:  # noqa: B027
        """Called at the end, also of an interrupted run."""


def figures(row: Row) -> dict[str, float]:
    """The float values of a row by their names, such as "validation/accuracy"."""
    return {f"{row['split']}/{key}": value for key, value in row.items() if isinstance(value, float)}


def results(result: Mapping[str, Any]) -> dict[str, float]:
    """The means in a result.json by their names, such as "best/validation" and "best/test"."""
    parts = {split: result.get(split) for split in ("validation", "test")}
    return {f"best/{name}": part["mean"] for name, part in parts.items() if isinstance(part, Mapping)}


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings in nested containers, by dotted names."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def require_package(package: str, option: str) -> None:
    """Raise ConfigError unless a package is installed."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f'tracker={option}: needs {package}; pip install "metarun[{option}]"')


def identity(folder: Path, service: str) -> Path:
    """The file in a run folder with the name of the run at a service."""
    return folder / f".{service}_run"


def remembered(folder: Path, service: str, made: str = "") -> str:
    """The name of a run at a service, kept in its folder so that a resumed run goes on under it.

    Args:
        folder: the run folder.
        service: the name of the service.
        made: the name that the service has given; "": a random one.
    """
    path = identity(folder, service)
    with suppress(OSError, UnicodeDecodeError):
        return path.read_text().strip()
    name = made or uuid.uuid4().hex[:16]
    with suppress(OSError):
        write_text(path, name + "\n")
    return name


class Background:
    """A destination in a thread of its own: the run never waits for it, and goes on without it if it fails.

    Args:
        name: of the destination, for messages.
        destination: gets all rows in order.
        run: what it receives about the run.
    """

    def __init__(self, name: str, destination: Destination, run: RunFacts) -> None:
        self.name, self.destination, self.given_up = name, destination, False
        self.waiting: queue.Queue[Any] = queue.Queue(MOST_WAITING)
        self.thread = threading.Thread(target=self.work, args=(run,), name=f"tracker {name}", daemon=True)
        self.thread.start()

    def work(self, run: RunFacts) -> None:
        """Pass on what is waiting, until there is None."""
        try:
            self.destination.start(run)
            while (call := self.waiting.get()) is not None:
                call()
            self.destination.close()
        except BaseException as error:  # also a SystemExit of a library
            self.give_up(described(error))

    def log(self, row: Row) -> None:
        """Pass on a row."""
        self.put(lambda: self.destination.log(row))

    def finish(self, result: Mapping[str, Any]) -> None:
        """Pass on the result."""
        self.put(lambda: self.destination.finish(result))

    def put(self, call: Any) -> None:
        """Let the thread make a call, unless it has failed or is too far behind."""
        if self.given_up:
            return
        try:
            self.waiting.put_nowait(call)
        except queue.Full:
            self.give_up(f"is {MOST_WAITING:,} rows behind")

    def close(self) -> None:
        """Wait for the thread, but not for long."""
        self.put(None)
        if not self.given_up:
            self.thread.join(PATIENCE)
            if self.thread.is_alive():
                self.give_up(f"has not finished within {PATIENCE:.0f} s")

    def give_up(self, why: str) -> None:
        """Report, once, that the run goes on without this destination."""
        if not self.given_up:
            self.given_up = True
            inform(f"tracker={self.name}: {why}; the run goes on without it")


class WeightsAndBiases(Destination):
    """A run of Weights & Biases (https://docs.wandb.ai).

    Args:
        project, entity: where the run is listed.
        mode: "online", "offline" (files in the run folder, which `wandb sync` uploads) or "disabled". None:
            the variable WANDB_MODE; else online if there is an API key, and offline otherwise.

    Raises:
        ConfigError: wandb is not installed.
    """

    def __init__(self, project: str = "metarun", entity: str | None = None, mode: str | None = None) -> None:
        require_package("wandb", "wandb")
        if mode not in (None, "online", "offline", "disabled"):
            raise ConfigError(f"tracker.wandb.mode={mode}: must be online, offline or disabled")
        self.project, self.entity, self.mode = project, entity, mode
        self.run: Any = None

    def start(self, run: RunFacts) -> None:
        import wandb

        self.run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode or os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline"),  # type: ignore[arg-type]
            dir=str(run.folder),
            id=remembered(run.folder, "wandb"),
            resume="allow",
            name=run.name,
            config=dict(run.config),
            settings=wandb.Settings(silent=True, console="off"),
        )

    def log(self, row: Row) -> None:
        self.run.log(figures(row), step=row["iteration"])

    def finish(self, result: Mapping[str, Any]) -> None:
        self.run.summary.update(results(result))

    def close(self) -> None:
        self.run.finish()


def has_key() -> bool:
    """Whether there is an API key of Weights & Biases: in the environment, or from `wandb login`."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    with suppress(OSError, UnicodeDecodeError):
        return "api.wandb.ai" in (Path.home() / ".netrc").read_text()
    return False


class MLflow(Destination):
    """A run of MLflow (https://mlflow.org).

    Args:
        uri: a server, or a store such as file:mlruns; None: the variable MLFLOW_TRACKING_URI, else the folder
            mlruns in the current folder.
        experiment: where the run is listed.

    Raises:
        ConfigError: mlflow is not installed.
    """

    def __init__(self, uri: str | None = None, experiment: str = "metarun") -> None:
        require_package("mlflow", "mlflow")
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI") or Path("mlruns").resolve().as_uri()
        self.experiment = experiment

    def start(self, run: RunFacts) -> None:
        if self.uri.startswith("file:"):  # MLflow 3 recommends a database, which needs more packages
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient(self.uri)
        known = self.client.get_experiment_by_name(self.experiment)
        experiment = known.experiment_id if known else self.client.create_experiment(self.experiment)
        known_run = identity(run.folder, "mlflow").exists()
        made = "" if known_run else self.client.create_run(experiment, run_name=run.name).info.run_id
        self.run_id = remembered(run.folder, "mlflow", made)
        if made:
            params = [Param(name, str(value)[:500]) for name, value in flat(run.config)]
            for start in range(0, len(params), 100):  # the most of one request
                self.client.log_batch(self.run_id, params=params[start : start + 100])

    def log(self, row: Row) -> None:
        self.measure(figures(row), row["iteration"])

    def finish(self, result: Mapping[str, Any]) -> None:
        self.measure(results(result), result.get("iterations", 0))

    def close(self) -> None:
        self.client.set_terminated(self.run_id)

    def measure(self, values: Mapping[str, float], step: int) -> None:
        """Log values of a step."""
        import time

        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self.client.log_batch(self.run_id, [Metric(key, value, now, step) for key, value in values.items()])
