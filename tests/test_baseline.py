"""pytest tests/test_baseline.py"""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial import KDTree
from torch import nn

from analytic import GaussianUNet
from ddad import baseline
from ddad.baseline import NearestNeighbours, farthest_points, fit_baseline
from ddad.config import make_settings
from ddad.data.demo import write_demo_dataset
from ddad.data.folder import scan
from ddad.data.samples import Sample, content_hash
from ddad.detector import Detector
from ddad.errors import ConfigError, DataError
from ddad.evaluation import evaluate
from ddad.features import create_features
from ddad.images import read_image
from ddad.unet import create_scheduler

SHAPE = (64, 96)


class Blocks(nn.Module):
    """Mean colours at two scales: features that a test can compute by hand."""

    def forward(self, image):
        return [nn.functional.avg_pool2d(image, size) for size in (8, 16)]


def good_image(seed):
    rng = np.random.default_rng(seed)
    return np.clip(128 + 12 * rng.standard_normal((*SHAPE, 3)), 0, 255).astype(np.uint8)


def defective_image(seed):
    image = good_image(seed)
    image[24:36, 60:76] = 255
    return image


@pytest.fixture(scope="module")
def features():
    return create_features("efficientnet-lite2", (2, 3))


@pytest.fixture(scope="module")
def fitted(features):
    return NearestNeighbours(features, SHAPE, 2.0, size=300).fit(good_image(i) for i in range(8))


def test_vectors_are_pooled_layers_on_the_first_grid():
    vectors = NearestNeighbours(Blocks(), SHAPE, 0).describe([good_image(0), good_image(1)])
    assert vectors.shape == (2, 8, 12, 6)
    blocks = (good_image(1) / 127.5 - 1).reshape(8, 8, 12, 8, 3).mean(axis=(1, 3))
    np.testing.assert_allclose(vectors[1, 3, 5, :3], blocks[2:5, 4:7].mean(axis=(0, 1)), atol=1e-6)
    np.testing.assert_allclose(vectors[1, 0, 0, :3], blocks[:2, :2].mean(axis=(0, 1)), atol=1e-6)


def test_distances_are_those_of_a_search_tree(fitted, monkeypatch):
    """With everything remembered, on the grid of the features; in chunks that do not fit evenly."""
    monkeypatch.setattr(baseline, "CHUNK", 37)
    grid = (8, 12)
    exact = NearestNeighbours(fitted.features, SHAPE, 0, map_shape=grid, size=10**6)
    train, test = [good_image(i) for i in range(4)], [good_image(9), defective_image(10)]
    maps, scores = exact.fit(train).score(test)
    tree = KDTree(exact.describe(train).flatten(0, 2).double().numpy())
    expected, _ = tree.query(exact.describe(test).double().numpy())
    np.testing.assert_allclose(maps.numpy(), expected, rtol=1e-5)
    np.testing.assert_allclose(scores.numpy(), expected.max(axis=(1, 2)), rtol=1e-5)
    # An image it remembers is at no distance.
    assert exact.score(train[:1])[1].item() < 1e-4 * scores.min().item()


def test_distances_far_from_the_origin_stay_exact():
    vectors = 1000 + np.random.default_rng(0).standard_normal((500, 20)).astype(np.float32)
    one = NearestNeighbours(Blocks(), SHAPE, 0)
    one.memory = torch.from_numpy(vectors[:300])
    expected, _ = KDTree(vectors[:300].astype(float)).query(vectors[300:].astype(float))
    np.testing.assert_allclose(one._to_nearest(torch.from_numpy(vectors[300:])).numpy(), expected, rtol=1e-5)


def test_same_image_same_score_alone_and_in_any_batch(fitted):
    images = [good_image(i) if i % 3 else defective_image(i) for i in range(20, 27)]
    alone = torch.cat([fitted.score([image])[0] for image in images])
    for order in (range(7), (3, 0, 6), (6, 5, 4, 3, 2, 1, 0)):
        maps, scores = fitted.score([images[i] for i in order])
        torch.testing.assert_close(maps, alone[list(order)], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(scores, maps.flatten(1).amax(dim=1))


@pytest.mark.parametrize("seed", range(5))
def test_farthest_points_cover_clusters_that_chance_misses(seed):
    """Twenty clusters of very different sizes: a few choices reach all of them."""
    rng = np.random.default_rng(seed)
    centres = 10 * rng.standard_normal((20, 8))
    counts = np.array([2000] * 2 + [20] * 18)
    points = np.repeat(centres, counts, axis=0) + 0.1 * rng.standard_normal((counts.sum(), 8))
    vectors = torch.from_numpy(rng.permutation(points)).float()

    def reach(chosen):
        return torch.cdist(vectors, vectors[chosen]).amin(dim=1).max().item()

    chosen = farthest_points(vectors, 30)
    assert len(set(chosen.tolist())) == 30
    subsets = [torch.from_numpy(rng.choice(len(vectors), 30, replace=False)) for _ in range(10)]
    assert reach(chosen) <= min(reach(subset) for subset in subsets)
    assert reach(chosen) < 1  # a point in every cluster


def test_each_farthest_point_is_the_farthest():
    vectors = torch.from_numpy(np.random.default_rng(0).standard_normal((200, 5))).float()
    chosen = farthest_points(vectors, 40).tolist()
    for count in range(1, 40):
        nearest = torch.cdist(vectors, vectors[chosen[:count]]).amin(dim=1)
        assert nearest[chosen[count]] == pytest.approx(nearest.max().item(), rel=1e-5)


def test_no_more_points_than_there_are_and_none_twice():
    assert sorted(farthest_points(torch.zeros(4, 3), 9).tolist()) == [0, 1, 2, 3]
    assert farthest_points(torch.eye(3), 1).tolist() == [0]


def test_candidates_are_bounded_seeded_and_from_all_images(monkeypatch):
    monkeypatch.setattr(baseline, "CANDIDATES", 200)
    images = [np.full((*SHAPE, 3), level, np.uint8) + good_image(0) // 16 for level in range(20, 220, 20)]

    def memory(seed, batch_size=4):
        return NearestNeighbours(Blocks(), SHAPE, 0, size=200, seed=seed).fit(iter(images), batch_size).memory

    assert memory(0).shape == (200, 6)
    assert torch.equal(memory(0), memory(0))
    assert not torch.equal(memory(0), memory(1))
    # 960 places, ten images of one brightness each: about 20 of each are kept.
    levels = np.histogram((memory(0)[:, 0].numpy() + 1) * 127.5, bins=np.arange(15, 235, 20))[0]
    assert levels.sum() == 200
    assert levels.min() >= 5
    one, other = (memory(0, size).sort(dim=0).values for size in (1, 7))
    torch.testing.assert_close(one, other)


def test_threshold_and_verdicts(fitted, tmp_path):
    fitted.calibrate((good_image(100 + i) for i in range(19)), 0.1)
    assert fitted.calibration.promised_rate == pytest.approx(0.1)
    samples = []
    for i, (kind, image) in enumerate([("good", good_image(200)), ("hole", defective_image(201))]):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
        samples.append(Sample(tmp_path / f"{i}.png", kind))
    (tmp_path / "damaged.png").write_bytes(b"nothing")
    found = list(fitted.inspect([samples[0], Sample(tmp_path / "damaged.png", "hole"), samples[1]], batch_size=2))
    assert [sample for sample, _ in found] == samples
    good, hole = (prediction for _, prediction in found)
    assert hole.anomaly_score > good.anomaly_score
    assert hole.is_anomalous is True
    assert hole.p_value == pytest.approx(1 / 20)
    assert hole.threshold == fitted.calibration.threshold
    row, column = np.unravel_index(hole.anomaly_map.argmax(), SHAPE)
    assert 24 <= row < 36
    assert 60 <= column < 76
    left, top, right, bottom = hole.regions[0].box
    assert left <= column < right
    assert top <= row < bottom


def test_nothing_to_remember(features):
    with pytest.raises(DataError, match="Expected good images to remember, found none"):
        NearestNeighbours(features, SHAPE, 2.0).fit([])
    with pytest.raises(RuntimeError, match="call fit"):
        NearestNeighbours(features, SHAPE, 2.0).score([good_image(0)])


# -- the yardstick of a model, on files --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return scan(write_demo_dataset(tmp_path_factory.mktemp("demo") / "part", train=30, good=6, defective=10, size=128))


@pytest.fixture
def detector(data, features):
    """As `fit` leaves it, on the first 20 images; the network does not matter here."""
    settings = make_settings("xs", image_size=96, false_alarms=0.2, network={"prediction_type": "epsilon"})
    hashes = [content_hash(sample.path) for sample in data.train]
    record = {"data": {"train": hashes[:20], "select": hashes[20:22], "calibration": hashes[22:]}}
    unet, scheduler = GaussianUNet(0.0, 0.1), create_scheduler("epsilon")
    return Detector(unet, scheduler, features, settings, (96, 96), record=record, device="cpu")


def test_painted_defects_score_above_good_parts(detector, data):
    """At another size than the model's, too; maps have the model's size either way."""
    for shape in (None, (128, 128)):
        yardstick = fit_baseline(detector, data, shape=shape, workers=2, size=1000)
        assert len(yardstick.calibration.scores) == 8
        result = evaluate(yardstick.inspect(data.test, workers=2), false_alarms=0.2, max_examples=0)
        assert result.metrics["image_auroc"] > 0.9
        assert result.metrics["pixel_auroc"] > 0.9
        assert result.metrics["miss_rate"] < 0.5
        assert {prediction.anomaly_map.shape for _, prediction in yardstick.inspect(data.test[:3])} == {(96, 96)}


def test_it_remembers_what_was_trained_on_and_ranks_what_ranked(detector, data):
    yardstick = fit_baseline(detector, data, batch_size=3, size=500)
    images = [read_image(sample.path, (96, 96)) for sample in data.train]
    same = NearestNeighbours(detector.features, (96, 96), detector.sigma, size=500).fit(images[:20], 3)
    assert torch.equal(yardstick.memory, same.memory)
    scores = sorted(float(same.score([image])[1]) for image in images[22:])
    np.testing.assert_allclose(yardstick.calibration.scores, scores, rtol=1e-4)


def test_in_folds_select_images_rank_too(detector, data):
    detector.calibrate_across([np.full((96, 96, 3), i, np.uint8) for i in range(4)], 2)
    assert len(fit_baseline(detector, data, size=50).calibration.scores) == 10


def test_features_that_were_adapted_are_not_used(detector, data):
    expected = fit_baseline(detector, data, size=50).memory
    detector.features = create_features("efficientnet-lite2", (2, 3))
    with torch.no_grad():
        for parameter in detector.features.parameters():
            parameter.mul_(1.1)
    detector.record["adaptation"] = {"epochs": 2}
    assert torch.equal(fit_baseline(detector, data, size=50).memory, expected)


def test_other_images_than_those_trained_on(detector, data):
    detector.record["data"]["train"] = ["0" * 64, *detector.record["data"]["train"]]
    with pytest.raises(DataError, match=r"Expected in .*part the 21 good images .* trained on, found 20 of them; name"):
        fit_baseline(detector, data)
    detector.record = {}
    with pytest.raises(DataError, match="the 0 good images"):
        fit_baseline(detector, data)


def test_without_calibration_images_there_is_no_verdict(detector, data):
    detector.record["data"]["calibration"] = ["0" * 64]
    yardstick = fit_baseline(detector, data, size=50)
    [(_, prediction)] = yardstick.inspect(data.test[:1])
    assert (prediction.p_value, prediction.is_anomalous, prediction.threshold) == (None, None, None)


def test_a_shape_the_features_do_not_work_at(detector, data):
    with pytest.raises(ConfigError, match="Expected features that work on images of 0 x 8"):
        fit_baseline(detector, data, shape=(0, 8))
