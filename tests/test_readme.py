"""The commands in the documents compose, linked files exist, and errors are quoted word for word."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from metarun.cli import main
from metarun.cli.overrides import arrange, separated
from metarun.config.check import check
from metarun.config.paths import CONF
from metarun.config.schema import register_frames

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [path.read_text("utf-8") for path in PAGES]
BASH = re.compile(r"```bash\n(.*?)```", re.DOTALL)


FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
#: What else a bash block may start; the tests of this repository and its benchmarks run these.
TOOLS = ("python3 -m venv", "pip install", "pytest", "ruff", "mypy", "python -m benchmarks", ". .venv")
TOOLS += ("torchrun",)  # of PyTorch; tests/commands/test_ranks.py runs it
TOOLS += ("ray start",)  # of Ray
TOOLS += ("export CUDA_MPS_", "mkdir -p /tmp/mps", "nvidia-cuda-mps-control")  # of CUDA
EXAMPLES = [main.HELP, *(path.read_text("utf-8") for path in sorted(CONF.glob("*.yaml")))]


def lines_of(block: str) -> list[str]:
    """The commands of a bash block; a backslash at the end of a line continues it."""
    lines = block.replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if part and not part.startswith("#")]


def commands() -> list[list[str]]:
    """Every `metarun ...` in bash blocks, after a prompt, in the text, and in the examples of the help."""
    found = []
    for document in DOCUMENTS:
        found += [line for text in BASH.findall(document) for line in lines_of(text)]
        found += re.findall(r"^\$ (metarun (?:eval|adapt) .*)$", document, re.MULTILINE)
        text = FENCE.sub("", document)
        found += [" ".join(code.split()) for code in re.findall(r"`(metarun \w+ [^`]*[^=`])`", text)]
    for text in EXAMPLES:
        found += [line.partition("  ")[0] for line in re.findall(r"^ +(metarun \w+ .*)$", text, re.MULTILINE)]
    found = [re.sub(r"^torchrun .*? -m (?=metarun )", "", line) for line in found]
    typed = {line: shlex.split(line, comments=True)[1:] for line in found if line.startswith("metarun ")}
    # Not templates, and not what tests/commands/test_own_parts.py runs.
    kept = (
        line
        for line in typed
        if not re.search(
            r"NAME|-cd|\.\.\.|\[\w+=|^metarun (eval|adapt|predict|export)(?!.*(checkpoint|adapted)=)", line
        )
    )
    return [typed[line] for line in kept]


def test_every_block_is_run_by_a_test():
    for page, document in zip(PAGES, DOCUMENTS, strict=True):
        for language, block in FENCE.findall(document):
            if language == "python" and page.name in ("README.md", "python_api.md"):
                continue  # tests/commands/test_programs.py
            if language in ("python", "yaml"):
                # tests/commands/test_own_parts.py and test_pretrained_weights.py
                assert page.name in ("adding_an_algorithm.md", "feature_based.md")
            elif language == "bash":
                assert all(line.startswith(("metarun ", *TOOLS)) for line in lines_of(block)), block
            else:
                assert not language, f"{page.name} has a block of {language}, which no test runs"


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_of_the_documents_composes(words: list[str]):
    command, *rest = words
    flags, overrides = separated(command, arrange(command, rest))
    register_frames()
    # A sweep's lists are Hydra's to split; the first choice of each stands for it here.
    sweep = "-m" in flags
    # Plugins may not be installed, and their ranges are no values.
    known = [word for word in overrides if not re.match(r"\+?hydra[/.](launcher|sweeper)|.*=\w+\(", word)]
    first = [word.split(",")[0] if sweep and "[" not in word else word for word in known]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(command, first)
    check(cfg, command, typed=first)


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
