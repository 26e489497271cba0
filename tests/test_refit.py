"""Calibrating and adapting finished models. pytest tests/test_refit.py"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.torch import load_file

from ddad.data.samples import content_hash
from ddad.detector import Detector, read_record
from ddad.errors import ConfigError, DataError, ModelError
from ddad.fit import locked
from ddad.refit import FEWEST, adapt, recalibrate, tune
from tiny import train_model, write_photos


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("data") / "good", range(110))


@pytest.fixture(scope="module")
def model(photos, tmp_path_factory):
    return train_model(photos, tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def few_defects(monkeypatch):
    monkeypatch.setattr("ddad.tuning.DEFECTS", 12)


def test_recalibrated_on_new_images(model, tmp_path):
    new = write_photos(tmp_path / "new", range(500, 530), level=140)
    detector = recalibrate(model, new, tmp_path / "again", false_alarms=0.2)
    loaded = Detector.from_pretrained(tmp_path / "again")
    assert loaded.calibration == detector.calibration != Detector.from_pretrained(model).calibration
    assert loaded.settings.false_alarms == 0.2
    record, before = read_record(tmp_path / "again"), read_record(model)
    assert record["data"]["train"] == before["data"]["train"]
    assert len(record["data"]["select"]) + len(record["data"]["calibration"]) == 30
    scores = sorted(result.anomaly_score for result in loaded.predict(_paths(new, record["data"]["calibration"])))
    np.testing.assert_allclose(scores, loaded.calibration.scores, rtol=1e-5)
    assert (tmp_path / "again" / "training.jsonl").is_file()


def _paths(folder, hashes):
    return [path for path in folder.iterdir() if content_hash(path) in set(hashes)]


def test_images_it_was_trained_on_are_left_out_and_the_others_keep_their_part(model, photos, tmp_path):
    recalibrate(model, photos, tmp_path / "again")
    before, after = read_record(model), read_record(tmp_path / "again")
    for part in ("train", "select", "calibration"):
        assert sorted(after["data"][part]) == sorted(before["data"][part])
    np.testing.assert_allclose(after["calibration"]["scores"], before["calibration"]["scores"], rtol=1e-5)


def test_what_a_choice_was_made_on_never_ranks(model, photos, tmp_path):
    """Select images of a first calibration come back after a second one, on other images."""
    write_photos(tmp_path / "new", range(500, 530))
    recalibrate(model, tmp_path / "new", tmp_path / "second")
    recalibrate(tmp_path / "second", photos, tmp_path / "third")
    assert not set(read_record(model)["data"]["select"]) & set(read_record(tmp_path / "third")["data"]["calibration"])


def test_only_images_that_ranked_before(model, photos, tmp_path):
    folder = tmp_path / "ranked"
    folder.mkdir()
    for path in _paths(photos, read_record(model)["data"]["calibration"][:6]):
        (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(
        DataError, match=r"Expected at least 2 good images in .* to give units and 1 to rank, found 0 a"
    ):
        recalibrate(model, folder)


def test_merged_images_add_their_scores(model, tmp_path):
    new = write_photos(tmp_path / "new", range(600, 606))
    before = Detector.from_pretrained(model)
    after = recalibrate(model, new, tmp_path / "merged", merge=True)
    loaded = Detector.from_pretrained(tmp_path / "merged")
    assert loaded.calibration == after.calibration
    assert loaded.calibration.scales == before.calibration.scales
    added = [result.anomaly_score for result in before.predict(sorted(new.iterdir()))]
    np.testing.assert_allclose(loaded.calibration.scores, sorted([*before.calibration.scores, *added]), rtol=1e-5)
    assert len(loaded.record["data"]["calibration"]) == len(loaded.calibration.scores)
    with pytest.raises(DataError, match=r"Expected good images in .*new that the model has not seen yet, found none;"):
        recalibrate(tmp_path / "merged", new, merge=True)


def test_nothing_to_merge_with(model, photos, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    record = json.loads((tmp_path / "model" / "detector.json").read_text())
    record |= {"calibration": None, "data": {}}
    (tmp_path / "model" / "detector.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=r"Expected a calibrated model to add scores to, found none; recalibrate w"):
        recalibrate(tmp_path / "model", photos, merge=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_few_images_rank_in_folds_unless_something_was_chosen_by_them(model, photos, tmp_path):
    few = write_photos(tmp_path / "few", range(700, 718))
    calibration = recalibrate(model, few, tmp_path / "again", false_alarms=0.01).calibration
    assert (len(calibration.scores), calibration.folds) == (18, 10)
    assert "18 good calibration images in 10 folds" in (tmp_path / "again" / "README.md").read_text()
    # A model whose adaptation was judged on its select images, and which gets those again.
    judged = tmp_path / "judged"
    shutil.copytree(model, judged)
    record = json.loads((judged / "detector.json").read_text())
    record["adaptation"]["history"] = [{"epoch": 0, "loss": None, "synthetic_auroc": 0.5}]
    (judged / "detector.json").write_text(json.dumps(record))
    again = recalibrate(judged, photos, tmp_path / "third", false_alarms=0.01)
    assert again.calibration.folds is None
    assert len(again.calibration.scores) == len(record["data"]["calibration"])


def test_settings_chosen_by_select_images_are_saved(model, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("ddad.tuning.DEFECTS", 16)
    said = []
    detector = tune(model, photos, tmp_path / "tuned", seconds=4, on_stage=said.append)
    loaded, before = Detector.from_pretrained(tmp_path / "tuned"), Detector.from_pretrained(model)
    assert loaded.settings == detector.settings
    assert loaded.calibration == detector.calibration
    tuning = loaded.record["tuning"]
    assert tuning["trials"]
    assert said[-1] == tuning["said"]
    assert tuning["said"] in (tmp_path / "tuned" / "README.md").read_text()
    changed = {
        f"{group}.{name}": value
        for group in ("sampling", "scoring")
        for name, value in getattr(loaded.settings, group).model_dump(mode="json").items()
        if value != getattr(before.settings, group).model_dump(mode="json")[name]
    }
    assert changed == tuning["changes"]
    assert loaded.settings.max_timestep == before.settings.max_timestep  # what the network was trained for
    for part in ("train", "select", "calibration"):
        assert sorted(loaded.record["data"][part]) == sorted(before.record["data"][part])


def test_what_was_trained_on_stays_on_record_wherever_it_is(model, photos, tmp_path, monkeypatch):
    """A folder without the training images is enough to tune; they must not rank later."""
    monkeypatch.setattr("ddad.tuning.DEFECTS", 16)
    data = read_record(model)["data"]
    folder = tmp_path / "others"
    folder.mkdir()
    for path in _paths(photos, [*data["select"], *data["calibration"]]):
        shutil.copy(path, folder)
    tune(model, folder, tmp_path / "tuned", seconds=0)
    assert sorted(read_record(tmp_path / "tuned")["data"]["train"]) == sorted(data["train"])
    next(iter(_paths(folder, data["calibration"]))).unlink()
    with pytest.raises(DataError, match=r"ranked by, found that 1 are missing; name a folder with all of them"):
        tune(model, folder, tmp_path / "other", seconds=0)
    with pytest.raises(DataError, match=r"ranked by, found that 1 are missing; name a folder with all of them"):
        adapt(model, folder, tmp_path / "other", epochs=1)


def test_a_model_named_from_within_and_a_mistyped_one(model, photos, tmp_path, monkeypatch):
    shutil.copytree(model, tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    recalibrate(".", photos)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"Expected a model folder with a detector.json, found none at typo/model"):
        recalibrate("typo/model", photos)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_one_process_at_a_time(model, photos, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    with locked(tmp_path / "model.adapt"), pytest.raises(ConfigError, match="Expected a run that nobody works on"):
        recalibrate(tmp_path / "model", photos)
    recalibrate(tmp_path / "model", photos)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_too_few_new_images(model, photos, tmp_path):
    record = read_record(model)
    folder = tmp_path / "seen"
    folder.mkdir()
    for path in _paths(photos, record["data"]["train"][:10] + record["data"]["select"][:1]):
        (folder / path.name).write_bytes(path.read_bytes())
    message = f"Expected at least {FEWEST} different good images that the model was not trained on in .*, found 1; add"
    with pytest.raises(DataError, match=message):
        recalibrate(model, folder)


def test_adapting_a_finished_model(few_defects, model, photos, tmp_path):
    said = []
    adapt(model, photos, tmp_path / "adapted", epochs=2, on_stage=said.append)
    record = read_record(tmp_path / "adapted")
    history = record["adaptation"]["history"]
    assert [entry["epoch"] for entry in history] == [0, 1, 2]
    assert all(0 < entry["synthetic_auroc"] < 1 for entry in history)
    best = max(history, key=lambda entry: (entry["synthetic_auroc"], -entry["epoch"]))["epoch"]
    assert record["adaptation"]["epochs"] == best
    assert record["adaptation"]["said"] in said
    assert record["adaptation"]["said"] in (tmp_path / "adapted" / "README.md").read_text()
    same = _features(model).keys() == _features(tmp_path / "adapted").keys() and all(
        np.array_equal(value.numpy(), _features(tmp_path / "adapted")[name].numpy())
        for name, value in _features(model).items()
    )
    assert same is (best == 0)
    assert not (tmp_path / "adapted.adapt").exists()


def _features(folder):
    return load_file(folder / "features" / "model.safetensors")


@pytest.mark.slow
def test_adaptation_killed_and_resumed_gives_the_same_features(model, photos, tmp_path):
    script = tmp_path / "adapt.py"
    script.write_text(
        "import sys\n"
        "from ddad import tuning\n"
        "from ddad.refit import adapt\n"
        "tuning.DEFECTS = 12\n"
        "adapt(sys.argv[1], sys.argv[2], sys.argv[3], epochs=3, on_stage=lambda s: print(s, flush=True))\n"
    )

    def command(out):
        return [sys.executable, str(script), str(model), str(photos), str(out)]

    subprocess.run(command(tmp_path / "whole"), check=True, stdout=subprocess.DEVNULL)
    out = tmp_path / "killed"
    process = subprocess.Popen(command(out), stdout=subprocess.PIPE, text=True)
    while not list((tmp_path / "killed.adapt" / "adaptation").glob("step-*")) and process.poll() is None:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    again = subprocess.run(command(out), check=True, stdout=subprocess.PIPE, text=True)
    assert "adaptation 0 of 3" not in again.stdout  # it went on, and did not begin again
    assert "adaptation 3 of 3" in again.stdout
    whole, killed = _features(tmp_path / "whole"), _features(out)
    assert all(np.array_equal(whole[name].numpy(), killed[name].numpy()) for name in whole)
    records = [json.loads((tmp_path / name / "detector.json").read_text()) for name in ("whole", "killed")]
    assert records[0]["adaptation"] == records[1]["adaptation"]
    assert records[0]["calibration"] == records[1]["calibration"]


def test_what_cannot_be_adapted_is_refused(model, photos, tmp_path):
    with pytest.raises(ConfigError, match="Expected at least one pass over the good images, found 0; give --epochs"):
        adapt(model, photos, tmp_path / "adapted")  # this model's settings want none
    few = write_photos(tmp_path / "few", range(700, 706))
    with pytest.raises(DataError, match=r"ranked by, found that \d+ are missing; name a folder"):
        adapt(model, few, tmp_path / "adapted", epochs=1)
    detector = Detector.from_pretrained(model)
    detector.record["adaptation"] = {"epochs": 2, "said": "adapted"}
    detector.save_pretrained(tmp_path / "adapted already")
    with pytest.raises(ConfigError, match=r"Expected features that are not adapted yet in .*, found adapted ones"):
        adapt(tmp_path / "adapted already", photos, epochs=1)
