"""HSML: hierarchically structured meta-learning (Yao, Wei, Huang and Li 2019)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from metarun.algorithms.feature_method import one_hot
from metarun.algorithms.maml import MAML
from metarun.errors import ConfigError, check_above_0, check_bound, check_least
from metarun.inner_loops.base import InnerLoop, Loss, PerWeight
from metarun.nn.per_task import Params
from metarun.tasks.episodes import Episodes, Outcome
from metarun.tasks.objectives import class_weights


class HSML(MAML):
    """A gate that depends on the cluster of a task scales the initial weights, from which inner steps adapt.

    - Task representation (section 4.1): an autoencoder reads an embedding of every support example with its
      label. The task's vector g is the mean of its codes after a last layer (`pooling`), or the mean of the
      states of a recurrent encoder (`recurrent`), and the meta-loss contains the reconstruction error.
    - Hierarchical clustering (section 4.2): the nodes of a level have learned centres. Node j of the level
      before belongs to node k by p = softmax_k(-||h_j - c_k||^2 / (2 spread)), and
      h_k = sum_j p_jk tanh(W_k h_j + b_k); the first level reads g, and the last one is a single root.
    - Knowledge adaptation (section 4.3): a linear layer with a sigmoid maps g and the root's vector to a gate
      of every weight, and the inner loop starts from the gated weights.

    Sizes and the weight of the reconstruction are those of the authors' code. An image is embedded by two
    convolutions and two linear layers, beside its label as a one-hot vector. The code takes a spread of 2 for
    functions and of 10 for images, where `hidden` is 128.

    Departures: the code assigns the nodes of upper levels by a linear layer instead of the distance to
    centres. The code does not gate the weights of norms, which its inner loop does not adapt. Cells of the
    recurrent autoencoder are PyTorch's GRU. Meta-gradients are not clipped (`clip.value=3`; the code does
    so for pooling, and at 10 for mini-ImageNet). Classes count equally in pooling and reconstruction. Linear
    layers start as Glorot and Bengio's, biases at 0 (the code: the output of the recurrent decoder normal
    with deviation 1 and bias 0.1, biases of the levels as their weights); the embedding of images starts as
    PyTorch's layers (normal with deviation 0.04, biases 0.1, convolutions without a bias).

    Args:
        backbone, inner_loop, outputs, item_shape, classes, transductive: see `MAML` and `Algorithm`.
        aggregator: "recurrent" or "pooling".
        hidden: the size of g and of the vectors of all nodes.
        clusters: the number of nodes of each level below the root, from the first one on.
        spread: squared sigma of the assignments, above 0.
        reconstruction: the weight of the reconstruction error, xi in the paper.
        width: the channels of the convolutions that embed images.

    Raises:
        ConfigError: if a setting is out of range, or tasks with classes have no images.
    """

    needs = Episodes
    plays = False
    embeds_first = False

    predicts_distributions = False  # it reads as many values of an example as there are outputs

    def __init__(
        self,
        backbone: nn.Module,
        inner_loop: InnerLoop,
        outputs: int,
        item_shape: tuple[int, ...],
        classes: int | None = None,
        transductive: bool = True,
        aggregator: Literal["recurrent", "pooling"] = "recurrent",
        hidden: int = 40,
        clusters: Sequence[int] = (4, 2),
        spread: float = 2.0,
        reconstruction: float = 0.01,
        width: int = 32,
    ) -> None:
        super().__init__(backbone, inner_loop, outputs, transductive=transductive)
        check_least("algorithm", 1, hidden=hidden, width=width)
        check_least("algorithm", 0, reconstruction=reconstruction)
        check_above_0("algorithm", spread=spread)
        check_bound(
            "algorithm",
            {"clusters": list(clusters)},
            lambda nodes: min(nodes, default=0) >= 1,
            "the clusters of one or more levels, at least 1 each",
        )
        self.reconstruction, self.embeds_images = reconstruction, classes is not None
        self.pairs = ImagePairs(item_shape, outputs, width) if classes else ValuePairs(item_shape, outputs)
        kind = Recurrent if aggregator == "recurrent" else Pooling
        self.aggregator = kind(self.pairs.size, hidden, images=classes is not None)
        self.levels = nn.Sequential(*(Level(nodes, hidden, spread) for nodes in (*clusters, 1)))
        self.gates = nn.ModuleDict(
            {PerWeight.key(n): dense(2 * hidden, p.numel()) for n, p in self.learner.own_parameters().items()}
        )

    @property
    def unused_settings(self) -> Mapping[str, str]:
        images = {} if self.embeds_images else {"algorithm.width": "for tasks without classes of images"}
        return {**super().unused_settings, **images}

    def inner_problem(self, tasks: Episodes) -> tuple[Loss, Params, Params]:  # type: ignore[override]
        loss, slow, fast = super().inner_problem(tasks)
        return loss, slow, self.gated(fast, self.represented(tasks)[0])

    def meta_loss(self, tasks: Episodes) -> Outcome:
        """The loss of the queries plus the weighted reconstruction error."""
        loss, _, fast = super().inner_problem(tasks)
        vectors, error = self.represented(tasks)
        outcome = self.outcome({"params": self.inner_loop(loss, self.gated(fast, vectors))}, tasks)
        return replace(outcome, loss=outcome.loss + self.reconstruction * error)

    def represented(self, tasks: Episodes) -> tuple[Tensor, Tensor]:
        """The vectors g of T tasks, [T, hidden], and the reconstruction errors, [T]."""
        if tasks.classes is None:
            weights = tasks.there / tasks.there.to(torch.float64).mean(1, keepdim=True)
        else:
            weights = class_weights(tasks.support_y, tasks.ways)
        pairs = self.pairs(tasks)
        return self.aggregator(pairs, weights.to(pairs.dtype))

    def gated(self, params: Params, vectors: Tensor) -> Params:
        """Weights [T, *shape] scaled by the gates of tasks with vectors [T, hidden]."""
        own = self.learner.own_parameters()
        root = self.levels(vectors.unsqueeze(1)).squeeze(1)
        inputs = torch.cat([vectors, root], 1)
        gated = {}
        for name, p in params.items():
            gate = self.gates[PerWeight.key(name)](inputs).sigmoid().unflatten(1, own[name].shape)
            gated[name] = p * gate[:, : p.shape[1]]  # of a head, the rows of the ways in the task
        return gated


class ValuePairs(nn.Module):
    """The inputs and the values of the support examples of a regression, [T, S, size]."""

    def __init__(self, item_shape: tuple[int, ...], values: int) -> None:
        super().__init__()
        self.size = math.prod(item_shape) + values

    def forward(self, tasks: Episodes) -> Tensor:
        return torch.cat([tasks.support_x.flatten(2), tasks.support_y], 2)


class ImagePairs(nn.Module):
    """The embeddings of support images beside their labels as one-hot vectors, [T, S, size]."""

    def __init__(self, item_shape: tuple[int, ...], ways: int, width: int) -> None:
        super().__init__()
        if len(item_shape) != 3:
            raise ConfigError(
                "algorithm=hsml: with classes it embeds images, and this dataset has none; choose "
                "algorithm=maml"
            )
        layers: list[nn.Module] = []
        for channels in (item_shape[0], width):
            layers += [nn.Conv2d(channels, width, 5, padding=2), nn.ReLU()]
        pool, norm = nn.MaxPool2d(3, 2, 1), nn.LocalResponseNorm(9, alpha=0.001, beta=0.75)
        layers = [*layers[:2], pool, norm, *layers[2:], norm, pool, nn.Flatten()]
        sides = [-(-side // 4) for side in item_shape[1:]]
        linear = [nn.Linear(width * math.prod(sides), 384), nn.ReLU(), nn.Linear(384, 64), nn.ReLU()]
        self.network = nn.Sequential(*layers, *linear)
        self.ways, self.size = ways, 64 + ways

    def forward(self, tasks: Episodes) -> Tensor:
        vectors = self.network(tasks.support_x.flatten(0, 1)).unflatten(0, tasks.support_x.shape[:2])
        return torch.cat([vectors, one_hot(tasks.support_y, self.ways, vectors)], 2)


class Pooling(nn.Module):
    """The pooling autoencoder: each example is encoded and decoded on its own, and codes are averaged.

    Args:
        size: of an example.
        hidden: of a code.
        images: whether the examples are embedded images, for which the layer between is larger.
    """

    def __init__(self, size: int, hidden: int, images: bool) -> None:
        super().__init__()
        between = 96 if images else 20
        self.encoder = nn.Sequential(dense(size, between), nn.ReLU(), dense(between, hidden), nn.ReLU())
        self.decoder = nn.Sequential(dense(hidden, between), nn.ReLU(), dense(between, size))
        self.last = nn.Sequential(dense(hidden, hidden), nn.ReLU())

    def forward(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The vectors [T, hidden] and errors [T] of examples [T, S, size] with weights [T, S], mean 1."""
        codes = self.encoder(x)
        squares = 0.5 * (x - self.decoder(codes)).square().mean(2)
        return self.last((weights.unsqueeze(2) * codes).mean(1)), (weights * squares).mean(1)


class Recurrent(nn.Module):
    """The recurrent autoencoder: the decoder repeats the examples in reverse order, from the last state.

    Args:
        size: of an example.
        hidden: of a state.
        images: whether the examples are embedded images; pairs of numbers have a linear layer before.
    """

    def __init__(self, size: int, hidden: int, images: bool) -> None:
        super().__init__()
        self.before = nn.Identity() if images else dense(size, 20)
        size = size if images else 20
        self.encoder, self.decoder = nn.GRUCell(size, hidden), nn.GRUCell(size, hidden)
        self.output = dense(hidden, size)

    def forward(self, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """As `Pooling.forward`. An example whose weight is 0 changes no state."""
        x, there = self.before(x), weights > 0
        state, states = x.new_zeros(len(x), self.encoder.hidden_size), []
        for s in range(x.shape[1]):
            state = torch.where(there[:, s : s + 1], self.encoder(x[:, s], state), state)
            states.append(state)
        given, errors = torch.zeros_like(x[:, 0]), []
        for s in reversed(range(x.shape[1])):
            state = torch.where(there[:, s : s + 1], self.decoder(given, state), state)
            given = torch.where(there[:, s : s + 1], self.output(state), given)
            errors.append(weights[:, s] * (x[:, s] - given).square().mean(1))
        vector = (weights.unsqueeze(2) * torch.stack(states, 1)).mean(1)
        return vector, torch.stack(errors).mean(0)


class Level(nn.Module):
    """One level of the hierarchy: what its nodes make of the vectors of the level before.

    Args:
        nodes: of this level.
        size: of a vector.
        spread: see `HSML`.
    """

    def __init__(self, nodes: int, size: int, spread: float) -> None:
        super().__init__()
        self.spread = spread
        bound = math.sqrt(6 / (1 + size))
        self.centres = nn.Parameter(torch.empty(nodes, size).uniform_(-bound, bound))
        self.layers = nn.ModuleList(dense(size, size) for _ in range(nodes))

    def assignments(self, vectors: Tensor) -> Tensor:
        """The share of each node [T, J, K] in vectors [T, J, size]; they sum to 1 over K."""
        distances = (vectors.unsqueeze(2) - self.centres).square().sum(3)
        return (-distances / (2 * self.spread)).softmax(2)

    def forward(self, vectors: Tensor) -> Tensor:
        """Vectors [T, K, size] of vectors [T, J, size]."""
        values = torch.stack([layer(vectors) for layer in self.layers], 2).tanh()  # [T, J, K, size]
        return (self.assignments(vectors).unsqueeze(3) * values).sum(1)


def dense(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with the initial weights of Glorot and Bengio (2010)."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
