"""Independent references for methods that learn from features: plain loops, written from the papers.

Each is the loss of one task, from its features and a copy of the method's own modules, of which
only the weights are used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.references import lstm_cell
from metarun.algorithms.base import Algorithm
from metarun.tasks.episodes import Episodes


def tasks_of(episodes: Episodes) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Support and query of one task after the other."""
    yield from zip(episodes.support_x, episodes.support_y, episodes.query_x, episodes.query_y, strict=True)


# (a copy of the method, support [S, F], classes [S], query [B, F], classes [B]) -> loss
TaskLoss = Callable[[Algorithm, Tensor, Tensor, Tensor, Tensor], Tensor]


def gradient_of(task_loss: TaskLoss):
    """The gradient of the mean over tasks, by name; support and query are embedded apart."""

    def reference(algorithm: Algorithm, episodes: Episodes, steps: int) -> dict[str, Tensor]:
        net = copy.deepcopy(algorithm)
        total = 0.0
        for x, y, query_x, query_y in tasks_of(episodes):
            loss = task_loss(net, net.backbone(x), y, net.backbone(query_x), query_y)
            total = total + loss / len(episodes)
        params = {name: p for name, p in net.named_parameters() if p.requires_grad}
        grads = torch.autograd.grad(total, list(params.values()), materialize_grads=True)
        return dict(zip(params, grads, strict=True))

    return reference


def mean_cross_entropy(rows: list[Tensor], labels: Tensor) -> Tensor:
    total = sum(torch.logsumexp(row, 0) - row[label] for row, label in zip(rows, labels, strict=True))
    return total / len(rows)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / (a.square().sum().sqrt() * b.square().sum().sqrt())


def mean_of(features: Tensor, labels: Tensor, k: int) -> Tensor:
    return torch.stack([x for x, y in zip(features, labels, strict=True) if y == k]).mean(0)


def balance_of(labels: Tensor) -> Tensor:
    """The weight of each example with which all classes count equally, with a mean of 1."""
    classes = labels.unique()
    return torch.tensor([len(labels) / len(classes) / (labels == k).sum() for k in labels])


def cosine_protonet(net, support, y, query, query_y) -> Tensor:
    centres = [mean_of(support, y, k) for k in range(3)]
    rows = [net.scale * torch.stack([cosine(q, c) for c in centres]) for q in query]
    return mean_cross_entropy(rows, query_y)


def zero_shot(algorithm: Algorithm, episodes: Episodes, steps: int) -> dict[str, Tensor]:
    """The mapped description and the features of a class's examples, each of unit length, added."""
    net = copy.deepcopy(algorithm)
    total = 0.0
    for t, (x, y, query_x, query_y) in enumerate(tasks_of(episodes)):
        support = net.backbone(x) if len(x) else []
        centres = []
        for k in range(3):
            about = (episodes.about[t, k].flatten() - net.mean) / net.deviation
            for layer in net.map:
                about = layer.weight @ about + layer.bias if hasattr(layer, "weight") else about.clamp(min=0)
            vectors = [about, *(f for f, label in zip(support, y, strict=True) if label == k)]
            centre = sum(v / v.square().sum().sqrt() for v in vectors)
            centres.append(centre / centre.square().sum().sqrt())
        rows = [torch.stack([-(q - c).square().sum() for c in centres]) for q in net.backbone(query_x)]
        total = total + mean_cross_entropy(rows, query_y) / len(episodes)
    params = dict(net.named_parameters())
    return dict(zip(params, torch.autograd.grad(total, list(params.values())), strict=True))


def matching(net, support, y, query, query_y) -> Tensor:
    """Equation 1, one query at a time; with contexts, the recurrences of the appendix.

    The votes of a class are averaged.
    """
    if net.support_context is not None:
        support = in_context(net.support_context, support)
        query = torch.stack([read(net, support, q) for q in query])
    losses = []
    for q, label in zip(query, query_y, strict=True):
        weights = torch.stack([net.scale * cosine(q, x) for x in support]).exp()
        votes = torch.stack([weights[y == k].mean() for k in range(3)])
        losses.append(-(votes[label] / votes.sum()).log())
    return torch.stack(losses).mean()


def in_context(lstm: nn.LSTM, support: Tensor) -> Tensor:
    def along(xs: list[Tensor], suffix: str) -> list[Tensor]:
        names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
        weights = [getattr(lstm, name + suffix) for name in names]
        h = c = torch.zeros(1, lstm.hidden_size)
        out = []
        for x in xs:
            h, c = lstm_cell(x.unsqueeze(0), h, c, weights)
            out.append(h[0])
        return out

    forward = along(list(support), "")
    backward = along(list(support.flip(0)), "_reverse")[::-1]
    return torch.stack([f + b + x for f, b, x in zip(forward, backward, support, strict=True)])


def read(net, support: Tensor, q: Tensor) -> Tensor:
    """The recurrent input is [h, r]: the first half of its weights act on h, the second on r."""
    cell = net.query_context
    size = len(q)
    on_query, on_read = cell.weight_ih.split(size, 1)
    recurrent = torch.cat([cell.weight_hh, on_read], 1)
    h, c, r = torch.zeros(size), torch.zeros(1, size), torch.zeros(size)
    for _ in range(net.reads):
        state = torch.cat([h, r]).unsqueeze(0)
        out, c = lstm_cell(q.unsqueeze(0), state, c, [on_query, recurrent, cell.bias_ih, cell.bias_hh])
        h = out[0] + q
        weights = torch.stack([(h * x).sum() for x in support]).exp()
        r = sum(w * x for w, x in zip(weights / weights.sum(), support, strict=True))
    return h


def relation(net, support, y, query, query_y) -> Tensor:
    sums = [net.shots * mean_of(support, y, way) for way in range(3)]
    pairs = [torch.cat([s.view(net.map_shape), q.view(net.map_shape)]) for q in query for s in sums]
    scores = 1 / (1 + torch.exp(-net.relation(torch.stack(pairs)).flatten()))
    wanted = [float(way == label) for label in query_y for way in range(3)]
    return sum((s - w) ** 2 for s, w in zip(scores, wanted, strict=True)) / len(wanted)


def ridge(net, support, y, query, query_y) -> Tensor:
    """The normal equations in the space of the features."""
    x = torch.cat([support, torch.ones(len(support), 1)], 1)
    targets = torch.stack([(y == k).to(x) for k in range(3)], 1)
    b = torch.diag(balance_of(y))
    w = torch.linalg.inv(x.T @ b @ x + net.log_ridge.exp() * torch.eye(x.shape[1])) @ x.T @ b @ targets
    rows = [net.scale * (torch.cat([q, torch.ones(1)]) @ w) for q in query]
    return mean_cross_entropy(rows, query_y)


def metaoptnet_ridge(net, support, y, query, query_y) -> Tensor:
    targets = torch.stack([(y == k).to(support) for k in range(3)], 1)
    eye, b = torch.eye(support.shape[1]), torch.diag(balance_of(y))
    w = torch.linalg.inv(support.T @ b @ support + net.ridge * eye) @ support.T @ b @ targets
    return smoothed(net, [net.scale * (q @ w) for q in query], query_y)


def smoothed(net, rows: list[Tensor], labels: Tensor) -> Tensor:
    share = net.label_smoothing
    losses = []
    for row, label in zip(rows, labels, strict=True):
        logs = row - torch.logsumexp(row, 0)
        losses.append(-(1 - share) * logs[label] - share * logs.mean())
    return torch.stack(losses).mean()


def logistic(net, support, y, query, query_y) -> Tensor:
    """Newton's steps with the gradient and the Hessian of each class's own problem."""
    x = torch.cat([support, torch.ones(len(support), 1)], 1)
    strength, b = net.log_ridge.exp(), balance_of(y)
    columns = []
    for k in range(3):
        target = (y == k).to(x)
        w = torch.zeros(x.shape[1])
        for _ in range(net.steps):
            mu = 1 / (1 + torch.exp(-x @ w))
            slope = x.T @ (b * (mu - target)) + strength * w
            hessian = x.T @ torch.diag(b * mu * (1 - mu)) @ x + strength * torch.eye(len(w))
            w = w - torch.linalg.inv(hessian) @ slope
        columns.append(w)
    w = torch.stack(columns, 1)
    rows = [net.scale * (torch.cat([q, torch.ones(1)]) @ w) for q in query]
    return mean_cross_entropy(rows, query_y)


def svm(net, support, y, query, query_y) -> Tensor:
    """The dual solution by projected gradient; its derivative by the equations of its active set.

    Where variables at their bounds stay there, the free ones solve a linear system.
    """
    ways, shots = 3, len(support)
    gram = support @ support.T
    own = torch.stack([(y == k).to(support) for k in range(ways)], 1).flatten()
    hessian = torch.kron(gram, torch.eye(ways))
    bound = net.penalty * own * balance_of(y).repeat_interleave(ways)
    a = projected_gradient(hessian.detach(), own, bound, ways)
    free = a < bound - 1e-7
    sums = torch.kron(torch.eye(shots), torch.ones(1, ways))
    block = hessian[free][:, free] + 1e-12 * torch.eye(int(free.sum()))  # its solution need not be unique
    corner = sums[:, free]
    used = corner.sum(1) > 0  # every example has a free variable, or all of its are at bounds
    corner = corner[used]
    size = len(block) + len(corner)
    system = torch.zeros(size, size)
    system[: len(block), : len(block)] = block
    system[len(block) :, : len(block)] = corner
    system[: len(block), len(block) :] = corner.T
    fixed = torch.where(free, 0.0, bound)
    right = torch.cat([own[free] - (hessian @ fixed)[free], -(sums @ fixed)[used]])
    solution = torch.linalg.solve(system, right)[: len(block)]
    everything = fixed.index_put((free.nonzero().squeeze(1),), solution)
    w = support.T @ everything.view(shots, ways)
    return smoothed(net, [net.scale * (q @ w) for q in query], query_y)


def projected_gradient(hessian: Tensor, own: Tensor, bound: Tensor, ways: int) -> Tensor:
    """Accelerated (FISTA with restarts) on 1/2 a'Ha - own'a, a <= bound, each example's sum zero."""
    length = 1 / torch.linalg.eigvalsh(hessian)[-1]
    a = before = torch.zeros_like(own)
    momentum = 1.0
    for _ in range(20000):
        new = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        look = a + (momentum - 1) / new * (a - before)
        step = project(look - length * (hessian @ look - own), bound, ways)
        momentum = 1.0 if (look - step) @ (step - a) > 0 else new
        before, a = a, step
        if (a - before).abs().max() < 1e-16 and momentum > 1:
            break
    return a


def project(a: Tensor, bound: Tensor, ways: int) -> Tensor:
    """The nearest point with a <= bound and zero sums: minus a shift of each example, found by sorting."""
    a, bound = a.view(-1, ways), bound.view(-1, ways)
    kinks = (a - bound).sort(1).values  # entries above the shift are at their bounds
    best = None
    for count in range(1, ways + 1):  # so many entries are free: those with the smallest a - bound
        order = (a - bound).argsort(1)[:, :count]
        fixed = bound.sum(1) - bound.gather(1, order).sum(1)
        shift = (a.gather(1, order).sum(1) + fixed) / count
        fits = (kinks[:, count - 1] <= shift + 1e-15) & (
            (kinks[:, count] >= shift - 1e-15) if count < ways else torch.ones_like(shift, dtype=torch.bool)
        )
        best = shift if best is None else torch.where(fits, shift, best)
    return torch.minimum(a - best.unsqueeze(1), bound).flatten()


def gnn(net, support, y, query, query_y) -> Tensor:
    """One node and one pair at a time; batch norms see all graphs of the task, layer norms one graph."""
    graph = net.graph
    labels = [torch.tensor([float(k == way) for way in range(3)]) for k in y]
    graphs = []
    for q in query:
        nodes = [torch.cat([q, torch.full((3,), 1 / 3)])]
        nodes += [torch.cat([x, label]) for x, label in zip(support, labels, strict=True)]
        graphs.append(nodes)

    def normalised(rows, layer):
        """Rows [graphs * each, C], by column over all, or all of a graph's together."""
        if isinstance(layer, nn.BatchNorm2d):
            mean, variance = rows.mean(0), rows.var(0, correction=0)
        else:
            assert isinstance(layer, nn.GroupNorm) and layer.num_groups == 1
            each = len(rows) // len(graphs)
            own = rows.view(len(graphs), -1)
            mean, variance = (
                x.repeat_interleave(each).unsqueeze(1) for x in (own.mean(1), own.var(1, correction=0))
            )
        return (rows - mean) / (variance + layer.eps).sqrt() * layer.weight + layer.bias

    def hears(adjacency, graphs, listeners):
        """For every graph and each of its listeners, what it hears; the norms see each pair once."""
        size = len(graphs[0])
        pairs = [{i, j} for i in range(size) for j in range(i + 1, size) if {i, j} & set(listeners)]
        out = torch.stack([(nodes[min(p)] - nodes[max(p)]).abs() for nodes in graphs for p in pairs])
        for layer in adjacency.network:
            if isinstance(layer, nn.Conv2d):
                out = out @ layer.weight[:, :, 0, 0].T + layer.bias
            elif isinstance(layer, nn.LeakyReLU):
                out = torch.where(out > 0, out, 0.01 * out)
            else:
                out = normalised(out, layer)
        out = out.view(len(graphs), len(pairs))
        heard = []
        for weights, nodes in zip(out, graphs, strict=True):
            for i in listeners:
                others = [j for j in range(size) if j != i]
                shares = torch.softmax(torch.stack([weights[pairs.index({i, j})] for j in others]), 0)
                heard.append(sum(s * nodes[j] for s, j in zip(shares, others, strict=True)))
        return heard

    everyone = range(len(graphs[0]))
    for adjacency, message, norm in zip(graph.adjacencies, graph.messages, graph.norms, strict=False):
        flat = [node for nodes in graphs for node in nodes]
        both = [torch.cat([n, h]) for n, h in zip(flat, hears(adjacency, graphs, everyone), strict=True)]
        out = torch.stack(both) @ message.weight.T + message.bias
        out = normalised(out, norm)
        out = torch.where(out > 0, out, 0.01 * out)
        rows = iter([torch.cat([n, o]) for n, o in zip(flat, out, strict=True)])
        graphs = [[next(rows) for _ in nodes] for nodes in graphs]
    heard = hears(graph.adjacencies[-1], graphs, [0])
    rows = [
        graph.last.weight @ torch.cat([graphs[g][0], heard[g]]) + graph.last.bias for g in range(len(graphs))
    ]
    return mean_cross_entropy(rows, query_y)


def snail(net, support, y, query, query_y) -> Tensor:
    """The whole sequence anew for every query, position by position."""
    order = scattered(len(support))
    rows = []
    for q in query:
        sequence = [torch.cat([support[i], F.one_hot(y[i], 3).to(support)]) for i in order]
        sequence.append(torch.cat([q, torch.zeros(3)]))
        for layer in net.layers:
            added = attend(layer, sequence) if hasattr(layer, "keys") else convolve(layer, sequence)
            sequence = [torch.cat([x, a]) for x, a in zip(sequence, added, strict=True)]
        rows.append(net.last.weight @ sequence[-1] + net.last.bias)
    return mean_cross_entropy(rows, query_y)


def scattered(length: int) -> list[int]:
    """The order that never changes: by Knuth's multiplicative hash of the position."""
    return sorted(range(length), key=lambda i: (i + 1) * 2654435761 % 2**32)


def attend(layer, sequence: list[Tensor]) -> list[Tensor]:
    added = []
    for i, x in enumerate(sequence):
        query = layer.queries(x)
        size = len(query)
        logits = torch.stack([(query * layer.keys(sequence[j])).sum() / size**0.5 for j in range(i + 1)])
        shares = torch.softmax(logits, 0)
        added.append(sum(s * layer.values(sequence[j]) for j, s in enumerate(shares)))
    return added


def convolve(layer, sequence: list[Tensor]) -> list[Tensor]:
    added = []
    for i, x in enumerate(sequence):
        earlier = sequence[i - layer.dilation] if i >= layer.dilation else torch.zeros_like(x)
        both = torch.cat([earlier, x])
        content = layer.content.weight @ both + layer.content.bias
        gate = layer.gate.weight @ both + layer.gate.bias
        added.append(torch.tanh(content) / (1 + torch.exp(-gate)))
    return added


def mann(net, support, y, query, query_y) -> Tensor:
    """One place of the memory at a time (equations 2 to 8)."""
    features, labels = torch.cat([support, query]), torch.cat([y, query_y])
    order = scattered(len(labels))
    cell = net.controller
    weights = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
    memory = [torch.zeros(net.size) for _ in range(net.slots)]
    usage = [torch.zeros(()) for _ in range(net.slots)]
    reading = [[torch.zeros(())] * net.slots for _ in range(net.heads)]
    reads = torch.zeros(net.heads * net.size)
    h = c = torch.zeros(1, cell.hidden_size)
    label_before = torch.zeros(3)
    share = 1 / (1 + torch.exp(-net.gate))
    rows = []
    for i in order:
        x = torch.cat([features[i], label_before, reads]).unsqueeze(0)
        h, c = lstm_cell(x, h, c, weights)
        keys = torch.tanh(net.keys.weight @ h[0] + net.keys.bias).view(net.heads, net.size)
        free = sorted(range(net.slots), key=lambda s: (usage[s].item(), s))[: net.heads]
        for place in free:
            memory[place] = torch.zeros(net.size)
        writing = [
            [share * reading[j][s] + (1 - share) * (s == free[j]) for s in range(net.slots)]
            for j in range(net.heads)
        ]
        memory = [
            memory[s] + sum(writing[j][s] * keys[j] for j in range(net.heads)) for s in range(net.slots)
        ]
        reading, found = [], []
        for j in range(net.heads):
            similar = torch.stack([F.cosine_similarity(keys[j], m, dim=0, eps=1e-12) for m in memory])
            shares = torch.softmax(similar, 0)
            reading.append(list(shares))
            found.append(sum(s * m for s, m in zip(shares, memory, strict=True)))
        reads = torch.cat(found)
        usage = [
            net.decay * usage[s] + sum(reading[j][s] + writing[j][s] for j in range(net.heads))
            for s in range(net.slots)
        ]
        rows.append(net.last.weight @ torch.cat([h[0], reads]) + net.last.bias)
        label_before = F.one_hot(labels[i], 3).to(support)
    return mean_cross_entropy(rows, labels[order])


def versa(net, support, y, query, query_y) -> Tensor:
    """Equation 5, sample by sample and class by class, with the noise the method was given."""
    noise = net.noise(torch.zeros(1, len(query), 3), None)[:, 0]  # [L, B or 1, N]
    means = [mean_of(support, y, k) for k in range(3)]
    losses = []
    for i, (q, label) in enumerate(zip(query, query_y, strict=True)):
        probabilities = []
        for sample in noise:
            row = sample[i % len(sample)]
            logits = []
            for k, mean in enumerate(means):
                m = (net.weight_mean(mean) * q).sum() + net.bias_mean(mean)[0]
                v = (net.weight_variance(mean).exp() * q**2).sum() + net.bias_variance(mean)[0].exp()
                logits.append(m + v.sqrt() * row[k])
            probabilities.append(torch.softmax(torch.stack(logits), 0)[label])
        losses.append(-torch.stack(probabilities).mean().log())
    return torch.stack(losses).mean()


def classifier(algorithm: Algorithm, episodes: Episodes, steps: int) -> dict[str, Tensor]:
    """Cross entropy over all training classes; support and query are one batch."""
    net = copy.deepcopy(algorithm)
    total = 0.0
    for t in range(len(episodes)):
        features = net.backbone(torch.cat([episodes.support_x[t], episodes.query_x[t]]))
        y = torch.cat([episodes.support_y[t], episodes.query_y[t]])
        labels = torch.stack([episodes.classes[t][way] for way in y])
        weight = net.classifier.weight
        if net.cosine:
            rows = [net.scale * torch.stack([cosine(x, w) for w in weight]) for x in features]
        else:
            rows = [weight @ x + net.classifier.bias for x in features]
        total = total + mean_cross_entropy(rows, labels) / len(episodes)
    params = {name: p for name, p in net.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(total, list(params.values()))
    return dict(zip(params, grads, strict=True))


class Scaled(nn.Module):
    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x[:, c] * self.scale[c] + self.shift[c] for c in range(x.shape[1])], 1)


def cnaps(algorithm: Algorithm, episodes: Episodes, steps: int) -> dict[str, Tensor]:
    """A backbone of its own for each task, its modulations filled in."""
    net = copy.deepcopy(algorithm)
    total = 0.0
    for x, y, query_x, query_y in tasks_of(episodes):
        encoded = net.encoder(x)
        task = torch.stack([mean_of(encoded, y, k) for k in range(3)]).mean(0, keepdim=True)
        given = iter(net.film)
        filled = {}
        for layer in net.modulations:
            generator = next(given)
            first = torch.relu(generator.first(task))
            out = [generator.size[i] * (first + generator.rest[i](first))[0] for i in range(2)]
            filled[layer] = Scaled(1 + out[0], out[1])
        features, query = (run_with(net.backbone, filled, images) for images in (x, query_x))
        rows = []
        for q in query:
            logits = []
            for k in range(3):
                mean = mean_of(features, y, k)
                logits.append(((mean + net.weight(mean)) * q).sum() + net.bias(mean)[0])
            rows.append(torch.stack(logits))
        total = total + mean_cross_entropy(rows, query_y) / len(episodes)
    total = total + net.penalty * sum(generator.size.pow(2).sum() for generator in net.film)
    params = {name: p for name, p in net.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(total, list(params.values()), materialize_grads=True)
    return dict(zip(params, grads, strict=True))


def run_with(module: nn.Module, filled: dict[nn.Module, nn.Module], x: Tensor) -> Tensor:
    """A chain of layers with some of them replaced."""
    if module in filled:
        return filled[module](x)
    if isinstance(module, nn.Sequential):
        for layer in module:
            x = run_with(layer, filled, x)
        return x
    inner = getattr(module, "net", None)
    return run_with(inner, filled, x) if inner is not None else module(x)


def meta_networks(algorithm: Algorithm, episodes: Episodes, steps: int) -> dict[str, Tensor]:
    """Algorithm 1, one example at a time; slow and fast layers are called one after the other."""
    net = copy.deepcopy(algorithm)
    params = {name: p for name, p in net.named_parameters() if p.requires_grad}
    net.requires_grad_(True)
    base, embedder = (
        nn.Sequential(net.backbone, net.head),
        nn.Sequential(net.representation, net.representation_head),
    )
    total = 0.0
    for x, y, query_x, query_y in tasks_of(episodes):
        of_task = fast_from_sequence(net, [own_gradient(embedder, *pair) for pair in zip(x, y, strict=True)])
        of_examples = [fast_from_one(net, own_gradient(base, *pair)) for pair in zip(x, y, strict=True)]
        keys = with_fast(embedder, of_task, x, head=False)
        queries = with_fast(embedder, of_task, query_x, head=False)
        rows = []
        for q, one in zip(queries, query_x, strict=True):
            similar = torch.stack([cosine(q, key) for key in keys]).exp() * balance_of(y)
            shares = similar / similar.sum()
            fast = {
                name: sum(s * weights[name] for s, weights in zip(shares, of_examples, strict=True))
                for name in of_examples[0]
            }
            rows.append(with_fast(base, fast, one.unsqueeze(0))[0])
        total = total + mean_cross_entropy(rows, query_y) / len(episodes)
    grads = torch.autograd.grad(total, list(params.values()), materialize_grads=True)
    return dict(zip(params, grads, strict=True))


def weighted(network: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in network.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def own_gradient(network: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    loss = F.cross_entropy(network(x.unsqueeze(0)), y.unsqueeze(0))
    found = weighted(network)
    grads = torch.autograd.grad(loss, [layer.weight for layer in found.values()])
    return dict(zip(found, grads, strict=True))


def log_and_sign(g: Tensor) -> Tensor:
    rows = []
    for v in g.flatten().tolist():
        large = abs(v) >= math.exp(-7)
        rows.append([math.log(abs(v)) / 7, math.copysign(1.0, v)] if large else [-1.0, math.exp(7) * v])
    return torch.tensor(rows, dtype=g.dtype)


def fast_from_one(net, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    kinds = {name: "convolution" if g.dim() == 4 else "linear" for name, g in grads.items()}
    return {name: net.of_example[kinds[name]](log_and_sign(g)).view(g.shape) for name, g in grads.items()}


def fast_from_sequence(net, sequence: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    weights = {}
    for name, first in sequence[0].items():
        if name == "1":  # the head, which keys do not pass
            continue
        kind = "convolution" if first.dim() == 4 else "linear"
        cell = net.over_examples[kind]
        h = c = torch.zeros(first.numel(), cell.hidden_size)
        for grads in sequence:
            four = [cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh]
            h, c = lstm_cell(log_and_sign(grads[name]), h, c, four)
        weights[name] = net.of_task[kind](h).view(first.shape)
    return weights


def with_fast(network: nn.Sequential, fast: dict[str, Tensor], x: Tensor, head: bool = True) -> Tensor:
    """Slow and fast streams part at a layer with weights and meet after the activation that follows."""
    names = {id(m): n for n, m in network.named_modules()}
    flat = [m for m in network.modules() if not list(m.children())]
    if not head:
        flat = flat[:-1]
    slow, quick = x, None
    for layer in flat:
        name = names[id(layer)]
        if name in fast:
            x = slow if quick is None else slow + quick
            slow = layer(x)
            twin = copy.copy(layer)
            twin._parameters = {"weight": fast[name], "bias": None}
            quick = twin(x)
        elif isinstance(layer, (nn.ReLU, nn.Softplus)):
            slow, quick = (layer(slow) if quick is None else layer(slow) + layer(quick)), None
        elif isinstance(layer, (nn.BatchNorm2d, nn.GroupNorm, nn.Identity)):
            slow, quick = layer(slow), None if quick is None else layer(quick)
        else:
            slow, quick = layer(slow if quick is None else slow + quick), None
    return slow if quick is None else slow + quick
