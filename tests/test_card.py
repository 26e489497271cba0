"""The model card says what was measured and recorded, and nothing else. pytest tests/test_card.py"""

import pytest
from huggingface_hub import ModelCard

from ddad.card import model_card
from ddad.config import make_settings
from ddad.data.samples import fingerprint

DATA = {"fingerprint": fingerprint(["a", "b"]), "train": ["a"] * 8, "select": ["b"], "calibration": ["c"] * 9}
CALIBRATION = {"scales": [1.0, 1.0], "false_alarms": 0.1, "threshold": 1.2, "scores": [i / 8 for i in range(9)]}


def record(preset="xs", **changes):
    settings = make_settings(preset).model_dump(mode="json")
    return {"settings": settings, "shape": [128, 96], "calibration": None, **changes}


def metrics(**changes):
    values = {"image_auroc": 0.98765, "aupro": None, "false_alarm_rate": 0.02, "miss_rate": 0.125}
    known = {"intervals": {"image_auroc": [0.95, 0.995]}, "counts": {"good": 50, "defective": 40}}
    return {**values, **known, "date": "2026-01-02T03:04:05+00:00", **changes}


def test_nothing_is_said_that_was_not_recorded():
    card = ModelCard(model_card(record()))
    assert card.data.to_dict() == {"library_name": "ddad", "tags": ["anomaly-detection", "diffusion", "ddad"]}
    assert "Anomaly detector for a product that was not named" in card.text
    rows = [line.split(" | ")[0].removeprefix("| ") for line in card.text.splitlines() if line.startswith("| ")][1:]
    expected = ["preset", "size", "features", "licence of the features' pretrained weights", "false alarms"]
    assert rows == expected
    assert "| licence of the features' pretrained weights | not recorded |" in card.text
    assert "There is no calibration" in card.text
    assert "Measured" not in card.text
    assert "The promise" not in card.text


def test_what_was_recorded_is_said():
    training = {"steps": 4500, "seconds": 3654.2, "held_out_loss": 0.003}
    said = {"adaptation": {"said": "Adapted in 3 passes."}, "tuning": {"said": "w = 2."}}
    known = record(
        category="tile", data=DATA, calibration=CALIBRATION, training=training, features_license="apache-2.0", **said
    )
    text = model_card(known, {"distillation": {"said": "One call."}})
    for row in (
        "| size | 128 x 96 pixels |",
        "| good images | 8 trained on, 1 for units and choices, 9 to calibrate |",
        f"| data fingerprint | `{DATA['fingerprint']}` |",
        "| training | 4500 steps, 3654 s, held-out loss 0.003 |",
        "| licence of the features' pretrained weights | apache-2.0 |",
        "| adaptation | Adapted in 3 passes. |",
        "| tuning | w = 2. |",
        "| student | One call. |",
        "| false alarms | 9 good calibration images: about 10 % of good parts are flagged",
    ):
        assert row in text
    assert "To sort photographs of tile" in text
    assert "Accuracy on defects is not known" in text
    assert "There is no calibration" not in text


def test_measured_numbers_stand_in_the_text_and_in_the_index():
    card = ModelCard(
        model_card(record(category="tile", data=DATA, calibration=CALIBRATION), None, metrics(), "me/tile")
    )
    assert "on 50 photographs of good and 40 of defective parts, on 2026-01-02" in card.text
    assert "| image AUROC | 0.9877 | 0.95 to 0.995 |" in card.text
    assert "| misses, share of defective parts | 0.125 | not measured |" in card.text
    assert "AUPRO" not in card.text  # there were no masks
    assert "Accuracy on defects is not known" not in card.text
    assert card.data.model_name == "me/tile"
    found = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert found == {"image_auroc": 0.98765, "false_alarm_rate": 0.02, "miss_rate": 0.125}
    assert card.data.eval_results[0].metric_args == {"interval_95": [0.95, 0.995], "good": 50, "defective": 40}
    assert card.data.eval_results[0].dataset_name == "tile"


@pytest.mark.parametrize(("preset", "warned"), [("paper", True), ("base", False)])
def test_networks_that_plain_diffusers_would_misread_carry_a_warning(preset, warned):
    assert ("plain diffusers would compute something else" in model_card(record(preset))) is warned


def test_a_converted_model_names_its_checkpoint():
    file = {"file": "2000", "sha256": "ab" * 32}
    converted = {"from": "the published DDAD code", "checkpoint": file, "features": {"weights": "pretrained"}}
    text = model_card(record(converted=converted, calibration=CALIBRATION))
    assert f"| converted from | the published DDAD code, `2000 (SHA-256 {'ab' * 32})` |" in text
    assert "| features' weights | pretrained |" in text
    assert "Which photographs the network was trained on is not recorded" in text
