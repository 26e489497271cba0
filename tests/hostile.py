"""Files that strangers may send: those that must be refused, and odd ones that must be read. Always the same bytes."""

import io
import struct
import zlib
from itertools import accumulate

import numpy as np
from PIL import Image

WHITE = 4095
"""Of the rule that the deep files are meant for."""
ENDLESS = ("many scans.jpg", "many pages.tif")
"""Decoding these takes minutes."""

PNG_START = b"\x89PNG\r\n\x1a\n"
MAGIC = {
    "png": PNG_START,
    "jpg": b"\xff\xd8\xff\xe0",
    "bmp": b"BM",
    "tif": b"II*\0",
    "big tif": b"MM\0+",
    "webp": b"RIFF\x10\x10\0\0WEBPVP8 ",
}


def encoded(pixels, kind, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photo(height=96, width=128):
    """A picture uint8 (H, W, 3) with a gradient and some noise."""
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([255 * x / width, 255 * y / height, 128 + 0 * x], axis=2)
    noise = np.random.default_rng(0).normal(0, 6, smooth.shape)
    return np.clip(smooth + noise, 0, 255).astype(np.uint8)


# PNG


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width, height, bits=8, colour=0):
    return PNG_START + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))


def png(width, height, rows, bits=8, colour=0, extra=b""):
    """A PNG file of given rows, each with its filter byte; `extra` are chunks before the pixels."""
    return png_header(width, height, bits, colour) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def png16(values):
    """16-bit colour, which Pillow cannot write: values uint16 (H, W, 3)."""
    height, width, _ = values.shape
    return png(width, height, b"".join(b"\0" + row.astype(">u2").tobytes() for row in values), bits=16, colour=2)


def png_bomb(side):
    """One bit a pixel, all black: the file is a thousandth of its rows, which are an eighth of its pixels."""
    row = bytes(1 + (side + 7) // 8)
    packer = zlib.compressobj()
    packed = b"".join(packer.compress(row * 100) for _ in range(side // 100)) + packer.flush()
    return png_header(side, side, bits=1) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


# TIFF


def tiff(pages, data=b"", next_of_last=None):
    """Little-endian TIFF from pages of (tag, type, count, value); `data` stands at the end of the file.

    next_of_last: the page after the last, None for none.
    """
    starts = list(accumulate((2 + 12 * len(tags) + 4 for tags in pages[:-1]), initial=8))
    follow = [*starts[1:], 0 if next_of_last is None else starts[next_of_last]]
    parts = [
        struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", after)
        for tags, after in zip(pages, follow, strict=True)
    ]
    return b"II*\0" + struct.pack("<I", 8) + b"".join(parts) + data


def grey_page(width=32, height=32, offset=122, length=1024):
    """Tags of an uncompressed grey picture in one strip, which by default follows a single page."""
    short, long = 3, 4
    return [
        (256, long, 1, width),
        (257, long, 1, height),
        (258, short, 1, 8),
        (259, short, 1, 1),
        (262, short, 1, 1),
        (273, long, 1, offset),
        (277, short, 1, 1),
        (278, long, 1, height),
        (279, long, 1, length),
    ]


# BMP and JPEG


def bmp(width, height, bits=24, colours=0, offset=54, data=bytes(3072)):
    information = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 0, 0, 2835, 2835, colours, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(data), 0, 0, offset) + information + data


def segment(marker, data):
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(data)) + data


def jpeg_header(width, height):
    """A JPEG file of which only the size is there."""
    frame = struct.pack(">BHHB", 8, height, width, 1) + bytes([1, 0x11, 0])
    return b"\xff\xd8" + segment(0xDB, bytes([0]) + bytes([1] * 64)) + segment(0xC0, frame)


def with_exif(jpeg, exif):
    return jpeg[:2] + segment(0xE1, b"Exif\0\0" + exif) + jpeg[2:]


def jpeg_of_many_scans(side, scans):
    """A progressive JPEG whose last scan comes again and again; the decoder goes over all pixels each time."""
    whole = encoded(Image.new("L", (side, side), 100), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * scans + whole[-2:]


def cut(name, whole):
    return {f"{name} cut at {percent} percent": whole[: len(whole) * percent // 100] for percent in (2, 25, 60, 95)}


def corpus():
    """Files that must be refused with `WHITE`, by name."""
    pixels = photo()
    plain, jpeg = encoded(pixels, "PNG"), encoded(pixels, "JPEG")
    frames = [Image.fromarray(np.roll(pixels, 8 * i, axis=1)) for i in range(12)]
    film = {"save_all": True, "append_images": frames[1:]}
    deep = np.linspace(0, 5000, 64 * 64).reshape(64, 64).astype(np.uint16)
    one_page = encoded(pixels[..., 0], "TIFF")
    deflated = encoded(pixels, "TIFF", compression="tiff_adobe_deflate")
    files = {
        # no picture at all
        "nothing.png": b"",
        "one byte.png": b"\x89",
        "signature.png": PNG_START,
        "signature.jpg": b"\xff\xd8\xff",
        "notes.png": b"These are notes, not a photograph.\n" * 20,
        "page.jpg": b"<!DOCTYPE html><html><script>alert(1)</script></html>",
        "drawing.png": b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><rect width="9" height="9"/></svg>',
        "program.jpg": b"\x7fELF\x02\x01\x01" + bytes(9) + np.random.default_rng(1).bytes(400),
        "program.png": b"MZ\x90\0" + bytes(60) + b"This program cannot be run in DOS mode.",
        # two things in one
        "picture in picture.gif": b"GIF89a" + plain,
        "archive.png": plain[: len(plain) // 2] + b"PK\x03\x04" + bytes(26) + b"PK\x05\x06" + bytes(18),
        "page inside.jpg": b"\xff\xd8\xff\xe0" + b"<html><script>alert(1)</script></html>",
        # more than one picture
        "film.gif": encoded(frames[0], "GIF", **film),
        "film.png": encoded(frames[0], "PNG", **film),
        "film.webp": encoded(frames[0], "WEBP", **film),
        "pages.tif": encoded(frames[0], "TIFF", **film),
        "many pages.tif": tiff([grey_page()] * 60_000, bytes(1024)),
        "pages in a circle.tif": tiff([grey_page(), grey_page()], bytes(1024), next_of_last=0),
        # too large, too small
        "bomb.png": png_bomb(30_000),
        "text bomb.png": png(64, 64, bytes(65 * 64), extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 24)))),
        "profile bomb.png": png(64, 64, bytes(65 * 64), extra=chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 24)))),
        "many texts.png": png(
            64, 64, bytes(65 * 64), extra=chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 20))) * 80
        ),
        "huge and empty.png": png_header(2**31 - 1, 2**31 - 1) + chunk(b"IDAT", b""),
        "large and empty.png": png_header(7000, 7000) + chunk(b"IDAT", b""),
        "wide.png": encoded(Image.new("L", (100_000, 1)), "PNG"),
        "tall.png": encoded(Image.new("L", (1, 100_000)), "PNG"),
        "dot.png": encoded(Image.new("RGB", (1, 1)), "PNG"),
        "narrow.jpg": encoded(Image.new("RGB", (15, 200)), "JPEG"),
        "huge and empty.jpg": jpeg_header(65_535, 65_535),
        "large and empty.jpg": jpeg_header(7000, 7000) + segment(0xDA, bytes([1, 1, 0, 0, 63, 0])),
        "many scans.jpg": jpeg_of_many_scans(5000, 20_000),
        "huge.tif": tiff([grey_page(2**32 - 1, 2**32 - 1)], bytes(1024)),
        "large and empty.tif": tiff([grey_page(7000, 7000)], bytes(1024)),
        "huge.bmp": bmp(2**31 - 1, 2**31 - 1),
        # damaged
        **cut("photo.png", plain),
        **cut("photo.jpg", jpeg),
        **cut("progressive.jpg", encoded(pixels, "JPEG", progressive=True)),
        **cut("photo.tif", encoded(pixels, "TIFF")),
        **cut("lzw.tif", encoded(pixels, "TIFF", compression="tiff_lzw")),
        **cut("deflate.tif", deflated),
        **cut("photo.webp", encoded(pixels, "WEBP")),
        **cut("lossless.webp", encoded(pixels, "WEBP", lossless=True)),
        **cut("photo.bmp", encoded(pixels, "BMP")),
        "wrong checksum.png": plain[:29] + bytes([plain[29] ^ 255]) + plain[30:],
        "wrong pixels.png": png_header(64, 64) + chunk(b"IDAT", b"x\x9c" + bytes(99)) + chunk(b"IEND", b""),
        "unknown colour.png": png(64, 64, bytes(65 * 64), bits=3, colour=7),
        "distant directory.tif": b"II*\0" + struct.pack("<I", 2**32 - 16),
        "distant pixels.tif": tiff([grey_page(offset=2**32 - 16)], bytes(1024)),
        "distant page.tif": one_page[:4] + struct.pack("<I", len(one_page) - 3) + one_page[8:],
        "narrower than nothing.bmp": bmp(-32, 32),
        "lower than nothing.bmp": bmp(32, -(2**31)),
        "distant pixels.bmp": bmp(32, 32, offset=2**32 - 1),
        "too many colours.bmp": bmp(32, 32, bits=8, colours=2**32 - 1),
        "bits.bmp": bmp(32, 32, bits=77),
        "wrong pixels.tif": deflated[:8] + b"\xff" * 100 + deflated[108:],
        # deep pixels that the rule does not allow
        "deep colour.png": png16(np.full((64, 64, 3), 300, np.uint16)),
        "too bright.png": encoded(deep, "PNG"),
        "too bright.tif": encoded(deep, "TIFF"),
        "too bright float.tif": encoded(np.full((64, 64), 1.5, np.float32), "TIFF"),
        "negative float.tif": encoded(np.full((64, 64), -0.5, np.float32), "TIFF"),
        "not a number.tif": encoded(np.full((64, 64), np.nan, np.float32), "TIFF"),
    }
    for kind, start in MAGIC.items():
        for seed in range(4):
            files[f"random {seed}.{kind}"] = start + np.random.default_rng(seed).bytes(2000)
    return files


def benign():
    """Files that must be read with `WHITE`, by name."""
    pixels = photo()
    turned, nested = Image.Exif(), Image.Exif()
    turned[0x0112] = 6
    nested.get_ifd(0x8769)[0x9286] = bytes(range(256))  # a comment that is no text
    clear = np.dstack([pixels, np.linspace(0, 255, pixels[..., 0].size).reshape(pixels.shape[:2]).astype(np.uint8)])
    deep = np.linspace(0, WHITE, 96 * 128).reshape(96, 128).astype(np.uint16)
    jpeg = encoded(pixels, "JPEG")
    loop = struct.pack("<2sHIH", b"II", 42, 8, 1) + struct.pack("<HHII", 0x8769, 4, 1, 8) + struct.pack("<I", 8)
    return {
        "photo.png": encoded(pixels, "PNG"),
        "photo.txt": encoded(pixels, "PNG"),
        "photo.jpg": jpeg,
        "progressive.jpg": encoded(pixels, "JPEG", progressive=True),
        "turned.jpg": encoded(pixels, "JPEG", exif=turned),
        "turned.png": encoded(pixels, "PNG", exif=turned),
        "exif with a comment.jpg": encoded(pixels, "JPEG", exif=nested),
        "exif of garbage.jpg": with_exif(jpeg, b"<script>" * 8),
        "exif in a circle.jpg": with_exif(jpeg, loop),
        "page in a comment.jpg": jpeg[:2] + segment(0xFE, b"<html><script>alert(1)</script></html>") + jpeg[2:],
        "archive.jpg": jpeg + b"PK\x03\x04" + bytes(26) + b"PK\x05\x06" + bytes(18),
        "cmyk.jpg": encoded(Image.fromarray(pixels).convert("CMYK"), "JPEG"),
        "palette.png": encoded(Image.fromarray(pixels).convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
        "clear.png": encoded(clear, "PNG"),
        "grey.png": encoded(pixels[..., 0], "PNG"),
        "black and white.png": encoded(pixels[..., 0] > 99, "PNG"),
        "deep grey.png": encoded(deep, "PNG"),
        "deep grey.tif": encoded(deep, "TIFF"),
        "float.tif": encoded((deep / WHITE).astype(np.float32), "TIFF"),
        "photo.webp": encoded(pixels, "WEBP"),
        "photo.tif": encoded(pixels, "TIFF"),
        "lzw.tif": encoded(pixels, "TIFF", compression="tiff_lzw"),
        "page after itself.tif": tiff([grey_page()], bytes(range(256)) * 4, next_of_last=0),
        "photo.bmp": encoded(pixels, "BMP"),
        "top down.bmp": bmp(32, -32, data=photo(32, 32).tobytes()),
        "smallest.png": encoded(photo(16, 16), "PNG"),
        "long.png": encoded(photo(16, 3000), "PNG"),
    }
