"""pytest tests/test_sampling.py"""

import pytest
import torch

from analytic import GaussianUNet
from ddad.config import SamplingSettings
from ddad.sampling import condition, match_level, reconstruct, step
from ddad.unet import clean_from, create_scheduler, predict, training_target

ALPHAS = create_scheduler("epsilon").alphas_cumprod


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("timestep", [0, 25, 225, 999])
@pytest.mark.parametrize("weight", [0.0, 1.0, 4.0])
def test_conditioning_is_a_step_towards_the_photograph(timestep, weight):
    """Eq. 5-7 in noise, as the paper writes them, equal x̂₀ + λ (y - x̂₀) with λ = w (1 - ā)."""
    alpha = ALPHAS[timestep].double()
    sample, target, epsilon = draw(2, 3, 8, 8), draw(2, 3, 8, 8, seed=1), draw(2, 3, 8, 8, seed=2)
    clean = clean_from(epsilon, sample, alpha, "epsilon")

    noised_target = alpha.sqrt() * target + (1 - alpha).sqrt() * epsilon  # Eq. 5
    guided = epsilon - weight * (1 - alpha).sqrt() * (noised_target - sample)  # Eq. 6
    expected = clean_from(guided, sample, alpha, "epsilon")

    torch.testing.assert_close(condition(clean, target, alpha, weight, clamp=False), expected)


def test_lambda_has_the_values_the_documentation_names():
    one = torch.ones(1, 1, 1, 1)
    moved = [float(condition(0 * one, one, ALPHAS[t], 1.0, clamp=False)) for t in (225, 0)]
    assert moved == pytest.approx([0.411, 0.0001], abs=5e-4)


def test_clamp_never_overshoots_the_photograph():
    clean, target = draw(1, 3, 4, 4), draw(1, 3, 4, 4, seed=1)
    torch.testing.assert_close(condition(clean, target, ALPHAS[900], 11.0, clamp=True), target)
    beyond = condition(clean, target, ALPHAS[900], 11.0, clamp=False)
    assert not torch.allclose(beyond, target)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("timestep", [0, 25, 225, 975])
def test_step_equals_diffusers_ddim(timestep, prediction_type, eta):
    scheduler = create_scheduler(prediction_type)
    scheduler.set_timesteps(40)  # a stride of 25
    sample, output, fresh = draw(2, 3, 8, 8), draw(2, 3, 8, 8, seed=1), draw(2, 3, 8, 8, seed=2)
    # At the last step diffusers adds no noise to speak of: its variance is that of the step to ā = 1.
    expected = scheduler.step(output, timestep, sample, eta=eta, variance_noise=fresh).prev_sample

    alpha = ALPHAS[timestep].double()
    alpha_next = ALPHAS[timestep - 25].double() if timestep >= 25 else torch.ones_like(alpha)
    clean = clean_from(output, sample, alpha, prediction_type)
    found = step(sample, clean, alpha, alpha_next, eta, lambda like: fresh)

    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_without_conditioning_the_whole_chain_is_plain_ddim():
    unet = GaussianUNet(0.2, 0.3)
    target = draw(2, 3, 8, 8).float() * 0.3
    scheduler = create_scheduler("epsilon")
    scheduler.set_timesteps(40)
    chain = [t for t in scheduler.timesteps.tolist() if t <= 250]
    sample = ALPHAS[250].sqrt() * target
    for timestep in chain:
        sample = scheduler.step(unet(sample, torch.tensor([timestep]))[0], timestep, sample).prev_sample

    def denoiser(x, t):
        return clean_from(predict(unet, x, torch.tensor([t])), x, ALPHAS[t], "epsilon")

    found = reconstruct(denoiser, target, ALPHAS, chain, start_timestep=250)
    torch.testing.assert_close(found, sample, rtol=1e-4, atol=1e-5)


def test_the_ideal_denoiser_pulls_a_defect_to_the_mean_and_conditioning_holds_it_back():
    unet = GaussianUNet(0.0, 0.05)
    target = torch.zeros(1, 3, 8, 8)
    target[..., 4, 4] = 1.0

    def rebuilt(weight):
        def denoiser(x, t):
            return clean_from(predict(unet, x, torch.tensor([t])), x, ALPHAS[t], "epsilon")

        times = range(250, 0, -25)
        return reconstruct(denoiser, target, ALPHAS, times, start_timestep=250, conditioning_weight=weight)

    free, held = rebuilt(0.0)[0, 0, 4, 4], rebuilt(2.0)[0, 0, 4, 4]
    assert 0 <= free < 0.1
    assert 2 * free < held < 1


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_clean_estimate_inverts_the_training_target(prediction_type):
    clean, noise = draw(4, 3, 4, 4), draw(4, 3, 4, 4, seed=1)
    alpha = ALPHAS[[1, 100, 250, 999]].double().view(-1, 1, 1, 1)
    sample = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    target = training_target(clean, noise, alpha, prediction_type)
    torch.testing.assert_close(clean_from(target, sample, alpha, prediction_type), clean)


def test_aligned_and_published_grids():
    published = {"start_timestep": 250, "stride": 25}
    assert SamplingSettings(**published).timesteps == (250, 225, 200, 175, 150, 125, 100, 75, 50, 25)
    assert SamplingSettings(**published, aligned=False).timesteps == (225, 200, 175, 150, 125, 100, 75, 50, 25, 0)


def test_level_is_matched_whatever_a_defect_covers():
    target = draw(2, 3, 16, 16)
    drifted = target - torch.tensor([0.3, -0.1, 0.2]).view(1, 3, 1, 1)
    drifted[:, :, 2:9, 2:9] += 5.0
    matched = match_level(drifted, target)
    torch.testing.assert_close(matched[:, :, 10:], target[:, :, 10:], rtol=0, atol=1e-6)
    torch.testing.assert_close(matched[:, :, 2:9, 2:9], target[:, :, 2:9, 2:9] + 5.0, rtol=0, atol=1e-6)


def test_stochastic_sampling_needs_a_source_of_noise():
    with pytest.raises(ValueError, match="source of noise"):
        reconstruct(lambda x, t: x, torch.zeros(1, 3, 4, 4), ALPHAS, [25], start_timestep=25, eta=1.0)
