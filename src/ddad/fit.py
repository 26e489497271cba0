"""The whole of `ddad train`: split, measure, train, calibrate, save. The same call again resumes or finds it done."""

import copy
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import psutil
import torch

from ddad.adaptation import Adapter
from ddad.checkpoint import CheckpointStore
from ddad.config import Settings
from ddad.data.folder import scan
from ddad.data.samples import Dataset, Split, fingerprint, model_shape, split_good, spread, too_few_to_split
from ddad.detector import Detector, read_record
from ddad.distributed import Processes, alike, join
from ddad.errors import ConfigError, ModelError
from ddad.features import FeatureExtractor, create_features, weights_license
from ddad.files import remove_leftovers, write_json
from ddad.images import ImageRule, fit_image_rule, probe, read_image
from ddad.sampling import to_unit
from ddad.tiling import Tiles, Tiling, spans
from ddad.tracking import check_trackers, log_progress, trackers
from ddad.training import Progress, Trainer
from ddad.tuning import DEFECTS, MOST_ADAPTED, MOST_JUDGED, adapt_features, can_adapt
from ddad.unet import choose_device, create_scheduler, create_unet, parameter_count

CACHE_SHARE = 0.4
"""Share of the free memory that decoded images may take; the others are read again each time."""
DEFAULT_TIME_BUDGET = 3600.0
FEWEST_STEPS = 10
"""A time budget that allows fewer is refused: the model would be noise with a promise."""
HELD_OUT = 32
"""Select images whose denoising loss is measured on the way."""
MOST_SELECT = 256
"""Select images that give the statistics of the maps; more would take memory and change nothing."""
PROMISED = ("threshold", "promised_rate", "rate_bound")
"""Of the calibration, for trackers."""
ADAPTATION_SHARE = 0.35
"""Of a time budget, at most."""


@dataclass(frozen=True)
class Plan:
    """What a run will do, decided once and stored, so that a resumed run is the same run."""

    settings: dict[str, Any]
    data: str
    """Fingerprint of the good images."""
    shape: tuple[int, int]
    white: int
    train: tuple[str, ...]
    select: tuple[str, ...]
    calibration: tuple[str, ...]
    """Content hashes of the three parts."""
    budget: dict[str, float | None]
    """What was asked: steps, or seconds."""
    estimate: dict[str, Any]
    """What was measured before the first step, with the number of steps and passes that followed from it."""

    @property
    def steps(self) -> int:
        return self.estimate["steps"]


@dataclass(frozen=True)
class Estimate:
    """Measured before the first step."""

    steps: int
    adaptation_epochs: int
    images_per_second: float
    train_seconds: float
    adapt_seconds: float
    calibrate_seconds: float
    memory_mb: float
    parameters: int
    precision: str
    shape: tuple[int, int]
    train_images: int
    select_images: int
    calibration_images: int


class ImageCache(Sequence[np.ndarray]):
    """Images at the model's shape, decoded once and kept as bytes, as many as fit; the others are read when needed."""

    def __init__(
        self, paths: Sequence[Path], shape: tuple[int, int], rule: ImageRule, memory: float, workers: int
    ) -> None:
        self._paths, self._shape, self._rule = paths, shape, rule
        kept = min(len(paths), int(memory // (shape[0] * shape[1] * 3)))
        with ThreadPoolExecutor(max(1, workers)) as pool:
            self._kept = list(pool.map(self._read, paths[:kept]))

    def _read(self, path: Path) -> np.ndarray:
        return read_image(path, self._shape, self._rule)

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: Any) -> Any:
        return self._kept[index] if index < len(self._kept) else self._read(self._paths[index])


def fit(
    data: str | Path | Dataset,
    out: str | Path,
    settings: Settings,
    *,
    steps: int | None = None,
    time_budget: float | None = None,
    device: str | None = None,
    workers: int = 2,
    log_with: Sequence[str] = (),
    log_dir: str | Path | None = None,
    on_estimate: Callable[[Estimate], None] = lambda estimate: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_stage: Callable[[str], None] = lambda sentence: None,
) -> Path:
    """Train a detector on the good images of `data` and write it to the folder `out`.

    Run again with the same arguments it resumes (from `out`.run), or returns at once where the model is there.

    Several processes that were launched together (`ddad.distributed`) share the training; batches stay as large as the
    settings say. Only the main one writes, calls back and returns: the others end in here with SystemExit, when
    training is over or the main one raises an error.

    Args:
        data: a folder in MVTec layout, a folder of good images, or one category of another layout.
        out: the model folder to write.
        settings: what to train.
        steps: training steps; or
        time_budget: seconds for everything this call does, from which the steps follow once, by the measured speed.
        log_with: trackers that follow the training: `tensorboard`, `mlflow`, or another one that Accelerate knows.
        log_dir: their folder; by default `out`.logs.

    Raises:
        ConfigError: `out` holds another model or the run of another command; settings that cannot work.
        DataError: images that cannot be used.
        training.Interrupted: asked to stop; the same call resumes.
    """
    started = time.monotonic()
    out = Path(out)
    run = out.with_name(out.name + ".run")
    with alike():
        if steps is not None and time_budget is not None:
            raise ConfigError("Expected either a number of steps or a time budget, found both; leave one out.")
        if steps is None and time_budget is None:
            time_budget = DEFAULT_TIME_BUDGET
        check_trackers(log_with)
        on_device = choose_device(device)
    processes = join(on_device)
    processes.share(settings.training.batch_size)
    if not processes.is_main:
        _assist(processes, settings, run, on_device, time_budget, workers)
    asked = {"steps": steps, "seconds": time_budget}
    with ExitStack() as stack:
        with processes.together() as task:
            prepared = _prepare(data, out, run, settings, asked, stack, on_stage)
            if prepared:
                task.update(
                    train=tuple(path.absolute() for path in prepared.split.train),
                    tiling=prepared.tiling,
                    rule=prepared.rule,
                    planned=prepared.plan is not None,
                )
        if not prepared:
            processes.leave()
            return out
        split, tiling, rule, plan = prepared.split, prepared.tiling, prepared.rule, prepared.plan
        shape = tiling.canvas
        store = CheckpointStore(run)
        with processes.together():
            images = ImageCache(split.train, shape, rule, _memory(processes), workers)
            memory = _memory(processes)
            select = ImageCache(split.select, shape, rule, memory / 2, workers)
            calibration = ImageCache(split.calibration, shape, rule, memory / 2, workers)

        unet = _fresh_unet(settings)
        scheduler = create_scheduler(settings.network.prediction_type)
        trainer = create_trainer(unet, settings, on_device)
        detector = Detector(unet, scheduler, prepared.features, settings, shape, image_rule=rule, device=trainer.device)
        done = store.latest_step()
        with processes.together() as decided:
            if plan:
                estimate = Estimate(**{**plan.estimate, "shape": shape})
                left = 1 - done / estimate.steps
                estimate = replace(estimate, train_seconds=left * estimate.train_seconds)
            else:
                estimate = _measure(trainer, detector, images, split, steps, time_budget, started)
                plan = Plan(
                    settings=settings.model_dump(mode="json"),
                    data=prepared.fingerprint,
                    shape=shape,
                    white=rule.white,
                    train=tuple(split.hashes[path] for path in split.train),
                    select=tuple(split.hashes[path] for path in split.select),
                    calibration=tuple(split.hashes[path] for path in split.calibration),
                    budget=asked,
                    estimate=asdict(estimate),
                )
                write_json(run / "run.json", asdict(plan))
            if processes.count > 1:
                each = len(processes.share(settings.training.batch_size))
                on_stage(f"{processes.count} processes, with {each} images of each step.")
            if done:
                on_stage(f"Resuming after step {done} of {plan.steps}.")
            on_estimate(estimate)

            log = RunLog(run / "log.jsonl")
            logs = Path(log_dir) if log_dir else out.with_name(out.name + ".logs")
            track = stack.enter_context(
                trackers(
                    log_with,
                    logs,
                    out.name,
                    done=done,
                    settings={**plan.settings, "steps": plan.steps, "good_images": plan.data},
                    state=run / "tracked.json",
                    device=trainer.device,
                )
            )
            if log_with:
                on_stage(f"Followed by {', '.join(log_with)} in {logs}.")
            decided["steps"] = plan.steps

        def progress(event: Progress) -> None:
            log.write(event)
            log_progress(track, event, settings.training.batch_size)
            on_progress(event)

        trainer.run(
            Tiles(images, tiling),
            plan.steps,
            held_out=spread(Tiles(select, tiling), HELD_OUT),
            store=store,
            on_progress=progress,
            on_resume=log.resume,
        )
        processes.leave()
        log.close()
        if warning := divergence(log.held_out, "model"):
            on_stage(warning)
        with trainer.averaged():
            passes = CheckpointStore(run / "adaptation")
            judges = [] if _across(split, settings) else select
            adaptation = adapt_features(detector, images, judges, estimate.adaptation_epochs, passes, on_stage)
            on_stage("Calibrating on good images that were not trained on.")
            calibrate(detector, split, select, calibration)
            detector.record = {
                "category": prepared.dataset.category,
                "trained": datetime.now(UTC).isoformat(timespec="seconds"),
                "data": {
                    "fingerprint": plan.data,
                    "train": plan.train,
                    "select": plan.select,
                    "calibration": plan.calibration,
                },
                "training": {"steps": plan.steps, "budget": plan.budget, **log.summary()},
                "adaptation": adaptation,
                "features_license": weights_license(settings.scoring.features),
            }
            for entry in adaptation.get("history", ()):
                numbers = {f"adaptation.{name}": entry[name] for name in ("loss", "synthetic_auroc")}
                track({name: value for name, value in numbers.items() if value is not None}, entry["epoch"])
            assert detector.calibration is not None
            promised = {name: getattr(detector.calibration, name) for name in PROMISED}
            track({f"calibration.{name}": value for name, value in promised.items()}, plan.steps)
            detector.save_pretrained(out, extra={"training.jsonl": log.path})
        shutil.rmtree(run)
    return out


@dataclass(frozen=True)
class _Prepared:
    """What there is to train on, and the plan of an earlier sitting."""

    dataset: Dataset
    split: Split
    fingerprint: str
    tiling: Tiling
    rule: ImageRule
    features: FeatureExtractor
    plan: Plan | None


def _prepare(
    data: str | Path | Dataset,
    out: Path,
    run: Path,
    settings: Settings,
    asked: dict[str, float | None],
    stack: ExitStack,
    on_stage: Callable[[str], None],
) -> _Prepared | None:
    """Look at the images and at what there is already, and lock the run; None where the model is there."""
    dataset = data if isinstance(data, Dataset) else scan(data)
    paths = [sample.path for sample in dataset.train]
    split = split_good(paths, settings.false_alarms)
    data_fingerprint = fingerprint(split.hashes.values())

    if out.exists():
        _check_finished(out, settings, data_fingerprint, asked)
        shutil.rmtree(run, ignore_errors=True)
        on_stage(f"{out} is already trained with these settings on these images; nothing to do.")
        return None
    rows, columns = settings.tiles
    sizes = [(info.height / spans(rows), info.width / spans(columns)) for info in map(probe, paths)]
    tile = (settings.image_size,) * 2 if settings.square else model_shape(sizes, settings.image_size)
    tiling = Tiling(rows, columns, tile)
    features = create_features(settings.scoring.features, settings.scoring.feature_layers, tile)
    stack.enter_context(locked(run))
    remove_leftovers(out.parent, out.name)
    plan = _load_plan(run)
    if plan:
        _check_same(plan, settings, data_fingerprint, asked, run)
    rule = ImageRule(white=plan.white) if plan else fit_image_rule(paths)
    height, width = tiling.canvas
    on_stage(
        f"{len(paths)} good images at {height} x {width} pixels"
        f"{f', in {tiling.number} tiles of {tile[0]} x {tile[1]}' if tiling.number > 1 else ''}: "
        f"{len(split.train)} to train, "
        f"{len(split.select)} to select, {len(split.calibration)} to calibrate."
    )
    return _Prepared(dataset, split, data_fingerprint, tiling, rule, features, plan)


def _assist(
    processes: Processes,
    settings: Settings,
    run: Path,
    device: torch.device,
    time_budget: float | None,
    workers: int,
) -> NoReturn:
    """What a process beside the main one does, in step with `fit`: its share of the training."""
    with processes.together() as task:
        pass
    if not task:
        processes.leave()
    tiling = task["tiling"]
    with processes.together():
        images = ImageCache(task["train"], tiling.canvas, task["rule"], _memory(processes), workers)
    trainer = create_trainer(_fresh_unet(settings), settings, device)
    with processes.together() as decided:
        if not task["planned"]:
            _step_seconds(trainer, settings, Tiles(images, tiling), time_budget)
    trainer.run(Tiles(images, tiling), decided["steps"], store=CheckpointStore(run))
    processes.leave()
    raise AssertionError("the main process goes on in `fit`")


def _memory(processes: Processes) -> float:
    """Bytes that one process may fill with decoded images now."""
    return psutil.virtual_memory().available * CACHE_SHARE / processes.local_count


def _fresh_unet(settings: Settings) -> Any:
    torch.manual_seed(settings.seed)
    return create_unet(settings.network.architecture)


def calibrate(detector: Detector, split: Split, select: ImageCache, calibration: ImageCache) -> None:
    """Calibrate a detector on the good images that were not trained on: two sets, or one in folds where few."""
    if _across(split, detector.settings):
        detector.calibrate_across(chain(select, calibration))
    else:
        detector.calibrate(spread(select, MOST_SELECT), calibration)


def _across(split: Split, settings: Settings) -> bool:
    good = len(split.train) + len(split.select) + len(split.calibration)
    return too_few_to_split(good, len(split.select), len(split.calibration), settings.false_alarms)


def diverged(held_out_losses: Sequence[float]) -> bool:
    """Whether a run ended far above the best it had reached; falling rates let a sound run end near its best."""
    return bool(held_out_losses) and held_out_losses[-1] > 1.5 * min(held_out_losses)


def divergence(held_out_losses: Sequence[float], what: str) -> str | None:
    """A warning not to trust `what`, where the run that made it has diverged."""
    if not diverged(held_out_losses):
        return None
    return (
        f"Warning: training diverged. The held-out loss was {min(held_out_losses):.4g} and is "
        f"{held_out_losses[-1]:.4g} at the end; this {what} is not to be trusted. Train again with another --seed."
    )


def create_trainer(unet: Any, settings: Settings, device: torch.device, labels: Sequence[int] | None = None) -> Trainer:
    """A trainer as the settings say; `labels` as of `Trainer`."""
    return Trainer(
        unet,
        settings.training,
        prediction_type=settings.network.prediction_type,
        max_timestep=settings.max_timestep,
        seed=settings.seed,
        device=device,
        labels=labels,
    )


def _measure(
    trainer: Trainer,
    detector: Detector,
    images: ImageCache,
    split: Split,
    steps: int | None,
    time_budget: float | None,
    started: float,
) -> Estimate:
    """Time a few steps on copies, and one inspection, so that the work fits the budget and the estimate is true."""
    settings = detector.settings
    patience = _patience(time_budget)
    step_seconds = _step_seconds(trainer, settings, Tiles(images, detector.tiling), time_budget)
    trainer.plain_unet.eval()
    chunk = [images[i] for i in range(min(4, len(images)))]
    inspect_seconds = _median_seconds(lambda index: detector.compare(chunk), patience / 2) / len(chunk)

    # The held-out loss is measured ten times, at five timesteps an image.
    call_seconds = inspect_seconds / len(settings.sampling.timesteps) / detector.tiling.number
    held_out = 10 * 5 * min(HELD_OUT, len(split.select) * detector.tiling.number) * call_seconds
    calibrate_seconds = inspect_seconds * (min(MOST_SELECT, len(split.select)) + len(split.calibration))

    rebuilt_seconds = epoch_seconds = 0.0
    judges = 0 if _across(split, settings) else len(split.select)
    epochs = settings.adaptation.epochs if can_adapt(settings.adaptation, len(split.train), judges) else 0
    if epochs:
        adapted = min(MOST_ADAPTED, len(split.train)) if settings.adaptation.choose_epochs else len(split.train)
        judged = min(MOST_JUDGED, len(split.select)) + DEFECTS if settings.adaptation.choose_epochs else 0
        rebuilt_seconds = inspect_seconds * (adapted * (settings.adaptation.pairs != "different") + judged)
        epoch_seconds = _adaptation_seconds(detector, chunk, patience / 2) * adapted
        if settings.adaptation.pairs != "own":
            epoch_seconds += inspect_seconds * adapted / (2 if settings.adaptation.pairs == "both" else 1)
        reconstruction = to_unit(chunk, detector.device)
        judge_seconds = _median_seconds(lambda index: detector.distances(chunk, reconstruction), patience / 5)
        epoch_seconds += judged * judge_seconds / len(chunk)
    trainer.plain_unet.train()

    if time_budget is not None:
        left = time_budget - (time.monotonic() - started) - calibrate_seconds - held_out
        if epochs and settings.adaptation.choose_epochs:
            # Of `epochs` passes there are `epochs` + 1 judgements; the first costs less than a pass.
            epochs = min(epochs, max(0, math.floor((ADAPTATION_SHARE * left - rebuilt_seconds) / epoch_seconds) - 1))
        adapt_seconds = rebuilt_seconds + (epochs + 1) * epoch_seconds if epochs else 0.0
        # A tenth is kept back: the machine may slow down, and what is promised is the whole command.
        steps = math.floor((0.9 * left - adapt_seconds) / step_seconds)
        if steps < FEWEST_STEPS:
            needed = time_budget - left + (FEWEST_STEPS * step_seconds + adapt_seconds) / 0.9
            raise ConfigError(
                f"Expected a time budget for at least {FEWEST_STEPS} training steps, found {time_budget:.0f} s, which "
                f"allow {max(0, steps)}; give more than {math.ceil(needed)} s, and an hour for good results."
            )
    assert steps is not None  # the caller has made sure: steps, or a budget
    return Estimate(
        steps=steps,
        adaptation_epochs=epochs,
        images_per_second=settings.training.batch_size / step_seconds,
        train_seconds=steps * step_seconds + held_out,
        adapt_seconds=rebuilt_seconds + (epochs + 1) * epoch_seconds if epochs else 0.0,
        calibrate_seconds=calibrate_seconds,
        memory_mb=psutil.Process().memory_info().rss / 1e6,
        parameters=parameter_count(trainer.plain_unet),
        precision=trainer.precision,
        shape=detector.shape,
        train_images=len(split.train),
        select_images=len(split.select),
        calibration_images=len(split.calibration),
    )


def _step_seconds(trainer: Trainer, settings: Settings, tiles: Tiles, time_budget: float | None) -> float:
    """Of one training step, on copies; all processes take as many as the main one has time for."""
    scratch = create_trainer(copy.deepcopy(trainer.plain_unet), settings, trainer.device)
    agree = trainer.processes.as_main
    return _median_seconds(lambda index: scratch.step(tiles, index, 1000), _patience(time_budget), agree)


def _patience(time_budget: float | None) -> float:
    """Seconds that measuring one thing may take."""
    return 2.0 if time_budget is None else min(10.0, time_budget / 20)


def _adaptation_seconds(detector: Detector, chunk: Sequence[np.ndarray], patience: float) -> float:
    """Of one image in one pass."""
    settings = detector.settings.adaptation
    batch = [chunk[i % len(chunk)] for i in range(settings.batch_size)]
    adapter = Adapter(copy.deepcopy(detector.features), settings, detector.device)
    target = to_unit(batch)
    return _median_seconds(lambda index: adapter.step(target, target.flip(-1)), patience) / len(batch)


def _median_seconds(
    action: Callable[[int], Any], patience: float, agree: Callable[[bool], bool] = lambda more: more
) -> float:
    """Of one call, from a few; the first, which allocates and chooses kernels, does not count."""
    action(0)
    durations: list[float] = []
    begin = time.monotonic()
    while agree(not durations or (time.monotonic() - begin < patience and len(durations) < 20)):
        before = time.monotonic()
        result = action(len(durations) + 1)
        if isinstance(result, torch.Tensor):
            float(result.sum())  # on a GPU: until it is done
        durations.append(time.monotonic() - before)
    return float(np.median(durations))


class RunLog:
    """One JSON line a step, in a file; what a resumed run repeats is cut off first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None
        self._last: dict[str, Any] = {}
        self.held_out: list[float] = []

    def resume(self, step: int) -> None:
        kept = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    entry = json.loads(line)
                except ValueError:  # cut short by a kill
                    break
                if entry["step"] > step:
                    break
                kept.append(line)
                self._note(entry)
        self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8", buffering=1)  # whole lines, also when killed

    def write(self, event: Progress) -> None:
        entry = asdict(event)
        self._note(entry)
        self._file.write(json.dumps(entry) + "\n")

    def _note(self, entry: dict[str, Any]) -> None:
        if entry["held_out_loss"] is not None:
            self.held_out.append(entry["held_out_loss"])
        self._last = {**entry, "held_out_loss": entry["held_out_loss"] or self._last.get("held_out_loss")}

    def close(self) -> None:
        if self._file:
            self._file.close()

    def summary(self) -> dict[str, Any]:
        return {key: self._last.get(key) for key in ("seconds", "loss", "held_out_loss")}


def _load_plan(run: Path) -> Plan | None:
    path = run / "run.json"
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return Plan(**{**values, "shape": tuple(values["shape"])})
    except (ValueError, TypeError, KeyError):
        raise ConfigError(
            f"Expected a run of this version of ddad in {run}, found another one's; delete that folder, or choose "
            "another --out."
        ) from None


def _check_same(plan: Plan, settings: Settings, data: str, asked: dict[str, float | None], run: Path) -> None:
    changes = differences(plan.settings, settings.model_dump(mode="json"))
    changes += differences(plan.budget, asked)
    if plan.data != data:
        changes.append("the good images")
    if changes:
        raise ConfigError(
            f"Expected the command that began the run in {run}, found changes in {', '.join(changes)}; "
            "repeat the first command, choose another --out, or delete that folder."
        )


def _check_finished(out: Path, settings: Settings, data: str, asked: dict[str, float | None]) -> None:
    try:
        record = read_record(out)
        changes = differences(record["settings"], settings.model_dump(mode="json"))
        changes += differences(record["training"]["budget"], asked)
        if record["data"]["fingerprint"] != data:
            changes.append("the good images")
    except (ModelError, KeyError):
        raise ConfigError(
            f"Expected a new folder for the model, found {out}, which is something else; choose another --out."
        ) from None
    if changes:
        raise ConfigError(
            f"Expected a new folder for the model, found {out}, trained with other {', '.join(changes)}; "
            "choose another --out, or delete that folder."
        )


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """What changed between two nested settings, each as `group.name (old before, new now)`."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} ({old} before, {new} now)")
    return found


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """One process at a time; the system drops the lock when the process ends, however it ends."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run / "lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise ConfigError(
            f"Expected a place for the model and its run, found that {run} cannot be written ({error.strerror}); "
            "choose another --out."
        ) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(run / "lock").st_ino != os.fstat(descriptor).st_ino:  # removed by the one before
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            raise ConfigError(
                f"Expected a run that nobody works on, found another process training in {run}; "
                "wait for it, or choose another --out."
            ) from None
        yield
    finally:
        os.close(descriptor)
