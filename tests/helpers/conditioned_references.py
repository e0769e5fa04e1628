"""Independent references for methods that make parts of a network for each task: one task at a time."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.embedded_references import (
    Scaled,
    balance_of,
    cosine,
    mean_cross_entropy,
    mean_of,
    run_with,
    tasks_of,
)
from metarun.algorithms.base import Algorithm
from metarun.tasks.episodes import Episodes


def gradient_by_name(total: Tensor, net: nn.Module) -> dict[str, Tensor]:
    params = {name: p for name, p in net.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(total, list(params.values()), materialize_grads=True)
    return dict(zip(params, grads, strict=True))


def tadam(algorithm: Algorithm, episodes: Episodes, steps: int) -> dict[str, Tensor]:
    """Distances one by one; the auxiliary task is that of iteration 0, where it is drawn."""
    net = copy.deepcopy(algorithm)
    total = net.penalty / 2 * sum((condition.multipliers**2).sum() for condition in net.conditions)
    for t, (x, y, query_x, query_y) in enumerate(tasks_of(episodes)):
        plain = {layer: nn.Identity() for layer in net.modulations}
        features, others = (run_with(net.backbone, plain, images) for images in (x, query_x))
        logits = net.classifier(torch.cat([features, others]))
        labels = episodes.classes[t][torch.cat([y, query_y])]
        total = total + mean_cross_entropy(list(logits), labels) / len(episodes)
        task = torch.stack([mean_of(features, y, k) for k in range(3)]).mean(0)
        filled = {}
        for layer, condition in zip(net.modulations, net.conditions, strict=True):
            gamma, beta = (through(part, task) for part in (condition.scale, condition.shift))
            filled[layer] = Scaled(condition.multipliers[0] * gamma + 1, condition.multipliers[1] * beta)
        features, queries = (run_with(net.backbone, filled, images) for images in (x, query_x))
        centres = [mean_of(features, y, k) for k in range(3)]
        rows = [torch.stack([-net.scale * (q - c).norm() for c in centres]) for q in queries]
        total = total + mean_cross_entropy(rows, query_y) / len(episodes)
    return gradient_by_name(total, net)


def through(network: nn.Module, x: Tensor) -> Tensor:
    """Two linear layers with x * sigmoid(x) between them, around the second of which is a shortcut."""
    first, second = network.layers
    hidden = first.weight @ x + first.bias
    hidden = hidden * (1 / (1 + torch.exp(-hidden)))
    return hidden + second.weight @ hidden + second.bias


def leo(algorithm: Algorithm, episodes: Episodes, steps: int) -> dict[str, Tensor]:
    """Equations 1 to 8, every pair of examples, sample and class on its own, with sums over the support."""
    net = copy.deepcopy(algorithm)
    linear = [net.encoder, *(net.relation[i] for i in (0, 2, 4)), net.decoder]
    rows = net.decoder.weight.T
    correlations = [cosine(rows[i], rows[j]) - (1.0 if i == j else 0.0) for i in range(3) for j in range(3)]
    total = net.decay / 2 * sum((layer.weight**2).sum() for layer in linear)
    total = total + net.orthogonality * sum(c**2 for c in correlations) / 9
    for x, y, query_x, query_y in tasks_of(episodes):
        support, query = (unit(net.backbone(images)) for images in (x, query_x))
        total = total + leo_loss(net, support, y, query, query_y) / len(episodes)
    return gradient_by_name(total, net)


def leo_loss(net: Algorithm, support: Tensor, y: Tensor, query: Tensor, query_y: Tensor) -> Tensor:
    shots = len(y) // 3  # as many samples for each class
    noise = net.noise(torch.zeros(1, 3, shots, 1))[0]
    related = []
    for one in support:
        pairs = [torch.cat([net.encoder.weight @ one, net.encoder.weight @ other]) for other in support]
        found = torch.stack([mlp(net.relation, pair) for pair in pairs])
        related.append(torch.stack([mean_of(found, y, k) for k in range(3)]).mean(0))
    centres = [mean_of(torch.stack(related), y, k) for k in range(3)]
    mean, deviation = (torch.stack([c[part] for c in centres]) for part in (slice(3), slice(3, 6)))
    deviation = torch.clamp(deviation.exp() - 1, min=1e-10)
    start = torch.stack([mean[k] + deviation[k] * noise[k, s] for k in range(3) for s in range(shots)])
    each = [(k, i) for k in range(3) for i in range(shots)]
    # log q - log p, with log q of a sample that is `noise` deviations from its mean
    logs = [-torch.log(deviation[k]) - noise[k, i] ** 2 / 2 + start[shots * k + i] ** 2 / 2 for k, i in each]
    divergence = torch.stack(logs).mean()
    codes, features = start, support.shape[1]

    def weights_of(codes: Tensor) -> Tensor:
        made = []
        for i, code in enumerate(codes):
            both = net.decoder.weight @ code
            wide = both[features:].exp() - (1 - (2 / (features + 3)) ** 0.5)
            made.append(both[:features] + torch.clamp(wide, min=1e-10) * noise[i // shots, i % shots])
        return torch.stack(made)

    def support_sum(weights: Tensor) -> Tensor:
        rows = logits_of(weights, support)
        each = [mean_cross_entropy([row], y[i : i + 1]) for i, row in enumerate(rows)]
        return 3 * shots * (balance_of(y) * torch.stack(each)).mean()

    for _ in range(2):
        (slope,) = torch.autograd.grad(support_sum(weights_of(codes)), codes, create_graph=True)
        codes = codes - net.rates * slope
    weights = weights_of(codes)
    for _ in range(2):
        (slope,) = torch.autograd.grad(support_sum(weights), weights, create_graph=True)
        weights = weights - net.tuning_rates * slope
    loss = mean_cross_entropy(logits_of(weights, query), query_y)
    return loss + net.divergence * divergence + net.distance * ((start - codes.detach()) ** 2).mean()


def logits_of(weights: Tensor, x: Tensor) -> list[Tensor]:
    """Several samples of the weights of each class; their logits are averaged."""
    samples = weights.split(len(weights) // 3)
    return [torch.stack([torch.stack([w @ q for w in own]).mean() for own in samples]) for q in x]


def unit(features: Tensor) -> Tensor:
    return torch.stack([f / f.pow(2).sum().sqrt() for f in features])


def mlp(network: nn.Sequential, x: Tensor) -> Tensor:
    for layer in network:
        x = torch.relu(x) if isinstance(layer, nn.ReLU) else layer.weight @ x
    return x


def lgm_net(net: Algorithm, support: Tensor, y: Tensor, query: Tensor, query_y: Tensor) -> Tensor:
    """One filter at a time; a context of `net.fixed` deviations from its mean, if there is such a thing."""
    maps, queries = (x.reshape(-1, *net.map_shape) for x in (support, query))
    encoded = net.context(maps)
    context = torch.stack([mean_of(encoded, y, k) for k in range(3)]).mean(0)
    half, fixed = len(context) // 2, getattr(net, "fixed", torch.zeros(2, 1, 1))
    layers = []
    for i, channels in enumerate((net.map_shape[0], 4)):
        sample = context[:half] + context[half:].exp().sqrt() * fixed[i, 0]
        made = net.generators[i].weight @ sample + net.generators[i].bias
        filters = made[: 4 * channels * 9].view(4, channels, 3, 3)
        layers.append((torch.stack([f / f.pow(2).sum().sqrt() for f in filters]), made[4 * channels * 9 :]))

    def transformed(x: Tensor) -> Tensor:
        x = torch.relu(F.conv2d(x, *layers[0], padding=1))
        return F.conv2d(F.max_pool2d(x, 2, ceil_mode=True), *layers[1], padding=1).flatten(1)

    rows = []
    known = transformed(maps)
    for q in transformed(queries):
        attention = torch.stack([net.scale * cosine(q, s) for s in known]).exp()
        rows.append(torch.stack([attention[y == k].mean() for k in range(3)]).log())
    return mean_cross_entropy(rows, query_y)
