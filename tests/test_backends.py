"""The same scores, whatever computes the networks. pytest tests/test_backends.py"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from ddad import backends
from ddad.backends import WITH_GRAPHS, check_backend, find_graphs
from ddad.cli import app
from ddad.config import make_settings
from ddad.detector import Detector
from ddad.errors import ConfigError, DataError, ModelError
from ddad.features import create_features
from ddad.sampling import to_unit
from ddad.unet import create_scheduler
from tiny import SHAPE, photo, train_model, write_photos

PHOTOS = [photo(1000 + i) for i in range(5)]
for defective in PHOTOS[1::2]:
    defective[16:] = 10


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Graphs are kept here, and not where the user's are."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder / "ddad"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    photos = write_photos(tmp_path_factory.mktemp("data") / "good", range(40))
    return train_model(photos, tmp_path_factory.mktemp("models") / "model", false_alarms=0.2)


@pytest.fixture(scope="module")
def eager(model):
    """PyTorch's predictions, each photograph alone."""
    detector = Detector.from_pretrained(model, device="cpu")
    predictions = [detector.predict(image) for image in PHOTOS]
    assert {prediction.is_anomalous for prediction in predictions} == {False, True}
    return predictions


@pytest.fixture(scope="module")
def made(model, cache, eager):
    """The graphs of the model, in the cache."""
    Detector.from_pretrained(model, backend="onnxruntime")
    (folder,) = cache.iterdir()
    return folder


def scores(predictions):
    return [prediction.anomaly_score for prediction in predictions]


@pytest.mark.parametrize("backend", WITH_GRAPHS)
def test_scores_and_verdicts_are_those_of_pytorch_in_any_batch(model, made, eager, backend):
    detector = Detector.from_pretrained(model, backend=backend)
    for batch_size in (1, 3, 5):
        found = detector.predict(PHOTOS, batch_size)
        np.testing.assert_allclose(scores(found), scores(eager), rtol=1e-4)
        for one, other in zip(found, eager, strict=True):
            assert (one.is_anomalous, one.p_value, one.threshold) == (
                other.is_anomalous,
                other.p_value,
                other.threshold,
            )
            np.testing.assert_allclose(one.anomaly_map, other.anomaly_map, rtol=1e-3, atol=1e-4)
            assert np.abs(one.reconstruction.astype(int) - other.reconstruction).max() <= 1


@pytest.mark.parametrize("backend", WITH_GRAPHS)
def test_the_photograph_decides_and_not_what_else_is_in_the_batch(model, made, backend):
    detector = Detector.from_pretrained(model, backend=backend)
    forwards, backwards = (scores(detector.predict(images, 3)) for images in (PHOTOS, PHOTOS[::-1]))
    np.testing.assert_allclose(forwards, backwards[::-1], rtol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "openvino"])
def test_bf16_moves_scores_by_little(model, made, eager, backend):
    full, half = (Detector.from_pretrained(model, backend=backend, precision=p) for p in ("fp32", "bf16"))
    np.testing.assert_allclose(scores(half.predict(PHOTOS)), scores(eager), rtol=0.15)
    moved = (full.reconstruct(PHOTOS) - half.reconstruct(PHOTOS)).abs()
    assert moved.mean() < 0.01  # of pixels in [-1, 1], over all network calls
    if backend == "torch":  # OpenVINO computes in bf16 only where the processor does
        assert moved.max() > 0


def test_graphs_are_made_once(model, made, cache):
    before = {path: path.stat().st_mtime_ns for path in [cache, *cache.rglob("*")]}
    assert {path.name for path in made.iterdir()} >= {"unet.onnx", "features.onnx", "schedule.safetensors"}
    for backend in WITH_GRAPHS:
        Detector.from_pretrained(model, backend=backend)
    assert {path: path.stat().st_mtime_ns for path in [cache, *cache.rglob("*")]} == before


def test_graphs_are_known_by_what_they_were_made_from(model, made, tmp_path, monkeypatch):
    assert find_graphs(model, SHAPE).folder == made
    assert find_graphs(model, (32, 64)) is None

    # Another threshold is no reason to make them again.
    other = tmp_path / "model"
    shutil.copytree(model, other)
    record = json.loads((other / "detector.json").read_text())
    (other / "detector.json").write_text(json.dumps(record | {"calibration": None}))
    assert find_graphs(other, SHAPE).folder == made

    for part, file in (("unet", "diffusion_pytorch_model.safetensors"), ("features", "model.safetensors")):
        weights = load_file(other / part / file)
        name = next(iter(weights))
        save_file({**weights, name: weights[name] + 1}, other / part / file)
        assert find_graphs(other, SHAPE) is None
        save_file(weights, other / part / file)

    schedule = json.loads((other / "scheduler" / "scheduler_config.json").read_text())
    (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule | {"beta_end": 0.01}))
    assert find_graphs(other, SHAPE) is None

    monkeypatch.setattr(backends, "GRAPH_VERSION", backends.GRAPH_VERSION + 1)
    assert find_graphs(model, SHAPE) is None


def tiny_model(folder, heads):
    torch.manual_seed(0)
    unet = UNet2DModel(
        in_channels=3, out_channels=3, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=16, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    settings = make_settings(
        "xs",
        image_size=32,
        network={"attention_heads": heads, "prediction_type": "epsilon"},
        scoring={"feature_layers": (0,), "layer_weights": (1.0,)},
    )
    features = create_features("efficientnet-lite2", (0,))
    Detector(unet, create_scheduler("epsilon"), features, settings, SHAPE, device="cpu").save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_graphs_have_the_published_number_of_heads(cache, tmp_path):
    """The U-Net's own file does not know it; and these networks predict ε."""
    plain, heads = tiny_model(tmp_path / "plain", None), tiny_model(tmp_path / "heads", 4)
    expected, others = (Detector.from_pretrained(one, device="cpu").score(PHOTOS) for one in (heads, plain))
    assert not np.allclose(expected, others, rtol=1e-3)
    folders = set(cache.iterdir()) if cache.exists() else set()
    found = Detector.from_pretrained(heads, backend="onnxruntime").score(PHOTOS)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    (new,) = set(cache.iterdir()) - folders
    assert find_graphs(heads, SHAPE).folder == new
    assert find_graphs(plain, SHAPE) is None


@pytest.mark.slow
def test_a_new_version_makes_graphs_again(cache, tmp_path, monkeypatch):
    model = tiny_model(tmp_path / "model", None)
    expected = Detector.from_pretrained(model, device="cpu").score(PHOTOS)
    folders = set(cache.iterdir()) if cache.exists() else set()
    for version in (1, 2):
        monkeypatch.setattr(backends, "GRAPH_VERSION", 1000 + version)
        found = Detector.from_pretrained(model, backend="onnxruntime").score(PHOTOS)
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        assert len(set(cache.iterdir()) - folders) == version


LOADED = """
import sys
import numpy as np
from ddad import Detector
for backend in sys.argv[2:]:
    Detector.from_pretrained(sys.argv[1], backend=backend).predict(np.zeros((40, 30), np.uint8))
print(sorted({"diffusers", "timm"} & set(sys.modules)))
"""


def loaded(model, *names):
    command = [sys.executable, "-c", LOADED, str(model), *names]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ))
    return run.stdout.strip().splitlines()[-1]


def test_graphs_need_neither_diffusers_nor_timm(model, made):
    assert loaded(model, *WITH_GRAPHS) == "[]"


@pytest.mark.slow
def test_the_check_of_what_is_loaded_can_fail(model):
    assert loaded(model, "torch") == "['diffusers', 'timm']"


def test_parts_are_loaded_when_somebody_asks_for_them(model, made, eager, tmp_path):
    detector = Detector.from_pretrained(model, backend="onnxruntime")
    detector.predict(PHOTOS)
    assert not {"unet", "scheduler", "features"} & vars(detector).keys()
    with pytest.raises(AttributeError, match="Detector has no attribute 'network'"):
        _ = detector.network
    expected = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    found = detector.unet.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert detector.scheduler.config.prediction_type == "v_prediction"
    assert not detector.features.training
    detector.save_pretrained(tmp_path / "saved")
    saved = Detector.from_pretrained(tmp_path / "saved", device="cpu")
    assert saved.calibration == detector.calibration
    np.testing.assert_allclose(scores(saved.predict(PHOTOS)), scores(eager), rtol=1e-5)


def test_a_model_saved_again_has_the_same_graphs(model, made, tmp_path):
    Detector.from_pretrained(model, device="cpu").save_pretrained(tmp_path / "saved")
    assert str(model) not in (tmp_path / "saved" / "unet" / "config.json").read_text()
    assert find_graphs(tmp_path / "saved", SHAPE) == find_graphs(model, SHAPE)


def test_graphs_stay_on_the_processor(model, made):
    detector = Detector.from_pretrained(model, backend="openvino")
    assert detector.to("cpu") is detector
    with pytest.raises(ConfigError, match=r"Expected device cpu for a detector that runs from graphs, found cuda\."):
        detector.to("cuda")


INTERRUPTED = """
import gc, os, signal, sys
import numpy as np
from ddad import Detector
detectors = [Detector.from_pretrained(sys.argv[1], backend="openvino") for _ in range(2)]
for detector in detectors:
    detector.predict(np.zeros((40, 30), np.uint8))
del detector, detectors[0]
gc.collect()
detectors.clear()
gc.collect()
signal.signal(signal.SIGINT, lambda *_: print("caught", flush=True))
os.kill(os.getpid(), signal.SIGINT)
"""


def test_ctrl_c_after_openvino_is_no_crash(model, made):
    command = [sys.executable, "-c", INTERRUPTED, str(model)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert (result.returncode, result.stdout) == (0, "caught\n"), result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"backend": "tensorrt"},
            r"Expected a backend among torch, compile, onnxruntime, openvino, found 'tensorrt'\.",
        ),
        ({"precision": "fp16"}, r"Expected a precision of fp32 or bf16, found 'fp16'\."),
        (
            {"backend": "openvino", "device": "cuda"},
            r"Expected device cpu for backend openvino, found cuda; use backend compile on a GPU\.",
        ),
        (
            {"backend": "onnxruntime", "device": torch.device("cuda", 1)},
            r"Expected device cpu for backend onnxruntime, found cuda:1; use backend compile on a GPU\.",
        ),
        (
            {"backend": "onnxruntime", "precision": "bf16"},
            r"Expected precision fp32 for backend onnxruntime, found bf16; use openvino for bf16\.",
        ),
    ],
)
def test_what_no_backend_can_do_is_refused(model, options, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        Detector.from_pretrained(model, **options)


def test_a_device_that_is_none_is_refused(model):
    with pytest.raises(ConfigError, match=r"Expected a device such as cpu, cuda or cuda:1, found 'gpu'\."):
        Detector.from_pretrained(model, backend="openvino", device="gpu")


@pytest.mark.parametrize("backend", WITH_GRAPHS)
@pytest.mark.parametrize("own", [True, False])
def test_a_missing_package_is_named(model, monkeypatch, backend, own):
    missing = backend if own else "onnxscript"
    installed = backends.find_spec
    monkeypatch.setattr(backends, "find_spec", lambda name: None if name == missing else installed(name))
    message = rf"Expected the package {missing} for backend {backend}, found none; pip install 'ddad\[export\]'\."
    with pytest.raises(ConfigError, match=message):
        Detector.from_pretrained(model, backend=backend)
    check_backend("torch", "bf16", "cuda")
    check_backend("compile", "fp32", None)


def test_no_place_for_graphs(model, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"Expected a place for the folder .*file/ddad/\w+, found that none can be m"):
        Detector.from_pretrained(model, backend="onnxruntime")


def test_an_incomplete_model_is_refused_as_with_pytorch(model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    shutil.rmtree(tmp_path / "model" / "unet")
    for backend in ("torch", "openvino"):
        with pytest.raises(ModelError, match=r"Expected the network, its scheduler and statistics in .*model, found"):
            Detector.from_pretrained(tmp_path / "model", device="cpu", backend=backend)


def test_from_the_command_line(model, made, eager, tmp_path):
    Image.fromarray(PHOTOS[1]).save(tmp_path / "part.png")
    arguments = ["predict", str(model), str(tmp_path / "part.png"), "--out", str(tmp_path / "out")]
    for options in (["--backend", "onnxruntime"], ["--backend", "openvino", "--precision", "fp32"]):
        result = CliRunner().invoke(app, [*arguments, *options])
        assert result.exit_code == 0, result.output
        row = json.loads((tmp_path / "out" / "results.jsonl").read_text())
        assert row["anomaly_score"] == pytest.approx(eager[1].anomaly_score, rel=1e-4)
        assert row["is_anomalous"] is eager[1].is_anomalous
    result = CliRunner().invoke(app, [*arguments, "--backend", "tpu"])
    assert isinstance(result.exception, ConfigError)


# -- calibrated as it is used -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(model, made, tmp_path_factory):
    """The model calibrated by OpenVINO in bf16, and the good photographs for that."""
    place = tmp_path_factory.mktemp("half")
    (place / "good").mkdir()
    rng = np.random.default_rng(7)
    for number in range(8):
        image = np.clip(PHOTOS[0].astype(int) + rng.integers(-20, 21, PHOTOS[0].shape), 0, 255)
        Image.fromarray(image.astype(np.uint8)).save(place / "good" / f"{number}.png")
    shutil.copytree(model, place / "model")
    arguments = ["recalibrate", str(place / "model"), str(place / "good"), "--backend", "openvino"]
    result = CliRunner().invoke(app, [*arguments, "--precision", "bf16"])
    assert result.exit_code == 0, result.output
    assert "That holds for backend openvino in bf16." in result.output
    return place


def test_a_model_is_used_as_it_was_calibrated(half):
    detector = Detector.from_pretrained(half / "model")
    assert (detector.backend, detector.precision, detector.warning) == ("openvino", "bf16", None)
    # The scores it ranks by are those it gives to the same photographs.
    now = np.array(scores(detector.predict(sorted((half / "good").iterdir()))))
    for ranked in detector.calibration.scores:
        assert np.abs(now - ranked).min() < 1e-4


@pytest.mark.parametrize(
    ("options", "runs", "warned"),
    [
        ({"precision": "bf16"}, ("openvino", "bf16"), False),
        ({"backend": "openvino"}, ("openvino", "bf16"), False),
        ({"precision": "fp32"}, ("torch", "fp32"), True),
        ({"backend": "torch"}, ("torch", "fp32"), True),
        ({"backend": "torch", "precision": "bf16"}, ("torch", "bf16"), True),
        ({"backend": "onnxruntime"}, ("onnxruntime", "fp32"), True),
    ],
)
def test_another_use_than_the_calibrated_one_is_warned_of(half, options, runs, warned):
    detector = Detector.from_pretrained(half / "model", **options)
    assert (detector.backend, detector.precision) == runs
    assert bool(detector.warning) is warned
    if warned:
        assert detector.warning.startswith(f"Expected the calibration's backend openvino in bf16, found {runs[0]} in ")
        assert detector.warning.endswith(f"GOOD_FOLDER --backend {runs[0]} --precision {runs[1]}")


def test_fp32_is_the_same_in_every_backend(model, made):
    for backend in ("torch", *WITH_GRAPHS):
        assert Detector.from_pretrained(model, backend=backend).warning is None
    assert Detector.from_pretrained(model, precision="bf16").warning


def test_the_warning_is_printed(half, tmp_path):
    arguments = ["predict", str(half / "model"), str(half / "good" / "0.png"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert (result.exit_code, result.stderr) == (0, "")
    result = CliRunner().invoke(app, [*arguments, "--json", "--precision", "fp32"])
    assert result.exit_code == 0
    assert result.stderr.startswith("Warning: Expected the calibration's backend openvino in bf16, found torch in fp32")


def test_scores_of_two_kinds_are_not_merged(half):
    with pytest.raises(
        ConfigError, match=r"Expected scores of backend torch in fp32 to add to, found those of backend "
    ):
        Detector.from_pretrained(half / "model", precision="fp32").add_to_calibration(PHOTOS)


# -- torch.compile -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [False, True])
def test_smaller_batches_are_filled_up_and_cut_again(layers):
    seen = []

    def network(sample, timesteps):
        seen.append((tuple(sample.shape), tuple(timesteps.shape)))
        answer = sample + timesteps.view(-1, 1)
        return [answer, answer[:, :1]] if layers else answer

    call = backends._one_size(network)
    for size in (3, 1, 2, 3, 5, 4, 3):
        sample, timesteps = torch.rand(size, 4), torch.arange(size)
        answer = call(sample, timesteps)
        expected = sample + torch.arange(size).view(-1, 1)
        if layers:
            assert torch.equal(answer[0], expected)
            assert torch.equal(answer[1], expected[:, :1])
        else:
            assert torch.equal(answer, expected)
    assert seen == [((size, 4), (size,)) for size in (3, 3, 3, 3, 5, 5, 5)]


def test_what_is_compiled_sees_one_layout_in_memory():
    """Another one is compiled again, as another shape is."""
    seen = []
    call = backends._one_size(lambda sample: seen.append(sample.stride()) or sample)
    for sample in (to_unit(PHOTOS), to_unit(PHOTOS[:4]), to_unit(PHOTOS[:4]).contiguous(), to_unit(PHOTOS[:1])):
        assert torch.equal(call(sample), sample)
    assert len(set(seen)) == 1


@pytest.mark.parametrize("layers", [False, True])
def test_an_answer_outlives_the_next_call(layers):
    """CUDA graphs write every answer to the same place."""
    place = torch.empty(2, 4)
    call = backends._one_size(lambda sample: [place.copy_(sample)] if layers else place.copy_(sample))
    first = call(torch.ones(2, 4))
    call(torch.zeros(2, 4))
    assert torch.equal(first[0] if layers else first, torch.ones(2, 4))


@pytest.mark.slow
def test_compiled_once_the_scores_are_those_of_pytorch(model, eager):
    detector = Detector.from_pretrained(model, device="cpu", backend="compile")
    found = scores(detector.predict(PHOTOS[:3], 3))
    with torch._dynamo.config.patch(error_on_recompile=True):
        found += scores(detector.predict(PHOTOS[3:], 3))
        again = [detector.predict(image).anomaly_score for image in PHOTOS]
    np.testing.assert_allclose(found, scores(eager), rtol=1e-4)
    np.testing.assert_allclose(again, found, rtol=1e-5)
