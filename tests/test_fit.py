"""The whole of training, as a person runs it, with real kills. pytest tests/test_fit.py"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ddad.config import make_settings
from ddad.data.samples import content_hash
from ddad.detector import Detector, read_record
from ddad.errors import ConfigError, DataError
from ddad.fit import ImageCache, diverged, fit
from ddad.images import ImageRule, read_image
from ddad.refit import recalibrate, tune


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "good"
    folder.mkdir()
    for i in range(12):
        pixels = np.clip(120 + 15 * np.random.default_rng(i).standard_normal((40, 36, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    return folder


def tiny(**changes):
    training = {"batch_size": 2, "precision": "fp32", **changes.pop("training", {})}
    return make_settings("xs", image_size=32, false_alarms=0.5, training=training, **changes)


def train_command(photos: Path, out: Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "ddad.cli", "train", str(photos), "--out", str(out), "--image-size", "32",
        "--false-alarms", "50%", *more,
    ]  # fmt: skip


def weights(model: Path) -> dict:
    return load_file(model / "unet" / "diffusion_pytorch_model.safetensors")


def assert_same_model(a: Path, b: Path) -> None:
    one, two = weights(a), weights(b)
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert read_record(a)["calibration"] == read_record(b)["calibration"]


@pytest.mark.slow
def test_killed_again_and_again_gives_the_same_model_bit_for_bit(photos, tmp_path):
    """kill -9 at changing moments, some of them in the middle of a save, since here every step is saved."""
    steps = 6
    whole = fit(photos, tmp_path / "whole", tiny(), steps=steps)

    out, run = tmp_path / "killed", tmp_path / "killed.run"
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "from ddad import training\n"
        "from ddad.config import make_settings\n"
        "from ddad.fit import fit\n"
        "run = training.Trainer.run\n"
        "training.Trainer.run = lambda *a, **k: run(*a, **{**k, 'save_every_seconds': 0, 'evaluate_every': 99})\n"
        "settings = make_settings('xs', image_size=32, false_alarms=0.5,\n"
        "                         training={'batch_size': 2, 'precision': 'fp32'})\n"
        f"fit(sys.argv[1], sys.argv[2], settings, steps={steps})\n"
    )
    command = [sys.executable, str(script), str(photos), str(out)]
    kills = in_save = 0
    seen = 0
    while kills < 2:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        # Once a new checkpoint is there, wait for the next save to begin, and kill.
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            finished = sorted(run.glob("step-*"))
            newest = int(finished[-1].name.removeprefix("step-")) if finished else 0
            if newest > seen and any(run.glob(".unfinished-step*")):
                break
        else:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        in_save += any(run.glob(".unfinished-step*"))
        seen = newest
        kills += 1
    assert kills >= 2
    assert in_save >= 1
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert_same_model(whole, out)
    assert not run.exists()
    log = [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log] == list(range(1, steps + 1))


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(photos, tmp_path):
    out = tmp_path / "model"
    command = train_command(photos, out, "--steps", "500")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "model.run" / "run.json"
    while not log.exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "The same command goes on from there." in errors
    assert "Traceback" not in errors
    saved = list((tmp_path / "model.run").glob("step-*"))
    assert len(saved) == 1
    assert not out.exists()
    stopped_at = int(saved[0].name.removeprefix("step-"))
    assert 0 < stopped_at < 500
    again = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while f"Resuming after step {stopped_at} of 500." not in (line := again.stdout.readline()):
        assert line, "it never said that it resumes"
    again.kill()
    again.wait()


def test_scores_of_calibration_are_those_of_use(photos, tmp_path):
    """Training computes in bf16; what is calibrated is the network as it will be used."""
    out = fit(photos, tmp_path / "model", tiny(training={"precision": "bf16"}), steps=3)
    detector = Detector.from_pretrained(out, device="cpu")
    by_hash = {content_hash(path): path for path in photos.iterdir()}
    calibration = [by_hash[digest] for digest in detector.record["data"]["calibration"]]
    scores = sorted(result.anomaly_score for result in detector.predict(calibration))
    np.testing.assert_allclose(scores, detector.calibration.scores, rtol=1e-5)
    assert all(0 <= score < 100 for score in scores)


def test_few_images_give_units_and_rank_in_folds_and_nothing_is_chosen_by_them(tmp_path):
    (tmp_path / "good").mkdir()
    for i in range(96):
        pixels = np.clip(120 + 15 * np.random.default_rng(i).standard_normal((32, 32, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "good" / f"{i:02d}.png")
    model = fit(tmp_path / "good", tmp_path / "model", tiny().model_copy(update={"false_alarms": 0.01}), steps=1)
    detector = Detector.from_pretrained(model)
    data = detector.record["data"]
    assert len(detector.calibration.scores) == len(data["select"]) + len(data["calibration"]) >= 16
    assert detector.calibration.folds == 10
    assert detector.record["adaptation"]["said"] == (
        "The features are not adapted: that needs 32 good images to train on and 8 to choose by."
    )
    assert "for units and, in folds, to calibrate" in (model / "README.md").read_text()
    # Their scores are not those of images that took no part in the units: none can be added, nothing chosen.
    with pytest.raises(ConfigError, match="Expected a calibration on images of its own to add scores to, found one in"):
        recalibrate(model, tmp_path / "good", merge=True)
    with pytest.raises(DataError, match="Expected a model with good images set aside to choose by, found one calibrat"):
        tune(model, tmp_path / "good")


@pytest.mark.slow
def test_features_are_adapted_within_training(tmp_path, monkeypatch):
    monkeypatch.setattr("ddad.tuning.DEFECTS", 12)
    photos = tmp_path / "good"
    photos.mkdir()
    for i in range(90):
        pixels = np.clip(120 + 15 * np.random.default_rng(i).standard_normal((32, 32, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(photos / f"{i:02d}.png")
    said = []
    trackers = {"log_with": ["tensorboard"], "log_dir": tmp_path / "logs"}
    out = fit(photos, tmp_path / "model", tiny(adaptation={"epochs": 1}), steps=2, on_stage=said.append, **trackers)
    adaptation = read_record(out)["adaptation"]
    assert [entry["epoch"] for entry in adaptation["history"]] == [0, 1]
    events = EventAccumulator(str(tmp_path / "logs" / "model")).Reload()
    for name in ("loss", "synthetic_auroc"):
        expected = [(one["epoch"], pytest.approx(one[name])) for one in adaptation["history"] if one[name] is not None]
        assert [(event.step, event.value) for event in events.Scalars(f"adaptation.{name}")] == expected
    assert adaptation["said"] in said
    assert adaptation["said"] in (out / "README.md").read_text()
    # The detector in use is the one that was judged: calibration scores are those of its features.
    detector = Detector.from_pretrained(out, device="cpu")
    by_hash = {content_hash(path): path for path in photos.iterdir()}
    calibration = [by_hash[digest] for digest in detector.record["data"]["calibration"]]
    scores = sorted(result.anomaly_score for result in detector.predict(calibration))
    np.testing.assert_allclose(scores, detector.calibration.scores, rtol=1e-5)


def test_a_finished_run_is_not_repeated(photos, tmp_path):
    out = fit(photos, tmp_path / "model", tiny(), steps=2)
    before = (out / "detector.json").stat().st_mtime_ns
    said = []
    fit(photos, out, tiny(), steps=2, on_stage=said.append)
    assert said == [f"{out} is already trained with these settings on these images; nothing to do."]
    assert (out / "detector.json").stat().st_mtime_ns == before


def test_another_command_on_a_finished_model_is_refused(photos, tmp_path):
    out = fit(photos, tmp_path / "model", tiny(), steps=2)
    with pytest.raises(ConfigError, match=r"trained with other seed \(0 before, 1 now\); choose another --out"):
        fit(photos, out, tiny(seed=1), steps=2)
    with pytest.raises(ConfigError, match=r"steps \(2 before, 3 now\)"):
        fit(photos, out, tiny(), steps=3)
    more = tmp_path / "more"
    shutil.copytree(photos, more)
    Image.new("RGB", (36, 40)).save(more / "new.png")
    with pytest.raises(ConfigError, match="trained with other the good images"):
        fit(more, out, tiny(), steps=2)
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(ConfigError, match=r"Expected a new folder for the model, found .*, which is something else"):
        fit(photos, other, tiny(), steps=2)


def test_steps_follow_from_the_time_budget_and_the_budget_is_kept(photos, tmp_path):
    started = time.monotonic()
    estimates = []
    out = fit(photos, tmp_path / "model", tiny(), time_budget=12, on_estimate=estimates.append)
    assert time.monotonic() - started < 24  # a shared machine may slow down on the way
    record = read_record(out)
    assert record["training"]["steps"] == estimates[0].steps > 1
    assert estimates[0].memory_mb > 50
    assert estimates[0].train_seconds + estimates[0].calibrate_seconds < 12


def test_a_budget_too_small_is_refused(photos, tmp_path):
    with pytest.raises(ConfigError, match=r"Expected a time budget for at least 10 training steps, found 0 s, which"):
        fit(photos, tmp_path / "model", tiny(), time_budget=0.4)


def test_an_impossible_place_is_refused(photos, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"Expected a place for the model and its run, found that .* cannot be writ"):
        fit(photos, tmp_path / "file" / "model", tiny(), steps=2)


def test_what_a_killed_save_left_is_removed(photos, tmp_path):
    (tmp_path / ".unfinished-model-abcd_123").mkdir()
    (tmp_path / ".unfinished-model-2-abcd_123").mkdir()  # another model, perhaps being saved just now
    fit(photos, tmp_path / "model", tiny(), steps=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".unfinished-model-2-abcd_123", "model"]


def test_steps_or_time_but_not_both(photos, tmp_path):
    with pytest.raises(ConfigError, match="either a number of steps or a time budget, found both"):
        fit(photos, tmp_path / "model", tiny(), steps=3, time_budget=3)


def test_the_model_folder_says_what_it_is(photos, tmp_path):
    out = fit(photos, tmp_path / "model", tiny(), steps=2)
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "detector.json", "features", "scheduler", "statistics.safetensors", "training.jsonl", "unet",
    ]  # fmt: skip
    record = read_record(out)
    assert sum(len(record["data"][part]) for part in ("train", "select", "calibration")) == 12
    card = (out / "README.md").read_text()
    assert record["data"]["fingerprint"] in card
    assert "good calibration images: about" in card
    result = Detector.from_pretrained(out, device="cpu").predict(photos / "00.png")
    assert np.isfinite(result.anomaly_score)


def test_two_processes_do_not_share_a_run(photos, tmp_path):
    import fcntl

    run = tmp_path / "model.run"
    run.mkdir()
    with (run / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="found another process training in"):
            fit(photos, tmp_path / "model", tiny(), steps=2)


def test_an_unreadable_good_image_is_named(photos, tmp_path):
    folder = tmp_path / "good"
    shutil.copytree(photos, folder)
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n not really")
    with pytest.raises(DataError, match=r"broken\.png"):
        fit(folder, tmp_path / "model", tiny(), steps=2)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([0.08, 0.03, 0.02, 0.021], False), ([0.026, 0.012, 0.129, 0.128], True), ([0.1], False), ([], False)],
)
def test_a_diverged_run_is_noticed(losses, expected):
    assert diverged(losses) is expected


def test_images_beyond_the_memory_limit_are_read_again(photos):
    paths = sorted(photos.iterdir())
    shape = (32, 32)
    small = ImageCache(paths, shape, ImageRule(), memory=3 * 32 * 32 * 3, workers=2)
    assert len(small) == len(paths)
    for index, path in enumerate(paths):
        np.testing.assert_array_equal(small[index], read_image(path, shape))
