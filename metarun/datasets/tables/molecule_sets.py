"""Published few-shot benchmarks of molecules: an assay is a task, active or inactive its labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from metarun.datasets.base import Split, at_least
from metarun.datasets.tables.table import Table
from metarun.errors import ConfigError, DataError
from metarun.storage.downloads import download
from metarun.storage.files import data_dir
from metarun.tasks.objectives import CLASSIFICATION, Objective

META_MGNN = "https://raw.githubusercontent.com/zhichunguo/Meta-MGNN/e72ee6508f24b8eb2e528153c50b44d6e717a53c"
DEEPCHEM = "https://raw.githubusercontent.com/deepchem/deepchem/fbe3b911a94a"


@dataclass(frozen=True)
class Source:
    """A set of molecules.

    Args:
        url: of the file.
        sha256: its SHA-256 sum.
        test: how many tasks, the last ones, are tested on in publications.
        drop: columns that are not tasks.
    """

    url: str
    sha256: str
    test: int
    drop: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the file."""
        return self.url.rpartition("/")[2]


#: Test tasks as in Meta-MGNN (Guo et al. 2021) and PAR (Wang et al. 2021).
SETS = {
    "tox21": Source(
        f"{META_MGNN}/Original_datasets/tox21/raw/tox21.csv",
        "7d7e7facd853a63e79ddce4e9c3fcb7a0d83a1c300b603031c0f2c64fbe77761",
        3,
        ("mol_id",),
    ),
    "sider": Source(
        f"{META_MGNN}/Original_datasets/sider/raw/sider.csv",
        "71efc6ac4ca82d6545bc512509863281be0f17234afd7adaf71a71899988302e",
        6,
    ),
    "muv": Source(
        f"{DEEPCHEM}/datasets/muv.csv.gz",
        "93c8b4a37c5996c76e57d5f3f065fb8b7cf1c19067011eff2293fd2a94ce274a",
        5,
        ("mol_id",),
    ),
    "toxcast": Source(
        f"{DEEPCHEM}/examples/toxcast/processing/toxcast_data.csv.gz",
        "56041515e0bb63c1787a26ecdbeb2bd7ae1f538681caa1b03f768853cf81b1a7",
        167,
    ),
}


class MoleculeSet(Table):
    """A set of molecules with a column of results (0, 1 or empty) for each of its tasks.

    The last tasks are tested on, as in publications, which train on all others and have no tasks for
    validation. Without any, the tasks that are trained on are validated: with `disjoint` on molecules
    that are new to them, otherwise the best iteration mostly is the last one.

    Args:
        name: of the set.
        root: the file, or the folder it is in. None: it is downloaded.
        disjoint, seed, learned: see `Table`. In publications, the molecules of test tasks were trained on in
            other tasks (`disjoint=False`).
        validation: the number of tasks to validate on, the last ones before those of the test.
        download: whether the file may be downloaded.
    """

    unread: ClassVar = {"seed": "disjoint=false"}

    def __init__(
        self,
        *,
        name: Literal["tox21", "sider", "muv", "toxcast"],
        root: str | None = None,
        disjoint: bool = False,
        validation: int = 0,
        seed: int = 0,
        download: bool = True,
        learned: str | None = None,
    ) -> None:
        at_least(0, validation=validation)
        self.source, self.kind = SETS[name], name
        super().__init__(
            root=root or str(data_dir() / name / self.source.name),
            tasks="columns",
            smiles="smiles",
            drop=list(self.source.drop),
            disjoint=disjoint,
            seed=seed,
            learned=learned,
        )
        self.validation, self.downloads = validation, download and root is None

    @property
    def objective(self) -> Objective:
        return CLASSIFICATION.choosing(["roc_auc"])

    @property
    def title(self) -> str:
        return self.kind

    def file(self, path: Path) -> Path:
        """The file, downloaded if necessary. Raises DataError."""
        if self.downloads:
            download(self.source.url, path, self.source.sha256)
        if path.is_dir():
            names = {self.source.name, f"{self.kind}.csv", f"{self.kind}.csv.gz"}
            if not (found := [path / name for name in sorted(names) if (path / name).is_file()]):
                raise DataError(f"{path}: has no {' or '.join(sorted(names))}; name the folder that has one")
            return found[0]
        if not path.exists():
            raise DataError(
                f"{path}: is missing; set dataset.root to the file from {self.source.url}, or leave out "
                "dataset.download=false"
            )
        return path

    def split_names(self, names: Sequence[str]) -> dict[Split, list[str]]:
        """The names of each split in the order of the file."""
        rest, test = list(names[: -self.source.test]), list(names[-self.source.test :])
        if self.validation >= len(rest):
            raise ConfigError(
                f"dataset.validation={self.validation}: {self.kind} has {len(rest)} tasks besides those of "
                f"the test; choose at most {len(rest) - 1}"
            )
        trained = len(rest) - self.validation
        return {"train": rest[:trained], "validation": rest[trained:] or rest, "test": test}
