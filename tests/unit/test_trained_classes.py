"""Which classes of a split a model was trained on: by name and by content."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from metarun.commands.trained_on import (
    classes_before,
    require_same_classes,
    trained_tasks,
    without_trained,
)
from metarun.datasets.cifar import labels
from metarun.datasets.mixture import MixtureStore
from metarun.datasets.omniglot import class_split
from metarun.errors import DataError
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.sampling import sample, seeded
from metarun.tasks.trained_classes import Known, TrainedClasses

pytestmark = pytest.mark.quick


def images(name: str, count: int = 12) -> Tensor:
    """Images of noise that depend on the name alone."""
    return torch.randint(0, 255, (count, 1, 3, 3), dtype=torch.uint8, generator=seeded(name))


def store(classes: Mapping[str, Tensor], name: str = "some test") -> ClassStore:
    return ClassStore(torch.cat([*classes.values()]), [len(x) for x in classes.values()], [*classes], name)


def known(train: Mapping[str, Tensor], test: Mapping[str, Tensor]) -> Known:
    record = TrainedClasses.of(store(train))
    assert record
    return TrainedClasses.from_plain(record.plain()).among(store(test))  # type: ignore[union-attr]


def test_the_classes_of_two_splits_of_one_dataset():
    """Figures that were counted by hand in the published lists."""
    cifar_fs = {label.name: images(label.name) for label in labels() if label.cifar_fs == "train"}
    fc100 = {label.name: images(label.name) for label in labels() if label.fc100 == "test"}
    assert len(known(cifar_fs, fc100).same_items) == 11
    vinyals = {name: images(name, 2) for name in class_split("vinyals")["train"]}
    maml = {name: images("other", 2) for name in class_split("maml")["test"]}
    assert len(known(vinyals, maml).same_name) == 281


def test_content_counts_whatever_the_name_the_order_and_a_few_images_more():
    train = {name: images(name) for name in "abcde"}
    test = {
        "renamed": images("a").flip(0),
        "grown": torch.cat([images("new", 5), images("b")]),
        "half": images("c")[::2],
        "d": images("not d"),
        "new": images("new"),
    }
    found = known(train, test)
    assert (found.same_items, found.same_name) == ([0, 1, 2], [3])


def test_one_common_image_and_blank_images_do_not_make_two_classes_one():
    blank = torch.zeros(5, 1, 3, 3, dtype=torch.uint8)
    train = {"a": torch.cat([images("a", 5), blank])}
    test = {"b": torch.cat([images("b", 5), images("a", 1)]), "c": torch.cat([images("c", 2), blank])}
    assert known(train, test).classes == []
    assert known({"a": images("a", 1)}, {"b": images("a", 1)}).classes == [0]  # it has no other image


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int32, torch.float64, torch.bfloat16])
def test_marks_are_those_of_distinct_items(dtype: torch.dtype):
    """Compared with sets of texts; many of the items differ in one number only."""
    base = torch.randint(0, 2, (1, 13), generator=seeded("base")).repeat(40, 1)
    base[torch.arange(26), torch.arange(26) % 13] += 1
    base = (base % 2).to(dtype)
    shown = {hashlib.sha256(str(row.tolist()).encode()).hexdigest() for row in base}
    marks = ClassStore(base, [1] * 40, [str(i) for i in range(40)], "rows").marks[:, 0]
    assert len(marks.unique()) == len(shown)


def test_what_is_left_out_is_never_drawn_and_the_rest_as_it_was(capsys):
    train = {name: images(name) for name in "bd"}
    test = store({name: images(name) for name in "abcdef"})
    record = TrainedClasses.of(store(train))
    left = without_trained(test, {"maml": record, "old": None})
    assert list(left.names) == ["a", "c", "e", "f"]
    assert (
        "maml was trained on 2 of the 6 classes of some test, such as 'b'"
        in (said := capsys.readouterr()).err
    )
    assert "old: this checkpoint has no record" in said.err
    assert left.fingerprint != test.fingerprint
    shape = EpisodeShape(4, 2, 3)
    episodes = sample(left, 20, shape, seeded("episodes"))
    own = {
        bytes(x.mul(255).round().byte().numpy().tobytes()): name
        for name in "acef"
        for x in images(name) / 255
    }
    for classes, task in zip(episodes.classes, episodes.support_x, strict=True):  # type: ignore[attr-defined]
        names = [own[bytes(x.mul(255).round().byte().numpy().tobytes())] for x in task[::2]]
        assert names == [left.names[i] for i in classes.tolist()]
    with pytest.raises(DataError, match="lower ways to at most 4"):
        left.check(EpisodeShape(5, 1, 1))
    assert without_trained(test, {"maml": record}, keep="split=train") is test
    with pytest.raises(DataError, match="trained on all of its 2 classes"):
        without_trained(store(train), {"maml": record})


def test_of_a_mixture_whole_datasets_may_be_left_out():
    parts = {name: store({f"{name}{i}": images(f"{name}{i}") for i in range(3)}) for name in "pqr"}
    mixture = MixtureStore(parts, [1.0, 2.0, 3.0], "mixture test", "cpu")
    record = TrainedClasses.of(store({name: images(name) for name in ("p0", "p1", "p2", "q1")}))
    left = without_trained(mixture, {"model": record})
    assert {name: list(part.names) for name, part in left.parts.items()} == {
        "q": ["q0", "q2"],
        "r": ["r0", "r1", "r2"],
    }
    drawn = left.draw(200, EpisodeShape(2, 1, 1), seeded("tasks"))[0]
    assert {left.names[i] for i in drawn.flatten().tolist()} == {"q: q0", "q: q2", "r: r0", "r: r1", "r: r2"}


@pytest.mark.parametrize(
    "entry", [None, 3, {}, {"names": ["a"], "marks": torch.zeros(2, 8).long()}, {"names": 1}]
)
def test_an_entry_that_is_no_record_is_none(entry):
    assert TrainedClasses.from_plain(entry) is None


def test_a_run_with_other_tasks_is_not_resumed():
    tasks = SimpleNamespace(name="patients train", tasks=["p1", "p3"], names=[])
    for before in ({"train_tasks": ["p1", "p3"]}, {}):  # older checkpoints have no record
        require_same_classes(before, tasks)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"training tasks have changed .*\(2 then, 2 now, 'p3' was not there"):
        require_same_classes({"train_tasks": ["p1", "p2"]}, tasks)  # type: ignore[arg-type]


def test_tasks_of_the_run_that_a_backbone_is_from_are_known(capsys):
    """As its classes are: `init=` of a run on a table."""
    before = classes_before(None, {"train_tasks": ["patient 1"], "init_tasks": ["patient 2"]})
    assert before == {"init_classes": None, "init_tasks": ["patient 1", "patient 2"]}
    assert not capsys.readouterr().err
    assert trained_tasks({"train_tasks": ["patient 3"], **before}) == ["patient 3", "patient 1", "patient 2"]
    assert classes_before(before, None) == before
    assert trained_tasks({"train_tasks": 3, "init_tasks": [1]}) == []
