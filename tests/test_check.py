"""pytest tests/test_check.py"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddad.data.check import check
from ddad.errors import ConfigError

MTD = Path(__file__).resolve().parents[2] / "shared/data/mtd/tile"


def save(path, pixels=None, *, seed=0, size=(40, 60), **options):
    """A random grey image; a different seed is a different image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8) if pixels is None else pixels
    Image.fromarray(pixels).save(path, **options)
    return path


def square(size=(40, 60), top=255):
    mask = np.zeros(size, np.uint8)
    mask[5:15, 5:15] = top
    return mask


@pytest.fixture
def root(tmp_path):
    """Nothing wrong with it: 12 good images, 2 good and 2 scratched test images, masks."""
    root = tmp_path / "bolt"
    for index in range(12):
        save(root / f"train/good/{index}.png", seed=index)
    for index in range(2):
        save(root / f"test/good/{index}.png", seed=100 + index)
        save(root / f"test/scratch/{index}.png", seed=200 + index)
        save(root / f"ground_truth/scratch/{index}_mask.png", square())
    return root


def run(root, level=None):
    """Findings as text, by level; the settings fit the small folder."""
    report = check(root, false_alarms=0.5, image_size=32)
    return report, [f"{f.message} {f.advice}" for f in report.findings if level in (None, f.level)]


def expect(root, level, words, *paths):
    report = check(root, false_alarms=0.5, image_size=32)
    found = [f for f in report.findings if f.level == level and re.search(words, f"{f.message} {f.advice}")]
    assert len(found) == 1, report.findings
    assert set(found[0].paths) == set(paths)
    assert report.can_train == all(f.level != "error" for f in report.findings)
    return report


def test_a_folder_in_order(root):
    report, texts = run(root)
    assert report.can_train
    assert (report.category, report.train, report.masks) == ("bolt", 12, 2)
    assert report.test == {"good": 2, "scratch": 2}
    assert report.shape == (32, 32)
    assert sum(report.split.values()) == 12
    assert texts == [
        "one model pixel covers 1.5 x 1.5 photo pixels; defects less than about 5 photo pixels across will be hard to "
        "see. Use --image-size 64 if yours are smaller."
    ]
    assert report.findings[0].level == "info"


def test_report_is_json(root):
    (root / "train/good/3.png").write_bytes(b"")
    values = json.loads(json.dumps(run(root)[0].to_dict()))
    assert values["can_train"] is False
    assert values["shape"] == [32, 32]
    assert values["root"] == str(root)
    assert values["findings"][0]["level"] == "error"
    assert values["findings"][0]["paths"] == [str(root / "train/good/3.png")]
    assert set(values) == {"root", "category", "train", "test", "masks", "shape", "split", "findings", "can_train"}


def test_unreadable_images_stop_training_only_where_it_needs_them(root):
    good, bad = root / "train/good/3.png", root / "test/scratch/1.png"
    bad.write_bytes(bad.read_bytes()[:200])
    report = expect(root, "warning", r"1\.png: expected a whole PNG.* Mend or remove it: it cannot be judged", bad)
    assert report.can_train
    good.write_text("no image")
    report = expect(root, "error", r"3\.png: expected a PNG.* Mend or remove it: training stops there", good)
    assert not report.can_train


def test_few_good_images(tmp_path):
    for index in range(4):
        save(tmp_path / f"{index}.png", seed=index)
    save(tmp_path / "copy.png", seed=0)
    expect(tmp_path, "error", "expected at least 5 different images of good parts, but found 4")
    save(tmp_path / "5.png", seed=5)
    report = check(tmp_path, false_alarms=0.01, image_size=32)
    assert report.can_train
    (budget,) = [f for f in report.findings if "false-alarm" in f.message]
    assert budget.level == "warning"
    assert budget.message == (
        "expected 99 calibration images for a false-alarm rate of 0.01, but found 1 among 6 good ones; that promises "
        "0.5 only, and with 95% confidence no more than 0.95."
    )
    assert budget.advice == "Bring about 278 good images, or allow more false alarms."
    assert "no test images" in str(report.findings)


def test_a_folder_that_cannot_be_scanned(tmp_path):
    for root in (tmp_path, tmp_path / "none"):
        report, errors = run(root, "error")
        assert not report.can_train
        assert len(errors) == 1
        assert errors[0].endswith("or a folder of good images.")
        json.dumps(report.to_dict())


def test_copies(root):
    again = save(root / "train/good/again.png", seed=1)
    expect(root, "warning", r"^the same image is there 2 times\. Keep one", root / "train/good/1.png", again)
    leaked = save(root / "test/good/leaked.png", seed=2)
    expect(root, "warning", "same image is in train and in test. Remove one", root / "train/good/2.png", leaked)
    twice = save(root / "test/good/twice.png", seed=200)
    expect(root, "warning", "in test as good and as scratch. Keep the right one", root / "test/scratch/0.png", twice)


def test_sizes_and_aspects(root):
    save(root / "train/good/0.png", seed=0, size=(48, 70))
    wide = save(root / "test/scratch/0.png", seed=200, size=(20, 100))
    save(root / "ground_truth/scratch/0_mask.png", square((20, 100)))
    expect(root, "info", "good images have 2 sizes, from 60 x 40 to 70 x 48")
    expect(root, "warning", "^1 images are more than 1.5 times wider or narrower than the median good image", wide)


def test_kinds_of_files(root):
    colour = save(root / "test/scratch/0.png", np.random.default_rng(5).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    expect(root, "warning", "of different kinds: 1 8-bit colour PNG, 15 8-bit grey PNG. Save all in one way", colour)


def test_deep_images_and_their_white(root):
    deep = root / "train/good/0.png"
    save(deep, np.random.default_rng(5).integers(0, 3000, (40, 60)).astype(np.uint16))
    expect(root, "info", "1 images have more than 8 bit; 4095 is read as white", deep)
    bright = root / "test/good/0.png"
    save(bright, np.full((40, 60), 9000, np.uint16))
    expect(root, "warning", "expected values from 0 to 4095, but found 9000 to 9000", bright)


def test_blank_images(root):
    blank = save(root / "train/good/0.png", np.full((40, 60), 90, np.uint8))
    expect(root, "warning", "1 images are nearly blank: brightest and darkest differ by less than 16/255", blank)


def test_masks(root):
    truth = root / "ground_truth/scratch"
    save(truth / "0_mask.png", square(top=0))
    expect(root, "warning", "1 masks mark nothing. Mark the defect in white", truth / "0_mask.png")
    save(truth / "0_mask.png", square((20, 30)))
    expect(root, "warning", "1 masks differ in size from their image", truth / "0_mask.png")
    stray = save(truth / "7_mask.png", square())
    expect(root, "warning", "1 masks belong to no image. Name masks after their images", stray)
    (truth / "0_mask.png").write_bytes(b"")
    expect(
        root, "warning", r"0_mask\.png: expected an image, but the file is empty.* Mend the mask", truth / "0_mask.png"
    )
    (truth / "0_mask.png").unlink()
    expect(root, "warning", "1 defective images have no mask", root / "test/scratch/0.png")
    for mask in truth.iterdir():
        mask.unlink()
    expect(root, "info", "no test image has a mask. Only image metrics can be measured")


def test_masks_of_turned_photographs_fit_when_they_are_upright(root):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(root / "test/scratch/0.png", seed=200, size=(60, 40), exif=exif)
    assert not [text for text in run(root)[1] if "masks" in text]


def test_kinds_without_images(root):
    (root / "test/bent").mkdir()
    expect(root, "warning", "no images of bent. Add images or remove the folder", root / "test/bent")
    for index in range(2):
        (root / f"test/good/{index}.png").unlink()
    expect(root, "warning", "test has no good images. Evaluating needs both")


def test_resolution(tmp_path):
    for index in range(6):
        save(tmp_path / f"{index}.png", seed=index, size=(320, 320))
    expect(
        tmp_path, "warning", r"covers 10\.0 x 10\.0 photo pixels; defects less than about 30 .* Use --image-size 64 "
    )
    report = check(tmp_path, false_alarms=0.5, image_size=320)
    assert [f.advice for f in report.findings if "model pixel" in f.message] == [
        "A larger --image-size would show nothing more."
    ]


def test_settings_that_cannot_work_raise(root):
    with pytest.raises(ConfigError, match="positive multiple of 32 as image size, got 250; use 256"):
        check(root, image_size=250)
    with pytest.raises(ConfigError, match="false-alarm rate above 0 and below 1, got 2"):
        check(root, false_alarms=2)


@pytest.mark.skipif(not MTD.is_dir(), reason="the magnetic-tile data set is not here")
def test_real_tiles():
    report = check(MTD, image_size=256)
    assert report.can_train
    assert report.split["calibration"] >= 99
    assert report.shape == (288, 224)
    assert report.masks == sum(report.test.values()) - report.test["good"]
    assert [len(f.paths) for f in report.findings if f.message.endswith("masks mark nothing.")] == [4]
