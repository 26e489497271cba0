"""What is wrong or suspicious in a folder of images, before anybody waits for training. Prints nothing."""

import math
import os
import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ddad.config import IMAGE_SIZE
from ddad.conformal import CONFIDENCE, images_needed, promised_rate, rate_bound
from ddad.data.folder import list_kinds, masks_by_image, scan
from ddad.data.samples import GOOD, SHAPE_MULTIPLE, Dataset, content_hash, model_shape, split_hashes, too_few_to_split
from ddad.errors import DataError
from ddad.images import ImageInfo, ImageRule, fit_image_rule, probe, read_image, read_mask

FAR_ASPECT = 1.5  # a side stretched by more than this against the other
BLANK_CONTRAST = 16  # of 255
VISIBLE_CELLS = 3  # model pixels across that a defect should cover


@dataclass(frozen=True)
class Finding:
    """One thing to know: "error" stops training, "warning" may spoil the result, "info" is good to know."""

    level: Literal["error", "warning", "info"]
    message: str
    advice: str = ""
    paths: tuple[Path, ...] = ()


@dataclass(frozen=True)
class CheckReport:
    """What `check` found. `shape` is the model's (height, width), `split` the number of good images by use."""

    root: Path
    category: str
    train: int = 0
    test: dict[str, int] = field(default_factory=dict)  # images by kind
    masks: int = 0
    shape: tuple[int, int] | None = None
    split: dict[str, int] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()

    @property
    def can_train(self) -> bool:
        return not any(finding.level == "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for JSON; paths as text."""
        report = asdict(self) | {"root": str(self.root), "can_train": self.can_train}
        report["shape"] = self.shape and list(self.shape)
        report["findings"] = [
            asdict(finding) | {"paths": [str(path) for path in finding.paths]} for finding in self.findings
        ]
        return report


@dataclass(frozen=True)
class _Looked:
    """One image file: header, (height, width) and contrast after decoding, hash of the bytes; or why that failed."""

    path: Path
    info: ImageInfo | None = None
    size: tuple[int, int] = (0, 0)
    digest: str = ""
    contrast: int = 0
    error: str = ""


def check(root: str | os.PathLike[str], false_alarms: float = 0.01, image_size: int = IMAGE_SIZE) -> CheckReport:
    """Decode every image and mask under root and list what is wrong, what to do, and what training would use.

    false_alarms: the rate of false alarms wanted, in (0, 1). image_size: see `model_shape`. A folder that cannot be
    scanned is an error-level finding; only settings that cannot work raise, as ConfigError.
    """
    needed = images_needed(false_alarms)
    model_shape([(1, 1)], image_size)  # refuses a wrong size before the long part
    try:
        dataset = scan(root)
    except DataError as error:
        advice = "Use DATA/train/good, DATA/test/<kind>, DATA/ground_truth/<kind>, or a folder of good images."
        return CheckReport(Path(root), Path(root).resolve().name, findings=(Finding("error", str(error), advice),))

    # Threads, because Pillow decodes outside the interpreter lock; few, because each may hold a large image.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        good_paths = [sample.path for sample in dataset.train]
        rule = ImageRule(white=max(pool.map(_white, good_paths), default=0) or ImageRule().white)
        train = list(pool.map(lambda path: _look(path, rule), good_paths))
        test = list(pool.map(lambda sample: _look(sample.path, rule), dataset.test))
        mask_findings = _masks(dataset, test, pool)

    findings: list[Finding] = []
    broken = [look for look in train if look.error]
    findings += [
        Finding("error", look.error, "Mend or remove it: training stops there.", (look.path,)) for look in broken
    ]
    findings += [
        Finding("warning", look.error, "Mend or remove it: it cannot be judged.", (look.path,))
        for look in test
        if look.error
    ]
    shape, split = None, {}
    good = [look for look in train if look.info]
    if good:
        shape = model_shape([look.size for look in good], image_size)
    try:
        parts = split_hashes(sorted({look.digest for look in good}), false_alarms)
    except DataError as error:
        findings.append(Finding("error", f"{dataset.root}: {error}", "Photograph more good parts."))
    else:
        split = {name: len(part) for name, part in zip(("train", "select", "calibration"), parts, strict=True)}
        different = split["calibration"]  # copies of an image add no evidence
        if too_few_to_split(sum(split.values()), split["select"], different, false_alarms):
            different += split["select"]
        if different < needed:
            message = (
                f"expected {needed} calibration images for a false-alarm rate of {false_alarms:.3g}, but found "
                f"{different} among {len(good)} good ones; "
                f"that promises {promised_rate(different, false_alarms):.2g} only, and with "
                f"{CONFIDENCE:.0%} confidence no more than {rate_bound(different, false_alarms):.2g}."
            )
            # Calibration gets 0.4 of all at most; hash values scatter, so ask for some more.
            advice = f"Bring about {math.ceil(2.8 * needed)} good images, or allow more false alarms."
            findings.append(Finding("warning", message, advice))
    findings += _copies(dataset, train, test)
    if good and shape:
        findings += _looks(good, [look for look in test if look.info], rule)
        findings += _resolution(good, shape, image_size)
    findings += _kinds(dataset) + mask_findings
    order = ("error", "warning", "info")
    return CheckReport(
        dataset.root,
        dataset.category,
        len(dataset.train),
        dict(Counter(sample.kind for sample in dataset.test)),
        sum(sample.mask is not None for sample in dataset.test),
        shape,
        split,
        tuple(sorted(findings, key=lambda finding: order.index(finding.level))),
    )


def _white(path: Path) -> int:
    """The white this image asks for, 0 when it has no say."""
    try:
        info = probe(path)
        return fit_image_rule([path]).white if info.bits > 8 and info.mode != "F" else 0
    except DataError:
        return 0  # found again, and reported, when it is decoded


def _look(path: Path, rule: ImageRule) -> _Looked:
    try:
        info, pixels = probe(path), read_image(path, rule=rule)
        return _Looked(path, info, (pixels.shape[0], pixels.shape[1]), content_hash(path), int(np.ptp(pixels)))
    except DataError as error:
        return _Looked(path, error=str(error))


def _copies(dataset: Dataset, train: Sequence[_Looked], test: Sequence[_Looked]) -> list[Finding]:
    places: dict[str, list[tuple[str, Path]]] = defaultdict(list)
    for kind, look in [("", look) for look in train] + [
        (sample.kind, look) for sample, look in zip(dataset.test, test, strict=True)
    ]:
        if look.digest:
            places[look.digest].append((kind, look.path))
    findings = []
    for entries in places.values():
        kinds, paths = {kind for kind, _ in entries}, tuple(path for _, path in entries)
        if len(entries) == 1:
            continue
        if "" in kinds and len(kinds) > 1:
            message, advice = "the same image is in train and in test", "Remove one: the test would flatter the model."
        elif len(kinds) > 1:
            message, advice = f"the same image is in test as {' and as '.join(sorted(kinds))}", "Keep the right one."
        else:
            message, advice = f"the same image is there {len(entries)} times", "Keep one: copies add no evidence."
        findings.append(Finding("warning", message + ".", advice, paths))
    return findings


def _looks(good: Sequence[_Looked], test: Sequence[_Looked], rule: ImageRule) -> list[Finding]:
    """Sizes, aspect ratios, modes, depth and contrast; all looks are readable."""
    findings = []
    sizes = [look.size for look in good]
    if len(set(sizes)) > 1:
        smallest, largest = (f(sizes, key=math.prod) for f in (min, max))
        message = f"good images have {len(set(sizes))} sizes, from {smallest[1]} x {smallest[0]} to "
        findings.append(
            Finding("info", f"{message}{largest[1]} x {largest[0]}.", "Each is resized to the model's shape.")
        )
    stretches = {look.path: math.log(look.size[1] / look.size[0]) for look in [*good, *test]}
    middle = statistics.median(stretches[look.path] for look in good)
    far = tuple(path for path, stretch in stretches.items() if abs(stretch - middle) > math.log(FAR_ASPECT))
    if far:
        message = f"{len(far)} images are more than {FAR_ASPECT} times wider or narrower than the median good image."
        findings.append(Finding("warning", message, "They are squeezed: crop all to one aspect ratio if you can.", far))

    modes: dict[str, list[Path]] = defaultdict(list)
    for look in [*good, *test]:
        assert look.info is not None
        grey = look.info.mode in ("1", "L", "LA", "I", "F") or look.info.mode.startswith("I;16")
        modes[f"{look.info.bits}-bit {'grey' if grey else 'colour'} {look.info.format}"].append(look.path)
    if len(modes) > 1:
        listed = ", ".join(f"{len(paths)} {mode}" for mode, paths in sorted(modes.items()))
        rare = min(modes.values(), key=len)
        advice = "Save all in one way: a difference of files may pass for a difference of parts."
        findings.append(Finding("warning", f"images are of different kinds: {listed}.", advice, tuple(rare)))
    deep = tuple(look.path for look in [*good, *test] if look.info and look.info.bits > 8)
    if deep:
        message = f"{len(deep)} images have more than 8 bit; {rule.white} is read as white, floats up to 1."
        findings.append(Finding("info", message, "Keep the camera's exposure and gain as they are.", deep))
    blank = tuple(look.path for look in [*good, *test] if look.contrast < BLANK_CONTRAST)
    if blank:
        message = (
            f"{len(blank)} images are nearly blank: brightest and darkest differ by less than {BLANK_CONTRAST}/255."
        )
        findings.append(Finding("warning", message, "Check exposure and bit depth, or remove them.", blank))
    return findings


def _resolution(good: Sequence[_Looked], shape: tuple[int, int], image_size: int) -> list[Finding]:
    side = math.sqrt(statistics.median(math.prod(look.size) for look in good))
    scale = side / math.sqrt(math.prod(shape))
    message = f"one model pixel covers {scale:.1f} x {scale:.1f} photo pixels"
    if scale <= 1:
        return [Finding("info", message + ".", "A larger --image-size would show nothing more.")]
    message += f"; defects less than about {math.ceil(VISIBLE_CELLS * scale)} photo pixels across will be hard to see."
    finer = min(math.ceil(side / SHAPE_MULTIPLE) * SHAPE_MULTIPLE, 2 * image_size)
    return [Finding("warning" if scale > 2 else "info", message, f"Use --image-size {finer} if yours are smaller.")]


def _kinds(dataset: Dataset) -> list[Finding]:
    counts = Counter(sample.kind for sample in dataset.test)
    findings = []
    if empty := [kind for kind in list_kinds(dataset.root / "test") if not counts[kind]]:
        paths = tuple(dataset.root / "test" / kind for kind in empty)
        findings.append(
            Finding("warning", f"no images of {', '.join(empty)}.", "Add images or remove the folder.", paths)
        )
    if not counts:
        findings.append(Finding("info", "there are no test images.", "Training works; evaluating needs test/<kind>."))
    elif not counts[GOOD] or len(counts) == 1:
        missing = "defective" if counts[GOOD] else "good"
        advice = "Evaluating needs both good and defective parts."
        findings.append(Finding("warning", f"test has no {missing} images.", advice))
    return findings


def _masks(dataset: Dataset, test: Sequence[_Looked], pool: ThreadPoolExecutor) -> list[Finding]:
    defective = [(sample, look) for sample, look in zip(dataset.test, test, strict=True) if sample.is_anomalous]
    masked = [(sample.mask, look) for sample, look in defective if sample.mask]
    without = tuple(sample.path for sample, _ in defective if not sample.mask)
    findings = []
    if defective and not masked:
        advice = "Only image metrics can be measured; add masks to ground_truth/<kind> for pixel metrics."
        findings.append(Finding("info", "no test image has a mask.", advice))
    elif without:
        advice = "Add ground_truth/<kind>/<name>_mask.png: these are left out of pixel metrics."
        findings.append(Finding("warning", f"{len(without)} defective images have no mask.", advice, without))

    def read(path: Path) -> tuple[tuple[int, int], bool] | str:
        try:
            mask = read_mask(path)
            return (mask.shape[0], mask.shape[1]), bool(mask.any())
        except DataError as error:
            return str(error)

    empty, odd = [], []
    for (path, look), found in zip(masked, pool.map(read, [path for path, _ in masked]), strict=True):
        if isinstance(found, str):
            findings.append(Finding("warning", found, "Mend the mask or remove it.", (path,)))
            continue
        if not found[1]:
            empty.append(path)
        if look.info and found[0] != look.size:
            odd.append(path)
    if empty:
        advice = "Mark the defect in white, or move the image to test/good."
        findings.append(Finding("warning", f"{len(empty)} masks mark nothing.", advice, tuple(empty)))
    if odd:
        advice = "Save each mask at its photograph's size: marks may lie beside the defects."
        findings.append(Finding("warning", f"{len(odd)} masks differ in size from their image.", advice, tuple(odd)))
    used = {path for path, _ in masked}
    truth = dataset.root / "ground_truth"
    stray = [
        path
        for kind in list_kinds(truth)
        if kind != GOOD
        for path in masks_by_image(truth / kind).values()
        if path not in used
    ]
    if stray:
        advice = "Name masks after their images: test/scratch/007.png goes with ground_truth/scratch/007_mask.png."
        findings.append(Finding("warning", f"{len(stray)} masks belong to no image.", advice, tuple(stray)))
    return findings
