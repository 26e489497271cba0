"""Magnetic Tile Defects as its authors publish it, or in MVTec layout: one category, "tile".

ROOT/MT_Free/Imgs/exp1_num_4727.jpg      good (with an empty mask beside it, which is not read)
ROOT/MT_Crack/Imgs/exp1_num_249594.jpg   defective, of the kind "crack"
ROOT/MT_Crack/Imgs/exp1_num_249594.png   where

In MVTec layout ROOT is the category, or a folder that holds it.

Huang, Qiu, Yuan: "Surface defect saliency of magnetic tile", The Visual Computer 2020. They give no split: of the good
images, sorted by name, every fifth (the 5th, 10th, ...) is for testing here, the others are for training.
"""

import os
from dataclasses import replace
from pathlib import Path

from ddad.data.folder import list_kinds, scan
from ddad.data.samples import GOOD, Dataset, Sample
from ddad.errors import DataError

CATEGORY = "tile"
KINDS = ("blowhole", "break", "crack", "fray", "uneven")
TEST_EVERY = 5


def list_categories(root: str | os.PathLike[str]) -> tuple[str, ...]:
    """The one category; raises DataError where neither layout is found."""
    _layout(Path(root))
    return (CATEGORY,)


def load_category(root: str | os.PathLike[str], category: str = CATEGORY) -> Dataset:
    """All of it; raises DataError where images or masks are missing, or kinds are others."""
    root = Path(root)
    folder = _layout(root)
    if folder:
        dataset = replace(scan(folder), category=category)
        kinds = {sample.kind for sample in dataset.test}
        if kinds != {GOOD, *KINDS}:  # MVTec AD has a category "tile", too
            raise DataError(
                f"{folder}: expected test images of the kinds {', '.join((GOOD, *KINDS))}, but found "
                f"{', '.join(sorted(kinds)) or 'none'}; name the folder of Magnetic Tile Defects."
            )
        return dataset
    good = [Sample(path, GOOD) for path in _images(root, "free")]
    test = good[TEST_EVERY - 1 :: TEST_EVERY]
    for kind in KINDS:
        for path in _images(root, kind):
            mask = path.with_suffix(".png")
            if not mask.is_file():
                raise DataError(f"{mask}: expected the mask of {path.name} here, but found none; download it again.")
            test.append(Sample(path, kind, mask))
    train = tuple(sample for index, sample in enumerate(good, start=1) if index % TEST_EVERY)
    return Dataset(root, category, train, tuple(test))


def _layout(root: Path) -> Path | None:
    """The category's folder where it is in MVTec layout; None in the authors' own."""
    kinds = list_kinds(root)
    if _folder("free") in kinds:
        return None
    if "train" in kinds:
        return root
    found = [root / kind for kind in kinds if (root / kind / "train" / GOOD).is_dir()]
    if len(found) == 1:
        return found[0]
    raise DataError(
        f"{root}: expected Magnetic Tile Defects, either its folders {', '.join(map(_folder, ('free', *KINDS)))}, or "
        f"one category in MVTec layout, but found {', '.join(kinds[:5]) or 'no folders'}; check the path."
    )


def _folder(kind: str) -> str:
    return f"MT_{kind.capitalize()}"


def _images(root: Path, kind: str) -> list[Path]:
    folder = root / _folder(kind) / "Imgs"
    images = sorted(path for path in folder.glob("*") if path.suffix.lower() == ".jpg" and path.name[0] != ".")
    if not images:
        raise DataError(f"{folder}: expected the JPEG images of {_folder(kind)} here, but found none; download them.")
    return images
