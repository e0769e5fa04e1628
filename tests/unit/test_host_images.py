"""Images that stay in host memory give the same episodes, fetched ahead."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from torch.optim import SGD as OuterSGD

from metarun.algorithms.protonet import ProtoNet
from metarun.backbones.conv4 import Conv4
from metarun.config.build import build_source
from metarun.datasets.augment import Augment
from metarun.datasets.glyphs import Glyphs
from metarun.datasets.mixture import Mixture, MixtureStore
from metarun.datasets.sinusoid import Sinusoid
from metarun.tasks.class_store import ClassStore
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.sampling import fetched_ahead, sample, training_draws
from metarun.training.evaluation import EvalSettings, evaluate
from metarun.training.hardware import Hardware
from metarun.training.step import OuterStep

GEOMETRY = EpisodeShape(3, 1, 2)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def glyphs(size: int = 28) -> Glyphs:
    return Glyphs(train_classes=20, validation_classes=6, test_classes=20, images_per_class=4, size=size)


def sources(dataset: object, device: str) -> list[ClassStore]:
    return [build_source(dataset, "train", Hardware(device, images=where)) for where in ("device", "host")]


def losses(store: ClassStore, device: str, compile: bool | str = False) -> list[float]:
    torch.manual_seed(0)
    hardware = Hardware(device, compile=compile)
    algorithm = hardware.place(ProtoNet(Conv4((1, 28, 28), 4)))
    optimizer = OuterSGD(algorithm.parameters(), lr=0.1)
    engine = OuterStep(algorithm, optimizer, store, GEOMETRY, 4, 0, hardware)
    notes: list[str] = []
    found = []
    with hardware.compute():
        engine.prepare(0, notes.append)
        for _ in range(20):  # over the end of a block of draws
            engine.step()
            found.append(engine.running_totals[0].item())
    assert engine.graph is None or store.host_for is None
    assert any("host memory" in note for note in notes) == (device == "cuda" and store.host_for is not None)
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("augmented", [False, True])
def test_training_is_the_same_from_host_memory(device: str, augmented: bool):
    stores = sources(glyphs(), device)
    assert [store.host_for is None for store in stores] == [True, False]
    assert stores[1].items.device.type == "cpu"
    if augmented:
        for store in stores:
            store.augment = Augment()
    compile = "auto" if augmented else False  # a trace, too, takes its images from host memory
    torch.testing.assert_close(*(torch.tensor(losses(store, device, compile)) for store in stores))


@pytest.mark.parametrize("device", DEVICES)
def test_a_mixture_and_an_evaluation_from_host_memory(device: str):
    dataset = Mixture(datasets={"a": glyphs(), "b": glyphs(20)}, parts={"a": 1.0, "b": 1.0})
    near, far = sources(dataset, device)
    assert isinstance(far, MixtureStore)
    assert far.parts["b"].host_for == torch.device(device)
    episodes = [sample(each, 5, GEOMETRY, torch.Generator().manual_seed(0)) for each in (near, far)]
    for name in ("support_x", "support_y", "query_x", "query_y", "classes"):
        a, b = (getattr(each, name) for each in episodes)
        assert a.device.type == b.device.type == device
        assert torch.equal(a, b)
    hardware = Hardware(device)
    algorithm = hardware.place(ProtoNet(Conv4((1, 28, 28), 4)))
    results = [evaluate(algorithm, each, EvalSettings(GEOMETRY, 60, 0), hardware) for each in (near, far)]
    assert results[0].episodes_hash == results[1].episodes_hash
    torch.testing.assert_close(results[0].scores, results[1].scores)
    assert far.resized((3, 8, 8)).parts["a"].host_for == torch.device(device)


def test_one_draw_is_fetched_ahead_by_a_thread_and_none_is_lost():
    store = sources(glyphs(), "cpu")[1]
    threads, fetched = [], []
    original = store.fetch

    def watched(draw):
        threads.append(threading.current_thread())
        fetched.append(draw)
        return original(draw)

    store.fetch = watched  # type: ignore[method-assign]
    draws = training_draws(store, 2, GEOMETRY, seed=0)
    ahead = fetched_ahead(draws, store)
    ready = list(itertools.islice(ahead, 3))
    ahead.close()
    assert len(fetched) == 4
    assert threading.main_thread() not in threads
    plain = itertools.islice(training_draws(store, 2, GEOMETRY, seed=0), 3)
    for (classes, pixels), draw in zip(ready, plain, strict=True):
        assert pixels.dtype == torch.uint8
        assert torch.equal(classes, draw[0])
        assert torch.equal(pixels, original(draw)[1])
    assert not any(thread.is_alive() for thread in threads)


def test_a_draw_that_does_not_fit_on_the_device_is_run_in_halves():
    store = sources(glyphs(), "cpu")[1]
    plain = losses(store, "cpu")
    original, failed = store.fetch, []

    def fails(draw):
        if len(draw[0]) > 2:
            failed.append(threading.current_thread())
            raise torch.OutOfMemoryError("no room")
        return original(draw)

    store.fetch = fails  # type: ignore[method-assign]
    found = torch.tensor(losses(store, "cpu"))
    torch.testing.assert_close(found, torch.tensor(plain), rtol=1e-5, atol=0)  # halves round differently
    assert {thread is threading.main_thread() for thread in failed} == {True, False}


def test_where_images_are_kept(monkeypatch):
    cpu = Hardware("cpu")
    assert not cpu.keeps_on_host(1 << 50)
    assert Hardware("cpu", images="host").keeps_on_host(1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 8000))
    cpu.device = torch.device("cuda")  # as if there were one
    assert [cpu.keeps_on_host(size) for size in (500, 501)] == [False, True]
    cpu.images = "device"
    assert not cpu.keeps_on_host(1 << 50)
    assert build_source(Sinusoid(), "train", Hardware("cpu", images="host")).spec.item_shape == (1,)
