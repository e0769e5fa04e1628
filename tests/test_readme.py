"""The commands in the documents compose, linked files exist, and errors are quoted word for word."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from metarun.cli.overrides import arrange
from metarun.config.check import check
from metarun.config.paths import CONF
from metarun.config.schema import register_frames

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [path.read_text("utf-8") for path in PAGES]
BASH = re.compile(r"```bash\n(.*?)```", re.DOTALL)


def commands() -> list[list[str]]:
    """Every `metarun ...` in a bash block; a backslash at the end of a line continues it."""
    blocks = "\n".join(text for document in DOCUMENTS for text in BASH.findall(document))
    lines = blocks.replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split("&&")]
    typed = [shlex.split(part, comments=True)[1:] for part in parts if part.startswith("metarun ")]
    return [words for words in typed if "-cd" not in words]  # tests/commands/test_own_parts.py runs those


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_of_the_documents_composes(words: list[str]):
    command, *rest = words
    overrides = [word for word in arrange(command, rest) if not word.startswith("-")]
    register_frames()
    # A sweep's lists are Hydra's to split; the first choice of each stands for it here.
    first = [word if "[" in word or "{" in word else word.split(",")[0] for word in overrides]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        check(compose(command, first), command, typed=first)


LINKS = {
    page.parent / name for page in PAGES for name in re.findall(r"\]\(([^):#]+)\)", page.read_text("utf-8"))
}


@pytest.mark.parametrize("path", sorted(LINKS), ids=lambda path: path.name)
def test_linked_files_exist(path: Path):
    assert path.stat().st_size > 500


@pytest.mark.parametrize(
    ("line", "error"), re.findall(r"^\$ metarun (.*)\n(metarun: error: .*)$", README, re.MULTILINE)
)
def test_the_readmes_errors_are_word_for_word(metarun, line: str, error: str):
    assert metarun(*shlex.split(line), status=1).stderr.splitlines()[-1] == error


def test_documents_name_modules_and_tests_that_exist():
    for text in DOCUMENTS:
        for name in re.findall(r"`((?:metarun|conf|tests)/[\w/]+\.\w+)`", text):
            if "nearest" not in name:
                assert (ROOT / name).exists(), name
