"""The base class of algorithms."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from metarun.errors import ConfigError
from metarun.nn.layers import uses_batch_statistics
from metarun.nn.task_norm import support_first, task_norms
from metarun.tasks.episodes import Episodes, EpisodeShape, Outcome, Tasks
from metarun.tasks.objectives import PerTask
from metarun.tasks.rollouts import Rollouts
from metarun.tasks.source import EpisodeSource
from metarun.tasks.spec import TaskSpec

#: Task-specific state after adaptation (weights, prototypes, ...): a tensor, or dicts and lists of tensors.
Adapted = Any
QUERIES_AT_ONCE = 75  # in evaluation, the most queries of a task in one pass, unless all are one batch


class Algorithm(nn.Module, ABC):
    """Base class of meta-learning methods: a module of meta-parameters that handles T tasks at once.

    The extension point for a new method. A subclass implements `adapt` and `predict`, and `meta_loss` if
    training minimises something other than the query loss after adaptation. The builder passes these
    constructor arguments by name, if the constructor has them: `backbone`, `inner_loop`, `outputs` (N, or the
    number of values of a regression), `item_shape`, `classes` (the number of classes of the training split;
    None for a regression), `shots` (K of the training tasks, at least 1), `description` (the shape of the
    description of a class, see `TaskSpec`). All other arguments are settings.

    `self.training` distinguishes meta-training from evaluation, as in any module. Keep tensors on their
    device and shapes fixed (no `.item()`, no branch on the value of a tensor), so that the method can be
    traced and captured as a CUDA graph.
    """

    #: The class of tasks that the method needs; a dataset with other tasks is rejected before it is loaded.
    needs: ClassVar[type[Tasks]] = Tasks  # type: ignore[type-abstract]
    #: Whether the method needs tasks with classes.
    needs_classes: ClassVar[bool] = False
    #: Whether it can predict distributions of values (`metarun.tasks.gaussians`), or only values.
    predicts_distributions: ClassVar[bool] = True
    #: Whether it learns from descriptions of classes (`Episodes.about`), so that tasks may have no support.
    reads_descriptions: ClassVar[bool] = False
    #: Whether it can learn from environments (`metarun.tasks.rollouts`).
    plays: ClassVar[bool] = False
    #: Whether its meta-loss is that of the queries, which PPO and TRPO take several steps on.
    minimises_query_loss: ClassVar[bool] = True
    #: Whether its meta-loss also trains a critic on the trajectories of environments, which needs PPO.
    trains_critic: ClassVar[bool] = False
    #: Whether a task is learned by steps of `inner_loop`, whose number can be chosen at test time.
    takes_steps: ClassVar[bool] = False
    #: Whether it trains one classifier over all training classes, which interpolated tasks do not have.
    classifies_training_classes: bool = False
    #: Whether it has `by_instance`, the accuracy at each appearance of a class (`metarun eval instances=N`).
    sees_examples_in_turn: ClassVar[bool] = False
    #: Whether it gives examples to its backbone alone, and as they are. Features of a frozen network may then
    #: take the place of images.
    embeds_first: ClassVar[bool] = False
    #: Settings of the algorithm, or of another group as in "inner_loop.order", that nothing reads while
    #: another setting of the same group has a value ("head=svm", "test_steps!=null"; "": always). They are
    #: refused if they are typed. An inner loop, a backbone or a dataset may have this attribute too.
    unread: ClassVar[Mapping[str, str | tuple[str, ...]]] = {}
    #: Settings of the algorithm that are `iterations` unless they are typed. A resumed run keeps them, also
    #: if it is given more iterations.
    of_all_iterations: ClassVar[tuple[str, ...]] = ()
    #: Whether the loss of a task depends on the other tasks of a meta-batch, so that they have to be run at
    #: once, and what to set so that it does not.
    couples_tasks: bool = False
    uncoupled: ClassVar[str] = ""
    #: Whether the backbone keeps the weights that it starts with.
    frozen: bool = False
    #: Whether evaluation normalises a query by the statistics of the batch that it is in (batch norm).
    normalises_batches: bool = False
    #: Whether all queries of a task are then one batch; False: each is in a batch with the support alone.
    transductive: bool = True
    #: The loss of the queries, (outputs, targets) -> [T], which training minimises and evaluation reports;
    #: None: the loss of the tasks' objective. A method with another loss defines a method of this name.
    loss: PerTask | None = None

    @classmethod
    def check_kind(cls, spec: TaskSpec) -> None:
        """Raise ConfigError if the method needs another kind of tasks, examples or environments."""
        if issubclass(spec.tasks, Rollouts) and not cls.plays:
            raise ConfigError(
                f"algorithm={cls.__name__}: learns from labelled examples, and this dataset is an "
                "environment; choose algorithm=rl2, maml, fomaml, anil, boil, meta_sgd, meta_curvature, "
                "cavia, reptile or pretrain"
            )
        if cls.needs is Rollouts and not issubclass(spec.tasks, Rollouts):
            raise ConfigError(
                f"algorithm={cls.__name__}: acts in environments, and this dataset has examples; choose "
                "dataset=bandit or navigation2d, or algorithm=maml"
            )
        if not issubclass(spec.tasks, cls.needs):
            raise ConfigError(
                f"algorithm={cls.__name__}: needs labelled support and query examples, which the tasks of "
                "this dataset do not have; choose algorithm=maml"
            )

    @classmethod
    def check_tasks(cls, spec: TaskSpec) -> None:
        """Raise ConfigError if the method does not support these tasks."""
        cls.check_kind(spec)
        if cls.needs_classes and spec.outputs is not None:
            raise ConfigError(
                f"algorithm={cls.__name__}: needs tasks with classes, which this dataset does not have; "
                "choose algorithm=maml, reptile or r2d2"
            )
        if spec.objective.numbers > 1 and not cls.predicts_distributions:
            raise ConfigError(
                f"algorithm={cls.__name__}: predicts values without an uncertainty; set "
                "dataset.likelihood=null, or choose algorithm=maml"
            )
        if cls.reads_descriptions and spec.kind == "texts":
            raise ConfigError(
                f"algorithm={cls.__name__}: is for images; of texts, a description takes the place of a "
                "support example, so choose any other method, such as algorithm=protonet shots=0"
            )
        if cls.reads_descriptions and spec.description is None:
            raise ConfigError(
                f"algorithm={cls.__name__}: needs descriptions of the classes apart from their examples, "
                "which this dataset does not have; choose dataset=glyphs, cub with its file of attributes, "
                "or image_folder with dataset.descriptions=FILE.csv"
            )

    @property
    def uses_query_statistics(self) -> bool:
        """Whether predictions for one query depend on the other queries of its task (transductive)."""
        return self.normalises_batches and self.transductive

    @cached_property
    def normalises_by_support(self) -> bool:
        """Whether a query is normalised by the support of its task (TaskNorm)."""
        return bool(task_norms(self))

    @property
    def support_norm(self) -> str:
        """The setting `norm` of layers that normalise by the support."""
        return task_norms(self)[0].setting

    @property
    def predicts_beside_support(self) -> bool:
        """Whether predicting a query takes the support examples, beside what `adapt` made of them."""
        return self.normalises_by_support or (self.normalises_batches and not self.transductive)

    @property
    def unused_settings(self) -> Mapping[str, str]:
        """Typed settings that nothing reads in the method as it is built, each with the reason.

        They are refused like those of `unread`, which other settings decide. A part of an algorithm, such as
        an inner loop, may have this attribute, too.
        """
        name, found = f"in algorithm={type(self).__name__}", {}
        if not self.normalises_batches:
            found["algorithm.transductive"] = f"{name}, where no layer here normalises queries by their batch"
        if not any(isinstance(layer, nn.Linear) for head in self.own_heads() for layer in head.modules()):
            found |= dict.fromkeys(
                ("initial_weights.head", "initial_weights.head_bias"), f"{name}, which has no linear head"
            )
        return found

    def own_backbone(self) -> nn.Module | None:
        """The network that `init=RUN` fills with another run's weights; None: there is none."""
        return None

    def own_heads(self) -> Sequence[nn.Module]:
        """What maps its features to outputs, and starts as `initial_weights=` says, too."""
        return ()

    def check(self, ways: int) -> None:
        """Raise ConfigError if the method does not support tasks with this number of ways."""

    def check_untrained(self) -> None:
        """Raise ConfigError if the method, as it is set, cannot be used without any training."""

    def check_classes(self) -> None:
        """Raise ConfigError if the method, as it is set, does not fit the number of training classes."""

    def check_source(self, source: EpisodeSource, shape: EpisodeShape) -> None:
        """Raise ConfigError if the method does not support tasks of this shape from this source."""
        self.check_classes()
        self.check_shots(source, shape.shots)
        self.check_shape(shape)
        if self.classifies_training_classes and not source.has_fixed_classes:
            raise ConfigError(
                f"train_tasks: algorithm={type(self).__name__} learns to tell all training classes apart, "
                "and an image would be in several of them; choose train_tasks=labels, cactus with "
                "train_tasks.partitions=1, or algorithm=protonet"
            )
        if shape.varied and not source.varies:
            raise ConfigError(
                f"varied=true: {source.name} has no tasks of different ways and shots; choose a dataset with "
                "classes of images, such as omniglot, and train_tasks=labels, or leave varied out"
            )
        if shape.varied and self.couples_tasks and self.training:
            raise ConfigError(
                f"varied=true: algorithm={type(self).__name__} runs the tasks of a meta-batch together, and "
                f"tasks of different sizes run one after another; set {self.uncoupled}, or leave varied out"
            )
        environment = issubclass(source.spec.tasks, Rollouts)
        if environment and not shape.shots and self.takes_steps and self.inner_loop.step_count():  # type: ignore[operator, union-attr]
            raise ConfigError(
                f"shots=0: algorithm={type(self).__name__} learns by inner steps, each from the trajectories "
                "of the shots; set shots, as in shots=20"
            )

    def check_shape(self, shape: EpisodeShape) -> None:
        """Raise ConfigError if the method does not support tasks of this shape, whatever they are made of."""
        self.check(shape.ways)
        self.check_norms(shape)

    def check_norms(self, shape: EpisodeShape) -> None:
        """Raise ConfigError for TaskNorm without a support, or together with batch norm by the batch."""
        if not self.normalises_by_support:
            return
        if not shape.shots:
            raise ConfigError(
                f"shots=0: norm={self.support_norm} normalises by the support examples, and there are none; "
                "set shots to 1 or more, or choose norm=running or layer"
            )
        if uses_batch_statistics(self):
            raise ConfigError(
                f"norm={self.support_norm}: normalises a query by the support alone, and another layer of "
                "the network by its batch; choose algorithm.norm=running or layer"
            )

    def check_training(self, shape: EpisodeShape) -> None:
        """Raise ConfigError if the method, as it is set, cannot be trained on tasks of this shape."""

    @classmethod
    def check_shots(cls, source: EpisodeSource, shots: int) -> None:
        """Raise ConfigError for tasks without support examples, if the method needs some.

        It needs none if it reads descriptions, or if the source gives descriptions in the place of examples.
        """
        if not (shots or cls.reads_descriptions) and source.spec.description is not None:
            raise ConfigError(
                f"shots=0: algorithm={cls.__name__} needs support examples; choose algorithm=zero_shot, or "
                "set shots to 1 or more"
            )

    def on_run_start(self, train: EpisodeSource) -> None:
        """Hook called once at the start of a new run, to set buffers by the training data.

        A network, or another part of an algorithm, may have a method of this name, too.
        """

    def on_validation(self, train: EpisodeSource) -> None:
        """Hook called before every validation, to set buffers by the training data and the current weights.

        The start of a run is a validation, too, also with iterations=0.
        """

    @cached_property
    def layers_by_step(self) -> list[nn.Module]:
        """The layers with an `at_iteration`, such as a dropout whose rate depends on the iteration."""
        return [layer for layer in self.modules() if hasattr(layer, "at_iteration")]

    def start_step(self, iteration: int) -> bool:
        """Called before every outer step: sets the iteration of layers, and returns `on_step_start`."""
        for layer in self.layers_by_step:
            layer.at_iteration(iteration)  # type: ignore[operator]
        return self.on_step_start(iteration)

    def on_step_start(self, iteration: int) -> bool:
        """Hook called before every outer step.

        Update annealed values here, in place and in buffers: a recorded step (a trace, a CUDA graph) reads
        the current value of a buffer, but holds Python numbers as constants.

        Args:
            iteration: the number of the outer step, from 0.

        Returns:
            True if the computation graph changed, so that traces, CUDA graphs and memory estimates must be
            rebuilt.
        """
        return False

    def on_collected(self, batches: Sequence[Rollouts]) -> None:
        """Hook called when the trajectories of an outer step were collected, with all its tasks in chunks."""

    @abstractmethod
    def adapt(self, tasks: Any) -> Adapted:
        """Adapt to each of T tasks, using its support only.

        Args:
            tasks: an instance of the class `needs`. The queries must not be used.

        Returns:
            The task-specific state that `predict` needs: a tensor, or dicts and lists of tensors, each with T
            as its first dimension.
        """

    @abstractmethod
    def predict(self, adapted: Adapted, query_x: Tensor) -> Tensor:
        """Predict the queries of each task.

        Args:
            adapted: the state that `adapt` returned.
            query_x: query examples, [T, B, *item].

        Returns:
            Logits [T, B, N], or the values of a regression [T, B, V].
        """

    def predictor(self, adapted: Adapted, tasks: Any) -> Callable[[Tensor], Tensor]:
        """How the queries of tasks are predicted, [T, B, *item] -> [T, B, N].

        This is `predict` of all queries. With TaskNorm, they are in one batch with the support, whose moments
        do not depend on them. If the method normalises batches and `transductive` is False, each query is
        predicted in a batch with the support alone, as in Reptile's paper (Nichol et al. 2018, section 6.1).

        Args:
            adapted: the state that `adapt` returned for these tasks.
            tasks: an instance of the class `needs`.

        Raises:
            ConfigError: the tasks have no support examples, which are needed if `transductive` is False.
        """
        return self.beside_support(partial(self.predict, adapted), tasks)

    def beside_support(self, predict: Callable[[Tensor], Tensor], tasks: Any) -> Callable[[Tensor], Tensor]:
        """A function of examples [T, B, *item] as one that predicts queries; see `predictor`."""
        if not self.predicts_beside_support:
            return predict
        if not isinstance(tasks, Episodes):
            setting = (
                f"norm={self.support_norm}" if self.normalises_by_support else "algorithm.transductive=false"
            )
            raise ConfigError(
                f"{setting}: predicts a query beside the support examples, and {tasks.unit} have none; "
                "leave it out"
            )

        def after_support(query_x: Tensor) -> Tensor:
            shots = tasks.support_x.shape[1]
            parts = [query_x] if self.training else query_x.split(QUERIES_AT_ONCE, 1)
            with support_first(self, shots):
                return torch.cat(
                    [predict(torch.cat([tasks.support_x, part], 1))[:, shots:] for part in parts], 1
                )

        def one_by_one(query_x: Tensor) -> Tensor:
            batches = (torch.cat([tasks.support_x, query], 1) for query in query_x.split(1, dim=1))
            return torch.cat([predict(batch)[:, -1:] for batch in batches], 1)

        return after_support if self.normalises_by_support else one_by_one

    def balanced(self, tasks: Any) -> Any:
        """Tasks for evaluation: if the method normalises batches, with copies (`Episodes.repeated`)."""
        return tasks.repeated() if self.normalises_batches and isinstance(tasks, Episodes) else tasks

    def meta_loss(self, tasks: Any) -> Outcome:
        """The outcome whose mean loss over tasks is minimised by training.

        By default this is the loss of the queries after adaptation.

        Args:
            tasks: an instance of the class `needs`.

        Returns:
            The loss, one for each task [T] or a scalar, and the scores of the queries.
        """
        return self.outcome(self.adapt(tasks), tasks)

    def outcome(self, adapted: Adapted, tasks: Any, dtype: torch.dtype | None = None) -> Outcome:
        """The outcome of the queries of tasks after adaptation.

        Args:
            adapted: the state that `adapt` returned for these tasks.
            tasks: an instance of the class `needs`.
            dtype: of the outputs; None: as the network gives them.
        """
        predict = self.predictor(adapted, tasks)
        return tasks.query(predict if dtype is None else lambda x: predict(x).to(dtype), self.loss)

    def trajectory(self, tasks: Any) -> Iterator[Adapted]:
        """Yield the state before the first inner step and after each step; a single state without steps."""
        yield self.adapt(tasks)

    def loss_of(self, tasks: Episodes) -> PerTask:
        """The loss that the method defines, or else the loss of the tasks' objective."""
        return self.loss or tasks.objective.loss
