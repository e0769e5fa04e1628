"""`metarun predict`: predicts new examples by a model that `metarun adapt` has saved."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from metarun.commands.models import own_dataset
from metarun.commands.predictions import known_targets, report_queries
from metarun.config.build import instantiate
from metarun.config.check import check
from metarun.config.schema import PredictConfig, typed
from metarun.config.targets import trusted_modules
from metarun.datasets import class_folders
from metarun.datasets.base import OwnQueries
from metarun.errors import ConfigError
from metarun.inference.adapted import AdaptedModel, check_reject, placed, restore_adapted
from metarun.inference.images import Ink, check_ink, read_query
from metarun.reporting.console import inform, relative
from metarun.storage.files import user_path
from metarun.training.hardware import Hardware


def run(cfg: DictConfig) -> float | None:
    """Predict as configured; returns the score of the queries whose class or value is known, if any."""
    check(cfg, "predict", typed=HydraConfig.get().overrides.task)
    command: PredictConfig = typed(cfg)
    hardware: Hardware = instantiate(command.hardware, "hardware")
    adapted = restore_adapted(command.adapted, trusted_modules(cfg), hardware)
    adapted.model.refuse_policy(f"adapted={command.adapted}")
    check_reject(command.reject, adapted.model.predicts_values)
    queries = queries_of(command, adapted)
    queries = OwnQueries(placed(adapted.model, queries.x), placed(adapted.model, queries.y), queries.names)
    outputs = adapted.outputs(queries.x)
    folder = Path(HydraConfig.get().runtime.output_dir)
    objective = adapted.model.objective(None)
    classes = list(map(str, adapted.classes))
    saved = report_queries(queries, classes, outputs, objective, folder, command.reject)
    inform(f"saved {', '.join(saved)} in {relative(folder)}")
    known = known_targets(queries.y)
    if not known.any():
        return None
    return objective.metrics[0].score(outputs[:, known], queries.y[:, known]).item()


def queries_of(command: PredictConfig, adapted: AdaptedModel) -> OwnQueries:
    """The queries, with examples prepared as in the training of the model. Raises ConfigError, DataError."""
    model, classes = adapted.model, list(map(str, adapted.classes))
    if model.spec.kind != "images":
        for name, unset in (("depth", 1), ("ink", None)):
            if (value := getattr(command, name)) != unset:
                raise ConfigError(f"{name}={value}: the model does not take images; leave it out")
        return own_dataset(command, model).own_queries(command.query, classes)
    if command.dataset:
        raise ConfigError("dataset: the model does not take texts; leave its settings out")
    ink: Ink = command.ink or adapted.ink  # type: ignore[assignment]
    check_ink(ink)
    files, labels = class_folders.query_files(user_path(command.query), classes, command.depth)
    if adapted.preparation is None:
        raise ConfigError(
            f"adapted={command.adapted}: was adapted to a task of a dataset, not to images of yours; run "
            "metarun adapt support=FOLDER"
        )
    x = read_query(model, ink, adapted.preparation, files)
    y = class_folders.known_labels(labels)
    return OwnQueries(x, y, [str(file) for file in files])
