"""Run alone: pytest tests/test_metrics.py (seconds)."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from ddad.errors import ConfigError, DataError
from ddad.metrics import PixelMetrics, image_metrics, pixel_metrics


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
