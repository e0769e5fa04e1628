"""Independent references for methods that generate examples: plain loops, written from the papers."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from helpers.embedded_references import balance_of, mean_cross_entropy, mean_of, tasks_of
from metarun.tasks.episodes import Episodes


def hallucination(net, support: Tensor, y: Tensor, query: Tensor, query_y: Tensor) -> Tensor:
    """Each example and its noise through three layers, one after the other."""
    examples, labels = list(support), list(y)
    for x, label in zip(support, y, strict=True):
        for z in net.noise(support):
            made = torch.cat([x, z])
            for layer in net.hallucinator[::2]:
                made = (layer.weight @ made + layer.bias).clamp(min=0)
            examples.append(made)
            labels.append(label)
    first, second = net.embedding[0], net.embedding[2]

    def embedded(x: Tensor) -> Tensor:
        return second.weight @ (first.weight @ x + first.bias).clamp(min=0) + second.bias

    x, y = torch.stack([embedded(x) for x in examples]), torch.stack(labels)
    query = torch.stack([embedded(q) for q in query])
    centres = [mean_of(x, y, k) for k in range(3)]
    rows = [torch.stack([-(q - c).square().sum() for c in centres]) for q in query]
    return mean_cross_entropy(rows, query_y)


def generated_images(generator, support: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    """Images of one task, by the convolutions' weights; every class counts equally in the task's vector."""
    maps = support
    for layer in generator.encoder[::2]:
        maps = F.leaky_relu(F.conv2d(maps, layer.weight, layer.bias, stride=2, padding=1), 0.2)
    vectors = maps.flatten(2).mean(2)
    task = torch.stack([mean_of(vectors, y, k) for k in range(int(y.max()) + 1)]).mean(0)
    images = []
    for z in noise:
        start = generator.start.weight @ torch.cat([task, z]) + generator.start.bias
        image = F.leaky_relu(start, 0.2).view(1, *generator.first_map)
        for layer in (generator.body[2], generator.body[5]):
            image = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
            image = F.conv2d(image, layer.weight, layer.bias, padding=1)
            image = F.leaky_relu(image, 0.2) if layer is generator.body[2] else 1 / (1 + torch.exp(-image))
        images.append(image[0, :, : generator.shape[1], : generator.shape[2]])
    return torch.stack(images)


def real_share(logits: Tensor) -> Tensor:
    """The probability that an image is one of the N ways, and not generated, [B]."""
    return logits.exp().sum(1) / (1 + logits.exp().sum(1))


def two_players(losses, algorithm) -> dict[str, Tensor]:
    """Each player's gradient of its own loss; `losses` are (of the classifier, of the generator)."""
    params = {name: p for name, p in algorithm.named_parameters() if p.requires_grad}
    found = {}
    for loss, own in zip(losses, (False, True), strict=True):
        names = [name for name in params if name.startswith("generator.") == own]
        grads = torch.autograd.grad(loss, [params[name] for name in names], retain_graph=True)
        found |= dict(zip(names, grads, strict=True))
    return {name: found[name] for name in params}


def metagan(algorithm, episodes: Episodes, steps: int) -> dict[str, Tensor]:
    net = copy.deepcopy(algorithm)
    classifier, generator = 0.0, 0.0
    for x, y, query_x, query_y in tasks_of(episodes):
        support, query = net.backbone(x), net.backbone(query_x)
        sums = [net.shots * mean_of(support, y, way) for way in range(3)]

        def logits(features: Tensor, sums=sums) -> Tensor:
            pairs = [
                torch.cat([s.view(net.map_shape), q.view(net.map_shape)]) for q in features for s in sums
            ]
            return net.relation(torch.stack(pairs)).view(-1, 3)

        images = generated_images(net.generator, x, y, net.noise(x)[0])
        real, made = logits(query), logits(net.backbone(images.detach()))
        loss = mean_cross_entropy(list(real), query_y)
        loss = loss - real_share(real).log().mean() - (1 - real_share(made)).log().mean()
        classifier = classifier + loss / len(episodes)
        generator = generator - real_share(logits(net.backbone(images))).log().mean() / len(episodes)
    return two_players((classifier, generator), net)


def metagan_maml(algorithm, episodes: Episodes, steps: int) -> dict[str, Tensor]:
    """The inner loop unrolled for one task after the other, with images as constants."""
    net = copy.deepcopy(algorithm)
    body = nn.Sequential(net.learner.backbone, net.learner.head)
    start = dict(body.named_parameters())
    classifier, generator = 0.0, 0.0
    for x, y, query_x, query_y in tasks_of(episodes):
        images = generated_images(net.generator, x, y, net.noise(x)[0])
        balance, weights = balance_of(y).to(x), dict(start)
        ways = int(y.max()) + 1

        def logits(weights, x: Tensor, ways=ways) -> Tensor:
            return functional_call(body, weights, (x,))[:, :ways]

        for _ in range(steps):
            real, made = logits(weights, x), logits(weights, images.detach())
            of_real = -(balance * real_share(real).log()).mean()
            loss = (balance * F.cross_entropy(real, y, reduction="none")).mean()
            loss = loss + 0.7 * (of_real - (1 - real_share(made)).log().mean())
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {n: w - 0.1 * g for (n, w), g in zip(weights.items(), grads, strict=True)}
        real, made = logits(weights, query_x), logits(weights, images.detach())
        loss = F.cross_entropy(real, query_y)
        loss = loss - real_share(real).log().mean() - (1 - real_share(made)).log().mean()
        classifier = classifier + loss / len(episodes)
        generator = generator - real_share(logits(weights, images)).log().mean() / len(episodes)
    return two_players((classifier, generator), net)
