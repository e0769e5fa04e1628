"""Tasks of several datasets, and images converted to a model's size and channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from metarun.config.build import build_dataset
from metarun.config.check import check_node
from metarun.datasets.base import Dataset, Split
from metarun.datasets.glyphs import Glyphs
from metarun.datasets.mixture import Mixture
from metarun.datasets.sinusoid import Sinusoid
from metarun.errors import ConfigError, DataError, naming_part
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.objectives import ACCURACY
from metarun.tasks.resize import resized
from metarun.tasks.sampling import sample
from metarun.tasks.spec import TaskSpec
from metarun.training.evaluation import Result, interval, mean_of

pytestmark = pytest.mark.quick

GEOMETRY = EpisodeShape(3, 1, 2)


class Flat(Dataset):
    """Images of one level; `count` classes of `each` images."""

    def __init__(self, level: int, count: int, each: int, item_shape: tuple[int, int, int]) -> None:
        self.level, self.count, self.each = level, count, each
        self.shape = item_shape

    @property
    def spec(self) -> TaskSpec:
        return TaskSpec(self.shape)

    def split(self, name: Split, device: torch.device | str = "cpu") -> ClassStore:
        images = torch.full((self.count * self.each, *self.item_shape), self.level, dtype=torch.uint8)
        names = [str(i) for i in range(self.count)]
        return ClassStore(images, [self.each] * self.count, names, f"flat {self.level} {name}", device)


def mixture(weights: dict[str, float] | None = None, **settings) -> Mixture:
    datasets = {"dark": Flat(50, 4, 9, (1, 6, 6)), "light": Flat(200, 7, 5, (3, 8, 8))}
    return Mixture(datasets=datasets, parts=weights or {"dark": 1.0, "light": 3.0}, **settings)


def test_each_task_is_of_one_dataset_and_as_often_as_its_weight_says():
    store = mixture().split("train")
    assert store.item_shape == (3, 8, 8)
    assert len(store.names) == 11
    episodes = sample(store, 2000, GEOMETRY, torch.Generator().manual_seed(0))
    levels = torch.cat([episodes.support_x, episodes.query_x], 1).mul(255).round().flatten(1)
    assert torch.equal(levels.amin(1), levels.amax(1))
    light = levels[:, 0] == 200
    assert set(levels[:, 0].tolist()) == {50, 200}
    assert abs(light.float().mean() - 0.75) < 4 * (0.75 * 0.25 / 2000) ** 0.5
    assert torch.equal((episodes.classes >= 4).all(1), light)
    assert torch.equal((episodes.classes >= 4).any(1), light)
    # Within a dataset every class is as likely as the others.
    share = torch.bincount(episodes.classes[~light].flatten(), minlength=4)[:4] / (~light).sum()
    assert (share - 0.75).abs().max() < 4 * (0.75 * 0.25 / int((~light).sum())) ** 0.5


def test_its_parts_are_the_datasets_themselves_on_the_same_memory():
    store = mixture().split("test")
    alone = Flat(200, 7, 5, (3, 8, 8)).split("test")
    part = store.parts["light"]
    assert (part.fingerprint, part.names) == (alone.fingerprint, alone.names)
    assert torch.equal(part.items, alone.items)
    assert part.items.untyped_storage().data_ptr() == store.items.untyped_storage().data_ptr()
    assert store.parts["dark"].items.unique().tolist() == [50]
    assert store.fingerprint != mixture({"dark": 1.0, "light": 1.0}).split("test").fingerprint
    grey = store.resized((1, 4, 4))
    assert grey.item_shape == (1, 4, 4) == grey.parts["dark"].item_shape
    assert grey.parts["light"].fingerprint == part.fingerprint


def test_a_task_that_one_of_them_cannot_give_is_refused_by_name():
    store = mixture().split("train")
    store.check(EpisodeShape(4, 1, 4))
    with pytest.raises(DataError, match="flat 50 train has 4 classes"):
        store.check(EpisodeShape(5, 1, 1))
    with pytest.raises(DataError, match="of flat 200 train has 5"):
        store.check(EpisodeShape(2, 1, 5))


@pytest.mark.parametrize(
    ("weights", "settings", "says"),
    [
        ({"dark": 0.0}, {}, "weight must be above 0"),
        ({"dark": float("nan")}, {}, "weight must be above 0"),
        ({"dark": float("inf")}, {}, "weight must be above 0 and finite"),
        ({"other": 1.0}, {}, "other has no settings"),
        ({"dark": 1.0}, {"size": 0}, "dataset.size=0"),
    ],
)
def test_what_cannot_be_mixed(weights: dict, settings: dict, says: str):
    with pytest.raises(ConfigError, match=says):
        mixture(weights, **settings)
    with pytest.raises(ConfigError, match="of images, and sinusoid has vectors"):
        Mixture(datasets={"sinusoid": Sinusoid()}, parts={"sinusoid": 1.0})
    with pytest.raises(ConfigError, match="name datasets"):
        Mixture(datasets={}, parts={})


def test_weights_whose_sum_is_infinite_are_as_good_as_others():
    draws = [
        sample(mixture(weights).split("train"), 50, GEOMETRY, torch.Generator().manual_seed(0)).classes
        for weights in ({"dark": 1e308, "light": 1e308}, {"dark": 1.0, "light": 1.0})
    ]
    assert torch.equal(*draws)


class Noise(Flat):
    """Images of which conversion back and forth leaves nothing."""

    def split(self, name: Split, device: torch.device | str = "cpu") -> ClassStore:
        store = super().split(name, device)
        return store.with_items(torch.randint(0, 255, store.items.shape, dtype=torch.uint8))


def test_each_part_is_converted_once_from_its_own_pixels():
    torch.manual_seed(0)
    parts = {"fine": Noise(1, 4, 3, (1, 8, 8)), "large": Noise(2, 4, 3, (3, 16, 16))}
    dataset = Mixture(datasets=parts, parts={"fine": 1.0, "large": 1.0})
    assert dataset.item_shape == (3, 16, 16)
    shaped = dataset.reshaped((1, 8, 8))
    assert (shaped.item_shape, dataset.item_shape) == ((1, 8, 8), (3, 16, 16))
    torch.manual_seed(0)
    own = parts["fine"].split("test").items
    torch.manual_seed(0)
    assert torch.equal(shaped.split("test").parts["fine"].items, own)


@pytest.mark.parametrize("path", ["/data/dataset.root/x", "my dataset.zip"])
def test_a_part_names_its_settings_as_they_are_typed(path: str):
    with pytest.raises(DataError) as error, naming_part("own", ["root", "size"]):
        raise DataError(f"dataset.root={path}: gone; set dataset.size, dataset.rootless or dataset.download")
    assert str(error.value) == (
        f"dataset.settings.own.root={path}: gone; set dataset.settings.own.size, dataset.rootless "
        "or dataset.download"
    )


def node(target: str, **settings):
    parts = {"glyphs": {"_target_": target, **settings}}
    content = {"_target_": "metarun.datasets.mixture.Mixture", "parts": {"glyphs": 1.0}, "settings": parts}
    return OmegaConf.create(content)


def test_its_parts_are_checked_like_any_dataset_before_they_are_built():
    good = node("metarun.datasets.glyphs.Glyphs", size=12)
    check_node("dataset", good)
    built = build_dataset(good)
    assert isinstance(built.datasets["glyphs"], Glyphs)
    assert built.item_shape == (1, 12, 12)
    assert built.drawings
    for bad, says in (
        (
            node("subprocess.Popen", args="true"),
            "settings.glyphs._target_=subprocess.Popen: is not a metarun.datasets.base.Dataset",
        ),
        (
            node("metarun.datasets.glyphs.Glyphs", sise=3),
            "settings.glyphs.sise: glyphs has no setting 'sise'",
        ),
        (OmegaConf.merge(good, {"settings": {"x": 3}}), "settings.x: is not a dataset"),
        (OmegaConf.merge(good, {"datasets": {}}), "is set by metarun; leave it out"),
        (OmegaConf.merge(good, {"parts": {"glyphs": "much"}}), "must be names, each with a number"),
    ):
        with pytest.raises(ConfigError, match=says):
            check_node("dataset", bad)


def test_conversion_agrees_with_pillow():
    """A photograph-like image; Pillow's bilinear resampling is antialiased too."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(noise, (40, 40), mode="bicubic").clamp(0, 1)
    pixels = (255 * smooth).byte()
    image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    small = torch.from_numpy(np.asarray(image.resize((16, 16), Image.Resampling.BILINEAR)).copy())
    assert (resized(pixels, (3, 16, 16))[0].permute(1, 2, 0).int() - small.int()).abs().max() <= 2
    grey = torch.from_numpy(np.asarray(image.convert("L")).copy())
    assert (resized(pixels, (1, 40, 40))[0, 0].int() - grey.int()).abs().max() <= 1
    colour = resized(pixels[:, :1], (3, 40, 40))
    assert torch.equal(colour, pixels[:, :1].expand(-1, 3, -1, -1))
    many = torch.randint(0, 256, (1500, 1, 3, 3), dtype=torch.uint8)  # more than one block
    assert torch.equal(resized(many, (3, 3, 3))[:, 2:], many)


def test_the_mean_over_datasets_has_the_interval_of_a_mean_of_means():
    def result_of(scores: torch.Tensor) -> Result:
        return Result(GEOMETRY, (ACCURACY,), {"accuracy": scores}, scores, "hash", False, 1.0)

    results = {"a": result_of(torch.rand(50)), "b": result_of(torch.rand(50) / 10 + 0.8)}
    both = mean_of(results)
    assert both.mean == pytest.approx((results["a"].mean + results["b"].mean) / 2)
    assert both.interval == pytest.approx(
        (results["a"].interval ** 2 + results["b"].interval ** 2) ** 0.5 / 2
    )
    assert both.interval < interval(
        both.scores["accuracy"]
    )  # which counts the difference between datasets as noise
