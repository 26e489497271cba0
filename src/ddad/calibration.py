"""What good parts show: the units of the maps, the distribution of scores, the threshold.

Two disjoint sets of good images, neither trained on: *select* gives the units of the maps (and every choice),
*calibration* only ranks scores. So a new good image is exchangeable with the calibration images, and its p-value is
uniform whatever the network does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from ddad import conformal
from ddad.anomaly_map import fuse, image_score, smooth
from ddad.errors import DataError


class Calibration(BaseModel):
    """Stored in `detector.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scales: tuple[float, ...]
    """Units of the pixel distance and of each feature layer: what a good image's peak typically is."""
    map_limit: float | None = None
    """Map values above it are drawn as anomalous; good parts rarely reach it."""
    false_alarms: float | None = None
    """The false-alarm rate that was asked for."""
    threshold: float | None = None
    """Scores above it are anomalous."""
    scores: tuple[float, ...] = ()
    """Scores of the calibration images, rising."""

    @property
    def promised_rate(self) -> float | None:
        """The expected false-alarm rate of the threshold, which too few calibration images keep above the one asked."""
        if self.false_alarms is None:
            return None
        return conformal.promised_rate(len(self.scores), self.false_alarms)

    def promise(self) -> str:
        """What the calibration images can and cannot promise, in one or two sentences."""
        if self.false_alarms is None or self.promised_rate is None:
            return "Not calibrated: there is no threshold, so no verdict."
        count = len(self.scores)
        share = f"about {self.promised_rate:.1%} of good parts are flagged in the long run"
        text = f"{count} good calibration images: {share}."
        if self.promised_rate > self.false_alarms * 1.0001:
            needed = conformal.images_needed(self.false_alarms)
            text += (
                f" {self.false_alarms:.1%} was asked for and cannot be promised with fewer than {needed} calibration "
                "images; the threshold is the largest score among them."
            )
        return text


def map_scales(distances: Sequence[Sequence[Tensor]], sigma: float) -> tuple[float, ...]:
    """The unit of each kind of distance: the median, over good images, of the peak of its smoothed map.

    Args:
        distances: one list per image of maps (1, H, W), one per kind of distance.
        sigma: smoothing in pixels, as it will be applied to the fused map.
    """
    peaks = torch.stack([torch.stack([image_score(smooth(one, sigma))[0] for one in kinds]) for kinds in distances])
    # A kind that is zero everywhere (no difference at all) must not divide by zero.
    return tuple(float(value) for value in peaks.median(dim=0).values.clamp(min=1e-6))


def fused_map(distances: Sequence[Tensor], scales: Sequence[float], weights: Sequence[float], sigma: float) -> Tensor:
    """D: distances in units of good parts, weighted, summed and smoothed, (B, H, W).

    Weights are divided by their sum, so that 1 means what a good part's peak typically is.
    """
    total = sum(weights)
    return smooth(fuse(distances, scales, [weight / total for weight in weights]), sigma)


def calibrate(
    scales: Sequence[float], maps: Sequence[np.ndarray], scores: Sequence[float], false_alarms: float
) -> Calibration:
    """Threshold and map limit from the maps (H, W) and scores of the calibration images.

    Raises:
        DataError: a score that is not a finite number.
    """
    if not np.isfinite(scores).all():
        raise DataError(
            "Expected finite scores for the calibration images, found NaN or infinity; train the model again."
        )
    peaks = [float(one.max()) for one in maps]
    return Calibration(
        scales=tuple(scales),
        map_limit=conformal.threshold(np.asarray(peaks), false_alarms),
        false_alarms=false_alarms,
        threshold=conformal.threshold(np.asarray(scores), false_alarms),
        scores=tuple(sorted(float(score) for score in scores)),
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
