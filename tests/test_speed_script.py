"""benchmarks/speed.py in small. pytest -m slow tests/test_speed_script.py"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "speed.py"


@pytest.mark.slow
def test_every_row_says_what_was_measured(tmp_path):
    out = tmp_path / "speed.json"
    options = ["--sections", "inference,training", "--presets", "xs", "--size", "64", "--batches", "1,4"]
    options += ["--repeats", "2", "--no-published", "--backends", "torch,onnxruntime,openvino", "--json", str(out)]
    done = subprocess.run([sys.executable, str(SCRIPT), *options], check=True, capture_output=True, text=True)
    rows = json.loads(out.read_text())
    inference = [row for row in rows if row["section"] == "inference"]
    fp32 = {(backend, "fp32", fast) for backend in ("torch", "onnxruntime", "openvino") for fast in (False, True)}
    assert fp32 <= {(row["backend"], row["precision"], row["fast"]) for row in inference}
    for row in inference:
        assert row["preset"] == "xs"
        assert row["batch"] in (1, 4)
        assert row["ms_spread"][0] <= row["ms_per_image"] <= row["ms_spread"][1]
        assert row["network_calls"] == (1 if row["fast"] else 5)
        assert 0 < row["of_peak"] < 1
        assert sum(row["share"].values()) == pytest.approx(1)
        limit = 1e-3 if row["precision"] == "fp32" else 0.2
        assert row["score_difference"] < limit * row["largest_score"]
        assert row["date"]
        assert row["machine"]
    (training,) = (row for row in rows if row["section"] == "training")
    assert training["images_per_second"] > 0
    assert "### inference" in done.stdout
