"""Training tasks without labels: pseudo-classes, views, and clusters against scikit-learn."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor

from metarun.algorithms.protonet import ProtoNet
from metarun.backbones.conv4 import Conv4
from metarun.datasets.augment import Augment
from metarun.datasets.training_tasks import UMTRA, CACTUs, TrainingTasks, Views, lloyd, principal_components
from metarun.errors import ConfigError, DataError
from metarun.tasks.class_store import ClassStore, unchanged
from metarun.tasks.episodes import Episodes, EpisodeShape
from metarun.tasks.pseudo_classes import by_content
from metarun.tasks.sampling import sample
from metarun.training.hardware import Hardware
from metarun.training.step import OuterStep

pytestmark = pytest.mark.quick

ITEMS = torch.randint(256, (60, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
ITEMS[7:9] = torch.tensor([0, 9], dtype=torch.uint8).view(2, 1, 1, 1)  # blank: without hashes
MAKERS: dict[str, Callable[[], TrainingTasks]] = {
    "umtra": UMTRA,
    "views": Views,
    "cactus": lambda: CACTUs(clusters=6, partitions=3, dimensions=5),
    "cactus on features": lambda: CACTUs("a run", clusters=6, partitions=3),
}


def store(order: Tensor | None = None, counts: tuple[int, ...] = (10,) * 6) -> ClassStore:
    items = ITEMS if order is None else ITEMS[order]
    made = ClassStore(items, counts, [f"{len(counts)} {i}" for i in range(len(counts))], "letters train")
    made.augment = Augment(drop=0.3)
    return made


def source_of(maker: TrainingTasks, labelled: ClassStore, shape: EpisodeShape) -> ClassStore:
    def embed(run: str) -> Tensor:
        assert run == "a run"
        return labelled.items.flatten(1)[:, ::40].float()

    return maker.source(labelled, shape, embed)


def tasks_of(maker: TrainingTasks, labelled: ClassStore, shape: EpisodeShape, tasks: int = 4) -> Episodes:
    return sample(source_of(maker, labelled, shape), tasks, shape, torch.Generator().manual_seed(3))  # type: ignore[return-value]


def trained(source: ClassStore, shape: EpisodeShape) -> Tensor:
    torch.manual_seed(0)
    algorithm = ProtoNet(Conv4((1, 16, 16), 4))
    optimizer = torch.optim.Adam(algorithm.parameters())
    engine = OuterStep(
        algorithm, optimizer, source, shape, 2, 0, Hardware("cpu", compile=False, tasks_at_once=2)
    )
    engine.prepare(0)
    for _ in range(3):
        engine.step()
    return torch.cat([p.detach().flatten() for p in algorithm.parameters()])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METARUN_CACHE", str(tmp_path))


@pytest.mark.parametrize("name", MAKERS)
def test_no_label_is_read(name: str):
    shape, order = EpisodeShape(3, 1, 2), torch.randperm(60, generator=torch.Generator().manual_seed(1))
    labelled, shuffled = store(), store(order, (7, 13, 20, 20))
    same = [trained(source_of(MAKERS[name](), each, shape), shape) for each in (labelled, shuffled)]
    assert torch.equal(*same)
    assert not torch.equal(trained(labelled, shape), trained(shuffled, shape))  # with labels


def marked(images: Tensor, numbers: Tensor) -> Tensor:
    """An augmentation that shows itself: the first row stays, and the others say which view it is."""
    return torch.cat([images[..., :1, :], numbers[:, :1, None, None].expand(-1, 1, 15, 16)], 2)


marked.numbers = 1  # type: ignore[attr-defined]


def test_umtra_augments_copies_of_one_image():
    labelled = store()
    labelled.augment = marked  # type: ignore[assignment]
    found = tasks_of(UMTRA(), labelled, EpisodeShape(5, 2, 3), 40)
    support, query = found.support_x.unflatten(1, (5, 2)), found.query_x.unflatten(1, (5, 3))
    images = [tuple(each.flatten().tolist()) for each in ITEMS.float() / 255]
    numbers = [[images.index(tuple(way[0].flatten().tolist())) for way in task] for task in support]
    assert all(len(set(task)) == 5 for task in numbers)
    assert len({number for task in numbers for number in task}) > 50  # all images, sooner or later
    copies = torch.cat([support[:, :, 1:], query], 2)
    assert (copies[..., :1, :] == support[:, :, :1, :, :1, :]).all()
    assert len(copies[..., 1, 0].unique()) == 40 * 5 * 4  # no two alike


@pytest.mark.parametrize("labels", [False, True])
def test_views_are_of_the_same_images(labels: bool):
    labelled, shots = store(), 3 if labels else 1
    labelled.augment = marked  # type: ignore[assignment]
    found = tasks_of(Views(labels), labelled, EpisodeShape(4, shots, shots))
    support, query = (x.unflatten(1, (4, shots)) for x in (found.support_x, found.query_x))
    assert (support[..., 0, :] == query[..., 0, :]).all() and (support[..., 1, :] != query[..., 1, :]).all()
    if labels:
        rows = (ITEMS.float() / 255)[..., 0, :].flatten(1)
        owners = (support[..., 0, :].flatten(3).unsqueeze(3) == rows).all(-1).long().argmax(-1) // 10
        assert (owners == found.classes.unsqueeze(-1)).all()
        assert all(len(way.unique(dim=0)) == shots for way in support[..., 0, :].flatten(0, 1))


def test_clusters_are_those_of_scikit_learn():
    points = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    centres, labels = lloyd(points, points[:7])
    theirs = KMeans(7, init=points[:7].numpy(), n_init=1, max_iter=100, tol=0).fit(points.numpy())
    assert (labels.numpy() == theirs.labels_).all()
    np.testing.assert_allclose(centres.numpy(), theirs.cluster_centers_, atol=1e-5)


def test_principal_components_are_those_of_scikit_learn():
    order = by_content(ITEMS)
    found = principal_components(store(), order, 5)
    theirs = PCA(5).fit_transform(ITEMS[order].flatten(1).numpy() / 255)[:, ::-1]
    np.testing.assert_allclose(found.abs().numpy(), np.abs(theirs), atol=1e-4)


def blobs() -> ClassStore:
    """Images of four kinds that are easily distinguished; those of the last are too few for a task."""
    kinds = torch.arange(4).repeat_interleave(torch.tensor([20, 30, 8, 2]))[torch.randperm(60)]
    items = torch.nn.functional.one_hot(kinds, 16).float() * 50 + torch.rand(60, 16)
    return ClassStore(items.view(60, 1, 4, 4), [60], ["all"], "blobs train", decode=unchanged)


def test_classes_of_a_task_are_clusters_of_one_partition():
    shape = EpisodeShape(3, 1, 4)
    maker = CACTUs(clusters=4, partitions=5, dimensions=16)
    source = source_of(maker, blobs(), shape)
    assert source.sizes.tolist() == [3] * 5 and sorted(source.counts[:3].tolist()) == [8, 20, 30]
    found: Episodes = sample(source, 50, shape, torch.Generator().manual_seed(0))  # type: ignore[assignment]
    x = torch.cat([found.support_x.unflatten(1, (3, 1)), found.query_x.unflatten(1, (3, 4))], 2).flatten(3)
    kinds = x.argmax(-1)  # [T, N, K+Q]
    assert (kinds == kinds[..., :1]).all() and all(len(set(task[:, 0].tolist())) == 3 for task in kinds)
    assert len((found.classes // 3).unique()) == 5
    assert ((found.classes // 3) == (found.classes // 3)[:, :1]).all()
    assert all(len(way.unique(dim=0)) == 5 for way in x.flatten(0, 1))


def test_what_cannot_be():
    shape = EpisodeShape(3, 1, 2)
    plain = store()
    plain.augment = None
    for maker in (UMTRA(), Views()):
        with pytest.raises(ConfigError, match=r"^augment=none: train_tasks="):
            source_of(maker, plain, shape)
    with pytest.raises(ConfigError, match=r"^shots=2 queries=2: queries must be views of the one shot"):
        source_of(Views(), store(), EpisodeShape(3, 2, 2))
    with pytest.raises(ConfigError, match=r"^train_tasks\.clusters=61: letters train has 60 images"):
        source_of(CACTUs(clusters=61), store(), shape)
    with pytest.raises(ConfigError, match=r"^train_tasks\.clusters=40: only \d+ of them have 12 images"):
        source_of(CACTUs(clusters=40), store(), EpisodeShape(3, 2, 10))
    with pytest.raises(ConfigError, match=r"^ways=61: letters train gives 60 classes"):
        source_of(UMTRA(), store(), shape).check(EpisodeShape(61, 1, 1))
    with pytest.raises(DataError, match=r"^shots=11"):
        source_of(Views(labels=True), store(), EpisodeShape(3, 11, 11)).check(EpisodeShape(3, 11, 11))
    with pytest.raises(ConfigError, match=r"^train_tasks\.partitions=0: must be at least 1"):
        CACTUs(partitions=0)
