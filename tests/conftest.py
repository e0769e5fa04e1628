"""Shared by all tests: few threads, a cache of their own, the command line, trained runs."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import hydra._internal.defaults_list
import omegaconf
import pytest
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins

from metarun.cli.main import main
from metarun.config.paths import CONF

# Before torch is imported: small tensors gain nothing from threads, and test processes share cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

gc.disable()  # until the tests are collected


def pytest_configure(config: pytest.Config) -> None:
    """`-m quick` means `-m 'quick and not gpu and not long'`: a later -m replaces the one in addopts."""
    if config.option.markexpr.strip() == "quick":
        config.option.markexpr = "quick and not gpu and not long"


def pytest_collection_finish() -> None:
    """The garbage collector need not look at the modules again and again: they stay until the end."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """`-m gpu` may be typed on any machine."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no GPU here")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Never the user's cache: one for all tests of a process, and for their fixtures."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METARUN_CACHE", str(cache))
        patch.setenv("METARUN_DATA", str(cache / "data"))
        yield


@pytest.fixture(scope="session", autouse=True)
def configs_are_composed_quickly() -> Iterator[None]:
    """What Hydra reads and parses for a config is most of the time of a command that trains nothing.

    The YAML files of metarun and Hydra, the frames of the commands, each override and each interpolation are
    read once in a process. Files of other folders, which tests write, are read each time.
    """
    Plugins.instance()  # registers the sources
    with pytest.MonkeyPatch.context() as patch:
        for source in map(SourcesRegistry.instance().resolve, ("file", "pkg", "structured")):
            patch.setattr(source, "load_config", reading_once(source.load_config))
        patch.setattr(OverridesParser, "parse_rule", parsing_once(OverridesParser.parse_rule))
        parse = cache(omegaconf.grammar_parser.parse)  # nothing changes the tree that it returns
        for module in (omegaconf.base, omegaconf._utils):
            patch.setattr(module, "parse", parse)
        # The choices for interpolations in defaults lists, of which there are none here.
        patch.setattr(hydra._internal.defaults_list, "_create_interpolation_map", lambda *arguments: None)
        yield


def reading_once(load: Callable[..., object]) -> Callable[..., object]:
    """`load` of one of Hydra's sources of configs, which reads a file of metarun or of Hydra once."""
    results: dict[tuple[str, str, str], bytes] = {}

    def load_config(source, config_path: str) -> object:
        key = (source.provider, source.path, config_path)
        if source.scheme() == "file" and source.path != str(CONF):
            return load(source, config_path)
        if key not in results:
            results[key] = pickle.dumps(load(source, config_path))
        return pickle.loads(results[key])  # a copy, in a fraction of the time of `deepcopy`

    return load_config


def parsing_once(parse: Callable[..., object]) -> Callable[..., object]:
    """`parse` of Hydra's grammar of overrides, which parses a text once; each caller gets a copy."""
    results: dict[tuple[str, str], object] = {}

    def parse_rule(parser, text: str, rule: str) -> object:
        if (text, rule) not in results:
            results[text, rule] = parse(parser, text, rule)
        return copy.deepcopy(results[text, rule])

    return parse_rule


@pytest.fixture(autouse=True)
def raw_errors_are_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """`cli` sets this variable for Hydra, and a command run inside this process leaves it set."""
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)


@pytest.fixture
def float64() -> Iterator[None]:
    """Numbers of double precision, and the same random ones each time."""
    import torch

    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@dataclass
class Done:
    """What a finished command left behind."""

    stdout: str
    stderr: str


Metarun = Callable[..., Done]


def exit_status(words: list[str], draws: bool) -> int:
    """Run `metarun WORDS` in this process and in the current folder, and return its exit status.

    Args:
        words: The command and its overrides.
        draws: Whether figures are drawn and written. A figure takes longer to draw than a small
            network to train.
    """
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sys, "argv", ["metarun"])
        patch.delenv("HYDRA_FULL_ERROR", raising=False)
        # Hydra composes the whole config once more, only to read hydra.mode, which the tests in one process
        # leave unset; that is half of the time of a command which ends in an error.
        patch.setattr("hydra._internal.hydra.Hydra.get_mode", lambda *args, **kwargs: None)
        if not draws:
            patch.setattr("metarun.reporting.drawing.save", leave_undrawn)
        main(words)
    GlobalHydra.instance().clear()
    return int(stopped.value.code or 0)


def leave_undrawn(figure: object, path: Path) -> None:
    """Stands for `drawing.save`: the figure is complete, only its rendering is left out."""
    assert path.parent.is_dir()


@pytest.fixture
def metarun(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Metarun:
    """`metarun(*words)` as a person types it, in an empty folder.

    It calls the console script's own function, since a new process would spend seconds on
    importing torch; test_cli.py runs new processes. Figures are written in tests marked `pictures`.
    """
    monkeypatch.chdir(tmp_path)
    draws = request.node.get_closest_marker("pictures") is not None

    def run(*words: str, status: int = 0) -> Done:
        capsys.readouterr()
        code = exit_status(list(words), draws)
        done = Done(*capsys.readouterr())
        assert code == status, f"exit {code}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`trained(*words)` is the folder of a run of `metarun train WORDS`, made once in a process.

    It is shared by all tests that ask for the same words: read it, or change a copy of it.
    """
    made: dict[tuple[str, ...], Path] = {}

    def run(*words: str) -> Path:
        if words not in made:
            folder = tmp_path_factory.mktemp("trained")
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                assert exit_status(["train", *words, "hydra.run.dir=run"], draws=False) == 0, words
            made[words] = folder / "run"
        return made[words]

    return run


@pytest.fixture
def real_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One cache for all tests of real data in a process, which is decoded once."""
    cache = tmp_path_factory.getbasetemp() / "real"
    monkeypatch.setenv("METARUN_CACHE", str(cache))
    return cache


@pytest.fixture(scope="session")
def test_data() -> Path:
    """Real data, where METARUN_TEST_DATA says."""
    if not (folder := os.environ.get("METARUN_TEST_DATA")):
        pytest.skip("METARUN_TEST_DATA is not set: no real data here")
    return Path(folder)
