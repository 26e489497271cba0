"""How soon the monitor notices changed photographs, and how often it warns of good ones.

    python benchmarks/drift.py DATA MODEL [--draws 40] [--windows 1000]

Good test images of DATA are inspected as they are and as changed copies (brighter, darker, blurred, shifted, at the
model's size). A stream is drawn from them with replacement; for each change: in how many of `--draws` streams of at
most 500 photographs an alarm came, after how many photographs (median and largest), and of what. For good images:
alarms in `--windows` windows, drawn from the same test images and judged by the same calibration images again and
again, so that an unlucky pair of sets alarms often and most never.
"""

import argparse
from collections import Counter
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from ddad.data.folder import scan
from ddad.detector import Detector
from ddad.images import read_image
from ddad.prediction import photo_statistics

LONGEST = 500


def brighter(amount: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda image: np.clip(image.astype(int) + amount, 0, 255).astype(np.uint8)


def blurred(sigma: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda image: ndimage.gaussian_filter(image, (sigma, sigma, 0))


def shifted(share: float) -> Callable[[np.ndarray], np.ndarray]:
    def shift(image: np.ndarray) -> np.ndarray:
        moved = np.roll(image, pixels := round(share * image.shape[1]), axis=1)
        moved[:, :pixels] = 0
        return moved

    return shift


CHANGES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "none": lambda image: image,
    "10 grey levels brighter": brighter(10),
    "20 grey levels brighter": brighter(20),
    "40 grey levels brighter": brighter(40),
    "40 grey levels darker": brighter(-40),
    "blurred, sigma 1 pixel": blurred(1),
    "blurred, sigma 2 pixels": blurred(2),
    "shifted by 5 % of the width": shifted(0.05),
    "shifted by 10 % of the width": shifted(0.10),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("model")
    parser.add_argument("--draws", type=int, default=40)
    parser.add_argument("--windows", type=int, default=1000)
    options = parser.parse_args()

    detector = Detector.from_pretrained(options.model)
    assert detector.calibration is not None
    paths = [sample.path for sample in scan(options.data).test if not sample.is_anomalous]
    good = [read_image(path, detector.shape, detector.image_rule) for path in paths]
    print(f"{len(detector.calibration.scores)} calibration scores, {len(detector.calibration.photographs)} photographs")
    print("| change | noticed | median delay | largest | alarms at the first of |")
    print("|---|---|---|---|---|")
    rng = np.random.default_rng(0)
    for name, change in CHANGES.items():
        images = [change(image) for image in good]
        rows = list(zip(detector.score(images), map(photo_statistics, images), strict=True))
        if name == "none":
            print(good_windows(detector, rows, options.windows, rng))
            continue
        delays, what = [], Counter()
        for _ in range(options.draws):
            monitor = detector.calibration.monitor()
            for _ in range(LONGEST):
                if alarms := monitor.update(*rows[rng.integers(len(rows))]):
                    delays.append(monitor.images)
                    what.update(alarm.what for alarm in alarms)
                    break
        first = ", ".join(f"{kind} {count}" for kind, count in what.most_common())
        summary = f"{np.median(delays):.0f} | {max(delays)}" if delays else "- | -"
        print(f"| {name} | {len(delays)} of {options.draws} | {summary} | {first} |", flush=True)


def good_windows(detector: Detector, rows: list, windows: int, rng: np.random.Generator) -> str:
    monitor = detector.calibration.monitor()
    what = Counter()
    for _ in range(windows * monitor.window):
        what.update(alarm.what for alarm in monitor.update(*rows[rng.integers(len(rows))]))
    found = ", ".join(f"{kind} {count}" for kind, count in what.items()) or "none"
    return f"| none | {sum(what.values())} alarms in {windows} windows | - | - | {found} |"


if __name__ == "__main__":
    main()
