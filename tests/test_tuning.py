"""pytest tests/test_tuning.py"""

import numpy as np
import pytest
import torch

from analytic import GaussianUNet
from ddad.checkpoint import CheckpointStore
from ddad.config import make_settings
from ddad.detector import Detector
from ddad.errors import ConfigError
from ddad.features import create_features
from ddad.tuning import SyntheticTest, adapt_features, paint_halves, tune
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
    assert np.ptp(test_set.maps(blind).numpy()) < 1e-6


def test_no_image_is_judged_by_statistics_of_itself(test_set):
    """What good images of one half look like changes the maps of the other half only."""
    distances = test_set.distances()
    before = test_set.maps(distances)
    changed = distances.clone()
    judged = torch.from_numpy(test_set.halves == 0)
    fitted = judged & torch.from_numpy(~test_set.labels)
    changed[fitted] *= 3
    after = test_set.maps(changed)
    defects_of_half = test_set.labels & (test_set.halves == 0)
    torch.testing.assert_close(after[defects_of_half], before[defects_of_half], atol=0, rtol=0)
    others = torch.from_numpy(test_set.halves == 1)
    assert (after[others] != before[others]).flatten(1).any(dim=1).all()


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


@pytest.mark.slow
def test_tuning_turns_off_what_only_adds_noise(test_set, monkeypatch):
    """Features of random layers are useless here beside an ideal denoiser's pixels, and the search finds that out."""
    monkeypatch.setattr("ddad.tuning.DEFECTS", 48)
    old = test_set.detector
    settings = old.settings.model_copy(
        update={
            "scoring": old.settings.scoring.model_copy(update={"pixel_weight": 0.25, "layer_weights": (4.0, 4.0)}),
            "sampling": old.settings.sampling.model_copy(update={"start_timestep": 80}),
        }
    )
    detector = Detector(old.unet, old.scheduler, old.features, settings, SHAPE, device="cpu")
    said = []
    record = tune(detector, [photo(i) for i in range(16)], on_stage=said.append)
    assert record["after"] > record["before"]
    assert said[-1] == record["said"]
    for name, value in record["changes"].items():
        group, key = name.split(".")
        stored = getattr(getattr(detector.settings, group), key)
        assert stored == value
    for trial in record["trials"]:
        (name,) = trial["changes"]
        assert name in said[record["trials"].index(trial)]
    # What it says can be repeated.
    again = SyntheticTest(detector, [photo(i) for i in range(16)], paint_halves([photo(i) for i in range(16)], 48, 0))
    assert again.quality(again.distances()).mean() == pytest.approx(record["after"], abs=1e-6)


def test_tuning_without_time_changes_nothing(test_set, monkeypatch):
    monkeypatch.setattr("ddad.tuning.DEFECTS", 16)
    old = test_set.detector
    detector = Detector(old.unet, old.scheduler, old.features, old.settings, SHAPE, device="cpu")
    record = tune(detector, [photo(i) for i in range(8)], seconds=0)
    assert (record["changes"], record["trials"], detector.settings) == ({}, [], old.settings)
    assert record["said"].endswith("nothing changed.")


def test_scores_that_depend_on_the_batch_cannot_be_tuned(test_set):
    old = test_set.detector
    settings = make_settings("paper", scoring={"features": "efficientnet-lite2"})
    detector = Detector(old.unet, old.scheduler, old.features, settings, SHAPE, device="cpu")
    with pytest.raises(ConfigError, match=r"Expected a model that scores each image by itself, found batch-max fusion"):
        tune(detector, [photo(i) for i in range(8)])
