"""The table of docs/gradient_based.md: `python docs/family_table.py` prints it from the configs.

What adapts, what is learned besides the weights, and whether memory grows with the inner steps
are read off the methods themselves; the rule, the derivative and the paper are given here. A
test compares the document with this table.
"""

from __future__ import annotations

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from metarun import cli
from metarun.algorithms.maml import MAML
from metarun.build import build_algorithm, build_hardware
from metarun.config import register_frames
from metarun.episodes import Episodes
from metarun.measure import peak_bytes

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
SETTINGS = ["backbone.width=8", "dataset.size=16", "hardware=cpu"]


def built(name: str, *words: str) -> MAML:
    with initialize_config_dir(str(cli.CONF), version_base="1.3"):
        cfg = compose("train", [f"algorithm={name}", *SETTINGS, *words])
    torch.manual_seed(0)
    algorithm = build_algorithm(cfg, build_hardware(cfg))
    assert isinstance(algorithm, MAML), OmegaConf.to_yaml(cfg.algorithm)
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
    algorithm = built(name, *words)
    y = torch.arange(5).unsqueeze(0)
    x = torch.rand(2, 1, 5, 1, 16, 16)
    episodes = Episodes(x[0], y, x[1], y, y)
    params = [p for p in algorithm.parameters() if p.requires_grad]
    return peak_bytes(
        lambda: torch.autograd.grad(algorithm.meta_loss(episodes)[0], params, allow_unused=True),
        torch.device("cpu"),
    )


def table() -> str:
    register_frames()
    headings = ["`algorithm=`", "adapts", "an inner step", "learned besides the weights", "meta-gradient"]
    headings += ["memory in steps", "paper"]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    for name, (rule, derivative, paper) in METHODS.items():
        algorithm = built(name)
        grows = "grows" if memory(name, 20) > 1.5 * memory(name, 5) else "flat"
        cells = [f"`{name}`", adapts(algorithm), rule, learns_besides(algorithm), derivative, grows, paper]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
