"""benchmarks/serve.py runs: load, memory, restarts under load. pytest tests/test_serve_script.py"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import train_model, write_photos

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "serve.py"


@pytest.mark.slow
def test_load_memory_and_restarts(tmp_path):
    photos = write_photos(tmp_path / "good", range(40))
    model = train_model(photos, tmp_path / "tile")
    images = sorted(photos.iterdir())[:3]
    options = ["--clients", "1,16", "--least", "20", "--requests", "100", "--restarts", "2", "--pause", "2"]
    command = [
        sys.executable,
        str(SCRIPT),
        str(model),
        *map(str, images),
        *options,
        "--json",
        str(tmp_path / "out.json"),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert [row["answered"] for row in found["latency"]] == [row["requests"] for row in found["latency"]]
    assert found["memory"][-1]["requests"] == 100
    (restart,) = found["restart"]
    assert restart["exit_codes"] == [0]
    assert restart["answered"] == restart["requests"] == restart["rows"] > 0
    assert (restart["lost"], restart["doubled"]) == (0, 0)
