"""A denoiser known in closed form: the best one for images whose pixels are independent N(mean, deviation²).

For x_t = √ā x₀ + √(1-ā) ε the best estimate of the noise is √(1-ā) (x_t - √ā μ) / (ā σ² + 1 - ā). It has the
interface of diffusers' U-Net, so everything above the network runs on it in milliseconds, and the truth is known.
"""

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ddad.unet import create_scheduler


class GaussianUNet(nn.Module):
    """Predicts ε (or v) exactly for pixels N(mean, deviation²); `mean` may be an image (3, H, W)."""

    def __init__(self, mean: float | Tensor = 0.0, deviation: float = 0.1, prediction_type: str = "epsilon") -> None:
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32))
        self.deviation = deviation
        self.prediction_type = prediction_type
        self.config = SimpleNamespace(in_channels=3)
        self.alphas_cumprod = create_scheduler(prediction_type).alphas_cumprod
        self.calls: list[int] = []

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        self.calls.append(int(timestep.flatten()[0]))
        alpha = self.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        epsilon = (1 - alpha).sqrt() * (sample - alpha.sqrt() * self.mean)
        epsilon = epsilon / (alpha * self.deviation**2 + 1 - alpha)
        if self.prediction_type == "epsilon":
            return (epsilon,)
        clean = (sample - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()
        return (alpha.sqrt() * epsilon - (1 - alpha).sqrt() * clean,)
