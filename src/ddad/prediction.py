"""What a detector says of a photograph, and what the photograph looks like. NumPy and Pillow are all it takes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddad.errors import DataError
from ddad.images import ImageRule, read_photo
from ddad.streaming import in_batches

ImageSource = str | Path | bytes | BinaryIO | np.ndarray | Image.Image

MOST_REGIONS = 20

_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # Rec. 601
_STEP = 1.0  # grey levels between neighbours that count half as detail
_FLAT = 0.1  # grey levels: keeps the logarithm finite where a photograph is flat


@dataclass(frozen=True)
class Photo:
    """A photograph, read for a model."""

    path: str | None
    image: np.ndarray
    """uint8 (H, W, 3), the model's shape."""
    size: tuple[int, int]
    """Height and width of the photograph itself, to which regions refer."""
    category: str | None = None
    """What it is to be judged as, by one network for many; None: as what it looks like."""


@dataclass(frozen=True)
class Region:
    """A connected group of anomalous pixels, in pixels of the photograph as it was given."""

    box: tuple[int, int, int, int]
    """Left, top, right, bottom; right and bottom are exclusive."""
    area: int
    """Pixels."""
    peak: float
    """Largest value of the anomaly map inside."""


@dataclass(frozen=True)
class Prediction:
    """What the detector says of one photograph. H x W is the model's shape."""

    path: str | None
    anomaly_score: float
    """Peak of the anomaly map; 1 is what a good part typically reaches (without calibration: no unit)."""
    p_value: float | None
    """Share of good parts that look at least this anomalous; None without calibration."""
    is_anomalous: bool | None
    """The verdict at the calibrated threshold; None without calibration."""
    threshold: float | None
    anomaly_map: np.ndarray
    """(H, W) float32, ≥ 0."""
    reconstruction: np.ndarray
    """(H, W, 3) uint8: the photograph as it would look without a defect."""
    image: np.ndarray
    """(H, W, 3) uint8: the photograph as the model sees it."""
    regions: tuple[Region, ...]
    """Anomalous regions in the photograph's own pixels, strongest first."""
    category: str | None = None
    """The category it was judged as, by one network for many."""


class Inspector(ABC):
    """What inspects photographs: a `Detector`, or a `Runtime`."""

    shape: tuple[int, int]
    """(height, width) that photographs are resized to."""
    image_rule: ImageRule

    @property
    @abstractmethod
    def is_calibrated(self) -> bool:
        """Whether 1 is what a good part's peak typically is; else maps have no unit."""

    @abstractmethod
    def predict_photos(self, batch: Sequence[Photo]) -> list[Prediction]:
        """Inspect photographs that are read already, all in one batch."""

    @overload
    def predict(self, images: ImageSource, batch_size: int = ...) -> Prediction: ...  # type: ignore[overload-overlap]
    @overload
    def predict(self, images: Sequence[ImageSource], batch_size: int = ...) -> list[Prediction]: ...
    def predict(
        self, images: ImageSource | Sequence[ImageSource], batch_size: int = 4
    ) -> Prediction | list[Prediction]:
        """Inspect one photograph or a list of them.

        Args:
            images: a path, bytes, an open file, a PIL image, an array (H, W[, 1|3|4]) uint8, uint16, bool or float in
                [0, 1], or a list of these. The score of an image does not depend on the others.
            batch_size: how many go through the network together.

        Raises:
            DataError: an image that cannot be read.
        """
        if not isinstance(images, list | tuple):
            return self.predict([images], batch_size)[0]  # type: ignore[list-item]
        results = []
        for _, result in self.stream(images, batch_size):
            if isinstance(result, DataError):
                raise result
            results.append(result)
        return results

    def stream(
        self, images: Iterable[ImageSource], batch_size: int = 4, workers: int = 1
    ) -> Iterator[tuple[Any, Prediction | DataError]]:
        """Inspect any number of photographs in order, a few in memory at a time.

        Yields (source, prediction), or (source, error) for one that cannot be read. `workers` threads decode ahead of
        the network.
        """
        return in_batches(images, self._read, self.predict_photos, batch_size, workers)

    def _read(self, source: ImageSource) -> Photo | DataError:
        try:
            image, photo_size = read_photo(source, self.shape, self.image_rule)
        except DataError as error:
            return error
        return Photo(str(source) if isinstance(source, str | Path) else None, image, photo_size)


def regions(
    anomaly_map: np.ndarray, limit: float, photo_size: tuple[int, int], max_regions: int = MOST_REGIONS
) -> tuple[Region, ...]:
    """8-connected groups of pixels above `limit` in a map (H, W), strongest first, in a photograph's pixels."""
    height, width = anomaly_map.shape
    vertical, horizontal = photo_size[0] / height, photo_size[1] / width
    found = []
    for group in _connected(anomaly_map > limit):
        rows, starts, stops = np.array(group).T
        box = (
            int(starts.min()) * photo_size[1] // width,
            int(rows.min()) * photo_size[0] // height,
            -(-int(stops.max()) * photo_size[1] // width),
            -(-int(rows.max() + 1) * photo_size[0] // height),
        )
        area = max(1, round(float((stops - starts).sum()) * vertical * horizontal))
        found.append(Region(box, area, max(float(anomaly_map[row, start:stop].max()) for row, start, stop in group)))
    return tuple(sorted(found, key=lambda region: -region.peak)[:max_regions])


def _connected(mask: np.ndarray) -> list[list[tuple[int, int, int]]]:
    """8-connected groups of a mask (H, W), each as runs (row, start, stop), `stop` exclusive, from top to bottom."""
    steps = np.diff(mask.astype(np.int8), prepend=0, append=0, axis=1)
    rows, starts = np.nonzero(steps == 1)
    stops = np.nonzero(steps == -1)[1]
    runs = list(zip(rows.tolist(), starts.tolist(), stops.tolist(), strict=True))
    parent = list(range(len(runs)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = run = parent[parent[run]]
        return run

    above = 0  # the first run that may touch the present one
    for run, (row, start, stop) in enumerate(runs):
        while runs[above][0] < row - 1 or (runs[above][0] == row - 1 and runs[above][2] < start):
            above += 1
        other = above
        while runs[other][0] == row - 1 and runs[other][1] <= stop:
            parent[root(other)] = root(run)
            other += 1
    groups: dict[int, list[tuple[int, int, int]]] = {}
    for run, place in enumerate(runs):
        groups.setdefault(root(run), []).append(place)
    return list(groups.values())


class PhotoStatistics(NamedTuple):
    """What one photograph looks like, whatever the part."""

    brightness: float
    """Mean grey, 0 to 255."""
    focus: float
    """Fineness of the detail, a natural logarithm: less is blurrier. Neither gain nor offset of the grey matters."""
    horizontal: float
    """Where the detail lies on average, in shares of the width: 0 is left, 1 right."""
    vertical: float
    """The same in shares of the height: 0 is top, 1 bottom."""


def photo_statistics(image: NDArray[np.uint8]) -> PhotoStatistics:
    """Brightness, focus and framing of one photograph, uint8 (H, W, 3), H and W at least 3, as the detector sees it.

    Focus is the mean absolute Laplacian over the mean absolute difference of neighbours: blur takes the finest detail
    first. Both operators are in the survey by Pertuz et al. ("Analysis of focus measure operators for
    shape-from-focus", Pattern Recognition 46, 2013). The usual variance of the Laplacian over the variance of the grey
    (Pech-Pacheco et al., ICPR 2000) also falls when light becomes uneven or a border enters the picture, and squares
    leave the word to a few strong edges.

    Framing is the mean place of horizontal detail across the width, vertical down the height. Neighbours d grey levels
    apart weigh d² / (d² + 1). So faint texture counts nearly like an edge, and an empty strip, flat or black, counts
    nothing although its own edge may be the strongest of all. Where a texture fills the picture, an empty strip moves
    the place by about half its width, in the direction the picture moved; a part before an even background moves it
    by all of it.

    Raises DataError for anything but such an image.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < 3:
        raise DataError(
            "Expected a uint8 image of shape (height, width, 3), both at least 3 pixels, found "
            f"{image.dtype} {image.shape}; read it with ddad.images.read_image."
        )
    grey = image.astype(np.float32) @ _LUMA  # (H, W)
    across, down = np.diff(grey, axis=1), np.diff(grey, axis=0)  # (H, W-1), (H-1, W)
    laplacian = np.diff(across, axis=1)[1:-1] + np.diff(down, axis=0)[:, 1:-1]  # (H-2, W-2)
    gradient = np.abs(across).mean() + np.abs(down).mean()
    return PhotoStatistics(
        brightness=float(grey.mean()),
        focus=math.log((np.abs(laplacian).mean() + _FLAT) / (gradient + _FLAT)),
        horizontal=_place(across),
        vertical=_place(down.T),
    )


def _place(differences: NDArray[np.float32]) -> float:
    """Mean place of the detail along the last axis, 0 to 1; the middle where there is none."""
    energy = differences**2
    weights = (energy / (energy + _STEP**2)).sum(axis=0, dtype=np.float64)  # one per gap between neighbours
    total = weights.sum()
    places = np.arange(1, len(weights) + 1) / (len(weights) + 1)
    return float(places @ weights / total) if total > 0 else 0.5
