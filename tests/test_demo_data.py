"""Rendered demo parts. Run alone: pytest tests/test_demo_data.py"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from ddad.data.demo import DEMO_DEFECTS, MASK_LIMIT, render_part, write_demo_dataset
from ddad.errors import ConfigError, DataError

SIZE = 64


def read(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("demo") / "parts"
    return write_demo_dataset(root, train=60, good=40, defective=42, size=SIZE)


def test_layout_is_that_of_mvtec(demo: Path) -> None:
    assert sorted(path.name for path in demo.iterdir()) == ["demo.json", "ground_truth", "test", "train"]
    assert read(demo / "train/good").shape == (60, SIZE, SIZE, 3)
    assert read(demo / "test/good").shape == (40, SIZE, SIZE, 3)
    assert sorted(path.name for path in (demo / "test").iterdir()) == sorted([*DEMO_DEFECTS, "good"])
    for kind, count in zip(DEMO_DEFECTS, (9, 9, 8, 8, 8), strict=True):
        images = sorted(path.stem for path in (demo / "test" / kind).iterdir())
        masks = sorted(path.stem for path in (demo / "ground_truth" / kind).iterdir())
        assert len(images) == count
        assert masks == [f"{stem}_mask" for stem in images]
        pixels = read(demo / "ground_truth" / kind)
        assert set(np.unique(pixels)) == {0, 255}
        assert (pixels.reshape(count, -1) == 255).any(axis=1).all()
    assert not list(demo.parent.glob(".unfinished*"))


def test_comparing_with_the_average_good_part_does_not_find_the_defects(demo: Path) -> None:
    mean = read(demo / "train/good").astype(np.float64).mean(axis=0)
    good = ((read(demo / "test/good") - mean) ** 2).mean(axis=(1, 2, 3))
    bad = np.concatenate([((read(demo / "test" / kind) - mean) ** 2).mean(axis=(1, 2, 3)) for kind in DEMO_DEFECTS])
    labels = np.repeat([0, 1], [len(good), len(bad)])
    assert roc_auc_score(labels, np.concatenate([good, bad])) < 0.8


@pytest.mark.parametrize("kind", DEMO_DEFECTS)
def test_mask_is_where_the_same_part_looks_different(kind: str) -> None:
    for seed in range(4):
        image, mask = render_part(np.random.default_rng(seed), kind, size=128)
        good, empty = render_part(np.random.default_rng(seed), size=128)
        assert not empty.any()
        difference = np.abs(image.astype(int) - good.astype(int)).max(axis=2)
        assert difference[~mask].max() <= MASK_LIMIT + 1  # 1 for rounding
        assert difference[mask].mean() > 15
        assert 0.001 < mask.mean() < 0.05
        assert ndimage.binary_erosion(mask).any()  # at least three pixels across somewhere


def test_rendering_is_repeatable_and_parts_differ() -> None:
    first, second, other = (render_part(np.random.default_rng(seed), "chip", size=48)[0] for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first.astype(int) - other).mean() > 5


def test_writing_again_keeps_the_same_data_set_and_refuses_to_mix(tmp_path: Path) -> None:
    root = tmp_path / "parts"
    small = {"train": 2, "good": 1, "defective": 5, "size": 32}
    root.mkdir()
    assert write_demo_dataset(root, **small) == root
    image = root / "train/good/000.png"
    written = image.stat().st_mtime_ns
    write_demo_dataset(root, **small)
    assert image.stat().st_mtime_ns == written
    with pytest.raises(DataError, match="already holds other files; give an empty or new folder"):
        write_demo_dataset(root, **small, seed=1)
    again = write_demo_dataset(tmp_path / "again", **small)
    assert image.read_bytes() == (again / "train/good/000.png").read_bytes()


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ConfigError, match="Unknown demo defect 'rust'; choose one of chip"):
        render_part(np.random.default_rng(0), "rust")
    with pytest.raises(ConfigError, match="at least 32 pixels, but got 8"):
        render_part(np.random.default_rng(0), size=8)
