"""Train one network for many categories: the whole of `ddad train --categories`, resumable as `ddad.fit` is."""

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
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from ddad.checkpoint import CheckpointStore
from ddad.config import Settings
from ddad.data.folder import list_kinds, scan
from ddad.data.samples import Dataset, Split, fingerprint, model_shape, split_good, spread
from ddad.detector import Detector
from ddad.errors import ConfigError, DataError, ModelError
from ddad.family import LOG, Family, pooled, read_family
from ddad.features import create_features, weights_license
from ddad.files import remove_leftovers, write_json
from ddad.fit import (
    CACHE_SHARE,
    DEFAULT_TIME_BUDGET,
    FEWEST_STEPS,
    HELD_OUT,
    MOST_SELECT,
    Estimate,
    ImageCache,
    RunLog,
    calibrate,
    create_trainer,
    differences,
    divergence,
    locked,
)
from ddad.images import ImageRule, fit_image_rule, list_images, probe
from ddad.streaming import chunks
from ddad.tiling import Tiles, Tiling, spans
from ddad.training import Progress, Trainer
from ddad.unet import choose_device, create_scheduler, create_unet, parameter_count

MOST_REMEMBERED = 64
"""Photographs of a category in the gallery."""
NOT_ADAPTED = "The features are not adapted, since all categories share them."
_TIMED = 5  # steps and inspections that are measured before the first step


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
        trainer = create_trainer(unet, settings, on_device, by_place)
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

        log = RunLog(run / "log.jsonl")

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
        if warning := divergence(log.held_out, "family"):
            on_stage(warning)
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
                calibrate(detector, split, select, calibration)
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
            Family(detectors, gallery, record).save_pretrained(out, extra={LOG: log.path})
        shutil.rmtree(run)
    return out


def _split(name: str, data: Dataset, false_alarms: float) -> Split:
    try:
        return split_good([sample.path for sample in data.train], false_alarms)
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def _tiling(paths: Mapping[str, Sequence[Path]], settings: Settings) -> Tiling:
    """One tiling for all categories, each of which counts once, however many photographs it has."""
    rows, columns = settings.tiles
    sizes = []
    for infos in (map(probe, own) for own in paths.values()):
        stretch = statistics.median(math.log(info.width / info.height) for info in infos)
        sizes.append((1 / spans(rows), math.exp(stretch) / spans(columns)))
    tile = (settings.image_size,) * 2 if settings.square else model_shape(sizes, settings.image_size)
    return Tiling(rows, columns, tile)


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
    scratch = create_trainer(copy.deepcopy(trainer.plain_unet), settings, trainer.device, trainer.labels)
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
