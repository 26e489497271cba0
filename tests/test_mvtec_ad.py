"""pytest tests/test_mvtec_ad.py"""

import re

import numpy as np
import pytest
from PIL import Image

from ddad.data.demo import render_part
from ddad.data.mvtec_ad import CATEGORIES, list_categories, list_folders, load_category, load_folder
from ddad.data.samples import Sample
from ddad.errors import DataError
from ddad.images import read_image, read_mask


def write_category(folder):
    """Real files: two good parts to train on, one to test on, one scratched."""
    for name, kind in {
        "train/good/000": None,
        "train/good/001": None,
        "test/good/000": None,
        "test/cut/000": "scratch",
    }.items():
        image, mask = render_part(np.random.default_rng([7, len(name)]), kind, size=32)
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
        if kind:
            truth = folder / "ground_truth/cut/000_mask.png"
            truth.parent.mkdir(parents=True)
            Image.fromarray(mask.astype(np.uint8) * 255).save(truth)


@pytest.fixture
def root(tmp_path):
    for category in ("wood", "bottle", "mine"):
        write_category(tmp_path / category)
    return tmp_path


def test_a_released_category(root):
    assert list_categories(root) == ("wood", "bottle")  # the paper's order; `mine` is none of them
    dataset = load_category(root, "wood")
    assert dataset.category == "wood"
    assert [sample.path.name for sample in dataset.train] == ["000.png", "001.png"]
    assert dataset.test == (
        Sample(root / "wood/test/cut/000.png", "cut", root / "wood/ground_truth/cut/000_mask.png"),
        Sample(root / "wood/test/good/000.png", "good"),
    )
    assert read_image(dataset.test[0].path).shape == (32, 32, 3)
    assert read_mask(dataset.test[0].mask).any()


def test_there_are_fifteen():
    assert len(set(CATEGORIES)) == 15


def test_categories_of_any_names(root):
    assert list_folders(root) == ("bottle", "mine", "wood")
    assert load_folder(root, "mine").category == "mine"
    assert list_folders(root / "mine") == ("mine",)
    assert load_folder(root / "mine", "mine") == load_folder(root, "mine")


def test_what_is_missing_is_said(root, tmp_path):
    (tmp_path / "wood/train/good").rename(tmp_path / "wood/train/fine")
    expected = f"{root / 'wood'}: expected good images in wood/train/good, but there is no such folder; unpack"
    with pytest.raises(DataError, match=re.escape(expected)):
        load_category(root, "wood")
    expected = (
        f"{root / 'mine'}: expected MVTec AD's folders (carpet, grid, leather, ...), but found ground_truth, test, "
    )
    with pytest.raises(DataError, match=re.escape(expected) + "train; name the folder that holds mine"):
        list_categories(root / "mine")
    with pytest.raises(DataError, match="but found no folders; check the path, or choose the data set `folder`"):
        list_categories(root / "nowhere")
    with pytest.raises(DataError, match="expected folders of categories with train/good in each, but found no folders"):
        list_folders(root / "nowhere")
