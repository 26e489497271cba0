"""Train the denoiser on good images: the denoising loss, the loop, the moving average.

Batches and timesteps of step k come from a generator seeded by (seed, k), flips and noise of an image from one seeded
by (seed, k, its place in the batch): nothing random has to be stored, and a run that was stopped at any step and
resumed gives, on a CPU, the same weights bit for bit as one that was not. Several processes, each with its part of
every batch, give the same weights but for rounding; not so with dropout, whose masks depend on how a batch is divided.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor

from ddad.checkpoint import CheckpointStore
from ddad.config import TrainingSettings
from ddad.distributed import STOPPED, join
from ddad.errors import ConfigError, Interrupted
from ddad.sampling import to_unit
from ddad.unet import clean_from, create_scheduler, predict, processor_computes_bf16, training_target

Images = Sequence[np.ndarray]
"""uint8 images (H, W, 3), all of one shape."""


@dataclass(frozen=True)
class Progress:
    """What the loop reports after a step."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    seconds: float
    """Seconds of training so far, earlier sittings included."""
    held_out_loss: float | None = None


def choose_precision(setting: str, device: torch.device) -> str:
    """`fp32` or `bf16` for the setting `auto`, `fp32` or `bf16`."""
    if setting != "auto":
        return setting
    return "bf16" if processor_computes_bf16(device) else "fp32"


def learning_rate(step: int, steps: int, settings: TrainingSettings) -> float:
    """Linear warm-up, then constant or a half cosine down to zero."""
    warmup = min(settings.warmup_steps, max(1, steps // 10))
    factor = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if settings.schedule == "cosine":
        factor *= 0.5 * (1 + math.cos(math.pi * step / steps))
    return settings.learning_rate * factor


def step_generator(seed: int, step: int, place: int | None = None) -> torch.Generator:
    """The source of everything random in one step, or of what belongs to the image at one place of its batch."""
    # NumPy takes a missing number for a zero, so places begin at one.
    numbers = [seed, step] if place is None else [seed, step, place + 1]
    mixed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(mixed)


def batch_indices(count: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Images of a step: passes over all images, each in an order of its own."""
    epochs, places = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), count)
    orders = {epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in np.unique(epochs).tolist()}
    return [int(orders[epoch][place]) for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)]


def draw_timesteps(batch_size: int, max_timestep: int, generator: torch.Generator) -> Tensor:
    """Timesteps (B,) in [0, max_timestep), spread evenly over the batch (Kingma et al. 2021, low-discrepancy draw)."""
    offset = torch.rand((), generator=generator)
    fractions = (offset + torch.arange(batch_size) / batch_size) % 1.0
    return (fractions * max_timestep).long().clamp(max=max_timestep - 1)


def denoising_loss(
    output: Tensor, target: Tensor, alphas_cumprod: Tensor, settings: TrainingSettings, prediction_type: str
) -> Tensor:
    """Squared error of the prediction; `alphas_cumprod` is ā_t shaped (B, 1, 1, 1)."""
    errors = (output.float() - target) ** 2
    if settings.loss_weighting == "clean":
        # An error of v counts √(1-ā), one of ε counts √((1-ā)/ā) in x̂₀.
        weight = 1 - alphas_cumprod
        errors = errors * (weight / alphas_cumprod if prediction_type == "epsilon" else weight)
    return errors.sum() / len(errors) if settings.loss == "sum" else errors.mean()


@torch.no_grad()
def held_out_loss(
    unet: Any,
    images: Images,
    alphas_cumprod: Tensor,
    prediction_type: str,
    timesteps: Sequence[int],
    labels: Sequence[int] | None = None,
) -> float:
    """Mean squared error of x̂₀ on images not trained on, with fixed noise, averaged over `timesteps`.

    In units of [-1, 1] pixels, so that networks with different predictions and weightings can be compared. `labels`
    are the images' categories, for a class-conditional network.
    """
    generator = torch.Generator().manual_seed(0)
    device = alphas_cumprod.device
    total = 0.0
    for index, image in enumerate(images):
        label = None if labels is None else torch.full((len(timesteps),), labels[index], device=device)
        clean = to_unit([image], device).expand(len(timesteps), -1, -1, -1)
        alpha = alphas_cumprod[list(timesteps)].view(-1, 1, 1, 1)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        sample = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        output = predict(unet, sample, torch.tensor(timesteps, device=device), label).float()
        total += float(((clean_from(output, sample, alpha, prediction_type) - clean) ** 2).mean())
    return total / len(images)


def augment(image: Tensor, kinds: Sequence[str], generator: torch.Generator) -> Tensor:
    """Random flips and quarter turns of (3, H, W); quarter turns only where H = W."""
    if not kinds:
        return image
    height, width = image.shape[-2:]
    flip_x, flip_y, turns = torch.randint(0, 4, (3,), generator=generator).tolist()
    if "hflip" in kinds and flip_x % 2:
        image = image.flip(-1)
    if "vflip" in kinds and flip_y % 2:
        image = image.flip(-2)
    if "rot90" in kinds:
        image = image.rot90(turns if height == width else 2 * (turns % 2), (-2, -1))
    return image


class Trainer:
    """The loop. `step()` does one step; `run()` does all of them, saves, resumes and reports.

    Of several processes that were launched together, each makes a trainer, and each computes its share of every batch.
    """

    def __init__(
        self,
        unet: Any,
        settings: TrainingSettings,
        *,
        prediction_type: str,
        max_timestep: int,
        seed: int,
        device: torch.device,
        labels: Sequence[int] | None = None,
    ) -> None:
        """
        Args:
            unet: the network; it is trained in place.
            max_timestep: timesteps are drawn below this.
            labels: the category of each training image, for a class-conditional network.

        Raises:
            ConfigError: several processes that cannot share a batch evenly, or cannot work together (`join`).
        """
        self.labels = labels
        self.processes = join(device)
        self.places = self.processes.share(settings.batch_size)
        self.precision = choose_precision(settings.precision, device)
        # Accelerate keeps one precision a process; autocast below is per trainer.
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
        self.settings = settings
        self.prediction_type = prediction_type
        self.max_timestep = max_timestep
        self.seed = seed
        self.plain_unet = unet
        if device.type == "cuda":
            unet.to(memory_format=torch.channels_last)
        unet.train()
        optimizer: torch.optim.Optimizer
        if settings.optimizer == "adam":  # coupled L2, as published
            optimizer = torch.optim.Adam(
                unet.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay, fused=True
            )
        else:
            # A short memory of gradient sizes: with 0.999 a run diverged after a spike (docs/log.md).
            optimizer = torch.optim.AdamW(
                unet.parameters(),
                lr=settings.learning_rate,
                betas=(0.9, 0.99),
                weight_decay=settings.weight_decay,
                fused=True,
            )
        self.unet, self.optimizer = self.accelerator.prepare(unet, optimizer)
        if settings.compile:
            torch._dynamo.config.suppress_errors = True  # what cannot be compiled is computed as it is
            self.unet = torch.compile(self.unet)
        self.device = self.accelerator.device
        self.alphas_cumprod = create_scheduler(prediction_type).alphas_cumprod.to(self.device)
        self.ema = EMAModel(unet.parameters(), decay=settings.ema_decay, foreach=True) if settings.ema_decay else None

    def step(self, images: Images, step: int, steps: int) -> Tensor:
        """One optimisation step; returns the loss of this process' share of the batch, a scalar tensor."""
        settings = self.settings
        loss = self._loss(images, step)
        self.accelerator.backward(loss)
        if settings.gradient_clip is not None:
            self.accelerator.clip_grad_norm_(self.unet.parameters(), settings.gradient_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, settings)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.step(self.plain_unet.parameters())
        return loss.detach()

    def _loss(self, images: Images, step: int) -> Tensor:
        settings = self.settings
        generator = step_generator(self.seed, step)
        # Dropout, where a preset has it, draws from the global generator; in no two processes the same.
        torch.manual_seed(generator.initial_seed() + self.processes.number)
        timesteps = draw_timesteps(settings.batch_size, self.max_timestep, generator)[list(self.places)]
        batch = batch_indices(len(images), settings.batch_size, step, self.seed)
        chosen = [batch[place] for place in self.places]
        labels = None if self.labels is None else torch.tensor([self.labels[i] for i in chosen], device=self.device)
        pictures, noises = [], []
        for picture, place in zip(to_unit([images[i] for i in chosen]), self.places, strict=True):
            generator = step_generator(self.seed, step, place)
            pictures.append(augment(picture, settings.augment, generator))
            noises.append(torch.randn(picture.shape, generator=generator))
        clean, noise = torch.stack(pictures).to(self.device), torch.stack(noises).to(self.device)
        timesteps = timesteps.to(self.device)

        alpha = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        sample = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        target = training_target(clean, noise, alpha, self.prediction_type)
        with self._autocast():
            output = predict(self.unet, sample, timesteps, labels)
        return denoising_loss(output, target, alpha, settings, self.prediction_type)

    def run(
        self,
        images: Images,
        steps: int,
        *,
        held_out: Images = (),
        held_out_labels: Sequence[int] | None = None,
        store: CheckpointStore | None = None,
        save_every_seconds: float = 60.0,
        evaluate_every: int | None = None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
        on_resume: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Train up to `steps` steps in all, from the newest checkpoint in `store` where there is one.

        Afterwards `averaged` has the result. Of several processes only the main one measures the held-out loss,
        saves and reports; the others read its checkpoints, and where it raises they raise SystemExit.

        Raises:
            Interrupted: SIGINT or SIGTERM came, to any process; the state is saved.
            ConfigError: the loss is no longer finite.
            ModelError: the checkpoint is damaged.
        """
        self.plain_unet.train()  # a detector that shares it has set it to evaluation
        processes = self.processes
        done, seconds = self._resume(store)
        if processes.is_main:
            on_resume(done)
        evaluate_every = evaluate_every or max(1, steps // 10)
        last_save = started = time.monotonic()
        with asked_to_stop() as asked:
            for index in range(done, steps):
                loss, stop = processes.agree(self.step(images, index, steps), asked())
                if not math.isfinite(loss):
                    raise processes.told(
                        ConfigError(
                            f"Expected a finite loss, found {loss} at step {index + 1}: training diverged; "
                            "choose another --seed or preset, and another --out."
                        )
                    )
                now = time.monotonic()
                finished = index + 1
                if processes.is_main:
                    held_out_value = None
                    if len(held_out) and (finished % evaluate_every == 0 or finished == steps):
                        held_out_value = self.held_out_loss(held_out, held_out_labels)
                    on_progress(
                        Progress(
                            finished,
                            steps,
                            loss,
                            learning_rate(index, steps, self.settings),
                            seconds + now - started,
                            held_out_value,
                        )
                    )
                    stop = stop or (processes.count == 1 and asked())  # several must stop at the same step
                    if store and (stop or finished == steps or now - last_save > save_every_seconds):
                        store.save(finished, self._tensors(), {"seconds": seconds + time.monotonic() - started})
                        last_save = time.monotonic()
                if stop:
                    processes.as_main(True)  # the others wait for it: launchers end all when one has ended
                    raise processes.told(Interrupted(f"step {finished} of {steps}"), STOPPED)

    def held_out_loss(self, images: Images, labels: Sequence[int] | None = None) -> float:
        """`held_out_loss` of the averaged weights, in evaluation mode."""
        timesteps = [round(self.max_timestep * f) for f in (0.1, 0.3, 0.5, 0.7, 0.9)]
        with self.averaged() as unet, self._autocast():
            return held_out_loss(unet, images, self.alphas_cumprod, self.prediction_type, timesteps, labels)

    @contextmanager
    def averaged(self) -> Iterator[Any]:
        """The network with its averaged weights, in evaluation mode, for the length of the block."""
        parameters = list(self.plain_unet.parameters())
        if self.ema:
            self.ema.store(parameters)
            self.ema.copy_to(parameters)
        self.plain_unet.eval()
        try:
            yield self.plain_unet
        finally:
            self.plain_unet.train()
            if self.ema:
                self.ema.restore(parameters)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        names = [name for name, _ in self.plain_unet.named_parameters()]
        groups: dict[str, dict[str, Tensor]] = {"unet": dict(self.plain_unet.state_dict())}
        state = self.optimizer.state_dict()["state"]
        groups["optimizer"] = {
            f"{names[index]}/{key}": value for index, values in state.items() for key, value in values.items()
        }
        if self.ema:
            groups["ema"] = dict(zip(names, self.ema.shadow_params, strict=True))
        return groups

    def _resume(self, store: CheckpointStore | None) -> tuple[int, float]:
        latest = None
        with self.processes.together() as known:
            if store and self.processes.is_main:
                latest = store.load_latest()  # first and alone, since it cleans up
            known["step"] = latest[1]["step"] if latest else 0
        with self.processes.together():
            if store and known["step"] and not self.processes.is_main:
                latest = store.load_latest()
                if latest is None or latest[1]["step"] != known["step"]:
                    raise ConfigError(
                        f"Expected the checkpoint of step {known['step']} in {store.folder} on every machine, found "
                        "none or another; choose an --out that all machines share."
                    )
        if latest is None:
            return 0, 0.0
        tensors, state = latest
        names = [name for name, _ in self.plain_unet.named_parameters()]
        self.plain_unet.load_state_dict(tensors["unet"])
        stored: dict[int, dict[str, Any]] = {}
        for key, value in tensors["optimizer"].items():
            name, entry = key.rsplit("/", 1)
            stored.setdefault(names.index(name), {})[entry] = value
        optimizer_state = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": stored, "param_groups": optimizer_state["param_groups"]})
        if self.ema:
            for shadow, name in zip(self.ema.shadow_params, names, strict=True):
                shadow.copy_(tensors["ema"][name])
            self.ema.optimization_step = state["step"]
        return state["step"], state["seconds"]


@contextmanager
def asked_to_stop() -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a request; a second one acts as usual."""
    asked = False
    before: dict[int, Any] = {}

    def note(number: int, frame: Any) -> None:
        nonlocal asked
        asked = True
        signal.signal(number, before[number])

    try:
        for number in map(int, (signal.SIGINT, signal.SIGTERM)):
            before[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: nobody can send it signals
        before.clear()
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
