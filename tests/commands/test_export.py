"""`metarun predict` and `metarun export`: an adapted model, later and elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import exit_status
from helpers.methods import METHODS
from helpers.own_images import folders, of_file
from helpers.runs import LEARNED, TINY, UNTESTED

import metarun as api
from metarun.errors import ConfigError
from metarun.inference.network import Classifier, check_same, traced

pytestmark = pytest.mark.xdist_group("learned")  # one process trains for all


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with out/ of `metarun adapt` and query/, without the support."""
    run, folder = trained(*LEARNED), tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        folders()
        words = [f"checkpoint={run}", "support=support", "query=query", "hydra.run.dir=out", "hardware=cpu"]
        assert exit_status(["adapt", *words], draws=False) == 0
        shutil.rmtree("support")
    return folder


@pytest.fixture
def adapted(metarun, made: Path) -> list[Path]:
    """out/ and query/ in the current folder; the queries."""
    for name in ("out", "query"):
        Path(name).symlink_to(made / name)
    return sorted(Path("query").glob("*/*.png"))


def test_predict_is_what_adapt_predicted(metarun, adapted):
    done = metarun("predict", "adapted=out", "query=query", "hydra.run.dir=again", "hardware=cpu")
    assert Path("again/predictions.csv").read_text() == Path("out/predictions.csv").read_text()
    assert "12 queries" in done.stdout
    expected = of_file(Path("out/predictions.csv")).max(1)
    level = float(np.sort(expected)[5]) + 1e-9
    words = ["adapted=out/adapted.pt", "query=query", f"reject={level}", "hydra.run.dir=some"]
    done = metarun("predict", *words, "hardware=cpu")
    assert "12 queries, 6 rejected" in done.stdout and "(none of them)" in done.stdout
    rows = Path("some/predictions.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1] == "" for row in rows] == (expected < level).tolist()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["adapted=lost.pt", "query=query"], "adapted=lost.pt: no such checkpoint; name an output folder of"),
        (["adapted=query", "query=query"], "this folder has no adapted.pt"),
        (["adapted=RUN/best.pt", "query=query"], "this is a checkpoint of a training run; name an adapted"),
        (["adapted=cut.pt", "query=query"], "cut.pt: damaged, or not a metarun checkpoint; adapt again"),
        (["adapted=out"], "query is not set; add query=VALUE"),
        (["adapted=out", "query=lost"], "lost: no such folder"),
        (["adapted=out", "query=out/steps.json"], "steps.json"),
        (["adapted=out", "query=query", "reject=2"], "reject=2.0: must be a probability"),
        (["adapted=out", "query=query", "reject=high"], "reject=high: must be a number"),
        (["adapted=out", "query=query", "ink=blue"], "ink=blue: must be auto, dark or light"),
        (["adapted=out", "query=query", "dataset.encoder=x"], "dataset: the model does not take texts"),
        (["checkpoint=out", "query=query"], "is called adapted in metarun predict; type adapted=out"),
    ],
)
def test_mistakes_in_predict(metarun, adapted, trained, words: list[str], message: str):
    Path("RUN").symlink_to(trained(*LEARNED))
    Path("cut.pt").write_bytes(Path("out/adapted.pt").read_bytes()[:5000])
    assert message in metarun("predict", *words, status=1).stderr.splitlines()[-1]


def test_a_task_of_a_dataset_has_no_queries_of_a_user(metarun, trained):
    metarun("adapt", f"checkpoint={trained(*UNTESTED)}", "hydra.run.dir=out", "hardware=cpu")
    assert "not to images of yours" in metarun("predict", "adapted=out", "query=out", status=1).stderr


def test_onnx_gives_the_probabilities_of_pytorch_for_any_number_of_images(metarun, adapted):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: metarun[export]")
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: metarun[export]")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed: metarun[export]")
    metarun("export", "adapted=out", "hydra.run.dir=exported")
    model = api.load_adapted("out", device="cpu")
    images = list(np.random.default_rng(0).integers(0, 256, (100, 40, 30), np.uint8))
    expected = model.predict(images).probabilities
    x = model.inputs(images)
    session = onnxruntime.InferenceSession("exported/model.onnx", providers=["CPUExecutionProvider"])
    for count in (100, 1, 7):
        (found,) = session.run(None, {"x": x[:count]})
        assert np.abs(found - expected[:count]).max() < 1e-4
    facts = json.loads(Path("exported/model.json").read_text())
    assert facts["classes"] == ["a", "b", "c"] and facts["input"]["shape"] == ["batch", 1, 28, 28]
    kept = {entry.key: entry.value for entry in onnx.load("exported/model.onnx").metadata_props}
    assert json.loads(kept["classes"]) == ["a", "b", "c"] and json.loads(kept["metarun"]) == facts


@pytest.mark.long
def test_a_program_of_pytorch(metarun, adapted, trained):
    metarun("export", "adapted=out", "format=torch_export", "hydra.run.dir=exported")
    model = api.load_adapted("out", device="cpu")
    program = torch.export.load("exported/model.pt2").module()
    found = program(torch.from_numpy(model.inputs(adapted)))
    np.testing.assert_allclose(found.numpy(), model.predict(adapted).probabilities, atol=1e-5)
    metarun("export", f"checkpoint={trained(*LEARNED)}", "format=torch_export", "hydra.run.dir=features")
    x = torch.rand(4, 1, 28, 28)
    expected = model.model.algorithm.backbone(x)
    found = torch.export.load("features/model.pt2").module()(x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_weights_as_safetensors(metarun, adapted):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    metarun("export", "adapted=out", "format=safetensors", "hydra.run.dir=exported")
    found = safetensors.load_file("exported/model.safetensors")
    model = api.load_adapted("out", device="cpu")
    torch.testing.assert_close(found["adapted"], model.state)
    for name, tensor in model.model.algorithm.state_dict().items():
        torch.testing.assert_close(found[f"algorithm.{name}"], tensor)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "export: set either adapted=FILE or checkpoint=RUN"),
        (["adapted=a", "checkpoint=b"], "export: set either adapted=FILE or checkpoint=RUN"),
        (["adapted=a", "format=onxx"], "format=onxx: must be one of onnx, torch_export, safetensors"),
        (["checkpoint=lost"], "checkpoint=lost: no such checkpoint"),
    ],
)
def test_mistakes_in_export(metarun, words: list[str], message: str):
    assert message in metarun("export", *words, status=1).stderr.splitlines()[-1]


def test_a_backbone_with_batch_statistics_has_no_features_of_an_example_alone(metarun, trained):
    run = trained("algorithm=maml", "ways=3", *UNTESTED)
    error = metarun("export", f"checkpoint={run}", status=1).stderr.splitlines()[-1]
    assert "normalises an example by the others of its batch" in error and "export adapted=FILE" in error


#: Methods that are not one network for batches of any size.
REFUSED = ("versa", "meta_networks")


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in METHODS if name != "leo"])  # which needs `init=`
def test_every_method_is_one_network_or_says_why_not(trained, name: str):
    run = trained(f"algorithm={name}", *TINY, "ways=3", "iterations=1", "test.episodes=0")
    model = api.load(run, device="cpu")
    random = np.random.default_rng(0)
    adapted = model.adapt(list(random.random((9, *model.spec.item_shape))), [0, 0, 0, 1, 1, 1, 2, 2, 2])
    x = torch.from_numpy(random.random((5, *model.spec.item_shape), np.float32))
    expected = adapted.outputs(x.unsqueeze(0))[0].softmax(-1)
    try:
        program = traced(Classifier(adapted), x[:3], name).module()
    except ConfigError as error:
        assert name in REFUSED and "cannot be exported" in str(error)
        return
    for count in (1, 5):
        check_same(program(x[:count]), expected[:count], name)


@pytest.mark.parametrize(
    "words",
    [
        ["algorithm=maml"],
        ["algorithm=protonet", "norm=task", "iterations=1", "normalise=train"],
        pytest.param(["algorithm=maml_plus_plus"], marks=pytest.mark.long),
    ],
)
def test_batch_statistics_are_those_of_each_query_beside_the_support(
    trained, tmp_path: Path, words: list[str]
):
    """In the adapted model, its file, and the exported network."""
    run = trained(*words[:1], "ways=3", *UNTESTED, *words[1:])
    random = np.random.default_rng(0)
    model = api.load(run, device="cpu")
    if "normalise=train" in words:  # a checkpoint has the numbers of its training images
        assert 0 < model.algorithm.own_backbone()[0].mean < model.algorithm.own_backbone()[0].deviation < 1
    adapted = model.adapt(list(random.random((6, 16, 16))), [0, 0, 1, 1, 2, 2])
    x = torch.from_numpy(random.random((5, 1, 16, 16), np.float32))
    expected = adapted.outputs(x.unsqueeze(0))[0].softmax(-1)
    adapted.save(tmp_path / "adapted.pt")
    again = api.load_adapted(tmp_path / "adapted.pt", device="cpu")
    torch.testing.assert_close(again.outputs(x.unsqueeze(0))[0].softmax(-1), expected)
    check_same(traced(Classifier(again), x[:3], "it").module()(x), expected, "it")
