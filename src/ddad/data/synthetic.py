"""Defects painted on photographs of good parts, with exact masks.

They stand in for a labelled test set when settings are chosen, and are never trained on. A kind is a painter: it
draws where the defect lies, what it looks like and how opaque it is; `add_defect` blends that in, reads the mask off
the pixels that changed visibly, and draws again if there is too little, or too much, to see.

Every contrast is relative to the grain of the photograph, so that a defect on rough cast iron is as hard to see as one
on glass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ddad.data.folder import scan
from ddad.data.samples import model_shape, spread
from ddad.errors import ConfigError, DataError
from ddad.images import fit_image_rule, probe, read_image, write_png

Float = NDArray[np.float32]
UInt8 = NDArray[np.uint8]
Bool = NDArray[np.bool_]

JUST_VISIBLE = 4  # grey levels: a pixel belongs to the defect if any channel changed by more than this
SMALLEST_SIDE = 32  # pixels
SMALLEST_AREA = 0.0002  # of the image; and never under four pixels
LARGEST_AREA = 0.08  # of the image; shading is larger by nature
LARGEST_SHADE = 0.25
TRIES = 24


@dataclass(frozen=True)
class _Scene:
    """What a painter works on. Images are float32 (H, W, 3) in 0-255."""

    image: Float
    donor: Float  # another good image, or the same one
    part: Bool | None  # where the part lies on its background; None if it fills the picture
    grain: float  # grey levels: spread of the fine texture, the smallest step an eye would notice
    strength: float  # 1 at first, grows while the drawn defects stay invisible
    rng: np.random.Generator

    @property
    def side(self) -> float:
        """Side of a square with the area of the image, in pixels."""
        height, width = self.image.shape[:2]
        return float(np.sqrt(height * width))

    def contrast(self, low: float = 1.5, high: float = 7.0) -> float:
        """A signed brightness step in grey levels, `low` to `high` times the grain."""
        step = min(self.strength * self.grain * log_uniform(self.rng, low, high), 150.0)
        return step if self.rng.random() < 0.4 else -step

    def half_extent(self, smallest: float, largest: float, aspect: tuple[float, float]) -> tuple[float, float]:
        """Half length and half width in pixels of a shape whose area, a fraction of the image, is log-uniform."""
        half_side = self.side * np.sqrt(log_uniform(self.rng, smallest, largest)) / 2
        stretch = np.sqrt(log_uniform(self.rng, *aspect))
        return float(max(half_side * stretch, 1.0)), float(max(half_side / stretch, 1.0))

    def somewhere(self, image: Float) -> tuple[float, float]:
        """A point of `image` as (row, column); in the picture itself mostly on the part, where defects are."""
        if self.part is not None and image is self.image and self.rng.random() < 0.9:
            row, column = self.rng.choice(np.argwhere(self.part))
        else:
            row, column = self.rng.uniform(0.04, 0.96, 2) * image.shape[:2]
        return float(row), float(column)


class _Place:
    """A window around a point, and its pixels' coordinates along (u) and across (v) a direction."""

    def __init__(self, scene: _Scene, reach: float, *, centre: tuple[float, float] | None = None) -> None:
        row, column = centre or scene.somewhere(scene.image)
        self.angle = float(scene.rng.uniform(0, 2 * np.pi))
        height, width = scene.image.shape[:2]
        reach += 2
        top, left = max(int(row - reach), 0), max(int(column - reach), 0)
        self.window = np.s_[top : min(int(row + reach) + 1, height), left : min(int(column + reach) + 1, width)]
        rows, columns = np.mgrid[self.window].astype(np.float32)
        self.rows, self.columns = rows, columns
        self.u = (columns - column) * np.cos(self.angle) + (rows - row) * np.sin(self.angle)
        self.v = (rows - row) * np.cos(self.angle) - (columns - column) * np.sin(self.angle)


class _Paint(NamedTuple):
    """What a painter hands back: `colour` (h, w, 3) and `opacity` (h, w) in [0, 1] for the pixels of `window`."""

    window: tuple[slice, slice]
    colour: Float
    opacity: Float


class SyntheticDefect(NamedTuple):
    """A good photograph with a defect painted in, and where it came from."""

    image: UInt8
    mask: Bool
    kind: str
    source_index: int


def log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    """One number between `low` and `high`, as likely to fall in one octave as in another."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def fractal_noise(shape: tuple[int, int], rng: np.random.Generator, *, cells: float = 3.0, octaves: int = 3) -> Float:
    """Smooth random relief (H, W), mean 0, spread 1: `cells` bumps across; every octave is half as large and high."""
    total = np.zeros(shape, dtype=np.float32)
    for octave in range(octaves):
        count = int(np.ceil(cells * 2**octave)) + 3
        lattice = rng.standard_normal((count, count)).astype(np.float32)
        rows = np.linspace(1, count - 2, shape[0])
        columns = np.linspace(1, count - 2, shape[1])
        total += _sample(lattice, *np.meshgrid(rows, columns, indexing="ij"), order=3) / 2**octave
    return (total - total.mean()) / max(float(total.std()), 1e-6)


def _sample(image: Float, rows: NDArray[np.floating], columns: NDArray[np.floating], *, order: int = 1) -> Float:
    """Values of `image` (H, W) or (H, W, 3) at fractional coordinates; beyond the border it is mirrored."""
    if image.ndim == 2:
        return ndimage.map_coordinates(image, [rows, columns], order=order, mode="mirror", output=np.float32)
    return np.stack([_sample(image[..., c], rows, columns, order=order) for c in range(image.shape[2])], axis=-1)


def _inside(distance: NDArray[np.floating], softness: float = 1.0) -> Float:
    """1 inside a shape (negative distance, in pixels), 0 outside, with a ramp `softness` pixels wide."""
    return np.clip(0.5 - distance / softness, 0, 1).astype(np.float32)


def _ellipse(place: _Place, length: float, width: float) -> Float:
    """Distance in pixels, roughly, to the ellipse with these half axes along u and v."""
    return (np.hypot(place.u / length, place.v / width) - 1) * min(length, width)


def _wavy_disc(place: _Place, radius: float, rng: np.random.Generator) -> Float:
    """Distance in pixels to a disc whose outline a few harmonics have made irregular."""
    angle = np.arctan2(place.v, place.u)
    outline = sum(rng.normal(0, 0.22 / k) * np.cos(k * angle + rng.uniform(0, 2 * np.pi)) for k in range(2, 7))
    return np.hypot(place.u, place.v) - radius * np.clip(1 + outline, 0.4, 1.6)


def _paste(scene: _Scene, length: float, width: float) -> _Paint:
    """A rectangle or ellipse of texture from elsewhere, turned, brightened or darkened."""
    rng = scene.rng
    place = _Place(scene, np.hypot(length, width))
    source = scene.donor if rng.random() < 0.5 else scene.image
    row, column = scene.somewhere(source)
    turn = place.angle + rng.uniform(-np.pi / 4, np.pi / 4)  # the texture is turned as well as the outline
    colour = _sample(
        source,
        row + place.u * np.sin(turn) + place.v * np.cos(turn),
        column + place.u * np.cos(turn) - place.v * np.sin(turn),
    )
    colour = colour * rng.uniform(0.85, 1.15) + scene.contrast(0.2, 2.5)
    if rng.random() < 0.5:
        distance = np.maximum(abs(place.u) - length, abs(place.v) - width)
    else:
        distance = _ellipse(place, length, width)
    return _Paint(place.window, colour, _inside(distance))


def _cutpaste(scene: _Scene) -> _Paint:
    return _paste(scene, *scene.half_extent(0.001, 0.08, aspect=(1.0, 3.0)))


def _scar(scene: _Scene) -> _Paint:
    return _paste(scene, *scene.half_extent(0.0008, 0.015, aspect=(6.0, 20.0)))


def _texture(scene: _Scene) -> _Paint:
    """The product's own texture, shuffled, in a region with a fractal outline."""
    rng = scene.rng
    length, width = scene.half_extent(0.001, 0.08, aspect=(1.0, 3.0))
    place = _Place(scene, 1.5 * length)
    # The relief moves the outline of an ellipse in and out, up to breaking it into islands.
    relief = fractal_noise(place.u.shape, rng, cells=rng.uniform(2, 5))
    opacity = _inside(_ellipse(place, length, width) + 0.45 * width * relief, softness=2.0)
    source = scene.donor if rng.random() < 0.5 else scene.image
    row, column = scene.somewhere(source)
    cell = max(scene.side * rng.uniform(0.02, 0.06), 3.0)
    tile_u, tile_v = (place.u // cell).astype(int), (place.v // cell).astype(int)
    jump = rng.uniform(-0.1, 0.1, (2, int(np.ptp(tile_u)) + 1, int(np.ptp(tile_v)) + 1)) * scene.side
    jump_rows, jump_columns = jump[:, tile_u - tile_u.min(), tile_v - tile_v.min()]
    colour = _sample(source, row + place.u + jump_rows, column + place.v + jump_columns)
    mean, here = colour.mean(axis=(0, 1)), scene.image[place.window].mean(axis=(0, 1))
    # Mostly the brightness of its surroundings, so that the texture itself is what is wrong.
    colour = here + rng.uniform(0, 0.4) * (mean - here) + (colour - mean) * rng.uniform(0.5, 1.8)
    colour = colour + scene.contrast(0.2, 2.5)
    return _Paint(place.window, colour, opacity * np.float32(rng.uniform(0.5, 1.0)))


def _smear(scene: _Scene) -> _Paint:
    """The surface dragged in one direction, as by a wet finger."""
    length, width = scene.half_extent(0.003, 0.08, aspect=(1.5, 4.0))
    place = _Place(scene, length)
    drag = max(scene.rng.uniform(0.5, 1.5) * length * scene.strength, 4.0)
    steps = np.linspace(0, drag, min(int(drag) + 1, 48))
    direction = np.sin(place.angle), np.cos(place.angle)
    colour = np.zeros((*place.u.shape, 3), dtype=np.float32)
    for step in steps:
        rows, columns = place.rows - step * direction[0], place.columns - step * direction[1]
        colour += _sample(scene.image, rows, columns) / len(steps)
    # Dragged matter also leaves a faint film; without it a smear along the grain would be invisible.
    colour += scene.contrast(0.3, 1.5)
    return _Paint(place.window, colour, _inside(_ellipse(place, length, width), softness=max(width / 2, 1.0)))


def _spot(scene: _Scene) -> _Paint:
    """One to four round dark or bright blobs close to each other."""
    rng = scene.rng
    largest = scene.side * log_uniform(rng, 0.01, 0.04)
    spread = 3 * largest
    place = _Place(scene, spread + 2 * largest)
    opacity = np.zeros_like(place.u)
    for index in range(int(rng.choice([1, 1, 2, 4]))):
        u, v = rng.uniform(-spread, spread, 2) if index else (0.0, 0.0)
        radius = max(largest * (rng.uniform(0.4, 1.0) if index else 1.0), 1.0)
        edge = max(radius * rng.uniform(0.3, 1.0), 1.0)
        opacity = np.maximum(opacity, _inside(np.hypot(place.u - u, place.v - v) - radius, softness=edge))
    return _Paint(place.window, scene.image[place.window] + scene.contrast(2.5, 8.0), opacity)


def _scratch(scene: _Scene) -> _Paint:
    """A long thin curved line whose depth varies along its length."""
    rng = scene.rng
    half = scene.side * log_uniform(rng, 0.06, 0.35)
    width = rng.uniform(1.0, 3.0) * max(scene.side / 512, 1.0)  # 1-3 px, and the same share of a larger photograph
    place = _Place(scene, half)
    along = np.clip(place.u / half, -1, 1)
    bend, wobble = rng.normal(0, 0.15) * half, rng.normal(0, 0.02) * half
    frequency, phase = rng.uniform(2, 6), rng.uniform(0, 2 * np.pi)
    middle = bend * (along**2 - 0.4) + wobble * np.sin(frequency * along + phase)
    slope = (2 * bend * along + wobble * frequency * np.cos(frequency * along + phase)) / half
    distance = abs(place.v - middle) / np.hypot(1, slope)
    depth = 0.75 + 0.25 * np.cos(rng.uniform(3, 12) * along + rng.uniform(0, 2 * np.pi))
    ends = np.minimum(4 * (1 - abs(place.u) / half), 1)
    opacity = _inside(distance - width / 2) * np.clip(depth * ends, 0, 1)
    return _Paint(place.window, scene.image[place.window] + scene.contrast(3.0, 9.0), opacity.astype(np.float32))


def _missing(scene: _Scene) -> _Paint:
    """A piece broken off the part: what lies beyond its edge shows instead.

    A part on a background breaks at its own outline; one that fills the picture breaks at the border, to the darkest
    colour found along it.
    """
    rng, image, part = scene.rng, scene.image, scene.part
    rim = _rim(image)
    edge = rim if part is None else part & ~ndimage.binary_erosion(part)
    row, column = rng.choice(np.argwhere(edge))
    radius = max(scene.side * np.sqrt(log_uniform(rng, 0.0015, 0.08) / np.pi) * scene.strength**0.25, 2.0)
    place = _Place(scene, 1.7 * radius, centre=(float(row), float(column)))
    opacity = _inside(_wavy_disc(place, radius, rng), softness=1.5)
    background = image[rim if part is None else rim & ~part]
    grey = background.mean(axis=1)
    if part is None:
        # A gap beside a part that fills the picture lies in its shadow.
        fill = background[grey <= np.quantile(grey, 0.03)].mean(axis=0) * rng.uniform(0.3, 0.9)
    else:
        fill = np.median(background, axis=0)
        # One pixel beyond the outline, so that no ghost of the edge remains.
        reach = ndimage.binary_dilation(part)[place.window].astype(np.float32)
        opacity = opacity * ndimage.gaussian_filter(reach, 0.7)
    noise = rng.normal(0, min(scene.grain, 4.0) / 2, (*place.u.shape, 1))
    return _Paint(place.window, (fill + noise).astype(np.float32), opacity)


def _rim(image: Float) -> Bool:
    """The outermost two pixels of a picture, as a mask."""
    rim = np.ones(image.shape[:2], dtype=bool)
    rim[2:-2, 2:-2] = False
    return rim


def _part(image: Float, grain: float) -> Bool | None:
    """Where the picture looks unlike its border, or None if that does not single out a part on a background."""
    brightness = ndimage.gaussian_filter(image.mean(axis=2), 1.0)
    rim = _rim(image)
    part = np.abs(brightness - np.median(brightness[rim])) > max(3 * grain, 20)
    return part if 0.05 < part.mean() < 0.9 and part[rim].mean() < 0.2 else None


def _shade(scene: _Scene) -> _Paint:
    """A large region, darker or brighter, without an outline."""
    length, width = scene.half_extent(0.03, LARGEST_SHADE, aspect=(1.0, 3.0))
    place = _Place(scene, 1.6 * length)
    opacity = np.exp(-((place.u / length) ** 2 + (place.v / width) ** 2)) - np.exp(-(1.6**2))
    local = scene.image[place.window]
    # Multiplied, as light is: black stays black.
    gain = 1 + scene.contrast(1.0, 5.0) / max(float(local.mean()), 16.0)
    return _Paint(place.window, local * max(gain, 0.1), np.clip(opacity, 0, 1).astype(np.float32))


_PAINTERS: dict[str, Callable[[_Scene], _Paint]] = {
    "cutpaste": _cutpaste,
    "scar": _scar,
    "texture": _texture,
    "smear": _smear,
    "spot": _spot,
    "scratch": _scratch,
    "missing": _missing,
    "shade": _shade,
}
DEFECT_KINDS: tuple[str, ...] = tuple(_PAINTERS)


def add_defect(
    image: UInt8, rng: np.random.Generator, kind: str | None = None, donor: UInt8 | None = None
) -> tuple[UInt8, Bool]:
    """Paint one defect on a photograph of a good part.

    Args:
        image: uint8 (H, W, 3), both sides at least 32 pixels. Grey images (equal channels) stay grey.
        rng: source of every choice; the same state gives the same result.
        kind: one of `DEFECT_KINDS`; drawn if None.
        donor: uint8 (H', W', 3), another good image of the same product to take texture from; `image` if None.

    Returns:
        A new image, and its mask: bool (H, W), True exactly where some channel changed by more than `JUST_VISIBLE`
        grey levels. The mask is never empty; it covers at most 8 % of the image ("shade": 25 %).

    Raises:
        DataError: an image is not uint8 (H, W, 3) or is too small.
        ConfigError: an unknown kind.
    """
    for name, array in (("image", image), ("donor", donor)):
        if array is not None and (array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3):
            raise DataError(f"Expected `{name}` as uint8 (H, W, 3), but got {array.dtype} {array.shape}.")
        if array is not None and min(array.shape[:2]) < SMALLEST_SIDE:
            raise DataError(f"Expected `{name}` with sides of at least {SMALLEST_SIDE} pixels, but got {array.shape}.")
    if kind is None:
        kind = DEFECT_KINDS[rng.integers(len(DEFECT_KINDS))]
    if kind not in _PAINTERS:
        raise ConfigError(f"Unknown defect kind {kind!r}; choose one of {', '.join(DEFECT_KINDS)}.")

    clean = image.astype(np.float32)
    source = clean if donor is None else donor.astype(np.float32)
    if donor is not None and (image == image[..., :1]).all():
        source = np.repeat(source.mean(axis=2, keepdims=True), 3, axis=2)
    fine = clean.mean(axis=2)
    grain = max(float((fine - ndimage.gaussian_filter(fine, 2.0)).std()), 5.0)
    part = _part(clean, grain)
    largest = LARGEST_SHADE if kind == "shade" else LARGEST_AREA
    smallest = max(4, SMALLEST_AREA * fine.size)

    for attempt in range(TRIES):
        strength = max(1.0, 1.25 ** (attempt - 4))
        window, colour, opacity = _PAINTERS[kind](_Scene(clean, source, part, grain, strength, rng))
        result = _blend(image, window, colour, opacity)
        mask = changed_pixels(image, result)
        # A few pixels that happen to differ inside a large shape would be noise, not a defect.
        visible = mask[window].sum() >= 0.3 * (opacity > 0.5).sum()
        if smallest <= mask.sum() <= largest * fine.size and visible:
            return result, mask
    # Nothing showed (a uniform image, say): shift a round spot away from the colour that is there.
    radius = max(0.03 * np.sqrt(fine.size), 2.0)
    place = _Place(_Scene(clean, source, part, grain, 1.0, rng), radius)
    opacity = _inside(np.hypot(place.u, place.v) - radius)
    local = clean[place.window]
    shift = 60.0 if local.mean() < 128 else -60.0
    result = _blend(image, place.window, local + shift, opacity)
    return result, changed_pixels(image, result)


def _blend(image: UInt8, window: tuple[slice, slice], colour: Float, opacity: Float) -> UInt8:
    """`image` with `colour` laid over one window, rounded to whole grey levels."""
    result = image.copy()
    local = image[window].astype(np.float32)
    mixed = local + (np.clip(colour, 0, 255) - local) * opacity[..., None]
    result[window] = np.rint(np.clip(mixed, 0, 255)).astype(np.uint8)
    return result


def changed_pixels(before: UInt8, after: UInt8, limit: int = JUST_VISIBLE) -> Bool:
    """Mask (H, W) of the pixels of two uint8 images (H, W, 3) where a channel differs by more than `limit`."""
    difference = np.abs(before.astype(np.int16) - after.astype(np.int16))
    return np.asarray(difference.max(axis=2) > limit)


def defect_set(images: Sequence[UInt8], total: int, seed: int = 0) -> list[SyntheticDefect]:
    """Paint `total` defects on good images, every kind and every image equally often (give or take one).

    Defect i depends on `seed`, i and the images alone, so a longer set begins with the shorter one.

    Args:
        images: uint8 (H, W, 3) each; sizes may differ.
        total: number of defects, 0 or more.
        seed: any non-negative integer.

    Raises:
        DataError: no images, or one that `add_defect` refuses.
    """
    if not images:
        raise DataError("Expected at least one good image to paint defects on, but got none.")
    defects = []
    for index in range(total):
        # Images are shuffled anew in every pass: otherwise 8 kinds and 80 images would always meet the same way.
        passes, position = divmod(index, len(images))
        order = np.random.default_rng([seed, passes, 1]).permutation(len(images))
        source_index = int(order[position])
        kind = DEFECT_KINDS[index % len(DEFECT_KINDS)]
        rng = np.random.default_rng([seed, index])
        donor = images[(source_index + int(rng.integers(1, max(len(images), 2)))) % len(images)]
        image, mask = add_defect(images[source_index], rng, kind, donor)
        defects.append(SyntheticDefect(image, mask, kind, source_index))
    return defects


def contact_sheet(images: Sequence[UInt8], masks: Sequence[Bool | None] | None = None, columns: int = 8) -> UInt8:
    """All images side by side, each defect outlined in red just outside its mask.

    Args:
        images: uint8 (H, W, 3) each; cells are as large as the largest.
        masks: bool (H, W) or None for each image.
        columns: images per row, at least 1.

    Returns:
        uint8 (rows · (H + 4), columns · (W + 4), 3).

    Raises:
        DataError: no images, or a different number of masks.
    """
    if not images or (masks is not None and len(masks) != len(images)):
        count = "none" if masks is None else len(masks)
        raise DataError(f"Expected images, and a mask (or None) for each, but got {len(images)} and {count}.")
    height, width = (max(image.shape[axis] for image in images) + 4 for axis in (0, 1))
    rows = -(-len(images) // columns)
    sheet = np.full((rows * height, columns * width, 3), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        cell, mask = image.copy(), masks[index] if masks is not None else None
        if mask is not None:
            outline = ndimage.binary_dilation(mask, iterations=3) & ~ndimage.binary_dilation(mask, iterations=2)
            cell[outline] = (255, 40, 40)
        top, left = index // columns * height + 2, index % columns * width + 2
        sheet[top : top + image.shape[0], left : left + image.shape[1]] = cell
    return sheet


def draw_examples(data: str | Path, path: str | Path, size: int, rows: int = 4) -> None:
    """Draw one defect of each kind a row, on good images of `data` at the model's size, as a PNG file.

    Raises:
        DataError: there are no good images, one cannot be read, or the file cannot be written.
    """
    chosen = spread(scan(data).train, rows * len(DEFECT_KINDS))
    sizes = [(info.height, info.width) for info in (probe(sample.path) for sample in chosen)]
    shape = model_shape(sizes, size)
    rule = fit_image_rule([sample.path for sample in chosen])
    good = [read_image(sample.path, shape, rule) for sample in chosen]
    defects = defect_set(good, rows * len(DEFECT_KINDS))
    sheet = contact_sheet(
        [defect.image for defect in defects], [defect.mask for defect in defects], columns=len(DEFECT_KINDS)
    )
    write_png(path, sheet)
