"""What the methods of the gradient-based family promise beyond their gradients (test_algorithms.py)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers.engines import engine_of, uncompiled
from torch import Tensor, nn

from metarun.algorithms.cavia import CAVIA
from metarun.algorithms.imaml import IMAML, conjugate_gradient
from metarun.algorithms.maml import MAML
from metarun.algorithms.maml_plus_plus import MAMLPlusPlus
from metarun.algorithms.pretrain import Pretrain
from metarun.algorithms.reptile import Reptile
from metarun.backbones.conv4 import Conv4
from metarun.backbones.mlp import MLP
from metarun.errors import ConfigError
from metarun.inner_loops.adam import Adam
from metarun.inner_loops.alfa import ALFA
from metarun.inner_loops.base import InnerLoop
from metarun.inner_loops.layer_rates import LayerRates
from metarun.inner_loops.meta_curvature import MetaCurvature
from metarun.inner_loops.meta_sgd import MetaSGD
from metarun.inner_loops.recurrent import LearnedOptimizer, MetaLSTM, preprocessed
from metarun.inner_loops.sgd import SGD
from metarun.nn.per_task import run_on_tasks
from metarun.tasks.episodes import Episodes, Outcome
from metarun.tasks.objectives import REGRESSION
from metarun.training.memory import peak_bytes
from metarun.training.step import Clip

INNER_LOOPS: dict[str, Callable[[], InnerLoop]] = {
    "sgd": lambda: SGD(0.1, 2),
    "adam": lambda: Adam(0.01, 2, order=2),
    "meta_sgd": lambda: MetaSGD(steps=2),
    "layer_rates": lambda: LayerRates(0.1, 2),
    "alfa": lambda: ALFA(0.1, steps=2),
    "meta_curvature": lambda: MetaCurvature(0.1, 2),
    "lstm": lambda: MetaLSTM(3, 2),
    "learned_optimizer": lambda: LearnedOptimizer(3, steps=2),
}
ALGORITHMS: dict[str, Callable[..., MAML]] = {
    "maml": MAML,
    "anil": lambda *args: MAML(*args, adapts="head"),
    "boil": lambda *args: MAML(*args, adapts="body"),
    "maml_plus_plus": lambda *args: MAMLPlusPlus(*args, multi_step_loss=10),
    "cavia": lambda *args: CAVIA(*args, context=4),
    "reptile": Reptile,
    "minibatch_prox": lambda *args: Reptile(*args, proximal=0.1),
    "imaml": IMAML,
    "pretrain": Pretrain,
}
MOVE_WEIGHTS_ALONE = ("reptile", "minibatch_prox", "imaml", "pretrain")


pytestmark = pytest.mark.usefixtures("float64")


def vectors(tasks: int = 3, ways: int = 3, shots: int = 2) -> Episodes:
    y = torch.arange(ways).repeat_interleave(shots).expand(tasks, -1)
    x = torch.randn(2, tasks, ways * shots, 6)
    return Episodes(x[0], y, x[1], y, torch.arange(ways).expand(tasks, -1))


def images(tasks: int = 3, ways: int = 3, size: int = 16) -> Episodes:
    y = torch.arange(ways).expand(tasks, -1)
    x = torch.rand(2, tasks, ways, 1, size, size)
    return Episodes(x[0], y, x[1], y, torch.arange(ways).expand(tasks, -1))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("inner_loop", INNER_LOOPS)
def test_any_inner_loop_with_any_algorithm_or_one_line_why_not(algorithm: str, inner_loop: str):
    loop = INNER_LOOPS[inner_loop]()

    def build() -> MAML:
        return ALGORITHMS[algorithm](MLP((6,), hidden=(8,)), loop, 3)

    if loop.learned and algorithm in MOVE_WEIGHTS_ALONE:
        with pytest.raises(ConfigError, match=r"has meta-parameters, and .*; choose inner_loop=sgd") as error:
            build()
        assert "\n" not in str(error.value)
        return
    built = build()
    engine = engine_of(built, vectors())
    before = {name: p.detach().clone() for name, p in built.named_parameters()}
    for _ in range(2):  # a gate that saw nothing before the first step has weights without a gradient
        engine.step()
    for name, p in built.named_parameters():
        assert p.isfinite().all()
        # The same update of every entry of a head changes no probability.
        has_effect = p.requires_grad and (algorithm, name) != ("anil", "inner_loop.output.bias")
        assert torch.equal(p, before[name]) != has_effect, name


# implicit MAML


def test_weights_are_pulled_back_after_plain_steps_in_training():
    """As in aravindr93/imaml_dev: in training one more step, of the proximal term alone."""
    tasks = vectors(tasks=1)
    algorithm = IMAML(MLP((6,), (4,)), SGD(0.1, 2), 3, proximal=2.0, pull=0.2)
    for training in (True, False):
        net = copy.deepcopy(nn.Sequential(algorithm.learner.backbone, algorithm.learner.head))
        start = [p.detach().clone() for p in net.parameters()]
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for step in range(3 if training else 2):
            optimizer.zero_grad()
            if step < 2:
                nn.functional.cross_entropy(net(tasks.support_x[0]), tasks.support_y[0]).backward()
            else:
                pairs = zip(net.parameters(), start, strict=True)
                sum((p - q).square().sum() for p, q in pairs).backward()  # lambda / 2 is 1
            optimizer.step()
        adapted = algorithm.train(training).adapt(tasks)["params"]
        for mine, expected in zip(adapted.values(), net.parameters(), strict=True):
            torch.testing.assert_close(mine[0], expected)


@pytest.mark.parametrize("pull", [-0.1, 1.5])
def test_an_impossible_pull_is_refused(pull: float):
    with pytest.raises(ConfigError, match=rf"^algorithm\.pull={pull}: must be 0 to 1, or null$"):
        IMAML(MLP((6,), (4,)), SGD(0.1, 2), 3, pull=pull)


def test_conjugate_gradient_solves_each_tasks_system():
    matrices = torch.randn(4, 5, 5)
    matrices = matrices @ matrices.mT + torch.eye(5)
    b = torch.randn(4, 5)
    found = conjugate_gradient(lambda v: torch.einsum("tij,tj->ti", matrices, v), b, 5)
    torch.testing.assert_close(found, torch.linalg.solve(matrices, b))
    # More steps than there are dimensions change nothing; a system that is not positive gives b.
    more = conjugate_gradient(lambda v: torch.einsum("tij,tj->ti", matrices, v), b, 50)
    torch.testing.assert_close(more, found)
    torch.testing.assert_close(conjugate_gradient(lambda v: -v, b, 3), b)


def test_implicit_gradient_of_a_quadratic_problem_is_the_closed_form():
    """Linear regression: phi* = (A + lambda)^-1 (b + lambda theta), and its derivative by theta."""
    strength, points, features = 0.7, 6, 4

    class Rows(nn.Flatten):
        features = 4

    algorithm = IMAML(Rows(), SGD(0.1, 3000), outputs=1, proximal=strength, cg_steps=10)
    x, y = torch.randn(2, 3, points, features), torch.randn(2, 3, points, 1)
    episodes = Episodes(x[0], y[0], x[1], y[1], objective=REGRESSION)
    engine = engine_of(algorithm, episodes)
    engine.backward(next(engine.draws))
    theta = torch.cat([algorithm.learner.head.weight[0], algorithm.learner.head.bias]).detach()
    expected = torch.zeros(features + 1)
    for t in range(3):
        support, query = (torch.cat([part[t], torch.ones(points, 1)], 1) for part in x)
        hessian = 2 * support.T @ support / points
        pulled = hessian + strength * torch.eye(features + 1)
        phi = torch.linalg.solve(pulled, 2 * support.T @ y[0, t, :, 0] / points + strength * theta)
        slope = 2 * query.T @ (query @ phi - y[1, t, :, 0]) / points
        expected += strength * torch.linalg.solve(pulled, slope) / 3
    found = torch.cat([algorithm.learner.head.weight.grad[0], algorithm.learner.head.bias.grad])
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_memory_of_implicit_maml_is_flat_in_the_inner_steps_and_mamls_grows():
    torch.set_default_dtype(torch.float32)
    episodes = images().to(torch.float32)

    def memory(build: Callable[..., MAML], steps: int) -> int:
        algorithm = build(Conv4((1, 16, 16), width=8), SGD(0.1, steps), 3)
        params = [p for p in algorithm.parameters() if p.requires_grad]
        return peak_bytes(
            lambda: torch.autograd.grad(algorithm.meta_loss(episodes).loss.mean(), params),
            torch.device("cpu"),
        )

    assert memory(IMAML, 50) < 1.05 * memory(IMAML, 5)
    assert memory(MAML, 50) > 5 * memory(MAML, 5)


# MAML++


def test_the_losses_of_all_steps_are_annealed_as_in_the_papers_code():
    """From equal weights to the last alone; the others keep 3 % of 1/steps until the annealing ends."""
    algorithm = MAMLPlusPlus(MLP((6,)), SGD(0.1, 5), 3, multi_step_loss=10)
    for epoch in range(10):
        algorithm.on_step_start(epoch)
        others = max(1 / 5 - epoch * (1 / 5 / 10), 0.03 / 5)
        last = min(1 / 5 + epoch * (4 / 5 / 10), 1 - 4 * 0.03 / 5)
        torch.testing.assert_close(algorithm.loss_weights, torch.tensor([others] * 4 + [last]))
    assert algorithm.on_step_start(10)
    episodes = vectors()
    mine, theirs = algorithm.meta_loss(episodes), MAML.meta_loss(algorithm, episodes)
    torch.testing.assert_close((mine.loss, mine.outputs), (theirs.loss, theirs.outputs))


@pytest.mark.parametrize("how", ["traced", "graph", pytest.param("compiled", marks=pytest.mark.long)])
def test_annealed_runs_are_the_same_however_a_step_is_run(how: str, monkeypatch: pytest.MonkeyPatch):
    """Order and losses change on the way, so that what was traced or compiled must be made anew.

    `graph` is what the compiler would be given.
    """
    given = uncompiled(monkeypatch) if how == "graph" else []
    losses = []
    for compile in (False, "auto" if how == "traced" else True):
        torch.manual_seed(1)
        backbone = MLP((6,), hidden=(8,))
        algorithm = MAMLPlusPlus(backbone, LayerRates(0.1, 3), 3, multi_step_loss=4, first_order=2)
        optimizer = torch.optim.SGD(algorithm.parameters(), lr=0.5)
        engine = engine_of(algorithm, vectors(), optimizer, compile=compile)
        run = []
        for iteration in range(7):
            engine.step()
            run.append(engine.running_totals[0].item())
            assert bool(engine.traced) == (compile is not False)
            assert algorithm.inner_loop.order == (1 if iteration < 2 else 2)
        losses.append(run)
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-9, atol=1e-12)
    assert len(given) == (3 if how == "graph" else 0)  # first order, second order, the last loss alone


def test_alfa_with_constant_rates_and_no_decay_is_learned_layer_rates():
    """And a decay that is generated shrinks the weights, of each task by its own factor."""
    episodes = vectors()
    alfa = MAML(MLP((6,), hidden=(8,)), ALFA(0.1, decay=0.5, steps=2), 3)
    layer_rates = MAML(MLP((6,), hidden=(8,)), LayerRates(0.1, 2), 3)
    layer_rates.learner.load_state_dict(alfa.learner.state_dict())
    last = alfa.inner_loop.generator[-1]
    with torch.no_grad():
        free = alfa.adapt(episodes)["params"]["head.weight"]
        last.weight.zero_()
        alphas, betas = last.bias.chunk(2)
        alphas.fill_(1)
        betas.zero_()
        found, expected = (each.adapt(episodes)["params"] for each in (alfa, layer_rates))
        torch.testing.assert_close(found, expected)
        betas.fill_(2)
        alphas.zero_()
        shrunk = alfa.adapt(episodes)["params"]["head.weight"]
    torch.testing.assert_close(shrunk, 0.9**2 * alfa.learner.head.weight.expand_as(shrunk))
    shift = (free - alfa.learner.head.weight).flatten(1)
    assert not torch.allclose(*(row / row.norm() for row in shift[:2]))


def test_a_run_that_begins_later_is_in_its_phase():
    algorithm = MAMLPlusPlus(MLP((6,), hidden=(8,)), LayerRates(0.1, 3), 3, multi_step_loss=4, first_order=2)
    engine = engine_of(algorithm, vectors())
    engine.prepare(3)
    assert algorithm.phase == (2, True)
    assert algorithm.loss_weights[-1] == pytest.approx(1 - 2 * 0.25 / 3)


def test_statistics_of_each_step_are_kept_and_used_in_evaluation():
    """Against batch norm modules of each step's own, on a network of one convolution."""

    class Net(nn.Sequential):
        features = 4

        def __init__(self) -> None:
            super().__init__(
                nn.Conv2d(1, 4, 3),
                nn.BatchNorm2d(4, track_running_stats=False),
                nn.AvgPool2d(14),
                nn.Flatten(),
            )

    algorithm = MAMLPlusPlus(Net(), SGD(0.1, 2), 3, step_statistics=True, step_affine=False)
    assert not algorithm.uses_query_statistics
    episodes = images(tasks=1)
    norm = algorithm.norms[0]
    algorithm.meta_loss(episodes)
    # By hand: what the convolution sees at each step, in support, and at the end, in query.
    states = list(algorithm.trajectory(episodes))
    expected = torch.zeros(2, 4)
    for row, x, state in ((0, episodes.support_x, 0), (1, episodes.support_x, 1), (1, episodes.query_x, 2)):
        weights = {name: p[0] for name, p in states[state]["params"].items()}
        maps = nn.functional.conv2d(x[0], weights["backbone.0.weight"], weights["backbone.0.bias"])
        expected[row] = 0.9 * expected[row] + 0.1 * maps.mean((0, 2, 3))
    with torch.no_grad():
        norm.mean.zero_()
        norm.variance.fill_(1)
    algorithm.meta_loss(episodes)
    torch.testing.assert_close(norm.mean, expected)
    assert not torch.allclose(norm.variance[0], norm.variance[1])
    # In evaluation a query's prediction is its own affair, and nothing is averaged any more.
    algorithm.eval()
    before = norm.mean.clone()
    adapted = algorithm.adapt(episodes)
    together = algorithm.predict(adapted, episodes.query_x)
    torch.testing.assert_close(algorithm.predict(adapted, episodes.query_x[:, :1]), together[:, :1])
    assert torch.equal(norm.mean, before)


# context, learned optimizers, pretraining


def test_a_context_is_all_that_adapts():
    algorithm = CAVIA(Conv4((1, 16, 16), width=8), SGD(1.0, 2), 3, context=7)
    episodes = images()
    start, end = (list(algorithm.trajectory(episodes))[i]["params"] for i in (0, -1))
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    (name,) = changed
    assert name == "backbone.2.1.1.context"
    assert end[name].shape == (3, 7)
    assert not start[name].any()


@pytest.mark.parametrize(("layer", "says"), [(9, "1 to 4"), (0, "1 to 4")])
def test_a_context_needs_a_layer_there_is(layer: int, says: str):
    with pytest.raises(
        ConfigError, match=f"algorithm.layer={layer}: choose a weight layer of the backbone, {says}"
    ):
        CAVIA(Conv4((1, 16, 16), width=8), SGD(1.0, 2), 3, layer=layer)


def test_a_context_shifts_as_if_it_were_appended_to_the_input():
    """CAVIA's sinusoid network: a linear layer over the input and the context."""
    algorithm = CAVIA(MLP((2,), hidden=(5,)), SGD(1.0, 1), 1, context=3)
    linear, film = algorithm.learner.backbone[1]
    x, context = torch.randn(1, 4, 2), torch.randn(1, 3)
    joined = torch.cat([linear.weight, film.weight], 1)  # [5, 2 + 3]
    expected = torch.cat([x[0], context.expand(4, -1)], 1) @ joined.T + linear.bias
    params = {name.removeprefix("backbone."): p for name, p in algorithm.learner.task_params(1, 1).items()}
    params["1.1.context"] = context
    first = nn.Sequential(algorithm.learner.backbone[0], algorithm.learner.backbone[1])
    own = {name: p for name, p in params.items() if name.startswith("1.")}
    torch.testing.assert_close(run_on_tasks(first, own, x)[0], expected)


def test_size_and_sign_of_numbers_of_any_scale():
    found = preprocessed(torch.tensor([0.0, 1.0, -math.exp(-5), math.exp(-11)]))
    expected = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [-0.5, -1.0], [-1.0, math.exp(-1)]])
    torch.testing.assert_close(found, expected)


def test_pretraining_gives_a_new_task_a_head_of_zeros():
    algorithm = Pretrain(MLP((6,), hidden=(8,)), SGD(0.5, 0, test_steps=3), 3, classes=20).eval()
    episodes = vectors(ways=4)  # more than it was built for
    states = list(algorithm.trajectory(episodes))
    assert len(states) == 4
    assert not algorithm.predict(states[0], episodes.query_x).any()
    assert algorithm.predict(states[-1], episodes.query_x).any()


def test_pretraining_of_values_is_joint_training():
    """One network for all tasks, on support and query: the mean squared error over everything."""
    algorithm = Pretrain(MLP((1,), hidden=(8,)), SGD(0.1, 0), 1)
    x, y = torch.randn(2, 4, 5, 1), torch.randn(2, 4, 5, 1)
    episodes = Episodes(x[0], y[0], x[1], y[1], objective=REGRESSION)
    outcome = algorithm.meta_loss(episodes)
    net = nn.Sequential(algorithm.learner.backbone, algorithm.learner.head)
    together = torch.cat([x[0], x[1]], 1)
    expected = (net(together.view(-1, 1)) - torch.cat([y[0], y[1]], 1).view(-1, 1)).square().mean()
    torch.testing.assert_close(outcome.loss.mean(), expected)
    assert outcome.outputs.shape == (4, 5, 1)


def test_a_meta_gradient_is_clipped_by_value_and_by_norm():
    for clip in (Clip(value=1e-3), Clip(norm=1e-3)):
        algorithm = MAML(MLP((6,), hidden=(8,)), SGD(0.1, 1), 3)
        engine = engine_of(algorithm, vectors())
        engine.backward(next(engine.draws))
        free = torch.cat([p.grad.flatten() for p in algorithm.parameters()])
        engine.clip = clip
        engine.backward(next(engine.draws))
        bound = torch.cat([p.grad.flatten() for p in algorithm.parameters()])
        expected: Tensor = free.clamp(-1e-3, 1e-3) if clip.value else 1e-3 * free / free.norm()
        assert free.norm() > 1e-2
        torch.testing.assert_close(bound, expected, rtol=1e-3, atol=1e-9)


def test_shared_heads_work_with_every_inner_loop():
    episodes = vectors(ways=5)
    for name, make in INNER_LOOPS.items():
        algorithm = MAML(MLP((6,), hidden=(8,)), make(), 3, head="shared")
        outcome = algorithm.meta_loss(episodes)
        outcome.loss.mean().backward()
        assert outcome.outputs.shape == (3, 10, 5), name


def test_a_fixed_head_with_fewer_ways_works_with_every_inner_loop():
    episodes = vectors(ways=2)
    for name, make in INNER_LOOPS.items():
        algorithm = MAML(MLP((6,), hidden=(8,)), make(), 3)
        assert algorithm.meta_loss(episodes).outputs.shape == (3, 4, 2), name


def test_averages_of_steps_do_not_depend_on_how_many_tasks_run_at_once():
    """But for the last step's, where support and query meet in another order."""
    found = []
    for at_once in (1, 2, 4):
        torch.manual_seed(0)
        algorithm = MAMLPlusPlus(Conv4((1, 16, 16), width=4), SGD(0.1, 2), 3, step_statistics=True)
        engine = engine_of(algorithm, images(tasks=4), tasks_at_once=at_once)
        engine.backward(next(engine.draws))
        found.append(torch.stack([torch.stack([norm.mean[0], norm.variance[0]]) for norm in algorithm.norms]))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])


def test_averages_of_steps_in_bf16_and_where_they_cannot_be_kept():
    algorithm = MAMLPlusPlus(Conv4((1, 16, 16), width=4), SGD(0.1, 2), 3, step_statistics=True)
    engine = engine_of(algorithm, images(), precision="bf16")
    with engine.hardware.compute():
        engine.step()
    assert algorithm.norms[0].mean.dtype == torch.float32
    assert algorithm.norms[0].mean.isfinite().all()
    for batching in ("vmap", "loop"):
        engine = engine_of(algorithm, images(), batching=batching)
        with pytest.raises(ConfigError, match=r"needs a backbone that is a chain .*hardware\.batching=auto"):
            engine.step()
    with pytest.raises(ConfigError, match="has no batch norm"):
        MAMLPlusPlus(MLP((6,)), SGD(0.1, 2), 3, step_statistics=True)


@pytest.mark.parametrize("adapts", ["body", "context"])
def test_a_head_that_all_ways_share_must_adapt(adapts: str):
    with pytest.raises(ConfigError, match=r"gives every way the same output .*choose algorithm\.head=fixed"):
        MAML(MLP((6,)), SGD(0.1, 1), 3, head="shared", adapts="body")
    algorithm = (
        MAML(MLP((6,)), SGD(0.1, 1), 3, adapts="body")
        if adapts == "body"
        else CAVIA(MLP((6,)), SGD(0.1, 1), 3)
    )
    with pytest.raises(ConfigError, match="fixed head has 3 ways, not 7; train with ways=7"):
        algorithm.check(7)


def test_evaluation_keeps_one_state_of_maml_plus_plus():
    torch.set_default_dtype(torch.float32)
    episodes = images().to(torch.float32)

    def memory(steps: int) -> int:
        inner_loop = LayerRates(0.1, 5, test_steps=steps)
        algorithm = MAMLPlusPlus(Conv4((1, 16, 16), width=8), inner_loop, 3).eval()
        with torch.no_grad():
            return peak_bytes(lambda: algorithm.adapt(episodes), torch.device("cpu"))

    assert memory(50) < 1.05 * memory(5)


def test_a_bound_is_put_once_where_two_weights_share_a_gradient():
    class Sum(MAML):
        def __init__(self) -> None:
            super().__init__(MLP((6,), hidden=(8,)), SGD(0.1, 1), 3)
            self.a, self.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

        def meta_loss(self, tasks: Episodes) -> Outcome:
            outcome = super().meta_loss(tasks)
            return replace(outcome, loss=outcome.loss + 100 * (self.a + self.b).square().sum())

    algorithm = Sum()
    engine = engine_of(algorithm, vectors())
    engine.clip = Clip(norm=1.0)
    engine.backward(next(engine.draws))
    total = torch.cat([p.grad.flatten() for p in algorithm.parameters()])
    assert total.norm().item() == pytest.approx(1.0, rel=1e-3)


def test_memory_that_ran_out_is_remembered_when_the_computation_changes():
    algorithm = MAMLPlusPlus(MLP((6,), hidden=(8,)), LayerRates(0.1, 2), 3, first_order=1)
    engine = engine_of(algorithm, vectors())
    engine.halve("as if")
    engine.step()
    engine.step()
    assert algorithm.phase[0] == 2
    assert engine.at_once == 2


def one_after_another(net: nn.Module, tasks: Episodes, steps: int, at_once: int) -> list[dict[str, Tensor]]:
    """Reptile's code: one torch.optim.Adam for all tasks; and the weights after each meta-batch of `at_once`.

    The tasks of a meta-batch start from the same state of it, which then takes in all their gradients.
    """
    inner, found = torch.optim.Adam(net.parameters(), lr=0.01, betas=(0.0, 0.999)), []
    for start in range(0, len(tasks), at_once):
        theta = [p.detach().clone() for p in net.parameters()]
        begun, gradients = copy.deepcopy(inner.state_dict()), []
        moved = [torch.zeros_like(p) for p in theta]
        for t in range(start, start + at_once):
            inner.load_state_dict(copy.deepcopy(begun))
            for _ in range(steps):
                inner.zero_grad()
                x = torch.cat([tasks.support_x[t], tasks.query_x[t]])
                y = torch.cat([tasks.support_y[t], tasks.query_y[t]])
                nn.functional.cross_entropy(net(x), y).backward()
                gradients.append([p.grad.clone() for p in net.parameters()])
                inner.step()
            for p, old, total in zip(net.parameters(), theta, moved, strict=True):
                total += (p.detach() - old) / at_once
                p.data.copy_(old)
        inner.load_state_dict(copy.deepcopy(begun))
        for each in gradients:  # of all tasks, at the same weights' state of the optimizer
            for p, g in zip(net.parameters(), each, strict=True):
                p.grad = g
            inner.step()
        for p, old, total in zip(net.parameters(), theta, moved, strict=True):
            p.data.copy_(old + total)
        found.append({name: p.detach().clone() for name, p in net.named_parameters()})
    return found


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_carried_moment_is_that_of_one_optimizer_for_all_tasks(at_once: int):
    """With one task in a meta-batch, exactly Reptile's code."""
    tasks = vectors(tasks=6)
    algorithm = Reptile(MLP((6,), hidden=(5,)), Adam(0.01, 2, carry=True), 3, batch=0)
    net = copy.deepcopy(nn.Sequential(algorithm.learner.backbone, algorithm.learner.head))
    expected = one_after_another(net, tasks, 2, at_once)
    optimizer = torch.optim.SGD(algorithm.parameters(), lr=1.0)
    for start, weights in zip(range(0, 6, at_once), expected, strict=True):
        algorithm.start_step(start)
        part = Episodes(*(each[start : start + at_once] for each in parts_of(tasks)))
        optimizer.zero_grad()
        algorithm.meta_loss(part).loss.mean().backward()
        optimizer.step()
        own = [*algorithm.learner.backbone.parameters(), *algorithm.learner.head.parameters()]
        for p, other in zip(own, weights.values(), strict=True):
            torch.testing.assert_close(p.detach(), other)
    saved = algorithm.state_dict()
    assert saved["inner_loop.moment.steps"] == 12
    algorithm.eval().adapt(tasks)
    for name, value in algorithm.state_dict().items():
        assert torch.equal(value, saved[name]), f"{name}: changed by an evaluation"


@pytest.mark.parametrize("head", ["fixed", "shared"])
def test_the_moment_of_a_head_with_other_ways(head):
    """Of ways that no task has, the mean of the others; of a vector for all ways, the mean."""
    tasks, outputs = vectors(tasks=1), 4 if head == "fixed" else 3
    algorithm = Reptile(MLP((6,), hidden=(5,)), Adam(0.01, 1, carry=True), outputs, head, batch=0)
    algorithm.start_step(0)
    algorithm.meta_loss(tasks)
    whole = tasks.joined()
    weight = algorithm.learner.head.weight.detach()
    rows = weight[:3].expand(3, -1).clone().requires_grad_()
    features = algorithm.learner.backbone(whole.support_x[0])
    logits = features @ rows.T + algorithm.learner.head.bias[:3]
    gradient = torch.autograd.grad(nn.functional.cross_entropy(logits, whole.support_y[0]), rows)[0]
    own = 0.001 * gradient.square()
    mean = own.mean(0, keepdim=True)
    expected = torch.cat([own, mean]) if head == "fixed" else mean
    torch.testing.assert_close(algorithm.inner_loop.moment.averages["head.weight"], expected)


def parts_of(tasks: Episodes) -> tuple[Tensor, ...]:
    return tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y, tasks.classes
