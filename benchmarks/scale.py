"""What bulk scoring costs, and what a job of any size takes: real runs, a fit of their logs, a simulation.

    python benchmarks/scale.py run MODEL PHOTOS OUT --sizes 8,16,64,256 [--kills K] [--processor-time]
    python benchmarks/scale.py parts [PHOTOS] [--only decode,listing,tables,finished,loop] [--json PARTS.json]
    python benchmarks/scale.py fit OUT... [--json FIT.json]
    python benchmarks/scale.py simulate [--fit FIT.json] --images N --workers W [--preemptions-per-hour 0,0.1,1] ...
    python benchmarks/scale.py check --fit FIT.json OUT...

run       scores photographs with `score_manifest` once for each shard size; --kills ends workers at random moments,
          --processor-time is for machines that have other work.
parts     what a worker or the driver does besides the networks: decode photographs of 1, 4 and 12 megapixels, write the
          listing of a large manifest, read and write the tables of a shard, find the finished ones, hand out shards.
fit       seconds an image, overhead a shard, start-up and bytes from the logs of jobs (OUT/_job/log/*.jsonl).
simulate  a table over shard sizes: wall time and where the workers' time goes.
check     a real job against the simulation of it, with its losses at their moments.

The simulation runs the loop of `ddad.bulk.crew.drive` itself, on workers whose clock is simulated.
"""

import argparse
import heapq
import json
import math
import multiprocessing
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import numpy as np

from ddad.bulk.crew import Lost, drive
from ddad.bulk.job import JOB, LOG
from ddad.errors import ConfigError, DataError, DDADError

ENOUGH_SHARDS = 5
"""To say how much they differ."""
SIZES = "100,300,1000,3000,10000,30000,100000"


@dataclass(frozen=True)
class Costs:
    """Of one worker; seconds, unless said otherwise."""

    seconds_per_image: float
    overhead: float = 0.0
    """A shard: its part of the listing read, its results written, the readers' queue filled and emptied."""
    gap: float = 0.0
    """A shard: from the driver that hears of one shard to the worker that begins the next. Shards queue for it."""
    start_up: float = 0.0
    """From asking for a worker until it can take a shard: machine, process, model."""
    spread: float = 0.0
    """Of a shard's seconds, relative: the standard deviation of a log-normal factor of mean 1."""
    preemptions_per_hour: float = 0.0
    """Of each worker; it is replaced at once, which takes its `start_up`."""
    slow_share: float = 0.0
    """Share of the machines that are slow; their replacements are as slow."""
    slow_factor: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            least = {"slow_factor": 1}.get(name, 0)
            if not (math.isfinite(value) and value >= least) or (name == "seconds_per_image" and value == 0):
                raise ConfigError(f"Expected {name} to be a number of at least {least}, found {value}.")

    @property
    def preemption_rate(self) -> float:
        return self.preemptions_per_hour / 3600

    def slow_workers(self, workers: int) -> int:
        return round(self.slow_share * workers)


@dataclass
class Outcome:
    """What a simulated job did; `useful` to `idle` are worker-seconds and add up to `workers * wall`."""

    workers: int
    wall: float = 0.0
    useful: float = 0.0
    overhead: float = 0.0
    lost: float = 0.0
    """Work on shards until their worker was lost."""
    starting: float = 0.0
    idle: float = 0.0
    """Mostly at the end, while others do the last shards."""
    losses: int = 0
    given_up: list[int] = field(default_factory=list)
    """Shards that lost as many workers as `drive` lets them."""
    finished: list[tuple[float, int]] = field(default_factory=list)
    """When each shard was done."""
    elsewhere: int = 0
    """Losses of a real job that met a worker with another shard, or none."""

    def share(self, name: str) -> float:
        return getattr(self, name) / (self.workers * self.wall)


class Simulated:
    """A crew for `drive` on a simulated clock."""

    def __init__(
        self,
        workers: int,
        costs: Costs,
        images: Callable[[int], int],
        seed: int = 0,
        losses: Iterable[tuple[float, int]] = (),
        local: bool = False,
    ) -> None:
        """
        Args:
            images: of a shard.
            losses: (moment, shard): besides those at random, the worker that has this shard at that moment is lost.
                Where no worker has it, the one that has the nearest number is: the real job was a little faster or
                slower than the simulated one.
            local: a shard is given to a worker that then starts, as in `Processes`; by default all start at once, and
                shards go to those that are ready, as in `ddad.cluster.Actors`.
        """
        self.now = 0.0
        self.outcome = Outcome(workers)
        self._costs, self._images, self._random = costs, images, random.Random(seed)
        self._slow = costs.slow_workers(workers)
        self._local = local
        self._free: list[int] = []
        self._absent: list[int] = []  # local ones that start when they get a shard
        self._since = [0.0] * workers  # free, starting or busy since then
        self._ready = [False] * workers
        self._busy: dict[int, tuple[int, float, float, float]] = {}  # shard, seconds useful, overhead, starting
        self._driver = 0.0  # busy handing out until then
        # (moment, number, worker, lost); a loss of a real job has the worker -1 and its shard as `lost`
        self._events: list[tuple[float, int, int, int]] = []
        self._number = 0
        self._expected = [0] * workers  # number of the event that counts; others are of shards that were lost
        for moment, shard in losses:
            self._push(moment, -1, shard)
        for worker in range(workers):
            self._start(worker)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: Any) -> None:
        """The job is over: what workers do now is to be idle, or to start in vain."""
        self.outcome.wall = self.now
        for worker, since in enumerate(self._since):
            self._spend("idle" if self._ready[worker] else "starting", self.now - since)

    def free(self) -> int:
        return len(self._free) + len(self._absent)

    def submit(self, task: int) -> None:
        costs = self._costs
        worker, starting = (self._free.pop(), 0.0) if self._free else (self._absent.pop(0), costs.start_up)
        self._spend("idle", self.now - self._since[worker])
        self._since[worker] = self.now
        begin = self._driver = max(self.now, self._driver) + costs.gap
        slow = costs.slow_factor if worker < self._slow else 1.0
        noise = math.exp(costs.spread * self._random.gauss(0, 1) - costs.spread**2 / 2) if costs.spread else 1.0
        useful = self._images(task) * costs.seconds_per_image * slow * noise
        overhead = costs.overhead * slow
        end, dies = begin + starting + overhead + useful, begin + self._life()
        self._expected[worker] = self._push(min(end, dies), worker, int(dies < end))
        self._busy[worker] = task, useful, overhead + begin - self.now, starting

    def wait(self) -> list[tuple[int, Any]]:
        moment, number, worker, lost = heapq.heappop(self._events)
        if worker < 0:
            return self._lose_as_recorded(moment, lost)
        if number != self._expected[worker]:
            return []
        self.now = moment
        if not self._ready[worker]:
            self._spend("starting", moment - self._since[worker])
            self._ready[worker] = True
            self._rest(worker)
            return []
        if lost:
            return [self._lose(worker)]
        task, useful, overhead, starting = self._busy.pop(worker)
        self._spend("useful", useful)
        self._spend("overhead", overhead)
        self._spend("starting", starting)
        self.outcome.finished.append((moment, task))
        self._rest(worker)
        return [(task, None)]

    def _rest(self, worker: int) -> None:
        self._since[worker] = self.now
        self._free.append(worker)

    def _lose(self, worker: int) -> tuple[int, Lost]:
        task, _, _, starting = self._busy.pop(worker)
        spent = self.now - self._since[worker]
        self._spend("starting", min(starting, spent))
        self._spend("lost", max(0.0, spent - starting))
        self.outcome.losses += 1
        self._start(worker)
        return task, Lost("preempted")

    def _lose_as_recorded(self, moment: float, shard: int) -> list[tuple[int, Any]]:
        if not self._busy:
            self.outcome.elsewhere += 1
            return []
        self.now = moment
        worker = min(self._busy, key=lambda one: abs(self._busy[one][0] - shard))
        self.outcome.elsewhere += self._busy[worker][0] != shard
        return [self._lose(worker)]

    def _start(self, worker: int) -> None:
        self._since[worker], self._ready[worker] = self.now, self._local
        if self._local:
            self._absent.append(worker)
            self._expected[worker] = 0
            return
        moment = self.now
        while (life := self._life()) < self._costs.start_up:
            moment += life
        self._expected[worker] = self._push(moment + self._costs.start_up, worker, 0)

    def _life(self) -> float:
        """Seconds until the next preemption; the exponential law has no memory."""
        rate = self._costs.preemption_rate
        return self._random.expovariate(rate) if rate else math.inf

    def _push(self, moment: float, worker: int, lost: int) -> int:
        self._number += 1
        heapq.heappush(self._events, (moment, self._number, worker, lost))
        return self._number

    def _spend(self, name: str, seconds: float) -> None:
        setattr(self.outcome, name, getattr(self.outcome, name) + seconds)


def run_simulated(crew: Simulated, shards: Iterable[int]) -> Outcome:
    """The whole job of these shards."""
    with crew:
        for shard, result in drive(crew, shards, lambda shard, reason: None):
            if isinstance(result, Lost):
                crew.outcome.given_up.append(shard)
    return crew.outcome


def simulate(images: int, shard_size: int, workers: int, costs: Costs, seed: int = 0) -> Outcome:
    """A job of so many images, in shards of `shard_size`, by `workers` workers."""
    shards = -(-images // shard_size)
    crew = Simulated(workers, costs, lambda shard: min(shard_size, images - shard * shard_size), seed)
    return run_simulated(crew, range(shards))


def ideal_wall(images: int, workers: int, costs: Costs) -> float:
    """Without overhead, losses, start-up and end: slow machines are slow, but always busy."""
    return images * costs.seconds_per_image / capacity(workers, costs)


def capacity(workers: int, costs: Costs) -> float:
    """In workers of full speed."""
    slow = costs.slow_workers(workers)
    return workers - slow + slow / costs.slow_factor


def approximate_wall(images: int, shard_size: int, workers: int, costs: Costs) -> float:
    """The closed form: seconds of a job, where there are many more shards than workers.

    A shard takes T = o + g + S s undisturbed, and E = (1/p + r) (exp(p T) - 1) of a worker's time where workers are
    lost at the rate p and replaced after r, since it begins anew each time. When the last shard is given out the
    workers have on average T/2 of work left; the slowest of m that could be last needs m/(m+1) of its T.
    """
    slow = costs.slow_workers(workers)
    shards = images / shard_size
    undisturbed = costs.overhead + costs.gap + shard_size * costs.seconds_per_image
    rate = costs.preemption_rate
    expected = (1 / rate + costs.start_up) * math.expm1(rate * undisturbed) if rate else undisturbed
    last = slow or workers
    tail = undisturbed * (costs.slow_factor if slow else 1) * last / (last + 1)
    work = (shards * expected - workers * undisturbed / 2) / capacity(workers, costs)
    return costs.start_up + max(work + tail, shards * costs.gap)


def best_size(images: int, workers: int, costs: Costs) -> float:
    """The shard size where overhead, losses and end together take least: the square-root rule.

    Overhead takes (o + g) / (S s) of the useful time, losses p S s / 2, the end S W / 2 N. For a job without end this
    is Young's rule for checkpoints.
    """
    s = costs.seconds_per_image
    return math.sqrt(2 * (costs.overhead + costs.gap) / s / (costs.preemption_rate * s + workers / images))


@dataclass(frozen=True)
class Log:
    """Of one run of `ddad score`; moments in seconds since `began`."""

    began: float
    """Whole seconds, by the file's name: so a start-up looks up to a second longer than it was."""
    shards: list[dict[str, Any]]
    losses: list[tuple[float, int]]

    def starts(self) -> list[float]:
        """Seconds from asking for a worker, at the beginning or after a loss, to its first shard."""
        first = {line["worker"]: line["moment"] - line["seconds"] for line in reversed(self.shards)}
        moments = sorted(first.values())
        starts = moments[: self.workers()]
        asked = [moment for moment, _ in self.losses]
        for begin in reversed(moments[self.workers() :]):
            # The latest: workers that were lost before their first shard was done left no other trace.
            if before := [moment for moment in asked if moment <= begin]:
                starts.append(begin - before[-1])
                asked.remove(before[-1])
        return starts

    def gaps(self) -> list[float]:
        """Seconds between two shards of a worker."""
        last: dict[str, float] = {}
        gaps = []
        for line in self.shards:
            if line["worker"] in last:
                gaps.append(max(0.0, line["moment"] - line["seconds"] - last[line["worker"]]))
            last[line["worker"]] = line["moment"]
        return gaps

    def workers(self) -> int:
        """As many as were at work at the same time."""
        spans: dict[str, list[float]] = {}
        for line in self.shards:
            spans.setdefault(line["worker"], [line["moment"] - line["seconds"], 0])[1] = line["moment"]
        return max(sum(begin <= moment < end for begin, end in spans.values()) for moment, _ in spans.values())


@dataclass(frozen=True)
class RealJob:
    """A folder that `ddad score` wrote."""

    out: Path
    images: int
    shard_size: int
    logs: list[Log]

    def rows(self, shard: int) -> int:
        return min(self.shard_size, self.images - shard * self.shard_size)


def read_job(out: Path) -> RealJob:
    """Raises DataError where there is no job, or nothing in its log."""
    try:
        job = json.loads((out / JOB).read_text())
        logs = [_read_log(file) for file in sorted((out / LOG).glob("*.jsonl"))]
        real = RealJob(out, int(job["images"]), int(job["shard_size"]), [log for log in logs if log.shards])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"Expected a job of ddad score in {out}, with {JOB} and {LOG}/*.jsonl, found none ({error}); "
            "name the folder that was its --out."
        ) from None
    if not real.logs:
        raise DataError(f"Expected at least one finished shard in the log of {out}, found none; let the job run on.")
    return real


def _read_log(file: Path) -> Log:
    match = re.match(r"(\d{8}T\d{6}Z)-", file.name)
    if not match:
        raise ValueError(f"{file.name} has no time in its name")
    began = datetime.strptime(match[1], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC).timestamp()
    shards, losses = [], []
    for text in file.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the driver was killed while it wrote the last one
            continue
        moment = datetime.fromisoformat(line["time"]).timestamp() - began
        if "lost" in line:
            losses.append((moment, line["shard"]))
        else:
            shards.append(line | {"moment": moment})
    return Log(began, shards, losses)


def fit(jobs: Sequence[RealJob]) -> dict[str, Any]:
    """Costs from logs. Overhead takes at least two shard sizes; else it is 0 and part of the seconds an image."""
    lines = [line for job in jobs for log in job.logs for line in log.shards]
    n = np.array([line["images"] for line in lines], float)
    seconds = np.array([line["seconds"] for line in lines], float)
    runs, alike = [], dict[int, list[float]]()
    for job in jobs:
        full = [
            line["seconds"] / line["images"]
            for log in job.logs
            for line in log.shards
            if line["images"] == job.shard_size
        ]
        alike.setdefault(job.shard_size, []).extend(full)
        images = sum(line["images"] for log in job.logs for line in log.shards)
        runs.append(
            {
                "out": job.out.name,
                "shard_size": job.shard_size,
                "shards": sum(len(log.shards) for log in job.logs),
                "images": images,
                "workers": max(log.workers() for log in job.logs),
                "losses": sum(len(log.losses) for log in job.logs),
                "seconds_per_image": statistics.median(full) if full else None,
                "spread": float(np.std(np.log(full))) if len(full) > 1 else None,
                "bytes_written": sum(line["bytes_written"] for log in job.logs for line in log.shards) / images,
                "gap": statistics.median(gaps) if (gaps := [gap for log in job.logs for gap in log.gaps()]) else None,
            }
        )
    several = len(alike) > 1
    # Each shard's error is about proportional to its length, so each counts by its relative error.
    terms = (np.stack([np.ones_like(n), n], 1) if several else n[:, None]) / n[:, None]
    solution, *_ = np.linalg.lstsq(terms, seconds / n, rcond=None)
    variance = ((seconds / n - terms @ solution) ** 2).sum() / max(1, len(n) - terms.shape[1])
    errors = np.sqrt(variance * np.diag(np.linalg.inv(terms.T @ terms)))
    gaps = [gap for job in jobs for log in job.logs for gap in log.gaps()]
    starts = [start for job in jobs for log in job.logs for start in log.starts()]
    # Of the largest size of which there are enough to say.
    spreads = [float(np.std(np.log(speeds))) for _, speeds in sorted(alike.items()) if len(speeds) >= ENOUGH_SHARDS]
    return {
        "seconds_per_image": float(solution[-1]),
        "seconds_per_image_error": float(errors[-1]),
        "overhead": float(solution[0]) if several else 0.0,  # by chance below 0, where it is next to nothing
        "overhead_error": float(errors[0]) if several else None,
        "gap": statistics.median(gaps) if gaps else 0.0,
        "start_up": statistics.median(starts) if starts else 0.0,
        "starts": starts,
        "spread": spreads[-1] if spreads else 0.0,
        "bytes_read": sum(line["bytes_read"] for line in lines) / n.sum(),
        "bytes_written": sum(line["bytes_written"] for line in lines) / n.sum(),
        "runs": runs,
        **machine(),
    }


def costs_of(record: dict[str, Any]) -> Costs:
    """From what `fit` returned."""
    names = ("seconds_per_image", "overhead", "gap", "start_up", "spread")
    return Costs(**{name: max(0.0, record[name]) for name in names})


@dataclass(frozen=True)
class Comparison:
    """One run of a real job and its simulation."""

    log: Log
    workers: int
    wall: float
    """Real, to the last shard that was logged."""
    predicted_wall: float
    completion_error: float
    """Median of the differences between real and predicted moments of the n-th finished shard, seconds."""
    elsewhere: int


def compare(job: RealJob, costs: Costs, workers: int | None = None, local: bool = False) -> list[Comparison]:
    """Each run of a job against its simulation, with the run's losses at their moments.

    Raises:
        DataError: two runs worked at the same time: which shards each had is not in their logs.
    """
    done: set[int] = set()
    comparisons = []
    for log, following in zip(job.logs, [*job.logs[1:], None], strict=True):
        wall = log.shards[-1]["moment"]
        if following and following.began < log.began + wall:
            raise DataError(
                f"Expected runs of {job.out} one after another, found two at the same time; check jobs of one driver."
            )
        count = workers or log.workers()
        left = [shard for shard in range(-(-job.images // job.shard_size)) if shard not in done]
        outcome = run_simulated(Simulated(count, costs, job.rows, losses=log.losses, local=local), left)
        real = [line["moment"] for line in log.shards]
        predicted = [moment for moment, _ in outcome.finished][: len(real)]
        error = statistics.median(abs(a - b) for a, b in zip(real, predicted, strict=False))
        comparisons.append(Comparison(log, count, wall, predicted[-1], error, outcome.elsewhere))
        done |= {line["shard"] for line in log.shards}
    return comparisons


def run_jobs(options: argparse.Namespace) -> None:
    from ddad.bulk import places
    from ddad.bulk.run import score_manifest

    photos = [place for place, _ in places.images(str(options.photos.resolve()))]
    if not photos:
        raise DataError(f"Expected photographs in {options.photos}, found none; name another folder.")
    options.out.mkdir(parents=True, exist_ok=True)
    manifest = options.out / "manifest.csv"
    rows = [photos[number % len(photos)] for number in range(options.images or len(photos))]
    manifest.write_text("uri\n" + "".join(f"{row}\n" for row in rows))
    for repeat in range(options.repeats):
        for size in options.sizes:
            out = options.out / f"{size}-{repeat}"
            if options.processor_time:
                seconds = _run_by_processor(options.model, manifest.resolve(), out, size)
            else:
                over = threading.Event()
                killer = threading.Thread(target=_kill, args=(options.kills, options.kill_seconds, repeat, over))
                killer.start()
                try:
                    seconds = score_manifest(
                        options.model, manifest, out, engine=options.engine, workers=options.workers, shard_size=size
                    ).seconds
                finally:
                    over.set()
                    killer.join()
            print(f"{out}: {len(rows)} photographs in {seconds:.1f} s", flush=True)


def _run_by_processor(model: Path, manifest: Path, out: Path, size: int) -> float:
    """One worker, in this process, whose clock is the processor's: others on this machine do not slow it down.

    What it waits for, as disks, does not count either.
    """
    from ddad.bulk.job import open_job
    from ddad.bulk.run import job_options
    from ddad.bulk.scoring import ShardScorer

    job = open_job(str(out), str(manifest), job_options(model, "cpu", shard_size=size))
    began, started = datetime.now(UTC).replace(microsecond=0), time.process_time()
    lines = []
    scorer = ShardScorer(str(out), job, model, 4, "cpu")
    for shard in range(job.shards):
        before = time.process_time()
        scored = asdict(scorer(shard))
        now = time.process_time()
        lines.append(
            {"time": (began + timedelta(seconds=now - started)).isoformat(), **scored, "seconds": now - before}
        )
    log = out / LOG / f"{began:%Y%m%dT%H%M%SZ}-processor-{os.getpid()}.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return time.process_time() - started


def _kill(count: int, pause: float, seed: int, over: threading.Event) -> None:
    """End workers of this process, local ones, at exponential moments."""
    chance = random.Random(seed)
    for _ in range(count):
        if over.wait(chance.expovariate(1 / pause)):
            return
        if children := multiprocessing.active_children():
            os.kill(chance.choice(children).pid or 0, signal.SIGKILL)


def decode(photos: Path, megapixels: Sequence[float], size: int, count: int) -> list[dict[str, Any]]:
    """JPEGs of each size, read as a worker reads them: hash, decode, resize; medians, processor milliseconds."""
    import hashlib
    import io

    from PIL import Image

    from ddad.bulk import places
    from ddad.images import MAX_PIXELS, ImageRule, pixel_values, to_rgb

    sources = [place for place, _ in places.images(str(photos.resolve()))]
    chance = np.random.default_rng(0)
    rows = []
    for each in megapixels:
        height, width = round(math.sqrt(each * 1e6 * 3 / 4)), round(math.sqrt(each * 1e6 * 4 / 3))
        times: dict[str, list[float]] = {"hash": [], "decode": [], "resize": []}
        lengths = []
        for _ in range(count):
            picture = Image.new("RGB", (width, height))
            top = 0
            while top < height:  # tiled at their own resolution, not enlarged: as much detail as photographs have
                left = tallest = 0
                while left < width:
                    with Image.open(sources[chance.integers(len(sources))]) as tile:
                        picture.paste(tile.convert("RGB"), (left, top))
                        left += tile.width
                        tallest = max(tallest, tile.height)
                top += tallest // 2  # most are covered in part, so that no row is empty
            # Grey photographs: the noise of a colour sensor, or the colour planes would cost next to nothing.
            noisy = np.asarray(picture) + chance.normal(0, 3, (height, width, 3))
            buffer = io.BytesIO()
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
            content = buffer.getvalue()
            lengths.append(len(content))
            began = time.thread_time()
            hashlib.sha256(content).hexdigest()
            hashed = time.thread_time()
            rule = ImageRule()
            values = pixel_values(io.BytesIO(content), rule, MAX_PIXELS)
            decoded = time.thread_time()
            to_rgb(values, (size, size), rule, "photograph")
            resized = time.thread_time()
            for name, seconds in zip(times, (hashed - began, decoded - hashed, resized - decoded), strict=True):
                times[name].append(seconds * 1000)
        medians = {name: statistics.median(values) for name, values in times.items()}
        rows.append({"megapixels": each, "bytes": statistics.mean(lengths), **medians, "ms": sum(medians.values())})
    return rows


def listing(rows: int, shard_size: int) -> dict[str, Any]:
    """`open_job` of a Parquet manifest with so many rows, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "manifest.parquet"
        _write_manifest(manifest, rows)
        out = Path(folder) / "out"
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, processor, before, after = pool.apply(_open_job, (str(out), str(manifest), shard_size))
        written = sum(file.stat().st_size for file in out.rglob("part-*.parquet"))
        return {
            "rows": rows,
            "seconds": seconds,
            "processor_seconds": processor,
            "memory_before_mb": before,
            "memory_peak_mb": after,
            "manifest_bytes": manifest.stat().st_size,
            "listing_bytes": written,
        }


def _write_manifest(manifest: Path, rows: int) -> None:
    """Names and ETags as of an object store: random, so that they compress no better than real ones."""
    import pyarrow as pa
    import pyarrow.parquet

    chance = np.random.default_rng(0)
    schema = pa.schema([("uri", pa.string()), ("etag", pa.string())])
    with pyarrow.parquet.ParquetWriter(manifest, schema) as writer:
        for first in range(0, rows, 1 << 16):
            tokens = [chance.bytes(24).hex() for _ in range(first, min(rows, first + (1 << 16)))]
            uris = [f"s3://archive/2026/11/25/line-{n % 40:02d}/{token[:16]}.jpg" for n, token in enumerate(tokens)]
            writer.write_table(pa.table([uris, [token[16:] for token in tokens]], schema))


def _open_job(out: str, manifest: str, shard_size: int) -> tuple[float, ...]:
    from ddad.bulk.job import open_job

    asked = {"model": "", "shard_size": shard_size, "batch_size": 8, "threads": 1, "device": "cpu", "backend": None}
    asked |= {"precision": None, "fast": False, "heatmaps": False}
    before = _peak_mb()
    began, processor = time.perf_counter(), time.process_time()
    open_job(out, manifest, asked)
    return time.perf_counter() - began, time.process_time() - processor, before, _peak_mb()


def _peak_mb() -> float:
    """Of this program: `getrusage` would count the one that started it too."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) / 1024


def tables(sizes: Sequence[int]) -> list[dict[str, Any]]:
    """What a shard takes besides its photographs: its rows read from the listing, its results encoded and written."""
    from ddad.bulk import places
    from ddad.bulk.tables import encode_results, read_shard, write_listing

    chance = random.Random(0)
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            tokens = [chance.randbytes(24).hex() for _ in range(10 * size)]
            write_listing(folder, ((f"s3://archive/{token[:16]}.jpg", token[16:], None) for token in tokens), size)
            times: dict[str, list[float]] = {"read": [], "write": []}
            for shard in range(10):
                began = time.process_time()
                entries = read_shard(folder, shard, size)
                read = time.process_time()
                results = [asdict(entry) | _result(chance) for entry in entries]
                filled = time.process_time()
                content = encode_results(results)
                places.write(f"{folder}/results.parquet", content)
                times["read"].append((read - began) * 1000)
                times["write"].append((time.process_time() - filled) * 1000)
            medians = {f"{name}_ms": statistics.median(values) for name, values in times.items()}
            rows.append({"shard_size": size, **medians, "bytes_a_row": len(content) / size})
    return rows


def _result(chance: random.Random) -> dict[str, Any]:
    """As of a photograph with a region; hashes and floats, which do not compress."""
    score = chance.random()
    region = {"box": [chance.randrange(128) for _ in range(4)], "area": chance.randrange(5000), "peak": chance.random()}
    return {
        "sha256": chance.randbytes(32).hex(),
        "anomaly_score": score,
        "p_value": round(score, 2),
        "is_anomalous": score > 0.9,
        "threshold": 0.9,
        "regions": [region] if score > 0.9 else [],
        "photo": {name: chance.random() for name in ("brightness", "focus", "horizontal", "vertical")},
        "error": None,
        "model": "0" * 64,
    }


def find_finished(count: int) -> dict[str, Any]:
    """`finished` where there are results of so many shards; the files are empty."""
    from ddad.bulk.job import finished, results_place

    with tempfile.TemporaryDirectory() as out:
        for shard in range(count):
            Path(results_place(out, shard)).touch()
        began, processor = time.perf_counter(), time.process_time()
        assert len(finished(out)) == count
        return {
            "files": count,
            "seconds": time.perf_counter() - began,
            "processor_seconds": time.process_time() - processor,
        }


def loop(tasks: int, workers: int, engine: str) -> dict[str, Any]:
    """Tasks that do nothing, through the real loop: how many shards a second a driver can hand out."""
    crew: Any
    if engine == "ray":
        from ddad.cluster import Actors, connect

        connect()
        crew = Actors(_do_nothing, (), most=workers, least=workers, cpus=0.1)
    else:
        from ddad.bulk.crew import Processes

        crew = Processes(_do_nothing, [()] * workers)
    moments = []
    with crew:
        for _ in drive(crew, range(tasks), lambda task, reason: None):
            moments.append((time.perf_counter(), time.process_time()))
    first = tasks // 10  # the others had started by then
    (began, began_cpu), (ended, ended_cpu) = moments[first], moments[-1]
    count = tasks - 1 - first
    return {
        "engine": engine,
        "workers": workers,
        "tasks": tasks,
        "tasks_per_second": count / (ended - began),
        "driver_cpu_ms_per_task": (ended_cpu - began_cpu) / count * 1000,
    }


def _do_nothing() -> Callable[[int], int]:
    return abs


def parts(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = machine()
    if "decode" in options.only:
        if options.photos is None:
            raise ConfigError("Expected PHOTOS to make larger ones of for decode, found none; name a folder.")
        found["decode"] = decode(options.photos, options.megapixels, options.size, options.count)
        print("| megapixels | MB | hash ms | decode ms | resize ms | together ms |\n|---|---|---|---|---|---|")
        for row in found["decode"]:
            times = " | ".join(f"{row[name]:.1f}" for name in ("hash", "decode", "resize", "ms"))
            print(f"| {row['megapixels']:g} | {row['bytes'] / 1e6:.2f} | {times} |", flush=True)
    if "listing" in options.only:
        found["listing"] = []
        print("\n| rows | s | processor s | peak MB (before) | bytes a row |\n|---|---|---|---|---|")
        for rows in options.rows:
            row = listing(rows, options.shard_size)
            found["listing"].append(row)
            print(
                f"| {rows:,} | {row['seconds']:.1f} | {row['processor_seconds']:.1f} | {row['memory_peak_mb']:.0f} "
                f"({row['memory_before_mb']:.0f}) | {row['listing_bytes'] / rows:.1f} |",
                flush=True,
            )
    if "tables" in options.only:
        found["tables"] = tables([100, 1000, 10_000])
        print("\n| shard size | read ms | encode and write ms | bytes a result |\n|---|---|---|---|")
        for row in found["tables"]:
            cells = f"{row['read_ms']:.1f} | {row['write_ms']:.1f} | {row['bytes_a_row']:.0f}"
            print(f"| {row['shard_size']:,} | {cells} |", flush=True)
    if "finished" in options.only:
        found["finished"] = find_finished(options.files)
        row = found["finished"]
        print(
            f"\nfinished(): {row['files']:,} shards in {row['seconds']:.2f} s "
            f"({row['processor_seconds']:.2f} of the processor)",
            flush=True,
        )
    if "loop" in options.only:
        found["loop"] = row = loop(options.tasks, options.workers, options.engine)
        print(
            f"\n{row['engine']}, {row['workers']} workers: {row['tasks_per_second']:,.0f} shards a second, "
            f"{row['driver_cpu_ms_per_task']:.2f} ms of the driver's processor each"
        )
    return found


def machine() -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=Path(__file__).parent
    ).stdout.strip()
    return {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "commit": commit,
        "date": f"{datetime.now(UTC):%F}",
    }


def print_fit(record: dict[str, Any]) -> None:
    print("| job | shard size | shards | workers | losses | ms an image, median | spread | gap ms | bytes an image |")
    print("|---|---|---|---|---|---|---|---|---|")
    for run in record["runs"]:
        cells = [run["out"], run["shard_size"], run["shards"], run["workers"], run["losses"]]
        cells += [_in(run["seconds_per_image"], "{:.1f}", 1000), _in(run["spread"], "{:.1%}")]
        cells += [_in(run["gap"], "{:.1f}", 1000), f"{run['bytes_written']:.0f}"]
        print("| " + " | ".join(map(str, cells)) + " |")
    overhead = f"{record['overhead'] * 1000:.0f} ms a shard"
    if record["overhead_error"] is not None:
        overhead += f" (standard error {record['overhead_error'] * 1000:.0f})"
    print(
        f"\n{record['seconds_per_image'] * 1000:.2f} ms an image (standard error "
        f"{record['seconds_per_image_error'] * 1000:.2f}), overhead {overhead}, gap {record['gap'] * 1000:.1f} ms, "
        f"start-up {record['start_up']:.1f} s (median of {len(record['starts'])}), spread {record['spread']:.1%}; "
        f"{record['bytes_read']:,.0f} bytes read and {record['bytes_written']:.0f} written an image"
    )


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds > 7200 else f"{seconds:.0f} s"


def _in(value: float | None, text: str, factor: float = 1) -> str:
    return "-" if value is None else text.format(value * factor)


def simulate_table(options: argparse.Namespace) -> list[dict[str, Any]]:
    if options.fit is None and options.seconds_per_image is None:
        raise ConfigError("Expected --fit or --seconds-per-image, found neither; the simulation knows no speed.")
    costs = costs_of(_read_fit(options.fit)) if options.fit else Costs(options.seconds_per_image)
    given = {
        name: getattr(options, name) for name in costs.__dataclass_fields__ if getattr(options, name, None) is not None
    }
    rates = given.pop("preemptions_per_hour")
    for name, value in (("images", options.images), ("workers", options.workers), ("sizes", min(options.sizes))):
        if value < 1:
            raise ConfigError(f"Expected {name} of at least 1, found {value}.")
    costs = replace(costs, **given)
    print(", ".join(f"{name} {value:.4g}" for name, value in asdict(costs).items() if name != "preemptions_per_hour"))
    rows = []
    for rate in rates:
        each = replace(costs, preemptions_per_hour=rate)
        ideal = ideal_wall(options.images, options.workers, each)
        print(
            f"\n{options.images:,} images, {options.workers} workers, {rate:g} preemptions an hour of each; ideal "
            f"{_time(ideal)}; best by the rule: {best_size(options.images, options.workers, each):,.0f}\n"
        )
        print("| shard size | shards | time | over ideal | formula | lost | overhead | starting | idle | given up |")
        print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
        for size in options.sizes:
            row = {"shard_size": size, "preemptions_per_hour": rate, "ideal": ideal}
            shards = -(-options.images // size)
            try:
                outcomes = [
                    simulate(options.images, size, options.workers, each, seed) for seed in range(options.seeds)
                ]
            except ConfigError as error:  # the loop gives up: too many losses before the first shard is done
                rows.append(row | {"ends": str(error)})
                print(f"| {size:,} | {shards:,} | ends: {error} |", flush=True)
                continue
            wall = statistics.mean(outcome.wall for outcome in outcomes)
            shares = {
                name: statistics.mean(outcome.share(name) for outcome in outcomes)
                for name in ("useful", "lost", "overhead", "starting", "idle")
            }
            closed = approximate_wall(options.images, size, options.workers, each)
            given_up = statistics.mean(len(outcome.given_up) for outcome in outcomes)
            row |= {"wall": wall, "formula": closed, **shares, "given_up": given_up}
            rows.append(row | {"losses": [outcome.losses for outcome in outcomes]})
            cells = [f"{size:,}", f"{shards:,}", _time(wall), f"{wall / ideal - 1:+.2%}", f"{closed / ideal - 1:+.2%}"]
            cells += [f"{shares[name]:.2%}" for name in ("lost", "overhead", "starting", "idle")]
            print("| " + " | ".join([*cells, f"{given_up:g}"]) + " |", flush=True)
    return rows


def check_table(options: argparse.Namespace) -> list[dict[str, Any]]:
    costs = costs_of(_read_fit(options.fit))
    rows = []
    print(
        "| job | shards | workers | losses (elsewhere) | speed of | wall s | predicted s | error | n-th shard off s |"
        "\n|---|---|---|---|---|---|---|---|---|"
    )
    for out in options.out:
        job = read_job(out)
        own = fit([job])
        itself = Costs(own["seconds_per_image"], gap=own["gap"], start_up=own["start_up"])
        # With the job's own speed and start-up only the loop, the losses and the end are left to be predicted.
        for name, speed in (("the fit", replace(costs, spread=0.0)), ("the job", itself)):
            for result in compare(job, speed, options.workers, options.engine == "local"):
                error = result.predicted_wall / result.wall - 1
                shards, losses = len(result.log.shards), len(result.log.losses)
                rows.append(
                    {"job": str(out), "speed_of": name, "shards": shards, "losses": losses, "workers": result.workers}
                    | {"wall": result.wall, "predicted": result.predicted_wall, "error": error}
                    | {"completion_error": result.completion_error, "elsewhere": result.elsewhere}
                )
                print(
                    f"| {out.name} | {shards} | {result.workers} | {losses} ({result.elsewhere}) | {name} | "
                    f"{result.wall:.1f} | {result.predicted_wall:.1f} | {error:+.1%} | {result.completion_error:.1f} |"
                )
    return rows


def _read_fit(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text())
        costs_of(record)
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"Expected a fit in {file}, found none; write it with scale.py fit OUT... --json.") from None
    return record


def _numbers(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("model", type=Path)
    one.add_argument("photos", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("--sizes", type=_numbers(int), default=[8, 16, 64, 256])
    one.add_argument("--images", type=int, help="photographs are used again, where there are fewer")
    one.add_argument("--workers", type=int, default=1)
    one.add_argument("--engine", choices=("local", "ray"), default="local")
    one.add_argument("--repeats", type=int, default=1)
    one.add_argument("--processor-time", action="store_true", help="one worker that counts its processor's seconds")
    one.add_argument("--kills", type=int, default=0, help="workers of the local engine that are ended, a run")
    one.add_argument("--kill-seconds", type=float, default=15, help="between them, on average")
    one = commands.add_parser("parts")
    one.add_argument("photos", type=Path, nargs="?")
    one.add_argument("--only", type=_numbers(str), default=["decode", "listing", "tables", "finished", "loop"])
    one.add_argument("--megapixels", type=_numbers(float), default=[1, 4, 12])
    one.add_argument("--size", type=int, default=128, help="of the model")
    one.add_argument("--count", type=int, default=10, help="photographs of each size")
    one.add_argument("--rows", type=_numbers(int), default=[100_000, 1_000_000], help="of manifests")
    one.add_argument("--shard-size", type=int, default=1000)
    one.add_argument("--files", type=int, default=100_000, help="finished shards")
    one.add_argument("--tasks", type=int, default=5000)
    one.add_argument("--workers", type=int, default=2)
    one.add_argument("--engine", choices=("local", "ray"), default="local")
    one = commands.add_parser("fit")
    one.add_argument("out", type=Path, nargs="+")
    one = commands.add_parser("simulate")
    one.add_argument("--fit", type=Path)
    one.add_argument("--images", type=int, required=True)
    one.add_argument("--workers", type=int, required=True)
    one.add_argument("--sizes", type=_numbers(int), default=_numbers(int)(SIZES))
    one.add_argument("--preemptions-per-hour", type=_numbers(float), default=[0.0, 0.1, 1.0], help="of each worker")
    for name in ("seconds-per-image", "overhead", "gap", "start-up", "spread", "slow-share", "slow-factor"):
        one.add_argument(f"--{name}", type=float, help="instead of the fit's" if name[:4] != "slow" else None)
    one.add_argument("--seeds", type=int, default=1)
    one = commands.add_parser("check")
    one.add_argument("out", type=Path, nargs="+")
    one.add_argument("--fit", type=Path, required=True)
    one.add_argument("--engine", choices=("local", "ray"), default="local", help="that the jobs had")
    one.add_argument("--workers", type=int, help="by default as many as were at work at the same time")
    for each in commands.choices.values():
        each.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    found: Any = None
    try:
        if options.command == "run":
            run_jobs(options)
        elif options.command == "parts":
            found = parts(options)
        elif options.command == "fit":
            found = fit([read_job(out) for out in options.out])
            print_fit(found)
        elif options.command == "simulate":
            found = simulate_table(options)
        else:
            found = check_table(options)
    except DDADError as error:
        print(error, file=sys.stderr)
        return 1
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
