"""Run alone: pytest tests/test_report.py (seconds)."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from ddad.evaluation import COMPARED, METRICS, Evaluation, Example, Row
from ddad.images import encode_jpeg, encode_png
from ddad.report import METRIC_NAMES, write_report

GREY = encode_jpeg(np.full((8, 12, 3), 128, np.uint8), 85)
MAP = np.zeros((8, 12), np.float32)


def example(path, score, verdict, mask=None):
    kind = Path(path).parts[-2]
    row = Row(path, kind, kind != "good", score, 0.25, verdict, 0)
    return Example(row, GREY, GREY, mask, MAP)


EXAMPLES = (
    example("tile/test/good/000.png", 0.5, False),
    example("tile/test/good/001.png", 1.7, True),
    example("tile/test/<b>crack&/000.png", 0.9, False, encode_png(np.zeros((8, 12), np.uint8))),
    example("tile/test/<b>crack&/001.png", 7.0, True),
)
EVALUATION = Evaluation(
    metrics={**dict.fromkeys(METRICS, 0.75), "false_alarm_rate": 0.5, "miss_rate": 0.5, "mean_image_auroc": 0.6},
    intervals={"image_auroc": [0.7, 0.8], "miss_rate": [0.0126, 0.9874]},
    counts={"good": 2, "defective": 2},
    per_kind={
        "<b>crack&": {"count": 2, "pixel_auroc": None, "aupro": None}
        | dict.fromkeys(("image_auroc", "image_ap", "miss_rate"), 0.5)
    },
    threshold=1.5,
    false_alarms=0.01,
    calibration_images=99,
    rows=tuple(shown.row for shown in EXAMPLES),
    notes=("Something is <missing>.",),
    settings={"preset": "s"},
    versions={"torch": "2.11"},
    machine={"cpus": "2"},
    date="2030-01-02T03:04:05+00:00",
    examples=EXAMPLES,
)
BASELINE = {
    **dict.fromkeys(COMPARED),
    "name": "k-next <neighbours>",
    "image_auroc": 0.625,
    "miss_rate": 0.25,
    "intervals": {"image_auroc": [0.55, 0.7]},
    "per_kind": {"<b>crack&": {"count": 2, "image_auroc": 0.375}},
    "difference": {"image_auroc": [0.05, 0.2]},
}


class Page(HTMLParser):
    """Collects tags with their attributes, text, and unbalanced tags."""

    VOID = frozenset({"meta", "link", "img"})

    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(html)
        self.close()
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words.append(data)


@pytest.fixture
def page(tmp_path):
    def write(evaluation=EVALUATION, **options):
        write_report(evaluation, tmp_path / "report.html", **{"title": "Tile & co", "limit": 1.0, **options})
        html = (tmp_path / "report.html").read_text(encoding="utf-8")
        parsed = Page(html)
        assert parsed.open == []
        return parsed, html

    return write


def test_nothing_is_fetched_from_elsewhere(page):
    parsed, html = page()
    for tag, attributes in parsed.tags:
        for name in {"src", "href", "srcset", "action", "poster", "data"} & attributes.keys():
            assert attributes[name].startswith("data:"), (tag, name)
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", html)


def test_what_stands_at_the_top(page):
    parsed, _ = page()
    assert "Tile & co" in parsed.text
    assert "2 good and 2 defective test images. A defective image scores above a good one in 75 % of all pairs." in (
        parsed.text
    )
    assert "1 of 2 defective images were missed (50 %)." in parsed.text
    assert (
        "1 of 2 good images raised a false alarm (50 %); 1 % was promised by 99 calibration images, and this is within "
        "what chance allows (so many or more: 2 %)."
    ) in parsed.text
    assert "AUPRO of 0.750" in parsed.text
    assert "2030-01-02 03:04 UTC" in parsed.text
    assert "mean good image does no worse" not in parsed.text


def test_a_broken_promise_is_said(page):
    metrics = {**EVALUATION.metrics, "false_alarm_rate": 0.1}
    parsed, _ = page(replace(EVALUATION, metrics=metrics, counts={"good": 500, "defective": 2}))
    assert "1 % was promised by 99 calibration images, and this is above what chance allows (so m" in parsed.text


def test_a_baseline_that_is_as_good_is_said(page):
    parsed, _ = page(replace(EVALUATION, metrics={**EVALUATION.metrics, "mean_image_auroc": 0.75}))
    assert "The plain distance to the mean good image does no worse (75 %)" in parsed.text


def test_every_metric_is_explained(page):
    assert tuple(METRIC_NAMES) == METRICS
    parsed, _ = page()
    for name, meaning in METRIC_NAMES.values():
        assert name in parsed.text
        assert meaning in parsed.text
    assert "Image F1, oracle" in parsed.text


def test_intervals_stand_beside_the_metrics(page):
    parsed, _ = page()
    assert "Image AUROC 0.750 (0.700 to 0.800)" in parsed.text
    assert "Miss rate 50 % (1.3 to 98.7 %)" in parsed.text
    assert "In brackets: 95 % intervals from 2,000 resamples of the test images" in parsed.text
    assert "k-next" not in parsed.text
    parsed, _ = page(replace(EVALUATION, intervals={}))
    assert "Image AUROC 0.750 chance" in parsed.text
    assert "In brackets" not in parsed.text


def test_a_baseline_stands_beside_the_method(page):
    parsed, html = page(replace(EVALUATION, baseline=BASELINE))
    assert "Metric DDAD K-next <neighbours> Meaning" in parsed.text
    assert "Image AUROC 0.750 (0.700 to 0.800) 0.625 (0.550 to 0.700)" in parsed.text
    assert "Miss rate 50 % (1.3 to 98.7 %) 25 % " in parsed.text
    assert "Mean-image AUROC 0.600 –" in parsed.text
    assert "<b>crack& 2 0.500 0.375 0.500 – 50 % – – – – –" in parsed.text
    assert "<neighbours>" not in html


@pytest.mark.parametrize(
    ("difference", "sentence"),
    [
        ([0.05, 0.2], "DDAD is better than k-next <neighbours> beyond chance: 0.750 against 0.625 in image AUROC, a "
                      "difference of +0.050 to +0.200."),
        ([-0.2, -0.05], "DDAD is worse than k-next <neighbours> beyond chance: 0.750 against 0.625 in image AUROC, a "
                        "difference of −0.200 to −0.050."),
        ([-0.05, 0.2], "DDAD cannot be told from k-next <neighbours> on these images: 0.750 against 0.625"),
        ([0, 0], "DDAD cannot be told from k-next <neighbours> on these images"),
        (None, "Beside k-next <neighbours> DDAD reaches 0.750 against 0.625 in image AUROC; there are too few images"),
    ],
)  # fmt: skip
def test_the_headline_says_whether_the_baseline_is_beaten(page, difference, sentence):
    found = {} if difference is None else {"image_auroc": difference}
    parsed, _ = page(replace(EVALUATION, baseline={**BASELINE, "difference": found}))
    assert sentence in parsed.text


def test_names_from_folders_are_escaped(page):
    parsed, html = page()
    assert "<b>" not in html
    assert "<b>crack&" in parsed.text
    assert "Something is <missing>." in parsed.text


def test_pictures(page):
    parsed, _ = page()
    pictures = [attributes for tag, attributes in parsed.tags if tag == "img"]
    assert len(pictures) == 2 * (4 * 3 + 1)  # each image among the extremes and among the examples; one has a mask
    assert all(
        picture["loading"] == "lazy" and (picture["width"], picture["height"]) == ("12", "8") for picture in pictures
    )
    assert "Reconstruction of good/000.png" in {picture["alt"] for picture in pictures}
    assert "Mask of <b>crack&/000.png" in {picture["alt"] for picture in pictures}
    for word in ("found", "missed", "false alarm", "passed"):
        assert f" {word} " in parsed.text


def test_histogram_counts_every_image(page):
    _, html = page()
    counts = re.findall(r"<title>(\d+) (good|defective)</title>", html)
    assert sum(int(n) for n, name in counts if name == "good") == 2
    assert sum(int(n) for n, name in counts if name == "defective") == 2
    assert html.count("stroke-dasharray") == 1
    places = [float(place) for place in re.findall(r'<rect x="([\d.-]+)"', html)]
    assert all(10 <= place < 990 for place in places)


@pytest.mark.parametrize("scores", [(1.0, 1.0), (0.0, 0.0), (-1.0, 3.0), (0.001, 1000.0)])
def test_any_scores_can_be_drawn(page, scores):
    rows = tuple(replace(row, anomaly_score=score) for row, score in zip(EVALUATION.rows[1:3], scores, strict=True))
    for threshold in (None, 0.0, 1.0):
        page(replace(EVALUATION, rows=rows, threshold=threshold), limit=None)


def test_what_is_missing_is_a_dash(page):
    empty = replace(
        EVALUATION,
        metrics=dict.fromkeys(METRICS),
        intervals={},
        counts={"good": 2, "defective": 0},
        per_kind={},
        threshold=None,
        false_alarms=None,
        rows=tuple(replace(row, p_value=None, is_anomalous=None) for row in EVALUATION.rows[:2]),
        examples=tuple(
            replace(shown, row=replace(shown.row, p_value=None, is_anomalous=None)) for shown in EXAMPLES[:2]
        ),
        settings={},
    )
    parsed, _ = page(empty, limit=None)
    assert "Image AUROC –" in parsed.text
    assert "no verdict" in parsed.text
    assert "Kinds of defect" not in parsed.text
    assert "None" not in parsed.text


def test_a_loaded_evaluation_has_numbers_and_says_why_no_pictures(page, tmp_path):
    EVALUATION.save(tmp_path / "metrics.json")
    parsed, html = page(Evaluation.load(tmp_path / "metrics.json"))
    assert "made from saved numbers, without pictures" in parsed.text
    assert "<img" not in html


def test_same_evaluation_same_page(page):
    assert page()[1] == page()[1]
