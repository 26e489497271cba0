"""Training followed by TensorBoard and MLflow, whose files are read back. pytest tests/test_tracking.py"""

import json
import os
import signal
from collections import Counter
from types import SimpleNamespace

import accelerate.tracking
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from typer.testing import CliRunner

from ddad.cli import app
from ddad.config import make_settings
from ddad.detector import read_record
from ddad.errors import ConfigError, Interrupted
from ddad.fit import fit
from ddad.tracking import POINTS, _mlflow_uri, check_trackers, log_progress
from ddad.training import Progress
from tiny import write_photos

STEPS = 9


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A run in three sittings: stopped after 3 steps, broken off after 2 more without a checkpoint, and finished."""
    folder = tmp_path_factory.mktemp("followed")
    photos = write_photos(folder / "good", range(20))
    settings = make_settings("xs", image_size=32, training={"batch_size": 2}, adaptation={"epochs": 0})
    said = []

    def sitting(on_progress=lambda event: None):
        options = {"on_progress": on_progress, "on_stage": said.append}
        fit(photos, folder / "part", settings, steps=STEPS, log_with=("tensorboard", "mlflow"), **options)

    def stop(event):
        if event.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    def break_off(event):
        if event.step == 5:
            raise RuntimeError("the power is gone")

    before = os.environ.pop("MLFLOW_TRACKING_URI", None)
    try:
        with pytest.raises(Interrupted):
            sitting(stop)
        with pytest.raises(RuntimeError, match="the power is gone"):
            sitting(break_off)
        sitting()
        assert "MLFLOW_TRACKING_URI" not in os.environ
    finally:
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before
    lines = [json.loads(line) for line in (folder / "part" / "training.jsonl").read_text().splitlines()]
    return SimpleNamespace(
        folder=folder, lines=lines, said=said, record=read_record(folder / "part"), settings=settings
    )


def expected(followed):
    loss = {line["step"]: line["loss"] for line in followed.lines}
    rate = {line["step"]: line["learning_rate"] for line in followed.lines}
    held_out = {line["step"]: line["held_out_loss"] for line in followed.lines if line["held_out_loss"] is not None}
    calibration = followed.record["calibration"]
    return {
        "loss": loss,
        "learning_rate": rate,
        "held_out_loss": held_out,
        "calibration.threshold": {STEPS: calibration["threshold"]},
    }


@pytest.mark.slow
def test_tensorboard_shows_each_step_once(followed):
    assert followed.said.count(f"Followed by tensorboard, mlflow in {followed.folder / 'part.logs'}.") == 3
    events = EventAccumulator(str(followed.folder / "part.logs" / "part")).Reload()
    for name, values in expected(followed).items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value)) for step, value in values.items()], name
    assert all(event.value > 0 for event in events.Scalars("images_per_second"))
    (settings,) = (followed.folder / "part.logs" / "part").glob("*/hparams.yml")
    assert "training.learning_rate: 0.0008" in settings.read_text()


@pytest.mark.slow
def test_mlflow_has_one_run_with_settings_and_values(followed):
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{followed.folder / 'part.logs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("ddad")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "part"
    assert run.data.params["network.architecture"] == "xs"
    assert run.data.params["good_images"] == followed.record["data"]["fingerprint"]
    for name, values in expected(followed).items():
        history = client.get_metric_history(run.info.run_id, name)
        assert {one.step: pytest.approx(one.value) for one in history} == values
    steps = Counter(one.step for one in client.get_metric_history(run.info.run_id, "loss"))
    assert steps == {step: 2 if step in (4, 5) else 1 for step in range(1, STEPS + 1)}


def test_a_long_training_is_thinned_out_but_no_held_out_loss_is_lost():
    logged = {}
    steps = 7 * POINTS + 3
    for step in range(1, steps + 1):
        held_out = 0.1 if step % 1001 == 0 else None
        log_progress(
            lambda numbers, step: logged.update({step: numbers}), Progress(step, steps, 0.5, 1e-3, step, held_out), 4
        )
    assert POINTS <= len(logged) <= POINTS + 10
    assert steps in logged
    assert [step for step, numbers in logged.items() if "held_out_loss" in numbers] == list(range(1001, steps, 1001))
    assert np.unique([numbers["images_per_second"] for numbers in logged.values()]) == 4


def test_a_place_that_the_user_names_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    with _mlflow_uri(tmp_path) as (uri, own):
        assert (uri, own) == ("https://mlflow.example", False)
    assert os.environ["MLFLOW_TRACKING_URI"] == "https://mlflow.example"


def test_what_cannot_follow_is_said_before_anything_is_done(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"Expected trackers among .*tensorboard.*mlflow.*, found 'tensorbord'"):
        check_trackers(["tensorbord"])
    with pytest.raises(
        ConfigError, match="Expected the package of the tracker swanlab, found none; pip install swanlab"
    ):
        check_trackers(["tensorboard", "swanlab"])
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", [])
    command = ["train", str(tmp_path), "--out", str(tmp_path / "out"), "--log-with", "tensorboard"]
    said = CliRunner().invoke(app, command).exception
    assert str(said) == ("Expected the package of the tracker tensorboard, found none; pip install 'ddad[track]'.")
    assert list(tmp_path.iterdir()) == []
