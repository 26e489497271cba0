"""pytest tests/test_config.py"""

import pytest
from pydantic import ValidationError

from ddad.config import PRESETS, make_settings, parse_settings
from ddad.errors import ConfigError


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_survive_json(preset):
    settings = make_settings(preset)
    assert settings.preset == preset
    assert parse_settings(settings.model_dump(mode="json")) == settings


def test_the_published_preset_is_as_published():
    paper = make_settings("paper")
    assert paper.sampling.timesteps == tuple(range(225, -1, -25))
    assert (paper.sampling.start_timestep, paper.sampling.eta, paper.sampling.clamp) == (250, 1.0, False)
    assert (paper.training.optimizer, paper.training.weight_decay, paper.training.loss) == ("adam", 0.05, "sum")
    assert (paper.training.ema_decay, paper.training.gradient_clip, paper.max_timestep) == (None, None, 1000)
    assert (paper.network.attention_heads, make_settings("paper-s").network.attention_heads) == (4, 2)
    assert paper.scoring.features == "wide_resnet101_2.tv_in1k"
    assert paper.square
    assert paper.scoring.position == "none"
    assert (paper.scoring.fusion, paper.scoring.crop) == ("batch-max", 0.875)
    assert (paper.scoring.pool_padding, paper.scoring.align_corners) == ("zero", True)
    assert (paper.scoring.smoothing, paper.scoring.layer_weights) == (4.0, (1.0, 1.0))
    adaptation = paper.adaptation
    assert (adaptation.pairs, adaptation.similarity, adaptation.batch_norm) == ("different", "flat", "train")
    assert (adaptation.conditioning_weight, adaptation.learning_rate, adaptation.layers) == (3.0, 1e-4, (1, 2, 3))
    assert adaptation.distillation_weight == 0.1
    assert not adaptation.choose_epochs


def test_timesteps_of_training_are_those_of_inference_with_a_margin():
    assert make_settings("xs", sampling={"start_timestep": 250, "stride": 25}).max_timestep == 301
    assert make_settings("xs", sampling={"start_timestep": 975, "stride": 25}).max_timestep == 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 250}, "Setting image_size: Input should be a multiple of 32, found 250."),
        ({"sampling": {"stride": 30}}, "Setting sampling: start_timestep must be a multiple of stride, got 200 and 30; "
                                       "use start_timestep 180."),
        ({"sampling": {"speed": 1}}, "Setting sampling.speed: Extra inputs are not permitted, found 1."),
        ({"false_alarms": 2.0}, "Setting false_alarms: Input should be less than 1, found 2.0."),
        ({"scoring": {"layer_weights": (1.0,)}}, "Setting scoring: layer_weights needs one weight a feature layer, "
                                                 "got 1 for 2 layers."),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_in_a_sentence(changes, message):
    with pytest.raises(ConfigError) as error:
        make_settings("xs", **changes)
    assert str(error.value) == message


def test_unknown_preset():
    with pytest.raises(ConfigError, match="Expected a preset among xs, s, base, paper, paper-s, found 'xl'"):
        make_settings("xl")


def test_settings_are_frozen():
    with pytest.raises(ValidationError):
        make_settings("xs").seed = 3
