"""Tasks of every kind: data that depends on the weights, unequal shapes, items of any type, losses."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from helpers.engines import FixedSource
from helpers.methods import BACKBONES, METHODS, SHAPE, episodes_of, gradient, relative_error
from torch import Tensor, nn
from torch.func import functional_call

from metarun.algorithms.base import Algorithm
from metarun.algorithms.maml import MAML
from metarun.algorithms.pretrain import Pretrain
from metarun.algorithms.protonet import ProtoNet
from metarun.algorithms.reptile import Reptile
from metarun.backbones.mlp import MLP
from metarun.datasets.mixture import MixtureStore
from metarun.errors import ConfigError
from metarun.inner_loops.meta_sgd import MetaSGD
from metarun.inner_loops.sgd import SGD
from metarun.nn.per_task import TaskBatching, run_on_tasks
from metarun.tasks.class_store import ClassStore, numbers, padded, padding_mask, pixels, tokens
from metarun.tasks.episodes import (
    Episodes,
    EpisodeShape,
    Model,
    Outcome,
    Tasks,
    UnequalEpisodes,
    run_parts,
)
from metarun.tasks.objectives import REGRESSION, PerTask, cross_entropy
from metarun.tasks.sampling import sample
from metarun.tasks.source import Draw, EpisodeSource
from metarun.tasks.spec import TaskSpec
from metarun.training.evaluation import EvalSettings, adapted_outcome, evaluate
from metarun.training.hardware import Hardware
from metarun.training.step import OuterStep

# Data that depends on the weights it is given.

STEPS, INPUTS, OUTPUTS, RATE = 2, 3, 2, 0.1


def seen_and_wanted(outputs: Tensor, noise: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [..., B, F] that a policy moves into, and what it should do there; both constants."""
    action = outputs.detach().tanh()
    return noise + 0.3 * action.sum(-1, keepdim=True), goal + 0.2 * action


@dataclass(frozen=True)
class Rollouts(Tasks):
    """Stands for an environment that is rolled out between inner steps.

    Args:
        goal: [T, 1, V].
        noise: [T, steps + 1, B, F], of each inner step and of the queries.
    """

    goal: Tensor
    noise: Tensor

    def __len__(self) -> int:
        return len(self.goal)

    @property
    def outputs(self) -> int:
        return self.goal.shape[-1]

    def rolled_out(self, model: Model, step: int) -> tuple[Tensor, Tensor]:
        noise = self.noise[:, step]
        x, targets = seen_and_wanted(model(noise), noise, self.goal)
        return model(x), targets

    def support_loss(self, model: Model, step: int) -> Tensor:
        outputs, targets = self.rolled_out(model, step)
        return (outputs - targets).square().mean((1, 2))

    def query(self, model: Model, loss: PerTask | None = None) -> Outcome:
        outputs, targets = self.rolled_out(model, STEPS)
        scores = {"mse": REGRESSION.loss(outputs.detach(), targets)}
        return Outcome((loss or REGRESSION.loss)(outputs, targets), scores, outputs)

    def to(self, dtype: torch.dtype) -> Rollouts:
        return Rollouts(self.goal.to(dtype), self.noise.to(dtype))


class Environment(EpisodeSource):
    """A source of `Rollouts`, whose goals are near to each other."""

    name = fingerprint = "environment"

    def __init__(self, static: bool = False) -> None:
        self.spec = TaskSpec((INPUTS,), REGRESSION, OUTPUTS, static=static, tasks=Rollouts)

    def check(self, shape: EpisodeShape) -> None: ...

    def draw(self, tasks: int, shape: EpisodeShape, generator: torch.Generator) -> Draw:
        goal = torch.tensor([1.0, -1.0]) + 0.2 * torch.randn(tasks, 1, OUTPUTS, generator=generator)
        return goal, torch.randn(tasks, STEPS + 1, 5, INPUTS, generator=generator)

    def gather(self, draw: Draw, shape: EpisodeShape) -> Rollouts:
        return Rollouts(*draw)


ONE = EpisodeShape(1, 1, 1)


def network() -> MLP:
    return MLP((INPUTS,), hidden=(6, 4))


def meta_sgd() -> MAML:
    algorithm = MAML(network(), MetaSGD(steps=STEPS), OUTPUTS)
    with torch.no_grad():
        for p in algorithm.inner_loop.parameters():
            p.uniform_(0.05, 0.2)
    return algorithm


def absolute_error(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).abs().mean((1, 2))


class AbsoluteError(MAML):
    """MAML with a loss of its own in the outer loop."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return absolute_error(outputs, targets)


ON_ROLLOUTS: dict[str, Callable[[], MAML]] = {
    "maml": lambda: MAML(network(), SGD(RATE, STEPS), OUTPUTS),
    "fomaml": lambda: MAML(network(), SGD(RATE, STEPS, order=1), OUTPUTS),
    "anil": lambda: MAML(network(), SGD(RATE, STEPS), OUTPUTS, adapts="head"),
    "boil": lambda: MAML(network(), SGD(RATE, STEPS), OUTPUTS, adapts="body"),
    "meta_sgd": meta_sgd,
    "own loss": lambda: AbsoluteError(network(), SGD(RATE, STEPS), OUTPUTS),
}


def plain_gradient(name: str, algorithm: MAML, tasks: Rollouts) -> dict[str, Tensor]:
    """A loop over tasks and steps with the weights as a dictionary."""
    net = nn.Sequential(copy.deepcopy(algorithm.learner.backbone), copy.deepcopy(algorithm.learner.head))
    own = {"0": "learner.backbone", "1": "learner.head"}
    theta = {key: p.detach().clone().requires_grad_() for key, p in net.named_parameters()}
    full = {key: own[key[0]] + key[1:] for key in theta}
    rates: dict[str, Tensor] = {}
    if name == "meta_sgd":
        learned = dict(algorithm.named_parameters())
        for key in theta:
            place = "inner_loop.rates." + full[key].removeprefix("learner.").replace(".", "/")
            rates[place] = learned[place].detach().clone().requires_grad_()
    fast = [key for key in theta if {"anil": key[0] == "1", "boil": key[0] == "0"}.get(name, True)]
    losses = []
    for goal, noise in zip(tasks.goal, tasks.noise, strict=True):
        weights = dict(theta)

        def loss(weights: dict[str, Tensor], z: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
            x, wanted = seen_and_wanted(functional_call(net, weights, (z,)), z, goal)
            return functional_call(net, weights, (x,)), wanted

        for step in range(STEPS):
            outputs, wanted = loss(weights, noise[step], goal)
            support = (outputs - wanted).square().mean()
            grads = torch.autograd.grad(
                support, [weights[key] for key in fast], create_graph=name != "fomaml"
            )
            for key, grad in zip(fast, grads, strict=True):
                place = "inner_loop.rates." + full[key].removeprefix("learner.").replace(".", "/")
                weights[key] = weights[key] - rates.get(place, RATE) * grad
        outputs, wanted = loss(weights, noise[STEPS], goal)
        error = (outputs - wanted).abs() if name == "own loss" else (outputs - wanted).square()
        losses.append(error.mean())
    everything = {full[key]: p for key, p in theta.items()} | rates
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(everything.values()))
    return dict(zip(everything, grads, strict=True))


def step_on(algorithm: Algorithm, source: EpisodeSource, tasks: int, rate: float = 0.1, **how) -> OuterStep:
    """An outer step in float64, prepared."""
    hardware = Hardware("cpu", **({"precision": "float64", "tasks_at_once": 100, "compile": False} | how))
    hardware.place(algorithm)
    optimizer = torch.optim.SGD(algorithm.parameters(), lr=rate)
    engine = OuterStep(algorithm, optimizer, source, ONE, tasks, 0, hardware)
    engine.prepare(0)
    return engine


def grads_of(algorithm: Algorithm) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in algorithm.named_parameters() if p.grad is not None}


@pytest.mark.quick
@pytest.mark.parametrize("name", ON_ROLLOUTS)
def test_the_meta_gradient_where_data_depends_on_the_weights(float64: None, name: str):
    algorithm = ON_ROLLOUTS[name]()
    engine = step_on(algorithm, Environment(), 4)
    draw = next(engine.draws)
    engine.backward(draw)
    expected = plain_gradient(name, algorithm, Environment().gather(draw, ONE).to(torch.float64))
    assert relative_error(grads_of(algorithm), expected) < 1e-10


@pytest.mark.quick
@pytest.mark.parametrize("how", ["auto", True])
def test_tasks_that_are_not_static_are_never_traced_and_are_learned(how: str | bool):
    torch.manual_seed(0)
    assert step_on(ON_ROLLOUTS["maml"](), Environment(static=True), 4, compile="auto").traced
    algorithm = ON_ROLLOUTS["maml"]()
    engine = step_on(algorithm, Environment(), 4, compile=how)
    losses = []
    for _ in range(40):
        engine.running_totals.zero_()
        engine.step()
        assert not engine.traced and engine.graph is None
        losses.append(engine.running_totals[0].item())
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert all(later < before for before, later in itertools.pairwise(losses[i] for i in (0, 10, 39)))
    result = evaluate(algorithm, Environment(), EvalSettings(ONE, 60, 0), engine.hardware)
    assert result.loss == pytest.approx(result.mean)
    assert result.loss < 0.3 * losses[0] / 4  # which is a sum over 4 tasks
    assert result.scores["mse"].shape == (60,)


@pytest.mark.quick
def test_methods_that_need_episodes_are_refused_for_other_tasks():
    spec = Environment().spec
    for cls in {type(METHODS[name].build(BACKBONES["smooth"](), 1)) for name in METHODS}:
        if cls.needs is Tasks:
            cls.check_tasks(spec)
            continue
        message = f"{cls.__name__}: needs labelled .* the tasks of this dataset"
        with pytest.raises(ConfigError, match=message) as error:
            cls.check_tasks(spec)
        assert "\n" not in str(error.value)
    assert ProtoNet.needs is Episodes
    assert {MAML.needs, Reptile.needs, Pretrain.needs} == {Tasks}


@pytest.mark.quick
def test_a_query_beside_the_support_needs_a_support():
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(INPUTS, 4), norm)
    backbone.features = 4
    algorithm = MAML(backbone, SGD(RATE, STEPS), OUTPUTS, transductive=False)
    tasks = sample(Environment(), 2, ONE, torch.Generator())
    with pytest.raises(ConfigError, match=r"^algorithm\.transductive=false: .*episodes have none"):
        algorithm.meta_loss(tasks)


# Tasks of unequal shapes.


def unequal() -> UnequalEpisodes:
    """Three tasks whose ways, shots of a class and queries of a class all differ."""
    tasks = []
    for shots, queries in (([1, 2, 3], [2, 1, 1]), ([2, 1], [1, 3]), ([1, 1, 2], [1, 1, 1])):
        ways = len(shots)
        support_y, query_y = (torch.arange(ways).repeat_interleave(torch.tensor(n)) for n in (shots, queries))
        tasks.append(
            Episodes(
                torch.rand(1, len(support_y), *SHAPE),
                support_y.unsqueeze(0),
                torch.rand(1, len(query_y), *SHAPE),
                query_y.unsqueeze(0),
                torch.randperm(11)[:ways].unsqueeze(0),
                about=torch.rand(1, ways, 2, 3),  # as in helpers.methods
            )
        )
    return UnequalEpisodes(tuple(tasks))


class UnequalSource(FixedSource):
    """Gives tasks of unequal shapes."""

    def __init__(self, episodes: UnequalEpisodes) -> None:
        super().__init__(episodes.tasks[0])
        self.whole = episodes

    def draw(self, tasks: int, shape: EpisodeShape, generator: torch.Generator) -> Draw:
        return (torch.arange(tasks) % len(self.whole),)

    def gather(self, draw: Draw, shape: EpisodeShape) -> UnequalEpisodes:
        return UnequalEpisodes(tuple(self.whole.tasks[i] for i in draw[0].tolist()))


def built(name: str, backbone: nn.Module | None = None) -> Algorithm:
    """A row of METHODS with two inner steps, without random numbers."""
    torch.manual_seed(1)
    algorithm = METHODS[name].build(BACKBONES["smooth"]() if backbone is None else backbone, 2)
    if name == "versa":
        fixed = torch.randn(2, 1, 1, 3)
        algorithm.noise = lambda like, bias: fixed[..., : like.shape[-1]]
    return algorithm


def of_one(name: str, algorithm: Algorithm, task: Episodes) -> dict[str, Tensor]:
    """A task's own meta-gradient: by the reference, for as many ways as its network has."""
    if task.outputs == 3:
        return METHODS[name].reference(copy.deepcopy(algorithm), task, 2)
    return gradient(copy.deepcopy(algorithm), task)


@pytest.mark.parametrize("name", METHODS)
def test_tasks_of_unequal_shapes_are_each_run_alone(float64: None, name: str):
    tasks, algorithm = unequal(), built(name)
    engine = step_on(algorithm, UnequalSource(tasks), len(tasks))
    before = copy.deepcopy(algorithm)
    engine.backward(next(engine.draws))
    alone = [of_one(name, before, task) for task in tasks.parts()]
    mean = {key: sum(grads[key] for grads in alone) / len(alone) for key in alone[0]}
    assert relative_error(grads_of(algorithm), {key: mean[key] for key in grads_of(algorithm)}) < max(
        METHODS[name].tolerance, 1e-9
    )
    outcome = run_parts(copy.deepcopy(before).meta_loss, tasks)
    assert outcome.loss.shape == (3,)
    for i, task in enumerate(tasks.parts()):
        own = copy.deepcopy(before).meta_loss(task)
        torch.testing.assert_close(outcome.loss[i], own.loss.mean())
        torch.testing.assert_close(outcome.scores["accuracy"][i], own.scores["accuracy"][0])
    engine.at_once = 2  # in chunks
    engine.running_totals.zero_()
    found = grads_of(algorithm)
    if name != "simpleshot":  # whose running average has moved, which its training does not use
        engine.backward(next(engine.draws))
        assert relative_error(grads_of(algorithm), found) < 1e-10
        assert engine.running_totals[0].item() == pytest.approx(outcome.loss.sum().item())


class Counting(nn.Module):
    """Remembers how many examples it is given."""

    features = 4

    def __init__(self, counts: list[int]) -> None:
        super().__init__()
        self.layers, self.counts = BACKBONES["smooth"](), counts

    def forward(self, x: Tensor) -> Tensor:
        self.counts.append(len(x))
        return self.layers(x)


@pytest.mark.parametrize("name", ["maml", "reptile-sgd", "imaml", "protonet", "r2d2"])
def test_nothing_is_padded(float64: None, name: str):
    tasks, counts = unequal(), []
    algorithm = built(name, Counting(counts))
    result = evaluate(
        algorithm, UnequalSource(tasks), EvalSettings(ONE, 3, 0), Hardware("cpu", precision="float64")
    )
    outcome = adapted_outcome(algorithm.eval(), tasks, torch.float64)
    torch.testing.assert_close(result.losses, outcome.loss)
    # Its batch statistics see each class as often as the largest (3 of 3, 2 of 2, 2 of 3), and all queries.
    assert set(counts) == {9, 4, 6} | {4, 3}


@pytest.mark.quick
@pytest.mark.parametrize("name", ["maml", "anil", "imaml", "snail", "gnn", "mann", "meta_networks"])
def test_a_network_with_too_few_ways_is_refused(float64: None, name: str):
    """Before training by `check`, and by the task itself where its ways were not known before."""
    tasks = UnequalEpisodes((*unequal().tasks, episodes_of(1, ways=4)))
    algorithm = built(name)
    assert tasks.outputs == 4
    with pytest.raises(ConfigError, match="has 3 ways, not 4"):
        algorithm.check(tasks.outputs)
    for run in (algorithm.meta_loss, lambda part: adapted_outcome(algorithm, part, torch.float64)):
        with pytest.raises(ConfigError, match="has 3 ways, not 4"):
            run_parts(run, tasks)


@pytest.mark.quick
def test_tasks_of_unequal_shapes_have_no_common_loss():
    tasks = unequal()
    assert (len(tasks), tasks.outputs) == (3, 3)
    with pytest.raises(TypeError, match="run each of parts"):
        tasks.support_loss(lambda x: x, 0)
    with pytest.raises(TypeError, match="run each of parts"):
        tasks.query(lambda x: x)
    assert {part.support_x.dtype for part in tasks.to(torch.float64).parts()} == {torch.float64}


# Items of any type.

COUNTS = [4, 6, 5, 7]
NAMES = ["a", "b", "c", "d"]
SHAPE_OF_TASK = EpisodeShape(3, 2, 2)


def marks() -> Tensor:
    """(class, place in it) of each item, [items, 2]."""
    return torch.tensor([(k, i) for k, count in enumerate(COUNTS) for i in range(count)])


def sentences(seed: int = 0) -> Tensor:
    """Token ids whose first two name the item; of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 6, (len(marks()),), generator=generator).tolist()
    words = [torch.randint(1, 20, (length,), generator=generator) for length in lengths]
    return padded([torch.cat([mark + 1, rest]).int() for mark, rest in zip(marks(), words, strict=True)])


ITEMS: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], Tensor]]] = {
    "pixels": (lambda: marks().to(torch.uint8)[:, None, None, :], pixels),
    "numbers": (lambda: marks().double() / 4 - 1, numbers),
    "tokens": (sentences, tokens),
}
#: The class and the place of decoded items.
READ: dict[str, Callable[[Tensor], Tensor]] = {
    "pixels": lambda x: (x[..., 0, 0, :] * 255).round().long(),
    "numbers": lambda x: ((x + 1) * 4).long(),
    "tokens": lambda x: x[..., :2] - 1,
}


def store_of(kind: str, items: Tensor | None = None, **settings) -> ClassStore:
    make, decode = ITEMS[kind]
    return ClassStore(make() if items is None else items, COUNTS, NAMES, kind, decode=decode, **settings)


@pytest.mark.quick
@pytest.mark.parametrize("kind", ITEMS)
def test_items_of_any_type_are_drawn_alike(kind: str):
    store = store_of(kind)
    expected_dtype = torch.int64 if kind == "tokens" else torch.float32
    assert store.spec.item_dtype == expected_dtype
    assert store.spec.item_shape == {"pixels": (1, 1, 2), "numbers": (2,)}.get(kind, store.items.shape[1:])
    draw = store.draw(50, SHAPE_OF_TASK, torch.Generator().manual_seed(0))
    for a, b in zip(
        draw, store_of("pixels").draw(50, SHAPE_OF_TASK, torch.Generator().manual_seed(0)), strict=True
    ):
        assert torch.equal(a, b)
    episodes = store.gather(draw, SHAPE_OF_TASK)
    assert episodes.support_x.dtype == episodes.query_x.dtype == expected_dtype
    classes, places = draw
    for x, y, part in (
        (episodes.support_x, episodes.support_y, places[..., :2]),
        (episodes.query_x, episodes.query_y, places[..., 2:]),
    ):
        found = READ[kind](x)  # [T, B, 2]
        assert torch.equal(found[..., 0], classes.gather(1, y))
        assert torch.equal(found[..., 1], part.flatten(1))
    converted = episodes.to(torch.float64)
    assert converted.support_x.dtype == (torch.int64 if kind == "tokens" else torch.float64)
    assert converted.support_y.dtype == torch.int64


@pytest.mark.quick
@pytest.mark.parametrize("kind", ITEMS)
def test_a_fingerprint_differs_with_the_items(kind: str):
    store, items = store_of(kind), ITEMS[kind][0]()
    assert store.fingerprint == store_of(kind).fingerprint
    changed = items.clone()
    changed[-1, ..., -1] += 1
    assert store_of(kind, changed).fingerprint != store.fingerprint
    assert store_of(kind, fingerprint="known").fingerprint != store.fingerprint
    assert (
        store_of(kind, fingerprint="known").fingerprint
        == store_of(kind, changed, fingerprint="known").fingerprint
    )
    assert len({store_of(each).fingerprint for each in ITEMS}) == 3


@pytest.mark.quick
@pytest.mark.parametrize("kind", ITEMS)
def test_items_in_host_memory_give_the_same_episodes(kind: str):
    near = store_of(kind)
    far = near.with_items(near.items, torch.device("cpu"))
    assert far.host_for is not None
    assert (far.spec, far.fingerprint) == (near.spec, near.fingerprint)
    a, b = (sample(each, 20, SHAPE_OF_TASK, torch.Generator().manual_seed(0)) for each in (near, far))
    for name in ("support_x", "support_y", "query_x", "query_y", "classes"):
        assert torch.equal(getattr(a, name), getattr(b, name))


@pytest.mark.quick
@pytest.mark.parametrize("kind", ITEMS)
def test_stores_of_one_kind_are_mixed(kind: str):
    stores = {"one": store_of(kind), "two": store_of(kind)}
    mixed = MixtureStore(stores, [1.0, 1.0], "both", "cpu")
    assert mixed.spec.item_dtype == stores["one"].spec.item_dtype
    episodes = sample(mixed, 50, SHAPE_OF_TASK, torch.Generator().manual_seed(0))
    second = episodes.classes >= len(NAMES)
    assert torch.equal(second.any(1), second.all(1)) and 5 < second.all(1).sum() < 45
    found = READ[kind](episodes.query_x)[..., 0]
    assert torch.equal(found, (episodes.classes % len(NAMES)).gather(1, episodes.query_y))
    part = sample(mixed.parts["two"], 5, SHAPE_OF_TASK, torch.Generator().manual_seed(0))
    alone = sample(stores["two"], 5, SHAPE_OF_TASK, torch.Generator().manual_seed(0))
    assert torch.equal(part.query_x, alone.query_x)


@pytest.mark.quick
def test_stores_of_unequal_kinds_are_not_mixed():
    scaled = store_of("numbers")
    other = ClassStore(scaled.items, COUNTS, NAMES, "other", decode=lambda items: items.float() / 2)
    wider = ClassStore(torch.zeros(22, 3).double(), COUNTS, NAMES, "other", decode=numbers)
    whole = ClassStore(scaled.items.int(), COUNTS, NAMES, "other", decode=numbers)
    for unlike in (other, wider, whole):
        with pytest.raises(ConfigError, match="numbers and other differ") as error:
            MixtureStore({"one": scaled, "two": unlike}, [1.0, 1.0], "both", "cpu")
        assert "\n" not in str(error.value)


class Words(nn.Module):
    """The mean embedding of a sequence's tokens."""

    features = 4

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.last = nn.Embedding(20, 6), nn.Linear(6, self.features)

    def forward(self, ids: Tensor) -> Tensor:
        known = padding_mask(ids).unsqueeze(-1).to(self.last.weight.dtype)
        return self.last((self.embedding(ids) * known).sum(1) / known.sum(1)).tanh()


@pytest.mark.quick
def test_padding_changes_no_sequence():
    ids = padded([torch.tensor([3, 4, 5]), torch.tensor([6])])
    assert ids.tolist() == [[3, 4, 5], [6, 0, 0]]
    assert padding_mask(ids).tolist() == [[True] * 3, [True, False, False]]
    words = Words()
    torch.testing.assert_close(words(ids)[1], words(torch.tensor([[6]]))[0])


@pytest.mark.quick
def test_an_embedding_is_run_on_tasks_in_every_way(float64: None):
    store, network = store_of("tokens"), Words()
    tasks = sample(store, 3, SHAPE_OF_TASK, torch.Generator().manual_seed(0))
    params = {name: torch.randn(3, *p.shape) for name, p in network.named_parameters()}
    expected = torch.stack(
        [
            functional_call(network, {name: p[t] for name, p in params.items()}, (tasks.support_x[t],))
            for t in range(3)
        ]
    )
    for how in ("auto", "grouped", "unfold", "vmap", "loop"):
        found = run_on_tasks(network, params, tasks.support_x, TaskBatching(how))  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected)


@pytest.mark.quick
def test_training_on_token_ids_from_host_memory_is_the_same():
    near, words = store_of("tokens"), Words()
    losses = []
    for store in (near, near.with_items(near.items, torch.device("cpu"))):
        algorithm = built("protonet", copy.deepcopy(words))
        hardware = Hardware("cpu", precision="float64", tasks_at_once=100, compile=False)
        hardware.place(algorithm)
        optimizer = torch.optim.SGD(algorithm.parameters(), lr=0.5)
        engine = OuterStep(algorithm, optimizer, store, SHAPE_OF_TASK, 4, 0, hardware)
        engine.prepare(0)
        assert (engine.host_store() is not None) == (store.host_for is not None)
        for _ in range(20):  # over the end of a block of draws
            engine.step()
        losses.append(engine.running_totals[0].item())
    assert losses[0] == losses[1] > 0


@pytest.mark.quick
@pytest.mark.parametrize("method", ["maml", "protonet", "pretrain"])
def test_methods_learn_token_ids_in_every_way(float64: None, method: str):
    store = store_of("tokens")
    tasks = sample(store, 3, SHAPE_OF_TASK, torch.Generator().manual_seed(0))
    algorithm = built(method, Words())
    found = {how: gradient(copy.deepcopy(algorithm), tasks, batching=how) for how in ("loop", "vmap", "auto")}
    for how in ("vmap", "auto"):
        assert relative_error(found[how], found["loop"]) < 1e-10
    expected = METHODS[method].reference(algorithm, tasks, 2)
    assert relative_error(found["loop"], expected) < 1e-10


# A method's own loss.


def scaled(algorithm: Algorithm, factor: int = 2) -> Algorithm:
    """The same with its loss of the queries times a factor."""
    cls = type(algorithm)

    class Scaled(cls):  # type: ignore[valid-type,misc]
        def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
            own = super().loss if callable(cls.loss) else cross_entropy
            return factor * own(outputs, targets)

    twin = copy.deepcopy(algorithm)
    twin.__class__ = Scaled
    return twin


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_of_a_methods_own_is_trained_by_and_reported(float64: None, name: str):
    tasks, algorithm = episodes_of(), built(name)
    twin = scaled(algorithm)
    outcomes = [
        adapted_outcome(copy.deepcopy(each).eval(), tasks, torch.float64) for each in (algorithm, twin)
    ]
    torch.testing.assert_close(outcomes[1].loss, 2 * outcomes[0].loss)
    torch.testing.assert_close(outcomes[1].scores["accuracy"], outcomes[0].scores["accuracy"])
    if name in ("platipus", "taml-theil"):  # their meta-losses are no multiples of that of the queries
        return
    expected = gradient(copy.deepcopy(algorithm), tasks)
    beside = gradient(scaled(algorithm, 0), tasks)  # of terms that are not the loss of the queries
    expected = {key: 2 * expected[key] - beside[key] for key in expected}
    assert relative_error(gradient(twin, tasks), expected) < 1e-8
