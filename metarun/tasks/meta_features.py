"""Meta-features: numbers that describe a task with classes before anything is learned from it."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

#: What each number means, for tables and documents.
MEANINGS = {
    "classes": "number of classes",
    "examples": "number of examples, support and queries",
    "dimension": "numbers in an example",
    "balance": "entropy of the sizes of the classes / log(classes): 1 if all are equal",
    "intrinsic dimension": "of the examples, by the distances to two neighbours (Facco et al. 2017)",
    "nearest neighbour": "accuracy of the nearest other example (1 - N3 of Ho and Basu 2002)",
    "within / between": "distances to the nearest example of the class / of another class (N2, the same)",
    "decision stump": "landmarker: cross-validated accuracy of a tree of one split (scikit-learn)",
    "naive Bayes": "landmarker: that of Gaussian naive Bayes",
    "linear": "landmarker: that of a ridge classifier",
}


def meta_features(x: Tensor, y: Tensor) -> dict[str, float]:
    """Sizes, balance, intrinsic dimension and separability of a task.

    Args:
        x: examples [n, ...] of floating point; distances are those of the flattened examples.
        y: classes [n], from 0.

    Returns:
        The numbers of `MEANINGS` that need no other library. NaN: not defined, such as the intrinsic
        dimension of fewer than three different examples.
    """
    x = x.flatten(1).double()
    counts = y.bincount()
    counts = counts[counts > 0]
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(math.inf)
    same = y.unsqueeze(0) == y.unsqueeze(1)
    own = distances.masked_fill(~same, math.inf).amin(1)
    other = distances.masked_fill(same, math.inf).amin(1)
    compared = own.isfinite() & other.isfinite()  # an example that is alone in its class has no neighbour
    shares = counts / counts.sum()
    entropy = -(shares * shares.log()).sum().item()
    return {
        "classes": float(len(counts)),
        "examples": float(len(y)),
        "dimension": float(x.shape[1]),
        "balance": entropy / math.log(len(counts)) if len(counts) > 1 else math.nan,
        "intrinsic dimension": intrinsic_dimension(distances),
        "nearest neighbour": (y[distances.argmin(1)] == y).double().mean().item(),
        "within / between": (own[compared].sum() / other[compared].sum()).item(),
    }


def intrinsic_dimension(distances: Tensor) -> float:
    """The estimate by two nearest neighbours: n / sum of log(second distance / first distance).

    Facco, d'Errico, Rodriguez and Laio (2017), "Estimating the intrinsic dimension of datasets by a minimal
    neighborhood information", in its form of maximum likelihood. Examples that are equal to another are left
    out.

    Args:
        distances: [n, n], infinite on the diagonal.
    """
    if len(distances) < 3:
        return math.nan
    first, second = distances.topk(2, largest=False).values.unbind(1)
    ratios = (second / first)[first > 0].log()
    return (len(ratios) / ratios.sum()).item() if ratios.sum() > 0 else math.nan


def landmarkers(x: Tensor, y: Tensor) -> dict[str, float]:
    """The cross-validated accuracy of simple classifiers (Pfahringer, Bensusan and Giraud-Carrier 2000).

    With five folds, or as many as the smallest class has examples.

    Args:
        x: examples [n, ...] of floating point.
        y: classes [n].

    Returns:
        The accuracies by name; empty if scikit-learn is not installed, or a class has a single example.
    """
    try:
        from sklearn.linear_model import RidgeClassifier
        from sklearn.model_selection import StratifiedKFold, cross_val_score
        from sklearn.naive_bayes import GaussianNB
        from sklearn.tree import DecisionTreeClassifier
    except ImportError:
        return {}
    least = int(y.unique(return_counts=True)[1].min())
    if least < 2:
        return {}
    folds = StratifiedKFold(min(5, least), shuffle=True, random_state=0)
    classifiers = {
        "decision stump": DecisionTreeClassifier(max_depth=1, random_state=0),
        "naive Bayes": GaussianNB(),
        "linear": RidgeClassifier(),
    }
    data, labels = x.flatten(1).double().cpu().numpy(), y.cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of features that are constant in a fold
        scores = {name: cross_val_score(each, data, labels, cv=folds) for name, each in classifiers.items()}
    return {name: float(score.mean()) for name, score in scores.items()}
