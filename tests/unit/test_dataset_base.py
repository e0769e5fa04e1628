"""What datasets share: the base classes, splits by digest, range checks."""

from __future__ import annotations

import hashlib
import importlib
import pkgutil

import pytest
import torch

from metarun import datasets
from metarun.datasets.base import (
    Dataset,
    ImageDataset,
    Split,
    and_more,
    at_least,
    by_digest,
    select,
    split_by_digest,
)
from metarun.errors import ConfigError
from metarun.tasks.class_store import ClassStore

NAMES = [f"class {i}" for i in range(20)] + ["Ф ы 猫"]


class Grey(ImageDataset):
    """Twenty classes of one image each."""

    def split(self, name: Split, device: torch.device | str = "cpu") -> ClassStore:
        return ClassStore(torch.zeros(20, *self.item_shape, dtype=torch.uint8), [1] * 20, NAMES[:20], name)


def test_every_dataset_derives_from_the_base_class():
    modules = [module.name for module in pkgutil.iter_modules(datasets.__path__)]
    classes = {
        cls
        for name in modules
        for cls in vars(importlib.import_module(f"metarun.datasets.{name}")).values()
        if isinstance(cls, type) and cls.__module__.startswith("metarun.datasets") and hasattr(cls, "split")
    }
    assert {"Omniglot", "Glyphs", "Sinusoid", "Mixture", "Cub"} <= {cls.__name__ for cls in classes}
    assert all(issubclass(cls, Dataset) for cls in classes)


def test_a_dataset_of_ones_own_needs_a_shape_and_splits():
    class Half(Dataset):
        item_shape = (1, 2, 2)

    with pytest.raises(TypeError, match="abstract"):
        Half()  # type: ignore[abstract]
    whole = Grey(size=5, channels=1)
    assert whole.item_shape == (1, 5, 5)
    assert whole.reshaped((3, 8, 8)) is whole
    assert not whole.drawings


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "28"])
def test_a_size_out_of_range(size):
    with pytest.raises(ConfigError, match=rf"^dataset\.size={size!r}: choose a whole number of at least 1$"):
        Grey(size=size)


def test_settings_out_of_range():
    at_least(0, seed=0, classes=[0, 3])
    with pytest.raises(ConfigError, match=r"^dataset\.classes=\[5, 0\]: choose whole numbers of at least 1$"):
        at_least(1, size=1, classes=[5, 0])


@pytest.mark.parametrize("seed", ["", "0 ", "1 "])
def test_the_order_of_digests_is_the_published_one(seed: str):
    digests = {hashlib.sha256((seed + name).encode()).hexdigest(): name for name in NAMES}
    order = [digests[digest] for digest in sorted(digests)]
    assert by_digest(reversed(NAMES), seed) == order
    assert split_by_digest(NAMES, (4, 2, 3), seed) == {
        "test": sorted(order[:3]),
        "validation": sorted(order[3:5]),
        "train": sorted(order[5:9]),
    }


def test_some_classes_of_a_store():
    images = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1)
    chosen, counts = select(ClassStore(images, [1, 2, 3], ["a", "b", "c"], "abc"), ["c", "a"])
    assert chosen.flatten().tolist() == [3, 4, 5, 0]
    assert counts == [3, 1]


def test_missing_names_in_a_message():
    assert and_more(["a"]) == "a"
    assert and_more(["a"] * 1201) == "a and 1,200 more"
