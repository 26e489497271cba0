"""pytest tests/test_unet.py"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ddad.unet import ARCHITECTURES, create_unet, parameter_count, predict, set_attention_heads


def gigaflops(unet, size=256):
    """Floating-point operations of a call; on the meta device, where shapes flow and nothing is computed."""
    unet = unet.to("meta")
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        predict(unet, torch.zeros(1, 3, size, size), torch.tensor([100]))
    return counter.get_total_flops() / 1e9


@pytest.mark.parametrize(("architecture", "parameters", "gflop"), [("base", 32_952_707, 142.5), ("s", 8_257_731, 36.5)])
def test_published_networks_have_the_published_size(architecture, parameters, gflop):
    unet = create_unet(architecture)
    assert parameter_count(unet) == parameters
    measured = gigaflops(unet)
    print(f"{architecture}: {parameters / 1e6:.1f} M parameters, {measured:.1f} GFLOP a call at 256 x 256")
    assert measured == pytest.approx(gflop, abs=0.1)


def test_the_small_network_is_small():
    unet = create_unet("xs")
    measured = gigaflops(unet)
    print(f"xs: {parameter_count(unet) / 1e6:.2f} M parameters, {measured:.2f} GFLOP a call at 256 x 256")
    assert parameter_count(unet) <= 4_000_000
    assert measured <= 6


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_any_multiple_of_32_goes_in_and_comes_out(architecture):
    unet = create_unet(architecture).eval()
    with torch.no_grad():
        assert predict(unet, torch.zeros(2, 3, 32, 96), torch.tensor([5, 9])).shape == (2, 3, 32, 96)


def test_head_count_reaches_every_attention_layer_and_matters():
    torch.manual_seed(0)
    unet = create_unet("s").eval()
    sample = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = predict(unet, sample, torch.tensor([100]))
        set_attention_heads(unet, 1)
        after = predict(unet, sample, torch.tensor([100]))
    assert not torch.allclose(before, after, atol=1e-6)
