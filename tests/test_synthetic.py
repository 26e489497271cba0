"""Synthetic defects. Run alone: pytest tests/test_synthetic.py"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from ddad.data.synthetic import (
    DEFECT_KINDS,
    JUST_VISIBLE,
    LARGEST_AREA,
    LARGEST_SHADE,
    add_defect,
    contact_sheet,
    defect_set,
    fractal_noise,
)
from ddad.errors import ConfigError, DataError


def surface(seed: int, height: int = 96, width: int = 128, *, grey: bool = False) -> np.ndarray:
    """A photograph-like surface: brushed grain under a brightness gradient."""
    rng = np.random.default_rng(seed)
    grain = ndimage.gaussian_filter(rng.normal(0, 30, (height, width)), (6, 0.7))
    brightness = 110 + grain + np.linspace(-30, 30, width)
    tint = np.ones(3) if grey else np.array([1.1, 1.0, 0.8])
    return np.clip(brightness[..., None] * tint, 0, 255).astype(np.uint8)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(DEFECT_KINDS),
    height=st.integers(32, 90),
    width=st.integers(32, 90),
    grey=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_mask_is_exactly_what_changed_visibly(kind: str, height: int, width: int, grey: bool, seed: int) -> None:
    image = surface(seed % 100, height, width, grey=grey)
    before = image.copy()
    result, mask = add_defect(image, np.random.default_rng(seed), kind, donor=surface(7, 50, 41))

    np.testing.assert_array_equal(image, before)  # the input is not written to
    assert result.dtype == np.uint8
    assert result.shape == image.shape
    difference = np.abs(result.astype(int) - image.astype(int)).max(axis=2)
    np.testing.assert_array_equal(mask, difference > JUST_VISIBLE)
    assert 4 <= mask.sum() <= (LARGEST_SHADE if kind == "shade" else LARGEST_AREA) * mask.size
    if grey:  # even though the donor is coloured
        assert (result == result[..., :1]).all()


@pytest.mark.parametrize("kind", DEFECT_KINDS)
def test_same_seed_same_defect_and_another_seed_another(kind: str) -> None:
    image = surface(0)
    first, second, other = (add_defect(image, np.random.default_rng(seed), kind)[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, second)
    assert (first != other).any()


@pytest.mark.parametrize("kind", DEFECT_KINDS)
@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_uniform_image_still_gets_a_visible_defect(kind: str, level: int) -> None:
    image = np.full((40, 33, 3), level, dtype=np.uint8)
    _, mask = add_defect(image, np.random.default_rng(0), kind)
    assert mask.sum() >= 4


def test_sizes_and_contrasts_range_from_subtle_to_clear() -> None:
    images = [surface(i, 128, 128) for i in range(3)]
    defects = defect_set(images, 160, seed=5)
    areas = np.array([d.mask.mean() for d in defects])
    contrasts = np.array([np.abs(d.image.astype(int) - images[d.source_index])[d.mask].mean() for d in defects])
    assert areas.min() < 0.002
    assert 0.003 < np.median(areas) < 0.03
    assert areas.max() > 0.05
    assert np.quantile(contrasts, 0.1) < 15
    assert np.quantile(contrasts, 0.9) > 30


def test_a_piece_goes_missing_at_the_outline_of_a_part_on_a_background() -> None:
    image = np.full((96, 96, 3), 20, dtype=np.uint8)
    image[24:72, 24:72] = surface(3, 48, 48)
    for seed in range(5):
        result, mask = add_defect(image, np.random.default_rng(seed), "missing")
        assert mask[22:74, 22:74].sum() == mask.sum()  # background is not bitten
        inner = np.zeros_like(mask)
        inner[28:68, 28:68] = True
        assert (mask & ~inner).any()
        assert abs(float(np.quantile(result[mask], 0.2)) - 20) < 12  # half of a small bite is its soft edge


def test_defects_lie_mostly_on_the_part() -> None:
    image = np.full((96, 96, 3), 20, dtype=np.uint8)
    image[24:72, 24:72] = surface(3, 48, 48)
    touching = [d.mask[24:72, 24:72].any() for d in defect_set([image], 64)]
    assert np.mean(touching) > 0.8  # a quarter of the picture is part


def test_a_piece_goes_missing_at_the_border_of_a_part_that_fills_the_picture() -> None:
    for seed in range(5):
        _, mask = add_defect(surface(3), np.random.default_rng(seed), "missing")
        mask[3:-3, 3:-3] = False
        assert mask.any()


def test_set_is_balanced_and_its_beginning_does_not_depend_on_its_length() -> None:
    images = [surface(i, 40 + i, 48) for i in range(4)]
    short, long = defect_set(images, 8, seed=3), defect_set(images, 24, seed=3)
    for kind in DEFECT_KINDS:
        assert sum(d.kind == kind for d in long) == 3
    for index in range(len(images)):
        assert sum(d.source_index == index for d in long) == 6
    for a, b in zip(short, long, strict=False):
        np.testing.assert_array_equal(a.image, b.image)
        np.testing.assert_array_equal(a.mask, b.mask)
        assert (a.kind, a.source_index) == (b.kind, b.source_index)
    assert [d.source_index for d in defect_set(images, 8, seed=4)] != [d.source_index for d in short]


def test_a_single_image_is_its_own_donor() -> None:
    assert [d.source_index for d in defect_set([surface(0)], 3)] == [0, 0, 0]


def test_fractal_noise_is_standardised_and_smooth() -> None:
    noise = fractal_noise((50, 70), np.random.default_rng(0))
    assert noise.shape == (50, 70)
    assert abs(noise.mean()) < 1e-4
    assert noise.std() == pytest.approx(1, abs=1e-3)
    assert np.abs(np.diff(noise, axis=0)).mean() < 0.2


def test_contact_sheet_outlines_masks_beside_them() -> None:
    images = [np.full((40, 50, 3), 90, dtype=np.uint8), np.full((30, 20, 3), 200, dtype=np.uint8)]
    mask = np.zeros((40, 50), dtype=bool)
    mask[15:20, 20:30] = True
    sheet = contact_sheet([*images, images[0]], [mask, None, None], columns=2)
    assert sheet.shape == (88, 108, 3)
    first = sheet[2:42, 2:52]
    red = (first == (255, 40, 40)).all(axis=2)
    assert red.any()
    assert not (red & mask).any()
    np.testing.assert_array_equal(first[~red], images[0][~red])
    np.testing.assert_array_equal(sheet[2:32, 56:76], images[1])


def test_what_cannot_be_painted_on_is_refused_with_what_was_found() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match=r"`image` as uint8 \(H, W, 3\), but got float64 \(40, 40, 3\)"):
        add_defect(np.zeros((40, 40, 3)), rng)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"at least 32 pixels, but got \(40, 31, 3\)"):
        add_defect(np.zeros((40, 31, 3), dtype=np.uint8), rng)
    with pytest.raises(DataError, match="`donor`"):
        add_defect(surface(0), rng, donor=surface(0)[..., 0])
    with pytest.raises(ConfigError, match="Unknown defect kind 'rust'; choose one of cutpaste"):
        add_defect(surface(0), rng, "rust")
    with pytest.raises(DataError, match="at least one good image"):
        defect_set([], 3)
    with pytest.raises(DataError, match="got 1 and 2"):
        contact_sheet([surface(0)], [None, None])
