"""pytest tests/test_calibration.py"""

import numpy as np
import pytest
import torch

from ddad.anomaly_map import image_score, standardise
from ddad.calibration import (
    Calibration,
    Ranking,
    calibrate,
    cross_scores,
    fit_units,
    map_scales,
    position_statistics,
    weighted,
)
from ddad.data.samples import FOLDED_FROM
from ddad.errors import DataError


def test_scale_is_the_median_peak_of_good_images():
    distances = torch.zeros(3, 2, 4, 4)
    distances[:, 0, 1, 1] = torch.tensor([1.0, 5.0, 3.0])
    distances[:, 1, 2, 2] = torch.tensor([10.0, 50.0, 30.0])
    assert map_scales(distances, least=1e-6) == (3.0, 30.0)


def test_a_distance_that_is_zero_everywhere_does_no_harm():
    nothing = torch.zeros(3, 1, 8, 8)
    assert map_scales(nothing, least=1.0) == (1.0,)
    mean, spread = position_statistics(nothing)
    assert torch.isfinite(standardise(nothing, mean, spread)).all()


def test_position_statistics_find_where_good_parts_differ():
    """With many images the maps are the true mean and, half drawn to the global one, the true spread."""
    generator = torch.Generator().manual_seed(0)
    distances = torch.randn(2000, 1, 42, 84, generator=generator) + 5
    distances[..., 42:] = 3 * distances[..., 42:]  # mean 15, spread 3 on the right
    mean, spread = position_statistics(distances)
    for columns, level, deviation in ((slice(8, 34), 5, 1), (slice(50, 76), 15, 3)):
        torch.testing.assert_close(mean[..., columns].mean(), torch.tensor(float(level)), rtol=0.02, atol=0)
        torch.testing.assert_close(spread[..., columns].mean(), torch.tensor((deviation + 2) / 2), rtol=0.03, atol=0)


def test_few_images_are_drawn_towards_the_global_value():
    distances = torch.zeros(1, 1, 32, 32)
    distances[..., 16:] = 4.0
    mean, spread = position_statistics(distances)
    assert 2 < mean[0, 16, 28] < 3  # 2 is the global mean, 4 what this one image shows
    assert spread.min() > 0.9  # of one image: the spread over places


def calibrated(count, false_alarms):
    scores = np.arange(1, count + 1) / count
    return calibrate((1.0,), scores.tolist(), false_alarms)


def test_verdict_is_the_p_value_against_the_budget():
    calibration = calibrated(99, 0.05)
    ranking = Ranking(calibration)
    for score in np.linspace(0, 1.1, 300):
        assert ranking.is_anomalous(score) == (ranking.p_value(score) <= 0.05)
    assert calibration.promised_rate == pytest.approx(0.05)


def test_the_promise_is_plain():
    assert calibrated(99, 0.01).promise() == (
        "99 good calibration images: about 1 % of good parts are flagged in the long run, with 95 % confidence at most "
        "3 %. A bound of 1 % takes at least 299 images."
    )


def test_with_enough_images_only_promise_and_bound_are_said():
    assert calibrated(99, 0.05).promise() == (
        "99 good calibration images: about 5 % of good parts are flagged in the long run, with 95 % confidence at most "
        "9 %."
    )


def test_too_few_images_say_so():
    calibration = calibrated(24, 0.01)
    assert calibration.threshold == 1.0  # the largest
    assert calibration.promised_rate == pytest.approx(1 / 25)
    assert calibration.promise() == (
        "24 good calibration images: about 4 % of good parts are flagged in the long run, with 95 % confidence at most "
        "12 %. A bound of 1 % takes at least 299 images. 1 % was asked for and cannot be promised with fewer than 99 "
        "calibration images; the threshold is the largest score among them."
    )


def test_without_calibration_there_is_no_verdict():
    ranking = Ranking(Calibration(scales=(1.0,)))
    assert ranking.p_value(3.0) is None
    assert ranking.is_anomalous(3.0) is None
    assert Calibration(scales=(1.0,)).promise() == "Not calibrated: there is no threshold, so no verdict."


def test_a_score_that_is_not_a_number_is_refused():
    with pytest.raises(DataError, match="Expected finite scores for the calibration images, found NaN or infinity"):
        calibrate((1.0,), [float("nan")], 0.05)


def test_calibration_survives_json():
    calibration = calibrated(10, 0.2)
    assert Calibration.model_validate_json(calibration.model_dump_json()) == calibration


def good_maps(count, rng):
    """Distances of two kinds with heavy tails, larger at some places than at others."""
    level = np.exp(0.5 * np.sin(np.linspace(0, 6, 64)).reshape(1, 1, 8, 8))
    return torch.from_numpy(level * rng.gamma(1.5, size=(count, 2, 8, 8)).astype(np.float32))


def score_in(distances, units):
    return image_score(weighted(distances, units, (1.0, 0.5)))


@pytest.mark.parametrize(("images", "false_alarms"), [(FOLDED_FROM, 0.01), (24, 0.05), (24, 0.2)])
@pytest.mark.parametrize("by_position", [True, False])
def test_cross_conformal_keeps_the_promise_and_the_bound(images, false_alarms, by_position):
    """Few images that both give units and rank, against many new ones, 200 times over."""
    rng = np.random.default_rng(0)
    repeats = 200
    rates = []
    for _ in range(repeats):
        held_out = good_maps(images, rng)
        scores = cross_scores(held_out, 10, by_position, score_in)
        units = fit_units(held_out, by_position)
        calibration = calibrate(units.scales, scores, false_alarms, folds=10)
        new = score_in(good_maps(400, rng), units).numpy()
        rates.append(float(np.mean(new > calibration.threshold)))
    deviation = np.std(rates) / repeats**0.5
    assert np.mean(rates) < calibration.promised_rate + 2 * deviation
    assert np.mean(rates) > 0.5 * calibration.promised_rate  # not by flagging nothing
    assert np.mean(np.array(rates) > calibration.rate_bound) < 0.05 + 2 * (0.05 * 0.95 / repeats) ** 0.5


def test_ranking_the_images_that_gave_the_units_breaks_the_promise():
    """Why there are folds: without them the same images look better than new ones."""
    rng = np.random.default_rng(0)
    rates = []
    for _ in range(100):
        held_out = good_maps(24, rng)
        units = fit_units(held_out, True)
        limit = calibrate(units.scales, score_in(held_out, units).tolist(), 0.2).threshold
        rates.append(float(np.mean(score_in(good_maps(400, rng), units).numpy() > limit)))
    assert np.mean(rates) > 0.21
