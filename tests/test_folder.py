"""pytest tests/test_folder.py"""

import re
from pathlib import Path

import pytest

from ddad.data.folder import scan
from ddad.data.samples import Sample
from ddad.errors import DataError
from ddad.images import list_images

MTD = Path(__file__).resolve().parents[2] / "shared/data/mtd/tile"


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()  # scan opens nothing
    return root


def test_images_are_listed_by_ending_sorted_and_without_hidden_ones(tmp_path):
    touch(tmp_path, "b.PNG", "a.jpeg", "z/c.Tiff", "notes.txt", ".hidden.png", ".cache/d.png", "__MACOSX/a.png")
    assert [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)] == ["a.jpeg", "b.PNG", "z/c.Tiff"]


def test_plain_folder_is_all_good(tmp_path):
    root = touch(tmp_path / "bolt", "1.png", "monday/2.webp")
    dataset = scan(root)
    assert dataset.category == "bolt"
    assert dataset.train == (Sample(root / "1.png", "good"), Sample(root / "monday/2.webp", "good"))
    assert dataset.test == ()
    assert len(scan(touch(tmp_path / "nut", "good/1.png")).train) == 1


def test_category_is_the_folders_name_however_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(touch(tmp_path / "bolt", "1.png"))
    assert scan(".").category == "bolt"


def test_mvtec_layout(tmp_path):
    root = touch(
        tmp_path / "bolt",
        "train/good/000.png",
        "test/good/001.png",
        "test/scratch/000.jpg",
        "test/scratch/001.jpg",
        "test/scratch/002.jpg",
        "test/bent/deep/000.png",
        "test/bent/000.png",
        "ground_truth/scratch/000_mask.png",
        "ground_truth/scratch/001.png",
        "ground_truth/bent/deep/000_mask.png",
        "ground_truth/good/001_mask.png",
    )
    dataset = scan(root)
    truth = root / "ground_truth"
    assert dataset.train == (Sample(root / "train/good/000.png", "good"),)
    assert dataset.test == (
        Sample(root / "test/bent/000.png", "bent"),
        Sample(root / "test/bent/deep/000.png", "bent", truth / "bent/deep/000_mask.png"),
        Sample(root / "test/good/001.png", "good"),
        Sample(root / "test/scratch/000.jpg", "scratch", truth / "scratch/000_mask.png"),
        Sample(root / "test/scratch/001.jpg", "scratch", truth / "scratch/001.png"),
        Sample(root / "test/scratch/002.jpg", "scratch"),
    )


def test_test_and_masks_are_optional(tmp_path):
    assert scan(touch(tmp_path / "a", "train/good/0.png")).test == ()
    assert scan(touch(tmp_path / "b", "train/good/0.png", "test/bad/0.png")).test[0].mask is None


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "expected images of good parts (.png, .jpg, .jpeg, .bmp, .tif, .tiff, .webp), but found none; put"),
        (["a.gif"], "but found only other files such as a.gif; put photographs of good parts there."),
        (["train/0.png"], "expected good images in train/good, but train has no such folder; move the good images"),
        (["train/good/readme.md"], "but found only other files such as readme.md"),
        (
            ["tile/train/good/0.png", "wood/train/good/0.png"],
            "expected one category, but found 2 (tile, wood); name one of them, such as ROOT/tile, or "
            "train one network for all with --categories all.",
        ),
        (["test/bent/0.png"], "expected train/good beside test, but there is no train; put the good images into"),
        (
            ["good/0.png", "bad/0.png"],
            "expected good images only, but found folders good, bad; name ROOT/good, or move the images to train/good",
        ),
        (
            ["train/good/0.png", "test/0.png"],
            "expected test images in test/good or test/<defect>, but found 1 directly",
        ),
    ],
)
def test_other_layouts_are_refused_with_a_way_out(names, words, tmp_path):
    root = touch(tmp_path, *names)
    with pytest.raises(DataError, match=re.escape(words.replace("ROOT", str(root)))) as caught:
        scan(root)
    assert str(caught.value).startswith(str(root))


def test_missing_folder_and_file(tmp_path):
    with pytest.raises(DataError, match="none: expected a folder of images, but there is none of this name; check"):
        scan(tmp_path / "none")
    touch(tmp_path, "a.png")
    with pytest.raises(DataError, match=r"a\.png: expected a folder of images, but found a file; name the folder"):
        scan(tmp_path / "a.png")


@pytest.mark.skipif(not MTD.is_dir(), reason="the magnetic-tile data set is not here")
def test_real_tiles():
    dataset = scan(MTD)
    assert dataset.category == "tile"
    assert len(dataset.train) > 700
    assert {sample.kind for sample in dataset.test} == {"good", "blowhole", "break", "crack", "fray", "uneven"}
    assert all((sample.mask is not None) == sample.is_anomalous for sample in dataset.test)
