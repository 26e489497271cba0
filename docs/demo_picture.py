"""Draw docs/demo.png from what `make demo` left: photograph | reconstruction | overlay, one row an image.

python docs/demo_picture.py demo docs/demo.png
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ddad import Detector
from ddad.images import overlay

SHOWN = ("good/000", "scratch/001", "stain/003", "plugged_hole/002")
SIDE = 192
GAP = 6


def main(demo: Path, out: Path) -> None:
    detector = Detector.from_pretrained(demo / "model")
    rows = []
    for result in detector.predict([demo / f"parts/test/{name}.png" for name in SHOWN]):
        assert result.threshold is not None
        pictures = result.image, result.reconstruction, overlay(result.image, result.anomaly_map, result.threshold)
        rows.append([np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.BICUBIC)) for picture in pictures])
    # Two images a line, so that the picture stays low.
    lines = [np.hstack([padded(picture) for row in rows[i : i + 2] for picture in row]) for i in range(0, len(rows), 2)]
    Image.fromarray(np.vstack(lines)).quantize(256).save(out, optimize=True)


def padded(picture: np.ndarray) -> np.ndarray:
    return np.pad(picture, ((GAP, 0), (GAP, 0), (0, 0)), constant_values=255)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
