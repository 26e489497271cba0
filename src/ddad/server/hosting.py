"""The models of a server: loaded, checked, swapped for new versions without a pause, and set back."""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from ddad.calibration import Calibration
from ddad.config import Backend, Precision
from ddad.detector import Detector, check_files
from ddad.drift import Alarm, DriftMonitor
from ddad.errors import ConfigError, DataError, ModelError
from ddad.prediction import Photo, PhotoStatistics, Prediction
from ddad.server.batching import Batcher, BatchSettings

logger = logging.getLogger(__name__)
KEPT_EVERY = 10
"""Photographs between two states of a drift monitor that are worth keeping."""


@dataclass(frozen=True)
class LoadSettings:
    """How the models of a server are computed, as in `Detector.from_pretrained`."""

    fast: bool = False
    backend: Backend | None = None
    precision: Precision | None = None
    device: str | None = None


@dataclass(frozen=True)
class Effect:
    """What a false-alarm budget means for a model, before it is applied."""

    false_alarms: float
    """The rate asked for."""
    threshold: float
    calibration_images: int
    flagged: int
    """Calibration images, all good, that score above the threshold."""
    promised_rate: float
    rate_bound: float
    promise: str


class Version:
    """One loaded model folder: its detector, its batches, its drift.

    Args:
        name: of the model.
        digest: SHA-256 that stands for the folder's contents.
    """

    def __init__(self, name: str, digest: str, detector: Detector, batcher: "Batcher[Photo, Inspected]") -> None:
        self.name, self.digest, self.detector, self.batcher = name, digest, detector, batcher
        self.alarms: dict[str, Alarm] = {}
        """The drift seen at the last look, by quantity."""
        self.monitor: DriftMonitor | None = None
        self._watching = Lock()
        try:
            self.monitor = self.calibration.monitor()
        except DataError as error:  # too few calibration images: no drift can be told
            logger.info("no drift monitor for %s: %s", name, error)

    @property
    def number(self) -> str:
        """A short name of this version, the same wherever the same folder is served."""
        return self.digest[:12]

    @property
    def calibration(self) -> Calibration:
        assert self.detector.calibration is not None  # seen to when loaded
        return self.detector.calibration

    def effect(self, false_alarms: float) -> Effect:
        """What another budget would mean on the calibration images.

        Raises:
            ConfigError: not a rate above 0 and below 1.
        """
        calibration = self.calibration.with_budget(false_alarms)
        limit, promised, bound = calibration.threshold, calibration.promised_rate, calibration.rate_bound
        assert limit is not None
        assert promised is not None
        assert bound is not None
        return Effect(
            false_alarms=false_alarms,
            threshold=limit,
            calibration_images=len(calibration.scores),
            flagged=sum(score > limit for score in calibration.scores),
            promised_rate=promised,
            rate_bound=bound,
            promise=calibration.promise(),
        )

    def apply_budget(self, false_alarms: float) -> None:
        """Judge by another budget from now on; raises as `effect`."""
        self.detector.calibration = self.calibration.with_budget(false_alarms)

    def watch(self, score: float, photo: PhotoStatistics) -> dict[str, Any] | None:
        """Take one photograph into account for drift; may be called from several threads.

        Returns:
            The monitor's state to keep, now and then.
        """
        if self.monitor is None:
            return None
        with self._watching:
            alarms = self.monitor.update(score, photo)
            since = self.monitor.images - self.monitor.window
            if since >= 0 and since % ((self.monitor.window + 1) // 2) == 0:
                self.alarms = {alarm.what: alarm for alarm in alarms}
            return self.monitor.state() if self.monitor.images % KEPT_EVERY == 0 else None


@dataclass(frozen=True)
class Inspected:
    """A prediction and what made it."""

    prediction: Prediction
    version: Version
    false_alarms: float


class Hosted:
    """A model that is served: the version in use, and the one before it to go back to.

    Args:
        folder: the model folder; what is loaded from it later is a new version.
        on_batch: as in `Batcher`.
        timed: entered with "network" around each batch.
        on_load: called with each version before it is used.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        executor: Executor,
        *,
        load: LoadSettings,
        batches: BatchSettings,
        on_batch: Callable[[list[float]], None] = lambda waited: None,
        timed: Callable[[str], AbstractContextManager[None]] = lambda stage: nullcontext(),
        on_load: Callable[[Version], None] = lambda version: None,
    ) -> None:
        self.name, self._folder, self._executor = name, folder, executor
        self._load_settings, self._batches, self._on_batch, self._on_load = load, batches, on_batch, on_load
        self._timed = timed
        self.previous: Version | None = None
        self.current: Version = self._version(*self._read())

    def _read(self) -> tuple[str, Detector]:
        """Load what is in the folder now, and see that it works.

        Raises:
            ModelError: no model, other files than it records, no calibration, or scores that are not numbers.
            ConfigError: as `Detector.from_pretrained`.
        """
        load = self._load_settings
        digest = check_files(self._folder, load.fast)
        detector = Detector.from_pretrained(
            self._folder, load.device, fast=load.fast, backend=load.backend, precision=load.precision
        )
        if check_files(self._folder, load.fast) != digest:
            raise ModelError(
                f"Expected {self._folder} to stay as it was while it was read, found it changed; try again."
            )
        if detector.settings.scoring.fusion == "batch-max":
            raise ModelError(
                f"Expected a model whose scores do not depend on the batch in {self._folder}, found one that fuses as "
                "published; it is for comparison only: train another preset."
            )
        if detector.calibration is None or detector.calibration.threshold is None:
            raise ModelError(
                f"Expected a calibrated model in {self._folder}, found none; run ddad recalibrate {self._folder} "
                "GOOD_FOLDER first."
            )
        if detector.warning:
            logger.warning("%s: %s", self.name, detector.warning)
        grey = np.full((*detector.shape, 3), 128, np.uint8)
        # Also the first call of each batch size, which takes longest.
        for size in {1, self._batches.max_batch}:
            tried = detector.predict_photos([Photo(None, grey, detector.shape)] * size)
        if not np.isfinite([one.anomaly_score for one in tried]).all():
            raise ModelError(f"Expected scores that are numbers from {self._folder}, found others; train it again.")
        return digest, detector

    def _version(self, digest: str, detector: Detector) -> Version:
        def run(photos: list[Photo]) -> list[Inspected]:
            calibration = version.calibration
            assert calibration.false_alarms is not None
            with self._timed("network"):
                predictions = detector.predict_photos(photos)
            return [Inspected(one, version, calibration.false_alarms) for one in predictions]

        batcher = Batcher(run, self._executor, self._batches, self._on_batch)
        version = Version(self.name, digest, detector, batcher)
        self._on_load(version)
        return version

    async def reload(self) -> bool:
        """Serve what the folder holds now; the version in use goes on until the new one has proved to work.

        Returns:
            Whether there was a new version.

        Raises:
            ModelError, ConfigError: the new version does not work, and the old one stays.
        """
        digest, detector = await asyncio.to_thread(self._read)
        if digest == self.current.digest:
            return False
        # The version before the previous one goes when the last request that holds it is answered.
        self.previous, self.current = self.current, self._version(digest, detector)
        return True

    def roll_back(self) -> None:
        """Serve the version before this one again; the two change places.

        Raises:
            ConfigError: there was none.
        """
        if self.previous is None:
            raise ConfigError(f"Expected an earlier version of {self.name} to go back to, found none since the start.")
        self.previous, self.current = self.current, self.previous
