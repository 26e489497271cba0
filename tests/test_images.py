"""pytest tests/test_images.py"""

import io
import re
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from ddad.errors import ConfigError, DataError
from ddad.images import (
    ImageInfo,
    ImageRule,
    encode_jpeg,
    encode_png,
    fit_image_rule,
    heatmap,
    overlay,
    probe,
    read_image,
    read_mask,
    write_png,
)

few = settings(max_examples=40, deadline=None)
colour = arrays(np.uint8, st.tuples(st.integers(1, 40), st.integers(1, 40), st.just(3)))
grey = arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=40))
deep = arrays(np.uint16, array_shapes(min_dims=2, max_dims=2, max_side=12))


def encoded(array_or_image, kind, **options):
    image = array_or_image if isinstance(array_or_image, Image.Image) else Image.fromarray(array_or_image)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png16(values):
    """A 16-bit RGB PNG, which Pillow cannot write: values uint16 (H, W, 3)."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def gradient(height=24, width=40):
    """A smooth colour image, so that JPEG and resizing stay close."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x / width, 255 * y / height, 128 + 0 * x], axis=2).astype(np.uint8)


# Reading


@few
@given(pixels=colour, kind=st.sampled_from(["PNG", "BMP", "TIFF"]))
def test_lossless_colour_comes_back_unchanged(pixels, kind):
    read = read_image(encoded(pixels, kind))
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, pixels)
    np.testing.assert_array_equal(read_image(pixels), pixels)


@few
@given(pixels=grey, kind=st.sampled_from(["PNG", "BMP", "TIFF"]))
def test_grey_becomes_three_equal_channels(pixels, kind):
    expected = np.repeat(pixels[..., None], 3, axis=2)
    np.testing.assert_array_equal(read_image(encoded(pixels, kind)), expected)
    np.testing.assert_array_equal(read_image(pixels), expected)
    np.testing.assert_array_equal(read_image(pixels[..., None]), expected)


@few
@given(values=deep, white=st.sampled_from([255, 1023, 4095, 65535]), kind=st.sampled_from(["PNG", "TIFF"]))
@example(values=np.array([[0, 4095]], np.uint16), white=4095, kind="PNG")
def test_deep_grey_is_scaled_linearly_and_keeps_order(values, white, kind):
    values = values & np.uint16(white)
    read = read_image(encoded(values, kind), rule=ImageRule(white=white))
    np.testing.assert_allclose(read[..., 0], values * (255 / white), atol=0.501)
    order = np.argsort(values, axis=None)
    assert (np.diff(read[..., 0].ravel()[order].astype(int)) >= 0).all()
    np.testing.assert_array_equal(read, read_image(values, rule=ImageRule(white=white)))


def test_eight_bit_values_stored_in_sixteen_bits_come_back_exactly():
    ramp = np.arange(256, dtype=np.uint16)[None]
    np.testing.assert_array_equal(read_image(encoded(ramp * 257, "PNG"))[0, :, 0], ramp[0])
    np.testing.assert_array_equal(read_image(encoded(ramp, "PNG"), rule=ImageRule(white=255))[0, :, 0], ramp[0])


@pytest.mark.parametrize("dtype", [">u2", np.int32])
def test_big_endian_and_32_bit_integer_tiff(dtype):
    values = np.array([[0, 1000, 65535]], dtype=dtype)
    assert read_image(encoded(values, "TIFF"))[0, :, 0].tolist() == [0, 4, 255]


def test_deep_images_are_resized_before_rounding():
    values = np.zeros((64, 64), np.uint16)
    values[::2] = 257  # one 8-bit step; its mean, a half step, would be lost the other way round
    values[:, 32:] *= 255
    read = read_image(encoded(values, "PNG"), size=(8, 8))
    assert read.shape == (8, 8, 3)
    assert abs(int(read[4, 7, 0]) - 128) <= 1


def test_float_tiff_in_unit_range_is_read_and_others_refused():
    assert read_image(encoded(np.array([[0, 0.5, 1]], np.float32), "TIFF"))[0, :, 0].tolist() == [0, 128, 255]
    for wrong in (1.5, -0.1, np.nan):
        with pytest.raises(DataError, match=r"expected values from 0 to 1, but found .*; divide by"):
            read_image(encoded(np.array([[0, wrong]], np.float32), "TIFF"))


def test_sixteen_bit_colour_keeps_its_high_byte_and_needs_the_full_range():
    values = np.array([[[0, 256, 65535], [32768, 511, 255]]], np.uint16)
    data = png16(values)
    np.testing.assert_array_equal(read_image(data), values >> 8)
    with pytest.raises(DataError, match="expected grey values from 0 to 4095, as in training, but found 16-bit colour"):
        read_image(data, rule=ImageRule(white=4095))
    # an array has all its bits, so any rule fits
    assert read_image(values >> 4, rule=ImageRule(white=4095)).tolist() == [[[0, 1, 255], [128, 2, 1]]]


def test_transparent_pixels_are_shown_on_black():
    half = Image.fromarray(np.array([[[200, 100, 50, 255], [200, 100, 50, 0], [200, 100, 50, 51]]], np.uint8))
    expected = [[200, 100, 50], [0, 0, 0], [40, 20, 10]]
    for kind in ("PNG", "TIFF"):
        assert read_image(encoded(half, kind))[0].tolist() == expected
    assert read_image(np.asarray(half))[0].tolist() == expected
    deep_alpha = np.asarray(half).astype(np.uint16) * 257
    assert read_image(deep_alpha)[0].tolist() == expected

    palette = Image.fromarray(np.array([[0, 1]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert read_image(encoded(palette, "PNG"))[0].tolist() == [[255, 0, 0], [0, 255, 0]]
    assert read_image(encoded(palette, "PNG", transparency=1))[0].tolist() == [[255, 0, 0], [0, 0, 0]]
    assert read_image(encoded(Image.new("LA", (1, 1), (80, 0)), "PNG"))[0].tolist() == [[0, 0, 0]]
    assert read_image(encoded(np.array([[9, 300]], np.uint16), "PNG", transparency=300))[0].tolist() == [[0] * 3] * 2


def test_other_modes_and_lossy_formats():
    pixels = gradient()
    for data in (encoded(pixels, "JPEG", quality=95), encoded(pixels, "WEBP", lossless=True)):
        assert np.abs(read_image(data).astype(int) - pixels).max() <= 12
    cmyk = read_image(encoded(Image.fromarray(pixels).convert("CMYK"), "TIFF"))
    assert np.abs(cmyk.astype(int) - pixels).max() <= 2
    assert read_image(encoded(np.eye(3, dtype=bool), "PNG"))[..., 0].tolist() == (np.eye(3) * 255).tolist()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "PNG 16"])
def test_exif_rotation(orientation, kind, tmp_path):
    turns = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, -1),
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, 1),
    }
    pixels = np.uint16(gradient()[..., 0]) * 257 if kind == "PNG 16" else gradient()
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {})
    path = tmp_path / "turned"
    path.write_bytes(encoded(pixels, kind.split()[0], exif=exif, **options))
    plain = read_image(encoded(pixels, kind.split()[0], **options))
    read = read_image(path)
    np.testing.assert_array_equal(read, turns[orientation](plain))
    info = probe(path)
    assert (info.height, info.width) == read.shape[:2]


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    pixels = gradient()
    data = encoded(pixels, "PNG")
    path = tmp_path / "named.jpg"  # the content decides
    path.write_bytes(data)

    class Pipe(io.RawIOBase):
        def __init__(self):
            self.file = io.BytesIO(data)

        def readable(self):
            return True

        def readinto(self, into):
            return self.file.readinto(into)

    image = Image.open(path)
    for source in (path, str(path), data, io.BytesIO(data), io.BufferedReader(Pipe()), image, pixels, pixels / 255):
        np.testing.assert_array_equal(read_image(source), pixels)
    handle = io.BytesIO(data)
    handle.read()
    np.testing.assert_array_equal(read_image(handle), pixels)
    assert probe(path) == ImageInfo(width=40, height=24, mode="RGB", bits=8, format="PNG", frames=1)


@few
@given(pixels=colour, height=st.integers(1, 50), width=st.integers(1, 50))
@example(pixels=np.full((1, 300, 3), 7, np.uint8), height=32, width=64)
def test_resizing_gives_the_size_stays_in_range_and_repeats(pixels, height, width):
    data = encoded(pixels, "PNG")
    read = read_image(data, size=(height, width))
    assert read.shape == (height, width, 3)
    assert read.min() >= pixels.min()
    assert read.max() <= pixels.max()
    np.testing.assert_array_equal(read, read_image(data, size=(height, width)))


def test_resizing_is_antialiased():
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 200
    assert np.ptp(read_image(stripes, size=(16, 16))[:, 2:-2]) <= 4


def test_first_frame_of_several():
    first, second = Image.fromarray(gradient()), Image.new("RGB", (4, 4))
    data = encoded(first, "TIFF", save_all=True, append_images=[second])
    np.testing.assert_array_equal(read_image(data), gradient())


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_frames_are_counted(kind, tmp_path):
    path = tmp_path / "several"
    frames = [Image.fromarray(np.roll(gradient(), shift, axis=1)) for shift in range(3)]
    for count in (1, 2, 3):
        path.write_bytes(encoded(frames[0], kind, save_all=True, append_images=frames[1:count]))
        assert probe(path).frames == count
    path.write_bytes(encoded(frames[0], kind))
    assert probe(path).frames == 1


# The rule for deep images


@pytest.mark.parametrize(
    ("highest", "white"), [(0, 255), (255, 255), (256, 511), (1023, 1023), (3000, 4095), (4096, 8191), (65535, 65535)]
)
def test_rule_covers_the_deep_training_images(highest, white, tmp_path):
    Image.fromarray(np.array([[0, highest]], np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(gradient()).save(tmp_path / "flat.png")
    assert fit_image_rule([tmp_path / "deep.png", tmp_path / "flat.png"]) == ImageRule(white=white)


def test_rule_without_deep_images_or_with_deep_colour_is_full_range(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "flat.png")
    Image.fromarray(np.array([[0, 7]], np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "colour.png").write_bytes(png16(np.zeros((1, 1, 3), np.uint16)))
    assert fit_image_rule([]) == fit_image_rule([tmp_path / "flat.png"]) == ImageRule(white=65535)
    assert fit_image_rule(tmp_path.glob("*.png")) == ImageRule()
    assert probe(tmp_path / "colour.png").bits == probe(tmp_path / "deep.png").bits == 16


def test_values_above_white_are_refused_not_clipped(tmp_path):
    path = tmp_path / "bright.png"
    Image.fromarray(np.array([[5, 5000]], np.uint16)).save(path)
    message = (
        f"{path}: expected values from 0 to 4095, but found 5 to 5000; use the camera settings of the training images, "
        "or train again with images that reach this value."
    )
    with pytest.raises(DataError) as caught:
        read_image(path, rule=ImageRule(white=4095))
    assert str(caught.value) == message


@pytest.mark.parametrize("value", [-1, 65536])
def test_rule_refuses_what_no_sixteen_bits_hold(value, tmp_path):
    path = tmp_path / "wide.tif"
    Image.fromarray(np.array([[0, value]], np.int32)).save(path)
    with pytest.raises(DataError, match=r"wide\.tif: expected values from 0 to 65535, .*; rescale it to this range"):
        fit_image_rule([path])
    assert probe(path).bits == 32


# Refusals


def test_messages_name_the_file_and_the_way_out(tmp_path):
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    text = tmp_path / "notes.png"
    text.write_text("These are notes, not a photograph.")
    broken = tmp_path / "broken.png"
    broken.write_bytes(encoded(gradient(100, 100), "PNG")[:150])
    gif = tmp_path / "moving.png"
    gif.write_bytes(encoded(Image.new("P", (3, 3)), "GIF"))
    cases = {
        tmp_path / "none.png": "expected an image file, but there is none of this name; check the path.",
        tmp_path: "expected an image file, but found a folder; name a file inside it.",
        empty: "expected an image, but the file is empty; copy it again or remove it.",
        text: "expected a PNG, JPEG, BMP, TIFF or WebP image, but the content is none of these; convert or remove it.",
        gif: "expected a PNG, JPEG, BMP, TIFF or WebP image, but the content is none of these; convert or remove it.",
        broken: r"expected a whole PNG, .* image, but it cannot be decoded \(.*trunc.*\); copy it again or remove it.",
    }
    for path, words in cases.items():
        with pytest.raises(DataError, match=f"^{re.escape(str(path))}: {words}$"):
            read_image(path)
        if path != broken:
            with pytest.raises(DataError, match=words):
                probe(path)
    assert probe(broken).width == 100  # the header is whole


def test_too_many_pixels_are_refused_before_decoding(tmp_path):
    def start_of_png(side):
        header = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
        return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT"

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(
            DataError, match="expected between 1 and 100,000,000 pixels, but found 60000 x 60000; reduce"
        ):
            read_image(start_of_png(60000))
        with pytest.raises(DataError, match="between 1 and 900 pixels, but found 40 x 24"):
            read_image(encoded(gradient(), "BMP"), max_pixels=900)
        # Between Pillow's warning or error and our limit there is no noise.
        for side in (9500, 20000):
            (tmp_path / "large.png").write_bytes(start_of_png(side))
            assert probe(tmp_path / "large.png", max_pixels=10**9).width == side


@pytest.mark.parametrize(
    "array",
    [np.zeros((0, 4), np.uint8), np.zeros((4, 4, 2), np.uint8), np.zeros(4), np.zeros((4, 4), np.int64)],
    ids=["empty", "two channels", "one axis", "int64"],
)
def test_other_arrays_are_refused(array):
    with pytest.raises(
        DataError, match=re.escape(f"but found shape {array.shape} and {array.dtype}; convert it first")
    ):
        read_image(array)


def test_things_that_are_no_source_are_refused():
    for thing in (None, 3, Image.new("L", (0, 0)), io.StringIO("text")):
        with pytest.raises(DataError):
            read_image(thing)
    with pytest.raises(DataError, match="expected values from 0 to 1, but found 0 to 2"):
        read_image(np.array([[0.0, 2.0]]))


SEEDS = [
    encoded(gradient(), "PNG"),
    encoded(gradient(), "JPEG"),
    encoded(gradient(), "BMP"),
    encoded(gradient(), "TIFF"),
    encoded(gradient(), "TIFF", compression="tiff_lzw"),
    encoded(gradient(), "WEBP"),
    encoded(gradient()[..., 0].astype(np.uint16), "PNG"),
]


def array_or_message(read, data):
    try:
        return read(data, max_pixels=10**6)
    except DataError as error:
        return str(error)


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(data=st.data(), seed=st.sampled_from(SEEDS))
def test_damage_never_raises_anything_else(data, seed):
    damaged = bytearray(seed[: data.draw(st.integers(0, len(seed)))])
    for _ in range(data.draw(st.integers(0, 8)) if damaged else 0):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    for read in (read_image, read_mask):
        result = array_or_message(read, bytes(damaged))
        assert not isinstance(result, str) or result.startswith("the given bytes: expected ")


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None)
@given(
    start=st.sampled_from([b"", b"BM", b"\xff\xd8\xff", b"II*\0", b"RIFF\0\0\0\0WEBP", SEEDS[0][:16]]), end=st.binary()
)
def test_random_bytes_never_raise_anything_else(start, end):
    result = array_or_message(read_image, start + end)
    assert not isinstance(result, str) or "\n" not in result


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("index", range(len(SEEDS)))
def test_a_truncated_file_is_an_error_or_whole(index):
    whole = read_image(SEEDS[index])
    for length in range(0, len(SEEDS[index]), 7):
        try:
            np.testing.assert_array_equal(read_image(SEEDS[index][:length]), whole)
        except DataError:
            continue


# Masks


@pytest.mark.parametrize("top", [1, 2, 255])
def test_masks_of_any_brightness_mean_the_same(top):
    shape = np.zeros((6, 9), bool)
    shape[2:4, 3:7] = True
    values = (shape * top).astype(np.uint8)
    for source in (encoded(values, "PNG"), values, encoded(values.astype(np.uint16) * 200, "PNG"), shape):
        mask = read_mask(source)
        assert mask.dtype == bool
        np.testing.assert_array_equal(mask, shape)
    np.testing.assert_array_equal(read_mask(np.repeat(values[..., None], 3, axis=2)), shape)


def test_black_mask_is_empty_and_half_bright_is_not_defect():
    assert not read_mask(np.zeros((4, 4), np.uint8)).any()
    assert read_mask(np.array([[100, 101, 200, 0]], np.uint8)).tolist() == [[False, True, True, False]]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_in_a_mask_of_class_ids_every_class_marks(kind):
    values = np.array([[0, 1, 2], [5, 31, 0]], kind)
    assert read_mask(encoded(values, "PNG")).tolist() == [[False, True, True], [True, True, False]]
    np.testing.assert_array_equal(read_mask(values), values > 0)
    values[1, 1] = 32  # one more is brightness: 5 is a soft edge
    assert read_mask(values).tolist() == [[False, False, False], [False, True, False]]


def test_a_mask_of_fractions_holds_no_class_ids():
    assert read_mask(np.array([[0, 0.3, 0.6, 1]], np.float32)).tolist() == [[False, False, True, True]]
    assert not read_mask(np.zeros((1, 2), np.float32)).any()


def test_mask_resized_keeps_cells_covered_by_half():
    mask = np.zeros((64, 64), bool)
    mask[16:32, 16:48] = True
    small = read_mask(mask, size=(16, 16))
    assert small.shape == (16, 16)
    expected = np.zeros((16, 16), bool)
    expected[4:8, 4:12] = True
    np.testing.assert_array_equal(small, expected)
    with pytest.raises(DataError, match="the given bytes: expected an image, but the file is empty"):
        read_mask(b"")


# Pictures


def brightness(picture):
    return picture.astype(float) @ (0.299, 0.587, 0.114)


def test_heatmap_is_fixed_monotone_and_dark_for_good_parts():
    ramp = np.linspace(0, 3, 301)[None] * 0.4
    picture = heatmap(ramp, limit=0.4)
    assert picture.shape == (1, 301, 3)
    assert picture.dtype == np.uint8
    assert (np.diff(brightness(picture)[0]) >= 0).all()
    assert brightness(picture)[0, :101].max() < 50  # up to the limit
    assert (picture[0, 200:] == picture[0, 200]).all()  # saturated from twice the limit
    assert brightness(picture)[0, 200] > 200
    np.testing.assert_array_equal(heatmap(ramp[:, :10], 0.4), picture[:, :10])  # no scaling by its own maximum


def test_not_a_number_is_hot():
    assert (heatmap(np.array([[np.nan, np.inf, 2.0]]), 1.0) == heatmap(np.array([[2.0]]), 1.0)).all()


def test_overlay_leaves_the_photograph_where_the_map_is_low():
    photo = gradient()
    anomaly_map = np.zeros((24, 40))
    anomaly_map[:, 20:] = np.linspace(1.01, 2, 20)
    result = overlay(photo, anomaly_map, limit=1.0)
    np.testing.assert_array_equal(result[:, :20], photo[:, :20])
    assert (result[:, 20:] != photo[:, 20:]).any(axis=2).all()
    small = overlay(photo, anomaly_map[::4, ::4], limit=1.0)
    assert small.shape == photo.shape
    np.testing.assert_array_equal(small[:, :16], photo[:, :16])


@pytest.mark.parametrize("limit", [0, -1, np.nan])
def test_limit_must_be_positive(limit):
    with pytest.raises(ConfigError, match="expected limit to be above 0, got "):
        heatmap(np.zeros((2, 2)), limit)


def test_written_pictures(tmp_path):
    path = tmp_path / "heat.png"
    write_png(path, np.zeros((3, 3), np.uint8))
    write_png(path, gradient())  # replaces
    np.testing.assert_array_equal(read_image(path), gradient())
    assert [entry.name for entry in tmp_path.iterdir()] == ["heat.png"]
    assert path.read_bytes() == encode_png(gradient())
    assert np.abs(read_image(encode_jpeg(gradient(), quality=95)).astype(int) - gradient()).max() <= 12
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"Expected a place to write .*heat\.png, found that it cannot be written"):
        write_png(tmp_path / "file" / "heat.png", gradient())


def test_no_torch():
    code = "import sys, ddad.images, ddad.conformal, ddad.data.check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
