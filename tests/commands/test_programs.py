"""Models in programs: `metarun.load`, `FewShotClassifier` and `metarun.train`."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.own_images import drawings, folders, of_file
from helpers.runs import LEARNED, TINY, UNTESTED
from PIL import Image
from sklearn.base import clone
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils.estimator_checks import check_estimator

import metarun as api
from metarun.cli.programs import Run
from metarun.errors import CheckpointError, ConfigError, DataError, MetarunError

pytestmark = pytest.mark.xdist_group("learned")  # one process trains for all
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(trained) -> Path:
    return trained(*LEARNED)


@pytest.fixture(scope="module")
def glyphs() -> tuple[np.ndarray, list[str]]:
    return drawings()


@pytest.mark.parametrize(
    "words", [LEARNED, ["algorithm=maml", "ways=3", *UNTESTED]], ids=["protonet", "maml"]
)
def test_a_program_gets_what_the_command_predicts(metarun, trained, words: list[str]):
    """MAML normalises batches: each query is predicted beside the support, which the file must keep."""
    run = trained(*words)
    support, query = folders()
    metarun(
        "adapt", f"checkpoint={run}", "support=support", "query=query", "hydra.run.dir=out", "hardware=cpu"
    )
    expected = of_file(Path("out/predictions.csv"))
    adapted = api.load(run, device="cpu").adapt(support, [path.parent.name for path in support])
    found = adapted.predict(query)
    np.testing.assert_array_equal(found.probabilities.astype(float), expected)
    assert found.labels == [adapted.classes[i] for i in expected.argmax(1)] and len(found) == 12
    assert found[0].probability == expected[0].max()
    opened = [Image.open(path) for path in query]
    grey = [np.asarray(image) for image in opened]
    same = {
        "PIL": opened,
        "bytes": grey,
        "floats": [image / 255 for image in grey],
        "tensors": [torch.from_numpy(image.copy()).float()[None] / 255 for image in grey],
        "colours": [np.repeat(image[:, :, None], 3, 2) for image in grey],
        "one array": np.stack(grey),
    }
    for how, images in same.items():
        np.testing.assert_array_equal(adapted.predict(images).probabilities, found.probabilities, how)
    for copied in (api.load_adapted("out/adapted.pt", device="cpu"), pickle.loads(pickle.dumps(adapted))):
        np.testing.assert_array_equal(copied.predict(query).probabilities, found.probabilities)


def test_an_example_that_belongs_to_no_class_is_rejected(run: Path, glyphs):
    images, labels = glyphs
    adapted = api.load(run, device="cpu").adapt(images[:12], labels[:12])
    found = adapted.predict(images)
    highest = found.probabilities.max(1)
    level = float(np.sort(highest)[6])
    rejected = [label is None for label in adapted.predict(images, reject=level).labels]
    assert rejected == (highest < np.float32(level)).tolist() and sum(rejected) == 6
    with pytest.raises(ConfigError, match="reject=50: must be a probability"):
        adapted.predict(images, reject=50)


WRONG = {
    "no examples": ([], "there are none"),
    "one path": ("a.png", "is a single str; pass a list"),
    "no such file": (["lost.png"], "lost.png: no such file"),
    "a flat row": ([np.zeros(7)], r"shape \(7,\) is not an image"),
    "floats above 1": ([np.full((4, 4), 2.0)], "values from 2 to 2"),
    "nan": ([np.full((4, 4), np.nan)], "values from nan"),
    "numbers": ([3], "is not an image"),
    "text": ([np.array([["a"]])], "must contain numbers"),
}  # fmt: skip


def test_mistakes_are_one_line(run: Path, glyphs, tmp_path: Path):
    model = api.load(run, device="cpu")
    images, labels = glyphs
    adapted = model.adapt(images, labels)
    for examples, message in WRONG.values():
        with pytest.raises(MetarunError, match=message) as raised:
            adapted.predict(examples)
        assert "\n" not in str(raised.value)
    for wrong, message in [
        (labels[:3], "there are 3 for 18 examples"),
        (["a"] * 18, "one class, 'a'"),
        ([1, "a"] * 9, "cannot be sorted"),
    ]:
        with pytest.raises(DataError, match=message):
            model.adapt(images, wrong)
    with pytest.raises(ConfigError, match="ink"):
        model.adapt(images, labels, ink="blue")
    with pytest.raises(
        CheckpointError, match="this is a checkpoint of a training run; name an adapted model"
    ):
        api.load_adapted(run / "best.pt")
    with pytest.raises(
        CheckpointError, match="checkpoint of a training run; name an output folder of metarun adapt"
    ):
        api.load_adapted(run)
    adapted.save(tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="this is an adapted model"):
        api.load(tmp_path / "a.pt")
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save(content | {"classes": ["a", "b"]}, tmp_path / "b.pt")
    with pytest.raises(CheckpointError, match="does not fit its model"):
        api.load_adapted(tmp_path / "b.pt")
    torch.save(content | {"adapted": {"x": 1}}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="does not fit its model"):
        api.load_adapted(tmp_path / "c.pt")
    del content["support"]
    torch.save(content, tmp_path / "d.pt")
    with pytest.raises(CheckpointError, match="no usable entry 'support'; adapt again"):
        api.load_adapted(tmp_path / "d.pt")


def test_texts_and_rows(trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    texts = api.load(trained("dataset=phrases", *SMALL), device="cpu")
    adapted = texts.adapt(["one two", "two one one", "six seven"], ["low", "low", "high"])
    assert adapted.classes == ["high", "low"]
    assert adapted.predict(["one one two", "seven six"]).probabilities.shape == (2, 2)
    with pytest.raises(DataError, match="3 is not a text"):
        adapted.predict([3])
    rows = api.load(table(trained, tmp_path), device="cpu")
    values = np.array([[1, 2, 3], [1, 2, 4], [9, 8, 7]])
    adapted = rows.adapt(values, [0, 0, 1])
    assert adapted.predict([[1, 2, 3]]).labels == [0]
    named = [dict(zip("xyz", row, strict=True)) for row in values.tolist()]
    same = [adapted.predict(each).probabilities for each in (values, named, [{"z": "3", "y": 2.0, "x": 1}])]
    np.testing.assert_array_equal(same[0], same[1])
    np.testing.assert_array_equal(same[0][:1], same[2])
    with pytest.raises(DataError, match="a row has 2 values, and the model takes 3: x, y, z"):
        adapted.predict([[1, 2]])


def test_a_regression_predicts_values(trained):
    """As by hand: one step of gradient descent on the mean squared error of the support."""
    run = trained("dataset=sinusoid", "algorithm=maml", "inner_loop.test_steps=1", *SMALL)
    model = api.load(run, device="cpu")
    x = np.linspace(-3, 3, 7)
    y = np.sin(x)
    found = model.adapt(x, y).predict([0.5, np.array([-1.0])])
    weights = [each.detach().clone().requires_grad_() for each in model.algorithm.parameters()]

    def network(weights, x):
        (a, b, c, d, e, f), x = weights, torch.as_tensor(x, dtype=torch.float32)[:, None]
        return (((x @ a.T + b).relu() @ c.T + d).relu() @ e.T + f)[:, 0]

    loss = ((network(weights, x) - torch.as_tensor(y, dtype=torch.float32)) ** 2).mean()
    gradients = torch.autograd.grad(loss, weights)
    stepped = [weight - 0.01 * gradient for weight, gradient in zip(weights, gradients, strict=True)]
    np.testing.assert_allclose(found.values, network(stepped, [0.5, -1.0]).detach(), rtol=1e-5)
    with pytest.raises(ConfigError, match="the model predicts values, not classes"):
        model.adapt(x, y).predict([0.5], reject=0.5)
    with pytest.raises(ConfigError, match="predicts values, not classes; use"):
        api.FewShotClassifier(model).fit(x[:, None], [0, 1] * 3 + [0])
    with pytest.raises(DataError, match="examples: must be a finite number for each example"):
        model.adapt([[1, 2]] * 7, y)


SMALL = ["iterations=1", "validation.episodes=2", "test.episodes=0", "hardware=cpu"]
SMALL += ["log.tensorboard=false"]


def table(trained, folder: Path) -> Path:
    """A model of a table with the columns x, y and z."""
    path = folder / "table.csv"
    random = np.random.default_rng(0)
    lines = ["x,y,z,label"]
    for label in range(12):
        centre = random.normal(size=3) * 3
        lines += [
            ",".join(f"{v:.2f}" for v in centre + random.normal(size=3)) + f",{label}" for _ in range(6)
        ]
    path.write_text("\n".join(lines))
    words = [f"dataset.root={path}", "dataset.label=label", "ways=2", "queries=2"]
    return trained("dataset=table", *words, *SMALL)


class Padded(api.FewShotClassifier):  # type: ignore[misc, name-defined]
    """The checks pass 1 to 20 columns, and the model takes 3."""

    def _shaped(self, X, model):
        rows = np.zeros((len(X), 3))
        rows[:, : min(3, X.shape[1])] = X[:, :3]
        return list(rows)


@pytest.mark.filterwarnings("ignore")  # of NumPy and scikit-learn, in their own checks
def test_scikit_learns_checks(trained, tmp_path: Path):
    model = api.load(table(trained, tmp_path), device="cpu")
    check_estimator(Padded(model), on_skip=None)


def test_in_a_pipeline_and_in_cross_validation(run: Path, glyphs):
    images, labels = glyphs
    model = api.load(run, device="cpu")
    bright = (255 - images).reshape(len(images), -1)
    classifier = api.FewShotClassifier(model, ink="light").fit(bright, labels)
    plain = model.adapt(255 - images, labels, ink="light").predict(255 - images)
    np.testing.assert_allclose(classifier.predict_proba(bright), plain.probabilities, atol=1e-6)
    assert classifier.predict(bright).tolist() == plain.labels
    assert copy.deepcopy(model) is model and clone(classifier).checkpoint is model
    pipeline = make_pipeline(MinMaxScaler((0, 255)), api.FewShotClassifier(run, device="cpu", ink="light"))
    with pytest.raises(MetarunError, match="values from"):
        pipeline.fit(bright, labels)
    pipeline = make_pipeline(MinMaxScaler(clip=True), api.FewShotClassifier(run, device="cpu", ink="light"))
    assert cross_val_score(pipeline, bright, labels, cv=3).mean() > 0.5  # chance: 0.33
    with pytest.raises(ValueError, match="700 values in a row"):
        api.FewShotClassifier(model).fit(bright[:, :700], labels)
    with pytest.raises(ValueError, match="checkpoint=None"):
        api.FewShotClassifier().fit(bright, labels)


def test_train_returns_what_the_command_does(metarun, tmp_path: Path):
    run = api.train([*TINY, "hydra.run.dir=here"])
    metarun("train", *TINY, "hydra.run.dir=there")
    mine, theirs = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("here", "there"))
    times = re.compile(r'"[^"]*(seconds|per_second)[^"]*": [\d.e-]+')
    assert times.sub("", mine) == times.sub("", theirs)
    assert run.folder.resolve() == tmp_path / "here"
    assert run.score == run.result["validation"]["mean"]
    assert api.load(run.folder).name == "protonet"
    for words, message in [
        (["algorithm=protonett"], "algorithm=protonett: no such algorithm; did you mean 'protonet'?"),
        (["ways="], "ways= is empty"),
        ([*TINY, "hydra.run.dir=here"], "this folder already contains a run"),
        (["-m", "seed=1,2"], "flags are for the command line"),
        (["ways=2000"], "has 1000 classes"),
    ]:
        with pytest.raises(MetarunError, match=re.escape(message)) as raised:
            api.train(words)
        assert "\n" not in str(raised.value)


BLOCKS = {
    f"{page} {i}": block
    for page in ("README.md", "docs/python_api.md")
    for i, block in enumerate(
        re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.DOTALL | re.MULTILINE)
    )
}
NOTEBOOKS = {path.name: path for path in (ROOT / "docs/notebooks").glob("*.ipynb")}
for name, path in NOTEBOOKS.items():
    cells = json.loads(path.read_text("utf-8"))["cells"]
    BLOCKS[name] = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.long
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_in_jupyter(tmp_path: Path, name: str):
    """Its figures appear, and what metarun prints is plain text: no HTML, no warnings."""
    nbformat, nbclient = (pytest.importorskip(each) for each in ("nbformat", "nbclient"))
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOKS[name], as_version=4)
    nbclient.NotebookClient(notebook, timeout=200, resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert "image/png" in kinds and "text/html" not in kinds
    assert "Warning" not in "".join(output.get("text", "") for output in outputs)


@pytest.mark.parametrize("name", BLOCKS)
def test_the_documents_examples(metarun, run: Path, glyphs, tmp_path, monkeypatch, name: str):
    images, labels = glyphs
    for path, i in {
        "support/alpha/a1": 0,
        "support/alpha/a2": 1,
        "support/beta/b1": 6,
        "query/x": 7,
        "query/y": 2,
    }.items():
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[i]).save(f"{path}.png")
    Path("outputs").mkdir()
    Path("outputs/RUN").symlink_to(run)
    train = api.train
    there = Run(run, 0.5, {"test": {"mean": 0.5}})
    here = (lambda words: there) if name in NOTEBOOKS else (lambda words: train([*words, *TINY]))
    monkeypatch.setattr(api, "train", here, raising=False)
    names = {"images": 255 - images, "labels": labels}
    exec(compile(BLOCKS[name], name, "exec"), names)
    if "predictions" in names and name not in NOTEBOOKS:
        assert names["predictions"].labels == ["beta", "alpha"]  # as the comment says
