"""DDAD in anomalib's engine and command line, on real files. pytest tests/test_anomalib.py"""

import importlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ddad.config import make_settings
from ddad.data.samples import content_hash
from ddad.detector import Detector, read_record
from ddad.errors import ConfigError, DataError, ModelError
from ddad.fit import fit
from ddad.images import read_image, read_mask
from ddad.metrics import PixelMetrics, image_metrics
from tiny import photo, write_photos

pytest.importorskip("anomalib", reason="the extra [anomalib] is not installed")

from anomalib.data import Folder, ImageBatch, PredictDataset
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, Evaluator
from torchvision import tv_tensors
from torchvision.transforms.v2 import RandomHorizontalFlip

from ddad.integrations.anomalib import AUROC, Ddad, FalseAlarmPostProcessor, PhotoResize

TINY = {"training": {"batch_size": 2, "precision": "fp32"}, "adaptation": {"epochs": 0}}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """30 good photographs to train on; 4 good and 4 defective ones of several sizes to test on."""
    root = tmp_path_factory.mktemp("data") / "parts"
    for folder in ("train", "test", "ground_truth"):
        (root / folder).mkdir(parents=True)
    write_photos(root / "train" / "good", range(30))
    write_photos(root / "test" / "good", range(100, 104))
    for folder in ("test/scratch", "ground_truth/scratch"):
        (root / folder).mkdir()
    for seed in range(200, 204):
        side = 32 + 8 * (seed - 200)
        pixels = np.asarray(Image.fromarray(photo(seed)).resize((side + 16, side))).copy()
        mask = np.zeros(pixels.shape[:2], np.uint8)
        mask[8:20, 10:24] = 255
        pixels[mask > 0] = 250
        Image.fromarray(pixels).save(root / "test" / "scratch" / f"{seed}.png")
        Image.fromarray(mask).save(root / "ground_truth" / "scratch" / f"{seed}.png")
    return root


def parts(root, **changes):
    options = {"normal_test_dir": "test/good", "abnormal_dir": "test/scratch", "mask_dir": "ground_truth/scratch"}
    options |= {"num_workers": 0, "eval_batch_size": 3, "val_split_mode": "none", **changes}
    return Folder(name="parts", root=root, normal_dir=options.pop("normal_dir", "train/good"), **options)


def engine(folder):
    return Engine(default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)


def tiny_model(**changes):
    return Ddad(**{"image_size": 32, "steps": 2, "false_alarms": 0.1, "settings": TINY, **changes})


@pytest.fixture(scope="module")
def trained(root, tmp_path_factory):
    """The model, what its test measured, the run's folder."""
    folder = tmp_path_factory.mktemp("run")
    model = tiny_model(out=str(folder / "model"))
    measured = engine(folder).train(model, datamodule=parts(root))[0]
    return model, measured, folder


@pytest.fixture(scope="module")
def by_detector(root, trained):
    """What `Detector.predict` says of each test photograph, from the folder that training wrote."""
    paths = sorted((root / "test").rglob("*.png"))
    return {Path(found.path): found for found in Detector.from_pretrained(trained[2] / "model").predict(paths)}


def assert_equal(batches, by_detector):
    """Predictions of the engine are those of the detector."""
    items = [item for batch in batches for item in batch]
    assert {Path(item.image_path) for item in items} == set(by_detector)
    for item in items:
        expected = by_detector[Path(item.image_path)]
        assert float(item.pred_score) == pytest.approx(expected.anomaly_score, abs=1e-4)
        np.testing.assert_allclose(item.anomaly_map, expected.anomaly_map, atol=1e-4)
        assert bool(item.pred_label) is expected.is_anomalous
        assert np.array_equal(item.pred_mask.numpy(), item.anomaly_map.numpy() > expected.threshold)


def test_training_is_that_of_ddad_train(trained, root, tmp_path):
    folder = trained[2] / "model"
    settings = make_settings("xs", image_size=32, false_alarms=0.1, **TINY)
    fit(root / "train" / "good", tmp_path / "fitted", settings, steps=2)
    for file in ("unet/diffusion_pytorch_model.safetensors", "statistics.safetensors"):
        ours, theirs = load_file(tmp_path / "fitted" / file), load_file(folder / file)
        assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    record, expected = read_record(folder), read_record(tmp_path / "fitted")
    assert record["data"] == expected["data"]
    assert record["calibration"] == expected["calibration"]
    split = [hashes for part in ("train", "select", "calibration") for hashes in record["data"][part]]
    assert sorted(split) == sorted(content_hash(path) for path in (root / "train" / "good").iterdir())


def test_measured_as_ddad_measures(trained, root, by_detector):
    scores = [found.anomaly_score for found in by_detector.values()]
    labels = [path.parent.name != "good" for path in by_detector]
    pixels = PixelMetrics()
    for path, found in by_detector.items():
        mask = root / "ground_truth" / path.parent.name / path.name
        shape = found.anomaly_map.shape
        pixels.update(found.anomaly_map, read_mask(mask, shape) if mask.exists() else np.zeros(shape, bool))
    expected = pixels.compute()
    measured = trained[1]
    assert measured["image_AUROC"] == pytest.approx(image_metrics(scores, labels)["image_auroc"], abs=1e-5)
    assert measured["pixel_AUROC"] == pytest.approx(expected["pixel_auroc"], abs=1e-5)
    assert measured["pixel_AUPRO"] == pytest.approx(expected["aupro"], abs=1e-4)


def test_a_picture_of_each_photograph(trained):
    assert len(list((trained[2] / "Ddad" / "parts").rglob("images/**/*.png"))) == 8


def test_a_finished_model_in_the_engine(trained, root, by_detector, tmp_path):
    """With a data module, whose batches hold photographs of several sizes, and with a folder."""
    model = Ddad.from_pretrained(trained[2] / "model", visualizer=False)
    assert_equal(engine(tmp_path).predict(model, data_path=root / "test"), by_detector)
    runner = engine(tmp_path)
    assert_equal(runner.predict(model, datamodule=parts(root)), by_detector)
    runner.trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = Ddad.load_from_checkpoint(tmp_path / "model.ckpt")
    assert loaded.hparams.pretrained is None  # the checkpoint needs no folder
    assert loaded.detector.calibration == model.detector.calibration


def test_a_checkpoint_holds_everything(trained, root, by_detector, tmp_path):
    _, _, folder = trained
    checkpoint = next((folder / "Ddad").rglob("model.ckpt"))
    untrained = Ddad(visualizer=False)
    assert_equal(engine(tmp_path).predict(untrained, data_path=root / "test", ckpt_path=checkpoint), by_detector)
    loaded = Ddad.load_from_checkpoint(checkpoint)
    loaded.detector.save_pretrained(tmp_path / "saved")
    again, before = (Detector.from_pretrained(saved) for saved in (tmp_path / "saved", folder / "model"))
    assert (again.calibration, again.settings, again.shape) == (before.calibration, before.settings, before.shape)
    assert again.image_rule == before.image_rule
    assert again.record["data"] == before.record["data"]
    path = next(iter(by_detector))
    np.testing.assert_allclose(again.predict(path).anomaly_map, by_detector[path].anomaly_map, atol=1e-5)


def test_validation_moves_no_threshold(trained, root, tmp_path):
    watched = Evaluator(val_metrics=[AUROC(fields=["pred_score", "gt_label"], prefix="image_")])
    model = Ddad.from_pretrained(trained[2] / "model", evaluator=watched, visualizer=False)
    threshold = np.float32(model.detector.calibration.threshold)
    measured = engine(tmp_path).validate(model, datamodule=parts(root, val_split_mode="same_as_test"))[0]
    assert 0 <= measured["image_AUROC"] <= 1
    assert float(model.post_processor.image_threshold) == float(model.post_processor.pixel_threshold) == threshold


def test_scores_of_the_unit_interval_on_request(trained, root, by_detector, tmp_path):
    ready = FalseAlarmPostProcessor(enable_normalization=True)
    model = Ddad.from_pretrained(trained[2] / "model", post_processor=ready, visualizer=False)
    for batch in engine(tmp_path).predict(model, datamodule=parts(root)):
        for item in batch:
            expected = by_detector[Path(item.image_path)]
            unit = expected.anomaly_map / (expected.anomaly_map + expected.threshold)
            np.testing.assert_allclose(item.anomaly_map, unit, atol=1e-4)
            assert float(item.pred_score) == float(item.anomaly_map.max()) < 1
            assert bool(item.pred_label) is expected.is_anomalous


def test_photographs_and_masks_are_resized_as_ours(root):
    path = root / "test" / "scratch" / "203.png"
    mask = root / "ground_truth" / "scratch" / "203.png"
    photograph = PredictDataset(path)[0].image
    whole = tv_tensors.Mask(torch.from_numpy(np.asarray(Image.open(mask)) > 0).to(torch.uint8))
    for shape in ((32, 32), (64, 96)):
        image, marked = PhotoResize(shape)(photograph, whole)
        expected = read_image(path, shape)
        assert np.array_equal((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy(), expected)
        assert np.array_equal(marked.bool().numpy(), read_mask(mask, shape))
        assert isinstance(marked, tv_tensors.Mask)


def test_auroc_is_right_whatever_the_batches():
    """torchmetrics puts a sigmoid around the scores of those batches only that reach above 1."""
    scores = torch.tensor([0.9, 0.8, 0.95, 1.2, 0.1, 7.0])
    labels = torch.tensor([False, False, True, True, False, True])
    metric = AUROC(fields=["pred_score", "gt_label"])
    for score, label in zip(scores, labels, strict=True):
        image = torch.zeros(1, 3, 4, 4)
        metric.update(ImageBatch(image=image, pred_score=score[None], gt_label=label[None]))
    assert float(metric.compute()) == image_metrics(scores, labels)["image_auroc"] == 1


@pytest.mark.parametrize("levels", [None, 20])
def test_both_libraries_measure_the_same_aupro(levels):
    """Also with many equal scores: both cut at the limit by a straight line and divide by the limit."""
    generator = np.random.default_rng(0)
    maps = generator.random((6, 40, 40)).astype(np.float32)
    masks = np.zeros((6, 40, 40), bool)
    masks[:4, 5:15, 5:15], masks[2:4, 25:30, 20:38] = True, True
    maps[masks] += 0.3
    if levels:
        maps = np.floor(maps * levels) / np.float32(levels)
    ours = PixelMetrics()
    for anomaly_map, mask in zip(maps, masks, strict=True):
        ours.update(anomaly_map, mask)
    expected = ours.compute()
    for name, limit in (("aupro", 0.3), ("aupro_0.05", 0.05)):
        theirs = AUPRO(fields=["anomaly_map", "gt_mask"], fpr_limit=limit)
        theirs.update(
            ImageBatch(
                image=torch.zeros(6, 3, 40, 40), anomaly_map=torch.from_numpy(maps), gt_mask=torch.from_numpy(masks)
            )
        )
        assert float(theirs.compute()) == pytest.approx(expected[name], abs=1e-5)


def test_what_cannot_be_trained(trained, root, tmp_path):
    def refused(error, message, model=None, **changes):
        with pytest.raises(error, match=message):
            engine(tmp_path).fit(model or tiny_model(visualizer=False), datamodule=parts(root, **changes))

    refused(ConfigError, "Expected a model to train, found .*model, which", Ddad.from_pretrained(trained[2] / "model"))
    refused(DataError, "Expected the pixels of .* as its file shows", train_augmentations=RandomHorizontalFlip(1.0))
    few = write_photos(tmp_path / "few", range(4))
    refused(DataError, "expected at least 5 different images of good parts, but found 4", normal_dir=few)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(photo(0)).save(few / "turned.png", exif=exif)
    refused(DataError, r"Expected the pixels of .*turned.png as its file shows them, found others", normal_dir=few)
    with pytest.raises(ConfigError, match="Expected a preset among"):
        Ddad(preset="large")


def test_what_cannot_be_used(trained, root, tmp_path):
    with pytest.raises(ModelError, match=r"Expected a trained model, found none; call Engine\.fit"):
        engine(tmp_path).predict(Ddad(), data_path=root / "test")
    model = trained[0]
    with pytest.raises(DataError, match="Expected images of 32 x 32 pixels with values from 0 to 1, found 64 x 64"):
        model.model(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ConfigError, match="Expected export type torch"):
        engine(tmp_path).export(model, "onnx")
    detector = Detector.from_pretrained(trained[2] / "model")
    detector.calibration = None
    detector.save_pretrained(tmp_path / "uncalibrated")
    with pytest.raises(ModelError, match="Expected a calibrated model"):
        Ddad.from_pretrained(tmp_path / "uncalibrated")


def test_without_anomalib(monkeypatch):
    monkeypatch.setitem(sys.modules, "anomalib", None)
    monkeypatch.delitem(sys.modules, "ddad.integrations.anomalib")
    with pytest.raises(ConfigError, match=r"found none \(.*\); pip install 'ddad\[anomalib\]'"):
        importlib.import_module("ddad.integrations.anomalib")


@pytest.mark.slow
def test_their_command_line(root, tmp_path):
    program = Path(sys.executable).with_name("anomalib")
    data = ["--data", "Folder", "--data.name", "parts", "--data.root", str(root), "--data.normal_dir", "train/good"]
    data += ["--data.normal_test_dir", "test/good", "--data.abnormal_dir", "test/scratch"]
    data += ["--data.mask_dir", "ground_truth/scratch", "--data.num_workers", "0"]
    run = ["--default_root_dir", str(tmp_path), "--trainer.accelerator", "cpu"]
    model = ["--model", "ddad.integrations.anomalib.Ddad", "--model.image_size", "32", "--model.steps", "2"]
    model += ["--model.settings", str(TINY).replace("'", '"'), "--model.false_alarms", "0.1"]
    model += ["--model.out", str(tmp_path / "model")]
    subprocess.run([program, "train", *model, *data, *run], check=True)
    assert Detector.from_pretrained(tmp_path / "model").shape == (32, 32)
    finished = ["--model", "ddad.integrations.anomalib.Ddad", "--model.pretrained", str(tmp_path / "model")]
    tested = subprocess.run([program, "test", *finished, *data, *run], check=True, capture_output=True, text=True)
    assert "image_AUROC" in tested.stdout
