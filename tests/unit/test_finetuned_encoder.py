"""An encoder of Hugging Face that is trained: its tokens, network, meta-gradient and checkpoints."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from metarun.algorithms.cavia import add_context
from metarun.algorithms.maml import MAML
from metarun.algorithms.protonet import ProtoNet
from metarun.backbones.adapter import Adapter
from metarun.backbones.encoder import EncoderLayer, FineTuned, network_of
from metarun.datasets.text.texts import Texts
from metarun.errors import ConfigError, DataError
from metarun.inner_loops.sgd import SGD
from metarun.nn.per_task import TaskBatching
from metarun.tasks.episodes import Episodes
from metarun.training import checkpoint

transformers = pytest.importorskip("transformers", reason="needs the extra metarun[text]")

WORDS = "open close lose find card account fee rate now later"


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of one layer with random weights, as transformers writes it."""
    folder = tmp_path_factory.mktemp("bert")
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split(), "##s"]
    (folder / "vocab.txt").write_text("\n".join(pieces))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    settings = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(pieces), max_position_embeddings=12, **settings)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six classes of five short texts, in three splits."""
    path = tmp_path_factory.mktemp("texts") / "texts.tsv"
    words, rows = WORDS.split(), ["label\tsplit\ttext"]
    for number in range(6):
        split = ("train", "validation", "test")[number // 2]
        rows += [f"c{number}\t{split}\t{' '.join(words[number : number + 2 + i])}s" for i in range(5)]
    path.write_text("\n".join(rows))
    return path


def dataset(texts: Path, encoder: Path, **settings: object) -> Texts:
    return Texts(root=str(texts), encoder=str(encoder), length=10, **{"finetune": True, **settings})


def network(texts: Path, bert: Path, adapts: bool = False) -> FineTuned:
    made = FineTuned(dataset(texts, bert).spec.pretrained, adapts=adapts)
    for layer in made.modules():
        if isinstance(layer, EncoderLayer):
            layer.load_weights()
    return made


@pytest.mark.parametrize("first", [False, True])
def test_it_starts_as_the_frozen_encoder(texts, bert, tmp_path, first):
    """The tokens are those of transformers, and the features those of an adapter on frozen vectors."""
    folder = tmp_path / "model"
    shutil.copytree(bert, folder)
    if first:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_cls_token": True}))
    made = dataset(texts, folder)
    store, frozen = made.split("test"), dataset(texts, folder, finetune=False).split("test")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text, ids in zip(store.texts, store.items.tolist(), strict=True):
        wanted = tokenizer(text, truncation=True, max_length=10)["input_ids"]
        assert ids == [i + 1 for i in wanted] + [0] * (10 - len(wanted))
    state = torch.get_rng_state()
    trained = network(texts, folder).train()  # without dropout
    assert torch.equal(torch.get_rng_state(), state)
    features = trained(store.decode(store.items))
    torch.testing.assert_close(features, Adapter((8,))(frozen.items), rtol=1e-4, atol=1e-5)
    assert not any("pooler" in name for name, _ in trained.named_parameters())
    nothing = torch.zeros(1, 10, dtype=torch.int64)
    assert trained(nothing).isfinite().all()


def episodes(store) -> Episodes:
    """Two tasks of two ways with two shots and three queries."""
    x = store.decode(store.items).view(2, 5, -1)
    x = torch.stack([x, x.flip(1)])  # [T, N, 5, L]
    y = torch.arange(2).expand(2, 2)
    support, query = x[:, :, :2].flatten(1, 2), x[:, :, 2:].flatten(1, 2)
    return Episodes(support, y.repeat_interleave(2, 1), query, y.repeat_interleave(3, 1), y)


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    named = dict(module.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    return dict(zip(named, grads, strict=True))


@pytest.mark.parametrize("how", ["auto", "vmap", "loop"])
@pytest.mark.parametrize("adapts", [False, True])
def test_maml_differentiates_through_its_steps(texts, bert, float64, adapts, how):
    """Against a plain loop, second order included; all weights of the encoder, or the head alone, adapt."""
    tasks = episodes(dataset(texts, bert).split("test"))
    algorithm = MAML(network(texts, bert, adapts), SGD(0.1, 2), outputs=2).double()
    algorithm.learner.batching = TaskBatching(how)
    net = nn.Sequential(copy.deepcopy(algorithm.learner.backbone), copy.deepcopy(algorithm.learner.head))
    losses = []
    for t in range(2):
        fast = {name: p for name, p in net.named_parameters() if adapts or name.startswith("1.")}
        for _ in range(2):
            loss = F.cross_entropy(functional_call(net, fast, (tasks.support_x[t],)), tasks.support_y[t])
            grads = torch.autograd.grad(loss, list(fast.values()), create_graph=True, materialize_grads=True)
            fast = {name: p - 0.1 * g for (name, p), g in zip(fast.items(), grads, strict=True)}
        losses.append(F.cross_entropy(functional_call(net, fast, (tasks.query_x[t],)), tasks.query_y[t]))
    theirs = gradients(torch.stack(losses).mean(), net)
    ours = gradients(algorithm.meta_loss(tasks).loss.mean(), algorithm)
    assert any(grad.abs().sum() > 0 for name, grad in theirs.items() if name.startswith("0."))
    for name, grad in theirs.items():
        name = name.replace("0.", "learner.backbone.", 1) if name[0] == "0" else f"learner.head{name[1:]}"
        torch.testing.assert_close(ours[name], grad, rtol=1e-8, atol=1e-12)


def test_methods_on_features_train_it(texts, bert, float64):
    tasks = episodes(dataset(texts, bert).split("test"))
    algorithm = ProtoNet(network(texts, bert)).double()
    ours = gradients(algorithm.meta_loss(tasks).loss.mean(), algorithm)
    losses = []
    for t in range(2):
        support, query = (algorithm.backbone(x[t]) for x in (tasks.support_x, tasks.query_x))
        means = torch.stack([support[tasks.support_y[t] == n].mean(0) for n in range(2)])
        losses.append(F.cross_entropy(-torch.cdist(query, means).square(), tasks.query_y[t]))
    for name, grad in gradients(torch.stack(losses).mean(), algorithm).items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-8, atol=1e-12)


def test_a_run_needs_its_encoder_only_to_start(texts, bert, tmp_path, metarun):
    encoder = tmp_path / "encoder"
    shutil.copytree(bert, encoder)
    words = ("dataset=texts", f"dataset.root={texts}", f"dataset.encoder={encoder}", "dataset.finetune=true")
    few = ("queries=2", "meta_batch=2", "hardware=cpu", "dataset.length=10", "ways=2")
    small = (*few, "validation.episodes=3", "test.episodes=3", "log.tensorboard=false", "checkpoint.every=1")
    metarun("train", *words, *small, "iterations=2", "hydra.run.dir=whole")
    metarun("train", *words, *small, "iterations=1", "hydra.run.dir=run")
    shutil.rmtree(encoder)
    metarun("train", "resume=run", "iterations=2")
    whole, resumed = (checkpoint.load(tmp_path / run / "last.pt") for run in ("whole", "run"))
    for name, weight in whole["algorithm"].items():
        assert torch.equal(weight, resumed["algorithm"][name]), name
    metarun("eval", "checkpoint=run", "episodes=3", "queries=2", "hardware=cpu", "hydra.run.dir=same")
    other = tmp_path / "other.tsv"
    shutil.copy(texts, other)
    place = ("dataset=texts", f"dataset.root={other}", "trained_classes=keep")
    metarun("eval", "checkpoint=run", *place, "episodes=3", "queries=2", "hydra.run.dir=other")
    same, there = (
        json.loads((tmp_path / at / "results.json").read_text())["results"][0] for at in ("same", "other")
    )
    assert same["scores"] == there["scores"]
    (tmp_path / "own.csv").write_text("label,text\na,open card\nb,fee\n")
    done = metarun("adapt", "checkpoint=run", "support=own.csv", 'query=["lose card"]')
    assert "lose card" in done.stdout
    done = metarun("eval", "checkpoint=run", "dataset.length=20", "episodes=3", status=1)
    assert "the model was trained with dataset.length=10" in done.stderr


def test_what_does_not_fit_is_one_line(texts, bert, tmp_path):
    made = dataset(texts, bert).spec.pretrained
    with pytest.raises(ConfigError, match=r"needs dataset\.encoder=FOLDER_OR_NAME and"):
        FineTuned(None)
    with pytest.raises(ConfigError, match=r"finetune=true: needs dataset\.encoder"):
        Texts(root=str(texts), finetune=True)
    with pytest.raises(ConfigError, match="is for vectors, not for"):
        dataset(texts, bert, centred=True)
    stated = json.loads(made.config)
    for change in ({"model_type": "t5", "is_encoder_decoder": True}, {"model_type": "clip"}):
        with pytest.raises(DataError, match="cannot be trained here"):
            FineTuned(replace(made, config=json.dumps({**stated, **change})))
    with pytest.raises(ConfigError, match=r"algorithm=cavia: inserts a layer .* choose algorithm=anil"):
        add_context(network(texts, bert), 3, None)
    with pytest.raises(DataError, match="is no usable text encoder"):
        FineTuned(replace(made, config=json.dumps({**stated, "num_attention_heads": 3})))
    kept = dataset(texts, bert)
    learned = kept.decided["learned"]
    gone = dataset(texts, tmp_path / "gone", learned=learned)
    with pytest.raises(DataError, match="is not a folder"):  # a checkpoint without its tokenizer
        gone.spec  # noqa: B018
    with pytest.raises(ConfigError, match="is not what metarun wrote"):
        dataset(texts, tmp_path / "gone", learned="{}").with_files(kept.files)
    assert gone.with_files(kept.files).spec == kept.spec
    # From a checkpoint of somebody else.
    for change in ({"length": 10**9}, {"length": "x"}, {"vocabulary": 0}, {"more": 1}, {"network": {}}):
        other = dataset(texts, bert, learned=json.dumps({**json.loads(learned), **change}))
        with pytest.raises(ConfigError, match="is not what metarun wrote"):
            other.with_files(kept.files)
    code = {"auto_map": {"AutoModel": "a--b.C"}, "_attn_implementation": "a/b", "attn_implementation": "a/b"}
    network_of(replace(made, config=json.dumps({**stated, **code})))
