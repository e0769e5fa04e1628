"""Methods that learn from features: solutions against other solvers, memory by hand, limits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.methods import METHODS, SHAPE, episodes_of
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from metarun.algorithms import mann
from metarun.algorithms.baseline import Baseline, SimpleShot
from metarun.algorithms.cnaps import CNAPs
from metarun.algorithms.feature_method import FeatureMethod
from metarun.algorithms.gnn import GNN
from metarun.algorithms.matching import MatchingNet
from metarun.algorithms.meta_networks import MetaNet
from metarun.algorithms.metaoptnet import MetaOptNet
from metarun.algorithms.protonet import ProtoNet
from metarun.algorithms.r2d2 import R2D2, logistic_regression, ridge_regression
from metarun.algorithms.relation import RelationNet
from metarun.algorithms.snail import SNAIL
from metarun.algorithms.svm import crammer_singer_dual
from metarun.algorithms.versa import Versa
from metarun.backbones.conv4 import Conv4
from metarun.backbones.mlp import MLP
from metarun.backbones.wide_resnet import WideResNet
from metarun.datasets.sinusoid import Sinusoid
from metarun.errors import ConfigError
from metarun.inner_loops.sgd import SGD
from metarun.nn.per_task import TaskBatching
from metarun.tasks.episodes import Episodes
from metarun.tasks.objectives import REGRESSION

EMBEDDED = [name for name, m in METHODS.items() if isinstance(m.build(MLP(SHAPE, (4,)), 1), FeatureMethod)]


class Numbers(nn.Module):
    """Features are the items themselves."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features

    def forward(self, x: Tensor) -> Tensor:
        return x


pytestmark = pytest.mark.usefixtures("float64")


def labelled(ways: int, shots: int, features: int, tasks: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Features [T, S, F], labels [S] and one-hot labels [T, S, N]."""
    y = torch.arange(ways).repeat_interleave(shots)
    x = torch.randn(tasks, ways * shots, features) + torch.randn(ways, features)[y]
    return x, y, nn.functional.one_hot(y, ways).to(x).expand(tasks, -1, -1)


# solutions


@pytest.mark.parametrize("features", [4, 60])
def test_ridge_regression_is_scikit_learns(features: int):
    x, _, wanted = labelled(5, 3, features)
    balance = torch.rand(2, 15) + 0.5
    weights = ridge_regression(x, wanted, torch.tensor(0.7), balance)
    for t in range(2):
        other = Ridge(alpha=0.7, fit_intercept=False)
        other.fit(x[t].numpy(), wanted[t].numpy(), sample_weight=balance[t].numpy())
        np.testing.assert_allclose(weights[t].numpy(), other.coef_.T, rtol=1e-12, atol=1e-10)


def test_logistic_regression_converges_to_scikit_learns():
    x, y, wanted = labelled(5, 3, 20)
    balance = torch.rand(2, 15) + 0.5
    weights = logistic_regression(x, wanted, torch.tensor(0.7), balance, steps=12)
    for k in range(5):
        other = LogisticRegression(C=1 / 0.7, fit_intercept=False, tol=1e-12, solver="newton-cholesky")
        other.fit(x[0].numpy(), (y == k).numpy(), sample_weight=balance[0].numpy())
        np.testing.assert_allclose(weights[0, :, k].numpy(), other.coef_[0], rtol=1e-6, atol=1e-12)


def test_a_penalty_beside_the_mean_is_that_of_r2d2s_code():
    """Features with a constant and targets divided by the root of NK, and 50 added to the Gram matrix."""
    x, y, wanted = labelled(5, 3, 20)
    fixed = R2D2(Numbers(20), ridge=50.0, learn_ridge=False, reduction="mean")
    assert [name for name, p in fixed.named_parameters() if not p.requires_grad] == ["log_ridge"]
    weights = fixed.fit(x, y.expand(2, -1), 5)["weights"]
    for t in range(2):
        rows, targets = torch.cat([x[t], torch.ones(15, 1)], 1) / 15**0.5, wanted[t] / 15**0.5
        expected = rows.T @ torch.linalg.inv(rows @ rows.T + 50 * torch.eye(15)) @ targets
        torch.testing.assert_close(weights[t], expected)
    mean, total = (
        R2D2(Numbers(20), solver="logistic", ridge=ridge, reduction=reduction).fit(x, y.expand(2, -1), 5)
        for ridge, reduction in ((2.0, "mean"), (30.0, "sum"))  # 15 examples
    )
    torch.testing.assert_close(mean["weights"], total["weights"])


# Older versions of scikit-learn warn here; whether the solution is the same, the comparison decides.
@pytest.mark.filterwarnings("ignore:Liblinear failed to converge")
@pytest.mark.parametrize(
    ("ways", "shots", "features", "penalty"),
    [
        (5, 1, 64, 0.1),
        (5, 5, 64, 0.1),
        (20, 1, 30, 0.1),
        (3, 4, 3, 0.1),
        (5, 5, 64, 1000.0),
        (2, 1, 8, 1.0),
    ],
)
def test_the_machine_is_scikit_learns(ways: int, shots: int, features: int, penalty: float):
    """Crammer and Singer's problem, by LIBLINEAR; and in float32 within its rounding."""
    x, y, wanted = labelled(ways, shots, features)
    dual = crammer_singer_dual(x @ x.mT, wanted, penalty, torch.ones(2, ways * shots))
    assert (dual <= penalty * wanted + 1e-9).all()
    torch.testing.assert_close(dual.sum(-1), torch.zeros_like(dual[..., 0]))
    single = MetaOptNet(Numbers(features), penalty=penalty).fit(x.float(), y.expand(2, -1), ways)["weights"]
    for t in range(2):
        other = LinearSVC(
            multi_class="crammer_singer",
            dual=True,
            fit_intercept=False,
            C=penalty,
            tol=1e-12,
            max_iter=1_000_000,
        ).fit(x[t].numpy(), y.numpy())
        expected = other.coef_.T if ways > 2 else np.stack([-other.coef_[0], other.coef_[0]], 1) / 2
        np.testing.assert_allclose((x[t].T @ dual[t]).numpy(), expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(single[t].numpy(), expected, rtol=1e-3, atol=1e-4)


def ridge_values(net: R2D2, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
    """The normal equations, one output after the other."""
    x, query = (torch.cat([each, torch.ones(len(each), 1)], 1) for each in (x, query))
    system = x.T @ x + net.log_ridge.exp() * torch.eye(x.shape[1])
    return torch.stack([query @ torch.linalg.inv(system) @ (x.T @ y[:, v]) for v in range(y.shape[1])], 1)


def mean_of_neighbours(net: MatchingNet, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
    rows = []
    for q in query:
        weights = torch.stack([(net.scale * (q @ s) / q.norm() / s.norm()).exp() for s in x])
        rows.append((weights[:, None] * y).sum(0) / weights.sum())
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("build", "predict"),
    [
        (lambda net: R2D2(net, ridge=0.3, scale=10.0), ridge_values),
        (lambda net: MatchingNet(net, scale=4.0), mean_of_neighbours),
    ],
    ids=["r2d2", "matching"],
)
def test_values_of_a_regression_are_those_of_a_plain_loop(build, predict):
    """Two values an example, with more and with fewer features than examples; and the meta-gradient."""
    for features in (3, 12):
        algorithm = build(MLP((5,), (8, features)))
        x, query_x = torch.randn(2, 4, 6, 5)
        y, query_y = torch.randn(2, 4, 6, 2)
        tasks = Episodes(x, y, query_x, query_y, objective=REGRESSION)
        outcome = algorithm.meta_loss(tasks)
        expected = [
            predict(algorithm, algorithm.backbone(x[t]), y[t], algorithm.backbone(query_x[t]))
            for t in range(4)
        ]
        losses = torch.stack([(own - query_y[t]).square().mean() for t, own in enumerate(expected)])
        torch.testing.assert_close(outcome.loss, losses, rtol=1e-9, atol=1e-11)
        params = [p for name, p in algorithm.named_parameters() if name != "scale"]
        grads, wanted = (torch.autograd.grad(loss.sum(), params) for loss in (outcome.loss, losses))
        for found, other in zip(grads, wanted, strict=True):
            torch.testing.assert_close(found, other, rtol=1e-8, atol=1e-11)
        outputs = algorithm.eval().predict(algorithm.adapt(tasks), query_x)
        torch.testing.assert_close(outputs, torch.stack(expected), rtol=1e-9, atol=1e-11)


CLOSED_FORM = {
    "svm": lambda net: MetaOptNet(net, penalty=0.1),
    "ridge": lambda net: MetaOptNet(net, head="ridge", ridge=2.0),
    "r2d2": lambda net: R2D2(net, ridge=0.1),
    "lrd2": lambda net: R2D2(net, solver="logistic", ridge=0.1),
    "protonet": ProtoNet,
    "cosine": lambda net: ProtoNet(net, distance="cosine"),
    "simpleshot": lambda net: SimpleShot(net, classes=3),
    "matching": MatchingNet,
    "versa": lambda net: Versa(net).eval(),
}


@pytest.mark.parametrize(("ways", "shots", "features"), [(3, 2, 5), (3, 10, 3), (5, 15, 16)])
@pytest.mark.parametrize("name", CLOSED_FORM)
def test_the_derivative_is_the_slope_of_the_solution(name: str, ways: int, shots: int, features: int):
    """Central differences, also where there are fewer features than shots."""
    algorithm = CLOSED_FORM[name](Numbers(features))
    x, y, _ = labelled(ways, shots, features)
    x, y = 0.6 * x, y.expand(2, -1)
    x.requires_grad_()
    query, probe = torch.randn(2, 4, features), torch.randn(2, 4, ways)

    def projected(x: Tensor) -> Tensor:
        return (algorithm.score(algorithm.fit(x, y, ways), query) * probe).sum()

    direction = torch.randn_like(x)
    (grad,) = torch.autograd.grad(projected(x), x)
    with torch.no_grad():
        h = 1e-5
        slope = (projected(x + h * direction) - projected(x - h * direction)) / (2 * h)
    torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.filterwarnings("ignore:Liblinear failed to converge")
def test_the_machine_weighs_classes_of_unequal_sizes_equally():
    x = torch.randn(1, 6, 8)
    y = torch.tensor([0, 1, 1, 1, 2, 2])
    weights = MetaOptNet(Numbers(8), penalty=0.5).fit(x, y.unsqueeze(0), 3)["weights"]
    settings = {"C": 0.5, "class_weight": "balanced", "fit_intercept": False, "tol": 1e-12}
    other = LinearSVC(multi_class="crammer_singer", dual=True, max_iter=10**6, **settings)
    other.fit(x[0].numpy(), y.numpy())
    np.testing.assert_allclose(weights[0].detach().numpy(), other.coef_.T, rtol=1e-5, atol=1e-7)


# MANN's memory, by hand


def test_memory_is_written_as_by_hand():
    """Two places of two numbers, one head: half to where was read last, half to the least used."""
    state = mann.State(
        memory=torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]),
        usage=torch.tensor([[0.9, 0.4]]),  # the second place is the least used
        read_weights=torch.tensor([[[0.75, 0.25]]]),
        read=torch.zeros(1, 2),
        hidden=torch.zeros(1, 1),
        cell=torch.zeros(1, 1),
        label=torch.zeros(1, 1),
    )
    memory, weights = mann.write(state, torch.tensor([[[4.0, 8.0]]]), torch.tensor(0.0))
    # sigmoid(0) = 1/2: weights 0.375 and 0.125 + 0.5. The second place is emptied, the key added.
    torch.testing.assert_close(weights, torch.tensor([[[0.375, 0.625]]]))
    torch.testing.assert_close(memory, torch.tensor([[[2.5, 3.0], [2.5, 5.0]]]))


def test_memory_is_read_as_by_hand():
    """Cosines 1 and 0: weights e / (e + 1) and 1 / (e + 1)."""
    memory = torch.tensor([[[3.0, 0.0], [0.0, 5.0]]])
    weights, read = mann.read_by_content(memory, torch.tensor([[[2.0, 0.0]]]))
    first = np.e / (np.e + 1)
    torch.testing.assert_close(weights, torch.tensor([[[first, 1 - first]]]))
    torch.testing.assert_close(read, torch.tensor([[[3 * first, 5 * (1 - first)]]]))


def test_usage_decays_and_counts_reads_and_writes():
    algorithm = mann.MANN(Numbers(3), outputs=2, slots=4, size=2, heads=1, controller=3, decay=0.5)
    before = algorithm.start(torch.zeros(1, 3))
    before = mann.State(**(vars(before) | {"usage": torch.tensor([[4.0, 3.0, 2.0, 1.0]])}))
    _, after = algorithm.step(before, torch.randn(1, 3))
    keys = algorithm.keys(after.hidden).tanh().unflatten(1, (1, 2))
    _, written = mann.write(before, keys, algorithm.gate)
    expected = 0.5 * before.usage + after.read_weights.sum(1) + written.sum(1)
    torch.testing.assert_close(after.usage, expected)


def test_accuracy_by_instance_counts_appearances():
    """A perfect memory of labels, and a guess before: 0 at the first appearance, 1 after."""
    algorithm = mann.MANN(Numbers(3), outputs=3, slots=4, size=2, heads=1, controller=3)
    episodes = one_hot_episodes(ways=3, shots=1, queries=3)

    def see(features: Tensor, targets: Tensor):
        known = torch.zeros(len(features), 3)
        rows = []
        for x, y in zip(features.unbind(1), targets.unbind(1), strict=True):
            row = nn.functional.one_hot(y, 3).to(x)
            seen = known.gather(1, y.unsqueeze(1))
            rows.append(torch.where(seen > 0, row, -row))
            known = known.scatter(1, y.unsqueeze(1), 1.0)
        return torch.stack(rows, 1), None

    algorithm.see = see
    order = torch.rand(2, 12).argsort(1)
    expected = torch.tensor([[0.0, 1.0, 1.0, 1.0]]).expand(2, -1)
    torch.testing.assert_close(algorithm.by_instance(episodes, order), expected, check_dtype=False)


def one_hot_episodes(ways: int, shots: int, queries: int) -> Episodes:
    def labels(each: int) -> Tensor:
        return torch.arange(ways).repeat_interleave(each).expand(2, -1)

    x = [nn.functional.one_hot(labels(each), ways).double() for each in (shots, queries)]
    return Episodes(x[0], labels(shots), x[1], labels(queries), torch.arange(ways).expand(2, -1))


# what each promises


@pytest.mark.parametrize("name", EMBEDDED)
@pytest.mark.parametrize(("ways", "shots"), [(2, 3), (3, 1), (5, 4)])
def test_any_ways_and_shots_it_allows(name: str, ways: int, shots: int):
    """Those with a network of a size that depends on the ways use its first ones, and refuse more."""
    algorithm = METHODS[name].build(Conv4(SHAPE, width=8), 2).eval()
    if hasattr(algorithm, "noise"):
        del algorithm.noise
    episodes = episodes_of(ways=ways, shots=shots)
    if algorithm.most_ways is not None and ways > algorithm.most_ways:
        with pytest.raises(ConfigError, match="the network has 3 ways, not 5; train with ways=5"):
            algorithm.check(ways)
        return
    algorithm.check(ways)
    with torch.no_grad():
        adapted = algorithm.adapt(episodes)
        outputs = algorithm.predict(adapted, episodes.query_x)
    assert outputs.shape == (3, 2 * ways, ways)
    assert outputs.isfinite().all()


@pytest.mark.parametrize("name", [*EMBEDDED, "meta_networks"])
def test_queries_do_not_see_each_other(name: str):
    """Without batch statistics a query is predicted the same, alone or among others."""
    algorithm = METHODS[name].build(Conv4(SHAPE, width=8, norm="layer"), 2)
    for parent in list(algorithm.modules()):
        for key, layer in list(parent.named_children()):
            if isinstance(layer, nn.BatchNorm2d):  # of the method's own networks
                setattr(parent, key, nn.GroupNorm(1, layer.num_features))
    assert not algorithm.eval().uses_query_statistics
    episodes = episodes_of()
    with torch.no_grad():
        adapted = algorithm.adapt(episodes)
        together = algorithm.predict(adapted, episodes.query_x)
        alone = [algorithm.predict(adapted, query) for query in episodes.query_x.split(1, dim=1)]
    torch.testing.assert_close(together, torch.cat(alone, 1))


@pytest.mark.parametrize("name", ["relation", "gnn", "cnaps"])
def test_running_averages_make_evaluation_inductive(name: str):
    """norm=running: training moves the averages of every network, evaluation only reads them."""
    builds = {
        "relation": lambda net: RelationNet(net, width=4, norm="running"),
        "gnn": lambda net: GNN(net, outputs=3, width=6, norm="running"),
        "cnaps": lambda net: CNAPs(net, SHAPE, width=4, norm="running"),
    }
    algorithm = builds[name](Conv4(SHAPE, width=8, norm="running"))
    assert not algorithm.uses_query_statistics
    before = {k: v.clone() for k, v in algorithm.named_buffers()}
    algorithm.meta_loss(episodes_of())
    moved = [k for k, v in algorithm.named_buffers() if not torch.equal(v, before[k])]
    assert set(moved) == set(before)
    algorithm.eval()
    episodes = episodes_of()
    kept = {k: v.clone() for k, v in algorithm.named_buffers()}
    with torch.no_grad():
        adapted = algorithm.adapt(episodes)
        together, fewer = (algorithm.predict(adapted, x) for x in (episodes.query_x, episodes.query_x[:, :2]))
    torch.testing.assert_close(together[:, :2], fewer)
    assert all(torch.equal(v, kept[k]) for k, v in algorithm.named_buffers())


def test_matching_votes_add_up_and_the_order_counts_only_in_context():
    x, y, _ = labelled(3, 2, 6)
    query = torch.randn(2, 4, 6)
    y = y.expand(2, -1)
    turned = torch.tensor([3, 0, 5, 1, 4, 2])
    for full_context in (False, True):
        algorithm = MatchingNet(Numbers(6), full_context=full_context)
        logits = algorithm.score(algorithm.fit(x, y, 3), query)
        votes = (logits - torch.logsumexp(logits, -1, keepdim=True)).exp()
        torch.testing.assert_close(votes.sum(-1), torch.ones(2, 4))
        other = algorithm.score(algorithm.fit(x[:, turned], y[:, turned], 3), query)
        assert torch.allclose(logits, other) != full_context


def test_cosine_prototypes_do_not_see_length():
    algorithm = ProtoNet(Numbers(6), distance="cosine", scale=5.0)
    x, y, _ = labelled(3, 1, 6)
    query = torch.randn(2, 4, 6)
    adapted = algorithm.fit(x, y.expand(2, -1), 3)
    torch.testing.assert_close(algorithm.score(adapted, query), algorithm.score(adapted * 7, query * 3))
    assert algorithm.score(adapted, query).abs().max() <= 5


@pytest.mark.parametrize("transform", ["UN", "L2N", "CL2N"])
def test_simpleshot_is_the_nearest_mean_of_transformed_features(transform: str):
    algorithm = SimpleShot(Numbers(4), classes=3, transform=transform)
    algorithm.average.copy_(torch.tensor([1.0, -1.0, 0.5, 0.0]))
    x, y, _ = labelled(3, 2, 4, tasks=1)
    query = torch.randn(1, 5, 4)
    logits = algorithm.score(algorithm.fit(x, y.unsqueeze(0), 3), query)[0]

    def changed(v: np.ndarray) -> np.ndarray:
        v = v - algorithm.average.numpy() if transform == "CL2N" else v
        return v if transform == "UN" else v / np.linalg.norm(v)

    means = [np.mean([changed(v) for v in x[0, y == k].numpy()], 0) for k in range(3)]
    expected = [[-np.sum((changed(q) - m) ** 2) for m in means] for q in query[0].numpy()]
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_simpleshot_averages_what_it_was_trained_on(at_once: int, autocast: bool):
    """Task by task, however many come at once, and not in half precision."""
    algorithm = SimpleShot(Numbers(4), classes=11, momentum=0.25).float()
    tasks = torch.randn(8, 6, 4, dtype=torch.float32)
    expected = torch.zeros(4, dtype=torch.float32)
    for i, features in enumerate(tasks):
        share = max(1 / (i + 1), 0.25)
        expected = (1 - share) * expected + share * features.mean(0)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for part in tasks.split(at_once):
            algorithm.on_training_features(part)
    torch.testing.assert_close(algorithm.average, expected)


@pytest.mark.parametrize("features", [64, 1600])
def test_a_new_cosine_head_gets_where_the_nearest_mean_is(features: int):
    """However many features there are: a hundred steps at the rate of its YAML are enough."""
    algorithm = Baseline(Numbers(features), SGD(1.0, 100), classes=4, cosine=True)
    means = torch.randn(5, features)
    y = torch.arange(5).repeat_interleave(5).expand(2, -1)
    x, query = (means[y] + 2 * torch.randn(2, 25, features) for _ in range(2))
    trained = algorithm.score(algorithm.fit(x, y, 5), query).argmax(-1)
    nearest = ProtoNet(Numbers(features), distance="cosine")
    expected = nearest.score(nearest.fit(x, y, 5), query).argmax(-1)
    assert (trained == y).double().mean() > (expected == y).double().mean() - 0.1 > 0.6


@pytest.mark.parametrize("cosine", [False, True])
def test_baseline_trains_a_new_head_as_torch_does(cosine: bool):
    """The same steps by torch.optim on the support features of one task."""
    algorithm = Baseline(Numbers(5), SGD(0.3, 7), classes=4, cosine=cosine, scale=3.0)
    x, y, _ = labelled(3, 2, 5)
    adapted = algorithm.fit(x, y.expand(2, -1), 3)
    for t in range(2):
        head = nn.Linear(5, 3, bias=not cosine)
        with torch.no_grad():
            for p in head.parameters():
                p.zero_()
            if cosine:
                head.weight.copy_(algorithm.new_head(1, 3, x)["weight"][0])
        optimizer = torch.optim.SGD(head.parameters(), lr=0.3)
        for _ in range(7):
            optimizer.zero_grad()
            logits = head(x[t])
            if cosine:
                unit = nn.functional.normalize
                logits = 3 * unit(x[t], dim=1) @ unit(head.weight, dim=1).T
            nn.functional.cross_entropy(logits, y).backward()
            optimizer.step()
        torch.testing.assert_close(adapted["weight"][t], head.weight.detach())


def test_versa_averages_probabilities_over_samples():
    """With many samples the average is that of fresh ones; evaluation repeats itself."""
    algorithm = Versa(Numbers(4), samples=2000)
    x, y, _ = labelled(3, 2, 4)
    query = torch.randn(2, 5, 4)
    with torch.no_grad():
        adapted = algorithm.fit(x, y.expand(2, -1), 3)
        fresh = algorithm.score(adapted, query).exp()
        algorithm.eval()
        same = algorithm.score(adapted, query).exp()
        again = algorithm.score(adapted, query).exp()
        weight, spread = adapted["weight"], adapted["weight variance"].sqrt()
        bias, wide = adapted["bias"], adapted["bias variance"].sqrt()
        sampled = []
        for _ in range(4000):  # classifiers, instead of logits
            w, b = weight + spread * torch.randn_like(weight), bias + wide * torch.randn_like(bias)
            sampled.append((query @ w.mT + b.unsqueeze(1)).softmax(-1))
    assert torch.equal(same, again)
    torch.testing.assert_close(fresh, same, atol=0.05, rtol=0)
    torch.testing.assert_close(torch.stack(sampled).mean(0), fresh, atol=0.05, rtol=0)


def test_a_frozen_backbone_stays_and_the_task_still_changes_its_features():
    algorithm = CNAPs(Conv4(SHAPE, width=8, norm="running"), SHAPE, width=4, frozen=True)
    for generator in algorithm.film:
        nn.init.normal_(generator.size, std=1.0)
    before = {k: v.clone() for k, v in algorithm.backbone.state_dict().items()}
    loss = algorithm.train().meta_loss(episodes_of()).loss.mean()
    loss.backward()
    assert all(p.grad is None for p in algorithm.backbone.parameters())
    assert all(torch.equal(v, before[k]) for k, v in algorithm.backbone.state_dict().items())
    one, other = episodes_of(), episodes_of()
    with torch.no_grad():
        films = [algorithm.adapt(e)["film"] for e in (one, other)]
        features = [algorithm.embed_with(film, one.query_x) for film in films]
    assert not torch.allclose(*features)


def test_cnaps_loads_the_weights_of_the_network_without_its_modulations():
    torch.manual_seed(0)
    plain, other = (Conv4(SHAPE, width=4, norm="running").eval() for _ in range(2))
    algorithm, x = CNAPs(other, SHAPE, width=4), torch.rand(5, *SHAPE)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(algorithm.eval().backbone(x), plain(x))
    other.load_state_dict(other.state_dict())  # as of a checkpoint
    assert torch.equal(other(x), plain(x))


def test_cnaps_starts_near_the_plain_network():
    backbone = Conv4(SHAPE, width=8, norm="layer")
    episodes = episodes_of()
    plain = torch.stack([backbone(x) for x in episodes.query_x])
    algorithm = CNAPs(backbone, SHAPE, width=4, norm="layer")
    film = algorithm.adapt(episodes)["film"]
    torch.testing.assert_close(algorithm.embed_with(film, episodes.query_x), plain, atol=0.05, rtol=0.05)


class Halves(nn.Module):
    """A user's network: one encoder for both halves of an image, put into the batch beside each other."""

    features = 4

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        halves = torch.stack(x.chunk(2, -1), 1).flatten(0, 1)
        return self.encoder(halves).mean((2, 3)).unflatten(0, (-1, 2)).mean(1)


class Rows(nn.Module):
    """A transformer whose tokens are the rows of an image."""

    features = 16

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(16, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x.squeeze(1)).mean(1)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("build", [Halves, Rows, lambda: Conv4((1, 16, 16), width=4, norm="running")])
def test_cnaps_scales_each_task_by_itself(build, channels_last: bool):
    """Whatever the network does with its batch, in evaluation and in training."""
    algorithm = CNAPs(build(), (1, 16, 16), width=4)
    algorithm.batching = TaskBatching(channels_last=channels_last)
    for generator in algorithm.film:
        nn.init.normal_(generator.size)
    x, y = torch.rand(3, 4, 1, 16, 16), torch.arange(4).expand(3, 4)
    for mode in (False, True):
        algorithm.train(mode)
        tasks = Episodes(x, y, x, y, torch.arange(4).expand(len(x), -1))
        together = algorithm.predict(algorithm.adapt(tasks), x)
        for t in range(3):
            one = tasks.map(lambda tensor, t=t: tensor[t : t + 1])
            alone = algorithm.predict(algorithm.adapt(one), one.query_x)
            torch.testing.assert_close(together[t], alone[0])


def test_relation_compares_maps_of_any_size():
    for size, halvings in ((16, 4), (16, 2), (20, 1)):
        backbone = Conv4((1, size, size), width=4, halvings=halvings)
        algorithm = RelationNet(backbone, width=4, norm="batch")
        x = torch.rand(2, 6, 1, size, size)
        features = algorithm.embed(x)
        assert features.shape[-1] == np.prod(backbone.map_shape)
        maps = nn.Sequential(*list(backbone)[:-1])(x[0])
        torch.testing.assert_close(features[0].unflatten(-1, backbone.map_shape), maps)
        assert algorithm.score(
            algorithm.fit(features, torch.tensor([[0, 1, 2] * 2] * 2), 3), features
        ).shape == (
            2,
            6,
            3,
        )


def test_snail_reaches_the_whole_support():
    """Every support example changes what the last position says."""
    algorithm = SNAIL(Numbers(3), outputs=3, longest=9, width=0.1).eval()
    x, y, _ = labelled(3, 3, 3, tasks=1)
    query = torch.randn(1, 1, 3)
    before = algorithm.score(algorithm.fit(x, y.unsqueeze(0), 3), query)
    for i in range(9):
        changed = x.clone()
        changed[0, i] += 1
        assert not torch.allclose(algorithm.score(algorithm.fit(changed, y.unsqueeze(0), 3), query), before)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: R2D2(Numbers(2), ridge=0.0), "algorithm.ridge=0.0: must be above 0"),
        (lambda: R2D2(Numbers(2), steps=0), "algorithm.steps=0: must be at least 1"),
        (lambda: MetaOptNet(Numbers(2), penalty=-1.0), "algorithm.penalty=-1.0: must be above 0"),
        (lambda: MetaOptNet(Numbers(2), label_smoothing=1.0), "below 1"),
        (lambda: MatchingNet(Numbers(2), reads=0), "algorithm.reads=0: must be at least 1"),
        (lambda: mann.MANN(Numbers(2), 2, heads=9, slots=4), "must be at most algorithm.slots=4"),
        (lambda: GNN(Numbers(2), 2, layers=-1), "must not be negative"),
        (lambda: GNN(Numbers(2), 2, width=1), "algorithm.width=1: must be at least 2"),
        (lambda: RelationNet(Numbers(2), width=0), "must be at least 1"),
        (lambda: SNAIL(Numbers(2), 2, longest=0), "algorithm.longest=0: must be at least 1"),
        (lambda: SimpleShot(Numbers(2), momentum=-3.0), "algorithm.momentum=-3.0"),
        (lambda: MatchingNet(Numbers(2), scale=0.0), "algorithm.scale=0.0: must be above 0"),
        (lambda: Versa(Numbers(2), samples=0), "algorithm.samples=0: must be at least 1"),
        (lambda: MetaNet(Numbers(2), outputs=2), "chain of layers"),
        (lambda: MetaNet(WideResNet(SHAPE, 10, 1, norm="none"), outputs=2), "chain of layers"),
        (lambda: CNAPs(Numbers(2), SHAPE), "no layer with channels"),
        (lambda: CNAPs(MLP((4,), (4,)), (4,)), "needs images; choose algorithm=versa"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(build, words: str):
    with pytest.raises(ConfigError) as error:
        build()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_logistic_regressions_need_classes():
    with pytest.raises(ConfigError, match=r"choose algorithm\.solver=ridge"):
        R2D2(Numbers(2), solver="logistic").on_run_start(Sinusoid().split("train"))
