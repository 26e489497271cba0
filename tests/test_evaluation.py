"""Run alone: pytest tests/test_evaluation.py (seconds)."""

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from ddad.data.samples import Sample
from ddad.errors import DataError
from ddad.evaluation import (
    COMPARED,
    METRICS,
    RESAMPLED,
    Evaluation,
    MeanImageBaseline,
    baseline_summary,
    evaluate,
    with_baseline,
)
from ddad.metrics import PixelMetrics, auroc_difference_interval, rate_interval

SHAPE = (24, 32)
RECTANGLE = (slice(4, 12), slice(6, 20))


def prediction(score=1.0, verdict=None, anomaly_map=None, **changes):
    """As `ddad.detector.Prediction`, without loading networks."""
    fields = {
        "path": None,
        "anomaly_score": score,
        "p_value": None if verdict is None else 0.5,
        "is_anomalous": verdict,
        "threshold": None if verdict is None else 2.0,
        "anomaly_map": np.full(SHAPE, score, np.float32) if anomaly_map is None else anomaly_map,
        "reconstruction": np.zeros((*SHAPE, 3), np.uint8),
        "image": np.full((*SHAPE, 3), 7, np.uint8),
        "regions": ("region",) if verdict else (),
    }
    return SimpleNamespace(**{**fields, **changes})


@pytest.fixture
def mask_file(tmp_path):
    """A mask of twice the size of the map."""
    mask = np.zeros((48, 64), np.uint8)
    mask[8:24, 12:40] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path / "mask.png"


@pytest.fixture
def pairs(mask_file):
    """Six good images, of which one is a false alarm, and two kinds of defect; one scratch is missed."""
    rng = np.random.default_rng(0)
    result = []
    for index, (kind, score) in enumerate(
        [("good", s) for s in (0.5, 0.6, 0.7, 0.8, 0.9, 2.5)]
        + [("scratch", 1.5), ("scratch", 3.0), ("hole", 4.0), ("hole", 5.0)]
    ):
        anomaly_map = rng.random(SHAPE, np.float32)
        if kind != "good":
            anomaly_map[RECTANGLE] += 0.7
        sample = Sample(Path(f"part/test/{kind}/{index:03}.png"), kind, None if kind == "good" else mask_file)
        result.append((sample, prediction(score, score > 2, anomaly_map)))
    return result


def test_all_metrics(pairs):
    result = evaluate(
        pairs,
        false_alarms=0.05,
        calibration_images=19,
        mean_image=MeanImageBaseline().fit([pairs[0][1].image]),
        settings={"n": 1},
    )
    assert tuple(result.metrics) == METRICS
    assert result.notes == ()
    assert None not in result.metrics.values()
    labels = [sample.is_anomalous for sample, _ in pairs]
    scores = [predicted.anomaly_score for _, predicted in pairs]
    assert result.metrics["image_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert result.metrics["false_alarm_rate"] == pytest.approx(1 / 6)
    assert result.metrics["miss_rate"] == pytest.approx(1 / 4)
    assert result.metrics["mean_image_auroc"] == pytest.approx(0.5)  # all images are equal
    assert result.counts == {"good": 6, "defective": 4}
    assert (result.threshold, result.false_alarms, result.settings) == (2.0, 0.05, {"n": 1})
    assert result.calibration_images == 19
    assert [row.is_defective for row in result.rows] == labels
    assert [row.regions for row in result.rows] == [0, 0, 0, 0, 0, 1, 0, 1, 1, 1]

    pixels = PixelMetrics()
    for sample, predicted in pairs:
        mask = np.zeros(SHAPE, bool)
        mask[RECTANGLE] = sample.is_anomalous
        pixels.update(predicted.anomaly_map, mask)
    assert {name: result.metrics[name] for name in pixels.compute()} == pytest.approx(pixels.compute())


def test_intervals_stand_around_the_metrics(pairs):
    result = evaluate(pairs)
    assert set(result.intervals) == {*RESAMPLED, "false_alarm_rate", "miss_rate"}
    for name, (low, high) in result.intervals.items():
        assert 0 <= low <= result.metrics[name] <= high <= 1
    assert result.intervals["false_alarm_rate"] == rate_interval(1, 6)
    assert result.intervals["miss_rate"] == rate_interval(1, 4)
    assert evaluate(pairs).intervals == result.intervals


def test_intervals_that_say_little_are_noted(pairs):
    notes = "\n".join(evaluate([*pairs[:6], pairs[8]]).notes)
    assert (
        "image_auroc, image_ap, pixel_auroc, pixel_ap, aupro, aupro_0.05: without an interval, because there" in notes
    )
    notes = "\n".join(evaluate([*pairs[:5], *pairs[8:]]).notes)
    assert "image_auroc, image_ap: an interval without width, because every resample" in notes


def test_a_baseline_is_another_evaluation_reduced_to_its_numbers(pairs, tmp_path):
    result = evaluate(pairs)
    other = evaluate([(sample, prediction(score, score > 2, predicted.anomaly_map)) for score, (sample, predicted)
                      in zip((3, 1, 2, 1, 1, 1, 2, 1, 3, 5), pairs, strict=True)])  # fmt: skip
    summary = baseline_summary(other, "nearest neighbours")
    assert set(summary) == {"name", "intervals", "per_kind", *COMPARED}
    assert summary["name"] == "nearest neighbours"
    assert {name: summary[name] for name in COMPARED} == {name: other.metrics[name] for name in COMPARED}
    assert summary["intervals"] == other.intervals
    assert summary["per_kind"] == other.per_kind
    both = with_baseline(result, other, "nearest neighbours")
    scores = [[row.anomaly_score for row in rows] for rows in (result.rows, other.rows)]
    difference = auroc_difference_interval(*scores, [row.is_defective for row in result.rows])
    assert both.baseline == {**summary, "difference": {"image_auroc": difference}}
    assert result.baseline is None
    both.save(tmp_path / "metrics.json")
    assert Evaluation.load(tmp_path / "metrics.json") == both
    # Only images that both have seen are compared; with one defective image left, nothing can be said.
    few = evaluate(pairs[:7])
    assert with_baseline(result, few, "b").baseline["difference"] == {}
    assert with_baseline(result, evaluate(pairs[:6]), "b").baseline["difference"] == {}
    assert with_baseline(result, evaluate(pairs[:8]), "b").baseline["difference"] == {"image_auroc": [0, 0]}


def test_each_kind_stands_against_all_good_images(pairs):
    result = evaluate(pairs)
    assert list(result.per_kind) == ["hole", "scratch"]
    scratch = result.per_kind["scratch"]
    assert (scratch["count"], scratch["miss_rate"]) == (2, 0.5)
    assert scratch["image_auroc"] == pytest.approx(11 / 12)  # 1.5 loses to the false alarm of 2.5, all else is won
    alone = evaluate([pair for pair in pairs if pair[0].kind in ("good", "scratch")])
    assert scratch["pixel_auroc"] == pytest.approx(alone.metrics["pixel_auroc"])
    assert scratch["aupro"] == pytest.approx(alone.metrics["aupro"])


def test_order_of_the_stream_does_not_matter(pairs):
    forth, back = evaluate(pairs, max_examples=4), evaluate(iter(pairs[::-1]), max_examples=4)
    assert forth.per_kind == back.per_kind
    assert [example.row for example in forth.examples] == [example.row for example in back.examples]


def test_json_round_trip(pairs, tmp_path):
    result = evaluate(pairs, false_alarms=0.05, settings={"path": Path("a"), "shape": (24, 32)})
    path = tmp_path / "new" / "metrics.json"
    result.save(path)
    assert Evaluation.load(path) == result
    assert [file.name for file in path.parent.iterdir()] == ["metrics.json"]
    content = json.loads(path.read_text())
    assert set(METRICS) < set(content)
    assert content["rows"][5]["path"] == "part/test/good/005.png"
    assert content["settings"] == {"path": "a", "shape": [24, 32]}


def test_what_cannot_be_computed_is_null_and_noted():
    result = evaluate([(Sample(Path(f"{i}.png"), "good"), prediction(i)) for i in range(3)])
    assert {name for name, value in result.metrics.items() if value is not None} == {
        "seconds_per_image",
        "peak_memory_mb",
    }
    notes = "\n".join(result.notes)
    assert "The image metrics are missing: expected good and defective test images, found 3 good and no" in notes
    assert "The pixel metrics are missing: expected anomalous and good pixels, found no anomalous and" in notes
    assert "false_alarm_rate is missing because the predictions carry no verdict." in notes
    assert "miss_rate is missing because there are no defective test images." in notes
    assert "mean_image_auroc is missing because no mean-image baseline was given." in notes
    assert all(note.endswith(".") and not note.endswith("..") for note in result.notes)


def test_defective_images_without_a_usable_mask_are_left_out_of_pixel_metrics(pairs, tmp_path):
    expected = evaluate(pairs).metrics["pixel_auroc"]
    Image.fromarray(np.zeros((48, 64), np.uint8)).save(tmp_path / "empty.png")
    unmasked = (Sample(Path("x.png"), "dent"), prediction(9, True))
    empty = (Sample(Path("y.png"), "dent", tmp_path / "empty.png"), prediction(9, True))
    result = evaluate([*pairs, unmasked, unmasked, empty])
    assert result.metrics["pixel_auroc"] == pytest.approx(expected)
    assert "2 defective images have no mask and are left out of the pixel metrics." in result.notes
    assert (
        "1 defective image has a mask that is empty at the model's resolution and is left out of the pixel metrics."
        in result.notes
    )
    assert result.per_kind["dent"]["pixel_auroc"] is None
    assert result.per_kind["dent"]["image_auroc"] == 1


def test_histogram_beyond_the_limit_is_noted(pairs):
    exact, streamed = evaluate(pairs), evaluate(pairs, exact_limit=2000)
    assert streamed.metrics["aupro"] == pytest.approx(exact.metrics["aupro"], abs=2e-3)
    assert any("from a histogram" in note and "2,000 pixels" in note for note in streamed.notes)


def test_seconds_count_the_stream_only(pairs):
    def slow():
        for pair in pairs:
            time.sleep(0.01)
            yield pair

    assert 0.01 <= evaluate(slow()).metrics["seconds_per_image"] < 0.1
    assert evaluate(slow(), seconds=5).metrics["seconds_per_image"] == 0.5


def test_examples_hold_the_extremes_and_every_kind():
    def stream():
        rng = np.random.default_rng(0)
        for index in range(300):
            kind = "good" if index % 3 else "hole" if index % 30 else "crack"
            yield Sample(Path(f"{kind}/{index:03}.png"), kind), prediction(float(rng.random()))

    result = evaluate(stream(), max_examples=20)
    shown = [example.row for example in result.examples]
    assert len(shown) == 20
    good, defective = ([row for row in result.rows if row.is_defective is label] for label in (False, True))
    assert set(sorted(good, key=lambda row: row.anomaly_score)[-5:]) < set(shown)
    assert set(sorted(defective, key=lambda row: row.anomaly_score)[:5]) < set(shown)
    assert all(sum(row.kind == kind for row in shown) >= 3 for kind in ("good", "hole", "crack"))
    assert len(evaluate(stream(), max_examples=1000).examples) == 300
    assert evaluate(stream(), max_examples=0).examples == ()


def test_example_pictures_are_small(mask_file):
    large = {"anomaly_map": np.ones((600, 300), np.float32)}
    large |= {name: np.zeros((600, 300, 3), np.uint8) for name in ("image", "reconstruction")}
    pair = (Sample(Path("x.png"), "hole", mask_file), prediction(**large))
    (example,) = evaluate([pair]).examples
    assert example.anomaly_map.shape == (256, 128)
    assert example.mask is not None
    assert example.mask.startswith(b"\x89PNG")
    assert max(len(example.image), len(example.reconstruction), len(example.mask)) < 10_000


def test_mistakes(pairs, tmp_path):
    with pytest.raises(DataError, match="expected test images to evaluate, found none; check the test folder"):
        evaluate([])
    with pytest.raises(
        DataError, match=r"expected a finite anomaly score, found nan for part/test/good/000.png; check"
    ):
        evaluate([(pairs[0][0], prediction(float("nan"), anomaly_map=np.zeros(SHAPE, np.float32)))])
    with pytest.raises(
        DataError, match=r"found no readable file .No such file or directory.; run `ddad evaluate` first"
    ):
        Evaluation.load(tmp_path / "missing.json")
    for content in ("{}", "[]", "not JSON", '{"format_version": 1}'):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(DataError, match=r"format version 2, found something else at .*; run `ddad evaluate` again"):
            Evaluation.load(tmp_path / "other.json")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"Expected a place to write .*metrics.json, found that it cannot be written"):
        evaluate(pairs).save(tmp_path / "file" / "metrics.json")


def test_a_failed_save_leaves_the_old_file(pairs, tmp_path):
    path = tmp_path / "metrics.json"
    result = evaluate(pairs)
    result.save(path)
    with pytest.raises(ValueError, match="JSON compliant"):
        replace(result, threshold=float("nan")).save(path)
    assert Evaluation.load(path) == result


def test_mean_image_baseline():
    black, white = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 255, np.uint8)
    baseline = MeanImageBaseline().fit(iter([black, white]))
    assert baseline.score(black) == baseline.score(white) == pytest.approx(0.25)
    with pytest.raises(DataError, match="expected good training images for the mean image, found none; check"):
        MeanImageBaseline().fit([])
    with pytest.raises(DataError, match=r"shape \(2, 2, 3\) of the first good one, found \(3, 2, 3\); resize"):
        baseline.score(np.zeros((3, 2, 3), np.uint8))
