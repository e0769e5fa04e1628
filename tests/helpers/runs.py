"""Small training runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import metarun

#: A training run of a few seconds; tests append to it.
TINY = [
    "dataset.train_classes=40",
    "dataset.validation_classes=10",
    "dataset.test_classes=20",
    "dataset.size=16",
    "hardware.compile=false",  # tracing a step takes longer than twelve of them,
    "hardware.tasks_at_once=8",  # and measuring the memory of a task longer than one
    "backbone.width=8",
    "iterations=12",
    "meta_batch=2",
    "validation.every=6",
    "validation.episodes=12",
    "test.episodes=20",
    "checkpoint.every=3",
    "log.every=3",
    "log.tensorboard=false",
    "hardware=cpu",
    "hardware.threads=1",
]

#: What some methods need further, to be as small.
SMALLER = {
    "meta_nas": [
        "backbone.cells=1",
        "backbone.nodes=1",
        "backbone.reductions=[0]",
        "inner_loop.test_steps=2",
    ]
}

#: The same without a test at the end.
UNTESTED = [*TINY, "test.episodes=0"]

#: A network that has learned to tell characters apart.
LEARNED = [
    "dataset.train_classes=200",
    "dataset.validation_classes=50",
    "dataset.test_classes=100",
    "backbone.width=16",
    "iterations=150",
    "validation.every=150",
    "validation.episodes=20",
    "test.episodes=200",
    "log.tensorboard=false",
    "hardware=cpu",
    "hardware.threads=1",
]


def some_quick(values: Iterable[str], *quick: str) -> list:
    """Values to parametrize a test by, a few of them marked `quick`."""
    return [pytest.param(value, marks=pytest.mark.quick) if value in quick else value for value in values]


def import_path() -> str:
    """PYTHONPATH of a new process: the metarun that is tested, then what is in it already."""
    before = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(Path(metarun.__file__).parents[1]), *([before] if before else [])])


class Died(BaseException):
    """Stands for kill -9: no handler, no checkpoint."""


def die() -> None:
    raise Died


def at_call(patch: pytest.MonkeyPatch, owner: object, name: str, count: int, action: Callable) -> None:
    """Call `action` before the call number `count` of a function."""
    calls, original = iter(range(1, 10**6)), getattr(owner, name)

    def wrapped(*args, **kwargs):
        if next(calls) == count:
            action()
        return original(*args, **kwargs)

    patch.setattr(owner, name, wrapped)
