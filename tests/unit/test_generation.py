"""Methods that generate examples: what is generated, against plain formulas, and limits without it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.methods import METHODS, SHAPE, Smooth, episodes_of
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.autograd import grad

from metarun.algorithms.base import Algorithm
from metarun.algorithms.distribution_calibration import DistributionCalibration
from metarun.algorithms.hallucination import Hallucination
from metarun.algorithms.maml import MAML
from metarun.algorithms.metagan import Classify, Generator, MetaGANMAML, MetaGANRelation, fake_loss, real_loss
from metarun.algorithms.multinomial import multinomial_regression
from metarun.algorithms.protonet import ProtoNet
from metarun.algorithms.relation import RelationNet
from metarun.algorithms.tadam import TADAM
from metarun.backbones.conv4 import Conv4
from metarun.datasets.generated import Interpolation, Rotations
from metarun.datasets.mixture import MixtureStore
from metarun.datasets.sinusoid import Sinusoid
from metarun.errors import ConfigError
from metarun.inner_loops.sgd import SGD
from metarun.tasks.class_store import ClassStore, tokens
from metarun.tasks.episodes import EpisodeShape, Outcome
from metarun.tasks.source import EpisodeSource

pytestmark = pytest.mark.usefixtures("float64")


class Positive(nn.Flatten):
    """Features are the pixels."""

    features = 4


# distribution calibration


def test_multinomial_regression_is_scikit_learns():
    """With weights of the examples and a penalty; in float32 within its rounding."""
    y = torch.arange(3).repeat_interleave(6)
    x, weights = torch.randn(2, 18, 5) + torch.randn(3, 5)[y], torch.rand(2, 18) + 0.5
    wanted = nn.functional.one_hot(y, 3).double().expand(2, -1, -1)
    found = multinomial_regression(x, wanted, weights, penalty=0.3)
    single = multinomial_regression(x.float(), wanted.float(), weights.float(), penalty=0.3)
    for t in range(2):
        other = LogisticRegression(C=1 / 0.3, tol=1e-12, max_iter=10_000)
        other.fit(x[t].numpy(), y.numpy(), sample_weight=weights[t].numpy())
        np.testing.assert_allclose(found[t, :-1].mT.numpy(), other.coef_, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(single[t, :-1].mT.numpy(), other.coef_, rtol=1e-3, atol=1e-3)
        constants = found[t, -1] - found[t, -1].mean()  # the loss does not change with their mean
        np.testing.assert_allclose(
            constants.numpy(), other.intercept_ - other.intercept_.mean(), rtol=1e-5, atol=1e-6
        )


def calibrated(**settings) -> tuple[DistributionCalibration, ClassStore]:
    """A method with the statistics of five classes of 3 to 7 images of four pixels."""
    counts = [3, 7, 4, 6, 5]
    items = torch.randint(0, 256, (25, 1, 2, 2), dtype=torch.uint8)
    store = ClassStore(items, counts, list("abcde"), "made train")
    algorithm = DistributionCalibration(Positive(), classes=5, **settings)
    algorithm.on_validation(store)
    return algorithm, store


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_generated_features_have_the_calibrated_distributions(power: float):
    """Equations 5 and 6, one support example at a time, with numpy's covariances."""
    algorithm, store = calibrated(nearest=2, spread=0.3, base_power=power)
    base = [(x.double().flatten(1).numpy() / 255) ** power for x in store.items.split(store.counts.tolist())]
    means, covariances = [x.mean(0) for x in base], [np.cov(x.T) for x in base]
    noise = algorithm.coefficients(1, torch.zeros(()))[0]
    unit = torch.eye(noise.numel()).view(-1, *noise.shape)  # one normal number at a time
    algorithm.coefficients = lambda count, like: torch.cat([torch.zeros_like(unit[:1]), unit])
    support = torch.rand(2, 3, 4)
    drawn = algorithm.drawn(support, count=0)
    for x, own in zip(support.flatten(0, 1).numpy(), drawn.flatten(0, 1).numpy(), strict=True):
        near = np.argsort([np.linalg.norm(x - mean) for mean in means])[:2]
        np.testing.assert_allclose(own[0], np.mean([means[i] for i in near] + [x], axis=0))
        offsets = own[1:] - own[0]
        expected = np.mean([covariances[i] for i in near], axis=0) + 0.3
        np.testing.assert_allclose(offsets.T @ offsets, expected, rtol=1e-6)


@pytest.mark.parametrize("generated", [0, 6])
def test_the_classifier_is_trained_on_the_support_and_on_generated_features(generated: int):
    algorithm, _ = calibrated(generated=generated)
    features, y = torch.rand(2, 6, 4), torch.tensor([[0, 1, 2, 2, 1, 0], [1, 1, 0, 0, 2, 2]])
    adapted, query = algorithm.fit(features, y, 3), torch.rand(2, 5, 4)
    found = algorithm.score(adapted, query).softmax(-1)
    for t in range(2):
        support = features[t].sqrt()
        drawn = [algorithm.drawn(x.view(1, 1, -1), generated // 2).view(-1, 4) for x in support]
        x = torch.cat([support, *drawn])
        labels = torch.cat([y[t], y[t].repeat_interleave(generated // 2)])
        other = LogisticRegression(tol=1e-12, max_iter=10_000).fit(x.numpy(), labels.numpy())
        expected = other.predict_proba(query[t].sqrt().numpy())
        np.testing.assert_allclose(found[t].numpy(), expected, rtol=1e-4, atol=1e-6)


def test_statistics_are_part_of_a_checkpoint():
    algorithm, _ = calibrated()
    fresh = DistributionCalibration(Positive(), classes=5)
    fresh.load_state_dict(algorithm.state_dict())
    assert algorithm.factors.abs().sum() > 0
    assert torch.equal(fresh.factors, algorithm.factors) and torch.equal(fresh.means, algorithm.means)
    wrong = algorithm.state_dict() | {"factors": torch.zeros(4, 2, 4)}
    with pytest.raises(RuntimeError, match="size mismatch for factors"):
        DistributionCalibration(Positive(), classes=5).load_state_dict(wrong)


def test_statistics_are_measured_in_evaluation_mode_and_leave_the_mode():
    """With running averages, the features of a class do not depend on the size of a batch."""
    algorithm = DistributionCalibration(Smooth(), classes=2)
    algorithm.backbone[1] = nn.BatchNorm2d(4)
    algorithm.backbone[5] = nn.BatchNorm2d(4)
    store = ClassStore(torch.randint(0, 256, (9, *SHAPE), dtype=torch.uint8), [4, 5], ["a", "b"], "x")
    before = {name: value.clone() for name, value in algorithm.backbone.state_dict().items()}
    algorithm.train().on_validation(store)
    assert algorithm.training and algorithm.backbone[1].training
    assert all(torch.equal(before[name], value) for name, value in algorithm.backbone.state_dict().items())
    with torch.no_grad():
        alone = torch.cat([algorithm.eval().backbone(x[None].double() / 255) for x in store.items])
    torch.testing.assert_close(algorithm.means[1], alone[4:].mean(0))


def test_features_that_depend_on_a_batch_have_no_statistics():
    store = ClassStore(torch.zeros(4, *SHAPE, dtype=torch.uint8), [2, 2], ["a", "b"], "x")
    with pytest.raises(ConfigError, match="norm: a feature depends on the other examples"):
        DistributionCalibration(Smooth(), classes=2).on_validation(store)


@pytest.mark.parametrize("norm", ["task", "batch"])
def test_generated_images_are_normalised_by_the_support_where_queries_are(norm: str):
    """One after the other is the same as together, with TaskNorm; with batch norm it is not."""
    net = Conv4(SHAPE, width=4, norm=norm)
    algorithm, tasks = MetaGANMAML(net, SGD(0.1, 1), 3, SHAPE, generated=4).eval(), episodes_of()
    loss, slow, fast = algorithm.inner_problem(tasks)
    images = algorithm.fakes(tasks)
    outputs = algorithm.learner(slow | fast, tasks.support_x)
    predict = algorithm.predictor({"params": slow | fast}, tasks)
    alone = torch.stack([fake_loss(predict(image)) for image in images.split(1, dim=1)]).mean(0)
    expected = tasks.support_loss(lambda x: outputs, 0) + real_loss(outputs) + alone
    assert torch.allclose(loss(fast, 0), expected) == (norm == "task")


@pytest.mark.parametrize("setting", [{"nearest": 6}, {"nearest": 0}, {"spread": -1.0}, {"generated": -1}])
def test_impossible_settings_are_refused(setting: dict[str, float]):
    with pytest.raises(ConfigError, match=rf"algorithm.{next(iter(setting))}="):
        method = DistributionCalibration(Positive(), classes=5, **setting)
        method.check_source(store_of(classes=5), EpisodeShape(5, 1, 1))


# hallucination


def test_without_generated_examples_hallucination_is_protonet():
    backbone, tasks = Smooth(), episodes_of()
    found, expected = (each.meta_loss(tasks) for each in (Hallucination(backbone, 0), ProtoNet(backbone)))
    assert torch.equal(found.outputs, expected.outputs) and torch.equal(found.loss, expected.loss)


def test_the_hallucinator_starts_as_the_identity():
    """Without noise it repeats its seed, and prototypes are those of the support; with noise it does not."""
    features, y = 2 + torch.rand(2, 6, 4), torch.arange(3).repeat_interleave(2).expand(2, -1)
    still, moving = (Hallucination(Positive(), generated=3, spread=spread) for spread in (0.0, 0.1))
    torch.testing.assert_close(still.hallucinated(features), features.unsqueeze(2).expand(-1, -1, 3, -1))
    torch.testing.assert_close(still.fit(features, y, 3), ProtoNet(Positive()).fit(features, y, 3))
    made = moving.train().hallucinated(features)
    assert (made.std(2) > 0.01).all() and not torch.equal(made, moving.hallucinated(features))
    assert torch.equal(moving.eval().hallucinated(features), moving.hallucinated(features))


def test_a_frozen_backbone_is_not_trained():
    """What is in front of the hallucinator stays, as in the paper; the layers behind it learn."""
    algorithm = Hallucination(Smooth(), embedding=3, frozen=True).train()
    algorithm.meta_loss(episodes_of()).loss.sum().backward()
    for name, p in algorithm.named_parameters():
        assert (p.grad is None) == name.startswith("backbone."), name


# generated tasks


def store_of(images: int = 4, classes: int = 6) -> ClassStore:
    items = torch.randint(0, 256, (images * classes, 1, 6, 6), dtype=torch.uint8)
    return ClassStore(items, [images] * classes, [f"c{i}" for i in range(classes)], "made train")


def test_rotated_images_are_further_classes():
    """Class 6 * turn + c of the new split is class c, turned; also where only some classes are drawn."""
    images = store_of()
    assert [rotated(images).names[i] for i in (0, 6, 23)] == ["c0", "c0@90", "c5@270"]
    kept = rotated(images.keeping([1, 4]))
    assert kept.spec.classes == len(kept.names) == 8 and kept.names[3] == "c4@90"
    draw = torch.tensor([[0, 3, 6]]), torch.tensor([[[0, 2], [1, 3], [2, 0]]])
    tasks = kept.gather(draw, EpisodeShape(3, 1, 1))
    wanted = [images.items[4], images.items[17].rot90(1, (1, 2)), images.items[6].rot90(3, (1, 2))]
    torch.testing.assert_close(tasks.support_x[0].double() * 255, torch.stack(wanted).double())


def rotated(images: ClassStore) -> ClassStore:
    return Rotations().source(images, SHAPE_3, lambda run: torch.empty(0))


def interpolated(source: EpisodeSource, **settings) -> EpisodeSource:
    return Interpolation(**settings).source(source, SHAPE_3, lambda run: torch.empty(0))


SHAPE_3 = EpisodeShape(3, 1, 2)


@pytest.mark.parametrize("how", ["mixup", "cutmix"])
@pytest.mark.parametrize("source", ["images", "sinusoid"])
def test_an_interpolated_task_is_made_of_two(how: str, source: str):
    """By one number for support and queries; with lambda 1 it is the first task itself, with 0 the other."""
    if source == "sinusoid" and how == "cutmix":
        return
    base = store_of() if source == "images" else Sinusoid().split("train")
    shape = SHAPE_3 if source == "images" else EpisodeShape(1, 3, 6)
    made = interpolated(base, share=1.0, how=how)
    *choices, numbers = made.draw(4, shape, torch.Generator().manual_seed(0))
    assert (numbers > 0).all() and (numbers < 1).all() and len(numbers.unique()) == numbers.numel()
    half = len(choices) // 2
    one, other = (base.gather(tuple(each), shape) for each in (choices[:half], choices[half:]))
    numbers[0, 0], numbers[1, 0] = 1.0, 0.0
    tasks = made.gather((*choices, numbers), shape)
    names = ["support_x", "query_x"] + (["support_y", "query_y"] if source == "sinusoid" else [])
    for name in names:
        found, a, b = (getattr(each, name) for each in (tasks, one, other))
        assert torch.equal(found[0], a[0])
        if how == "mixup":
            share = numbers[2, 0]
            torch.testing.assert_close(found[2], share * a[2] + (1 - share) * b[2], check_dtype=False)
            torch.testing.assert_close(found[1], b[1])
        else:
            other_part = (found != a)[2].flatten(0, 1).any(0)
            rows, columns = other_part.any(1).nonzero(), other_part.any(0).nonzero()
            inside = (..., slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
            assert torch.equal(found[2][inside], b[2][inside]) and other_part.sum() < 36
            side = 6 * (1 - numbers[2, 0]).sqrt()
            assert max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1 <= side.ceil()
    if source == "images":
        assert torch.equal(tasks.query_y, one.query_y)


def test_the_share_of_interpolated_tasks_and_the_distribution_of_lambda():
    """Beta(2, 2) has mean 1/2 and variance 1/20."""
    made = interpolated(store_of(), alpha=2, share=0.25)
    share = made.draw(4000, SHAPE_3, torch.Generator().manual_seed(0))[-1][:, 0]
    own = share[share < 1]
    assert len(own) / 4000 == pytest.approx(0.25, abs=0.03)
    assert own.mean().item() == pytest.approx(0.5, abs=0.02)
    assert own.var().item() == pytest.approx(0.05, abs=0.005)


@pytest.mark.parametrize(
    ("settings", "source", "message"),
    [
        ({"how": "cutmix"}, lambda: Sinusoid().split("train"), "train_tasks.how=cutmix"),
        ({}, lambda: ClassStore(torch.ones(4, 5), [2, 2], ["a", "b"], "x", decode=tokens), "made of numbers"),
    ],
)
def test_examples_that_cannot_be_interpolated_are_refused(settings, source, message: str):
    with pytest.raises(ConfigError, match=message):
        interpolated(source(), **settings)


def test_what_is_not_rotated():
    with pytest.raises(ConfigError, match="needs square images, not 4x6"):
        rotated(ClassStore(torch.zeros(4, 1, 4, 6, dtype=torch.uint8), [2, 2], ["a", "b"], "x"))
    with pytest.raises(ConfigError, match="are classes already"):
        rotated(rotated(store_of()))
    with pytest.raises(ConfigError, match="not of a mixture"):
        rotated(MixtureStore({"a": store_of(), "b": store_of()}, [1.0, 1.0], "both", "cpu"))


@pytest.mark.parametrize("name", ["baseline", "simpleshot", "pretrain", "oml", "tadam"])
def test_methods_that_classify_training_classes_need_one_class_for_each_image(name: str):
    algorithm, made = METHODS[name].build(Smooth(), 1), interpolated(store_of())
    if name == "tadam":
        algorithm = TADAM(Smooth(), classes=6, auxiliary=10)
    algorithm.check_source(store_of(), SHAPE_3)
    with pytest.raises(ConfigError, match="would be in several of them"):
        algorithm.check_source(made, SHAPE_3)
    ProtoNet(Smooth()).check_source(made, SHAPE_3)


# MetaGAN


def relation(cls: type[RelationNet], **settings) -> RelationNet:
    torch.manual_seed(0)
    backbone = Conv4(SHAPE, width=4, norm="running")
    return cls(backbone, width=4, hidden=5, norm="running", shots=2, **settings)


def copied(algorithm: Algorithm, into: Algorithm) -> Algorithm:
    """`into`, with the weights of the other."""
    into.load_state_dict(algorithm.state_dict(), strict=False)
    return into


def test_without_a_generator_metagan_is_its_base():
    tasks = episodes_of()
    base, maml = relation(RelationNet), MAML(Smooth(), SGD(0.1, 2), outputs=3)
    pairs = [
        (base, copied(base, relation(MetaGANRelation, item_shape=SHAPE, generated=0))),
        (maml, copied(maml, MetaGANMAML(Smooth(), SGD(0.1, 2), 3, SHAPE, generated=0))),
    ]
    for expected, found in pairs:
        outcomes = [each.meta_loss(tasks) for each in (expected, found)]
        assert torch.equal(outcomes[0].outputs, outcomes[1].outputs)
        assert torch.equal(outcomes[0].loss, outcomes[1].loss)
        outcomes = [each.eval().outcome(each.adapt(tasks), tasks) for each in (expected, found)]
        assert torch.equal(outcomes[0].loss, outcomes[1].loss)


def test_generated_images_do_not_move_running_averages():
    base, tasks = relation(RelationNet), episodes_of()
    found = copied(base, relation(MetaGANRelation, item_shape=SHAPE, generated=7))
    for each in (base, found):
        each.meta_loss(tasks)
    moved = dict(base.named_buffers())
    for name, average in found.named_buffers():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(average, moved[name])
    assert all(norm.momentum == 0.1 for norm in found.modules() if isinstance(norm, nn.BatchNorm2d))


class Dropped(Smooth):
    """Drops half of the features in training."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), training=self.training)


@pytest.mark.parametrize("name", ["metagan", "metagan_maml"])
def test_both_players_have_the_gradient_of_their_own_loss_with_the_same_dropout(name: str):
    """A second pass would draw other masks, and the generator's loss would also train the classifier."""
    algorithm, tasks = METHODS[name].build(Dropped(), 1), episodes_of()
    params = dict(algorithm.named_parameters())

    def gradients() -> dict[str, Tensor]:
        torch.manual_seed(0)
        return dict(zip(params, grad(algorithm.meta_loss(tasks).loss.sum(), [*params.values()]), strict=True))

    def own(loss: Callable[[Outcome, Tensor, Classify], Tensor]) -> dict[str, Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(algorithm, "against_generator", lambda *given: replace(given[0], loss=loss(*given)))
            return gradients()

    found = gradients()
    of_generator = own(lambda outcome, fakes, classify: real_loss(classify(fakes)))
    of_classifier = own(
        lambda outcome, fakes, classify: (
            outcome.loss + real_loss(outcome.outputs) + fake_loss(classify(fakes.detach())) + 0 * fakes.sum()
        )
    )
    for key, value in found.items():
        expected = of_generator if key.startswith("generator.") else of_classifier
        torch.testing.assert_close(value, expected[key])


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 28, 21)])
def test_images_have_the_shape_and_the_range_of_the_dataset(shape: tuple[int, ...]):
    generator = Generator(shape, noise=3, width=4)
    support, noise = torch.rand(2, 6, *shape), torch.randn(2, 5, 3)
    images = generator(support, torch.ones(2, 6), noise)
    assert images.std(1).mean() > 0.05  # nearly equal images would make batch norm's gradients explode
    assert images.shape == (2, 5, *shape) and images.min() > 0 and images.max() < 1
    alone = generator(support[1:], torch.ones(1, 6), noise[1:])
    torch.testing.assert_close(images[1:], alone)  # a task's images depend on its support alone
    assert not torch.allclose(images[0, 0], generator(support, torch.ones(2, 6), noise.flip(1))[0, 0])
