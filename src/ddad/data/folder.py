"""A folder in MVTec layout, or simply a folder of good images, as a `Dataset`.

ROOT/train/good/*.png                     good parts to train on
ROOT/test/good/*.png                      optional: more good parts
ROOT/test/scratch/007.png                 optional: parts with a defect of this kind
ROOT/ground_truth/scratch/007_mask.png    optional: where it is (007.png works too)
"""

import os
from pathlib import Path

from ddad.data.samples import GOOD, Dataset, Sample
from ddad.errors import DataError
from ddad.images import SUFFIXES, check_folder, is_hidden, list_images


def list_kinds(folder: Path) -> list[str]:
    """Names of the visible sub-folders, sorted; none where the folder does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def masks_by_image(folder: Path) -> dict[str, Path]:
    """Masks of one kind, by the image they belong to: its path inside test/<kind>, without the ending."""
    masks: dict[str, Path] = {}
    for path in list_images(folder) if folder.is_dir() else []:
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem.endswith("_mask"):
            masks[stem.removesuffix("_mask")] = path
        else:
            masks.setdefault(stem, path)
    return masks


def scan(root: str | os.PathLike[str]) -> Dataset:
    """List the images of one category; nothing is opened. The category is the folder's name.

    A folder with `train` in it is read in MVTec layout: `test` and `ground_truth` may be absent. Any other folder holds
    good images only, in sub-folders too. Raises DataError where the layout is neither, or has no good images.
    """
    root = check_folder(root)
    category = root.resolve().name
    kinds = list_kinds(root)
    if "train" not in kinds:
        _refuse_if_not_plain(root, kinds)
        return Dataset(root, category, tuple(Sample(path, GOOD) for path in _some_images(root)))

    if not (root / "train" / GOOD).is_dir():
        raise DataError(
            f"{root}: expected good images in train/good, but train has no such folder; move the good images there."
        )
    train = tuple(Sample(path, GOOD) for path in _some_images(root / "train" / GOOD))
    test_root = root / "test"
    loose = [path for path in list_images(test_root) if path.parent == test_root] if test_root.is_dir() else []
    if loose:
        raise DataError(
            f"{loose[0]}: expected test images in test/good or test/<defect>, but found {len(loose)} directly in test; "
            "move each into the folder of its kind."
        )
    test = []
    for kind in list_kinds(test_root):
        folder = test_root / kind
        masks = {} if kind == GOOD else masks_by_image(root / "ground_truth" / kind)
        for path in list_images(folder):
            test.append(Sample(path, kind, masks.get(path.relative_to(folder).with_suffix("").as_posix())))
    return Dataset(root, category, train, tuple(test))


def _some_images(folder: Path) -> list[Path]:
    images = list_images(folder)
    if not images:
        others = sorted(path.name for path in folder.rglob("*") if path.is_file() and not is_hidden(path.name))
        found = f"only other files such as {others[0]}" if others else "none"
        raise DataError(
            f"{folder}: expected images of good parts ({', '.join(SUFFIXES)}), but found {found}; "
            "put photographs of good parts there."
        )
    return images


def _refuse_if_not_plain(root: Path, kinds: list[str]) -> None:
    """A folder without `train` counts as good images, all of it: not where its sub-folders say otherwise."""
    categories = [kind for kind in kinds if (root / kind / "train" / GOOD).is_dir()]
    if categories:
        shown = ", ".join(categories[:5]) + (", ..." if len(categories) > 5 else "")
        raise DataError(
            f"{root}: expected one category, but found {len(categories)} ({shown}); name one of them, such as "
            f"{root / categories[0]}, or train one network for all with --categories all."
        )
    if "test" in kinds or "ground_truth" in kinds:
        raise DataError(
            f"{root}: expected train/good beside test, but there is no train; put the good images into train/good."
        )
    marked = [kind for kind in kinds if kind.lower() in (GOOD, "ok")]
    others = [kind for kind in kinds if kind not in marked and list_images(root / kind)]
    if marked and others:
        raise DataError(
            f"{root}: expected good images only, but found folders {', '.join([*marked, *others][:5])}; name "
            f"{root / marked[0]}, or move the images to train/good and test/<defect>."
        )
