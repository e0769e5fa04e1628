"""Molecules as vectors: Morgan fingerprints of their SMILES strings, computed by RDKit once and cached."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metarun.datasets.tables.reading import Cells
from metarun.errors import ConfigError, DataError, counted
from metarun.reporting.console import Bar, inform
from metarun.storage.cached_arrays import Metadata, memmap_cached
from metarun.storage.files import encoded

BITS, RADIUS = 2048, 2  # of Morgan fingerprints (Rogers and Hahn 2010), as ECFP4
MANY = 500  # molecules, from which their fingerprints are kept in the cache
AT_ONCE = 250  # molecules between two updates of the progress
SHOWN = 3  # unreadable molecules that are named


class Fingerprints:
    """The fingerprints of molecules by their SMILES strings.

    Args:
        dataset: whose entries of the cache they are.
    """

    def __init__(self, dataset: str) -> None:
        self.dataset = dataset
        self.known: dict[str, np.ndarray] = {}  # packed bits

    def readable(self, cells: Cells, column: str) -> Cells:
        """The rows whose molecules have a fingerprint; a message names those that RDKit cannot read.

        Raises:
            ConfigError: RDKit is not installed.
            DataError: no row is left.
        """
        every = cells.column(column, "dataset.smiles")
        new = list(dict.fromkeys(each for each in every if each not in self.known))
        self.known |= self._cached(new, cells.path) if len(new) >= MANY else dict(computed(new))
        good = [row for row, each in enumerate(every) if each in self.known]
        bad = [row for row, each in enumerate(every) if each not in self.known]
        if not bad:
            return cells
        named = ", ".join(f"line {cells.lines[row]} ({every[row][:40]!r})" for row in bad[:SHOWN])
        what = (
            f"{counted(len(bad), 'molecule')} that RDKit cannot read: {named}{', ...' * (len(bad) > SHOWN)}"
        )
        if not good:
            raise DataError(
                f"{cells.path}: has only {what}; set dataset.smiles to the column of SMILES strings"
            )
        inform(f"{cells.path}: left out {what}")
        return cells.keeping(good)

    def of(self, smiles: Sequence[str]) -> Tensor:
        """The fingerprints of readable molecules, uint8 [molecules, BITS] of 0 and 1."""
        packed = np.stack([self.known[each] for each in smiles])
        return torch.from_numpy(np.unpackbits(packed, axis=1))

    def _cached(self, smiles: Sequence[str], source: Path) -> dict[str, np.ndarray]:
        """Fingerprints from the cache, where they are computed if they are missing."""
        digest = hashlib.sha256(encoded(f"morgan {BITS} {RADIUS}\0" + "\0".join(smiles))).hexdigest()

        def build(write: Callable[[bytes], object]) -> Metadata:
            readable = []
            with Bar(f"fingerprints of {self.dataset}", len(smiles), "molecules") as bar:
                for start in range(0, len(smiles), AT_ONCE):
                    part = smiles[start : start + AT_ONCE]
                    made = dict(computed(part))
                    readable += [start + i for i, each in enumerate(part) if each in made]
                    write(b"".join(packed.tobytes() for packed in made.values()))
                    bar.advance(len(part))
            return {"readable": readable}

        name, key = f"{self.dataset}-fingerprints-{digest[:24]}", f"{self.dataset} fingerprints {source}"
        content, made = memmap_cached(name, build, key, os.path.abspath(source))
        rows = content.numpy().reshape(-1, BITS // 8)
        return {smiles[i]: row for i, row in zip(made["readable"], rows, strict=True)}


def computed(smiles: Sequence[str]) -> list[tuple[str, np.ndarray]]:
    """The packed fingerprints of the molecules that RDKit can read. Raises ConfigError if it is missing."""
    try:
        from rdkit import Chem, rdBase
        from rdkit.Chem.rdFingerprintGenerator import GetMorganGenerator
    except ImportError:
        raise ConfigError(
            "molecules: their fingerprints need RDKit; install it by pip install 'metarun[molecules]'"
        ) from None
    generator = GetMorganGenerator(radius=RADIUS, fpSize=BITS)
    found = []
    with rdBase.BlockLogs():  # it would print a line for each molecule that it cannot read
        for each in smiles:
            if each and (molecule := Chem.MolFromSmiles(each)) is not None:
                found.append((each, np.packbits(generator.GetFingerprintAsNumPy(molecule))))
    return found
