"""What calibration promises, and what good test images show: false alarms at several rates.

    python benchmarks/promise.py MODEL METRICS_JSON [--rates 0.01 0.02 0.05 0.1]

METRICS_JSON is what `ddad evaluate` wrote for this model. For each rate: the threshold from the model's calibration
scores, the expected share of good parts above it, the bound at 95 % confidence, and how many of the good test images
are above it, with Clopper and Pearson's interval and the chance of so many or more where the promise holds.
"""

import argparse
from pathlib import Path

from ddad import conformal
from ddad.detector import read_record
from ddad.evaluation import Evaluation
from ddad.metrics import rate_interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("metrics", type=Path)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1])
    options = parser.parse_args()
    calibration = read_record(options.model)["calibration"]["scores"]
    rows = Evaluation.load(options.metrics).rows
    good = [row.anomaly_score for row in rows if not row.is_defective]
    defective = [row.anomaly_score for row in rows if row.is_defective]
    print(f"{len(calibration)} calibration images, {len(good)} good and {len(defective)} defective test images")
    print("| asked for | promised | at most, 95 % confidence | good test images flagged | chance of so many | missed |")
    print("|---|---|---|---|---|---|")
    for rate in options.rates:
        limit = conformal.threshold(calibration, rate)
        promised = conformal.promised_rate(len(calibration), rate)
        bound = conformal.rate_bound(len(calibration), rate)
        count = sum(score > limit for score in good)
        low, high = rate_interval(count, len(good))
        chance = conformal.chance_of(count, len(good), len(calibration), rate)
        missed = sum(score <= limit for score in defective) / max(1, len(defective))
        print(
            f"| {rate:.0%} | {promised:.2%} | {bound:.2%} | {count} = {count / len(good):.1%} ({low:.1%}-{high:.1%}) | "
            f"{chance:.2f} | {missed:.1%} |"
        )


if __name__ == "__main__":
    main()
