"""benchmarks/gpu.sh, on a CPU. pytest -m slow tests/test_gpu_script.py"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddad.data.demo import write_demo_dataset

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.sh"


@pytest.mark.slow
def test_the_whole_script_in_small_and_in_two_calls(tmp_path):
    data = write_demo_dataset(tmp_path / "parts", train=90, good=6, defective=10, size=32)
    out = tmp_path / "out"

    def call(seconds):
        command = [str(SCRIPT), str(data), str(out), "--smoke", "--call-seconds", str(seconds)]
        environment = {**os.environ, "PYTHON": sys.executable}
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    assert "the same call again goes on there" in call(40)
    assert "All done" in call(3000)
    assert (out / "results.json").stat().st_size < 500_000
    results = json.loads((out / "results.json").read_text())
    assert set(results) == {
        "latency",
        *(f"{preset}/{stage}" for preset in ("base", "s") for stage in ("training", "evaluation", "ablation")),
    }
    rows = results["latency"]["rows"]
    assert {(row["preset"], row["batch_size"]) for row in rows} == {
        (preset, size) for preset in ("paper", "base", "s", "xs") for size in (1, 32)
    }
    assert all(row["seconds"] > 0 for row in rows)
    assert 0 <= results["s/evaluation"]["metrics"]["image_auroc"] <= 1
    assert results["base/training"]["training"]["steps"] == 3


@pytest.mark.slow
def test_without_a_gpu_the_real_run_is_refused(tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(
        [str(SCRIPT), str(tmp_path), str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.strip() == "Expected an NVIDIA GPU, found none; add --smoke to try the script on a CPU."
