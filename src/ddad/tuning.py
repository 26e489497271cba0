"""Judge settings on good images and synthetic defects: what a choice is made on, instead of test labels."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ddad.adaptation import RECONSTRUCTION_BATCH, Adapter, Epoch, Pairs, best_epoch, reconstruct_all
from ddad.anomaly_map import image_score
from ddad.calibration import fit_units, weighted
from ddad.checkpoint import CheckpointStore
from ddad.config import AdaptationSettings
from ddad.data.synthetic import SyntheticDefect, defect_set
from ddad.detector import Detector
from ddad.metrics import image_metrics

Item = TypeVar("Item")

MOST_ADAPTED = 512
"""Good images that adapt the features, where the number of passes is chosen; as published: all."""
FEWEST_ADAPTED = 32
"""Fewer, or fewer than `FEWEST_JUDGED` to judge by, and the features stay as they are."""
MOST_JUDGED, FEWEST_JUDGED = 128, 8
"""Select images on which defects are painted to judge the adaptation."""
DEFECTS = 160
"""Synthetic defects painted on them."""


class SyntheticTest:
    """Good images and synthetic defects painted on them, rebuilt once; distances follow the detector's features.

    The good images must not have been trained on. Statistics come from one half of them and judge the other half, with
    the defects painted on it, then the other way round: nothing is judged by what it was fitted on.
    """

    def __init__(self, detector: Detector, good: Sequence[np.ndarray], painted: Sequence[SyntheticDefect]) -> None:
        """
        Args:
            good: at least two images, uint8, model shape.
            painted: defects on them, of `paint_halves`.
        """
        self.detector = detector
        self.images = [*good, *(defect.image for defect in painted)]
        self.labels = np.arange(len(self.images)) >= len(good)
        self.halves = np.array([*range(len(good)), *(defect.source_index for defect in painted)]) % 2
        self.reconstructions = list(reconstruct_all(detector, self.images))

    def distances(self) -> Tensor:
        """Smoothed distances with the detector's present features, (N, K, H, W) on the CPU."""
        parts = []
        for first in range(0, len(self.images), RECONSTRUCTION_BATCH):
            chunk = slice(first, first + RECONSTRUCTION_BATCH)
            rebuilt = torch.stack(self.reconstructions[chunk]).float().to(self.detector.device)
            parts.append(self.detector.smooth(self.detector.distances(self.images[chunk], rebuilt)).cpu())
        return torch.cat(parts)

    def scores(self, distances: Tensor, weights: Sequence[float]) -> np.ndarray:
        """Image scores (N,) of smoothed distances, with one weight a kind of distance."""
        result = np.empty(len(self.images))
        by_position = self.detector.settings.scoring.position == "standardise"
        for half in (0, 1):
            units = fit_units(distances[~self.labels & (self.halves != half)], by_position)
            result[self.halves == half] = image_score(weighted(distances[self.halves == half], units, weights)).numpy()
        return result

    def image_auroc(self) -> float:
        """How well the detector as it is tells good images from synthetic defects, in [0, 1]."""
        return image_metrics(self.scores(self.distances(), self.detector.weights), self.labels)["image_auroc"]


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


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of these, evenly spread over all of them."""
    return [items[i * len(items) // min(count, len(items))] for i in range(min(count, len(items)))]
