"""From the scores of good parts to p-values and a threshold: split-conformal prediction.

If a new good part comes from the same source as the n calibration parts, its rank among them is uniform. So calling it
anomalous when its p-value is at most alpha is wrong for at most a fraction alpha of good parts, on average over
calibration sets and with no assumption on the distribution of scores. Higher scores are more anomalous.

Of one calibration set more can be said. With the k-th largest of its n scores as threshold, the share of all good
parts above it is distributed as Beta(k, n + 1 - k) (order statistics; with ties it is smaller): its mean is the
promise, and its 95 % quantile a bound that only one calibration set in twenty breaks. It is also Clopper and Pearson's
bound, for the k - 1 calibration images above the threshold.
"""

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from ddad.errors import ConfigError, DataError

CONFIDENCE = 0.95
"""Of bounds, everywhere."""


def p_value(score: ArrayLike, calibration: ArrayLike) -> float | np.ndarray:
    """(1 + number of calibration scores >= score) / (n + 1), in [1 / (n + 1), 1].

    score: a number, which gives a float, or an array, which gives an array of its shape. calibration: n scores of good
    parts, in any order. Raises DataError for an empty or not finite calibration and for scores that are not numbers.
    """
    ordered = np.sort(_checked(calibration))
    scores = np.asarray(score, dtype=np.float64)
    if np.isnan(scores).any():
        raise DataError("expected anomaly scores that are numbers, but found not-a-number; check the model's weights.")
    at_least = len(ordered) - np.searchsorted(ordered, scores, side="left")
    values = (1 + at_least) / (len(ordered) + 1)
    return float(values) if scores.ndim == 0 else values


def threshold(calibration: ArrayLike, false_alarms: float) -> float:
    """The score above which (strictly) a part is anomalous: exactly when p_value(score) <= false_alarms.

    It is the k-th largest of n calibration scores, k = floor(false_alarms * (n + 1)): at most k - 1 of them can then
    reach a score above it. With too few images for the budget, k = 0, it is the largest score, which promises
    1 / (n + 1); see `promised_rate`. Raises ConfigError unless 0 < false_alarms < 1, DataError as `p_value`.
    """
    ordered = np.sort(_checked(calibration))
    return float(ordered[-_rank_used(len(ordered), false_alarms)])


def promised_rate(n: int, false_alarms: float) -> float:
    """The expected false-alarm rate that a threshold from n calibration images really promises.

    k / (n + 1), which is at most `false_alarms`, or 1 / (n + 1) where n is below `images_needed`. Raises ConfigError
    unless 0 < false_alarms < 1, DataError unless n >= 1.
    """
    return _rank_used(n, false_alarms) / (n + 1)


def rate_bound(n: int, false_alarms: float, confidence: float = CONFIDENCE) -> float:
    """The false-alarm rate that the threshold from n calibration images stays below with this confidence.

    Raises as `promised_rate`, and ConfigError unless 0 < confidence < 1.
    """
    _check_share(confidence, "a confidence", "0.95")
    k = _rank_used(n, false_alarms)
    return float(special.betaincinv(k, n + 1 - k, confidence))


def images_to_bound(false_alarms: float, confidence: float = CONFIDENCE) -> int:
    """The fewest calibration images with which some threshold stays below this rate with this confidence.

    The largest score is that threshold: (1 - false_alarms)^n <= 1 - confidence. Raises ConfigError as `rate_bound`.
    """
    _check_rate(false_alarms)
    _check_share(confidence, "a confidence", "0.95")
    return math.ceil(math.log(1 - confidence) / math.log1p(-false_alarms))


def chance_of(flagged: int, images: int, n: int, false_alarms: float) -> float:
    """The chance that at least `flagged` of so many new good images are flagged, by n calibration images' threshold.

    Neither set is large: the count is beta-binomial, over calibration sets as well as over new images. A small value
    says that the new images are not like those of calibration. Raises as `promised_rate`, and DataError unless
    0 <= flagged <= images.
    """
    if not 0 <= flagged <= images:
        raise DataError(f"expected between 0 and {images} flagged images, but found {flagged}; count again.")
    k = _rank_used(n, false_alarms)
    j = np.arange(flagged, images + 1)
    ways = special.gammaln(images + 1) - special.gammaln(j + 1) - special.gammaln(images - j + 1)
    chances = np.exp(ways + special.betaln(j + k, images - j + n + 1 - k) - special.betaln(k, n + 1 - k))
    return min(1.0, float(chances.sum()))


def images_needed(false_alarms: float) -> int:
    """The fewest calibration images that can promise this false-alarm rate: ceil(1 / false_alarms) - 1.

    Raises ConfigError unless 0 < false_alarms < 1.
    """
    _check_rate(false_alarms)
    total = max(round(1 / false_alarms), 1)
    return total - 1 if 1 / total <= false_alarms else total


def _rank_used(n: int, false_alarms: float) -> int:
    """Which of n scores, from the largest, is the threshold: the largest itself where the rate cannot be had."""
    if n < 1:
        raise DataError(f"expected at least 1 calibration image, but found {n}; add photographs of good parts.")
    return max(_rank(n, false_alarms), 1)


def _rank(n: int, false_alarms: float) -> int:
    """The largest k with k / (n + 1) <= false_alarms, rounded as in p_value: floor(0.29 * 100) would be 28."""
    _check_rate(false_alarms)
    k = round(false_alarms * (n + 1))
    return k if k / (n + 1) <= false_alarms else k - 1


def _check_rate(false_alarms: float) -> None:
    _check_share(false_alarms, "a false-alarm rate", "0.01 for one good part in a hundred")


def _check_share(value: float, what: str, example: str) -> None:
    if not 1e-9 <= value < 1:
        raise ConfigError(f"expected {what} above 0 and below 1, got {value}; use {example}.")


def _checked(calibration: ArrayLike) -> np.ndarray:
    scores = np.asarray(calibration, dtype=np.float64).ravel()
    if scores.size == 0 or not np.isfinite(scores).all():
        found = "none" if scores.size == 0 else f"{np.count_nonzero(~np.isfinite(scores))} of {scores.size} not finite"
        raise DataError(f"expected finite calibration scores, but found {found}; calibrate again on good images.")
    return scores
