"""Task2Vec (Achille et al. 2019): tasks as vectors, by the Fisher information of the weights of a network.

"Task2Vec: Task Embedding for Meta-Learning", ICCV 2019. A probe network, trained before and the same for
all tasks, gets a classifier for the task (`fitted_head`); the diagonal of the Fisher information of the
weights of the network (`fisher_diagonal`, equation 1) says which of them matter for the task. It is averaged
over the weights of each filter, and tasks are compared by the symmetric distance (`distances`).

Departures from the paper and from its code:

- The expectation over labels of the model, y ~ p(y|x), is a sum over the classes instead of a sample, and
  gradients are those of single examples, as in equation 1. (The code squares the gradient of a batch.)
- The Fisher information is computed at the weights, not by the paper's robust variational estimate.
- The classifier is the optimum of logistic regression with scikit-learn's default penalty, instead of ten
  epochs of Adam: without a penalty, few examples are separated perfectly and have no Fisher information.
- Batch norm uses its running averages; the network must have some.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

EXAMPLES_AT_ONCE = 8  # of which the gradients of all outputs are in memory
SMALLEST = 1e-30  # a filter with less information for two tasks does not tell them apart


def fitted_head(features: Tensor, y: Tensor, ways: int) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: the least sum of cross entropies + |weight|^2 / 2.

    Args:
        features: [n, F].
        y: classes [n], from 0 to `ways` - 1.
        ways: number of classes.

    Returns:
        (weight [ways, F], bias [ways]).
    """
    weight = features.new_zeros(ways, features.shape[1]).requires_grad_()
    bias = features.new_zeros(ways).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(features @ weight.T + bias, y, reduction="sum")
        loss = (loss + weight.square().sum() / 2) / len(y)
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def fisher_diagonal(network: nn.Module, head: tuple[Tensor, Tensor], x: Tensor) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of the weights of a network with a classifier, equation 1.

    F_i = mean over x of the sum over y of p(y|x) (d log p(y|x) / d w_i)^2.

    Args:
        network: in evaluation mode; it maps each example to features independently of the others.
        head: (weight [ways, F], bias [ways]).
        x: examples [n, ...].

    Returns:
        The diagonal by name of the parameter, in the shape of the parameter.
    """
    params = {name: p.detach() for name, p in network.named_parameters()}
    buffers = dict(network.named_buffers())

    def log_probabilities(weights: dict[str, Tensor], one: Tensor) -> Tensor:
        features = functional_call(network, {**weights, **buffers}, (one.unsqueeze(0),))
        return (features @ head[0].T + head[1]).log_softmax(-1).squeeze(0)

    def of_one(one: Tensor) -> dict[str, Tensor]:
        slopes = jacrev(log_probabilities)(params, one)  # [ways, *weight]
        p = log_probabilities(params, one).exp()
        return {name: torch.tensordot(p, slope.square(), 1) for name, slope in slopes.items()}

    totals = {name: torch.zeros_like(p) for name, p in params.items()}
    for part in x.split(EXAMPLES_AT_ONCE):
        for name, each in vmap(of_one)(part).items():
            totals[name] += each.sum(0) / len(x)
    return totals


def task_vector(network: nn.Module, x: Tensor, y: Tensor, ways: int) -> Tensor:
    """A task as a vector: the Fisher information of each filter of a probe network.

    Args:
        network: the probe, in evaluation mode; its weights stay as they are.
        x, y: all labelled examples of the task.
        ways: number of classes.

    Returns:
        One number for each output of each layer: the mean over its weights, without biases and
        normalisation, as in the paper's code.
    """
    with torch.no_grad():
        features = network(x)
    diagonal = fisher_diagonal(network, fitted_head(features, y, ways), x)
    filters = [value.flatten(1).mean(1) for value in diagonal.values() if value.dim() > 1]
    return torch.cat(filters).double()


def distances(vectors: Tensor) -> Tensor:
    """The symmetric distance of tasks: the cosine distance of a / (a + b) and b / (a + b).

    Args:
        vectors: [tasks, filters], not negative.

    Returns:
        [tasks, tasks], from 0 to 1.
    """
    a, b = vectors.unsqueeze(1), vectors.unsqueeze(0)
    total = a + b
    share = torch.where(total > SMALLEST, a / total.clamp(min=SMALLEST), torch.zeros_like(total))
    cosine = torch.cosine_similarity(share, share.transpose(0, 1), dim=-1)
    return (1 - cosine).clamp(min=0).fill_diagonal_(0.0)


def positions(distances: Tensor) -> tuple[Tensor, float]:
    """Points in the plane with about these distances, by classical multidimensional scaling (Torgerson 1952).

    Args:
        distances: [tasks, tasks].

    Returns:
        The points [tasks, 2], and the share of the (positive) variance that they keep, from 0 to 1.
    """
    count = len(distances)
    centring = torch.eye(count, dtype=torch.float64) - 1 / count
    values, vectors = torch.linalg.eigh(-0.5 * centring @ distances.double().square() @ centring)
    values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
    vectors = (
        vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    )  # of two mirror images
    points = nn.functional.pad(vectors[:, :2] * values[:2].sqrt(), (0, max(0, 2 - count)))
    return points, (values[:2].sum() / values.sum().clamp(min=SMALLEST)).item()
