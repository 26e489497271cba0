"""pytest tests/test_samples.py"""

import hashlib
import math
import random
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ddad.conformal import images_needed
from ddad.data.samples import (
    CALIBRATION_LADDER,
    SELECT_FROM,
    Sample,
    content_hash,
    fingerprint,
    model_shape,
    split_good,
    split_hashes,
    spread,
)
from ddad.errors import ConfigError, DataError


def hashes(count, seed=0):
    return [hashlib.sha256(f"{seed} {index}".encode()).hexdigest() for index in range(count)]


def position(digest):
    return int(digest[:13], 16) / 16**13


many = st.builds(hashes, st.integers(5, 600), st.integers(0, 1000))
budgets = st.sampled_from([0.5, 0.1, 0.05, 0.02, 0.01])


def write(folder, count, prefix="part"):
    folder.mkdir(exist_ok=True)
    paths = []
    for index in range(count):
        paths.append(folder / f"{prefix}{index}.png")
        paths[-1].write_text(str(index))
    return paths


def test_sample_says_whether_it_is_anomalous():
    assert not Sample(Path("a.png"), "good").is_anomalous
    assert Sample(Path("a.png"), "scratch").is_anomalous


def test_hash_and_fingerprint(tmp_path):
    path = write(tmp_path, 1)[0]
    assert content_hash(path) == hashlib.sha256(b"0").hexdigest()
    digests = hashes(4)
    assert fingerprint(digests) == fingerprint([*reversed(digests), digests[0]])
    assert fingerprint(digests) != fingerprint(digests[:3])
    with pytest.raises(DataError, match=r"none\.png: expected a readable file, but No such file.*; check the path"):
        content_hash(tmp_path / "none.png")


@given(digests=many, false_alarms=budgets)
def test_parts_are_disjoint_complete_and_none_is_empty(digests, false_alarms):
    train, select, calibration = split_hashes(digests, false_alarms)
    assert sorted([*train, *select, *calibration]) == sorted(digests)
    assert 2 * len(train) >= len(digests)
    assert min(len(select), len(calibration)) >= max(1, len(digests) // 20)
    assert train == sorted(train)


@given(digests=many, false_alarms=budgets, seed=st.integers(0, 100))
def test_order_of_the_images_does_not_matter(digests, false_alarms, seed):
    shuffled = random.Random(seed).sample(digests, len(digests))
    assert split_hashes(shuffled, false_alarms) == split_hashes(digests, false_alarms)


@settings(max_examples=50)
@given(seed=st.integers(0, 1000), old=st.integers(200, 400), new=st.integers(1, 200))
def test_old_images_keep_their_part_when_images_are_added(seed, old, new):
    # A budget that one image satisfies: the fraction stays 0.1. No bound acts.
    digests = hashes(old + new, seed)
    for some in (digests[:old], digests):
        assume(sum(position(digest) < CALIBRATION_LADDER[0] for digest in some) >= len(some) // 20)
        assume(sum(position(digest) >= SELECT_FROM for digest in some) >= len(some) // 20)
    for before, after in zip(split_hashes(digests[:old], 0.5), split_hashes(digests, 0.5), strict=True):
        assert set(before) <= set(after)


@given(digests=many, false_alarms=budgets)
def test_calibration_takes_what_the_budget_needs_where_train_keeps_half(digests, false_alarms):
    train, select, calibration = split_hashes(digests, false_alarms)
    n, needed = len(digests), images_needed(false_alarms)
    reachable = sum(position(digest) < CALIBRATION_LADDER[-1] for digest in digests)
    if min(reachable, n // 2 - len(select)) >= needed:
        assert len(calibration) >= needed
    # Except where a bound acts, hash values alone decide.
    assert max(map(position, calibration)) < min(map(position, train)) < max(map(position, train))
    if n // 20 < sum(position(digest) >= SELECT_FROM for digest in digests) < n // 4:
        assert set(select) == {digest for digest in digests if position(digest) >= SELECT_FROM}


def test_usual_proportions():
    sizes = [len(part) for part in split_hashes(hashes(2000), 0.01)]
    assert sizes == pytest.approx([1600, 200, 200], abs=40)
    sizes = [len(part) for part in split_hashes(hashes(300), 0.01)]  # 99 are needed: 0.4 of 300
    assert sizes == pytest.approx([150, 30, 120], abs=20)


def test_renaming_does_not_matter_and_copies_are_no_further_evidence(tmp_path):
    paths = write(tmp_path / "a", 40)
    copies = write(tmp_path / "b", 40, prefix="copy")
    assert split_good([*copies, *paths], 0.1) == split_good(paths, 0.1)
    only_first, only_second = split_good(paths, 0.1), split_good(reversed(copies), 0.1)
    for part in ("train", "select", "calibration"):
        first, second = getattr(only_first, part), getattr(only_second, part)
        assert [path.read_text() for path in first] == [path.read_text() for path in second]
        assert [content_hash(path) for path in first] == sorted(content_hash(path) for path in first)


def test_too_few_different_images(tmp_path):
    assert len(split_good(write(tmp_path, 5), 0.01).train) == 3
    paths = [*write(tmp_path / "a", 4), *write(tmp_path / "b", 4)]  # 8 files, 4 images
    with pytest.raises(
        DataError, match="expected at least 5 different images of good parts, but found 4; add photographs of good"
    ):
        split_good(paths, 0.01)


@pytest.mark.parametrize(
    ("sizes", "image_size", "shape"),
    [
        ([(100, 100)], 256, (256, 256)),
        ([(480, 640)] * 3, 256, (224, 288)),
        ([(100, 400)], 256, (128, 512)),
        ([(400, 100)], 256, (512, 128)),
        ([(100, 100), (100, 100), (10, 1000)], 64, (64, 64)),  # one odd image does not count
        ([(1, 10000)], 64, (32, 6400)),
    ],
)
def test_shape_from_the_median_aspect(sizes, image_size, shape):
    if shape == (32, 6400):
        height, width = model_shape(sizes, image_size)
        assert height == 32
        assert width % 32 == 0
    else:
        assert model_shape(sizes, image_size) == shape


@given(
    sizes=st.lists(st.tuples(st.integers(100, 400), st.integers(100, 400)), min_size=1, max_size=20),
    image_size=st.integers(4, 20).map(lambda cells: cells * 32),
)
def test_shape_keeps_area_and_aspect(sizes, image_size):
    height, width = model_shape(sizes, image_size)
    assert height % 32 == width % 32 == 0
    assert height * width == pytest.approx(image_size**2, rel=0.35)
    ratios = sorted(w / h for h, w in sizes)
    middle = math.sqrt(ratios[(len(ratios) - 1) // 2] * ratios[len(ratios) // 2])
    assert abs(math.log(width / height / middle)) < 0.45


@pytest.mark.parametrize(("wrong", "use"), [(250, 256), (0, 32), (-64, 32), (100, 96), (31, 32)])
def test_image_size_must_be_a_multiple_of_32(wrong, use):
    with pytest.raises(ConfigError) as caught:
        model_shape([(10, 10)], wrong)
    assert str(caught.value) == f"expected a positive multiple of 32 as image size, got {wrong}; use {use}."
    with pytest.raises(DataError, match="expected the size of at least 1 good image, but found none"):
        model_shape([], 64)


def test_images_are_spread_evenly():
    assert spread([f"{i}" for i in range(10)], 5) == ["0", "2", "4", "6", "8"]
    assert spread(["a"], 5) == ["a"]
