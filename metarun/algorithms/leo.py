"""LEO: latent embedding optimization (Rusu, Rao, Sygnowski, Vinyals, Pascanu, Osindero and Hadsell 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.feature_method import FeatureMethod, precise, prototypes, require, without_autocast
from metarun.errors import check_above_0, check_least
from metarun.nn.frozen import Frozen
from metarun.tasks import numbers
from metarun.tasks.episodes import Episodes, Outcome
from metarun.tasks.objectives import class_weights, cross_entropy, weighted

LEAST = 1e-10  # the smallest standard deviation


class LEO(FeatureMethod):
    """Adapt a latent code of each class, from which a linear classifier on frozen features is decoded.

    - The encoder is a linear map of features of unit length; a relation network of three linear layers
      compares each support example with all of them, and the mean for a class is the mean and the deviation
      of its code (section 2.3.1, equation 1).
    - The decoder, a linear map, makes of a code the mean and the deviation of the weights of its class
      (equation 2).
    - Inner steps descend the support loss with respect to the codes, with a learned rate for each of their
      numbers (section 2.3.2, equations 3 and 4). Further steps fine-tune the decoded weights, with a learned
      rate for each feature (section 2.3.3).
    - The loss is that of the queries, plus the divergence of the codes from a standard normal distribution,
      the squared distance from the encoded codes to the adapted ones, which are held constant, and penalties
      on the weights and on the correlations of the decoder's rows (section 2.3.4, equations 6 and 8).

    In training, codes and weights are sampled, as many for a class as it has shots, which are averaged; and
    features are dropped in all losses. Evaluation takes the means. These and other details are those of the
    authors' code: no biases, a divergence estimated from the samples, and deviations exp(d) - 1 for codes,
    and exp(d) - 1 + sqrt(2 / (F + N)) for weights.

    The losses of the code's inner steps are sums over the support, which the rates here are for, too. The
    backbone is frozen: `init=RUN` gives it the weights of a pretrained one, such as those of
    algorithm=baseline with norm=running, and its features are computed once.

    Departures: if classes have different numbers of shots, which the paper does not consider, every class
    counts equally. A step whose gradient is not finite is not replaced by one of weight decay.

    Args:
        backbone: passed by the builder; see `Algorithm`.
        latents: numbers in the code of a class.
        steps, rate: steps in the latent space, and their initial rate.
        tuning_steps, tuning_rate: the same in the space of classifier weights.
        dropout: the share of features that are dropped in training.
        divergence, encoder, decay, orthogonality: weights of the divergence, of the distance of codes, of
            half of the squared weights, and of the squared correlations.
    """

    frozen = True

    def __init__(
        self,
        backbone: nn.Module,
        latents: int = 64,
        steps: int = 5,
        rate: float = 1.0,
        tuning_steps: int = 5,
        tuning_rate: float = 0.001,
        dropout: float = 0.5,
        divergence: float = 0.001,
        encoder: float = 1e-9,
        decay: float = 1e-8,
        orthogonality: float = 0.001,
    ) -> None:
        features: int = backbone.features  # type: ignore[assignment]
        whole = nn.Sequential(Frozen(backbone))
        whole.features = features  # type: ignore[assignment]
        super().__init__(whole)
        require(latents >= 1, f"algorithm.latents={latents}: must be at least 1")
        require(
            steps >= 1 and tuning_steps >= 0,
            f"algorithm.steps={steps}, algorithm.tuning_steps={tuning_steps}: must be at least 1 and 0",
        )
        check_above_0("algorithm", rate=rate, tuning_rate=tuning_rate)
        check_least("algorithm", 0, divergence=divergence, encoder=encoder)
        check_least("algorithm", 0, decay=decay, orthogonality=orthogonality)
        require(0 <= dropout < 1, f"algorithm.dropout={dropout}: must be from 0 to below 1")
        self.steps, self.tuning_steps, self.dropout = steps, tuning_steps, dropout
        self.divergence, self.distance = divergence, encoder
        self.decay, self.orthogonality = decay, orthogonality
        self.encoder = nn.Linear(features, latents, bias=False)
        sizes = [nn.Linear(2 * latents, 2 * latents, bias=False) for _ in range(3)]
        self.relation = nn.Sequential(sizes[0], nn.ReLU(), sizes[1], nn.ReLU(), sizes[2])
        self.decoder = nn.Linear(latents, 2 * features, bias=False)
        for layer in self.linear_layers():
            nn.init.xavier_uniform_(layer.weight)
        self.rates = nn.Parameter(torch.full((latents,), float(rate)))
        self.tuning_rates = nn.Parameter(torch.full((features,), float(tuning_rate)))

    def linear_layers(self) -> list[nn.Linear]:
        parts = (self.encoder, self.relation, self.decoder)
        return [layer for part in parts for layer in part.modules() if isinstance(layer, nn.Linear)]

    def fit(self, features: Tensor, targets: Tensor, ways: int) -> Tensor:
        """The classifier weights [T, N, F]."""
        return self.learn(features, targets, ways).weights

    def score(self, adapted: Tensor, features: Tensor) -> Tensor:
        features = F.normalize(precise(features), dim=-1)
        with without_autocast(features):
            return self.dropped(features) @ adapted.mT

    def meta_loss(self, tasks: Episodes) -> Outcome:
        """The loss of the queries and the penalties."""
        support, query = self.embed_episodes(tasks)
        learned = self.learn(support, tasks.support_y, tasks.ways)
        logits = self.score(learned.weights, query)
        loss = self.loss_of(tasks)(logits, tasks.query_y) + self.divergence * learned.divergence
        squares = torch.stack([layer.weight.square().sum() for layer in self.linear_layers()]).sum()
        rows = F.normalize(self.decoder.weight.T, dim=1)  # [latents, 2F]
        correlated = (rows @ rows.T - torch.eye(len(rows)).to(rows)).square().mean()
        penalty = self.decay / 2 * squares + self.orthogonality * correlated
        return tasks.outcome(logits, loss.mean() + self.distance * learned.distance.mean() + penalty)

    def learn(self, features: Tensor, targets: Tensor, ways: int) -> Learned:
        """Adapt to features [T, S, F] with targets [T, S]."""
        differentiable = torch.is_grad_enabled()
        x = F.normalize(precise(features), dim=-1)
        samples = x.shape[1] // ways if self.training else 1
        balance = class_weights(targets, ways).to(x.dtype)
        with torch.enable_grad(), without_autocast(x):
            start, divergence = self.sampled(self.encoded(x, targets, ways, balance, samples), 0.0)
            codes = start
            for _ in range(self.steps):
                loss = self.support_loss(self.decoded(codes), x, targets, balance)
                slope = gradient(loss * (ways * samples), codes, differentiable)
                codes = codes - self.rates * slope
            distance = (codes.detach() - start).square().mean((1, 2, 3))
            weights = self.decoded(codes)
            for _ in range(self.tuning_steps):
                loss = self.support_loss(weights, x, targets, balance)
                weights = weights - self.tuning_rates * gradient(loss * ways, weights, differentiable)
        if not differentiable:
            weights = weights.detach()
        return Learned(weights, divergence, distance)

    def encoded(self, x: Tensor, targets: Tensor, ways: int, balance: Tensor, samples: int) -> Tensor:
        """Means and deviations of codes, [T, N, samples, 2 * latents], from x [T, S, F]."""
        codes = self.encoder(self.dropped(x))
        shots = codes.shape[1]
        pairs = torch.cat(
            [
                codes.unsqueeze(2).expand(-1, -1, shots, -1),
                codes.unsqueeze(1).expand(-1, shots, -1, -1),
            ],
            -1,
        )
        related = (self.relation(pairs) * balance[:, None, :, None]).mean(2)
        return prototypes(related, targets, ways).unsqueeze(2).expand(-1, -1, samples, -1)

    def decoded(self, codes: Tensor) -> Tensor:
        """Classifier weights [T, N, F] of codes [T, N, samples, latents], the mean over samples."""
        wide = math.sqrt(2 / (self.features + codes.shape[1]))
        return self.sampled(self.decoder(codes), wide)[0].mean(2)

    def sampled(self, distribution: Tensor, wide: float) -> tuple[Tensor, Tensor]:
        """Samples of means and deviations [T, N, samples, 2D], and their divergence from N(0, 1), [T]."""
        mean, deviation = distribution.chunk(2, -1)
        if not self.training:
            return mean, mean.new_zeros(len(mean))
        deviation = (deviation.exp() - (1 - wide)).clamp_min(LEAST)
        noise = self.noise(mean)
        found = mean + deviation * noise
        return found, (found.square() / 2 - noise.square() / 2 - deviation.log()).mean((1, 2, 3))

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal numbers of the shape of `like` [T, N, samples, D]."""
        return numbers.noise_like(like)

    def support_loss(self, weights: Tensor, x: Tensor, targets: Tensor, balance: Tensor) -> Tensor:
        """The mean cross entropy [T] of the support x [T, S, F], in which every class counts equally."""
        return weighted(cross_entropy, self.dropped(x) @ weights.mT, targets, balance)

    def dropped(self, x: Tensor) -> Tensor:
        return numbers.dropped(x, self.dropout) if self.training and self.dropout else x


@dataclass(frozen=True)
class Learned:
    """What was learned of T tasks: classifier weights [T, N, F]; the divergence of the codes, and the mean
    squared distance that they moved, [T]."""

    weights: Tensor
    divergence: Tensor
    distance: Tensor


def gradient(losses: Tensor, at: Tensor, differentiable: bool) -> Tensor:
    """The gradient of the sum of losses [T]."""
    return torch.autograd.grad(losses.sum(), at, create_graph=differentiable)[0]
