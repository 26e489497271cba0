"""Judge settings on good images and synthetic defects: what a choice is made on, instead of test labels."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddad.adaptation import RECONSTRUCTION_BATCH, Adapter, Epoch, Pairs, best_epoch, reconstruct_all
from ddad.anomaly_map import image_score
from ddad.calibration import fit_units
from ddad.checkpoint import CheckpointStore
from ddad.config import AdaptationSettings, SamplingSettings, Settings
from ddad.data.samples import spread
from ddad.data.synthetic import SyntheticDefect, defect_set
from ddad.detector import Detector
from ddad.errors import ConfigError
from ddad.metrics import PixelMetrics, image_metrics

MOST_ADAPTED = 512
"""Good images that adapt the features, where the number of passes is chosen; as published: all."""
FEWEST_ADAPTED = 32
"""Fewer, or fewer than `FEWEST_JUDGED` to judge by, and the features stay as they are."""
MOST_JUDGED, FEWEST_JUDGED = 128, 8
"""Select images on which defects are painted to judge the adaptation."""
DEFECTS = 160
"""Synthetic defects painted on them."""
GROUPS = 4
"""Of images, by whose scatter a gain is judged."""
LEAST_GAIN = 0.002
"""Of the mean of image AUROC and AUPRO; less is no reason to depart from the defaults."""


class SyntheticTest:
    """Good images and synthetic defects painted on them, judged by whatever settings and features the detector has.

    The good images must not have been trained on. Units come from one half of them and judge the other half, with the
    defects painted on it, then the other way round: nothing is judged by what it was fitted on. Reconstructions are
    kept, in 16 bits, while the way of sampling is the same.
    """

    def __init__(self, detector: Detector, good: Sequence[np.ndarray], painted: Sequence[SyntheticDefect]) -> None:
        """
        Args:
            good: at least two images, uint8, model shape.
            painted: defects on them, of `paint_halves`.
        """
        self.detector = detector
        self.images = [*good, *(defect.image for defect in painted)]
        self.masks = [*(np.zeros(detector.shape, dtype=bool) for _ in good), *(defect.mask for defect in painted)]
        self.labels = np.arange(len(self.images)) >= len(good)
        self.sources = np.array([*range(len(good)), *(defect.source_index for defect in painted)])
        self.halves = self.sources % 2
        self._rebuilt: tuple[SamplingSettings, list[Tensor]] | None = None

    def distances(self) -> Tensor:
        """Distances with the detector's present features, not smoothed, (N, K, H, W) on the CPU."""
        sampling = self.detector.settings.sampling
        if self._rebuilt is None or self._rebuilt[0] != sampling:
            self._rebuilt = sampling, list(reconstruct_all(self.detector, self.images))
        parts = []
        for first in range(0, len(self.images), RECONSTRUCTION_BATCH):
            chunk = slice(first, first + RECONSTRUCTION_BATCH)
            rebuilt = torch.stack(self._rebuilt[1][chunk]).float().to(self.detector.device)
            parts.append(self.detector.distances(self.images[chunk], rebuilt).cpu())
        return torch.cat(parts)

    def maps(self, distances: Tensor) -> Tensor:
        """Anomaly maps (N, H, W) of distances (N, K, H, W), with the detector's present settings of scoring."""
        distances = self.detector.smooth(distances)
        by_position = self.detector.settings.scoring.position == "standardise"
        maps = torch.empty(len(distances), *distances.shape[2:])
        for half in (0, 1):
            units = fit_units(distances[~self.labels & (self.halves != half)], by_position)
            maps[self.halves == half] = self.detector.fuse(distances[self.halves == half], units)
        return maps

    def image_auroc(self) -> float:
        """How well the detector as it is tells good images from synthetic defects, in [0, 1]."""
        scores = image_score(self.maps(self.distances())).numpy()
        return image_metrics(scores, self.labels)["image_auroc"]

    def quality(self, distances: Tensor) -> np.ndarray:
        """Mean of image AUROC and AUPRO, in [0, 1], in each of `GROUPS` groups of images, (GROUPS,)."""
        maps = self.maps(distances)
        scores = image_score(maps).numpy()
        group = self.sources // 2 % GROUPS  # each has images of both halves
        return np.array([self._quality(scores, maps, np.flatnonzero(group == number)) for number in range(GROUPS)])

    def _quality(self, scores: np.ndarray, maps: Tensor, chosen: np.ndarray) -> float:
        pixels = PixelMetrics()
        for index in chosen:
            pixels.update(maps[index].numpy(), self.masks[index])
        auroc = image_metrics(scores[chosen], self.labels[chosen])["image_auroc"]
        return (auroc + pixels.compute()["aupro"]) / 2


@dataclass(frozen=True)
class Trial:
    """One setting that was tried: its quality on synthetic defects, and what it gains on the best before it."""

    changes: dict[str, Any]
    quality: float
    gain: float
    error: float
    """Standard error of the gain, from `GROUPS` groups of images."""

    @property
    def helps(self) -> bool:
        return self.gain > max(self.error, LEAST_GAIN)


def tune(
    detector: Detector,
    good: Sequence[np.ndarray],
    seconds: float = math.inf,
    on_stage: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Choose the detector's settings of sampling and scoring on good images and synthetic defects painted on them.

    One coordinate after the other, the cheap ones (which reuse reconstructions) first and once more at the end. A
    change is made only where it gains more than its standard error over groups of images.

    Args:
        good: images that were not trained on and will not rank, uint8, model shape; at least `FEWEST_JUDGED`.
        seconds: no further setting is tried after these.

    Returns:
        What is remembered of it: `said`, `before`, `after`, `changes` and every trial.

    Raises:
        ConfigError: scores that depend on their batch, as published.
    """
    if detector.settings.scoring.fusion == "batch-max":
        raise ConfigError(
            f"Expected a model that scores each image by itself, found batch-max fusion (preset "
            f"{detector.settings.preset}); tune a model of preset xs, s or base."
        )
    started = time.monotonic()
    good = spread(good, MOST_JUDGED)
    test = SyntheticTest(detector, good, paint_halves(good, DEFECTS, detector.settings.seed))
    distances = test.distances()
    best = before = test.quality(distances)
    trials: list[Trial] = []
    changes: dict[str, Any] = {}
    for group, name, values in _coordinates(detector.settings):
        settings, found = detector.settings, None
        for value in values:
            if value == _get(settings, group, name) or time.monotonic() - started > seconds:
                continue
            detector.settings = _with(settings, group, name, value)
            candidate = test.distances() if group == "sampling" else distances
            quality = test.quality(candidate)
            gain = quality - best
            changed = {f"{group}.{name}": value}
            trials.append(
                Trial(changed, float(quality.mean()), float(gain.mean()), float(gain.std(ddof=1) / GROUPS**0.5))
            )
            on_stage(f"tuning {group}.{name} = {value}: {quality.mean():.3f} ({gain.mean():+.3f})")
            if trials[-1].helps and (found is None or quality.mean() > found[1].mean()):
                found = value, quality, candidate
        detector.settings = settings
        if found:
            value, best, distances = found
            detector.settings = _with(settings, group, name, value)
            changes[f"{group}.{name}"] = value
    said = (
        f"{len(trials)} settings were tried on {len(good)} good images with {len(test.images) - len(good)} synthetic "
        f"defects: mean of image AUROC and AUPRO on these {before.mean():.3f} before, {best.mean():.3f} after"
        + (
            f" ({', '.join(f'{name} {value}' for name, value in changes.items())})."
            if changes
            else ", nothing changed."
        )
    )
    on_stage(said)
    return {
        "said": said,
        "before": float(before.mean()),
        "after": float(best.mean()),
        "changes": changes,
        "trials": [asdict(trial) for trial in trials],
    }


def _coordinates(settings: Settings) -> Iterator[tuple[str, str, Sequence[Any]]]:
    weights = settings.scoring.layer_weights
    cheap: list[tuple[str, str, Sequence[Any]]] = [
        ("scoring", "position", ("none", "standardise")),
        ("scoring", "pixel_weight", (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)),
        ("scoring", "layer_weights", [tuple(one) for one in _tilted(weights)]),
        ("scoring", "smoothing", (2.0, 3.0, 4.0, 6.0, 8.0)),
    ]
    stride, most = settings.sampling.stride, settings.max_timestep - 1
    yield from cheap
    yield "sampling", "conditioning_weight", (0.0, 0.5, 1.0, 2.0, 4.0)
    yield "sampling", "start_timestep", list(range(2 * stride, most + 1, stride))
    yield from cheap


def _tilted(weights: Sequence[float]) -> Iterator[list[float]]:
    """Each layer more, less, or not at all, as far as some layer remains; their sum stays."""
    for index in range(len(weights)):
        for factor in (0.0, 0.5, 2.0):
            tilted = [weight * (factor if i == index else 1) for i, weight in enumerate(weights)]
            if sum(tilted):
                yield [round(weight * sum(weights) / sum(tilted), 4) for weight in tilted]


def _get(settings: Settings, group: str, name: str) -> Any:
    return getattr(getattr(settings, group), name)


def _with(settings: Settings, group: str, name: str, value: Any) -> Settings:
    changed = settings.model_copy(update={group: getattr(settings, group).model_copy(update={name: value})})
    if name != "start_timestep":
        return changed
    # Which timesteps the network was trained for follows from T', unless it is written down.
    training = settings.training.model_copy(update={"max_timestep": settings.max_timestep})
    return changed.model_copy(update={"training": training})


def paint_halves(good: Sequence[np.ndarray], count: int, seed: int) -> list[SyntheticDefect]:
    """About `count` defects on good images; none carries texture from an image of the other half."""
    painted = []
    for half in (0, 1):
        for defect in defect_set(good[half::2], count // 2, seed + half):
            painted.append(defect._replace(source_index=2 * defect.source_index + half))
    return painted


def adapt_features(
    detector: Detector,
    images: Sequence[np.ndarray],
    select: Sequence[np.ndarray],
    epochs: int,
    store: CheckpointStore,
    on_stage: Callable[[str], None],
) -> dict[str, Any]:
    """Adapt the detector's features where that helps; returns what is remembered of it."""
    settings = detector.settings.adaptation
    if epochs == 0:
        if settings.epochs == 0:
            why = "the settings say so"
        elif not can_adapt(settings, len(images), len(select)):
            why = f"that needs {FEWEST_ADAPTED} good images to train on and {FEWEST_JUDGED} to choose by"
        else:
            why = "the time budget does not allow it"
        said = f"The features are not adapted: {why}."
        on_stage(said)
        return {"epochs": 0, "said": said, "history": []}

    on_stage("Rebuilding good images to adapt the features on.")
    test = None
    if settings.choose_epochs:
        good = spread(select, MOST_JUDGED)
        test = SyntheticTest(detector, good, paint_halves(good, DEFECTS, detector.settings.seed))
        images = spread(images, MOST_ADAPTED)
    pairs = Pairs(detector, images, settings, detector.settings.seed)

    def tell(entry: Epoch) -> None:
        loss = "" if entry.loss is None else f", loss {entry.loss:.4f}"
        auroc = entry.synthetic_auroc
        found = "" if auroc is None else f", image AUROC {auroc:.3f} on synthetic defects"
        on_stage(f"adaptation {entry.epoch} of {epochs}{loss}{found}")

    adapter = Adapter(detector.features, settings, detector.device)
    history = adapter.run(
        pairs, epochs, seed=detector.settings.seed, judge=test.image_auroc if test else None, store=store, on_epoch=tell
    )
    chosen = best_epoch(history)
    if test is None:
        said = f"The features are adapted in {chosen} passes over {len(images)} good images."
    elif chosen == 0:
        said = f"The features are not adapted: no pass of {epochs} found synthetic defects better."
    else:
        before, after = history[0].synthetic_auroc, history[chosen].synthetic_auroc
        said = (
            f"The features are adapted in {chosen} of {epochs} passes over {len(images)} good images: image AUROC on "
            f"synthetic defects {before:.3f} before, {after:.3f} after."
        )
    on_stage(said)
    return {"epochs": chosen, "said": said, "history": [vars(entry) for entry in history]}


def can_adapt(settings: AdaptationSettings, train: int, select: int) -> bool:
    """Whether there are enough good images to adapt features on, and to judge that by where it is to be judged."""
    return (train >= FEWEST_ADAPTED and select >= FEWEST_JUDGED) if settings.choose_epochs else train > 1
