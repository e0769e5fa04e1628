"""An adapted model, or a backbone, as one plain network that other programs can run."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from metarun.algorithms.feature_method import FeatureMethod
from metarun.errors import ConfigError, first_line
from metarun.inference.adapted import AdaptedModel, on_device
from metarun.inference.model import Model
from metarun.nn.layers import ShiftNorm, StepNorm, relates_examples, replace_layers
from metarun.nn.per_task import TaskBatching
from metarun.nn.task_norm import task_norms

PLAIN = TaskBatching("loop", channels_last=False)
CLOSE = 1e-4  # the largest difference of a probability, or of a feature


class NormBeside(nn.Module):
    """Batch norm by batch statistics, where the batch is several groups that are normalised separately.

    Args:
        layer: nn.BatchNorm2d without running averages, or StepNorm; its weights are taken over.
        groups: a list whose only element is the number of groups, set before a forward pass.
    """

    def __init__(self, layer: Any, groups: list[Any]) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.groups = layer.weight, layer.bias, layer.eps, groups
        self.row = layer.step if isinstance(layer, StepNorm) else None
        self.shift = layer.shift if isinstance(layer, ShiftNorm) else None

    def forward(self, x: Tensor) -> Tensor:
        """x [groups * B, C, ...], a group after the other."""
        y = x.reshape(self.groups[0], -1, *x.shape[1:])
        others = [1, *range(3, y.dim())]
        mean = y.mean(others, keepdim=True)
        variance = (y - mean).square().mean(others, keepdim=True)
        y = ((y - mean) / (variance + self.eps).sqrt()).reshape(x.shape)
        if self.weight is None:
            return y if self.shift is None else self.shift(y)
        weight, bias = self.weight, self.bias
        if self.row is not None:
            row = min(self.row, len(weight) - 1)
            weight, bias = weight[row], bias[row]
        shape = (-1, *[1] * (x.dim() - 2))
        return y * weight.view(shape) + bias.view(shape)


class Classifier(nn.Module):
    """Examples [B, *item] to the probabilities of an adapted model's classes [B, N], or values [B, V].

    Each example is predicted independently of the others: where the network normalises by batch statistics,
    beside the support alone, as `metarun adapt` does; where by TaskNorm, all are beside one support.
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        super().__init__()
        self.ended = ending(adapted)
        self.algorithm, self.groups = plain_copy(adapted.model.algorithm)
        self.state = to_cpu(adapted.state)
        by_batch, by_support = self.algorithm.normalises_batches, self.algorithm.normalises_by_support
        self.support = adapted.support_x[0].cpu().float() if by_batch or by_support else None
        self.shares_support = by_support
        for norm in task_norms(self.algorithm):
            norm.support = adapted.support_x.shape[1]

    def forward(self, x: Tensor) -> Tensor:
        if self.support is None:
            return self.ended(self.predict(x))
        if self.shares_support:
            return self.ended(self.predict(torch.cat([self.support, x]))[len(self.support) :])
        count = x.shape[0]  # not len(x), which a trace takes for a constant
        self.groups[0] = count
        support = self.support.unsqueeze(0).expand(count, *self.support.shape)
        batches = torch.cat([support, x.unsqueeze(1)], 1)  # [B, S + 1, *item]
        outputs = self.predict(batches.flatten(0, 1))
        return self.ended(outputs.reshape(count, -1, outputs.shape[-1])[:, -1])

    def predict(self, x: Tensor) -> Tensor:
        """Logits [B, N] of x [B, *item]."""
        algorithm, batch = self.algorithm, x.unsqueeze(0)
        if isinstance(algorithm, FeatureMethod) and type(algorithm).predict is FeatureMethod.predict:
            return algorithm.score(self.state, algorithm.embed(batch))[0]  # without parts of fixed size
        return algorithm.predict(self.state, batch)[0]


def ending(adapted: AdaptedModel) -> Callable[[Tensor], Tensor]:
    """From the outputs [B, N] to what is predicted: probabilities, or values in their units."""
    if adapted.classes:
        return lambda outputs: outputs.softmax(-1)
    units = adapted.model.objective(None).units
    return lambda outputs: units(outputs).float() if units else outputs


class Embedding(nn.Module):
    """Examples [B, *item] to features [B, F], by the backbone of a model."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        backbone = model.algorithm.own_backbone()
        if backbone is None:
            raise ConfigError(f"{model.path}: {model.name} has no backbone to export; export adapted=FILE")
        if relates_examples(backbone):
            raise ConfigError(
                f"{model.path}: its backbone normalises an example by the others of its batch, so it has no "
                "features of an example alone; export adapted=FILE, or train with norm=running"
            )
        self.backbone, _ = plain_copy(backbone)

    def forward(self, x: Tensor) -> Tensor:
        return self.backbone(x)


def plain_copy(module: Any) -> tuple[Any, list[Any]]:
    """A copy on the CPU in float32 that runs tasks in turn, and the number of groups of its norms."""
    twin = copy.deepcopy(module).cpu().float().eval().requires_grad_(False)
    groups: list[Any] = [1]
    for part in twin.modules():
        if isinstance(getattr(part, "batching", None), TaskBatching):
            part.batching = PLAIN

    def beside(layer: nn.Module) -> nn.Module | None:
        plain = isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.running_mean is None
        steps = isinstance(layer, StepNorm) and layer.uses_batch_statistics
        return NormBeside(layer, groups) if plain or steps else None

    if hasattr(twin, "norms"):  # those of MAML++, whose step was set by the last prediction
        twin.norms = []
    replace_layers(twin, beside)
    return twin, groups


def to_cpu(value: Any) -> Any:
    """Nested containers with every tensor on the CPU, floating point numbers as float32."""
    return on_device(value, torch.device("cpu"), torch.float32)


def traced(network: nn.Module, example: Tensor, what: str) -> torch.export.ExportedProgram:
    """The network as a program of PyTorch for batches of any size.

    Args:
        network: the network.
        example: examples [B, *item], of which B is not 1.
        what: the model in words, for messages.

    Raises:
        ConfigError: it cannot be exported; with the reason.
    """
    shapes = {"x": {0: torch.export.Dim("batch", min=1)}}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(network, (example,), dynamic_shapes=shapes, strict=False)
    except Exception as error:  # of many types, with many lines
        raise ConfigError(f"{what} cannot be exported: {first_line(error)}") from error


def check_same(found: Tensor, expected: Tensor, what: str) -> None:
    """Raise ConfigError if an exported network computes something else than the model."""
    if found.shape != expected.shape or not torch.allclose(found, expected, atol=CLOSE, rtol=CLOSE):
        raise ConfigError(
            f"{what} cannot be exported: as one network it differs by "
            f"{(found - expected).abs().max().item() if found.shape == expected.shape else found.shape}"
        )
