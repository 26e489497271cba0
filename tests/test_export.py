"""A model as one graph, and predictions from it without PyTorch. pytest tests/test_export.py"""

import csv
import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from ddad.cli import app
from ddad.detector import Detector
from ddad.errors import ConfigError, ModelError
from ddad.export import COMPARISON, export, resized
from ddad.images import resize
from ddad.runtime import RECORD, Runtime
from tiny import SHAPE, photo, train_model, write_photos

LIGHT = ("numpy", "numpy.libs", "PIL", "pillow.libs", "onnxruntime", "flatbuffers", "google", "packaging")
"""What NumPy, Pillow and ONNX Runtime are on disk."""


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return write_photos(tmp_path_factory.mktemp("data") / "good", range(40))


@pytest.fixture(scope="module")
def model(photos, tmp_path_factory):
    # One network call, so that tracing takes seconds.
    changes = {"sampling": {"stride": 200}}
    return train_model(photos, tmp_path_factory.mktemp("models") / "model", false_alarms=0.2, **changes)


@pytest.fixture(scope="module")
def exported(model, photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("exports") / "part"
    run = CliRunner().invoke(app, ["export", str(model), "--out", str(out), "--data", str(photos)])
    assert run.exit_code == 0, run.output
    assert "no verdict differs from the model's" in run.output
    return out


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Photographs of several sizes, some with a defect."""
    folder = tmp_path_factory.mktemp("pictures")
    for number, size in enumerate([(32, 32), (75, 40), (50, 99)]):
        image = resize(photo(500 + number), size).copy()
        if number:
            image[10:30, 5:25] = 0
        Image.fromarray(image).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("seed", range(40))
def test_resizing_in_the_graph_is_pillows_to_the_pixel(seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (*rng.integers(3, 500, 2), 3), dtype=np.uint8)
    shape = tuple(int(side) for side in 32 * rng.integers(1, 9, 2))
    found = resized(torch.from_numpy(image)[None], shape)[0].permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(found, resize(image, shape))


def test_the_graph_says_what_the_detector_says(model, exported, pictures):
    detector, runtime = Detector.from_pretrained(model, "cpu"), Runtime(exported)
    paths = sorted(pictures.iterdir())
    together = runtime.predict(paths)
    for path, found in zip(paths, together, strict=True):
        expected = detector.predict(path)
        assert found.anomaly_score == pytest.approx(expected.anomaly_score, abs=1e-4)
        assert (found.p_value, found.is_anomalous) == (expected.p_value, expected.is_anomalous)
        np.testing.assert_allclose(found.anomaly_map, expected.anomaly_map, atol=1e-3)
        assert np.abs(found.reconstruction.astype(int) - expected.reconstruction).max() <= 1
        assert [region.box for region in found.regions] == [region.box for region in expected.regions]
        # At its own size, as a program in another language would give it.
        own = runtime.infer(np.asarray(Image.open(path))[None])
        assert own.anomaly_score[0] == pytest.approx(expected.anomaly_score, abs=1e-4)
        assert own.reconstruction.shape == (1, *SHAPE, 3)
    assert {found.is_anomalous for found in together} == {False, True}


def test_the_comparison_stands_beside_the_graph(exported):
    with (exported / COMPARISON).open() as file:
        rows = list(csv.DictReader(file))
    record = json.loads((exported / RECORD).read_text())["comparison"]
    differences = [abs(float(row["anomaly_score"]) - float(row["exported_score"])) for row in rows]
    assert (len(rows), max(differences)) == (record["images"], record["largest_difference"])
    assert record["largest_difference"] < 1e-4 < record["tolerance"]
    assert "no verdict differs" in (exported / "README.md").read_text()


@pytest.mark.slow
def test_an_export_that_differs_is_refused_and_leaves_nothing(model, tmp_path):
    with pytest.raises(ModelError, match=r"^Expected the model's verdicts .* within 0, found 0 of 16 .*; nothing is"):
        export(model, tmp_path / "out", tolerance=0)
    assert list(tmp_path.iterdir()) == []


def test_without_torch_the_output_is_that_of_ddad_predict(model, exported, pictures, tmp_path):
    """In an environment with NumPy, Pillow and ONNX Runtime alone; its pictures are those of `ddad predict`, too."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    (packages,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    installed = Path(sysconfig.get_paths()["purelib"])
    for name in LIGHT:
        if (installed / name).exists():
            (packages / name).symlink_to(installed / name)
    (packages / "ddad").symlink_to(Path(__file__).resolve().parents[1] / "src" / "ddad")
    assert subprocess.run([python, "-c", "import torch"], capture_output=True, check=False).returncode
    command = [python, "-m", "ddad.runtime", exported, pictures, "--out", tmp_path / "light"]
    light = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert light.returncode == 0, light.stderr
    full = CliRunner().invoke(app, ["predict", str(model), str(pictures), "--out", str(tmp_path / "full")])
    assert light.stdout.replace("light", "full") == full.stdout
    for line, other in zip(*((tmp_path / name / "results.jsonl").open() for name in ("light", "full")), strict=True):
        row, expected = json.loads(line), json.loads(other)
        assert row.pop("anomaly_score") == pytest.approx(expected.pop("anomaly_score"), abs=1e-4)
        for region in (*row["regions"], *expected["regions"]):
            region["peak"] = round(region["peak"], 3)
        assert row == expected
        assert (tmp_path / "light" / row["files"]["overlay"]).is_file()


def test_mistakes_of_the_runtime_are_one_sentence(exported, pictures, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-m", "ddad.runtime", *map(str, arguments), "--out", str(tmp_path / "out")]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    missing = run(tmp_path, pictures)
    assert (missing.returncode, missing.stderr) == (
        1,
        f"Error: Expected an exported model with an export.json, found none at {tmp_path}; name the folder that "
        "`ddad export` wrote.\n",
    )
    assert run(exported, pictures, "--workers", "0").returncode == 2


def test_a_damaged_export_is_refused(exported, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (RECORD, "detector.onnx"):
        (copy / file).write_bytes((exported / file).read_bytes()[:-1] + b"\n")
    with pytest.raises(ModelError, match=r"^Expected the file detector.onnx that .* records, found another or none;"):
        Runtime(copy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"precision": "bf16"},
            r"^Expected a format and precision among onnx with fp32, .* found onnx with",
        ),
        ({"out": "taken"}, r"^Expected a new or empty folder, or an older export, found other files in"),
    ],
)
def test_what_cannot_be_exported_is_said_first(options, message, model, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "letter.txt").write_text("dear")
    options = {"out": "new", **options}
    with pytest.raises(ConfigError, match=message):
        export(model, tmp_path / options.pop("out"), **options)
