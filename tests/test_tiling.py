"""Large photographs in overlapping tiles. pytest tests/test_tiling.py"""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from analytic import GaussianUNet
from ddad.cli import app
from ddad.config import make_settings
from ddad.detector import Detector
from ddad.features import create_features
from ddad.tiling import OVERLAP, Tiles, Tiling
from ddad.unet import create_scheduler

TILES = (2, 3)
CANVAS = Tiling(*TILES, (64, 32)).canvas


@pytest.mark.parametrize("tiles", [(1, 1), (1, 4), (2, 3), (5, 2)])
@pytest.mark.parametrize("tile", [(32, 32), (64, 96)])
def test_tiles_cover_the_canvas_and_neighbours_share_a_quarter(tile, tiles):
    tiling = Tiling(*tiles, tile)
    assert Tiling.of(tiling.canvas, tiles) == tiling
    covered = np.zeros(tiling.canvas, int)
    for window in tiling.windows:
        assert covered[window].shape == tile
        covered[window] += 1
    assert covered.min() == 1
    rows, columns = tiling.windows[0][0], tiling.windows[-1][1]
    assert (rows.start, columns.stop) == (0, tiling.canvas[1])
    if tiles[1] > 1:
        first, second = tiling.windows[0][1], tiling.windows[1][1]
        assert first.stop - second.start == tile[1] // OVERLAP


def test_what_is_cut_and_blended_is_what_it_was():
    tiling = Tiling(*TILES, (64, 32))
    canvases = torch.randn(3, 2, *tiling.canvas)
    tiles = tiling.cut(canvases)
    assert tiles.shape == (3 * 6, 2, 64, 32)
    torch.testing.assert_close(tiling.blend(tiles), canvases)
    whole = Tiling(1, 1, tiling.canvas)
    assert torch.equal(whole.blend(whole.cut(canvases)), canvases)


def test_one_tile_fades_into_the_next_without_a_step():
    tiling = Tiling(1, 2, (32, 64))
    levels = torch.zeros(2, 1, 32, 64)
    levels[1] = 1.0
    blended = tiling.blend(levels)[0, 0, 0]
    overlap = 64 // OVERLAP
    assert torch.equal(blended[: 64 - overlap], torch.zeros(64 - overlap))
    torch.testing.assert_close(blended[64 - overlap : 64], (torch.arange(overlap) + 0.5) / overlap)
    assert torch.equal(blended[64:], torch.ones(64 - overlap))


def test_tiles_of_images_are_images():
    tiling = Tiling(*TILES, (64, 32))
    images = [np.random.default_rng(i).integers(0, 255, (*tiling.canvas, 3), dtype=np.uint8) for i in range(2)]
    tiles = Tiles(images, tiling)
    stacked = torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images])
    assert len(tiles) == 12
    for index, tile in enumerate(tiling.cut(stacked)):
        np.testing.assert_array_equal(tiles[index], tile.permute(1, 2, 0).numpy())


def photo(seed, size=CANVAS):
    return np.clip(128 + 12 * np.random.default_rng(seed).standard_normal((*size, 3)), 0, 255).astype(np.uint8)


def detector(tiles, shape=CANVAS, **sampling):
    """The ideal denoiser treats each pixel by itself, so that cutting must change nothing."""
    settings = make_settings(
        "xs",
        tiles=tiles,
        false_alarms=0.05,
        network={"prediction_type": "epsilon"},
        sampling={"match_level": False, **sampling},
        scoring={"layer_weights": (0.0, 0.0)},
    )
    features = create_features("efficientnet-lite2", (2, 3))
    return Detector(GaussianUNet(0.0, 0.1), create_scheduler("epsilon"), features, settings, shape, device="cpu")


@pytest.fixture(scope="module")
def tiled():
    made = detector(TILES)
    made.calibrate([photo(300 + i) for i in range(4)], [photo(400 + i) for i in range(19)])
    return made


def test_a_network_without_surroundings_rebuilds_the_same_in_tiles_and_as_a_whole(tiled):
    images = [photo(i) for i in range(3)]
    whole = detector((1, 1))
    torch.testing.assert_close(tiled.reconstruct(images), whole.reconstruct(images))
    towards = [photo(10 + i) for i in range(3)]
    for one in (tiled, whole):
        one.towards = one.reconstruct(images, start=towards, conditioning_weight=2.0)
    torch.testing.assert_close(tiled.towards, whole.towards)
    assert tiled.distances(images, tiled.towards).shape == (3, 3, *CANVAS)
    torch.testing.assert_close(
        tiled.distances(images, tiled.towards)[:, 0], whole.distances(images, whole.towards)[:, 0]
    )


def test_the_score_of_a_photograph_in_tiles_does_not_depend_on_its_batch(tiled):
    images = [photo(i) for i in range(5)]
    alone = [tiled.predict(image).anomaly_score for image in images]
    for size in (2, 5):
        assert [one.anomaly_score for one in tiled.predict(images, batch_size=size)] == pytest.approx(alone, rel=1e-5)


def test_a_defect_across_tiles_is_one_region_in_the_photographs_own_pixels(tiled):
    assert len(tiled.calibration.scores) == 19  # photographs, not tiles
    size = (2 * CANVAS[0], 2 * CANVAS[1])
    image = np.asarray(Image.fromarray(photo(7)).resize(size[::-1], Image.Resampling.NEAREST)).copy()
    edge = 2 * (64 - 8)  # the middle of where the first row of tiles meets the second
    image[edge - 16 : edge + 16, 40:80] = 250
    result = tiled.predict(image)
    assert result.is_anomalous
    left, top, right, bottom = result.regions[0].box
    assert (left, top) < (60, edge) < (right, bottom)
    assert right - left < 100
    assert bottom - top < 100
    assert result.anomaly_map.shape == CANVAS
    assert result.reconstruction.shape == (*CANVAS, 3)


@pytest.mark.slow
def test_trained_predicted_and_told_on_the_command_line(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(20):
        Image.fromarray(photo(i, (60, 120))).save(photos / f"{i:02d}.png")

    def run(*arguments):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        return result.output

    said = run("train", photos, "--out", tmp_path / "model", "--tiles", "1x2", "--image-size", 32, "--steps", 2)
    assert "at 32 x 56 pixels, in 2 tiles of 32 x 32: " in said
    assert "32 x 56 pixels in 1 x 2 tiles" in run("info", tmp_path / "model")
    run("predict", tmp_path / "model", photos / "00.png", "--out", tmp_path / "out")
    row = json.loads((tmp_path / "out" / "results.jsonl").read_text())
    assert Image.open(tmp_path / "out" / row["files"]["heatmap"]).size == (120, 60)
    loaded = Detector.from_pretrained(tmp_path / "model")
    assert loaded.tiling == Tiling(1, 2, (32, 32))
    assert loaded.predict(photos / "00.png").anomaly_score == pytest.approx(row["anomaly_score"], rel=1e-5)


@pytest.mark.parametrize("tiles", ["2", "2x", "0x2", "ax3"])
def test_tiles_that_cannot_be(tiles, tmp_path):
    result = CliRunner().invoke(app, ["train", str(tmp_path), "--out", str(tmp_path / "model"), "--tiles", tiles])
    if tiles == "0x2":
        assert "Setting tiles.0: Input should be greater than or equal to 1, found 0." in str(result.exception)
    else:
        assert result.exit_code == 2
        assert "expected rows x columns such as 2x3" in result.output
