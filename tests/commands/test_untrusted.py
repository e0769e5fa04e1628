"""Checkpoints from somebody else: nothing in them is run, and what is in them is only data."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.runs import UNTESTED, import_path

from metarun.algorithms.base import Algorithm
from metarun.backbones.conv4 import Conv4
from metarun.config.restore import EVALUATED, config_of, rebuild
from metarun.config.schema import typed
from metarun.errors import CheckpointError, ConfigError
from metarun.training import checkpoint
from metarun.training.hardware import Hardware

Content = dict[str, Any]
PAYLOAD = """
import pathlib
pathlib.Path({trace!r}).write_text(__name__)
from metarun.algorithms.protonet import ProtoNet as Class
"""


@pytest.fixture
def content(trained) -> Content:
    """The content of a checkpoint, to be changed."""
    return torch.load(trained(*UNTESTED) / "last.pt", weights_only=True)


@pytest.fixture
def trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the package `payload`, installed and in the current folder, writes when imported."""
    trace = tmp_path / "trace"
    for folder in (tmp_path / "installed", tmp_path):
        (folder / "payload").mkdir(parents=True)
        for name in ("__init__", "__main__", "inner"):
            (folder / "payload" / f"{name}.py").write_text(PAYLOAD.format(trace=str(trace)))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "installed")])
    for name in [name for name in sys.modules if name.partition(".")[0] == "payload"]:
        monkeypatch.delitem(sys.modules, name)
    return trace


def naming(group: str, target: object) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        content["config"][group] = {**(content["config"][group] or {}), "_target_": target}

    return change


def in_a_mixture(content: Content) -> None:
    settings = {"a": {"_target_": "payload.Class"}}
    content["config"]["dataset"] = {
        "_target_": "metarun.datasets.mixture.Mixture",
        "parts": {"a": 1},
        "settings": settings,
    }


def trusting_itself(content: Content) -> None:
    naming("algorithm", "payload.Class")(content)
    content["config"]["trust"] = ["payload"]


def below_arguments(content: Content) -> None:
    content["config"]["algorithm"]["distance"] = {"_target_": "payload.Class"}


ATTACKS: dict[str, Callable[[Content], None]] = {
    "an algorithm": naming("algorithm", "payload.Class"),
    "a backbone": naming("backbone", "payload.inner.Class"),
    "an inner loop": naming("inner_loop", "payload.Class"),
    "a part of a mixture": in_a_mixture,
    "a program": naming("algorithm", "payload.__main__.Class"),
    "a module without a class": naming("algorithm", "payload"),
    "through metarun": naming("algorithm", "metarun.config.build.inspect.payload.Class"),
    "a class of torch by way of metarun": naming("backbone", "metarun.nn.layers.nn.Identity"),
    "a function": naming("dataset", "pathlib.Path.write_text"),
    "a process": naming("dataset", "subprocess.Popen"),
    "not a name": naming("algorithm", ["payload.Class"]),
    "trusting itself": trusting_itself,
    "below an argument": below_arguments,
}
ONLY_RESUMED: dict[str, Callable[[Content], None]] = {
    "an optimizer": naming("optimizer", "payload.Class"),
    "a scheduler": naming("scheduler", "payload.Class"),
    "hardware": naming("hardware", "payload.Class"),
    "an augmentation": naming("augment", "payload.Class"),
    "training tasks": naming("train_tasks", "payload.Class"),
}


def rebuilt(path: Path, nodes: tuple[str, ...] | None) -> Algorithm:
    """The algorithm of a checkpoint, as the commands rebuild it."""
    loaded = checkpoint.load(path)
    settings = typed(config_of(loaded, path, (), nodes))
    return rebuild(loaded, settings, Hardware("cpu"), path)[0]


def saved(content: Content, path: Path) -> Path:
    path.parent.mkdir(exist_ok=True)
    torch.save(content, path)
    return path


@pytest.mark.parametrize("attack", [*ATTACKS, *ONLY_RESUMED])
def test_a_checkpoint_imports_nothing_but_metarun(content, trace: Path, tmp_path: Path, attack: str):
    {**ATTACKS, **ONLY_RESUMED}[attack](content)
    path = saved(content, tmp_path / "evil.pt")
    for nodes in (EVALUATED, None) if attack in ATTACKS else (None,):
        with pytest.raises(CheckpointError, match=r"evil\.pt: ") as refused:
            rebuilt(path, nodes)
        assert "\n" not in str(refused.value)
        assert not trace.exists()


@pytest.mark.parametrize(
    ("attack", "words"),
    [
        ("an algorithm", "eval checkpoint="),
        ("a part of a mixture", "adapt checkpoint="),
        ("trusting itself", "train resume="),
        ("an optimizer", "train resume="),
        ("a program", "eval trust=[payload] checkpoint="),
    ],
)
def test_no_command_imports_it(metarun, content, trace: Path, attack: str, words: str):
    {**ATTACKS, **ONLY_RESUMED}[attack](content)
    saved(content, Path("run/last.pt"))
    (line,) = metarun(*f"{words}run/last.pt".split(), status=1).stderr.strip().splitlines()
    assert line.startswith("metarun: error: run/last.pt: ")
    assert not trace.exists()


def test_init_reads_only_the_weights_which_must_be_finite(metarun, content, trace: Path, tmp_path: Path):
    for change in (*ATTACKS.values(), *ONLY_RESUMED.values()):
        change(content)
    torch.save(content, tmp_path / "evil.pt")
    metarun("train", *UNTESTED, "init=evil.pt", "iterations=1")
    not_finite(content)
    torch.save(content, tmp_path / "evil.pt")
    done = metarun("train", *UNTESTED, "init=evil.pt", "iterations=1", status=1)
    assert "error: evil.pt: its weight" in done.stderr and "is not finite" in done.stderr
    assert not trace.exists()


def test_a_module_that_the_user_trusts_is_imported(metarun, content, trace: Path, tmp_path: Path):
    ATTACKS["an algorithm"](content)
    torch.save(content, tmp_path / "own.pt")
    words = ["eval", "checkpoint=own.pt", "episodes=2", "queries=1"]
    assert "add trust=[payload]" in metarun(*words, "trust=[pay,payload.other]", status=1).stderr
    assert not trace.exists()
    metarun(*words, "trust=[payload]")
    assert trace.read_text() == "payload"


def test_the_record_of_a_run_is_not_a_folder_of_configs(metarun, trained):
    folder = trained(*UNTESTED) / ".hydra"
    done = metarun("train", "-cd", f"{folder}/", "-cn", "config", status=2)
    assert "is the record of a run; continue the run with resume=RUN" in done.stderr


def test_a_pickle_is_not_executed(metarun, tmp_path: Path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Attack()))
    metarun("eval", "checkpoint=evil.pt", status=1)
    torch.save({"format": Attack()}, tmp_path / "evil.pt")
    metarun("eval", "checkpoint=evil.pt", status=1)
    assert not (tmp_path / "owned").exists()


def test_files_in_the_current_folder_are_not_imported(tmp_path: Path):
    """Neither as a plugin of Hydra, nor in place of a library."""
    (tmp_path / "hydra_plugins").mkdir()
    for name in ("hydra_plugins/evil.py", "yaml.py", "omegaconf.py"):
        (tmp_path / name).write_text(f"open({str(tmp_path / 'trace')!r}, 'a').write(__name__)\n")
    words = [sys.executable, "-m", "metarun", "train", "--cfg", "job"]
    environment = os.environ | {"PYTHONPATH": f"{import_path()}{os.pathsep}"}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert not (tmp_path / "trace").exists()
    assert done.returncode == 0 and "algorithm" in done.stdout


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def itself() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["itself"] = value
    return value


def doubled(times: int) -> list:
    """2 ** times values in a few bytes."""
    value: list = [0]
    for _ in range(times):
        value = [value, value]
    return value


def put(path: str, value: Any) -> Callable[[Content], None]:
    def change(content: Content) -> None:
        *groups, name = path.split(".")
        for group in groups:
            content = content[group]
        content[name] = value

    return change


def repeated(content: Content) -> None:
    """Weights of a petabyte, of which the file has one number."""
    name = next(iter(content["algorithm"]))
    content["algorithm"][name] = torch.zeros(1).expand(1 << 40, 1 << 8)


UNUSABLE = "its config is not usable: "
LARGE = "its config describes a larger network than its weights"


def not_finite(content: Content) -> None:
    next(iter(content["algorithm"].values())).view(-1)[-1] = torch.inf


BAD_VALUES: dict[str, tuple[Callable[[Content], None], str]] = {
    "an unknown setting": (put("config.foo", 1), "its config has an unknown setting 'foo'"),
    "an unknown nested setting": (
        put("config.validation.foo", 1),
        UNUSABLE + "Key 'foo' not in 'Validation'",
    ),
    "an unknown setting of a class": (
        put("config.backbone.foo", 1),
        "backbone=conv4 has no setting 'foo'",
    ),
    "text for a number": (put("config.iterations", "ten"), "could not be converted to Integer (iterations)"),
    "a list for a number": (put("config.ways", [5]), "(ways)"),
    "a number below its bound": (put("config.shots", -1), "shots=-1: must be a whole number of at least 0"),
    "a group that is a number": (put("config.dataset", 5), "dataset"),
    "a group that is missing": (put("config.algorithm", None), "algorithm"),
    "an environment variable": (put("config.norm", "${oc.env:HOME}"), "contains '${oc.env:HOME}'"),
    "a huge network": (put("config.backbone.width", 10**9), "backbone.width=1000000000: is out of range"),
    "a large network": (put("config.backbone.width", 3000), LARGE),
    "an endless number": (put("config.backbone.width", 10**40), "no usable entry 'config'"),
    "Hydra's arguments": (put("config.backbone._args_", [1]), "backbone._args_: there is no such setting"),
    "a config in itself": (put("config.backbone.width", itself()), "no usable entry 'config'"),
    "a deep config": (put("config.backbone.width", nested(200)), "no usable entry 'config'"),
    "a config without end": (put("config.backbone.width", doubled(60)), "no usable entry 'config'"),
    "a tensor in the config": (put("config.ways", torch.ones(1)), "no usable entry 'config'"),
    "no name of an algorithm": (put("choices.algorithm", None), "no usable entry 'choices'"),
    "typed settings that are numbers": (put("overrides", [1]), "no usable entry 'overrides'"),
    "weights that are numbers": (put("algorithm", {"a": 1}), "no usable entry 'algorithm'"),
    "a weight that is not finite": (not_finite, "weight is not finite"),
    "weights that are repeated": (repeated, "no usable entry 'algorithm'"),
    "a shape that is text": (put("description", ["189"]), "no usable entry 'description'"),
    "an iteration that is text": (put("iteration", "12"), "no usable entry 'iteration'"),
}


@pytest.mark.parametrize("kind", BAD_VALUES)
def test_a_bad_value_in_a_checkpoint_is_one_line_with_its_name(content, tmp_path: Path, kind: str):
    change, message = BAD_VALUES[kind]
    change(content)
    with pytest.raises(CheckpointError) as refused:
        rebuilt(saved(content, tmp_path / "bad.pt"), None)
    assert str(refused.value).startswith(f"{tmp_path}/bad.pt: ") and message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_checkpoint_may_be_older_than_a_bound(content, tmp_path: Path):
    put("config.backbone.slope", -1.0)(content)
    rebuilt(saved(content, tmp_path / "older.pt"), None)
    with pytest.raises(ConfigError, match=r"backbone\.slope=-1\.0: must be at least 0"):
        Conv4((1, 16, 16), slope=-1.0)


def test_a_compressed_checkpoint_does_not_fill_the_memory(trained, tmp_path: Path):
    with (
        zipfile.ZipFile(trained(*UNTESTED) / "best.pt") as good,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for member in good.infolist():
            bomb.writestr(member.filename, good.read(member) + bytes(1 << 20))
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(tmp_path / "bomb.pt")


@pytest.mark.parametrize(("key", "value"), [("best", {"a": 1}), ("optimizer", {"a": 1})])
def test_a_state_of_training_that_does_not_fit(metarun, content, key: str, value: Any):
    content[key] = value
    saved(content, Path("run/last.pt"))
    *_, line = metarun("train", "resume=run", "iterations=15", status=1).stderr.strip().splitlines()
    assert line.startswith("metarun: error: run/last.pt: its state does not fit its config")
