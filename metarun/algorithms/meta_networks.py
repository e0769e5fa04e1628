"""Meta Networks: fast weights from a memory of loss gradients (Munkhdalai and Yu 2017)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm
from metarun.algorithms.feature_method import cosines, without_autocast
from metarun.errors import ConfigError
from metarun.inner_loops.recurrent import LSTMCell, preprocessed
from metarun.nn.layers import NORMS, Residual, uses_batch_statistics
from metarun.nn.learner import refuse_running_averages
from metarun.nn.per_task import AUTO, Params, is_groupable, layers, loops, run_chain, run_on_tasks
from metarun.tasks.episodes import Episodes
from metarun.tasks.objectives import class_weights, cross_entropy

RANGE = 7.0  # p in the preprocessing of gradients; 10 in Andrychowicz et al.


class MetaNet(Algorithm):
    """Map loss gradients of the support examples to fast weights, which each query retrieves by attention.

    There are two networks with the architecture of the backbone, each with a linear head:

    - The representation network computes keys. The gradients of its loss, one for each support example, pass
      through an LSTM over the examples, which outputs fast weights of the task (equations 1 to 3 and
      algorithm 1, lines 1 to 5). With these the network computes a key of every example.
    - The base network predicts. A small network maps each coordinate of the gradient of each support example
      to a fast weight of that example (lines 6 to 11). The fast weights of a query are the mean of those of
      the examples, weighted by a softmax over the cosines of the keys (lines 12 to 15).

    Slow and fast weights are applied in parallel, and their outputs are added after the activation; in the
    last layer there is no activation ("layer augmentation", section 3.3).

    Convolutions and linear layers have separate generators of fast weights, as in the author's code.
    Gradients are constants of the meta-gradient, also as in the code, so that the head of the representation
    network is not trained. Fast weights have no biases. The loss of the representation network is cross
    entropy for any number of shots, again as in the code (the paper: contrastive above one shot). Keys are
    the features of the backbone (in the code those of a hidden layer, without its ReLU). If classes have
    different numbers of shots, the attention is weighted such that every class counts equally. `init=` loads
    weights into the base network.

    Args:
        backbone, outputs: passed by the builder; see `Algorithm`.
        hidden: hidden units of the generators of fast weights.

    Raises:
        ConfigError: if the backbone has shortcuts, for which layer augmentation is not defined, or running
            averages.
    """

    needs = Episodes
    needs_classes = True

    def __init__(self, backbone: nn.Module, outputs: int, hidden: int = 20) -> None:
        super().__init__()
        # Layer augmentation is not defined across skip connections.
        has_shortcuts = any(isinstance(part, Residual) for part in backbone.modules())
        if not is_groupable(backbone) or has_shortcuts or loops(backbone):
            raise ConfigError(
                "algorithm=meta_networks: needs a backbone that is a chain of layers without shortcuts; "
                "choose backbone=conv4 for images, bag for texts or mlp for vectors"
            )
        refuse_running_averages(backbone)
        self.outputs, self.batching = outputs, AUTO
        self.normalises_batches = uses_batch_statistics(backbone)
        features: int = backbone.features  # type: ignore[assignment]
        self.backbone, self.head = backbone, nn.Linear(features, outputs)
        self.representation, self.representation_head = (
            copy.deepcopy(backbone),
            nn.Linear(features, outputs),
        )
        for p in self.representation_head.parameters():
            p.requires_grad_(False)  # it only affects gradients, which are constants of the meta-gradient
        self.of_example = nn.ModuleDict({kind: per_coordinate(hidden) for kind in kinds_in(self.base)})
        self.over_examples = nn.ModuleDict({kind: LSTMCell(2, hidden) for kind in kinds_in(backbone)})
        self.of_task = nn.ModuleDict({kind: nn.Linear(hidden, 1) for kind in kinds_in(backbone)})

    @property
    def base(self) -> nn.Sequential:
        return nn.Sequential(self.backbone, self.head)

    @property
    def embedder(self) -> nn.Sequential:
        return nn.Sequential(self.representation, self.representation_head)

    def own_backbone(self) -> nn.Module:
        return self.backbone

    def check(self, ways: int) -> None:
        if ways > self.outputs:
            raise ConfigError(f"the network has {self.outputs} ways, not {ways}; train with ways={ways}")

    def adapt(self, tasks: Episodes) -> dict[str, Any]:
        """Fast weights of the task [T, *shape] and of its examples [T, S, P], their keys [T, S, F], and the
        logarithms of their weights [T, S], which are zero if all classes have the same number of shots.
        """
        self.check(tasks.ways)
        with without_autocast(tasks.support_x):  # autocast within vmap produces mixed dtypes
            return self.learn(tasks.support_x, tasks.support_y, tasks.ways)

    def learn(self, support_x: Tensor, support_y: Tensor, ways: int) -> dict[str, Any]:
        task = self.task_weights(self.gradients(self.embedder, support_x, support_y))
        examples = self.example_weights(self.gradients(self.base, support_x, support_y))
        return {
            "task": task,
            "examples": examples,
            "keys": self.keys(task, support_x),
            "log weights": class_weights(support_y, ways).to(examples.dtype).log(),
            "ways": ways,
        }

    def predict(self, adapted: dict[str, Any], query_x: Tensor) -> Tensor:
        with without_autocast(query_x):
            return self.answer(adapted, query_x)

    def answer(self, adapted: dict[str, Any], query_x: Tensor) -> Tensor:
        similarities = cosines(self.keys(adapted["task"], query_x), adapted["keys"])
        shares = (similarities + adapted["log weights"].unsqueeze(1)).softmax(-1)  # [T, B, S]
        rows = (shares @ adapted["examples"]).flatten(0, 1)  # [T*B, P]
        like = fast_weights(self.base)
        parts = rows.split([p.numel() for p in like.values()], 1)
        fast = {n: part.view(-1, *p.shape) for (n, p), part in zip(like.items(), parts, strict=True)}
        logits = augmented(self.base, fast, query_x.flatten(0, 1).unsqueeze(1))
        return logits.view(*query_x.shape[:2], -1)[..., : adapted["ways"]]

    def keys(self, task: Params, x: Tensor) -> Tensor:
        """Keys of x [T, B, *item]: the features of the representation network, [T, B, F]."""
        return augmented(self.representation, task, x)

    def gradients(self, network: nn.Module, x: Tensor, y: Tensor) -> Params:
        """The gradient of the loss of each support example, [T, S, *shape] for each fast weight."""
        tasks, shots = y.shape
        constants = {name: p.detach() for name, p in network.named_parameters()}
        names = list(fast_weights(network))
        with torch.enable_grad():
            own = {
                name: p.expand(tasks * shots, *p.shape).requires_grad_(name in names)
                for name, p in constants.items()
            }
            outputs = run_on_tasks(network, own, x.flatten(0, 1).unsqueeze(1), self.batching)
            losses = cross_entropy(outputs, y.flatten().unsqueeze(1))
            grads = torch.autograd.grad(losses.sum(), [own[name] for name in names])
        return {name: g.unflatten(0, (tasks, shots)) for name, g in zip(names, grads, strict=True)}

    def example_weights(self, grads: Params) -> Tensor:
        """Fast weights of every example, [T, S, P]."""
        parts = [self.of_example[kind_of(g[0, 0])](preprocessed(g.flatten(2), RANGE)) for g in grads.values()]
        return torch.cat([part.squeeze(-1) for part in parts], -1)

    def task_weights(self, grads: Params) -> Params:
        """Fast weights of the representation network without its head, [T, *shape] each.

        Args:
            grads: the gradients of the examples, [T, S, *shape] each, which the LSTM reads in order.
        """
        weights = {}
        body = {name.removeprefix("0."): g for name, g in grads.items() if name.startswith("0.")}
        for name, g in body.items():
            kind = kind_of(g[0, 0])
            inputs = preprocessed(g.flatten(2), RANGE)  # [T, S, coordinates, 2]
            state = None
            for x in inputs.unbind(1):
                state = self.over_examples[kind](x.flatten(0, 1), state)
            assert state is not None
            weights[name] = self.of_task[kind](state[0]).view(len(g), *g.shape[2:])
        return weights


def augmented(network: nn.Module, fast: Params, x: Tensor) -> Tensor:
    """Run a network with slow and fast weights ("layer augmentation").

    Args:
        network: a chain of layers without residual blocks; its own weights are the slow ones.
        fast: the fast weights of each of G groups, [G, *shape] each.
        x: [G, B, *item].

    Returns:
        [G, B, *out].
    """

    def run(weights: Params, group: Tensor) -> Tensor:
        return run_chain(network, Streams(group), partial(augmented_layer, weights)).joined()

    return torch.vmap(run, randomness="different")(fast, x)


@dataclass(frozen=True)
class Streams:
    """The outputs of the slow and the fast weights for one input; `fast` is None after they were added.

    Not a tensor, so that adding two branches, which is not defined for streams, raises a TypeError.
    """

    slow: Tensor
    fast: Tensor | None = None

    def joined(self) -> Tensor:
        """The sum of the streams."""
        return self.slow if self.fast is None else self.slow + self.fast

    def each(self, layer: nn.Module) -> Streams:
        """The layer applied to each stream."""
        return Streams(layer(self.slow), None if self.fast is None else layer(self.fast))


def augmented_layer(fast: Params, name: str, layer: nn.Module, x: Streams) -> Streams:
    """Run one layer on both streams.

    A layer with weights takes the sum of the streams and outputs two new streams. Normalisation is applied to
    each stream. An activation is applied to each stream and the results are added (section 3.3). Any other
    layer takes the sum.
    """
    if isinstance(layer, (nn.Conv2d, nn.Linear)):
        inputs = x.joined()
        return Streams(layer(inputs), without_bias(layer, fast[f"{name}.weight"], inputs))
    if isinstance(layer, ACTIVATIONS):
        return Streams(x.each(layer).joined())
    if isinstance(layer, (*NORMS, nn.Identity)):
        return x.each(layer)
    return Streams(layer(x.joined()))


ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.Softplus, nn.Tanh)


def without_bias(layer: nn.Conv2d | nn.Linear, weight: Tensor, x: Tensor) -> Tensor:
    """The layer applied to x with this weight instead of its own, and without bias."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    return F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)


def fast_weights(network: nn.Module) -> Params:
    """The weights that have corresponding fast weights, by name: those of convolutions and linear layers."""
    return {
        f"{name}.weight": layer.weight
        for name, layer in layers(network)
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    }


def kinds_in(network: nn.Module) -> list[str]:
    """The kinds of layers in the network that have fast weights; each kind has its own generator."""
    return sorted({kind_of(p) for p in fast_weights(network).values()})


def kind_of(weight: Tensor) -> str:
    """The kind of layer that a weight [out, in] or [out, in, k, k] belongs to."""
    return "convolution" if weight.dim() == 4 else "linear"


def per_coordinate(hidden: int) -> nn.Sequential:
    """A network that maps the preprocessed gradient of a coordinate [..., 2] to its fast weight [..., 1]."""
    return nn.Sequential(
        nn.Linear(2, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1)
    )
