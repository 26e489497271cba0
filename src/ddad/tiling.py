"""Large photographs in overlapping tiles: each goes through the networks alone, and what comes out is blended.

The whole photograph is resized to a canvas of rows x columns tiles that overlap by a quarter of their side. Units,
score and threshold are those of the canvas, so a photograph in tiles is calibrated, and judged, as one image.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

OVERLAP = 4
"""One part in so many of a tile's side is shared with its neighbour."""


class Tiling(NamedTuple):
    """How a canvas is cut; one row and one column leave it as it is."""

    rows: int
    columns: int
    tile: tuple[int, int]
    """(height, width), multiples of 4."""

    @classmethod
    def of(cls, canvas: tuple[int, int], tiles: tuple[int, int]) -> "Tiling":
        """The tiling of a canvas (height, width), as `canvas` gives it, in `tiles` rows and columns."""
        rows, columns = tiles
        return cls(rows, columns, (round(canvas[0] / spans(rows)), round(canvas[1] / spans(columns))))

    @property
    def number(self) -> int:
        return self.rows * self.columns

    @property
    def canvas(self) -> tuple[int, int]:
        """(height, width) of the whole."""
        return round(self.tile[0] * spans(self.rows)), round(self.tile[1] * spans(self.columns))

    @property
    def windows(self) -> list[tuple[slice, slice]]:
        """Where each tile lies in the canvas, row by row."""
        steps = [side - side // OVERLAP for side in self.tile]
        corners = ((row * steps[0], column * steps[1]) for row in range(self.rows) for column in range(self.columns))
        return [(slice(top, top + self.tile[0]), slice(left, left + self.tile[1])) for top, left in corners]

    def cut(self, canvases: Tensor) -> Tensor:
        """Tiles (B·number, C, h, w) of canvases (B, C, H, W), all of one canvas after the other."""
        return torch.stack([canvases[..., rows, columns] for rows, columns in self.windows], dim=1).flatten(0, 1)

    def blend(self, tiles: Tensor) -> Tensor:
        """Canvases (B, C, H, W) from tiles (B·number, C, h, w); where tiles overlap, one fades into the other."""
        if self.number == 1:
            return tiles
        weight = _ramp(self.tile[0])[:, None] * _ramp(self.tile[1])
        weight = weight.to(tiles)
        by_canvas = tiles.unflatten(0, (-1, self.number))
        total = tiles.new_zeros(by_canvas.shape[0], tiles.shape[1], *self.canvas)
        weights = tiles.new_zeros(self.canvas)
        for index, (rows, columns) in enumerate(self.windows):
            total[..., rows, columns] += weight * by_canvas[:, index]
            weights[rows, columns] += weight
        return total / weights


class Tiles(Sequence[np.ndarray]):
    """The tiles of images (uint8, canvas shape) as images of their own; cut when asked for."""

    def __init__(self, images: Sequence[np.ndarray], tiling: Tiling) -> None:
        self._images, self._windows = images, tiling.windows

    def __len__(self) -> int:
        return len(self._images) * len(self._windows)

    def __getitem__(self, index: Any) -> Any:
        image, tile = divmod(index, len(self._windows))
        return self._images[image][self._windows[tile]]


def spans(count: int) -> float:
    """How many sides of a tile `count` overlapping ones cover."""
    return 1 + (count - 1) * (1 - 1 / OVERLAP)


def _ramp(side: int) -> Tensor:
    """Weights (side,): level inside, falling towards both ends where a neighbour may take over."""
    place = torch.arange(side) + 0.5
    return torch.minimum(place, side - place).clamp(max=side // OVERLAP)
