"""pytest tests/test_calibration.py"""

import numpy as np
import pytest
import torch

from ddad.calibration import Calibration, Ranking, calibrate, fused_map, map_scales
from ddad.errors import DataError


def test_scale_is_the_median_peak_of_good_images():
    peaks = [1.0, 5.0, 3.0]
    distances = []
    for peak in peaks:
        one = torch.zeros(1, 4, 4)
        one[0, 1, 1] = peak
        distances.append([one, 10 * one])
    assert map_scales(distances, sigma=0.0) == (3.0, 30.0)


def test_a_distance_that_is_zero_everywhere_does_no_harm():
    scales = map_scales([[torch.zeros(1, 4, 4)]], sigma=1.0)
    assert torch.isfinite(fused_map([torch.zeros(1, 4, 4)], scales, (1.0,), 1.0)).all()


def test_a_typical_good_peak_is_one_whatever_the_weights():
    one = torch.zeros(1, 4, 4)
    one[0, 1, 1] = 3.0
    for weights in ((1.0, 1.0), (7.0, 0.5)):
        assert float(fused_map([one, 10 * one], (3.0, 30.0), weights, 0.0).max()) == pytest.approx(1.0)


def calibrated(count, false_alarms):
    scores = np.arange(1, count + 1) / count
    maps = [np.full((2, 2), score, np.float32) for score in scores]
    return calibrate((1.0,), maps, scores.tolist(), false_alarms)


def test_verdict_is_the_p_value_against_the_budget():
    calibration = calibrated(99, 0.05)
    ranking = Ranking(calibration)
    for score in np.linspace(0, 1.1, 300):
        assert ranking.is_anomalous(score) == (ranking.p_value(score) <= 0.05)
    assert calibration.promised_rate == pytest.approx(0.05)
    assert calibration.map_limit == pytest.approx(calibration.threshold)


def test_the_promise_is_plain():
    assert calibrated(99, 0.01).promise() == (
        "99 good calibration images: about 1.0% of good parts are flagged in the long run."
    )


def test_too_few_images_say_so():
    calibration = calibrated(24, 0.01)
    assert calibration.threshold == 1.0  # the largest
    assert calibration.promised_rate == pytest.approx(1 / 25)
    assert calibration.promise() == (
        "24 good calibration images: about 4.0% of good parts are flagged in the long run. 1.0% was asked for and "
        "cannot be promised with fewer than 99 calibration images; the threshold is the largest score among them."
    )


def test_without_calibration_there_is_no_verdict():
    ranking = Ranking(Calibration(scales=(1.0,)))
    assert ranking.p_value(3.0) is None
    assert ranking.is_anomalous(3.0) is None
    assert Calibration(scales=(1.0,)).promise() == "Not calibrated: there is no threshold, so no verdict."


def test_a_score_that_is_not_a_number_is_refused():
    with pytest.raises(DataError, match="Expected finite scores for the calibration images, found NaN or infinity"):
        calibrate((1.0,), [np.zeros((2, 2))], [float("nan")], 0.05)


def test_calibration_survives_json():
    calibration = calibrated(10, 0.2)
    assert Calibration.model_validate_json(calibration.model_dump_json()) == calibration
