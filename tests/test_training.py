"""pytest tests/test_training.py"""

import copy
import json
import math
import os
import signal
import threading

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel

from analytic import GaussianUNet
from ddad.checkpoint import CheckpointStore
from ddad.config import TrainingSettings
from ddad.errors import ConfigError, Interrupted, ModelError
from ddad.training import (
    Trainer,
    augment,
    batch_indices,
    denoising_loss,
    draw_timesteps,
    held_out_loss,
    learning_rate,
    step_generator,
    to_unit,
)
from ddad.unet import create_scheduler

IMAGES = [np.random.default_rng(i).integers(0, 256, (32, 32, 3), dtype=np.uint8) for i in range(7)]
FAST = TrainingSettings(batch_size=2, warmup_steps=2, precision="fp32")


def tiny_unet(seed=0):
    torch.manual_seed(seed)
    return UNet2DModel(
        in_channels=12, out_channels=12, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, dropout=0.1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def trainer(settings=FAST, seed=0):
    return Trainer(
        tiny_unet(), settings, prediction_type="v_prediction", max_timestep=300, seed=seed, device=torch.device("cpu")
    )


def weights(one):
    with one.averaged() as unet:
        return {name: value.clone() for name, value in unet.state_dict().items()}


def assert_bit_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_diverging_run_ends_in_a_sentence():
    with pytest.raises(ConfigError, match=r"Expected a finite loss, found (nan|inf) at step \d+: training diverged"):
        trainer(FAST.model_copy(update={"learning_rate": 1e20, "gradient_clip": None})).run(IMAGES, 20)


@pytest.mark.parametrize(
    "settings",
    [
        FAST,
        FAST.model_copy(update={"ema_decay": None, "optimizer": "adam"}),
        FAST.model_copy(update={"precision": "bf16", "augment": ("hflip", "rot90")}),
    ],
)
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, settings):
    whole = trainer(settings)
    whole.run(IMAGES, 6)

    store = CheckpointStore(tmp_path)
    first = trainer(settings)

    def stop_at_three(progress):
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="step 3 of 6"):
        first.run(IMAGES, 6, store=store, on_progress=stop_at_three)
    second = trainer(settings)
    resumed_from = []
    second.run(IMAGES, 6, store=store, on_resume=resumed_from.append)
    assert resumed_from == [3]
    assert_bit_equal(weights(whole), weights(second))
    assert_bit_equal(dict(whole.plain_unet.state_dict()), dict(second.plain_unet.state_dict()))


def test_a_finished_run_trains_no_further(tmp_path):
    store = CheckpointStore(tmp_path)
    first = trainer()
    first.run(IMAGES, 2, store=store)
    again = trainer()
    steps = []
    again.run(IMAGES, 2, store=store, on_progress=lambda progress: steps.append(progress.step))
    assert steps == []
    assert_bit_equal(weights(first), weights(again))


def test_seed_decides_everything():
    runs = []
    for seed in (1, 1, 2):
        one = trainer(seed=seed)
        one.run(IMAGES, 2)
        runs.append(weights(one))
    assert_bit_equal(runs[0], runs[1])
    assert any(not torch.equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_training_learns():
    """A network shown one grey level soon beats the best answer without training."""
    grey = [np.full((32, 32, 3), 200, np.uint8)] * 4
    one = trainer(TrainingSettings(batch_size=4, learning_rate=5e-3, warmup_steps=5, precision="fp32", ema_decay=0.9))
    before = one.held_out_loss(grey[:1])
    one.run(grey, 150)
    assert one.held_out_loss(grey[:1]) < 0.6 * before


def test_held_out_loss_of_the_ideal_denoiser_is_its_closed_form():
    """For pixels N(0, s²) the best error is s² (1 - ā) / (ā s² + 1 - ā)."""
    deviation, timestep = 0.3, 200
    rng = np.random.default_rng(0)
    pixels = np.clip(127.5 + 127.5 * deviation * rng.standard_normal((8, 64, 64, 3)), 0, 255).round().astype(np.uint8)
    alphas = create_scheduler("epsilon").alphas_cumprod
    found = held_out_loss(GaussianUNet(0.0, deviation), list(pixels), alphas, "epsilon", [timestep])
    alpha = float(alphas[timestep])
    expected = deviation**2 * (1 - alpha) / (alpha * deviation**2 + 1 - alpha)
    assert found == pytest.approx(expected, rel=0.03)


def test_each_pass_shows_every_image_once():
    shown = [index for step in range(7) for index in batch_indices(7, 3, step, seed=5)]
    for epoch in range(3):
        assert sorted(shown[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert shown[:7] != shown[7:14]


def test_timesteps_cover_what_inference_uses_and_no_more():
    drawn = torch.cat([draw_timesteps(16, 301, step_generator(0, step)) for step in range(200)])
    assert drawn.min() >= 0
    assert drawn.max() <= 300
    counts = torch.histc(drawn.float(), 10, 0, 300)
    assert counts.min() > 0.8 * counts.mean()


def test_learning_rate_warms_up_and_falls_to_zero():
    settings = TrainingSettings(learning_rate=1.0, warmup_steps=10)
    rates = [learning_rate(step, 1000, settings) for step in range(1000)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(1.0, abs=1e-3)
    assert rates[-1] < 1e-4
    constant = settings.model_copy(update={"schedule": "constant"})
    assert learning_rate(999, 1000, constant) == 1.0


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_clean_weighting_counts_errors_in_pixels(prediction_type):
    from ddad.unet import clean_from, training_target

    generator = torch.Generator().manual_seed(0)
    clean, noise, wrong = (torch.randn(3, 3, 4, 4, generator=generator) for _ in range(3))
    alpha = create_scheduler("epsilon").alphas_cumprod[[10, 100, 250]].view(-1, 1, 1, 1)
    sample = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    target = training_target(clean, noise, alpha, prediction_type)
    settings = TrainingSettings(loss_weighting="clean")
    loss = denoising_loss(target + wrong, target, alpha, settings, prediction_type)
    error = clean_from(target + wrong, sample, alpha, prediction_type) - clean
    assert loss.item() == pytest.approx(error.square().mean().item(), rel=1e-4)


def test_the_published_loss_is_summed_over_pixels():
    output, target = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
    alpha = torch.full((2, 1, 1, 1), 0.5)
    assert denoising_loss(output, target, alpha, TrainingSettings(loss="sum"), "epsilon") == 3 * 4 * 4


def test_augmentation_moves_pixels_and_changes_none():
    batch = to_unit([np.arange(32 * 64 * 3, dtype=np.uint8).reshape(32, 64, 3)] * 8)
    turned = [augment(image, ("hflip", "vflip", "rot90"), step_generator(0, 0, i)) for i, image in enumerate(batch)]
    assert all(image.shape == batch.shape[1:] for image in turned)
    assert not torch.equal(torch.stack(turned), batch)
    for before, after in zip(batch, turned, strict=True):
        assert torch.equal(before.flatten().sort().values, after.flatten().sort().values)
    image = batch[0]
    assert augment(image, (), step_generator(0, 0)) is image


def test_no_two_images_and_no_two_steps_draw_alike():
    drawn = [
        step_generator(*numbers) for numbers in [(0, 0), (0, 0, 0), (0, 0, 1), (0, 1), (0, 1, 0), (1, 0), (1, 0, 0)]
    ]
    assert len({float(torch.rand((), generator=generator)) for generator in drawn}) == len(drawn)


def test_progress_is_reported_and_saved(tmp_path):
    events = []
    store = CheckpointStore(tmp_path)
    trainer().run(IMAGES[:5], 4, held_out=IMAGES[5:], evaluate_every=2, store=store, on_progress=events.append)
    assert [event.step for event in events] == [1, 2, 3, 4]
    assert [event.held_out_loss is not None for event in events] == [False, True, False, True]
    assert all(math.isfinite(event.loss) and event.seconds > 0 for event in events)
    assert json.loads((tmp_path / "step-000000004" / "state.json").read_text())["step"] == 4


def test_only_whole_checkpoints_count(tmp_path):
    store = CheckpointStore(tmp_path)
    tensors = {"unet": {"a": torch.arange(3.0)}}
    store.save(1, tensors, {"seconds": 1.0})
    (tmp_path / ".unfinished-step-000000002-x").mkdir()  # what kills in the middle of saves leave
    (tmp_path / ".unfinished-run.json").touch()
    loaded, state = store.load_latest()
    assert torch.equal(loaded["unet"]["a"], tensors["unet"]["a"])
    assert state == {"step": 1, "seconds": 1.0}
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    store.save(2, tensors, {"seconds": 2.0})
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000002"]
    (tmp_path / "step-000000002" / "unet.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match=r"Expected a complete checkpoint in .*step-000000002, found a damaged one"):
        store.load_latest()


def test_a_failed_save_keeps_the_one_before(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(1, {"unet": {"a": torch.zeros(1)}}, {"seconds": 0.0})
    with pytest.raises(TypeError):
        store.save(2, {"unet": {"a": torch.zeros(1)}}, {"seconds": object()})
    assert store.load_latest()[1]["step"] == 1


def test_training_works_outside_the_main_thread():
    errors = []

    def work():
        try:
            trainer().run(IMAGES, 1)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []


def test_signals_act_as_before_after_training():
    before = signal.getsignal(signal.SIGINT)
    trainer().run(IMAGES, 1)
    assert signal.getsignal(signal.SIGINT) is before


def test_averaging_restores_the_trained_weights():
    one = trainer()
    one.run(IMAGES, 3)
    trained = copy.deepcopy(one.plain_unet.state_dict())
    averaged = weights(one)
    assert_bit_equal(dict(trained), dict(one.plain_unet.state_dict()))
    assert any(not torch.equal(trained[name], averaged[name]) for name in trained)
    assert one.plain_unet.training
