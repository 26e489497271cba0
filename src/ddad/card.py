"""The model card: the README of a model folder. All of it was measured or recorded; nothing is typed by hand."""

from collections.abc import Mapping
from typing import Any

from ddad.calibration import Calibration

MEASURED = {
    "image_auroc": "image AUROC",
    "aupro": "AUPRO",
    "false_alarm_rate": "false alarms, share of good parts",
    "miss_rate": "misses, share of defective parts",
}
"""Metrics of an evaluation that the card and the hub's index show."""
USE = """
## Intended use

To sort photographs of {product}: which look like the good ones, and where the others do not. A part that is flagged
wants a person's look at its heatmap and reconstruction. A part that is not flagged looks like the good ones in the
photograph, which is no proof that it is sound. Other products, cameras and light want another model.

```python
from ddad import Detector
result = Detector.from_pretrained("{name}").predict("part.png")
```
"""
LIMITS = """
## Limits

The promise holds for parts and photographs like the good ones it was calibrated on: same product, camera and light.
Defects smaller than a few pixels at the model's size cannot be seen. """
NOT_MEASURED = """Accuracy on defects is not known from good images:
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
HEADS = """
The U-Net uses the paper's number of attention heads, which `unet/config.json` cannot say:
load it with ddad, since plain diffusers would compute something else.
"""


def model_card(
    record: Mapping[str, Any],
    student: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    name: str = "this folder",
) -> str:
    """Markdown with front matter, as the Hugging Face hub reads it.

    Args:
        record: the contents of the model's `detector.json`.
        student: of its one-call student's.
        metrics: of the `metrics.json` of an evaluation of this model.
        name: what it is loaded by.
    """
    settings, converted = record["settings"], record.get("converted")
    calibration = Calibration.model_validate(record["calibration"]) if record.get("calibration") else None
    product = record.get("category") or "a product that was not named"
    made = "Converted" if converted else "Trained on photographs of good parts only"
    limits = UNCALIBRATED
    if calibration:
        limits = LIMITS.rstrip() + "\n" if metrics else LIMITS + NOT_MEASURED
        limits += CONVERTED if converted else ""
    table = "".join(f"| {row} | {value} |\n" for row, value in _rows(record, student, calibration).items())
    return (
        f"{_front(record, metrics, name)}# Anomaly detector for {product}\n\n"
        f"{made}. It rebuilds a photograph as it would look without a defect and shows the difference.\n\n"
        f"| | |\n|---|---|\n{table}{HEADS if settings['network']['attention_heads'] else ''}"
        f"{_measured(metrics) if metrics else ''}{USE.format(product=product, name=name)}{limits}"
    )


def family_card(record: Mapping[str, Any], members: Mapping[str, Mapping[str, Any]]) -> str:
    """The card of one network for many categories.

    Args:
        record: the contents of `family.json`.
        members: of each category's `detector.json`.
    """
    settings, training = record["settings"], record.get("training", {})
    rows = {
        "preset": f"`{settings['preset']}`",
        "size": "{} x {} pixels".format(*record["shape"]),
        "features": settings["scoring"]["features"],
    }
    if training:
        rows["training"] = (
            f"{training['steps']} steps, {training['seconds']:.0f} s, held-out loss {training['held_out_loss']}"
        )
    table = "".join(f"| {row} | {value} |\n" for row, value in rows.items())
    for name, member in members.items():
        calibration = Calibration.model_validate(member["calibration"]) if member["calibration"] else None
        table += f"| {name} | {calibration.promise() if calibration else 'not calibrated'} |\n"
    heads = HEADS if settings["network"]["attention_heads"] else ""
    limits = LIMITS.replace("like the good ones", "like the good ones of its category")
    return (
        f"{_front({}, None, 'this folder')}# Anomaly detector for {', '.join(members)}\n\n"
        "One network, trained on photographs of good parts of all these categories, with a threshold for each. A "
        "photograph of any other product is judged as the category it looks most like, which says nothing.\n\n"
        f"| | |\n|---|---|\n{table}{heads}\n"
        "```python\nfrom ddad import Family\n"
        f'result = Family.from_pretrained("this folder").predict("part.png", category="{next(iter(members))}")\n```\n'
        f"{limits}{NOT_MEASURED}"
    )


def _rows(
    record: Mapping[str, Any], student: Mapping[str, Any] | None, calibration: Calibration | None
) -> dict[str, str]:
    settings = record["settings"]
    rows = {"preset": f"`{settings['preset']}`", "size": "{} x {} pixels".format(*record["shape"])}
    if data := record.get("data"):
        folded = calibration is not None and calibration.folds
        uses = ("for units and, in folds, to calibrate",) * 2 if folded else ("for units and choices", "to calibrate")
        parts = zip(("train", "select", "calibration"), ("trained on", *uses), strict=True)
        rows["good images"] = ", ".join(f"{len(data[part])} {use}" for part, use in parts)
        rows["data fingerprint"] = f"`{data['fingerprint']}`"
    if training := record.get("training"):
        rows["training"] = (
            f"{training['steps']} steps, {training['seconds']:.0f} s, held-out loss {training['held_out_loss']}"
        )
    if family := record.get("family"):
        rows["the network was trained for"] = ", ".join(family)
    rows["features"] = settings["scoring"]["features"]
    rows["licence of the features' pretrained weights"] = record.get("features_license") or "not recorded"
    for kind in ("adaptation", "tuning"):
        if kind in record:
            rows[kind] = record[kind]["said"]
    if student and "distillation" in student:
        rows["student"] = student["distillation"]["said"]
    if converted := record.get("converted"):
        rows["converted from"] = f"{converted['from']}, `{_file(converted['checkpoint'])}`"
        weights = converted["features"]["weights"]
        rows["features' weights"] = weights if isinstance(weights, str) else f"adapted, `{_file(weights)}`"
    rows["false alarms"] = calibration.promise() if calibration else "not calibrated"
    return rows


def _front(record: Mapping[str, Any], metrics: Mapping[str, Any] | None, name: str) -> str:
    """No pipeline tag: the hub has none for anomaly detection. No licence of the model: that is its owner's to give."""
    from huggingface_hub import EvalResult, ModelCardData

    tags = ["anomaly-detection", "diffusion", "ddad"]
    results = [
        EvalResult(
            task_type="anomaly-detection",
            dataset_type="private",
            dataset_name=record.get("category") or "not named",
            dataset_args={"good_images": record["data"]["fingerprint"]} if "data" in record else None,
            metric_type=metric,
            metric_name=said,
            metric_value=metrics[metric],
            metric_args={"interval_95": metrics["intervals"].get(metric), **metrics["counts"]},
        )
        for metric, said in (MEASURED.items() if metrics else ())
        if metrics and metrics[metric] is not None
    ]
    index = {"model_name": name, "eval_results": results} if results else {}
    return f"---\n{ModelCardData(library_name='ddad', tags=tags, **index).to_yaml()}\n---\n"


def _measured(metrics: Mapping[str, Any]) -> str:
    rows = ""
    for metric, said in MEASURED.items():
        if metrics[metric] is not None:
            interval = metrics["intervals"].get(metric)
            between = "{:.4g} to {:.4g}".format(*interval) if interval else "not measured"
            rows += f"| {said} | {metrics[metric]:.4g} | {between} |\n"
    counts = metrics["counts"]
    return (
        f"\n## Measured\n\nBy `ddad evaluate` on {counts['good']} photographs of good and {counts['defective']} of "
        f"defective parts, on {metrics['date'][:10]}; other defects may be found more or less often.\n\n"
        f"| | value | 95 % interval |\n|---|---|---|\n{rows}"
    )


def _file(described: Mapping[str, str]) -> str:
    return f"{described['file']} (SHA-256 {described['sha256']})"
