"""Every method: how it is built for a test, and its independent reference; METHODS has a row for each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from helpers import adaptive_references as adaptive
from helpers import conditioned_references as conditioned
from helpers import contrastive_references as contrastive
from helpers import embedded_references as embedded
from helpers import generation_methods as generation
from helpers import hierarchy_references as hierarchy
from helpers import online_references as online
from helpers import probabilistic_references as probabilistic
from helpers import references, search_references
from helpers import regularised_references as regularised
from helpers.engines import engine_of
from metarun.algorithms.base import Algorithm
from metarun.algorithms.baseline import Baseline, SimpleShot
from metarun.algorithms.cavia import CAVIA
from metarun.algorithms.cnaps import CNAPs
from metarun.algorithms.contrastive import Contrastive
from metarun.algorithms.gnn import GNN
from metarun.algorithms.hsml import HSML
from metarun.algorithms.imaml import IMAML
from metarun.algorithms.leo import LEO
from metarun.algorithms.lgm_net import LGMNet
from metarun.algorithms.maml import MAML
from metarun.algorithms.maml_plus_plus import MAMLPlusPlus
from metarun.algorithms.mann import MANN
from metarun.algorithms.matching import MatchingNet
from metarun.algorithms.meta_nas import MetaNAS
from metarun.algorithms.meta_networks import MetaNet
from metarun.algorithms.metaoptnet import MetaOptNet
from metarun.algorithms.mmaml import MMAML
from metarun.algorithms.mr_maml import MRMAML
from metarun.algorithms.oml import OML
from metarun.algorithms.platipus import PLATIPUS
from metarun.algorithms.pmf import PMF
from metarun.algorithms.pretrain import Pretrain
from metarun.algorithms.protonet import ProtoNet
from metarun.algorithms.r2d2 import R2D2
from metarun.algorithms.relation import RelationNet
from metarun.algorithms.reptile import Reptile
from metarun.algorithms.snail import SNAIL
from metarun.algorithms.tadam import TADAM
from metarun.algorithms.taml import TAML
from metarun.algorithms.versa import Versa
from metarun.algorithms.zero_shot import ZeroShot
from metarun.backbones.cells import Cells
from metarun.backbones.conv4 import Conv4
from metarun.backbones.mlp import MLP
from metarun.backbones.omniglot_cnn import OmniglotCNN
from metarun.inner_loops.adam import Adam
from metarun.inner_loops.alfa import ALFA
from metarun.inner_loops.architecture_adam import ArchitectureAdam
from metarun.inner_loops.base import InnerLoop, PerWeight
from metarun.inner_loops.layer_rates import LayerRates
from metarun.inner_loops.meta_curvature import MetaCurvature
from metarun.inner_loops.meta_sgd import MetaSGD
from metarun.inner_loops.recurrent import LearnedOptimizer, MetaLSTM
from metarun.inner_loops.sgd import SGD
from metarun.nn.layers import FiLM, StepNorm
from metarun.tasks.episodes import Episodes

SHAPE = (1, 16, 16)
RATE = 0.1
Gradient = dict[str, Tensor]


class Smooth(nn.Sequential):
    """A convolutional network without kinks, so that finite differences mean something."""

    features = 4

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 4, 3, padding=1),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.Softplus(),
            nn.AvgPool2d(4),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.BatchNorm2d(4, track_running_stats=False),
            nn.Softplus(),
            nn.AvgPool2d(4),
            nn.Flatten(),
        )


BACKBONES: dict[str, Callable[[], nn.Module]] = {
    "smooth": Smooth,
    "conv4": lambda: Conv4(SHAPE, width=8),
    "conv4-stride-layer": lambda: Conv4(SHAPE, width=8, downsample="stride", norm="layer"),
    "omniglot_cnn": lambda: OmniglotCNN(SHAPE, width=4, hidden=8),
    "mlp": lambda: MLP(SHAPE, hidden=(8, 8)),
}


@dataclass(frozen=True)
class Method:
    build: Callable[[nn.Module, int], Algorithm]  # (backbone, inner steps)
    reference: Callable[[Algorithm, Episodes, int], Gradient]  # by parameter name
    finite_differences: bool = True  # whether the loss's true gradient is what is followed
    tolerance: float = 1e-10  # relative
    any_network: bool = True  # or only chains of layers
    any_order: bool = True  # whether it claims that the order of the classes of a task changes nothing
    equal_classes: bool = True  # whether it claims to weigh classes equally, whatever their numbers of shots


def maml(order: int = 2, **settings) -> Callable[[nn.Module, int], MAML]:
    return lambda backbone, steps: MAML(backbone, SGD(RATE, steps, order=order), outputs=3, **settings)


def reptile(inner_loop: Callable[[int], InnerLoop]) -> Callable[[nn.Module, int], Reptile]:
    return lambda backbone, steps: Reptile(backbone, inner_loop(steps), outputs=3, batch=0)


def rename(grads: Gradient, names: dict[str, str]) -> Gradient:
    return {names[name.split(".")[0]] + name[1:]: grad for name, grad in grads.items()}


def maml_reference(order: int = 2, head_only: bool = False):
    def reference(algorithm: MAML, episodes: Episodes, steps: int) -> Gradient:
        net = references.network(algorithm.learner.backbone, algorithm.learner.head)
        _, grads = references.maml_gradient(
            net, episodes, rate=RATE, steps=steps, order=order, head_only=head_only
        )
        return rename(grads, {"0": "learner.backbone", "1": "learner.head"})

    return reference


def reptile_reference(optimizer: type[torch.optim.Optimizer], **settings):
    def reference(algorithm: Reptile, episodes: Episodes, steps: int) -> Gradient:
        net = references.network(algorithm.learner.backbone, algorithm.learner.head)
        grads = references.reptile_update(net, episodes, optimizer, steps, **settings)
        return rename(grads, {"0": "learner.backbone", "1": "learner.head"})

    return reference


def protonet_reference(algorithm: ProtoNet, episodes: Episodes, steps: int) -> Gradient:
    net = copy.deepcopy(algorithm.backbone)
    loss = references.protonet_loss(net, episodes, together=not algorithm.uses_query_statistics)
    grads = torch.autograd.grad(loss, list(net.parameters()))
    return {f"backbone.{name}": g for (name, _), g in zip(net.named_parameters(), grads, strict=True)}


INNER_LOOPS: dict[str, Callable[[int], InnerLoop]] = {
    "meta_sgd": lambda steps: MetaSGD(steps=steps),
    "layer_rates": lambda steps: LayerRates(RATE, steps),
    "alfa": lambda steps: ALFA(RATE, 0.2, steps),
    "meta_curvature": lambda steps: MetaCurvature(RATE, steps),
    "lstm": lambda steps: MetaLSTM(3, steps),
    "learned_optimizer": lambda steps: LearnedOptimizer(3, steps=steps),
}


def learned(name: str) -> Callable[[nn.Module, int], MAML]:
    """MAML with an inner loop whose meta-parameters are moved away from where they start."""

    def build(backbone: nn.Module, steps: int) -> MAML:
        algorithm = MAML(backbone, INNER_LOOPS[name](steps), outputs=3)
        with torch.no_grad():
            for p in algorithm.inner_loop.parameters():
                p += 0.02 * torch.randn_like(p)
        return algorithm

    return build


def meta_of(module: nn.Module) -> Gradient:
    return dict(module.named_parameters(prefix="inner_loop"))


def in_net(name: str) -> str:
    """A weight's name in the reference's network: backbone.x is 0.x, head.x is 1.x."""
    first, _, rest = name.partition(".")
    return f"{'0' if first == 'backbone' else '1'}.{rest}"


def of_weight(module: PerWeight, prefix: str) -> dict[str, str]:
    """Where the meta-parameter of each weight of the reference's network is."""
    return {in_net(key.replace("/", ".")): f"inner_loop.{prefix}.{key}" for key in module}


def unrolled_reference(update, order: int = 2, **settings):
    """`update(algorithm)` gives the reference's rule from the meta-parameters by name."""

    def reference(algorithm: MAML, episodes: Episodes, steps: int) -> Gradient:
        net = references.network(algorithm.learner.backbone, algorithm.learner.head)
        meta = meta_of(algorithm.inner_loop)
        grads = references.unrolled_gradient(net, meta, episodes, steps, update(algorithm), order, **settings)
        own = {name: grads.pop(name) for name in meta}
        return rename(grads, {"0": "learner.backbone", "1": "learner.head"}) | own

    return reference


def meta_sgd_rule(algorithm: MAML):
    places = of_weight(algorithm.inner_loop.rates, "rates")
    return lambda meta: lambda w, g, loss, step: {n: w[n] - meta[places[n]] * g[n] for n in w}


def layer_rates_rule(algorithm: MAML):
    places = of_weight(algorithm.inner_loop.rates, "rates")
    return lambda meta: lambda w, g, loss, step: {n: w[n] - meta[places[n]][step] * g[n] for n in w}


def alfa_rule(algorithm: MAML):
    return adaptive.alfa_rule(of_weight(algorithm.inner_loop.rates, "rates"))


def meta_curvature_rule(algorithm: MAML):
    loop = algorithm.inner_loop
    scales = of_weight(loop.scales, "scales")
    matrices = [of_weight(part, f"matrices.{dim}") for dim, part in enumerate(loop.matrices)]

    def rule(meta):
        def curve(name: str, g: Tensor) -> Tensor:
            if name in scales:
                return meta[scales[name]] * g
            return references.curved(g, [meta[places[name]] for places in matrices if name in places])

        return lambda w, g, loss, step: {n: w[n] - RATE * curve(n, g[n]) for n in w}

    return rule


def cell_of(meta: Gradient, prefix: str) -> list[Tensor]:
    return [meta[f"inner_loop.{prefix}.{kind}"] for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]


def lstm_rule(algorithm: MAML):
    def rule(meta):
        memory: dict[str, list[Tensor]] = {}  # of each weight: h, c, the forget gate, the input gate

        def update(w, g, loss, step):
            new = {}
            for name in w:
                theta, grad = w[name].flatten(), g[name].flatten()
                h, c, f, i = memory.get(
                    name, [torch.zeros(len(theta), 3)] * 2 + [torch.zeros(len(theta))] * 2
                )
                losses = [part.expand(len(theta)) for part in references.seen(loss)]
                x = torch.stack(references.seen(grad) + losses, 1)
                h, c = references.lstm_cell(x, h, c, cell_of(meta, "cell"))
                gates = []
                for kind, before in (("forget", f), ("input", i)):
                    z = torch.cat([h, theta[:, None], before[:, None]], 1)
                    z = z @ meta[f"inner_loop.{kind}.weight"][0] + meta[f"inner_loop.{kind}.bias"]
                    gates.append(1 / (1 + torch.exp(-z)))
                f, i = gates
                memory[name] = [h, c, f, i]
                new[name] = (f * theta - i * grad).view(w[name].shape)
            return new

        return update

    return rule


def learned_optimizer_rule(algorithm: MAML):
    def rule(meta):
        memory: dict[str, list[Tensor]] = {}

        def update(w, g, loss, step):
            new = {}
            for name in w:
                count = w[name].numel()
                state = memory.get(name, [torch.zeros(count, 3)] * 4)
                first = references.lstm_cell(
                    torch.stack(references.seen(g[name]), 1), *state[:2], cell_of(meta, "cells.0")
                )
                second = references.lstm_cell(first[0], *state[2:], cell_of(meta, "cells.1"))
                memory[name] = [*first, *second]
                out = second[0] @ meta["inner_loop.output.weight"][0] + meta["inner_loop.output.bias"]
                new[name] = w[name] + 0.1 * out.view(w[name].shape)
            return new

        return update

    return rule


def sgd_rule(algorithm: MAML):
    return lambda meta: lambda w, g, loss, step: {n: w[n] - RATE * g[n] for n in w}


def cavia_reference(algorithm: CAVIA, episodes: Episodes, steps: int) -> Gradient:
    """FiLM taken out of the network and put back as a hook with its formula."""
    net = references.network(algorithm.learner.backbone, algorithm.learner.head)
    for parent in net.modules():
        if isinstance(parent, nn.Sequential) and len(parent) == 2 and isinstance(parent[1], FiLM):
            film = parent[1]
            parent[1] = Modulated(film.context, film.weight, film.bias)
    return unrolled_reference_of(net, episodes, steps, lambda name: name.endswith("context"))


class Modulated(nn.Module):
    def __init__(self, context: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.context = nn.Parameter(context.detach().clone(), requires_grad=False)
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        to = self.weight @ self.context
        if self.bias is None:
            return x + to
        to = to + self.bias
        half = len(to) // 2
        return torch.stack([to[c] * x[:, c] + to[half + c] for c in range(half)], 1)


def unrolled_reference_of(net: nn.Module, episodes: Episodes, steps: int, fast) -> Gradient:
    grads = references.unrolled_gradient(net, {}, episodes, steps, sgd_rule(None), fast=fast)
    return rename(grads, {"0": "learner.backbone", "1": "learner.head"})


def maml_plus_plus(backbone: nn.Module, steps: int) -> MAMLPlusPlus:
    algorithm = MAMLPlusPlus(backbone, SGD(RATE, steps), outputs=3, multi_step_loss=10)
    with torch.no_grad():
        for norm in algorithm.norms:
            norm.weight += 0.1 * torch.randn_like(norm.weight)
            norm.bias += 0.1 * torch.randn_like(norm.bias)
    return algorithm


def maml_plus_plus_reference(algorithm: MAMLPlusPlus, episodes: Episodes, steps: int) -> Gradient:
    """Plain batch norms, given the weights of a step; at the start all losses count alike."""
    net = references.network(algorithm.learner.backbone, algorithm.learner.head)
    places = [name for name, layer in net.named_modules() if isinstance(layer, StepNorm)]
    rows = {f"{name}.{kind}" for name in places for kind in ("weight", "bias")}
    own = {name: p.detach().clone() for name, p in net.named_parameters() if name in rows}
    for name in places:
        parent, _, last = name.rpartition(".")
        norm = nn.BatchNorm2d(own[f"{name}.weight"].shape[1], track_running_stats=False)
        norm.weight, norm.bias = (nn.Parameter(own[f"{name}.{kind}"]) for kind in ("weight", "bias"))
        setattr(net.get_submodule(parent), last, norm)  # its weights have a row for each step

    def at_step(weights, step):
        return {name: p[step] if name in rows else p for name, p in weights.items()}

    grads = references.unrolled_gradient(
        net,
        {},
        episodes,
        steps,
        sgd_rule(None),
        fast=lambda name: name not in rows,
        at_step=at_step,
        loss_weights=[1 / steps] * steps,
    )
    return rename(grads, {"0": "learner.backbone", "1": "learner.head"})


def minibatch_prox_reference(algorithm: Reptile, episodes: Episodes, steps: int) -> Gradient:
    net = references.network(algorithm.learner.backbone, algorithm.learner.head)
    grads = references.proximal_update(net, episodes, RATE, steps, strength=0.5)
    return rename(grads, {"0": "learner.backbone", "1": "learner.head"})


def imaml_reference(algorithm: IMAML, episodes: Episodes, steps: int) -> Gradient:
    net = references.network(algorithm.learner.backbone, algorithm.learner.head)
    grads = references.implicit_gradient(net, episodes, RATE, steps, strength=2.0, cg_steps=5)
    return rename(grads, {"0": "learner.backbone", "1": "learner.head"})


def pretrain_reference(algorithm: Pretrain, episodes: Episodes, steps: int) -> Gradient:
    """Cross entropy over all training classes, one task's batch after the other."""
    net = references.network(algorithm.learner.backbone, algorithm.classifier)
    total = 0.0
    for t in range(len(episodes)):
        x = torch.cat([episodes.support_x[t], episodes.query_x[t]])
        y = torch.cat([episodes.support_y[t], episodes.query_y[t]])
        labels = torch.stack([episodes.classes[t][way] for way in y])
        total = total + torch.nn.functional.cross_entropy(net(x), labels) / len(episodes)
    grads = torch.autograd.grad(total, list(net.parameters()))
    named = {name: g for (name, _), g in zip(net.named_parameters(), grads, strict=True)}
    return rename(named, {"0": "learner.backbone", "1": "classifier"})


def versa(backbone: nn.Module, steps: int) -> Versa:
    """With the same two samples for all, so that chunks of tasks meet the same."""
    algorithm = Versa(backbone, samples=2)
    fixed = torch.randn(2, 1, 1, 3)
    algorithm.noise = lambda like, bias: fixed
    return algorithm


def tadam(backbone: nn.Module, steps: int) -> TADAM:
    algorithm = TADAM(backbone, classes=11, scale=0.7, layers=2, penalty=0.3, auxiliary=40)
    for condition in algorithm.conditions:
        nn.init.normal_(condition.multipliers, std=0.3)
    return algorithm


def lgm_net(backbone: nn.Module, steps: int) -> LGMNet:
    """A context that is the mean, as in evaluation; another test samples."""
    algorithm = LGMNet(backbone, width=4, scale=2.0, norm="batch", intertask=False)
    algorithm.noise = torch.zeros_like
    return algorithm


def leo(backbone: nn.Module, steps: int) -> LEO:
    """Samples that are the means, as in evaluation; another test samples."""
    algorithm = LEO(backbone, latents=3, steps=2, tuning_steps=2, rate=0.3, tuning_rate=0.2, dropout=0.0)
    algorithm.divergence, algorithm.distance, algorithm.decay, algorithm.orthogonality = 0.3, 0.4, 0.05, 0.6
    algorithm.noise = torch.zeros_like
    return algorithm


def zero_shot(backbone: nn.Module, steps: int) -> ZeroShot:
    algorithm = ZeroShot(backbone, (2, 3), hidden=(5,))
    algorithm.mean.uniform_()
    algorithm.deviation.uniform_(0.5, 2)
    return algorithm


def platipus(backbone: nn.Module, steps: int) -> PLATIPUS:
    """With the same noise for all tasks, so that chunks of tasks meet the same."""
    loop = SGD(RATE, steps)
    algorithm = PLATIPUS(backbone, loop, 3, classes=11, deviation=0.05, rate=RATE, samples=2, weight=0.3)
    for p in algorithm.prior_deviations.parameters():
        p.data += 0.1 * torch.randn_like(p)
    algorithm.draws = lambda tasks, samples, like: regularised.wave(
        torch.Size((samples, like.shape[-1]))
    ).expand(tasks, -1, -1)
    return algorithm


def platipus_reference(algorithm: PLATIPUS, episodes: Episodes, steps: int) -> Gradient:
    return probabilistic.platipus(algorithm, episodes, steps, RATE)


def meta_nas(backbone: nn.Module, steps: int) -> MetaNAS:
    """On cells of its own, which any method may use but no other backbone replaces."""
    cells = Cells(SHAPE, width=2, cells=1, nodes=1, reductions=(0,), drop_path=0.0)
    return MetaNAS(cells, ArchitectureAdam(0.01, 0.02, steps), outputs=3, test_share=1.0)


def mr_maml(on: str, **settings) -> Callable[[nn.Module, int], MRMAML]:
    """With the same noise for all tasks and examples, so that chunks of tasks meet the same."""

    def build(backbone: nn.Module, steps: int) -> MRMAML:
        algorithm = MRMAML(
            backbone, SGD(RATE, steps), 3, regularises=on, weight=0.1, deviation=0.1, **settings
        )
        shared = 1 if on == "weights" else 2
        algorithm.noise = lambda like: regularised.wave(like.shape[shared:]).expand_as(like)
        return algorithm

    return build


def mr_maml_reference(algorithm: MRMAML, episodes: Episodes, steps: int) -> Gradient:
    return regularised.mr_maml(algorithm, episodes, steps, RATE)


def taml(measure: str) -> Callable[[nn.Module, int], TAML]:
    return lambda backbone, steps: TAML(backbone, SGD(RATE, steps), 3, measure=measure, weight=0.7)


def taml_reference(algorithm: TAML, episodes: Episodes, steps: int) -> Gradient:
    return regularised.taml(algorithm, episodes, steps, RATE)


def mmaml(backbone: nn.Module, steps: int) -> MMAML:
    return MMAML(backbone, SGD(RATE, steps), 3, SHAPE, classes=11, hidden=5, width=1)


def mmaml_reference(algorithm: MMAML, episodes: Episodes, steps: int) -> Gradient:
    return adaptive.mmaml(algorithm, episodes, steps, RATE)


def hsml(aggregator: str) -> Callable[[nn.Module, int], HSML]:
    def build(backbone: nn.Module, steps: int) -> HSML:
        loop = SGD(RATE, steps)
        sizes = {"hidden": 3, "clusters": (3, 2), "reconstruction": 0.7, "width": 2}
        return HSML(backbone, loop, 3, SHAPE, classes=11, aggregator=aggregator, **sizes)

    return build


def hsml_reference(algorithm: HSML, episodes: Episodes, steps: int) -> Gradient:
    return hierarchy.hsml(algorithm, episodes, steps, RATE)


METHODS = {
    "maml": Method(maml(), maml_reference(), any_order=False),
    "fomaml": Method(maml(order=1), maml_reference(order=1), finite_differences=False, any_order=False),
    "anil": Method(maml(adapts="head"), maml_reference(head_only=True), any_order=False),
    "reptile-sgd": Method(
        reptile(lambda steps: SGD(RATE, steps, order=1)),
        reptile_reference(torch.optim.SGD, lr=RATE),
        finite_differences=False,
        any_order=False,
    ),
    "reptile-adam": Method(
        reptile(lambda steps: Adam(0.01, steps)),
        reptile_reference(torch.optim.Adam, lr=0.01, betas=(0.0, 0.999)),
        finite_differences=False,
        tolerance=1e-7,  # Adam divides by a root: rounding grows where a gradient is nearly zero,
        any_order=False,
    ),
    "boil": Method(
        maml(adapts="body"),
        unrolled_reference(sgd_rule, fast=lambda name: name.startswith("0.")),
        any_order=False,
    ),
    "meta_sgd": Method(learned("meta_sgd"), unrolled_reference(meta_sgd_rule), any_order=False),
    "layer_rates": Method(learned("layer_rates"), unrolled_reference(layer_rates_rule), any_order=False),
    "alfa": Method(learned("alfa"), unrolled_reference(alfa_rule), any_order=False),
    "meta_curvature": Method(
        learned("meta_curvature"), unrolled_reference(meta_curvature_rule), any_order=False
    ),
    "meta_lstm": Method(
        learned("lstm"), unrolled_reference(lstm_rule, order=1), finite_differences=False, any_order=False
    ),
    "learned_optimizer": Method(
        learned("learned_optimizer"),
        unrolled_reference(learned_optimizer_rule, order=1),
        finite_differences=False,
        any_order=False,
    ),
    "cavia": Method(
        lambda backbone, steps: CAVIA(backbone, SGD(RATE, steps), outputs=3, context=5),
        cavia_reference,
        any_order=False,
    ),
    "maml_plus_plus": Method(maml_plus_plus, maml_plus_plus_reference, any_order=False),
    "minibatch_prox": Method(
        lambda backbone, steps: Reptile(backbone, SGD(RATE, steps), 3, batch=0, proximal=0.5),
        minibatch_prox_reference,
        finite_differences=False,
        any_order=False,
    ),
    "imaml": Method(
        lambda backbone, steps: IMAML(backbone, SGD(RATE, steps), outputs=3),
        imaml_reference,
        finite_differences=False,
        any_order=False,
    ),
    "meta_nas": Method(
        meta_nas,
        search_references.update,
        finite_differences=False,
        tolerance=1e-7,  # as for reptile-adam
        any_network=False,
        any_order=False,
    ),
    "platipus": Method(platipus, platipus_reference, any_order=False),
    "mr_maml-weights": Method(mr_maml("weights"), mr_maml_reference, any_order=False),
    "mr_maml-activations": Method(
        mr_maml("activations", bottleneck=4, decoder=[5]), mr_maml_reference, any_order=False
    ),
    "taml-entropy": Method(taml("entropy"), taml_reference, any_order=False),
    "taml-theil": Method(taml("theil"), taml_reference, any_order=False),
    "metagan_maml": Method(
        generation.metagan_maml,
        generation.references.metagan_maml,
        finite_differences=False,  # two losses
        any_order=False,
    ),
    "mmaml": Method(
        mmaml,
        mmaml_reference,
        finite_differences=False,  # kinks of the encoder
        any_order=False,
    ),
    "hsml-pooling": Method(
        hsml("pooling"),
        hsml_reference,
        finite_differences=False,  # kinks of the autoencoder
        any_order=False,
    ),
    "hsml-recurrent": Method(
        hsml("recurrent"),
        hsml_reference,
        finite_differences=False,
        any_order=False,
        equal_classes=False,
    ),
    "pretrain": Method(
        lambda backbone, steps: Pretrain(backbone, SGD(RATE, steps), outputs=3, classes=11),
        pretrain_reference,
    ),
    "protonet": Method(lambda backbone, steps: ProtoNet(backbone), protonet_reference),
    "zero_shot": Method(zero_shot, embedded.zero_shot, equal_classes=False),  # a description is an example
    "supcon": Method(
        lambda backbone, steps: Contrastive(backbone, temperature=0.2, projection=3), contrastive.contrastive
    ),
    "meta_baseline": Method(
        lambda backbone, steps: ProtoNet(backbone, distance="cosine", scale=10.0, learn_scale=True),
        embedded.gradient_of(embedded.cosine_protonet),
    ),
    "pmf": Method(
        lambda backbone, steps: PMF(backbone, Adam(0.001, steps, beta1=0.9), augment=0.0),
        embedded.gradient_of(embedded.cosine_protonet),
    ),
    "matching": Method(
        lambda backbone, steps: MatchingNet(backbone, scale=2.0), embedded.gradient_of(embedded.matching)
    ),
    "matching-full-context": Method(
        lambda backbone, steps: MatchingNet(backbone, full_context=True, reads=3),
        embedded.gradient_of(embedded.matching),
        any_order=False,
        equal_classes=False,
    ),
    "relation": Method(
        lambda backbone, steps: RelationNet(backbone, width=4, hidden=5, norm="batch", shots=2),
        embedded.gradient_of(embedded.relation),
    ),
    "r2d2": Method(
        lambda backbone, steps: R2D2(backbone, ridge=2.0, scale=3.0), embedded.gradient_of(embedded.ridge)
    ),
    "lrd2": Method(
        lambda backbone, steps: R2D2(backbone, solver="logistic", ridge=0.5, steps=3),
        embedded.gradient_of(embedded.logistic),
    ),
    "metaoptnet": Method(
        lambda backbone, steps: MetaOptNet(backbone, penalty=1.0, scale=9.0, label_smoothing=0.1),
        embedded.gradient_of(embedded.svm),
        tolerance=1e-6,  # both solve it to a tolerance
    ),
    "metaoptnet-ridge": Method(
        lambda backbone, steps: MetaOptNet(backbone, head="ridge", ridge=2.0),
        embedded.gradient_of(embedded.metaoptnet_ridge),
    ),
    "gnn": Method(
        lambda backbone, steps: GNN(backbone, outputs=3, width=6, norm="batch"),
        embedded.gradient_of(embedded.gnn),
        finite_differences=False,  # kinks of absolute differences and leaky ReLUs,
        any_order=False,
        equal_classes=False,
    ),
    "gnn-layer": Method(
        lambda backbone, steps: GNN(backbone, outputs=3, width=6, norm="layer"),
        embedded.gradient_of(embedded.gnn),
        finite_differences=False,
        any_order=False,
        equal_classes=False,
    ),
    "snail": Method(
        lambda backbone, steps: SNAIL(backbone, outputs=3, longest=6, width=0.05, shuffles=False),
        embedded.gradient_of(embedded.snail),
        any_order=False,
        equal_classes=False,
    ),
    "mann": Method(
        lambda backbone, steps: MANN(backbone, 3, slots=7, size=4, heads=2, controller=5, shuffles=False),
        embedded.gradient_of(embedded.mann),
        any_order=False,
        equal_classes=False,
    ),
    "meta_networks": Method(
        lambda backbone, steps: MetaNet(backbone, outputs=3, hidden=4),
        embedded.meta_networks,
        finite_differences=False,  # the gradients that it reads are held constant
        any_network=False,
        any_order=False,
        equal_classes=False,
    ),
    "versa": Method(versa, embedded.gradient_of(embedded.versa)),
    "oml": Method(
        lambda backbone, steps: OML(backbone, SGD(RATE, steps), classes=11, trajectory=2),
        online.oml,
        any_order=False,
        equal_classes=False,
    ),
    "cnaps": Method(
        lambda backbone, steps: CNAPs(backbone, SHAPE, width=4, penalty=0.1, norm="batch"),
        embedded.cnaps,
        finite_differences=False,  # kinks of the set encoder
    ),
    "lgm_net": Method(
        lgm_net,
        embedded.gradient_of(conditioned.lgm_net),
        finite_differences=False,  # kinks of its networks
    ),
    "leo": Method(leo, conditioned.leo, finite_differences=False),  # distances to codes that are constants
    "tadam": Method(tadam, conditioned.tadam),
    "baseline": Method(
        lambda backbone, steps: Baseline(backbone, SGD(RATE, steps), classes=11), embedded.classifier
    ),
    "baseline_plus_plus": Method(
        lambda backbone, steps: Baseline(backbone, SGD(RATE, steps), classes=11, cosine=True),
        embedded.classifier,
    ),
    "simpleshot": Method(lambda backbone, steps: SimpleShot(backbone, classes=11), embedded.classifier),
    "metagan": Method(
        generation.metagan,
        generation.references.metagan,
        finite_differences=False,  # two losses
    ),
    "hallucination": Method(generation.hallucination, generation.hallucination_reference),
    "distribution_calibration": Method(generation.distribution_calibration, embedded.classifier),
}


#: Methods that learn from features, in whose training nothing is random here.
EMBEDDED = list(METHODS)[list(METHODS).index("protonet") :]
#: Several inner steps in training; learning from features takes none.
STEPS = {name: 1 if name in EMBEDDED else 3 for name in METHODS}
#: What runs a network with weights of each task's own.
PER_TASK = [name for name in METHODS if name not in EMBEDDED or name == "meta_networks"]


def one_of_each_network() -> list[str]:
    """Of `PER_TASK`, one method for each class and kinds of layers.

    Methods that differ in their inner loop alone run the network in the same way.
    """
    chosen: dict[object, str] = {}
    for name in PER_TASK:
        algorithm = METHODS[name].build(BACKBONES["conv4"](), 1)
        layers = {type(m) for key, m in algorithm.named_modules() if not key.startswith("inner_loop")}
        chosen.setdefault((getattr(algorithm, "adapts", None), frozenset(layers)), name)
    return list(chosen.values())


#: What is run in every batching of tasks.
EVERY_BATCHING = one_of_each_network()


def episodes_of(tasks: int = 3, ways: int = 3, shots: int = 2, queries: int = 2) -> Episodes:
    def labels(each: int) -> Tensor:
        return torch.arange(ways).repeat_interleave(each).expand(tasks, -1)

    return Episodes(
        torch.rand(tasks, ways * shots, *SHAPE),
        labels(shots),
        torch.rand(tasks, ways * queries, *SHAPE),
        labels(queries),
        torch.stack([torch.randperm(11)[:ways] for _ in range(tasks)]),
        about=torch.rand(tasks, ways, 2, 3),
    )


def gradient(algorithm: Algorithm, episodes: Episodes, **hardware) -> Gradient:
    """By metarun's own way."""
    engine = engine_of(algorithm, episodes, **hardware)
    engine.backward(next(engine.draws))
    return {name: p.grad.clone() for name, p in algorithm.named_parameters() if p.requires_grad}


def relative_error(a: Gradient, b: Gradient) -> float:
    assert a.keys() == b.keys()
    flat_a, flat_b = (torch.cat([g[name].flatten() for name in a]) for g in (a, b))
    assert flat_b.norm() > 1e-3
    return ((flat_a - flat_b).norm() / flat_b.norm()).item()
