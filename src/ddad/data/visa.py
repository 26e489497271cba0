"""VisA as released (VisA_20220922.tar), with its one-class split.

ROOT/split_csv/1cls.csv                      object,split,label,image,mask: one row an image, paths relative to ROOT
ROOT/candle/Data/Images/Normal/0000.JPG      good; the split says whether to train or to test on it
ROOT/candle/Data/Images/Anomaly/000.JPG      defective, of the one kind "anomaly"
ROOT/candle/Data/Masks/Anomaly/000.png       0, and small ids of defect classes, which `read_mask` knows
"""

import csv
import os
from pathlib import Path

from ddad.data.samples import GOOD, Dataset, Sample
from ddad.errors import DataError

CATEGORIES = (
    "candle", "capsules", "cashew", "chewinggum", "fryum", "macaroni1", "macaroni2", "pcb1", "pcb2", "pcb3", "pcb4",
    "pipe_fryum",
)  # fmt: skip
"""The published categories, in the paper's order."""

SPLIT = Path("split_csv") / "1cls.csv"
COLUMNS = ("object", "split", "label", "image", "mask")
KINDS = {"normal": GOOD, "anomaly": "anomaly"}


def list_categories(root: str | os.PathLike[str]) -> tuple[str, ...]:
    """Those of the 12 that the split lists and that have a folder; raises DataError where none does."""
    root = Path(root)
    listed = {row["object"] for row in _rows(root)}
    found = tuple(category for category in CATEGORIES if category in listed and (root / category).is_dir())
    if not found:
        raise DataError(
            f"{root}: expected VisA's folders ({', '.join(CATEGORIES[:3])}, ...) beside {SPLIT.parent}, but found "
            "none; unpack the whole archive there."
        )
    return found


def load_category(root: str | os.PathLike[str], category: str) -> Dataset:
    """One category; raises DataError where a row of the split is unknown or its file is missing."""
    root = Path(root)
    train: list[Sample] = []
    test: list[Sample] = []
    missing: list[Path] = []
    for number, row in enumerate(_rows(root), start=2):  # line 1 is the header
        if row["object"] != category:
            continue
        kind = KINDS.get(row["label"])
        if row["split"] not in ("train", "test") or kind is None or (row["split"] == "train" and kind != GOOD):
            raise DataError(
                f"{root / SPLIT}: expected a split train or test and a label normal or anomaly, with only normal "
                f"images to train on, but line {number} has {row['split']!r} and {row['label']!r}; unpack it again."
            )
        mask = root / row["mask"] if row["mask"] and kind != GOOD else None
        sample = Sample(root / row["image"], kind, mask)
        missing += [path for path in (sample.path, sample.mask) if path and not path.is_file()]
        (train if row["split"] == "train" else test).append(sample)
    if missing:
        raise DataError(
            f"{missing[0]}: expected this file of VisA, which {SPLIT} lists, but there is none ({len(missing)} files "
            f"of {category} are missing); unpack the archive again, or leave {category} out."
        )
    return Dataset(root / category, category, tuple(train), tuple(test))


def _rows(root: Path) -> list[dict[str, str]]:
    path = root / SPLIT
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            rows = list(reader)
    except OSError:
        raise DataError(
            f"{path}: expected VisA's one-class split at this place, but there is no such file; name the folder that "
            "holds split_csv, or choose the data set `folder` for a copy of VisA in MVTec layout."
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path}: expected a table of images, but it cannot be read ({error}); unpack it again."
        ) from None
    found = reader.fieldnames or ()
    if not set(COLUMNS) <= set(found):
        raise DataError(
            f"{path}: expected the columns {', '.join(COLUMNS)}, but found {', '.join(found) or 'none'}; "
            "unpack it again."
        )
    return rows
