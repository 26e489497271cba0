"""Rendered photographs of a machined part: a small data set for `ddad demo` that needs no download.

The part is a turned steel flange with a bore, an orange O-ring, six bolt holes, a dowel hole and three engraved marks,
lying on a dark mat. Everything is a signed distance function (negative inside) evaluated on a grid finer than the
image. Good parts differ in few, smooth ways (pose, light, tone), which a network learns in minutes; these ways move
far more pixels than a defect does, so that comparing with the average good image fails.

Lengths are in units of the image side; the image spans -0.5 to 0.5, columns (x) to the right and rows (y) down.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from ddad.data.synthetic import Bool, Float, UInt8, changed_pixels
from ddad.errors import ConfigError, DataError
from ddad.files import atomic_folder, write_json

DEMO_DEFECTS: tuple[str, ...] = ("chip", "fibre", "plugged_hole", "scratch", "stain")
SUPERSAMPLING = 2  # samples per pixel and axis
MASK_LIMIT = 8  # grey levels by which a defect must change a pixel of the noise-free image
SMALLEST_SIZE = 32

# The drawing of the part.
RIM, BORE = 0.40, 0.115  # radii
O_RING, O_RING_WIDTH = 0.175, 0.017  # radius, half width
BOLT_CIRCLE, BOLT_HOLE = 0.285, 0.042
SECTOR = np.pi / 3  # between neighbouring bolt holes
BEVEL = 0.012  # width of the chamfer along every edge
FIBRE_COLOURS = ((0.75, 0.12, 0.12), (0.12, 0.25, 0.70), (0.92, 0.90, 0.82), (0.08, 0.08, 0.08))


@dataclass(frozen=True)
class _Pose:
    """How one good part differs from the next."""

    x: float
    y: float
    angle: float  # radians
    scale: float
    light: float  # direction the light comes from, radians
    gradient: float  # how much brighter the lit side of the picture is
    exposure: float
    warmth: float  # red gained and blue lost
    gloss: float  # strength of the bow-tie highlight of turned metal
    grooves: tuple[float, float, float]  # phases of the turning marks, radians


def _draw_pose(rng: np.random.Generator) -> _Pose:
    return _Pose(
        # A fixture holds the part: it moves by about a pixel and turns by a few degrees.
        x=rng.uniform(-0.005, 0.005),
        y=rng.uniform(-0.005, 0.005),
        angle=rng.uniform(-0.05, 0.05),
        scale=rng.uniform(0.995, 1.005),
        light=rng.uniform(-np.pi, np.pi),
        gradient=rng.uniform(0.05, 0.25),
        exposure=rng.uniform(0.88, 1.08),
        warmth=rng.uniform(-0.03, 0.03),
        gloss=rng.uniform(0.10, 0.18),
        grooves=(rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi), rng.uniform(0, 2 * np.pi)),
    )


def _draw_defect(kind: str, rng: np.random.Generator) -> dict[str, Any]:
    """Where on the part a defect lies (polar, in the part's own frame) and what it looks like."""
    if kind == "plugged_hole":
        return {"kind": kind, "sector": int(rng.integers(6)), "tone": rng.uniform(0.85, 1.1)}
    defect = {
        "kind": kind,
        "radius": RIM if kind == "chip" else rng.uniform(0.22, 0.37),
        "angle": rng.uniform(-np.pi, np.pi),
        "turn": rng.uniform(-np.pi, np.pi),
        "phases": [rng.uniform(0, 2 * np.pi) for _ in range(3)],
    }
    if kind == "chip":
        return defect | {"size": rng.uniform(0.03, 0.05)}
    if kind == "stain":
        return defect | {"size": rng.uniform(0.035, 0.06), "depth": rng.uniform(0.5, 0.75)}
    if kind == "scratch":
        depth = rng.uniform(0.45, 0.65) * (1 if rng.random() < 0.5 else -1)
        return defect | {"size": rng.uniform(0.06, 0.13), "bend": rng.uniform(-0.3, 0.3), "depth": depth}
    colour = FIBRE_COLOURS[rng.integers(len(FIBRE_COLOURS))]
    return defect | {"size": rng.uniform(0.09, 0.15), "bend": rng.uniform(0.2, 0.5), "colour": colour}


def _render(pose: _Pose, size: int, defect: dict[str, Any] | None) -> Float:
    """One noise-free photograph, float32 (size, size, 3) in [0, 1]."""
    count = size * SUPERSAMPLING
    pixel = 1 / count
    axis = (np.arange(count, dtype=np.float32) + 0.5) * pixel - 0.5
    image_y, image_x = np.meshgrid(axis, axis, indexing="ij")
    cos, sin = math.cos(pose.angle), math.sin(pose.angle)
    x = ((image_x - pose.x) * cos + (image_y - pose.y) * sin) / pose.scale  # the part's own frame
    y = ((image_y - pose.y) * cos - (image_x - pose.x) * sin) / pose.scale
    radius, angle = np.hypot(x, y), np.arctan2(y, x)

    def inside(distance: Float, softness: float = 0.0) -> Float:
        return np.clip(0.5 - distance / max(softness, pixel), 0, 1)

    # 1. Shape. One bolt hole is drawn six times by folding the angle into one sector.
    sector = np.rint(angle / SECTOR)
    folded = angle - sector * SECTOR
    to_hole = np.hypot(radius * np.cos(folded) - BOLT_CIRCLE, radius * np.sin(folded)) - BOLT_HOLE
    holes = to_hole
    if defect and defect["kind"] == "plugged_hole":
        holes = np.where(sector % 6 == defect["sector"], np.float32(1), to_hole)
    dowel = np.hypot(x - 0.345 * math.cos(SECTOR / 2), y - 0.345 * math.sin(SECTOR / 2)) - 0.016
    solid = np.maximum.reduce([radius - RIM, BORE - radius, -holes, -dowel])
    if defect and defect["kind"] != "plugged_hole":
        # The defect's own frame: u along it, v across it.
        from_x = x - defect["radius"] * math.cos(defect["angle"])
        from_y = y - defect["radius"] * math.sin(defect["angle"])
        u = from_x * math.cos(defect["turn"]) + from_y * math.sin(defect["turn"])
        v = from_y * math.cos(defect["turn"]) - from_x * math.sin(defect["turn"])
        around = np.arctan2(v, u)
        lobes = sum(0.25 / k * np.cos(k * around + phase) for k, phase in zip((2, 3, 5), defect["phases"], strict=True))
        blob = np.hypot(u, v) - defect["size"] * (1 + lobes)
        if defect["kind"] == "chip":
            solid = np.maximum(solid, -blob)

    # 2. Light: a chamfer faces the way its distance grows; turned metal shines in two opposite wedges.
    towards_x, towards_y = math.cos(pose.light), math.sin(pose.light)
    slope_y, slope_x = np.gradient(solid, pixel)
    chamfer = inside(abs(solid + BEVEL / 2) - BEVEL / 2, BEVEL / 2)
    metal = 0.60 + pose.gloss * np.cos(2 * (angle + pose.angle - pose.light))
    for waves, phase in zip((9, 21, 34), pose.grooves, strict=True):
        metal = metal + 0.012 * np.cos(2 * np.pi * waves * radius + phase)
    to_marks = (angle + 3.5 * SECTOR) % (2 * math.pi) - math.pi  # three engraved marks, opposite the dowel hole
    to_mark = radius * abs(to_marks - 0.12 * np.clip(np.rint(to_marks / 0.12), -1, 1))
    metal = metal * (1 - 0.45 * inside(np.maximum(to_mark - 0.006, abs(radius - 0.355) - 0.020), 0.006))
    metal = metal + 0.22 * chamfer * (slope_x * towards_x + slope_y * towards_y)
    colour = metal * _rgb(0.98, 1.0, 1.03)  # (3, H, W), like every colour here

    # 3. The O-ring in its groove, rounded across and shiny along the middle.
    across = abs(radius - O_RING) / O_RING_WIDTH
    colour = colour * (1 - 0.35 * inside((across - 1.25) * O_RING_WIDTH, 0.008))
    rubber = (0.55 + 0.45 * np.sqrt(np.clip(1 - across**2, 0, 1))) * _rgb(0.80, 0.36, 0.12)
    colour = _over(colour, rubber, inside((across - 1) * O_RING_WIDTH))

    # 4. What lies on the metal, or in it.
    if defect and defect["kind"] == "plugged_hole":
        plug = (sector % 6 == defect["sector"]) * inside(to_hole)
        seam = (sector % 6 == defect["sector"]) * inside(abs(to_hole) - 0.002, 0.006)
        colour = colour * (1 - plug * (1 - defect["tone"]) - 0.3 * seam)
    elif defect and defect["kind"] == "stain":
        colour = colour * (1 - defect["depth"] * inside(blob, 0.03) * _rgb(0.8, 0.95, 1.1))
    elif defect and defect["kind"] in ("scratch", "fibre"):
        along = np.clip(u / defect["size"], -1.2, 1.2)
        phase = defect["phases"][0]
        curve = defect["bend"] * defect["size"] * (along**2 + 0.3 * np.sin(3 * along + phase) - 0.4)
        slope = defect["bend"] * (2 * along + 0.9 * np.cos(3 * along + phase))
        aside = (v - curve) / np.sqrt(1 + slope**2)
        line = np.maximum(abs(aside), abs(u) - defect["size"])
        if defect["kind"] == "scratch":
            # A furrow: one flank turned away from the light, the other towards it.
            furrow = inside(line - 0.014, 0.006) * np.clip(1.3 * aside / 0.014 + 0.5, -0.6, 1)
            colour = colour * (1 + defect["depth"] * furrow)

    # 5. The ribbed mat below, with the shadow the part casts away from the light.
    ribs = 0.16 + 0.012 * np.cos(2 * np.pi * 12 * image_y)
    shadow = np.hypot(image_x - pose.x + 0.02 * towards_x, image_y - pose.y + 0.02 * towards_y) - RIM * pose.scale
    mat = ribs * (1 - 0.5 * inside(shadow, 0.05)) * _rgb(0.85, 1.0, 1.15)
    colour = _over(mat, colour, inside(solid))
    if defect and defect["kind"] == "fibre":
        colour = _over(colour, _rgb(*defect["colour"]), inside(line - 0.012))

    # 6. The camera: light falls off across the picture, exposure and white balance vary, pixels average.
    gain = pose.exposure * (1 + pose.gradient * (image_x * towards_x + image_y * towards_y))
    colour = colour * gain * _rgb(1 + pose.warmth, 1, 1 - pose.warmth)
    rows = colour.reshape(3, size, SUPERSAMPLING, count).mean(axis=2)
    return rows.reshape(3, size, size, SUPERSAMPLING).mean(axis=3).transpose(1, 2, 0)


def _rgb(red: float, green: float, blue: float) -> Float:
    """One colour, (3, 1, 1), to multiply or lay over a picture."""
    return np.array([red, green, blue], dtype=np.float32)[:, None, None]


def _over(below: Float, above: Float, coverage: Float) -> Float:
    """Lay `above` on `below`, both (3, H, W) or one colour, where `coverage` (H, W) is 1."""
    return below + (above - below) * coverage


def render_part(rng: np.random.Generator, kind: str | None = None, *, size: int = 160) -> tuple[UInt8, Bool]:
    """Render a photograph of one part.

    The defect is drawn last: the same generator state with `kind=None` gives the same part without it.

    Args:
        rng: source of every choice.
        kind: one of `DEMO_DEFECTS`, or None for a good part.
        size: height and width in pixels, at least 32.

    Returns:
        Image, uint8 (size, size, 3), and mask, bool (size, size): the pixels the defect changes by more than
        `MASK_LIMIT` grey levels before sensor noise; all False for a good part.

    Raises:
        ConfigError: an unknown kind, or too small a size.
    """
    if kind is not None and kind not in DEMO_DEFECTS:
        raise ConfigError(f"Unknown demo defect {kind!r}; choose one of {', '.join(DEMO_DEFECTS)}.")
    if size < SMALLEST_SIZE:
        raise ConfigError(f"Expected a demo image size of at least {SMALLEST_SIZE} pixels, but got {size}.")
    pose = _draw_pose(rng)
    noise = rng.normal(0, 1.5, (size, size, 3))
    photo = good = 255 * _render(pose, size, None)
    mask = np.zeros((size, size), dtype=bool)
    if kind is not None:
        photo = 255 * _render(pose, size, _draw_defect(kind, rng))
        mask = changed_pixels(_to_uint8(good), _to_uint8(photo), MASK_LIMIT)
        mask = ndimage.binary_closing(mask, iterations=1) | mask  # a seam must not split one defect in two
    return _to_uint8(photo + noise), mask


def _to_uint8(image: NDArray[np.floating]) -> UInt8:
    return np.rint(np.clip(image, 0, 255)).astype(np.uint8)


def write_demo_dataset(
    root: Path, *, seed: int = 0, train: int = 240, good: int = 60, defective: int = 60, size: int = 160
) -> Path:
    """Write the demo data set as a folder in MVTec layout, PNG throughout.

    `train/good`, `test/good`, `test/<kind>` and `ground_truth/<kind>/<stem>_mask.png` (0 or 255), and `demo.json` with
    the settings. It appears at once, complete; if the same data set is already there it is left alone.

    Args:
        root: folder to make; it may exist if empty.
        seed: non-negative; image i of a folder depends on it, the folder and i alone.
        train: number of good training images.
        good: number of good test images.
        defective: number of defective test images, shared evenly between `DEMO_DEFECTS`.
        size: height and width in pixels, at least 32.

    Returns:
        `root`.

    Raises:
        DataError: `root` holds something else already.
        ConfigError: too small a size.
    """
    root = Path(root)
    settings = {"seed": seed, "train": train, "good": good, "defective": defective, "size": size}
    marker = root / "demo.json"
    if root.exists() and any(root.iterdir()):
        if marker.is_file() and json.loads(marker.read_text()) == settings:
            return root
        raise DataError(f"{root} already holds other files; give an empty or new folder for the demo data set.")

    folders: list[tuple[str, str | None, int]] = [("train/good", None, train), ("test/good", None, good)]
    for index, kind in enumerate(DEMO_DEFECTS):
        share = defective // len(DEMO_DEFECTS) + (index < defective % len(DEMO_DEFECTS))
        folders.append((f"test/{kind}", kind, share))
    with atomic_folder(root) as partial:
        for number, (folder, defect, count) in enumerate(folders):
            (partial / folder).mkdir(parents=True)
            if defect is not None:
                (partial / "ground_truth" / defect).mkdir(parents=True)
            for index in range(count):
                image, mask = render_part(np.random.default_rng([seed, number, index]), defect, size=size)
                Image.fromarray(image).save(partial / folder / f"{index:03d}.png")
                if defect is not None:
                    mask_path = partial / "ground_truth" / defect / f"{index:03d}_mask.png"
                    Image.fromarray(mask.astype(np.uint8) * 255).save(mask_path)
        write_json(partial / marker.name, settings)
    return root
