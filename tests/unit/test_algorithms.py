"""Every algorithm against an independent reference, in float64 (METHODS of helpers/methods.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import references
from helpers.engines import engine_of
from helpers.methods import (
    BACKBONES,
    EMBEDDED,
    EVERY_BATCHING,
    METHODS,
    RATE,
    SHAPE,
    STEPS,
    Gradient,
    Smooth,
    episodes_of,
    gradient,
    maml,
    maml_reference,
    protonet_reference,
    relative_error,
)
from torch import Tensor, nn
from torch.func import functional_call

from metarun.algorithms.base import Algorithm
from metarun.algorithms.maml import MAML
from metarun.algorithms.protonet import ProtoNet
from metarun.algorithms.reptile import Reptile
from metarun.backbones.conv4 import Conv4
from metarun.backbones.mlp import MLP
from metarun.commands.one_task import Task, follow
from metarun.errors import ConfigError
from metarun.inner_loops.adam import Adam
from metarun.inner_loops.base import InnerLoop
from metarun.inner_loops.sgd import SGD
from metarun.nn.layers import replace_layers
from metarun.nn.per_task import TaskBatching, run_on_tasks
from metarun.nn.shared_weights import runs_at_once
from metarun.tasks.episodes import Episodes, EpisodeShape, UnequalEpisodes
from metarun.tasks.objectives import REGRESSION
from metarun.tasks.scores import mean_squared_error
from metarun.training.evaluation import adapted_outcome
from metarun.training.step import OuterStep

pytestmark = pytest.mark.usefixtures("float64")


#: Methods that stand for the rest where networks differ: by weights of each task, by features, and
#: those that look at the layers one by one.
ON_EVERY_BACKBONE = ("maml", "protonet", "cavia", "maml_plus_plus", "meta_networks", "cnaps")


@pytest.mark.quick
@pytest.mark.parametrize("name", METHODS)
def test_gradient_is_the_references(name: str):
    """Whole and in chunks; after one inner step."""
    method = METHODS[name]
    algorithm = method.build(Smooth(), 1)
    episodes = episodes_of()
    expected = method.reference(algorithm, episodes, 1)
    assert relative_error(gradient(algorithm, episodes), expected) < method.tolerance
    assert relative_error(gradient(algorithm, episodes, tasks_at_once=2), expected) < method.tolerance


#: Settings of the methods that draw random numbers in training, which the rows of METHODS leave out.
AT_RANDOM = {"shuffles": True, "dropout": 0.5, "batch": 2}
#: What stands in the rows for the random numbers of a method.
STAND_INS = ("noise", "draws")


def with_random_numbers(name: str) -> tuple[Algorithm, bool]:
    """A method that draws as its users' does, and whether it draws."""
    algorithm = METHODS[name].build(BACKBONES["mlp"](), 1)
    settings = {key: value for key, value in AT_RANDOM.items() if hasattr(algorithm, key)}
    vars(algorithm).update(settings)
    return algorithm, any(vars(algorithm).pop(key, None) for key in STAND_INS) or bool(settings)


def two_steps(algorithm: Algorithm, **how) -> tuple[OuterStep, list[Gradient]]:
    """The gradients and the sums of losses and scores of two steps that leave the weights as they are."""
    still = torch.optim.SGD(algorithm.parameters(), lr=0.0)
    engine, found = engine_of(algorithm, episodes_of(tasks=3, shots=2, queries=1), still, **how), []
    torch.manual_seed(0)
    for _ in range(2):
        engine.step()
        found.append({n: p.grad.clone() for n, p in algorithm.named_parameters() if p.requires_grad})
    return engine, [*found, {"totals": engine.running_totals}]


@pytest.mark.parametrize("name", METHODS)
def test_random_numbers_of_a_task_do_not_depend_on_how_many_run_at_once(name: str):
    algorithm, random = with_random_numbers(name)
    state = torch.get_rng_state()
    engine, expected = two_steps(algorithm)
    assert bool(engine.numbers.drawn) == random
    torch.set_rng_state(state)  # of the tasks
    _, found = two_steps(algorithm, tasks_at_once=1)
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-7


@pytest.mark.parametrize("name", ["mr_maml-weights", "hallucination"])
def test_a_trace_draws_the_random_numbers_of_eager_steps(name: str):
    """New ones at each step; parts of the tasks are not traced, since they share the numbers of all."""
    algorithm, state = with_random_numbers(name)[0], torch.get_rng_state()
    _, expected = two_steps(algorithm)
    torch.set_rng_state(state)
    engine, found = two_steps(algorithm, compile="auto", precision="float64")
    assert engine.traced
    assert relative_error(found[0], found[1]) > 1e-3
    for a, b in zip(found, expected, strict=True):
        assert relative_error(a, b) < 1e-7
    assert not engine_of(algorithm, episodes_of(), compile="auto", tasks_at_once=2).traced


@pytest.mark.parametrize(
    ("name", "backbone"),
    [
        (name, backbone)
        for backbone in BACKBONES
        for name in METHODS
        if backbone == "conv4" or (backbone != "smooth" and name in ON_EVERY_BACKBONE)
    ],
)
def test_gradient_of_several_steps_is_the_references(name: str, backbone: str):
    """On any network."""
    algorithm = METHODS[name].build(BACKBONES[backbone](), STEPS[name])
    episodes = episodes_of()
    expected = METHODS[name].reference(algorithm, episodes, STEPS[name])
    assert relative_error(gradient(algorithm, episodes), expected) < METHODS[name].tolerance


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.finite_differences])
def test_gradient_is_the_slope_of_the_loss(name: str):
    """Central differences along random directions, on a network without kinks."""
    algorithm = METHODS[name].build(Smooth(), STEPS[name])
    episodes = episodes_of()
    grads = gradient(algorithm, episodes)
    params = {name: p for name, p in algorithm.named_parameters() if p.requires_grad}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()}
        slope = sum((grads[n] * direction[n]).sum() for n in params).item()
        assert slope == pytest.approx(difference(algorithm, episodes, direction), rel=1e-6)


def difference(algorithm: Algorithm, episodes: Episodes, direction: Gradient, h: float = 1e-5) -> float:
    """(loss(theta + h d) - loss(theta - h d)) / 2h."""
    params = {name: p for name, p in algorithm.named_parameters() if p.requires_grad}
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            for name, p in params.items():
                p += sign * h * direction[name]
        losses.append(algorithm.meta_loss(episodes).loss.mean().item())
        with torch.no_grad():
            for name, p in params.items():
                p -= sign * h * direction[name]
    return (losses[0] - losses[1]) / (2 * h)


@pytest.mark.parametrize("name", EVERY_BATCHING)
def test_every_batching_gives_the_same_meta_gradient(name: str):
    algorithm = METHODS[name].build(BACKBONES["conv4"](), 2)
    episodes = episodes_of(tasks=2)
    expected = METHODS[name].reference(algorithm, episodes, 2)
    for batching in ("grouped", "unfold", "vmap", "loop"):
        error = relative_error(gradient(algorithm, episodes, batching=batching), expected)
        assert error < METHODS[name].tolerance, batching


@pytest.mark.parametrize("name", [name for name in EMBEDDED if name not in ("meta_networks", "leo")])
def test_all_tasks_in_one_pass_give_the_same_meta_gradient(name: str):
    """As on a GPU, where feature maps are not channels-last: only batch norm knows of tasks."""
    algorithm = METHODS[name].build(BACKBONES["conv4"](), 1)
    episodes = episodes_of()
    assert runs_at_once(algorithm.backbone, episodes.support_x, TaskBatching(channels_last=False))
    expected = METHODS[name].reference(algorithm, episodes, 1)
    found = gradient(algorithm, episodes, channels_last=False)
    assert relative_error(found, expected) < METHODS[name].tolerance


class Wrapped(nn.Module):
    """A user's own network: no chain of layers as far as anyone can see."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Smooth()
        self.features = self.net.features

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.any_network])
def test_a_network_of_any_kind_gives_the_same_meta_gradient(name: str):
    algorithm = METHODS[name].build(Wrapped(), 2)
    episodes = episodes_of()
    expected = METHODS[name].reference(algorithm, episodes, 2)
    assert relative_error(gradient(algorithm, episodes), expected) < METHODS[name].tolerance


@pytest.mark.parametrize("name", METHODS)
def test_a_traced_gradient_is_the_references_each_time(name: str):
    """Recorded once and repeated: nothing of it may have a state of its own."""
    algorithm = METHODS[name].build(BACKBONES["mlp"](), 1)
    episodes = episodes_of(tasks=2, shots=1, queries=1)  # loops over tasks and examples are recorded whole
    engine = engine_of(algorithm, episodes)
    engine.trace(compiles=False)
    assert engine.traced
    expected = METHODS[name].reference(algorithm, episodes, 1)
    for _ in range(2):
        engine.backward(next(engine.draws))
        grads = {n: p.grad.clone() for n, p in algorithm.named_parameters() if p.requires_grad}
        assert relative_error(grads, expected) < METHODS[name].tolerance


@pytest.mark.parametrize("name", METHODS)
def test_evaluation_equals_training_mode_and_leaves_no_graph(name: str):
    """Without gradients, adapting gives the same predictions, and nothing is left to differentiate."""
    algorithm = METHODS[name].build(BACKBONES["conv4"](), 2).eval()
    episodes = episodes_of()
    with torch.no_grad():
        adapted = algorithm.adapt(episodes)
        outputs = algorithm.predict(adapted, episodes.query_x)
    assert not outputs.requires_grad
    assert outputs.shape == (3, 6, 3)
    algorithm.train()
    again = algorithm.predict(algorithm.adapt(episodes), episodes.query_x)
    torch.testing.assert_close(outputs, again)


@pytest.mark.parametrize("name", METHODS)
def test_tasks_do_not_touch_each_other(name: str):
    """A task's predictions are the same alone and beside others."""
    algorithm = METHODS[name].build(BACKBONES["conv4"](), 2)
    episodes = episodes_of()
    whole = algorithm.predict(algorithm.adapt(episodes), episodes.query_x)
    for t in range(len(episodes)):
        one = episodes.map(lambda tensor, t=t: tensor[t : t + 1])
        alone = algorithm.predict(algorithm.adapt(one), one.query_x)
        torch.testing.assert_close(alone[0], whole[t])


def without_batch_statistics(name: str) -> Algorithm:
    """The method on vectors, with layer norm in its own networks and its own samples."""
    algorithm = METHODS[name].build(BACKBONES["mlp"](), 2).eval()
    replace_layers(
        algorithm,
        lambda part: nn.GroupNorm(1, part.num_features) if isinstance(part, nn.BatchNorm2d) else None,
    )
    vars(algorithm).pop("noise", None)
    return algorithm


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.equal_classes])
def test_every_class_counts_equally_whatever_its_number_of_shots(name: str):
    """Each example is there twice; or one class has four copies of its example, and the others have one."""
    algorithm = without_batch_statistics(name)
    tasks = episodes_of(shots=1)
    outputs = []
    for rows in torch.tensor([[0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 2]]):
        copies = replace(tasks, support_x=tasks.support_x[:, rows], support_y=tasks.support_y[:, rows])
        outputs.append(algorithm.predict(algorithm.adapt(copies.balanced()), tasks.query_x))
    torch.testing.assert_close(*outputs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if n not in EMBEDDED and m.equal_classes])
def test_batch_statistics_count_every_class_equally(name: str):
    """In `adapt` and `eval`: 2, 4 and 1 examples in any order, as 2, 1 and 4 copies of each would be."""
    algorithm = METHODS[name].build(BACKBONES["conv4"](), 2).eval()
    algorithm.transductive = False
    tasks = episodes_of(tasks=1, shots=4)
    copied, few = torch.tensor([0, 1, 0, 1, 4, 5, 6, 7, 8, 8, 8, 8]), torch.tensor([6, 0, 5, 8, 4, 1, 7])
    equal = replace(tasks, support_x=tasks.support_x[:, copied])
    task = replace(tasks, support_x=tasks.support_x[:, few], support_y=tasks.support_y[:, few]).balanced()
    with torch.no_grad():
        expected, found = (follow(algorithm, Task(each, True, "abc", []))[2] for each in (equal, task))
    torch.testing.assert_close(found, expected)
    outcome = adapted_outcome(algorithm, UnequalEpisodes((task,)), torch.float64)
    torch.testing.assert_close(outcome.outputs, expected)


def test_copies_of_an_example_share_its_weight():
    """Classes of 3, 2 and 1 examples: of the class of 2, one is there twice."""
    tasks = episodes_of(tasks=2, shots=3)
    rows, each = torch.tensor([[0, 1, 2, 3, 4, 6], [8, 0, 4, 5, 1, 2]]), torch.tensor([[0], [1]])
    few = replace(tasks, support_x=tasks.support_x[each, rows], support_y=tasks.support_y[each, rows])
    copied = few.balanced().repeated()
    rows = torch.tensor([[0, 1, 2, 3, 4, 5, 3, 5, 5], [0, 1, 2, 3, 4, 5, 2, 0, 0]])
    torch.testing.assert_close(copied.support_x, few.support_x[each, rows])
    assert torch.equal(copied.support_y, few.support_y[each, rows])
    weights = [[1, 1, 1, 0.75, 1.5, 1, 0.75, 1, 1], [1, 1, 0.75, 1.5, 1, 1, 0.75, 1, 1]]
    torch.testing.assert_close(copied.support_weights, torch.tensor(weights))
    assert torch.equal(tasks.balanced().repeated().support_x, tasks.support_x)


def test_copies_take_limited_memory():
    """Twenty examples of one class beside one of each of five: four times the mean size of a class is 16."""
    few = episodes_of(tasks=1, ways=6, shots=20)
    rows = torch.tensor([*range(20), *range(20, 120, 20)])
    few = replace(few, support_x=few.support_x[:, rows], support_y=few.support_y[:, rows])
    copied = few.balanced().repeated()
    assert copied.support_y[0].bincount().tolist() == [20, 16, 16, 16, 16, 16]
    sums = torch.zeros(6).scatter_add_(0, copied.support_y[0], copied.support_weights[0])
    torch.testing.assert_close(sums, torch.full((6,), 100 / 6))


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.any_order])
def test_the_order_of_classes_changes_nothing(name: str):
    """Classes in another order, as if their folders had other names."""
    algorithm = without_batch_statistics(name)
    tasks = episodes_of(shots=2)
    rows = torch.tensor([4, 5, 0, 1, 2, 3])  # the class that was last comes first
    turned = replace(tasks, support_x=tasks.support_x[:, rows], about=tasks.about[:, [2, 0, 1]])
    expected, found = (algorithm.predict(algorithm.adapt(each), tasks.query_x) for each in (tasks, turned))
    expected, found = (outputs.log_softmax(-1) for outputs in (expected, found))
    torch.testing.assert_close(found[..., [1, 2, 0]], expected)


@pytest.mark.parametrize("name", METHODS)
def test_a_loss_of_its_own_is_trained_evaluated_and_reported(name: str):
    """By training, `eval` and `adapt`; unless training minimises another loss than that of the queries."""
    algorithm, tasks = METHODS[name].build(BACKBONES["mlp"](), 2), episodes_of(tasks=1)
    algorithm.on_step_start(0)
    found = []
    for value in (6, 5):
        algorithm.loss = lambda outputs, targets, value=value: outputs.square().sum((1, 2)) * 0 + value
        found.append(algorithm.meta_loss(tasks).loss.mean().item())
    if algorithm.minimises_query_loss:
        assert found[0] - found[1] == pytest.approx(1, abs=1e-12)  # some add a penalty of the weights
    algorithm.eval()
    assert adapted_outcome(algorithm, tasks, torch.float64).loss.tolist() == [5]
    with torch.no_grad():
        rows, *_ = follow(algorithm, Task(tasks, True, "abc", []))
    assert {row["support loss"] for row in rows} | {row["query loss"] for row in rows} == {5}


@pytest.mark.parametrize("name", METHODS)
def test_trajectory_ends_where_adapt_does(name: str):
    algorithm = METHODS[name].build(BACKBONES["smooth"](), 3).eval()
    episodes = episodes_of()
    with torch.no_grad():
        steps = list(algorithm.trajectory(episodes))
        last = algorithm.predict(steps[-1], episodes.query_x)
        direct = algorithm.predict(algorithm.adapt(episodes), episodes.query_x)
    assert len(steps) == (4 if hasattr(algorithm, "inner_loop") else 1)
    torch.testing.assert_close(last, direct)


def test_shared_head_meets_any_number_of_ways():
    """Its gradient is that of the copies, summed: by finite differences, at 3 and at 7 ways."""
    algorithm = MAML(Smooth(), SGD(RATE, 2), outputs=3, head="shared")
    for ways in (3, 7):
        episodes = episodes_of(ways=ways)
        grads = gradient(algorithm, episodes)
        assert grads["learner.head.weight"].shape == (1, 4)
        rows = torch.arange(ways).flip(0).repeat_interleave(2) * 2 + torch.arange(2 * ways) % 2
        turned = replace(episodes, support_x=episodes.support_x[:, rows])
        expected, found = (
            algorithm.predict(algorithm.adapt(each), episodes.query_x) for each in (episodes, turned)
        )
        torch.testing.assert_close(found.flip(-1), expected)  # no way is preferred
        direction = {name: torch.randn_like(g) for name, g in grads.items()}
        slope = sum((grads[n] * direction[n]).sum() for n in grads).item()
        assert slope == pytest.approx(difference(algorithm, episodes, direction), rel=1e-6)


def test_fixed_head_uses_its_first_outputs_and_refuses_more():
    algorithm = METHODS["maml"].build(Smooth(), 1)
    few = episodes_of(ways=2)
    adapted = algorithm.adapt(few)
    assert algorithm.predict(adapted, few.query_x).shape[-1] == 2
    many = episodes_of(ways=4)
    with pytest.raises(ConfigError, match=r"fixed head has 3 ways, not 4; .*algorithm\.head=shared"):
        algorithm.adapt(many)


def test_queries_see_each_other_only_when_transductive():
    """transductive=False predicts each query in one batch with the support: against a plain loop."""
    episodes = episodes_of()
    backbone = BACKBONES["conv4"]()
    for transductive in (True, False):
        algorithm = maml(transductive=transductive)(backbone, 1)
        assert algorithm.uses_query_statistics is transductive
        adapted = algorithm.adapt(episodes)
        predict = algorithm.predictor(adapted, episodes)
        predictions, fewer = predict(episodes.query_x), predict(episodes.query_x[:, :2])
        assert torch.allclose(predictions[:, :2], fewer) == (not transductive)
    net = references.network(algorithm.learner.backbone, algorithm.learner.head)
    for t in range(3):
        own = {name: p[t] for name, p in adapted["params"].items()}
        weights = {name.replace("backbone", "0").replace("head", "1"): p for name, p in own.items()}
        for q in range(6):
            batch = torch.cat([episodes.support_x[t], episodes.query_x[t, q : q + 1]])
            expected = functional_call(net, weights, (batch,))[-1]
            torch.testing.assert_close(predictions[t, q], expected)


@pytest.mark.parametrize("name", METHODS)
def test_batch_statistics_do_not_make_a_query_depend_on_others_unless_asked(name: str):
    algorithm = METHODS[name].build(BACKBONES["conv4"](), 1).eval()
    assert algorithm.uses_query_statistics
    episodes = episodes_of()
    with torch.no_grad():
        adapted = algorithm.adapt(episodes)
        for transductive in (True, False):
            algorithm.transductive = transductive
            predict = algorithm.predictor(adapted, episodes)
            together, alone = predict(episodes.query_x), predict(episodes.query_x[:, :1])
            assert torch.allclose(together[:, :1], alone) != transductive


def test_test_steps_are_taken_in_evaluation_only():
    inner_loop = SGD(0.25, steps=1, test_steps=3)
    start = {"w": torch.ones(1, 1)}

    def loss(params, step):
        return params["w"].square().sum(1)  # one step: w <- w - 0.25 * 2w = w / 2

    assert inner_loop(loss, start)["w"].item() == pytest.approx(0.5)
    assert inner_loop.eval()(loss, start)["w"].item() == pytest.approx(0.125)


def test_protonet_with_running_averages():
    """Training: each task by its own batch statistics, support and query in one pass."""
    algorithm = ProtoNet(Conv4(SHAPE, width=8, norm="running"))
    episodes = episodes_of()
    expected = protonet_reference(algorithm, episodes, 0)
    assert relative_error(gradient(algorithm, episodes), expected) < 1e-10
    assert relative_error(gradient(algorithm, episodes, tasks_at_once=1), expected) < 1e-10
    # Evaluation: a query's prediction is its own affair.
    algorithm.eval()
    adapted = algorithm.adapt(episodes)
    together, fewer = (algorithm.predict(adapted, x) for x in (episodes.query_x, episodes.query_x[:, :2]))
    torch.testing.assert_close(together[:, :2], fewer)


@pytest.mark.parametrize("inner_loop", [SGD(RATE, 2), Adam(0.01, 2, order=2)], ids=["sgd", "adam"])
def test_second_order_through_any_inner_loop(inner_loop: InnerLoop):
    algorithm = MAML(Smooth(), inner_loop, outputs=3)
    episodes = episodes_of()
    grads = gradient(algorithm, episodes)
    direction = {name: torch.randn_like(g) for name, g in grads.items()}
    for name in grads:  # a bias before batch norm has no gradient, only rounding, which Adam would enlarge
        if name.endswith(("backbone.0.bias", "backbone.4.bias")):
            direction[name].zero_()
    slope = sum((grads[n] * direction[n]).sum() for n in grads).item()
    assert slope == pytest.approx(difference(algorithm, episodes, direction, h=1e-6), rel=1e-4)


def test_reptile_moves_a_shared_head_by_the_mean_of_its_copies():
    algorithm = Reptile(Smooth(), SGD(RATE, 2, order=1), outputs=3, head="shared", batch=0)
    episodes = episodes_of(ways=4)
    phi = algorithm.adapt(episodes.joined())["params"]["head.weight"]  # [T, N, features]
    expected = algorithm.learner.head.weight - phi.mean((0, 1))
    torch.testing.assert_close(gradient(algorithm, episodes)["learner.head.weight"], expected.detach())


def odd_networks() -> dict[str, nn.Module]:
    """Networks a user may well write, which the grouped batching does not know."""
    act, tied = nn.ReLU(), nn.Linear(8, 8)
    return {
        "one activation used twice": nn.Sequential(
            nn.Conv2d(1, 4, 3), act, nn.Conv2d(4, 2, 3), act, nn.Flatten()
        ),
        "tied layers": nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), tied, nn.Tanh(), tied),
        "circular padding": nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.ReLU(), nn.Flatten()
        ),
        "another flatten": nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(2), nn.Flatten()),
        "group norm without weights": nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4, affine=False), nn.Flatten()
        ),
    }


@pytest.mark.parametrize("name", odd_networks())
def test_any_network_gives_what_the_loop_gives(name: str):
    module = odd_networks()[name]
    params = {n: p.detach() + 0.1 * torch.randn(3, *p.shape) for n, p in module.named_parameters()}
    x = torch.rand(3, 5, *SHAPE)
    torch.testing.assert_close(
        run_on_tasks(module, params, x), run_on_tasks(module, params, x, TaskBatching("loop"))
    )


def test_items_that_are_no_images():
    """A vector or a sequence of vectors, [L, F], through the grouped batching."""
    for shape in ((5,), (4, 5)):
        module = MLP(shape, hidden=(6, 6))
        params = {n: p.detach() + 0.1 * torch.randn(3, *p.shape) for n, p in module.named_parameters()}
        x = torch.rand(3, 7, *shape)
        torch.testing.assert_close(
            run_on_tasks(module, params, x, TaskBatching("grouped")),
            run_on_tasks(module, params, x, TaskBatching("loop")),
        )


def test_regression_of_several_values():
    """Two outputs for one way, against the plain loop; targets of another shape are refused."""
    algorithm = MAML(MLP((1,), hidden=(8,)), SGD(RATE, 2), outputs=2)
    x, y = torch.randn(2, 4, 10, 1), torch.randn(2, 4, 10, 2)
    episodes = Episodes(x[0], y[0], x[1], y[1], objective=REGRESSION)
    expected = maml_reference()(algorithm, episodes, 2)
    assert relative_error(gradient(algorithm, episodes), expected) < 1e-10
    with pytest.raises(ValueError, match="differ in shape"):
        mean_squared_error(torch.zeros(1, 3, 1), torch.zeros(1, 3, 2))


def test_reptile_takes_its_examples_in_turn():
    """Every example is seen once before any is seen twice, in an order of each task's own."""
    algorithm = Reptile(MLP((1,), hidden=(4,)), SGD(RATE, 1, order=1), outputs=3, batch=2)
    x = torch.arange(6.0).view(1, 6, 1).expand(4, -1, -1)
    seen: list[Tensor] = []

    def record(params, batch):
        seen.append(batch.squeeze(-1))
        return torch.zeros(4, 2, 3, requires_grad=True)

    algorithm.learner.forward = record
    y = torch.zeros(4, 6, dtype=torch.long)
    loss, _, params = algorithm.inner_problem(Episodes(x, y, x, y, torch.arange(3).expand(4, -1)))
    for step in range(3):
        loss(params, step)
    order = torch.cat(seen, 1)
    assert torch.equal(order.sort(1).values, x.squeeze(-1))
    assert not torch.equal(order[0], order[1])


def test_protonet_takes_unequal_numbers_of_shots():
    algorithm = ProtoNet(MLP((2,), hidden=(4,)))
    x, y = torch.rand(1, 5, 2), torch.tensor([[0, 1, 1, 1, 2]])
    centres = algorithm.adapt(Episodes(x, y, x, y, torch.arange(3).unsqueeze(0)))
    torch.testing.assert_close(centres[0, 1], algorithm.backbone(x[0, 1:4]).mean(0))


def test_running_averages_are_refused_where_weights_adapt():
    with pytest.raises(ConfigError, match="norm=running"):
        METHODS["maml"].build(Conv4(SHAPE, width=8, norm="running"), 1)


def test_regression_uses_the_mean_squared_error():
    """MAML on values, against the plain loop."""
    algorithm = MAML(MLP((1,), hidden=(8,)), SGD(RATE, 2), outputs=1)
    x, y = torch.randn(2, 4, 10, 1), torch.randn(2, 4, 10, 1)
    episodes = Episodes(x[0], y[0], x[1], y[1], objective=REGRESSION)
    expected = maml_reference()(algorithm, episodes, 2)
    assert relative_error(gradient(algorithm, episodes), expected) < 1e-10


def test_geometry_reads_like_the_field():
    assert str(EpisodeShape(5, 1, 15)) == "5-way 1-shot"
