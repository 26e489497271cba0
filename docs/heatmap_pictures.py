"""Draw the pictures of docs/guides/how-to-read-a-heatmap.md from the model that `make demo` left.

python docs/heatmap_pictures.py demo/model docs/guides
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from PIL import Image, ImageFilter

from ddad import Detector, Prediction
from ddad.data.demo import render_part
from ddad.images import heatmap, overlay

COLUMNS = ("photograph", "reconstruction", "heatmap", "overlay and regions")


def main(model: Path, out: Path) -> None:
    mpl.use("agg")
    plt.rc("font", size=8)
    detector = Detector.from_pretrained(model)
    shown = {"a good part": None, "a stain": "stain", "a plugged hole": "plugged_hole", "a scratch": "scratch"}
    parts = [render_part(np.random.default_rng(4), kind)[0] for kind in shown.values()]
    save(grid(list(shown), detector.predict(parts)), out / "heatmap-parts.jpg")

    good = Image.fromarray(parts[0])
    changed = {
        "as it is": good,
        "blurred": good.filter(ImageFilter.GaussianBlur(2)),
        "moved by 5 %": good.transform(good.size, Image.Transform.AFFINE, (1, 0, 8, 0, 1, 0), fillcolor=(20, 24, 28)),
        "half as bright": good.point(lambda value: value // 2),
    }
    save(grid(list(changed), detector.predict(list(changed.values()))), out / "heatmap-artefacts.jpg")
    save(scale(), out / "heatmap-scale.jpg")


def grid(names: Sequence[str], results: Sequence[Prediction]) -> plt.Figure:
    """One row a photograph: itself, its reconstruction, heatmap, overlay with boxes."""
    figure, axes = plt.subplots(len(names), 4, figsize=(6.4, 1.62 * len(names) + 0.2), layout="compressed")
    for name, result, row in zip(names, results, axes, strict=True):
        limit = result.threshold
        assert limit is not None
        pictures = (
            result.image,
            result.reconstruction,
            heatmap(result.anomaly_map, limit),
            overlay(result.image, result.anomaly_map, limit),
        )
        for axis, picture in zip(row, pictures, strict=True):
            axis.imshow(picture)
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{name}\nscore {result.anomaly_score:.2f}, p = {result.p_value:.2f}")
        for region in result.regions:
            # Boxes are in pixels of the photograph; the pictures are of the model's size.
            left, top, right, bottom = np.array(region.box) * result.image.shape[0] / 160
            box = Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor="white")
            row[3].add_patch(box)
    for axis, title in zip(axes[0], COLUMNS, strict=True):
        axis.set_title(title, fontsize=8)
    return figure


def scale() -> plt.Figure:
    """The colours of a heatmap, from nothing to twice the threshold."""
    figure, axis = plt.subplots(figsize=(6.4, 0.9), layout="compressed")
    axis.imshow(heatmap(np.linspace(0, 2, 512)[None], 1.0), aspect="auto", extent=(0, 2, 0, 1))
    axis.set(yticks=[], xticks=[0, 1, 2], xticklabels=["0", "threshold", "twice the threshold, and above"])
    axis.get_xticklabels()[2].set_horizontalalignment("right")
    return figure


def save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=140, bbox_inches="tight", pad_inches=0.03, pil_kwargs={"quality": 88})
    plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
