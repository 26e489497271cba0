"""MVTec AD as released, and any other folder whose sub-folders are categories in its layout.

ROOT/carpet/train/good/000.png
ROOT/carpet/test/good/000.png
ROOT/carpet/test/cut/000.png
ROOT/carpet/ground_truth/cut/000_mask.png
"""

import os
from pathlib import Path

from ddad.data.folder import list_kinds, scan
from ddad.data.samples import GOOD, Dataset
from ddad.errors import DataError

CATEGORIES = (
    "carpet", "grid", "leather", "tile", "wood", "bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill", "screw",
    "toothbrush", "transistor", "zipper",
)  # fmt: skip
"""The published categories, in the paper's order."""


def list_categories(root: str | os.PathLike[str]) -> tuple[str, ...]:
    """Those of the 15 that are there; raises DataError where none is."""
    root = Path(root)
    kinds = list_kinds(root)
    found = tuple(category for category in CATEGORIES if category in kinds)
    if not found:
        advice = f"name the folder that holds {root.resolve().name}" if "train" in kinds else "check the path"
        raise DataError(
            f"{root}: expected MVTec AD's folders ({', '.join(CATEGORIES[:3])}, ...), but found "
            f"{_shown(kinds)}; {advice}, or choose the data set `folder` for categories of other names."
        )
    return found


def load_category(root: str | os.PathLike[str], category: str) -> Dataset:
    """One category; raises DataError where its layout is another one."""
    folder = Path(root) / category
    if not (folder / "train" / GOOD).is_dir():
        raise DataError(
            f"{folder}: expected good images in {category}/train/good, but there is no such folder; "
            "unpack the data set again, or leave this category out."
        )
    return scan(folder)


def list_folders(root: str | os.PathLike[str]) -> tuple[str, ...]:
    """Categories of any names in MVTec layout, sorted: sub-folders with `train/good`, or ROOT itself if it has one."""
    root = Path(root)
    kinds = list_kinds(root)
    if "train" in kinds:
        return (root.resolve().name,)
    found = tuple(kind for kind in kinds if (root / kind / "train" / GOOD).is_dir())
    if not found:
        raise DataError(
            f"{root}: expected folders of categories with train/good in each, but found {_shown(kinds)}; "
            "check the path, or move the good images of each category to <category>/train/good."
        )
    return found


def load_folder(root: str | os.PathLike[str], category: str) -> Dataset:
    """One of `list_folders`; raises DataError like `scan`."""
    root = Path(root)
    return scan(root) if "train" in list_kinds(root) else load_category(root, category)


def _shown(kinds: list[str]) -> str:
    return "no folders" if not kinds else ", ".join(kinds[:5]) + (", ..." if len(kinds) > 5 else "")
