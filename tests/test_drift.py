"""pytest tests/test_drift.py"""

import json
from functools import cache

import numpy as np
import pytest
from scipy import ndimage
from scipy.stats import kstest

from ddad.conformal import p_value
from ddad.data.demo import render_part
from ddad.drift import DriftMonitor
from ddad.errors import ConfigError, DataError
from ddad.prediction import PhotoStatistics, photo_statistics

SIZE = 64
CALIBRATION, WINDOW = 60, 30


def texture(seed):
    """A picture filled with blotches, under light that differs a little: uint8 (SIZE, SIZE, 3)."""
    rng = np.random.default_rng(seed)
    blotches = ndimage.gaussian_filter(rng.normal(size=(SIZE, SIZE)), rng.uniform(1.2, 1.6))
    rows, columns = np.mgrid[:SIZE, :SIZE] / SIZE - 0.5
    slope = rng.normal(0, 8) * columns + rng.normal(0, 8) * rows
    grey = rng.normal(120, 4) + 18 * blotches / blotches.std() + slope + rng.normal(0, 1.5, (SIZE, SIZE))
    return np.repeat(np.clip(grey, 0, 255).astype(np.uint8)[..., None], 3, axis=2)


def part(seed):
    return render_part(np.random.default_rng(seed), size=SIZE)[0]


@cache
def photographs(kind):
    make = {"part": part, "texture": texture}[kind]
    return [make(seed) for seed in range(CALIBRATION + WINDOW)]


@cache
def calibration(kind):
    return [photo_statistics(image) for image in photographs(kind)[:CALIBRATION]]


def brighter(image):
    return np.clip(image.astype(int) + 15, 0, 255).astype(np.uint8)


def blurred(image):
    return ndimage.gaussian_filter(image, (1, 1, 0))


def moved(image, share, axis, black):
    """A copy moved right or down (share > 0), left or up, by a share of the side; the rest is black or the last row."""
    step = round(share * SIZE)
    places = np.arange(SIZE) - step
    copy = np.take(image, np.clip(places, 0, SIZE - 1), axis=axis)
    if black:
        copy[(slice(None),) * axis + ((places < 0) | (places >= SIZE),)] = 0
    return copy


def run(monitor, scores, statistics=PhotoStatistics(100, 0, 0.5, 0.5)):  # noqa: B008 (immutable)
    """All alarms of a stream. statistics: one for all, or one per score."""
    if isinstance(statistics, PhotoStatistics):
        statistics = [statistics] * len(scores)
    return [alarm for pair in zip(scores, statistics, strict=True) for alarm in monitor.update(*pair)]


def alarms_of(kind, change, seed=0):
    """Alarms after one window of changed photographs, whose scores are good."""
    rng = np.random.default_rng(seed)
    monitor = DriftMonitor(rng.normal(size=CALIBRATION), calibration(kind), window=WINDOW)
    seen = [photo_statistics(change(image)) for image in photographs(kind)[CALIBRATION:]]
    return run(monitor, rng.normal(size=WINDOW), seen)


def same(count):
    return [PhotoStatistics(100, 0, 0.5, 0.5)] * count


DRAWS = {
    "heavy tail": lambda rng, count: rng.standard_cauchy(count),
    "ties": lambda rng, count: rng.integers(0, 3, count).astype(float),
    "rounded": lambda rng, count: np.round(rng.lognormal(size=count), 1),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_good_photographs_alarm_at_most_at_the_stated_rate(draw):
    """Expected alarms a window, over calibration sets; windows overlap, and the quantities are five strangers."""
    rng, rate, window, repeats = np.random.default_rng(1), 0.5, 10, 350
    count = 0
    for _ in range(repeats):
        before, now = draw(rng, (15, 5)), draw(rng, (window * 3 // 2, 5))  # two looks: the rate of one window
        monitor = DriftMonitor(before[:, 0], before[:, 1:], window=window, false_alarms=rate)
        count += len(run(monitor, now[:, 0], [PhotoStatistics(*row) for row in now[:, 1:]]))
    assert count / repeats <= rate + 3 * np.sqrt(2 * rate / repeats)  # twice the variance: looks overlap


def test_the_simulation_can_fail():
    """Against the uniform distribution, as if 15 calibration scores were infinitely many, alarms are too many."""
    rng, repeats = np.random.default_rng(2), 400
    calibrations = rng.normal(size=(repeats, 15))
    p_values = [kstest(p_value(rng.normal(size=50), calibration), "uniform").pvalue for calibration in calibrations]
    assert np.mean(np.array(p_values) < 0.05) > 0.2


def test_one_test_holds_its_level_on_average_over_calibration_sets():
    rng, rate, repeats = np.random.default_rng(3), 0.5, 1000
    calls = []
    for _ in range(repeats):
        monitor = DriftMonitor(rng.normal(size=40), same(40), window=20, false_alarms=rate)
        calls.append(bool(run(monitor, rng.normal(size=20))))
    # 0.05 for the scores' share; an exact test of this size uses most of it, so it is neither broken nor asleep.
    assert 0.02 < np.mean(calls) <= 0.05 + 3 * np.sqrt(0.05 / repeats)


@pytest.mark.parametrize(("shift", "words"), [(2, "score higher"), (-2, "score lower")])
def test_shifted_scores_alarm(shift, words):
    rng = np.random.default_rng(4)
    monitor = DriftMonitor(rng.normal(size=100), same(100))
    assert run(monitor, rng.normal(size=100)) == []
    alarms = run(monitor, rng.normal(shift, 1, size=50))
    assert {alarm.what for alarm in alarms} == {"scores"}
    assert alarms[-1].images == 150
    assert alarms[-1].p_value < 1e-5
    assert words in alarms[-1].message
    assert "heatmaps" in alarms[-1].message


@pytest.mark.parametrize(("spread", "words"), [(0, "vary less"), (6, "vary more")])
def test_scores_that_only_change_their_spread_alarm(spread, words):
    """Spread 0 is a camera that sends one picture for ever: each is typical, but nothing varies."""
    rng = np.random.default_rng(5)
    [alarm] = run(DriftMonitor(rng.normal(size=100), same(100)), spread * rng.normal(size=50))
    assert f"{words} in anomaly score than at calibration (the middle half from" in alarm.message


def test_a_few_defective_parts_do_not_alarm_but_many_do():
    rng = np.random.default_rng(6)

    def windows_with_alarm(share):
        found = 0
        for _ in range(100):
            defective = rng.random(50) < share
            monitor = DriftMonitor(rng.normal(size=100), same(100))
            found += bool(run(monitor, np.where(defective, 10.0, rng.normal(size=50))))
        return found

    assert windows_with_alarm(0.05) == 0
    assert windows_with_alarm(0.7) == 100


@pytest.mark.parametrize("kind", ["part", "texture"])
def test_good_photographs_do_not_alarm(kind):
    assert alarms_of(kind, lambda image: image) == []


@pytest.mark.parametrize("kind", ["part", "texture"])
def test_a_brighter_picture_alarms_on_brightness_alone(kind):
    [alarm] = alarms_of(kind, brighter)
    assert alarm.what == "brightness"
    assert "are brighter than at calibration (by 1" in alarm.message
    [alarm] = alarms_of(kind, lambda image: (0.8 * image).astype(np.uint8))
    assert alarm.what == "brightness"
    assert "are darker" in alarm.message


@pytest.mark.parametrize("kind", ["part", "texture"])
@pytest.mark.parametrize("sigma", [1, 2])
def test_a_blurred_picture_alarms_on_focus(kind, sigma):
    alarms = {alarm.what: alarm for alarm in alarms_of(kind, lambda i: ndimage.gaussian_filter(i, (sigma, sigma, 0)))}
    assert "are blurrier" in alarms["focus"].message
    assert "less fine detail" in alarms["focus"].message
    assert "brightness" not in alarms


@pytest.mark.parametrize("kind", ["part", "texture"])
@pytest.mark.parametrize("black", [True, False], ids=["black", "last row"])
@pytest.mark.parametrize(
    ("axis", "share", "words"),
    [(1, 0.1, "further right"), (1, -0.1, "further left"), (0, 0.1, "further down"), (0, -0.1, "further up")],
)
def test_a_moved_picture_alarms_on_framing(kind, black, axis, share, words):
    alarms = {alarm.what: alarm for alarm in alarms_of(kind, lambda image: moved(image, share, axis, black))}
    assert words in alarms["framing"].message
    assert "of the width" in alarms["framing"].message or axis == 0
    if not black:  # a black strip is darker, and has a sharp edge
        assert set(alarms) == {"framing"}


def test_photo_statistics_mean_what_they_say():
    flat = np.full((5, 9, 3), 70, dtype=np.uint8)
    brightness, focus, horizontal, vertical = photo_statistics(flat)
    assert (brightness, focus, horizontal, vertical) == (pytest.approx(70), 0, 0.5, 0.5)
    flat[:, 6:] = 90  # one edge, between columns 5 and 6
    assert photo_statistics(flat).horizontal == pytest.approx(6 / 9)
    assert photo_statistics(flat.transpose(1, 0, 2)).vertical == pytest.approx(6 / 9)
    noise = np.random.default_rng(0).integers(0, 100, (40, 40, 1), dtype=np.uint8).repeat(3, axis=2)
    assert photo_statistics(noise + np.uint8(50)).focus == pytest.approx(photo_statistics(noise).focus, abs=1e-6)
    assert photo_statistics(noise * np.uint8(2)).focus == pytest.approx(photo_statistics(noise).focus, abs=0.01)
    assert photo_statistics(blurred(noise)).focus < photo_statistics(noise).focus - 0.5


def test_a_restarted_monitor_goes_on():
    rng = np.random.default_rng(7)
    scores, stream = rng.normal(size=100), np.concatenate([rng.normal(size=70), rng.normal(2, 1, size=80)])
    straight = run(DriftMonitor(scores, same(100)), stream)
    first = DriftMonitor(scores, same(100))
    early = run(first, stream[:93])
    second = DriftMonitor(scores[::-1], same(100))  # calibration has no order
    second.restore(json.loads(json.dumps(first.state())))
    assert second.images == 93
    assert early + run(second, stream[93:]) == straight
    assert len(straight) >= 2


def test_looks_come_after_each_half_window():
    monitor = DriftMonitor(np.arange(20.0), same(20), window=11)
    assert [alarm.images for alarm in run(monitor, np.full(40, 99.0))] == [11, 17, 23, 29, 35]


@pytest.mark.parametrize("settings", [{"window": 1}, {"false_alarms": 0}, {"false_alarms": 1}])
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=r"Expected a .* found .*; use "):
        DriftMonitor(np.arange(20.0), same(20), **settings)


def test_few_calibration_images_can_still_alarm_or_are_refused():
    rng = np.random.default_rng(8)
    [alarm] = run(DriftMonitor(rng.normal(size=4), same(4)), np.full(50, 99.0))
    assert alarm.what == "scores"
    with pytest.raises(DataError, match=r"Expected scores of at least 4 calibration images, .* found 3; calibrate"):
        DriftMonitor([1, 2, 3], same(20))
    with pytest.raises(DataError, match=r"Expected photo statistics of at least 4 .* found 0;"):
        DriftMonitor([1, 2, 3, 4], [])


def test_wrong_values_are_refused_and_forgotten():
    with pytest.raises(DataError, match="Expected finite calibration scores, found NaN or infinity; calibrate again"):
        DriftMonitor([1, np.nan], same(2))
    monitor = DriftMonitor(np.arange(20.0), same(20))
    with pytest.raises(DataError, match="Expected a finite score and finite photo statistics, found"):
        monitor.update(float("nan"), same(1)[0])
    assert monitor.images == 0
    for image in (np.zeros((9, 9, 3)), np.zeros((9, 9), np.uint8), np.zeros((2, 9, 3), np.uint8)):
        with pytest.raises(DataError, match=r"Expected a uint8 image of shape \(height, width, 3\), .* found .*; read"):
            photo_statistics(image)


def test_a_strange_state_is_refused():
    monitor, other = DriftMonitor(np.arange(20.0), same(20)), DriftMonitor(np.arange(21.0), same(20))
    wider = DriftMonitor(np.arange(20.0), same(20), window=60)
    for state in (other.state(), wider.state(), monitor.state() | {"images": 9}):
        with pytest.raises(DataError, match="from the same calibration and window, found another one; start afresh"):
            monitor.restore(state)
    with pytest.raises(DataError, match="Expected the saved state of a drift monitor, found 4 values that do not fit"):
        monitor.restore({})
