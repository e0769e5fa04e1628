"""Independent references of methods whose adaptation depends on the task, written from the papers."""

from __future__ import annotations

import torch
from torch import Tensor

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
