"""Independent references of probabilistic methods, written from the papers as loops over tasks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.func import functional_call

from helpers import references
from helpers.references import loss_of, support_loss_of
from metarun.tasks.episodes import Episodes


def platipus(algorithm: nn.Module, episodes: Episodes, steps: int, rate: float) -> dict[str, Tensor]:
    """Finn, Xu and Levine 2018, algorithm 1, with the algorithm's own noise; the gradient by its names."""
    net = references.network(algorithm.learner.backbone, algorithm.learner.head)
    learned = {name: p.detach().clone().requires_grad_() for name, p in algorithm.named_parameters()}
    places = {name: place_of(name) for name, _ in net.named_parameters()}
    mu = {name: learned[f"learner.{place}"] for name, place in places.items()}

    def deviation(kind: str, name: str) -> Tensor:
        return learned[f"{kind}_deviations.{places[name].replace('.', '/')}"].exp()

    def stepped(weights: dict[str, Tensor], loss: Tensor, size: Tensor | float) -> dict[str, Tensor]:
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
        return {name: weights[name] - size * g for name, g in zip(weights, grads, strict=True)}

    like = torch.zeros(1, sum(p.numel() for p in mu.values()))
    noise = algorithm.draws(1, 1, like)[0, 0]
    sizes = {name: p.numel() for name, p in algorithm.learner.named_parameters()}
    parts = dict(zip(sizes, noise.split(list(sizes.values())), strict=True))
    losses = []
    for t in range(len(episodes)):
        x, y, query_x, query_y = (
            getattr(episodes, key)[t] for key in ("support_x", "support_y", "query_x", "query_y")
        )
        p_mean = stepped(mu, support_loss_of(functional_call(net, mu, (x,)), y), learned["prior_rate"])
        before = loss_of(functional_call(net, mu, (query_x,)), query_y)
        q_mean = stepped(mu, before, learned["posterior_rate"])
        divergence, weights = 0.0, {}
        for name in mu:
            q = Normal(q_mean[name], deviation("posterior", name))
            p = Normal(p_mean[name], deviation("prior", name))
            divergence = divergence + kl_divergence(q, p).sum()
            weights[name] = q.mean + q.stddev * parts[places[name]].view(q.mean.shape)
        for _ in range(steps):
            weights = stepped(weights, support_loss_of(functional_call(net, weights, (x,)), y), rate)
        loss = loss_of(functional_call(net, weights, (query_x,)), query_y)
        losses.append(loss + algorithm.weight * divergence / len(query_x))
    total = torch.stack(losses).mean()
    return dict(zip(learned, torch.autograd.grad(total, list(learned.values())), strict=True))


def place_of(name: str) -> str:
    """The name in the learner of a weight of the reference's network: 0.x is backbone.x, 1.x is head.x."""
    first, _, rest = name.partition(".")
    return f"{'backbone' if first == '0' else 'head'}.{rest}"
