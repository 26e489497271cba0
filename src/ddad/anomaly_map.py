"""From photograph and reconstruction to a map of differences and a score.

D_p   pixel_distance     mean over channels of |y - x₀|
D_f   feature_distance   1 - cosine, layer by layer, after 3 x 3 mean pooling
D     fuse               D_f + v · D_p, each in units of what good parts show
σ     smoothing          Gaussian over D; the image's score is its maximum
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ddad.features import pool


def pixel_distance(target: Tensor, reconstruction: Tensor) -> Tensor:
    """D_p: mean over channels of |y - x₀|, (B, 3, H, W) twice -> (B, H, W) in [0, 2] for images in [-1, 1]."""
    return (target - reconstruction).abs().mean(dim=1)


def feature_distance(
    target: Tensor,
    reconstruction: Tensor,
    size: tuple[int, int],
    *,
    zero_padding: bool = False,
    align_corners: bool = False,
) -> Tensor:
    """1 - cosine of one layer's features after 3 x 3 mean pooling, (B, C, h, w) twice -> (B, H, W) in [0, 2]."""
    one, other = pool(target, zero_padding), pool(reconstruction, zero_padding)
    distance = 1 - functional.cosine_similarity(one, other, dim=1)
    return functional.interpolate(distance[:, None], size=size, mode="bilinear", align_corners=align_corners)[:, 0]


def standardise(distance: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """Distances (B, H, W) in spreads above what good parts show at each place; `mean` and `spread` are (H, W)."""
    return (distance - mean) / spread


def fuse(distances: Sequence[Tensor], scales: Sequence[float], weights: Sequence[float]) -> Tensor:
    """Σ weight · distance / scale, all (B, H, W).

    A scale is what good parts show, measured once on held-out good images, so a map depends on its own image only.
    """
    fused = torch.zeros_like(distances[0])
    for distance, scale, weight in zip(distances, scales, weights, strict=True):
        fused = fused + distance * (weight / scale)
    return fused


def fuse_batch_max(distances: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """As published: D = D_f + v · max(D_f) / max(D_p) · D_p, the maxima over the whole batch, D_f the sum of layers.

    A map then depends on the other images of its batch; this is here for comparison only.

    Args:
        distances: the pixel distance, then each layer's, (B, H, W), before smoothing.
        weights: v, then the weight of each layer.
    """
    pixel, *layers = distances
    pixel_weight, *layer_weights = weights
    features = torch.zeros_like(pixel)
    for distance, weight in zip(layers, layer_weights, strict=True):
        features = features + weight * distance
    return features + pixel_weight * features.max() / pixel.max().clamp(min=1e-12) * pixel


def centre(height: int, width: int, crop: float | None) -> tuple[slice, slice]:
    """Rows and columns of the centre, `crop` of each side; all of them where it is None."""
    rows, columns = (round(length * (1 - crop) / 2) if crop else 0 for length in (height, width))
    return slice(rows, height - rows), slice(columns, width - columns)


def smooth(anomaly_map: Tensor, sigma: float) -> Tensor:
    """Gaussian of `sigma` pixels over (B, H, W), mirrored at the border, cut at 4 σ."""
    if sigma == 0:
        return anomaly_map
    height, width = anomaly_map.shape[-2:]
    radius = min(math.ceil(4 * sigma), height - 1, width - 1)
    offsets = torch.arange(-radius, radius + 1, dtype=anomaly_map.dtype, device=anomaly_map.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    blurred = functional.pad(anomaly_map[:, None], (radius,) * 4, mode="reflect")
    blurred = functional.conv2d(blurred, kernel.view(1, 1, 1, -1))
    return functional.conv2d(blurred, kernel.view(1, 1, -1, 1))[:, 0]


def image_score(anomaly_map: Tensor) -> Tensor:
    """The maximum of each map: (B, H, W) -> (B,)."""
    return anomaly_map.flatten(1).amax(dim=1)
