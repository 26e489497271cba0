"""One network for many categories, or one for each: what it costs in quality, at equal steps in all.

    python benchmarks/family.py TILE --out FOLDER [--steps 2400] [--size 64] [--seed 0]

Three categories: TILE, a folder in MVTec layout such as Magnetic Tile Defects, and two kinds of rendered parts, the
demo's flange and one of other dimensions. Three ways to train: a family (`told`, a class-conditional network), a family
whose network is not told the category (`untold`), and a model a category (`own`), with the share of the steps that the
family gives to it. Same architecture, size, seed and features, not adapted. Everything is judged on test images, by
which nothing is chosen. The same call again goes on where it was stopped; results are in FOLDER/table.md and
results.json.
"""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from ddad.config import Settings, make_settings
from ddad.data import demo
from ddad.data.folder import scan
from ddad.detector import Detector
from ddad.family import Family, read_family
from ddad.files import write_json, write_text
from ddad.fit import fit
from ddad.fit_family import train_family
from ddad.report import evaluate_folder

FALSE_ALARMS = 0.05
"""What the calibration images of the smallest category can promise."""
RING = {"BORE": 0.06, "O_RING": 0.115, "O_RING_WIDTH": 0.012, "BOLT_CIRCLE": 0.25, "BOLT_HOLE": 0.06}
"""Dimensions of the second kind of part."""
KINDS = {"own": "its own", "told": "one for all", "untold": "one for all, not told"}
METRICS = ("image_auroc", "aupro", "false_alarm_rate", "miss_rate")


def gather(tile: Path, root: Path) -> None:
    """The three categories side by side; nothing is copied of the first."""
    root.mkdir(parents=True, exist_ok=True)
    if not (root / "tile").exists():
        (root / "tile").symlink_to(tile.resolve())
    demo.write_demo_dataset(root / "flange", seed=0)
    with patch.multiple(demo, **RING):
        demo.write_demo_dataset(root / "ring", seed=1)


def judge(detector: Detector, data: Path, out: Path) -> dict[str, Any]:
    """Metrics with their intervals, measured once."""
    if not (out / "metrics.json").exists():
        evaluate_folder(detector, data, out)
    found = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return {
        **{name: found[name] for name in METRICS},
        "intervals": {name: found["intervals"].get(name) for name in METRICS},
        "promised": found["false_alarms"],
        "counts": found["counts"],
    }


def recognised(family: Family, root: Path) -> dict[str, float]:
    """Share of test images of each category, good and defective, whose category is inferred rightly."""
    shares = {}
    for name in family.categories:
        paths = [sample.path for sample in scan(root / name).test]
        shares[name] = sum(family.infer_category(path) == name for path in paths) / len(paths)
    return shares


def megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def table(results: dict[str, Any]) -> str:
    """Markdown, of what is there."""
    lines = [
        "| category | network | steps | image AUROC | AUPRO | false alarms | missed | category inferred |",
        "|---|---|---|---|---|---|---|---|",
    ]
    kinds = {kind: said for kind, said in KINDS.items() if kind in results}
    for name in results["told"]:
        for kind, said in kinds.items():
            found = results[kind][name]
            figures = (_figure(found, metric) for metric in METRICS)
            inferred = f"{results['recognised'][kind][name]:.1%}" if kind in results["recognised"] else "-"
            lines.append(f"| {name} | {said} | {found['steps']} | {' | '.join(figures)} | {inferred} |")
    sizes = ", ".join(f"{results['megabytes'][kind]:.1f} MB ({said})" for kind, said in kinds.items())
    height, width = results["shape"]
    return "\n".join(
        [
            *lines,
            "",
            f"{results['steps']} steps of 16 images in all, {height} x {width} pixels, seed {results['seed']}, "
            f"{results['threads']} thread, {results['date']}. On disk: {sizes}. Parentheses: 95 % intervals.",
            "",
        ]
    )


def _figure(found: dict[str, Any], metric: str) -> str:
    form = "{:.1%}" if metric.endswith("rate") else "{:.3f}"
    between = found["intervals"][metric]
    interval = f" ({form.format(between[0])}-{form.format(between[1])})" if between else ""
    return form.format(found[metric]) + interval


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tile", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2400, help="in all")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    root, out = options.out / "parts", options.out
    gather(options.tile, root)
    settings: Settings = make_settings(
        "xs", image_size=options.size, seed=options.seed, false_alarms=FALSE_ALARMS, adaptation={"epochs": 0}
    )

    def say(sentence: str) -> None:
        print(f"{datetime.now(UTC):%T} {sentence}", flush=True)

    results: dict[str, Any] = {
        "steps": options.steps,
        "seed": options.seed,
        "threads": torch.get_num_threads(),
        "date": f"{datetime.now(UTC):%F}",
        "recognised": {},
        "megabytes": {},
        "seconds": {},
    }

    def keep(kind: str, judged: dict[str, Any], folder: Path) -> None:
        results[kind] = judged
        results["megabytes"][kind] = megabytes(folder)
        write_json(out / "results.json", results)
        write_text(out / "table.md", table(results))

    def judge_family(kind: str, conditional: bool) -> dict[str, int]:
        """Train and judge a family; returns the steps of each category."""
        say(kind)
        folder = train_family(root, out / kind, settings, conditional=conditional, steps=options.steps, on_stage=say)
        record, family = read_family(folder), Family.from_pretrained(folder)
        places = record["training"]["places"]
        shares = {name: round(options.steps * count / sum(places.values())) for name, count in places.items()}
        results["recognised"][kind] = recognised(family, root)
        results["seconds"][kind] = record["training"]["seconds"]
        results["shape"] = record["shape"]
        judged = {
            name: {**judge(family.detector(name), root / name, out / "judged" / kind / name), "steps": shares[name]}
            for name in family.categories
        }
        keep(kind, judged, folder)
        return shares

    shares = judge_family("told", conditional=True)
    own = {}
    for name, steps in shares.items():
        say(f"own {name}")
        model = fit(scan(root / name), out / "own" / name, settings, steps=steps, on_stage=say)
        own[name] = {**judge(Detector.from_pretrained(model), root / name, out / "judged/own" / name), "steps": steps}
    keep("own", own, out / "own")
    judge_family("untold", conditional=False)
    print(table(results))


if __name__ == "__main__":
    main()
