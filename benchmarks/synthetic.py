"""How well trained models find synthetic defects: to choose between them, or between settings, without a test label.

    python benchmarks/synthetic.py DATA MODEL [MODEL ...] [--defects 160]

Good images are those of each model's *select* split, which it was not trained on. Defects are painted on them once, at
`--paint-size`, so that models of different sizes inspect the same defects. Statistics come from one half of these
images and judge the other half, then the other way round. Prints the image AUROC of the pixel distance, of each feature
layer and of all together; ± is its spread over resampled images.
"""

import argparse
from datetime import UTC, datetime

import numpy as np
import torch

from ddad.anomaly_map import image_score
from ddad.data.folder import scan
from ddad.data.samples import model_shape, paths_by_hash
from ddad.data.synthetic import SyntheticDefect
from ddad.detector import Detector
from ddad.images import probe, read_image
from ddad.metrics import image_metrics
from ddad.tuning import SyntheticTest, paint_halves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--defects", type=int, default=160)
    parser.add_argument("--paint-size", type=int, default=384)
    options = parser.parse_args()

    by_hash = paths_by_hash(sample.path for sample in scan(options.data).train)
    sizes = [(info.height, info.width) for info in map(probe, by_hash.values())]
    print(f"{options.defects} defects, {torch.get_num_threads()} threads, {datetime.now(UTC):%F}")
    print("| model | size | held-out loss | pixel | layers | all |")
    print("|---|---|---|---|---|---|")
    for name in options.models:
        detector = Detector.from_pretrained(name)
        paths = [by_hash[digest] for digest in detector.record["data"]["select"]]
        shape = model_shape(sizes, options.paint_size)
        good = [read_image(path, shape, detector.image_rule) for path in paths]
        painted = paint_halves(good, options.defects, seed=0)
        test = SyntheticTest(
            detector,
            [read_image(image, detector.shape) for image in good],
            [at_shape(defect, detector.shape) for defect in painted],
        )
        distances = test.distances()
        kinds = distances.shape[1]
        weightings = [tuple(float(j == k) for j in range(kinds)) for k in range(kinds)] + [detector.weights]
        columns = []
        for weights in weightings:
            weighted = {"pixel_weight": weights[0], "layer_weights": weights[1:]}
            scoring = detector.settings.scoring.model_copy(update=weighted)
            detector.settings = detector.settings.model_copy(update={"scoring": scoring})
            columns.append(auroc_with_spread(test.labels, image_score(test.maps(distances)).numpy()))
        loss = detector.record["training"]["held_out_loss"]
        size = "{} x {}".format(*detector.shape)
        layers = ", ".join(columns[1:-1])
        print(f"| {name} | {size} | {loss:.4f} | {columns[0]} | {layers} | {columns[-1]} |", flush=True)


def at_shape(defect: SyntheticDefect, shape: tuple[int, int]) -> SyntheticDefect:
    mask = read_image(np.repeat(defect.mask[..., None] * np.uint8(255), 3, axis=2), shape)[..., 0] > 127
    return defect._replace(image=read_image(defect.image, shape), mask=mask)


def auroc_with_spread(labels: np.ndarray, values: np.ndarray, draws: int = 200) -> str:
    rng = np.random.default_rng(0)
    resampled = []
    for _ in range(draws):
        chosen = np.concatenate([rng.choice(np.flatnonzero(labels == side), (labels == side).sum()) for side in (0, 1)])
        resampled.append(image_metrics(values[chosen], labels[chosen])["image_auroc"])
    return f"{image_metrics(values, labels)['image_auroc']:.3f} ± {np.std(resampled):.3f}"


if __name__ == "__main__":
    main()
