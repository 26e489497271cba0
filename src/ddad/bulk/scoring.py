"""What a worker does: load the model once, then score shards, each read, inspected and written as a whole."""

import hashlib
import io
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch

from ddad.bulk import places
from ddad.bulk.job import Job, maps_place, results_place
from ddad.bulk.tables import Entry, encode_maps, encode_results, read_shard
from ddad.detector import Detector, check_files, is_family
from ddad.errors import DataError, ModelError
from ddad.family import Family, check_computed
from ddad.family import check_files as check_family
from ddad.images import read_photo
from ddad.prediction import Inspector, Photo, Prediction, photo_statistics
from ddad.streaming import in_batches


@dataclass(frozen=True)
class Scored:
    """What a worker reports of a shard that is written."""

    shard: int
    images: int
    flagged: int
    errors: int
    seconds: float
    bytes_read: int
    bytes_written: int
    worker: str
    """Host and process."""


@dataclass(frozen=True)
class _Read:
    """A photograph as it came, with what could be made of it."""

    sha256: str | None
    size: int
    photo: Photo | None
    error: str | None


class _Named(io.BytesIO):
    """Bytes with a name, for messages."""

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(content)
        self.name = name


def model_hash(folder: str | Path, fast: bool = False) -> str:
    """The hash that stands for all files of a model or a family, which are checked; raises ModelError."""
    return check_family(folder) if is_family(folder) else check_files(folder, fast)


class Scorer:
    """A model that scores photographs by their places."""

    def __init__(self, detector: Inspector, model: str, *, batch_size: int, readers: int, base: str = "") -> None:
        """
        Args:
            detector: a detector, or a family.
            model: the hash that rows carry.
            batch_size: photographs inspected together.
            readers: threads that fetch and decode ahead of the networks; they change nothing in the results.
            base: what relative URIs refer to.
        """
        self.detector, self.model = detector, model
        self.batch_size, self.readers, self.base = batch_size, readers, base

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        fast: bool = False,
        backend: Any = None,
        precision: Any = None,
        device: str | None = None,
        threads: int = 1,
        **options: Any,
    ) -> Self:
        """Load a model or a family after checking its files against their hashes; `options` as of the constructor.

        `threads` of PyTorch are set for the whole process.

        Raises:
            ModelError: the model is missing, damaged, or records no hashes.
            ConfigError: it cannot be computed in this way.
        """
        torch.set_num_threads(threads)
        identity = model_hash(model, fast)
        detector: Inspector
        if is_family(model):
            check_computed(fast, backend, precision)
            detector = Family.from_pretrained(model, device)
        else:
            detector = Detector.from_pretrained(model, device, fast=fast, backend=backend, precision=precision)
        return cls(detector, identity, **options)

    def rows(self, entries: Iterable[Entry]) -> Iterator[tuple[dict[str, Any], Prediction | None, int]]:
        """The result row, the prediction where there is one, and the bytes read, of each entry in order."""

        def process(batch: Sequence[_Read]) -> Sequence[tuple[_Read, Prediction | None]]:
            predictions = iter(self.detector.predict_photos([one.photo for one in batch if one.photo]))
            return [(one, next(predictions) if one.photo else None) for one in batch]

        for entry, result in in_batches(entries, self._read, process, self.batch_size, self.readers):
            assert not isinstance(result, DataError)  # `_read` returns none
            read, prediction = result
            yield self._row(entry, read, prediction), prediction, read.size

    def _read(self, entry: Entry) -> _Read:
        if isinstance(self.detector, Family) and entry.category not in (None, *self.detector.categories):
            known = ", ".join(self.detector.categories)
            return _Read(None, 0, None, f"{entry.uri}: expected a category among {known}, found {entry.category}.")
        try:
            content = places.read(places.join(self.base, entry.uri))
        except DataError as error:
            return _Read(None, 0, None, str(error))
        digest = hashlib.sha256(content).hexdigest()
        try:
            image, size = read_photo(_Named(content, entry.uri), self.detector.shape, self.detector.image_rule)
        except DataError as error:
            return _Read(digest, len(content), None, str(error))
        return _Read(digest, len(content), Photo(entry.uri, image, size, entry.category), None)

    def _row(self, entry: Entry, read: _Read, prediction: Prediction | None) -> dict[str, Any]:
        row: dict[str, Any] = {
            **asdict(entry),
            "sha256": read.sha256,
            "regions": [],
            "error": read.error,
            "model": self.model,
        }
        if prediction:
            row |= {
                "category": prediction.category or entry.category,
                "anomaly_score": prediction.anomaly_score,
                "p_value": prediction.p_value,
                "is_anomalous": prediction.is_anomalous,
                "threshold": prediction.threshold,
                "regions": [asdict(region) for region in prediction.regions],
                "photo": photo_statistics(prediction.image)._asdict(),
            }
        return row


class ShardScorer:
    """A worker of a job: it makes one shard's files, the same ones whichever worker does it."""

    def __init__(self, out: str, job: Job, model: str | Path, readers: int, device: str | None) -> None:
        self.out, self.job = out, job
        self.scorer = Scorer.load(
            model,
            fast=job.fast,
            backend=job.backend,
            precision=job.precision,
            device=device,
            threads=job.threads,
            batch_size=job.batch_size,
            readers=readers,
            base=job.base,
        )
        if self.scorer.model != job.model:
            raise ModelError(f"Expected the model that the job in {out} began with, found another one at {model}.")

    def __call__(self, shard: int) -> Scored:
        """Score a shard and write it; raises DataError where it cannot be written."""
        started = time.monotonic()
        entries = read_shard(places.join(self.out, self.job.listing), shard, self.job.shard_size)
        rows, maps, mapped, size = [], [], [], 0
        for row, prediction, read in self.scorer.rows(entries):
            rows.append(row)
            size += read
            if prediction and self.job.heatmaps:
                mapped.append(row["row"])
                maps.append(prediction.anomaly_map.astype("float16"))
        written = 0
        if self.job.heatmaps:
            content = encode_maps(mapped, maps)
            places.write(maps_place(self.out, shard), content)
            written += len(content)
        content = encode_results(rows)
        places.write(results_place(self.out, shard), content)  # last: it says that the shard is finished
        return Scored(
            shard=shard,
            images=len(rows),
            flagged=sum(bool(row.get("is_anomalous")) for row in rows),
            errors=sum(row["error"] is not None for row in rows),
            seconds=time.monotonic() - started,
            bytes_read=size,
            bytes_written=written + len(content),
            worker=f"{socket.gethostname()}:{os.getpid()}",
        )
