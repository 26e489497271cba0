"""Does a score depend on having seen the same part? For data sets that photograph a part several times.

    python benchmarks/relatives.py DATA MODEL METRICS_JSON

The relative of a test image is the training image it correlates with most, pixel by pixel, after a difference of
Gaussians has taken out light and grain. Prints how near the relatives are, how well that alone tells defects from good
images, and the image AUROC of the model's scores (METRICS_JSON of `ddad evaluate`) against thirds of the good test
images, from those without a near relative to those with one.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy import ndimage, stats

from ddad.data.folder import scan
from ddad.data.samples import paths_by_hash
from ddad.detector import Detector
from ddad.evaluation import Evaluation
from ddad.images import ImageRule, read_image
from ddad.metrics import image_intervals, image_metrics

SIDE = 64


def patterns(paths: Iterable[Path], rule: ImageRule) -> np.ndarray:
    """One row an image, (N, SIDE * SIDE), with mean 0 and length 1."""
    rows = []
    for path in paths:
        grey = read_image(path, (SIDE, SIDE), rule).mean(axis=2)
        band = ndimage.gaussian_filter(grey, 0.7) - ndimage.gaussian_filter(grey, 3)
        row = (band - band.mean()).ravel()
        rows.append(row / max(np.linalg.norm(row), 1e-9))
    return np.array(rows)


def auroc(scores: np.ndarray, labels: np.ndarray) -> str:
    low, high = image_intervals(scores, labels)["image_auroc"]
    return f"{image_metrics(scores, labels)['image_auroc']:.3f} ({low:.3f}-{high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("model")
    parser.add_argument("metrics")
    options = parser.parse_args()

    detector = Detector.from_pretrained(options.model)
    by_hash = paths_by_hash(sample.path for sample in scan(options.data).train)
    rows = Evaluation.load(options.metrics).rows
    trained = patterns((by_hash[one] for one in detector.record["data"]["train"]), detector.image_rule)
    nearest = (patterns((Path(row.path) for row in rows), detector.image_rule) @ trained.T).max(axis=1)
    labels = np.array([row.is_defective for row in rows])
    scores = np.array([row.anomaly_score for row in rows])

    for name, chosen in (("good", ~labels), ("defective", labels)):
        quartiles = ", ".join(f"{value:.2f}" for value in np.quantile(nearest[chosen], (0.25, 0.5, 0.75)))
        print(f"{name} test images: correlation with the nearest training image, quartiles {quartiles}")
    print(f"1 - that correlation alone: image AUROC {auroc(1 - nearest, labels)}")
    rank = stats.spearmanr(scores[~labels], nearest[~labels])
    print(f"good images: Spearman {rank.statistic:.2f} (p = {rank.pvalue:.1g}) between score and that correlation")
    print("| good test images | images | correlation | image AUROC of the model | of 1 - correlation |")
    print("|---|---|---|---|---|")
    ordered = np.flatnonzero(~labels)[np.argsort(nearest[~labels])]
    for name, good in zip(
        ("all", "lowest third", "middle third", "highest third"), [ordered, *np.array_split(ordered, 3)], strict=True
    ):
        some = np.concatenate([good, np.flatnonzero(labels)])
        between = f"{nearest[good].min():.2f}-{nearest[good].max():.2f}"
        print(
            f"| {name} | {len(good)} | {between} | {auroc(scores[some], labels[some])} | "
            f"{auroc(1 - nearest[some], labels[some])} |"
        )


if __name__ == "__main__":
    main()
