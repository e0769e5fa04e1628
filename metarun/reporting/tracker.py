"""Logs the metrics of a run to a JSON Lines file, to TensorBoard, and to other destinations."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from metarun.reporting.console import inform
from metarun.reporting.destinations import Background, Destination, Row, RunFacts, figures, flat, results
from metarun.storage.files import write_text


class Tracker:
    """Appends rows to metrics.jsonl and, optionally, to TensorBoard.

    When a run is resumed, rows after the checkpoint are removed: these iterations run again, so that the
    file has neither gaps nor duplicates.

    Args:
        folder: the run folder.
        resumed_at: the iteration of the checkpoint; 0 for a new run.
        tensorboard: whether to write TensorBoard files.
        unlogged: the splits whose row of the iteration of the checkpoint is still to be logged.
        others: get the rows that are logged from now on.

    Attributes:
        rows: all rows so far.
    """

    def __init__(
        self,
        folder: Path,
        resumed_at: int = 0,
        tensorboard: bool = True,
        unlogged: Collection[str] = (),
        others: Sequence[Background] = (),
    ) -> None:
        self.path, self.tensorboard, self.others = folder / "metrics.jsonl", tensorboard, others
        rows = [(row, row["iteration"] + (row["split"] in unlogged)) for row in read_rows(self.path)]
        self.rows = [row for row, needed in rows if needed <= resumed_at]
        self.open(resumed_at + 1)

    def open(self, first: int) -> None:
        """Write all rows, and open the files; in TensorBoard, rows from iteration `first` on are replaced."""
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in self.rows))
        self.file = self.path.open("a")
        self.events = Events(self.path.parent / "tensorboard", first) if self.tensorboard else None

    def log(self, row: Row) -> None:
        """Write one row.

        Args:
            row: `iteration`, `split`, and values; float values go to TensorBoard.
        """
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.events:
            self.events.log(row)
        for each in self.others:
            each.log(row)

    def end(self, config: Mapping[str, Any], result: Mapping[str, Any], picture: Path) -> None:
        """Pass on what a finished run has: its settings with its result, and the picture of its curve."""
        if self.events:
            self.events.end(config, result, picture)
        for each in self.others:
            each.finish(result)

    def sync(self) -> None:
        """Flush the rows to disk; call it before saving a checkpoint, which relies on them.

        If the run folder was deleted, all rows are written again.
        """
        if not self.path.exists():
            inform(f"{self.path}: was deleted; the run goes on and writes its results again")
            self.close()
            self.open(0)
            for row in self.rows if self.events else []:
                self.events.log(row)  # type: ignore[union-attr]
        os.fsync(self.file.fileno())

    def close(self) -> None:
        """Close the files and the other destinations."""
        self.file.close()
        if self.events:
            self.events.close()

    def leave(self) -> None:
        """Close everything, for good."""
        self.close()
        for each in self.others:
            each.close()


class Unwritten(Tracker):
    """Keeps rows in memory only, for a process that leaves writing them to another one.

    Args:
        folder: the run folder.
        rows: all rows so far.
    """

    def __init__(self, folder: Path, rows: list[Row]) -> None:
        self.path, self.rows = folder / "metrics.jsonl", rows

    def log(self, row: Row) -> None:
        self.rows.append(row)

    def end(self, config: Mapping[str, Any], result: Mapping[str, Any], picture: Path) -> None: ...

    def sync(self) -> None: ...

    def leave(self) -> None: ...


class Events(Destination):
    """A file for TensorBoard: scalars, and at the end the settings and the picture of the learning curve.

    PyTorch's SummaryWriter writes in a thread of its own, where a full disk ends with a traceback. Here, the
    run goes on without these files.

    Args:
        folder: where the file is created.
        first: TensorBoard ignores what earlier files have from this iteration on.
    """

    def __init__(self, folder: Path, first: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # slow to import
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.event, self.summary, self.folder = event_pb2.Event, summary_pb2.Summary, folder
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{uuid.uuid4().hex}"
        self.writer = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.writer = RecordWriter((folder / name).open("wb"))
        except OSError as error:
            self.give_up(error)
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        for content in ({"file_version": "brain.Event:2"}, {"session_log": start}):
            self.write(step=first, **content)

    def start(self, run: RunFacts) -> None:
        """Nothing: the file is open."""

    def log(self, row: Row) -> None:
        """Write the float values of a row."""
        values = [self.summary.Value(tag=tag, simple_value=value) for tag, value in figures(row).items()]
        self.write(step=row["iteration"], summary=self.summary(value=values))

    def end(self, config: Mapping[str, Any], result: Mapping[str, Any], picture: Path) -> None:
        """Write the settings as hyper-parameters and as text, the result, and a picture.

        Args:
            config: all settings, as plain containers.
            result: the content of result.json.
            picture: a PNG file.
        """
        from tensorboard.plugins.hparams import summary_v2 as hparams
        from tensorboard.plugins.text import metadata as text

        if self.writer is None:
            return
        step = result.get("iterations", 0)
        settings = dict(flat(config))
        plain = {
            key: each if isinstance(each, (bool, int, float)) else str(each) for key, each in settings.items()
        }
        table = "\n".join(
            ["| setting | value |", "| --- | --- |", *(f"| {k} | {v} |" for k, v in plain.items())]
        )
        tensor = make_tensor_proto(table)
        values = [
            *(self.summary.Value(tag=tag, simple_value=mean) for tag, mean in results(result).items()),
            self.summary.Value(tag="config", tensor=tensor, metadata=text.create_summary_metadata("", "")),
        ]
        with contextlib.suppress(OSError):  # tests leave pictures out
            content = picture.read_bytes()
            width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
            image = self.summary.Image(encoded_image_string=content, width=width, height=height, colorspace=4)
            values.append(self.summary.Value(tag="learning curve", image=image))
        for summary in (hparams.hparams_pb(plain), self.summary(value=values)):
            self.write(step=step, summary=summary)

    def write(self, **content: Any) -> None:
        """Write an event, if the file could be written so far."""
        if self.writer is None:
            return
        try:
            self.writer.write(self.event(wall_time=time.time(), **content).SerializeToString())
            self.writer.flush()
        except OSError as error:
            self.give_up(error)

    def give_up(self, error: OSError) -> None:
        """Report that the file cannot be written."""
        inform(
            f"{self.folder}: cannot be written ({error.strerror}); the run goes on without TensorBoard files"
        )
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self.writer is not None:
            with contextlib.suppress(OSError):  # the end of a file on a full disk
                self.writer.close()
            self.writer = None


def make_tensor_proto(text: str) -> Any:
    """A text as TensorBoard's tensor."""
    from tensorboard.compat.proto import tensor_pb2, tensor_shape_pb2, types_pb2

    shape = tensor_shape_pb2.TensorShapeProto()
    return tensor_pb2.TensorProto(dtype=types_pb2.DT_STRING, string_val=[text.encode()], tensor_shape=shape)


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl; an incomplete last line, left by a killed process, is ignored."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
