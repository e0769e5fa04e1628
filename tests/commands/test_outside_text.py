"""Names from outside are only text, in tables, figures and messages."""

from __future__ import annotations

import csv
import errno
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.images import picture
from helpers.runs import UNTESTED
from rich.progress import Progress
from rich.table import Table

from metarun.cli import explain, streams
from metarun.errors import ConfigError, DataError, message_line, naming_part, printable
from metarun.reporting.classes import LONGEST_STEM, report_classes
from metarun.reporting.console import TextConsole
from metarun.storage.files import blaming, cache_dir, data_dir, user_path

NAMES = [
    "[red]a[bold]",
    "$\\frac{a$",
    ":cat:",
    "a%sb",
    "{0}",
    "${oc.env:HOME}",
    "back\\slash",
    "_a_1$ $",
    "日",
]
CODES = {
    "a\x1b[31mred": "a\\x1b[31mred",
    "two\nlines": "two\\nlines",
    "\x9bx\x07": "\\x9bx\\x07",
    "\u202eab": "\\u202eab",
}


def test_printable_text_has_no_codes():
    for name in NAMES:
        assert printable(name) == message_line(name) == name
    for name, shown in CODES.items():
        assert printable(name) == shown and len(printable(name, "?")) == len(name)
    assert len(message_line("long" * 10**6)) < 5000


def test_names_in_tables_are_text():
    out = io.StringIO()
    console = TextConsole(file=out, width=100, force_terminal=True, color_system=None)
    table = Table(title=NAMES[0])
    table.add_column(NAMES[2])
    for name in [*NAMES, *CODES]:
        table.add_row(name)
    console.print(table)
    with Progress(console=console) as progress:
        progress.add_task("live", total=1)
    printed = out.getvalue()
    for name in NAMES:
        assert name in printed
    assert "\x1b[31m" not in printed and "\x9b" not in printed and "\u202e" not in printed
    assert "\x1b[?25l" in printed  # rich's own codes still work


@pytest.mark.pictures
def test_adapt_takes_any_name(metarun, trained, tmp_path: Path):
    names = [*NAMES, *(name for name in CODES if os.name == "posix")]
    for i, name in enumerate(names):
        for part in ("support", "query"):
            picture(tmp_path / part / name / f"[b]$_{{{name}.png", i)
    shutil.copytree(trained(*UNTESTED), tmp_path / "run")
    words = ["checkpoint=run", "support=support", "query=query", "hydra.run.dir=out"]
    done = metarun("adapt", *words)
    assert "Warning" not in done.stderr
    for name in NAMES:
        assert name in done.stdout
    assert "\x1b" not in done.stdout
    with (tmp_path / "out/predictions.csv").open(newline="") as file:
        assert {row["class"] for row in csv.DictReader(file)} == set(names)


def test_an_error_is_one_line_for_any_name(metarun):
    for name in CODES:
        (line,) = metarun("eval", f"checkpoint=no {name}", status=1).stderr.splitlines()
        assert line.isprintable() and "no such checkpoint" in line


def test_a_part_of_a_mixture_with_any_name():
    with pytest.raises(ConfigError, match=r"dataset\.settings\.a\\1\.root"), naming_part("a\\1", ["root"]):
        raise ConfigError("dataset.root=x")


def test_files_of_a_long_title_have_short_names(tmp_path: Path):
    import torch

    titles = [f"{'é' * 200} {end}" for end in "ab"]
    files = report_classes({title: (torch.eye(2).long(), ["a", "b"]) for title in titles}, tmp_path)
    assert len(set(files)) == len(files) and all(len(name) < LONGEST_STEM + 40 for name in files)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_characters_that_an_encoding_lacks_are_replaced(encoding: str):
    text = "91.5 ± 1.0 … ━ 日 \udcff \N{REPLACEMENT CHARACTER}"
    text = text.encode(encoding, streams.ERRORS).decode(encoding)
    assert text.endswith("\\u65e5 \\udcff ?")
    if encoding == "ascii":
        assert text.startswith("91.5 +- 1.0 ... - ")


def test_a_terminal_without_unicode_and_a_home_that_does_not_exist(trained):
    run = trained(*UNTESTED)
    words = [sys.executable, "-m", "metarun", "eval", f"checkpoint={run}", "episodes=4", "queries=1"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "HOME": str(run.parent / "no" / "home")}
    done = subprocess.run(words, cwd=run.parent, env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert b" +- " in done.stdout and b"Traceback" not in done.stderr


def test_a_home_that_is_not_known(monkeypatch, metarun):
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without an entry
    assert user_path("~/run") == Path("~/run")
    for variable, folder in (("METARUN_CACHE", cache_dir), ("METARUN_DATA", data_dir)):
        monkeypatch.delenv(variable)
        with pytest.raises(DataError, match=f"the home folder is not known; set the variable {variable}"):
            folder()
    assert "no such checkpoint" in metarun("eval", "checkpoint=~nobody-here/run", status=1).stderr


def test_what_cannot_be_read_is_not_said_to_be_unwritable(tmp_path: Path, monkeypatch):
    (tmp_path / "secret").touch()
    denied = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "secret"))
    assert "no permission to write" in str(explain.explain_os(denied))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "no permission to read" in str(explain.explain_os(denied))
    read = pytest.raises(DataError, match=r"secret: cannot be read \(Permission denied\)")
    with read, blaming(tmp_path / "cache", "METARUN_CACHE"):
        raise denied
    with pytest.raises(DataError, match="set the variable METARUN_CACHE"), blaming(tmp_path, "METARUN_CACHE"):
        raise denied
