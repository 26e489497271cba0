"""One network for many categories: a class-conditional U-Net, one feature extractor, and a calibration a category.

family.json                                       categories with their labels, shape, settings, training, file hashes
unet/, scheduler/, features/                      once, as in a model folder
categories/<name>/detector.json                   calibration, image rule and data of the category
categories/<name>/statistics.safetensors          what its good parts show at each place
gallery.safetensors                               pooled features of good photographs, by which a category is recognised

Each category is drawn equally often in training, keeps a threshold and a promise of its own, and is judged by an
ordinary `Detector` that shares the networks. The features are not adapted: they would have to fit all products at once.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from ddad.card import family_card
from ddad.config import parse_settings
from ddad.detector import (
    CARD,
    FAMILY,
    Detector,
    load_networks,
    load_record,
    package_versions,
    read_record,
    save_networks,
)
from ddad.errors import ConfigError, DataError, ModelError
from ddad.files import atomic_folder, check_place, sha256, write_json, write_text
from ddad.prediction import ImageSource, Inspector, Photo, Prediction
from ddad.sampling import to_unit
from ddad.unet import choose_device

FORMAT_VERSION = 1
GALLERY = "gallery.safetensors"
LOG = "training.jsonl"
_OF_THE_FOLDER = ("format_version", "categories", "shape", "settings", "versions", "files")
_UNHASHED = (FAMILY, CARD, LOG)


class Family(Inspector):
    """Photographs of several products in, predictions out; each photograph is judged as one of the categories."""

    def __init__(
        self,
        detectors: Mapping[str, Detector],
        gallery: Mapping[str, Tensor],
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """
        Args:
            detectors: by category, all with the same networks and shape.
            gallery: by category, features of good photographs as of `pooled`, (N, C).
            record: what `family.json` says of the training.
        """
        self._detectors = dict(detectors)
        first = self._first
        self.unet, self.scheduler, self.features = first.unet, first.scheduler, first.features
        self.shape, self.image_rule, self.device = first.shape, first.image_rule, first.device
        self.gallery = {name: gallery[name].to(self.device) for name in self._detectors}
        self.record = dict(record or {})

    @property
    def _first(self) -> Detector:
        return next(iter(self._detectors.values()))

    @property
    def categories(self) -> tuple[str, ...]:
        """In the order of their labels."""
        return tuple(self._detectors)

    @property
    def is_calibrated(self) -> bool:
        """Whether each category is."""
        return all(detector.is_calibrated for detector in self._detectors.values())

    def detector(self, category: str) -> Detector:
        """The detector of one category, which shares the networks; `save_pretrained` makes a model of its own of it.

        Raises:
            ConfigError: there is no such category.
        """
        if category not in self._detectors:
            raise ConfigError(f"Expected a category among {', '.join(self.categories)}, found {category!r}.")
        return self._detectors[category]

    def infer_category(self, photo: ImageSource) -> str:
        """The category whose good photographs look most like this one; raises DataError where it cannot be read."""
        read = self._read(photo)
        if isinstance(read, DataError):
            raise read
        return self.infer_categories([read.image])[0]

    def infer_categories(self, images: Sequence[np.ndarray]) -> list[str]:
        """The category of each image (uint8, model shape): that of its nearest neighbour in the gallery, by cosine."""
        found = pooled(self._first, images)
        nearest = [(found @ remembered.T).amax(dim=1) for remembered in self.gallery.values()]
        return [self.categories[index] for index in torch.stack(nearest).argmax(dim=0).tolist()]

    def predict_photos(self, batch: Sequence[Photo]) -> list[Prediction]:
        """Inspect photographs that are read already, each as its category, or as the one it looks like."""
        unknown = [photo.image for photo in batch if photo.category is None]
        inferred = iter(self.infer_categories(unknown) if unknown else ())
        found = [photo.category or next(inferred) for photo in batch]
        results: dict[int, Prediction] = {}
        for category in dict.fromkeys(found):
            places = [place for place, one in enumerate(found) if one == category]
            predictions = self.detector(category).predict_photos([batch[place] for place in places])
            results |= zip(places, predictions, strict=True)
        return [results[place] for place in range(len(batch))]

    @overload
    def predict(self, images: ImageSource, batch_size: int = ..., *, category: str | None = ...) -> Prediction: ...  # type: ignore[overload-overlap]
    @overload
    def predict(
        self, images: Sequence[ImageSource], batch_size: int = ..., *, category: str | None = ...
    ) -> list[Prediction]: ...
    def predict(
        self, images: ImageSource | Sequence[ImageSource], batch_size: int = 4, *, category: str | None = None
    ) -> Prediction | list[Prediction]:
        """`Inspector.predict`, each photograph as the category it looks like, or all as the one that is given."""
        if category is not None:
            return self.detector(category).predict(images, batch_size)
        return super().predict(images, batch_size)

    def save_pretrained(self, folder: str | Path, extra: Mapping[str, Path] | None = None) -> None:
        """Write the family's folder, without pickle; replaces an older family of this name.

        Args:
            folder: where to; written under a temporary name first, then renamed.
            extra: other files to copy into it, by name.

        Raises:
            ConfigError: the folder is there and holds something else.
        """
        folder = Path(folder)
        check_place(folder, FAMILY, "family")
        with atomic_folder(folder) as temporary:
            save_networks(self.unet, self.scheduler, self.features, temporary)
            save_file({name: rows.cpu().contiguous() for name, rows in self.gallery.items()}, temporary / GALLERY)
            members = {}
            for name, detector in self._detectors.items():
                place = temporary / "categories" / name
                place.mkdir(parents=True)
                members[name] = detector.save_record(place)
            record = {
                "format_version": FORMAT_VERSION,
                "categories": {name: detector.label for name, detector in self._detectors.items()},
                "shape": self.shape,
                "settings": self._first.settings.model_dump(mode="json"),
                "versions": package_versions(),
                "files": _file_hashes(temporary),
                **self.record,
            }
            write_json(temporary / FAMILY, record)
            write_text(temporary / CARD, family_card(record, members))
            for name, file in (extra or {}).items():
                shutil.copyfile(file, temporary / name)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device | None = None) -> "Family":
        """Load a family's folder.

        Raises:
            ModelError: it is missing, incomplete or of a newer format.
            ConfigError: no such device on this machine.
        """
        folder, on_device = Path(folder), choose_device(device)
        record = read_family(folder)
        try:
            networks = load_networks(folder, parse_settings(record["settings"]))
            gallery = load_file(folder / GALLERY)
            detectors = {}
            for name, label in record["categories"].items():
                place = folder / "categories" / name
                settings, shape, known = load_record(place, read_record(place))
                if list(shape) != record["shape"] or label not in range(networks[0].config.num_class_embeds):
                    raise ValueError(f"{name} belongs to another network")
                detectors[name] = Detector(*networks, settings, shape, **known, device=on_device, label=label)
            kept = {key: record[key] for key in record if key not in _OF_THE_FOLDER}
            return cls(detectors, gallery, kept)
        except (KeyError, TypeError, ValueError, OSError, SafetensorError, ConfigError) as error:
            raise ModelError(
                f"Expected a complete family in {folder}, found something else ({' '.join(str(error).split())}); "
                "copy or train it again."
            ) from None


def read_family(folder: str | Path) -> dict[str, Any]:
    """The contents of `family.json`; raises ModelError where there is no readable one."""
    path = Path(folder) / FAMILY
    if not path.is_file():
        raise ModelError(
            f"Expected the folder of a family, with a {FAMILY}, found none at {folder}; "
            "name the folder that ddad train --categories wrote."
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found, names = record["format_version"], record["categories"]
        # Names become paths.
        whole = isinstance(names, dict) and bool(names) and all(name == Path(name).name != ".." for name in names)
    except (ValueError, KeyError, TypeError):
        whole, found = False, FORMAT_VERSION
    if found != FORMAT_VERSION:
        raise ModelError(f"Expected family format {FORMAT_VERSION} in {path}, found {found}; update ddad.")
    if not whole:
        raise ModelError(f"Expected a complete {path}, found a damaged one; copy or train the family again.")
    return record


def check_computed(fast: bool, backend: str | None, precision: str | None) -> None:
    """Raises ConfigError for a way of computing that families do not know."""
    if fast or backend not in (None, "torch") or precision not in (None, "fp32"):
        raise ConfigError(
            "Expected neither --fast nor another --backend or --precision for a family, found one; leave it out, or "
            "save the category as a model of its own."
        )


def check_files(folder: str | Path) -> str:
    """Check a family's files against the hashes in `family.json`, as `detector.check_files`.

    Returns:
        The SHA-256 of `family.json`.

    Raises:
        ModelError: there is no family, or a file is another one, missing or too many.
    """
    folder = Path(folder)
    expected, found = read_family(folder).get("files", {}), _file_hashes(folder)
    if wrong := sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)):
        raise ModelError(
            f"Expected the files that {folder / FAMILY} records, found that {wrong[0]} differs; copy the family again."
        )
    return sha256(folder / FAMILY)


def _file_hashes(folder: Path) -> dict[str, str]:
    names = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    return {name: sha256(names[name]) for name in sorted(names) if name not in _UNHASHED}


@torch.no_grad()
def pooled(detector: Detector, images: Sequence[np.ndarray]) -> Tensor:
    """Deepest features of images (uint8, model shape), averaged over all places: (B, C), each of length 1."""
    tiling = detector.tiling
    deepest = detector.features(tiling.cut(to_unit(images, detector.device)))[-1]
    means = deepest.float().mean(dim=(2, 3)).unflatten(0, (-1, tiling.number)).mean(dim=1)
    return functional.normalize(means, dim=1)
