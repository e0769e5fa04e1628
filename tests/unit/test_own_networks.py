"""Networks as people write them: what breaks the contract is one line, transformers run with MAML."""

from __future__ import annotations

import pytest
import torch
from helpers.engines import engine_of
from helpers.methods import RATE
from torch import Tensor, nn

from metarun.algorithms.base import Algorithm
from metarun.algorithms.cavia import CAVIA
from metarun.algorithms.imaml import IMAML
from metarun.algorithms.maml import MAML
from metarun.algorithms.protonet import ProtoNet
from metarun.config.build import build_backbone, load_weights
from metarun.errors import ConfigError, TrainingError
from metarun.inner_loops.sgd import SGD
from metarun.tasks.episodes import Episodes
from metarun.tasks.spec import TaskSpec

pytestmark = pytest.mark.quick
IMAGES, TEXT = TaskSpec((1, 8, 8)), TaskSpec((6,), item_dtype=torch.int64)
VOCABULARY = 9


class Net(nn.Module):
    """Vectors of 4 numbers; subclasses break the contract in one place each."""

    def __init__(self, item_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.features = 4
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Dropout())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class OtherFeatures(Net):
    def __init__(self, item_shape: tuple[int, ...]) -> None:
        super().__init__(item_shape)
        self.features = 5


class LayersAsFeatures(Net):
    """As in torchvision's VGG."""

    def __init__(self, item_shape: tuple[int, ...]) -> None:
        super().__init__(item_shape)
        del self.features
        self.features = nn.Identity()


class Maps(Net):
    def forward(self, x: Tensor) -> Tensor:
        return x.expand(-1, 4, -1, -1)


class OneVector(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).mean(0, keepdim=True)


class Pair(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.body(x), x


class ThreeChannels(Net):
    def __init__(self, item_shape: tuple[int, ...]) -> None:
        super().__init__(item_shape)
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())


def node(cls: type[nn.Module]) -> dict[str, str]:
    return {"_target_": f"{__name__}.{cls.__name__}"}


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (OtherFeatures, "has features=5, and its outputs are vectors of 4 numbers; set self.features = 4"),
        (LayersAsFeatures, "its attribute features is a Identity; give it another name"),
        (Maps, "maps two examples (2, 1, 8, 8) to outputs (2, 4, 8, 8); it must return one vector"),
        (OneVector, "to outputs (1, 4); it must return one vector for each example"),
        (Pair, "returns a tuple; it must return a tensor [B, features]"),
        (
            ThreeChannels,
            "fails on two examples, a torch.float32 tensor of shape (2, 1, 8, 8) (RuntimeError: ",
        ),
    ],
)
def test_a_network_that_breaks_the_contract_is_one_line(cls: type[nn.Module], words: str):
    with pytest.raises(ConfigError) as error:
        build_backbone(node(cls), IMAGES)
    assert str(error.value).startswith(f"backbone: {__name__}.{cls.__name__}: ")
    assert words in str(error.value) and "\n" not in str(error.value)


class WithoutFeatures(Net):
    def __init__(self, item_shape: tuple[int, ...]) -> None:
        super().__init__(item_shape)
        del self.features


class WithoutItemShape(Net):
    def __init__(self) -> None:
        super().__init__(())


class AnySettings(Net):
    def __init__(self, **settings: object) -> None:
        super().__init__(settings["item_shape"])  # type: ignore[arg-type]


@pytest.mark.parametrize("cls", [Net, WithoutFeatures, WithoutItemShape, AnySettings])
def test_what_can_be_found_out_need_not_be_said(cls: type[nn.Module]):
    """The size of the vectors, by a forward pass that leaves the network and the random numbers unchanged."""
    torch.manual_seed(0)
    expected, after = Net((1, 8, 8)), torch.rand(3)
    torch.manual_seed(0)
    network = build_backbone(node(cls), IMAGES)
    assert torch.equal(torch.rand(3), after) and network.training and network.features == 4
    for found, wanted in zip(network.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(found, wanted)


class LoadsItself(Net):
    """A method of its own with the name of metarun's hook, which its constructor calls."""

    def __init__(self, item_shape: tuple[int, ...] = ()) -> None:
        super().__init__(item_shape)
        self.load_weights("a file")

    def load_weights(self, path: str) -> None:
        self.loaded = [*getattr(self, "loaded", []), path]


class Hook(Net):
    def load_weights(self, path: str = "default") -> None:
        self.loaded = path


def test_only_a_hook_without_arguments_is_called():
    network = ProtoNet(nn.Sequential(LoadsItself(), Hook(())))
    load_weights(network)
    assert network.backbone[0].loaded == ["a file"] and network.backbone[1].loaded == "default"


# transformers


class Transformer(nn.Module):
    """A padded sequence of token ids, by PyTorch's own layer."""

    features = 4

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(self.embedding(ids), src_key_padding_mask=ids == 0).mean(1)


class Attention(nn.Module):
    """A call of the attention function itself."""

    features = 4

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 4)
        self.projections = nn.Linear(4, 12)

    def forward(self, ids: Tensor) -> Tensor:
        projected = self.projections(self.embedding(ids)).unsqueeze(1).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(*projected).squeeze(1).mean(1)


class Recurrent(nn.Module):
    features = 4

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.gru = nn.Embedding(VOCABULARY, 4), nn.GRU(4, 4, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        return self.gru(self.embedding(ids))[0].mean(1)


class Bag(nn.Module):
    features = 4

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(VOCABULARY, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids)


def texts() -> Episodes:
    ids = torch.randint(1, VOCABULARY, (2, 2, 6, 6))
    ids[..., 4:] *= torch.randint(2, (2, 2, 6, 1))  # some are padded
    labels = torch.arange(3).repeat_interleave(2).expand(2, -1)
    return Episodes(ids[0], labels, ids[1], labels, torch.arange(3).expand(2, -1))


def build(name: str, backbone: nn.Module, order: int = 2) -> Algorithm:
    if name == "cavia":
        return CAVIA(backbone, SGD(RATE, 2), outputs=3, context=3)
    if name == "imaml":
        return IMAML(backbone, SGD(RATE, 2), outputs=3)
    return MAML(backbone, SGD(RATE, 2, order=order), outputs=3)


@pytest.mark.parametrize(
    ("name", "cls", "batching"),
    [("maml", cls, batching) for cls in (Transformer, Attention) for batching in ("vmap", "loop")]
    + [("cavia", Transformer, "vmap"), ("maml", Recurrent, "auto")],
)
def test_the_meta_gradient_of_a_network_for_sequences_is_the_slope(
    float64: None, name: str, cls, batching: str
):
    """By central differences along a random direction."""
    algorithm, tasks = build(name, cls()), texts()
    engine = engine_of(algorithm, tasks, batching=batching)
    engine.backward(next(engine.draws))
    params = [p for p in algorithm.parameters() if p.requires_grad]
    direction = [torch.randn_like(p) for p in params]
    slope = sum((p.grad * d).sum() for p, d in zip(params, direction, strict=True)).item()
    losses = []
    for sign in (1, -2):
        with torch.no_grad():
            for p, d in zip(params, direction, strict=True):
                p += sign * 1e-5 * d
        losses.append(algorithm.meta_loss(tasks).loss.mean().item())
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("name", ["maml", "imaml", "cavia"])
def test_a_transformer_is_trained_and_evaluated(float64: None, name: str):
    """Its fast path of evaluation would be taken here; the user's switches are left as they were."""
    algorithm, tasks = build(name, Transformer()), texts()
    algorithm.meta_loss(tasks).loss.mean().backward()
    trained = algorithm.predict(algorithm.adapt(tasks), tasks.query_x).detach()
    algorithm.eval()
    with torch.no_grad():
        evaluated = algorithm.predict(algorithm.adapt(tasks), tasks.query_x)
    torch.testing.assert_close(evaluated, trained)
    assert torch.backends.mha.get_fastpath_enabled() and torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_an_operation_without_second_derivative_is_one_line(float64: None):
    engine = engine_of(build("maml", Bag(), order=1), texts())
    engine.backward(next(engine.draws))
    with pytest.raises(TrainingError, match=r"^_embedding_bag\w*: PyTorch has no second derivative.*order=1"):
        engine_of(build("maml", Bag()), texts()).step()
