"""One network for many categories: a class-conditional U-Net, one feature extractor, and a calibration a category.

family.json                                       categories with their labels, shape, settings, training, file hashes
unet/, scheduler/, features/                      once, as in a model folder
categories/<name>/detector.json                   calibration, image rule and data of the category
categories/<name>/statistics.safetensors          what its good parts show at each place
gallery.safetensors                               pooled features of good photographs, by which a category is recognised

Each category is drawn equally often in training, keeps a threshold and a promise of its own, and is judged by an
ordinary `Detector` that shares the networks. The features are not adapted: they would have to fit all products at once.
"""

import copy
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, overload

import numpy as np
import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from ddad.card import family_card
from ddad.checkpoint import CheckpointStore
from ddad.config import Settings, parse_settings
from ddad.data.folder import list_kinds, scan
from ddad.data.samples import Dataset, Split, fingerprint, model_shape, split_good, spread, too_few_to_split
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
from ddad.features import create_features, weights_license
from ddad.files import atomic_folder, check_place, remove_leftovers, sha256, write_json, write_text
from ddad.fit import (
    CACHE_SHARE,
    DEFAULT_TIME_BUDGET,
    FEWEST_STEPS,
    HELD_OUT,
    MOST_SELECT,
    Estimate,
    ImageCache,
    _Log,
    differences,
    diverged,
    locked,
)
from ddad.images import ImageRule, fit_image_rule, list_images, probe
from ddad.prediction import ImageSource, Inspector, Photo, Prediction
from ddad.sampling import to_unit
from ddad.streaming import chunks
from ddad.tiling import Tiles, Tiling, spans
from ddad.training import Progress, Trainer
from ddad.unet import choose_device, create_scheduler, create_unet, parameter_count

FORMAT_VERSION = 1
GALLERY = "gallery.safetensors"
MOST_REMEMBERED = 64
"""Photographs of a category in the gallery."""
NOT_ADAPTED = "The features are not adapted, since all categories share them."
_LOG = "training.jsonl"
_OF_THE_FOLDER = ("format_version", "categories", "shape", "settings", "versions", "files")
_UNHASHED = (FAMILY, CARD, _LOG)
_TIMED = 5  # steps and inspections that are measured before the first step


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


# -- training ----------------------------------------------------------------------------------------------------------


class EvenDraw(Sequence[np.ndarray]):
    """Images of all categories in one sequence, in which each category has about as many places.

    Whole categories are repeated, up to the size of the largest: so one of ten photographs is drawn about as often as
    one of thousands, as a network of its own would draw it, and no photograph of a category more often than another.
    """

    def __init__(self, images: Sequence[np.ndarray], counts: Sequence[int]) -> None:
        """
        Args:
            images: of one category after the other.
            counts: how many there are of each, at least one.
        """
        self._images = images
        self.repeats = [max(1, round(max(counts) / count)) for count in counts]
        starts = np.cumsum([0, *counts])
        parts = [
            np.tile(np.arange(start, start + count), times)
            for start, count, times in zip(starts[:-1], counts, self.repeats, strict=True)
        ]
        self._places: list[int] = np.concatenate(parts).tolist()
        self.members: list[int] = np.repeat(np.arange(len(counts)), [len(part) for part in parts]).tolist()
        """The number of the category, place by place."""

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        return self._images[self._places[index]]


def load_categories(root: str | Path, categories: Sequence[str] | None = None) -> dict[str, Dataset]:
    """The categories in a folder, each a folder in MVTec layout or of good images.

    Args:
        categories: their folders' names; by default all visible folders that have images in them.

    Raises:
        DataError: there are fewer than two, or one is neither.
        ConfigError: one that is named is not there, or is named twice.
    """
    root = Path(root)
    kinds = [kind for kind in list_kinds(root) if list_images(root / kind)]
    if "train" in kinds:
        raise DataError(
            f"{root}: expected a folder for each category, but found one category, with train in it; name the folder "
            "above it, or leave out --categories."
        )
    names = kinds if categories is None else list(categories)
    if unknown := [name for name in names if name not in kinds]:
        raise ConfigError(f"Expected categories among {', '.join(kinds) or 'none'} in {root}, found {unknown[0]!r}.")
    if len(set(names)) < max(2, len(names)):
        raise ConfigError(
            f"Expected at least two different categories in {root}, found {', '.join(names) or 'none'}; name others, "
            "or leave out --categories."
        )
    return {name: scan(root / name) for name in names}


def train_family(
    root: str | Path,
    out: str | Path,
    settings: Settings,
    *,
    categories: Sequence[str] | None = None,
    conditional: bool = True,
    steps: int | None = None,
    time_budget: float | None = None,
    device: str | None = None,
    workers: int = 2,
    on_estimate: Callable[[Estimate], None] = lambda estimate: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_stage: Callable[[str], None] = lambda sentence: None,
) -> Path:
    """Train one network on the good images of many categories, calibrate each, and write the family to `out`.

    Run again with the same arguments it resumes (from `out`.run), or returns at once where the family is there. All
    categories have one shape (the median of their median aspect ratios) and one white level of 16-bit images; features
    are not adapted, whatever the settings say.

    Args:
        root: a folder with a folder for each category, as `load_categories`.
        out: the folder to write.
        settings: what to train; the false-alarm rate is that of each category.
        categories: some of them; by default all.
        conditional: whether the network is told the category. Else it must see it in the photograph, for comparison.
        steps: training steps in all; or
        time_budget: seconds for everything this call does, from which the steps follow once, by the measured speed.

    Raises:
        ConfigError: `out` holds something else or the run of another command; settings that cannot work.
        DataError: images that cannot be used.
        training.Interrupted: asked to stop; the same call resumes.
    """
    started = time.monotonic()
    out = Path(out)
    run = out.with_name(out.name + ".run")
    if steps is not None and time_budget is not None:
        raise ConfigError("Expected either a number of steps or a time budget, found both; leave one out.")
    if steps is None and time_budget is None:
        time_budget = DEFAULT_TIME_BUDGET
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ConfigError(
            f"Expected one process to train many categories, found {processes}; start it without a launcher."
        )
    on_device = choose_device(device)
    settings = settings.model_copy(update={"adaptation": settings.adaptation.model_copy(update={"epochs": 0})})
    datasets = load_categories(root, categories)
    splits = {name: _split(name, data, settings.false_alarms) for name, data in datasets.items()}
    asked: dict[str, Any] = {
        "settings": settings.model_dump(mode="json"),
        "budget": {"steps": steps, "seconds": time_budget},
        "conditional": conditional,
        "data": {name: fingerprint(split.hashes.values()) for name, split in splits.items()},
    }
    if out.exists():
        _check_finished(out, asked)
        shutil.rmtree(run, ignore_errors=True)
        on_stage(f"{out} is already trained with these settings on these images; nothing to do.")
        return out
    tiling = _tiling({name: [sample.path for sample in data.train] for name, data in datasets.items()}, settings)
    shape = tiling.canvas
    features = create_features(settings.scoring.features, settings.scoring.feature_layers, tiling.tile)
    with locked(run):
        remove_leftovers(out.parent, out.name)
        store = CheckpointStore(run)
        plan = _read_plan(run, asked)
        if plan:
            rule = ImageRule(white=plan["white"])
        else:
            rule = fit_image_rule(sample.path for data in datasets.values() for sample in data.train)
        on_stage(f"{len(datasets)} categories at {shape[0]} x {shape[1]} pixels. {NOT_ADAPTED}")
        for name, split in splits.items():
            on_stage(
                f"{name}: {len(split.train)} good images to train, {len(split.select)} to select, "
                f"{len(split.calibration)} to calibrate."
            )

        def cache(paths: Sequence[Path], share: float) -> ImageCache:
            return ImageCache(paths, shape, rule, psutil.virtual_memory().available * CACHE_SHARE * share, workers)

        images = cache([path for split in splits.values() for path in split.train], 1.0)
        others = {
            name: (cache(split.select, 0.5 / len(splits)), cache(split.calibration, 0.5 / len(splits)))
            for name, split in splits.items()
        }
        drawn = EvenDraw(images, [len(split.train) for split in splits.values()])
        labels = {name: number if conditional else 0 for number, name in enumerate(splits)}

        torch.manual_seed(settings.seed)
        # One label for all is a network that is not told the category.
        unet = create_unet(settings.network.architecture, categories=len(set(labels.values())))
        scheduler = create_scheduler(settings.network.prediction_type)
        by_place = [list(labels.values())[member] for member in drawn.members for _ in range(tiling.number)]
        trainer = _trainer(unet, settings, on_device, by_place)
        detectors = {
            name: Detector(
                unet, scheduler, features, settings, shape, image_rule=rule, device=trainer.device, label=label
            )
            for name, label in labels.items()
        }
        tiles = Tiles(drawn, tiling)
        held_out: list[np.ndarray] = []
        held_out_labels: list[int] = []
        for name, (select, _) in others.items():
            some = spread(Tiles(select, tiling), max(1, HELD_OUT // len(splits)))
            held_out += some
            held_out_labels += [labels[name]] * len(some)
        done = store.latest_step()
        if plan:
            estimate = Estimate(**{**plan["estimate"], "shape": shape})
            left = 1 - done / estimate.steps
            estimate = replace(estimate, train_seconds=left * estimate.train_seconds)
        else:
            estimate = _measure(trainer, detectors, tiles, len(held_out), splits, steps, time_budget, started)
            write_json(run / "run.json", {"asked": asked, "white": rule.white, "estimate": asdict(estimate)})
        if done:
            on_stage(f"Resuming after step {done} of {estimate.steps}.")
        on_estimate(estimate)

        log = _Log(run / "log.jsonl")

        def progress(event: Progress) -> None:
            log.write(event)
            on_progress(event)

        trainer.run(
            tiles,
            estimate.steps,
            held_out=held_out,
            held_out_labels=held_out_labels,
            store=store,
            on_progress=progress,
            on_resume=log.resume,
        )
        log.close()
        if diverged(log.held_out):
            on_stage(
                f"Warning: training diverged. The held-out loss was {min(log.held_out):.4g} and is "
                f"{log.held_out[-1]:.4g} at the end; this family is not to be trusted. Train again with another --seed."
            )
        training = {
            "steps": estimate.steps,
            "budget": asked["budget"],
            "conditional": conditional,
            "places": {
                name: times * len(split.train)
                for (name, split), times in zip(splits.items(), drawn.repeats, strict=True)
            },
            **log.summary(),
        }
        trained = datetime.now(UTC).isoformat(timespec="seconds")
        gallery = {}
        with trainer.averaged():
            on_stage("Calibrating each category on good images that were not trained on.")
            begins = 0
            for name, detector in detectors.items():
                split, (select, calibration) = splits[name], others[name]
                if _across(split, settings.false_alarms):
                    detector.calibrate_across(chain(select, calibration))
                else:
                    detector.calibrate(spread(select, MOST_SELECT), calibration)
                own = range(begins, begins + len(split.train))
                begins += len(split.train)
                remembered = (images[place] for place in spread(own, MOST_REMEMBERED))
                gallery[name] = torch.cat([pooled(detector, some) for some in chunks(remembered, 4)])
                detector.record = {
                    "category": name,
                    "family": list(splits),
                    "trained": trained,
                    "data": {
                        "fingerprint": asked["data"][name],
                        "train": [split.hashes[path] for path in split.train],
                        "select": [split.hashes[path] for path in split.select],
                        "calibration": [split.hashes[path] for path in split.calibration],
                    },
                    "training": training,
                    "adaptation": {"said": NOT_ADAPTED},
                    "features_license": weights_license(settings.scoring.features),
                }
            record = {"trained": trained, "training": training, "asked": asked}
            Family(detectors, gallery, record).save_pretrained(out, extra={_LOG: log.path})
        shutil.rmtree(run)
    return out


def _split(name: str, data: Dataset, false_alarms: float) -> Split:
    try:
        return split_good([sample.path for sample in data.train], false_alarms)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def _across(split: Split, false_alarms: float) -> bool:
    return too_few_to_split(len(split.hashes), len(split.select), len(split.calibration), false_alarms)


def _tiling(paths: Mapping[str, Sequence[Path]], settings: Settings) -> Tiling:
    """One tiling for all categories, each of which counts once, however many photographs it has."""
    rows, columns = settings.tiles
    sizes = []
    for infos in (map(probe, own) for own in paths.values()):
        stretch = statistics.median(math.log(info.width / info.height) for info in infos)
        sizes.append((1 / spans(rows), math.exp(stretch) / spans(columns)))
    tile = (settings.image_size,) * 2 if settings.square else model_shape(sizes, settings.image_size)
    return Tiling(rows, columns, tile)


def _trainer(unet: Any, settings: Settings, device: torch.device, labels: Sequence[int]) -> Trainer:
    return Trainer(
        unet,
        settings.training,
        prediction_type=settings.network.prediction_type,
        max_timestep=settings.max_timestep,
        seed=settings.seed,
        device=device,
        labels=labels,
    )


def _measure(
    trainer: Trainer,
    detectors: Mapping[str, Detector],
    tiles: Sequence[np.ndarray],
    held_out: int,
    splits: Mapping[str, Split],
    steps: int | None,
    time_budget: float | None,
    started: float,
) -> Estimate:
    """Time a few steps on a copy, and an inspection, so that the work fits the budget and the estimate is true."""
    detector = next(iter(detectors.values()))
    settings, number = detector.settings, detector.tiling.number
    assert trainer.labels is not None
    scratch = _trainer(copy.deepcopy(trainer.plain_unet), settings, trainer.device, trainer.labels)
    step_seconds = _seconds(lambda index: scratch.step(tiles, index, 1000))
    trainer.plain_unet.eval()
    image = np.zeros((*detector.shape, 3), np.uint8)
    inspect_seconds = _seconds(lambda index: detector.compare([image])[0])
    trainer.plain_unet.train()
    inspected = sum(min(MOST_SELECT, len(split.select)) + len(split.calibration) for split in splits.values())
    calibrate_seconds = inspect_seconds * inspected
    # The held-out loss is measured ten times, at five timesteps an image.
    call_seconds = inspect_seconds / len(settings.sampling.timesteps) / number
    held_out_seconds = 10 * 5 * held_out * call_seconds
    if time_budget is not None:
        left = time_budget - (time.monotonic() - started) - calibrate_seconds - held_out_seconds
        # A tenth is kept back: the machine may slow down, and what is promised is the whole command.
        steps = math.floor(0.9 * left / step_seconds)
        if steps < FEWEST_STEPS:
            needed = time_budget - left + FEWEST_STEPS * step_seconds / 0.9
            raise ConfigError(
                f"Expected a time budget for at least {FEWEST_STEPS} training steps, found {time_budget:.0f} s, which "
                f"allow {max(0, steps)}; give more than {math.ceil(needed)} s, and an hour a category for good results."
            )
    assert steps is not None  # the caller has made sure: steps, or a budget
    return Estimate(
        steps=steps,
        adaptation_epochs=0,
        images_per_second=settings.training.batch_size / step_seconds,
        train_seconds=steps * step_seconds + held_out_seconds,
        adapt_seconds=0.0,
        calibrate_seconds=calibrate_seconds,
        memory_mb=psutil.Process().memory_info().rss / 1e6,
        parameters=parameter_count(trainer.plain_unet),
        precision=trainer.precision,
        shape=detector.shape,
        train_images=sum(len(split.train) for split in splits.values()),
        select_images=sum(len(split.select) for split in splits.values()),
        calibration_images=sum(len(split.calibration) for split in splits.values()),
    )


def _seconds(action: Callable[[int], Tensor]) -> float:
    """Of one call, the median of a few; the first, which allocates and chooses kernels, does not count."""
    durations = []
    for index in range(_TIMED):
        before = time.monotonic()
        float(action(index).sum())  # on a GPU: until it is done
        durations.append(time.monotonic() - before)
    return statistics.median(durations[1:])


def _read_plan(run: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What a run of the same command has decided; None where it has not begun."""
    path = run / "run.json"
    if not path.exists():
        return None
    try:
        plan = json.loads(path.read_text(encoding="utf-8"))
        changes = list(_changes(plan["asked"], asked))
    except (ValueError, TypeError, KeyError):
        raise ConfigError(
            f"Expected the run of a family by this version of ddad in {run}, found another one; delete that folder, or "
            "choose another --out."
        ) from None
    if changes:
        raise ConfigError(
            f"Expected the command that began the run in {run}, found changes in {', '.join(changes)}; "
            "repeat the first command, choose another --out, or delete that folder."
        )
    return plan


def _check_finished(out: Path, asked: dict[str, Any]) -> None:
    try:
        changes = list(_changes(read_family(out)["asked"], asked))
    except (ModelError, KeyError, TypeError):
        raise ConfigError(
            f"Expected a new folder for the family, found {out}, which is something else; choose another --out."
        ) from None
    if changes:
        raise ConfigError(
            f"Expected a new folder for the family, found {out}, trained with other {', '.join(changes)}; "
            "choose another --out, or delete that folder."
        )


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    plain = ("settings", "budget", "conditional")
    yield from differences({key: before[key] for key in plain}, {key: now[key] for key in plain})
    if list(before["data"]) != list(now["data"]):
        yield f"categories ({', '.join(before['data'])} before, {', '.join(now['data'])} now)"
    for name in before["data"].keys() & now["data"].keys():
        if before["data"][name] != now["data"][name]:
            yield f"the good images of {name}"
