"""pytest tests/test_adaptation.py"""

import numpy as np
import pytest
import torch
from torch.nn import functional

from analytic import GaussianUNet
from ddad.adaptation import Adapter, Epoch, Pairs, adaptation_loss, best_epoch, cosine_distance
from ddad.checkpoint import CheckpointStore
from ddad.config import AdaptationSettings, make_settings
from ddad.detector import Detector
from ddad.features import create_features
from ddad.sampling import to_unit
from ddad.unet import create_scheduler

SHAPE = (32, 32)


def photo(seed):
    rng = np.random.default_rng(seed)
    return np.clip(128 + 25 * rng.standard_normal((*SHAPE, 3)), 0, 255).astype(np.uint8)


@pytest.fixture
def features():
    return create_features("efficientnet-lite2", (2, 3))


def detector(features, **adaptation):
    settings = make_settings("xs", network={"prediction_type": "epsilon"}, adaptation=adaptation)
    return Detector(GaussianUNet(0.0, 0.1), create_scheduler("epsilon"), features, settings, SHAPE, device="cpu")


def test_distance_of_features_by_hand():
    one = torch.tensor([[[[1.0, 2.0]], [[0.0, 0.0]]]])  # two places: (1, 0) and (2, 0)
    other = torch.tensor([[[[0.0, 3.0]], [[1.0, 0.0]]]])  # (0, 1) and (3, 0)
    assert cosine_distance(one, other, "position").item() == pytest.approx((1 + 0) / 2)
    assert cosine_distance(one, other, "flat").item() == pytest.approx(1 - 6 / (5**0.5 * 10**0.5))


def test_the_loss_is_similarity_plus_distillation_over_layers():
    generator = torch.Generator().manual_seed(0)
    y, x, frozen_y, frozen_x = ([torch.randn(2, 4, 3, 3, generator=generator) for _ in range(2)] for _ in range(4))

    def d(a, b):
        return sum(
            (1 - functional.cosine_similarity(p.flatten(1), q.flatten(1))).mean() for p, q in zip(a, b, strict=True)
        )

    expected = d(x, y) + 0.3 * (d(y, frozen_y) + d(x, frozen_x))
    torch.testing.assert_close(adaptation_loss(y, x, frozen_y, frozen_x, 0.3, "flat"), expected)
    torch.testing.assert_close(adaptation_loss(y, y, y, y, 0.3, "position"), torch.tensor(0.0), atol=1e-6, rtol=0)


def test_own_pairs_show_every_photograph_once_a_pass_with_its_reconstruction(features):
    images = [photo(i) for i in range(5)]
    of = detector(features, batch_size=2)
    pairs = Pairs(of, images, of.settings.adaptation, seed=3)
    expected = {tuple(to_unit([image]).flatten()[:4].tolist()): of.reconstruct([image])[0] for image in images}
    seen = [pair for batch in pairs.batches(1) for pair in zip(*batch, strict=True)]
    assert len(seen) == len({tuple(y.flatten()[:4].tolist()) for y, _ in seen}) == 5
    for y, x in seen:
        torch.testing.assert_close(x, expected[tuple(y.flatten()[:4].tolist())], atol=1e-3, rtol=0)  # kept in 16 bits
    again = torch.cat([y for y, _ in pairs.batches(1)])
    torch.testing.assert_close(torch.stack([y for y, _ in seen]), again)
    assert not torch.equal(again, torch.cat([y for y, _ in pairs.batches(2)]))


def test_different_pairs_are_another_photograph_rebuilt_towards_this_one(features):
    levels = (40, 100, 160, 220)
    images = [np.full((*SHAPE, 3), level, np.uint8) for level in levels]

    def pair(weight):
        settings = make_settings(
            "xs",
            network={"prediction_type": "epsilon"},
            sampling={"match_level": False},
            adaptation={"pairs": "different", "batch_size": 4, "conditioning_weight": weight},
        )
        of = Detector(GaussianUNet(0.0, 1.0), create_scheduler("epsilon"), features, settings, SHAPE, device="cpu")
        ((y, x),) = Pairs(of, images, settings.adaptation, seed=0).batches(1)
        alone = of.reconstruct(images).mean(dim=(1, 2, 3))
        return y.mean(dim=(1, 2, 3)), x.mean(dim=(1, 2, 3)), alone

    y, x, alone = pair(0.0)
    own = {
        round(float(level), 4): float(value)
        for level, value in zip(to_unit(images).mean((1, 2, 3)), alone, strict=True)
    }
    # Without conditioning x is what its start becomes: each photograph serves once as a start, never for itself.
    assert sorted(x.tolist()) == pytest.approx(sorted(own.values()), abs=1e-5)
    assert all(abs(float(value) - own[round(float(level), 4)]) > 0.1 for level, value in zip(y, x, strict=True))
    y, towards, _ = pair(3.0)
    assert ((y - towards).abs() < (y - x).abs()).all()


def test_pairs_meet_other_noise_in_each_pass(features):
    """As published: start and steps are noisy, so one photograph is rebuilt in many ways."""
    settings = make_settings("paper", adaptation={"batch_size": 2, "pairs": "different"})
    of = Detector(GaussianUNet(0.0, 0.1), create_scheduler("epsilon"), features, settings, SHAPE, device="cpu")
    pairs = Pairs(of, [photo(0), photo(1)], settings.adaptation, seed=0)

    def rebuilt(epoch):
        target, reconstruction = next(iter(pairs.batches(epoch)))
        return reconstruction[target.flatten(1).sum(dim=1).argsort()]  # the order differs too

    torch.testing.assert_close(rebuilt(1), rebuilt(1), atol=0, rtol=0)
    assert (rebuilt(1) - rebuilt(2)).abs().mean() > 0.01


def blurred(target):
    return functional.avg_pool2d(target, 3, stride=1, padding=1)


def test_adapted_features_find_reconstructions_more_alike_and_stay_near_the_original(features):
    target = to_unit([photo(i) for i in range(8)])
    settings = AdaptationSettings(learning_rate=1e-4, distillation_weight=0.1)
    adapter = Adapter(features, settings, torch.device("cpu"))

    def apart(extractor):
        with torch.no_grad():
            pairs = zip(extractor(target), extractor(blurred(target)), strict=True)
            return float(sum(cosine_distance(a, b, "position") for a, b in pairs))

    features.eval()
    before, original = apart(features), apart(adapter.frozen)
    losses = [adapter.step(target, blurred(target)) for _ in range(12)]
    features.eval()
    assert losses[-1] < 0.8 * losses[0]
    assert apart(features) < 0.7 * before
    assert apart(adapter.frozen) == original == before


@pytest.mark.parametrize(("batch_norm", "moves"), [("frozen", False), ("train", True)])
def test_statistics_of_batch_norm(features, batch_norm, moves):
    before = {name: value.clone() for name, value in features.backbone.named_buffers() if "running" in name}
    adapter = Adapter(features, AdaptationSettings(batch_norm=batch_norm, similarity="flat"), torch.device("cpu"))
    target = to_unit([photo(i) for i in range(4)])
    adapter.step(target, blurred(target))
    after = {name: value for name, value in features.backbone.named_buffers() if "running" in name}
    assert any(not torch.equal(before[name], after[name]) for name in before) is moves


def adapt(features, epochs, store=None, judge=None, **settings):
    of = detector(features, batch_size=2, **settings)
    adapter = Adapter(features, of.settings.adaptation, of.device)
    pairs = Pairs(of, [photo(i) for i in range(4)], of.settings.adaptation, seed=0)
    history = adapter.run(pairs, epochs, seed=0, judge=judge, store=store)
    return history, {name: value.clone() for name, value in features.backbone.state_dict().items()}


def test_stopped_and_resumed_is_bit_for_bit_the_same(tmp_path):
    whole, expected = adapt(create_features("efficientnet-lite2", (2, 3)), 3)
    store = CheckpointStore(tmp_path)
    adapt(create_features("efficientnet-lite2", (2, 3)), 1, store)
    resumed, weights = adapt(create_features("efficientnet-lite2", (2, 3)), 3, store)
    assert resumed == whole
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_checkpoint_of_another_adaptation_is_not_taken_over(tmp_path):
    store = CheckpointStore(tmp_path)
    adapt(create_features("efficientnet-lite2", (2, 3)), 2, store, learning_rate=1e-2)
    _, expected = adapt(create_features("efficientnet-lite2", (2, 3)), 1)
    history, weights = adapt(create_features("efficientnet-lite2", (2, 3)), 1, store)
    assert [entry.epoch for entry in history] == [0, 1]
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert store.latest_step() == 1


@pytest.mark.parametrize(("aurocs", "chosen"), [((0.5, 0.6, 0.9, 0.7), 2), ((0.5, 0.4, 0.5, 0.3), 0)])
def test_the_pass_that_finds_synthetic_defects_best_is_kept(features, aurocs, chosen):
    original = {name: value.clone() for name, value in features.backbone.state_dict().items()}
    seen = []

    def judge():
        seen.append({name: value.clone() for name, value in features.backbone.state_dict().items()})
        return aurocs[len(seen) - 1]

    history, weights = adapt(features, 3, judge=judge)
    assert best_epoch(history) == chosen
    assert all(torch.equal(weights[name], seen[chosen][name]) for name in weights)
    assert all(torch.equal(weights[name], original[name]) for name in weights) is (chosen == 0)


def test_passes_end_where_they_no_longer_help(features):
    aurocs = iter([0.5, 0.6, 0.55, 0.4, 0.3, 0.9])
    history, _ = adapt(features, 20, judge=lambda: next(aurocs))
    assert [entry.epoch for entry in history] == [0, 1, 2, 3, 4]
    assert best_epoch(history) == 1


def test_without_a_judge_the_last_pass_is_kept():
    assert best_epoch([Epoch(0, None, None), Epoch(1, 0.3, None), Epoch(2, 0.4, None)]) == 2
