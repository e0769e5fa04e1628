"""What a task asks for: the loss and the score of T tasks, for classification and regression.

The targets decide: whole numbers are classes (cross entropy, accuracy), floating point
numbers are values (mean squared error, which is also the score).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def is_classification(targets: Tensor) -> bool:
    return not targets.is_floating_point()


def metric_name(targets: Tensor) -> str:
    """What `task_score` gives for such targets: higher accuracy is better, lower mse."""
    return "accuracy" if is_classification(targets) else "mse"


def task_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean loss of each task, [T].

    Arguments: outputs [T, B, N] and classes [T, B], or values and targets, both [T, B, outputs].
    The mean is over a task's examples; papers that sum over classes need their rate scaled
    (docs/protocols.md).
    """
    if is_classification(targets):
        losses = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view(targets.shape).mean(1)
    if outputs.shape != targets.shape:
        raise ValueError(f"outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)} differ in shape")
    return F.mse_loss(outputs, targets, reduction="none").flatten(1).mean(1)


def task_score(outputs: Tensor, targets: Tensor) -> Tensor:
    """Accuracy of each task in [0, 1], or its mean squared error; [T]."""
    if is_classification(targets):
        return (outputs.argmax(-1) == targets).float().mean(1)
    return task_loss(outputs, targets)
