"""The tables of docs/gradient_based.md and docs/feature_based.md: `python docs/family_table.py` prints them.

What adapts, what is learned besides the weights, whether memory grows with the inner steps, and
how many ways a new task may have are read off the methods themselves; the rest is given here. A
test compares the documents with these tables.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from hydra import compose, initialize_config_dir

from metarun.algorithms.base import Algorithm
from metarun.algorithms.baseline import Classifier
from metarun.algorithms.maml import MAML
from metarun.config.build import build_algorithm, build_dataset, instantiate
from metarun.config.paths import CONF
from metarun.config.schema import register_frames, typed
from metarun.errors import ConfigError
from metarun.tasks.episodes import Episodes
from metarun.training.memory import peak_bytes

THROUGH, CONSTANT, NONE = "through the steps", "gradients held constant", "not through the steps"

# algorithm: (rule of an inner step, derivative of the meta-gradient, paper)
METHODS = {
    "maml": ("gradient descent", THROUGH, "Finn et al. 2017"),
    "fomaml": ("gradient descent", CONSTANT, "Finn et al. 2017, 5.2"),
    "anil": ("gradient descent", THROUGH, "Raghu et al. 2020"),
    "boil": ("gradient descent", THROUGH, "Oh et al. 2021"),
    "meta_sgd": ("gradient times a rate of each weight", THROUGH, "Li et al. 2017"),
    "meta_curvature": ("gradient times a matrix in each dimension", THROUGH, "Park and Oliva 2019"),
    "maml_plus_plus": ("gradient times a rate of each layer and step", THROUGH, "Antoniou et al. 2019"),
    "cavia": ("gradient descent", THROUGH, "Zintgraf et al. 2019"),
    "meta_lstm": ("gates of an LSTM forget and add the gradient", CONSTANT, "Ravi and Larochelle 2017"),
    "learned_optimizer": ("output of an LSTM", CONSTANT, "Andrychowicz et al. 2016"),
    "reptile": ("Adam", NONE + ": towards where they end", "Nichol et al. 2018"),
    "minibatch_prox": ("Adam on the loss and a pull", NONE + ": towards where they end", "Zhou et al. 2019"),
    "imaml": ("gradient descent on the loss and a pull", NONE + ": implicit", "Rajeswaran et al. 2019"),
    "pretrain": ("gradient descent, at test alone", NONE + ": none in training", "the baseline"),
}
# algorithm: (what a task's support becomes, how a query is answered, paper)
FEATURES = {
    "protonet": ("class means", "nearest mean, squared Euclidean or cosine", "Snell et al. 2017"),
    "matching": ("itself, or seen by an LSTM", "vote weighted by cosine attention", "Vinyals et al. 2016"),
    "relation": ("sums of feature maps", "a network's score of each pair", "Sung et al. 2018"),
    "mann": ("contents of a memory", "recurrent controller that reads it", "Santoro et al. 2016"),
    "snail": ("a sequence", "causal attention and convolutions", "Mishra et al. 2018"),
    "meta_networks": ("fast weights from gradients", "fast weights by attention", "Munkhdalai and Yu 2017"),
    "r2d2": ("ridge regression", "linear", "Bertinetto et al. 2019"),
    "lrd2": ("logistic regressions", "linear", "Bertinetto et al. 2019"),
    "metaoptnet": ("support vector machine", "linear", "Lee et al. 2019"),
    "versa": ("distribution over a classifier", "linear, averaged over samples", "Gordon et al. 2019"),
    "cnaps": ("channel scales and a classifier", "linear on adapted features", "Requeima et al. 2019"),
    "gnn": ("nodes with labels", "messages over a learned graph", "Garcia and Bruna 2018"),
    "baseline": ("a classifier trained on it", "linear", "Chen et al. 2019"),
    "baseline_plus_plus": ("a classifier trained on it", "scaled cosine", "Chen et al. 2019"),
    "simpleshot": ("class means", "nearest mean of normalised features", "Wang et al. 2019"),
    "meta_baseline": ("class means", "scaled cosine, from a pretrained network", "Chen et al. 2021"),
}
SETTINGS = ["backbone.width=8", "dataset.size=16", "hardware=cpu"]


def built(name: str, *words: str) -> Algorithm:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"algorithm={name}", *SETTINGS, *words])
    torch.manual_seed(0)
    settings = typed(cfg)
    spec = replace(build_dataset(settings.dataset).spec, classes=5)
    return build_algorithm(settings, spec, instantiate(settings.hardware))


def built_maml(name: str, *words: str) -> MAML:
    algorithm = built(name, *words)
    assert isinstance(algorithm, MAML), name
    return algorithm


def adapts(algorithm: MAML) -> str:
    names = [name for name, _ in algorithm.learner.named_parameters()]
    fast = [name for name in names if algorithm.is_fast(name)]
    if all(name.endswith(".context") for name in fast):
        return "a context"
    heads = {name.startswith("head.") for name in fast}
    if len(heads) == 2:
        return "all" if len(fast) == len(names) else "all but the norms"
    return "the head" if heads == {True} else "the body"


def learns_besides(algorithm: MAML) -> str:
    """Meta-parameters that are no weights of the learner."""
    names = {
        name.removeprefix("inner_loop.").split(".")[0]
        for name, p in algorithm.named_parameters()
        if p.requires_grad and not name.startswith("learner.")
    }
    return ", ".join(sorted(names)) or "-"


def memory(name: str, steps: int) -> int:
    """Peak bytes of a meta-gradient of one task with so many inner steps in training."""
    words = [] if name == "pretrain" else [f"inner_loop.steps={steps}"]
    algorithm = built_maml(name, *words)
    y = torch.arange(5).unsqueeze(0)
    x = torch.rand(2, 1, 5, 1, 16, 16)
    episodes = Episodes(x[0], y, x[1], y, y)
    params = [p for p in algorithm.parameters() if p.requires_grad]
    return peak_bytes(
        lambda: torch.autograd.grad(algorithm.meta_loss(episodes).loss.mean(), params, allow_unused=True),
        torch.device("cpu"),
    )


def table() -> str:
    register_frames()
    headings = ["`algorithm=`", "adapts", "an inner step", "learned besides the weights", "meta-gradient"]
    headings += ["memory in steps", "paper"]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for name, (rule, derivative, paper) in METHODS.items():
        algorithm = built_maml(name)
        grows = "grows" if memory(name, 8) > 1.5 * memory(name, 2) else "flat"
        cells = [f"`{name}`", adapts(algorithm), rule, learns_besides(algorithm), derivative, grows, paper]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def feature_table() -> str:
    register_frames()
    headings = ["`algorithm=`", "a task's support becomes", "a query is answered by"]
    headings += ["trained on", "learned besides the backbone", "ways of a new task", "paper"]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for name, (support, query, paper) in FEATURES.items():
        algorithm = built(name)
        trained = "all training classes" if isinstance(algorithm, Classifier) else "episodes"
        cells = [f"`{name}`", support, query, trained, besides_backbone(algorithm), ways_of(algorithm), paper]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def besides_backbone(algorithm: Algorithm) -> str:
    """Its other networks and numbers, by their names."""
    names = {
        name.split(".")[0].replace("_", " ")
        for name, p in algorithm.named_parameters()
        if p.requires_grad and not name.startswith("backbone.")
    }
    return ", ".join(sorted(names)) or "-"


def ways_of(algorithm: Algorithm) -> str:
    try:
        algorithm.check(6)  # one more than it was built for
    except ConfigError:
        return "as trained, or fewer"
    return "any"


if __name__ == "__main__":
    print(table(), feature_table(), sep="\n\n")
