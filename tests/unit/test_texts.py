"""Texts: tokens of every script, files of every form, wrong files in one line, languages and descriptions."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.server import running

from metarun.algorithms.protonet import ProtoNet
from metarun.backbones.bag import Bag
from metarun.datasets.text import published
from metarun.datasets.text.base import readable
from metarun.datasets.text.phrases import Phrases
from metarun.datasets.text.published import PUBLISHED, PublishedTexts
from metarun.datasets.text.store import Languages, TextStore
from metarun.datasets.text.texts import Texts
from metarun.datasets.text.tokens import BUCKETS, Tokens, normalised, words
from metarun.errors import ConfigError, DataError
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.sampling import seeded

pytestmark = pytest.mark.quick
TOKENS = Tokens((), 8)


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),  # combining vowels
        ("Jọ̀wọ́ bá mi!", ["jọ̀wọ́", "bá", "mi", "!"]),  # tone marks that have no letter of their own
        ("สวัสดีครับ", ["สวัสดีครับ"]),
        ("مرحبا، عالم", ["مرحبا", "،", "عالم"]),
        ("I'm 24/7 in STRASSE/straße", ["i", "'", "m", "24", "/", "7", "in", "strasse", "/", "strasse"]),
        ("ｆｕｌｌ ﬁn", ["full", "fin"]),
        ("ok👍🏽go", ["ok", "👍", "🏽", "go"]),
        ("\u200f\ufeff \n\t", ["\u200f\ufeff"]),
    ],
)
def test_words_keep_marks_and_part_with_punctuation(text, wanted):
    assert words(normalised(text)) == [normalised(word) for word in wanted]


def test_tokens_are_the_same_for_the_same_words_whatever_is_around_them():
    ids, lengths = Tokens((3,), 12).encode(["Card", "my card, card", "x " * 100])
    own = ids[0, ids[0] > 0].tolist()  # the word, and <ca car ard rd>
    assert len(own) == 5 == lengths[0] and len(set(own)) == 5 and min(own) > 0 and max(own) < BUCKETS
    assert ids[1].tolist()[-5:] != own and own == ids[1].tolist()[3:8]
    assert lengths[2] == 200 and (ids[2] > 0).all()


def write(path: Path, text: str) -> str:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


ROWS = {f"class {i}": [f"text {i} {j}" for j in range(4)] for i in range(8)}
LINES = [(label, text) for label, texts in ROWS.items() for text in texts]


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.csv", "text,label\n" + "".join(f"{t},{c}\n" for c, t in LINES)),
        ("a.csv", "\ufefflabel;other;text\r\n" + "".join(f'{c};1;"{t}"\r\n' for c, t in LINES)),
        ("a.csv", "label\ttext\n" + "".join(f"{c}\t{t}\n\n" for c, t in LINES)),
        ("a.tsv.gz", "label\ttext\n" + "".join(f"{c}\t {t} \n" for c, t in LINES)),
        ("a.jsonl", "\n".join(json.dumps({"text": t, "label": c}) for c, t in LINES)),
    ],
)
def test_files_of_every_form_give_the_same_splits(tmp_path, name, text, capsys):
    dataset = Texts(root=write(tmp_path / name, text))
    stores = {split: dataset.split(split) for split in dataset.splits()}
    assert {s: len(store.names) for s, store in stores.items()} == {"train": 4, "validation": 2, "test": 2}
    assert sorted(text for store in stores.values() for text in store.texts) == sorted(t for _, t in LINES)
    assert "8 classes split 4/2/2" in "".join(capsys.readouterr())
    assert len(dataset.load("all").names) == 8
    trainval = [name for split in ("train", "validation") for name in stores[split].names]
    assert dataset.load("trainval").names == trainval


def test_class_folders_of_text_files_and_a_column_of_splits(tmp_path):
    for label, texts in ROWS.items():
        (tmp_path / "own" / label).mkdir(parents=True)
        for i, text in enumerate(texts):
            (tmp_path / "own" / label / f"{i}.txt").write_text(f"{text}\n", "utf-8")
    whole = Texts(root=str(tmp_path / "own")).load("all")
    assert sorted(whole.texts) == sorted(text for _, text in LINES)
    lines = [f"{t},{c},{'dev' if c < 'class 3' else 'TEST'}" for c, t in LINES]
    split = Texts(root=write(tmp_path / "split.csv", "\n".join(["text,label,split", *lines])))
    assert split.splits() == ("validation", "test")
    assert split.split("validation").names == ["class 0", "class 1", "class 2"]
    with pytest.raises(DataError, match="has no classes for train, but for validation, test"):
        split.split("train")


@pytest.mark.parametrize(
    "name, text, message",
    [
        ("a.csv", "text,label\nx,a\ny,b,c\n", "a.csv, line 3: has 3 fields, and 2 are expected"),
        ("a.csv", 'text,label\n"one\ntwo",a\n ,b\n', "a.csv, line 4: its text is empty"),
        ("a.csv", "text,label\nx,\n", "a.csv, line 2: its label is empty"),
        ("a.csv", 'text,label\n"x,a\ny,b\n', "a.csv, line 2: .*check its quotes"),
        ("a.csv", "words,label\nx,a\n", "no column 'text', but 'words', 'label'; set dataset.text=COLUMN"),
        ("a.csv", "text,label,split\nx,a,train\ny,a,test\n", "line 3: class 'a' is in train and in test"),
        ("a.csv", "text,label,split\nx,a,later\n", "line 2: split 'later' must be train, validation or test"),
        ("a.csv", "text,label,text\nx,a,y\n", "a.csv, line 1: two columns are named 'text'; rename one"),
        ("a.jsonl", '{"text": null, "label": "a"}\n', "a.jsonl, line 1: its text is empty"),
        ("a.csv", "", "a.csv: has no texts"),
        ("a.csv", "text,label\n", "a.csv: has no texts"),
        ("a.jsonl", '{"text": "x", "label": "a"}\n[1]\n', "a.jsonl, line 2: is not an object"),
        ("a.jsonl", "{\n", "a.jsonl, line 1: is not JSON"),
        ("a.tsv.gz", None, "a.tsv.gz: cannot be read"),
        ("a.docx", "x", "a.docx: is not a .csv, .tsv"),
        ("folder", None, "folder: has no class folders of .txt files"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_line(tmp_path, name, text, message):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif text is None:
        path.write_bytes(b"not gzip")
    else:
        write(path, text)
    with pytest.raises(DataError, match=message) as caught:
        Texts(root=str(path)).split("test")
    assert "\n" not in str(caught.value)


def test_languages_that_are_not_there_are_one_line(tmp_path):
    root = write(tmp_path / "a.csv", "text,label\nx,a\ny,b\n")
    with pytest.raises(DataError, match=r"no column 'tongue', .*; set dataset.language=COLUMN"):
        Texts(root=root, language="tongue").splits()
    with pytest.raises(DataError, match="has no texts in 'eng'; it has no languages; leave the setting out"):
        Texts(root=root, support_language="eng").split("test")
    with pytest.raises(ConfigError, match=r"dataset.languages=\[\]: name at least one language"):
        PublishedTexts(name="injongo", languages=[])


def test_text_that_is_not_utf8_names_its_line(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"text,label\nok,a\ncaf\xe9,b\n")
    with pytest.raises(DataError, match=r"a.csv, line 3: is not UTF-8 text"):
        Texts(root=str(tmp_path / "a.csv")).splits()


def test_a_million_characters_and_many_lines_are_read_in_time(tmp_path):
    lines = [f"text number {i % 977} of class {i % 50},c{i % 50}" for i in range(5_000)]
    lines += [f"{'long ' * 200_000},c{i}" for i in range(2)]
    began = time.process_time()
    store = Texts(root=write(tmp_path / "a.csv", "\n".join(["text,label", *lines]))).load("all")
    assert len(store.texts) == 5_002 and max(store.lengths) > 200_000
    assert time.process_time() - began < 30  # one second


def test_descriptions_take_the_place_of_shots_or_join_them():
    corpus = {f"c{i}": {"": [f"word{i} again{j}" for j in range(3)]} for i in range(4)}
    store = TextStore(corpus, [f"about word{i}" for i in range(4)], TOKENS, "made test")
    shape = EpisodeShape(3, 0, 2)
    draw = store.draw(2, shape, seeded("a"))
    tasks = store.gather(draw, shape)
    assert tasks.support_x.shape == (2, 3, 8) and tasks.query_x.shape == (2, 6, 8)
    assert torch.equal(tasks.support_y, torch.arange(3).expand(2, -1))
    expected = TOKENS.encode([f"about word{i}" for i in tasks.classes[1].tolist()])[0]
    assert torch.equal(tasks.support_x[1], expected.long())
    joined = TextStore(corpus, store.descriptions, TOKENS, "made test", names_as_shots=True)
    both = joined.gather(joined.draw(2, EpisodeShape(3, 1, 2), seeded("a")), EpisodeShape(3, 1, 2))
    assert both.support_y.tolist() == [[0, 1, 2, 0, 1, 2]] * 2
    two = torch.tensor([[0, 1]]), torch.tensor([[[2, 0], [1, 0]]])  # of the classes that are kept
    rows = store.keeping([1, 3]).examples(two, EpisodeShape(2, 1, 1))
    assert [row["text"] for row in rows] == ["word1 again2", "word1 again0", "word3 again1", "word3 again0"]
    assert not any("description" in line for line in store.remarks())
    alike = TextStore(corpus, ["one", "Two", "two", "three"], TOKENS, "made test")
    assert "2 classes have the description of another one, such as 'Two'" in " ".join(alike.remarks())


@pytest.mark.parametrize("support, query", [((), ()), (("b",), ("a",)), (("a", "b"), ("b",)), (("a",), ())])
def test_support_and_queries_are_in_the_languages_of_a_task(support, query):
    corpus = {f"c{i}": {lang: [f"{lang} {i} {j}" for j in range(5 + i)] for lang in "abc"} for i in range(4)}
    store = TextStore(corpus, list(corpus), TOKENS, "made test", languages=Languages(support, query))
    shape = EpisodeShape(3, 2, 3)
    store.check(shape)
    classes, places = store.draw(60, shape, seeded("x"))
    numbers = store.starts[classes].unsqueeze(-1) + places
    seen = set()
    for task, own in zip(numbers, classes, strict=True):
        texts = [[store.texts[i].split() for i in row] for row in task.tolist()]
        ours = {text[0] for row in texts for text in row[:2]}
        theirs = {text[0] for row in texts for text in row[2:]}
        assert len(ours) == len(theirs) == 1
        assert [row[0][1] for row in texts] == [str(k) for k in own.tolist()]
        assert all(len({tuple(text) for text in row}) == 5 for row in texts)
        seen.add((*ours, *theirs))
    ours = support or ("a", "b", "c")
    assert seen == {(s, q) for s in ours for q in (query or (s,))}
    with pytest.raises(DataError, match=r"class 'c0' of made test has 5 in"):
        store.check(EpisodeShape(3, 3, 3))
    few = {label: texts | {"c": ["alone"]} for label, texts in corpus.items()}
    store = TextStore(few, list(few), TOKENS, "made test", languages=Languages(support, query))
    with contextlib.nullcontext() if support else pytest.raises(DataError, match="has 1 in c"):
        store.check(shape)  # of the languages that are drawn only
    with pytest.raises(DataError, match="has no texts in 'd'; its languages are a, b, c"):
        TextStore(corpus, list(corpus), TOKENS, "made test", languages=Languages(("d",)))


def test_episodes_do_not_depend_on_how_texts_are_encoded():
    corpus = {f"c{i}": {"": [f"{i} {j}" for j in range(5)]} for i in range(4)}
    stores = [TextStore(corpus, list(corpus), each, "made test") for each in (TOKENS, Tokens((3,), 20))]
    assert stores[0].fingerprint == stores[1].fingerprint
    assert torch.equal(stores[0].marks, stores[1].marks)
    other = TextStore(corpus | {"c0": {"": ["x"]}}, list(corpus), TOKENS, "made test")
    assert other.fingerprint != stores[0].fingerprint


SIZES = {
    ("clinc150", 1): (50, 50, 50),
    ("clinc150", 5): (50, 50, 50),
    ("banking77", 3): (25, 25, 27),
    ("hwu64", 1): (16, 23, 25),
    ("liu57", 2): (18, 18, 18),
    ("huffpost", 1): (20, 5, 16),
    ("reuters", 1): (15, 5, 11),
    ("fewrel", 1): (65, 5, 10),
    ("injongo", 1): (20, 5, 15),
}


@pytest.mark.parametrize("name, fold", SIZES)
def test_published_splits_have_each_class_once(name, fold):
    splits = PublishedTexts(name=name, fold=fold).classes
    assert tuple(map(len, splits.values())) == SIZES[name, fold]
    assert len({label for labels in splits.values() for label in labels}) == sum(SIZES[name, fold])


def test_the_authors_files_are_downloaded_checked_and_read(tmp_path, monkeypatch):
    monkeypatch.setenv("METARUN_DATA", str(tmp_path))
    labels = [label for own in PublishedTexts(name="reuters").classes.values() for label in own]
    body = "".join(
        json.dumps({"raw": f"{label} {i}", "label": int(label[:2])}) + "\n"
        for label in labels
        for i in range(2)
    ).encode()
    with running() as server:
        server.files["reuters.json"] = body
        made = replace(
            PUBLISHED["reuters"], urls=(f"{server.url}reuters.json",), md5=(hashlib.md5(body).hexdigest(),)
        )
        monkeypatch.setitem(published.PUBLISHED, "reuters", made)
        store = PublishedTexts(name="reuters").split("test")
        assert len(store.names) == 11 and store.texts[0] == f"{store.names[0]} 0"
        server.files["reuters.json"] = body[:-5]
        (tmp_path / "reuters" / "reuters.json").unlink()
        with pytest.raises(DataError, match="md5"):
            PublishedTexts(name="reuters").split("test")
    with pytest.raises(DataError, match=r"is not at .*, and dataset.download=false"):
        PublishedTexts(name="reuters", download=False).split("test")
    with pytest.raises(DataError, match=r"has no reuters.tsv or reuters.tsv.gz"):
        PublishedTexts(name="reuters", root=str(tmp_path)).split("test")
    write(tmp_path / "reuters.tsv", "00 acquisitions\tonly this\n")
    with pytest.raises(DataError, match=r"reuters.tsv: has no texts of class '01 aluminium'"):
        PublishedTexts(name="reuters", root=str(tmp_path)).split("test")


def test_names_of_classes_as_words():
    names = {
        "next_holiday": "next holiday",
        "lists/remove": "lists remove",
        "5 stars": "5 stars",
        "top 10 songs": "top 10 songs",
    }
    assert {name: readable(name) for name in names} == names
    huffpost = PublishedTexts(name="huffpost")  # whose classes are numbered by its publishers
    assert huffpost.description_of("00 STYLE & BEAUTY") == "STYLE & BEAUTY"


def test_phrases_are_the_same_everywhere_and_more_classes_keep_those_that_there_are():
    few, many = Phrases(test_classes=4, texts_per_class=6), Phrases(test_classes=7, texts_per_class=6)
    ours, theirs = few.split("test"), many.split("test")
    assert ours.texts == theirs.texts[: len(ours.texts)] and len(set(ours.texts)) > 20
    assert ours.texts != few.split("validation").texts[: len(ours.texts)]
    assert ours.texts != Phrases(test_classes=4, texts_per_class=6, seed=1).split("test").texts
    digest = hashlib.sha256("\n".join(ours.texts).encode()).hexdigest()
    assert digest.startswith("4df76dc28661bb99")  # and so with any version of NumPy


def test_phrases_in_several_languages_share_classes_and_some_words():
    store = Phrases(test_classes=30, texts_per_class=10, languages=4).split("test")
    assert store.spoken == ["ket", "mal", "oru", "zun"] and len(store.names) == 30
    ket, mal, _, zun = (set("".join(store.texts[i : i + 10])) for i in range(0, 40, 10))
    assert ket & set("αειοπτκ") and mal & set("аэиопт") and zun <= set("ptkbdgmnslrvaeiou ")

    def accuracy(store: TextStore, shots: int) -> float:
        """Of nearest means of the bags of n-grams, without any training."""
        shape = EpisodeShape(5, shots, 5)
        tasks = store.gather(store.draw(60, shape, seeded("a")), shape)
        method = ProtoNet(Bag(BUCKETS))
        return tasks.query(method.predictor(method.adapt(tasks), tasks)).scores["accuracy"].mean().item()

    within, across = store.speaking("zun", "zun"), store.speaking("zun", "ket")
    assert 0.4 < accuracy(within, 1) < 0.75 and accuracy(within, 5) > 0.7
    assert accuracy(across, 5) < 0.3  # another alphabet
    assert accuracy(within, 0) > 0.5  # the description of a class is in the first language


@pytest.mark.parametrize("name, sizes", [("hwu64", (16, 23, 25)), ("liu57", (18, 18, 18))])
def test_files_of_protaugment_are_read_as_they_are(tmp_path, name, sizes):
    """Lines of full.jsonl have the keys `sentence` and `label`, in either order, and labels such as a/b."""
    rows = []
    for labels in PublishedTexts(name=name).classes.values():
        rows += [{"sentence": f"set the {label}", "label": label} for label in labels]
        rows += [{"label": label, "sentence": f"now the {label} at 5am"} for label in labels]
    write(tmp_path / "full.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
    dataset = PublishedTexts(name=name, root=str(tmp_path))
    stores = [dataset.split(split) for split in ("train", "validation", "test")]
    assert tuple(len(store.names) for store in stores) == sizes
    assert all(len(store.texts) == 2 * len(store.names) for store in stores)
    assert stores[2].descriptions[0] == re.sub("[/_]", " ", stores[2].names[0])
