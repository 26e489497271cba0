"""pytest tests/test_mtd.py"""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddad.data.demo import DEMO_DEFECTS, render_part
from ddad.data.mtd import KINDS, list_categories, load_category
from ddad.data.samples import Sample
from ddad.errors import DataError
from ddad.images import read_image, read_mask

REAL = Path(__file__).resolve().parents[2] / "shared/data/mtd/tile"


def write(folder, name, seed, kind=None):
    """A JPEG and the mask of the same stem beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    image, mask = render_part(np.random.default_rng(seed), kind, size=32)
    Image.fromarray(image).save(folder / f"{name}.jpg")
    Image.fromarray(mask.astype(np.uint8) * 255).save(folder / f"{name}.png")


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "Magnetic-tile-defect-datasets"
    for index in range(11):
        write(root / "MT_Free/Imgs", f"exp1_num_{100 + 7 * index}", index)
    for number, (kind, drawn) in enumerate(zip(KINDS, DEMO_DEFECTS, strict=True)):
        write(root / f"MT_{kind.capitalize()}/Imgs", "exp2_num_5", 50 + number, drawn)
    (root / "README.md").write_text("# data")
    return root


def test_the_authors_layout(root):
    assert list_categories(root) == ("tile",)
    dataset = load_category(root)
    assert dataset.category == "tile"
    free = sorted((root / "MT_Free/Imgs").glob("*.jpg"))
    assert [sample.path for sample in dataset.test[:2]] == [free[4], free[9]]  # the 5th and the 10th
    assert [sample.path for sample in dataset.train] == [free[i] for i in range(11) if i not in (4, 9)]
    assert {sample.kind for sample in (*dataset.train, *dataset.test[:2])} == {"good"}
    assert all(sample.mask is None for sample in (*dataset.train, *dataset.test[:2]))
    assert [sample.kind for sample in dataset.test[2:]] == list(KINDS)
    crack = root / "MT_Crack/Imgs/exp2_num_5"
    assert dataset.test[4] == Sample(crack.with_suffix(".jpg"), "crack", crack.with_suffix(".png"))
    assert read_image(dataset.test[4].path).shape == (32, 32, 3)
    assert all(read_mask(sample.mask).any() for sample in dataset.test[2:])


def test_mvtec_layout_is_the_category_or_holds_it(root, tmp_path):
    authors = load_category(root)
    tile = tmp_path / "mtd" / "tile"
    for part, samples in (("train", authors.train), ("test", authors.test)):
        for index, sample in enumerate(samples):
            copy = tile / part / sample.kind / f"{index}.jpg"
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(sample.path, copy)
            if sample.mask:
                truth = tile / "ground_truth" / sample.kind / f"{index}.png"
                truth.parent.mkdir(parents=True)
                shutil.copyfile(sample.mask, truth)
    for place in (tile, tile.parent):
        assert list_categories(place) == ("tile",)
        dataset = load_category(place)
        assert (dataset.category, len(dataset.train), len(dataset.test)) == ("tile", 9, 7)
        assert all((sample.mask is not None) == sample.is_anomalous for sample in dataset.test)
    shutil.rmtree(tile / "test/crack")  # so MVTec AD's own `tile` is not taken for it
    with pytest.raises(
        DataError, match=r"kinds good, blowhole, break, crack, fray, uneven, but found blowhole, break, f"
    ):
        load_category(tile)


def test_what_is_missing_is_said(root, tmp_path):
    (root / "MT_Fray/Imgs/exp2_num_5.png").unlink()
    expected = f"{root}/MT_Fray/Imgs/exp2_num_5.png: expected the mask of exp2_num_5.jpg here, but found none; download"
    with pytest.raises(DataError, match=re.escape(expected)):
        load_category(root)
    shutil.rmtree(root / "MT_Break")
    expected = f"{root}/MT_Break/Imgs: expected the JPEG images of MT_Break here, but found none; download them."
    with pytest.raises(DataError, match=re.escape(expected)):
        load_category(root)
    shutil.rmtree(root / "MT_Free")
    for place, found in ((root, "MT_Blowhole, MT_Crack, MT_Fray, MT_Uneven"), (tmp_path / "none", "no folders")):
        expected = (
            "either its folders MT_Free, MT_Blowhole, MT_Break, MT_Crack, MT_Fray, MT_Uneven, or one category in "
        )
        with pytest.raises(DataError, match=re.escape(expected) + f"MVTec layout, but found {found}; check the path."):
            list_categories(place)


@pytest.mark.skipif(not REAL.is_dir(), reason="the magnetic-tile data set is not here")
def test_real_tiles(tmp_path):
    """The copy in MVTec layout, put back into the authors' folders, gives the same split again."""
    expected = load_category(REAL.parent)
    for sample in (*expected.train, *expected.test):
        kind = "free" if sample.kind == "good" else sample.kind
        folder = tmp_path / f"MT_{kind.capitalize()}" / "Imgs"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / sample.path.name).symlink_to(sample.path)
        if sample.mask:
            (folder / sample.mask.name).symlink_to(sample.mask)

    def named(samples):
        return {(sample.kind, sample.path.name, sample.mask and sample.mask.name) for sample in samples}

    dataset = load_category(tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (762, 190 + 392)
    assert named(dataset.train) == named(expected.train)
    assert named(dataset.test) == named(expected.test)
