"""Rewrite the generated tables of the README and of the documents in place.

    python docs/tables.py            write them
    python docs/tables.py --check    exit 1 and name the files whose tables are not up to date

A table stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`. What it says is read from the options'
YAML files (their names, and facts such as `# paper: Finn et al. 2017` in the header), from the methods
themselves, and from metarun/tasks/objectives.py.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from metarun.algorithms.base import Algorithm
from metarun.algorithms.baseline import Classifier
from metarun.algorithms.maml import MAML
from metarun.config.build import build_algorithm, build_dataset
from metarun.config.changes import key_of
from metarun.config.comments import METHODS, facts
from metarun.config.paths import CONF
from metarun.config.published import Published, published_in, task_name
from metarun.config.schema import Node, TrainConfig, register_frames, typed
from metarun.config.unread import shown
from metarun.errors import ConfigError
from metarun.reporting.destinations import flat
from metarun.tasks.episodes import EpisodeShape
from metarun.tasks.objectives import CLASSIFICATION, DISTRIBUTIONS, REGRESSION, Metric
from metarun.tasks.rollouts import Rollouts
from metarun.training.hardware import Hardware

ROOT = Path(__file__).resolve().parents[1]
SMALL = ("backbone.width=8", "dataset.size=16")
CPU = Hardware("cpu")
#: The kinds of tasks by their headings, each with an example.
KINDS = {
    "images": ("dataset=glyphs",),
    "texts": ("dataset=phrases", "backbone=text_cnn", "backbone.width=8"),
    "values of functions": ("dataset=sinusoid", "backbone=mlp"),
    "their distributions": ("dataset=sinusoid", "backbone=mlp", "dataset.likelihood=gaussian"),
    "environments": ("dataset=navigation2d", "backbone=mlp_policy"),
}
FAMILIES = {
    "gradient": "gradient-based ([compared](docs/gradient_based.md))",
    "features": "feature-based ([compared](docs/feature_based.md))",
    "memory": "with a memory, for environments ([explained](docs/reinforcement.md))",
    "process": "neural processes, for regression ([explained](docs/regression.md))",
}


def options(group: str) -> dict[str, dict[str, str]]:
    """The facts of every option of a group, by its name."""
    return {path.stem: facts(path) for path in sorted((CONF / group).glob("*.yaml"))}


def methods(family: str) -> dict[str, dict[str, str]]:
    """The facts of the algorithms of a family, by year and then by name."""
    own = [(name, stated) for name, stated in options("algorithm").items() if stated["family"] == family]
    return dict(sorted(own, key=lambda item: re.findall(r"\d{4}", item[1]["paper"]) or ["none"]))


def markdown(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(headings), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


@cache
def settings_of(*words: str) -> TrainConfig:
    """The settings of a run of `metarun train` with these words, on a CPU."""
    register_frames()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed(compose("train", [*words, "hardware=cpu"]))


def built(name: str, **other: Node) -> Algorithm:
    """A small network with the method of this name, for ten training classes; `other`: nodes of groups."""
    settings = replace(settings_of(f"algorithm={name}", *SMALL), **other)
    spec = build_dataset(settings.dataset).spec
    spec = replace(
        spec, classes=10 if spec.outputs is None and not issubclass(spec.tasks, Rollouts) else None
    )
    return build_algorithm(settings, spec, CPU)


def trained_names(algorithm: Algorithm, *besides: str) -> list[str]:
    """The names of the parameters that are trained, without those that start with one of `besides`."""
    named = algorithm.named_parameters()
    return [name for name, p in named if p.requires_grad and not name.startswith(besides)]


def gradient_methods() -> str:
    headings = ["`algorithm=`", "adapts", "inner step", "learned besides the weights", "meta-gradient"]
    rows = []
    for name, stated in methods("gradient").items():
        algorithm = built(name)
        assert isinstance(algorithm, MAML), name
        rules = {
            rule.removeprefix("inner_loop.").split(".")[0] for rule in trained_names(algorithm, "learner.")
        }
        cells = [adapts(algorithm), stated["inner step"], listed(rules), stated["meta-gradient"]]
        rows.append([f"`{name}`", *cells, stated["memory in steps"], stated["paper"]])
    return markdown([*headings, "memory in steps", "paper"], rows)


def adapts(algorithm: MAML) -> str:
    """Which weights an inner step changes."""
    names = [name for name, _ in algorithm.learner.named_parameters()]
    fast = [name for name in names if algorithm.is_fast(name)]
    if all(name.endswith(".context") for name in fast):
        return "a context"
    heads = {name.startswith("head.") for name in fast}
    if len(heads) == 2:
        return "all" if len(fast) == len(names) else "all but the norms"
    return "the head" if heads == {True} else "the body"


def update_rules() -> str:
    """The inner loops that each gradient-based method can be built with."""
    found: dict[str, list[str]] = {}
    rules = [rule for rule, stated in options("inner_loop").items() if METHODS not in stated]
    rules.remove("none")
    for name in sorted(methods("gradient")):
        own = OmegaConf.load(CONF / "algorithm" / f"{name}.yaml").get("inner_loop", {})
        known = [rule for rule in rules if takes_rule(name, rule, own)]
        found.setdefault(", ".join(f"`{rule}`" for rule in known), []).append(f"`{name}`")
    rows = sorted(([", ".join(names), rules] for rules, names in found.items()), key=lambda row: -len(row[1]))
    return markdown(["`algorithm=`", "`inner_loop=`"], rows)


def takes_rule(name: str, rule: str, own: Node) -> bool:
    node = settings_of(f"inner_loop={rule}", "algorithm=maml").inner_loop
    if not set(own) <= set(node):  # such as `order`, which not every rule has
        return False
    try:
        built(name, inner_loop={**node, **own})
    except ConfigError:
        return False
    return True


def kinds_of_tasks() -> str:
    """The kinds of tasks that each method takes, of all families."""
    found: dict[tuple[str, ...], list[str]] = {}
    for name in sorted(options("algorithm")):
        cells = tuple("yes" if takes_tasks(name, *words) else "no" for words in KINDS.values())
        found.setdefault(cells, []).append(f"`{name}`")
    rows = [[", ".join(names), *cells] for cells, names in sorted(found.items(), reverse=True)]
    return markdown(["`algorithm=`", *KINDS], rows)


def takes_tasks(name: str, *words: str) -> bool:
    other = settings_of(*words)
    nodes = {"dataset": other.dataset} | ({"backbone": other.backbone} if len(words) > 1 else {})
    dataset = build_dataset(other.dataset)
    if settings_of(f"algorithm={name}", *SMALL).augment and dataset.spec.kind != "images":
        return False
    try:
        algorithm = built(name, **nodes)
        if dataset.spec.outputs is not None:  # functions, which are drawn as they are needed
            source = dataset.load("train", torch.device("cpu"))
            algorithm.check_source(source, EpisodeShape(1, 5, 5))
    except ConfigError:
        return False
    return True


def feature_methods() -> str:
    headings = ["`algorithm=`", "support set becomes", "query is answered by", "trained on"]
    rows = []
    for name, stated in methods("features").items():
        algorithm = built(name)
        trained = "all training classes" if isinstance(algorithm, Classifier) else "episodes"
        parts = {part.split(".")[0].replace("_", " ") for part in trained_names(algorithm, "backbone.")}
        cells = [stated["support"], stated["query"], trained, listed(parts), ways_of(algorithm)]
        rows.append([f"`{name}`", *cells, stated["paper"]])
    return markdown([*headings, "learned besides the backbone", "ways of a new task", "paper"], rows)


def memory_methods() -> str:
    headings = ["`algorithm=`", "memory", "reads at each step", "a task is", "trained by", "critic", "paper"]
    rows = []
    for name, stated in methods("memory").items():
        cells = [stated[fact] for fact in ("memory", "reads", "task", "trained by", "critic", "paper")]
        rows.append([f"`{name}`", *cells])
    return markdown(headings, rows)


def neural_processes() -> str:
    facts = ("deterministic path", "latent path", "trained by", "predictions", "likelihood", "paper")
    own = methods("process").items()
    rows = [[f"`{name}`", *(stated[fact] for fact in facts)] for name, stated in own]
    return markdown(["`algorithm=`", *facts], rows)


def ways_of(algorithm: Algorithm) -> str:
    try:
        algorithm.check(6)  # one more than it was built for
    except ConfigError:
        return "as trained, or fewer"
    return "any"


def listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "-"


def datasets() -> str:
    rows = [
        [
            f"`{name}`",
            stated["classes"],
            stated["items"],
            stated["from"].replace("dataset.root", "`dataset.root`"),
        ]
        for name, stated in options("dataset").items()
    ]
    return markdown(["`dataset=`", "classes (train / validation / test)", "items", "source"], rows)


def metrics() -> str:
    known = {metric.name for metric in REGRESSION.available}
    kinds = {
        "classification": CLASSIFICATION.available,
        "regression": REGRESSION.available,
        "regression, distributions": [m for m in DISTRIBUTIONS.available if m.name not in known],
    }
    rows = [
        [f"`{metric.name}`", kind, metric.title, *described(metric)]
        for kind, available in kinds.items()
        for metric in available
    ]
    return markdown(["name", "tasks", "title", "what it is", "better", "shown as"], rows)


def described(metric: Metric) -> list[str]:
    """What it is, by the first line of its function's docstring; its direction; how a score is shown."""
    meaning = (metric.score.__doc__ or "").splitlines()[0].replace(", [T]", "").rstrip(".")
    better = "higher" if metric.higher_is_better else "lower"
    if metric.aim is not None:
        better = f"nearest to {metric.show(metric.aim)}"
    return [meaning, better, metric.show(0.5)]


def all_options() -> str:
    methods = ("algorithm", "dataset", "backbone", "inner_loop", "outer_loop")
    groups = (
        *methods,
        "normalise",
        "initial_weights",
        "sampler",
        "augment",
        "train_tasks",
        "hardware",
        "tracker",
        "recipe",
    )
    return markdown(["group", "options"], [[f"`{group}`", row_of(group)] for group in groups])


def row_of(group: str) -> str:
    """The options of a group: by family where they have one, the default first."""
    default = default_of(group)
    families: dict[str, list[str]] = {}
    for name, stated in sorted(options(group).items(), key=lambda item: item[0] != default):
        notes = [*(["default"] if name == default else []), *([stated["note"]] if "note" in stated else [])]
        if METHODS in stated:
            notes.append("for " + " and ".join(f"`{each}`" for each in stated[METHODS].split(", ")))
        words = f"`{name}`" + (f" ({', '.join(notes)})" if notes else "")
        families.setdefault(stated.get("family", ""), []).append(words)
    order = sorted(families.items(), key=lambda item: [*FAMILIES, ""].index(item[0]))
    return "; ".join(
        (f"{FAMILIES[family]}: " if family else "") + ", ".join(words) for family, words in order
    )


def default_of(group: str) -> str | None:
    """The option of a group that `metarun train` uses where none is chosen."""
    chosen = (each for each in OmegaConf.load(CONF / "train.yaml").defaults if OmegaConf.is_dict(each))
    return next((each[group] for each in chosen if group in each), None)


def published() -> str:
    """The results of papers in the files of the recipes."""
    rows = []
    for path in sorted((CONF / "recipe").glob("*.yaml")):
        for each in published_in(OmegaConf.to_container(OmegaConf.load(path))):  # type: ignore[arg-type]
            task = f"{each.dataset}, {each.task}"
            facts = [task, each.shown, "yes" if each.transductive else "no", each.backbone]
            rows.append(
                [
                    f"`{' '.join([path.stem, *each.typed])}`",
                    *facts,
                    str(each.episodes or "not stated"),
                    *source_of(each),
                ]
            )
    headings = [
        "`recipe=`",
        "task",
        "published",
        "transductive",
        "`backbone=`",
        "test tasks",
        "source",
        "differs here",
    ]
    return markdown(headings, rows)


def source_of(each: Published) -> list[str]:
    """The paper with its table, and what is always another protocol here."""
    doubt = f" (not verified: {each.unverified})" if each.unverified else ""
    return [f"{each.paper}, {each.where}{doubt}", each.differs or "-"]


def reproduced() -> str:
    """The runs of recipes in benchmarks/results/reproduced, beside their published results."""
    rows = []
    for path in sorted((ROOT / "benchmarks" / "results" / "reproduced").glob("*.json")):
        run = json.loads(path.read_text("utf-8"))
        for each in run["verdicts"]:
            task, here = task_name(each["ways"], each["shots"], each.get("steps")), each["here"]
            length = f"{run['iterations']:,} of {run['of']:,}"
            device = run["machine"]["device"].partition(",")[0]
            words = [run["recipe"], *each.get("settings", [])]
            cells = [f"`{' '.join(words)}`", task, f"{each['published']:g}"]
            cells += [f"{here:.4g} ± {each['here interval']:.2g}", each["verdict"], length]
            note = "; ".join(filter(None, [run["note"], changed_since(run)]))
            rows.append([*cells, f"{run['seconds'] / 60:.1f}, {device}", note or "-"])
    headings = ["`recipe=`", "task", "published", "here", "verdict", "iterations", "minutes, on", "note"]
    return markdown(headings, rows)


def changed_since(run: dict[str, Any]) -> str:
    """The settings that a recipe has now, and had not when a run of it was made; "" if there are none."""
    recipe = OmegaConf.to_container(OmegaConf.load(CONF / "recipe" / f"{run['recipe']}.yaml"))
    assert isinstance(recipe, dict)
    now = flat({name: value for name, value in recipe.items() if name not in ("defaults", "published")})
    then, known = dict(flat(run["config"])), {key_of(override) for override in run.get("overrides", ())}
    new = [f"{key}={shown(value)}" for key, value in now if key not in known and then.get(key) != value]
    return f"before the recipe had `{' '.join(new)}`" if new else ""


#: The tables by the names of their markers: the file that each is in, and what writes it.
TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "options": ("README.md", all_options),
    "datasets": ("docs/data.md", datasets),
    "gradient-based methods": ("docs/gradient_based.md", gradient_methods),
    "feature-based methods": ("docs/feature_based.md", feature_methods),
    "methods with a memory": ("docs/reinforcement.md", memory_methods),
    "neural processes": ("docs/regression.md", neural_processes),
    "update rules": ("docs/gradient_based.md", update_rules),
    "kinds of tasks": ("docs/data.md", kinds_of_tasks),
    "metrics": ("docs/metrics.md", metrics),
    "published results": ("docs/published.md", published),
    "reproduced results": ("docs/published.md", reproduced),
}


@cache
def table(name: str) -> str:
    return TABLES[name][1]()


def with_tables(file: str, text: str) -> str:
    """The text of a file with its tables as they should be. ValueError where their markers are missing."""
    for name in (name for name, (own, _) in TABLES.items() if own == file):
        begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
        if not (begin in text and end in text.partition(begin)[2]):
            raise ValueError(f"{file}: needs one table between {begin.strip()} and {end.strip()}")
        before, _, rest = text.partition(begin)
        text = before + begin + table(name) + end + rest.partition(end)[2]
    return text


def main(arguments: list[str], root: Path = ROOT) -> int:
    """Write the tables below `root`, or with `--check` compare them; 1 where a file is not up to date."""
    if unknown := set(arguments) - {"--check"}:
        print(f"{' '.join(sorted(unknown))}: unknown argument; the only one is --check", file=sys.stderr)
        return 2
    status = 0
    for file in dict.fromkeys(file for file, _ in TABLES.values()):
        path = root / file
        before = path.read_text("utf-8")
        after = with_tables(file, before)
        if before == after:
            continue
        if arguments:
            print(f"{file}: its tables are not up to date; run python docs/tables.py", file=sys.stderr)
            status = 1
        else:
            path.write_text(after, "utf-8")
            print(f"{file}: updated")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
