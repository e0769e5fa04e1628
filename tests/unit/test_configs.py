"""Every YAML is composed, checked and built; each opens with the command that runs it."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers.build import built, composed, composed_with_choices
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from metarun.cli.overrides import Failed, arrange
from metarun.commands.starting import check_method
from metarun.commands.train import GROUPS as STORED
from metarun.config.build import build_dataset, instantiate
from metarun.config.check import check
from metarun.config.paths import CONF
from metarun.config.schema import typed
from metarun.config.variants import variant_name
from metarun.errors import ConfigError
from metarun.training.hardware import Hardware

GROUPS = ("dataset", "algorithm", "backbone", "inner_loop", "hardware")
FILES = sorted(CONF.rglob("*.yaml"))
NEEDS_MORE = {"encoder", "timm"}  # tested in test_finetuned_encoder.py and test_timm_network.py
BACKBONES = sorted({path.stem for path in (CONF / "backbone").glob("*.yaml")} - NEEDS_MORE)
SMALL = {  # a network of the same kind that is built in no time
    "conv4_joined": ["backbone.widths=[8,8,8,8]"],
    "resnet12": ["backbone.widths=[8,8,8,8]"],
    "resnet18": ["backbone.width=8"],
    "wrn28_10": ["backbone.depth=10", "backbone.width=1"],
}
FOR_TEXTS = ("adapter", "bag", "text_cnn", "text_transformer")
#: The backbones that have no layers of the kind that an algorithm changes.
REFUSED = {
    "meta_networks": (*SMALL, "adapter", "cells", "text_transformer"),  # its weights have a fast twin each
    "cnaps": FOR_TEXTS,
    "cavia": ("bag",),
}
#: One of each way in which an algorithm uses its network.
KINDS = ("maml", "maml_plus_plus", "cavia", "protonet", "cnaps", "meta_networks")


def test_what_is_not_a_default_is_named():
    typed = ["inner_loop=meta_sgd", "train_tasks=umtra", "augment=drawings", "norm=task", "varied=true"]
    cfg, choices = composed_with_choices("train", "algorithm=anil", "fixed_labels=true", *typed)
    name = (
        "anil inner_loop=meta_sgd augment=drawings train_tasks=umtra norm=task fixed_labels=true varied=true"
    )
    assert variant_name(choices, cfg) == name
    cfg, choices = composed_with_choices("train", "dataset=phrases", "algorithm=simclr", "augment=none")
    assert variant_name(choices, {"norm": "running"}) == "simclr augment=none norm=running"  # of texts: layer
    own = {"algorithm": "mine", "inner_loop": "none", "train_tasks": "umtra"}
    assert variant_name(own, {"norm": "none"}) == "mine train_tasks=umtra"
    old = {"algorithm": "../maml", "dataset": "glyphs"}  # of an older checkpoint, or of somebody else's
    assert variant_name(old, {}) == "../maml"
    assert {"normalise", "initial_weights", "pairing"} <= {*STORED}, "a checkpoint has what its name needs"
    seen, drawn = ["normalise=train", "initial_weights=xavier"], ["normalise=none", "initial_weights=pytorch"]
    cfg, choices = composed_with_choices("train", "algorithm=maml", *seen)
    assert variant_name(choices, cfg) == "maml normalise=train initial_weights=xavier"
    before = {key: value for key, value in choices.items() if key not in ("normalise", "initial_weights")}
    assert variant_name(before, cfg) == "maml"
    cfg, choices = composed_with_choices("train", "algorithm=maml", *drawn)
    assert variant_name(choices, cfg) == "maml"


@pytest.mark.parametrize("dataset", ["phrases", "navigation2d"])
def test_what_a_dataset_needs_is_not_named_in_older_checkpoints(dataset: str):
    cfg, choices = composed_with_choices("train", f"dataset={dataset}", "train_tasks=labels")
    del choices["pairing"]
    assert variant_name(choices, cfg) == choices["algorithm"]
    images = {"algorithm": "maml", "dataset": "omniglot", "backbone": "resnet12"}
    assert variant_name(images, {"norm": "task"}) == "maml backbone=resnet12 norm=task"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(CONF)))
def test_every_yaml_opens_with_its_command_which_composes_and_checks(path: Path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("# @package")]
    assert lines[0].startswith("# metarun "), lines[0]
    words = shlex.split(lines[0].removeprefix("# metarun "))
    command, words = words[0], [word for word in words[1:] if not word.startswith("checkpoint=")]
    words += ["checkpoint=x"] if command in ("eval", "adapt") else []
    if command != "predict":  # which needs them
        words = [word for word in words if not word.startswith(("support=", "query="))]
    cfg, choices = composed_with_choices(command, *words)
    assert path.stem in [
        *" ".join([command, *words]).replace("=", " ").split(),
        "none",
        choices.get("pairing"),
    ]
    check(cfg, command, typed=words)
    group = path.parent.name
    if group in GROUPS:
        assert choices[group] == path.stem, "its command does not choose it"
    if command == "train" and {word.partition("=")[0] for word in words} <= {"algorithm", "dataset"}:
        assert variant_name(choices, cfg) == choices["algorithm"], "its defaults are not named"
    if group in GROUPS and "_target_" in (cfg[group] or {}):
        expected = "metarun.training.hardware." if group == "hardware" else f"metarun.{group}s."
        assert cfg[group]._target_.startswith(expected)


def test_settings_that_are_the_iterations_of_a_run_are_stated():
    """`metarun train resume=RUN iterations=N` names them."""
    for path in (CONF / "algorithm").glob("*.yaml"):
        node = OmegaConf.load(path)
        node = OmegaConf.to_container(node.get("algorithm", node))
        names = tuple(key for key, value in node.items() if value == "${iterations}")
        # A file without a class has the settings of another one.
        assert names == (get_class(node["_target_"]).of_all_iterations if "_target_" in node else ()), path


#: Command lines of which the last word would be without effect, and what the error says.
IN_VAIN = {
    "train +inner_loop.stepz=3": "inner_loop.stepz: nothing reads it, because inner_loop has no class",
    "train ++scheduler.gamma=0.5": "scheduler.gamma: nothing reads it",
    "train +augment.flip=true": "augment.flip: nothing reads it",
    "train recipe=maml_omniglot algorithm=protonet": "inner_loop.rate: nothing reads it.* with the recipe",
    "train inner_loop=adam": "inner_loop=adam: nothing reads it in algorithm=ProtoNet",
    "train inner_rate=0.1": "inner_rate=0.1: nothing reads it here; leave it out",
    "train algorithm=reptile inner_rate=0.1": "nothing reads it here; set inner_loop.rate instead",
    "train algorithm=maml inner_loop.rate=1 inner_rate=0.1": "set inner_loop.rate instead",
    "train backbone=omniglot_cnn norm=batch": "set backbone.norm instead",
    "train algorithm=matching algorithm.reads=3": "nothing reads it with algorithm.full_context=false",
    "train algorithm=baseline inner_loop.steps=50": "nothing reads it with inner_loop.test_steps=100",
    "train algorithm=imaml inner_loop.order=2": "inner_loop.order=2: nothing reads it in algorithm=IMAML",
    "train algorithm=hsml inner_loop=imaml": "inner_loop=imaml: is inner_loop=sgd with the settings of",
    "train test.episodes=0 test.seed=1": "nothing reads it without test.episodes",
    "train +test.fold=1": "test.fold: there is no such setting",
    "train +backbone._convert_=none": "backbone._convert_: there is no such setting",
    "adapt checkpoint=x ink=dark": "ink=dark: nothing reads it without support",
    "adapt checkpoint=x support=y split=train": "nothing reads it with support",
    "adapt checkpoint=x support=y ++dataset.root=z": "nothing reads it with support",
    "data ways=3": "ways=3: nothing reads it without dataset",
    "data verify=true split=test": "nothing reads it with",
    "train dataset=clinc150 dataset.encoder=x dataset.ngrams=[]": "nothing reads it with dataset.encoder=x",
    "train dataset=texts dataset.root=x dataset.vectors=y dataset.ngrams=[]": "nothing reads it with",
    "train ~ways": "~ways: ways is needed",
    "train ~validation": "~validation: validation is needed",
    "train ~optimizer._target_": "optimizer: has no class",
    "train metrics=[[accuracy]]": "metrics=.*: must be a list of text",
    "train backbone.width=4294967296": "backbone.width=4294967296: is out of range",
    "train algorithm=maml inner_loop.steps=1000001": "choose a number of at most 1000000",
    "train backbone=resnet12 backbone.widths=[8,0,8,8]": "backbone.widths=0: must be above 0",
    "train dataset=sinusoid backbone.hidden=[-1]": "backbone.hidden=-1: must be above 0",
    "train algorithm=meta_lstm inner_loop.hidden=0": "inner_loop.hidden=0: must be above 0",
    "train seed=9223372036854775808": "seed=9223372036854775808: is out of range",
    "train optimizer.lr=1e400": "optimizer.lr=inf: must be a finite number",
    "train inner_rate=1e39": "inner_rate=1e.39: must be a finite number",
    "train dataset=sinusoid dataset.amplitude=[nan,1]": "dataset.amplitude.0=nan: must be a finite number",
}


@pytest.mark.parametrize("line", IN_VAIN)
def test_a_setting_that_nothing_can_use_is_refused(line: str):
    command, *words = line.split()
    with pytest.raises(ConfigError, match=IN_VAIN[line]):
        check(composed(command, *words), command, typed=words)


#: Command lines that are refused when the method is built, before any data is loaded, and by which words.
REFUSED_AS_BUILT = {
    "initial_weights=kaiming initial_weights.head=0.1": "head=0.1: nothing reads it.* no linear head",
    "algorithm=hsml dataset=functions algorithm.width=8": "width=8: nothing reads it for tasks without",
    "algorithm=maml norm=layer algorithm.transductive=false": "nothing reads it .*no layer here normalises",
    "algorithm=maml_plus_plus norm=layer algorithm.step_affine=true": "where the backbone has no batch norm",
    "algorithm=maml inner_loop=architecture_adam": "the backbone has no architecture to adapt",
    "algorithm=pretrain inner_loop=adam_carried": "pretraining takes no inner steps; choose inner_loop=adam",
    "algorithm=hsml algorithm.clusters=[]": r"clusters=\[\]: must be the clusters of one or more levels",
    "algorithm=protonet algorithm.scale=0": "scale=0: must be above 0",
    "algorithm=oml ways=3": "algorithm.trajectory=3: leaves none of ways=3",
    "train_tasks=cactus train_tasks.clusters=1": "clusters=1: must be at least 2",
}


@pytest.mark.parametrize("line", REFUSED_AS_BUILT)
def test_a_method_is_refused_before_data_is_loaded(line: str, monkeypatch: pytest.MonkeyPatch):
    words = ["backbone.width=4", *line.split()] if "functions" not in line else line.split()
    settings = typed(composed("train", *words))
    dataset = build_dataset(settings.dataset)
    monkeypatch.setattr(type(dataset), "load", None)
    before = torch.get_rng_state()
    with pytest.raises(ConfigError, match=REFUSED_AS_BUILT[line]):
        check_method(settings, dataset, Hardware("cpu"), words)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_recipe_sets_may_be_without_effect():
    settings = typed(composed("train", "initial_weights=kaiming", "initial_weights.head=0.1"))
    check_method(settings, build_dataset(settings.dataset), Hardware("cpu"))


LEFT_OVER = (
    "maml_omniglot initial_weights=pytorch",
    "relation_mini normalise=none dataset.root=x",
    "relation_omniglot normalise=none initial_weights=pytorch",
    "simpleshot_mini augment=none dataset.root=x",
    "maml_omniglot algorithm=protonet inner_loop=none",
)


@pytest.mark.parametrize("line", LEFT_OVER)
def test_an_option_without_a_class_is_stronger_than_the_settings_of_a_recipe(line: str):
    words = f"recipe={line}".split()
    cfg = composed("train", *words)
    check(cfg, "train", typed=words)
    chosen = [word.partition("=")[0] for word in words[1:] if word.endswith(("=pytorch", "=none"))]
    assert chosen and not any(cfg[group] for group in chosen)


@pytest.mark.parametrize("word", ["initial_weights.head=2", "initial_weights.head_bias=2"])
def test_a_typed_setting_of_an_option_without_a_class_is_refused(word: str):
    words = ["recipe=relation_omniglot", "initial_weights=pytorch", word]
    key, name = word.partition("=")[0], word[len("initial_weights.") : -2]
    with pytest.raises(ConfigError, match=f"{key}: initial_weights=pytorch has no setting '{name}'"):
        check(composed("train", *words), "train", typed=words)


def test_an_option_of_several_nodes_has_classes():
    assert composed("train", "tracker=jsonl").tracker


def test_own_texts_may_be_encoded_by_a_model_that_was_moved():
    words = ["checkpoint=x", "support=y", "++dataset.encoder=z"]
    check(composed("adapt", *words), "adapt", typed=words)


def test_a_default_may_be_without_effect():
    for words in ([], ["algorithm=matching"], ["algorithm=matching", "algorithm.full_context=true"]):
        check(composed("train", *words), "train", typed=words)


#: Characters of Hydra's grammar, of OmegaConf's, and of shells.
ODD_PATHS = [
    "my run, two",
    "a (b)[1]{c}",
    "it's",
    'say "x"',
    "back\\",
    "a\\'b",
    "a${x}",
    "a\\${x}",
    "a=b",
    "x: #y",
]


@pytest.mark.parametrize(
    ("command", "key"),
    [
        *(("train", key) for key in ("init", "+init", "backbone.weights", "dataset.root", "hydra.run.dir")),
        ("train", "dataset.settings.my-part.root"),
        *(("eval", key) for key in ("checkpoint", "dataset.root")),
        *(("adapt", key) for key in ("checkpoint", "support", "query")),
    ],
)
def test_every_path_is_typed_without_quotes(command: str, key: str):
    parser = OverridesParser.create()
    for path in ODD_PATHS:
        if "hydra" in key and "${" in path:
            continue  # Hydra's folders may refer to settings
        (word,) = arrange(command, [f"{key}={path}"])
        value = parser.parse_override(word).value()
        assert OmegaConf.create({"path": value}).path == path


@pytest.mark.parametrize("column", [*ODD_PATHS, "subject#", "Jitter(%)", "Jitter:DDP", "NR-*"])
def test_columns_of_tables_are_typed_without_quotes(column: str):
    parser = OverridesParser.create()
    (word,) = arrange("train", [f"dataset.task={column}"])
    assert OmegaConf.create({"it": parser.parse_override(word).value()}).it == column
    if not {",", "'", "\\", "]"} & {*column}:
        (word,) = arrange("train", [f"dataset.drop=[{column},b]"])
        assert list(OmegaConf.create({"it": parser.parse_override(word).value()}).it) == [column, "b"]
    assert arrange("train", ["dataset.missing=[null,-9]"]) == ["dataset.missing=['null',-9]"]
    assert arrange("train", ["-m", "dataset.task=a#,b"]) == ["-m", "dataset.task='a#',b"]


def test_paths_are_swept_and_listed():
    assert arrange("eval", ["-m", "checkpoint=a, b,[c,d]"]) == ["-m", "checkpoint='a','b',['c','d']"]
    assert arrange("eval", ["-m", "checkpoint='a,b',c"]) == ["-m", "checkpoint='a,b','c'"]
    assert arrange("eval", ["checkpoint=[a b,c]"]) == ["checkpoint=['a b','c']"]
    words = ["-m", "dataset=omniglot", "dataset.root=a,b"]
    assert arrange("train", words) == ["-m", "dataset=omniglot", "dataset.root='a','b'"]
    assert arrange("train", ["-m", "hydra.sweep.dir=a,b"]) == ["-m", "hydra.sweep.dir='a,b'"]


def test_a_sweep_has_the_settings_that_its_options_need():
    """As each run alone has them: text_cnn reads words alone."""
    assert arrange("train", ["-m", "dataset=phrases,clinc150"])[1] == "pairing=texts"
    swept = ["-m", "dataset=phrases", "backbone=text_cnn, text_transformer"]
    assert arrange("train", swept)[1] == "pairing=texts_words"
    tuned = ["dataset=texts", "dataset.encoder=x", "dataset.finetune=true"]
    assert arrange("train", tuned)[0] == "pairing=text_finetune"
    assert arrange("train", tuned[:2])[0] == "pairing=text_vectors"
    assert arrange("train", ["-m", "dataset=omniglot,glyphs"]) == ["-m", "dataset=omniglot,glyphs"]
    for words in (["dataset=phrases", "backbone=bag,text_cnn"], ["dataset=omniglot,sinusoid"]):
        with pytest.raises(Failed, match="1") as raised:
            arrange("train", ["-m", *words])
        assert f"{words[-1]}: these need different settings of other groups" in raised.value.message


@pytest.fixture(scope="module")
def composed_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], DictConfig]:
    """`composed_once("maml")`, `composed_once("mlp")`: the config of an algorithm, of a small backbone."""
    vectors = tmp_path_factory.mktemp("vectors") / "words.txt"
    vectors.write_text("the 1 0 2 0 3 0 4 0")

    @cache
    def of(option: str) -> DictConfig:
        if option in KINDS:
            return composed("train", f"algorithm={option}", "hardware=cpu")
        words = [f"backbone={option}", *SMALL.get(option, [])]
        words += ["dataset=clinc150"] * (option in FOR_TEXTS)
        words += [f"dataset.vectors={vectors}"] * (option == "adapter")
        return composed("train", *words)

    return of


@pytest.mark.parametrize("algorithm", KINDS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_kind_of_algorithm_builds_on_every_backbone(composed_once, algorithm: str, backbone: str):
    """Every algorithm on conv4 is in tests/commands/test_train.py."""
    cfg = composed_once(algorithm).copy()
    for group in ("backbone", "dataset"):
        cfg[group] = composed_once(backbone)[group]
    if backbone in REFUSED.get(algorithm, ()):
        with pytest.raises(
            ConfigError,
            match=r"chain of layers without shortcuts|needs images|with channels|and backbone=Bag has none",
        ):
            built(cfg)
        return
    assert sum(p.numel() for p in built(cfg).parameters()) > 1000


def test_what_is_typed_is_stronger_than_what_a_dataset_asks_for():
    cfg = composed("train", "dataset=sinusoid", "shots=5", "backbone=conv4")
    assert (cfg.ways, cfg.shots, cfg.backbone._target_.rsplit(".")[-1]) == (1, 5, "Conv4")


@pytest.mark.parametrize(
    ("words", "backbone"),
    [
        (["dataset.encoder=x"], "Adapter"),
        (["dataset.vectors=my vectors.txt", "backbone=mlp"], "MLP"),
        (["dataset.vectors=x"], "Adapter"),
        (["dataset.encoder=null"], "Bag"),
        ([], "Bag"),
    ],
)
def test_vectors_of_texts_get_a_network_for_vectors(words: list[str], backbone: str):
    for dataset in (["dataset=clinc150"], ["dataset=texts", "dataset.root=x"]):
        cfg = composed("train", *dataset, *words)
        assert cfg.backbone._target_.rsplit(".")[-1] == backbone


def test_reptile_brings_its_own_optimizers_which_can_be_replaced():
    cfg = composed("train", "algorithm=reptile")
    assert cfg.inner_loop._target_.endswith("Adam")
    assert cfg.optimizer._target_ == "torch.optim.SGD"
    cfg = composed("train", "algorithm=reptile", "inner_loop=sgd", "optimizer.lr=0.5")
    assert cfg.inner_loop._target_.endswith("inner_loops.sgd.SGD")
    assert cfg.optimizer.lr == 0.5


def test_lists_reach_their_class_as_plain_lists():
    """What a class keeps of its settings goes into checkpoints, which hold plain values only."""
    cfg = composed("train", "optimizer._target_=torch.optim.RAdam", "+optimizer.betas=[0.5,0.9]")
    optimizer = instantiate(cfg.optimizer, params=[torch.zeros(1, requires_grad=True)])
    assert type(optimizer.param_groups[0]["betas"]) is list
