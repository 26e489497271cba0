"""Are recent photographs still like those of calibration? Alarms with a stated rate; the threshold is never moved.

The monitor compares the last `window` photographs with the calibration images, twice a window, in five numbers: the
anomaly score, brightness, focus, and the horizontal and vertical place of the detail. Each comparison is an exact
two-sample Kolmogorov-Smirnov test. Testing p-values for uniformity instead would take the calibration set for infinite
and alarm too often: all p-values come from the same few calibration scores, so they are uniform one by one, not
together. Ties only make the test more careful, because breaking them at random could only widen the distance.

What the rate means: while good photographs keep coming from the source of the calibration images (exchangeable with
them), the expected number of alarms is at most `false_alarms` for every `window` photographs. Each of the ten tests in
that stretch gets a tenth of the rate, and the union bound needs no independence, neither of the five numbers nor of
windows that overlap. All windows share one calibration set, so alarms come together: the bound is an average over
calibration sets, and an unlucky one alarms again and again while most never do. Photographs that resemble their
neighbours (batches, times of day) are not exchangeable with a calibration set taken on one day, and then the bound
does not hold; such an alarm is true, however harmless. Parts that are defective count too: a few rarely alarm, many do.
"""

import hashlib
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from ddad.errors import ConfigError, DataError
from ddad.prediction import PhotoStatistics

WINDOW = 50
FALSE_ALARMS = 1e-4
"""Expected alarms per window of good photographs: 0.1 in 1,000 windows."""

Quantity = Literal["scores", "brightness", "focus", "framing"]
_Row = tuple[float, float, float, float, float]  # the score, then PhotoStatistics


class Alarm(BaseModel):
    """Recent photographs differ from those of calibration more than chance allows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    what: Quantity
    p_value: float
    """Of this one test, before it is compared with its share of the rate."""
    images: int
    """Photographs seen so far."""
    message: str
    """One sentence: what moved, which way, by how much, and what to look at."""


class _State(BaseModel):
    model_config = ConfigDict(extra="forbid")

    window: int
    calibration: str
    images: int
    recent: list[_Row]


class _Wording(NamedTuple):
    what: Quantity
    name: str
    less: str
    more: str
    advice: str


_PLACE = "look at the camera, its mount and the fixture of the parts"
_WORDINGS = (
    _Wording(
        "scores",
        "anomaly score",
        "score lower",
        "score higher",
        "look at the latest heatmaps: many defective parts, or a change in good ones that asks for a new calibration",
    ),
    _Wording("brightness", "brightness", "are darker", "are brighter", "look at lamps, daylight and exposure"),
    _Wording("focus", "sharpness", "are blurrier", "are sharper", "look at focus, lens, vibration and compression"),
    _Wording("framing", "horizontal place", "show detail further left", "show detail further right", _PLACE),
    _Wording("framing", "vertical place", "show detail further up", "show detail further down", _PLACE),
)


class DriftMonitor:
    """Feed it one photograph at a time; it answers with alarms, mostly none.

    It looks when `window` photographs are in, and then after every half window. While a change lasts, each look alarms.
    With the defaults and 100 calibration images it notices, within a window, shifts by more than about one standard
    deviation of good photographs: where lamps already vary by 35 grey levels, 20 more pass as good.

    Args:
        calibration_scores: scores of the calibration images. None of them may have been trained on.
        calibration_statistics: `photo_statistics` of good photographs, taken as the detector sees the stream's. They
            depend on no network, so images it was trained on may join; the more, the smaller a change is noticed.
        window: photographs compared at a time, at least 2. More notice a smaller change, later.
        false_alarms: expected alarms per window of good photographs, above 0 and below 1; see the module's docstring.

    Raises:
        ConfigError: a window or a rate that cannot work.
        DataError: calibration values that are not finite, or too few for any alarm at this rate (then even photographs
            beyond all calibration images would be no proof: their p-value is 2 / C(n + window, window)).
    """

    def __init__(
        self,
        calibration_scores: ArrayLike,
        calibration_statistics: Sequence[PhotoStatistics],
        *,
        window: int = WINDOW,
        false_alarms: float = FALSE_ALARMS,
    ) -> None:
        if window < 2:
            raise ConfigError(f"Expected a window of at least 2 photographs, found {window}; use {WINDOW}.")
        if not 0 < false_alarms < 1:
            raise ConfigError(
                f"Expected a rate of false alarms above 0 and below 1, found {false_alarms}; use {FALSE_ALARMS} for "
                "one alarm in 10,000 windows."
            )
        scores = np.asarray(calibration_scores, dtype=np.float64).ravel()
        statistics = np.asarray(calibration_statistics, dtype=np.float64).reshape(-1, len(PhotoStatistics._fields))
        self.window = window
        self.images = 0
        """Photographs seen so far."""
        self._calibration = [np.sort(values) for values in (scores, *statistics.T)]
        self._pause = (window + 1) // 2  # photographs between looks: at most two looks a window
        self._level = false_alarms / (2 * len(self._calibration))
        self._recent: deque[_Row] = deque(maxlen=window)
        for values, name in ((scores, "scores"), (statistics, "photo statistics")):
            if not np.isfinite(values).all():
                raise DataError(f"Expected finite calibration {name}, found NaN or infinity; calibrate again.")
            needed = _images_needed(window, self._level)
            if len(values) < needed:
                raise DataError(
                    f"Expected {name} of at least {needed} calibration images, since fewer could never raise an alarm "
                    f"at this rate, found {len(values)}; calibrate on more good photographs."
                )

    def update(self, score: float, statistics: PhotoStatistics) -> list[Alarm]:
        """Take in one photograph: its anomaly score and its `photo_statistics`.

        Returns the alarms of this look, at most one per quantity; none between looks. Raises DataError for values that
        are not finite, and forgets that photograph.
        """
        brightness, focus, horizontal, vertical = statistics
        row = (float(score), float(brightness), float(focus), float(horizontal), float(vertical))
        if not all(map(math.isfinite, row)):
            raise DataError(f"Expected a finite score and finite photo statistics, found {row}; check the model.")
        self._recent.append(row)
        self.images += 1
        if self.images < self.window or (self.images - self.window) % self._pause:
            return []
        from scipy.stats import ks_2samp  # takes a second to import, and inspection needs none of it

        alarms: dict[Quantity, Alarm] = {}
        for wording, before, now in zip(_WORDINGS, self._calibration, np.array(self._recent).T, strict=True):
            p_value = float(ks_2samp(before, now, method="exact").pvalue)
            known = alarms.get(wording.what)  # framing is two tests
            if p_value <= self._level and (known is None or p_value < known.p_value):
                message = _message(wording, before, now, p_value)
                alarms[wording.what] = Alarm(what=wording.what, p_value=p_value, images=self.images, message=message)
        return list(alarms.values())

    def state(self) -> dict[str, Any]:
        """What a restarted program needs to go on, ready for JSON. The calibration itself is not in it."""
        state = _State(
            window=self.window, calibration=self._fingerprint(), images=self.images, recent=list(self._recent)
        )
        return state.model_dump(mode="json")

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a `state()` taken with the same calibration and window. Raises DataError for any other."""
        try:
            known = _State.model_validate(state)
        except ValidationError as error:
            raise DataError(
                f"Expected the saved state of a drift monitor, found {error.error_count()} values that do not fit; "
                "start afresh without it."
            ) from None
        full = len(known.recent) == min(known.images, known.window) and np.isfinite(known.recent).all()
        if (known.window, known.calibration) != (self.window, self._fingerprint()) or not full:
            raise DataError(
                "Expected a drift monitor's state from the same calibration and window, found another one; "
                "start afresh without it."
            )
        self.images = known.images
        self._recent = deque(known.recent, maxlen=self.window)

    def _fingerprint(self) -> str:
        digest = hashlib.sha256()
        for values in self._calibration:
            digest.update(values.tobytes() + b"|")
        return digest.hexdigest()


def watch(monitor: DriftMonitor, rows: Iterable[Mapping[str, Any]], threshold: float) -> Iterator[Alarm]:
    """The alarms over rows of `results.jsonl`; photographs that could not be read are passed over.

    Args:
        threshold: the calibrated one; scores of another calibration may have another unit.

    Raises:
        DataError: a row without the score and the look of a photograph, or of another calibration.
    """
    for row in rows:
        if row.get("error"):
            continue
        if row.get("threshold", threshold) != threshold:
            raise DataError(
                "Expected results of the model as it is calibrated now, found others; inspect the photographs again "
                "with ddad predict."
            )
        try:
            score, photo = float(row["anomaly_score"]), PhotoStatistics(**row["photo"])
        except (KeyError, TypeError, ValueError):
            raise DataError(
                "Expected the results.jsonl of ddad predict, found a row without anomaly_score and photo; inspect the "
                "photographs again."
            ) from None
        yield from monitor.update(score, photo)


def _images_needed(window: int, level: float) -> int:
    """The fewest calibration images with which windows beyond all of them have a p-value of at most `level`."""
    count = 1
    while 2 / math.comb(count + window, window) > level:
        count += 1
    return count


def _message(wording: _Wording, before: NDArray[np.float64], now: NDArray[np.float64], p_value: float) -> str:
    """One sentence for a person. before: the calibration images' values, now: the window's."""
    low, old, high = np.quantile(before, (0.25, 0.5, 0.75))
    least, new, most = np.quantile(now, (0.25, 0.5, 0.75))
    if least <= low <= high <= most or low <= least <= most <= high:  # one middle half within the other
        change = f"vary {'more' if most - least > high - low else 'less'} in {wording.name}"
        amount = f"the middle half from {least:.3g} to {most:.3g}, at calibration from {low:.3g} to {high:.3g}"
    else:
        change = wording.more if new > old else wording.less
        amount = {
            "scores": f"median {new:.3g}, at calibration {old:.3g}",
            "brightness": f"by {abs(new - old):.0f} of 255 grey levels",
            "focus": f"{abs(math.expm1(new - old)):.0%} {'more' if new > old else 'less'} fine detail",
            "framing": f"by {abs(new - old):.1%} of the {'width' if 'horizontal' in wording.name else 'height'}",
        }[wording.what]
    return (
        f"The last {len(now)} photographs {change} than at calibration ({amount}; p = {p_value:.1g}); {wording.advice}."
    )
