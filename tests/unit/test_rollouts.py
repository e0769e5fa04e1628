"""Environments as tasks: exact against enumeration, plain loops and dense algebra, in float64."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metarun.algorithms.maml import MAML
from metarun.algorithms.pretrain import Pretrain
from metarun.backbones.mlp import MLP
from metarun.datasets.environments.navigation2d import Navigation2D
from metarun.errors import ConfigError
from metarun.inner_loops.meta_sgd import MetaSGD
from metarun.inner_loops.sgd import SGD
from metarun.tasks.actions import Box, Discrete
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.objectives import RETURNS
from metarun.tasks.policy_gradient import Estimator, alive_mean, outer_loss
from metarun.tasks.rollouts import SCORED, Rollouts
from metarun.tasks.worlds import Trajectories, World, random_numbers
from metarun.training.evaluation import EvalSettings, evaluate
from metarun.training.hardware import Hardware
from metarun.training.outer_loops import PPO, TRPO, OuterLoop, conjugate_gradient
from metarun.training.step import OuterStep

pytestmark = [pytest.mark.quick, pytest.mark.usefixtures("float64")]

RAW = Estimator(discount=1.0, baseline="none", normalise=False)  # returns to go, as they are


# A Markov decision process so small that all its trajectories can be written down.

STATES, ACTIONS, HORIZON, RATE = 2, 2, 2, 0.7


class TwoStates(World):
    """Two states, two actions, two time steps; only its kind of actions is needed here."""

    actions, horizon, device = Discrete(ACTIONS), HORIZON, torch.device("cpu")

    def __len__(self) -> int:
        raise NotImplementedError

    def reset(self, episodes: int, chance: Tensor) -> Tensor:
        raise NotImplementedError

    def step(self, actions: Tensor, chance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


REWARDS = numbers(0, STATES, ACTIONS)
MOVES = numbers(1, STATES, ACTIONS, STATES).softmax(-1)  # the probabilities of the next state
PATHS = list(itertools.product(range(ACTIONS), range(STATES), range(ACTIONS)))  # action, next state, action


def probability(logits: Tensor, path: tuple[int, int, int]) -> Tensor:
    """Of a trajectory that starts in state 0, for a table of logits [STATES, ACTIONS]."""
    first, state, second = path
    policy = logits.softmax(-1)
    return policy[0, first] * MOVES[0, first, state] * policy[state, second]


def trajectories(batches: list[list[tuple[int, int, int]]], logits: Tensor) -> Trajectories:
    """Batches of trajectories, one batch a task, as the policies of tables [T, STATES, ACTIONS] acted."""
    actions = torch.tensor([[[a for a, _, _ in paths], [b for _, _, b in paths]] for paths in batches])
    states = torch.tensor([[[0] * len(paths), [s for _, s, _ in paths]] for paths in batches])
    each = torch.arange(len(batches))[:, None, None]
    return RAW.with_advantages(
        Trajectories(
            observations=nn.functional.one_hot(states, STATES).to(torch.float64),
            actions=actions,
            rewards=REWARDS[states, actions],
            alive=torch.ones(states.shape, dtype=torch.float64),
            outputs=logits.detach()[each, states],
        )
    )


def objective(logits: Tensor) -> Tensor:
    """The expected return of a policy."""
    returns = [REWARDS[0, a] + REWARDS[s, b] for a, s, b in PATHS]
    return sum(probability(logits, path) * r for path, r in zip(PATHS, returns, strict=True))


def adapted_table(logits: Tensor, paths: list[tuple[int, int, int]]) -> Tensor:
    """The table after one step of REINFORCE on these trajectories, written out.

    The network adds a bias to all states, which starts at zero and is adapted too.
    """
    total = torch.zeros((), dtype=torch.float64)
    for a, s, b in paths:
        policy = logits.log_softmax(-1)
        total = total + policy[0, a] * (REWARDS[0, a] + REWARDS[s, b]) + policy[s, b] * REWARDS[s, b]
    (grad,) = torch.autograd.grad(total / (HORIZON * len(paths)), logits, create_graph=True)
    return logits + RATE * (grad + grad.sum(0))


def table_maml(logits: Tensor) -> MAML:
    """MAML whose policy is a table of logits."""
    backbone = nn.Flatten()
    backbone.features = STATES  # type: ignore[assignment]
    algorithm = MAML(backbone, SGD(RATE), ACTIONS)
    with torch.no_grad():
        algorithm.learner.head.weight.copy_(logits.T)
        algorithm.learner.head.bias.zero_().requires_grad_(False)
    return algorithm


def estimated(logits: Tensor, per_batch: int, estimator: Estimator, credit: bool) -> Tensor:
    """The expectation of the estimated meta-gradient over all trajectories before and after the step."""
    logits = logits.clone().requires_grad_()
    before, after, weights = [], [], []
    tables = []
    for paths in itertools.product(PATHS, repeat=per_batch):
        adapted = adapted_table(logits, list(paths)).detach()
        for path in PATHS:
            before.append(list(paths))
            after.append([path])
            tables.append(adapted)
            chance = math.prod(probability(logits, each).item() for each in paths)
            weights.append(chance * probability(adapted, path).item())
    algorithm = table_maml(logits)
    tasks = Rollouts(TwoStates(), torch.zeros(len(before)), EpisodeShape(1, per_batch, 1), RETURNS, estimator)
    tasks.recorded[1] = trajectories(before, logits.expand(len(before), -1, -1))
    tasks.recorded[SCORED] = trajectories(after, torch.stack(tables))
    if credit:
        tasks.give_credit(torch.zeros(len(before), dtype=torch.float64))
    algorithm.learner.head.bias.requires_grad_(False)
    losses = algorithm.meta_loss(tasks).loss  # [T]
    expected = (losses * torch.tensor(weights, dtype=torch.float64)).sum()
    (grad,) = torch.autograd.grad(-HORIZON * expected, algorithm.learner.head.weight)
    return grad.T


def true_gradient(logits: Tensor, per_batch: int) -> Tensor:
    """Of the expected return after the step, over the batches that the step may see: finite differences."""

    def value(table: Tensor) -> float:
        table = table.clone().requires_grad_()
        total = 0.0
        for paths in itertools.product(PATHS, repeat=per_batch):
            chance = math.prod(probability(table, each).item() for each in paths)
            total += chance * objective(adapted_table(table, list(paths))).item()
        return total

    grad, size = torch.zeros_like(logits), 1e-4
    for i in range(logits.numel()):
        shift = torch.zeros_like(logits)
        shift.view(-1)[i] = size
        # Of fourth order in the size of the shift.
        near, far = (value(logits + k * shift) - value(logits - k * shift) for k in (1, 2))
        grad.view(-1)[i] = (8 * near - far) / (12 * size)
    return grad


TABLE = numbers(2, STATES, ACTIONS)


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("per_batch", [1, 2])
def test_e_maml_is_unbiased_and_others_are_as_biased_as_documented(per_batch: int):
    expected = true_gradient(TABLE, per_batch)
    assert error(estimated(TABLE, per_batch, RAW, credit=True), expected) < 1e-8
    biases = {
        kind: error(estimated(TABLE, per_batch, replace(RAW, surrogate=kind), credit=False), expected)
        for kind in ("log_prob", "lvc", "dice")
    }
    assert biases == pytest.approx(BIASES[per_batch], rel=1e-3)


# Also in docs/reinforcement.md.
BIASES = {
    1: {"log_prob": 0.055073, "lvc": 0.031927, "dice": 0.058538},
    2: {"log_prob": 0.078478, "lvc": 0.028066, "dice": 0.037007},
}
HESSIANS = {"log_prob": 0.439446, "lvc": 0.282797}


@pytest.mark.parametrize("kind", ["log_prob", "lvc", "dice"])
def test_the_derivatives_of_surrogates(kind: str):
    batch = trajectories([[path] for path in PATHS], TABLE.expand(len(PATHS), -1, -1))
    weights = torch.stack([probability(TABLE, path) for path in PATHS])
    states = batch.observations.argmax(-1)

    def surrogate(table: Tensor) -> Tensor:
        log_probs = Discrete(ACTIONS).log_prob(table[states], batch.actions)
        losses = replace(RAW, surrogate=kind).inner_loss(log_probs, batch, Discrete(ACTIONS))
        return -HORIZON * (losses * weights).sum()

    exact, own = (torch.autograd.functional.hessian(f, TABLE) for f in (objective, surrogate))
    gradients = (torch.autograd.functional.jacobian(f, TABLE) for f in (surrogate, objective))
    assert error(*gradients) < 1e-12
    if kind == "dice":
        assert error(own, exact) < 1e-10
    else:
        assert error(own, exact) == pytest.approx(HESSIANS[kind], rel=1e-3)


# Advantages.


def batch_of(steps: int, ends: list[list[int]]) -> Trajectories:
    """Random trajectories whose episodes end at these steps."""
    lengths = torch.tensor(ends)  # [T, E]
    alive = (torch.arange(steps)[None, :, None] < lengths[:, None]).to(torch.float64)
    shape = alive.shape
    return Trajectories(
        observations=3 * numbers(3, *shape, 2),
        actions=numbers(4, *shape, 2),
        rewards=numbers(5, *shape) * alive,
        alive=alive,
        outputs=numbers(6, *shape, 4),
    )


def test_advantages_against_sums_and_least_squares():
    batch = batch_of(5, [[5, 3, 4], [2, 5, 5]])
    discount, decay = 0.9, 0.7
    estimator = Estimator(discount=discount, gae=decay, normalise=False)
    advantages = estimator.with_advantages(batch).advantages
    assert advantages is not None
    for t, e in itertools.product(range(2), range(3)):
        length = int(batch.alive[t, :, e].sum())
        rewards = batch.rewards[t, :length, e].numpy()
        values = fitted(batch, t, discount)[e]
        for h in range(length):
            following = [*values[h + 1 : length], 0.0]
            deltas = rewards[h:] + discount * np.array(following) - values[h:length]
            wanted = sum((discount * decay) ** i * delta for i, delta in enumerate(deltas))
            assert advantages[t, h, e].item() == pytest.approx(wanted, rel=1e-9, abs=1e-9)
        assert not advantages[t, length:, e].any()
    normal = Estimator(discount=discount, gae=decay).with_advantages(batch)
    for t in range(2):
        inside = normal.advantages[t][batch.alive[t] > 0]
        assert inside.mean().item() == pytest.approx(0, abs=1e-12)
        assert inside.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert not (normal.advantages * (1 - batch.alive)).any()


def fitted(batch: Trajectories, t: int, discount: float) -> list[np.ndarray]:
    """The values of numpy's least squares with ridge rows, one array for each episode of a task."""
    rows, targets, places = [], [], []
    for e in range(batch.rewards.shape[2]):
        length = int(batch.alive[t, :, e].sum())
        for h in range(length):
            o = batch.observations[t, h, e].clamp(-10, 10).numpy()
            time = h / 100
            rows.append([*o, *o**2, time, time**2, time**3, 1.0])
            later = batch.rewards[t, h:length, e].numpy()
            targets.append(sum(discount**i * r for i, r in enumerate(later)))
            places.append((e, h))
    x, y = np.array(rows), np.array(targets)
    ridge = math.sqrt(1e-5) * np.eye(x.shape[1])
    weights = np.linalg.lstsq(np.vstack([x, ridge]), np.concatenate([y, np.zeros(len(ridge))]), rcond=None)[0]
    values = [np.zeros(batch.rewards.shape[1]) for _ in range(batch.rewards.shape[2])]
    for (e, h), value in zip(places, x @ weights, strict=True):
        values[e][h] = value
    return values


# Policies.


@pytest.mark.parametrize("kind", ["box", "discrete"])
def test_distributions_against_those_of_pytorch(kind: str):
    old, new = numbers(7, 6, 4), numbers(8, 6, 4)
    if kind == "box":
        actions = Box(2)

        def theirs(outputs: Tensor) -> torch.distributions.Distribution:
            mean, log_std = outputs.split(2, -1)
            return torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
    else:
        actions = Discrete(4)

        def theirs(outputs: Tensor) -> torch.distributions.Distribution:
            return torch.distributions.Categorical(logits=outputs)

    taken = theirs(old).sample()
    torch.testing.assert_close(actions.log_prob(new, taken), theirs(new).log_prob(taken))
    torch.testing.assert_close(actions.entropy(new), theirs(new).entropy())
    expected = torch.distributions.kl_divergence(theirs(old), theirs(new))
    torch.testing.assert_close(actions.divergence(old, new), expected)
    noise = actions.noise(1, 40_000, torch.Generator().manual_seed(0))[0].double()
    drawn = actions.sample(new[0].expand(len(noise), -1), noise)
    if kind == "box":
        torch.testing.assert_close(drawn.mean(0), new[0, :2], atol=0.05, rtol=0)
        torch.testing.assert_close(drawn.std(0).log(), new[0, 2:], atol=0.02, rtol=0)
    else:
        shares = torch.bincount(drawn, minlength=4) / len(drawn)
        torch.testing.assert_close(shares.double(), new[0].softmax(-1), atol=0.01, rtol=0)


# 2D navigation.

SMALL = Navigation2D(horizon=12)
SHAPE = EpisodeShape(1, 3, 4)


def policy(inner_loop: SGD | MetaSGD | None = None) -> MAML:
    torch.manual_seed(0)
    algorithm = MAML(MLP((2,), (5,)), inner_loop or SGD(0.1, steps=2), 2, constants=2).double()
    with torch.no_grad():
        for p in algorithm.learner.parameters():
            p += 0.1 * torch.randn_like(p)
    return algorithm


def test_navigation_against_a_plain_loop():
    source = Navigation2D(horizon=30).split("test")
    goals, seeds = source.draw(3, SHAPE, torch.Generator().manual_seed(1))
    goals[2] = torch.tensor([0.03, -0.02])  # so near that an episode ends early
    tasks = source.gather((goals, seeds), SHAPE)
    tasks.query(lambda x: torch.cat([0.1 * x + 3 * (goals.unsqueeze(1) - x), x.new_full(x.shape, -3)], -1))
    batch = tasks.recorded[SCORED]
    noise, _ = random_numbers(tasks.world, seeds, SCORED, SHAPE.queries, torch.device("cpu"))
    early = 0
    for t, e in itertools.product(range(3), range(SHAPE.queries)):
        position, goal, alive = np.zeros(2), goals[t].numpy().astype(float), True
        for h in range(30):
            assert batch.alive[t, h, e].item() == alive
            if not alive:
                assert batch.rewards[t, h, e] == 0
                continue
            np.testing.assert_allclose(batch.observations[t, h, e], position, atol=1e-5)
            action = 0.1 * position + 3 * (goal - position) + math.exp(-3) * noise[t, h, e].numpy()
            position = position + 0.1 * np.clip(action, -1, 1)
            assert batch.rewards[t, h, e].item() == pytest.approx(-np.linalg.norm(position - goal), abs=1e-5)
            alive = not (np.abs(position - goal) < 0.01).all()
        early += not alive
    assert early


def test_the_optimum_of_navigation_is_that_of_going_straight():
    goals = torch.tensor([[0.35, -0.12], [0.0, 0.05]])
    expected = []
    for x, y in goals.tolist():
        position, total = [0.0, 0.0], 0.0
        for _ in range(100):
            for i, aim in enumerate((x, y)):
                position[i] += max(-0.1, min(0.1, aim - position[i]))
            total -= math.dist(position, (x, y))
        expected.append(total)
    torch.testing.assert_close(
        Navigation2D().optimum({"goal": goals}), torch.tensor(expected, dtype=torch.float64)
    )
    assert Navigation2D().optimum({"goal": torch.rand(20_000, 2) - 0.5}).mean().item() == pytest.approx(
        -0.506, abs=0.01
    )


def plain_meta_gradient(algorithm: MAML, tasks: Rollouts) -> dict[str, Tensor]:
    """The meta-gradient of recorded tasks, one task after the other, with the network written out."""
    names = dict(algorithm.named_parameters())
    rates = {name: p for name, p in names.items() if "rates" in name}
    theta = {name: p for name, p in names.items() if name not in rates}

    def log_probs(weights: dict[str, Tensor], batch: Trajectories, t: int) -> Tensor:
        values = list(weights.values())
        by = {name.rpartition("learner.")[2]: w for name, w in zip(weights, values, strict=True)}
        hidden = (batch.observations[t] @ by["backbone.1.weight"].T + by["backbone.1.bias"]).relu()
        mean = hidden @ by["head.weight"].T + by["head.bias"]
        deviation = by["head.constants"].exp()
        return torch.distributions.Normal(mean, deviation).log_prob(batch.actions[t]).sum(-1)

    losses = []
    for t in range(len(tasks)):
        weights = dict(theta)
        for step in range(algorithm.inner_loop.steps):
            batch = tasks.recorded[step + 1]
            gain = (log_probs(weights, batch, t) * batch.advantages[t] * batch.alive[t]).sum()
            loss = -gain / batch.alive[t].sum()
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            for (name, w), grad in zip(list(weights.items()), grads, strict=True):
                key = "inner_loop.rates." + name.removeprefix("learner.").replace(".", "/")
                weights[name] = w - (rates[key] if rates else 0.1) * grad
        batch = tasks.recorded[SCORED]
        new = log_probs(weights, batch, t)
        ratio = (new - new.detach()).exp()
        losses.append(-(ratio * batch.advantages[t] * batch.alive[t]).sum() / batch.alive[t].sum())
    grads = torch.autograd.grad(torch.stack(losses).mean(), list(names.values()))
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize(
    "inner_loop", [SGD(0.1, steps=2), MetaSGD(0.05, 0.2, steps=2)], ids=["sgd", "meta_sgd"]
)
def test_the_meta_gradient_against_a_plain_loop(inner_loop: SGD | MetaSGD):
    algorithm = policy(inner_loop)
    source = SMALL.split("train")
    tasks = source.gather(source.draw(3, SHAPE, torch.Generator()), SHAPE).to(torch.float64)
    algorithm.meta_loss(tasks).loss.mean().backward()  # collects, and differentiates at once
    expected = plain_meta_gradient(algorithm, tasks)
    for name, p in algorithm.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-9, atol=1e-12)


def step_with(
    rule: OuterLoop, algorithm: MAML, tasks: int = 6, at_once: int = 100, **how: float
) -> OuterStep:
    hardware = Hardware("cpu", precision="float64", tasks_at_once=at_once)
    hardware.place(algorithm)
    optimizer = torch.optim.SGD(algorithm.parameters(), lr=how.get("rate", 0.01))
    family = Navigation2D(horizon=12, estimator=Estimator(credit=bool(how.get("credit"))))
    outer = OuterStep(algorithm, optimizer, family.split("train"), SHAPE, tasks, 0, hardware, None, rule)
    outer.prepare(0)
    return outer


def weights_of(algorithm: MAML) -> Tensor:
    return torch.cat([p.detach().flatten() for p in algorithm.parameters()])


@pytest.mark.parametrize("credit", [False, True])
@pytest.mark.parametrize(
    "rule", [PPO(epochs=2, inner_kl=0.1), TRPO(every=1, damping=0.1)], ids=["ppo", "trpo"]
)
def test_a_step_in_chunks_is_that_of_all_tasks_at_once(rule: OuterLoop, credit: bool):
    ends = []
    for at_once in (100, 4):
        algorithm = policy()
        outer = step_with(rule, algorithm, 7, at_once, credit=credit)
        start = weights_of(algorithm)
        outer.step()
        assert outer.at_once == min(at_once, 7)
        ends.append((weights_of(algorithm), outer.running_totals))
    torch.testing.assert_close(*(weights for weights, _ in ends), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(*(totals for _, totals in ends), rtol=1e-10, atol=1e-12)
    assert not torch.equal(ends[0][0], start)


def test_what_happens_in_a_task_depends_on_its_own_seed_and_parameters_alone():
    algorithm, source = policy(), SMALL.split("train")
    draw = source.draw(5, SHAPE, torch.Generator().manual_seed(3))
    whole, other = (source.gather(each, SHAPE).to(torch.float64) for each in (draw, draw))
    other = source.gather(tuple(x[[4, 2]] for x in draw), SHAPE).to(torch.float64)
    with torch.no_grad():
        for tasks in (whole, other):
            algorithm.meta_loss(tasks)
    for phase, batch in other.recorded.items():
        for name in ("observations", "actions", "rewards", "advantages"):
            a, b = getattr(whole.recorded[phase], name)[[4, 2]], getattr(batch, name)
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_ratios_are_one_where_the_policy_is_the_one_that_acted():
    algorithm = policy()
    outer = step_with(TRPO(), algorithm)
    (tasks,) = outer.collect(next(outer.draws))
    outcome = algorithm.meta_loss(tasks)
    batch = tasks.recorded[SCORED]
    outputs = outcome.outputs.view_as(batch.outputs)
    torch.testing.assert_close(outputs, batch.outputs, rtol=1e-10, atol=1e-12)
    log_probs = Box(2).log_prob(outputs, batch.actions)
    for clip in (None, 0.1):
        plain = -alive_mean(batch.advantages, batch.alive)
        torch.testing.assert_close(outer_loss(log_probs, batch, Box(2), clip), plain, rtol=0, atol=1e-12)
    assert tasks.divergence(outcome).abs().max() < 1e-12


def test_the_fisher_product_leaves_the_loss_of_the_tasks_as_it_is():
    algorithm = policy()
    outer = step_with(TRPO(), algorithm, credit=True)
    batches = outer.collect(next(outer.draws))
    before = algorithm.meta_loss(batches[0]).loss
    product = TRPO().fisher_product(outer, batches)
    product(weights_of(algorithm))
    torch.testing.assert_close(algorithm.meta_loss(batches[0]).loss, before, rtol=0, atol=0)


def test_clipped_ratios_stop_the_gradient_beyond_the_clip():
    batch = replace(batch_of(1, [[1, 1, 1, 1]]), advantages=torch.tensor([[[1.0, 1.0, -1.0, -1.0]]]).double())
    old = Box(2).log_prob(batch.outputs, batch.actions)
    change = torch.tensor([[[0.5, -0.5, 0.5, -0.5]]]).double().requires_grad_()
    outer_loss(old + change, batch, Box(2), clip=0.2).sum().backward()
    # What would still raise a good action's ratio, or lower a bad one's, has no gradient.
    assert (change.grad.flatten() != 0).tolist() == [False, True, True, False]


def test_the_fisher_product_against_dense_algebra():
    algorithm = policy(SGD(0.1))
    outer = step_with(TRPO(), algorithm, 3)
    batches = outer.collect(next(outer.draws))
    (tasks,) = batches
    rule = TRPO(every=1, damping=0.01)
    size = sum(p.numel() for p in outer.params)
    product = rule.fisher_product(outer, batches)
    found = torch.stack([product(row) for row in torch.eye(size, dtype=torch.float64)])
    batch = tasks.recorded[SCORED]
    outputs = algorithm.meta_loss(tasks).outputs.reshape(-1, 4)  # [T*H*E, mean and log std]
    rows = [torch.autograd.grad(o, outer.params, retain_graph=True) for o in outputs.flatten()]
    jacobian = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).view(
        len(outputs), 4, size
    )
    share = (batch.alive / batch.alive.sum((1, 2), keepdim=True) / len(tasks)).flatten()
    # The Fisher information of a Gaussian: 1 / variance of its mean, and 2 of the logarithm of its deviation.
    information = torch.cat([(-2 * outputs[:, 2:]).exp(), torch.full_like(outputs[:, 2:], 2.0)], 1).detach()
    dense = torch.einsum("no,nop,noq->pq", information * share[:, None], jacobian, jacobian)
    torch.testing.assert_close(found, dense + 0.01 * torch.eye(size).double(), rtol=1e-8, atol=1e-10)
    target = numbers(9, size)
    solution = conjugate_gradient(product, target, 5 * size)
    torch.testing.assert_close(solution, torch.linalg.solve(found, target), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("every", [1, 3])
def test_a_trpo_step_improves_and_stays_in_the_trust_region(every: int):
    algorithm = policy(SGD(0.1))
    rule = TRPO(max_kl=0.003, every=every, damping=0.01)
    outer = step_with(rule, algorithm)
    kept = []
    collect = outer.collect
    outer.collect = lambda draw: kept.append(collect(draw)) or kept[-1]  # type: ignore[method-assign]
    for _ in range(3):
        outer.step()
        ((tasks,),) = kept[-1:]
        outcome = algorithm.meta_loss(tasks)
        assert 0.0005 < tasks.divergence(outcome).mean() <= 0.003
        assert (
            outcome.loss.mean()
            < -alive_mean(tasks.recorded[SCORED].advantages, tasks.recorded[SCORED].alive).mean()
        )


def test_pretraining_scores_all_trajectories_of_one_policy():
    torch.manual_seed(0)
    algorithm = Pretrain(MLP((2,), (5,)), SGD(0.1), 2, constants=2).double()
    source = SMALL.split("train")
    tasks = source.gather(source.draw(3, SHAPE, torch.Generator()), SHAPE).to(torch.float64)
    outcome = algorithm.meta_loss(tasks)
    assert tasks.recorded.keys() == {SCORED}
    assert tasks.recorded[SCORED].rewards.shape == (3, 12, SHAPE.shots + SHAPE.queries)
    assert outcome.loss.requires_grad


def test_policies_are_learned_and_compared_on_the_same_random_numbers():
    algorithm = policy(SGD(0.1))
    outer = step_with(TRPO(every=2), algorithm, 8)
    settings = EvalSettings(EpisodeShape(1, 5, 5), 20, 0)
    source = SMALL.split("validation")
    before = evaluate(algorithm, source, settings, outer.hardware)
    for _ in range(12):
        outer.step()
    after = evaluate(algorithm, source, settings, outer.hardware)
    assert after.episodes_hash == before.episodes_hash
    assert after.mean > before.mean + 0.5
    again = evaluate(algorithm, source, settings, outer.hardware)
    assert torch.equal(again.scores["return"], after.scores["return"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Estimator(discount=0.0), r"dataset\.estimator\.discount=0\.0: must be above 0"),
        (lambda: Estimator(gae=1.5), r"dataset\.estimator\.gae=1\.5: must be from 0 to 1"),
        (lambda: Navigation2D(half=0.0), r"dataset\.half=0\.0: must be above 0"),
        (lambda: Navigation2D(horizon=0), r"dataset\.horizon=0: must be at least 1"),
        (lambda: PPO(clip=0.0), r"outer_loop\.clip=0\.0.*above 0"),
        (lambda: PPO(epochs=0), r"outer_loop\.epochs=0.*at least 1"),
        (lambda: TRPO(shrink=1.0), r"outer_loop\.shrink=1\.0.*between 0 and 1"),
        (lambda: TRPO(cg_steps=0), r"outer_loop\.cg_steps=0.*at least 1"),
    ],
)
def test_settings_out_of_range(make, message: str):
    with pytest.raises(ConfigError, match=message):
        make()
