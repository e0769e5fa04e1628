"""Images as features of a frozen network, computed once and kept in the cache."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from metarun.algorithms.base import Algorithm
from metarun.nn.frozen import Frozen, frozen_part
from metarun.nn.layers import relates_examples
from metarun.reporting.console import Bar
from metarun.storage.cached_arrays import memmap_cached
from metarun.tasks.class_store import ClassStore, unchanged
from metarun.tasks.source import EpisodeSource
from metarun.training.hardware import Hardware

VERSION = 1  # of what is in a cache entry
IMAGES_AT_ONCE = {"cpu": 8, "cuda": 256}  # on a CPU, feature maps of more do not stay in its cache


def on_features(source: EpisodeSource, algorithm: Algorithm, hardware: Hardware) -> EpisodeSource:
    """A split with the features of its images in their place, where these are always the same.

    They are if the backbone of the algorithm begins with a frozen network, if the algorithm gives images to
    nothing else, and if images are not augmented. The same choices still name the same examples.

    Args:
        source: the split.
        algorithm: the algorithm, with its weights and on the device.
        hardware: the device and the precision.

    Returns:
        The split with features from the cache, or computed now; `source` itself if features may differ from
        one draw to the next.
    """
    network = frozen_part(algorithm.own_backbone())
    if network is None or not algorithm.embeds_first or relates_examples(network):
        return source
    if not isinstance(source, ClassStore) or source.spec.kind != "images" or source.augment is not None:
        return source
    features = cached_features(source, network, hardware)
    if hardware.keeps_on_host(features.nbytes):
        return source.with_items(features, hardware.device, unchanged)
    return source.with_items(features.to(hardware.device), decode=unchanged)


def cached_features(source: ClassStore, network: Frozen, hardware: Hardware) -> Tensor:
    """The features of all items of a split, [items, F], memory-mapped. Raises DataError."""

    def build(write: Callable[[bytes], object]) -> dict[str, Any]:
        shape: list[int] = []
        with Bar("features", len(source.items), "images") as bar, torch.no_grad(), hardware.compute():
            for items in source.items.split(IMAGES_AT_ONCE[hardware.device.type]):
                images = source.decode(items.to(hardware.device)).to(hardware.dtype)
                images = hardware.batching.laid_out(images)
                features = network(images).to("cpu", hardware.dtype).contiguous()
                write(features.numpy().tobytes())
                shape = list(features.shape[1:])
                bar.advance(len(items))
        return {"shape": shape}

    where = f"{hardware.device.type} {hardware.precision}"
    decode = getattr(source.decode, "__qualname__", type(source.decode).__qualname__)
    stored = f"{decode} {source.items.dtype} {tuple(source.items.shape)}"
    digest = hashlib.sha256(f"{VERSION} {network.digest()} {where} {stored}".encode())
    digest.update(source.items.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    name = re.sub(r"[^\w.]+", "-", f"{source.name} features")
    content, metadata = memmap_cached(f"{name}-{digest.hexdigest()[:24]}", build)
    features = content.view(hardware.dtype)
    return features.view(len(source.items), *metadata["shape"])
