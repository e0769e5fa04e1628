"""Neural processes (Garnelo et al. 2018a, 2018b; Kim et al. 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm
from metarun.errors import ConfigError, check_least
from metarun.tasks import gaussians, numbers
from metarun.tasks.episodes import Episodes, Outcome
from metarun.tasks.spec import TaskSpec

Gaussian = tuple[Tensor, Tensor]  # means and standard deviations


class NeuralProcess(Algorithm):
    """Predict the distribution of values from the encoded support (the context) of a task.

    Each context point (x, y) is encoded. A decoder maps the encoded context and a query x to a Gaussian of y.
    The context reaches it on two paths:

    - the deterministic path: the mean of the encoded points (conditional neural processes, Garnelo et al.
      2018a), or an attention of the query x over the context x (attentive neural processes, Kim et al. 2019,
      section 3), whose heads are summed;
    - the latent path (Garnelo et al. 2018b): one latent variable z of the task, q(z | points) by the mean of
      encoded points.

    Without the latent path, the loss is the negative log-likelihood of the targets. With it, the loss is the
    negative evidence lower bound, -E_q(z | targets) log p(y | x, context, z) + KL(q(z | targets) || q(z |
    context)) (Kim et al. 2019, equation 3), with one sample of z. Both are divided by the number of targets,
    which are the queries and all support points, also those that are left out of the context. Layers, bounds
    of standard deviations and initial weights are those of the papers' code,
    github.com/deepmind/neural-processes.

    Predictions are scored by the Monte Carlo estimate log 1/L sum_l prod_i p(y_i | x_i, context, z_l) with
    samples z_l of q(z | context), in expectation a lower bound. They belong to the adapted state, so that all
    predictions for a task are by the same ones.

    Departures: in the papers, the number of targets also changes from step to step. There is no
    self-attention between the points of the context, as in the code; the paper has it for images.

    Args:
        item_shape, outputs: passed by the builder; see `Algorithm`.
        path: the deterministic path, "mean", "attention", or None.
        latent: whether there is a latent path.
        width: of all layers, and of z.
        heads: of the attention; they divide the width.
        samples: L, the number of samples of z in predictions.

    Raises:
        ConfigError: there is no path, or a number is out of bounds.
    """

    needs = Episodes
    unread: ClassVar = {"heads": "path!=attention", "samples": "latent=false"}

    def __init__(
        self,
        item_shape: tuple[int, ...],
        outputs: int,
        path: Literal["mean", "attention"] | None = "attention",
        latent: bool = True,
        width: int = 128,
        heads: int = 8,
        samples: int = 32,
    ) -> None:
        super().__init__()
        check_least("algorithm", 1, width=width, heads=heads, samples=samples)
        if path is None and not latent:
            raise ConfigError(
                "algorithm.path=null: without the latent path, there is none; choose algorithm.path=mean or "
                "attention, or set algorithm.latent=true"
            )
        inputs, values = math.prod(item_shape), outputs // gaussians.NUMBERS
        self.samples, self.width = samples, width
        self.encoder = perceptron(inputs + values, [width] * 4) if path else None
        self.attention = Attention(inputs, width, heads) if path == "attention" else None
        self.latent = LatentEncoder(inputs + values, width) if latent else None
        paths = (path is not None) + latent
        self.decoder = perceptron(paths * width + inputs, [width, width, outputs])

    @classmethod
    def check_tasks(cls, spec: TaskSpec) -> None:
        super().check_tasks(spec)
        if spec.objective.numbers != gaussians.NUMBERS:
            raise ConfigError(
                f"algorithm={cls.__name__}: predicts distributions of values, which these tasks do not "
                "ask for; choose dataset=gp, or dataset=sinusoid dataset.likelihood=gaussian"
            )

    def adapt(self, tasks: Episodes) -> dict[str, Any]:
        """The encoded context, and L samples of z, [T, L, D]."""
        state = self.encode(tasks)
        if self.latent is not None:
            encoded = self.latent.points(pairs(tasks.support_x, tasks.support_y))
            noise = numbers.normal(len(tasks), self.samples * self.width, encoded.device)
            noise = noise.unflatten(1, (self.samples, self.width))
            state["z"] = sampled(self.latent(encoded, tasks.there), noise)
        return state

    def encode(self, tasks: Episodes) -> dict[str, Any]:
        """What the deterministic path keeps of the context."""
        if self.encoder is None:
            return {}
        points, there = self.encoder(pairs(tasks.support_x, tasks.support_y)), tasks.there
        if self.attention is None:
            return {"mean": mean_of(points, there)}
        return {"x": tasks.support_x.flatten(2), "points": points, "there": there}

    def predict(self, adapted: dict[str, Any], query_x: Tensor) -> Tensor:
        """Outputs [T, B, 2 V L] (`metarun.tasks.gaussians`), with L = 1 if there is no latent path."""
        x = query_x.flatten(2)
        parts = [x.unsqueeze(2)]  # of the inputs of the decoder, [T, B, 1 or L, *] each
        if self.attention is not None:
            mixed = self.attention(x, adapted["x"], adapted["points"], adapted["there"])
            parts.append(mixed.unsqueeze(2))
        elif self.encoder is not None:
            parts.append(adapted["mean"][:, None, None])
        if self.latent is not None:
            parts.append(adapted["z"].unsqueeze(1))
        samples = parts[-1].shape[2]
        parts = [part.expand(-1, x.shape[1], samples, -1) for part in parts]
        means, widths = self.decoder(torch.cat(parts, -1)).chunk(2, -1)
        return gaussians.packed(means, (0.1 + 0.9 * F.softplus(widths)).log())

    def meta_loss(self, tasks: Episodes) -> Outcome:
        x = torch.cat([tasks.support_x, tasks.query_x], 1)
        y = torch.cat([tasks.support_y, tasks.query_y], 1)
        shots, state = tasks.support_x.shape[1], self.encode(tasks)
        divergence: Tensor | float = 0.0
        if self.latent is not None:
            encoded = self.latent.points(pairs(x, y))
            prior = self.latent(encoded[:, :shots], tasks.there)
            posterior = self.latent(encoded, torch.ones_like(y[..., 0], dtype=torch.bool))
            state["z"] = sampled(posterior, numbers.normal(len(x), self.width, x.device).unsqueeze(1))
            divergence = kl_divergence(posterior, prior)
        outputs = self.predict(state, x)
        loss = divergence / x.shape[1] - gaussians.log_likelihood(outputs, y)
        return tasks.outcome(outputs[:, shots:], loss)


class LatentEncoder(nn.Module):
    """q(z | points): a Gaussian with independent components, by the mean of points that `points` encodes."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.points = perceptron(inputs, [width] * 4)
        self.hidden, self.mean, self.deviation = (dense(width, width) for _ in range(3))

    def forward(self, encoded: Tensor, there: Tensor) -> Gaussian:
        """Means and standard deviations [T, D] by encoded points [T, S, W]; `there` [T, S]: which exist."""
        hidden = self.hidden(mean_of(encoded, there)).relu()
        return self.mean(hidden), 0.1 + 0.9 * self.deviation(hidden).sigmoid()


class Attention(nn.Module):
    """Multi-head attention of target inputs over context inputs, both mapped by the same two layers."""

    def __init__(self, inputs: int, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ConfigError(f"algorithm.heads={heads}: must divide algorithm.width={width}")
        self.heads = heads
        self.inputs = perceptron(inputs, [width, width])
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        nn.init.normal_(self.query.weight, std=width**-0.5)
        nn.init.normal_(self.key.weight, std=width**-0.5)
        nn.init.normal_(self.value.weight, std=width**-0.5)
        nn.init.normal_(self.out.weight, std=width**-0.5)

    def forward(self, x: Tensor, context_x: Tensor, points: Tensor, there: Tensor) -> Tensor:
        """[T, B, W] of queries x [T, B, *], context x [T, S, *] and encoded points [T, S, W]."""

        def split(vectors: Tensor) -> Tensor:
            return vectors.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        queries, keys = self.query(self.inputs(x)), self.key(self.inputs(context_x))
        mixed = F.scaled_dot_product_attention(
            split(queries), split(keys), split(self.value(points)), attn_mask=there[:, None, None]
        )
        return self.out(mixed.transpose(1, 2).flatten(2))


def perceptron(inputs: int, sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers of these sizes, with rectifiers between them."""
    layers = [part for pair in pairwise([inputs, *sizes]) for part in (dense(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def dense(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer with the initial weights of the papers' code (Glorot and Bengio 2010)."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def pairs(x: Tensor, y: Tensor) -> Tensor:
    """Points [T, S, inputs + V] of inputs [T, S, *item] and values [T, S, V]."""
    return torch.cat([x.flatten(2), y], -1)


def mean_of(points: Tensor, there: Tensor) -> Tensor:
    """The mean [T, W] of the points [T, S, W] that exist."""
    weights = there.to(points.dtype).unsqueeze(-1)
    return (points * weights).sum(1) / weights.sum(1)


def sampled(distribution: Gaussian, noise: Tensor) -> Tensor:
    """Samples [T, L, D] by standard normal noise [T, L, D]."""
    mean, deviation = (part.unsqueeze(1) for part in distribution)
    return mean + deviation * noise.to(mean.dtype)


def kl_divergence(q: Gaussian, p: Gaussian) -> Tensor:
    """KL(q || p) of Gaussians with independent components, [T]."""
    (q_mean, q_deviation), (p_mean, p_deviation) = q, p
    ratio = (q_deviation / p_deviation).square()
    return 0.5 * (ratio + ((q_mean - p_mean) / p_deviation).square() - 1 - ratio.log()).sum(-1)
