"""What gpu.sh runs: stage after stage, each skipped where its result is there, none begun without time for it."""

import argparse
import json
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from ddad.ablation import run_ablation
from ddad.config import Settings, make_settings
from ddad.detector import Detector, package_versions
from ddad.errors import Interrupted
from ddad.features import FeatureExtractor, create_features
from ddad.files import write_json
from ddad.fit import fit
from ddad.report import evaluate_folder
from ddad.unet import create_scheduler, create_unet

PRESETS = {"base": 0.7, "s": 0.3}
"""Share of the training time."""
BATCH_SIZES = (1, 32)
STAGE_SECONDS = 90
"""Without this much time left nothing new is begun."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--train-seconds", type=float, default=1000)
    parser.add_argument("--call-seconds", type=float, default=540)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if not options.smoke and not torch.cuda.is_available():
        print("Expected an NVIDIA GPU, found none; add --smoke to try the script on a CPU.", file=sys.stderr)
        return 1
    deadline = time.monotonic() + options.call_seconds
    _interrupt_at(deadline - 20)

    work, path = options.out / "work", options.out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    stages: list[tuple[str, Callable[[], dict[str, Any]]]] = [("latency", lambda: latency(options.smoke))]
    for preset, share in PRESETS.items():
        model = work / preset / "model"
        stages += [
            (f"{preset}/training", lambda p=preset, s=share, m=model: train(p, s, m, options)),
            (f"{preset}/evaluation", lambda m=model: judge(m, options)),
            (f"{preset}/ablation", lambda m=model: ablate(m, options)),
        ]
    failed = 0
    for name, stage in stages:
        if name in results:
            continue
        if deadline - time.monotonic() < (0 if options.smoke else STAGE_SECONDS):
            print(f"Not enough time for {name}; the same call again goes on there.")
            return 0
        print(f"{name} ...", flush=True)
        try:
            result = stage()
        except (Interrupted, KeyboardInterrupt) as error:
            print(f"Stopped in {name} ({error}); the same call again goes on there.")
            return 0
        except Exception:  # device time is short: the other stages go on
            traceback.print_exc()
            failed += 1
            continue
        results[name] = {**result, **machine(), "date": f"{datetime.now(UTC):%F}"}
        write_json(path, results)
    print(f"{failed} stages failed." if failed else f"All done: {path}")
    return min(failed, 1)


def _interrupt_at(moment: float) -> None:
    """As Ctrl-C would: what is running saves itself."""
    timer = threading.Timer(max(1.0, moment - time.monotonic()), lambda: signal.raise_signal(signal.SIGINT))
    timer.daemon = True
    timer.start()


def settings(preset: str, smoke: bool) -> Settings:
    training = {"compile": not smoke}
    if smoke:
        return make_settings(
            preset,
            image_size=32,
            false_alarms=0.2,
            network={"architecture": "xs", "attention_heads": None},
            training={**training, "batch_size": 2},
            adaptation={"epochs": 1},
        )
    return make_settings(preset, training=training)


def train(preset: str, share: float, out: Path, options: argparse.Namespace) -> dict[str, Any]:
    amount = {"steps": 3} if options.smoke else {"time_budget": share * options.train_seconds}
    fit(options.data, out, settings(preset, options.smoke), on_stage=print, **amount)
    record = json.loads((out / "detector.json").read_text())
    return {key: record[key] for key in ("training", "adaptation", "shape", "settings")}


def judge(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    detector = Detector.from_pretrained(model)
    evaluation = evaluate_folder(detector, options.data, model.parent, batch_size=8, workers=8)
    return {"metrics": evaluation.metrics, "per_kind": evaluation.per_kind, "notes": evaluation.notes}


def ablate(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    images = 12 if options.smoke else None
    table = run_ablation(model, options.data, model.parent, max_images=images, workers=8, on_stage=print)
    return {"table": table.splitlines()}


def latency(smoke: bool) -> dict[str, Any]:
    """Seconds for one batch of noise, photograph to map, with weights that were never trained: speed does not mind."""
    rows = []
    for preset in ("paper", "base", "s", "xs"):
        made = settings(preset, smoke)
        shape = (made.image_size,) * 2
        if preset == "paper":
            backbone = timm.create_model("resnet18" if smoke else "wide_resnet101_2", pretrained=False)
            features = FeatureExtractor(backbone, "wide_resnet101_2", (2, 3), (0.5,) * 3, (0.5,) * 3)
        else:
            features = create_features(made.scoring.features, made.scoring.feature_layers)
        unet = create_unet(made.network.architecture)
        detector = Detector(unet, create_scheduler(made.network.prediction_type), features, made, shape)
        for precision in ("fp32",) if preset == "paper" else ("fp32", "bf16"):
            detector.precision = precision
            for batch_size in BATCH_SIZES:
                rows.append(
                    {
                        "preset": preset,
                        "precision": precision,
                        "calls": len(made.sampling.timesteps),
                        "batch_size": batch_size,
                        "seconds": median_seconds(detector, batch_size, repeats=2 if smoke else 10),
                    }
                )
                print(rows[-1], flush=True)
    return {"rows": rows}


def median_seconds(detector: Detector, batch_size: int, repeats: int) -> float:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*detector.shape, 3), dtype=np.uint8) for _ in range(batch_size)]
    detector.predict(images, batch_size)
    durations = []
    for _ in range(repeats):
        started = time.perf_counter()
        detector.predict(images, batch_size)  # ends with the maps on the CPU, so the GPU has finished
        durations.append(time.perf_counter() - started)
    return float(np.median(durations))


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {"gpu": gpu, "processor": platform.processor() or platform.machine(), "versions": package_versions()}


if __name__ == "__main__":
    raise SystemExit(main())
