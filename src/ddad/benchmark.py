"""Many categories and seeds in one call, and the paper's figures beside ours.

OUT/<variant>/benchmark.json                     what was asked: a later call into the same folder must ask the same
OUT/<variant>/<category>/seed-<n>/result.json    metrics, settings and seconds, or the error in one sentence
OUT/<variant>/<category>/seed-<n>/...            the model, its metrics.json and its report.html
OUT/results.md, results.csv, results.html        one table a variant (see `comparison`)

Trainings run one after the other, or side by side on the machines of a Ray cluster, which all see the same files.

A variant is a preset with one setting for all categories, or `<preset>-published`: the authors' settings of each
category. No test label takes part in any choice made here.
"""

import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddad.cluster import connect, run_tasks
from ddad.comparison import TITLES, duration, read_json, shipped, write_tables
from ddad.config import Settings, make_settings
from ddad.data import mtd, mvtec_ad, visa
from ddad.data.samples import Dataset, content_hash, fingerprint
from ddad.detector import Detector
from ddad.distributed import join
from ddad.errors import ConfigError, DataError, DDADError, Interrupted
from ddad.files import write_json, write_text
from ddad.fit import DEFAULT_TIME_BUDGET, MOST_SELECT, Estimate, differences, fit
from ddad.report import evaluate_folder
from ddad.training import Progress
from ddad.unet import choose_device, parse_device

ENGINES = ("local", "ray")
LIVES = 5
"""How often a training is begun again, from its last checkpoint, when its process or machine is gone."""
PAPER_PRESETS = ("paper", "paper-s")
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Layout:
    """How a data set lies on the disk."""

    list_categories: Callable[[Path], tuple[str, ...]]
    load_category: Callable[[Path, str], Dataset]


LAYOUTS = {
    "mvtec-ad": Layout(mvtec_ad.list_categories, mvtec_ad.load_category),
    "visa": Layout(visa.list_categories, visa.load_category),
    "mtd": Layout(mtd.list_categories, mtd.load_category),
    "folder": Layout(mvtec_ad.list_folders, mvtec_ad.load_folder),
}


@dataclass(frozen=True)
class PublishedSettings:
    """The authors' settings of one category."""

    conditioning_weight: float
    """w."""
    pixel_weight: float
    """v."""
    unet_epochs: int
    extractor_epochs: int
    distillation_weight: float
    """λ_DL."""
    adaptation_batch_size: int
    test_batch_size: int

    def steps(self, train_images: int, batch_size: int) -> int:
        """U-Net steps: the published code leaves out each epoch's last, incomplete batch."""
        return self.unet_epochs * max(1, train_images // batch_size)

    def apply(self, settings: Settings) -> Settings:
        """`settings` with these values."""
        adaptation = {
            "epochs": self.extractor_epochs,
            "distillation_weight": self.distillation_weight,
            "batch_size": self.adaptation_batch_size,
        }
        return settings.model_copy(
            update={
                "sampling": settings.sampling.model_copy(update={"conditioning_weight": self.conditioning_weight}),
                "scoring": settings.scoring.model_copy(update={"pixel_weight": self.pixel_weight}),
                "adaptation": settings.adaptation.model_copy(update=adaptation),
            }
        )


def published_settings(dataset: str, category: str) -> PublishedSettings:
    """From `presets.toml`; raises ConfigError where the authors give none."""
    tables = shipped("presets.toml")
    try:
        group = tables[dataset]
        return PublishedSettings(**{**group["all"], **group["categories"][category]})
    except KeyError:
        known = ", ".join(name for name in tables if name != "source")
        raise ConfigError(
            f"Expected a category of {known}, for which published settings exist, found {category} of {dataset}; "
            "name another, or do without them."
        ) from None


@dataclass(frozen=True)
class BenchmarkReport:
    """What `run_benchmark` did."""

    table: str
    """All tables as Markdown; empty after a dry run."""
    failures: dict[str, str]
    """The error of each training of this call that failed, by "<category>, seed <n>"."""
    trained: int
    skipped: int
    """Trainings done before."""
    models: dict[Path, Dataset] = field(default_factory=dict, compare=False)
    """The model folder of seed 0 of each category that has one, and its data."""
    seconds_left: float | None = None
    """After a dry run: how long the call would take here."""


def run_benchmark(
    root: str | Path,
    dataset: str,
    out: str | Path,
    *,
    categories: Sequence[str] | None = None,
    preset: str = "xs",
    seeds: int = 3,
    image_size: int | None = None,
    steps: int | None = None,
    time_budget: float | None = None,
    changes: Mapping[str, Any] | None = None,
    published: bool = False,
    dry_run: bool = False,
    device: str | None = None,
    workers: int = 2,
    engine: str = "local",
    address: str | None = None,
    gpus_per_worker: float | None = None,
    on_estimate: Callable[[Estimate], None] = lambda estimate: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_stage: Callable[[str], None] = lambda sentence: None,
) -> BenchmarkReport:
    """Train and judge a detector for every category and seed that is not done yet, and write the tables.

    The same call goes on where an earlier one was stopped. What fails is noted in the table, and the others go on.

    Args:
        root: the data set.
        dataset: its layout, one of `LAYOUTS`.
        out: the folder for results, models and tables.
        categories: some of the data set's; by default all that are there.
        preset, image_size, changes: settings of all categories; `changes` are further ones, as for `make_settings`.
        seeds: seeds 0, 1, ... of each category.
        steps: training steps, or
        time_budget: seconds, of each training; by default an hour.
        published: use the authors' settings of each category; their epochs where neither steps nor time are given.
        dry_run: train and write nothing; measure the first training and say how long all of them would take.
        workers: threads that decode images; with `ray` also the processors that a training takes.
        engine: `local`, one training after the other, or `ray`, as many at a time as a cluster has room for; then
            root and out must be the same folders on all its machines, and nothing is called back but `on_stage`.
        address: of the Ray cluster; by default RAY_ADDRESS, or this machine.
        gpus_per_worker: GPUs that each training takes on the cluster, 1 by default on `cuda`.

    Raises:
        ConfigError: settings that cannot work, or others than `out` was begun with; no Ray.
        DataError: the layout of any category is wrong; nothing has been trained then.
        training.Interrupted: asked to stop; the same call resumes.
    """
    root, out = Path(root), Path(out)
    base = make_settings(preset, image_size=image_size, **(changes or {}))
    if engine not in ENGINES:
        raise ConfigError(f"Expected an engine among {', '.join(ENGINES)}, found {engine!r}.")
    if engine == "ray":
        root, out = root.absolute(), out.absolute()  # its processes have another working folder
        if device is None and gpus_per_worker:
            device = "cuda"
        if device is not None:
            parse_device(device)  # of machines of the cluster, perhaps not of this one
    elif (processes := join(choose_device(device))).count > 1:
        raise processes.told(
            ConfigError(
                f"Expected one process for a benchmark, found {processes.count}; start it by itself, with --engine ray "
                "for many machines."
            )
        )
    if steps is not None and time_budget is not None:
        raise ConfigError("Expected either a number of steps or a time budget, found both; leave one out.")
    if seeds < 1:
        raise ConfigError(f"Expected at least 1 seed, found {seeds}.")
    if published and preset not in PAPER_PRESETS:
        raise ConfigError(
            f"Expected preset {' or '.join(PAPER_PRESETS)} for the published settings, found {preset}; "
            "choose one of them, or leave --published out."
        )
    if steps is None and time_budget is None and not published:
        time_budget = DEFAULT_TIME_BUDGET
    datasets = _load(root, dataset, categories)
    asked = {
        "dataset": dataset,
        "published": published,
        "budget": {"steps": steps, "seconds": time_budget},
        "settings": base.model_dump(mode="json", exclude={"seed"}),
    }
    variant = out / (f"{preset}-published" if published else preset)
    _check_same(variant, asked)

    trainings = [
        _training(variant, dataset, category, data, base, seed, steps, time_budget, published)
        for seed in range(seeds)  # outermost, so that there is soon a table of all categories
        for category, data in datasets.items()
    ]
    fingerprints = {category: _fingerprint(data) for category, data in datasets.items()}
    waiting = [one for one in trainings if not one.is_done(fingerprints[one.category])]
    skipped = len(trainings) - len(waiting)
    on_stage(f"{TITLES[dataset]}: {len(trainings)} trainings, {skipped} of them done before.")
    if dry_run:
        seconds = _seconds_left(waiting, device, workers, on_stage) if waiting else 0.0
        return BenchmarkReport("", {}, 0, skipped, seconds_left=seconds)

    if engine == "ray" and waiting:
        connect(address)
    write_json(variant / "benchmark.json", asked)
    failures: dict[str, str] = {}

    def finish(one: _Training, result: dict[str, Any]) -> None:
        if "error" in result:
            failures[one.name] = result["error"]
            on_stage(f"{one.name} failed: {result['error']}")
        write_json(one.folder / "result.json", one.identity(fingerprints[one.category]) | result)
        write_tables(out)

    if engine == "ray" and waiting:

        def work(one: _Training) -> dict[str, Any]:
            try:
                return _attempt(one, device, workers)
            except Interrupted as stop:  # somebody stopped this process, not the benchmark
                return {"error": f"stopped at {stop}, and saved; the same command goes on from there"}

        gpus = float((device or "").startswith("cuda")) if gpus_per_worker is None else gpus_per_worker
        ended = run_tasks(work, waiting, cpus=workers, gpus=gpus, retries=LIVES)
        for number, (one, result) in enumerate(ended, start=1):
            lost = {"error": _sentence(result, one.folder)} if isinstance(result, Exception) else result
            on_stage(f"Ended {number} of {len(waiting)}: {one.name}.")
            finish(one, lost)
    else:
        for number, one in enumerate(waiting, start=1):
            on_stage(f"Training {number} of {len(waiting)}: {one.name}.")
            finish(one, _attempt(one, device, workers, on_estimate, on_progress, on_stage))
    models = {one.folder / "model": one.data for one in trainings if one.settings.seed == 0}
    return BenchmarkReport(
        write_tables(out),
        failures,
        trained=len(waiting) - len(failures),
        skipped=skipped,
        models={folder: data for folder, data in models.items() if folder.exists()},
    )


@dataclass(frozen=True)
class _Training:
    """One category and seed."""

    folder: Path
    dataset: str
    category: str
    data: Dataset
    settings: Settings
    steps: int | None
    time_budget: float | None
    batch_size: int | None
    """Images inspected together, where the authors say so."""

    @property
    def name(self) -> str:
        return f"{self.category}, seed {self.settings.seed}"

    def identity(self, data_fingerprint: str | None) -> dict[str, Any]:
        """What a result was made from; a result of anything else is not this one's."""
        return {
            "format_version": FORMAT_VERSION,
            "dataset": self.dataset,
            "category": self.category,
            "seed": self.settings.seed,
            "settings": self.settings.model_dump(mode="json"),
            "budget": {"steps": self.steps, "seconds": self.time_budget},
            "data": data_fingerprint,
        }

    def is_done(self, data_fingerprint: str | None) -> bool:
        result = read_json(self.folder / "result.json")
        expected = self.identity(data_fingerprint)
        return "metrics" in result and all(result.get(key) == value for key, value in expected.items())


def _training(
    variant: Path,
    dataset: str,
    category: str,
    data: Dataset,
    base: Settings,
    seed: int,
    steps: int | None,
    time_budget: float | None,
    published: bool,
) -> _Training:
    settings = base.model_copy(update={"seed": seed})
    batch_size = None
    if published:
        authors = published_settings(dataset, category)
        settings, batch_size = authors.apply(settings), authors.test_batch_size
        if steps is None and time_budget is None:
            steps = authors.steps(len(data.train), settings.training.batch_size)
    folder = variant / category / f"seed-{seed}"
    return _Training(folder, dataset, category, data, settings, steps, time_budget, batch_size)


def _load(root: Path, dataset: str, categories: Sequence[str] | None) -> dict[str, Dataset]:
    """The categories wanted, each with something to train and to judge on."""
    if dataset not in LAYOUTS:
        raise ConfigError(f"Expected a data set among {', '.join(LAYOUTS)}, found {dataset!r}.")
    layout = LAYOUTS[dataset]
    present = layout.list_categories(root)
    if unknown := [category for category in categories or () if category not in present]:
        raise ConfigError(f"Expected categories among {', '.join(present)} in {root}, found {', '.join(unknown)}.")
    datasets = {category: layout.load_category(root, category) for category in categories or present}
    for category, data in datasets.items():
        labels = {sample.is_anomalous for sample in data.test}
        if not data.train or labels != {True, False}:
            raise DataError(
                f"{data.root}: expected good images to train on, and both good and defective ones to test on, but "
                f"found {len(data.train)}, {sum(not sample.is_anomalous for sample in data.test)} and "
                f"{sum(sample.is_anomalous for sample in data.test)}; complete {category}, or leave it out."
            )
    return datasets


def _fingerprint(data: Dataset) -> str | None:
    """One hash of all images, labels and masks; None where one cannot be read, which training will say."""

    def lines() -> Iterator[str]:
        for part, samples in (("train", data.train), ("test", data.test)):
            for sample in samples:
                mask = content_hash(sample.mask) if sample.mask else ""
                yield f"{part} {sample.kind} {content_hash(sample.path)} {mask}"

    try:
        return fingerprint(lines())
    except DataError:
        return None


def _check_same(variant: Path, asked: dict[str, Any]) -> None:
    before = read_json(variant / "benchmark.json")
    if not before:
        return
    if changes := differences(before, asked):
        raise ConfigError(
            f"Expected the benchmark that was begun in {variant}, found changes in {', '.join(changes)}; "
            "repeat the first command, choose another --out, or delete that folder."
        )


def _attempt(
    one: _Training,
    device: str | None,
    workers: int,
    on_estimate: Callable[[Estimate], None] = lambda estimate: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_stage: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """What `_train_and_judge` found, or the error: hours of other trainings must not be lost for one."""
    try:
        return _train_and_judge(one, device, workers, on_estimate, on_progress, on_stage)
    except Interrupted:
        raise
    except Exception as error:
        return {"error": _sentence(error, one.folder)}


def _train_and_judge(
    one: _Training,
    device: str | None,
    workers: int,
    on_estimate: Callable[[Estimate], None],
    on_progress: Callable[[Progress], None],
    on_stage: Callable[[str], None],
) -> dict[str, Any]:
    model = fit(
        one.data,
        one.folder / "model",
        one.settings,
        steps=one.steps,
        time_budget=one.time_budget,
        device=device,
        workers=workers,
        on_estimate=on_estimate,
        on_progress=on_progress,
        on_stage=on_stage,
    )
    on_stage(f"Inspecting {len(one.data.test)} test images.")
    started = time.monotonic()
    detector = Detector.from_pretrained(model, device=device)
    evaluation = evaluate_folder(detector, one.data, one.folder, batch_size=one.batch_size, workers=workers)
    training = detector.record["training"]
    return {
        "metrics": evaluation.metrics,
        "counts": evaluation.counts,
        "per_kind": evaluation.per_kind,
        "notes": list(evaluation.notes),
        "test_images": len(one.data.test),
        "shape": list(detector.shape),
        "steps": training["steps"],
        "held_out_loss": training["held_out_loss"],
        "seconds": {"train": training["seconds"], "judge": time.monotonic() - started},
        "machine": evaluation.machine,
        "versions": evaluation.versions,
        "date": evaluation.date,
    }


def _sentence(error: Exception, folder: Path) -> str:
    """The message of a user's mistake; for anything else its first line, and the traceback in a file."""
    if isinstance(error, DDADError):
        return " ".join(str(error).split())
    path = folder / "traceback.txt"
    write_text(path, "".join(traceback.format_exception(error)))
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first} (see {path})"


class _Measured(Exception):
    """Carries an estimate out of `fit` before its first step."""


def _seconds_left(
    waiting: Sequence[_Training], device: str | None, workers: int, on_stage: Callable[[str], None]
) -> float:
    """Measure the first training, as `fit` does, and scale it by steps and images to the others."""

    def stop(estimate: Estimate) -> None:
        raise _Measured(estimate)

    first = max(waiting, key=lambda one: one.settings.adaptation.epochs)  # the first one of equals
    on_stage(f"Measuring on {first.name}.")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        try:
            fit(
                first.data,
                Path(folder) / "model",
                first.settings,
                steps=first.steps,
                time_budget=first.time_budget,
                device=device,
                workers=workers,
                on_estimate=stop,
            )
        except _Measured as measured:
            estimate: Estimate = measured.args[0]
    start_seconds = time.monotonic() - started  # reading, and measuring once more
    inspected = min(MOST_SELECT, estimate.select_images) + estimate.calibration_images
    inspect_seconds = estimate.calibrate_seconds / inspected
    train_seconds = judge_seconds = 0.0
    for one in waiting:
        judge_seconds += inspect_seconds * len(one.data.test)
        if one.time_budget is not None:
            train_seconds += one.time_budget
            continue
        assert one.steps is not None
        images = len(one.data.train) / len(first.data.train)
        train_seconds += estimate.train_seconds * one.steps / estimate.steps
        passes = one.settings.adaptation.epochs / max(1, first.settings.adaptation.epochs)
        train_seconds += images * (start_seconds + passes * estimate.adapt_seconds + estimate.calibrate_seconds)
    total = train_seconds + judge_seconds
    on_stage(
        f"{len(waiting)} trainings would take about {duration(total)} on this machine: {duration(train_seconds)} to "
        f"train, {duration(judge_seconds)} to inspect test images. What is half done is counted as a whole."
    )
    return total
