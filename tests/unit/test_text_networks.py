"""Networks for texts: each method's meta-gradient against plain loops in float64, however tasks are run."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.methods import METHODS
from torch import Tensor, nn
from torch.func import functional_call

from metarun.algorithms.maml import MAML
from metarun.backbones.adapter import Adapter
from metarun.backbones.bag import Bag
from metarun.backbones.text_cnn import TextCNN
from metarun.backbones.text_transformer import TextTransformer
from metarun.config.build import build_backbone
from metarun.errors import ConfigError
from metarun.inner_loops.meta_sgd import MetaSGD
from metarun.inner_loops.sgd import SGD
from metarun.nn.per_task import TaskBatching, plain_attention
from metarun.tasks.class_store import ClassStore, tokens
from metarun.tasks.episodes import Episodes
from metarun.tasks.spec import TaskSpec

VOCABULARY, LENGTH = 40, 6


def adapter(adapts: bool) -> nn.Module:
    """With a last layer that is no longer zero, so that all weights have gradients."""
    network = Adapter((LENGTH,), hidden=5)
    nn.init.normal_(network[0].body[2].weight)
    return network


NETWORKS: dict[str, Callable[[bool], nn.Module]] = {
    "bag": lambda adapts: Bag(VOCABULARY, features=16, adapts=adapts),
    "text_cnn": lambda adapts: TextCNN(VOCABULARY, width=4, filters=3, widths=(1, 3), adapts=adapts),
    "text_transformer": lambda adapts: TextTransformer((LENGTH,), VOCABULARY, 4, 1, 2, adapts=adapts),
    "adapter": adapter,
}


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def texts(*shape: int, empty: bool) -> Tensor:
    """Token ids, half of the texts short, and possibly one text of each task without any token."""
    ids = torch.randint(1, VOCABULARY, (*shape, LENGTH))
    ids[:, ::2, LENGTH // 2 :] = 0
    if empty:
        ids[:, 1] = 0
    return ids


def episodes(name: str, empty: bool = True) -> Episodes:
    """Of token ids; of vectors for an adapter, one of them zeros instead of the empty text."""
    y = torch.arange(3).repeat(2, 1)
    x, query_x = (texts(2, 6, empty=empty) for _ in range(2))
    if name == "adapter":
        x, query_x = x / VOCABULARY, query_x / VOCABULARY
    return Episodes(
        x,
        y.repeat_interleave(2, 1),
        query_x,
        y.repeat_interleave(2, 1),
        torch.arange(3).repeat(2, 1),
    )


def adapted_names(net: nn.Module, adapts: bool) -> list[str]:
    """In the reference's network 0 is the backbone and 1 the head; tables of tokens are adapted if asked."""
    tables = {"0.0.weight"} if isinstance(net[0], nn.Sequential) else {"0.embedding.weight"}
    return [name for name, _ in net.named_parameters() if adapts or name not in tables]


def plain_maml(net: nn.Module, tasks: Episodes, names: list[str], rates: dict[str, Tensor]) -> Tensor:
    losses = []
    for x, y, query_x, query_y in zip(
        tasks.support_x, tasks.support_y, tasks.query_x, tasks.query_y, strict=True
    ):
        fast = {name: p for name, p in net.named_parameters() if name in names}
        for _ in range(2):
            loss = F.cross_entropy(functional_call(net, fast, (x,)), y)
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            fast = {name: p - rates[name] * g for (name, p), g in zip(fast.items(), grads, strict=True)}
        losses.append(F.cross_entropy(functional_call(net, fast, (query_x,)), query_y))
    return torch.stack(losses).mean()


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    named = dict(module.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(named.items(), grads, strict=True)
    }


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-9, atol=1e-12, msg=name)
    assert all(grad.abs().sum() > 0 for grad in theirs.values())


@pytest.mark.parametrize("how", ["grouped", "vmap", "loop"])
@pytest.mark.parametrize("adapts", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("rule", ["sgd", "meta_sgd"])
def test_gradient_based_methods_differentiate_through_their_steps(name, adapts, how, rule):
    tasks, network = episodes(name), NETWORKS[name](adapts)
    loop = SGD(0.3, 2) if rule == "sgd" else MetaSGD(steps=2)
    algorithm = MAML(network, loop, outputs=3)
    algorithm.learner.batching = TaskBatching(how)
    net = nn.Sequential(copy.deepcopy(network), copy.deepcopy(algorithm.learner.head))
    names = adapted_names(net, adapts)
    ours = gradients(algorithm.meta_loss(tasks).loss.mean(), algorithm)

    def renamed(key: str) -> str:
        return key.replace("0.", "learner.backbone.", 1) if key.startswith("0.") else f"learner.head{key[1:]}"

    if rule == "sgd":
        rates = dict.fromkeys(names, 0.3)
    else:
        own = dict(algorithm.inner_loop.named_parameters())
        flat = {
            key.split(".", 1)[1].replace("/", "."): p.detach().clone().requires_grad_()
            for key, p in own.items()
        }
        rates = {key: flat[renamed(key).removeprefix("learner.")] for key in names}
    with plain_attention():
        loss = plain_maml(net, tasks, names, rates)
        theirs = {renamed(key): grad for key, grad in gradients(loss, net).items()}
        loss = plain_maml(net, tasks, names, rates)
    if rule == "meta_sgd":
        found = torch.autograd.grad(loss, list(rates.values()))
        theirs |= {
            f"inner_loop.rates.{renamed(key).removeprefix('learner.').replace('.', '/')}": grad
            for key, grad in zip(rates, found, strict=True)
        }
    assert_equal(ours, theirs)


@pytest.mark.quick
@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("method", ["protonet", "r2d2", "matching"])
def test_methods_on_features_have_the_gradient_of_a_plain_loop(method, name):
    algorithm = METHODS[method].build(NETWORKS[name](False), 1)
    tasks = episodes(name, empty=False)  # the references divide by the length of a vector
    theirs = METHODS[method].reference(algorithm, tasks, 1)
    assert_equal(gradients(algorithm.meta_loss(tasks).loss.mean(), algorithm), theirs)


@pytest.mark.parametrize("width, looped", [(64, True), (16, False)])
def test_wide_attention_is_run_in_a_loop_on_a_cpu(width, looped, monkeypatch):
    calls = []
    vmap = torch.vmap
    monkeypatch.setattr(torch, "vmap", lambda *args, **kwargs: calls.append(1) or vmap(*args, **kwargs))
    network = TextTransformer((LENGTH,), VOCABULARY, width, 1, 2)
    algorithm = MAML(network, SGD(0.3, 1), outputs=3)
    algorithm.meta_loss(episodes("text_transformer"))
    assert (not calls) == looped


def test_a_network_without_anything_to_adapt_is_refused():
    with pytest.raises(ConfigError, match=r"algorithm.adapts=body: tasks share .* set backbone.adapts=true"):
        MAML(NETWORKS["bag"](False), SGD(0.3, 2), outputs=3, adapts="body")


@pytest.mark.quick
def test_a_bag_has_the_angles_of_scikit_learns_tfidf():
    """With more features than tokens, and so without collisions."""
    text = pytest.importorskip("sklearn.feature_extraction.text")
    counts = torch.randint(0, 4, (7, VOCABULARY - 1))
    counts[:, 0], counts[:, -1] = 1, 0  # a token of every text, and one of none
    rows = [torch.repeat_interleave(torch.arange(1, VOCABULARY), row) for row in counts]
    items = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).int()
    bag = Bag(VOCABULARY, features=1 << 16)
    bag.on_run_start(ClassStore(items, [7], ["one"], "made train", decode=tokens))
    vectors = bag(items.long()).detach()
    theirs = torch.from_numpy(text.TfidfTransformer().fit_transform(counts.numpy()).toarray())
    torch.testing.assert_close(vectors @ vectors.T, 9 * theirs @ theirs.T, rtol=1e-6, atol=1e-6)


@pytest.mark.quick
def test_padding_changes_nothing():
    ids = torch.randint(1, VOCABULARY, (3, LENGTH))
    longer = F.pad(ids, (0, 4))
    for name in ("bag", "text_cnn"):
        network = NETWORKS[name](False)
        torch.testing.assert_close(network(longer), network(ids))
    short, whole = F.pad(ids[:, :3], (0, 3)), NETWORKS["text_transformer"](False)
    changed = copy.deepcopy(whole)
    with torch.no_grad():
        changed.positions[3:] += 1  # the positions of padding
    torch.testing.assert_close(changed(short), whole(short))


@pytest.mark.quick
def test_networks_for_texts_and_for_other_examples_are_not_confused():
    bag, mlp = ({"_target_": f"metarun.backbones.{name}"} for name in ("bag.Bag", "mlp.MLP"))
    with pytest.raises(
        ConfigError, match="backbone=Bag: takes texts, and this dataset has images; choose backbone=conv4"
    ):
        build_backbone(bag, TaskSpec((1, 8, 8)))
    with pytest.raises(
        ConfigError, match="backbone=MLP: does not take texts; choose backbone=bag, text_cnn or text_tr"
    ):
        build_backbone(mlp, TaskSpec((LENGTH,), item_dtype=torch.int64, vocabulary=VOCABULARY))
