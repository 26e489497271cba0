"""Read any photograph to 8-bit RGB, any mask to booleans; turn anomaly maps into pictures.

The content decides the format, never the file's ending. The first frame of a file with several is read. Transparent
pixels are shown on black. Whatever a damaged or hostile file makes the decoder raise, the caller sees a `DataError`.
"""

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import (
    BmpImagePlugin,
    ExifTags,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from ddad.errors import ConfigError, DataError
from ddad.files import write_bytes

Source = str | os.PathLike[str] | bytes | BinaryIO | Image.Image | np.ndarray

MAX_PIXELS = 100_000_000
FORMATS = "PNG, JPEG, BMP, TIFF or WebP"
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
CLASS_IDS = 32
"""A mask whose largest whole number is below this holds ids of classes, not brightness."""

# First bytes of a file and the Pillow class that reads it. The classes are called directly, because `Image.open`
# compares with one limit for the whole process and merely warns up to twice that.
_SIGNATURES: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (b"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (b"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (b"BM", BmpImagePlugin.BmpImageFile),
    (b"II*\0", TiffImagePlugin.TiffImageFile),
    (b"MM\0*", TiffImagePlugin.TiffImageFile),
    (b"II+\0", TiffImagePlugin.TiffImageFile),
    (b"MM\0+", TiffImagePlugin.TiffImageFile),
    (b"RIFF", WebPImagePlugin.WebPImageFile),
)


@dataclass(frozen=True)
class ImageRule:
    """How integer images deeper than 8 bit become 8 bit: 0 is black, `white` is white, linear between.

    Stored with the model, so that a part looks the same in training and in use. Values above `white` are refused, not
    clipped: a clipped highlight is a defect nobody sees.
    """

    white: int = 65535

    def __post_init__(self) -> None:
        if not (type(self.white) is int and 1 <= self.white <= 65535):
            raise ConfigError(f"Expected a white level from 1 to 65535, found {self.white!r}; use 65535 for 16 bit.")


@dataclass(frozen=True)
class ImageInfo:
    """What the header of an image file says: size in pixels after EXIF rotation, Pillow mode, bits per channel."""

    width: int
    height: int
    mode: str
    bits: int  # 8, 16 or 32
    format: str  # "PNG", "JPEG", "BMP", "TIFF" or "WEBP"
    frames: int  # 1 for a plain picture; more for an animation or a TIFF file of several pages


def list_images(folder: str | os.PathLike[str]) -> list[Path]:
    """Image files in a folder and its sub-folders, by their endings, sorted by relative path; hidden ones left out.

    Raises DataError when the folder is missing or is a file.
    """
    folder = check_folder(folder)
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    visible = [path for path in found if not any(is_hidden(part) for part in path.relative_to(folder).parts)]
    return sorted(visible, key=lambda path: path.relative_to(folder).as_posix())


def named_images(paths: Iterable[Path]) -> list[Path]:
    """The image files that a user named: files as they are, and what `list_images` finds in folders.

    Raises DataError where one is missing, or there is none in all.
    """
    paths = list(paths)
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"Expected an image or a folder at {path}, found nothing; check the path.")
        found += list_images(path) if path.is_dir() else [path]
    if not found:
        raise DataError(f"Expected images in {', '.join(map(str, paths))}, found none; name other folders.")
    return found


def check_folder(path: str | os.PathLike[str]) -> Path:
    """The path of a folder; raises DataError where there is none."""
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: expected a folder of images, but there is none of this name; check the path.")
    if not path.is_dir():
        raise DataError(f"{path}: expected a folder of images, but found a file; name the folder that holds it.")
    return path


def is_hidden(name: str) -> bool:
    """Whether nobody means the file or folder of this name: a dot file, or what an archive left."""
    return name.startswith(".") or name == "__MACOSX"


def probe(path: str | os.PathLike[str] | BinaryIO, max_pixels: int = MAX_PIXELS) -> ImageInfo:
    """Read the header only. EXIF data that a PNG file keeps behind its pixels is not seen here.

    Raises DataError as `read_image` does, except for damage behind the header; all pages of a TIFF file need a header.
    """
    with _opened(path, max_pixels) as image:
        width, height = image.size
        if isinstance(image, PngImagePlugin.PngImageFile):
            exif = Image.Exif()  # its getexif() would decode the pixels
            exif.load(image.info.get("exif", b""))
        else:
            exif = image.getexif()
        # Pillow has already turned the size of a TIFF file.
        if image.format != "TIFF" and exif.get(ExifTags.Base.Orientation) in (5, 6, 7, 8):
            width, height = height, width
        return ImageInfo(width, height, image.mode, _bits(image), image.format or "", getattr(image, "n_frames", 1))


def fit_image_rule(paths: Iterable[str | os.PathLike[str]], max_pixels: int = MAX_PIXELS) -> ImageRule:
    """The rule whose `white` is the smallest 2^k - 1, k = 8 ... 16, that covers every deep integer image.

    So a 12-bit camera that stores its values in 16-bit files gets white = 4095. Images of 8 bit are not decoded. With
    no deep image, or with 16-bit colour (which Pillow reduces from the full range), it is 65535. Raises DataError for
    unreadable images and for values above 65535.
    """
    whites = []
    for path in paths:
        with _opened(path, max_pixels) as image:
            if image.mode == "F" or _bits(image) == 8:
                continue
            highest = 65535
            if _is_deep(image):
                values = _pixels(image)
                _to_unit(values, 65535, str(path))
                highest = int(values.max())
            whites.append(max(255, (1 << highest.bit_length()) - 1))
    return ImageRule(white=max(whites, default=65535))


def read_image(
    source: Source,
    size: tuple[int, int] | None = None,
    rule: ImageRule = ImageRule(),
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Any image as uint8 RGB of shape (H, W, 3), turned upright by its EXIF orientation.

    source: path, encoded bytes, binary file, Pillow image, or array of shape (H, W), (H, W, 1), (H, W, 3) or
        (H, W, 4) holding uint8, bool, uint16 (scaled by `rule`) or floats in [0, 1]. Float TIFF files must be in
        [0, 1] too.
    size: (height, width) to resize to, antialiased; deep images are resized before they are rounded to 8 bit.
    max_pixels: checked before anything is decoded.

    Raises DataError for whatever cannot be read, is too large, or holds values outside the expected range.
    """
    return to_rgb(pixel_values(source, rule, max_pixels), size, rule, _name(source))


def read_photo(
    source: Source, size: tuple[int, int], rule: ImageRule, max_pixels: int = MAX_PIXELS
) -> tuple[np.ndarray, tuple[int, int]]:
    """`read_image` at `size`, and the photograph's own (height, width), from one decoding."""
    values = pixel_values(source, rule, max_pixels)
    return to_rgb(values, size, rule, _name(source)), values.shape[:2]


def pixel_values(source: Source, rule: ImageRule, max_pixels: int) -> np.ndarray:
    """Upright pixels: uint8 (H, W, 3), or raw values (H, W[, 3 or 4])."""
    if isinstance(source, np.ndarray):
        return _checked_array(source)
    with _opened(source, max_pixels) as image:
        if rule.white != 65535 and _bits(image) > 8 and not _is_deep(image):
            raise DataError(
                f"{_name(source)}: expected grey values from 0 to {rule.white}, as in training, but found 16-bit "
                "colour, which is read over its full range only; save it as 8-bit colour, or as 16-bit grey."
            )
        return _pixels(image)


def to_rgb(values: np.ndarray, size: tuple[int, int] | None, rule: ImageRule, name: str) -> np.ndarray:
    if values.dtype != np.uint8:
        values = _to_unit(values, 1 if values.dtype.kind == "f" else rule.white, name)
        if values.ndim == 3 and values.shape[2] == 4:
            values = values[..., :3] * values[..., 3:]
        if size is not None:
            values = resize(values, size)
        values = np.rint(values * 255).astype(np.uint8)
    elif size is not None:
        values = resize(values, size)
    return np.ascontiguousarray(np.broadcast_to(values.reshape(*values.shape[:2], -1), (*values.shape[:2], 3)))


def read_mask(source: Source, size: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A defect mask as bool of shape (H, W): True where it marks a defect; a black mask marks nothing.

    Whole numbers of which the largest is below `CLASS_IDS` are ids of defect classes, as in VisA: all but 0 mark. Other
    masks are pictures, perhaps with soft edges: what is above half of their own brightest value marks. So masks of 0
    and 1, of 0 and 255 and of 0, 1, 2, ... all mean what they look like. With `size` (height, width) the mask is
    resized with antialiasing, and a pixel at least half covered is True. Raises DataError like `read_image`.
    """
    if isinstance(source, np.ndarray):
        values = _checked_array(source)
    else:
        with _opened(source, max_pixels) as image:
            values = _pixels(image)
    if values.ndim == 3:
        values = values[..., :3].max(axis=2)
    brightest = values.max()
    has_ids = values.dtype.kind != "f" and brightest < CLASS_IDS
    mask = values > (0 if has_ids else max(0, brightest / 2))
    if size is not None:
        mask = resize(mask.astype(np.float32), size) >= 0.5
    return mask


# Colours at 0, limit, and up to 2 * limit: what good parts reach stays dark and cool.
_HEAT_STOPS = (0.0, 0.5, 0.65, 0.8, 0.9, 1.0)
_HEAT_COLOURS = ((0, 0, 0), (24, 34, 84), (124, 30, 110), (214, 52, 58), (250, 150, 36), (255, 246, 170))
_HEAT = np.stack(
    [np.interp(np.linspace(0, 1, 256), _HEAT_STOPS, channel) for channel in zip(*_HEAT_COLOURS, strict=True)], axis=1
)
_HEAT_TABLE = np.rint(_HEAT).astype(np.uint8)  # (256, 3)


def heatmap(anomaly_map: np.ndarray, limit: float) -> np.ndarray:
    """The map (H, W) in colours, uint8 (H, W, 3): dark blue at `limit` and below, brightest from 2 * limit.

    limit: the value that good parts reach, so that a good part does not glow. The scale is the same for every image of
    a model. Not-a-number is shown as the hottest. Raises ConfigError unless limit is above 0.
    """
    return _HEAT_TABLE[np.rint(_excess(anomaly_map, limit) * 127.5).astype(np.uint8)]


def overlay(image: np.ndarray, anomaly_map: np.ndarray, limit: float) -> np.ndarray:
    """The photograph with heat colours laid over what is above `limit`; elsewhere it is unchanged.

    image: uint8 (H, W, 3). anomaly_map: float, of any height and width; it is resized to the image. Returns uint8
    (H, W, 3). Raises ConfigError unless limit is above 0.
    """
    excess = _excess(anomaly_map, limit)
    if excess.shape != image.shape[:2]:
        excess = resize(excess, (image.shape[0], image.shape[1]))
    alpha = 0.8 * np.sqrt(np.clip(excess - 1, 0, 1))[..., None]  # (H, W, 1)
    colours = _HEAT_TABLE[np.rint(excess * 127.5).astype(np.uint8)]
    return np.rint(image * (1 - alpha) + colours * alpha).astype(np.uint8)


def encode_png(array: np.ndarray) -> bytes:
    """Lossless PNG of an array uint8 (H, W, 3), uint8, uint16 or bool (H, W)."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def encode_jpeg(array: np.ndarray, quality: int = 85) -> bytes:
    """JPEG of an array uint8 (H, W, 3) or (H, W); quality from 1 to 95."""
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_png(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Write a PNG file atomically; arrays as `encode_png`, errors as `write_bytes`."""
    write_bytes(path, encode_png(array), flush=False)


def _excess(anomaly_map: np.ndarray, limit: float) -> np.ndarray:
    """map / limit, within [0, 2], float32."""
    if not limit > 0:
        raise ConfigError(f"expected limit to be above 0, got {limit}; use a value that the maps of good parts reach.")
    ratio = np.nan_to_num(np.asarray(anomaly_map, dtype=np.float32) / limit, nan=2.0)
    return np.clip(ratio, 0, 2).astype(np.float32)


def _name(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    return str(getattr(source, "filename", "") or getattr(source, "name", "") or f"the given {type(source).__name__}")


@contextmanager
def _opened(source: Any, max_pixels: int) -> Iterator[Image.Image]:
    """Open by content, refuse by the header what is too large, and turn any failure in the block into a DataError."""
    name = _name(source)
    try:
        with ExitStack() as stack:
            if isinstance(source, Image.Image):
                image = source
            else:
                if isinstance(source, (str, os.PathLike)):
                    file: BinaryIO = stack.enter_context(open(source, "rb"))
                elif isinstance(source, (bytes, bytearray, memoryview)):
                    file = io.BytesIO(source)
                elif hasattr(source, "read"):
                    if source.seekable():
                        source.seek(0)
                    file = io.BytesIO(source.read())
                else:
                    raise DataError(f"expected a path, bytes, binary file, Pillow image or array, but found {name}.")
                head = file.read(16)
                if not head:
                    raise DataError(f"{name}: expected an image, but the file is empty; copy it again or remove it.")
                file.seek(0)
                reader = next((reader for start, reader in _SIGNATURES if head.startswith(start)), None)
                if reader is None:
                    raise DataError(
                        f"{name}: expected a {FORMATS} image, but the content is none of these; convert or remove it."
                    )
                image = reader(file)
            if not 0 < image.width * image.height <= max_pixels:
                raise DataError(
                    f"{name}: expected between 1 and {max_pixels:,} pixels, but found {image.width} x {image.height}; "
                    "reduce or crop the image."
                )
            yield image
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{name}: expected an image file, but there is none of this name; check the path.") from error
    except IsADirectoryError as error:
        raise DataError(f"{name}: expected an image file, but found a folder; name a file inside it.") from error
    except PermissionError as error:
        raise DataError(f"{name}: expected a readable file, but access is denied; change its permissions.") from error
    except Exception as error:  # damaged files make Pillow raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{name}: expected a whole {FORMATS} image, but it cannot be decoded ({reason}); "
            "copy it again or remove it."
        ) from error


def _is_deep(image: Image.Image) -> bool:
    """Does Pillow keep more than 8 bit of it? (16-bit colour it reduces to 8 by dropping the low byte.)"""
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def _bits(image: Image.Image) -> int:
    """Bits per channel in the file, before Pillow reduces them: 8, 16 or 32."""
    bits = 8
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = max(image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (1,)))
    elif isinstance(image, PngImagePlugin.PngImageFile) and image.tile:
        bits = 16 if "16" in str(image.tile[0][3]) else 8
    if _is_deep(image) and bits <= 8:
        bits = 16 if image.mode.startswith("I;16") else 32
    return 8 if bits <= 8 else 16 if bits <= 16 else 32


def _pixels(image: Image.Image) -> np.ndarray:
    """Decode upright: uint8 (H, W, 3), or the raw values (H, W) of a deep image."""
    image.load()
    image = ImageOps.exif_transpose(image)
    if _is_deep(image):
        values = np.asarray(image)
        transparent = image.info.get("transparency")
        return values if transparent is None else np.where(values == transparent, 0, values)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image)
    return np.asarray(image.convert("RGB"))


def _checked_array(array: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3), or raw deep values (H, W), (H, W, 3) or (H, W, 4)."""
    shape_fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if not (shape_fits and array.size and (array.dtype in (np.uint8, np.uint16, np.bool_) or array.dtype.kind == "f")):
        raise DataError(
            "expected an array of shape (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) with uint8, uint16, bool or float "
            f"values, but found shape {array.shape} and {array.dtype}; convert it first."
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * np.uint8(255)
    return _pixels(Image.fromarray(array)) if array.dtype == np.uint8 else array


def _to_unit(values: np.ndarray, white: int, name: str) -> np.ndarray:
    """Values 0 ... white as float32 in [0, 1]; DataError when any is outside."""
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= white):  # also when not a number
        advice = (
            "divide by the camera's white level before saving"
            if white == 1
            else "rescale it to this range"
            if white == 65535
            else "use the camera settings of the training images, or train again with images that reach this value"
        )
        raise DataError(f"{name}: expected values from 0 to {white}, but found {low:g} to {high:g}; {advice}.")
    return values.astype(np.float32) / np.float32(white)


def reduced_size(height: int, width: int, most: int) -> tuple[int, int]:
    """Height and width of a picture in its own proportions, the longer side at most `most` pixels; never enlarged."""
    scale = min(1.0, most / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (H, W, 3), or float32 (H, W[, C]), to `size` (height, width); bilinear, antialiased, no overshoot.

    Rows are resized first, then columns, each rounded as Pillow does. Which of them Pillow would begin with depends on
    the shape and on its version, and moves scores in the second digit.
    """
    if values.ndim == 3 and values.dtype != np.uint8:
        return np.stack([resize(values[..., channel], size) for channel in range(values.shape[2])], axis=2)
    height, width = size
    picture = Image.fromarray(values)
    for shape in ((width, picture.height), (width, height)):
        picture = picture.resize(shape, Image.Resampling.BILINEAR)
    return np.asarray(picture)
