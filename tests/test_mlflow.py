"""The MLflow flavour: saved, logged, loaded and served by MLflow itself. pytest tests/test_mlflow.py"""

import base64
import json

import mlflow
import pandas as pd
import pytest
import torch
from fastapi.testclient import TestClient
from mlflow.exceptions import MlflowException
from mlflow.pyfunc.scoring_server import init

from ddad.config import make_settings
from ddad.detector import Detector
from ddad.errors import DataError, ModelError
from ddad.features import create_features
from ddad.images import encode_png
from ddad.integrations.mlflow import log_model, save_model
from ddad.unet import create_scheduler, create_unet
from tiny import SHAPE, photo

PHOTOS = [encode_png(one) for one in (photo(1), photo(2, level=30), photo(3))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    settings = make_settings("xs", false_alarms=0.2)
    features = create_features("efficientnet-lite2", (2, 3))
    detector = Detector(create_unet("xs"), create_scheduler("v_prediction"), features, settings, SHAPE, device="cpu")
    detector.calibrate(map(photo, range(10, 14)), map(photo, range(20, 25)))
    folder = tmp_path_factory.mktemp("models") / "model"
    detector.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "flavour"
    save_model(model, folder)
    return folder


def check(rows, expected):
    for row, prediction in zip(rows, expected, strict=True):
        assert row["anomaly_score"] == pytest.approx(prediction.anomaly_score)
        assert (row["p_value"], row["is_anomalous"]) == (prediction.p_value, prediction.is_anomalous)
        assert row["threshold"] == prediction.threshold
        assert [one["box"] for one in json.loads(row["regions"])] == [list(one.box) for one in prediction.regions]
        assert row["error"] is None


def test_it_predicts_what_the_detector_predicts(model, saved):
    loaded = mlflow.pyfunc.load_model(str(saved))
    expected = Detector.from_pretrained(model).predict(PHOTOS)
    assert {one.is_anomalous for one in expected} == {True, False}
    check(loaded.predict(pd.DataFrame({"image": PHOTOS})).to_dict("records"), expected)


def test_there_is_no_pickle_and_the_example_is_a_rendered_part(saved):
    suffixes = {file.suffix for file in saved.rglob("*") if file.is_file()}
    assert suffixes == {"", ".json", ".md", ".safetensors", ".txt", ".yaml"}
    assert "ddad==" in (saved / "requirements.txt").read_text()
    example = mlflow.models.Model.load(saved).load_input_example(str(saved))
    assert list(example) == ["image"]


def test_the_signature_is_enforced(saved):
    loaded = mlflow.pyfunc.load_model(str(saved))
    with pytest.raises(MlflowException, match="Model is missing inputs"):
        loaded.predict(pd.DataFrame({"picture": PHOTOS}))
    with pytest.raises(MlflowException, match="Incompatible input types for column image"):
        loaded.predict(pd.DataFrame({"image": [1.0]}))
    with pytest.raises(DataError, match=r"Expected encoded photographs \(bytes\) in the column image, found str"):
        loaded.predict(pd.DataFrame({"image": ["/etc/hostname"]}))


def test_served_as_json(model, saved):
    """By MLflow's scoring server, without a port."""
    images = [base64.b64encode(one).decode() for one in (PHOTOS[1], b"no photograph")]
    with TestClient(init(mlflow.pyfunc.load_model(str(saved)))) as client:
        answer = client.post("/invocations", json={"dataframe_records": [{"image": one} for one in images]})
        example = client.post(
            "/invocations",
            content=(saved / "serving_input_example.json").read_bytes(),
            headers={"Content-Type": "application/json"},
        )
    assert "NaN" not in answer.text
    good, bad = answer.json()["predictions"]
    check([good], [Detector.from_pretrained(model).predict(PHOTOS[1])])
    assert (bad["anomaly_score"], bad["is_anomalous"], bad["regions"]) == (None, None, "[]")
    assert "expected a PNG, JPEG" in bad["error"]
    assert example.status_code == 200
    assert example.json()["predictions"][0]["anomaly_score"] > 0


@pytest.mark.slow
def test_logged_to_a_run(model, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = mlflow.create_experiment("parts", artifact_location=(tmp_path / "artifacts").as_uri())
    with mlflow.start_run(experiment_id=experiment):
        logged = log_model(model, "tile", metadata={"line": 3})
    loaded = mlflow.pyfunc.load_model(logged.model_uri)
    assert loaded.metadata.metadata == {"line": 3}
    check(
        loaded.predict(pd.DataFrame({"image": PHOTOS})).to_dict("records"),
        Detector.from_pretrained(model).predict(PHOTOS),
    )


def test_what_is_no_model_is_said_in_a_sentence(tmp_path):
    with pytest.raises(ModelError, match=r"Expected a model folder with a detector.json, found none at"):
        save_model(tmp_path / "nowhere", tmp_path / "flavour")
    assert not (tmp_path / "flavour").exists()
