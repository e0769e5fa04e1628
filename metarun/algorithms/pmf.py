"""P>M>F: a pretrained network, meta-trained, and fine-tuned on each task.

Hu, Li, Stühmer, Kim and Hospedales 2022, "Pushing the Limits of Simple Pipelines for Few-Shot Learning:
External Data and Fine-Tuning Make a Difference".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metarun.algorithms.feature_method import prototypes, require
from metarun.algorithms.protonet import ProtoNet
from metarun.inner_loops.base import InnerLoop, Loss, refuse_trained
from metarun.nn.per_task import Params, shared_names
from metarun.tasks.episodes import Episodes
from metarun.tasks.objectives import class_weights, cross_entropy
from metarun.tasks.spec import TaskSpec

SHIFT = 0.125  # of the height and the width, the largest shift
BRIGHTNESS = 0.125  # the largest change of brightness, where pixels are in [0, 1]
NUMBERS = 5  # random numbers for each image


class PMF(ProtoNet):
    """Prototypical networks with scaled cosines, whose backbone is fine-tuned on the support of each task.

    Training is that of `ProtoNet` (section 3.2) and takes no inner steps. In evaluation, each inner step of
    fine-tuning (section 3.3) is a step on the cross entropy of augmented support images, which are classified
    by the prototypes of the support images as they are. Gradients go through the prototypes, too; all weights
    of the backbone are adapted, and the scale is not. Running averages stay those of training.

    The augmentation is that of the paper's code: a step augments with probability `augment`; all images are
    then mirrored in half of the steps, and each gets another brightness, saturation and contrast, and is
    shifted. Departures: it changes pixels in [0, 1], so that the change of brightness is that of half a
    deviation, and the paper's code changes normalised ones; a step draws the same random numbers for every
    task, so that a result depends neither on the order of tasks nor on how many are run at once. The logits
    have no common bias, which changes no probability. The paper's code keeps a network in evaluation mode
    while it is meta-trained.

    Args:
        backbone, inner_loop: passed by the builder; see `Algorithm`.
        scale: the initial factor of the cosines, which is learned; above 0.
        augment: the probability with which a step augments, in [0, 1].
    """

    takes_steps = True
    embeds_first = False  # fine-tuning changes the network, and images
    # Steps are only taken in evaluation, without a gradient through them.
    unread: ClassVar = {"inner_loop.order": "", "inner_loop.steps": "test_steps!=null"}

    def __init__(
        self, backbone: nn.Module, inner_loop: InnerLoop, scale: float = 10.0, augment: float = 0.9
    ) -> None:
        refuse_trained(inner_loop, "meta-training takes no inner steps")
        require(0 <= augment <= 1, f"algorithm.augment={augment}: must be from 0 to 1")
        super().__init__(backbone, "cosine", scale, learn_scale=True)
        self.inner_loop, self.augment = inner_loop, augment
        weights = self.fine_tuned()
        require(bool(weights), "algorithm=pmf: fine-tunes the backbone, which is frozen; unfreeze it")
        inner_loop.attach({name: p.detach() for name, p in weights.items()})

    @classmethod
    def check_tasks(cls, spec: TaskSpec) -> None:
        super().check_tasks(spec)
        require(
            spec.kind == "images",
            f"algorithm=pmf: is for images, and this dataset has {spec.kind}; choose algorithm=meta_baseline",
        )

    def fine_tuned(self) -> dict[str, nn.Parameter]:
        """The weights of the backbone that fine-tuning changes, by name."""
        shared = shared_names(self.backbone)
        return {n: p for n, p in self.backbone.named_parameters() if n not in shared and p.requires_grad}

    def adapt(self, tasks: Episodes) -> dict[str, Any]:
        """{"prototypes": [T, N, F]} and, with inner steps, "params": the weights of the backbone."""
        if not self.inner_loop.step_count():
            return {"prototypes": super().adapt(tasks)}
        loss, start = self.inner_problem(tasks)
        return self.solved(tasks, self.inner_loop(loss, start))

    def trajectory(self, tasks: Episodes) -> Iterator[dict[str, Any]]:
        loss, start = self.inner_problem(tasks)
        yield self.solved(tasks, start)
        for params in self.inner_loop.trajectory(loss, start):
            yield self.solved(tasks, params)

    def predict(self, adapted: dict[str, Any], query_x: Tensor) -> Tensor:
        if "params" not in adapted:
            return super().predict(adapted["prototypes"], query_x)
        return self.score(adapted["prototypes"], self.embed_with(adapted["params"], query_x))

    def solved(self, tasks: Episodes, params: Params) -> dict[str, Any]:
        """What `predict` needs, given the weights of the backbone for each task."""
        features = self.embed_with(params, tasks.support_x)
        return {"params": params, "prototypes": prototypes(features, tasks.support_y, tasks.ways)}

    def inner_problem(self, tasks: Episodes) -> tuple[Loss, Params]:
        """The loss of fine-tuning, and the weights that it starts from, [T, *shape] each."""
        images, targets = tasks.support_x, tasks.support_y
        balance = class_weights(targets, tasks.ways).to(images.dtype)  # every class counts equally

        def loss(params: Params, step: int) -> Tensor:
            means = prototypes(self.embed_with(params, images), targets, tasks.ways)
            queries = augmented(images, step, self.augment)
            return cross_entropy(self.score(means, self.embed_with(params, queries)), targets, balance)

        return loss, {n: p.detach().expand(len(images), *p.shape) for n, p in self.fine_tuned().items()}

    def embed_with(self, params: Params, x: Tensor) -> Tensor:
        """Features [T, B, F] of x [T, B, *item], by the weights [T, *shape] of each task."""
        weights = ({name: p[t] for name, p in params.items()} for t in range(len(x)))
        return torch.stack(
            [functional_call(self.backbone, own, (each,)) for own, each in zip(weights, x, strict=True)]
        )


def augmented(images: Tensor, step: int, probability: float) -> Tensor:
    """Images of a step of fine-tuning, changed at random.

    Args:
        images: [T, S, C, H, W].
        step: the number of the step, which chooses the random numbers.
        probability: that the images are changed; otherwise they are returned as they are.
    """
    generator = torch.Generator().manual_seed(step)
    changes, mirrors = (torch.rand(2, generator=generator) < torch.tensor([probability, 0.5])).tolist()
    if not changes:
        return images
    numbers = torch.rand(images.shape[1], NUMBERS, generator=generator).to(images)
    return torch.stack([changed(task.flip(-1) if mirrors else task, numbers) for task in images])


def changed(images: Tensor, numbers: Tensor) -> Tensor:
    """Images [B, C, H, W] with other colours and shifted, by their numbers [B, NUMBERS] in [0, 1)."""
    brightness, saturation, contrast, *shifts = (column.view(-1, 1, 1, 1) for column in numbers.unbind(1))
    images = images + BRIGHTNESS * (2 * brightness - 1)
    grey = images.mean(1, keepdim=True)
    images = grey + 2 * saturation * (images - grey)
    mean = images.mean((1, 2, 3), keepdim=True)
    images = mean + (contrast + 0.5) * (images - mean)
    sides = [int(side * SHIFT + 0.5) for side in images.shape[-2:]]
    padded = F.pad(images, (sides[1], sides[1], sides[0], sides[0]))  # with black
    rows, columns = (
        (number.flatten() * (2 * most + 1)).long().unsqueeze(1) + torch.arange(side, device=images.device)
        for number, most, side in zip(shifts, sides, images.shape[-2:], strict=True)
    )
    each = torch.arange(len(images), device=images.device)
    found = padded.permute(0, 2, 3, 1)[each[:, None, None], rows[:, :, None], columns[:, None, :]]
    return found.permute(0, 3, 1, 2)
