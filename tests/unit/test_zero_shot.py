"""Tasks without examples: descriptions of classes, from the source to the prediction."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.methods import METHODS, SHAPE, Smooth, episodes_of, gradient, relative_error

from metarun.algorithms.maml import MAML
from metarun.algorithms.protonet import ProtoNet
from metarun.algorithms.zero_shot import ZeroShot
from metarun.backbones.mlp import MLP
from metarun.datasets.descriptions import described
from metarun.datasets.glyphs import DESCRIPTION, Glyphs, describe, sample_types
from metarun.datasets.mixture import MixtureStore
from metarun.datasets.sinusoid import Sinusoid
from metarun.errors import ConfigError, DataError
from metarun.inference.model import Model
from metarun.tasks.class_store import ClassStore, joined
from metarun.tasks.episodes import Episodes, EpisodeShape
from metarun.tasks.objectives import CLASSIFICATION
from metarun.tasks.sampling import sample

NONE = EpisodeShape(3, 0, 2)


def store(classes: int = 6, about: bool = True, first: int = 0) -> ClassStore:
    """Four images of each class, whose pixels are the number of the class, as is its description."""
    numbers = torch.arange(first, first + classes)
    images = numbers.repeat_interleave(4)[:, None, None, None].expand(-1, *SHAPE).to(torch.uint8)
    names = [f"class {i}" for i in numbers.tolist()]
    own = numbers[:, None, None].expand(-1, 2, 3).float() if about else None
    return ClassStore(images.clone(), [4] * classes, names, "mine train", about=own)


def drawn(source: ClassStore, shape: EpisodeShape = NONE) -> Episodes:
    tasks = sample(source, 5, shape, torch.Generator().manual_seed(0))
    assert isinstance(tasks, Episodes)
    return tasks


VIEWS = {
    "itself": lambda: store(),
    "moved": lambda: store().with_items(store().items + 0),
    "some classes": lambda: store().keeping([1, 2, 4, 5]),
    "resized": lambda: store().resized((3, 8, 8)),
    "other metrics": lambda: store().reporting(CLASSIFICATION.choosing(["ece"])),
    "all splits": lambda: joined([store(2), store(3, first=2)], "all"),
    "host memory": lambda: store().with_items(store().items, torch.device("cpu")),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shots", [0, 2])
def test_descriptions_stay_with_their_classes(view: str, shots: int):
    source = VIEWS[view]()
    shape = EpisodeShape(3, shots, 2)
    source.check(shape)
    tasks = drawn(source, shape)
    assert source.spec.description == (2, 3)
    assert tasks.support_x.shape[:2] == (5, 3 * shots)
    assert tasks.about is not None and tasks.about.shape == (5, 3, 2, 3)
    pixels = tasks.query_x.flatten(2)[..., 0].unflatten(1, (3, 2)) * 255
    assert torch.equal(pixels.round(), tasks.about[..., 0, :2])


def test_a_task_without_examples_needs_descriptions():
    plain = store(about=False)
    for source in (plain, MixtureStore({"a": store()}, [1.0], "mixture", "cpu"), Sinusoid().split("train")):
        with pytest.raises(DataError, match=rf"^shots=0: {source.name} has no descriptions of its classes"):
            source.check(EpisodeShape(1 if source.spec.outputs else 3, 0, 2))
    assert drawn(plain, EpisodeShape(3, 1, 1)).about is None
    with pytest.raises(ValueError, match="2 descriptions of 3 classes"):
        ClassStore(torch.zeros(3, 1, dtype=torch.uint8), [1] * 3, list("abc"), "x", about=torch.zeros(2, 1))


def test_who_needs_examples_and_who_descriptions():
    source = store()
    protonet, zero_shot = ProtoNet(Smooth()), ZeroShot(Smooth(), (2, 3))
    with pytest.raises(ConfigError, match=r"^shots=0: algorithm=ProtoNet needs support examples; choose al"):
        protonet.check_source(source, NONE)
    content = {
        "config": {"algorithm": {"_target_": "metarun.algorithms.protonet.ProtoNet"}},
        "choices": {"algorithm": "meta_baseline"},
    }
    model = Model("", Path(), None, None, source.spec, protonet, content, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^shots=0: algorithm=meta_baseline needs support examples"):
        model.check_source(source, NONE)  # as `eval` and `adapt` ask: the option, not its class
    protonet.check_source(source, EpisodeShape(3, 1, 2))
    zero_shot.check_source(source, NONE)
    for other in (store(about=False), Glyphs(train_classes=2).split("train")):
        with pytest.raises(ConfigError, match=r"this model takes those of shape \(2, 3\)"):
            zero_shot.check_source(other, NONE)
    with pytest.raises(ConfigError, match="needs descriptions of the classes apart from their examples"):
        ZeroShot.check_tasks(store(about=False).spec)


class InThePlaceOfExamples(ClassStore):
    """A source whose descriptions are items, as texts are."""

    described = True  # type: ignore[assignment]


def test_descriptions_in_the_place_of_examples_are_for_every_method():
    plain = store(about=False)
    source = InThePlaceOfExamples(plain.items, [4] * 6, plain.names, "texts")
    source.check(NONE)
    MAML.check_shots(source, 0)


@pytest.mark.usefixtures("float64")
def test_the_gradient_without_examples_is_the_references():
    method = METHODS["zero_shot"]
    algorithm, episodes = method.build(Smooth(), 1), episodes_of(shots=0)
    expected = method.reference(algorithm, episodes, 1)
    assert relative_error(gradient(algorithm, episodes), expected) < 1e-10
    algorithm.eval()
    outputs = algorithm.predict(algorithm.adapt(episodes), episodes.query_x)
    assert outputs.shape == (3, 6, 3)


def test_descriptions_are_standardised_by_the_training_classes():
    about = torch.randn(7, 4) * torch.tensor([100.0, 1e-3, 1.0, 0.0]) + torch.tensor([5.0, 0.0, -3.0, 0.1])
    source = ClassStore(torch.zeros(7, 2), [1] * 7, list("abcdefg"), "x", about=about)
    algorithm = ZeroShot(MLP((2,), (3,)), (4,), hidden=())
    algorithm.on_run_start(source)
    np.testing.assert_allclose(algorithm.mean, about.numpy().mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(algorithm.deviation[:3], about.numpy().std(0)[:3], rtol=1e-5)
    assert algorithm.deviation[3] == 1
    assert {"mean", "deviation"} <= algorithm.state_dict().keys()


def test_a_glyph_is_described_by_its_program():
    """Characters of the same seed have the same description; absent strokes are zero."""
    source = Glyphs(train_classes=25).split("train")
    assert source.about is not None and source.spec.description == Glyphs().spec.description == (DESCRIPTION,)
    assert torch.equal(source.about[:3], Glyphs(train_classes=3).split("train").about)
    assert len(source.about.unique(dim=0)) == 25
    types = sample_types(200, torch.Generator().manual_seed(0))
    described = describe(types)
    strokes = (types.lengths.sum(-1) > 0).sum(1)
    filled = described[:, :12].unflatten(1, (4, 3)).any(2).sum(1)
    assert torch.equal(filled, strokes) and set(strokes.tolist()) == {1, 2, 3, 4}
    relations = described[:, 156:172].unflatten(1, (4, 4)).sum(2)
    assert torch.equal(relations.sum(1).long(), strokes)
    assert torch.equal(described[:, -1], types.sizes.float())


# descriptions in files


@pytest.mark.parametrize(
    "text",
    ["a,1,-2.5\nb,0,1e3\n", "\ufeffclass,x,y\r\na,1,-2.5\r\n\r\nb,0,1e3\r\n", "name;x;y\na;1;-2,5\nb;0;1e3"],
)
@pytest.mark.parametrize("tabs", [False, True])
def test_a_table_of_descriptions(tmp_path: Path, text: str, tabs: bool):
    text = text.replace(";", "\t") if tabs else text
    (tmp_path / "about.csv").write_text(text, encoding="utf-8", newline="")
    assert described(str(tmp_path / "about.csv"), ["b", "a"]).tolist() == [[0, 1000], [1, -2.5]]


def test_a_name_may_have_separators_quotes_and_accents(tmp_path: Path, capsys):
    (tmp_path / "about.csv").write_text('"a, ""b""\nc",1\ncafe\u0301,2\nother,3\n', encoding="utf-8")
    file = str(tmp_path / "about.csv")
    assert described(file, ["caf\u00e9", 'a, "b"\nc']).tolist() == [[2], [1]]
    assert f"{file}, line 4: not a class of the dataset; 1 of 3 lines" in capsys.readouterr().err.replace(
        "\n", ""
    )


WRONG_TABLES = {
    "no line": ("", "has no classes"),
    "headings only": ("class,x\n", "has no classes"),
    "a class missing": ("a,1\n", "has no line for class 'b'; add"),
    "a class twice": ("a,1\nb,2\na,3\n", "line 3: class 'a' is also in .*line 1"),
    "no number": ("a,1\nb,red\n", "line 2: 'red' in column 2 is not a finite number"),
    "an empty cell": ("class,x,y\na,1,\nb,2,3\n", "line 2: '' in column 3 is not a finite number"),
    "a digit separator": ("a,1\nb,1_000\n", "line 2: '1_000' in column 2 is not a finite number"),
    "NaN": ("a,1\nb,nan\n", "line 2: 'nan' in column 2 is not a finite number"),
    "infinite": ("a,1\n\nb,1e39\n", "line 3: '1e39' in column 2 is not a finite number"),
    "unequal lengths": ("a,1,2\nb,3\n", "line 2: has 1 numbers, and lines before it have 2"),
    "names only": ("a\nb\n", "line 2: has no numbers"),
    "an open quote": ('a,1\n"b,2\n', "line 2: .*check its quotes"),
    "another encoding": (b"a,1\n\xff,2\n", "is not UTF-8 text"),
}


@pytest.mark.parametrize("name", WRONG_TABLES)
def test_a_wrong_table_is_refused_by_line(tmp_path: Path, name: str):
    content, says = WRONG_TABLES[name]
    (tmp_path / "about.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=rf"^{re.escape(str(tmp_path))}/about\.csv.*{says}") as error:
        described(str(tmp_path / "about.csv"), ["a", "b"])
    assert "\n" not in str(error.value)


def test_a_table_that_is_not_there(tmp_path: Path):
    with pytest.raises(DataError, match=r"none\.csv: no such file"):
        described(str(tmp_path / "none.csv"), ["a"])
    with pytest.raises(DataError, match="is a folder"):
        described(str(tmp_path), ["a"])
