"""A trained model as a classifier of scikit-learn."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from metarun.errors import ConfigError
from metarun.inference.images import Ink
from metarun.inference.model import Model, load
from metarun.reporting.console import silent

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_array, check_is_fitted, column_or_1d
except ImportError as error:
    raise ImportError('FewShotClassifier needs scikit-learn; pip install "metarun[sklearn]"') from error


class FewShotClassifier(ClassifierMixin, BaseEstimator):
    """Learn new classes from a few examples of each, by a model that metarun has trained.

    The examples X of `fit` and `predict` are those of `metarun.Model.adapt` (images, texts, rows of a table).
    A model of images also takes an array [examples, values] with the values of its own input shape
    (C * H * W) in a row, as other steps of a pipeline pass it.

    Args:
        checkpoint: a run folder, a .pt file, or a model that `metarun.load` has returned, so that it is
            loaded once.
        ink, seed: see `Model.adapt`.
        device, steps, transductive, trust: see `metarun.load`; not read if `checkpoint` is a model.

    Attributes:
        classes_: the classes, sorted.
        adapted_: the adapted model.
        n_features_in_: the number of columns, if X is an array [examples, values].
    """

    def __init__(
        self,
        checkpoint: str | Path | Model | None = None,
        *,
        device: str = "auto",
        steps: int | None = None,
        transductive: bool = False,
        trust: Collection[str] = (),
        ink: Ink = "auto",
        seed: int = 0,
    ) -> None:
        self.checkpoint = checkpoint
        self.device = device
        self.steps = steps
        self.transductive = transductive
        self.trust = trust
        self.ink = ink
        self.seed = seed

    def fit(self, X: Any, y: Any) -> FewShotClassifier:
        """Adapt the model to the examples X [examples, ...] of the classes y [examples].

        Raises:
            ValueError: X and y do not fit each other or the model; also `MetarunError`, which names the
                example.
        """
        if self.checkpoint is None:
            raise ValueError("checkpoint=None: name a run folder, a .pt file, or pass metarun.load(RUN)")
        if y is None:
            raise ValueError("requires y to be passed, but the target y is None")
        X = self._checked(X, fitting=True)
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        if len(X) != len(y):
            raise ValueError(f"inconsistent numbers of examples in X ({len(X)}) and y ({len(y)})")
        self.classes_, numbers = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y has one class, {self.classes_[0]!r}; a classifier needs two")
        model = self.checkpoint
        if not isinstance(model, Model):
            settings = {"device": self.device, "steps": self.steps, "transductive": self.transductive}
            model = load(model, **settings, trust=self.trust)  # type: ignore[arg-type]
        if model.predicts_values:
            raise ConfigError(f"{model.path}: predicts values, not classes; use model.adapt and predict")
        fixed = model.dataset.fixed_labels
        with silent():
            labels = numbers.tolist() if fixed is None else list(map(str, y))
            self.adapted_ = model.adapt(self._shaped(X, model), labels, ink=self.ink, seed=self.seed)
        if fixed is not None:  # the outputs are in the order of training
            names = list(map(str, self.classes_))
            self._order = [list(self.adapted_.classes).index(name) for name in names]
        else:
            self._order = list(range(len(self.classes_)))
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class, [examples, classes], in the order of `classes_`."""
        check_is_fitted(self)
        X = self._checked(X, fitting=False)
        found = self.adapted_.predict(self._shaped(X, self.adapted_.model)).probabilities
        return found[:, self._order].astype(np.float64)

    def predict(self, X: Any) -> np.ndarray:
        """The most probable class of each example, [examples]."""
        best = self.predict_proba(X).argmax(1)
        return self.classes_[best]

    def _checked(self, X: Any, fitting: bool) -> Any:
        """X, with an array of numbers checked as scikit-learn does. Raises ValueError."""
        if not is_array_of_rows(X):
            return X
        X = check_array(X, dtype="numeric", estimator=self, input_name="X")
        if fitting:
            self.n_features_in_ = X.shape[1]
        elif X.shape[1] != getattr(self, "n_features_in_", X.shape[1]):
            raise ValueError(
                f"X has {X.shape[1]} features, but {type(self).__name__} is expecting "
                f"{self.n_features_in_} features as input"
            )
        return X

    def _shaped(self, X: Any, model: Model) -> Sequence[Any]:
        """X as examples of the model: rows of the values of an image become images again."""
        shape = model.spec.item_shape
        if model.spec.kind == "images" and is_array_of_rows(X):
            if X.shape[1] != int(np.prod(shape)):
                raise ValueError(f"X has {X.shape[1]} values in a row, and an image of the model has {shape}")
            return list(X.reshape(len(X), *shape))
        return X

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.three_d_array = True
        tags.input_tags.string = True
        tags.no_validation = False
        return tags


def is_array_of_rows(X: Any) -> bool:
    """Whether X is to be an array [examples, values]: its elements are no examples by themselves."""
    if hasattr(X, "columns"):  # a data frame
        return False
    if hasattr(X, "toarray") or not hasattr(X, "__getitem__") or not len(X):  # which scikit-learn refuses
        return True
    return not isinstance(X[0], (str, Path, Image, Mapping)) and np.ndim(X[0]) < 2
