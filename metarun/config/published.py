"""Published results that recipes repeat, and how far a run is from them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from metarun.errors import ConfigError, counted

# Typed settings that make another protocol of a recipe; where its files are does not.
OF_PROTOCOL = re.compile(
    r"\+*(norm|augment|trainval|(normalise|initial_weights)(\.\w+)?|backbone\.\w+|dataset\.(?!(root|download|descriptions|vectors|encoder)\b)[\w.]+)"
)

SHORTENED = re.compile(r"\+*(iterations|meta_batch)")  # typed settings that explain a lower result


@dataclass(frozen=True)
class Published:
    """One result of a paper.

    Args:
        paper: authors and year.
        where: the table or section.
        algorithm, dataset, backbone: the options that the paper's protocol is run with here.
        ways, shots: of the test tasks.
        value: the result: a percentage for accuracy.
        interval: half of its 95 % interval; None: not stated.
        episodes: the number of test tasks; None: not stated.
        transductive: whether the queries of a task are predicted together.
        metric: of the value.
        differs: what is always another protocol here; "" if nothing is.
        unverified: what of this entry was not looked up in the paper itself; "" if all was.
        settings: further settings of the run that the result is of, such as {"algorithm.context": 2}.
        steps: inner steps at test; None: those of the recipe.
    """

    paper: str
    where: str
    algorithm: str
    dataset: str
    backbone: str
    ways: int
    shots: int
    value: float
    interval: float | None
    episodes: int | None
    transductive: bool
    metric: str = "accuracy"
    differs: str = ""
    unverified: str = ""
    settings: Mapping[str, Any] | None = None
    steps: int | None = None

    @property
    def task(self) -> str:
        """The test tasks, for people."""
        return task_name(self.ways, self.shots, self.steps)

    @property
    def typed(self) -> list[str]:
        """Its further settings as words of a command line."""
        return [f"{key}={value}".replace(" ", "") for key, value in (self.settings or {}).items()]

    @property
    def shown(self) -> str:
        """The value with its interval, for people."""
        unit = " %" if self.metric == "accuracy" else ""
        half = "" if self.interval is None else f" ± {self.interval:g}"
        return f"{self.value:g}{half}{unit}"


@dataclass(frozen=True)
class Outcome:
    """The result of a run on test tasks.

    Args:
        metric: the name of its first metric.
        scale: what its numbers are multiplied by before they are shown: 100 for percentages.
        higher_is_better: the direction of the metric.
        mean, interval: the result.
        ways, shots: of the tasks.
        transductive: whether queries were predicted together.
        choices: the options of the groups of the run, and the dataset that was tested on.
        overrides: the typed settings of the run.
        split: that was tested on.
        model: its name, where several are compared.
        config: all settings of the run.
        steps: inner steps at test; None: as in the config.
        rate: inner rate at test, if it was chosen for it.
    """

    metric: str
    scale: int
    higher_is_better: bool
    mean: float
    interval: float
    ways: int
    shots: int
    transductive: bool
    choices: Mapping[str, str]
    overrides: Sequence[str]
    split: str = "test"
    model: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    steps: int | None = None
    rate: float | None = None

    @property
    def own_steps(self) -> int | None:
        """The inner steps at test in the config of the run; None for a method without an inner loop."""
        test = self.setting("inner_loop.test_steps")
        return self.setting("inner_loop.steps") if test is None else test

    def setting(self, key: str) -> Any:
        """A setting of the run by its key, such as "algorithm.context"; None if there is none."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value


@dataclass(frozen=True)
class Verdict:
    """A published result beside the one of a run.

    Args:
        published: the published result.
        here: the result of the run.
        words: "reproduced"; "short by x" and a shorter training; or "another protocol: " and what differs.
        kind: the first of these words.
    """

    published: Published
    here: Outcome
    words: str
    kind: Literal["reproduced", "short", "another protocol"]

    @property
    def difference(self) -> float:
        """The result of the run less the published one, in the units that are shown."""
        return self.here.scale * self.here.mean - self.published.value


def task_name(ways: int, shots: int, steps: int | None) -> str:
    """The name of tasks, with the number of inner steps where a result states it."""
    with_steps = "" if steps is None else f", {counted(steps, 'step')}"
    return f"{ways}-way {shots}-shot{with_steps}"


def published_in(config: Mapping[str, Any]) -> list[Published]:
    """The published results in a config, checked to be complete; none without a recipe.

    Raises:
        ConfigError: an entry is incomplete or has values of other types.
    """
    entries = config.get("published")
    if entries is None:
        return []
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise ConfigError("published: must be a list of results, as in conf/recipe")
    return [entry_of(i, entry) for i, entry in enumerate(entries)]


def entry_of(number: int, entry: Any) -> Published:
    """One published result. Raises ConfigError."""
    where, known = f"published.{number}", {field.name: field for field in dataclasses.fields(Published)}
    if not isinstance(entry, Mapping):
        raise ConfigError(f"{where}: must be a result with {', '.join(known)}")
    needed = [name for name, field in known.items() if field.default is dataclasses.MISSING]
    if missing := [name for name in needed if name not in entry]:
        raise ConfigError(f"{where}: has no {missing[0]}; add it, as null if the paper does not state it")
    if unknown := [name for name in entry if name not in known]:
        raise ConfigError(f"{where}.{unknown[0]}: there is no such fact; it has {', '.join(known)}")
    hints = get_type_hints(Published)
    for name, value in entry.items():
        own = int | float if hints[name] is float else hints[name]
        own = int | float | None if hints[name] == float | None else own
        own = Mapping | None if name == "settings" else own
        if not isinstance(value, own) or (isinstance(value, bool) and hints[name] is not bool):
            raise ConfigError(f"{where}.{name}={value}: is not of the right type")
    return Published(**entry)


def verdicts(entries: Iterable[Published], outcomes: Iterable[Outcome]) -> list[Verdict]:
    """A verdict for each outcome on tasks that a paper has a result for.

    If no outcome is on such tasks, the first one is compared with the first result.
    """
    entries, outcomes = list(entries), list(outcomes)
    found = [verdict(entry, one) for one in outcomes if (entry := matching(entries, one))]
    return found or [verdict(entries[0], one) for one in outcomes[:1] if entries]


def matching(entries: Sequence[Published], here: Outcome) -> Published | None:
    """The published result for tasks of the same ways and shots.

    If possible, it is of the same inner steps and further settings, as many as there are, and also as
    transductive.
    """
    same = [each for each in entries if (each.ways, each.shots) == (here.ways, here.shots)]

    def rank(each: Published) -> tuple[bool, int, int, bool]:
        settings, steps = len(each.settings or ()), bool(other_steps(each, here))
        return steps, len(other_settings(each, here)), -settings, each.transductive != here.transductive

    return min(same, key=rank, default=None)


def other_settings(published: Published, here: Outcome) -> list[str]:
    """The further settings of a published result that a run has not."""
    wanted = (published.settings or {}).items()
    return [f"{k}={here.setting(k)}, not {value}" for k, value in wanted if here.setting(k) != value]


def other_steps(published: Published, here: Outcome) -> list[str]:
    """The number of inner steps, if it is not that of a published result."""
    wanted = here.own_steps if published.steps is None else published.steps
    taken = here.own_steps if here.steps is None else here.steps
    return [] if taken == wanted else [f"{taken} inner steps, not {wanted}"]


def verdict(published: Published, here: Outcome) -> Verdict:
    """How a result compares with the published one.

    It is reproduced where the published value lies inside the interval of the run, or where the run is
    better.
    """
    if differing := differences(published, here):
        return Verdict(published, here, f"another protocol: {', '.join(differing)}", "another protocol")
    sign = 1 if here.higher_is_better else -1
    mean, half = here.scale * here.mean, here.scale * here.interval
    if not math.isnan(mean) and sign * published.value <= sign * mean + half:
        return Verdict(published, here, "reproduced", "reproduced")
    gap = abs(published.value - mean)
    unit = f"{gap:.2f} %" if here.scale == 100 else f"{gap:.4g}"
    typed = [each.lstrip("+") for each in here.overrides if SHORTENED.fullmatch(each.partition("=")[0])]
    less = [each for each in typed if each.partition("=")[0] not in (published.settings or {})]
    why = f" ({', '.join(less)})" if less else ""
    return Verdict(published, here, f"short by {unit}{why}", "short")


def differences(published: Published, here: Outcome) -> list[str]:
    """What makes another protocol of a run."""
    found = [
        f"{group}={here.choices.get(group)}"
        for group in ("algorithm", "dataset", "backbone")
        if here.choices.get(group) != getattr(published, group)
    ]
    if (here.ways, here.shots) != (published.ways, published.shots):
        own, theirs = (f"{each.ways}-way {each.shots}-shot" for each in (here, published))
        found.append(f"{own}, not {theirs}")
    if here.metric != published.metric:
        found.append(f"{here.metric}, not {published.metric}")
    if here.transductive != published.transductive:
        found.append("transductive" if here.transductive else "not transductive")
    if here.split != "test":
        found.append(f"split={here.split}")
    if here.rate is not None:
        found.append(f"inner rate {here.rate:g}, chosen for the test")
    found += other_steps(published, here) + other_settings(published, here)
    typed = [each.lstrip("+") for each in here.overrides if OF_PROTOCOL.fullmatch(each.partition("=")[0])]
    found += [each for each in typed if each.partition("=")[0] not in (published.settings or {})]
    return found + [published.differs] * bool(published.differs)
