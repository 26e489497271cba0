"""`ddad score`: a manifest of any size in, Parquet out, by any number of workers on one machine or many."""

import json
import math
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddad.backends import check_backend
from ddad.bulk import places
from ddad.bulk.crew import Crew, Lost, Processes, drive
from ddad.bulk.job import LOG, MAPS, Job, finished, open_job
from ddad.bulk.scoring import Scored, Scorer, ShardScorer, model_hash
from ddad.bulk.tables import Entry, encode_maps, encode_results, read_manifest
from ddad.cluster import Actors, connect, room
from ddad.comparison import duration
from ddad.detector import is_family, model_folder
from ddad.errors import ConfigError, DataError, Interrupted
from ddad.family import check_computed
from ddad.files import remove_leftovers
from ddad.unet import choose_device, parse_device

SHARD_SIZE = 1000
BATCH_SIZE = 8
SAMPLE = 64
SHARD_SECONDS = 180.0
SHARDS_A_WORKER = 20
LEAST_SHARD = 30
"""A shard of minutes loses little with its worker, and many a worker let all end together (docs/scale.md)."""


@dataclass(frozen=True)
class ScoreProgress:
    """After a shard."""

    done: int
    """Photographs that are scored, in this run or before."""
    images: int
    flagged: int
    """In this run."""
    errors: int
    """In this run."""
    seconds_left: float | None
    """By the speed of this run, once every worker has had time to end a shard."""


@dataclass(frozen=True)
class ScoreReport:
    """What a run did; what earlier runs of the same job found is in their results alone."""

    images: int
    """Photographs of its shards."""
    before: int
    """Of these, scored by earlier runs."""
    scored: int
    """Scored by this run."""
    flagged: int
    """Of those that this run scored."""
    errors: int
    """Of those that this run scored."""
    given_up: tuple[int, ...]
    """Shards that ended every worker that tried them."""
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def sentence(self, out: str) -> str:
        if not self.images:
            return "There are fewer shards than slices, and none for this one."
        if not self.scored and not self.given_up:
            return (
                f"All {self.images:,} photographs were scored before. Results are in {places.join(out, '*.parquet')}."
            )
        before = f"; {self.before:,} were scored before" if self.before else ""
        text = (
            f"{self.scored:,} photographs done in {duration(self.seconds)}: {self.flagged:,} anomalous, "
            f"{self.errors:,} not inspected{before}. Results are in {places.join(out, '*.parquet')}."
        )
        if self.given_up:
            shards = ", ".join(map(str, self.given_up[:5])) + (", ..." if len(self.given_up) > 5 else "")
            text += (
                f" Expected every shard to be finished, found that {len(self.given_up)} ended each worker that tried "
                f"them ({shards}): a file in them may be to blame, or too little memory; the log in {out} has the "
                "reasons, and the same command tries them again."
            )
        return text


@dataclass(frozen=True)
class ScoreEstimate:
    """What a dry run measured on a sample, and what follows for the whole."""

    images: int
    sample: int
    images_per_second: float
    """Of one worker."""
    bytes_read: float
    """An image."""
    bytes_written: float
    """An image."""
    errors: int
    """In the sample."""
    first_error: str | None
    load_seconds: float
    """Until a worker can begin."""
    workers: int
    shard_size: int

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard_size)

    @property
    def worker_hours(self) -> float:
        return self.images / self.images_per_second / 3600

    @property
    def hours(self) -> float:
        """With all workers: shards are not divided."""
        return self.worker_hours * math.ceil(self.shards / self.workers) / self.shards

    @property
    def best_shard_size(self) -> int:
        """Photographs that take a worker a few minutes, or fewer where there would be few shards; a round number."""
        most = min(SHARD_SECONDS * self.images_per_second, self.images / (SHARDS_A_WORKER * self.workers))
        most = max(most, LEAST_SHARD)
        digits = 10 ** math.floor(math.log10(most))
        return math.floor(most / digits) * digits

    def to_dict(self, price: float | None = None) -> dict[str, Any]:
        derived = ("worker_hours", "hours", "best_shard_size")
        values = {**asdict(self), **{name: getattr(self, name) for name in derived}}
        return values if price is None else {**values, "cost": price * self.worker_hours}

    def sentence(self, price: float | None = None) -> str:
        cost = "" if price is None else f", which cost {price * self.worker_hours:,.2f}"
        failed = f"; {self.errors} could not be inspected ({self.first_error})" if self.errors else ""
        advice = ""
        if self.shard_size > 2 * self.best_shard_size and 3600 * self.hours > SHARD_SECONDS:
            advice = (
                f" Shards of this size are long for so many workers: --shard-size {self.best_shard_size} loses less "
                "with a worker, and keeps all busy to the end."
            )
        return (
            f"{_count(self.images, 'photograph')} in {_count(self.shards, 'shard')}. Of a sample of {self.sample} "
            f"each took one worker of this machine, alone, {1000 / self.images_per_second:.0f} ms{failed}. All would "
            f"take {duration(3600 * self.hours)} with {_count(self.workers, 'worker')} ({self.worker_hours:,.2g} hours "
            f"of one{cost}), and {duration(self.load_seconds)} to start; several on one machine are slower each. They "
            f"would read {_bytes(self.images * self.bytes_read)} and write {_bytes(self.images * self.bytes_written)}. "
            f"Nothing was written.{advice}"
        )


def score_manifest(
    model: str | Path,
    manifest: str | Path,
    out: str | Path,
    *,
    engine: str = "local",
    workers: int | None = None,
    least_workers: int = 1,
    readers: int = 4,
    slice_of: tuple[int, int] = (1, 1),
    address: str | None = None,
    gpus_per_worker: float | None = None,
    on_stage: Callable[[str], None] = lambda sentence: None,
    on_progress: Callable[[ScoreProgress], None] = lambda progress: None,
    **options: Any,
) -> ScoreReport:
    """Score every photograph of a manifest that has no result yet.

    The results depend on model, manifest and `options` alone: shards and batches are cut by the manifest, so any number
    of workers, any engine and any number of interrupted runs write the same files.

    Args:
        model: a model folder, or owner/name on the hub.
        manifest: a Parquet or CSV file with a column `uri` (and `etag`, where there is one), a folder of Parquet files,
            or a folder of images; a path, or a URI that fsspec reads. Relative URIs refer to its folder.
        out: the folder for results, a path or URI that all workers see; see `ddad.bulk.job` for what is in it.
        engine: `local` processes, or actors of `ray`.
        workers: processes or actors at most; by default what this machine or the cluster has processors for, or GPUs.
        least_workers: actors that must be up before work begins.
        readers: threads of each worker that fetch and decode.
        slice_of: (i, n): only every n-th shard, beginning with the i-th; i from 1 to n.
        address: of the Ray cluster; by default RAY_ADDRESS, or this machine.
        gpus_per_worker: GPUs that each actor takes, 1 by default on `cuda`; less than 1 shares one.
        options: as of `job_options`.

    Raises:
        ConfigError: options that cannot work, or another job in `out`.
        DataError: a manifest or a folder that cannot be used.
        ModelError: a model that cannot be loaded, or is not the one the job began with.
        Interrupted: Ctrl-C; the same call goes on.
    """
    check_engine(engine, address, gpus_per_worker, least_workers)
    if not 1 <= slice_of[0] <= slice_of[1]:
        raise ConfigError(f"Expected a slice from 1/n to n/n, found {slice_of[0]}/{slice_of[1]}.")
    started = time.monotonic()
    out, manifest = places.absolute(out), places.absolute(manifest)
    folder = model_folder(model)
    device = _device(engine, options.pop("device", None), gpus_per_worker)
    if engine == "ray":
        connect(address)  # before anything is written
    job = open_job(out, manifest, job_options(folder, device, **options))
    mine = range(slice_of[0] - 1, job.shards, slice_of[1])
    there = finished(out)
    left = [shard for shard in mine if shard not in there]
    images = sum(map(job.rows, mine))
    before = images - sum(map(job.rows, left))
    said = f"{_count(job.images, 'photograph')} in {_count(job.shards, 'shard')}, as listed on {job.created}"
    on_stage(said + (f"; {before:,} of {images:,} are scored already." if before else "."))
    flagged = errors = done = 0
    given_up: list[int] = []
    if left:
        if engine == "ray":
            cpus = float(job.threads)
            gpus = gpus_per_worker if gpus_per_worker is not None else float(job.device == "cuda")
            count = min(workers or room(cpus, gpus), len(left))
            crew: Crew = Actors(
                _scorer_of_files,
                (_files(folder), out, job, readers, device),
                most=count,
                least=min(least_workers, len(left)),
                cpus=cpus,
                gpus=gpus,
                on_idle=on_stage,
            )
        else:
            count = min(workers or processors(device, job.threads), len(left))
            crew = Processes(ShardScorer, [(out, job, folder, readers, one) for one in _spread(device, count)])
        with _log(out) as log, crew:

            def lost(shard: int, reason: str) -> None:
                log(shard=shard, lost=reason)
                on_stage(f"Shard {shard} lost its worker ({reason}).")

            warm: tuple[float, int] | None = None  # when all workers had ended a shard: the time, and what was done
            try:
                for number, (shard, result) in enumerate(drive(crew, left, lost), start=1):
                    if isinstance(result, Lost):
                        given_up.append(shard)
                        continue
                    assert isinstance(result, Scored)
                    log(**asdict(result))
                    done, flagged, errors = done + result.images, flagged + result.flagged, errors + result.errors
                    now, seconds_left = time.monotonic(), None
                    if warm and done > warm[1]:
                        seconds_left = (now - warm[0]) / (done - warm[1]) * (images - before - done)
                    elif number >= count:
                        warm = now, done
                    on_progress(ScoreProgress(before + done, images, flagged, errors, seconds_left))
            except KeyboardInterrupt:
                raise Interrupted(f"{before + done:,} of {images:,} photographs") from None
    if places.is_local(out) and len(finished(out)) == job.shards:
        for place in (Path(out), Path(out) / MAPS):
            remove_leftovers(place)  # of killed workers
    return ScoreReport(images, before, done, flagged, errors, tuple(given_up), time.monotonic() - started)


def check_engine(engine: str, address: str | None, gpus_per_worker: float | None, least_workers: int) -> None:
    """Raises ConfigError for an unknown engine, or for what only Ray can do."""
    if engine not in ("local", "ray"):
        raise ConfigError(f"Expected an engine among local, ray, found {engine!r}.")
    if engine == "local":
        given = {
            "--address": address,
            "--gpus-per-worker": gpus_per_worker,
            "the least of --workers": least_workers > 1,
        }
        for name, value in given.items():
            if value:
                raise ConfigError(f"Expected --engine ray for {name}, found local; say --engine ray, or leave it out.")


def job_options(
    model: str | Path,
    device: str,
    *,
    shard_size: int = SHARD_SIZE,
    batch_size: int = BATCH_SIZE,
    threads: int = 1,
    backend: str | None = None,
    precision: str | None = None,
    fast: bool = False,
    heatmaps: bool = False,
) -> dict[str, Any]:
    """What decides the results, as fields of a `Job`.

    Args:
        shard_size: photographs a shard: what is lost with a worker.
        batch_size: photographs inspected together.
        threads: of PyTorch, a worker. One, with as many workers as processors, is quickest.
        backend, precision, fast: as of `Detector.from_pretrained`.
        heatmaps: also write the anomaly maps.
    """
    for name, value in (("shard_size", shard_size), ("batch_size", batch_size), ("threads", threads)):
        if value < 1:
            raise ConfigError(f"Expected {name} to be at least 1, found {value}.")
    if is_family(model):
        check_computed(fast, backend, precision)
    else:
        check_backend(backend or "torch", precision or "fp32", device if backend else None)
    return {
        "model": model_hash(model, fast),
        "shard_size": shard_size,
        "batch_size": batch_size,
        "threads": threads,
        "device": parse_device(device).type,
        "backend": backend,
        "precision": precision,
        "fast": fast,
        "heatmaps": heatmaps,
    }


def _device(engine: str, device: str | None, gpus_per_worker: float | None) -> str:
    """Where networks run: for Ray's actors not what this machine has, but what they are to take."""
    if engine == "local":
        return str(choose_device(device))
    return str(parse_device(device or ("cuda" if gpus_per_worker else "cpu")))


def _spread(device: str, workers: int) -> list[str]:
    """A device for each worker: all GPUs in turn, unless one is named."""
    if device != "cuda":
        return [device] * workers
    return [f"cuda:{number % torch.cuda.device_count()}" for number in range(workers)]


def processors(device: str, threads: int) -> int:
    """How many workers this machine has processors for, or GPUs."""
    if parse_device(device).type == "cuda":
        return torch.cuda.device_count()
    affinity = getattr(os, "sched_getaffinity", None)  # Linux
    return max(1, (len(affinity(0)) if affinity else os.cpu_count() or 1) // threads)


def _files(folder: Path) -> dict[str, bytes]:
    """A model as bytes, so that a cluster needs no copy of it on every machine."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
    }


def _scorer_of_files(files: dict[str, bytes], out: str, job: Job, readers: int, device: str) -> ShardScorer:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            file = Path(folder) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
        return ShardScorer(out, job, folder, readers, device)


@contextmanager
def _log(out: str) -> Iterator[Callable[..., None]]:
    """A file for what took how long: one line a shard, at once where `out` is a local folder, else at the end."""
    began = datetime.now(UTC)
    name = f"{LOG}/{began:%Y%m%dT%H%M%SZ}-{socket.gethostname()}-{os.urandom(4).hex()}.jsonl"
    with places.lines(places.join(out, name)) as write_line:
        yield lambda **values: write_line(json.dumps({"time": datetime.now(UTC).isoformat(), **values}))


def estimate(
    model: str | Path,
    manifest: str | Path,
    *,
    workers: int | None = None,
    readers: int = 4,
    device: str | None = None,
    **options: Any,
) -> ScoreEstimate:
    """Score a sample of a manifest in this process, write nothing, and say what the whole would take.

    Arguments and errors as of `score_manifest`.
    """
    manifest = places.absolute(manifest)
    folder = model_folder(model)
    device = str(choose_device(device))
    asked = job_options(folder, device, **options)
    base, rows = read_manifest(manifest)
    count, sample = _sample(rows)
    if not count:
        raise DataError(f"Expected photographs in {manifest}, found none; name another folder or manifest.")
    started = time.monotonic()
    scorer = Scorer.load(
        folder,
        fast=asked["fast"],
        backend=asked["backend"],
        precision=asked["precision"],
        device=device,
        threads=asked["threads"],
        batch_size=asked["batch_size"],
        readers=readers,
        base=base,
    )
    warm = sample[: asked["batch_size"]]
    list(scorer.rows(warm))  # the first batch chooses kernels
    load_seconds = time.monotonic() - started
    started = time.monotonic()
    scored = list(scorer.rows(sample))
    seconds = time.monotonic() - started
    failures = [row["error"] for row, _, _ in scored if row["error"]]
    written = len(encode_results([row for row, _, _ in scored]))
    if asked["heatmaps"]:
        maps = [prediction.anomaly_map.astype("float16") for _, prediction, _ in scored if prediction]
        written += len(encode_maps(list(range(len(maps))), maps))
    return ScoreEstimate(
        images=count,
        sample=len(sample),
        images_per_second=(len(sample) - len(failures) or len(sample)) / seconds,
        bytes_read=sum(read for _, _, read in scored) / len(sample),
        bytes_written=written / len(sample),
        errors=len(failures),
        first_error=failures[0] if failures else None,
        load_seconds=load_seconds,
        workers=workers or processors(device, asked["threads"]),
        shard_size=asked["shard_size"],
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def _sample(rows: Iterator[tuple[str, str | None, str | None]]) -> tuple[int, list[Entry]]:
    """How many rows there are, and some of them, each as likely as any other (reservoir sampling, Vitter 1985)."""
    random = np.random.default_rng(0)
    kept: list[Entry] = []
    count = 0
    for count, row in enumerate(rows, start=1):
        entry = Entry(count - 1, *row)
        if len(kept) < SAMPLE:
            kept.append(entry)
        elif (place := int(random.integers(count))) < SAMPLE:
            kept[place] = entry
    return count, sorted(kept, key=lambda entry: entry.row)
