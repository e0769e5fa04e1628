"""The end of `metarun train`: result.json, and a panel with the results and the next command."""

from __future__ import annotations

import shlex
from typing import Any

from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from metarun.commands.verdicts import outcome_of, report_verdicts
from metarun.config.published import published_in, verdicts
from metarun.config.targets import trust_words
from metarun.errors import counted
from metarun.reporting.console import console, print_line, relative
from metarun.storage.files import write_json
from metarun.training.evaluation import Result
from metarun.training.trainer import Trainer


def report(trainer: Trainer, test: Result | None, name: str) -> None:
    """Write result.json, and print a panel with the results, the paths and the next command."""
    best, folder, metric = trainer.best, trainer.folder, trainer.metrics[0]
    assert best
    result: dict[str, Any] = {
        "name": name,
        "overrides": trainer.record["overrides"],
        "iterations": trainer.iteration,
        "seconds": round(trainer.seconds, 2),
        "metric": metric.name,
        "validation": {"iteration": best.iteration, "mean": best.score, "interval": best.interval},
        "checkpoint": str((folder / "best.pt").resolve()),
    }
    figure = metric.show_interval(best.score, best.interval)
    which = "trained classes" if trainer.settings.newest else "best"
    lines = [("validation", f"{metric.name} {figure}  ({which}, iteration {best.iteration})")]
    if best.iteration == 0 < trainer.iteration:
        lines.append(("", "training did not help: best.pt is the start of the run"))
    if trainer.stopped_by:
        result["stopped_by"] = trainer.stopped_by
    if test is not None:
        task = trainer.train_source.spec.task_name(test.shape)
        result["test"] = {"task": task, **test_record(test)}
        unit = trainer.train_source.spec.tasks.unit
        kind = ", transductive" if test.uses_query_statistics else ""
        for each in test.metrics:
            if each.name == metric.before and test.mean_of(each) == test.mean:
                continue  # a policy with a memory may have played nothing before
            figure = each.show_interval(test.mean_of(each), test.interval_of(each))
            about = f"  ({task}, {test.episodes} {unit}{kind})" if each is metric else ""
            lines.append(("test" if each is metric else "", f"{each.name} {figure}{about}"))
        lines += [("", test.shape.chance)] * bool(test.shape.chance)
        for part, own in test.parts.items():
            lines.append(("", f"{metric.show_interval(own.mean, own.interval)}  {part}"))
    if test is not None and not test.shape.varied:
        record = trainer.record
        here = outcome_of(test, metric, record["choices"], record["overrides"], record["config"])
        result["verdicts"] = report_verdicts(verdicts(published_in(record["config"]), [here]))
    write_json(folder / "result.json", result)
    (folder / "failure.json").unlink(missing_ok=True)  # it may exist from an earlier attempt in a sweep
    place, early = relative(folder), f", ended by {trainer.stopped_by}" if trainer.stopped_by else ""
    lines += [
        ("trained", f"{counted(trainer.iteration, 'iteration')} in {trainer.seconds:.0f} s{early}"),
        ("folder", place),
        ("", "best.pt  last.pt  learning_curve.png  metrics.jsonl  result.json"),
    ]
    table = Table.grid("", Column(overflow="fold"), padding=(0, 2))
    for label, text in lines:
        table.add_row(label, Text(text))
    console.print(Panel(table, title=Text(name), expand=False))
    # Below the panel, so that users can copy the whole line.
    print_line(
        f"next: metarun eval {shlex.join([f'checkpoint={place}', *trust_words(trainer.record['config'])])}"
    )


def test_record(test: Result) -> dict[str, Any]:
    """The results of the test as plain values; accuracies are in [0, 1]."""
    record: dict[str, Any] = {
        "mean": test.mean,
        "interval": test.interval,
        "metrics": {
            each.name: {"mean": test.mean_of(each), "interval": test.interval_of(each)}
            for each in test.metrics
        },
        "episodes": test.episodes,
        "episodes_hash": test.episodes_hash,
        "uses_query_statistics": test.uses_query_statistics,
    }
    if test.parts:
        record["datasets"] = {
            part: {"mean": own.mean, "interval": own.interval, "episodes_hash": own.episodes_hash}
            for part, own in test.parts.items()
        }
    return record
