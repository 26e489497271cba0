"""Judge a detector on labelled test images: a stream of (sample, prediction) pairs becomes one `Evaluation`.

Nothing is kept of an image but its row, its pixels inside the accumulators of `metrics`, and, for a bounded number of
examples, small pictures for the report. No number here feeds back into a choice: test labels only measure.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import math
import os
import platform
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ddad import images
from ddad.anomaly_map import centre
from ddad.detector import package_versions
from ddad.errors import DataError
from ddad.files import write_json
from ddad.metrics import (
    EXACT_LIMIT,
    PixelMetrics,
    auroc_difference_interval,
    image_intervals,
    image_metrics,
    pixel_intervals,
    pixel_metrics,
    rate_interval,
)

if TYPE_CHECKING:
    from ddad.data.samples import Sample
    from ddad.prediction import Prediction

METRICS = (
    "image_auroc",
    "image_ap",
    "image_f1_max",  # an oracle: its threshold is the best one for these very test labels
    "pixel_auroc",
    "pixel_ap",
    "aupro",
    "aupro_0.05",
    "false_alarm_rate",
    "miss_rate",
    "mean_image_auroc",
    "seconds_per_image",
    "peak_memory_mb",
)
RESAMPLED = ("image_auroc", "image_ap", "pixel_auroc", "pixel_ap", "aupro", "aupro_0.05")  # bootstrap intervals
COMPARED = tuple(name for name in METRICS if name not in ("mean_image_auroc", "peak_memory_mb"))  # with a baseline
PLAIN_FIELDS = (
    "intervals",
    "counts",
    "per_kind",
    "baseline",
    "threshold",
    "false_alarms",
    "calibration_images",
    "settings",
    "versions",
    "machine",
    "date",
)
PICTURE_SIZE = 256  # pixels of the longer side of the example pictures
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Row:
    """What was found in one test image."""

    path: str
    kind: str  # "good" or the name of the defect
    is_defective: bool  # the label
    anomaly_score: float
    p_value: float | None
    is_anomalous: bool | None  # the verdict; None without a calibrated threshold
    regions: int  # number of anomalous regions found


@dataclass(frozen=True)
class Example:
    """Pictures of one test image, at most `PICTURE_SIZE` pixels on the longer side."""

    row: Row
    image: bytes  # JPEG
    reconstruction: bytes  # JPEG
    mask: bytes | None  # PNG; None for a good image and for one without a mask
    anomaly_map: NDArray[np.float32]  # (h, w), coloured when the report is written


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`; `save` and `load` keep everything but the example pictures."""

    metrics: dict[str, float | None]  # one entry per name in METRICS; None where a note says why
    intervals: dict[str, list[float]]  # 95 %: [low, high] around metrics; a note says why where one is missing
    counts: dict[str, int]  # of "good" and "defective" images
    per_kind: dict[str, dict[str, float | None]]
    threshold: float | None
    false_alarms: float | None  # the promised false alarm rate
    calibration_images: int | None  # whose scores gave the threshold
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    settings: dict[str, Any]
    versions: dict[str, str]
    machine: dict[str, str]
    date: str  # ISO 8601, UTC
    baseline: dict[str, Any] | None = None  # another detector on the same images, see `with_baseline`
    examples: tuple[Example, ...] = field(default=(), compare=False, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the metrics stand at the top level."""
        return {
            "format_version": FORMAT_VERSION,
            **self.metrics,
            **{name: getattr(self, name) for name in PLAIN_FIELDS},
            "notes": list(self.notes),
            "rows": [asdict(row) for row in self.rows],
        }

    def save(self, path: str | Path) -> None:
        """Write JSON to `path`, which is complete or, after a crash, as it was before."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what `save` wrote.

        Raises:
            DataError: there is no such file, or it is not an evaluation of this format.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["format_version"] != FORMAT_VERSION:
                raise ValueError(f"format version {content['format_version']}")
            return cls(
                metrics={name: content[name] for name in METRICS},
                rows=tuple(Row(**row) for row in content["rows"]),
                notes=tuple(content["notes"]),
                **{name: content[name] for name in PLAIN_FIELDS},
            )
        except OSError as error:
            raise DataError(
                f"expected the metrics.json of an evaluation at {path}, found no readable file ({error.strerror}); "
                "run `ddad evaluate` first or correct the path."
            ) from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"expected the metrics.json of an evaluation, format version {FORMAT_VERSION}, found something else at "
                f"{path} ({type(error).__name__}: {error}); run `ddad evaluate` again."
            ) from error


def baseline_summary(evaluation: Evaluation, name: str) -> dict[str, Any]:
    """An evaluation of another detector reduced to its numbers, JSON-ready.

    Returns:
        `name`; the metrics in `COMPARED`, in the units of `Evaluation.metrics`; `intervals`; `per_kind`.
    """
    return {
        "name": name,
        **{metric: evaluation.metrics[metric] for metric in COMPARED},
        "intervals": evaluation.intervals,
        "per_kind": evaluation.per_kind,
    }


def with_baseline(evaluation: Evaluation, baseline: Evaluation, name: str) -> Evaluation:
    """`evaluation` with the `baseline_summary` of another detector on the same test images.

    Its entry `difference` holds the 95 % interval of `image_auroc` here minus there, over the images both could read:
    {"image_auroc": [low, high]}, empty where the classes are too small for one.
    """
    theirs = {row.path: row.anomaly_score for row in baseline.rows}
    rows = [row for row in evaluation.rows if row.path in theirs]
    interval = None
    if len({row.is_defective for row in rows}) == 2:
        interval = auroc_difference_interval(
            [row.anomaly_score for row in rows],
            [theirs[row.path] for row in rows],
            [row.is_defective for row in rows],
        )
    difference = {} if interval is None else {"image_auroc": interval}
    return replace(evaluation, baseline={**baseline_summary(baseline, name), "difference": difference})


class MeanImageBaseline:
    """The plainest detector: distance to the mean of the good training images. A method must beat it to be of use."""

    def __init__(self) -> None:
        self.mean: NDArray[np.float64] | None = None  # (H, W, 3) in [0, 1]

    def fit(self, good_images: Iterable[NDArray[np.uint8]]) -> Self:
        """Average (H, W, 3) uint8 images of one shape, read one at a time.

        Raises:
            DataError: there is no image, or shapes differ.
        """
        total, count = None, 0
        for image in good_images:
            if total is None:
                total = np.zeros(image.shape, np.float64)
            self._check_shape(image.shape, total.shape)
            total += image
            count += 1
        if total is None:
            raise DataError(
                "expected good training images for the mean image, found none; check the train/good folder."
            )
        self.mean = total / (255 * count)
        return self

    def score(self, image: NDArray[np.uint8]) -> float:
        """Mean squared difference to the mean image, intensities in [0, 1]; higher is more anomalous."""
        if self.mean is None:
            raise RuntimeError("call fit before score")
        self._check_shape(image.shape, self.mean.shape)
        return float(np.mean((image / 255 - self.mean) ** 2))

    @staticmethod
    def _check_shape(found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if found != expected:
            raise DataError(
                f"expected images of the shape {expected} of the first good one, found {found}; "
                "resize all images to the model's shape."
            )


def evaluate(
    predictions: Iterable[tuple[Sample, Prediction]],
    *,
    false_alarms: float | None = None,
    calibration_images: int | None = None,
    mean_image: MeanImageBaseline | None = None,
    settings: Mapping[str, Any] | None = None,
    seconds: float | None = None,
    max_examples: int = 200,
    exact_limit: int = EXACT_LIMIT,
    crop: float | None = None,
) -> Evaluation:
    """Compare predictions with the labels and masks of the test images.

    Args:
        predictions: pairs of test image and prediction, consumed once; a generator keeps memory bounded.
        false_alarms: the false alarm rate promised by calibration, in (0, 1).
        calibration_images: how many it is promised by.
        mean_image: fitted; scores each `prediction.image` for `mean_image_auroc`.
        settings: what produced the predictions; kept in the result, anything JSON does not know as its `str`.
        seconds: total prediction time. If None, the time `predictions` takes to yield is measured, so reading images
            and warming up count, and computing metrics does not.
        max_examples: number of images kept as pictures: the worst false alarms, the worst misses and an even spread
            over the kinds. The choice does not depend on the order of the stream.
        exact_limit: pixels for which pixel metrics are exact; a histogram with a note beyond.
        crop: share of each side, in the centre, that the pixel metrics see; None: all. As published: 224 / 256.

    Returns:
        The evaluation, without a `baseline`. What cannot be computed is None and has an entry in `notes`.

    Raises:
        DataError: there are no predictions, a score is not finite, or a mask does not fit.
    """
    rows: list[Row] = []
    mean_image_scores: list[float] = []
    pixels: dict[str, PixelMetrics] = defaultdict(lambda: PixelMetrics(exact_limit))
    missing_masks: Counter[str] = Counter()
    thresholds: set[float | None] = set()
    gallery = _Gallery(max_examples)
    measured = 0.0
    stream = iter(predictions)
    while True:
        start = time.perf_counter()
        pair = next(stream, None)
        measured += time.perf_counter() - start
        if pair is None:
            break
        sample, prediction = pair
        if not math.isfinite(prediction.anomaly_score):
            raise DataError(
                f"expected a finite anomaly score, found {prediction.anomaly_score} for {sample.path}; "
                "check the model's training loss, which has probably diverged."
            )
        row = Row(
            path=str(sample.path),
            kind=sample.kind,
            is_defective=sample.is_anomalous,
            anomaly_score=float(prediction.anomaly_score),
            p_value=None if prediction.p_value is None else float(prediction.p_value),
            is_anomalous=None if prediction.is_anomalous is None else bool(prediction.is_anomalous),
            regions=len(prediction.regions),
        )
        rows.append(row)
        thresholds.add(prediction.threshold)
        if mean_image is not None:
            mean_image_scores.append(mean_image.score(prediction.image))
        mask = _read_mask(sample, prediction)
        if mask is None or mask.any() != sample.is_anomalous:
            missing_masks["no mask" if mask is None else "a mask that is empty at the model's resolution"] += 1
        else:
            seen = centre(mask.shape[0], mask.shape[1], crop)
            pixels[sample.kind].update(prediction.anomaly_map[seen], mask[seen])
            if sum(part.pixels for part in pixels.values() if part.is_exact) > exact_limit:
                for part in pixels.values():
                    part.to_histogram()
        gallery.offer(row, prediction, mask if sample.is_anomalous else None)
    if not rows:
        raise DataError("expected test images to evaluate, found none; check the test folder.")

    notes = [
        f"{count} defective {'image has' if count == 1 else 'images have'} {what} and "
        f"{'is' if count == 1 else 'are'} left out of the pixel metrics."
        for what, count in missing_masks.items()
    ]
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    good, defective = ([row for row in rows if row.is_defective is label] for label in (False, True))
    intervals: dict[str, list[float]] = {}
    parts = list(pixels.values())
    if of_images := _or_note(notes, "The image metrics", _image_metrics, rows):
        metrics.update(of_images)
        intervals |= image_intervals([row.anomaly_score for row in rows], [row.is_defective for row in rows])
    if of_pixels := _or_note(notes, "The pixel metrics", pixel_metrics, parts):
        metrics.update(of_pixels)
        intervals |= pixel_intervals(parts, of_pixels)
    if not all(part.is_exact for part in pixels.values()):
        notes.append(
            f"The pixel metrics come from a histogram of bins at most 0.05 % wide, because the test set has more than "
            f"{exact_limit:,} pixels."
        )
    metrics["false_alarm_rate"], metrics["miss_rate"] = _verdict_share(good, True), _verdict_share(defective, False)
    for name, group, what in (("false_alarm_rate", good, "good"), ("miss_rate", defective, "defective")):
        if (rate := metrics[name]) is None:
            why = "the predictions carry no verdict" if group else f"there are no {what} test images"
            notes.append(f"{name} is missing because {why}.")
        else:
            intervals[name] = rate_interval(round(rate * len(group)), len(group))
    if bare := [name for name in RESAMPLED if metrics[name] is not None and name not in intervals]:
        notes.append(
            f"{', '.join(bare)}: without an interval, because there are fewer than two good or two defective images to "
            "resample, or nearly all scores lie within a few percent of each other."
        )
    if alike := [name for name in RESAMPLED if name in intervals and np.ptp(intervals[name]) < 1e-6]:
        notes.append(
            f"{', '.join(alike)}: an interval without width, because every resample of these images gives the same "
            "value; other images may still give another."
        )
    if mean_image is None:
        notes.append("mean_image_auroc is missing because no mean-image baseline was given.")
    else:
        labels = [row.is_defective for row in rows]
        result = _or_note(notes, "The metrics of the mean-image baseline", image_metrics, mean_image_scores, labels)
        metrics["mean_image_auroc"] = result.get("image_auroc")
    metrics["seconds_per_image"] = (measured if seconds is None else seconds) / len(rows)
    metrics["peak_memory_mb"] = _peak_memory_mb()
    if metrics["peak_memory_mb"] is None:
        notes.append("peak_memory_mb is missing because this operating system does not report it.")
    if len(thresholds) > 1:
        notes.append("The predictions carry different thresholds, so none is shown.")

    kinds = sorted({row.kind for row in defective})
    per_kind: dict[str, dict[str, float | None]] = {}
    for kind in kinds:
        of_kind = [row for row in defective if row.kind == kind]
        # Problems here repeat those already noted for all kinds together, or are a missing mask.
        of_image = _or_note([], kind, _image_metrics, good + of_kind)
        parts = [part for part_kind, part in pixels.items() if part_kind in {kind, *(row.kind for row in good)}]
        of_pixel = _or_note([], kind, pixel_metrics, parts, (0.3,)) if kind in pixels else {}
        per_kind[kind] = {
            "count": len(of_kind),
            "image_auroc": of_image.get("image_auroc"),
            "image_ap": of_image.get("image_ap"),
            "miss_rate": _verdict_share(of_kind, False),
            "pixel_auroc": of_pixel.get("pixel_auroc"),
            "aupro": of_pixel.get("aupro"),
        }
    return Evaluation(
        metrics=metrics,
        intervals=intervals,
        counts={"good": len(good), "defective": len(defective)},
        per_kind=per_kind,
        threshold=thresholds.pop() if len(thresholds) == 1 else None,
        false_alarms=false_alarms,
        calibration_images=calibration_images,
        rows=tuple(rows),
        notes=tuple(notes),
        settings=json.loads(json.dumps(dict(settings or {}), default=str)),
        versions=package_versions(),
        machine=_machine(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        examples=gallery.examples(),
    )


class _Gallery:
    """Chooses which images to keep as pictures while they stream by, independent of their order.

    Half of the places go to the highest-scoring good and the lowest-scoring defective images; the others are shared
    evenly among the kinds, and within a kind go to the images whose names have the smallest digests: a random sample
    that is the same everywhere.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._offered = 0
        self._worst: dict[bool, list[tuple[float, str, int]]] = {False: [], True: []}  # heaps per label, mildest first
        self._spread: dict[str, list[tuple[int, int]]] = defaultdict(list)  # heaps per kind, largest digest first
        self._pictures: dict[int, Example] = {}

    def offer(self, row: Row, prediction: Prediction, mask: NDArray[np.bool_] | None) -> None:
        number = self._offered
        self._offered += 1
        worst, spread = self._worst[row.is_defective], self._spread[row.kind]
        badness = -row.anomaly_score if row.is_defective else row.anomaly_score
        heapq.heappush(worst, (badness, row.path, number))
        if len(worst) > self.size // 4:
            heapq.heappop(worst)
        name = "/".join(Path(row.path).parts[-2:])  # the same wherever the data lie
        heapq.heappush(spread, (-int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]), number))
        if sum(map(len, self._spread.values())) > self.size:
            self._evict()
        kept = self._kept()
        if number in kept:
            self._pictures[number] = _example(row, prediction, mask)
        for gone in self._pictures.keys() - kept:
            del self._pictures[gone]

    def examples(self) -> tuple[Example, ...]:
        while len(self._kept()) > self.size:
            self._evict()
        chosen = (self._pictures[number] for number in self._kept())
        return tuple(sorted(chosen, key=lambda example: (example.row.is_defective, example.row.kind, example.row.path)))

    def _evict(self) -> None:
        heapq.heappop(self._spread[max(self._spread, key=lambda kind: (len(self._spread[kind]), kind))])

    def _kept(self) -> set[int]:
        worst = {number for heap in self._worst.values() for _, _, number in heap}
        return worst | {number for heap in self._spread.values() for _, number in heap}


def _example(row: Row, prediction: Prediction, mask: NDArray[np.bool_] | None) -> Example:
    height, width = prediction.anomaly_map.shape
    scale = min(1, PICTURE_SIZE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))

    def shrink(array: NDArray[Any]) -> NDArray[Any]:
        return array if scale == 1 else np.asarray(Image.fromarray(array).resize(size, Image.Resampling.BOX))

    return Example(
        row=row,
        image=images.encode_jpeg(shrink(prediction.image), 85),
        reconstruction=images.encode_jpeg(shrink(prediction.reconstruction), 85),
        mask=None if mask is None else images.encode_png(shrink(mask * np.uint8(255))),
        anomaly_map=shrink(np.array(prediction.anomaly_map, dtype=np.float32)),
    )


def _read_mask(sample: Sample, prediction: Prediction) -> NDArray[np.bool_] | None:
    if not sample.is_anomalous:
        return np.zeros(prediction.anomaly_map.shape, bool)
    if sample.mask is None:
        return None
    return images.read_mask(sample.mask, size=prediction.anomaly_map.shape)


def _image_metrics(rows: Sequence[Row]) -> dict[str, float]:
    return image_metrics([row.anomaly_score for row in rows], [row.is_defective for row in rows])


def _or_note(
    notes: list[str], what: str, compute: Callable[..., dict[str, float]], *arguments: Any
) -> dict[str, float]:
    """What `compute` returns, or nothing and a note that says why."""
    try:
        return compute(*arguments)
    except DataError as error:
        notes.append(f"{what} are missing: {error}")
        return {}


def _verdict_share(rows: Sequence[Row], verdict: bool) -> float | None:
    verdicts = [row.is_anomalous for row in rows]
    return None if not verdicts or None in verdicts else verdicts.count(verdict) / len(verdicts)


def _peak_memory_mb() -> float | None:
    """The largest resident memory of this process so far, in 10^6 bytes; memory of a GPU is not in it."""
    try:
        import resource  # not on Windows
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _machine() -> dict[str, str]:
    """Enough to compare timings; nothing that names the computer."""
    machine = {"system": platform.system(), "processor": platform.machine(), "cpus": str(os.cpu_count())}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine
