"""Leaves out the classes that a model was trained on, where new classes are wanted; notices changed data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hydra.utils import get_class

from metarun.config.build import build_source, in_metarun
from metarun.config.schema import TrainConfig
from metarun.config.targets import in_options
from metarun.datasets.base import Dataset
from metarun.datasets.tables.tasks import TableTasks
from metarun.errors import DataError
from metarun.reporting.console import inform
from metarun.tasks.class_store import ClassStore
from metarun.tasks.source import EpisodeSource
from metarun.tasks.trained_classes import TrainedClasses
from metarun.training.hardware import Hardware

Trained = Mapping[str, TrainedClasses | None]  # by the name of a model; None: its checkpoint has no record
INSTEAD = "choose another dataset or split, or trained_classes=keep to evaluate on them"
ENTRIES = ("train_classes", "init_classes")  # of a checkpoint: the classes of its own run, and those before


def trained_classes(content: Mapping[str, Any]) -> TrainedClasses | None:
    """All classes that the weights in a checkpoint were trained on; None if it has no record of them."""
    own, before = (TrainedClasses.from_plain(content.get(entry)) for entry in ENTRIES)
    return own + before if own and before else own


def trained_tasks(content: Mapping[str, Any]) -> list[str]:
    """The names of all stored tasks that the weights in a checkpoint were trained on."""
    entries = (content.get(entry) for entry in ("train_tasks", "init_tasks"))
    lists = [entry for entry in entries if isinstance(entry, list)]  # others are from a damaged checkpoint
    return [name for names in lists for name in names if isinstance(name, str)]


def classes_before(resumed: Mapping[str, Any] | None, init: Mapping[str, Any] | None) -> dict[str, Any]:
    """The entries of a checkpoint for the classes and tasks that weights were trained on before the run.

    Args:
        resumed: the content of the checkpoint that is resumed, if any.
        init: the content of the checkpoint that the backbone is taken from, if any.
    """
    if resumed is not None:
        return {"init_classes": resumed.get("init_classes"), "init_tasks": resumed.get("init_tasks")}
    classes = trained_classes(init) if init is not None else None
    tasks = trained_tasks(init) if init is not None else []
    if init is not None and classes is None and not tasks:
        inform("init: this checkpoint has no record of its training classes, so they cannot be recognised")
    return {"init_classes": classes and classes.plain(), "init_tasks": tasks}


def load_split(
    dataset: Dataset, split: str, hardware: Hardware, record: dict[str, Any], resumed: Mapping[str, Any]
) -> EpisodeSource:
    """One split of a run. Those to validate and to test on have no classes that were trained on.

    Args:
        dataset: the dataset.
        split: "train" or "trainval", one of which must be loaded first; "validation", whose classes
            `trainval` trains on; or "test".
        hardware: the device.
        record: of the run, which gets the entries that identify its data.
        resumed: the content of the checkpoint that is resumed; empty for a new run.

    Raises:
        DataError: the run cannot be resumed because its training classes, or descriptions, are others now.
    """
    source = build_source(dataset, split, hardware)
    record.setdefault("fingerprints", {})[split] = source.fingerprint
    record.setdefault("descriptions", {})[split] = source.described_by()
    require_same_descriptions(resumed, split, source)
    trained = split in ("train", "trainval")
    if trained:
        require_same_classes(resumed, source)
        classes = TrainedClasses.of(source)
        record["train_classes"] = classes and classes.plain()
        record["train_tasks"] = list(source.tasks)
    compare_with([resumed], split, source)
    if trained:
        return source
    if split == "validation" and "trainval" in record["fingerprints"]:
        inform("trainval=true: validates on classes that are trained on, so best.pt has the newest weights")
        return source
    other = "test.episodes=0" if split == "test" else "trainval=true, which validates on trained classes"
    instead = f"choose another dataset, or set {other}"
    return without_trained(source, {"this run": trained_classes(record)}, instead=instead)


def without_trained(
    source: EpisodeSource, trained: Trained, keep: str = "", instead: str = INSTEAD
) -> EpisodeSource:
    """A split without the classes that any of some models was trained on.

    Args:
        source: the split. Without classes, as for a regression, it is returned as it is.
        trained: the classes that each model was trained on.
        keep: the setting that keeps these classes, which are then only counted; "" leaves them out.
        instead: what to do if no class is left, for the message.

    Raises:
        DataError: no class is left.
    """
    if not isinstance(source, ClassStore):
        return source
    known: set[int] = set()
    for model, classes in trained.items():
        if classes is None:
            inform(
                f"{model}: this checkpoint has no record of its training classes, so classes of "
                f"{source.name} that it was trained on cannot be recognised"
            )
            continue
        found = classes.among(source)
        known |= set(found.classes)
        if found.classes:
            only_name = f" ({len(found.same_name)} of them only by name)" if found.same_name else ""
            inform(
                f"{model} was trained on {len(found.classes)} of the {len(source.names)} classes of "
                f"{source.name}{only_name}, such as {source.names[found.classes[0]]!r}; "
                + (f"{keep} keeps them, and the results are not for new classes" if keep else "left out")
            )
    if not known or keep:
        return source
    if len(known) == len(source.names):
        raise DataError(f"{source.name}: the model was trained on all of its {len(known)} classes; {instead}")
    return source.keeping([i for i in range(len(source.names)) if i not in known])


def without_trained_tasks(
    source: EpisodeSource, contents: Mapping[str, Mapping[str, Any]], keep: str = ""
) -> EpisodeSource:
    """A split without the stored tasks, such as patients, that any of some models was trained on.

    They are recognised by their names: tasks that differ may have rows in common, as assays have molecules.

    Args:
        source: the split. Without stored tasks it is returned as it is.
        contents: of the checkpoints, by the names of the models.
        keep: as for `without_trained`.

    Raises:
        DataError: no task is left.
    """
    if not isinstance(source, TableTasks):
        return source
    known: set[int] = set()
    for model, content in contents.items():
        before = set(trained_tasks(content))
        if found := [i for i, name in enumerate(source.tasks) if name in before]:
            known |= set(found)
            inform(
                f"{model} was trained on tasks of the same names as {len(found)} of the {len(source.tasks)} "
                f"tasks of {source.name}, such as {source.tasks[found[0]]!r}; "
                + (f"{keep} keeps them, and the results may not be for new tasks" if keep else "left out")
            )
    if not known or keep:
        return source
    if len(known) == len(source.tasks):
        raise DataError(
            f"{source.name}: the model was trained on tasks of the names of all of its {len(known)} tasks; "
            "choose another dataset or split, or trained_classes=keep to evaluate on them"
        )
    return source.keeping([i for i in range(len(source.tasks)) if i not in known])


def note_weights(model: str, settings: TrainConfig, choices: Mapping[str, Any]) -> None:
    """Report that a backbone started from other weights, whose training classes have no record."""
    if weights := pretrained_by(settings):
        named = in_options(weights, {"backbone": settings.backbone}, choices)
        inform(f"{model}: the classes that {named} was trained on are not known, and not left out")


def pretrained_by(settings: TrainConfig) -> str:
    """The setting that gives the backbone pretrained weights, as it is typed; "" if there is none."""
    if weights := settings.backbone.get("weights"):
        return f"backbone.weights={weights}"
    cls = get_class(settings.backbone["_target_"])
    if not in_metarun(cls) and callable(getattr(cls, "load_weights", None)):
        return f"backbone={cls.__name__}"
    return "backbone.pretrained=true" if settings.backbone.get("pretrained") else ""


def compare_with(contents: Sequence[Mapping[str, Any]], split: str, source: EpisodeSource) -> None:
    """Report if a split is not the one that the runs of checkpoints had."""
    before = {(content.get("fingerprints") or {}).get(split) for content in contents} - {None}
    if before - {source.fingerprint}:
        inform(f"{source.name}: its data has changed since the model was trained")


def require_same_descriptions(content: Mapping[str, Any], split: str, source: EpisodeSource) -> None:
    """Raise DataError if a run cannot be resumed because the descriptions of its classes are others now."""
    before = (content.get("descriptions") or {}).get(split)  # older checkpoints have none
    if before is not None and before != source.described_by():
        raise DataError(
            f"{source.name}: the descriptions of its classes have changed since the run was started; restore "
            "them, or start a new run"
        )


def require_same_classes(content: Mapping[str, Any], train: EpisodeSource) -> None:
    """Raise DataError if a run cannot be resumed because its training classes or tasks are others now."""
    classes, own = TrainedClasses.from_plain(content.get("train_classes")), TrainedClasses.of(train)
    what, before, now = "tasks", list(content.get("train_tasks") or ()), list(train.tasks)
    if classes and own:
        what, before, now = "classes", classes.names, own.names
    if not before or not now or before == now:
        return
    added, gone = sorted(set(now) - set(before)), sorted(set(before) - set(now))
    example = f"{added[0]!r} was not there" if added else f"{gone[0]!r} is missing" if gone else "their order"
    raise DataError(
        f"{train.name}: the training {what} have changed since the run was started "
        f"({len(before)} then, {len(now)} now, {example}); restore the data, or start a new run"
    )
