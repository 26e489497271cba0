"""Does tuning on synthetic defects help on real ones? Three rows on one network: fixed, tuned, as published.

    python benchmarks/settings.py DATA MODEL OUT [--seconds 600]

The search sees good images of the model's *select* split and synthetic defects painted on them; the rows are measured
on the labelled test images of DATA. Writes `settings.md` (the table), `tuning.json` (every trial) and what a resumed
call needs to OUT.
"""

import argparse
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

import torch

from ddad.ablation import VARIANTS, Variant, run_ablation
from ddad.comparison import read_json
from ddad.data.folder import scan
from ddad.data.samples import paths_by_hash
from ddad.detector import Detector
from ddad.files import write_json, write_text
from ddad.images import read_image
from ddad.tuning import tune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=600)
    options = parser.parse_args()

    found = read_json(options.out / "tuning.json")
    if not found:
        detector = Detector.from_pretrained(options.model)
        by_hash = paths_by_hash(sample.path for sample in scan(options.data).train)
        select = [
            read_image(by_hash[one], detector.shape, detector.image_rule) for one in detector.record["data"]["select"]
        ]
        found = tune(detector, select, options.seconds, print)
        write_json(options.out / "tuning.json", found)
    changes: dict[str, dict] = defaultdict(dict)
    for name, value in found["changes"].items():
        group, setting = name.split(".")
        changes[group][setting] = value
    rows = (
        Variant("fixed", ours=True),
        Variant("tuned", changes["sampling"], changes["scoring"], ours=True),
        next(variant for variant in VARIANTS if variant.name.startswith("as published")),
    )
    table = run_ablation(options.model, options.data, options.out, variants=rows, on_stage=print)
    machine = f"{torch.get_num_threads()} threads, {datetime.now(UTC):%F}"
    write_text(options.out / "settings.md", f"{table}\n{found['said']} {machine}.\n")
    print((options.out / "settings.md").read_text())


if __name__ == "__main__":
    main()
