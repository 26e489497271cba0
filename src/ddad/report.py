"""One HTML page from an `Evaluation`: everything inline, readable offline, without script and on a telephone."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from ddad import images
from ddad.baseline import fit_baseline
from ddad.conformal import chance_of
from ddad.data.folder import scan
from ddad.data.samples import Dataset, Sample
from ddad.detector import Detector
from ddad.errors import DataError
from ddad.evaluation import Evaluation, Example, MeanImageBaseline, Row, evaluate, with_baseline
from ddad.files import write_text
from ddad.images import read_image
from ddad.metrics import RESAMPLES
from ddad.prediction import Prediction

METRIC_NAMES = {
    "image_auroc": ("Image AUROC", "chance that a defective image scores above a good one; 0.5 is guessing"),
    "image_ap": ("Image average precision", "area under the precision-recall curve"),
    "image_f1_max": ("Image F1, oracle", "at the best threshold for these test labels, which nobody knows beforehand"),
    "pixel_auroc": ("Pixel AUROC", "the same chance for single pixels; high even for coarse maps"),
    "pixel_ap": ("Pixel average precision", "for single pixels; strict when defects are small"),
    "aupro": ("AUPRO", "overlap per defect region, up to 30 % false positive pixels"),
    "aupro_0.05": ("AUPRO, 5 % limit", "the same up to 5 % false positive pixels"),
    "false_alarm_rate": ("False alarm rate", "share of good images called anomalous"),
    "miss_rate": ("Miss rate", "share of defective images called normal"),
    "mean_image_auroc": ("Mean-image AUROC", "baseline: distance to the mean good image; the method has to beat it"),
    "seconds_per_image": ("Seconds per image", "prediction, reading included"),
    "peak_memory_mb": ("Peak memory (MB)", "of the whole process"),
}
SHARES = ("false_alarm_rate", "miss_rate")  # shown in percent
KIND_COLUMNS = {  # of the table of defect kinds: metric, heading, whether it is shown in percent
    "image_auroc": ("Image AUROC", False),
    "image_ap": ("Image AP", False),
    "miss_rate": ("Missed", True),
    "pixel_auroc": ("Pixel AUROC", False),
    "aupro": ("AUPRO", False),
}
WORST = 6  # images in each of the two lists of mistakes
BINS = 40
UNLIKELY = 0.01
UNIT = "\xa0%"
PAPER_BATCH = 16


def write_report(evaluation: Evaluation, path: str | Path, *, title: str, limit: float | None = None) -> None:
    """Write the page.

    Args:
        evaluation: from `evaluate`; one that was loaded from JSON has no pictures, and the page says so.
        path: the HTML file; it is replaced as a whole.
        title: heading of the page, say the product and the model.
        limit: anomaly map value (> 0) that good parts reach; colours start there and are strongest at its double. If
            None, the threshold, or, without one, the median score of the good images.
    """
    rows = evaluation.rows
    if limit is None:
        good_scores = [row.anomaly_score for row in rows if not row.is_defective]
        limit = evaluation.threshold or (float(np.median(good_scores)) if good_scores else 1.0)
        limit = limit if limit > 0 else 1.0
    environment = Environment(
        loader=PackageLoader("ddad"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = _number
    environment.filters["percent"] = _percent
    environment.filters["interval"] = _interval
    cards = [_card(example, limit) for example in evaluation.examples]
    good, defective = ([card for card in cards if card["row"].is_defective is label] for label in (False, True))
    page = environment.get_template("report.html").render(
        title=title,
        evaluation=evaluation,
        ours={**evaluation.metrics, "intervals": evaluation.intervals},
        resamples=RESAMPLES,
        headline=_headline(evaluation),
        metric_names=METRIC_NAMES,
        shares=SHARES,
        kind_columns=KIND_COLUMNS,
        histogram=_histogram(rows, evaluation.threshold),
        cards=cards,
        worst_good=sorted(good, key=lambda card: -card["row"].anomaly_score)[:WORST],
        worst_defective=sorted(defective, key=lambda card: card["row"].anomaly_score)[:WORST],
        limit=limit,
    )
    write_text(path, page)


def evaluate_folder(
    detector: Detector,
    data: str | Path | Dataset,
    out: str | Path,
    *,
    baseline: bool = False,
    batch_size: int | None = None,
    workers: int = 1,
) -> Evaluation:
    """Inspect the test images of a folder in MVTec layout, or of a `Dataset`; write `metrics.json` and `report.html`.

    Args:
        baseline: also judge nearest-neighbour features, which remember the images that the model was trained on.
        batch_size: images inspected together; by default 4, or, where scores depend on it, the paper's 16.

    Raises:
        DataError: there are no test images, or a mask cannot be read. A test image that cannot be read is left out, and
            a note says so. With `baseline`, also: the good images are not those that the model was trained on.
    """
    dataset = data if isinstance(data, Dataset) else scan(data)
    if not dataset.test:
        raise DataError(
            f"Expected labelled test images in {dataset.root / 'test'}, found none; "
            "evaluation needs test/good and test/<defect> folders."
        )
    neighbours = fit_baseline(detector, dataset, workers=workers) if baseline else None
    good = (read_image(sample.path, detector.shape, detector.image_rule) for sample in dataset.train)
    mean_image = MeanImageBaseline().fit(good)
    notes: list[str] = []
    batch_max = detector.settings.scoring.fusion == "batch-max"
    if batch_size is None:
        batch_size = PAPER_BATCH if batch_max else 4
    if batch_max:
        notes.append(
            f"Scores depend on their batch of {batch_size} images, as published (batch-max fusion): for comparison "
            "only, and without verdicts."
        )
    notes += [said for part in ("adaptation", "tuning") if (said := detector.record.get(part, {}).get("said"))]
    evaluation = evaluate(
        inspect(detector, dataset.test, batch_size, workers, notes),
        false_alarms=detector.calibration.promised_rate if detector.calibration else None,
        calibration_images=len(detector.calibration.scores) if detector.calibration else None,
        mean_image=mean_image,
        settings=detector.settings.model_dump(mode="json"),
        crop=detector.settings.scoring.crop,
    )
    evaluation = replace(evaluation, notes=(*evaluation.notes, *notes))
    if neighbours:
        theirs = evaluate(
            neighbours.inspect(dataset.test, workers=workers), crop=detector.settings.scoring.crop, max_examples=0
        )
        evaluation = with_baseline(evaluation, theirs, "nearest neighbours")
    out = Path(out)
    evaluation.save(out / "metrics.json")
    write_report(evaluation, out / "report.html", title=f"{dataset.category}: inspection report")
    return evaluation


def inspect(
    detector: Detector, samples: Sequence[Sample], batch_size: int, workers: int, notes: list[str]
) -> Iterator[tuple[Sample, Prediction]]:
    """Predictions of labelled images, for `evaluate`; what cannot be read is left out and noted."""
    batch_max = detector.settings.scoring.fusion == "batch-max"
    results = detector.stream((sample.path for sample in samples), batch_size, workers, batch_max=batch_max)
    for sample, (_, result) in zip(samples, results, strict=True):
        if isinstance(result, DataError):
            notes.append(f"Left out, since it cannot be read: {result}")
        else:
            yield sample, result


def _headline(evaluation: Evaluation) -> list[str]:
    """The result in plain sentences, most important first."""
    metrics, counts = evaluation.metrics, evaluation.counts
    sentences = [f"{counts['good']} good and {counts['defective']} defective test images."]
    if (auroc := metrics["image_auroc"]) is not None:
        sentences.append(f"A defective image scores above a good one in {_percent(auroc)} of all pairs.")
    baseline = metrics["mean_image_auroc"]
    if auroc is not None and baseline is not None and baseline >= auroc:
        sentences.append(
            f"The plain distance to the mean good image does no worse ({_percent(baseline)}), "
            "so this test set does not show what the method adds."
        )
    if auroc is not None and evaluation.baseline is not None and evaluation.baseline["image_auroc"] is not None:
        sentences.append(_comparison(auroc, evaluation.baseline))
    if (miss_rate := metrics["miss_rate"]) is not None:
        missed = round(miss_rate * counts["defective"])
        sentences.append(f"{missed} of {counts['defective']} defective images were missed ({_percent(miss_rate)}).")
    if (rate := metrics["false_alarm_rate"]) is not None:
        false = round(rate * counts["good"])
        sentence = f"{false} of {counts['good']} good images raised a false alarm ({_percent(rate)})"
        if evaluation.false_alarms is not None and evaluation.calibration_images:
            promised, known = evaluation.false_alarms, evaluation.calibration_images
            chance = chance_of(false, counts["good"], known, promised)
            judged = "above" if chance < UNLIKELY else "within"
            sentence += (
                f"; {_percent(promised)} was promised by {known} calibration images, and this is {judged} what chance "
                f"allows (so many or more: {_percent(chance)})"
            )
        sentences.append(sentence + ".")
    if (aupro := metrics["aupro"]) is not None:
        sentences.append(f"Defects are located with an AUPRO of {_number(aupro)}.")
    return sentences


def _comparison(auroc: float, baseline: dict[str, Any]) -> str:
    """Whether the method is above the baseline on image AUROC beyond chance."""
    name = baseline["name"]
    pair = f"{_number(auroc)} against {_number(baseline['image_auroc'])} in image AUROC"
    if (interval := baseline.get("difference", {}).get("image_auroc")) is None:
        return f"Beside {name} DDAD reaches {pair}; there are too few images to tell whether that is chance."
    low, high = interval
    judged = (
        f"DDAD is better than {name} beyond chance"
        if low > 0
        else f"DDAD is worse than {name} beyond chance"
        if high < 0
        else f"DDAD cannot be told from {name} on these images"
    )
    difference = f"{low:+.3f} to {high:+.3f}".replace("-", "−")
    return f"{judged}: {pair}, a difference of {difference}."


def _histogram(rows: Sequence[Row], threshold: float | None) -> dict[str, Any]:
    """Bars for good images and for defective ones as (bin, images, height in [0, 1] of the tallest of the class).

    Places on the axis are in [0, 1]. The axis is logarithmic where scores are positive and spread widely.
    """
    scores = np.array([row.anomaly_score for row in rows])
    is_defective = np.array([row.is_defective for row in rows])
    limits = scores if threshold is None else np.append(scores, threshold)
    low, high = float(limits.min()), float(limits.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    logarithmic = low > 0 and high / low > 4

    def place(value: Any) -> Any:
        return np.log(value / low) / np.log(high / low) if logarithmic else (value - low) / (high - low)

    bars = {}
    for name, label in (("good", False), ("defective", True)):
        counts, _ = np.histogram(place(scores[is_defective == label]), BINS, (0, 1))
        bars[name] = [(i, int(n), float(n / counts.max())) for i, n in enumerate(counts) if n]
    return {
        **bars,
        "bins": BINS,
        "logarithmic": logarithmic,
        "ticks": [
            (t, low * (high / low) ** t if logarithmic else low + t * (high - low)) for t in np.linspace(0, 1, 5)
        ],
        "threshold": None if threshold is None else float(place(threshold)),
    }


def _card(example: Example, limit: float) -> dict[str, Any]:
    row = example.row
    if row.is_anomalous is None:
        verdict, mistake = "no verdict", False
    else:
        mistake = row.is_anomalous is not row.is_defective
        verdict = {
            (True, True): "found",
            (True, False): "missed",
            (False, True): "false alarm",
            (False, False): "passed",
        }[row.is_defective, row.is_anomalous]
    with Image.open(io.BytesIO(example.image)) as image:
        overlay = images.overlay(np.asarray(image.convert("RGB")), example.anomaly_map, limit)
    pictures = [
        ("Input", "jpeg", example.image),
        ("Reconstruction", "jpeg", example.reconstruction),
        ("Heatmap", "jpeg", images.encode_jpeg(overlay, 85)),
    ]
    if example.mask is not None:
        pictures.append(("Mask", "png", example.mask))
    return {
        "row": row,
        "name": "/".join(Path(row.path).parts[-2:]),
        "verdict": verdict,
        "mistake": mistake,
        "pictures": [
            (name, f"data:image/{kind};base64,{base64.b64encode(content).decode()}") for name, kind, content in pictures
        ],
        "height": example.anomaly_map.shape[0],
        "width": example.anomaly_map.shape[1],
    }


def _number(value: float | int | None) -> str:
    if value is None:
        return "–"
    return str(value) if isinstance(value, int) else f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}".removesuffix(".0") + UNIT


def _interval(bounds: Sequence[float], percent: bool = False) -> str:
    low, high = (_percent(bound) if percent else _number(bound) for bound in bounds)
    return f"{low.removesuffix(UNIT)} to {high}"
