"""`metarun export`: writes a model for programs without metarun."""

from __future__ import annotations

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from metarun.config.check import check
from metarun.config.schema import ExportConfig, typed
from metarun.config.targets import trusted_modules
from metarun.errors import ConfigError
from metarun.inference.adapted import AdaptedModel, restore_adapted
from metarun.inference.export import FORMATS, export
from metarun.inference.model import find, restore
from metarun.reporting.console import inform, relative
from metarun.training.hardware import Hardware


def run(cfg: DictConfig) -> None:
    """Export as configured."""
    check(cfg, "export", typed=HydraConfig.get().overrides.task)
    command: ExportConfig = typed(cfg)
    if command.format not in FORMATS:
        raise ConfigError(f"format={command.format}: must be one of {', '.join(FORMATS)}")
    if (command.checkpoint is None) == (command.adapted is None):
        raise ConfigError("export: set either adapted=FILE or checkpoint=RUN")
    hardware, trusted = Hardware("cpu"), trusted_modules(cfg)
    source = (
        restore(find(command.checkpoint), trusted, hardware)
        if command.checkpoint is not None
        else restore_adapted(str(command.adapted), trusted, hardware)
    )
    model = source.model if isinstance(source, AdaptedModel) else source
    model.refuse_policy("export")
    folder = Path(HydraConfig.get().runtime.output_dir)
    names = export(source, command.format, folder)
    inform(f"saved {' and '.join(names)} in {relative(folder)}")
