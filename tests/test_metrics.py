"""Run alone: pytest tests/test_metrics.py (seconds)."""

from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from ddad.errors import ConfigError, DataError
from ddad.metrics import (
    PixelCurves,
    PixelMetrics,
    auroc_difference_interval,
    image_intervals,
    image_metrics,
    pixel_intervals,
    pixel_metrics,
    rate_interval,
    weighted_image_metrics,
)


def compute(maps, masks, exact_limit=10**9, fpr_limits=(0.3, 0.05)):
    metrics = PixelMetrics(exact_limit)
    for anomaly_map, mask in zip(maps, masks, strict=True):
        metrics.update(np.asarray(anomaly_map, np.float32), np.asarray(mask, bool))
    return metrics.compute(fpr_limits)


def aupro_by_thresholds(maps, masks, limit):
    """The definition, one threshold after the other."""
    maps, masks = np.asarray(maps, np.float32), np.asarray(masks, bool)
    regions = []
    for index, mask in enumerate(masks):
        labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [(index, labels == label) for label in range(1, count + 1)]
    fpr, pro = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        above = maps >= threshold
        fpr.append(above[~masks].mean())
        pro.append(np.mean([above[index][region].mean() for index, region in regions]))
    area = 0.0
    for x0, x1, y0, y1 in zip(fpr[:-1], fpr[1:], pro[:-1], pro[1:], strict=True):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            area += (end - x0) * (y0 + (y1 - y0) * (end - x0) / (x1 - x0) / 2)
    return area / limit


# ---- images


def test_image_metrics_agree_with_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.random(300) < 0.3
    scores = np.round(rng.normal(size=300) + labels, 1)  # with ties
    result = image_metrics(scores, labels)
    assert result["image_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert result["image_ap"] == pytest.approx(average_precision_score(labels, scores), abs=1e-6)


def test_large_scores_are_not_merged():
    scores, labels = [100, 200, 300, 400], [False, False, True, True]
    assert image_metrics(scores, labels) == {"image_auroc": 1, "image_ap": 1, "image_f1_max": 1}


def test_f1_max_on_paper():
    # Best is "everything at or above 2": 2 of 2 found, 1 false alarm, F1 = 2 * 2 / (2 * 2 + 1).
    assert image_metrics([4, 3, 2, 1], [1, 0, 1, 0])["image_f1_max"] == pytest.approx(0.8)


def test_equal_scores_are_chance():
    assert image_metrics([5, 5, 5], [0, 1, 1])["image_auroc"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        ([1, 2], [0, 0], "expected good and defective test images, found 2 good and no defective ones; add images"),
        ([1, 2], [1, 1], "found no good and 2 defective ones"),
        (
            [1, np.nan, np.inf],
            [0, 1, 1],
            "expected finite anomaly scores, found 2 of 3 that are NaN or infinite; check",
        ),
        ([1, 2], [1], "expected one label per score, found 2 scores and 1 labels; pair them"),
    ],
)
def test_image_mistakes(scores, labels, message):
    with pytest.raises(DataError, match=message):
        image_metrics(scores, labels)


# ---- pixels

MASK = np.zeros((10, 10), bool)
MASK[2:4, 2:4] = True  # 96 good pixels


def test_perfect_map():
    assert compute([MASK * 3.0], [MASK]) == {"pixel_auroc": 1, "pixel_ap": 1, "aupro": 1, "aupro_0.05": 1}


def test_constant_map_rises_along_the_diagonal():
    result = compute([np.full((10, 10), 0.7)], [MASK])
    assert result["pixel_auroc"] == 0.5
    assert result["pixel_ap"] == pytest.approx(0.04)
    assert result["aupro"] == pytest.approx(0.15)  # area limit^2 / 2, divided by the limit
    assert result["aupro_0.05"] == pytest.approx(0.025)


def test_inverted_map():
    result = compute([1.0 - MASK], [MASK])
    assert result["pixel_auroc"] == result["aupro"] == result["aupro_0.05"] == 0
    assert result["pixel_ap"] == pytest.approx(0.04)


def test_small_and_large_regions_count_alike():
    mask = np.zeros((10, 10), bool)
    mask[0, 0] = True
    mask[5:, :] = True  # 50 pixels
    anomaly_map = np.zeros((10, 10))
    anomaly_map[0, 0] = 1
    # The small region is found at once, the large one with all good pixels: PRO rises from 1/2 to 1 along the diagonal.
    assert compute([anomaly_map], [mask])["aupro"] == pytest.approx(0.5 + 0.3 / 4)


def test_pixels_that_touch_by_a_corner_are_one_region():
    mask, anomaly_map = np.zeros((10, 10), bool), np.zeros((10, 10))
    mask[0, 0] = mask[1, 1] = mask[1, 2] = True
    anomaly_map[0, 0] = 1
    # One of three pixels found. As two regions it would be 1/2 to begin with.
    assert compute([anomaly_map], [mask], fpr_limits=(1.0,))["aupro_1"] == pytest.approx((1 / 3 + 1) / 2)


def test_interpolation_at_the_limit():
    # Ten good pixels. Scores 2: one good; 1: the only anomalous one and four good; 0: five good.
    anomaly_map, mask = np.array([[2, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0]]), np.arange(11)[None] == 1
    # PRO is 0 up to 0.1, then rises to 1 at 0.5; at 0.3 it has reached 1/2, at 0.05 it has not started.
    result = compute([anomaly_map], [mask])
    assert result["aupro"] == pytest.approx((0.2 * 0.5 / 2) / 0.3)
    assert result["aupro_0.05"] == 0


def test_good_images_dilute_false_positives():
    anomaly_map = np.where(MASK, 1, 2)
    with_good = compute([anomaly_map, np.zeros((100, 100))], [MASK, np.zeros((100, 100), bool)])
    assert with_good["aupro"] == pytest.approx(1 - 96 / (96 + 10_000) / 0.3)


cases = st.integers(0, 2**32 - 1).map(np.random.default_rng)


@settings(max_examples=40, deadline=None)
@given(cases)
def test_exact_metrics_agree_with_the_definition_and_scikit_learn(rng):
    shape = (int(rng.integers(1, 4)), int(rng.integers(2, 9)), int(rng.integers(2, 9)))
    masks = rng.random(shape) < 0.3
    masks[0, 0, :2] = True, False
    maps = rng.integers(0, rng.integers(1, 30), shape) / 7  # many ties
    limit = float(rng.uniform(0.01, 1))
    result = compute(maps, masks, fpr_limits=(limit,))
    assert result["pixel_auroc"] == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-6)
    assert result["pixel_ap"] == pytest.approx(average_precision_score(masks.ravel(), maps.ravel()), abs=1e-6)
    assert result[f"aupro_{limit:g}"] == pytest.approx(aupro_by_thresholds(maps, masks, limit), abs=1e-9)


def many(count=12, seed=0):
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, 40, 40), bool)
    masks[::2, 5:12, 5:9] = True
    masks[::4, 20:24, 20:38] = True
    return (rng.gamma(2, 1, masks.shape) + 2 * masks).astype(np.float32), masks


def test_order_does_not_matter():
    maps, masks = many()
    order = np.random.default_rng(1).permutation(len(maps))
    for exact_limit in (10**9, 5000):
        expected = compute(maps, masks, exact_limit)
        assert compute(maps[order], masks[order], exact_limit) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
def test_streaming_stays_within_the_stated_bound(scale):
    maps, masks = many()
    maps = np.float32(scale) * maps
    exact, streamed = compute(maps, masks), compute(maps, masks, exact_limit=5000)
    bins = maps.view(np.uint32) >> 12
    sizes = np.zeros(maps.shape)
    for mask, size in zip(masks, sizes, strict=True):
        labels, _ = ndimage.label(mask)
        size[mask] = np.bincount(labels[mask])[labels[mask]]
    share_tied = np.array([np.mean(bins[~masks] == value) for value in bins[masks]])
    weight = 1 / sizes[masks] / np.sum(1 / sizes[masks])
    assert 0 < share_tied.mean() < 0.01
    assert abs(streamed["pixel_auroc"] - exact["pixel_auroc"]) <= share_tied.mean() / 2
    assert abs(streamed["aupro"] - exact["aupro"]) <= weight @ share_tied / 2 / 0.3
    assert abs(streamed["aupro_0.05"] - exact["aupro_0.05"]) <= weight @ share_tied / 2 / 0.05
    assert streamed == pytest.approx(exact, abs=2e-3)
    assert streamed != exact


def test_streaming_is_exact_when_no_scores_share_a_bin():
    rng = np.random.default_rng(3)
    maps, masks = rng.integers(0, 200, (5, 20, 20)) / 8, rng.random((5, 20, 20)) < 0.1
    assert compute(maps, masks, exact_limit=500) == pytest.approx(compute(maps, masks), abs=1e-12)


def test_parts_together_equal_one_accumulator():
    maps, masks = many()
    for limits in ((10**9, 10**9), (1000, 10**9)):
        parts = [PixelMetrics(limit) for limit in limits]
        for index, (anomaly_map, mask) in enumerate(zip(maps, masks, strict=True)):
            parts[index % 2].update(anomaly_map, mask)
        expected = compute(maps, masks, min(limits))
        assert pixel_metrics(parts) == pytest.approx(expected, abs=1e-12)
        assert pixel_metrics(parts) == pytest.approx(expected, abs=1e-12)  # computing changes nothing


def test_more_images_may_follow_a_result():
    maps, masks = many()
    metrics = PixelMetrics()
    for anomaly_map, mask in zip(maps, masks, strict=True):
        metrics.update(anomaly_map, mask)
        metrics.compute()
    assert metrics.compute() == compute(maps, masks)


def test_minus_zero_is_zero():
    plus, minus = np.zeros((2, 2)), np.array([[-0.0, 0.0], [0.0, 0.0]])
    mask = np.array([[True, False], [False, False]])
    assert compute([minus], [mask]) == compute([plus], [mask])


@pytest.mark.parametrize(
    ("anomaly_map", "mask", "message"),
    [
        (np.zeros((2, 3)), np.zeros((3, 2)), r"one shape \(H, W\), found \(2, 3\) and \(3, 2\); resize the mask"),
        (
            np.full((2, 2), np.nan),
            np.zeros((2, 2)),
            "finite values >= 0, found values from nan to nan; check the model",
        ),
        (np.full((2, 2), np.inf), np.zeros((2, 2)), "found values from inf to inf"),
        (np.full((2, 2), -1.0), np.zeros((2, 2)), "found values from -1.0 to -1.0"),
    ],
)
def test_update_mistakes(anomaly_map, mask, message):
    with pytest.raises(DataError, match=message):
        PixelMetrics().update(anomaly_map, mask)


@pytest.mark.parametrize("exact_limit", [1, 1000])
def test_pixel_metrics_need_both_classes(exact_limit):
    with pytest.raises(DataError, match="found no anomalous and 100 good ones; pixel metrics need ground-truth masks"):
        compute([MASK * 1.0], [MASK & False], exact_limit)
    with pytest.raises(DataError, match="found 100 anomalous and no good ones"):
        compute([MASK * 1.0], [MASK | True], exact_limit)
    with pytest.raises(DataError, match="found no anomalous and no good ones"):
        PixelMetrics().compute()


@pytest.mark.parametrize("limit", [0, -1, 1.5, float("nan")])
def test_fpr_limit_must_be_a_rate(limit):
    with pytest.raises(ConfigError, match="expected an fpr_limit above 0 and at most 1, found"):
        compute([MASK * 1.0], [MASK], fpr_limits=(limit,))


# ---- intervals: rates


def test_rate_intervals_are_those_of_the_binomial():
    assert rate_interval(0, 10) == pytest.approx([0, 1 - 0.025**0.1])  # the rate at which none of 10 has chance 2.5 %
    assert rate_interval(10, 10) == pytest.approx([0.025**0.1, 1])
    assert rate_interval(1, 1) == pytest.approx([0.025, 1])
    low, high = rate_interval(7, 50)
    of_rate = [sum(np.prod([(50 - i) / (i + 1) for i in range(k)]) * p**k * (1 - p) ** (50 - k) for k in range(7))
               for p in (low, high)]  # chance of fewer than 7  # fmt: skip
    assert of_rate[0] == pytest.approx(0.975)
    assert of_rate[1] < 0.025


@pytest.mark.parametrize(("count", "total"), [(0, 0), (3, 2), (-1, 2)])
def test_rates_need_images(count, total):
    with pytest.raises(DataError, match=f"expected a count among at least one image, found {count} of {total}; check"):
        rate_interval(count, total)


# ---- intervals: images


def binormal(rng, good=40, defective=40, distance=1.0):
    scores = rng.normal(size=good + defective)
    labels = np.arange(good + defective) >= good
    return scores + distance * labels, labels


TRUE_AUROC = NormalDist().cdf(1 / 2**0.5)  # of `binormal`


@settings(max_examples=40, deadline=None)
@given(cases)
def test_a_weight_is_a_repetition(rng):
    """The fast AUROC and average precision of the bootstrap agree with torchmetrics, ties included."""
    scores = rng.integers(0, rng.integers(1, 12), int(rng.integers(2, 30))).astype(float)
    labels = np.arange(len(scores)) % 2 == 0
    weights = rng.integers(0, 4, (3, len(scores)))
    weights[:, :2] = 1
    found = weighted_image_metrics(scores[~labels], scores[labels], weights[:, ~labels], weights[:, labels])
    for index, weight in enumerate(weights):
        expected = image_metrics(np.repeat(scores, weight), np.repeat(labels, weight))
        for name, values in found.items():
            assert values[index] == pytest.approx(expected[name], abs=1e-6)


def test_image_intervals_hold_the_value_and_the_seed_decides():
    scores, labels = binormal(np.random.default_rng(0))
    intervals, metrics = image_intervals(scores, labels), image_metrics(scores, labels)
    assert list(intervals) == ["image_auroc", "image_ap"]
    for name, (low, high) in intervals.items():
        assert 0 <= low < metrics[name] < high <= 1
    order = np.random.default_rng(1).permutation(len(scores))
    assert image_intervals(scores[order], labels[order]) == intervals
    assert image_intervals(scores, labels, seed=1) != intervals
    assert image_intervals(scores, labels, seed=1)["image_auroc"] == pytest.approx(intervals["image_auroc"], abs=0.02)


def test_image_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    found = [image_intervals(*binormal(rng), resamples=500)["image_auroc"] for _ in range(300)]
    covered = np.mean([low <= TRUE_AUROC <= high for low, high in found])
    assert 0.91 <= covered <= 0.98  # 0.95 but for the percentile method's small bias; the simulation's sd is 0.013


def test_image_intervals_where_there_is_little_to_resample():
    assert image_intervals([1, 2, 3], [0, 1, 1]) == {}
    assert image_intervals([1, 2, 3], [0, 0, 1]) == {}
    assert image_intervals([1, 2, 3, 4], [0, 0, 1, 1]) == {"image_auroc": [1, 1], "image_ap": [1, 1]}
    low, high = image_intervals([5, 5, 5, 5], [0, 0, 1, 1])["image_auroc"]
    assert low == high == 0.5
    with pytest.raises(DataError, match="found 2 good and no defective"):
        image_intervals([1, 2], [0, 0])


def test_detectors_that_agree_differ_little_and_others_much():
    rng = np.random.default_rng(0)
    scores, labels = binormal(rng, 100, 100)
    assert auroc_difference_interval(scores, np.exp(scores), labels) == [0, 0]  # the same order
    similar = auroc_difference_interval(scores + 0.1 * rng.normal(size=200), scores, labels)
    assert similar[0] < 0 < similar[1]
    assert similar[1] - similar[0] < 0.05  # unpaired, it would be about 0.19
    low, high = auroc_difference_interval(scores, rng.normal(size=200), labels)
    assert 0.05 < low < TRUE_AUROC - 0.5 < high < 0.5
    assert auroc_difference_interval([1, 2, 3], [1, 2, 3], [0, 0, 1]) is None


def test_difference_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    held = []
    for _ in range(200):
        scores, labels = binormal(rng, 40, 40, 1.0)
        noisy = scores + rng.normal(size=80)  # so that the distance is 1 / sqrt(2) of the spread
        low, high = auroc_difference_interval(scores, noisy, labels, resamples=300)
        held.append(low <= TRUE_AUROC - NormalDist().cdf(0.5) <= high)
    assert 0.90 <= np.mean(held) <= 0.99


# ---- intervals: pixels


def accumulate(maps, masks, exact_limit=10**9):
    metrics = PixelMetrics(exact_limit)
    for anomaly_map, mask in zip(maps, masks, strict=True):
        metrics.update(anomaly_map, mask)
    return metrics


def textured(rng, count, shape=(48, 48), image_spread=0.5, distance=2.0):
    """Log-normal maps whose images differ as a whole, the defective half with two regions each."""
    masks = np.zeros((count, *shape), bool)
    masks[1::2, 5:12, 5:9] = True
    masks[1::2, 20:24, 20:38] = True
    logs = rng.normal(size=masks.shape) + image_spread * rng.normal(size=(count, 1, 1)) + distance * masks
    return np.exp(0.3 * logs).astype(np.float32), masks


def reduced(parts):
    curves = PixelCurves(parts)
    values = curves.metrics(np.ones((1, curves.good)), np.ones((1, curves.defective)))
    return {name: float(value[0]) for name, value in values.items()}


@pytest.mark.parametrize("distance", [0, 1, 3])
@pytest.mark.parametrize("scale", [1e-6, 1, 1e6])
def test_curves_agree_with_the_exact_metrics(scale, distance):
    maps, masks = textured(np.random.default_rng(0), 20, distance=distance)
    metrics = accumulate(maps * np.float32(scale), masks)
    # Measured: at most 0.001 here, and 0.0005 on smooth maps of 256 x 256 pixels.
    assert reduced([metrics]) == pytest.approx(metrics.compute(), abs=2e-3)


def test_a_weight_repeats_an_image():
    rng = np.random.default_rng(0)
    maps, masks = textured(rng, 12)
    curves = PixelCurves([accumulate(maps[::2], masks[::2]), accumulate(maps[1::2], masks[1::2])])
    weights = rng.multinomial(6, np.full(6, 1 / 6), (2, 3))
    found = curves.metrics(*weights.astype(float))
    for index in range(3):
        repeats = weights[:, index].T.ravel()  # good and defective images alternate
        exact = accumulate(np.repeat(maps, repeats, 0), np.repeat(masks, repeats, 0)).compute()
        assert {name: values[index] for name, values in found.items()} == pytest.approx(exact, abs=2e-3)


def test_pixel_intervals_hold_the_value_and_the_seed_decides():
    maps, masks = textured(np.random.default_rng(0), 20)
    for limit in (10**9, 5000):
        metrics = accumulate(maps, masks, limit)
        exact = metrics.compute()
        intervals = pixel_intervals([metrics], exact)
        assert intervals.keys() == exact.keys()
        for name, (low, high) in intervals.items():
            assert 0 <= low < exact[name] < high <= 1
        assert pixel_intervals([metrics], exact) == intervals
        assert pixel_intervals([metrics], exact, seed=1) != intervals


def test_pixel_intervals_hold_the_truth_as_often_as_they_say():
    """Pixels of an image are alike: resampling them one by one would give intervals many times too narrow."""
    rng = np.random.default_rng(0)
    truth = NormalDist().cdf(2 / (2 * (1 + 0.5**2)) ** 0.5)
    held = []
    for _ in range(100):
        metrics = accumulate(*textured(rng, 60))
        low, high = pixel_intervals([metrics], metrics.compute(), resamples=300)["pixel_auroc"]
        held.append(low <= truth <= high)
    assert 0.88 <= np.mean(held) <= 0.99


def test_pixel_intervals_where_there_is_little_to_resample():
    good = np.zeros((10, 10), bool)
    for maps, masks in (([MASK, good, good], [MASK, good, good]), ([MASK, MASK, good], [MASK, MASK, good])):
        metrics = accumulate(maps, masks)
        assert pixel_intervals([metrics], metrics.compute()) == {}
    perfect = accumulate([MASK * 3.0, MASK * 3.0, good, good], [MASK, MASK, good, good])
    for low, high in pixel_intervals([perfect], perfect.compute()).values():
        assert low == high == pytest.approx(1)
    constant = accumulate([good + 0.7] * 4, [MASK, MASK, good, good])
    assert pixel_intervals([constant], constant.compute())["pixel_auroc"] == pytest.approx([0.5, 0.5])


def test_curves_too_coarse_for_a_metric_give_no_interval():
    maps = [1 + 1e-5 * MASK, 1 + 1e-5 * MASK, np.ones((10, 10)), np.ones((10, 10))]  # perfect, but all in one bin
    metrics = accumulate(maps, [MASK, MASK, MASK & False, MASK & False])
    assert metrics.compute()["aupro"] == 1
    assert pixel_intervals([metrics], metrics.compute()) == {}


def test_curves_stay_small():
    maps, masks = textured(np.random.default_rng(0), 6, (256, 256))
    metrics = accumulate(maps, masks)
    stored = [sum(a.nbytes for sparse in image[1:] for a in sparse) for image in metrics._images]
    assert max(stored) < 8000
