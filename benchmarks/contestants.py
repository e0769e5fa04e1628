"""The compared implementations: metarun with several settings, a plain loop, and installed libraries.

A contestant computes the meta-gradient of a workload on given weights and episodes, and runs
outer steps with Adam. The step of metarun includes sampling its episodes; the others get theirs for free.
"""

from __future__ import annotations

import copy
import importlib
import importlib.metadata
import time
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.workloads import Workload
from metarun.tasks.episodes import Episodes
from metarun.tasks.sampling import training_draws
from metarun.training.hardware import Hardware
from metarun.training.step import OuterStep


class Contestant(ABC):
    """Base class of contestants.

    Args:
        workload: the workload.
        tasks: the meta-batch.
        dtype: float64 for the check of the gradient, float32 for timing.
        device: where to run.
    """

    def __init__(self, workload: Workload, tasks: int, dtype: torch.dtype, device: torch.device) -> None:
        self.workload, self.tasks, self.dtype, self.device = workload, tasks, dtype, device

    @abstractmethod
    def gradient(self) -> list[Tensor]:
        """The meta-gradient of the first meta-batch, for each weight in the algorithm's order."""

    @abstractmethod
    def step(self) -> None:
        """One meta-iteration."""


class Metarun(Contestant):
    """The engine, with some settings of hardware."""

    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, workload: Workload, tasks: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, tasks, dtype, device)
        settings = dict(self.settings)
        if dtype == torch.float64 and settings.get("precision", "float32") == "float32":
            settings["precision"] = "float64"
        self.hardware = Hardware(str(device), **settings)
        algorithm = self.hardware.place(workload.algorithm())
        captured = device.type == "cuda"
        rate: Any = torch.tensor(1e-3, device=device) if captured else 1e-3
        optimizer = torch.optim.Adam(algorithm.parameters(), lr=rate, fused=True, capturable=captured)
        source = workload.source(device)
        self.engine = OuterStep(algorithm, optimizer, source, workload.shape, tasks, 0, self.hardware)
        self.said: list[str] = []
        began = time.perf_counter()
        with self.hardware.compute():
            self.engine.prepare(0, self.said.append)
        self.start_up = time.perf_counter() - began

    def gradient(self) -> list[Tensor]:
        with self.hardware.compute():
            self.engine.backward(next(self.engine.draws_from(0)))
        return [p.grad.clone() for p in self.engine.params if p.grad is not None]

    def step(self) -> None:
        with self.hardware.compute():
            self.engine.step()

    def sample(self) -> Episodes:
        """Draw and gather the episodes of a step."""
        engine = self.engine
        return engine.source.gather(next(engine.draws), engine.shape).to(self.hardware.dtype)


def metarun(**settings: Any) -> type[Metarun]:
    return type("Metarun", (Metarun,), {"settings": settings})


class Peer(Contestant):
    """Base class of loops over tasks with one copy of the network for each task."""

    package: str | None = None  # the required package
    module: str | None = None  # its name in Python, if that is another
    has_first_order = False

    def __init__(self, workload: Workload, tasks: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(workload, tasks, dtype, device)
        algorithm = workload.algorithm()
        if workload.kind == "protonet":
            self.net: nn.Module = copy.deepcopy(algorithm.backbone)
        else:
            learner: Any = algorithm.learner
            self.net = nn.Sequential(copy.deepcopy(learner.backbone), copy.deepcopy(learner.head))
        self.net.to(device, dtype)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-3)
        self.episodes = first_episodes(workload, tasks, dtype, device)
        self.set_up()

    def set_up(self) -> None:
        """Initialisation of a library."""

    @classmethod
    def fits(cls, workload: Workload) -> bool:
        return workload.kind == "maml" and (workload.order == 2 or cls.has_first_order)

    def gradient(self) -> list[Tensor]:
        self.optimizer.zero_grad()
        self.backward()
        return [p.grad.clone() for p in self.net.parameters() if p.grad is not None]

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.backward()
        self.optimizer.step()

    def backward(self) -> None:
        """Write the gradient of the mean loss over tasks to `.grad`."""
        e = self.episodes
        for t in range(self.tasks):
            self.backward_of_task(e.support_x[t], e.support_y[t], e.query_x[t], e.query_y[t])

    @abstractmethod
    def backward_of_task(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> None: ...

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (
            F.mse_loss(outputs, targets) if targets.is_floating_point() else F.cross_entropy(outputs, targets)
        )


def first_episodes(workload: Workload, tasks: int, dtype: torch.dtype, device: torch.device) -> Episodes:
    """metarun's first meta-batch."""
    source = workload.source(device)
    draw = next(training_draws(source, tasks, workload.shape, 0, device=device))
    return source.gather(draw, workload.shape).to(dtype)


class PlainLoop(Peer):
    """The usual implementation: functional weights, `autograd.grad`, one task after the other."""

    @classmethod
    def fits(cls, workload: Workload) -> bool:
        return True

    def backward_of_task(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> None:
        getattr(self, self.workload.kind)(support_x, support_y, query_x, query_y)

    def maml(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> None:
        weights = dict(self.net.named_parameters())
        for _ in range(self.workload.steps):
            loss = self.loss(torch.func.functional_call(self.net, weights, (support_x,)), support_y)
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=self.workload.order == 2)
            pairs = zip(weights.items(), grads, strict=True)
            weights = {name: w - self.workload.rate * g for (name, w), g in pairs}
        loss = self.loss(torch.func.functional_call(self.net, weights, (query_x,)), query_y)
        (loss / self.tasks).backward()

    def reptile(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> None:
        x, y = torch.cat([support_x, query_x]), torch.cat([support_y, query_y])
        twin = copy.deepcopy(self.net)
        inner = torch.optim.SGD(twin.parameters(), lr=self.workload.rate)
        for _ in range(self.workload.steps):
            inner.zero_grad()
            self.loss(twin(x), y).backward()
            inner.step()
        with torch.no_grad():
            for p, adapted in zip(self.net.parameters(), twin.parameters(), strict=True):
                moved = (p - adapted) / self.tasks
                p.grad = moved if p.grad is None else p.grad + moved

    def protonet(self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> None:
        ways, shots = self.workload.shape.ways, self.workload.shape.shots
        prototypes = self.net(support_x).view(ways, shots, -1).mean(1)
        logits = -torch.cdist(self.net(query_x), prototypes).square()
        (self.loss(logits, query_y) / self.tasks).backward()


class Higher(Peer):
    package = "higher"

    def backward_of_task(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> None:
        import higher

        inner = torch.optim.SGD(self.net.parameters(), lr=self.workload.rate)
        with higher.innerloop_ctx(self.net, inner, copy_initial_weights=False) as (twin, update):
            for _ in range(self.workload.steps):
                update.step(self.loss(twin(support_x), support_y))
            (self.loss(twin(query_x), query_y) / self.tasks).backward()


class TorchOpt(Peer):
    package = "torchopt"

    def set_up(self) -> None:
        import torchopt

        self.inner = torchopt.MetaSGD(self.net, lr=self.workload.rate)

    def backward_of_task(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> None:
        import torchopt

        state = torchopt.extract_state_dict(self.net, by="reference")
        inner_state = torchopt.extract_state_dict(self.inner, by="reference")
        for _ in range(self.workload.steps):
            self.inner.step(self.loss(self.net(support_x), support_y))
        (self.loss(self.net(query_x), query_y) / self.tasks).backward()
        torchopt.recover_state_dict(self.net, state)
        torchopt.recover_state_dict(self.inner, inner_state)


class TorchOptVmap(Peer):
    """TorchOpt's functional recipe: `vmap` of the inner gradient. Inexact with batch norm."""

    package = "torchopt"

    def backward(self) -> None:
        import torchopt
        from torch.func import functional_call, grad, vmap

        weights = dict(self.net.named_parameters())
        rate = self.workload.rate

        def task_loss(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
            return self.loss(functional_call(self.net, w, (x,)), y)

        def after(support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
            w = weights
            rule = torchopt.sgd(lr=rate)
            state = rule.init(w)
            for _ in range(self.workload.steps):
                updates, state = rule.update(grad(task_loss)(w, support_x, support_y), state, inplace=False)
                w = torchopt.apply_updates(w, updates, inplace=False)
            return task_loss(w, query_x, query_y)

        e = self.episodes
        vmap(after)(e.support_x, e.support_y, e.query_x, e.query_y).mean().backward()

    def backward_of_task(self, *task: Tensor) -> None:
        raise NotImplementedError


class Learn2Learn(Peer):
    package = "learn2learn"
    has_first_order = True

    def set_up(self) -> None:
        import learn2learn

        self.maml = learn2learn.algorithms.MAML(
            self.net, lr=self.workload.rate, first_order=self.workload.order == 1
        )

    def backward_of_task(
        self, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor
    ) -> None:
        twin = self.maml.clone()
        for _ in range(self.workload.steps):
            twin.adapt(self.loss(twin(support_x), support_y))
        (self.loss(twin(query_x), query_y) / self.tasks).backward()


class ParallelMetaLearn(Peer):
    """parallel-metalearn: `vmap` of the whole inner loop."""

    package, module = "parallel-metalearn", "metalearn"
    has_first_order = True

    @classmethod
    def fits(cls, workload: Workload) -> bool:
        return super().fits(workload) and not workload.regression  # it has a loss for classes only

    def set_up(self) -> None:
        from metalearn.algorithms import MAML
        from metalearn.inner_optimizers import InnerSGD
        from metalearn.loss import CategoricalAccuracy, CrossEntropy
        from metalearn.model_wrappers import MAML_Model

        assert isinstance(self.net, nn.Sequential)
        body, head = self.net
        self.model = MAML_Model(Plain(body), Plain(head))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        inner = InnerSGD(
            self.model.get_fast_weights(),
            first_order=self.workload.order == 1,
            inner_lr=self.workload.rate,
            max_inner_steps=self.workload.steps,
            learn_lr=False,
        )
        self.maml = MAML(
            model=self.model,
            optimizer=self.optimizer,
            inner_optimizer=inner.to(self.dtype),
            support_loss_fn=CrossEntropy(metric_fn=CategoricalAccuracy()),
            inner_steps=self.workload.steps,
            chunk_size=self.tasks,
            device=self.device,
        )
        e = self.episodes
        self.batch = e.support_x, {"labels": e.support_y}, e.query_x, {"labels": e.query_y}

    def gradient(self) -> list[Tensor]:
        """The gradient that its step leaves behind."""
        self.step()
        return [p.grad.clone() for p in self.model.parameters() if p.grad is not None]

    def step(self) -> None:
        self.maml.step(iter([self.batch]))

    def backward_of_task(self, *task: Tensor) -> None:
        raise NotImplementedError


class Plain(nn.Module):
    """A network that is called with words that it does not know."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, **words: object) -> Tensor:
        return self.net(x)


PEERS: dict[str, type[Peer]] = {
    "plain loop": PlainLoop,
    "higher": Higher,
    "torchopt": TorchOpt,
    "torchopt vmap": TorchOptVmap,
    "learn2learn": Learn2Learn,
    "parallel-metalearn": ParallelMetaLearn,
}


def contestants(device: torch.device, compiled: bool) -> dict[str, type[Contestant]]:
    """All contestants that can run on this machine, by name; "metarun" has the default settings."""
    found: dict[str, type[Contestant]] = {"metarun": metarun()}
    if compiled:
        found["metarun compiled"] = metarun(compile=True)
    if device.type == "cuda":
        found["metarun eager"] = metarun(graph=False)
        found["metarun grouped"] = metarun(batching="grouped")
        found["metarun tf32"] = metarun(precision="tf32")
    if device.type == "cuda" or computes_bf16():
        found["metarun bf16"] = metarun(precision="bf16")
    return found | {name: peer for name, peer in PEERS.items() if version(peer.package, peer.module)}


def computes_bf16() -> bool:
    """Whether the CPU has instructions for bf16; without, it takes about ten times as long as float32."""
    try:
        return "bf16" in Path("/proc/cpuinfo").read_text()  # avx512_bf16, amx_bf16, and bf16 of ARM
    except OSError:
        return True


def version(package: str | None, module: str | None = None) -> str | None:
    """The version of a package; None if it is not installed or its import fails."""
    if package is None:
        return torch.__version__
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(module or package)
        return importlib.metadata.version(package)
    except Exception:  # some packages are incompatible with newer versions of their dependencies
        return None
