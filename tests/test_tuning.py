"""pytest tests/test_tuning.py"""

import numpy as np
import pytest
import torch

from analytic import GaussianUNet
from ddad.checkpoint import CheckpointStore
from ddad.config import make_settings
from ddad.detector import Detector
from ddad.features import create_features
from ddad.tuning import SyntheticTest, adapt_features, paint_halves, spread
from ddad.unet import create_scheduler

SHAPE = (64, 64)


def photo(seed):
    rng = np.random.default_rng(seed)
    return np.clip(128 + 3 * rng.standard_normal((*SHAPE, 1)), 0, 255).astype(np.uint8).repeat(3, axis=2)


@pytest.fixture(scope="module")
def test_set():
    settings = make_settings("xs", network={"prediction_type": "epsilon"})
    features = create_features("efficientnet-lite2", (2, 3))
    detector = Detector(GaussianUNet(0.0, 0.03), create_scheduler("epsilon"), features, settings, SHAPE, device="cpu")
    good = [photo(i) for i in range(10)]
    return SyntheticTest(detector, good, paint_halves(good, 24, seed=0))


def test_an_ideal_denoiser_finds_most_synthetic_defects(test_set):
    assert test_set.labels.sum() == 24
    assert test_set.image_auroc() > 0.8
    blind = torch.ones_like(test_set.distances())
    assert np.ptp(test_set.scores(blind, (1, 1, 1))) < 1e-6


def test_no_image_is_judged_by_statistics_of_itself(test_set):
    """What good images of one half look like changes the scores of the other half only."""
    distances = test_set.distances()
    before = test_set.scores(distances, (1, 1, 1))
    changed = distances.clone()
    judged = torch.from_numpy(test_set.halves == 0)
    fitted = judged & torch.from_numpy(~test_set.labels)
    changed[fitted] *= 3
    after = test_set.scores(changed, (1, 1, 1))
    defects_of_half = test_set.labels & (test_set.halves == 0)
    np.testing.assert_array_equal(after[defects_of_half], before[defects_of_half])
    others = test_set.halves == 1
    assert (after[others] != before[others]).all()


def test_a_defect_belongs_to_the_half_of_the_image_it_is_painted_on(test_set):
    for index in np.flatnonzero(test_set.labels):
        sources = [source for source in range(10) if (test_set.images[index] == test_set.images[source]).mean() > 0.5]
        assert [source % 2 for source in sources] == [test_set.halves[index]]


@pytest.mark.parametrize(
    ("epochs", "changes", "count", "said"),
    [
        (0, {"epochs": 0}, 40, "The features are not adapted: the settings say so."),
        (0, {}, 3, "The features are not adapted: that needs 32 good images to train on and 8 to choose by."),
        (0, {}, 40, "The features are not adapted: the time budget does not allow it."),
    ],
)
def test_why_features_are_not_adapted(test_set, tmp_path, epochs, changes, count, said):
    detector = test_set.detector
    settings = make_settings("xs", adaptation=changes)
    other = Detector(detector.unet, detector.scheduler, detector.features, settings, SHAPE, device="cpu")
    images = [photo(i) for i in range(count)]
    sentences = []
    record = adapt_features(other, images, images, epochs, CheckpointStore(tmp_path), sentences.append)
    assert (record["said"], sentences) == (said, [said])


def test_images_are_spread_evenly():
    assert spread([f"{i}" for i in range(10)], 5) == ["0", "2", "4", "6", "8"]
    assert spread(["a"], 5) == ["a"]
