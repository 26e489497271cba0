"""The denoiser: diffusers' `UNet2DModel` in the paper's two sizes and in a small one for CPUs.

Symbols: y_t or x_t = `sample`, t = `timesteps`, ā_t = `alphas_cumprod[t]`. Images are (B, 3, H, W) in [-1, 1]; H and W
are multiples of 32.
"""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddad.errors import ConfigError

if TYPE_CHECKING:  # diffusers takes seconds to import, and a detector whose networks run elsewhere does without
    from diffusers import DDIMScheduler, UNet2DModel

NUM_TRAIN_TIMESTEPS = 1000


def _published(base_channels: int, dropout: float) -> dict[str, Any]:
    """The guided-diffusion form of the paper: six levels, two blocks each, attention on the lower three."""
    return {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": tuple(base_channels * m for m in (1, 1, 2, 2, 4, 4)),
        "layers_per_block": 2,
        "down_block_types": ("ResnetDownsampleBlock2D",) * 3 + ("AttnDownBlock2D",) * 3,
        "up_block_types": ("AttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",) * 3,
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "attention_head_dim": 32,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": False,
        "freq_shift": 0,
        "dropout": dropout,
    }


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "base": _published(64, dropout=0.0),  # 32,952,707 parameters, 142.5 GFLOP a call at 256 x 256
    "s": _published(32, dropout=0.3),  # 8,257,731 parameters, 36.5 GFLOP
    # A pixel-unshuffle stem: 2 x 2 pixels become channels, so that the costly first level is a quarter of the size.
    "xs": {
        "in_channels": 12,
        "out_channels": 12,
        "block_out_channels": (24, 48, 64, 96, 128),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D",),
        "up_block_types": ("AttnUpBlock2D",) + ("UpBlock2D",) * 4,
        "attention_head_dim": 32,
        "norm_num_groups": 8,
        "norm_eps": 1e-5,
    },
}


def create_unet(architecture: str, categories: int | None = None) -> "UNet2DModel":
    """A U-Net with fresh weights: `xs`, `s` or `base`; class-conditional where one is to serve several categories."""
    from diffusers import UNet2DModel

    return UNet2DModel(**ARCHITECTURES[architecture], num_class_embeds=categories)


def load_unet(folder: Path) -> "UNet2DModel":
    """What `UNet2DModel.save_pretrained` wrote; raises OSError, ValueError, RuntimeError or SafetensorError."""
    from diffusers import UNet2DModel

    unet = UNet2DModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    # Where it was loaded from is nobody's business, and would make a copy look like another network.
    unet._internal_dict = type(unet.config)({k: v for k, v in unet.config.items() if k != "_name_or_path"})
    return unet


def load_scheduler(folder: Path) -> "DDIMScheduler":
    """What `DDIMScheduler.save_pretrained` wrote; raises OSError or ValueError."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_pretrained(folder, local_files_only=True)


def create_scheduler(prediction_type: str) -> "DDIMScheduler":
    """The noise schedule of the paper: linear betas 1e-4 … 0.02 over 1000 timesteps.

    `clip_sample` is off: clipping the clean estimate would break the identity `ddad.sampling` is built on.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="leading",
        prediction_type=prediction_type,
    )


def set_attention_heads(unet: "UNet2DModel", heads: int) -> None:
    """Give every attention layer the same number of heads, as published (diffusers fixes channels a head instead)."""
    from diffusers.models.attention_processor import Attention

    for module in unet.modules():
        if isinstance(module, Attention):
            module.heads = heads


def for_category(unet: "UNet2DModel", label: int) -> "UNet2DModel":
    """A network of one category that computes what a class-conditional one does for `label`, to rounding.

    The label's vector is added to what the timestep becomes, so it fits into the bias that is added there.
    """
    from diffusers import UNet2DModel

    alone = UNet2DModel.from_config({**unet.config, "num_class_embeds": None})
    weights = dict(unet.state_dict())
    vector = weights.pop("class_embedding.weight")[label]
    weights["time_embedding.linear_2.bias"] = weights["time_embedding.linear_2.bias"] + vector
    alone.load_state_dict(weights)
    return alone.to(unet.device).train(unet.training)


def predict(unet: Any, sample: Tensor, timesteps: Tensor, labels: Tensor | None = None) -> Tensor:
    """The network's raw output for x_t = `sample` (B, 3, H, W) and `timesteps` (B,) or (), same shape as `sample`.

    Networks with 3·f² input channels see f x f pixels as channels (pixel-unshuffle). `labels` (B,) are the numbers of
    the categories, for a class-conditional network.
    """
    config = getattr(unet, "module", unet).config  # inside of what spreads it over processes
    factor = math.isqrt(config.in_channels // 3)
    if factor > 1:
        sample = functional.pixel_unshuffle(sample, factor)
    conditions = (timesteps,) if labels is None else (timesteps, labels)
    output = unet(sample, *conditions, return_dict=False)[0]
    return functional.pixel_shuffle(output, factor) if factor > 1 else output


def clean_from(output: Tensor, sample: Tensor, alphas_cumprod: Tensor, prediction_type: str) -> Tensor:
    """x̂₀ (B, 3, H, W) from the network's output, for ā_t = `alphas_cumprod` broadcastable to `sample`.

    ε-prediction: x̂₀ = (x_t - √(1-ā) ε) / √ā; v-prediction: x̂₀ = √ā x_t - √(1-ā) v.
    """
    signal, noise = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    if prediction_type == "epsilon":
        return (sample - noise * output) / signal
    return signal * sample - noise * output


def training_target(clean: Tensor, noise: Tensor, alphas_cumprod: Tensor, prediction_type: str) -> Tensor:
    """What the network is to predict: ε, or v = √ā ε - √(1-ā) x₀ (Salimans and Ho 2022)."""
    if prediction_type == "epsilon":
        return noise
    return alphas_cumprod.sqrt() * noise - (1 - alphas_cumprod).sqrt() * clean


def parameter_count(module: nn.Module) -> int:
    """Number of weights."""
    return sum(parameter.numel() for parameter in module.parameters())


def choose_device(name: str | torch.device | None) -> torch.device:
    """The device of this name; None: the GPU where there is one.

    Raises:
        ConfigError: no such device on this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = parse_device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"Expected a device of this machine, found {device}; it has {torch.cuda.device_count()} CUDA devices."
        )
    return device


def parse_device(name: str | torch.device) -> torch.device:
    """The device of this name, on this machine or not; raises ConfigError for what is none."""
    try:
        return torch.device(name)
    except RuntimeError:
        raise ConfigError(f"Expected a device such as cpu, cuda or cuda:1, found {name!r}.") from None


def processor_computes_bf16(device: torch.device) -> bool:
    """Whether bf16 is a speed-up on this device rather than an emulation."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())
