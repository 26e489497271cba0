"""What good parts show: the units of the maps, the distribution of scores, the threshold.

Two disjoint sets of good images, neither trained on: *select* gives the units of the maps (and every choice),
*calibration* only ranks scores. So a new good image is exchangeable with the calibration images, and its p-value is
uniform whatever the network does. Where there are too few images for two sets, one set does both, in folds: each image
is ranked in units that come from the others.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ddad import conformal
from ddad.anomaly_map import fuse, smooth, standardise
from ddad.config import Backend, Precision
from ddad.drift import FALSE_ALARMS, WINDOW, DriftMonitor
from ddad.errors import DataError
from ddad.prediction import PhotoStatistics

PRIOR_IMAGES = 10
"""How many good images the global value counts for against the value at a place."""
LEAST_SPREAD = 0.05
"""Of the mean distance; less is not believed."""


class Calibration(BaseModel):
    """Stored in `detector.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scales: tuple[float, ...]
    """Units of the pixel distance and of each feature layer: what a good image's peak typically is."""
    false_alarms: float | None = None
    """The false-alarm rate that was asked for."""
    threshold: float | None = None
    """Scores above it are anomalous; so are pixels of the map, since the score is the map's maximum."""
    scores: tuple[float, ...] = ()
    """Scores of the calibration images, rising."""
    folds: int | None = None
    """Of a cross-conformal calibration: images that gave units also ranked, each in units from the other folds."""
    photographs: tuple[PhotoStatistics, ...] = ()
    """What the good images look like that gave units or ranked."""
    backend: Backend = "torch"
    """What computed the networks for these scores; and"""
    precision: Precision = "fp32"
    """how. Scores in fp32 are the same in every backend but for rounding, those in bf16 are each backend's own."""

    def holds(self, backend: Backend, precision: Precision) -> bool:
        """Whether scores computed like this rank among these scores as the promise supposes."""
        return precision == self.precision and (precision == "fp32" or backend == self.backend)

    @property
    def promised_rate(self) -> float | None:
        """The expected false-alarm rate of the threshold, which too few calibration images keep above the one asked."""
        if self.false_alarms is None:
            return None
        return conformal.promised_rate(len(self.scores), self.false_alarms)

    @property
    def rate_bound(self) -> float | None:
        """The false-alarm rate that the threshold stays below with 95 % confidence."""
        if self.false_alarms is None:
            return None
        return conformal.rate_bound(len(self.scores), self.false_alarms)

    def with_budget(self, false_alarms: float) -> "Calibration":
        """The same scores with the threshold for another false-alarm rate; raises as `conformal.threshold`."""
        limit = conformal.threshold(np.asarray(self.scores), false_alarms)
        return self.model_copy(update={"false_alarms": false_alarms, "threshold": limit})

    def monitor(self, window: int = WINDOW, false_alarms: float = FALSE_ALARMS) -> DriftMonitor:
        """A monitor that compares further photographs with the calibration images; raises as `DriftMonitor`.

        Raises:
            DataError: there are no calibration images.
        """
        if not self.scores or not self.photographs:
            raise DataError(
                "Expected a model that knows the scores and the look of good photographs, found one without; run ddad "
                "recalibrate with good images."
            )
        return DriftMonitor(self.scores, self.photographs, window=window, false_alarms=false_alarms)

    def promise(self) -> str:
        """What the calibration images can and cannot promise, in a few sentences."""
        if self.false_alarms is None or self.promised_rate is None or self.rate_bound is None:
            return "Not calibrated: there is no threshold, so no verdict."
        text = (
            f"{len(self.scores)} good calibration images{f' in {self.folds} folds' if self.folds else ''}: about "
            f"{_percent(self.promised_rate)} of good parts are flagged in the long run, with "
            f"{_percent(conformal.CONFIDENCE)} confidence {'roughly ' if self.folds else ''}at most "
            f"{_percent(self.rate_bound)}."
        )
        if len(self.scores) < (bounding := conformal.images_to_bound(self.false_alarms)):
            text += f" A bound of {_percent(self.false_alarms)} takes at least {bounding} images."
        if self.precision != "fp32":
            text += f" That holds for backend {self.backend} in {self.precision}."
        if self.promised_rate > self.false_alarms * 1.0001:
            needed = conformal.images_needed(self.false_alarms)
            text += (
                f" {_percent(self.false_alarms)} was asked for and cannot be promised with fewer than {needed} "
                "calibration images; the threshold is the largest score among them."
            )
        return text


class PositionStatistics(NamedTuple):
    """What good parts show at each place: one (H, W) map per kind of distance."""

    mean: Tensor  # (K, H, W)
    spread: Tensor  # (K, H, W)


def position_statistics(distances: Tensor) -> PositionStatistics:
    """Mean and spread of each kind of distance at each place, over good images.

    A place is seen only once an image, so both maps are smoothed (σ = 1/42 of the side) and drawn towards their global
    value: the mean as by `PRIOR_IMAGES` further images, the spread half way.

    Args:
        distances: smoothed distances of N good images, (N, K, H, W).
    """
    count, _, height, width = distances.shape
    sigma = math.sqrt(height * width) / 42
    mean = smooth(distances.mean(dim=0), sigma)
    spread = smooth(distances.std(dim=0, correction=0), sigma)
    trust = count / (count + PRIOR_IMAGES)
    overall_mean = mean.mean(dim=(1, 2), keepdim=True)
    # Of one image the spread at a place is zero; the spread over places then stands for it.
    overall_spread = distances.std(dim=(0, 2, 3), correction=0).view(-1, 1, 1).clamp(min=1e-6)
    spread = trust * spread + (1 - trust) * overall_spread
    spread = (spread + spread.mean(dim=(1, 2), keepdim=True)) / 2
    # Very few images may happen to agree; new ones will not agree so well.
    spread = torch.maximum(spread, LEAST_SPREAD * overall_mean.clamp(min=1e-6))
    return PositionStatistics(trust * mean + (1 - trust) * overall_mean, spread)


def map_scales(distances: Tensor, least: float) -> tuple[float, ...]:
    """The unit of each kind of distance: the median, over good images, of the peak of its map.

    Args:
        distances: smoothed, and standardised where that is wanted, of N good images, (N, K, H, W).
        least: above 0; a kind that hardly differs on good images must not count for millions on others.
    """
    peaks = distances.flatten(2).amax(dim=2).median(dim=0).values
    return tuple(float(value) for value in peaks.clamp(min=least))


class Units(NamedTuple):
    """What makes distances of different kinds and places comparable."""

    statistics: PositionStatistics | None
    scales: tuple[float, ...]


def fit_units(distances: Tensor, by_position: bool) -> Units:
    """Units from smoothed distances of good images, (N, K, H, W)."""
    statistics = position_statistics(distances) if by_position else None
    # Standardised distances are in spreads, of which a peak has at least one.
    scales = map_scales(in_units(distances, statistics), least=1.0 if statistics else 1e-6)
    return Units(statistics, scales)


def in_units(distances: Tensor, statistics: PositionStatistics | None) -> Tensor:
    """Distances (..., K, H, W) compared with what good parts show at each place, where that is known."""
    return distances if statistics is None else standardise(distances, *(one.to(distances) for one in statistics))


def weighted(distances: Tensor, units: Units, weights: Sequence[float]) -> Tensor:
    """D (N, H, W) >= 0 from smoothed distances (N, K, H, W) and a weight a kind: 1 is what a good part's peak is."""
    shares = [weight / sum(weights) for weight in weights]
    return fuse(in_units(distances, units.statistics).unbind(dim=1), units.scales, shares).clamp(min=0)


def cross_scores(
    distances: Tensor, folds: int, by_position: bool, score: Callable[[Tensor, Units], Tensor]
) -> list[float]:
    """Scores of good images, each in units that come from the other folds (cross-conformal).

    Args:
        distances: smoothed distances (N, K, H, W) of N >= 2 good images, neither trained on nor chosen by.
        folds: in [2, N].
        score: image scores (n,) of distances (n, K, H, W) in given units.
    """
    fold = np.arange(len(distances)) % folds
    scores = np.empty(len(distances))
    for number in range(folds):
        units = fit_units(distances[fold != number], by_position)
        scores[fold == number] = score(distances[fold == number], units).numpy()
    return scores.tolist()


def calibrate(
    scales: Sequence[float],
    scores: Sequence[float],
    false_alarms: float,
    *,
    folds: int | None = None,
    photographs: Sequence[PhotoStatistics] = (),
) -> Calibration:
    """Threshold from the scores of the calibration images.

    Raises:
        DataError: a score that is not a finite number.
    """
    if not np.isfinite(scores).all():
        raise DataError(
            "Expected finite scores for the calibration images, found NaN or infinity; train the model again."
        )
    return Calibration(
        scales=tuple(scales),
        false_alarms=false_alarms,
        threshold=conformal.threshold(np.asarray(scores), false_alarms),
        scores=tuple(sorted(float(score) for score in scores)),
        folds=folds,
        photographs=tuple(photographs),
    )


@dataclass(frozen=True)
class Ranking:
    """Calibration scores ready to rank new ones."""

    calibration: Calibration

    @cached_property
    def _scores(self) -> np.ndarray:
        return np.asarray(self.calibration.scores)

    def p_value(self, score: float) -> float | None:
        """The share of good parts that look at least this anomalous; None where there is no calibration."""
        return float(conformal.p_value(score, self._scores)) if len(self._scores) else None

    def is_anomalous(self, score: float) -> bool | None:
        """Whether the score is above the threshold; None where there is none."""
        threshold = self.calibration.threshold
        return None if threshold is None else score > threshold


def _percent(rate: float) -> str:
    return f"{100 * rate:.2g} %"
