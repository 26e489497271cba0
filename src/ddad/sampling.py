"""Conditioned denoising: rebuild a photograph as it would look without its defect (paper, Eq. 5-7).

    paper   here                what it is
    y       target              the photograph, (B, 3, H, W) in [-1, 1]
    x_t     sample              the state at timestep t
    x̂₀      clean               the network's estimate of the finished reconstruction
    ā_t     alphas_cumprod[t]   how much of the signal is left at t
    w       conditioning_weight
    η       eta

The paper conditions the noise estimate: with y_t = √ā y + √(1-ā) ε it uses ε̂ = ε - w √(1-ā) (y_t - x_t). Because
x̂₀ = (x_t - √(1-ā) ε) / √ā, that is exactly

    x̂₀' = x̂₀ + λ_t (y - x̂₀),   λ_t = w (1 - ā_t):

a step from the prediction towards the photograph. So here: predict x̂₀, move it, take the DDIM step.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Denoiser = Callable[[Tensor, int], Tensor]
"""(x_t, t) -> x̂₀."""
Noise = Callable[[Tensor], Tensor]
"""A draw of N(0, I) in the shape of the argument; one generator per image keeps scores independent of the batch."""


def to_unit(images: Sequence[np.ndarray], device: torch.device | str = "cpu") -> Tensor:
    """uint8 (H, W, 3) images of one shape as one (B, 3, H, W) float tensor in [-1, 1]."""
    batch = torch.from_numpy(np.stack(images)).to(device)
    return batch.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_pixels(images: Tensor) -> Tensor:
    """(B, 3, H, W), nominally in [-1, 1], as uint8 (B, H, W, 3): what `to_unit` takes."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)


def condition(clean: Tensor, target: Tensor, alpha_cumprod: Tensor, conditioning_weight: float, clamp: bool) -> Tensor:
    """x̂₀': the clean estimate moved towards the photograph by λ_t = w (1 - ā_t) (Eq. 5-6).

    λ is 0.411·w at t = 225 and 0.0001·w at t = 0; above 1 it overshoots the photograph, which `clamp` prevents.
    """
    weight = conditioning_weight * (1 - alpha_cumprod)
    if clamp:
        weight = weight.clamp(max=1.0)
    return clean + weight * (target - clean)


def step(
    sample: Tensor, clean: Tensor, alpha_cumprod: Tensor, alpha_cumprod_next: Tensor, eta: float, noise: Noise
) -> Tensor:
    """One DDIM step from ā_t to the next, less noisy ā (Eq. 7; Song et al. 2021, Eq. 12)."""
    # 1. The noise that, added to the (conditioned) clean estimate, gives x_t.
    epsilon = (sample - alpha_cumprod.sqrt() * clean) / (1 - alpha_cumprod).sqrt()
    # 2. The share of fresh noise.
    variance = (1 - alpha_cumprod_next) / (1 - alpha_cumprod) * (1 - alpha_cumprod / alpha_cumprod_next)
    sigma = eta * variance.sqrt()
    # 3. Signal, the direction towards x_t, fresh noise.
    direction = (1 - alpha_cumprod_next - sigma**2).clamp(min=0).sqrt() * epsilon
    following = alpha_cumprod_next.sqrt() * clean + direction
    return following + sigma * noise(sample) if eta > 0 else following


def match_level(reconstruction: Tensor, target: Tensor) -> Tensor:
    """The reconstruction (B, 3, H, W) with each channel shifted by the median of its difference to the photograph.

    A network that sees √ā y without noise misjudges the overall level; the median ignores what a defect covers.
    """
    difference = (target - reconstruction).flatten(2)
    return reconstruction + difference.median(dim=2).values[..., None, None]


def reconstruct(
    denoiser: Denoiser,
    target: Tensor,
    alphas_cumprod: Tensor,
    timesteps: Sequence[int],
    *,
    start_timestep: int,
    conditioning_weight: float = 0.0,
    clamp: bool = True,
    eta: float = 0.0,
    noise: Noise | None = None,
    start_noise: bool = False,
    start: Tensor | None = None,
) -> Tensor:
    """The photograph as the denoiser would have it, (B, 3, H, W), nominally in [-1, 1].

    Args:
        denoiser: x̂₀ for (x_t, t).
        target: photographs, (B, 3, H, W) in [-1, 1].
        alphas_cumprod: ā for all training timesteps, (T,).
        timesteps: timesteps of the network calls, falling; after the last one ā is 1.
        start_timestep: T', the noise level of the start; `timesteps[0]` in an aligned grid.
        noise: draws for the start and for eta > 0; required where either is used.
        start_noise: start from √ā y + √(1-ā) z as published, instead of the deterministic √ā y.
        start: start from these photographs instead of `target`, (B, 3, H, W): the pairs of domain adaptation.
    """
    if noise is None:
        if start_noise or eta > 0:
            raise ValueError("a stochastic start or eta > 0 needs a source of noise")
        noise = torch.zeros_like
    alpha_start = alphas_cumprod[start_timestep]
    sample = alpha_start.sqrt() * (target if start is None else start)
    if start_noise:
        sample = sample + (1 - alpha_start).sqrt() * noise(target)
    one = torch.ones_like(alpha_start)
    for index, timestep in enumerate(timesteps):
        alpha = alphas_cumprod[timestep]
        alpha_next = alphas_cumprod[timesteps[index + 1]] if index + 1 < len(timesteps) else one
        clean = denoiser(sample, timestep)
        clean = condition(clean, target, alpha, conditioning_weight, clamp)
        sample = step(sample, clean, alpha, alpha_next, eta, noise)
    return sample
