"""The tables of the two families are what the methods are."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from metarun.config.paths import CONF

DOCS = Path(__file__).resolve().parents[2] / "docs"


def load():
    spec = importlib.util.spec_from_file_location("family_table", DOCS / "family_table.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_documents_have_the_tables_and_the_tables_every_method():
    family = load()
    assert family.table() in (DOCS / "gradient_based.md").read_text()
    assert family.feature_table() in (DOCS / "feature_based.md").read_text()
    options = {path.stem for path in (CONF / "algorithm").glob("*.yaml")}
    assert options == set(family.METHODS) | set(family.FEATURES)
    assert not set(family.METHODS) & set(family.FEATURES)
