"""Convert checkpoints of the published DDAD code (arimousa/DDAD, arXiv 2305.15956) into a model folder.

The published network is, tensor for tensor, diffusers' `UNet2DModel` in the paper's sizes (`ddad.unet`). What differs:

| published                                              | diffusers                                              |
|--------------------------------------------------------|--------------------------------------------------------|
| `down`, `up`: one flat list over all levels            | one block a level, its parts sorted by kind            |
| `to_qkv`, one 1 x 1 convolution, (3C, C, 1)            | `to_q`, `to_k`, `to_v`, each linear, (C, C)            |
| rows of `to_qkv`: head 0's q, k, v, then head 1's, ... | rows of each: head 0, head 1, ...                      |
| a number of heads                                      | channels a head; the `Detector` sets the number        |

Every tensor of a checkpoint is used exactly once and every tensor of the network is filled exactly once; a file that
does not fit in name or shape is refused. Only tensors are read (`weights_only`): a file cannot run code.
"""

import warnings
from pathlib import Path
from typing import Any, NoReturn

import timm
import torch
from diffusers import UNet2DModel
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

from ddad.benchmark import published_settings
from ddad.config import Settings, make_settings
from ddad.data.samples import content_hash
from ddad.detector import Detector
from ddad.errors import ConfigError, ModelError
from ddad.features import FeatureExtractor, create_features
from ddad.unet import create_scheduler, create_unet

PRESETS = {64: "paper", 32: "paper-s"}
"""Channels after the first convolution, and the preset of that network."""

LEVELS, ATTENTION_LEVELS, BLOCKS = 6, 3, 2
"""Levels of resolution; the coarsest of them, with attention; residual blocks a level (one more on the way up)."""

_RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "embed_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {
    "group_norm": "norm",
    "to_q": "to_qkv",
    "to_k": "to_qkv",
    "to_v": "to_qkv",
    "to_out.0": "proj_out",
}
_QKV = ("to_q", "to_k", "to_v")
_PARALLEL = "module."  # what torch's DataParallel puts before each name
_NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64)


def convert_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    features: str | Path | None = None,
    features_name: str | None = None,
    preset: str | None = None,
    dataset: str | None = None,
    category: str | None = None,
) -> Path:
    """Write a model folder from a checkpoint of the published code.

    The model has no calibration: the published code has none to convert, so there is neither p-value nor verdict.

    Args:
        checkpoint: the state dict of the U-Net, as `torch.save` wrote it.
        out: the model folder to write; an older model of this name is replaced.
        features: the state dict of the adapted extractor (`feat<N>`), a ResNet with torchvision's names.
        features_name: the backbone; its weights are those of the file `features`, or else pretrained ones, as
            `ddad.features.create_features` finds them. The preset's by default.
        preset: `paper` or `paper-s`; by default the one whose width the checkpoint has.
        dataset: `mvtec-ad` or `visa`, for the authors' w and v of its `category`; by default the preset's.
        category: the product.

    Returns:
        `out`.

    Raises:
        ModelError: a file that is missing, damaged, or something else than was published.
        ConfigError: an impossible preset, a category without published settings, features that cannot be had, or an
            `out` that holds something else.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    if preset is not None and preset not in PRESETS.values():
        raise ConfigError(f"Expected the preset {' or '.join(PRESETS.values())} for a conversion, found {preset!r}.")
    weights = _read(checkpoint)
    found = _preset(checkpoint, weights)
    if preset is not None and preset != found:
        raise ModelError(
            f"Expected a checkpoint of the preset {preset} in {checkpoint}, found one of {found}; leave the preset out."
        )
    settings = make_settings(found, scoring={"features": features_name} if features_name else None)
    if dataset is not None:
        settings = published_settings(dataset, category or "none").apply(settings)
    unet = _unet(checkpoint, weights, settings)
    shape = (settings.image_size, settings.image_size)
    scoring = settings.scoring
    if features is None:
        extractor = create_features(scoring.features, scoring.feature_layers, shape)
    else:
        extractor = _extractor(Path(features), scoring.features, scoring.feature_layers)
    detector = Detector(
        unet, create_scheduler(settings.network.prediction_type), extractor, settings, shape, device="cpu"
    )
    detector.record = {
        "category": category,
        "converted": {
            "from": "the published DDAD code",
            "checkpoint": _identity(checkpoint),
            "features": {
                "backbone": scoring.features,
                "weights": "pretrained" if features is None else _identity(Path(features)),
            },
        },
    }
    detector.save_pretrained(out)
    return out


def _identity(path: Path) -> dict[str, str]:
    return {"file": path.name, "sha256": content_hash(path)}


def _read(path: Path) -> dict[str, Tensor]:
    """The named tensors of a state dict, without the prefix of DataParallel."""
    if not path.is_file():
        raise ModelError(f"Expected a checkpoint file at {path}, found none; name a file that torch.save wrote.")
    try:
        with warnings.catch_warnings(action="ignore"):  # what torch says of odd files; the sentence below is enough
            stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes the unpickler raise nearly anything
        raise ModelError(
            f"Expected a state dict, as torch.save writes it, in {path}, found something else or a damaged one "
            f"({type(error).__name__}); download or save it again."
        ) from None
    if not isinstance(stored, dict) or not stored:
        kind = "an empty one" if isinstance(stored, dict) else f"something else ({type(stored).__name__})"
        raise ModelError(f"Expected a state dict of named tensors in {path}, found {kind}; name another file.")
    for name, value in stored.items():
        if not (isinstance(name, str) and isinstance(value, Tensor) and _is_plain(value)):
            raise ModelError(
                f"Expected a state dict of named, plain tensors in {path}, found an entry {name!r} that is none "
                f"({type(value).__name__}); save the network's state_dict() alone."
            )
    if all(name.startswith(_PARALLEL) for name in stored):
        return {name.removeprefix(_PARALLEL): value for name, value in stored.items()}
    return stored


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor simply holds its numbers: neither sparse nor quantised nor without storage."""
    return tensor.dtype in _NUMBERS and tensor.layout == torch.strided and not tensor.is_meta


def _check(path: Path, weights: dict[str, Tensor], expected: dict[str, tuple[int, ...]], network: str) -> None:
    """Refuse weights whose names and shapes are not exactly the expected ones, or that are not finite."""

    def refuse(reason: str) -> NoReturn:
        raise ModelError(
            f"Expected the tensors of {network} in {path}, found that {reason}; name a checkpoint of that network."
        )

    for name, shape in expected.items():
        if name not in weights:
            refuse(f"{name} is missing")
        if tuple(weights[name].shape) != shape:
            refuse(f"{name} has the shape {tuple(weights[name].shape)} instead of {shape}")
        if not weights[name].isfinite().all():
            refuse(f"{name} holds NaN or infinity")
    for name in weights:
        if name not in expected:
            refuse(f"{name} is not one of them")


def _preset(path: Path, weights: dict[str, Tensor]) -> str:
    first = weights.get("down.0.0.weight")
    if first is None:
        raise ModelError(
            f"Expected a U-Net of the published code in {path}, found no tensor down.0.0.weight in it; "
            "the adapted extractor and other networks are not converted on their own."
        )
    width = len(first) if first.ndim else 0
    if width not in PRESETS:
        raise ModelError(
            f"Expected a U-Net of {' or '.join(map(str, PRESETS))} base channels in {path}, found {width}; "
            "only the paper's two sizes can be converted."
        )
    return PRESETS[width]


def _unet(path: Path, weights: dict[str, Tensor], settings: Settings) -> UNet2DModel:
    """diffusers' network with the published weights."""
    unet = create_unet(settings.network.architecture)
    network = unet.state_dict()
    published = _published_names()
    sources: dict[str, str] = {}
    expected: dict[str, tuple[int, ...]] = {}
    for name, tensor in network.items():
        module, _, kind = name.rpartition(".")
        source = sources[name] = f"{published[module]}.{kind}"
        joined = 3 if "to_qkv" in source else 1
        kernel = (1,) if source.endswith(("to_qkv.weight", "proj_out.weight")) else ()
        expected[source] = (joined * len(tensor), *tensor.shape[1:], *kernel)
    _check(path, weights, expected, f"the published U-Net (preset {settings.preset})")

    converted = {}
    for name, tensor in network.items():
        value, part = weights[sources[name]], name.split(".")[-2]
        if part in _QKV:
            by_head = value.unflatten(0, (settings.network.attention_heads, 3, -1))  # (heads, qkv, C / heads, ...)
            value = by_head[:, _QKV.index(part)]
        converted[name] = value.reshape(tensor.shape)
    unet.load_state_dict(converted)
    return unet


def _published_names() -> dict[str, str]:
    """The published name of each module of `UNet2DModel` that has weights.

    A part that a block has not (a shortcut where channels stay, a resampler at the last level) is listed all the same.
    """
    names = {
        "conv_in": "down.0.0",
        "time_embedding.linear_1": "time_embedding.1",
        "time_embedding.linear_2": "time_embedding.3",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }

    def add(block: str, published: str, parts: dict[str, str]) -> None:
        names.update({f"{block}.{ours}": f"{published}.{theirs}" for ours, theirs in parts.items()})

    # Down: the first convolution is entry 0, then a level has an entry for each block and one for its resampler.
    for level in range(LEVELS):
        first = 1 + (BLOCKS + 1) * level
        for block in range(BLOCKS):
            add(f"down_blocks.{level}.resnets.{block}", f"down.{first + block}.0", _RESIDUAL)
            add(f"down_blocks.{level}.attentions.{block}", f"down.{first + block}.1", _ATTENTION)
        add(f"down_blocks.{level}.downsamplers.0", f"down.{first + BLOCKS}.0", _RESIDUAL)
    for block in range(2):
        add(f"mid_block.resnets.{block}", f"middle.{2 * block}", _RESIDUAL)
    add("mid_block.attentions.0", "middle.1", _ATTENTION)
    # Up, coarse to fine: an entry for each block; the resampler is the last part of the level's last entry.
    for level in range(LEVELS):
        first = (BLOCKS + 1) * level
        for block in range(BLOCKS + 1):
            add(f"up_blocks.{level}.resnets.{block}", f"up.{first + block}.0", _RESIDUAL)
            add(f"up_blocks.{level}.attentions.{block}", f"up.{first + block}.1", _ATTENTION)
        last = 2 if level < ATTENTION_LEVELS else 1  # behind the attention, where there is one
        add(f"up_blocks.{level}.upsamplers.0", f"up.{first + BLOCKS}.{last}", _RESIDUAL)
    return names


def _extractor(path: Path, name: str, layers: tuple[int, ...]) -> FeatureExtractor:
    """The adapted extractor in timm's ResNet of this name; timm and torchvision name its tensors alike."""
    backbone = _empty_backbone(path, name)
    weights = _read(path)
    expected = {key: tuple(tensor.shape) for key, tensor in backbone.state_dict().items()}
    _check(path, weights, expected, f"the backbone {name}")
    backbone.load_state_dict(weights)
    # The published code normalises with ImageNet's statistics, whatever the weights.
    return FeatureExtractor(backbone, name, layers, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def _empty_backbone(path: Path, name: str) -> Any:
    try:
        if timm.is_model(name):  # else create_model would look for a folder, or on the hub
            return timm.create_model(name, pretrained=False)
    except RuntimeError:  # an unknown tag behind a known name
        pass
    raise ConfigError(
        f"Expected the timm name of the backbone whose weights are in {path}, found {name!r}; "
        "the published one is wide_resnet101_2.tv_in1k."
    )
