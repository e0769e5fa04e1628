"""python -m benchmarks.agreement CASE ...: does a GPU compute what the CPU computes?

For each case (a method on a dataset), the first meta-batch of the same run is computed on the CPU and on the
device, in float64 and float32: the loss, and the meta-gradient (or, if the outer loop is not a gradient step,
the weights after one outer step). Random numbers that a method draws come from the CPU everywhere. On a GPU,
some steps with a CUDA graph are also compared with the same steps without. One line of JSON a case.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import open_dict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from metarun.cli.overrides import arrange
from metarun.commands.train import build_trainer
from metarun.config.build import build_dataset
from metarun.config.check import check
from metarun.config.paths import CONF
from metarun.config.schema import TrainConfig, register_frames, typed
from metarun.config.unread import in_use
from metarun.errors import first_line
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import Episodes, EpisodeShape, Tasks
from metarun.tasks.rollouts import Rollouts
from metarun.tasks.source import Draw, EpisodeSource
from metarun.training.hardware import Hardware
from metarun.training.outer_loops import Gradient
from metarun.training.step import OuterStep
from metarun.training.trainer import Trainer

#: The beginnings of the names of operations that draw random numbers; others of PyTorch's tag may do so.
DRAWS = ("rand", "normal", "uniform", "bernoulli", "native_dropout", "multinomial", "exponential")
STEPS = 8  # with and without a graph, which is captured at the fourth
EXACT = 1e-6  # the largest relative difference of float64 between the CPU and the device
MOVED = 1e-14  # a relative change of the weights, to see how far a method carries a rounding error
ROUNDING = 10.0  # the device may differ by so many times what rounding does on the CPU
COARSE = 0.05  # and in float32 by so much: rounding decides on which side of a kink an activation is
SMALL = ["dataset.train_classes=40", "dataset.validation_classes=20", "meta_batch=4"]
IMAGES = ["dataset=glyphs", *SMALL]
#: Methods that need more than `algorithm=NAME dataset=glyphs`, and cases that are not on glyphs.
NOT_ON_IMAGES = ("rl2", "zero_shot", "np", "anp", "cnp")
MORE = {
    "protonet, resnet12": ["algorithm=protonet", "backbone=resnet12", *IMAGES],
    "protonet, resnet18": ["algorithm=protonet", "backbone=resnet18", *IMAGES],
    "protonet, wrn28_10": ["algorithm=protonet", "backbone=wrn28_10", "backbone.width=2", *IMAGES],
    "protonet, running averages": ["algorithm=protonet", "norm=running", *IMAGES],
    "protonet, augmented": ["algorithm=protonet", "augment=standard", *IMAGES],
    "maml, layer norm": ["algorithm=maml", "norm=layer", *IMAGES],
    "maml, adam": ["algorithm=maml", "inner_loop=adam", "inner_loop.rate=0.01", *IMAGES],
    "maml, sinusoid": ["algorithm=maml", "dataset=sinusoid"],
    "cavia, sinusoid": ["algorithm=cavia", "dataset=sinusoid"],
    "np, gp": ["algorithm=np", "dataset=gp", "meta_batch=4"],
    "anp, gp": ["algorithm=anp", "dataset=gp", "meta_batch=4"],
    "cnp, gp": ["algorithm=cnp", "dataset=gp", "meta_batch=4"],
    "protonet, phrases": ["algorithm=protonet", "dataset=phrases"],
    "maml, phrases": ["algorithm=maml", "dataset=phrases"],
    "zero_shot": ["algorithm=zero_shot", "shots=0", *IMAGES],
    "protonet, phrases, no examples": ["algorithm=protonet", "dataset=phrases", "shots=0"],
    "maml, navigation2d": ["dataset=navigation2d", "meta_batch=4"],
    "maml, navigation2d, gradient": ["dataset=navigation2d", "meta_batch=4", "outer_loop=gradient"],
    "maml, pendulum": ["dataset=pendulum", "meta_batch=4"],
    "rl2, bandit": ["dataset=bandit", "meta_batch=8"],
    "rl2, tabular": ["dataset=tabular", "meta_batch=8"],
}


def cases() -> dict[str, list[str]]:
    """The settings of every case: each algorithm of the config groups, and `MORE`."""
    names = sorted(path.stem for path in (CONF / "algorithm").glob("*.yaml"))
    methods = {name: [f"algorithm={name}", *IMAGES] for name in names if name not in NOT_ON_IMAGES}
    return methods | MORE


class RandomFromCPU(TorchDispatchMode):
    """Random numbers are drawn by the CPU's generator in float32, whatever the device and the precision."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if torch.Tag.nondeterministic_seeded not in func.tags or not name.startswith(DRAWS):
            return func(*args, **kwargs)
        target = next((a for a in args if isinstance(a, Tensor)), None)
        device, dtype = (kwargs.get("device"), kwargs.get("dtype")) if target is None else like(target)
        words = dict(kwargs)
        words |= {"device": torch.device("cpu")} if kwargs.get("device") is not None else {}
        words |= {"dtype": torch.float32} if kwargs.get("dtype") == torch.float64 else {}
        drops = name == "native_dropout"  # whose argument is not only a shape
        result = func(*tree_map(lambda a: on_cpu(a, drops), args), **words)
        if func._schema.is_mutable:  # such as bernoulli_, whose result belongs into its first argument
            return args[0].copy_(result)
        return tree_map(lambda a: back(a, device, dtype) if isinstance(a, Tensor) else a, result)


def like(tensor: Tensor) -> tuple[torch.device, torch.dtype]:
    return tensor.device, tensor.dtype


def on_cpu(value: Any, exactly: bool) -> Any:
    """An argument on the CPU; in float32 instead of float64, unless its values matter."""
    if not isinstance(value, Tensor):
        return value
    return value.cpu().float() if value.is_floating_point() and not exactly else value.cpu()


def back(tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None) -> Tensor:
    """A result on a device; floating point numbers with this dtype."""
    return tensor.to(device, dtype if tensor.is_floating_point() else None)


def main() -> None:
    known = cases()
    parser = argparse.ArgumentParser("python -m benchmarks.agreement", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {'; '.join(known)}. Without one: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if unknown := sorted(set(args.cases) - set(known)):
        parser.error(f"{unknown[0]}: no such case")
    torch.set_num_threads(1)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # so that cuBLAS counts as deterministic
    for name in args.cases or known:
        began = time.perf_counter()
        try:
            row = compared(known[name], torch.device(args.device))
        except Exception as error:  # the others are still to be compared
            row = {"failed": f"{type(error).__name__}: {first_line(error)}", "where": where(error)}
        print(json.dumps({"case": name, **row, "seconds": time.perf_counter() - began}), flush=True)


def where(error: BaseException) -> str:
    """The innermost line of metarun or of a benchmark in a traceback."""
    own = [f for f in traceback.extract_tb(error.__traceback__) if "metarun" in f.filename]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""


def compared(words: Sequence[str], device: torch.device) -> dict[str, Any]:
    """The differences of one case.

    Args:
        words: its settings, as typed after `metarun train`.
        device: the device that is compared with the CPU.

    Returns:
        The relative differences from float64 on the CPU, `carried`: that of the CPU itself with weights that
        are changed by 1e-14, `agrees`, and what is known of the CUDA graph.
    """
    cpu = torch.device("cpu")
    reference = first_step(words, cpu, "float64")
    float32 = difference(first_step(words, cpu, "float32"), reference)
    row: dict[str, Any] = {"loss": reference[0], "cpu_float32": float32}
    if device.type == "cpu":
        return row | {"agrees": True}
    row["device_float64"] = difference(first_step(words, device, "float64"), reference)
    row["device_float32"] = difference(first_step(words, device, "float32"), reference)
    row["carried"] = difference(first_step(words, cpu, "float64", 1 + MOVED), reference)
    row["agrees"] = row["device_float64"] < max(EXACT, ROUNDING * row["carried"])
    row["agrees"] &= row["device_float32"] < max(COARSE, ROUNDING * float32)
    return row | graph(words, device)


def first_step(
    words: Sequence[str], device: torch.device, precision: str, scale: float = 1.0
) -> tuple[float, Tensor]:
    """The loss of the first meta-batch, and its gradient or the weights after it, flat in float64.

    Args:
        words: the settings of the run.
        device: where it is computed.
        precision: "float32" or "float64".
        scale: a factor on all weights.
    """
    settings: dict[str, Any] = {
        "compile": False,
        "graph": False,
        "channels_last": False,
    }  # masks are by layout
    step = trainer_of(words, Hardware(str(device), precision=precision, **settings)).outer_step
    if device.type != "cpu" and not issubclass(
        step.source.spec.tasks, Rollouts
    ):  # the examples are computed, too
        step.source = Moved(trainer_of(words, Hardware("cpu", precision=precision)).outer_step.source, device)
    with step.hardware.compute(), RandomFromCPU():
        for p in step.params:
            p.data.mul_(scale)
        step.algorithm.train()
        step.algorithm.on_step_start(0)
        draw = next(step.draws_from(0))
        if isinstance(step.outer_loop, Gradient):
            step.backward(draw)
            found = [p.grad for p in step.params if p.grad is not None]
        else:
            step.outer_loop.step(step, draw)
            found = list(step.params)
    flat = torch.cat([each.detach().flatten().double().cpu() for each in found])
    return (step.running_totals[0] / step.meta_batch).item(), flat


class Moved:
    """A source whose tasks are gathered on the CPU and moved to a device."""

    def __init__(self, source: EpisodeSource, device: torch.device) -> None:
        self.source, self.device = source, device

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def gather(self, draw: Draw, shape: EpisodeShape) -> Tasks:
        tasks = self.source.gather(tuple(tensor.cpu() for tensor in draw), shape)
        assert isinstance(tasks, Episodes)
        return tasks.map(lambda tensor: tensor.to(self.device))


def difference(found: tuple[float, Tensor], reference: tuple[float, Tensor]) -> float:
    """The larger of the relative differences of the loss and of the whole gradient."""
    loss = abs(found[0] - reference[0]) / max(abs(reference[0]), 1.0)  # that of a policy is about 0
    size = reference[1].norm().clamp(min=1e-300)
    return max(loss, ((found[1] - reference[1]).norm() / size).item())


def graph(words: Sequence[str], device: torch.device) -> dict[str, Any]:
    """Steps with a CUDA graph beside the same steps without one."""
    totals, row = [], {}
    for captures in (False, True):
        said: list[str] = []
        trainer = trainer_of(words, Hardware(str(device), graph=captures))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.use_deterministic_algorithms(not captures, warn_only=True)
            run(trainer.outer_step, said)
        if not captures:
            varying = {
                str(each.message).split(" ")[0] for each in caught if "determinis" in str(each.message)
            }
            row["nondeterministic"] = sorted(varying)
        totals.append(trainer.outer_step.running_totals[0].item())
        row |= {"captured": trainer.outer_step.graph is not None, "said": said}
    return row | {"graph_difference": abs(totals[1] - totals[0]) / max(abs(totals[0]), 1.0)}


def run(step: OuterStep, said: list[str]) -> None:
    with step.hardware.compute():
        torch.manual_seed(0)
        step.algorithm.train()
        step.prepare(0, said.append)
        for _ in range(STEPS):
            step.step()


def trainer_of(words: Sequence[str], hardware: Hardware) -> Trainer:
    """The trainer of `metarun train WORDS`, on other hardware."""
    register_frames()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", arrange("train", list(words)), return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg.hydra
    check(cfg, "train", typed=list(words))
    settings: TrainConfig = typed(in_use(cfg))
    torch.manual_seed(settings.seed)
    dataset = build_dataset(settings.dataset)
    objective = dataset.spec.objective.choosing(settings.metrics, training=True)
    folder = Path(tempfile.gettempdir())  # nothing is written
    trainer = build_trainer(settings, dataset, objective, hardware, folder, {"choices": choices}, {})
    if isinstance(store := trainer.outer_step.source, ClassStore) and store.spec.kind == "images":
        trainer.outer_step.source = store.with_items(noise(store.items))
    return trainer


def noise(images: Tensor) -> Tensor:
    """Random images in the place of others: max pooling has no ties in them, which rounding would decide."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, images.shape, dtype=torch.uint8, generator=generator).to(images.device)


if __name__ == "__main__":
    main()
