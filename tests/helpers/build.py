"""An algorithm built from a composed config, as the commands build it."""

from __future__ import annotations

from dataclasses import replace

from omegaconf import DictConfig

from metarun.algorithms.base import Algorithm
from metarun.config.build import build_algorithm, build_dataset, instantiate
from metarun.config.schema import typed


def built(cfg: DictConfig, classes: int = 11) -> Algorithm:
    """The algorithm of a train config, for a dataset with so many training classes."""
    settings = typed(cfg)
    spec = build_dataset(settings.dataset).spec
    if spec.outputs is None:
        spec = replace(spec, classes=classes)
    return build_algorithm(settings, spec, instantiate(settings.hardware))
