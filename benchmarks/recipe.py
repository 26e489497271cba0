"""Which way of training the small network converges fastest, on good images alone.

    python benchmarks/recipe.py DATA [--steps 300] [--size 128] [--target 0.04] [--only NAME ...]

Trains each variant for the same number of images and prints the held-out denoising loss: mean squared error of x̂₀ in
units of [-1, 1] pixels, on good images that were not trained on, with the averaged weights; also at five timesteps, the
images a second (median step), and the seconds of training until the loss is below the target, since a variant may be
better an image and worse a second. Processor seconds, so that other processes disturb them less: use one thread.
"""

import argparse
import statistics
import time
from datetime import UTC, datetime
from typing import Any

import torch
from diffusers import UNet2DModel

from ddad.config import TrainingSettings
from ddad.data.folder import scan
from ddad.data.samples import model_shape, split_good
from ddad.fit import ImageCache
from ddad.images import fit_image_rule, probe
from ddad.training import Trainer, held_out_loss
from ddad.unet import ARCHITECTURES, choose_device, parameter_count

STEM_4 = {
    "in_channels": 48,
    "out_channels": 48,
    "block_out_channels": (64, 80, 96, 112),
    "norm_num_groups": 16,
    "attention_head_dim": 16,
    "down_block_types": ("DownBlock2D",) * 3 + ("AttnDownBlock2D",),
    "up_block_types": ("AttnUpBlock2D",) + ("UpBlock2D",) * 3,
}
# name: (network, prediction, training)
VARIANTS = {
    "default": ({}, "v_prediction", {}),
    "default, constant rate": ({}, "v_prediction", {"schedule": "constant"}),
    "default, batch 8": ({}, "v_prediction", {"batch_size": 8}),
    "default, batch 32": ({}, "v_prediction", {"batch_size": 32}),
    "default, clean weighting": ({}, "v_prediction", {"loss_weighting": "clean"}),
    "v, lr 1e-3": ({}, "v_prediction", {"learning_rate": 1e-3}),
    "4x4 stem": (STEM_4, "v_prediction", {"learning_rate": 1e-3}),
    "epsilon": ({}, "epsilon", {"learning_rate": 1e-3}),
    "clean weighting": ({}, "v_prediction", {"learning_rate": 1e-3, "loss_weighting": "clean"}),
    "constant rate": ({}, "v_prediction", {"learning_rate": 1e-3, "schedule": "constant"}),
    "lr 2e-3": ({}, "v_prediction", {"learning_rate": 2e-3}),
    "lr 4e-3": ({}, "v_prediction", {"learning_rate": 4e-3}),
    "lr 2e-3, clean weighting": ({}, "v_prediction", {"learning_rate": 2e-3, "loss_weighting": "clean"}),
    "lr 2e-3, batch 8": ({}, "v_prediction", {"learning_rate": 2e-3, "batch_size": 8}),
}
MAX_TIMESTEP = 241
EVALUATIONS = 12
"""Of a run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--steps", type=int, default=300, help="of 16 images")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--target", type=float, default=0.04, help="held-out loss to reach")
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    options = parser.parse_args()

    paths = [sample.path for sample in scan(options.data).train]
    split = split_good(paths, 0.01)
    shape = model_shape([(info.height, info.width) for info in map(probe, paths)], options.size)
    rule = fit_image_rule(paths)
    train = ImageCache(split.train, shape, rule, 4e9, 2)
    held_out = list(ImageCache(split.select[:24], shape, rule, 4e9, 2))
    device = choose_device(None)
    print(f"{len(train)} images of {shape[0]} x {shape[1]}, {torch.get_num_threads()} threads, {datetime.now(UTC):%F}")
    print(
        f"| variant | M parameters | images/s | s to {options.target} | loss x 1000 after 1/3, 2/3, all "
        "| at t = 30, 80, 130, 180, 230 |"
    )
    print("|---|---|---|---|---|---|")
    for name in options.only:
        network, prediction_type, changes = VARIANTS[name]
        settings = TrainingSettings(**{"ema_decay": 0.99, **changes})
        torch.manual_seed(0)
        unet = UNet2DModel(**{**ARCHITECTURES["xs"], **network})
        trainer = Trainer(
            unet, settings, prediction_type=prediction_type, max_timestep=MAX_TIMESTEP, seed=0, device=device
        )
        steps = options.steps * 16 // settings.batch_size
        losses: list[float] = []
        seconds = []

        def step(images: Any, index: int, count: int, plain: Any = trainer.step, seconds: Any = seconds) -> Any:
            started = time.process_time()
            loss = plain(images, index, count)
            seconds.append(time.process_time() - started)
            return loss

        trainer.step = step  # type: ignore[method-assign]
        trainer.run(
            train,
            steps,
            held_out=held_out,
            evaluate_every=steps // EVALUATIONS,
            on_progress=lambda event: event.held_out_loss and losses.append(event.held_out_loss),  # noqa: B023
        )
        rate = settings.batch_size / statistics.median(seconds)
        reached = next((number + 1 for number, loss in enumerate(losses) if loss <= options.target), None)
        took = f"{sum(seconds[: reached * (steps // EVALUATIONS)]):.0f}" if reached else "-"
        with trainer.averaged():
            each = [
                held_out_loss(unet, held_out, trainer.alphas_cumprod, prediction_type, [timestep])
                for timestep in (30, 80, 130, 180, 230)
            ]
        thirds = losses[EVALUATIONS // 3 - 1 :: EVALUATIONS // 3]
        columns = [" ".join(f"{1000 * value:.2f}" for value in values) for values in (thirds, each)]
        size = parameter_count(unet) / 1e6
        print(f"| {name} | {size:.2f} | {rate:.1f} | {took} | {columns[0]} | {columns[1]} |", flush=True)


if __name__ == "__main__":
    main()
