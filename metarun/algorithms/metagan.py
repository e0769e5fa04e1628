"""MetaGAN (Zhang, Che, Ghahramani, Bengio and Song 2018) with relation networks and with MAML."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metarun.algorithms.maml import MAML
from metarun.algorithms.relation import RelationNet
from metarun.errors import ConfigError, check_least
from metarun.inner_loops.base import InnerLoop, Loss
from metarun.nn.layers import Norm
from metarun.nn.per_task import Params
from metarun.tasks.episodes import Episodes, Outcome, Tasks
from metarun.tasks.numbers import noise_like
from metarun.tasks.objectives import class_weights, cross_entropy
from metarun.tasks.spec import TaskSpec

Classify = Callable[[Tensor], Tensor]  # images [T, B, C, H, W] to logits [T, B, N]


class Generator(nn.Module):
    """A generator of images that is conditioned on a task.

    The task's vector is the mean of the vectors that an encoder gives to the support images. Together with
    noise, it is the input of the generator. All classes count equally in the mean. The paper does not give
    the layers: here three convolutions of stride 2 are the encoder, and a linear layer and two upsampled
    convolutions the generator, without normalisation. Weights start with He's variances, so that images
    differ from each other from the start. Batch norm in the classifier would enlarge the differences of
    nearly equal images, and the meta-gradient of MAML with them, by orders of magnitude.

    Args:
        item_shape: of an image, (C, H, W).
        noise: the size of the noise.
        width: the channels of the first convolution.
    """

    def __init__(self, item_shape: tuple[int, ...], noise: int, width: int) -> None:
        super().__init__()
        channels, *sides = item_shape
        self.shape = item_shape
        self.first_map = (2 * width, *(-(-side // 4) for side in sides))
        sizes = (channels, width, 2 * width, 2 * width)
        convolutions = [nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise(sizes)]
        self.encoder = nn.Sequential(*[part for each in convolutions for part in (each, nn.LeakyReLU(0.2))])
        self.start = nn.Linear(2 * width + noise, self.first_map[0] * self.first_map[1] * self.first_map[2])
        self.body = nn.Sequential(
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(width, channels, 3, padding=1),
            nn.Sigmoid(),
        )
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, a=0.2)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, support_x: Tensor, balance: Tensor, noise: Tensor) -> Tensor:
        """Images [T, M, C, H, W].

        Args:
            support_x: [T, S, C, H, W].
            balance: the weights of the support images, [T, S], with a mean of 1.
            noise: [T, M, Z].
        """
        vectors = self.encoder(support_x.flatten(0, 1)).mean((2, 3)).unflatten(0, support_x.shape[:2])
        task = (balance.unsqueeze(-1) * vectors).mean(1, keepdim=True)  # [T, 1, 2 * width]
        start = self.start(torch.cat([task.expand(*noise.shape[:2], -1), noise], -1))
        images = self.body(start.flatten(0, 1).unflatten(-1, self.first_map))
        return images[..., : self.shape[1], : self.shape[2]].unflatten(0, noise.shape[:2])


class Adversarial(nn.Module):
    """What both variants share: generated images, and the losses of both players.

    A classifier with logits r of N ways has another class, generated images, whose logit is 0: the
    probability that an image is real is exp(r) summed over ways, divided by 1 + this sum. The classifier
    minimises its loss of labelled images, -log p(real) of real images, which need no label, and
    -log p(generated) of generated ones. The generator minimises -log p(real) of its images, with the
    classifier held constant.
    """

    generator: Generator
    generated: int
    noise_size: int

    def add_generator(self, item_shape: tuple[int, ...], generated: int, noise: int, width: int) -> None:
        check_least("algorithm", 0, generated=generated)
        check_least("algorithm", 1, noise=noise, generator_width=width)
        self.generated, self.noise_size = generated, noise
        self.generator = Generator(item_shape, noise, width)

    def fakes(self, tasks: Episodes) -> Tensor:
        """Generated images [T, M, C, H, W]."""
        x = tasks.support_x
        noise = self.noise(x).to(x).expand(len(x), -1, -1)
        return self.generator(x, class_weights(tasks.support_y, tasks.ways).to(x.dtype), noise)

    def noise(self, like: Tensor) -> Tensor:
        """Standard normal numbers [T, M, Z] for T tasks like [T, ...]; the same in evaluation, [1, M, Z]."""
        size = self.generated, self.noise_size
        if self.training:
            return noise_like(like.new_empty(()).expand(len(like), *size))
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1, *size, generator=generator, dtype=torch.float64)

    def against_generator(self, outcome: Outcome, fakes: Tensor, classify: Classify) -> Outcome:
        """The outcome of the queries, whose loss is that of the classifier.

        Each player gets the gradient of its own loss from one pass of the classifier, so that both see the
        same masks of dropout. The images of this pass are constants; the gradient of the generator's loss
        with respect to them is handed on to the generator by a term whose value is 0.
        """
        assert outcome.outputs is not None
        images = fakes.detach().requires_grad_()
        logits = classify(images)
        (slope,) = torch.autograd.grad(real_loss(logits).sum(), images, retain_graph=True)
        of_generator = (slope * (fakes - images.detach())).flatten(1).sum(1)
        loss = outcome.loss + real_loss(outcome.outputs) + fake_loss(logits) + of_generator
        return replace(outcome, loss=loss)


def real_loss(logits: Tensor, weights: Tensor | None = None) -> Tensor:
    """The mean of -log p(real), [T], of logits [T, B, N]; examples have weights [T, B] with a mean of 1."""
    losses = F.softplus(-logits.logsumexp(-1))
    return (losses if weights is None else weights * losses).mean(1)


def fake_loss(logits: Tensor) -> Tensor:
    """The mean of -log p(generated), [T], of logits [T, M, N]."""
    return F.softplus(logits.logsumexp(-1)).mean(1)


def check_images(name: str, spec: TaskSpec) -> None:
    """Raise ConfigError if examples are not images."""
    if spec.kind != "images":
        raise ConfigError(
            f"algorithm={name}: generates images, and this dataset has {spec.kind}; choose algorithm=maml, "
            "or algorithm=hallucination, which generates features"
        )


class MetaGANRelation(Adversarial, RelationNet):
    """Relation networks that also tell generated images from real ones.

    The relation scores before the sigmoid are the logits. The loss of real images is the cross entropy, since
    scores are probabilities of N + 1 classes together; without generated images (`generated=0`), the method
    is the relation network, with its own squared error. Real images are the queries. New tasks are solved
    as by a relation network; generated images take part in training only, and do not change running averages.

    Args:
        backbone, shots, item_shape: passed by the builder; see `Algorithm`.
        width, hidden, norm: see `RelationNet`.
        generated: the number of generated images of a task, M.
        noise: the size of the generator's noise.
        generator_width: the channels of its first convolution.
    """

    embeds_first = False

    def __init__(
        self,
        backbone: nn.Module,
        item_shape: tuple[int, ...],
        width: int = 64,
        hidden: int = 8,
        norm: Norm = "running",
        shots: int = 1,
        generated: int = 25,
        noise: int = 32,
        generator_width: int = 32,
    ) -> None:
        super().__init__(backbone, width, hidden, norm, shots)
        self.add_generator(item_shape, generated, noise, generator_width)

    @classmethod
    def check_tasks(cls, spec: TaskSpec) -> None:
        super().check_tasks(spec)
        check_images("metagan", spec)

    def meta_loss(self, tasks: Episodes) -> Outcome:
        if not self.generated:
            return super().meta_loss(tasks)
        support, query = self.embed_episodes(tasks)
        adapted = self.fit_tasks(tasks, support)
        outcome = tasks.outcome(self.score(adapted, query), self.loss)
        with without_moving_averages(self):
            return self.against_generator(outcome, self.fakes(tasks), self.predictor(adapted, tasks))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The cross entropy [T]; without generated images, the squared error of the relation scores."""
        return cross_entropy(outputs, targets) if self.generated else super().loss(outputs, targets)


@contextmanager
def without_moving_averages(module: nn.Module) -> Iterator[None]:
    """A context in which batch norms in training use the statistics of a batch and keep their averages."""
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


class MetaGANMAML(Adversarial, MAML):
    """MAML whose inner loop and meta-loss also tell generated images from real ones.

    The support is real in the inner loop, the queries in the meta-loss. The inner loop takes generated images
    as constants, in training and on new tasks, where the generator sees the support alone. Without generated
    images (`generated=0`), the method is MAML.

    Args:
        backbone, inner_loop, outputs, item_shape: passed by the builder; see `Algorithm`.
        transductive: see `Algorithm`.
        generated: the number of generated images of a task, M, in the inner loop and in the meta-loss.
        inner_weight: of the two losses of the extra class in the inner loop; 1 in the paper.
        noise: the size of the generator's noise.
        generator_width: the channels of its first convolution.
    """

    needs = Episodes
    needs_classes = True
    plays = False
    embeds_first = False
    unread: ClassVar = {}

    def __init__(
        self,
        backbone: nn.Module,
        inner_loop: InnerLoop,
        outputs: int,
        item_shape: tuple[int, ...],
        transductive: bool = True,
        generated: int = 25,
        inner_weight: float = 1.0,
        noise: int = 32,
        generator_width: int = 32,
    ) -> None:
        check_least("algorithm", 0, inner_weight=inner_weight)
        super().__init__(backbone, inner_loop, outputs, transductive=transductive)
        self.inner_weight = inner_weight
        self.add_generator(item_shape, generated, noise, generator_width)

    @classmethod
    def check_tasks(cls, spec: TaskSpec) -> None:
        super().check_tasks(spec)
        check_images("metagan_maml", spec)

    def inner_problem(self, tasks: Tasks) -> tuple[Loss, Params, Params]:
        assert isinstance(tasks, Episodes)
        loss, slow, fast = super().inner_problem(tasks)
        if not (self.generated and self.inner_weight):
            return loss, slow, fast
        fakes, balance = self.fakes(tasks).detach(), class_weights(tasks.support_y, tasks.ways)

        def with_fakes(params: Params, step: int) -> Tensor:
            classify: Classify = partial(self.learner, slow | params)
            outputs = classify(tasks.support_x)
            labelled = tasks.support_loss(lambda x: outputs, step)
            real = real_loss(outputs, balance.to(outputs.dtype))
            if self.normalises_by_support:
                classify = self.predictor({"params": slow | params}, tasks)
            return labelled + self.inner_weight * (real + fake_loss(classify(fakes)))

        return with_fakes, slow, fast

    def meta_loss(self, tasks: Episodes) -> Outcome:
        adapted = self.adapt(tasks)
        outcome = self.outcome(adapted, tasks)
        if not self.generated:
            return outcome
        return self.against_generator(outcome, self.fakes(tasks), self.predictor(adapted, tasks))
