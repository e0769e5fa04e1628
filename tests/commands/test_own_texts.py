"""`dataset=texts` as a person types it: a trained model sees texts as in its training, or says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from metarun.commands.predictions import class_table
from metarun.reporting.console import shortened

TINY = ("hardware=cpu", "ways=2", "queries=2", "iterations=1", "validation.episodes=2", "test.episodes=0")
SMALL = (*TINY, "dataset=texts", "dataset.root=mine.tsv", "log.tensorboard=false", "hydra.run.dir=run")
FEW = ("episodes=2", "queries=2", "hardware=cpu", "trained_classes=keep")
WORDS = ["open", "close", "find", "card", "fee", "rate"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Texts, the vectors of their words, and descriptions of their classes."""
    rows = ["label\tsplit\ttext"]
    for number, word in enumerate(WORDS):
        split = ("train", "validation", "test")[number // 2]
        rows += [f"c{number}\t{split}\t{word} {other}" for other in WORDS[:4]]
    (tmp_path / "mine.tsv").write_text("\n".join(rows))
    lines = (f"{word} {i} 1 {i * i}\n" for i, word in enumerate(WORDS))
    (tmp_path / "words.txt").write_text("".join(lines))
    about = (f"c{number},about {word}\n" for number, word in enumerate(WORDS))
    (tmp_path / "about.csv").write_text("label,description\n" + "".join(about))
    return tmp_path


def refused(done) -> str:
    """The one line that says why a command ended."""
    (line,) = (line for line in done.stderr.splitlines() if "metarun: error" in line)
    return line


def test_other_vectors_or_descriptions_at_the_same_path_are_noticed(metarun, files: Path):
    metarun("train", *SMALL, "dataset.vectors=words.txt", "dataset.descriptions=about.csv")
    own = files / "own.csv"
    own.write_text("label,text\na,open\nb,fee\n")
    commands = (
        ("eval", "checkpoint=run", *FEW),
        ("eval", "checkpoint=run", "dataset=texts", "dataset.root=mine.tsv", *FEW),
        ("adapt", "checkpoint=run", "support=own.csv", 'query=["open"]'),
        ("train", "resume=run", "iterations=2"),
    )
    (files / "words.txt").rename(files / "moved.txt")
    moved = (files / "moved.txt").read_text()
    (files / "words.txt").write_text(moved.replace("open 0", "open 9"))
    for command in commands:
        assert "words.txt: is not the model that the run was trained with" in refused(
            metarun(*command, status=1)
        )
    for command in commands[2:]:
        metarun(*command, "dataset.vectors=moved.txt")
    about = (files / "about.csv").read_text()
    (files / "other.csv").write_text(about.replace("about open", "whatever"))
    resume = ("train", "resume=run", "iterations=3", "dataset.vectors=moved.txt")
    done = metarun(*resume, "dataset.descriptions=other.csv", status=1)
    assert "descriptions of its classes have changed since the run was started" in refused(done)


def test_a_trained_model_keeps_its_tokens(metarun, files: Path):
    metarun("train", *SMALL, "dataset.ngrams=[]")
    for place in ([], ["dataset=texts", "dataset.root=mine.tsv"]):
        done = metarun("eval", "checkpoint=run", *place, "dataset.ngrams=[3]", *FEW, status=1)
        assert "dataset.ngrams=[3]: the model was trained with dataset.ngrams=[]" in refused(done)
    done = metarun("eval", "checkpoint=run", "dataset.vectors=words.txt", *FEW, status=1)
    assert "the model was trained with dataset.vectors=null" in refused(done)
    places = {"same": ["dataset.length=256"], "other": ["dataset=texts", "dataset.root=copy.tsv"]}
    (files / "copy.tsv").write_text((files / "mine.tsv").read_text())
    scores = []
    for name, place in places.items():
        metarun("eval", "checkpoint=run", *place, *FEW, f"hydra.run.dir={name}")
        scores.append(json.loads((files / name / "results.json").read_text())["results"][0]["scores"])
    assert scores[0] == scores[1]


@pytest.mark.parametrize("known", ["", "transfer_via_contactless_payment"])
def test_names_of_classes_are_not_broken_on_eighty_columns(known: str):
    name = "transfer_via_contactless_payment"
    row = {"query": "a long text of a query " * 8, "prediction": name, "probability": 0.9, "class": known}
    console = Console(width=80)
    with console.capture() as captured:
        console.print(class_table([row]))
    lines = captured.get().splitlines()
    assert shortened(name, 20 if known else 32) in captured.get()
    assert all(line[-1] in "┓┩┫┃│┘┛" for line in lines[1:])
