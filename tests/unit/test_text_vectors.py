"""Texts as vectors of word vectors and of encoders: computed once, centred, and the same in every command."""

from __future__ import annotations

import gzip
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from metarun.backbones.adapter import Adapter
from metarun.datasets.text import base, encoder
from metarun.datasets.text.encoder import Encoder
from metarun.datasets.text.texts import Texts
from metarun.datasets.text.vectors import Vectors
from metarun.datasets.text.word_vectors import WordVectors
from metarun.errors import ConfigError, DataError
from metarun.training.checkpoint import is_plain

GLOVE = "the 1 0 0\nof 0 1 0\nbank 0 0 2\nn't 3 0 0\nn 0 9 9\nUS 0 5 0\nus 0 6 0\nParis 7 0 0\n"


@dataclass(frozen=True)
class Counting:
    """A model that counts letters a, b and c, and its own calls."""

    calls: list[int] = None  # type: ignore[assignment]
    width = 3
    source = ""
    mark = "letters"
    digest = "abc"
    setting = "vectors"

    def __hash__(self) -> int:
        return 0

    def at(self, other):
        return other

    def encode(self, texts):
        self.calls.append(len(texts))
        vectors = np.array([[text.count(letter) for letter in "abc"] for text in texts], np.float32)
        return vectors, np.array([[len(text), 1] for text in texts], np.int32)

    def remark(self, counts):
        return f"{int(counts.sum())} in all"


def written(folder: Path, text: str, name: str = "glove.txt") -> str:
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return str(path)


@pytest.mark.quick
def test_a_text_is_the_weighted_mean_of_its_words(tmp_path):
    """In a plain sum, with the weights of the places of the words in the file."""
    vectors, counts = WordVectors(written(tmp_path, GLOVE)).encode(
        ["The bank, ca n't", "US paris", "zzz", "of of the"]
    )

    def weight(rank: int) -> float:
        return 1e-4 / (1e-4 + 1 / (rank * (math.log(8) + 0.5772)))

    the, of, bank, nt, us, paris = map(weight, (1, 2, 3, 4, 7, 8))
    expected = [
        [the / 3 + nt, 0, 2 * bank / 3],  # "n't" is one word, and "bank," are two
        [7 * paris / 2, 6 * us / 2, 0],
        [0, 0, 0],
        [the / 3, 2 * of / 3, 0],
    ]
    assert counts.tolist() == [[5, 2], [2, 0], [1, 1], [3, 0]]
    np.testing.assert_allclose(vectors, expected, rtol=1e-6)


@pytest.mark.parametrize("name", ["a.vec", "a.txt", "a.txt.gz"])
def test_files_of_fasttext_and_compressed_ones_are_the_same(tmp_path, name):
    content = f"8 3\n{GLOVE}" if name == "a.vec" else GLOVE
    found, _ = WordVectors(written(tmp_path, content, name)).encode(["bank of us"])
    plain, _ = WordVectors(written(tmp_path, GLOVE)).encode(["bank of us"])
    np.testing.assert_array_equal(found, plain)
    assert WordVectors(str(tmp_path / name)).width == 3


def test_words_of_a_file_may_contain_spaces(tmp_path):
    """As some of GloVe 840B do."""
    vectors, _ = WordVectors(written(tmp_path, "the 1 0\n. . . 0 5\nbank 0 1\n")).encode(["bank"])
    assert vectors[0, 0] == 0 and vectors[0, 1] > 0


@pytest.mark.parametrize(
    "content, words",
    [
        ("", "has no word vectors"),
        ("8 3\n", "has no word vectors"),
        ("the 1 0\nof 1\n", "line 2: has 1 number, and the lines before it 2"),
        ("the 1 0\n\nof 1 2 3\n", "line 3: has 3 numbers"),
        ("the 1 0\nbank 1 x\n", "line 2: 'x' is not a finite number"),
        ("the 1 0\nbank 1 nan\n", "line 2: 'nan' is not a finite number"),
        ("the\n", "line 1: has no numbers"),
    ],
)
def test_files_that_are_not_as_expected_are_named_with_their_line(tmp_path, content, words):
    with pytest.raises(DataError, match=words) as error:
        WordVectors(written(tmp_path, content)).encode(["the bank of"])
    assert "glove.txt" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("what", ["missing", "folder", "binary", "cut"])
def test_other_files_are_refused_in_one_line(tmp_path, what):
    path = tmp_path / f"{what}.txt.gz"
    if what == "folder":
        path.mkdir()
    elif what == "binary":
        path = tmp_path / "a.bin"
        path.write_bytes(b"\xff\xfe\x00\x01" * 50)
    elif what == "cut":
        path.write_bytes(gzip.compress(GLOVE.encode())[:-9])
    with pytest.raises(DataError, match=path.name):
        WordVectors(str(path)).encode(["the"])


@pytest.fixture
def model(monkeypatch) -> Counting:
    """In place of the word vectors of a file."""
    made = Counting([])
    monkeypatch.setattr(base, "WordVectors", lambda path: made)
    return made


def file_of(folder: Path, name: str = "mine.tsv") -> str:
    path = folder / name
    rows = ["label\tlanguage\tsplit\ttext"]
    for number in range(6):
        split = ("train", "train", "train", "validation", "test", "test")[number]
        for i in range(4):
            rows.append(
                f"c{number}\t{'xy'[i % 2]}\t{split}\t{'a' * (number + 1)}{'b' * (i % 2)}{'c' * i} {name}"
            )
    path.write_text("\n".join(rows))
    return str(path)


def test_vectors_are_computed_once_for_all_splits_and_commands(tmp_path, model, monkeypatch):
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    options = {"root": file_of(tmp_path), "vectors": "x", "centred": False}
    dataset = Texts(**options)
    stores = {split: dataset.load(split) for split in ("train", "test", "all")}
    assert len(model.calls) == 1
    again = Texts(**options).split("test")
    assert len(model.calls) == 1
    torch.testing.assert_close(again.items, stores["test"].items, rtol=0, atol=0)
    for store in stores.values():
        expected, _ = model.encode(store.texts)
        expected /= np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(store.items.numpy(), expected, rtol=1e-6)
        assert store.spec.kind == "vectors" and store.item_shape == (3,)
        assert f"{store.name}: {sum(map(len, store.texts)) + len(store.texts)} in all" in store.remarks()
    (entry,) = (tmp_path / "cache").glob("texts-vectors-*.json")
    assert json.loads(entry.read_text())["dataset"] == "texts"


def test_the_mean_of_each_language_is_that_of_the_training_classes(tmp_path, model):
    dataset = Texts(root=file_of(tmp_path), vectors="x")
    plain = Texts(root=file_of(tmp_path), vectors="x", centred=False)
    train, test = plain.split("train"), plain.split("test")
    speaks_y = torch.tensor(["b" in text for text in train.texts])
    means = {False: train.items[~speaks_y].mean(0), True: train.items[speaks_y].mean(0)}
    expected = test.items - torch.stack([means["b" in text] for text in test.texts])
    torch.testing.assert_close(dataset.split("test").items, expected, rtol=0, atol=1e-5)
    # A name is in no known language, and a user's own texts need not be.
    described = plain.split("test").described_items - train.items.mean(0)
    torch.testing.assert_close(dataset.split("test").described_items, described, rtol=0, atol=1e-5)


def test_a_checkpoint_keeps_the_means_and_other_datasets_use_them(tmp_path, model):
    trained = Texts(root=file_of(tmp_path), vectors="x")
    kept = Texts(root=str(tmp_path / "gone.tsv"), vectors="x", **trained.decided)
    assert kept.preparation == replace(trained.preparation, digest="abc")
    other = Texts(root=file_of(tmp_path, "other.tsv"), ngrams=[]).prepared_like(kept.preparation)
    plain = Texts(root=file_of(tmp_path, "other.tsv"), vectors="x", centred=False)
    means = json.loads(trained.decided["learned"])["means"]
    spoken = ["y" if "b" in text else "x" for text in other.split("test").texts]
    expected = plain.split("test").items - torch.tensor([means[each] for each in spoken])
    torch.testing.assert_close(other.split("test").items, expected)
    support = tmp_path / "own.csv"
    support.write_text("label,language,text\na,y,aab\nb,,cca\n")
    own = kept.own_task(support, '["aab", "cca"]')
    vectors = torch.nn.functional.normalize(torch.tensor([[2.0, 1, 0], [1, 0, 2]]))
    expected = vectors - torch.tensor([means["y"], means[""]])
    torch.testing.assert_close(own.support_x[0], expected)
    assert own.query_x is not None
    torch.testing.assert_close(own.query_x[0], vectors - torch.tensor(means[""]))


def test_the_means_of_many_languages_fit_into_a_checkpoint():
    """Of an encoder with 1,024 numbers, in the languages of injongo."""
    means = json.dumps({f"l{i}": torch.rand(1024, dtype=torch.float64).tolist() for i in range(17)})
    assert is_plain({"dataset": {"learned": Vectors(WordVectors("x"), means).dumps()}})


def test_another_dataset_says_where_the_model_of_training_is_now(tmp_path):
    here, there = (written(tmp_path, GLOVE, name) for name in ("here.txt", "there.txt"))
    trained = Texts(root="x", vectors=here, learned='{"": [1, 2, 3]}').preparation
    moved = Texts(root="x", vectors=there).prepared_like(trained).preparation
    assert moved == Vectors(WordVectors(there), '{"": [1, 2, 3]}')
    tokens = Texts(root="x").preparation
    assert Texts(root="x", vectors=there).prepared_like(tokens).spec.item_shape == (256,)


def test_settings_that_do_not_fit_are_refused(tmp_path):
    for settings in ({"centred": True}, {"vectors": "a", "encoder": "b"}):
        with pytest.raises(ConfigError, match="leave"):
            Texts(root="x", **settings)
    only_test = tmp_path / "few.tsv"
    only_test.write_text("label\ttext\na\ta\nb\tb\n")
    with pytest.raises(DataError, match="no training classes"):
        Texts(root=str(only_test), vectors=written(tmp_path, GLOVE)).split("test")
    wrong = Vectors(WordVectors(written(tmp_path, GLOVE)), json.dumps({"": [1.0]}))
    with pytest.raises(ConfigError, match="learned"):
        wrong.encode(["the"])


@pytest.mark.quick
def test_an_adapter_starts_as_the_directions_of_the_vectors():
    x = torch.randn(4, 5)
    network = Adapter((5,), hidden=7)
    torch.testing.assert_close(network(x), 3 * torch.nn.functional.normalize(x))
    assert network(torch.zeros(1, 5)).abs().sum() == 0
    with pytest.raises(ConfigError, match="takes vectors"):
        Adapter((3, 28, 28))


def folder_like(folder: Path, **content: object) -> Path:
    """A folder with a config.json."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 8, **content}))
    return folder


def test_an_encoder_says_what_it_needs(tmp_path, monkeypatch):
    folder = folder_like(tmp_path / "model")
    assert Encoder(str(folder), 16).width == 8
    with pytest.raises(DataError, match="safetensors"):
        Encoder(str(folder), 16).encode(["a"])
    (folder / "model.safetensors").write_bytes(b"damaged")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'metarun\[text\]'"):
        Encoder(str(folder), 16).encode(["a"])
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"pip install 'metarun\[text\]'"):
        encoder.folder_of("nobody/no-such-model")
    for name in (str(tmp_path / "no"), str(folder / "config.json"), "./no"):
        with pytest.raises(DataError, match="is not a folder"):
            encoder.folder_of(name)
    for text, words in (("[]", "not a JSON object"), ("{", "is not JSON"), ("{}", "no hidden_size")):
        (folder / "config.json").write_text(text)
        with pytest.raises(DataError, match=words):
            Encoder(str(folder), 16).width  # noqa: B018
    (folder / "config.json").unlink()
    with pytest.raises(DataError, match="no such file"):
        Encoder(str(folder), 16).width  # noqa: B018


TEXTS = ["we open an account", "card", "a card a card a card a card a card", "lost it"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    """A small BERT with random weights, as transformers writes it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *" ".join(TEXTS).split()]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    settings = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=30, max_position_embeddings=16, **settings)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("first", [False, True])
def test_vectors_are_the_outputs_of_transformers(bert, first):
    transformers = pytest.importorskip("transformers")
    (bert / "1_Pooling").mkdir(exist_ok=True)
    (bert / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": first}))
    state = torch.get_rng_state()
    vectors, counts = Encoder(str(bert), 8).encode(TEXTS)
    assert torch.equal(torch.get_rng_state(), state)  # a run is the same whether vectors were cached or not
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    network = transformers.AutoModel.from_pretrained(bert).eval()
    for text, vector in zip(TEXTS, vectors, strict=True):  # alone, so without padding
        inputs = tokenizer(text, truncation=True, max_length=8, return_tensors="pt")
        with torch.no_grad():
            outputs = network(**inputs).last_hidden_state[0]
        expected = outputs[0] if first else outputs.mean(0)
        np.testing.assert_allclose(vector, expected.numpy(), atol=1e-6)
    assert counts.tolist() == [[6, 0], [3, 0], [12, 4], [4, 0]]


def test_a_text_is_cut_to_what_the_model_takes(bert):
    long = Encoder(str(bert), 1000)
    vectors, counts = long.encode([" ".join(["card"] * 50)])
    assert counts.tolist() == [[52, 52 - 16]] and np.isfinite(vectors).all()


@pytest.mark.parametrize("what", ["damaged", "another", "kind"])
def test_folders_that_are_no_encoders_are_one_line(bert, tmp_path, what):
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    if what == "damaged":
        (folder / "model.safetensors").write_bytes((bert / "model.safetensors").read_bytes()[:100])
    elif what == "another":
        content = json.loads((bert / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**content, "num_hidden_layers": 3}))
    else:
        folder_like(folder, model_type="no_such_kind", hidden_size=12)
    with pytest.raises(DataError, match="model: ") as error:
        Encoder(str(folder), 8).encode(TEXTS)
    assert "\n" not in str(error.value)


@pytest.mark.long
@pytest.mark.skipif("METARUN_TEST_ENCODER" not in os.environ, reason="METARUN_TEST_ENCODER names no folder")
def test_a_real_encoder_knows_what_is_alike():
    vectors, _ = Encoder(os.environ["METARUN_TEST_ENCODER"], 64).encode(
        ["I lost my bank card", "my debit card is gone", "what is the weather tomorrow"]
    )
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert unit[0] @ unit[1] > unit[0] @ unit[2] + 0.2
