"""Tables of a user's own: reading, roles of columns, splits, features and tasks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from metarun.datasets.tables.columns import category_of
from metarun.datasets.tables.reading import read_table
from metarun.datasets.tables.table import Table
from metarun.datasets.tables.tasks import TableTasks
from metarun.errors import ConfigError, DataError
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.sampling import seeded

pytestmark = pytest.mark.quick


def written(folder: Path, text: str | bytes, name: str = "table.csv") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def patients(folder: Path, tasks: int = 10, rows: int = 8) -> str:
    """A table of patients: a number with gaps, a category, two labels and a target."""
    lines = ["patient,age,site,ill,score"]
    generator = np.random.default_rng(0)
    for task in range(tasks):
        for row in range(rows):
            age = "?" if row == 3 else f"{generator.normal(40 + task, 5):.2f}"
            lines.append(f"p{task},{age},{'abc'[row % 3]},{row % 2},{generator.normal(task):.3f}")
    return written(folder, "\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("text", "delimiter"),
    [("\ufeffa,b\n1,2\n", ","), ("a;b\r\n1;2\r\n", ";"), ("a\tb\n1\t2\n", "\t"), ('"a,x";b\n1;2', ";")],
)
@pytest.mark.parametrize("packed", [False, True])
def test_tables_are_read_with_any_separator(tmp_path, text, delimiter, packed):
    content = gzip.compress(text.encode()) if packed else text.encode()
    cells = read_table(Path(written(tmp_path, content, "t.csv.gz" if packed else "t.csv")))
    first = "a,x" if "x" in text else "a"
    assert cells.columns == {first: ["1"], "b": ["2"]}
    assert cells.comma == (delimiter == ";")


def test_cells_with_line_breaks_keep_the_lines_of_rows(tmp_path):
    cells = read_table(Path(written(tmp_path, 'a,b\n"x\ny",1\n\nz,2\n')))
    assert cells.columns == {"a": ["x\ny", "z"], "b": ["1", "2"]}
    assert cells.lines == [2, 5]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"a,b\n", "has a header and no rows"),
        (b"a,b,a\n1,2,3\n", "two columns are named 'a'"),
        (b"a,b\n1,2\n3\n", "line 3: has 1 cells, and the header 2"),
        (b'a,b\n1,"2\n', "line 2: is not a row"),
        (b"a,b\n1,2\n\xff\xfe,1\n", "line 3: is not UTF-8"),
        (b"\x1f\x8bbroken", "cannot be read .*; get it again"),
    ],
)
def test_faulty_files_are_named_with_the_line(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        read_table(Path(written(tmp_path, content)))
    with pytest.raises(DataError, match="no such file"):
        read_table(tmp_path / "none.csv")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": "patint", "label": "ill"}, "dataset.task: .* no column 'patint'; did you mean 'patient'"),
        ({"task": "patient", "label": "ill", "drop": ["scor"]}, "did you mean 'score'"),
        ({"task": "patient", "target": "site"}, "line 2: column 'site' has 'a' where a finite number"),
        ({"tasks": ["ill", "score"]}, "column 'score' has .* and a task has only 0, 1 and empty"),
        ({"tasks": ["x*"]}, r"no column 'x\*'"),
        ({"task": "patient", "label": "ill", "drop": ["*"]}, "no feature is left"),
    ],
)
def test_wrong_columns_are_named(tmp_path, settings, message):
    with pytest.raises(DataError, match=message):
        for split in ("train", "test"):
            Table(root=patients(tmp_path), **settings).split(split)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "none is set"),
        ({"label": "a", "target": "b"}, "label and target are set"),
        ({"target": "a"}, "add dataset.task=COLUMN"),
        ({"task": "a", "tasks": "columns"}, "leave it out"),
        ({"label": "a", "learned": "{}"}, "dataset.learned: is not what metarun wrote"),
        ({"label": "a", "test": 0.9}, "less than 1 together"),
    ],
)
def test_settings_that_do_not_fit(settings, message):
    with pytest.raises(ConfigError, match=message):
        Table(root="x.csv", **settings)


@pytest.mark.parametrize(("column", "cells"), [("id", "row{}"), ("id", "{}"), ("id", "{}.0")])
def test_identifiers_are_refused_unless_the_features_are_named(tmp_path, column, cells):
    lines = [f"{cells.format(i)},{i / 7:.3f},{i % 3},{i % 2}" for i in range(24)]
    root = written(tmp_path, "\n".join([f"{column},x,task,label", *lines]))
    with pytest.raises(DataError, match="column 'id' has another value in each of the 24 rows"):
        Table(root=root, task="task", label="label").split("train")
    assert Table(root=root, task="task", label="label", drop=["id"]).item_shape == (1,)
    assert Table(root=root, task="task", label="label", features=["*"]).item_shape != (1,)


def test_features_are_standardised_by_training_tasks_only(tmp_path):
    table = Table(root=patients(tmp_path), task="patient", label="ill", drop=["score"])
    store = table.split("train")
    cells = table.layout.cells.columns
    training = [i for i, name in enumerate(cells["patient"]) if name in store.tasks]
    ages = np.array([float("nan" if cells["age"][i] == "?" else cells["age"][i]) for i in training])
    expected = np.where(np.isnan(ages), 0, (ages - np.nanmean(ages)) / np.nanstd(ages))
    items = table.items[training].numpy()
    assert items.shape[1] == 2 + 4  # the number and its indicator; a, b, c and others
    np.testing.assert_allclose(items[:, 0], expected, atol=1e-6)
    np.testing.assert_array_equal(items[:, 1], np.isnan(ages))
    np.testing.assert_array_equal(items[:, 2:].argmax(1), ["abc".index(cells["site"][i]) for i in training])
    assert set(store.tasks).isdisjoint(table.split("test").tasks)


def test_what_was_learned_prepares_another_table(tmp_path):
    table = Table(root=patients(tmp_path), task="patient", label="ill", drop=["score"])
    learned = table.decided["learned"]
    assert "$" not in learned
    other = written(tmp_path, "patient;age;site;ill\np1;40,5;zzz;1\np1;NA;a;0\n", "other.csv")
    read = Table(root=other, task="patient", label="ill", learned=learned)
    number = json.loads(learned)["columns"][0]
    items = read.items
    torch.testing.assert_close(items[0, 0].item(), (40.5 - number["mean"]) / number["deviation"])
    assert items[0, 2:].tolist() == [0, 0, 0, 1]  # another value
    assert items[1].tolist() == [0, 1, 1, 0, 0, 0]
    regression = Table(root=patients(tmp_path), task="patient", target="score", drop=["ill"])
    labelled = Table(root=other, task="patient", label="ill").prepared_like(regression.preparation)
    assert labelled.load("all").names == ["0", "1"]  # so that the number of outputs is what does not fit
    taken = Table(root=other, task="patient", label="ill").prepared_like(table.preparation)
    torch.testing.assert_close(taken.items, items)  # type: ignore[attr-defined]
    assert Table(root="not read.csv", task="patient", label="ill", learned=learned).item_shape == (6,)


def test_a_whole_number_is_the_same_category_with_and_without_decimals(tmp_path):
    """As programs write a column of whole numbers with a missing one."""
    lines = [f"p{i // 4},{i % 4},{i % 2},{i % 3}" for i in range(24)]
    plain = written(tmp_path, "\n".join(["task,ward,ill,dose", *lines]))
    decimal = [line.replace(f",{i % 4},", f",{i % 4}.0,", 1) for i, line in enumerate(lines)]
    other = written(tmp_path, "\n".join(["task,ward,ill,dose", *decimal]), "other.csv")
    settings = {"task": "task", "label": "ill", "categories": ["ward"]}
    first, second = (Table(root=root, **settings) for root in (plain, other))
    assert first.learned == second.learned
    assert torch.equal(first.items, second.prepared_like(first.preparation).items)
    assert category_of("01", False) == "01" != category_of("1,0", True) == "1"


def test_many_values_are_hashed(tmp_path):
    lines = [f"v{i % 90},{i % 6},{i % 2}" for i in range(180)]
    root = written(tmp_path, "\n".join(["word,task,label", *lines]))
    items = Table(root=root, task="task", label="label").items
    assert items.shape == (180, 64) and (items.sum(1) == 1).all()
    torch.testing.assert_close(items[:90], items[90:])


def test_episodes_of_tasks_are_rows_of_one_task_with_its_labels(tmp_path):
    table = Table(root=patients(tmp_path), task="patient", label="ill")  # no two rows have one score
    store, shape = table.split("train"), EpisodeShape(2, 1, 2)
    assert isinstance(store, TableTasks)
    store.check(shape)
    draw = store.draw(20, shape, seeded("x"))
    episodes = store.gather(draw, shape)
    cells = table.layout.cells.columns
    of_row = {tuple(row.tolist()): i for i, row in enumerate(table.items)}
    x = torch.cat([episodes.support_x, episodes.query_x], 1)
    y = torch.cat([episodes.support_y, episodes.query_y], 1)
    for task, own, labels in zip(draw[0].tolist(), x, y.tolist(), strict=True):
        rows = [of_row[tuple(item.tolist())] for item in own]
        assert {cells["patient"][row] for row in rows} == {store.tasks[task]}
        assert [cells["ill"][row] for row in rows] == [str(label) for label in labels]
        assert len(set(rows)) == len(rows)
    shown = store.examples(draw, shape)
    assert [row["part"] for row in shown] == ["support"] * 2 + ["query"] * 4
    assert [row["label"] for row in shown] == ["0", "1", "0", "0", "1", "1"]


def test_shuffled_labels_name_the_ways(tmp_path):
    table = Table(
        root=patients(tmp_path), task="patient", label="site", labels="shuffled", drop=["score", "ill"]
    )
    store, shape = table.split("train"), EpisodeShape(2, 1, 1)
    assert isinstance(store, TableTasks)
    store.check(shape)
    labels = store.draw(60, shape, seeded("x"))[1]
    assert len({tuple(row) for row in labels.tolist()}) == 6  # ordered pairs of three labels
    with pytest.raises(DataError, match="set ways from 2 to 3"):
        store.check(EpisodeShape(4, 1, 1))


def test_tasks_that_are_too_small_are_named(tmp_path, capsys):
    lines = [f"t{task},{row / 3:.2f},{row % 2}" for task in range(6) for row in range(4 if task == 2 else 9)]
    root = written(tmp_path, "\n".join(["task,x,label", *lines, "t9,0.5,1", "t9,0.6,1"]))
    store = Table(root=root, task="task", label="label").load("all")
    assert "1 task of one label left out: t9" in capsys.readouterr().err
    store.check(EpisodeShape(2, 1, 3))
    message = capsys.readouterr().err
    assert "need 4 rows of each label; 1 of 6 tasks have fewer and are left out: t2" in " ".join(
        message.split()
    )
    store.check(EpisodeShape(2, 1, 3))
    assert not capsys.readouterr().err  # once
    assert "t2" not in {store.tasks[i] for i in store.draw(50, EpisodeShape(2, 1, 3), seeded("x"))[0]}  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="none of the 6 tasks of table all has as many"):
        store.check(EpisodeShape(2, 4, 4))
    with pytest.raises(DataError, match="set ways=2"):
        store.check(EpisodeShape(5, 1, 1))


def test_a_regression_has_standardised_targets_and_metrics_in_its_own_units(tmp_path):
    table = Table(root=patients(tmp_path), task="patient", target="score", drop=["ill"])
    store, shape = table.split("train"), EpisodeShape(1, 3, 4)
    episodes = store.gather(store.draw(5, shape, seeded("x")), shape)
    assert episodes.support_y.shape == (5, 3, 1) and episodes.classes is None
    deviation = table.learned.deviation
    score = episodes.objective.metrics[0].score(episodes.query_y + 2 / deviation, episodes.query_y)
    torch.testing.assert_close(score, torch.full((5,), 4.0))
    units = episodes.objective.units
    assert units is not None
    targets = {round(float(cell), 3) for cell in table.layout.cells.columns["score"]}
    assert {round(value, 3) for value in units(episodes.query_y.double()).flatten().tolist()} <= targets
    with pytest.raises(DataError, match="set ways=1"):
        store.check(EpisodeShape(2, 1, 1))


def test_targets_far_from_zero_keep_their_differences(tmp_path):
    lines = [
        f"t{task},{row / 7:.2f},{1_600_000_000 + 7 * task + row}" for task in range(4) for row in range(8)
    ]
    table = Table(
        root=written(tmp_path, "\n".join(["task,x,seconds", *lines])), task="task", target="seconds"
    )
    store, shape = table.split("train"), EpisodeShape(1, 1, 7)
    episodes = store.gather(store.draw(1, shape, seeded("x")), shape)
    wrong = episodes.query_y + 3 / table.learned.deviation
    (score,) = episodes.objective.metrics[0].score(wrong, episodes.query_y)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score.item(), 9.0, rtol=1e-4, atol=0)  # float32 knows multiples of 128 there


def test_equal_targets_are_only_centred(tmp_path):
    lines = [f"t{task},{row / 7:.2f},0.1" for task in range(4) for row in range(10)]
    table = Table(root=written(tmp_path, "\n".join(["task,x,y", *lines])), task="task", target="y")
    assert table.learned.deviation == 1.0


def test_numbers_that_float32_does_not_have_are_refused(tmp_path):
    lines = [f"t{i % 4},{'1e300' if i == 20 else i / 7},{i % 2}" for i in range(40)]
    root = written(tmp_path, "\n".join(["task,x,label", *lines]))
    with pytest.raises(DataError, match="line 22: column 'x' has '1e300' where a finite number"):
        _ = Table(root=root, task="task", label="label").items


@pytest.mark.parametrize(("word", "cell"), [(-9, "-9.0"), ("-9.0", "-9"), ("NONE", "None")])
def test_words_for_missing_values_are_compared_as_numbers(tmp_path, word, cell):
    lines = [f"t{i % 4},{cell if i % 5 == 0 else i / 7},{i % 2}" for i in range(40)]
    root = written(tmp_path, "\n".join(["task,x,label", *lines]))
    items = Table(root=root, task="task", label="label", missing=[word]).items
    assert items[:5].tolist()[0] == [0, 1] and items[:, 1].sum() == 8


def test_columns_are_tasks_of_a_wide_table(tmp_path):
    lines = [f"{i % 2},{'' if i % 3 else i % 2},{i % 5 // 4}.0,{i * 7 % 11}.5" for i in range(40)]
    root = written(tmp_path, "\n".join(["a-1,a-2,b,x", *lines]))
    table = Table(root=root, tasks="columns")
    assert list(table.layout.groups) == ["a-1", "a-2", "b"] and table.item_shape == (1,)
    assert [len(rows) for rows in table.layout.groups["a-2"].rows] == [7, 7]
    assert list(Table(root=root, tasks=["a-*"], drop=["b"]).layout.groups) == ["a-1", "a-2"]
    splits = written(
        tmp_path, "\n".join(["a,x,split", *[f"{i % 2},{i / 7},train" for i in range(9)]]), "s.csv"
    )
    with pytest.raises(DataError, match="column 'split' says the splits of rows"):
        _ = Table(root=splits, tasks="columns").items
    assert Table(root=splits, tasks="columns", drop=["split"]).items.shape == (9, 1)
    apart = Table(root=root, tasks="columns", disjoint=True)
    train, test = (apart.split(split).rows for split in ("train", "test"))  # type: ignore[attr-defined]
    names = apart.layout.row_names
    assert {names[i] for i in train}.isdisjoint({names[i] for i in test})


def test_without_tasks_every_label_is_a_class(tmp_path):
    lines = [f"{i / 7:.2f},{'uvwxyz'[i % 6]}" for i in range(36)]
    table = Table(root=written(tmp_path, "\n".join(["x,label", *lines])), label="label")
    store = table.split("train")
    assert isinstance(store, ClassStore)
    assert store.item_counts() == [6] * len(store.names)
    assert sorted(name for split in table.splits() for name in table.split(split).names) == list("uvwxyz")


def test_a_split_column_is_used(tmp_path):
    lines = [
        f"t{task},{row / 3:.2f},{row % 2},{split}"
        for task, split in enumerate(("train", "val", "test"))
        for row in range(6)
    ]
    root = written(tmp_path, "\n".join(["task,x,label,split", *lines]))
    table = Table(root=root, task="task", label="label")
    assert {split: table.split(split).tasks for split in table.splits()} == {  # type: ignore[attr-defined]
        "train": ["t0"],
        "validation": ["t1"],
        "test": ["t2"],
    }
    mixed = written(tmp_path, Path(root).read_text() + "\nt0,9,1,test\n", "mixed.csv")
    with pytest.raises(DataError, match="task 't0' is in test and in train"):
        Table(root=mixed, task="task", label="label").split("train")


def test_own_files_become_one_task(tmp_path):
    table = Table(root=patients(tmp_path), task="patient", label="ill", drop=["score"])
    support = Path(written(tmp_path, "age,site,ill\n30,a,1\n50,b,0\n60,b,0\n", "support.csv"))
    query = written(tmp_path, "site,age\nb,40\nq,?\n", "query.csv")
    own = table.own_task(support, query)
    assert own.classes == ["0", "1"] and own.support_y.tolist() == [[1, 0, 0]]
    assert own.query_y is not None and own.query_y.tolist() == [[-1, -1]]
    assert own.query_names == ["line 2", "line 3"]
    torch.testing.assert_close(own.query_x[0, 1], torch.tensor([0.0, 1, 0, 0, 0, 1]))  # type: ignore[index]
    for text, message in (
        ("age,site,ill\n30,a,1\n", "no row with the ill '0'"),
        ("age,site,ill\n30,a,2\n", "line 2: the ill '2' is not one of 0, 1"),
        ("age,site,ill\n30,a,\n", "line 2: column 'ill' is empty"),
        ("age,ill\n30,1\n40,0\n", "no column 'site'"),
        ("age,site\n30,a\n", "no column 'ill'"),
    ):
        with pytest.raises(DataError, match=message):
            table.own_task(Path(written(tmp_path, text, "bad.csv")), None)
