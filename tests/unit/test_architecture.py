"""Imports run one way, and the documents name what exists."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterable
from pathlib import Path

import pytest

import metarun

pytestmark = pytest.mark.quick

PACKAGE = Path(metarun.__file__).parent
INNER = {"algorithms", "inner_loops", "backbones", "learner", "objectives", "episodes"}
FORBIDDEN = {
    "hydra",
    "omegaconf",
    "metarun.datasets",
    "metarun.trainer",
    "metarun.commands",
    "metarun.config",
    "metarun.build",
    "metarun.hardware",
    "metarun.tracking",
}
FILES = {"errors", "files", "locks", "downloads", "archives", "entries"}  # these know of no other room
HYDRA_ROOMS = {"cli", "commands", "config", "build", "explain", "sweep", "checkpoint"}


def imports(path: Path) -> set[str]:
    return names_in(ast.walk(ast.parse(path.read_text("utf-8"))))


def names_in(nodes: Iterable[ast.AST]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def offences(path: Path) -> list[str]:
    """The imports of a module that its room must not have."""
    names, own = imports(path), room(path)
    found = set()
    if own in INNER:
        found |= {name for name in names if any(name == f or name.startswith(f + ".") for f in FORBIDDEN)}
    if own in FILES:
        found |= {name for name in names if name.startswith("metarun.") and name.split(".")[1] not in FILES}
    if own not in HYDRA_ROOMS:
        found |= {name for name in names if name.split(".")[0] in ("hydra", "omegaconf")}
    return sorted(f"{path.relative_to(PACKAGE)} imports {name}" for name in found)


def test_imports_run_one_way():
    assert [offence for path in sorted(PACKAGE.rglob("*.py")) for offence in offences(path)] == []


def test_no_module_imports_itself_by_way_of_others():
    """But for imports within functions, which are made late."""
    paths = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
    }
    within = {
        name: names_in(ast.parse(path.read_text("utf-8")).body) & paths.keys() for name, path in paths.items()
    }
    graphlib.TopologicalSorter(within).prepare()


def test_no_algorithm_imports_a_sibling_but_a_variant_its_original():
    allowed = {
        (variant, "maml") for variant in ("reptile", "maml_plus_plus", "cavia", "proximal", "pretrain")
    }
    allowed |= {("proximal", "reptile"), ("metaoptnet", "r2d2")}
    shared = ("base", "embedded", "sequences")
    for path in (PACKAGE / "algorithms").glob("*.py"):
        for name in imports(path):
            if name.startswith("metarun.algorithms."):
                other = name.split(".")[2]
                assert other in (*shared, path.stem) or (path.stem, other) in allowed, (path.name, name)
