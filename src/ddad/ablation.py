"""What each part of the method contributes, measured on one trained network: the paper's steps, then our changes.

The first rows are the paper's: the same network with less. The rows after "as published" change one behaviour each, and
the last one has all of ours. Test labels measure here and choose nothing.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddad.comparison import METRICS
from ddad.config import PRESETS, Settings, parse_settings
from ddad.data.folder import scan
from ddad.data.samples import Dataset, Sample, paths_by_hash, spread
from ddad.detector import Detector
from ddad.errors import ConfigError, DataError
from ddad.evaluation import evaluate
from ddad.features import create_features
from ddad.files import write_json, write_text
from ddad.images import read_image
from ddad.report import PAPER_BATCH, inspect


@dataclass(frozen=True)
class Variant:
    """One row: what differs from the published behaviours (or, with `ours`, from the model's own settings)."""

    name: str
    sampling: dict[str, Any] = field(default_factory=dict)
    scoring: dict[str, Any] = field(default_factory=dict)
    adapted: bool = True
    ours: bool = False


_PIXEL = {"layer_weights": 0.0, "fusion": "good-images"}  # one distance alone needs no common unit
_FEATURES = {"pixel_weight": 0.0, "fusion": "good-images"}

VARIANTS = (
    # The paper's steps.
    Variant("unconditioned, pixel distance", {"conditioning_weight": 0.0}, _PIXEL),
    Variant("conditioned, pixel distance", {}, _PIXEL),
    Variant("conditioned, feature distance", {}, _FEATURES, adapted=False),
    Variant("conditioned, feature distance, adapted", {}, _FEATURES),
    Variant("both, not adapted", adapted=False),
    Variant("as published: both, adapted, n = 10"),
    Variant("n = 5", {"stride": 50}),
    Variant("n = 25", {"stride": 10}),
    # Ours, one at a time.
    Variant("units from good images", {}, {"fusion": "good-images"}),
    Variant("standardised by position", {}, {"fusion": "good-images", "position": "standardise"}),
    Variant(
        "no crop, pooling and resizing as ours", {}, {"crop": None, "pool_padding": "exclude", "align_corners": False}
    ),
    Variant("start without noise, eta = 0", {"start_noise": "none", "eta": 0.0}),
    Variant("eta = 0", {"eta": 0.0}),
    Variant("λ ≤ 1", {"clamp": True}),
    Variant("one time grid (T' = 225, n = 9)", {"aligned": True, "start_timestep": 225}),
    Variant("level matched", {"match_level": True}),
    Variant("all of ours, not adapted", adapted=False, ours=True),
    Variant("all of ours", ours=True),
)


def run_ablation(
    model: str | Path,
    data: str | Path | Dataset,
    out: str | Path,
    *,
    max_images: int | None = None,
    variants: Sequence[Variant] = VARIANTS,
    device: str | None = None,
    workers: int = 2,
    on_stage: Callable[[str], None] = lambda sentence: None,
) -> str:
    """Judge one trained network in every variant; write `ablations.json` and `ablations.md` to `out`.

    Args:
        model: a trained model folder.
        data: the data set it was trained on, with test images.
        max_images: test images used, spread evenly over each kind; by default all.

    Returns:
        The table as Markdown.

    Raises:
        ConfigError: the network was not trained for the timesteps of a variant.
        DataError: there are no test images, or the good ones are not those of the model.

    Run again after a stop, the same call goes on after the last whole row.
    """
    trained = Detector.from_pretrained(model, device=device)
    if trained.settings.preset in ("paper", "paper-s"):
        variants = [variant for variant in variants if not variant.ours]  # its own settings are the published ones
    if "training" not in trained.record:
        raise DataError(f"Expected a model that ddad trained in {model}, found a converted one; train one.")
    dataset = data if isinstance(data, Dataset) else scan(data)
    if not dataset.test:
        raise DataError(f"Expected labelled test images in {dataset.root}, found none; an ablation needs them.")
    samples = spread_samples(dataset.test, max_images)
    parts = trained.record["data"]
    by_hash = paths_by_hash(sample.path for sample in dataset.train)
    try:
        select, calibration = (
            [read_image(by_hash[one], trained.shape, trained.image_rule) for one in parts[part]]
            for part in ("select", "calibration")
        )
    except KeyError:
        raise DataError(
            f"Expected the good images that {model} was trained on in {dataset.root}, found that some are missing; "
            "name the data set it was trained on."
        ) from None
    name = trained.settings.scoring.features
    layers = trained.settings.scoring.feature_layers
    extractors = {True: trained.features, False: create_features(name, layers, trained.shape)}
    passes = trained.record.get("adaptation", {}).get("epochs", 0)

    counts = {label: sum(sample.is_anomalous is label for sample in samples) for label in (False, True)}
    title = (
        f"{dataset.category}, one network (preset {trained.settings.preset}, {trained.shape[0]} x {trained.shape[1]}, "
        f"{trained.record['training']['steps']} steps, features adapted in {passes} passes), {counts[False]} good and "
        f"{counts[True]} defective test images."
    )
    identity = {
        "title": title,
        "trained": trained.record["trained"],
        "settings": trained.settings.model_dump(mode="json"),
    }
    path = Path(out) / "ablations.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows: list[dict[str, Any]] = before["rows"] if before.get("identity") == identity else []
    done = {row["variant"] for row in rows}
    memory: dict[bytes, Tensor] = {}
    key = None
    # Variants that rebuild alike follow each other, so that each reconstruction is made once.
    ordered = sorted(variants, key=lambda variant: repr(settings_of(variant, trained.settings).sampling))
    for number, variant in enumerate(ordered, start=1):
        if variant.name in done:
            continue
        if not passes and variant.adapted and (twin := _twin(variant, variants)):
            on_stage(f"{number} of {len(ordered)}: {variant.name}: left out, the same as {twin.name!r} here.")
            continue
        settings = settings_of(variant, trained.settings)
        if settings.sampling != key:
            key = settings.sampling
            memory = {}
        detector = _Remembering(memory, trained, extractors[variant.adapted], settings)
        detector.calibrate(select, calibration)
        notes: list[str] = []
        evaluation = evaluate(
            inspect(detector, samples, PAPER_BATCH, workers, notes), crop=settings.scoring.crop, max_examples=0
        )
        rows.append(
            {
                "variant": variant.name,
                **{metric: evaluation.metrics[metric] for metric in METRICS},
                "intervals": {metric: evaluation.intervals.get(metric) for metric in METRICS},
            }
        )
        write_json(path, {"identity": identity, "rows": rows})
        on_stage(f"{number} of {len(ordered)}: {variant.name}: image AUROC {_number(rows[-1]['image_auroc'])}.")
    rows.sort(key=lambda row: [variant.name for variant in variants].index(row["variant"]))
    table = _markdown(title, rows)
    write_json(path, {"identity": identity, "rows": rows})
    write_text(Path(out) / "ablations.md", table)
    return table


def settings_of(variant: Variant, trained: Settings) -> Settings:
    """The settings of a row, from those of the trained network.

    Raises:
        ConfigError: the network was not trained for the row's timesteps.
    """
    published = PRESETS["paper"]
    sampling = {**({} if variant.ours else published["sampling"]), **variant.sampling}
    # The size and the features are the trained network's; everything else is as published.
    like_paper = {key: value for key, value in published["scoring"].items() if key not in ("features", "layer_weights")}
    like_paper |= {"layer_weights": tuple(1.0 for _ in trained.scoring.feature_layers), "pixel_weight": 1.0}
    scoring = {**({} if variant.ours else like_paper), **variant.scoring}
    values = trained.model_dump()
    values["sampling"] |= sampling
    values["scoring"] |= scoring
    if values["scoring"]["layer_weights"] == 0:
        values["scoring"]["layer_weights"] = tuple(0.0 for _ in trained.scoring.feature_layers)
    settings = parse_settings(values)
    if max(settings.sampling.timesteps) >= trained.max_timestep:
        raise ConfigError(
            f"Expected a network trained up to timestep {max(settings.sampling.timesteps)} for {variant.name!r}, found "
            f"one trained up to {trained.max_timestep - 1}; train with a larger start timestep."
        )
    return settings


def spread_samples(samples: Sequence[Sample], count: int | None) -> list[Sample]:
    """About `count` samples, evenly spread over each kind; all where it is None."""
    if count is None or count >= len(samples):
        return list(samples)
    chosen: list[Sample] = []
    for kind in sorted({sample.kind for sample in samples}):
        of_kind = [sample for sample in samples if sample.kind == kind]
        share = max(1, round(count * len(of_kind) / len(samples)))
        chosen += spread(of_kind, share)
    return chosen


class _Remembering(Detector):
    """A detector that keeps reconstructions, in 16 bits, for rows that differ in what follows."""

    def __init__(self, memory: dict[bytes, Tensor], trained: Detector, features: Any, settings: Settings) -> None:
        super().__init__(
            trained.unet,
            trained.scheduler,
            features,
            settings,
            trained.shape,
            image_rule=trained.image_rule,
            device=trained.device,
        )
        self._memory = memory

    def reconstruct(self, images: Sequence[np.ndarray], **options: Any) -> Tensor:
        keys = [hashlib.sha256(image.tobytes()).digest() for image in images]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self._memory}
        if new:
            made = super().reconstruct(list(new.values()), **options)
            self._memory.update(zip(new, made.half().cpu(), strict=True))
        return torch.stack([self._memory[key] for key in keys]).float().to(self.device)


def _twin(variant: Variant, variants: Sequence[Variant]) -> Variant | None:
    """The row that is the same but for adaptation."""
    for other in variants:
        same = (other.sampling, other.scoring, other.ours) == (variant.sampling, variant.scoring, variant.ours)
        if same and other.adapted is not variant.adapted:
            return other
    return None


def _markdown(title: str, rows: Sequence[dict[str, Any]]) -> str:
    lines = [title, "", f"| variant | {' | '.join(METRICS.values())} |", "|---|" + "---|" * len(METRICS)]
    for row in rows:
        cells = (_number(row[name]) + _between(row["intervals"][name]) for name in METRICS)
        lines.append(f"| {row['variant']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", "In brackets: 95 % intervals, resampled over test images."]) + "\n"


def _between(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" ({interval[0]:.3f}-{interval[1]:.3f})"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
