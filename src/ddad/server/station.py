"""What happens to a photograph: decoded, queued, inspected in a batch, drawn, remembered, watched for drift."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import numpy as np
from PIL import Image

from ddad import results
from ddad.drift import Quantity
from ddad.errors import ConfigError, DataError
from ddad.hub import model_name
from ddad.images import encode_jpeg, encode_png
from ddad.prediction import Photo, PhotoStatistics, photo_statistics
from ddad.server.batching import BatchSettings
from ddad.server.decoding import Decoded, Decoders, Limits
from ddad.server.history import History, Inspection
from ddad.server.hosting import Effect, Hosted, Inspected, LoadSettings, Version
from ddad.server.measures import Measures

PICTURES = ("photo", *results.PICTURES)
RECENT = 200
"""Inspections that the effect of another budget is shown on."""
_JPEG = ("overlay", "reconstruction")  # a PNG of these takes many times as long and as much room
Result = TypeVar("Result")


class StationFull(Exception):
    """There are `most_waiting` photographs inside already."""

    def __init__(self, retry_after: float) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after
        """Seconds in which these will be done, as measured."""


class TooLate(Exception):
    """The deadline passed before there was a result."""


@dataclass(frozen=True)
class StationSettings:
    history: Path = Path("ddad-history")
    """Folder of past inspections."""
    history_bytes: int = 2 << 30
    batches: BatchSettings = field(default_factory=BatchSettings)
    decoding: Limits = field(default_factory=Limits)
    workers: int = 2
    """Processes that decode, and threads that draw and store."""
    most_waiting: int = 256
    """Photographs that may be inside, waiting or at work."""
    deadline: float = 30.0
    """Seconds a request may take from its arrival to its result."""


class Upload(NamedTuple):
    name: str
    """As the client calls it; shown, never a path."""
    content: bytes | np.ndarray
    """An image file, or pixels, uint8 (H, W, 3)."""


@dataclass(frozen=True)
class Answer:
    """What became of one uploaded file: an inspection, or the sentence that says why there is none."""

    file: str
    inspection: Inspection | None = None
    inspected: Inspected | None = None
    decoded: Decoded | None = None
    error: str | None = None
    drawn: dict[str, bytes] = field(default_factory=dict)
    """Pictures to keep, PNG or JPEG."""
    asked: dict[str, bytes] = field(default_factory=dict)
    """Pictures that were asked for, as PNG."""


class Station:
    """The inspection of photographs, without HTTP.

    Args:
        models: folders, served under their names.

    Raises:
        ConfigError: two folders of one name, or a name that is no plain word.
        ModelError: as `Hosted`.
        DataError: as `History`.
    """

    def __init__(
        self,
        models: Sequence[Path],
        settings: StationSettings,
        load: LoadSettings = LoadSettings(),  # noqa: B008 (frozen)
    ) -> None:
        self.settings = settings
        self.measures = Measures()
        self.started = datetime.now(UTC)
        self._inside = 0
        named = _named(models)
        self._network = ThreadPoolExecutor(1, "network")  # one batch at a time, whatever the model
        self._decoding = ThreadPoolExecutor(settings.workers, "decoding")
        self._threads = ThreadPoolExecutor(settings.workers, "station")
        self.history = History(settings.history, settings.history_bytes)
        try:
            self.models = {
                name: Hosted(
                    name,
                    folder,
                    self._network,
                    load=load,
                    batches=settings.batches,
                    on_batch=self._count_batch,
                    timed=self.measures.stage,
                    on_load=self._recall,
                )
                for name, folder in named.items()
            }
            self._decoders = Decoders(settings.workers, settings.decoding)
        except BaseException:
            self.history.close()
            raise
        for name, hosted in self.models.items():
            self.measures.queue_length(name, lambda hosted=hosted: len(hosted.current.batcher))  # type: ignore[misc]
            self.measures.version(name, hosted.current.number)

    @property
    def default(self) -> Hosted:
        """The model named first."""
        return next(iter(self.models.values()))

    async def in_thread(self, call: Callable[[], Result]) -> Result:
        """Run a function beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    # -- inspection ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def places(self, hosted: Hosted, count: int) -> AsyncIterator[None]:
        """Room for so many photographs, from before they are read until there is an answer, and no longer than allowed.

        Raises:
            StationFull: too many are inside.
            TooLate: the deadline passed.
        """
        if self._inside + count > self.settings.most_waiting:
            self.measures.refused.labels("queue").inc()
            raise StationFull(max(1.0, self._inside * hosted.current.batcher.seconds_an_item))
        self._inside += count
        try:
            async with asyncio.timeout(self.settings.deadline):
                yield
        except TimeoutError:
            self.measures.refused.labels("deadline").inc()
            raise TooLate from None
        finally:
            self._inside -= count

    async def inspect(
        self, hosted: Hosted, uploads: Sequence[Upload], pictures: Collection[str] | None = None
    ) -> list[Answer]:
        """Inspect files; one that is no photograph gets a sentence, the others go on.

        When this is cancelled, what still waits leaves the queue.

        Args:
            pictures: also draw, what is to be kept and these kinds as PNG.
        """
        version = hosted.current
        answers = await _together(self._one(version, upload) for upload in uploads)
        if pictures is None:
            return answers
        return [await self.in_thread(partial(self._draw, answer, pictures)) for answer in answers]

    async def remember(self, answers: Sequence[Answer], request_id: str) -> list[Answer]:
        """Keep inspections; to be called when nothing can come between this and the answer."""
        return await self.in_thread(lambda: self._remember(answers, request_id))

    async def _one(self, version: Version, upload: Upload) -> Answer:
        name, loop = shown(upload.name), asyncio.get_running_loop()
        try:
            decoded = await loop.run_in_executor(self._decoding, self._decode, version, name, upload.content)
        except DataError as error:
            self.measures.refused.labels("file").inc()
            return Answer(name, error=str(error))
        photo = Photo(name, decoded.image, decoded.size)
        inspected = await version.batcher.submit(photo)
        return Answer(name, inspected=inspected, decoded=decoded)

    def _decode(self, version: Version, name: str, content: bytes | np.ndarray) -> Decoded:
        with self.measures.stage("decode"):
            if isinstance(content, np.ndarray):
                file = BytesIO()
                Image.fromarray(content).save(file, "BMP")  # costs nothing, and takes the way of all others
                content = file.getvalue()
            return self._decoders.decode(content, name, version.detector.shape, version.detector.image_rule)

    def _draw(self, answer: Answer, asked: Collection[str]) -> Answer:
        if answer.inspected is None or answer.decoded is None:
            return answer
        with self.measures.stage("draw"):
            with Image.open(BytesIO(answer.decoded.photo)) as photo:
                pixels = np.asarray(photo.convert("RGB"))
            drawn = results.draw(answer.inspected.version.detector, pixels, answer.inspected.prediction)
            kept = {kind: encode_jpeg(one, 90) if kind in _JPEG else encode_png(one) for kind, one in drawn.items()}
            return replace(
                answer,
                drawn={"photo": answer.decoded.photo, **kept},
                asked={kind: encode_png(drawn[kind]) for kind in asked},
            )

    def _remember(self, answers: Sequence[Answer], request_id: str) -> list[Answer]:
        found = [(_inspection(answer, request_id), answer.drawn) for answer in answers if answer.inspected]
        with self.measures.stage("store"):
            kept = iter(self.history.add(found))
        done = [replace(answer, inspection=next(kept)) if answer.inspected else answer for answer in answers]
        for answer in done:
            if answer.inspected and answer.inspection:
                self._count(answer.inspected.version, answer.inspection)
        return done

    def _count(self, version: Version, inspection: Inspection) -> None:
        self.measures.verdicts.labels(version.name, "anomalous" if inspection.is_anomalous else "good").inc()
        state = version.watch(inspection.anomaly_score, PhotoStatistics(**inspection.photo))
        if state:
            self.history.keep_setting(_drift(version), state)
        for quantity in get_args(Quantity) if version.monitor else ():
            self.measures.drift.labels(version.name, quantity).set(quantity in version.alarms)

    def _count_batch(self, waited: list[float]) -> None:
        self.measures.batch_size.observe(len(waited))
        for seconds in waited:
            self.measures.stage_seconds.labels("queue").observe(seconds)

    # -- models --------------------------------------------------------------------------------------------------------

    def effect(self, hosted: Hosted, false_alarms: float) -> tuple[Effect, dict[str, int]]:
        """What another budget would mean, on calibration images and for recent inspections.

        Returns:
            The effect, and of the recent inspections by this version: how many there are (`inspections`), and how many
            would be judged anomalous instead of good (`more`), or good instead of anomalous (`fewer`).

        Raises:
            ConfigError: no rate above 0 and below 1.
        """
        version = hosted.current
        effect = version.effect(false_alarms)
        recent = [one for one in self.history.latest(RECENT, model=hosted.name) if one.version == version.number]
        flagged = [one.anomaly_score > effect.threshold for one in recent]
        changed = [(was.is_anomalous, now) for was, now in zip(recent, flagged, strict=True)]
        return effect, {
            "inspections": len(recent),
            "more": changed.count((False, True)),
            "fewer": changed.count((True, False)),
        }

    async def apply_budget(self, hosted: Hosted, false_alarms: float) -> None:
        """Judge by another budget from now on, also after a restart; raises as `effect`."""
        version = hosted.current
        # Between two batches: no batch is judged half by one, half by the other.
        await asyncio.get_running_loop().run_in_executor(self._network, version.apply_budget, false_alarms)
        await self.in_thread(lambda: self.history.keep_setting(_budget(version), false_alarms))

    async def reload(self, hosted: Hosted) -> bool:
        """As `Hosted.reload`."""
        new = await hosted.reload()
        self.measures.version(hosted.name, hosted.current.number)
        return new

    def roll_back(self, hosted: Hosted) -> None:
        """As `Hosted.roll_back`."""
        hosted.roll_back()
        self.measures.version(hosted.name, hosted.current.number)

    def _recall(self, version: Version) -> None:
        """What was set or seen of this version before a restart."""
        if (false_alarms := self.history.setting(_budget(version))) is not None:
            version.apply_budget(false_alarms)
        state = self.history.setting(_drift(version))
        if version.monitor and state:
            with suppress(DataError):  # of other code or another window: it starts afresh
                version.monitor.restore(state)

    async def close(self) -> None:
        """End threads and processes; what they are at is finished."""
        for version in (hosted.current for hosted in self.models.values()):
            if version.monitor:
                self.history.keep_setting(_drift(version), version.monitor.state())
        for threads in (self._network, self._decoding, self._threads):
            await asyncio.to_thread(threads.shutdown)
        self._decoders.close()
        self.history.close()


async def _together(works: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Results of all; the first failure cancels the others and is raised by itself."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def shown(name: str) -> str:
    """A client's file name as it may be shown: its last part, printable, at most 255 characters."""
    plain = re.split(r"[/\\]", name)[-1]
    return "".join(one if one.isprintable() else "?" for one in plain)[:255] or "unnamed"


def _named(models: Sequence[Path]) -> dict[str, Path]:
    named: dict[str, Path] = {}
    for folder in models:
        name = model_name(folder)
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ConfigError(
                f"Expected a model folder with a name of letters, digits, '.', '_' and '-', found {name!r}; rename it."
            )
        if name in named:
            raise ConfigError(f"Expected models of different names, found two called {name}; rename one of them.")
        named[name] = folder
    return named


def _budget(version: Version) -> str:
    return f"false-alarms {version.digest}"


def _drift(version: Version) -> str:
    return f"drift {version.digest}"


def _inspection(answer: Answer, request_id: str) -> Inspection:
    assert answer.inspected
    assert answer.decoded
    prediction, version = answer.inspected.prediction, answer.inspected.version
    assert prediction.p_value is not None
    assert prediction.is_anomalous is not None
    assert prediction.threshold is not None
    return Inspection(
        time=datetime.now(UTC),
        request_id=request_id,
        file=answer.file,
        model=version.name,
        version=version.number,
        anomaly_score=prediction.anomaly_score,
        p_value=prediction.p_value,
        is_anomalous=prediction.is_anomalous,
        threshold=prediction.threshold,
        false_alarms=answer.inspected.false_alarms,
        height=answer.decoded.size[0],
        width=answer.decoded.size[1],
        regions=[asdict(region) for region in prediction.regions],
        photo=photo_statistics(prediction.image)._asdict(),
    )
