"""DDAD as a model of anomalib 2.7, for its `Engine` and its command line.

    from anomalib.engine import Engine
    from ddad.integrations.anomalib import Ddad
    Engine().train(Ddad(time_budget=3600), datamodule=datamodule)                    # learn, then test
    Engine().test(Ddad.from_pretrained("models/tile"), datamodule=datamodule)        # what `ddad train` made

Training is `ddad.fit`, on the photographs that one pass over anomalib's train loader brings: split by content, so that
no photograph both trains and calibrates; resumable where `out` is given. Scores, maps and the threshold are those of
`Detector`: anomalib's normalisation, which clamps scores, and its threshold, which looks at test labels, stay out.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms.v2 import Resize

from ddad.anomaly_map import image_score
from ddad.calibration import Calibration, PositionStatistics
from ddad.config import IMAGE_SIZE, make_settings, parse_settings
from ddad.data.samples import GOOD, Dataset, Sample
from ddad.detector import Detector
from ddad.errors import ConfigError, DataError, ModelError
from ddad.features import FeatureExtractor
from ddad.fit import Estimate, fit
from ddad.images import ImageRule, read_image, resize
from ddad.training import Progress
from ddad.unet import create_scheduler, create_unet

try:
    from anomalib import LearningType
    from anomalib.data import Batch, ImageBatch, InferenceBatch
    from anomalib.metrics import AUPRO, Evaluator, F1Score
    from anomalib.metrics.auroc import _AUROC
    from anomalib.metrics.base import AnomalibMetric
    from anomalib.models.components import AnomalibModule
    from anomalib.post_processing import PostProcessor
    from anomalib.pre_processing import PreProcessor
    from anomalib.visualization import ImageVisualizer
    from lightning.pytorch.utilities import rank_zero_info
except ImportError as error:
    raise ConfigError(
        f"Expected anomalib 2.7 for this model, found none ({error}); pip install 'ddad[anomalib]'."
    ) from error

STEPS_BETWEEN_LOGS = 10


class Ddad(AnomalibModule):
    """Denoising diffusion anomaly detection (arXiv 2305.15956): learns from good photographs only.

    Args:
        preset: xs, s, base, paper or paper-s, as for `ddad train`.
        image_size: height and width are about this, a multiple of 32; by default the preset's.
        steps: training steps; or
        time_budget: seconds for all of the training. An hour where neither is given.
        false_alarms: share of good parts that may be flagged; the threshold follows from it and from good photographs.
        seed: of weights, batches and noise.
        settings: any other setting by group, such as {"scoring": {"features": "resnet18"}}; see `ddad.config`.
        out: the model folder to write, for `ddad predict` too; the same training again resumes there. By default
            `weights/ddad` in the folder of this run.
        pretrained: a finished model folder instead of training.
        pre_processor, post_processor, evaluator, visualizer: as for any model of anomalib.

    Raises:
        ConfigError: settings that cannot work.
        ModelError: `pretrained` names no calibrated model.
    """

    def __init__(
        self,
        preset: str = "xs",
        image_size: int | None = None,
        steps: int | None = None,
        time_budget: float | None = None,
        false_alarms: float = 0.01,
        seed: int = 0,
        settings: dict[str, Any] | None = None,
        out: str | None = None,
        pretrained: str | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: ImageVisualizer | bool = True,
    ) -> None:
        super().__init__(pre_processor, post_processor, evaluator, visualizer)
        self.settings = make_settings(
            preset, image_size=image_size, false_alarms=false_alarms, seed=seed, **(settings or {})
        )
        self._budget = {"steps": steps, "time_budget": time_budget}
        self._out = out
        self._pretrained = pretrained
        self._photographs: list[Path] = []
        self.model = _Network()
        if pretrained is None:
            self._expect((self.settings.image_size,) * 2)
        else:
            self._use(Detector.from_pretrained(pretrained, device="cpu", backend="torch"))

    @classmethod
    def from_pretrained(cls, folder: str | Path, **components: Any) -> "Ddad":
        """A model that `ddad train` made; `components` are pre_processor, post_processor, evaluator, visualizer."""
        return cls(pretrained=str(folder), **components)

    @property
    def detector(self) -> Detector:
        """The trained model itself: `detector.save_pretrained(FOLDER)` writes what `ddad predict` reads.

        Raises:
            ModelError: nothing is trained yet.
        """
        return self.model.trained()

    @property
    def learning_type(self) -> LearningType:
        """Only good photographs are learned from."""
        return LearningType.ONE_CLASS

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One pass over the train loader, at whose end everything is trained.

        The validation loader follows once, and only where the evaluator has validation metrics.
        """
        arguments = {"max_epochs": 1, "max_steps": -1, "num_sanity_val_steps": 0, "devices": 1, "precision": "32-true"}
        validates = self.evaluator is not None and len(self.evaluator.val_metrics) > 0
        return arguments if validates else {**arguments, "limit_val_batches": 0}

    def configure_optimizers(self) -> None:
        """None: `ddad.training` has its own."""

    # -- training ---------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Begin to collect photographs."""
        if self._pretrained is not None:
            raise ConfigError(
                f"Expected a model to train, found {self._pretrained}, which is trained; use Engine.test or "
                "Engine.predict, or leave pretrained out."
            )
        self._photographs = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Collect the batch's photographs; with the last batch train on all of them.

        Returns:
            Zero: what the U-Net's loss was goes to the loggers.
        """
        self._photographs += _checked_photographs(batch)
        if self.trainer.is_last_batch:
            self._fit()
        return torch.zeros((), device=self.device, requires_grad=True)

    def _fit(self) -> None:
        datamodule = getattr(self.trainer, "datamodule", None)
        category = getattr(datamodule, "category", "") or getattr(datamodule, "name", "") or "photographs"
        good = tuple(Sample(path, GOOD) for path in self._photographs)
        out = Path(self._out or Path(self.trainer.default_root_dir) / "weights" / "ddad")
        fit(
            Dataset(self._photographs[0].parent, category, good),
            out,
            self.settings,
            **self._budget,  # type: ignore[arg-type]
            device=str(self.device),
            on_estimate=_tell_estimate,
            on_progress=self._tell_progress,
            on_stage=rank_zero_info,
        )
        self._use(Detector.from_pretrained(out, device=self.device, backend="torch"))

    def _tell_progress(self, event: Progress) -> None:
        measured = {"train_loss": event.loss}
        if event.held_out_loss is not None:
            measured["held_out_loss"] = event.held_out_loss
            rank_zero_info(
                f"Step {event.step} of {event.steps}: loss {event.loss:.4f}, held-out loss {event.held_out_loss:.5f}."
            )
        if event.held_out_loss is not None or event.step % STEPS_BETWEEN_LOGS == 0:
            for logger in self.loggers:
                logger.log_metrics(measured, step=event.step)

    # -- use --------------------------------------------------------------------------------------------------------

    def validation_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Predictions for the evaluator's validation metrics; nothing is fitted to them."""
        return self.test_step(batch, batch_idx)

    def _use(self, detector: Detector) -> None:
        known = detector.calibration
        if known is None or known.threshold is None:
            raise ModelError(
                "Expected a calibrated model, found one without a threshold; run ddad recalibrate with good images."
            )
        if detector.warning:
            rank_zero_info(detector.warning)
        self.settings = detector.settings
        self.model = _Network(detector)
        self._expect(detector.shape)
        if isinstance(self.post_processor, FalseAlarmPostProcessor):
            self.post_processor.set_threshold(known.threshold)

    def _expect(self, shape: tuple[int, int]) -> None:
        if isinstance(self.pre_processor, PhotoPreProcessor):
            self.pre_processor.transform.size = shape

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> "PhotoPreProcessor":
        """Photographs resized as `ddad` does."""
        return PhotoPreProcessor(image_size or (IMAGE_SIZE, IMAGE_SIZE))

    def configure_post_processor(self) -> "FalseAlarmPostProcessor":
        """Verdicts at the threshold of the false-alarm budget."""
        return FalseAlarmPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """anomalib's metrics, its AUROC made safe for scores above 1, and AUPRO."""
        pixels: dict[str, Any] = {"prefix": "pixel_", "strict": False}
        return Evaluator(
            test_metrics=[
                AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
                F1Score(fields=["pred_label", "gt_label"], prefix="image_"),
                AUROC(fields=["anomaly_map", "gt_mask"], **pixels),
                F1Score(fields=["pred_mask", "gt_mask"], **pixels),
                AUPRO(fields=["anomaly_map", "gt_mask"], **pixels),
            ]
        )

    @classmethod
    def configure_visualizer(cls) -> "ThresholdVisualizer":
        """anomalib's pictures, the threshold in the middle of the colours."""
        return ThresholdVisualizer()

    def to_onnx(self, *args: Any, **kwargs: Any) -> Path:
        """Not this way: raises ConfigError, which names the other."""
        raise ConfigError(
            "Expected export type torch, found one that traces a single network call; save the model with "
            "model.detector.save_pretrained(FOLDER), and export it with ddad export FOLDER --out DIR."
        )

    to_openvino = to_onnx

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add to the weights, as plain data, what else makes the model."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"]["pretrained"] = None  # the checkpoint needs no other folder
        if self.model.detector is not None:
            checkpoint["ddad"] = _described(self.model.detector)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Make the networks that the weights, loaded next, belong to."""
        super().on_load_checkpoint(checkpoint)
        if "ddad" in checkpoint:
            self._use(_restored(checkpoint["ddad"]))


class _Network(nn.Module):
    """What anomalib calls: photographs in, scores and maps out; holds the networks, so that they move and are saved."""

    def __init__(self, detector: Detector | None = None) -> None:
        super().__init__()
        self.detector = detector
        if detector is not None:
            self.unet, self.features = detector.unet, detector.features

    def trained(self) -> Detector:
        if self.detector is None:
            raise ModelError(
                "Expected a trained model, found none; call Engine.fit or Engine.train first, give a checkpoint, or "
                "load one with Ddad.from_pretrained(MODEL)."
            )
        return self.detector

    def train(self, mode: bool = True) -> "_Network":
        """Always in evaluation mode: `ddad.fit` trains copies of its own."""
        return super().train(False)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Images (B, 3, H, W) in [0, 1], at the model's shape, to scores (B,) and maps (B, 1, H, W)."""
        detector = self.trained()
        if tuple(images.shape[-2:]) != detector.shape or images.amin() < 0 or images.amax() > 1:
            raise DataError(
                f"Expected images of {detector.shape[0]} x {detector.shape[1]} pixels with values from 0 to 1, found "
                f"{images.shape[-2]} x {images.shape[-1]} from {images.amin():.3g} to {images.amax():.3g}; leave the "
                "pre_processor as it is by default."
            )
        if detector.device != images.device:
            detector.to(images.device)
        distances, _ = detector.compare(_photographs(images))
        maps = detector.fuse(distances)
        return InferenceBatch(pred_score=image_score(maps), anomaly_map=maps[:, None])


class PhotoResize(Resize):
    """`ddad.images.resize` of 8-bit photographs, which anomalib holds as floats in [0, 1], and of masks.

    A `Resize`, so that anomalib does it in the loader's processes, where photographs differ in size.
    """

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """(..., C, H, W) images in [0, 1], or (..., H, W) masks, at `size`; once more changes nothing."""
        size = tuple(self.size)
        if tuple(inpt.shape[-2:]) == size:
            return inpt
        if isinstance(inpt, tv_tensors.Mask):
            masks = inpt.reshape(-1, *inpt.shape[-2:]).float().cpu().numpy()
            resized = torch.from_numpy(np.stack([resize(mask, size) >= 0.5 for mask in masks]))
        else:
            photographs = _photographs(inpt.reshape(-1, *inpt.shape[-3:]))
            stacked = torch.from_numpy(np.stack([resize(photograph, size) for photograph in photographs]))
            resized = stacked.permute(0, 3, 1, 2).to(inpt.dtype) / 255
        resized = resized.to(inpt.device, inpt.dtype).reshape(*inpt.shape[:-2], *size)
        return tv_tensors.wrap(resized, like=inpt) if isinstance(inpt, tv_tensors.TVTensor) else resized


class PhotoPreProcessor(PreProcessor):
    """Resizes photographs to the model's (height, width), and nothing else."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.transform = PhotoResize(shape)

    def forward(self, batch: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] at the model's shape."""
        return self.transform(batch)

    def checkpoint_config(self) -> dict[str, Any]:
        """The shape."""
        return {"shape": list(self.transform.size)}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Set the shape; the loaders hold this very transform."""
        self.transform.size = tuple(config["shape"])


class FalseAlarmPostProcessor(PostProcessor):
    """Verdicts at the threshold that the false-alarm budget gives, for images and pixels alike.

    Validation images, with their labels, change nothing.

    Args:
        enable_normalization: scores and maps become x / (x + threshold): in [0, 1), in the same order, 0.5 at the
            threshold, as other tools of anomalib like them. By default they stay what they are.
    """

    def __init__(self, enable_normalization: bool = False) -> None:
        super().__init__(enable_normalization=enable_normalization)

    def set_threshold(self, threshold: float) -> None:
        """Scores above it are anomalous, and pixels of the map, since the score is the map's maximum."""
        self._image_threshold.fill_(threshold)
        self._pixel_threshold.fill_(threshold)

    @staticmethod
    def _normalize(preds: Tensor, norm_min: Tensor, norm_max: Tensor, threshold: Tensor) -> Tensor:
        return preds / (preds + threshold)

    @property
    def normalized_image_threshold(self) -> Tensor:
        """What scores are compared with, as they come out."""
        return torch.full_like(self.image_threshold, 0.5) if self.enable_normalization else self.image_threshold

    @property
    def normalized_pixel_threshold(self) -> Tensor:
        """What maps are compared with, as they come out."""
        return torch.full_like(self.pixel_threshold, 0.5) if self.enable_normalization else self.pixel_threshold

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        """No statistics."""

    def on_validation_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """No threshold from labels."""


class _AnyRangeAUROC(_AUROC):
    def update(self, preds: Tensor, target: Tensor) -> None:
        # Where a batch has scores above 1, and only there, torchmetrics puts a sigmoid around them: orders get mixed.
        super().update(preds / (1 + preds), target)


class AUROC(AnomalibMetric, _AnyRangeAUROC):
    """anomalib's AUROC, right for any scores from 0 up."""


class ThresholdVisualizer(ImageVisualizer):
    """anomalib draws maps of 0 to 1: these are map / (map + threshold), so that the threshold is in the middle."""

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: ImageBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Draw the batch; for predictions, too."""
        verdicts = pl_module.post_processor
        if isinstance(verdicts, FalseAlarmPostProcessor) and not verdicts.enable_normalization:
            limit = verdicts.pixel_threshold
            batch = batch.update(in_place=False, anomaly_map=batch.anomaly_map / (batch.anomaly_map + limit))
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)


def _photographs(images: Tensor) -> list[np.ndarray]:
    """uint8 (H, W, 3) of images (B, 3, H, W) in [0, 1]."""
    return list((images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy())


def _checked_photographs(batch: Batch) -> list[Path]:
    """The files of a batch of good photographs; anomalib must have read each as `ddad` does."""
    if not batch.image_path:
        raise DataError("Expected the paths of photographs in each batch, found none; use a data set of anomalib.")
    if batch.gt_label is not None and batch.gt_label.any():
        raise DataError("Expected good photographs only to train on, found one labelled anomalous; take it out.")
    for path, seen in zip(batch.image_path, _photographs(batch.image), strict=True):
        if not np.array_equal(seen, read_image(path, seen.shape[:2])):
            raise DataError(
                f"Expected the pixels of {path} as its file shows them, found others: anomalib changes photographs "
                "that are of 16 bit, transparent or turned by EXIF, and augmentations do; save it upright in 8 bit, "
                "and augment by settings={'training': {'augment': ['hflip']}}."
            )
    return [Path(path) for path in batch.image_path]


def _tell_estimate(estimate: Estimate) -> None:
    minutes = (estimate.train_seconds + estimate.adapt_seconds + estimate.calibrate_seconds) / 60
    rank_zero_info(f"{estimate.steps} training steps; with adaptation and calibration about {minutes:.0f} minutes.")


def _described(detector: Detector) -> dict[str, Any]:
    """All but the weights, in plain data and tensors."""
    known = detector.calibration
    return {
        "settings": detector.settings.model_dump(mode="json"),
        "shape": list(detector.shape),
        "calibration": known and known.model_dump(mode="json"),
        "statistics": detector.statistics and detector.statistics._asdict(),
        "image_rule": asdict(detector.image_rule),
        "record": detector.record,
        "precision": detector.precision,
        "features": detector.features.config,
    }


def _restored(described: dict[str, Any]) -> Detector:
    """The detector that `_described` describes, with fresh weights."""
    settings = parse_settings(described["settings"])
    detector = Detector(
        create_unet(settings.network.architecture),
        create_scheduler(settings.network.prediction_type),
        FeatureExtractor.from_config(described["features"]),
        settings,
        tuple(described["shape"]),
        calibration=Calibration.model_validate(described["calibration"]),
        statistics=described["statistics"] and PositionStatistics(**described["statistics"]),
        image_rule=ImageRule(**described["image_rule"]),
        record=described["record"],
        device="cpu",
    )
    detector.precision = described["precision"]
    return detector
