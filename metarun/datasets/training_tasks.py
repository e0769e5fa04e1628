"""How training tasks are made of the images of a training split, where not of its labelled classes."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from metarun.errors import ConfigError, check_least
from metarun.reporting.console import Bar
from metarun.storage.cached_arrays import memmap_cached
from metarun.tasks.class_store import HASHED, ClassStore
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.pseudo_classes import PseudoClasses, by_content
from metarun.tasks.sampling import seeded
from metarun.tasks.source import EpisodeSource

#: The features [items, F] of the items of a split, by a reference to a trained run.
Embed = Callable[[str], Tensor]

PIXELS = 32  # a larger image is averaged to as many pixels a side before it is clustered
LLOYD = 100  # the most iterations of k-means
VERSION = 1  # of what is in a cache entry


class TrainingTasks(ABC):
    """How training tasks are made of the images of a training split: the base class of `train_tasks`."""

    #: Whether the labels of the training split are read.
    labelled = False
    #: Whether they are made of images.
    of_images = True

    @abstractmethod
    def source(self, train: ClassStore, shape: EpisodeShape, embed: Embed) -> EpisodeSource:
        """The training split with the classes that tasks are drawn from.

        Args:
            train: the training split, a store of images (any, if not `of_images`).
            shape: of the training tasks.
            embed: the features of its images, by the reference to a run.

        Raises:
            ConfigError: the settings do not fit the tasks.
        """


class UMTRA(TrainingTasks):
    """Unsupervised meta-learning with tasks by random sampling and augmentation (Khodadadeh et al. 2019).

    Algorithm 1 of the paper: each of N images, drawn at random from all, is a class of its own. The image
    itself is the support example, and an augmented copy of it the query. The augmentation is the group
    `augment`; of the paper for Omniglot, `augment=drawings` (pixels set to zero at random, and shifts).

    Departures: the tasks of the paper have one shot and one query. Here further shots and further queries
    are further augmented copies.
    """

    def source(self, train: ClassStore, shape: EpisodeShape, embed: Embed) -> ClassStore:
        require_augmentation(train, "umtra: the queries are augmented copies of the support")
        return instances(train, plain=1)


class Views(TrainingTasks):
    """Two views of each image, its class mates: the batches of SimCLR and SupCon.

    A task with K shots and K queries has K images of each of N classes, augmented once as support and once
    as queries (Chen, Kornblith, Norouzi and Hinton 2020, section 2.1; Khosla et al. 2020, section 3.1).

    Args:
        labels: whether classes are those of the labels (SupCon); False: each image is one (SimCLR).
    """

    def __init__(self, labels: bool = False) -> None:
        self.labelled = labels

    def source(self, train: ClassStore, shape: EpisodeShape, embed: Embed) -> ClassStore:
        require_augmentation(train, "views: they differ by their augmentation")
        if shape.queries % shape.shots or not (self.labelled or shape.shots == 1):
            wanted = "a multiple of shots" if self.labelled else "views of the one shot, so that shots=1"
            raise ConfigError(f"shots={shape.shots} queries={shape.queries}: queries must be {wanted}")
        if not self.labelled:
            return instances(train)
        return PseudoClasses(train, torch.arange(len(train.items)), train.counts.tolist(), views=True)


class CACTUs(TrainingTasks):
    """Clustering to automatically construct tasks for unsupervised meta-learning (Hsu, Levine and Finn 2019).

    Algorithm 1 of the paper: k-means partitions the embeddings of the training images P times, and classes of
    tasks are clusters of one partition. The dimensions of each partition but the first are scaled by random
    factors from [0, 1) (section 3.1, and the authors' code). Clusters that are too small for a task are left
    out.

    Departures: the paper embeds by BiGAN, ACAI or DeepCluster; here by the backbone of a run, such as one of
    `algorithm=simclr`, or by the principal components of the pixels (the paper's tasks from pixels are
    whitened instead). k-means ends after 100 iterations at most, and starts by k-means++.

    Args:
        embedding: "pixels", or a run whose backbone gives the features.
        dimensions: the number of principal components, of pixels.
        clusters: k, in each partition.
        partitions: P.
        seed: of the partitions.
    """

    def __init__(
        self,
        embedding: str = "pixels",
        dimensions: int = 64,
        clusters: int = 500,
        partitions: int = 10,
        seed: int = 0,
    ) -> None:
        check_least("train_tasks", 1, dimensions=dimensions, partitions=partitions)
        check_least("train_tasks", 2, clusters=clusters)
        self.embedding, self.dimensions, self.clusters = embedding, dimensions, clusters
        self.partitions, self.seed = partitions, seed

    def source(self, train: ClassStore, shape: EpisodeShape, embed: Embed) -> ClassStore:
        if self.clusters > len(train.items):
            raise ConfigError(
                f"train_tasks.clusters={self.clusters}: {train.name} has {len(train.items)} images; lower it"
            )
        order = by_content(train.items)
        if self.embedding == "pixels":
            features = principal_components(train, order, self.dimensions)
        else:
            features = embed(self.embedding)[order.to(train.items.device)].cpu().float()
        labels = self.labels(train.name, features)  # [partitions, items]
        members, counts, sizes, wanted = [], [], [], shape.shots + shape.queries
        for own in labels.long():
            found = own.bincount(minlength=self.clusters)
            kept = (found >= wanted).nonzero().flatten()
            if len(kept) < shape.ways:
                raise ConfigError(
                    f"train_tasks.clusters={self.clusters}: only {len(kept)} of them have {wanted} images "
                    f"(shots + queries), and ways={shape.ways}; lower clusters, shots or queries"
                )
            by_cluster = own.argsort(stable=True)
            members.append(order[by_cluster[(found >= wanted)[own[by_cluster]]]])
            counts += found[kept].tolist()
            sizes.append(len(kept))
        return PseudoClasses(train, torch.cat(members), counts, sizes)

    def labels(self, name: str, features: Tensor) -> Tensor:
        """The cluster of each of the features [items, F] in each partition, int32, from the cache."""

        def build(write: Callable[[bytes], object]) -> dict[str, Any]:
            with Bar("clusters", self.partitions, "partitions") as bar:
                for number in range(self.partitions):
                    generator = seeded(f"cactus {self.seed} {number}")
                    factors = torch.rand(features.shape[1], generator=generator) if number else 1.0
                    labels = k_means(features * factors, self.clusters, generator)[1]
                    write(labels.int().numpy().tobytes())
                    bar.advance(1)
            return {}

        digest = hashlib.sha256(f"{VERSION} {self.clusters} {self.partitions} {self.seed}".encode())
        digest.update(features.contiguous().numpy().tobytes())
        entry = f"{name.replace(' ', '-')}-clusters-{digest.hexdigest()[:24]}"
        content, _ = memmap_cached(entry, build)
        return torch.from_numpy(np.frombuffer(content.numpy(), np.int32).copy()).view(self.partitions, -1)


def instances(train: ClassStore, plain: int = 0) -> PseudoClasses:
    """Each image as a class of its own, in an order that does not depend on labels."""
    order = by_content(train.items)
    return PseudoClasses(train, order, [1] * len(order), views=True, plain=plain)


def require_augmentation(train: ClassStore, why: str) -> None:
    """Raise ConfigError if the images of a split are not augmented."""
    if train.augment is None:
        raise ConfigError(f"augment=none: train_tasks={why}; set augment=standard, or augment=drawings")


def principal_components(store: ClassStore, order: Tensor, dimensions: int) -> Tensor:
    """The principal components of the images of a store, float32 [items, F].

    Args:
        store: images.
        order: of the images [items].
        dimensions: F; as many as there are pixels if these are fewer.
    """
    rows = []
    for block in order.to(store.items.device).split(HASHED):
        images = store.decode(store.items[block])
        if max(images.shape[-2:]) > PIXELS:
            images = F.adaptive_avg_pool2d(images, PIXELS)
        rows.append(images.flatten(1).cpu())
    pixels = torch.cat(rows)
    mean = pixels.mean(0)
    pixels -= mean
    covariance = sum(block.double().mT @ block.double() for block in pixels.split(HASHED)) / len(pixels)
    directions = torch.linalg.eigh(covariance).eigenvectors[:, -dimensions:]  # type: ignore[arg-type]
    return pixels @ directions.float()


def k_means(points: Tensor, clusters: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from the centres of k-means++ (Arthur and Vassilvitskii 2007).

    A cluster that loses all of its points keeps its centre.

    Args:
        points: [P, F].
        clusters: k.
        generator: the only source of randomness.

    Returns:
        The centres [k, F] and the number of the nearest centre of each point [P].
    """
    return lloyd(points, first_centres(points, clusters, generator))


def first_centres(points: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """The centres [k, F] of k-means++: points, drawn with the squared distance to the nearest one before."""
    squares = points.square().sum(1)

    def distances(i: int) -> Tensor:
        return (squares - 2 * points @ points[i] + squares[i]).clamp_min(0)

    chosen = [int(torch.randint(len(points), (), generator=generator))]
    nearest = distances(chosen[0])
    while len(chosen) < clusters:
        total = nearest.double().cumsum(0)
        place = torch.rand((), generator=generator, dtype=torch.float64) * total[-1]
        chosen.append(min(int(torch.searchsorted(total, place)), len(points) - 1))
        nearest = torch.minimum(nearest, distances(chosen[-1]))
    return points[chosen]


def lloyd(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from given centres [k, F]; the centres and labels, as `k_means` returns them."""
    labels = torch.full((len(points),), -1)
    for _ in range(LLOYD):
        halves = centres.square().sum(1) / 2
        new = torch.cat([(halves - block @ centres.mT).argmin(1) for block in points.split(4096)])
        if torch.equal(new, labels):
            break
        labels = new
        sums = torch.zeros_like(centres).index_add_(0, labels, points)
        counts = labels.bincount(minlength=len(centres)).unsqueeze(1)
        centres = torch.where(counts > 0, sums / counts.clamp_min(1), centres)
    return centres, labels
