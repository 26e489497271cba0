"""pytest tests/test_visa.py"""

import re

import numpy as np
import pytest
from PIL import Image

from ddad.data.demo import render_part
from ddad.data.samples import Sample
from ddad.data.visa import CATEGORIES, list_categories, load_category
from ddad.errors import DataError
from ddad.images import read_image, read_mask

HEADER = "object,split,label,image,mask"


def write_category(root, category):
    """JPEG photographs and masks of class ids, as released; returns the rows of the split."""
    rows = []
    for index in range(4):
        defective = index == 3
        image, mask = render_part(np.random.default_rng(index), "stain" if defective else None, size=32)
        folder, stem = ("Anomaly", "000") if defective else ("Normal", f"{index:04d}")
        path = root / category / "Data/Images" / folder / f"{stem}.JPG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path, "JPEG")
        row = [category, "test" if index >= 2 else "train", "anomaly" if defective else "normal"]
        row += [path.relative_to(root).as_posix(), ""]
        if defective:
            truth = root / category / "Data/Masks/Anomaly/000.png"
            truth.parent.mkdir(parents=True)
            ids = mask.astype(np.uint8)
            ids[::2] *= 4  # a second class
            Image.fromarray(ids).save(truth)
            row[-1] = truth.relative_to(root).as_posix()
        rows.append(",".join(row))
    return rows


def write_split(root, rows, header=HEADER):
    path = root / "split_csv/1cls.csv"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


@pytest.fixture
def root(tmp_path):
    rows = [row for category in ("pcb1", "candle") for row in write_category(tmp_path, category)]
    # A category of the split whose folder was not unpacked.
    write_split(tmp_path, [*rows, "cashew,train,normal,cashew/Data/Images/Normal/000.JPG,"])
    return tmp_path


def test_the_released_layout(root):
    assert list_categories(root) == ("candle", "pcb1")
    dataset = load_category(root, "candle")
    images = root / "candle/Data/Images"
    assert dataset.category == "candle"
    assert dataset.train == tuple(Sample(images / f"Normal/000{index}.JPG", "good") for index in (0, 1))
    mask = root / "candle/Data/Masks/Anomaly/000.png"
    assert dataset.test == (
        Sample(images / "Normal/0002.JPG", "good"),
        Sample(images / "Anomaly/000.JPG", "anomaly", mask),
    )
    assert read_image(dataset.test[1].path).shape == (32, 32, 3)
    ids = np.asarray(Image.open(mask))
    assert set(np.unique(ids)) == {0, 1, 4}
    np.testing.assert_array_equal(read_mask(mask), ids > 0)


def test_there_are_twelve():
    assert len(set(CATEGORIES)) == 12


def test_a_missing_file_is_named(root):
    lost = root / "candle/Data/Masks/Anomaly/000.png"
    lost.unlink()
    (root / "candle/Data/Images/Normal/0001.JPG").unlink()
    expected = (
        f"{root}/candle/Data/Images/Normal/0001.JPG: expected this file of VisA, which split_csv/1cls.csv lists, but "
        "there is none (2 files of candle are missing); unpack the archive again, or leave candle out."
    )
    with pytest.raises(DataError, match=f"^{re.escape(expected)}$"):
        load_category(root, "candle")
    assert len(load_category(root, "pcb1").train) == 2


def test_no_split_and_no_categories(root, tmp_path):
    with pytest.raises(DataError, match=r"none/split_csv/1cls.csv: expected VisA's one-class split at this place, but"):
        list_categories(tmp_path / "none")
    write_split(root, ["other,train,normal,other/0.JPG,"])
    with pytest.raises(DataError, match=r"expected VisA's folders \(candle, capsules, cashew, ...\) beside split_csv"):
        list_categories(root)


@pytest.mark.parametrize(
    ("header", "row", "words"),
    [
        (
            "object;split;label",
            "candle;train;normal",
            "expected the columns object, split, label, image, mask, but found obj",
        ),
        (HEADER, "candle,val,normal,a.JPG,", "but line 2 has 'val' and 'normal'; unpack it again."),
        (HEADER, "candle,test,broken,a.JPG,", "but line 2 has 'test' and 'broken'"),
        (
            HEADER,
            "candle,train,anomaly,a.JPG,",
            "with only normal images to train on, but line 2 has 'train' and 'anom",
        ),
        (HEADER, "candle,test", "but line 2 has 'test' and ''"),
    ],
)
def test_another_table_is_refused(header, row, words, root):
    path = write_split(root, [row], header)
    with pytest.raises(DataError, match=re.escape(words)) as caught:
        load_category(root, "candle")
    assert str(caught.value).startswith(str(path))
