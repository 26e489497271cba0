"""Nearest-neighbour features: the yardstick beside DDAD, which shows whether the diffusion model earns its time.

After PatchCore (Roth et al., "Towards Total Recall in Industrial Anomaly Detection", CVPR 2022, arXiv 2106.08265). It
remembers the pretrained features of places in good images, thinned out by farthest-point selection; a place is as
anomalous as its features are far from the nearest remembered ones, wherever in an image these were. Simpler than there:
all channels are kept as they are, the memory has a fixed size, and the score is the map's maximum, not reweighted.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ddad.anomaly_map import image_score, smooth
from ddad.calibration import Calibration, Ranking, calibrate
from ddad.data.samples import Dataset, Sample, paths_by_hash
from ddad.detector import Detector
from ddad.errors import DataError
from ddad.features import create_features, pool
from ddad.images import ImageRule, read_image, read_photo
from ddad.prediction import Prediction, regions
from ddad.sampling import to_unit
from ddad.streaming import chunks, in_threads

MEMORY = 4096
"""Vectors remembered: about 1 % of the places of 500 images at 256 x 256; the paper loses next to nothing at 1 %."""
CANDIDATES = 50_000
"""Vectors that the memory is chosen from, drawn at random: choosing takes 20 s on one core, they take 34 to 300 MB."""
PROJECTED = 128
"""Dimensions that distances are measured in while choosing; a random projection nearly keeps them."""
CHUNK = 2048
"""Places compared with the memory at a time: 32 MiB of distances."""
AHEAD = 4
"""Images read before they are used, for each thread."""


class NearestNeighbours:
    """Distance of an image's features to those of good images.

    Args:
        features: as `create_features` makes it, in evaluation mode: (B, 3, H, W) in [-1, 1] to one (B, C_i, H_i, W_i) a
            layer.
        shape: (height, width) of the images it is given.
        sigma: of the Gaussian over the maps, in pixels of the map.
        map_shape: (height, width) of the maps; by default `shape`.
        image_rule: how photographs are read.
        size: vectors remembered at most.
        seed: of every random choice.
    """

    def __init__(
        self,
        features: Any,
        shape: tuple[int, int],
        sigma: float,
        device: str | torch.device = "cpu",
        *,
        map_shape: tuple[int, int] | None = None,
        image_rule: ImageRule | None = None,
        size: int = MEMORY,
        seed: int = 0,
    ) -> None:
        self.features = features.to(device)
        self.shape, self.sigma, self.device = shape, sigma, torch.device(device)
        self.map_shape = map_shape or shape
        self.image_rule = image_rule or ImageRule()
        self.size, self.seed = size, seed
        self.memory = torch.empty(0, 0, device=self.device)  # (M, C)
        self.calibration = Calibration(scales=())

    def fit(self, images: Iterable[np.ndarray], batch_size: int = 4) -> Self:
        """Remember good images, uint8 (H, W, 3) of `shape`, a few in memory at a time.

        Raises:
            DataError: there is no image.
        """
        rng = np.random.default_rng(self.seed)
        candidates, seen = np.empty((0, 0), np.float32), 0
        for batch in chunks(images, batch_size):
            vectors = self.describe(batch).flatten(0, 2).cpu().numpy()
            if not seen:
                candidates = np.empty((CANDIDATES, vectors.shape[1]), np.float32)
            # Vitter's algorithm R: each place of all images so far is equally likely to be a candidate.
            number = seen + np.arange(1, len(vectors) + 1)
            slot = np.where(number <= CANDIDATES, number - 1, rng.integers(0, number))
            drawn = slot < CANDIDATES
            candidates[slot[drawn]] = vectors[drawn]
            seen += len(vectors)
        if not seen:
            raise DataError("Expected good images to remember, found none; check the train/good folder.")
        found = torch.from_numpy(candidates[:seen]).to(self.device)
        projected = found
        if found.shape[1] > PROJECTED:
            directions = rng.standard_normal((found.shape[1], PROJECTED), dtype=np.float32) / PROJECTED**0.5
            projected = found @ torch.from_numpy(directions).to(self.device)
        self.memory = found[farthest_points(projected, self.size)]
        return self

    def calibrate(self, images: Iterable[np.ndarray], false_alarms: float, batch_size: int = 4) -> None:
        """Set `calibration` from good images, uint8 (H, W, 3) of `shape`, that were not remembered.

        Raises:
            DataError: there is no image.
        """
        scores = [score for batch in chunks(images, batch_size) for score in self.score(batch)[1].tolist()]
        self.calibration = calibrate((), scores, false_alarms)

    @torch.no_grad()
    def describe(self, images: Sequence[np.ndarray]) -> Tensor:
        """One vector a place (B, h, w, C), on the first layer's grid, of images, uint8 (H, W, 3) of `shape`."""
        first, *others = (pool(layer) for layer in self.features(to_unit(images, self.device)))
        size = first.shape[-2:]
        resized = [functional.interpolate(layer, size=size, mode="bilinear", align_corners=False) for layer in others]
        return torch.cat([first, *resized], dim=1).permute(0, 2, 3, 1)

    @torch.no_grad()
    def score(self, images: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Maps (B, H, W) ≥ 0 of `map_shape` in the features' own unit, and scores (B,), of images of `shape`."""
        if not len(self.memory):
            raise RuntimeError("call fit before score")
        vectors = self.describe(images)
        distances = torch.cat([self._to_nearest(chunk) for chunk in vectors.flatten(0, 2).split(CHUNK)])
        maps = functional.interpolate(
            distances.view(len(images), 1, *vectors.shape[1:3]), self.map_shape, mode="bilinear", align_corners=False
        )
        maps = smooth(maps[:, 0], self.sigma)
        return maps, image_score(maps)

    def _to_nearest(self, vectors: Tensor) -> Tensor:
        # A product finds the neighbour: |m|²/2 - v·m is least. Differences of large squares are inexact, so vectors are
        # centred before, and the distance is taken anew.
        centre = self.memory.mean(dim=0)
        memory = self.memory - centre
        nearest = (memory.square().sum(dim=1) / 2 - (vectors - centre) @ memory.T).argmin(dim=1)
        return (vectors - self.memory[nearest]).norm(dim=1)

    def inspect(
        self, samples: Iterable[Sample], batch_size: int = 4, workers: int = 1
    ) -> Iterator[tuple[Sample, Prediction]]:
        """Predictions of labelled images, for `evaluation.evaluate`.

        What cannot be read is left out; the evaluation of the detector says so. Nothing is rebuilt here, so each
        `reconstruction` is the photograph itself. Without `calibration` there is no verdict.
        """
        ranking = Ranking(self.calibration)
        limit = self.calibration.threshold
        photos = (
            (sample, photo)
            for sample, photo in in_threads(self._read, samples, workers, AHEAD * workers)
            if photo is not None
        )
        for batch in chunks(photos, batch_size):
            maps, scores = self.score([image for _, (image, _) in batch])
            for (sample, (image, size)), anomaly_map, score in zip(
                batch, maps.cpu().numpy(), scores.tolist(), strict=True
            ):
                yield (
                    sample,
                    Prediction(
                        path=str(sample.path),
                        anomaly_score=score,
                        p_value=ranking.p_value(score),
                        is_anomalous=ranking.is_anomalous(score),
                        threshold=limit,
                        anomaly_map=anomaly_map,
                        reconstruction=image,
                        image=image,
                        regions=() if limit is None else regions(anomaly_map, limit, size),
                    ),
                )

    def _read(self, sample: Sample) -> tuple[np.ndarray, tuple[int, int]] | None:
        try:
            return read_photo(sample.path, self.shape, self.image_rule)
        except DataError:
            return None


def farthest_points(vectors: Tensor, size: int) -> Tensor:
    """Indices of at most `size` of the vectors (N, C), chosen so that no vector is far from all of them.

    Each is the one farthest from those before it (greedy k-center): its largest distance is at most twice the best
    possible (Gonzalez, 1985). The first is vector 0.
    """
    centred = vectors - vectors.mean(dim=0)  # squares are then small, and their differences more exact
    squares = centred.square().sum(dim=1)
    nearest = torch.full_like(squares, torch.inf)  # squared distance to the chosen ones
    chosen = [torch.zeros((), dtype=torch.long, device=vectors.device)]
    while len(chosen) < min(size, len(vectors)):
        last = chosen[-1]
        nearest = torch.minimum(nearest, squares + squares[last] - 2 * (centred @ centred[last]))
        nearest[last] = -torch.inf  # never twice
        chosen.append(nearest.argmax())
    return torch.stack(chosen)


def fit_baseline(
    detector: Detector,
    dataset: Dataset,
    *,
    shape: tuple[int, int] | None = None,
    batch_size: int = 4,
    workers: int = 1,
    size: int = MEMORY,
    seed: int = 0,
) -> NearestNeighbours:
    """The yardstick of a model: it remembers the images that the model was trained on, and those that ranked rank.

    Features are the pretrained ones, also where the model's own are adapted to the product. Without all of the
    calibration images in `dataset` there is no threshold.

    Args:
        shape: (height, width) to read images at; by default the model's, which maps always have.
        batch_size: images that go through the features together.
        workers: threads that read images.

    Raises:
        DataError: not all images that the model was trained on are there, or one cannot be read.
        ConfigError: pretrained features that are not on this machine, or do not work at `shape`.
    """
    known = detector.record.get("data", {})
    paths = paths_by_hash(sample.path for sample in dataset.train)
    train = [paths[one] for one in known.get("train", ()) if one in paths]
    if not train or len(train) < len(known["train"]):
        raise DataError(
            f"Expected in {dataset.root} the {len(known.get('train', ()))} good images that the model was trained on, "
            f"found {len(train)} of them; name the folder that `ddad train` was given."
        )
    # Where there were too few images for two parts, both rank (`Detector.calibrate_across`).
    across = detector.calibration is not None and detector.calibration.folds is not None
    ranks = [*known.get("calibration", ()), *(known.get("select", ()) if across else ())]
    calibration = [paths[one] for one in ranks] if all(one in paths for one in ranks) else []

    shape = shape or detector.shape
    scoring = detector.settings.scoring
    features = detector.features
    if detector.record.get("adaptation", {}).get("epochs") or shape != detector.shape:
        features = create_features(scoring.features, scoring.feature_layers, shape)  # also tries them at this shape
    baseline = NearestNeighbours(
        features,
        shape,
        detector.sigma,
        detector.device,
        map_shape=detector.shape,
        image_rule=detector.image_rule,
        size=size,
        seed=seed,
    )

    def read(path: Path) -> np.ndarray:
        return read_image(path, shape, detector.image_rule)

    baseline.fit((image for _, image in in_threads(read, train, workers, AHEAD * workers)), batch_size)
    if calibration:
        images = (image for _, image in in_threads(read, calibration, workers, AHEAD * workers))
        baseline.calibrate(images, detector.settings.false_alarms, batch_size)
    return baseline
