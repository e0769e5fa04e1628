"""OML: representations for learning long sequences of classes online, without forgetting."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from metarun.algorithms.feature_method import FeatureMethod, precise, require
from metarun.inner_loops.base import InnerLoop
from metarun.inner_loops.sgd import SGD
from metarun.nn.per_task import Params
from metarun.tasks.episodes import Episodes, EpisodeShape, Outcome


class OML(FeatureMethod):
    """Online-aware meta-learning (Javed and White 2019).

    The examples of a task arrive one after another, class by class. The last layer (the prediction learning
    network) takes a step of gradient descent on each of them; the backbone (the representation learning
    network) is fixed meanwhile. A new task starts with a last layer of zeros.

    In training (algorithm 2), the last layer has a row for each training class. The first `trajectory` ways
    of a task are learned online, and their rows start at zero. The loss is that of the queries of all ways
    among all training classes: those of the trajectory, and those of the others, which must not be
    forgotten. It is minimised with respect to the backbone and to the last layer, through the online steps.

    Departures: the last layer is linear, as in the authors' code since July 2020; the paper has two layers
    there. Rows of new classes start at zero instead of at random. The classes to remember are drawn from all
    training classes, in the code from one half of them; each has as many queries as one of the trajectory.

    Args:
        backbone, inner_loop, classes: passed by the builder; see `Algorithm`. The inner loop gives the rate,
            and the number of passes over the sequence as its steps.
        trajectory: the number of ways that are learned online in training.
    """

    takes_steps = True
    classifies_training_classes = True

    def __init__(
        self, backbone: nn.Module, inner_loop: InnerLoop, classes: int | None = None, trajectory: int = 3
    ) -> None:
        super().__init__(backbone)
        require(trajectory >= 1, f"algorithm.trajectory={trajectory}: must be at least 1")
        require(
            isinstance(inner_loop, SGD) and inner_loop.test_decay == 1,
            "inner_loop: OML learns online by plain gradient descent; choose inner_loop=sgd",
        )
        assert isinstance(inner_loop, SGD)
        self.inner_loop = inner_loop
        self.ways_online = trajectory
        self.classifier = nn.Linear(self.features, classes or 1)

    def check_training(self, shape: EpisodeShape) -> None:
        require(
            self.ways_online < shape.ways,
            f"algorithm.trajectory={self.ways_online}: leaves none of ways={shape.ways} to be remembered; "
            "lower it, or raise ways",
        )

    def meta_loss(self, tasks: Episodes) -> Outcome:
        assert tasks.classes is not None
        support, query = self.embed_episodes(tasks)
        online = min(self.ways_online, tasks.ways)
        new = torch.zeros(len(support), self.classifier.out_features, dtype=torch.bool, device=support.device)
        new = new.scatter(1, tasks.classes[:, :online], True)
        head = {
            "weight": self.classifier.weight.masked_fill(new.unsqueeze(-1), 0.0),
            "bias": self.classifier.bias.masked_fill(new, 0.0),
        }
        targets, learned = tasks.classes.gather(1, tasks.support_y), None
        if tasks.support_weights is None:  # all classes have as many examples, one class after the other
            count = support.shape[1] // tasks.ways * online
            support, targets = support[:, :count], targets[:, :count]
        else:
            learned = tasks.support_y < online
        logits = self.score(self.last(head, support, targets, learned), query)
        loss = self.loss_of(tasks)(logits, tasks.classes.gather(1, tasks.query_y))
        own = tasks.classes.unsqueeze(1).expand(-1, query.shape[1], -1)
        return tasks.outcome(logits.gather(2, own), loss)

    def fit(self, features: Tensor, targets: Tensor, ways: int) -> Params:
        return self.last(self.new_head(features, ways), features, targets)

    def score(self, adapted: Params, features: Tensor) -> Tensor:
        return precise(features) @ adapted["weight"].mT + adapted["bias"].unsqueeze(1)

    def trajectory(self, tasks: Episodes) -> Iterator[Params]:
        """The head before the first pass over the sequence and after each pass."""
        features = self.embed(tasks.support_x)
        head = self.new_head(features, tasks.ways)
        yield head
        yield from self.passes(head, features, tasks.support_y)

    def new_head(self, features: Tensor, ways: int) -> Params:
        """A last layer of zeros: weights [T, N, F] and biases [T, N]."""
        like, tasks = precise(features), len(features)
        return {"weight": like.new_zeros(tasks, ways, self.features), "bias": like.new_zeros(tasks, ways)}

    def last(self, head: Params, features: Tensor, targets: Tensor, learned: Tensor | None = None) -> Params:
        """The head after the last of the `passes`."""
        return deque([head, *self.passes(head, features, targets, learned)], maxlen=1).pop()

    def passes(
        self, head: Params, features: Tensor, targets: Tensor, learned: Tensor | None = None
    ) -> Iterator[Params]:
        """The head after each pass over the examples, with a step of gradient descent on each of them.

        Args:
            head: the weights [T, N, F] and the biases [T, N] before.
            features: of the examples in their order, [T, S, F].
            targets: [T, S], from 0 to N - 1.
            learned: bool [T, S], False for examples without a step; None: there are none of these.
        """
        weight, bias, features = head["weight"], head["bias"], precise(features)
        rate, second = self.inner_loop.rate, self.inner_loop.order == 2
        for _ in range(self.inner_loop.step_count()):
            for i, (x, y) in enumerate(zip(features.unbind(1), targets.unbind(1), strict=True)):
                p = ((weight @ x.unsqueeze(-1)).squeeze(-1) + bias).softmax(-1)
                gradient = p.scatter_add(1, y.unsqueeze(1), p.new_full((len(p), 1), -1.0))  # of cross entropy
                if learned is not None:
                    gradient = gradient * learned[:, i : i + 1]
                outer = gradient.unsqueeze(-1) * x.unsqueeze(1)
                if not second:
                    gradient, outer = gradient.detach(), outer.detach()
                weight, bias = weight - rate * outer, bias - rate * gradient
            yield {"weight": weight, "bias": bias}
