"""Independent reference of HSML, written from the paper: one task, one example and one node at a time."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from helpers.embedded_references import balance_of
from helpers.references import loss_of, support_loss_of
from metarun.tasks.episodes import Episodes

Weights = dict[str, Tensor]


def hsml(algorithm: nn.Module, episodes: Episodes, steps: int, rate: float) -> Weights:
    """Yao et al. 2019, section 4, on images; classes count equally."""
    copied = copy.deepcopy(algorithm)
    net = nn.Sequential(copied.learner.backbone, copied.learner.head)
    names = {"0": "learner.backbone", "1": "learner.head"}
    theta = dict(net.named_parameters())
    losses = []
    for t in range(len(episodes)):
        x, y = episodes.support_x[t], episodes.support_y[t]
        pairs = [
            torch.cat([image_vector(copied.pairs.network, x[i]), torch.eye(3)[y[i]]]) for i in range(len(y))
        ]
        vector, error = AGGREGATORS[type(copied.aggregator).__name__](copied.aggregator, pairs, balance_of(y))
        both = torch.cat([vector, root(copied.levels, vector)])
        weights = {}
        for name, p in theta.items():
            gate = copied.gates[(names[name[0]][8:] + name[1:]).replace(".", "/")]
            weights[name] = p / (1 + torch.exp(-linear(gate, both))).view(p.shape)
        for _ in range(steps):
            support = support_loss_of(functional_call(net, weights, (x,)), y)
            grads = torch.autograd.grad(support, list(weights.values()), create_graph=True)
            weights = {n: p - rate * g for (n, p), g in zip(weights.items(), grads, strict=True)}
        query = loss_of(functional_call(net, weights, (episodes.query_x[t],)), episodes.query_y[t])
        losses.append(query + copied.reconstruction * error)
    own = dict(copied.named_parameters())
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(own.values()))
    return dict(zip(own, grads, strict=True))


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer.weight @ x + layer.bias


def image_vector(network: nn.Sequential, image: Tensor) -> Tensor:
    first, second, *dense = [part for part in network if hasattr(part, "weight")]
    maps = torch.relu(F.conv2d(image[None], first.weight, first.bias, padding=2))
    maps = normalised(F.max_pool2d(maps, 3, 2, 1))
    maps = normalised(torch.relu(F.conv2d(maps, second.weight, second.bias, padding=2)))
    vector = F.max_pool2d(maps, 3, 2, 1).flatten()
    for layer in dense:
        vector = torch.relu(linear(layer, vector))
    return vector


def normalised(maps: Tensor) -> Tensor:
    """Local response norm over all of these few channels: x / (1 + 0.001 / 9 sum x^2)^0.75."""
    return maps / (1 + 0.001 / 9 * (maps**2).sum(1, keepdim=True)) ** 0.75


def pooling(part: nn.Module, pairs: list[Tensor], balance: Tensor) -> tuple[Tensor, Tensor]:
    """The codes' weighted mean through a last layer, and half of the mean squared error."""
    codes, errors = [], []
    for pair in pairs:
        code = torch.relu(linear(part.encoder[2], torch.relu(linear(part.encoder[0], pair))))
        found = linear(part.decoder[2], torch.relu(linear(part.decoder[0], code)))
        codes.append(code)
        errors.append(sum((a - b) ** 2 for a, b in zip(pair, found, strict=True)) / len(pair) / 2)
    mean = sum(w * code for w, code in zip(balance, codes, strict=True)) / len(pairs)
    error = sum(w * e for w, e in zip(balance, errors, strict=True)) / len(pairs)
    return torch.relu(linear(part.last[0], mean)), error


def recurrent(part: nn.Module, pairs: list[Tensor], balance: Tensor) -> tuple[Tensor, Tensor]:
    """The mean state of an encoder; a decoder, which reads its own output, gives the pairs in reverse."""
    state, states = torch.zeros(part.encoder.hidden_size), []
    for pair in pairs:
        state = gru(part.encoder, pair, state)
        states.append(state)
    given, found = torch.zeros_like(pairs[0]), []
    for _ in pairs:
        state = gru(part.decoder, given, state)
        given = linear(part.output, state)
        found.insert(0, given)
    error = sum(w * ((a - b) ** 2).mean() for w, a, b in zip(balance, pairs, found, strict=True)) / len(pairs)
    return sum(w * s for w, s in zip(balance, states, strict=True)) / len(pairs), error


def gru(cell: nn.GRUCell, x: Tensor, h: Tensor) -> Tensor:
    given = (cell.weight_ih @ x + cell.bias_ih).view(3, -1)
    before = (cell.weight_hh @ h + cell.bias_hh).view(3, -1)
    reset, update = (1 / (1 + torch.exp(-given[i] - before[i])) for i in (0, 1))
    return update * h + (1 - update) * torch.tanh(given[2] + reset * before[2])


def root(levels: nn.Sequential, vector: Tensor) -> Tensor:
    """The vector of the root of the hierarchy, node by node."""
    below = [vector]
    for level in levels:
        above = [torch.zeros_like(vector) for _ in level.centres]
        for one in below:
            near = [torch.exp(-((one - c) ** 2).sum() / 2 / level.spread) for c in level.centres]
            for k, layer in enumerate(level.layers):
                above[k] = above[k] + near[k] / sum(near) * torch.tanh(linear(layer, one))
        below = above
    return below[0]


AGGREGATORS = {"Pooling": pooling, "Recurrent": recurrent}
