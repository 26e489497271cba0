"""What a data set is, how its good images are split, and the shape the model works at."""

import hashlib
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import TypeVar

from ddad.conformal import images_needed
from ddad.errors import ConfigError, DataError
from ddad.files import sha256

Item = TypeVar("Item")

GOOD = "good"
MIN_GOOD = 5  # different good images that a split needs
SHAPE_MULTIPLE = 32  # five halvings in the U-Net

SELECT_FROM = 0.9
SPLIT_FROM = 100  # good images; with fewer, and too few to rank for the rate, select and calibration are one
FOLDED_FROM = 16  # of these
CALIBRATION_LADDER = (0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4)


@dataclass(frozen=True)
class Sample:
    """One image: `kind` is "good" or the name of the defect, `mask` the picture that marks it, where there is one."""

    path: Path
    kind: str
    mask: Path | None = None

    @property
    def is_anomalous(self) -> bool:
        return self.kind != GOOD


@dataclass(frozen=True)
class Dataset:
    """One category: good images to train on, and images to test on, of which there may be none."""

    root: Path
    category: str
    train: tuple[Sample, ...]
    test: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class Split:
    """Good images by use: `train` fits networks, `select` fits statistics and choices, `calibration` ranks scores."""

    train: tuple[Path, ...]
    select: tuple[Path, ...]
    calibration: tuple[Path, ...]
    hashes: dict[Path, str] = field(default_factory=dict, repr=False)
    """Content hash of each of these images."""


def content_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the file's bytes, in hex. Raises DataError when it cannot be read."""
    try:
        return sha256(Path(path))
    except OSError as error:
        raise DataError(
            f"{os.fspath(path)}: expected a readable file, but {error.strerror or error}; check the path."
        ) from error


def paths_by_hash(paths: Iterable[str | os.PathLike[str]]) -> dict[str, Path]:
    """Different files by their content; of identical ones the first by name. Raises DataError like `content_hash`."""
    by_hash: dict[str, Path] = {}
    for path in sorted(Path(path) for path in paths):
        by_hash.setdefault(content_hash(path), path)
    return by_hash


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of these, evenly spread over all of them."""
    return [items[i * len(items) // min(count, len(items))] for i in range(min(count, len(items)))]


def fingerprint(hashes: Iterable[str]) -> str:
    """One hash for a set of content hashes, whatever their order and however often each occurs."""
    return hashlib.sha256("\n".join(sorted(set(hashes))).encode()).hexdigest()


def split_good(paths: Iterable[str | os.PathLike[str]], false_alarms: float) -> Split:
    """Split good images into train, select and calibration, about 80/10/10, by content alone.

    Each file's hash is a number u in [0, 1): calibration takes u < f, select u >= 0.9, train the rest. So renamed
    files, and old files when new ones come, keep their part. Of identical files, which are no further evidence, the
    first by name stands for all. f is the smallest of `CALIBRATION_LADDER` that gives calibration
    `images_needed(false_alarms)` different images; 0.1 if none does. Two bounds go before: train keeps at least half of
    all (so calibration ends earlier), and calibration and select get at least max(1, n // 20) each (so in small sets
    they reach further). Images move only when f changes or a bound acts.

    Order inside a part is by hash. Raises DataError below `MIN_GOOD` different images or for unreadable files,
    ConfigError unless 0 < false_alarms < 1.
    """
    by_hash = paths_by_hash(paths)
    parts = split_hashes(list(by_hash), false_alarms)
    train, select, calibration = (tuple(by_hash[digest] for digest in part) for part in parts)
    return Split(train, select, calibration, {path: digest for digest, path in by_hash.items()})


def split_hashes(hashes: Sequence[str], false_alarms: float) -> tuple[list[str], list[str], list[str]]:
    """`split_good` on content hashes, all different: (train, select, calibration), each sorted."""
    needed = images_needed(false_alarms)
    ordered = sorted(hashes)  # also the order of u
    n = len(ordered)
    if n < MIN_GOOD:
        raise DataError(
            f"expected at least {MIN_GOOD} different images of good parts, but found {n}; "
            "add photographs of good parts."
        )
    position = [int(digest[:13], 16) / 16**13 for digest in ordered]
    least, spare = max(1, n // 20), n // 2  # at most `spare` images may leave train
    select = min(max(sum(u >= SELECT_FROM for u in position), least), spare - least)
    counts = [sum(u < fraction for u in position) for fraction in CALIBRATION_LADDER]
    counts = [min(max(count, least), spare - select) for count in counts]
    calibration = next((count for count in counts if count >= needed), counts[0])
    return ordered[calibration : n - select], ordered[n - select :], ordered[:calibration]


def too_few_to_split(good: int, select: int, calibration: int, false_alarms: float) -> bool:
    """Whether the images that were not trained on are too few for two sets, of which only one ranks.

    They then both give units and rank, in folds (`Detector.calibrate_across`), and nothing may be chosen by them. Fewer
    than `FOLDED_FROM` are left as two sets: in simulations folds of so few broke the promise.

    Args:
        good: all good images at hand.
        select, calibration: those among them that would give units, and rank.
    """
    return good < SPLIT_FROM and select + calibration >= FOLDED_FROM and calibration < images_needed(false_alarms)


def model_shape(sizes: Iterable[tuple[float, float]], image_size: int) -> tuple[int, int]:
    """One (height, width) for all images: median aspect ratio of `sizes`, area about image_size^2, multiples of 32.

    sizes: (height, width) of the good images, in pixels. Raises ConfigError unless image_size is a positive multiple
    of 32, DataError without sizes.
    """
    if image_size < SHAPE_MULTIPLE or image_size % SHAPE_MULTIPLE:
        nearest = max(1, round(image_size / SHAPE_MULTIPLE)) * SHAPE_MULTIPLE
        raise ConfigError(
            f"expected a positive multiple of {SHAPE_MULTIPLE} as image size, got {image_size}; use {nearest}."
        )
    stretches = [math.log(width / height) for height, width in sizes]
    if not stretches:
        raise DataError("expected the size of at least 1 good image, but found none; add photographs of good parts.")
    stretch = statistics.median(stretches)

    def neighbours(length: float) -> set[int]:
        cells = length / SHAPE_MULTIPLE
        return {max(1, cell) * SHAPE_MULTIPLE for cell in (math.floor(cells), math.ceil(cells))}

    def misfit(shape: tuple[int, int]) -> tuple[float, tuple[int, int]]:
        height, width = shape
        area, aspect = math.log(height * width / image_size**2), math.log(width / height)
        return round(abs(area) + abs(aspect - stretch), 9), shape  # the shape breaks ties

    heights, widths = (neighbours(image_size * math.exp(sign * stretch / 2)) for sign in (-1, 1))
    return min(product(heights, widths), key=misfit)
