"""The detector: a trained model that is given photographs and returns what is wrong with them."""

import hashlib
import json
import math
import platform
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddad import __version__, hub
from ddad.anomaly_map import (
    centre,
    feature_distance,
    fuse_batch_max,
    image_score,
    pixel_distance,
    smooth,
)
from ddad.backends import (
    WITH_GRAPHS,
    Networks,
    check_backend,
    compiled,
    find_graphs,
    make_graphs,
)
from ddad.calibration import (
    Calibration,
    PositionStatistics,
    Ranking,
    Units,
    calibrate,
    cross_scores,
    fit_units,
    weighted,
)
from ddad.card import model_card
from ddad.config import Backend, Precision, Settings, parse_settings
from ddad.errors import ConfigError, DataError, ModelError
from ddad.features import FeatureExtractor
from ddad.files import atomic_folder, check_place, sha256, write_json, write_text
from ddad.images import ImageRule
from ddad.prediction import ImageSource, Inspector, Photo, PhotoStatistics, Prediction, photo_statistics, regions
from ddad.sampling import Noise, match_level, reconstruct, to_pixels, to_unit
from ddad.streaming import chunks, in_batches
from ddad.tiling import Tiles, Tiling
from ddad.unet import (
    choose_device,
    clean_from,
    for_category,
    load_scheduler,
    load_unet,
    predict,
    set_attention_heads,
)

if TYPE_CHECKING:
    from diffusers import DDIMScheduler

FORMAT_VERSION = 1
RECORD = "detector.json"
FAMILY = "family.json"
"""Marks the folder of one network for many categories (`ddad.family`)."""
OF_THE_FOLDER = ("format_version", "versions", "files")
"""What of the record is written anew with each folder."""
_ARGUMENTS = ("settings", "shape", "calibration", "image_rule")
CARD = "README.md"
STATISTICS = "statistics.safetensors"
PARTS = ("unet", "scheduler", "features", STATISTICS)
STUDENT = "fast"
"""Folder of the one-call student inside a model: a model of its own."""
FOLDS = 10
"""Of a cross-fitted calibration: more would cost nothing and change little."""
MOST_TILES = 8
"""Tiles that go through the networks together, or as many as there are images: what they need of memory is bounded."""
PACKAGES = ("torch", "diffusers", "timm", "torchmetrics", "numpy", "scipy", "pillow")


class Detector(Inspector):
    """Photographs in, predictions out.

    `unet`, `scheduler`, `features` and `calibration` are the parts; each can be used alone.
    """

    unet: Any
    scheduler: "DDIMScheduler"
    features: Any

    def __init__(
        self,
        unet: Any,
        scheduler: "DDIMScheduler",
        features: Any,
        settings: Settings,
        shape: tuple[int, int],
        *,
        calibration: Calibration | None = None,
        statistics: PositionStatistics | None = None,
        image_rule: ImageRule | None = None,
        record: dict[str, Any] | None = None,
        device: str | torch.device | None = None,
        label: int | None = None,
    ) -> None:
        """
        Args:
            shape: (height, width) that photographs are resized to; of the canvas, where there are tiles.
            label: the number of this detector's category, where the network is one for many.
        """
        self._know(settings, shape, calibration, statistics, image_rule or ImageRule(), record or {}, label)
        if settings.network.attention_heads:
            set_attention_heads(unet, settings.network.attention_heads)
        self.unet, self.scheduler, self.features = unet.eval(), scheduler, features.eval()
        self._networks = Networks(
            self._denoise,
            self._extract,
            scheduler.alphas_cumprod,
            scheduler.config.prediction_type,
        )
        self.to(choose_device(device))

    # Methods, so that other features can be set and a copy uses its own networks.
    def _denoise(self, sample: Tensor, timesteps: Tensor) -> Tensor:
        labels = None if self.label is None else torch.full(sample.shape[:1], self.label, device=sample.device)
        return predict(self.unet, sample, timesteps, labels)

    def _extract(self, images: Tensor) -> Sequence[Tensor]:
        return self.features(images)

    def _know(
        self,
        settings: Settings,
        shape: tuple[int, int],
        calibration: Calibration | None,
        statistics: PositionStatistics | None,
        image_rule: ImageRule,
        record: dict[str, Any],
        label: int | None = None,
    ) -> None:
        self.settings = settings
        self.shape = shape
        self.tiling = Tiling.of(shape, settings.tiles)
        self.calibration = calibration
        self.statistics = statistics
        self.image_rule = image_rule
        self.record = record
        """What is known of the training: data fingerprint, steps, measured numbers."""
        self.label = label
        self.backend: Backend = "torch"
        self.precision: Precision = "fp32"
        """Of the U-Net: `fp32`, or `bf16` for speed; scores then move, and want a calibration of their own."""
        self._graphs_of: Path | None = None

    def __getattr__(self, name: str) -> Any:
        """The parts of a detector that runs from graphs are loaded when somebody asks for them, to save or to adapt."""
        folder = self.__dict__.get("_graphs_of")
        if folder is None or name not in ("unet", "scheduler", "features"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        self.unet, self.scheduler, self.features = load_networks(folder, self.settings)
        return self.__dict__[name]

    def to(self, device: str | torch.device) -> "Detector":
        """Move to a device.

        Raises:
            ConfigError: graphs run on the CPU only.
        """
        self.device = torch.device(device)
        if self._graphs_of:
            if self.device.type != "cpu":
                raise ConfigError(f"Expected device cpu for a detector that runs from graphs, found {device}.")
            return self
        self.unet.to(self.device)
        if self.device.type == "cuda":
            self.unet.to(memory_format=torch.channels_last)
        self.features.to(self.device)
        self._networks = self._networks._replace(alphas_cumprod=self.scheduler.alphas_cumprod.to(self.device))
        return self

    # -- the method -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reconstruct(
        self,
        images: Sequence[np.ndarray],
        *,
        start: Sequence[np.ndarray] | None = None,
        conditioning_weight: float | None = None,
        draw: int = 0,
    ) -> Tensor:
        """Reconstructions (B, 3, H, W) of images (uint8, model shape); noise is seeded by their pixels.

        Args:
            start: other images that are rebuilt towards `images`: the pairs of domain adaptation.
            conditioning_weight: w, instead of the settings'.
            draw: another number, other noise; inspection uses 0.
        """
        if conditioning_weight is None:
            conditioning_weight = self.settings.sampling.conditioning_weight
        tiles = Tiles(images, self.tiling)
        starts = None if start is None else Tiles(start, self.tiling)
        rebuilt = [
            self._reconstruct_tiles(
                [tiles[i] for i in part],
                None if starts is None else [starts[i] for i in part],
                conditioning_weight,
                draw,
            )
            for part in chunks(range(len(tiles)), self._tiles_together(len(images)))
        ]
        return self.tiling.blend(torch.cat(rebuilt))

    def _tiles_together(self, images: int) -> int:
        return max(images, MOST_TILES)

    def _reconstruct_tiles(
        self,
        images: Sequence[np.ndarray],
        start: Sequence[np.ndarray] | None,
        conditioning_weight: float,
        draw: int,
    ) -> Tensor:
        generators = [_generator(image, draw) for image in images]

        def noise(like: Tensor) -> Tensor:
            draws = [torch.randn(like.shape[1:], generator=generator) for generator in generators]
            return torch.stack(draws).to(like)

        return self.rebuild(
            to_unit(images, self.device),
            noise,
            start=None if start is None else to_unit(start, self.device),
            conditioning_weight=conditioning_weight,
        )

    def rebuild(
        self, target: Tensor, noise: Noise | None = None, *, start: Tensor | None = None, conditioning_weight: float
    ) -> Tensor:
        """Reconstructions of tiles (B, 3, h, w) in [-1, 1], as tensors; arguments as of `sampling.reconstruct`."""
        sampling, networks = self.settings.sampling, self._networks

        def denoiser(sample: Tensor, timestep: int) -> Tensor:
            timesteps = torch.full((sample.shape[0],), timestep, device=sample.device)
            # None at all in fp32: it would hide from an exported graph which module a node belongs to.
            half = torch.autocast(self.device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()
            with half:
                output = networks.denoise(sample, timesteps).float()
            return clean_from(output, sample, networks.alphas_cumprod[timestep], networks.prediction_type)

        reconstruction = reconstruct(
            denoiser,
            target,
            networks.alphas_cumprod,
            sampling.timesteps,
            start_timestep=sampling.start_timestep,
            conditioning_weight=conditioning_weight,
            clamp=sampling.clamp,
            eta=sampling.eta,
            noise=noise,
            start_noise=sampling.start_noise == "seeded",
            start=start,
        )
        return match_level(reconstruction, target) if sampling.match_level else reconstruction

    @torch.no_grad()
    def distances(self, images: Sequence[np.ndarray], reconstruction: Tensor) -> Tensor:
        """How far images (uint8, model shape) are from their reconstructions (B, 3, H, W).

        Returns:
            The pixel distance and one feature distance a layer, not smoothed, (B, K, H, W).
        """
        target = to_unit(images, self.device)
        of_pixels = pixel_distance(target, reconstruction)[:, None]
        together = self._tiles_together(len(images))
        pairs = zip(*(self.tiling.cut(one).split(together) for one in (target, reconstruction)), strict=True)
        of_features = self.tiling.blend(torch.cat([self.feature_distances(*pair) for pair in pairs]))
        return torch.cat([of_pixels, of_features], dim=1)

    def feature_distances(self, target: Tensor, reconstruction: Tensor) -> Tensor:
        """One distance a layer of tiles (B, 3, h, w) in [-1, 1] and their reconstructions: (B, layers, h, w)."""
        scoring = self.settings.scoring
        count = target.shape[0]
        distances = [
            feature_distance(
                layer[:count],
                layer[count:],
                self.tiling.tile,
                zero_padding=scoring.pool_padding == "zero",
                align_corners=scoring.align_corners,
            )
            for layer in self._networks.features(torch.cat([target, reconstruction]))
        ]
        return torch.stack(distances, dim=1)

    def smooth(self, maps: Tensor) -> Tensor:
        """Maps (..., H, W) smoothed as the settings say."""
        return smooth(maps.flatten(0, -3), self.sigma).view(maps.shape)

    def compare(self, images: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
        """Smoothed distances (B, K, H, W) of images (uint8, model shape), and their reconstructions (B, 3, H, W)."""
        reconstruction = self.reconstruct(images)
        return self.smooth(self.distances(images, reconstruction)), reconstruction

    def fuse(self, distances: Tensor, units: Units | None = None) -> Tensor:
        """D (B, H, W) ≥ 0 from smoothed distances (B, K, H, W): 1 is what a good part's peak typically is.

        `units` are the detector's own by default. Without calibration distances have none, and are added as they are.
        """
        return self._only_centre(weighted(distances, units or self._units(distances.shape[1]), self.weights))

    def _units(self, kinds: int) -> Units:
        return Units(self.statistics, self.calibration.scales if self.calibration else (1.0,) * kinds)

    def _only_centre(self, maps: Tensor) -> Tensor:
        if self.settings.scoring.crop is None:
            return maps
        rows, columns = centre(self.shape[0], self.shape[1], self.settings.scoring.crop)
        kept = torch.zeros_like(maps)
        kept[..., rows, columns] = maps[..., rows, columns]
        return kept

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the pixel distance and of each feature layer."""
        return (self.settings.scoring.pixel_weight, *self.settings.scoring.layer_weights)

    @property
    def sigma(self) -> float:
        """Smoothing in pixels of this model: σ is stated for a tile of 256 x 256."""
        return self.settings.scoring.smoothing * math.prod(self.tiling.tile) ** 0.5 / 256

    # -- calibration ------------------------------------------------------------------------------------------------

    def calibrate(self, select: Iterable[np.ndarray], calibration: Iterable[np.ndarray], batch_size: int = 4) -> None:
        """Set `calibration` from good images (uint8, model shape) that were not trained on.

        Args:
            select: images that give the units of the maps.
            calibration: other images that give the distribution of scores and the threshold.
        """
        seen: list[PhotoStatistics] = []
        units = self._use_units(self._compared(_looked_at(select, seen), batch_size))
        scores = self.score(_looked_at(calibration, seen), batch_size)
        self._calibrated(units.scales, scores, seen)

    def calibrate_across(self, images: Iterable[np.ndarray], folds: int = FOLDS, batch_size: int = 4) -> None:
        """Set `calibration` from so few good images that each must both give units and rank (cross-conformal).

        Each image is scored in units that the other folds give, a new one in units that all give. So promise and bound
        hold approximately, which tests/test_calibration.py simulates; exact they are for two sets only. (Vovk's
        cross-conformal predictors, 2015, rank a new image in each fold's units, and guarantee twice the rate.)

        Args:
            images: uint8, model shape; nothing may have been chosen by them. At least two.
            folds: at most so many; every image its own fold where there are fewer images.
        """
        seen: list[PhotoStatistics] = []
        distances = self._compared(_looked_at(images, seen), batch_size)
        folds = min(folds, len(distances))
        scores = cross_scores(
            distances, folds, self._by_position, lambda some, units: image_score(self.fuse(some, units))
        )
        units = self._use_units(distances)
        self._calibrated(units.scales, scores, seen, folds)

    def add_to_calibration(self, images: Iterable[np.ndarray], batch_size: int = 4) -> None:
        """Add the scores of more good images (uint8, model shape) to those there are; units stay.

        Raises:
            ConfigError: there is no calibration to add to, or one in another precision.
        """
        if self.calibration is None or not self.calibration.scores:
            raise ConfigError("Expected a calibrated model to add scores to, found none; recalibrate without --merge.")
        if not self.calibration.holds(self.backend, self.precision):
            raise ConfigError(
                f"Expected scores of backend {self.backend} in {self.precision} to add to, found those of backend "
                f"{self.calibration.backend} in {self.calibration.precision}; recalibrate without --merge."
            )
        seen = [*self.calibration.photographs]
        scores = [*self.calibration.scores, *self.score(_looked_at(images, seen), batch_size)]
        self._calibrated(self.calibration.scales, scores, seen, self.calibration.folds)

    def _calibrated(
        self,
        scales: Sequence[float],
        scores: Sequence[float],
        seen: Sequence[PhotoStatistics],
        folds: int | None = None,
    ) -> None:
        ranked = calibrate(scales, scores, self.settings.false_alarms, folds=folds, photographs=seen)
        self.calibration = ranked.model_copy(update={"backend": self.backend, "precision": self.precision})

    @property
    def is_calibrated(self) -> bool:
        """Whether 1 is what a good part's peak typically is; else maps have no unit."""
        return self.calibration is not None

    @property
    def warning(self) -> str | None:
        """A sentence where the model was calibrated in another precision than it runs in: the promise then lapses."""
        known = self.calibration
        if known is None or known.threshold is None or known.holds(self.backend, self.precision):
            return None
        return (
            f"Expected the calibration's backend {known.backend} in {known.precision}, found {self.backend} in "
            f"{self.precision}: some verdicts differ, and the false-alarm rate is not promised; calibrate for "
            f"this use: ddad recalibrate MODEL GOOD_FOLDER --backend {self.backend} --precision {self.precision}"
        )

    def score(self, images: Iterable[np.ndarray], batch_size: int = 4) -> list[float]:
        """Image scores of images (uint8, model shape), without pictures and verdicts."""
        return [
            score
            for chunk in chunks(images, batch_size)
            for score in image_score(self.fuse(self.compare(chunk)[0])).tolist()
        ]

    @property
    def _by_position(self) -> bool:
        return self.settings.scoring.position == "standardise"

    def _compared(self, images: Iterable[np.ndarray], batch_size: int) -> Tensor:
        return torch.cat([self.compare(chunk)[0].cpu() for chunk in chunks(images, batch_size)])

    def _use_units(self, distances: Tensor) -> Units:
        units = fit_units(distances, self._by_position)
        self.statistics, self.calibration = units.statistics, Calibration(scales=units.scales)
        return units

    # -- use --------------------------------------------------------------------------------------------------------

    def stream(
        self, images: Iterable[ImageSource], batch_size: int = 4, workers: int = 1, *, batch_max: bool = False
    ) -> Iterator[tuple[ImageSource, Prediction | DataError]]:
        """Inspect any number of photographs in order, a few in memory at a time.

        Yields (source, prediction), or (source, error) for one that cannot be read. `workers` threads decode ahead of
        the network. `batch_max` fuses as published, for comparison only: scores then depend on the batch, and there is
        no verdict.
        """
        return in_batches(
            images, self._read, lambda photos: self.predict_photos(photos, batch_max), batch_size, workers
        )

    def predict_photos(self, batch: Sequence[Photo], batch_max: bool = False) -> list[Prediction]:
        """Inspect photographs that are read already, all in one batch; `batch_max` as in `stream`."""
        if not batch:
            return []
        images = [photo.image for photo in batch]
        reconstructions = self.reconstruct(images)
        distances = self.distances(images, reconstructions)
        if batch_max:
            # A cosine may be above 1 by rounding.
            maps = self._only_centre(self.smooth(fuse_batch_max(distances.unbind(dim=1), self.weights)).clamp(min=0))
        else:
            maps = self.fuse(self.smooth(distances))
        scores = image_score(maps).tolist()
        drawn = to_pixels(reconstructions).cpu().numpy()
        ranking = None if batch_max or self.calibration is None else Ranking(self.calibration)
        limit = ranking.calibration.threshold if ranking else None
        results = []
        for photo, anomaly_map, score, reconstruction in zip(
            batch, maps.float().cpu().numpy(), scores, drawn, strict=True
        ):
            results.append(
                Prediction(
                    path=photo.path,
                    anomaly_score=score,
                    p_value=ranking.p_value(score) if ranking else None,
                    is_anomalous=ranking.is_anomalous(score) if ranking else None,
                    threshold=limit,
                    anomaly_map=anomaly_map,
                    reconstruction=reconstruction,
                    image=photo.image,
                    regions=() if limit is None else regions(anomaly_map, limit, photo.size),
                    category=None if self.label is None else self.record.get("category"),
                )
            )
        return results

    # -- files ------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self,
        folder: str | Path,
        extra: Mapping[str, Path] | None = None,
        student: "Detector | None" = None,
    ) -> None:
        """Write the model folder: everything the model needs, without pickle; replaces an older model of this name.

        One category of a network for many becomes a model of its own.

        Args:
            folder: where to; written under a temporary name first, then renamed.
            extra: other files to copy into it, by name.
            student: the model's one-call student, written into it.

        Raises:
            ConfigError: the folder is there and holds something else.
        """
        folder = Path(folder)
        check_place(folder, RECORD, "model")
        with atomic_folder(folder) as temporary:
            record = self._write(temporary)
            for name, file in (extra or {}).items():
                shutil.copyfile(file, temporary / name)
            learned = student._write(temporary / STUDENT) if student else None
            write_text(temporary / CARD, model_card(record, learned))

    def push_to_hub(
        self,
        name: str,
        *,
        metrics: Mapping[str, Any] | None = None,
        student: "Detector | None" = None,
        private: bool = True,
        revision: str | None = None,
        message: str | None = None,
        token: str | None = None,
    ) -> str:
        """Upload the model to the Hugging Face hub, as `save_pretrained` writes it; arguments as of `push_folder`."""
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "model"
            self.save_pretrained(folder, student=student)
            return push_folder(
                folder, name, metrics=metrics, private=private, revision=revision, message=message, token=token
            )

    def _write(self, folder: Path) -> dict[str, Any]:
        unet = self.unet if self.label is None else for_category(self.unet, self.label)
        save_networks(unet, self.scheduler, self.features, folder)
        return self.save_record(folder)

    def save_record(self, folder: Path) -> dict[str, Any]:
        """Write all but the networks into a folder that is there; returns the contents of `detector.json`."""
        if self.statistics:
            save_file(self.statistics._asdict(), folder / STATISTICS)
        record = {
            "format_version": FORMAT_VERSION,
            "shape": self.shape,
            "settings": self.settings.model_dump(mode="json"),
            "calibration": self.calibration and self.calibration.model_dump(mode="json"),
            "image_rule": asdict(self.image_rule),
            "versions": package_versions(),
            "files": _file_hashes(folder),
            **self.record,
        }
        write_json(folder / RECORD, record)
        return record

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        device: str | torch.device | None = None,
        *,
        revision: str | None = None,
        fast: bool = False,
        backend: Backend | None = None,
        precision: Precision | None = None,
    ) -> "Detector":
        """Load a model folder, or a model of the Hugging Face hub.

        Args:
            model: the folder; or `owner/name` on the hub, whose files are fetched once and checked against the hashes
                in `detector.json`. Only weights and settings are fetched, never code.
            revision: a branch, a tag or a commit on the hub; `owner/name@revision` says the same.
            fast: the one-call student in it, made by `ddad distill`, instead of the model itself.
            backend: what computes the networks; all but `torch` take up to a minute when first used with a model.
            precision: of the networks, as `Detector.precision`. By default both are as in calibration where that was in
                bf16, else `torch` and fp32.

        Raises:
            ModelError: the model is missing, incomplete or of a newer format, or has no student.
            ConfigError: the backend is not installed, or cannot do what is asked.
        """
        folder = model_folder(model, revision)
        record = read_record(folder)
        if fast:
            folder = student_folder(folder)
            record = read_record(folder)
        settings, shape, known = load_record(folder, record)
        backend, precision = _computed(known["calibration"], backend, precision)
        check_backend(backend, precision, device)
        if backend in WITH_GRAPHS:
            tile = Tiling.of(shape, settings.tiles).tile
            try:
                graphs = find_graphs(folder, tile)
            except OSError as error:
                raise _incomplete(folder, error) from None
            if graphs is None:
                detector = cls(*load_networks(folder, settings), settings, shape, **known, device="cpu")
                graphs = make_graphs(folder, tile, detector.unet, detector.features, *detector._networks[2:])
            detector = cls.__new__(cls)
            detector._know(settings, shape, **known)
            detector._networks = graphs.load(backend, precision)
            detector.backend, detector.precision = backend, precision
            detector._graphs_of, detector.device = folder, torch.device("cpu")
            return detector
        detector = cls(*load_networks(folder, settings), settings, shape, **known, device=device)
        if precision == "bf16":
            # Faster on CPUs, too; but there GroupNorm then rounds a thousand times more coarsely, so not in fp32.
            detector.unet.to(memory_format=torch.channels_last)
        detector.backend, detector.precision = backend, precision
        if backend == "compile":
            denoise, features = compiled(detector.unet, detector.features)
            detector._networks = detector._networks._replace(denoise=denoise, features=features)
        return detector


def load_record(folder: Path, record: dict[str, Any]) -> tuple[Settings, tuple[int, int], dict[str, Any]]:
    """What `Detector.save_record` wrote, of which `record` is read already.

    Returns:
        Settings, shape, and further arguments of a `Detector`.

    Raises:
        ModelError: there is something else.
    """
    calibrated = record.get("calibration") is not None
    by_position = record.get("settings", {}).get("scoring", {}).get("position") == "standardise"
    try:
        stored = load_file(folder / STATISTICS) if calibrated and by_position else None
    except (OSError, SafetensorError) as error:
        raise _incomplete(folder, error) from None
    try:
        calibration = record["calibration"]
        known: dict[str, Any] = {
            "calibration": calibration and Calibration.model_validate(calibration),
            "statistics": PositionStatistics(**stored) if stored else None,
            "image_rule": ImageRule(**record["image_rule"]),
            "record": {key: value for key, value in record.items() if key not in (*OF_THE_FOLDER, *_ARGUMENTS)},
        }
        height, width = record["shape"]
        return parse_settings(record["settings"]), (height, width), known
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise ModelError(
            f"Expected settings this version understands in {folder / RECORD}, found others "
            f"({str(error).splitlines()[0]}); train the model again."
        ) from None


def save_networks(unet: Any, scheduler: "DDIMScheduler", features: Any, folder: Path) -> None:
    """Write the networks, and the noise schedule, of a model folder."""
    unet.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    features.save(folder / "features")


def _computed(
    calibration: Calibration | None, backend: Backend | None, precision: Precision | None
) -> tuple[Backend, Precision]:
    """Backend and precision as asked for; where that leaves a choice, as in a calibration in bf16."""
    known = calibration or Calibration(scales=())
    if known.precision == "bf16" and backend in (None, known.backend) and precision in (None, "bf16"):
        return known.backend, known.precision
    return backend or "torch", precision or "fp32"


def load_networks(folder: Path, settings: Settings) -> tuple[Any, "DDIMScheduler", FeatureExtractor]:
    """U-Net, scheduler and features of a model folder; raises ModelError where they are not there."""
    around = folder.absolute().parent.parent
    if not (folder / "unet").exists() and is_family(around):
        raise ModelError(
            f"Expected a model folder, found one category of the family in {around}; name that folder, and "
            f"--category {folder.name}."
        )
    try:
        unet, scheduler = load_unet(folder / "unet"), load_scheduler(folder / "scheduler")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _incomplete(folder, error) from None
    if settings.network.attention_heads:
        set_attention_heads(unet, settings.network.attention_heads)
    return unet.eval(), scheduler, FeatureExtractor.load(folder / "features").eval()


def _incomplete(folder: Path, error: Exception) -> ModelError:
    return ModelError(
        f"Expected the network, its scheduler and statistics in {folder}, found something else "
        f"({str(error).splitlines()[0]}); copy or train the model again."
    )


def is_family(folder: str | Path) -> bool:
    """Whether the folder holds a family (`ddad.family`), rather than a model of one category."""
    return (Path(folder) / FAMILY).is_file()


def read_record(folder: Path) -> dict[str, Any]:
    """The contents of `detector.json`; raises ModelError where there is no readable one."""
    path = folder / RECORD
    if is_family(folder):
        raise ModelError(
            f"Expected a model of one category, found a family of many in {folder}; ddad predict, evaluate, score and "
            "info take it, and ddad.family.Family, whose detector(NAME).save_pretrained(FOLDER) makes a model of one."
        )
    if not path.is_file():
        raise ModelError(
            f"Expected a model folder with a detector.json, found none at {folder}; "
            "name the folder that `ddad train --out` wrote."
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record["format_version"]
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"Expected a complete {path}, found a damaged one; copy or train the model again.") from None
    if found != FORMAT_VERSION:
        raise ModelError(f"Expected model format {FORMAT_VERSION} in {path}, found {found}; update ddad.")
    return record


def model_folder(model: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: the one that `model` names, or the one it is fetched to, as `Detector.from_pretrained`.

    Raises:
        ModelError: the hub has no such model, or its files are not those that it records.
        ConfigError: a revision of a folder.
    """
    named = hub.parse_name(model, revision)
    if named is None:
        return Path(model)
    folder = hub.download(*named)
    for part in (folder, folder / STUDENT):
        if (part / RECORD).is_file() and read_record(part).get("files"):
            check_files(part)
    return folder


def push_folder(
    folder: str | Path,
    name: str,
    *,
    metrics: Mapping[str, Any] | None = None,
    private: bool = True,
    revision: str | None = None,
    message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a model folder to the Hugging Face hub, in one commit; an older model there is replaced.

    What is uploaded: weights, settings, calibration scores, and of the good photographs their hashes, brightness, focus
    and framing. No photograph is; but the weights know what the product looks like. The card is written anew.

    Args:
        folder: as `Detector.save_pretrained` writes it.
        name: `owner/name`.
        metrics: the contents of the `metrics.json` of `ddad evaluate`, for the card.
        private: whether a repository that is not there yet becomes private; one that is there stays as it is.
        revision: a branch, made where it is not there yet.
        message: of the commit.
        token: of the hub; by default that of `hf auth login`, or HF_TOKEN.

    Returns:
        The hash of the commit, which can be given as a revision.

    Raises:
        ModelError: there is no model, or a file is not the one that it records.
        ConfigError: metrics of another model, or a repository that cannot be written.
    """
    folder = Path(folder)
    record = read_record(folder)
    student = read_record(folder / STUDENT) if (folder / STUDENT / RECORD).is_file() else None
    for part, known in ((folder, record), (folder / STUDENT, student)):
        if known and known.get("files"):
            check_files(part)
    if metrics:
        same = parse_settings(metrics["settings"]) == parse_settings(record["settings"])
        if not same or metrics["threshold"] not in (None, (record["calibration"] or {}).get("threshold")):
            raise ConfigError(
                f"Expected the metrics of the model in {folder} itself, found those of another one, of its student, or "
                "from before it was calibrated again; run ddad evaluate on it."
            )
    files: dict[str, Path | bytes] = {file: folder / file for file in hub.FILES if (folder / file).is_file()}
    files[CARD] = model_card(record, student, metrics, name).encode()
    return hub.upload(name, files, private=private, revision=revision, message=message, token=token)


def _file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of what the model computes with, by the file's place in its folder."""
    files = [
        file for part in ("unet", "scheduler", "features") for file in (folder / part).rglob("*") if file.is_file()
    ]
    files += folder.glob(STATISTICS)
    return {file.relative_to(folder).as_posix(): sha256(file) for file in sorted(files)}


def student_folder(folder: Path) -> Path:
    """The folder of a model's one-call student; raises ModelError where it has none."""
    if not (folder / STUDENT / RECORD).is_file():
        raise ModelError(
            f"Expected a one-call student in {folder}, found none; make it with ddad distill {folder} DATA, or leave "
            "out --fast."
        )
    return folder / STUDENT


def check_files(folder: str | Path, fast: bool = False) -> str:
    """Check a model's files, or with `fast` those of its student, against the hashes in its `detector.json`.

    Returns:
        The SHA-256 of `detector.json`, which stands for all of them.

    Raises:
        ModelError: there is no model, it has no hashes, or a file is another one, missing or too many.
    """
    folder = Path(folder)
    if fast:
        folder = student_folder(folder)
    expected, found = read_record(folder).get("files"), _file_hashes(folder)
    if not expected:
        raise ModelError(
            f"Expected the hashes of its files in {folder / RECORD}, found none; ddad recalibrate writes them."
        )
    if wrong := sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name)):
        raise ModelError(
            f"Expected the files that {folder / RECORD} records, found that {wrong[0]} differs; copy the model again."
        )
    return sha256(folder / RECORD)


def package_versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    packages = {package: version(package) for package in PACKAGES}
    return {"python": platform.python_version(), "ddad": __version__, **packages}


def _generator(image: np.ndarray, draw: int) -> torch.Generator:
    """Noise that depends on the pixels and the number of the draw alone: the same image, the same noise."""
    digest = hashlib.sha256(image.tobytes()).digest()
    return torch.Generator().manual_seed((int.from_bytes(digest[:7], "little") + draw) % 2**63)


def _looked_at(images: Iterable[np.ndarray], seen: list[PhotoStatistics]) -> Iterator[np.ndarray]:
    """The images as they come, with what each looks like added to `seen`."""
    for image in images:
        seen.append(photo_statistics(image))
        yield image
