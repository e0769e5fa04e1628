"""An independent reference of MetaNAS: a plain loop over tasks, operations and pairs of inputs."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.references import support_loss_of
from metarun.algorithms.meta_nas import MetaNAS
from metarun.backbones.cells import Cells
from metarun.tasks.episodes import Episodes


def features(net: Cells, x: Tensor, temperature: float) -> Tensor:
    """The output of cells: each pair of inputs is formed and weighed."""
    before = last = net.stem(x)
    for cell in net.cells:
        kind = "reduction" if cell.halves else "normal"
        states = [cell.first(before), cell.second(last)]
        for i, edges in enumerate(cell.edges):
            alpha = torch.softmax(net.architecture[f"{kind}_operations_{i}"] / temperature, 1)
            beta = torch.softmax(net.architecture[f"{kind}_inputs_{i}"] / temperature, 0)
            mixed = []
            for j, operations in enumerate(edges):
                kept = [o for o in range(len(operations)) if alpha[j, o] > net.threshold]
                mixed.append(sum(alpha[j, o] * operations[o](states[j]) for o in kept))
            node, pair = 0, 0
            for a in range(len(states)):
                for b in range(a + 1, len(states)):
                    if beta[pair] > net.threshold:
                        node = node + beta[pair] * (mixed[a] + mixed[b])
                    pair += 1
            states.append(node)
        before, last = last, torch.cat(states[2:], 1)
    return F.adaptive_avg_pool2d(last, 1).flatten(1)


def update(algorithm: MetaNAS, episodes: Episodes, steps: int) -> dict[str, Tensor]:
    """What is subtracted from the weights, by torch's Adam with two learning rates."""
    loop = algorithm.inner_loop
    net = nn.ModuleDict({"backbone": algorithm.learner.backbone, "head": algorithm.learner.head})
    architecture = [name for name, _ in net.named_parameters() if "architecture" in name]
    totals = {f"learner.{name}": torch.zeros_like(p) for name, p in net.named_parameters()}
    for t in range(len(episodes)):
        own = copy.deepcopy(net)
        weights = dict(own.named_parameters())
        groups = [
            {"params": [p for n, p in weights.items() if n not in architecture], "lr": loop.rate},
            {"params": [weights[n] for n in architecture], "lr": loop.architecture_rate},
        ]
        adam = torch.optim.Adam(groups, betas=(0.0, 0.999))
        x = torch.cat([episodes.support_x[t], episodes.query_x[t]])
        y = torch.cat([episodes.support_y[t], episodes.query_y[t]])
        for temperature in torch.linspace(1.0, 0.05, steps).tolist() if steps > 1 else [0.05]:
            adam.zero_grad()
            support_loss_of(own["head"](features(own["backbone"], x, temperature)), y).backward()
            adam.step()
        for name, p in net.named_parameters():
            rate = 0.6 if name in architecture else 1.0
            totals[f"learner.{name}"] += rate * (p - weights[name]).detach() / len(episodes)
    return totals
