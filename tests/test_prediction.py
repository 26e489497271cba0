"""Regions and photo statistics: pytest tests/test_prediction.py"""

import numpy as np
import pytest
from scipy import ndimage

from ddad.prediction import MOST_REGIONS, Region, regions


def test_regions_are_connected_over_corners_and_in_photograph_pixels():
    anomaly_map = np.zeros((10, 20), np.float32)
    anomaly_map[1, 1] = anomaly_map[2, 2] = 5.0  # touch at a corner: one region
    anomaly_map[7:9, 10:14] = 3.0
    anomaly_map[5, 0] = 1.0  # at the limit, not above it
    assert regions(anomaly_map, 1.0, photo_size=(20, 40)) == (
        Region(box=(2, 2, 6, 6), area=8, peak=5.0),
        Region(box=(20, 14, 28, 18), area=32, peak=3.0),
    )
    assert regions(anomaly_map, 9.0, photo_size=(20, 40)) == ()


@pytest.mark.parametrize(("cells", "side"), [(224, 58), (96, 1000), (32, 31)])
def test_a_region_never_reaches_past_the_photograph(cells, side):
    (region,) = regions(np.ones((cells, cells), np.float32), 0.5, photo_size=(side, side))
    assert region.box == (0, 0, side, side)
    assert region.area == side * side


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(10))
def test_regions_are_those_of_scipy(seed, share):
    """On noise, whose regions have every shape: the same groups, boxes, areas and peaks as scipy's labels."""
    rng = np.random.default_rng(seed)
    anomaly_map = rng.random((rng.integers(1, 40), rng.integers(1, 40)), np.float32)
    labels, count = ndimage.label(anomaly_map > 1 - share, structure=np.ones((3, 3)))
    expected = [
        Region(
            (columns.start, rows.start, columns.stop, rows.stop),
            int((labels == index).sum()),
            float(anomaly_map[labels == index].max()),
        )
        for index, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1)
    ]
    assert len(expected) == count
    found = regions(anomaly_map, 1 - share, anomaly_map.shape, max_regions=count + 1)
    assert sorted(found, key=lambda one: one.peak) == sorted(expected, key=lambda one: one.peak)
    assert regions(anomaly_map, 1 - share, anomaly_map.shape) == found[:MOST_REGIONS]
