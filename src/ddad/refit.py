"""Parts of `ddad train` done again on a finished model: calibrate on other good images, adapt its features."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ddad.checkpoint import CheckpointStore
from ddad.config import Backend, Precision
from ddad.conformal import images_needed
from ddad.data.folder import scan
from ddad.data.samples import fingerprint, paths_by_hash, split_hashes, spread, too_few_to_split
from ddad.detector import RECORD, STUDENT, Detector, read_record
from ddad.distillation import distil
from ddad.errors import ConfigError, DataError
from ddad.files import check_place, remove_leftovers
from ddad.fit import CACHE_SHARE, MOST_SELECT, ImageCache, locked
from ddad.training import Progress
from ddad.tuning import FEWEST_JUDGED, adapt_features, can_adapt
from ddad.tuning import tune as choose

DEFAULT_SECONDS = 600.0
"""For a search of settings."""
FEWEST = 4
"""Good images that were not trained on: two to give units, two to rank."""


@dataclass(frozen=True)
class _Parts:
    """Good images by use, as paths and as content hashes."""

    paths: dict[str, Path]
    train: Sequence[str]
    select: Sequence[str]
    calibration: Sequence[str]

    def cache(self, part: Sequence[str], detector: Detector, workers: int) -> ImageCache:
        memory = psutil.virtual_memory().available * CACHE_SHARE / 3
        return ImageCache([self.paths[one] for one in part], detector.shape, detector.image_rule, memory, workers)

    def check(self, data: str | Path) -> None:
        """Raises DataError where there is nothing to give units, or nothing to rank."""
        if len(self.select) < 2 or not self.calibration:
            raise DataError(
                f"Expected at least 2 good images in {data} to give units and 1 to rank, found {len(self.select)} and "
                f"{len(self.calibration)} that serve; add photographs of good parts."
            )

    def record(self, known: dict[str, Any]) -> dict[str, Any]:
        used = (*self.train, *self.select, *self.calibration)
        parts = {"train": self.train, "select": self.select, "calibration": self.calibration}
        # What a choice was made on must never rank scores later.
        former = {*known.get("select", ()), *known.get("former_select", ())} - set(self.select)
        return {"fingerprint": fingerprint(used), **parts, "former_select": sorted(former)}


def recalibrate(
    model: str | Path,
    data: str | Path,
    out: str | Path | None = None,
    *,
    merge: bool = False,
    false_alarms: float | None = None,
    backend: Backend | None = None,
    precision: Precision | None = None,
    device: str | None = None,
    workers: int = 2,
) -> Detector:
    """Give a model, and its one-call student where it has one, a new threshold from good images, without training.

    Images the model was trained on are left out; those that gave units or ranks before keep their part.

    Args:
        model: a model folder.
        data: a folder in MVTec layout, or a folder of good images.
        out: where to; by default the model is replaced.
        merge: keep the units, and add the new images' scores to those there are.
        false_alarms: the rate to promise; by default the model's.
        backend: what computes the networks, now and later by default; and
        precision: in which precision, as `Detector.from_pretrained`.

    Raises:
        ConfigError: another process is at it, or there is no calibration to merge with.
        DataError: too few good images that were not trained on.
    """
    out = _place(model, out)
    with _alone(out):
        how: dict[str, Any] = {"device": device, "backend": backend, "precision": precision}
        detector = Detector.from_pretrained(model, **how)
        student = Detector.from_pretrained(model, fast=True, **how) if _has_student(model) else None
        paths = paths_by_hash(sample.path for sample in scan(data).train)
        for one in (detector, student) if student else (detector,):
            if false_alarms is not None:
                one.settings = one.settings.model_copy(update={"false_alarms": false_alarms})
            if merge:
                _merge(one, paths, data, workers)
            else:
                _calibrate_anew(one, paths, data, workers)
        _save(detector, out, model, student)
    return detector


def _merge(detector: Detector, paths: dict[str, Path], data: str | Path, workers: int) -> None:
    if detector.calibration is not None and detector.calibration.folds:
        raise ConfigError(
            "Expected a calibration on images of its own to add scores to, found one in folds, as of fewer than 100 "
            "good images; recalibrate without --merge on a folder with all good images."
        )
    known = detector.record.get("data", {})
    used = {one for part in ("train", "select", "former_select", "calibration") for one in known.get(part, ())}
    new = [one for one in paths if one not in used]
    if not new:
        raise DataError(
            f"Expected good images in {data} that the model has not seen yet, found none; add photographs of good "
            "parts."
        )
    parts = _Parts(paths, known.get("train", ()), known.get("select", ()), new)
    detector.add_to_calibration(parts.cache(new, detector, workers))
    calibration = [*known.get("calibration", ()), *new]
    everything = (*parts.train, *parts.select, *calibration)
    detector.record["data"] = {**known, "calibration": calibration, "fingerprint": fingerprint(everything)}


def _calibrate_anew(detector: Detector, paths: dict[str, Path], data: str | Path, workers: int) -> None:
    known = detector.record.get("data", {})
    unseen = [one for one in paths if one not in set(known.get("train", ()))]
    if len(unseen) < FEWEST:
        raise DataError(
            f"Expected at least {FEWEST} different good images that the model was not trained on in {data}, found "
            f"{len(unseen)}; add photographs of good parts."
        )
    parts = _Parts(paths, known.get("train", ()), *_halves(unseen, known, detector.settings.false_alarms))
    parts.check(data)
    _calibrate(detector, parts, workers)


def adapt(
    model: str | Path,
    data: str | Path,
    out: str | Path | None = None,
    *,
    epochs: int | None = None,
    device: str | None = None,
    workers: int = 2,
    on_stage: Callable[[str], None] = lambda sentence: None,
) -> Detector:
    """Adapt the features of a model to the product, where that helps, and calibrate it again.

    Run again after a stop, the same call goes on after the last whole pass.

    Args:
        model: a model folder whose features are not adapted yet.
        data: its good images: a folder in MVTec layout, or a folder of good images.
        out: where to; by default the model is replaced.
        epochs: passes at most; by default as many as the settings say.

    Raises:
        ConfigError: the features are adapted already, or no pass is wanted.
        DataError: too few good images.
        training.Interrupted: asked to stop.
    """
    out = _place(model, out)
    with _alone(out) as run:
        detector = _trainable(model, device)
        converted = detector.record.get("converted", {}).get("features", {})
        if detector.record.get("adaptation", {}).get("epochs") or isinstance(converted.get("weights"), dict):
            raise ConfigError(
                f"Expected features that are not adapted yet in {model}, found adapted ones; train with --no-adapt "
                "first."
            )
        settings = detector.settings.adaptation
        if epochs is not None:
            settings = settings.model_copy(update={"epochs": epochs})
            detector.settings = detector.settings.model_copy(update={"adaptation": settings})
        if settings.epochs == 0:
            raise ConfigError("Expected at least one pass over the good images, found 0; give --epochs.")
        parts = _same_parts(detector, data, more=True)
        train = [one for one in parts.train if one in parts.paths]
        if not can_adapt(settings, len(train), len(parts.select)):
            raise DataError(
                f"Expected more good images in {data} to adapt on, found {len(train)} to train and "
                f"{len(parts.select)} to select; add photographs of good parts."
            )
        parts.check(data)
        images, others = parts.cache(train, detector, workers), parts.cache(parts.select, detector, workers)
        store = CheckpointStore(run / "adaptation")
        detector.record["adaptation"] = adapt_features(detector, images, others, settings.epochs, store, on_stage)
        on_stage("Calibrating on good images that were not trained on.")
        _calibrate(detector, parts, workers)
        _save(detector, out, model, on_stage=on_stage)
        shutil.rmtree(store.folder, ignore_errors=True)
    return detector


def tune(
    model: str | Path,
    data: str | Path,
    out: str | Path | None = None,
    *,
    seconds: float = DEFAULT_SECONDS,
    device: str | None = None,
    workers: int = 2,
    on_stage: Callable[[str], None] = lambda sentence: None,
) -> Detector:
    """Choose a model's settings on good images and synthetic defects, and calibrate it again.

    Args:
        model: a model folder.
        data: its good images: a folder in MVTec layout, or a folder of good images.
        out: where to; by default the model is replaced.
        seconds: for the search.

    Raises:
        ConfigError: another process is at it.
        DataError: too few good images to choose by, or they are not those of the model.
    """
    out = _place(model, out)
    with _alone(out):
        detector = _trainable(model, device)
        parts = _judging_parts(detector, data)
        detector.record["tuning"] = choose(detector, parts.cache(parts.select, detector, workers), seconds, on_stage)
        _calibrate(detector, parts, workers)
        _save(detector, out, model, on_stage=on_stage)
    return detector


def distill(
    model: str | Path,
    data: str | Path,
    out: str | Path | None = None,
    *,
    steps: int | None = None,
    device: str | None = None,
    workers: int = 2,
    on_stage: Callable[[str], None] = lambda sentence: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Detector:
    """Give a model a one-call student, calibrated by itself: `--fast`, `Detector.from_pretrained(..., fast=True)`.

    Run again after a stop, the same call goes on from there.

    Args:
        model: a model folder.
        data: its good images: a folder in MVTec layout, or a folder of good images.
        out: where to write the model with its student; by default the model gets it.
        steps: training steps of the student; by default none where the model's own first call does as well, else 600.

    Returns:
        The student.

    Raises:
        ConfigError: another process is at it, or the student would find synthetic defects worse than the model.
        DataError: too few good images to judge by, or they are not those of the model.
        Interrupted: asked to stop.
    """
    out = _place(model, out)
    with _alone(out) as run:
        detector = _trainable(model, device)
        parts = _judging_parts(detector, data)
        train = [one for one in parts.train if one in parts.paths]
        if not train:
            raise DataError(
                f"Expected in {data} good images that the model was trained on, found none; name the folder it was "
                "trained on."
            )
        images, others = parts.cache(train, detector, workers), parts.cache(parts.select, detector, workers)
        try:
            student = distil(
                detector,
                images,
                others,
                steps=steps,
                store=lambda identity: CheckpointStore(run / f"student-{identity}"),
                on_stage=on_stage,
                on_progress=on_progress,
            )
        except ConfigError:  # refused: there is nothing to go on with
            _forget_students(run)
            raise
        on_stage("Calibrating the student on good images that were not trained on.")
        _calibrate(student, parts, workers)
        _save(detector, out, model, student)
        _forget_students(run)
    return student


def _forget_students(run: Path) -> None:
    for folder in run.glob("student-*"):
        shutil.rmtree(folder)


def _judging_parts(detector: Detector, data: str | Path) -> _Parts:
    """The model's good images by use, where there are enough that were set aside to choose by."""
    if detector.calibration is not None and detector.calibration.folds:
        raise DataError(
            "Expected a model with good images set aside to choose by, found one calibrated in folds, as of fewer "
            "than 100 good images; train on more."
        )
    parts = _same_parts(detector, data)
    if len(parts.select) < FEWEST_JUDGED:
        raise DataError(
            f"Expected at least {FEWEST_JUDGED} good images in {data} that the model has set aside to choose by, "
            f"found {len(parts.select)}; name the folder it was trained on, or train on more good images."
        )
    parts.check(data)
    return parts


def _save(
    detector: Detector,
    out: Path,
    model: str | Path,
    student: Detector | None = None,
    on_stage: Callable[[str], None] = lambda sentence: None,
) -> None:
    if student is None and _has_student(model):
        on_stage("The one-call student is that of the model as it was, and is left out; make it again: ddad distill.")
    detector.save_pretrained(out, extra=_log(Path(model)), student=student)


def _trainable(model: str | Path, device: str | None) -> Detector:
    """The model in PyTorch and fp32, in whatever it was calibrated: its networks are changed, or judged closely."""
    return Detector.from_pretrained(model, device, backend="torch", precision="fp32")


def _has_student(model: str | Path) -> bool:
    return (Path(model) / STUDENT / RECORD).is_file()


def _place(model: str | Path, out: str | Path | None) -> Path:
    """Where the result goes, checked before anything is made there."""
    read_record(Path(model))
    place = Path(out or model).absolute()
    check_place(place, RECORD, "model")
    return place


@contextmanager
def _alone(out: Path) -> Iterator[Path]:
    """The folder of an adaptation, locked; left behind only where one was begun there and goes on later."""
    run = out.with_name(out.name + ".adapt")
    with locked(run):
        remove_leftovers(out.parent, out.name)
        try:
            yield run
        finally:
            (run / "lock").unlink()
            if not any(run.iterdir()):
                run.rmdir()


def _same_parts(detector: Detector, data: str | Path, more: bool = False) -> _Parts:
    """The model's good images in `data` by their use; with `more`, new ones are split as for training.

    Raises:
        DataError: images that rank are not there, which would loosen the promise without a word.
    """
    known = detector.record.get("data", {})
    paths = paths_by_hash(sample.path for sample in scan(data).train)
    ranked = known.get("calibration", ())
    if missing := sum(one not in paths for one in ranked):
        raise DataError(
            f"Expected in {data} the {len(ranked)} good images that the model's scores are ranked by, found that "
            f"{missing} are missing; name a folder with all of them."
        )
    added: tuple[Sequence[str], ...] = ((), (), ())
    new = [one for one in paths if not any(one in known.get(part, ()) for part in ("train", "select", "calibration"))]
    if more and len(new) >= FEWEST + 1:
        added = split_hashes(new, detector.settings.false_alarms)
    select = [one for one in known.get("select", ()) if one in paths]
    # All that were trained on stay on record, wherever they are now: none of them may ever rank.
    return _Parts(
        paths,
        sorted({*known.get("train", ()), *added[0]}),
        sorted({*select, *added[1]}),
        sorted({*ranked, *added[2]}),
    )


def _calibrate(detector: Detector, parts: _Parts, workers: int) -> None:
    select, calibration = (parts.cache(part, detector, workers) for part in (parts.select, parts.calibration))
    known, before = detector.record.get("data", {}), detector.calibration
    few = too_few_to_split(
        len(select) + len(calibration), len(select), len(calibration), detector.settings.false_alarms
    )
    # What a choice was made on must never rank: of a model calibrated in folds nothing was, unless done since.
    chosen = detector.record.get("adaptation", {}).get("history") or detector.record.get("tuning")
    untouched = before is not None and before.folds and not chosen
    reused = {*known.get("select", ()), *known.get("former_select", ())} & set(parts.select)
    if few and (untouched or not reused):
        detector.calibrate_across([*select, *calibration])
    else:
        detector.calibrate(spread(select, MOST_SELECT), calibration)
    detector.record["data"] = parts.record(known)


def _halves(hashes: Sequence[str], known: dict[str, Any], false_alarms: float) -> tuple[list[str], list[str]]:
    """Select and calibration: as before where that is known; of new images the calibration gets half, or what the
    promise needs where that leaves a fifth.
    """
    select = [one for one in hashes if one in {*known.get("select", ()), *known.get("former_select", ())}]
    calibration = [one for one in hashes if one in known.get("calibration", ())]
    new = sorted(set(hashes) - {*select, *calibration})
    wanted = max(len(new) // 2, images_needed(false_alarms) - len(calibration))
    count = min(wanted, len(new) - max(2 - len(select), len(new) // 5, 0))
    return [*select, *new[count:]], [*calibration, *new[:count]]


def _log(model: Path) -> dict[str, Path]:
    file = model / "training.jsonl"
    return {file.name: file} if file.is_file() else {}
