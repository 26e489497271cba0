"""How well scores tell defective from good: whole images (torchmetrics) and single pixels (one sorted sweep).

The pixel metrics share one idea. Lower a threshold from the highest score to the lowest and count, at each distinct
score, what is at or above it: good pixels (false positives), anomalous pixels (true positives), and anomalous pixels
weighted by 1 / the size of their ground-truth region. The last sum, divided by the number of regions, is the mean
per-region overlap (PRO), so AUROC, average precision and AUPRO all come from one pass. Between two scores of anomalous
pixels only the false positives grow, so the sweep stops at those scores alone and looks the good pixels up by
bisection.

AUPRO: Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 2021, section 5.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_precision_recall_curve,
)

from ddad.errors import ConfigError, DataError

EXACT_LIMIT = 64_000_000  # pixels: 256 MB of float32 scores
PENDING_LIMIT = 4_000_000  # pixels kept between two additions to a histogram
DROPPED_BITS = 12  # a histogram bin is the top 20 of the 32 bits of a float32: sign, exponent, 11 of the mantissa
BINS = 1 << (31 - DROPPED_BITS)  # the sign bit is never set


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
    scores, labels = np.asarray(scores, dtype=np.float64).ravel(), np.asarray(labels, dtype=bool).ravel()
    if len(scores) != len(labels):
        raise DataError(
            f"expected one label per score, found {len(scores)} scores and {len(labels)} labels; pair them."
        )
    if bad := np.count_nonzero(~np.isfinite(scores)):
        raise DataError(
            f"expected finite anomaly scores, found {bad} of {len(scores)} that are NaN or infinite; "
            "check the model's training loss, which has probably diverged."
        )
    defective = int(labels.sum())
    if defective in (0, len(labels)):
        raise DataError(
            f"expected good and defective test images, found {len(labels) - defective or 'no'} good and "
            f"{defective or 'no'} defective ones; add images of the missing class to the test folder."
        )
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


class PixelMetrics:
    """Pixel AUROC, average precision and AUPRO of anomaly maps that arrive one by one, in any order.

    Exact for up to `exact_limit` pixels (4 bytes a good pixel, 8 an anomalous one; scores are cast to float32). Beyond
    that everything moves to a histogram over the top 20 bits of the float32 pattern, 12 MB whatever the number of
    images: scores within a factor of 1 + 2^-11 may share a bin and then count as tied. The AUROC is off by at most
    half the share of (anomalous, good) pixel pairs that share a bin, the AUPRO by at most half that share, with
    anomalous pixels weighted by region, divided by `fpr_limit`.
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
            self._region_size.append(np.bincount(region).astype(np.int32)[region])
            self._anomalous.append(bits[mask])
            self._good.append(bits[~mask])
        else:
            self._good.append(bits.ravel())
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
        name = "aupro" if limit == 0.3 else f"aupro_{limit:g}"
        result[name] = _area_up_to(limit, fpr, pro) / limit
    return result


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
