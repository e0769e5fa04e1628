"""The command line itself: help, usage, and every error in one line."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers.runs import TINY, UNTESTED, some_quick

import metarun as package
from metarun.training.checkpoint import FORMAT


def typed(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "metarun", *words],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_teaches(tmp_path: Path):
    done = typed("--help", cwd=tmp_path)
    assert done.returncode == 0
    for command in ("metarun train", "metarun eval", "metarun adapt"):
        assert command in done.stdout


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["train", "wayz=3"], ["train", "--cfg", "job"]]
)
def test_help_and_mistyped_keys_do_not_wait_for_torch(tmp_path: Path, words: list[str]):
    code = f"""
import sys
from metarun.cli.main import main
try:
    main({words!r})
except SystemExit:
    pass
sys.exit(3 if "torch" in sys.modules else 0)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True).returncode == 0


@pytest.mark.parametrize("command", ["train", "eval", "adapt"])
def test_every_command_has_help_with_examples(tmp_path: Path, command: str):
    done = typed(command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert "Examples:" in done.stdout


def test_the_console_script_and_the_module_are_the_same(tmp_path: Path):
    script = Path(sys.executable).with_name("metarun")
    if not script.exists():
        pytest.skip("the console script is not beside this Python")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == f"metarun {package.__version__}\n" == typed("--version", cwd=tmp_path).stdout


@pytest.mark.quick
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "metarun train"),
        (["trian"], "did you mean 'train'?"),
        (["train", "ways"], "'ways' is neither a setting"),
        (["train", "--wys"], "--wys is not a flag"),
    ],
)
def test_bad_usage_exits_with_2(tmp_path: Path, words: list[str], message: str):
    done = typed(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


BAD_VALUES = {
    "algorithm=protonett": "algorithm=protonett: no such algorithm; did you mean 'protonet'?",
    "wayz=3": "wayz: there is no such setting; did you mean 'ways'?",
    "validation.evry=3": "did you mean 'every'?",
    "backbone.widht=3": "did you mean 'width'?",
    "+backbone.widht=3": "backbone.widht: backbone=conv4 has no setting 'widht'; did you mean 'width'?",
    "ways=five": "ways=five: must be a whole number",
    "ways=0": "ways=0: must be a whole number of at least 1",
    "checkpoint=foo": "checkpoint=foo: is a group of settings; set one of them, as in checkpoint.every=VALUE",
    "log.tensorboard=maybe": "log.tensorboard=maybe: must be true or false",
    "metrics=ece": "metrics=ece: must be a list, as in metrics=[ece]",
    "init=nowhere": "init=nowhere: no such checkpoint",
    "iterations=-1": "iterations=-1: must be a whole number of at least 0",
    "backbone.width=1.5": "backbone.width=1.5: must be a whole number",
    "backbone.downsample=average": "must be one of max_pool, stride",
    "backbone=null": "a group needs one of its options",
    "ways=41": "ways=41: glyphs train has 40 classes; lower ways to at most 40",
    "shots=10 queries=11": "need 21 examples a class",
    "validation.ways=11": "glyphs validation has 10 classes",
    "dataset.train_classes=0": "choose a whole number of at least 1",
    "dataset=sinusoid backbone=conv4": "backbone=conv4 takes images",
    "dataset=sinusoid algorithm=protonet": "needs tasks with classes",
    "dataset=sinusoid algorithm=maml ways=2": "a regression task has one way",
    "hardware.threads=100000": "hardware.threads=100000: must be from 1 to",
    "optimizer._target_=os.system": "import failed",
    "hydra.run.dir=dangling": "dangling: is a link that leads nowhere",
    "hardware=gpu": "finds no GPU on this machine",
    "hardware.device=tpuu": "not a device",
    "hardware.tasks_at_once=0": "must be at least 1",
    "hardware.precision=tf32": "needs a GPU",
    "algorithm=maml norm=running": "norm=running keeps averages over tasks",
    "algorithm=maml inner_loop.order=3": "order=3: must be 1 (first order) or 2 (second order)",
    "algorithm=maml inner_loop.steps=-1": "error: inner_loop.steps=-1: must be at least 0",
    "optimizer._target_=torch.optim.Addam": "import failed",
    "optimizer.lr=fast": "optimizer.lr=fast",
    "dataset=omniglot dataset.root=nowhere": "nowhere",
    "resume=nowhere": "resume=nowhere: no such checkpoint",
    "hydra.run.dir=file/inside": "file",
    "test.episodes=-5": "test.episodes=-5: must be a whole number of at least 0",
    "validation.episodes=1": "must be a whole number of at least 2",
    "optimizer=null": "set optimizer._target_",
    "optimizer.lr=-1": "optimizer.lr=-1: Invalid learning rate",
    "hardware.device=mps": "not supported; choose auto, cpu or cuda",
    "seed=99999999999999999999999": "seed=99999999999999999999999",
    "norm=foo": "norm=foo: must be one of batch",
    "queries=(3": "queries=(3: not understood; a bracket or a quote is not closed",
    "algorithm=reptile inner_loop=meta_sgd": "inner_loop=meta_sgd: it has meta-parameters, and Reptile",
    "algorithm=imaml inner_loop=lstm": "the implicit gradient does not pass through its steps; choose",
    "algorithm=pretrain inner_loop=layer_rates": "pretraining takes no inner steps; choose inner_loop=sgd",
    "algorithm=minibatch_prox inner_loop=meta_curvature": "has meta-parameters",
    "algorithm=fomaml inner_loop=lstm": "no setting 'order', which algorithm=fomaml sets; leave",
    "recipe=simpleshot_mini dataset=sinusoid algorithm=maml backbone=mlp": "this dataset has vectors; set "
    "normalise=none, since recipe=simpleshot_mini sets it",
    "backbone=resnet12 backbone.ramp=5 backbone.drop_rate=0": "ramp=5: nothing reads it with "
    "backbone.drop_rate=0; leave it out",
    "algorithm=imaml algorithm.proximal=0": "algorithm.proximal=0: must be above 0",
    "algorithm=imaml algorithm.cg_steps=0": "algorithm.cg_steps=0: must be at least 1",
    "algorithm=cavia algorithm.layer=9": "algorithm.layer=9: choose a weight layer of the backbone, 1 to 4",
    "algorithm=cavia algorithm.context=0": "algorithm.context=0: must be at least 1",
    "algorithm=meta_lstm inner_loop.steps=0": "a learned optimizer needs at least one step",
    "algorithm=maml_plus_plus inner_loop.steps=0": "learned rates need at least one step",
    "algorithm=meta_sgd inner_loop.low=1": "inner_loop.low=1: must not be above inner_loop.high=0.1",
    "algorithm=boil algorithm.head=shared": "gives every way the same output until the head is adapted",
    "algorithm=pretrain +algorithm.classes=10": "algorithm.classes=10: is set by metarun",
    "algorithm=pretrain algorithm.adapts=body": "must be one of all, head",
    "scheduler._target_=torch.optim.lr_scheduler.StepLR": "scheduler is null, so its settings are new",
    "clip.norm=0": "clip.norm=0.0: must be above 0",
    "clip.norm=nan": "clip.norm=nan: must be a finite number",
    "algorithm=maml inner_rate=-1": "inner_rate=-1.0: must be above 0",
    "algorithm=reptile inner_loop.rate=-1": "inner_loop.rate=-1: must be above 0",
    "backbone.width=1000000": "out of memory; lower",
    "dataset.train_classes=2000000000": "dataset.train_classes=2000000000",
    "metrics=[null]": "must not be null",
    "metrics={a:1}": "metrics={a:1}: must be a list, as in metrics=",
    "seed=${nothing}": "seed=${nothing}: Interpolation key 'nothing' not found; check what is between",
    "+inner_loop=sgd": "+inner_loop: this group has an option already; leave the plus out",
    "+metrics.a=1": "+metrics.a=1: ",
    "seed=range(1,3)": "seed=range(1,3): has several values; for a sweep over them add -m",
    "+hydra.run.dirr=x": "+hydra.run.dirr=x: Hydra has no such setting; did you mean 'dir'?",
    "hydra.sweep.dir=x": "hydra.sweep.dir=x: is only read in a sweep",
    "hydra.searchpath=[nowhere]": "hydra.searchpath: nowhere is not a folder of config files",
    "backbone=[conv4]": "backbone=[conv4]: a group has one option, as in backbone=conv4",
    "algorithm=maml.yaml": "a group has one option, as in algorithm=maml",
    "backbone=conv4,mlp": "backbone=conv4,mlp: a group has one option; for a sweep over several add -m",
    "init=my,run": "init=my,run: no such checkpoint",
    "algorithm=maml_plus_plus algorithm.multi_step_loss=-1": "numbers of iterations, 0 or more",
    "ways=5,10": "ways=5,10: takes one value; for a sweep over several add -m",
    "validation.ways=5,6": "validation.ways=5,6: takes one value",
    "metrics=accuracy,ece": "type a list as metrics=[accuracy,ece]",
    "lr=0.1": "lr: there is no such setting; did you mean 'optimizer.lr'?",
    "test.ways=3": "did you mean 'ways' or 'validation.ways'?",
    "steps=5": "steps: is a setting of metarun eval, metarun adapt and metarun online, not of metarun train",
    "ways=abc ways=5": "error: ways=abc: must be a whole number",
    "backbone=mlp backbone.width=8": "backbone.width: backbone=mlp has no setting 'width'",
    "inner_loop.rate=0.1": "inner_loop.rate: no option of inner_loop is chosen, so it has no settings",
    "optimizer.weight_decay=0.1": "needs a plus: +optimizer.weight_decay=VALUE",
    "log.tensorboard=2": "log.tensorboard=2: must be true or false",
    "hydra.verbose=foo": "hydra.verbose=foo: must be true or false",
    "hydra.job.name=": "hydra.job.name= is empty; type a value, or leave it out for the default",
}


@pytest.mark.parametrize("words", some_quick(BAD_VALUES, "wayz=3", "backbone.width=1.5", "norm=foo"))
def test_a_bad_value_is_one_line_and_exit_1_and_leaves_nothing(metarun, tmp_path: Path, words: str):
    if words == "hardware=gpu" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "dangling").symlink_to("nowhere")
    asked = words.split()
    # What is typed replaces the small run's settings, and another group option has other settings.
    replaced = {word.split("=")[0].lstrip("+") for word in asked}
    if "dataset=sinusoid" in asked:
        replaced |= {word.split("=")[0] for word in TINY if word.startswith(("dataset.", "backbone."))}
    if replaced & {"dataset", "backbone"}:
        group = (replaced & {"dataset", "backbone"}).pop()
        replaced |= {word.split("=")[0] for word in TINY if word.startswith(f"{group}.")}
    tiny = [word for word in TINY if word.split("=")[0] not in replaced]
    done = metarun("train", *tiny, *asked, status=1)
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("metarun: error: ")
    assert BAD_VALUES[words] in lines[0]
    assert not list(tmp_path.glob("outputs/*/*"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train ways=2000", "ways=2000: glyphs train has 1000 classes"),
        ("train ways=800", "glyphs validation has 100 classes; lower ways to at most 100, or set validation"),
        (
            "train validation.shots=30",
            "validation.shots=30 and queries=5 need 35 examples a class: each class",
        ),
        (
            "train recipe=maml_plus_plus_omniglot backbone=mlp",
            "which recipe=maml_plus_plus_omniglot sets; leave",
        ),
        (
            "train recipe=r2d2_cifar_fs trainval=true",
            "not trained on; set stop.patience=null or trainval=false",
        ),
        (
            "train algorithm=distribution_calibration algorithm.nearest=1001",
            "nearest=1001: must be from 1 to 1000, the number of training classes",
        ),
        ("train dataset=cifar_fs ways=65", "cifar_fs train has 64 classes"),
        ("train dataset=omniglot ways=4401", "omniglot train has 4400 classes"),
        ("train dataset=mixture dataset.parts={glyphs:1,mnist:1} ways=6", "mnist train has 5 classes"),
        ("data dataset=cub ways=101", "cub train has 100 classes"),
        ("eval checkpoint=RUN dataset=glyphs ways=[401,500]", "ways=401: glyphs test has 400 classes"),
        ("eval checkpoint=RUN dataset=glyphs split=all ways=1501", "glyphs all has 1500 classes"),
        ("adapt checkpoint=RUN dataset=glyphs ways=401", "ways=401: glyphs test has 400 classes"),
    ],
)
def test_tasks_that_the_settings_rule_out_are_refused_before_any_data(
    metarun, trained, monkeypatch, words: str, message: str
):
    words = words.replace("RUN", str(trained(*UNTESTED)))
    monkeypatch.setattr("metarun.datasets.base.Dataset.load", None)  # a call would be an error of its own
    assert message in metarun(*words.split(), status=1).stderr


def test_a_failing_command_removes_only_its_own_folders(metarun, tmp_path: Path):
    def folders() -> set[str]:
        return {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}

    for name in ("run/.hydra", "empty/inner"):
        (tmp_path / name).mkdir(parents=True)
    before = folders()
    few = "ways=1 dataset.train_classes=6 dataset.validation_classes=6"
    for words in (
        "train resume=run",
        "train resume=empty/inner",
        f"train {few} hydra.run.dir=empty/inner",
        f"train {few} hydra.run.dir=empty/inner/new",
        f"train {few} hydra.run.dir=new/inner",
        f"train {few}",
        "eval checkpoint=none hydra.run.dir=empty/inner",
    ):
        metarun(*words.split(), status=1)
        assert {name for name in folders() - before if name != "outputs"} == set(), words
        assert before <= folders(), words


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("ways=x,y", "ways=x: must be a whole number"),
        ("wayz=1,2", "did you mean 'ways'?"),
        ("seed=range(0)", "seed=range(0): no values, so there are no jobs"),
    ],
)
def test_a_sweep_that_cannot_start_leaves_nothing(metarun, tmp_path: Path, word: str, message: str):
    (line,) = metarun("train", "-m", word, status=1).stderr.splitlines()
    assert message in line
    assert {path.name for path in tmp_path.rglob("*")} <= {"outputs"}


def test_eval_and_adapt_do_not_write_into_a_training_run(metarun, trained):
    run = trained(*UNTESTED)
    before = (run / ".hydra" / "config.yaml").read_bytes()
    for command in ("eval", "adapt"):
        done = metarun(command, f"checkpoint={run}", f"hydra.run.dir={run}", status=1)
        assert "has a training run, whose files this would replace" in done.stderr
    assert (run / ".hydra" / "config.yaml").read_bytes() == before


def flipped(content: bytes) -> bytes:
    """One bit in the middle of the largest weights changed; PyTorch itself would not notice."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        with archive.open(largest) as member:
            data = member.read()
    place = content.index(data) + len(data) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def damaged(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_checkpoints_that_cannot_be_used(metarun, trained, tmp_path: Path):
    run = trained(*UNTESTED)
    good = (run / "best.pt").read_bytes()
    content = torch.load(run / "best.pt", weights_only=True)
    torch.save(content | {"format": 99, "metarun": "9.0"}, tmp_path / "future.pt")
    torch.save({"model": torch.zeros(1)}, tmp_path / "foreign.pt")
    torch.save(content | {"algorithm": {}}, tmp_path / "misfit.pt")
    torch.save({"format": FORMAT}, tmp_path / "hollow.pt")
    torch.save(content | {"config": None}, tmp_path / "empty_config.pt")
    torch.save({key: content[key] for key in content if key != "optimizer"}, tmp_path / "no_optimizer.pt")
    (tmp_path / "folder").mkdir()
    cases = {
        "missing.pt": "no such checkpoint",
        str(damaged(tmp_path / "empty.pt", b"")): "damaged",
        str(damaged(tmp_path / "cut.pt", good[: len(good) // 2])): "damaged",
        str(damaged(tmp_path / "text.pt", b"hello world")): "damaged",
        "future.pt": "written by metarun 9.0 in checkpoint format 99",
        "foreign.pt": "not a metarun checkpoint",
        "misfit.pt": "its weights do not fit its config",
        "hollow.pt": "it has no usable entry",
        "empty_config.pt": "it has no usable entry 'config'",
        "no_optimizer.pt": "it has no usable entry 'optimizer'",
        "n" * 300: "the name is too long",
        str(damaged(tmp_path / "flipped.pt", flipped(good))): "damaged",
        str(damaged(tmp_path / "byte.pt", b"\x80")): "damaged",
        "folder": "has no best.pt or last.pt",
    }
    for reference, message in cases.items():
        done = metarun("eval", f"checkpoint={reference}", "hydra.run.dir=out", status=1)
        assert message in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert not (tmp_path / "out").exists()


def test_home_is_understood_in_paths(metarun, trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(trained(*UNTESTED), tmp_path / "run, (x=1) [2]")
    metarun("eval", "checkpoint=~/run, (x=1) [2]", "episodes=5", "queries=2")
    done = metarun("eval", "checkpoint=", status=1)
    assert "checkpoint= is empty" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ways=[]"], "ways=[]: must name at least one number"),
        (["ways=5,20"], "type a list as ways=[5,20]; for a sweep over the values add -m"),
        (["ways=500"], "has 20 classes"),
        (["split=tests"], "must be one of train, validation, test"),
        (["episodes=1"], "at least 2"),
        (["dataset=null"], "dataset=null: a group needs one of its options"),
        (["dataset=true", "seed=1"], "error: dataset=true: a group needs one of its options"),
        (["+foo=1"], "foo: there is no such setting"),
    ],
)
def test_mistakes_of_eval(metarun, trained, words: list[str], message: str):
    done = metarun("eval", f"checkpoint={trained(*UNTESTED)}", *words, status=1)
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_yaml_that_cannot_be_read_is_named(metarun, tmp_path: Path):
    (tmp_path / "conf/backbone").mkdir(parents=True)
    (tmp_path / "conf/backbone/own.yaml").write_text("_target_: [\n")
    done = metarun("train", "-cd", "conf", "backbone=own", status=1)
    assert "own.yaml" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_resumed_run_keeps_its_settings(metarun, trained, tmp_path: Path):
    shutil.copytree(trained(*UNTESTED), tmp_path / "run")
    before = (tmp_path / "run/last.pt").read_bytes()
    done = metarun("train", "resume=run", "ways=3", status=1)
    assert "ways=3: a resumed run keeps its settings" in done.stderr
    done = metarun("train", "resume=run", "hydra.run.dir=other", status=1)
    assert "hydra.run.dir=other: a resumed run stays in its folder" in done.stderr
    assert (tmp_path / "run/last.pt").read_bytes() == before


@pytest.mark.parametrize("full", ["best.pt", "metrics.jsonl"])
def test_a_full_disk_is_reported_in_one_line_and_nothing_is_half_written(
    metarun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
):
    """The system's own error for a full disk, at the moment a file is made safe."""
    import errno

    real = os.fsync

    def fsync(number: int) -> None:
        name = os.readlink(f"/proc/self/fd/{number}") if sys.platform == "linux" else ""
        if full in name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    done = metarun("train", *TINY, "hydra.run.dir=run", status=1)
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run/best.pt").exists()
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_paths_with_spaces_and_brackets_need_no_quotes(metarun, tmp_path: Path):
    metarun("train", *UNTESTED, "hydra.run.dir='my run (1)'")
    metarun("eval", "checkpoint=my run (1)", "episodes=5", "queries=2")
    metarun("train", "resume=my run (1)", "iterations=14")


COMPLETED = {
    "metarun ": "train eval adapt predict export runs report data online",
    "metarun ev": "eval",
    "metarun train algorithm=fo": "algorithm=fomaml",
    "metarun train pa": "",  # conf/pairing is not for users
    "metarun eval checkpoint=": "checkpoint=outputs/",
    "metarun eval checkpoint=outputs/": "checkpoint=outputs/a/ checkpoint=outputs/b.pt",
    "metarun eval checkpoint=[outputs/b.pt,outputs/a": "checkpoint=[outputs/b.pt,outputs/a/",
    "metarun train init=outputs/b": "init=outputs/b.pt",
    "metarun train resume=outputs/a": "resume=outputs/a/",
    "metarun adapt support=outputs/n": "support=outputs/notes.txt",
    "metarun train hydra.run.dir=o": "hydra.run.dir=outputs/",
}


@pytest.mark.parametrize("line", COMPLETED)
def test_completion_offers_commands_options_and_paths(
    metarun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
):
    (tmp_path / "outputs" / "a").mkdir(parents=True)
    for name in ("b.pt", "notes.txt", ".hidden", "with space.pt"):
        (tmp_path / "outputs" / name).touch()
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    assert metarun("-sc", "query=bash").stdout.split() == COMPLETED[line].split()
