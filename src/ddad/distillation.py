"""The one-call student: a U-Net that gives in one call what the model's n calls give.

It begins as a copy of the model's U-Net and sees the scaled photograph √ā y at T', as the model does at its start;
its clean estimate x̂₀ there learns the model's finished reconstruction x₀, of good images and of synthetic defects:

    L = | x̂₀(√ā_T' y, T') - x₀(y) |²,   averaged over pixels.

To use it is the same method with one step (stride = T'), so nothing else in the package knows of it. Where the model's
own first call finds synthetic defects as well, that serves, and nothing has to be learned (docs/log.md).
"""

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddad.adaptation import reconstruct_all
from ddad.checkpoint import CheckpointStore
from ddad.config import Settings
from ddad.data.samples import spread
from ddad.data.synthetic import defect_set
from ddad.detector import Detector
from ddad.errors import ConfigError
from ddad.sampling import to_unit
from ddad.tiling import Tiles
from ddad.training import Images, Progress, Trainer, batch_indices, step_generator
from ddad.tuning import DEFECTS, MOST_JUDGED, SyntheticTest, paint_halves
from ddad.unet import clean_from, predict

MOST_REBUILT = 512
"""Good images the student learns from, and as many synthetic defects."""
STEPS = 600
LEARNING_RATE_SHARE = 0.25
"""Of the model's own: the student starts from finished weights."""
MOST_LOST = 0.005
"""Image AUROC on synthetic defects that a student may lose; one that loses more is not kept."""


def student_settings(settings: Settings) -> Settings:
    """The model's settings with one deterministic network call, at T'; conditioning is in what the student learned."""
    sampling = settings.sampling.model_copy(
        update={
            "stride": settings.sampling.start_timestep,
            "conditioning_weight": 0.0,
            "eta": 0.0,
            "start_noise": "none",
            "aligned": True,
        }
    )
    return settings.model_copy(update={"sampling": sampling})


class StudentTrainer(Trainer):
    """The loop of `Trainer` with the loss above; `run` is given the photographs that `rebuilt` belongs to."""

    def __init__(self, unet: Any, settings: Settings, rebuilt: Sequence[Tensor], device: torch.device) -> None:
        """
        Args:
            settings: the model's.
            rebuilt: the model's reconstruction of each photograph, (3, H, W).
        """
        training = settings.training
        super().__init__(
            unet,
            training.model_copy(update={"learning_rate": LEARNING_RATE_SHARE * training.learning_rate}),
            prediction_type=settings.network.prediction_type,
            max_timestep=settings.max_timestep,
            seed=settings.seed,
            device=device,
        )
        self.rebuilt = rebuilt
        self.timestep = settings.sampling.start_timestep

    def _loss(self, images: Images, step: int) -> Tensor:
        chosen = batch_indices(len(images), self.settings.batch_size, step, self.seed)
        target = torch.stack([self.rebuilt[i] for i in chosen]).to(self.device).float()
        # Dropout, where a preset has it, draws from the global generator.
        torch.manual_seed(step_generator(self.seed, step).initial_seed())
        alpha = self.alphas_cumprod[self.timestep]
        sample = alpha.sqrt() * to_unit([images[i] for i in chosen], self.device)
        with self._autocast():
            output = predict(self.unet, sample, torch.full((len(chosen),), self.timestep, device=self.device))
        clean = clean_from(output.float(), sample, alpha, self.prediction_type)
        return torch.nn.functional.mse_loss(clean, target)


def distil(
    detector: Detector,
    train: Images,
    select: Images,
    *,
    steps: int | None = None,
    store: Callable[[str], CheckpointStore] | None = None,
    on_stage: Callable[[str], None] = lambda sentence: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Detector:
    """The one-call student of a detector, not calibrated yet.

    Args:
        train: good images to learn from, uint8, model shape.
        select: good images neither was trained on, to judge by with synthetic defects; at least two.
        steps: of training. None: the model's own first call serves where it finds synthetic defects as well; where it
            does not, `STEPS`.
        store: a checkpoint store for this distillation's identity; without it a stopped one begins again.

    Raises:
        ConfigError: the student finds synthetic defects worse by more than `MOST_LOST`; or scores as published, which
            depend on their batch.
        Interrupted: asked to stop; the state is saved.
    """
    settings = detector.settings
    if settings.scoring.fusion == "batch-max":
        raise ConfigError(
            f"Expected a model that scores each image by itself, found batch-max fusion (preset {settings.preset}); "
            "distil a model of preset xs, s or base."
        )
    record = {key: value for key, value in detector.record.items() if key in ("category", "data", "trained")}

    def in_one_call(unet: Any) -> Detector:
        return Detector(
            unet,
            detector.scheduler,
            detector.features,
            student_settings(settings),
            detector.shape,
            image_rule=detector.image_rule,
            record=dict(record),
            device=detector.device,
        )

    on_stage("Judging the model, and its first call alone, on synthetic defects.")
    judged = spread(select, MOST_JUDGED)
    painted = paint_halves(judged, DEFECTS, settings.seed)
    student = in_one_call(copy.deepcopy(detector.unet))
    before, untaught = (SyntheticTest(one, judged, painted).image_auroc() for one in (detector, student))
    found, taught = untaught, 0
    how = f"the model's own first call: image AUROC on synthetic defects {untaught:.3f}, with all calls {before:.3f}."
    if steps is not None or untaught < before - MOST_LOST:
        taught = steps or STEPS
        unet, images = _teach(detector, train, taught, store, on_stage, on_progress)
        student = in_one_call(unet)
        on_stage("Judging the student on synthetic defects.")
        found = SyntheticTest(student, judged, painted).image_auroc()
        if found < before - MOST_LOST:
            raise ConfigError(
                f"Expected a student that finds synthetic defects as well as the model (image AUROC {before:.3f}, "
                f"within {100 * MOST_LOST:.1f} points), found {found:.3f} after {taught} steps; give more --steps. "
                "Nothing was written."
            )
        how = (
            f"learned in {taught} steps from {images} reconstructions: image AUROC on synthetic defects {found:.3f}, "
            f"the model itself {before:.3f}, its own first call {untaught:.3f}."
        )
    said = f"One network call instead of {len(settings.sampling.timesteps)}, {how}"
    on_stage(said)
    student.record["distillation"] = {
        "said": said,
        "steps": taught,
        "synthetic_auroc": found,
        "model_synthetic_auroc": before,
        "first_call_synthetic_auroc": untaught,
    }
    return student


def _teach(
    detector: Detector,
    train: Images,
    steps: int,
    store: Callable[[str], CheckpointStore] | None,
    on_stage: Callable[[str], None],
    on_progress: Callable[[Progress], None],
) -> tuple[Any, int]:
    """A copy of the U-Net that learned the detector's reconstructions, and from how many."""
    settings, tiling = detector.settings, detector.tiling
    good = spread(train, max(1, MOST_REBUILT // tiling.number))
    images = [*good, *(defect.image for defect in defect_set(good, len(good), settings.seed))]
    on_stage(f"Rebuilding {len(good)} good images and {len(images) - len(good)} synthetic defects for the student.")
    rebuilt = [tile for canvas in reconstruct_all(detector, images) for tile in tiling.cut(canvas[None])]
    trainer = StudentTrainer(copy.deepcopy(detector.unet), settings, rebuilt, detector.device)
    identity = _identity(detector, images, steps)
    trainer.run(Tiles(images, tiling), steps, store=store(identity) if store else None, on_progress=on_progress)
    with trainer.averaged() as unet:
        return copy.deepcopy(unet), len(images)


def _identity(detector: Detector, images: Images, steps: int) -> str:
    """One hash of everything a distillation follows from."""
    digest = hashlib.sha256(f"{steps} {detector.settings.model_dump_json()}".encode())
    for image in images:
        digest.update(np.ascontiguousarray(image).tobytes())
    for tensor in detector.unet.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
