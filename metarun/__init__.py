"""metarun: a command-line experiment runner for meta-learning, and its trained models in a program.

`load`, `load_adapted`, `train` and `FewShotClassifier` are the interface of programs (docs/python_api.md).
They are imported when they are first used, since PyTorch takes seconds to import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metarun.cli.programs import train as train
    from metarun.inference.adapted import load_adapted as load_adapted
    from metarun.inference.classifier import FewShotClassifier as FewShotClassifier
    from metarun.inference.model import load as load

__version__ = "0.1.0"
PLACES = {
    "load": "metarun.inference.model",
    "load_adapted": "metarun.inference.adapted",
    "FewShotClassifier": "metarun.inference.classifier",
    "train": "metarun.cli.programs",
}
__all__ = ["FewShotClassifier", "__version__", "load", "load_adapted", "train"]


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'metarun' has no attribute {name!r}")
    return getattr(importlib.import_module(PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *PLACES})
