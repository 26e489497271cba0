"""pytest tests/test_anomaly_map.py"""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional

from ddad.anomaly_map import (
    centre,
    feature_distance,
    fuse,
    fuse_batch_max,
    image_score,
    pixel_distance,
    smooth,
    standardise,
)


def test_pixel_distance_is_the_mean_over_channels():
    target = torch.zeros(2, 3, 4, 5)
    reconstruction = torch.tensor([0.3, -0.6, 0.0]).view(1, 3, 1, 1).expand_as(target)
    torch.testing.assert_close(pixel_distance(target, reconstruction), torch.full((2, 4, 5), 0.3))


def test_feature_distance_is_one_minus_cosine():
    same = torch.randn(1, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    assert feature_distance(same, 3 * same, (12, 12)).abs().max() < 1e-6  # length does not count
    torch.testing.assert_close(feature_distance(same, -same, (12, 12)), torch.full((1, 12, 12), 2.0))


def test_feature_distance_of_constant_features_has_no_seam_at_the_border():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    maps = [value.view(1, 2, 1, 1).expand(1, 2, 5, 7) for value in (a, b)]
    distance = feature_distance(*maps, (10, 14))
    torch.testing.assert_close(distance, torch.full((1, 10, 14), 1 - 0.5**0.5))


def test_feature_distance_as_published():
    """3 x 3 pooling with zeros beyond the border, corners aligned with corners."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(2, 5, 6, 6, generator=generator) for _ in range(2))
    window = torch.full((5, 1, 3, 3), 1 / 9)
    pooled = [functional.conv2d(maps, window, padding=1, groups=5) for maps in (a, b)]
    cosine = (pooled[0] * pooled[1]).sum(1) / (pooled[0].norm(dim=1) * pooled[1].norm(dim=1))
    distance = feature_distance(a, b, (11, 11), zero_padding=True, align_corners=True)
    # With aligned corners every second pixel of 11 is one of the 6 cells.
    torch.testing.assert_close(distance[:, ::2, ::2], 1 - cosine)


def test_batch_max_fusion_by_hand():
    pixel, one, two = (torch.tensor(values).view(2, 1, 1) for values in ([1.0, 4.0], [2.0, 1.0], [0.0, 5.0]))
    fused = fuse_batch_max([pixel, one, two], [3.0, 1.0, 2.0])
    layers = torch.tensor([2.0, 11.0]).view(2, 1, 1)
    torch.testing.assert_close(fused, layers + 3 * 11 / 4 * pixel)


@pytest.mark.parametrize(
    ("shape", "crop", "expected"),
    [
        ((256, 256), 224 / 256, (224, 224)),
        ((288, 224), 0.5, (144, 112)),
        ((64, 64), 1.0, (64, 64)),
        ((64, 64), None, (64, 64)),
    ],
)
def test_centre(shape, crop, expected):
    mask = np.zeros(shape, bool)
    mask[centre(*shape, crop)] = True
    assert mask[centre(*shape, crop)].shape == expected
    np.testing.assert_array_equal(mask, mask[::-1, ::-1])


def test_fuse_weighs_in_units_of_good_parts():
    one, two = torch.full((1, 2, 2), 3.0), torch.full((1, 2, 2), 8.0)
    torch.testing.assert_close(fuse([one, two], [1.5, 4.0], [2.0, 0.5]), torch.full((1, 2, 2), 2 * 2 + 2 * 0.5))


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.5])
def test_smoothing_equals_scipy(sigma):
    values = torch.rand(2, 31, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = [
        ndimage.gaussian_filter(v, sigma, mode="mirror", radius=int(np.ceil(4 * sigma))) for v in values.numpy()
    ]
    np.testing.assert_allclose(smooth(values, sigma).numpy(), np.stack(expected), atol=1e-9)


def test_smoothing_a_map_smaller_than_the_kernel():
    torch.testing.assert_close(smooth(torch.full((1, 4, 4), 2.0), 10.0), torch.full((1, 4, 4), 2.0))


def test_standardised_is_spreads_above_good_parts_at_each_place():
    mean, spread = torch.rand(4, 5), torch.rand(4, 5) + 0.5
    torch.testing.assert_close(standardise(mean + 3 * spread, mean, spread)[None], torch.full((1, 4, 5), 3.0))


def test_score_is_the_maximum():
    assert image_score(torch.arange(12.0).view(2, 2, 3)).tolist() == [5, 11]
