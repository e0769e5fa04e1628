"""Published results beside those of a run, for `metarun train` and `eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from metarun.commands.cells import Cell
from metarun.config.published import Outcome, Verdict, published_in, verdicts
from metarun.config.schema import EvalConfig
from metarun.inference.model import Model
from metarun.reporting.console import console
from metarun.tasks.objectives import Metric
from metarun.training.evaluation import Result

STYLES = {"reproduced": "green", "short": "yellow", "another protocol": ""}


def outcome_of(
    result: Result,
    metric: Metric,
    choices: Mapping[str, str],
    overrides: Sequence[str],
    config: Mapping[str, Any],
    split: str = "test",
    model: str = "",
    steps: int | None = None,
    rate: float | None = None,
) -> Outcome:
    """The result of a run on test tasks; the arguments are those of `Outcome`."""
    return Outcome(
        metric=metric.name,
        scale=metric.scale,
        higher_is_better=metric.higher_is_better,
        mean=result.mean_of(metric),
        interval=result.interval_of(metric),
        ways=result.shape.ways,
        shots=result.shape.shots,
        transductive=result.uses_query_statistics,
        choices=choices,
        overrides=overrides,
        split=split,
        model=model,
        config=config,
        steps=steps,
        rate=rate,
    )


def verdicts_of(cells: Sequence[Cell], command: EvalConfig) -> list[Verdict]:
    """The verdicts on evaluated runs of recipes, model by model."""
    found = []
    models = {id(cell.model): cell.model for cell in cells if isinstance(cell.model, Model)}
    for model in models.values():
        own = [cell for cell in cells if cell.model is model and cell.result and not cell.shape.varied]
        outcomes = [
            outcome_of(
                cell.result,  # type: ignore[arg-type]
                cell.metrics[0],
                {**model.content["choices"], "dataset": cell.dataset},
                model.content["overrides"],
                model.content["config"],
                command.split,
                model.name if len(models) > 1 else "",
                cell.steps,
                cell.rate,
            )
            for cell in own
        ]
        found += verdicts(published_in(model.content["config"]), outcomes)
    return found


def table_of(found: Sequence[Verdict], model: str) -> Table:
    """The table of the verdicts on one model; its name is "" if there are no others."""
    table = Table(title=Text(f"{model} beside the paper".strip()), box=None, padding=(0, 2, 0, 0))
    table.add_column("task", no_wrap=True)
    for heading in ("published", "here", "difference"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict")
    for each in found:
        here, unit = each.here, " %" if each.here.scale == 100 else ""
        mean, half = here.scale * here.mean, here.scale * here.interval
        table.add_row(
            each.published.task,
            each.published.shown,
            f"{mean:.2f} ± {half:.2f}{unit}" if unit else f"{mean:.4g} ± {half:.2g}",
            f"{each.difference:+.2f}{unit}" if unit else f"{each.difference:+.4g}",
            Text(each.words.partition(": ")[0], style=STYLES[each.kind]),
        )
    return table


def differences(found: Sequence[Verdict]) -> list[str]:
    """What differs from the papers' protocols, in lines of their own: a cell would break long settings."""
    tasks: dict[str, list[str]] = {}
    for each in found:
        if what := each.words.partition(": ")[2]:
            tasks.setdefault(what, []).append(each.published.task)
    return [f"another protocol ({', '.join(own)}): {what}" for what, own in tasks.items()]


def report_verdicts(found: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Print a table of the verdicts of each model, if any; returns them as plain values for a result file."""
    if not found:
        return []
    for model in dict.fromkeys(each.here.model for each in found):
        own = [each for each in found if each.here.model == model]
        console.print(table_of(own, model))
        for line in differences(own):
            console.print(Text(line), soft_wrap=True)
    papers = dict.fromkeys(f"{each.published.paper}, {each.published.where}" for each in found)
    console.print(Text(f"published: {'; '.join(papers)}"), soft_wrap=True)
    return [
        {
            "paper": each.published.paper,
            "where": each.published.where,
            "ways": each.published.ways,
            "shots": each.published.shots,
            "steps": each.published.steps,
            "settings": each.published.typed,
            "published": each.published.value,
            "published interval": each.published.interval,
            "here": each.here.scale * each.here.mean,
            "here interval": each.here.scale * each.here.interval,
            "difference": each.difference,
            "verdict": each.words,
        }
        for each in found
    ]
