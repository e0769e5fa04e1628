"""Molecules: fingerprints and their cache, the published sets, and what is kept out of training."""

from __future__ import annotations

import gzip
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from metarun.config.comments import facts
from metarun.config.paths import CONF
from metarun.datasets.tables import molecules
from metarun.datasets.tables.molecule_sets import SETS, MoleculeSet
from metarun.datasets.tables.molecules import BITS
from metarun.datasets.tables.table import Table
from metarun.errors import ConfigError, DataError
from metarun.storage.cache import cache_entries
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.sampling import seeded

pytestmark = pytest.mark.quick
TASKS = 12


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """In the place of RDKit, which need not be installed: every molecule it was asked for, "X" unreadable."""
    asked: list[str] = []

    def computed(smiles):
        asked.extend(smiles)
        draws = (
            (each, np.random.default_rng(zlib.crc32(each.encode()))) for each in smiles if "X" not in each
        )
        return [(each, draw.integers(0, 256, BITS // 8, np.uint8)) for each, draw in draws]

    monkeypatch.setattr(molecules, "computed", computed)
    monkeypatch.setattr(molecules, "MANY", 20)
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path / "cache"))
    return asked


def written(folder: Path, rows: int = 60) -> Path:
    """A file like Tox21's."""
    names = [f"SR-{i}" for i in range(TASKS)]
    lines = [",".join([*names, "mol_id", "smiles"])]
    for row in range(rows):
        cells = ["" if (row + i) % 5 == 0 else str((row + i) % 2) for i in range(TASKS)]
        lines.append(",".join([*cells, f"TOX{row}", f"{'X' if row in (3, 9) else 'C' * (row + 1)}"]))
    path = folder / "tox21.csv"
    path.write_text("\n".join(lines))
    return path


def test_the_published_protocol_and_molecules_kept_out_of_training(stub, tmp_path, capsys):
    dataset = MoleculeSet(name="tox21", root=str(written(tmp_path)))
    sources = {split: dataset.split(split) for split in dataset.splits()}
    message = " ".join(capsys.readouterr().err.split())
    assert "left out 2 molecules that RDKit cannot read: line 5 ('X'), line 11 ('X')" in message
    assert [source.tasks for source in sources.values()] == [  # type: ignore[attr-defined]
        [f"SR-{i}" for i in own] for own in (range(9), range(9), (9, 10, 11))
    ]
    held_out = MoleculeSet(name="tox21", root=str(tmp_path), validation=2)
    assert [len(held_out.split(split).tasks) for split in held_out.splits()] == [7, 2, 3]  # type: ignore[attr-defined]
    shared = [set(source.rows) for source in sources.values()]  # type: ignore[attr-defined]
    assert len(shared[0] & shared[2]) > 50
    apart = MoleculeSet(name="tox21", root=str(tmp_path), disjoint=True)
    rows = [set(apart.split(split).rows) for split in apart.splits()]  # type: ignore[attr-defined]
    assert not rows[0] & (rows[1] | rows[2]) and abs(len(rows[0]) - len(rows[2])) < 5
    shape = EpisodeShape(2, 2, 3)
    episodes = sources["test"].gather(sources["test"].draw(2, shape, seeded("x")), shape)
    assert episodes.support_x.shape == (2, 4, BITS) and episodes.support_x.dtype == torch.float32
    assert episodes.objective.metrics[0].name == "roc_auc"


def test_fingerprints_are_computed_once(stub, tmp_path, capsys):
    path = written(tmp_path)
    first = MoleculeSet(name="tox21", root=str(path))
    items = first.items
    assert len(stub) == len(set(stub)) == 59  # "X" twice
    assert [entry.dataset for entry in cache_entries()] == ["tox21"]
    stub.clear()
    again = MoleculeSet(name="tox21", root=str(path), learned=first.decided["learned"])
    assert again.item_shape == (BITS,)
    torch.testing.assert_close(again.items, items)
    assert not stub
    support = tmp_path / "support.csv"
    support.write_text("smiles,label\nCC,1\nN,0\n")
    own = again.own_task(support, str(support))
    assert stub == ["N"] and own.query_names == ["CC", "N"] and own.classes == ["0", "1"]
    torch.testing.assert_close(own.support_x[0, 0].byte(), items[1])


def test_molecules_beside_other_columns(stub, tmp_path):
    lines = [
        "assay,smiles,dose,active",
        *(f"a{i % 4},{'C' * (i + 1)},{i / 3:.2f},{i // 4 % 2}" for i in range(40)),
    ]
    (tmp_path / "own.csv").write_text("\n".join(lines))
    dataset = Table(root=str(tmp_path / "own.csv"), task="assay", label="active", smiles="smiles")
    assert dataset.item_shape == (1 + BITS,) and dataset.items.dtype == torch.float32
    assert set(dataset.items[:, 1:].unique().tolist()) == {0.0, 1.0}


def test_muv_is_read_as_it_is_published(stub, tmp_path):
    """Its tasks come first, then an identifier and the SMILES string; most results are missing."""
    tasks = [f"MUV-{i}" for i in range(17)]
    lines = [",".join([*tasks, "mol_id", "smiles"])]
    for i in range(68):
        results = ["" if (i + task) % 4 else str((i // 4 + task) % 2) for task in range(17)]
        lines.append(",".join([*results, f"CID{i}", f"C{i}"]))
    path = tmp_path / "muv.csv.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    dataset = MoleculeSet(name="muv", root=str(path))
    assert dataset.split("train").tasks == tasks[:12] and dataset.split("test").tasks == tasks[12:]
    dataset.split("test").check(EpisodeShape(2, 1, 2))
    assert dataset.spec.item_shape == (BITS,)


def test_mistakes(stub, tmp_path):
    with pytest.raises(ConfigError, match=r"dataset\.validation=9: tox21 has 9 tasks besides"):
        MoleculeSet(name="tox21", root=str(written(tmp_path)), validation=9).splits()
    with pytest.raises(DataError, match=r"has no sider\.csv or sider\.csv\.gz"):
        MoleculeSet(name="sider", root=str(tmp_path)).splits()
    with pytest.raises(DataError, match=r"tox21\.csv: is missing; set dataset.root to the file from https"):
        MoleculeSet(name="tox21", root=str(tmp_path / "no/tox21.csv")).splits()
    (tmp_path / "bad.csv").write_text("smiles,a,b\nX,1,0\nXX,0,1\n")
    with pytest.raises(DataError, match="has only 2 molecules that RDKit cannot read"):
        Table(root=str(tmp_path / "bad.csv"), tasks="columns", smiles="smiles").splits()


def test_without_rdkit_a_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(ConfigError, match=r"pip install 'metarun\[molecules\]'"):
        molecules.computed(["CC"])


def test_fingerprints_are_those_of_rdkit():
    pytest.importorskip("rdkit", reason="RDKit is not installed: pip install 'metarun[molecules]'")
    from rdkit.Chem import AllChem, MolFromSmiles

    found = dict(molecules.computed(["CCO", "not a molecule", "c1ccccc1O", ""]))
    assert list(found) == ["CCO", "c1ccccc1O"]
    for smiles, packed in found.items():
        expected = list(AllChem.GetMorganFingerprintAsBitVect(MolFromSmiles(smiles), 2, 2048))
        assert np.unpackbits(packed).tolist() == expected


def test_every_set_has_an_option():
    for name, source in SETS.items():
        stated = facts(CONF / "dataset" / f"{name}.yaml")
        assert int(stated["classes"].split(" ")[4]) == source.test and len(source.sha256) == 64
