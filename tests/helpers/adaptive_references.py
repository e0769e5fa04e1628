"""Independent references of methods whose adaptation depends on the task, written from the papers."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from helpers.embedded_references import mean_of
from helpers.references import loss_of, support_loss_of
from metarun.tasks.episodes import Episodes

Weights = dict[str, Tensor]


def alfa_rule(places: Weights):
    """Baik et al. 2020, one number at a time: two linear layers read means and make a rate and a decay each.

    `places` gives, for each weight of the reference's network, where its rates are in the meta-parameters.
    """

    def rule(meta: Weights):
        first, second = (
            (meta[f"inner_loop.generator.{layer}.weight"], meta[f"inner_loop.generator.{layer}.bias"])
            for layer in (0, 2)
        )

        def update(w: Weights, g: Weights, loss: Tensor, step: int) -> Weights:
            state = torch.stack([each.sum() / each.numel() for each in (*w.values(), *g.values())])
            hidden = (first[0] @ state + first[1]).clamp(min=0)
            made = second[0] @ hidden + second[1]
            new = {}
            for number, name in enumerate(w):
                alpha = meta[places[name]][step] * made[number]
                beta = 1 - meta[places[name].replace(".rates.", ".decays.")][step] * made[len(w) + number]
                new[name] = beta * w[name] - alpha * g[name]
            return new

        return update

    return rule


class Given(nn.Module):
    """Channels scaled and shifted by numbers that are set from outside."""

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C] or [B, C, H, W], one channel after the other."""
        channels = [x[:, c] * (1 + self.scale[c]) + self.shift[c] for c in range(len(self.scale))]
        return torch.stack(channels, 1)


def mmaml(algorithm: nn.Module, episodes: Episodes, steps: int, rate: float) -> Weights:
    """Vuorio et al. 2019, algorithm 1, with the encoder of images; classes count equally."""
    net = nn.Sequential(copy.deepcopy(algorithm.learner.backbone), copy.deepcopy(algorithm.learner.head))
    encoder, modulators = copy.deepcopy(algorithm.encoder), copy.deepcopy(algorithm.modulators)
    given = {}
    for parent in list(net.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer).__name__ == "TaskScale":
                setattr(parent, name, given.setdefault(len(given), Given()))
    theta = dict(net.named_parameters())
    theta = {name: p.detach().clone().requires_grad_() for name, p in theta.items()}
    losses = []
    for t in range(len(episodes)):
        maps = encoder.convolutions(episodes.support_x[t])
        encoded = torch.relu(maps @ encoder.linear.weight.T + encoder.linear.bias)
        embedding = torch.stack([mean_of(encoded, episodes.support_y[t], k) for k in range(3)]).mean(0)
        for place, modulator in zip(given.values(), modulators, strict=True):
            made = modulator.weight @ embedding + modulator.bias
            place.scale, place.shift = made[: len(made) // 2], made[len(made) // 2 :]
        weights = theta
        for _ in range(steps):
            outputs = functional_call(net, weights, (episodes.support_x[t],))
            support = support_loss_of(outputs, episodes.support_y[t])
            grads = torch.autograd.grad(support, list(weights.values()), create_graph=True)
            weights = {n: p - rate * g for (n, p), g in zip(weights.items(), grads, strict=True)}
        losses.append(loss_of(functional_call(net, weights, (episodes.query_x[t],)), episodes.query_y[t]))
    names = {"0": "learner.backbone", "1": "learner.head"}
    own = {names[name[0]] + name[1:]: p for name, p in theta.items()}
    own |= dict(encoder.named_parameters("encoder")) | dict(modulators.named_parameters("modulators"))
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(own.values()))
    return dict(zip(own, grads, strict=True))
