"""pytest tests/test_conformal.py"""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from scipy import stats

from ddad.conformal import chance_of, images_needed, images_to_bound, p_value, promised_rate, rate_bound, threshold
from ddad.errors import ConfigError, DataError

rates = st.one_of(
    st.floats(0.001, 0.999),
    st.integers(2, 300).flatmap(lambda total: st.integers(1, total - 1).map(lambda k: k / total)),
)
scores = st.lists(st.integers(-5, 5) | st.floats(-5, 5), min_size=1, max_size=120)  # with ties


def test_p_value_counts_ties_against_the_part():
    calibration = [0.1, 0.2, 0.2, 0.4]
    assert p_value(0.2, calibration) == 4 / 5
    assert p_value(0.3, calibration) == 2 / 5
    assert p_value(0.5, calibration) == 1 / 5
    assert p_value(0.0, calibration) == 1.0
    assert isinstance(p_value(0.2, calibration), float)


@given(calibration=scores, score=scores)
def test_p_value_is_its_definition(calibration, score):
    expected = [(1 + sum(c >= s for c in calibration)) / (len(calibration) + 1) for s in score]
    np.testing.assert_array_equal(p_value(score, calibration), expected)
    np.testing.assert_array_equal(p_value(np.reshape(score, (1, -1)), calibration), [expected])


@settings(max_examples=300)
@given(calibration=scores, score=st.integers(-6, 6) | st.floats(-6, 6), false_alarms=rates)
@example(calibration=list(range(99)), score=98, false_alarms=0.01)  # ties with the largest: not anomalous
@example(calibration=list(range(99)), score=98.5, false_alarms=0.01)
@example(calibration=list(range(99)), score=70.5, false_alarms=0.29)  # 0.29 * 100 rounds to 28.999999999999996
@example(calibration=[1.0] * 99, score=1.0, false_alarms=0.5)
def test_above_the_threshold_is_the_same_as_a_small_p_value(calibration, score, false_alarms):
    assume(len(calibration) >= images_needed(false_alarms))
    for near in (score, *calibration, *np.nextafter(calibration, np.inf)):
        assert (near > threshold(calibration, false_alarms)) == (p_value(near, calibration) <= false_alarms)


@given(calibration=scores, false_alarms=rates)
def test_with_too_few_images_only_scores_above_all_are_anomalous(calibration, false_alarms):
    assume(len(calibration) < images_needed(false_alarms))
    assert threshold(calibration, false_alarms) == max(calibration)
    assert promised_rate(len(calibration), false_alarms) == 1 / (len(calibration) + 1)


@given(n=st.integers(1, 400), false_alarms=rates)
def test_promise_is_the_largest_rank_within_the_budget(n, false_alarms):
    exact = math.floor(Fraction(false_alarms) * (n + 1) + Fraction(1, 10**9))
    assert promised_rate(n, false_alarms) == pytest.approx(max(exact, 1) / (n + 1))
    assert (promised_rate(n, false_alarms) <= false_alarms) == (n >= images_needed(false_alarms))


@pytest.mark.parametrize(("rate", "images"), [(0.01, 99), (0.05, 19), (0.1, 9), (0.001, 999), (1 / 3, 2), (0.7, 1)])
def test_images_needed(rate, images):
    assert images_needed(rate) == images
    assert promised_rate(images, rate) <= rate


def test_the_promise_is_kept_on_average():
    """Good parts of a lopsided distribution; 4 standard errors of the binomial as tolerance."""
    generator = np.random.default_rng(0)
    runs, n, fresh = 2000, 39, 50
    for false_alarms in (0.05, 0.1, 0.01):  # the last one cannot be kept: 1 / 40 is promised
        alarms = []
        for _ in range(runs):
            calibration, parts = generator.lognormal(size=n), generator.lognormal(size=fresh)
            alarms.append(np.mean(parts > threshold(calibration, false_alarms)))
        promised = promised_rate(n, false_alarms)
        # Parts of one run share a calibration set, so runs, not parts, are the independent draws.
        assert abs(np.mean(alarms) - promised) < 4 * np.sqrt(promised * (1 - promised) / runs)


@given(n=st.integers(1, 400), false_alarms=rates)
def test_the_bound_is_clopper_and_pearsons(n, false_alarms):
    above = round(promised_rate(n, false_alarms) * (n + 1)) - 1  # calibration images above the threshold
    interval = stats.binomtest(above, n, alternative="less").proportion_ci(0.95, method="exact")
    assert rate_bound(n, false_alarms) == pytest.approx(interval.high)
    assert rate_bound(n, false_alarms) > promised_rate(n, false_alarms) or n == 1


def test_the_bound_in_numbers_a_plant_may_know():
    assert rate_bound(76, 0.01) == pytest.approx(0.0387, abs=5e-5)
    assert images_to_bound(0.01) == 299
    assert images_to_bound(0.05) == 59


@given(false_alarms=st.floats(0.001, 0.5))
def test_images_to_bound_are_the_fewest(false_alarms):
    n = images_to_bound(false_alarms)
    tightest = 1 / (2 * n)  # the largest score as the threshold
    assert rate_bound(n, tightest) <= false_alarms * (1 + 1e-9)
    assert n == 1 or rate_bound(n - 1, tightest) > false_alarms * (1 - 1e-9)


@pytest.mark.parametrize("draw", ["normal", "standard_cauchy", "coins"])
def test_one_calibration_set_in_twenty_breaks_the_bound(draw):
    """The share of good parts above a threshold is known exactly here, from the distribution they come from."""
    rng = np.random.default_rng(0)
    n, false_alarms, draws = 60, 0.05, 4000
    above = {
        "normal": stats.norm.sf,
        "standard_cauchy": stats.cauchy.sf,
        "coins": lambda value: stats.binom.sf(value, 30, 0.3),  # many ties
    }[draw]
    sample = (lambda: rng.binomial(30, 0.3, n)) if draw == "coins" else (lambda: getattr(rng, draw)(size=n))
    broken = np.mean([above(threshold(sample(), false_alarms)) > rate_bound(n, false_alarms) for _ in range(draws)])
    assert broken < 0.05 + 3 * (0.05 * 0.95 / draws) ** 0.5
    assert broken > 0.03 or draw == "coins"  # and it is not vacuous


def test_chance_of_so_many_false_alarms():
    """Against a simulation of both sets, and scipy's beta-binomial."""
    rng = np.random.default_rng(0)
    n, images, rate = 40, 30, 0.1
    scores = rng.standard_normal((20_000, n + images))
    limits = np.sort(scores[:, :n], axis=1)[:, -4]  # floor(0.1 * 41) = 4
    counts = (scores[:, n:] > limits[:, None]).sum(axis=1)
    for flagged in range(12):
        chance = chance_of(flagged, images, n, rate)
        assert chance == pytest.approx(np.mean(counts >= flagged), abs=0.012)
        assert chance == pytest.approx(stats.betabinom.sf(flagged - 1, images, 4, n + 1 - 4), abs=1e-9)
    with pytest.raises(DataError, match="expected between 0 and 30 flagged images, but found 31"):
        chance_of(31, images, n, rate)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, float("nan")])
def test_rates_outside_are_refused(rate):
    words = "expected a false-alarm rate above 0 and below 1, got .*; use 0.01 for one good part in a hundred"
    for call in (lambda: threshold([1.0], rate), lambda: promised_rate(5, rate), lambda: images_needed(rate)):
        with pytest.raises(ConfigError, match=words):
            call()


def test_calibration_that_cannot_rank_is_refused():
    with pytest.raises(DataError, match="expected finite calibration scores, but found none; calibrate again"):
        threshold([], 0.1)
    with pytest.raises(DataError, match="but found 1 of 2 not finite; calibrate again on good images"):
        p_value(1.0, [0.5, np.inf])
    with pytest.raises(DataError, match="expected anomaly scores that are numbers"):
        p_value(np.nan, [0.5])
    with pytest.raises(DataError, match="expected at least 1 calibration image, but found 0"):
        promised_rate(0, 0.1)
