"""Online meta-learning: tasks that arrive one after another, with their examples batch by batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metarun.algorithms.maml import MAML
from metarun.datasets.rainbow import StreamTask
from metarun.tasks.episodes import Episodes
from metarun.tasks.sampling import seeded
from metarun.training.checkpoint import load_optimizer


@dataclass(frozen=True)
class OnlineSettings:
    """How learners are trained.

    Args:
        batch: examples that arrive at once, of the images of a task.
        meta_steps: steps of the outer optimizer after each batch.
        meta_batch: tasks in each of these steps, drawn from all that have arrived.
        minibatch: examples of a task in a step, for the support and again for the query.
        lr: of the outer optimizer, Adam.
        seed: of the weights and of the choices.
    """

    batch: int
    meta_steps: int
    meta_batch: int
    minibatch: int
    lr: float
    seed: int


Row = dict[str, Any]


class OnlineLearner:
    """Follow the meta leader, and what it is compared with (Finn, Rajeswaran, Kakade and Levine 2019).

    After each batch of examples, a learner takes steps on minibatches of the tasks that have arrived
    (`learn`), and predicts the test examples of the current task (`predict`). Algorithm 1 and 2 of the paper,
    by the name of the learner in `LEARNERS` (section 6):

    - "ftml": follow the meta leader. The steps are those of MAML, for a support and a query minibatch of each
      task; the current task is predicted after gradient descent on its examples.
    - "joint": one network learns all tasks so far, and is fine-tuned to the current one as ftml is ("FTL").
    - "everything": the same network, not fine-tuned ("TOE").
    - "scratch": a new network for each task, which learns from its examples alone ("TFS").

    Departures: all learners take the same number of steps of Adam on as many examples; in the paper, each
    trains until it converges. The update procedure uses all examples of the current task in each step.

    Args:
        kind: "ftml", "joint" or "scratch".
        algorithm: MAML, which is copied.
        outputs: the number of classes.
        settings: how it is trained.
    """

    def __init__(self, kind: str, algorithm: MAML, outputs: int, settings: OnlineSettings) -> None:
        self.kind, self.start, self.outputs, self.settings = kind, algorithm, outputs, settings
        self.generator = seeded(f"online {settings.seed}")  # the same choices for all learners
        self.begin()

    def begin(self) -> None:
        """Start with the first weights."""
        self.algorithm = copy.deepcopy(self.start)
        self.optimizer = torch.optim.Adam(self.algorithm.parameters(), lr=self.settings.lr)

    def state(self) -> dict[str, Any]:
        """What it goes on from: its weights, its optimizer and its random choices."""
        return {
            "weights": self.algorithm.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "choices": self.generator.get_state(),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.algorithm.load_state_dict(state["weights"])
        load_optimizer(self.optimizer, state["optimizer"])
        self.generator.set_state(state["choices"])

    def learn(self, tasks: Sequence[StreamTask], arrived: int) -> None:
        """Take the steps after a batch of examples.

        Args:
            tasks: all so far; the last one is the current one.
            arrived: how many examples of the current task there are; of the others, all are.
        """
        self.algorithm.train()
        for _ in range(self.settings.meta_steps):
            episodes = self.minibatches(tasks, arrived)
            if self.kind == "ftml":
                loss = self.algorithm.meta_loss(episodes).loss.mean()
            else:
                whole = episodes.joined()
                params = self.algorithm.learner.task_params(len(whole), self.outputs)
                loss = whole.objective.loss(
                    self.algorithm.learner(params, whole.support_x), whole.support_y
                ).mean()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    def minibatches(self, tasks: Sequence[StreamTask], arrived: int) -> Episodes:
        """A minibatch for the support and one for the query of each of some tasks, drawn with replacement."""
        count, size = len(tasks), 2 * self.settings.minibatch
        chosen = torch.randint(count, (self.settings.meta_batch,), generator=self.generator)
        if self.kind == "scratch":
            chosen = torch.full_like(chosen, count - 1)
        rows = []
        for number in chosen.tolist():
            there = arrived if number == count - 1 else len(tasks[number].x)
            order = torch.randperm(there, generator=self.generator)
            rows.append((tasks[number], order.repeat(-(-size // there))[:size]))
        x, y = (torch.stack([getattr(task, key)[own] for task, own in rows]) for key in ("x", "y"))
        half = self.settings.minibatch
        return self.episodes(x[:, :half], y[:, :half], x[:, half:], y[:, half:])

    def episodes(self, x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor) -> Episodes:
        """Tasks with the same classes."""
        classes = torch.arange(self.outputs, device=x.device).expand(len(x), -1)
        return Episodes(x, y, query_x, query_y, classes)

    def predict(self, task: StreamTask, arrived: int, adapts: bool) -> Tensor:
        """The logits of the test examples of a task, [B, N].

        Args:
            task: the current task.
            arrived: how many of its examples have arrived.
            adapts: whether to adapt to these first.
        """
        self.algorithm.eval()
        support = task.x[None, :arrived], task.y[None, :arrived]
        tasks = self.episodes(*support, task.test_x[None], task.test_y[None])
        with torch.no_grad():
            if adapts:
                adapted = self.algorithm.adapt(tasks)
            else:
                adapted = {"params": self.algorithm.learner.task_params(1, self.outputs)}
            return self.algorithm.predictor(adapted, tasks)(tasks.query_x)[0]


#: The learners: which steps they take, and whether they adapt to the current task.
LEARNERS = {
    "ftml": ("ftml", True),
    "joint": ("joint", True),
    "everything": ("joint", False),
    "scratch": ("scratch", False),
}


class Followers:
    """Learners that follow a stream of tasks side by side.

    Args:
        kinds: names of learners.
        algorithm: MAML with the first weights.
        outputs: the number of classes.
        settings: how learners are trained.
    """

    def __init__(self, kinds: Sequence[str], algorithm: MAML, outputs: int, settings: OnlineSettings) -> None:
        self.kinds, self.settings = kinds, settings
        trained = dict.fromkeys(LEARNERS[kind][0] for kind in kinds)
        self.learners = {kind: OnlineLearner(kind, algorithm, outputs, settings) for kind in trained}
        self.done = 0  # tasks

    def next_task(
        self, stream: Sequence[StreamTask], advance: Callable[[int], object] = lambda count: None
    ) -> Iterator[Row]:
        """Let all learners follow the next task of a stream.

        Args:
            stream: all tasks.
            advance: called with 1 after each batch of examples of each learner.

        Yields:
            After each batch: the learner, the number of the task, the images that have arrived, and the
            accuracy on the test examples.
        """
        task, batch = stream[self.done], self.settings.batch
        for arrived in range(batch, len(task.x) + 1, batch):
            for learner in self.learners.values():
                if learner.kind == "scratch" and arrived == batch:
                    learner.begin()
                learner.learn(stream[: self.done + 1], arrived)
                advance(1)
            for kind in self.kinds:
                learned, adapts = LEARNERS[kind]
                logits = self.learners[learned].predict(task, arrived, adapts)
                accuracy = (logits.argmax(-1) == task.test_y).double().mean().item()
                yield {"learner": kind, "task": self.done, "images": arrived, "accuracy": accuracy}
        self.done += 1

    def state(self) -> dict[str, Any]:
        """What all go on from after a task, as entries of a checkpoint of the kind "stream"."""
        states = {kind: learner.state() for kind, learner in self.learners.items()}
        return {
            "done": self.done,
            "algorithm": {
                f"{k}.{name}": x for k, s in states.items() for name, x in s.pop("weights").items()
            },
            "learners": states,
            "random": torch.get_rng_state(),  # of dropout
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        for kind, learner in self.learners.items():
            own = {
                k.removeprefix(f"{kind}."): x
                for k, x in state["algorithm"].items()
                if k.startswith(f"{kind}.")
            }
            learner.load_state({**state["learners"][kind], "weights": own})
        torch.set_rng_state(state["random"])
        self.done = state["done"]
