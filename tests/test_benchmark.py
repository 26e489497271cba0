"""Many categories and seeds, with a real kill, and the tables. pytest tests/test_benchmark.py"""

import csv
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from html.parser import HTMLParser

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from ddad import benchmark
from ddad.benchmark import BenchmarkReport, published_settings, run_benchmark
from ddad.comparison import METRICS, duration, paper_figures, write_tables
from ddad.config import PRESETS, make_settings
from ddad.data import mvtec_ad, visa
from ddad.data.demo import render_part
from ddad.errors import ConfigError, DataError, Interrupted
from ddad.evaluation import Evaluation
from ddad.fit import Estimate
from test_distributed import PRIVATE, needs_private_network

STEPS = 6
CHANGES = {
    "false_alarms": 0.5,
    "training": {"batch_size": 2, "precision": "fp32"},
    "adaptation": {"epochs": 0},
}
OPTIONS = {"image_size": 32, "steps": STEPS, "changes": CHANGES}
TIMES = ("seconds", "date")  # of a result, and:
MEASURED = ("seconds_per_image", "peak_memory_mb")  # of its metrics


def write_category(folder, train=10, good=3, defective=3):
    """Rendered parts of 32 pixels in MVTec layout."""
    for part, kind, count in (
        ("train/good", None, train),
        ("test/good", None, good),
        ("test/stain", "stain", defective),
    ):
        for index in range(count):
            image, mask = render_part(np.random.default_rng([len(part), index, train]), kind, size=32)
            path = folder / part / f"{index:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
            if kind:
                truth = folder / "ground_truth" / kind / f"{index:03d}_mask.png"
                truth.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(mask.astype(np.uint8) * 255).save(truth)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_category(root / "nut")
    write_category(root / "ring", train=11)
    return root


def skip_measuring(patch):
    """A fixed number of steps needs no measured speed, which takes seconds of each training."""
    patch.setattr("ddad.fit._median_seconds", lambda *arguments: 0.01, raising=False)


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    """Two categories, two seeds, trained for a moment and never interrupted."""
    out = tmp_path_factory.mktemp("whole")
    said = []
    with pytest.MonkeyPatch.context() as patch:
        skip_measuring(patch)
        report = run_benchmark(root, "folder", out, seeds=2, **OPTIONS, on_stage=said.append)
    assert report.failures == {}
    assert (report.trained, report.skipped) == (4, 0)
    order = [sentence for sentence in said if sentence.startswith("Training ")]
    assert order == [
        "Training 1 of 4: nut, seed 0.",
        "Training 2 of 4: ring, seed 0.",
        "Training 3 of 4: nut, seed 1.",
        "Training 4 of 4: ring, seed 1.",
    ]
    return out


def results(out):
    paths = sorted(out.glob("*/*/seed-*/result.json"))
    return {path.parent.relative_to(out).as_posix(): json.loads(path.read_text()) for path in paths}


def without_times(result):
    metrics = {name: value for name, value in result["metrics"].items() if name not in MEASURED}
    return {**{name: value for name, value in result.items() if name not in TIMES}, "metrics": metrics}


# Runs


def test_one_result_a_category_and_seed(root, whole):
    found = results(whole)
    assert list(found) == ["xs/nut/seed-0", "xs/nut/seed-1", "xs/ring/seed-0", "xs/ring/seed-1"]
    for place, result in found.items():
        evaluation = Evaluation.load(whole / place / "metrics.json")
        assert result["metrics"] == evaluation.metrics
        assert result["counts"] == {"good": 3, "defective": 3}
        assert result["settings"]["image_size"] == 32
        assert result["settings"]["seed"] == result["seed"] == int(place[-1])
        assert result["category"] == place.split("/")[1]
        assert result["steps"] == STEPS
        assert result["seconds"]["train"] > 0
        assert result["seconds"]["judge"] > 0
        assert (whole / place / "report.html").exists()
        assert (whole / place / "model" / "detector.json").exists()
    assert found["xs/nut/seed-0"]["data"] == found["xs/nut/seed-1"]["data"] != found["xs/ring/seed-0"]["data"]


def test_the_same_call_again_trains_nothing(root, whole):
    before = {path: path.stat().st_mtime_ns for path in whole.glob("*/*/seed-*/*.json")}
    table = (whole / "results.md").read_text()
    progress = []
    report = run_benchmark(root, "folder", whole, seeds=2, **OPTIONS, on_progress=progress.append)
    assert report == BenchmarkReport(table, {}, 0, 4)
    assert progress == []
    assert {path: path.stat().st_mtime_ns for path in whole.glob("*/*/seed-*/*.json")} == before


SCRIPT = """
import json, sys
import ddad.fit as fit
from ddad import training
from ddad.benchmark import run_benchmark
fit._median_seconds = lambda *arguments: 0.01
run = training.Trainer.run
training.Trainer.run = lambda *a, **k: run(*a, **{**k, "save_every_seconds": 0})
root, out, options = sys.argv[1:]
run_benchmark(root, "folder", out, seeds=1, **json.loads(options))
"""


@pytest.mark.slow
def test_killed_twice_it_goes_on_and_gives_the_same_results(root, whole, tmp_path):
    """kill -9 in the middle of the first training and of the second; one seed is enough."""
    script, out = tmp_path / "run.py", tmp_path / "out"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(root), str(out), json.dumps(OPTIONS)]
    for category in ("nut", "ring"):
        run = out / "xs" / category / "seed-0" / "model.run"
        process = subprocess.Popen(command)
        deadline = time.monotonic() + 200
        while process.poll() is None and time.monotonic() < deadline and not any(run.glob("step-*")):
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL  # it had not ended by itself
        assert list(results(out)) == (["xs/nut/seed-0"] if category == "ring" else [])
    subprocess.run(command, check=True)
    for place, result in results(out).items():
        assert without_times(result) == without_times(results(whole)[place]), place
    assert len(results(out)) == 2
    assert not list(out.glob("*/*/*/*.run"))


ON_RAY = """
import json, sys
from ddad.benchmark import run_benchmark
root, out, options = sys.argv[1:]
report = run_benchmark(
    root, "folder", out, seeds=1, **json.loads(options), engine="ray", device="cpu", workers=1, on_stage=print
)
print(report.trained, report.skipped, json.dumps(report.failures))
"""


@needs_private_network
@pytest.mark.slow
def test_a_cluster_gives_the_same_results_though_a_process_is_killed(root, whole, tmp_path):
    """In a network of its own, since Ray listens on all addresses of a machine."""
    pytest.importorskip("ray")
    data, out, script = tmp_path / "data", tmp_path / "out", tmp_path / "run.py"
    shutil.copytree(root, data)
    write_category(data / "broken", train=5)
    broken = data / "broken/train/good/003.png"
    broken.write_bytes(broken.read_bytes()[:100])
    script.write_text(ON_RAY)
    command = [*PRIVATE, sys.executable, str(script), "data", "out", json.dumps(OPTIONS)]
    log = tmp_path / "said"
    # A short path, for sockets; and not the usual folder, where Ray notes which cluster is running.
    with log.open("w") as said, tempfile.TemporaryDirectory(prefix="ray-") as ray_folder:
        threads = str(torch.get_num_threads())
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "RAY_TMPDIR": ray_folder}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=said, stderr=said)
        killed = []
        lock = out / "xs/ring/seed-0/model.run/lock"
        while process.poll() is None and not killed:
            time.sleep(0.05)
            if lock.with_name("run.json").exists():
                for one in psutil.Process(process.pid).children(recursive=True):
                    if str(lock) in (file.path for file in one.open_files()):
                        one.kill()
                        killed.append(one.pid)
        process.wait(timeout=300)
    assert killed, log.read_text()
    assert process.returncode == 0, log.read_text()
    assert '2 0 {"broken, seed 0": ' in log.read_text()
    found = results(out)
    assert list(found) == ["xs/broken/seed-0", "xs/nut/seed-0", "xs/ring/seed-0"]
    assert found.pop("xs/broken/seed-0")["error"].startswith(f"{broken.parents[2]}")
    for place, result in found.items():
        assert without_times(result) == without_times(results(whole)[place]), place
    assert "| mean of 2 (1 failed) |" in (out / "results.md").read_text()
    # What is done is not done again, whoever did it, and no cluster is started for nothing.
    report = run_benchmark(root, "folder", out, seeds=1, **OPTIONS, engine="ray")
    assert (report.trained, report.skipped) == (0, 2)


def test_a_broken_category_is_noted_and_the_others_go_on(root, whole, tmp_path, monkeypatch):
    skip_measuring(monkeypatch)
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(root, data)
    shutil.copytree(whole, out)
    write_category(data / "broken", train=5)
    broken = data / "broken/train/good/003.png"
    content = broken.read_bytes()
    broken.write_bytes(content[:100])
    report = run_benchmark(data, "folder", out, seeds=2, **OPTIONS)
    assert (report.trained, report.skipped) == (0, 4)
    assert list(report.failures) == ["broken, seed 0", "broken, seed 1"]
    sentence = report.failures["broken, seed 0"]
    assert sentence.startswith(f"{broken}: expected a whole PNG, JPEG")
    row = next(line for line in report.table.splitlines() if line.startswith("| broken"))
    assert row == f"| broken | – | – | – | – | – | – | 0; seed 0 and 1 failed: {sentence} |"
    assert "| mean of 2 (1 failed) |" in report.table
    assert results(out)["xs/broken/seed-1"]["error"] == sentence

    broken.write_bytes(content)  # mended: only what failed is trained
    report = run_benchmark(data, "folder", out, seeds=1, **OPTIONS)
    assert (report.trained, report.skipped, report.failures) == (1, 2, {})
    assert "error" not in results(out)["xs/broken/seed-0"]


def test_a_bug_in_one_training_keeps_its_traceback_and_the_others_go_on(root, tmp_path, monkeypatch):
    def buggy(*arguments, **options):
        raise ZeroDivisionError("a bug\nsecond line")

    monkeypatch.setattr(benchmark, "fit", buggy)
    report = run_benchmark(root, "folder", tmp_path, seeds=1, **OPTIONS)
    trace = tmp_path / "xs/ring/seed-0/traceback.txt"
    assert report.failures["ring, seed 0"] == f"ZeroDivisionError: a bug (see {trace})"
    assert "in buggy" in trace.read_text()
    assert "nut, seed 0" in report.failures


def test_ctrl_c_is_passed_on_and_nothing_is_written_for_it(root, tmp_path, monkeypatch):
    def stopped(*arguments, **options):
        raise Interrupted("step 3 of 9")

    monkeypatch.setattr(benchmark, "fit", stopped)
    with pytest.raises(Interrupted, match="step 3 of 9"):
        run_benchmark(root, "folder", tmp_path, seeds=1, **OPTIONS)
    assert results(tmp_path) == {}


def test_another_command_on_the_same_folder_is_refused(root, whole):
    with pytest.raises(
        ConfigError, match=r"found changes in budget.steps \(6 before, 7 now\); repeat the first command"
    ):
        run_benchmark(root, "folder", whole, seeds=2, **{**OPTIONS, "steps": 7})
    with pytest.raises(ConfigError, match=r"found changes in settings.image_size \(32 before, 64 now\)"):
        run_benchmark(root, "folder", whole, seeds=2, **{**OPTIONS, "image_size": 64})


def test_other_images_are_no_longer_done(root, whole, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(root, data)
    shutil.copytree(whole, out)
    mask = data / "nut/ground_truth/stain/000_mask.png"
    Image.fromarray(np.full((32, 32), 255, np.uint8)).save(mask)
    report = run_benchmark(data, "folder", out, seeds=1, **OPTIONS)
    assert (report.trained, report.skipped, report.failures) == (1, 1, {})  # the model stays, as it saw no mask
    before, after = (results(place)["xs/nut/seed-0"] for place in (whole, out))
    assert before["metrics"]["image_auroc"] == after["metrics"]["image_auroc"]
    assert before["metrics"]["pixel_auroc"] != after["metrics"]["pixel_auroc"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dataset": "mvtec"}, "Expected a data set among mvtec-ad, visa, mtd, folder, found 'mvtec'."),
        ({"categories": ["nut", "bolt"]}, "Expected categories among nut, ring in"),
        ({"seeds": 0}, "Expected at least 1 seed, found 0."),
        ({"engine": "spark"}, "Expected an engine among local, ray, found 'spark'."),
        ({"steps": 3, "time_budget": 3}, "Expected either a number of steps or a time budget, found both; leave one"),
        ({"published": True}, "Expected preset paper or paper-s for the published settings, found xs; choose one"),
        ({"published": True, "preset": "paper"}, "of mvtec-ad, visa, for which published settings exist, found nut of"),
        ({"preset": "huge"}, "Expected a preset among xs, s, base, paper, paper-s, found 'huge'."),
        ({"image_size": 100}, "Setting image_size: Input should be a multiple of 32"),
    ],
)
def test_wrong_options_are_refused_at_once(options, words, root, tmp_path):
    options = {"dataset": "folder", **options}
    with pytest.raises(ConfigError, match=re.escape(words)):
        run_benchmark(root, options.pop("dataset"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_layout_of_all_categories_is_checked_before_any_training(root, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(root, data)
    shutil.rmtree(data / "ring/test/good")
    words = (
        f"{data / 'ring'}: expected good images to train on, and both good and defective ones to test on, but found 11"
    )
    with pytest.raises(DataError, match=re.escape(f"{words}, 0 and 3; complete ring, or leave it out.")):
        run_benchmark(data, "folder", tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


# How long it takes


def test_a_dry_run_measures_and_writes_nothing(root, tmp_path):
    said = []
    report = run_benchmark(root, "folder", tmp_path / "out", seeds=1, **OPTIONS, dry_run=True, on_stage=said.append)
    assert 0 < report.seconds_left < 120
    assert said[0] == "Own data: 2 trainings, 0 of them done before."
    assert re.match(r"2 trainings would take about \d+ s on this machine: \d+ s to train, \d+ s to inspect", said[-1])
    assert not (tmp_path / "out").exists()


def test_a_dry_run_leaves_out_what_is_done(root, whole):
    report = run_benchmark(root, "folder", whole, seeds=2, **OPTIONS, dry_run=True)
    assert report == BenchmarkReport("", {}, 0, 4, seconds_left=0.0)


ESTIMATE = Estimate(
    steps=100,
    adaptation_epochs=2,
    images_per_second=10.0,
    train_seconds=1000.0,
    adapt_seconds=50.0,
    calibrate_seconds=8.0,
    memory_mb=100.0,
    parameters=1,
    precision="fp32",
    shape=(32, 32),
    train_images=8,
    select_images=3,
    calibration_images=5,
)  # 1 s to inspect an image


def test_the_estimate_adds_up(root, tmp_path, monkeypatch):
    def measured(*arguments, on_estimate, **options):
        on_estimate(ESTIMATE)

    monkeypatch.setattr(benchmark, "fit", measured)
    arguments = (root, "folder", tmp_path)
    seconds = run_benchmark(*arguments, time_budget=600, seeds=2, dry_run=True).seconds_left
    assert seconds == pytest.approx(4 * (600 + 6))
    seconds = run_benchmark(*arguments, steps=100, seeds=2, dry_run=True).seconds_left
    assert seconds == pytest.approx(4 * (1000 + 6) + 2 * 58 * (1 + 11 / 10), abs=2)  # ring has 11 images, nut 10


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (90, "90 s"), (1800, "30 min"), (3600, "60 min"), (9000, "2.5 h"), (260000, "3 days")],
)
def test_durations_for_people(seconds, text):
    assert duration(seconds) == text


# The authors' settings and figures


def test_published_settings():
    for dataset, categories in (("mvtec-ad", mvtec_ad.CATEGORIES), ("visa", visa.CATEGORIES)):
        every = [published_settings(dataset, category) for category in categories]
        assert all(one.apply(make_settings("paper")) != make_settings("paper") for one in every)
    screw = published_settings("mvtec-ad", "screw")
    assert (screw.conditioning_weight, screw.pixel_weight, screw.unet_epochs, screw.extractor_epochs) == (2, 1, 2000, 4)
    assert (screw.distillation_weight, screw.adaptation_batch_size, screw.test_batch_size) == (0.1, 16, 16)
    assert [screw.steps(count, 32) for count in (320, 351, 20)] == [20000, 20000, 2000]
    pcb1, cashew = published_settings("visa", "pcb1"), published_settings("visa", "cashew")
    assert (pcb1.conditioning_weight, pcb1.pixel_weight, pcb1.unet_epochs, pcb1.extractor_epochs) == (9, 7, 500, 8)
    assert (pcb1.distillation_weight, pcb1.adaptation_batch_size, pcb1.test_batch_size) == (0.01, 16, 32)
    assert (cashew.pixel_weight, cashew.adaptation_batch_size, cashew.unet_epochs) == (1, 32, 1750)
    settings = pcb1.apply(make_settings("paper", seed=5))
    assert (settings.sampling.conditioning_weight, settings.scoring.pixel_weight) == (9, 7)
    assert (settings.adaptation.epochs, settings.adaptation.distillation_weight) == (8, 0.01)
    assert (settings.adaptation.batch_size, settings.training.batch_size, settings.seed) == (16, 32, 5)


@pytest.mark.parametrize(("dataset", "categories"), [("mvtec-ad", mvtec_ad.CATEGORIES), ("visa", visa.CATEGORIES)])
def test_the_papers_means_are_those_of_its_categories(dataset, categories):
    figures = paper_figures(dataset)
    mean = figures.pop("mean")
    assert tuple(figures) == categories
    for metric in METRICS:
        assert statistics.fmean(row[metric] for row in figures.values()) == pytest.approx(mean[metric], abs=0.051)


def test_published_rows_are_labelled_and_trained_as_published(tmp_path, monkeypatch):
    for category in ("screw", "wood"):
        write_category(tmp_path / "data" / category, train=20)
    trained = {}

    def noted(data, out, settings, *, steps, time_budget, **options):
        trained[data.category] = (settings.sampling.conditioning_weight, steps, time_budget)
        raise DataError("no more")

    monkeypatch.setattr(benchmark, "fit", noted)
    options = {"preset": "paper-s", "published": True, "seeds": 1}
    report = run_benchmark(tmp_path / "data", "mvtec-ad", tmp_path / "a", **options)
    assert trained == {"screw": (2.0, 2000, None), "wood": (11.0, 2000, None)}  # 20 images: one whole batch of 16
    assert "## MVTec AD, preset paper-s, the authors' settings for each category" in report.table
    assert (
        "These rows use the authors' w, v and adaptation settings and numbers of epochs. Source: arXiv" in report.table
    )
    assert set(results(tmp_path / "a")) == {"paper-s-published/screw/seed-0", "paper-s-published/wood/seed-0"}
    report = run_benchmark(tmp_path / "data", "mvtec-ad", tmp_path / "b", **options, steps=7)
    assert trained["wood"] == (11.0, 7, None)
    assert "adaptation settings, but not their number of epochs (7 training steps)." in report.table


# Tables


def write_results(out, variant, dataset, metrics, *, published=False, features=None):
    """Result files as a run leaves them; `metrics` is {category: {seed: image AUROC, or an error}}."""
    scoring = {"features": features} if features else {}
    settings = make_settings(variant.removesuffix("-published"), scoring=scoring).model_dump(mode="json")
    asked = {
        "dataset": dataset,
        "published": published,
        "budget": {"steps": None, "seconds": 1800.0},
        "settings": settings,
    }
    (out / variant).mkdir(parents=True)
    (out / variant / "benchmark.json").write_text(json.dumps(asked))
    for category, seeds in metrics.items():
        for seed, value in seeds.items():
            result = {"category": category, "seed": seed}
            if isinstance(value, str):
                result["error"] = value
            else:
                result |= {
                    "metrics": {"image_auroc": value, "pixel_auroc": value - 0.1, "aupro": None},
                    "counts": {"good": 4, "defective": 5},
                    "test_images": 9 + (category == "wood"),
                    "machine": {"system": "Linux", "cpus": "2"},
                    "versions": {"ddad": "1", "torch": "2"},
                    "date": f"2030-01-0{seed + 1}T00:00:00+00:00",
                }
            folder = out / variant / category / f"seed-{seed}"
            folder.mkdir(parents=True)
            (folder / "result.json").write_text(json.dumps(result))


class Links(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.found += [value for name, value in attributes if name in ("href", "src")]


def test_our_columns_and_the_papers_side_by_side(tmp_path):
    every = {category: {0: 0.90, 1: 0.80} for category in mvtec_ad.CATEGORIES}
    write_results(tmp_path, "xs", "mvtec-ad", {**every, "grid": {0: 0.60, 1: "No <b>luck</b> | here."}})
    write_results(tmp_path, "paper-published", "mvtec-ad", {"wood": {0: 0.99}, "tile": {0: 0.97}}, published=True)
    write_results(tmp_path, "paper", "mvtec-ad", {"tile": {0: "It failed."}})
    table = write_tables(tmp_path)
    assert table == (tmp_path / "results.md").read_text()
    lines = table.splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "## MVTec AD, preset xs, one setting for all categories",  # the headline
        "## MVTec AD, preset paper, one setting for all categories",
        "## MVTec AD, preset paper, the authors' settings for each category",
    ]
    columns = [f"{name}{part}" for name in ("image AUROC", "pixel AUROC", "AUPRO") for part in ("", ", paper")]
    assert lines[2] == "| category | " + " | ".join(columns) + " | seeds |"
    names = [line.split(" | ")[0].removeprefix("| ") for line in lines[4:20]]
    assert names == [*mvtec_ad.CATEGORIES, "mean of 15"]
    assert lines[4] == "| carpet | 85.0 ± 7.1 | 99.3 | 75.0 ± 7.1 | 98.7 | – | 93.9 | 2 |"
    assert lines[5] == "| grid | 60.0 | 100.0 | 50.0 | 99.4 | – | 97.3 | 1; seed 1 failed: No <b>luck</b> \\| here. |"
    assert lines[19] == "| mean of 15 | 83.3 | 99.8 | 73.3 | 98.1 | – | 92.3 |  |"  # one seed is complete: no spread
    assert "| mean of 2 | 98.0 | 100.0 | 88.0 | 96.6 | – | 88.0 |  |" in lines  # the paper's, over the same two
    assert "| mean of 0 (1 failed) | – | – | – | – | – | – |  |" in lines
    assert "- Features: efficientnet-lite2 here, wide_resnet101_2 in the paper." in lines
    assert table.count("Features: ") == 1
    assert table.count("no test label takes part in any choice") == 2  # who knows how the authors chose theirs
    assert "- Image size 256, 30 min for each training." in lines
    assert "- wood, seed 1: 1 of 10 test images could not be read and are left out." in lines
    assert "- Measured with ddad 1, torch 2 on system Linux, cpus 2; 2030-01-01 to 2030-01-02." in lines


def test_the_spread_of_the_mean_is_over_seeds(tmp_path):
    write_results(tmp_path, "xs", "folder", {"a": {0: 0.9, 1: 0.7}, "b": {0: 0.5, 1: 0.7}, "c": {0: 0.7, 1: 0.4}})
    assert "| mean of 3 | 65.0 ± 7.1 | – | 55.0 ± 7.1 | – | – | – |  |" in write_tables(tmp_path)


def test_the_csv_is_in_fractions(tmp_path):
    write_results(tmp_path, "xs", "mtd", {"tile": {0: 0.9, 1: 0.8}}, features="resnet18.a1_in1k")
    write_tables(tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["category"] for row in rows] == ["tile", "mean of 1"]
    assert rows[0] == {
        "variant": "xs", "category": "tile", "image_auroc": "0.8500", "image_auroc_spread": "0.0707",
        "image_auroc_paper": "0.9830", "pixel_auroc": "0.7500", "pixel_auroc_spread": "0.0707", "pixel_auroc_paper": "",
        "aupro": "", "aupro_spread": "", "aupro_paper": "", "seeds": "2",
    }  # fmt: skip


def test_the_page_stands_alone_and_escapes(tmp_path):
    write_results(tmp_path, "xs", "folder", {"a&b": {0: 0.9, 1: "No <b>luck</b>."}})
    write_tables(tmp_path)
    page = (tmp_path / "results.html").read_text()
    assert "<b>" not in page
    assert "90.0" in page
    assert "seed 1 failed: No &lt;b&gt;luck" in page
    assert Links(page).found == ["data:,", "xs/a%26b/seed-0/report.html"]
    assert not re.search(r"https?://|@import|url\(|<script", page)


def test_real_tables_after_a_run(whole):
    table = (whole / "results.md").read_text()
    found = results(whole)
    for category in ("nut", "ring"):
        values = [100 * found[f"xs/{category}/seed-{seed}"]["metrics"]["image_auroc"] for seed in (0, 1)]
        expected = f"| {category} | {statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f} | – | "
        assert expected in table
    links = Links((whole / "results.html").read_text()).found[1:]
    assert links == ["xs/nut/seed-0/report.html", "xs/ring/seed-0/report.html"]
    assert all((whole / link).exists() for link in links)


def test_the_preset_that_is_compared_with_exists():
    assert set(benchmark.PAPER_PRESETS) <= PRESETS.keys()
