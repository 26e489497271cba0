"""The model card: the README of a model folder, from what was measured and recorded."""

from ddad.detector import Detector

FRONT = """---
library_name: ddad
tags: [anomaly-detection, diffusion, ddad]
---
"""
LIMITS = """
## Limits

The promise holds for parts and photographs like the good ones it was calibrated on: same product, camera and light.
Defects smaller than a few pixels at the model's size cannot be seen. Accuracy on defects is not known from good images:
measure it with `ddad evaluate` on labelled ones.
"""
CONVERTED = """
Which photographs the network was trained on is not recorded in the checkpoint. The promise holds only if none of them
served to calibrate.
"""
UNCALIBRATED = """
## Limits

There is no calibration: the model gives neither a p-value nor a verdict until `ddad recalibrate` has seen good images
that it was not trained on.
"""
USE = """
```python
from ddad import Detector
result = Detector.from_pretrained("this folder").predict("part.png")
```
"""


def model_card(detector: Detector, student: Detector | None = None) -> str:
    """Markdown with front matter, as the Hugging Face hub reads it."""
    settings, record = detector.settings, detector.record
    rows = {"preset": f"`{settings.preset}`", "size": "{} x {} pixels".format(*detector.shape)}
    if data := record.get("data"):
        folded = detector.calibration is not None and detector.calibration.folds
        uses = ("for units and, in folds, to calibrate",) * 2 if folded else ("for units and choices", "to calibrate")
        parts = zip(("train", "select", "calibration"), ("trained on", *uses), strict=True)
        rows["good images"] = ", ".join(f"{len(data[part])} {use}" for part, use in parts)
        rows["data fingerprint"] = f"`{data['fingerprint']}`"
    if training := record.get("training"):
        rows["training"] = (
            f"{training['steps']} steps, {training['seconds']:.0f} s, held-out loss {training['held_out_loss']}"
        )
    rows["features"] = settings.scoring.features
    if adaptation := record.get("adaptation"):
        rows["adaptation"] = adaptation["said"]
    if tuning := record.get("tuning"):
        rows["tuning"] = tuning["said"]
    if student:
        rows["student"] = student.record["distillation"]["said"]
    if converted := record.get("converted"):
        rows["converted from"] = f"{converted['from']}, `{_file(converted['checkpoint'])}`"
        weights = converted["features"]["weights"]
        rows["features' weights"] = weights if isinstance(weights, str) else f"adapted, `{_file(weights)}`"
    calibration = detector.calibration
    rows["false alarms"] = calibration.promise() if calibration else "not calibrated"

    made = "Converted" if converted else "Trained on photographs of good parts only"
    heads = ""
    if settings.network.attention_heads:
        heads = (
            "\nThe U-Net uses the paper's number of attention heads, which `unet/config.json` cannot say: load it with "
            "ddad, since plain diffusers would compute something else.\n"
        )
    limits = UNCALIBRATED if calibration is None else LIMITS + CONVERTED if converted else LIMITS
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    return (
        f"{FRONT}# Anomaly detector for {record.get('category') or 'a product that was not named'}\n\n"
        f"{made}. It rebuilds a photograph as it would look without a defect and shows the difference.\n\n"
        f"| | |\n|---|---|\n{table}{heads}{limits}{USE}"
    )


def _file(described: dict[str, str]) -> str:
    return f"{described['file']} (SHA-256 {described['sha256']})"
