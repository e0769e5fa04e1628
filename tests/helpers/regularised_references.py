"""Independent references of meta-regularised methods, written from the papers as loops over tasks."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, Normal, kl_divergence
from torch.func import functional_call

from helpers.references import loss_of, support_loss_of
from metarun.tasks.episodes import Episodes

Weights = dict[str, Tensor]


def wave(shape: torch.Size) -> Tensor:
    """Numbers of a shape that stand for noise, the same at each call."""
    count = shape.numel()
    return torch.sin(torch.arange(1, count + 1, dtype=torch.float64) * 12.9898).view(shape)


def mr_maml(algorithm: nn.Module, episodes: Episodes, steps: int, rate: float) -> Weights:
    """Yin et al. 2020, algorithm 2, with `wave` as noise: of the weights, or of each activation."""
    network = copy.deepcopy(algorithm.learner.backbone)
    head, deviations = copy.deepcopy(algorithm.learner.head), algorithm.__dict__["_modules"].get("deviations")
    theta = {f"learner.backbone.{name}": p for name, p in network.named_parameters()}
    theta |= {f"learner.head.{name}": p for name, p in head.named_parameters()}
    if deviations is not None:
        theta |= {f"deviations.{key}": p.detach().clone() for key, p in deviations.items()}
    theta = {name: p.detach().clone().requires_grad_() for name, p in theta.items()}
    prefix = "learner.backbone.encoder."

    def deviation_of(name: str) -> Tensor | None:
        key = f"deviations.{name.removeprefix('learner.').replace('.', '/')}"
        return theta[key].exp() if key in theta else None

    def within(weights: Weights, part: str) -> Weights:
        return {n.removeprefix(part): p for n, p in weights.items() if n.startswith(part)}

    def coded(weights: Weights, x: Tensor) -> tuple[Tensor, Tensor | float]:
        drawn = {}
        for name, p in weights.items():
            if name.startswith(prefix):
                spread = deviation_of(name)
                drawn[name] = p if spread is None else p + spread * wave(p.shape)
        out = functional_call(network.encoder, within(drawn, prefix), (x,))
        if deviations is not None:
            return out, 0.0
        mean, spread = out[:, : out.shape[1] // 2], (1 + out[:, out.shape[1] // 2 :].exp()).log()
        divergence = kl_divergence(Normal(mean, spread), Normal(torch.zeros_like(mean), 1.0)).mean()
        return mean + spread * wave(mean.shape[1:]), divergence

    def decoded(weights: Weights, codes: Tensor) -> Tensor:
        hidden = functional_call(network.decoder, within(weights, "learner.backbone.decoder."), (codes,))
        return hidden @ weights["learner.head.weight"].T + weights["learner.head.bias"]

    network.decoder.append(nn.Identity())
    losses = []
    for t in range(len(episodes)):
        weights = dict(theta)
        names = [n for n in theta if not n.startswith((prefix, "deviations."))]
        for _ in range(steps):
            outputs = decoded(weights, coded(weights, episodes.support_x[t])[0])
            support = support_loss_of(outputs, episodes.support_y[t])
            grads = torch.autograd.grad(support, [weights[n] for n in names], create_graph=True)
            weights |= {n: weights[n] - rate * g for n, g in zip(names, grads, strict=True)}
        codes, divergence = coded(weights, episodes.query_x[t])
        losses.append(loss_of(decoded(weights, codes), episodes.query_y[t]) + algorithm.weight * divergence)
    total = torch.stack(losses).mean()
    for name, p in theta.items():
        if (spread := deviation_of(name)) is not None:
            total = total + algorithm.weight * kl_divergence(Normal(p, spread), Normal(0.0, 1.0)).sum()
    grads = torch.autograd.grad(total, list(theta.values()))
    return dict(zip(theta, grads, strict=True))


def taml(algorithm: nn.Module, episodes: Episodes, steps: int, rate: float) -> Weights:
    """Jamal and Qi 2019: MAML's loss plus the change of entropy, or Theil's index of the losses before."""
    net = nn.Sequential(copy.deepcopy(algorithm.learner.backbone), copy.deepcopy(algorithm.learner.head))
    theta = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    adapted, before, entropies = [], [], []
    for t in range(len(episodes)):
        weights = theta
        for _ in range(steps):
            outputs = functional_call(net, weights, (episodes.support_x[t],))
            support = support_loss_of(outputs, episodes.support_y[t])
            grads = torch.autograd.grad(support, list(weights.values()), create_graph=True)
            weights = {n: p - rate * g for (n, p), g in zip(weights.items(), grads, strict=True)}
        start, end = (functional_call(net, each, (episodes.query_x[t],)) for each in (theta, weights))
        adapted.append(loss_of(end, episodes.query_y[t]))
        before.append(loss_of(start, episodes.query_y[t]))
        first, last = (Categorical(logits=each).entropy().mean() for each in (start, end))
        entropies.append(last - first)
    if algorithm.measure == "entropy":
        penalty = sum(entropies) / len(entropies)
    else:
        mean = sum(before) / len(before)
        penalty = sum(each / mean * torch.log(each / mean) for each in before) / len(before)
    total = sum(adapted) / len(adapted) + algorithm.weight * penalty
    grads = torch.autograd.grad(total, list(theta.values()))
    names = {"0": "learner.backbone", "1": "learner.head"}
    return {names[name[0]] + name[1:]: g for name, g in zip(theta, grads, strict=True)}
