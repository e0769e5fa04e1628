"""Configs as a command line gives them, and an algorithm built from one, as the commands build it."""

from __future__ import annotations

from dataclasses import replace

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, open_dict

from metarun.algorithms.base import Algorithm
from metarun.cli.jobs import composing_jobs
from metarun.cli.overrides import arrange
from metarun.commands.shapes import check_before_loading
from metarun.commands.starting import check_method
from metarun.config.build import build_algorithm, build_dataset, instantiate
from metarun.config.check import check
from metarun.config.comments import facts
from metarun.config.paths import CONF
from metarun.config.schema import register_frames, typed
from metarun.config.unread import in_use
from metarun.training.hardware import Hardware

#: The algorithms, without those for environments or distributions alone, and that which needs `init=`.
ALGORITHMS = sorted(
    path.stem
    for path in (CONF / "algorithm").glob("*.yaml")
    if facts(path)["family"] in ("gradient", "features") and path.stem != "leo"
)


def composed(command: str, *words: str) -> DictConfig:
    return composed_with_choices(command, *words)[0]


def composed_with_choices(command: str, *words: str) -> tuple[DictConfig, dict[str, str]]:
    """The config of a command line, and which option each group has in it."""
    register_frames()
    with composing_jobs(), initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(command, arrange(command, list(words)), return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg.hydra
    return cfg, choices


def built(cfg: DictConfig, classes: int = 11) -> Algorithm:
    """The algorithm of a train config, for a dataset with so many training classes."""
    settings = typed(cfg)
    spec = build_dataset(settings.dataset).spec
    if spec.outputs is None:
        spec = replace(spec, classes=classes)
    return build_algorithm(settings, spec, instantiate(settings.hardware))


def check_run(*words: str) -> None:
    """What `metarun train WORDS` checks before it loads data, on the CPU; it also builds the method.

    Raises:
        ConfigError: if the command would end with this error.
    """
    cfg = composed("train", *words)
    check(cfg, "train", typed=words)
    settings = typed(in_use(cfg))
    dataset = build_dataset(settings.dataset)
    check_before_loading(dataset, settings)
    check_method(settings, dataset, Hardware("cpu"), words)
