"""How well scores tell defective from good: whole images (torchmetrics) and single pixels (one sorted sweep).

The pixel metrics share one idea. Lower a threshold from the highest score to the lowest and count, at each distinct
score, what is at or above it: good pixels (false positives), anomalous pixels (true positives), and anomalous pixels
weighted by 1 / the size of their ground-truth region. The last sum, divided by the number of regions, is the mean
per-region overlap (PRO), so AUROC, average precision and AUPRO all come from one pass. Between two scores of anomalous
pixels only the false positives grow, so the sweep stops at those scores alone and looks the good pixels up by
bisection.

AUPRO: Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 5.3.

How far a metric can be trusted: 95 % intervals by resampling whole images (the pixels of one image are alike, so single
pixels would promise too much), good and defective ones separately. Efron and Tibshirani, "An Introduction to the
Bootstrap", 1993, chapter 13. Rates have the exact interval of Clopper and Pearson, Biometrika 1934.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage, stats
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_precision_recall_curve,
)

from ddad.conformal import CONFIDENCE
from ddad.errors import ConfigError, DataError

EXACT_LIMIT = 64_000_000  # pixels: 256 MB of float32 scores
PENDING_LIMIT = 4_000_000  # pixels kept between two additions to a histogram
DROPPED_BITS = 12  # a histogram bin is the top 20 of the 32 bits of a float32: sign, exponent, 11 of the mantissa
BINS = 1 << (31 - DROPPED_BITS)  # the sign bit is never set
CURVE_DROPPED_BITS = 17  # an image's own curve is coarser: a bin is 1/64 of an octave
CURVE_BINS = 1 << (31 - CURVE_DROPPED_BITS)
CURVE_LEVELS = 400  # thresholds of the curves that are resampled
RESAMPLES = 2000
CURVE_TOLERANCE = 0.01  # a curve that is further from the exact metric has no interval to offer
CHUNK = 100  # resamples computed together


def image_metrics(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """Metrics of whole images, each in [0, 1], higher is better.

    Args:
        scores: (N,) finite anomaly scores of any range; only their order matters, and equal scores stay equal.
        labels: (N,) True for defective images.

    Returns:
        `image_auroc`; `image_ap`, the average precision; `image_f1_max`, the F1 score at the best threshold for these
        very labels, which nobody knows beforehand: an upper limit, not a result to expect.

    Raises:
        DataError: lengths differ, a score is not finite, or only one class is present.
    """
    scores, labels = _checked(scores, labels)
    # torchmetrics squashes values outside [0, 1] through a sigmoid, which merges large scores; ranks keep the order.
    _, ranks = np.unique(scores, return_inverse=True)
    predicted, target = torch.from_numpy(ranks / len(scores)), torch.from_numpy(labels.astype(np.int64))
    precision, recall, _ = binary_precision_recall_curve(predicted, target)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return {
        "image_auroc": float(binary_auroc(predicted, target)),
        "image_ap": float(binary_average_precision(predicted, target)),
        "image_f1_max": float(f1.max()),
    }


def rate_interval(count: int, total: int) -> list[float]:
    """The exact 95 % interval (Clopper-Pearson) of a rate, in [0, 1]: [low, high].

    Raises:
        DataError: not 0 <= count <= total with total >= 1.
    """
    if not 0 <= count <= total or total < 1:
        raise DataError(f"expected a count among at least one image, found {count} of {total}; check the verdicts.")
    interval = stats.binomtest(count, total).proportion_ci(CONFIDENCE, method="exact")
    return [float(interval.low), float(interval.high)]


def image_intervals(
    scores: ArrayLike, labels: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, list[float]]:
    """95 % percentile-bootstrap intervals of `image_auroc` and `image_ap`: [low, high], in [0, 1].

    An interval always holds the value itself. Perfectly separated classes stay so in every resample: their interval
    has no width, which is no proof of certainty.

    Args:
        scores, labels: (N,), as for `image_metrics`.

    Returns:
        Nothing where a class has fewer than two images: resampling one image shows no spread.

    Raises:
        DataError: as `image_metrics`.
    """
    scores, labels = _checked(scores, labels)
    good, defective = np.sort(scores[~labels]), np.sort(scores[labels])  # the order of the images must not matter
    if min(len(good), len(defective)) < 2:
        return {}
    measured = image_metrics(scores, labels)
    found = [
        weighted_image_metrics(good, defective, *weights)
        for weights in _resamples(len(good), len(defective), resamples, seed)
    ]
    return {
        name: _interval(np.concatenate([values[name] for values in found]), measured[name], (0, 1))
        for name in ("image_auroc", "image_ap")
    }


def auroc_difference_interval(
    scores_a: ArrayLike, scores_b: ArrayLike, labels: ArrayLike, *, resamples: int = RESAMPLES, seed: int = 0
) -> list[float] | None:
    """95 % interval of image AUROC of detector a minus that of b, in [-1, 1]; 0 outside it: beyond chance.

    Both see the same resamples (a paired bootstrap), so what makes an image hard for both does not count.

    Args:
        scores_a, scores_b: (N,) finite scores of the same images by two detectors, each in its own unit.
        labels: (N,) True for defective images.

    Returns:
        [low, high], or None where a class has fewer than two images.

    Raises:
        DataError: as `image_metrics`.
    """
    (scores_a, labels), (scores_b, _) = _checked(scores_a, labels), _checked(scores_b, labels)
    order = np.lexsort((scores_b, scores_a))  # the order of the images must not matter
    scores_a, scores_b, labels = scores_a[order], scores_b[order], labels[order]
    good, defective = int((~labels).sum()), int(labels.sum())
    if min(good, defective) < 2:
        return None

    def difference(weights: tuple[NDArray[np.float64], NDArray[np.float64]]) -> NDArray[np.float64]:
        a, b = (weighted_image_metrics(s[~labels], s[labels], *weights)["image_auroc"] for s in (scores_a, scores_b))
        return a - b

    measured = float(difference((np.ones((1, good)), np.ones((1, defective))))[0])
    found = [difference(weights) for weights in _resamples(good, defective, resamples, seed)]
    return _interval(np.concatenate(found), measured, (-1, 1))


def weighted_image_metrics(
    good: NDArray[np.float64],
    defective: NDArray[np.float64],
    good_weights: NDArray[np.float64],
    defective_weights: NDArray[np.float64],
) -> dict[str, NDArray[np.float64]]:
    """`image_auroc` and `image_ap` of many resamples at once, an image counting as often as its weight says.

    Args:
        good, defective: (G,) and (D,) scores.
        good_weights, defective_weights: (R, G) and (R, D) counts >= 0, each row with a positive sum.

    Returns:
        (R,) values each, in [0, 1]; with weights of 1 they are those of `image_metrics`.
    """
    good_above = _weight_above(good, good_weights, defective, "right")
    good_at_or_above = _weight_above(good, good_weights, defective, "left")
    true_positives = _weight_above(defective, defective_weights, defective, "left")
    good_total, total = good_weights.sum(1), defective_weights.sum(1)
    pairs_won = good_total[:, None] - (good_above + good_at_or_above) / 2  # a tie is half a win
    precision = true_positives / np.maximum(true_positives + good_at_or_above, 1)  # 0 / 0 only where the weight is 0
    return {
        "image_auroc": (defective_weights * pairs_won).sum(1) / (total * good_total),
        "image_ap": (defective_weights * precision).sum(1) / total,
    }


class PixelMetrics:
    """Pixel AUROC, average precision and AUPRO of anomaly maps that arrive one by one, in any order.

    Exact for up to `exact_limit` pixels (4 bytes a good pixel, 8 an anomalous one; scores are cast to float32). Beyond
    that everything moves to a histogram over the top 20 bits of the float32 pattern, 12 MB whatever the number of
    images: scores within a factor of 1 + 2^-11 may share a bin and then count as tied. The AUROC is off by at most
    half the share of (anomalous, good) pixel pairs that share a bin, the AUPRO by at most half that share, with
    anomalous pixels weighted by region, divided by `fpr_limit`.

    For `pixel_intervals` each image also leaves its own coarse histogram: 6 bytes a bin that it has pixels in, which is
    1 to 4 kB for an ordinary map and never more than 100 kB for a good image.
    """

    def __init__(self, exact_limit: int = EXACT_LIMIT) -> None:
        self.exact_limit = exact_limit
        self.pixels = 0
        self.regions = 0
        self._pending = 0
        self._sorted = False
        self._good: list[NDArray[np.uint32]] = []  # float32 scores by bit pattern: same order, faster to sort
        self._anomalous: list[NDArray[np.uint32]] = []
        self._region_size: list[NDArray[np.int32]] = []  # of the region each anomalous pixel belongs to
        self._histogram: _Histogram | None = None
        self._images: list[_ImageCurve] = []

    @property
    def is_exact(self) -> bool:
        """Whether every score is still kept as it came."""
        return self._histogram is None

    def update(self, anomaly_map: ArrayLike, mask: ArrayLike) -> None:
        """Add one image.

        Args:
            anomaly_map: (H, W) finite scores >= 0.
            mask: (H, W) True where the image is anomalous; all False for a good image. Anomalous pixels that touch,
                also by a corner, are one region.

        Raises:
            DataError: shapes differ, or a score is negative or not finite.
        """
        scores, mask = np.asarray(anomaly_map, dtype=np.float32), np.asarray(mask, dtype=bool)
        if scores.ndim != 2 or scores.shape != mask.shape:
            raise DataError(
                f"expected an anomaly map and a mask of one shape (H, W), found {scores.shape} and {mask.shape}; "
                "resize the mask to the map."
            )
        # One comparison chain refuses NaN, too.
        if scores.size and not (scores.min() >= 0 and scores.max() < np.inf):
            raise DataError(
                f"expected an anomaly map of finite values >= 0, found values from {scores.min()} to {scores.max()}; "
                "check the model that made it."
            )
        bits = np.abs(scores).view(np.uint32)  # abs copies, and turns -0.0 into 0.0
        if mask.any():
            regions, count = ndimage.label(mask, structure=np.ones((3, 3)))
            self.regions += count
            region = regions[mask]
            size = np.bincount(region).astype(np.int32)[region]
            anomalous, good = bits[mask], bits[~mask]
            self._region_size.append(size)
            self._anomalous.append(anomalous)
            self._good.append(good)
            self._images.append(_ImageCurve(count, _sparse(good), _sparse(anomalous), _sparse(anomalous, 1 / size)))
        else:
            self._good.append(bits.ravel())
            self._images.append(_ImageCurve(0, _sparse(bits.ravel()), _EMPTY, _EMPTY))
        self._sorted = False
        self.pixels += mask.size
        self._pending += mask.size
        if self._pending > (self.exact_limit if self.is_exact else PENDING_LIMIT):
            self.to_histogram()

    def to_histogram(self) -> None:
        """Fold all scores into the histogram, from now on; frees their memory and gives up exactness."""
        if self._histogram is None:
            self._histogram = _Histogram(np.zeros(BINS, np.int64), np.zeros(BINS, np.int64), np.zeros(BINS))
        for bits in self._good:
            np.add.at(self._histogram.good, bits >> DROPPED_BITS, 1)
        for bits, size in zip(self._anomalous, self._region_size, strict=True):
            np.add.at(self._histogram.anomalous, bits >> DROPPED_BITS, 1)
            np.add.at(self._histogram.overlap, bits >> DROPPED_BITS, 1 / size)
        self._good, self._anomalous, self._region_size = [], [], []
        self._pending = 0

    def compute(self, fpr_limits: Sequence[float] = (0.3, 0.05)) -> dict[str, float]:
        """`pixel_metrics` of the images added so far; more may follow."""
        return pixel_metrics([self], fpr_limits)

    def _sorted_good(self) -> NDArray[np.uint32]:
        if not self._sorted:
            self._good = [np.concatenate([np.empty(0, np.uint32), *self._good])]
            self._good[0].sort()
            self._sorted = True
        return self._good[0]


def pixel_metrics(parts: Sequence[PixelMetrics], fpr_limits: Sequence[float] = (0.3, 0.05)) -> dict[str, float]:
    """Metrics over the pixels of several accumulators together, say the good images and those of one defect kind.

    Args:
        parts: accumulators; if one has left exactness, all do.
        fpr_limits: each in (0, 1]; the AUPRO integrates up to this false positive rate and is divided by it.

    Returns:
        `pixel_auroc`, `pixel_ap`, and for each limit the AUPRO: `aupro` for 0.3, `aupro_0.05` for 0.05 and so on.
        All in [0, 1], higher is better.

    Raises:
        ConfigError: a limit is outside (0, 1].
        DataError: there are no anomalous or no good pixels.
    """
    for limit in fpr_limits:
        if not 0 < limit <= 1:
            raise ConfigError(
                f"expected an fpr_limit above 0 and at most 1, found {limit}; the usual ones are 0.3, 0.05."
            )
    sweep = _sweep_exact(parts) if all(part.is_exact for part in parts) else _sweep_histogram(parts)
    if not len(sweep.anomalous) or not sweep.good_total:
        raise DataError(
            f"expected anomalous and good pixels, found {sweep.anomalous.sum() or 'no'} anomalous and "
            f"{sweep.good_total or 'no'} good ones; pixel metrics need ground-truth masks of the defective images."
        )
    # Each step is one distinct score of anomalous pixels, highest first.
    true_positives = np.cumsum(sweep.anomalous)
    pairs_won = sweep.good_total - (sweep.good_above + sweep.good_at_or_above) / 2  # a tie is half a win
    precision = true_positives / (true_positives + sweep.good_at_or_above)
    # The PRO curve: level while only false positives grow, then up by this step's share (a slope where scores tie).
    overlap = np.cumsum(sweep.overlap) / sum(part.regions for part in parts)
    fpr = np.column_stack([sweep.good_above, sweep.good_at_or_above]).ravel() / sweep.good_total
    fpr = np.concatenate([[0], fpr, [1]])
    pro = np.concatenate([[0, 0], np.repeat(overlap, 2)])
    result = {
        "pixel_auroc": float(sweep.anomalous @ pairs_won / (true_positives[-1] * sweep.good_total)),
        "pixel_ap": float(sweep.anomalous @ precision / true_positives[-1]),
    }
    for limit in fpr_limits:
        result[_aupro_name(limit)] = _area_up_to(limit, fpr, pro) / limit
    return result


def pixel_intervals(
    parts: Sequence[PixelMetrics],
    exact: Mapping[str, float],
    fpr_limits: Sequence[float] = (0.3, 0.05),
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> dict[str, list[float]]:
    """95 % percentile-bootstrap intervals of what `pixel_metrics` measures: [low, high], in [0, 1].

    The resamples are of `PixelCurves`; the interval is then moved by the small difference between their value of the
    whole test set and the exact one, and always holds the exact one.

    Args:
        exact: `pixel_metrics(parts, fpr_limits)`.

    Returns:
        Nothing where there are fewer than two good or two defective images. A metric is left out where the curves miss
        it by more than `CURVE_TOLERANCE`: the scores of nearly all pixels lie within a few percent of each other.
    """
    curves = PixelCurves(parts)
    good, defective = curves.good, curves.defective
    if min(good, defective) < 2:
        return {}
    reduced = curves.metrics(np.ones((1, good)), np.ones((1, defective)), fpr_limits)
    found = [curves.metrics(*weights, fpr_limits) for weights in _resamples(good, defective, resamples, seed)]
    return {
        name: _interval(
            np.concatenate([values[name] for values in found]) + exact[name] - float(value[0]), exact[name], (0, 1)
        )
        for name, value in reduced.items()
        if abs(float(value[0]) - exact[name]) <= CURVE_TOLERANCE
    }


class PixelCurves:
    """Each image as three short rows of counts, so that a resample of images is a weighted sum of rows.

    The rows count, at `CURVE_LEVELS` thresholds shared by all images, the good pixels, the anomalous ones and these
    weighted by 1 / region size. The thresholds are denser where few good pixels are above them, because that is the
    part of the curve the AUPRO uses. Memory: 24 bytes times `CURVE_LEVELS` times the number of images at most.

    Attributes:
        good, defective: numbers of images, the rows that weights refer to.
    """

    def __init__(self, parts: Sequence[PixelMetrics]) -> None:
        images = [image for part in parts for image in part._images]
        kinds = [[image for image in images if bool(image.regions) is label] for label in (False, True)]
        self.good, self.defective = map(len, kinds)
        total = np.zeros((3, CURVE_BINS))
        for image in images:
            for row, (bins, values) in zip(total, image[1:], strict=True):
                row[bins] += values
        at_or_above = np.cumsum(total[:, ::-1], axis=1)[:, ::-1]
        share = at_or_above / np.maximum(at_or_above[:, :1], 1e-12)
        share[0] **= 0.5  # spends a fifth of the steps on the first 5 % of false positives
        level = np.floor(share.mean(0) * (CURVE_LEVELS - 1)).astype(np.int64)  # (CURVE_BINS,) 0 is the highest score

        def dense(sparse: _Sparse) -> NDArray[np.float64]:
            return np.bincount(level[sparse.bins], sparse.values, minlength=CURVE_LEVELS).astype(np.float64)

        self._good = np.array([dense(image.good_pixels) for image in kinds[0]]).reshape(-1, CURVE_LEVELS)
        rows = np.array([[dense(row) for row in image[1:]] for image in kinds[1]])
        self._defective = rows.reshape(-1, 3 * CURVE_LEVELS)  # one matrix product instead of three
        self._regions = np.array([image.regions for image in kinds[1]], np.float64)

    def metrics(
        self,
        good_weights: NDArray[np.float64],
        defective_weights: NDArray[np.float64],
        fpr_limits: Sequence[float] = (0.3, 0.05),
    ) -> dict[str, NDArray[np.float64]]:
        """What `pixel_metrics` measures, for many resamples at once, an image counting as often as its weight says.

        Args:
            good_weights, defective_weights: (R, good) and (R, defective) counts >= 0, rows with a positive sum.

        Returns:
            (R,) values each. With weights of 1 they are those of `pixel_metrics` but for scores between two
            thresholds, which count as evenly mixed.
        """
        rows = (defective_weights @ self._defective).reshape(len(defective_weights), 3, CURVE_LEVELS)
        good, anomalous = good_weights @ self._good + rows[:, 0], rows[:, 1]
        overlap = rows[:, 2] / (defective_weights @ self._regions)[:, None]
        false_positives, true_positives = np.cumsum(good, 1), np.cumsum(anomalous, 1)
        good_total, total = false_positives[:, -1:], true_positives[:, -1]
        # Within a level pixels are taken as evenly mixed: the middle of the level stands for all of it.
        hits, alarms = true_positives - anomalous / 2, false_positives - good / 2
        result = {
            "pixel_auroc": (anomalous * (1 - alarms / good_total)).sum(1) / total,
            "pixel_ap": (anomalous * hits / np.maximum(hits + alarms, 1e-12)).sum(1) / total,
        }
        width, pro_before = good / good_total, np.cumsum(overlap, 1) - overlap
        fpr_before = np.cumsum(width, 1) - width
        for limit in fpr_limits:
            inside = np.clip(limit - fpr_before, 0, width)  # the part of each level's width below the limit
            mean_height = pro_before + overlap * inside / np.maximum(width, 1e-300) / 2
            result[_aupro_name(limit)] = (inside * mean_height).sum(1) / limit
        return result


class _Sparse(NamedTuple):
    bins: NDArray[np.uint16]  # indices of occupied bins, rising with the score
    values: NDArray[np.float32]


class _ImageCurve(NamedTuple):
    regions: int  # 0 for a good image
    good_pixels: _Sparse
    anomalous_pixels: _Sparse
    overlap: _Sparse  # anomalous pixels by 1 / region size


_EMPTY = _Sparse(np.empty(0, np.uint16), np.empty(0, np.float32))


def _sparse(bits: NDArray[np.uint32], weights: NDArray[np.float64] | None = None) -> _Sparse:
    values = np.bincount(bits >> CURVE_DROPPED_BITS, weights)
    bins = np.flatnonzero(values)
    return _Sparse(bins.astype(np.uint16), values[bins].astype(np.float32))


class _Histogram(NamedTuple):
    good: NDArray[np.int64]
    anomalous: NDArray[np.int64]
    overlap: NDArray[np.float64]


class _Sweep(NamedTuple):
    """Counts at each distinct score of anomalous pixels, highest first."""

    anomalous: NDArray[np.int64]  # anomalous pixels with this score
    overlap: NDArray[np.float64]  # their summed 1 / region size
    good_above: NDArray[np.int64]  # good pixels with a higher score
    good_at_or_above: NDArray[np.int64]
    good_total: int


def _sweep_exact(parts: Sequence[PixelMetrics]) -> _Sweep:
    bits = np.concatenate([np.empty(0, np.uint32), *(chunk for part in parts for chunk in part._anomalous)])
    size = np.concatenate([np.empty(0, np.int32), *(chunk for part in parts for chunk in part._region_size)])
    order = np.argsort(bits)
    bits = bits[order]
    start = np.flatnonzero(np.diff(bits, prepend=bits[:1] + 1))
    levels = bits[start]
    good_above, good_at_or_above = np.zeros(len(levels), np.int64), np.zeros(len(levels), np.int64)
    good_total = 0
    # Each part is sorted once, however many combinations it is used in.
    for part in parts:
        good = part._sorted_good()
        good_above += len(good) - np.searchsorted(good, levels, side="right")
        good_at_or_above += len(good) - np.searchsorted(good, levels, side="left")
        good_total += len(good)
    overlap = np.add.reduceat(1 / size[order], start) if len(start) else np.empty(0)
    counts = np.diff(start, append=len(bits))
    return _Sweep(counts[::-1], overlap[::-1], good_above[::-1], good_at_or_above[::-1], good_total)


def _sweep_histogram(parts: Sequence[PixelMetrics]) -> _Sweep:
    good, anomalous, overlap = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64), np.zeros(BINS)
    for part in parts:
        part.to_histogram()
        assert part._histogram is not None
        good += part._histogram.good
        anomalous += part._histogram.anomalous
        overlap += part._histogram.overlap
    at_or_above = np.cumsum(good[::-1])[::-1]
    step = np.flatnonzero(anomalous)[::-1]
    return _Sweep(anomalous[step], overlap[step], (at_or_above - good)[step], at_or_above[step], int(at_or_above[0]))


def _area_up_to(limit: float, x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Trapezoid area under the curve (x, y) from x = 0 to `limit`; x never falls and may jump upwards in y."""
    end = int(np.searchsorted(x, limit, side="right"))
    if end < len(x):
        at_limit = y[end - 1] + (y[end] - y[end - 1]) * (limit - x[end - 1]) / (x[end] - x[end - 1])
        x, y = np.append(x[:end], limit), np.append(y[:end], at_limit)
    return float(np.trapezoid(y, x))


def _aupro_name(limit: float) -> str:
    return "aupro" if limit == 0.3 else f"aupro_{limit:g}"


def _resamples(
    good: int, defective: int, resamples: int, seed: int
) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """How often each image is drawn, `CHUNK` resamples at a time: (R, good) and (R, defective) counts."""
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        good_weights, defective_weights = (
            rng.multinomial(count, np.full(count, 1 / count), size).astype(np.float64) for count in (good, defective)
        )
        yield good_weights, defective_weights


def _weight_above(
    scores: NDArray[np.float64],
    weights: NDArray[np.float64],
    levels: NDArray[np.float64],
    side: Literal["left", "right"],
) -> NDArray[np.float64]:
    """(R, L) summed `weights` (R, N) of the `scores` (N,) above each level; with side "left" also of those at it."""
    order = np.argsort(scores)
    below = np.zeros((len(weights), len(scores) + 1))
    np.cumsum(weights[:, order], axis=1, out=below[:, 1:])
    return below[:, -1:] - below[:, np.searchsorted(scores[order], levels, side)]


def _interval(values: NDArray[np.float64], measured: float, limits: tuple[float, float]) -> list[float]:
    """The middle 95 % of the values, within the limits, widened to what was measured if that lies outside."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.clip(np.quantile(values, (tail, 1 - tail)), *limits)
    return [min(float(low), measured), max(float(high), measured)]


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    values, truth = np.asarray(scores, dtype=np.float64).ravel(), np.asarray(labels, dtype=bool).ravel()
    if len(values) != len(truth):
        raise DataError(f"expected one label per score, found {len(values)} scores and {len(truth)} labels; pair them.")
    if bad := np.count_nonzero(~np.isfinite(values)):
        raise DataError(
            f"expected finite anomaly scores, found {bad} of {len(values)} that are NaN or infinite; "
            "check the model's training loss, which has probably diverged."
        )
    defective = int(truth.sum())
    if defective in (0, len(truth)):
        raise DataError(
            f"expected good and defective test images, found {len(truth) - defective or 'no'} good and "
            f"{defective or 'no'} defective ones; add images of the missing class to the test folder."
        )
    return values, truth
