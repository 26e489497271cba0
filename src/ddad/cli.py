"""The command line. It parses, calls and prints; what it calls can be called from Python just as well."""

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ddad import __version__
from ddad.config import IMAGE_SIZE
from ddad.errors import ConfigError, DDADError, Interrupted, ModelError

if TYPE_CHECKING:
    from ddad.bulk.run import ScoreProgress
    from ddad.data.check import CheckReport
    from ddad.detector import Detector
    from ddad.evaluation import Evaluation
    from ddad.family import Family
    from ddad.fit import Estimate
    from ddad.prediction import Inspector
    from ddad.training import Progress

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Find and show defects in photographs of parts, after seeing good parts only.",
)
INTERRUPTED = 130
SHOWN_PATHS = 5


def main() -> None:
    """Entry point: users' mistakes end in one line and exit code 1; our bugs keep their traceback."""
    try:
        app()
    except DDADError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"Error: {error}", style="red", markup=False)
        raise SystemExit(1) from None


def _duration(text: str) -> float:
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s?)?", text.strip().lower())
    if not match or not any(match.groups()):
        raise typer.BadParameter(f"expected a duration such as 90s, 30m or 1h30m, got {text!r}")
    hours, minutes, seconds = (float(part or 0) for part in match.groups())
    total = 3600 * hours + 60 * minutes + seconds
    if total <= 0:
        raise typer.BadParameter(f"expected a duration above zero, got {text!r}")
    return total


def _rate(given: str | float) -> float:
    text = str(given)  # a default comes as a number
    try:
        value = float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise typer.BadParameter(f"expected a rate such as 1% or 0.01, above 0 and below 100%, got {text!r}")
    return value


def _tiles(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)[x×](\d+)", text.strip().lower())
    if not match:
        raise typer.BadParameter(f"expected rows x columns such as 2x3, got {text!r}")
    return int(match[1]), int(match[2])


def _bounds(given: str | int) -> tuple[int, int]:
    match = re.fullmatch(r"(?:(\d+):)?(\d+)", str(given).strip())
    least, most = (int(match[1] or 1), int(match[2])) if match else (0, 0)
    if not 1 <= least <= most:
        raise typer.BadParameter(f"expected a number of workers such as 8, or 2:8, got {given!r}")
    return least, most


def _slice(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise typer.BadParameter(f"expected a slice from 1/n to n/n such as 3/8, got {text!r}")
    return int(match[1]), int(match[2])


def _size(given: str | int) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", str(given).strip().lower())
    if not match:
        raise typer.BadParameter(f"expected a size such as 500MB or 2GB, got {given!r}")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2] or " "))


Preset = Annotated[str, typer.Option(help="xs, s, base: ours; paper, paper-s: as published.")]
FalseAlarms = Annotated[
    float,
    typer.Option(
        parser=_rate, metavar="RATE", show_default="1%", help="Share of good parts that may be flagged, such as 1%."
    ),
]
ImageSize = Annotated[int, typer.Option(help="The model's height and width are about this; a multiple of 32.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the GPU where there is one by default.")]
Workers = Annotated[int, typer.Option(min=1, help="Threads that decode images.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images inspected together; scores do not depend on it.")]
Fast = Annotated[bool, typer.Option("--fast", help="The model's one-call student, made by ddad distill.")]
BackendName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="What computes the networks: torch (the default), compile, onnxruntime or openvino.",
    ),
]
PrecisionName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="fp32 (the default, unless calibrated in bf16), or bf16 where the processor computes it."
    ),
]
Category = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Of a family; by default what a photograph looks like (predict only)."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
OutModel = Annotated[Path | None, typer.Option(help="The model folder to write; by default MODEL is replaced.")]
Data = Annotated[Path, typer.Argument(help="A folder in MVTec layout, or a folder of good images.")]
Model = Annotated[
    Path, typer.Argument(help="A model folder, as written by `ddad train`; or owner/name[@revision] on the hub.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ddad {__version__}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def check(
    data: Data,
    false_alarms: FalseAlarms = 0.01,
    image_size: ImageSize = IMAGE_SIZE,
    synthetic: Annotated[
        Path | None,
        typer.Option(metavar="PNG", help="Also draw synthetic defects, like those of every choice."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Say what is wrong with a folder of images, and how to mend it."""
    from ddad.data.check import check as check_data

    report = check_data(data, false_alarms=false_alarms, image_size=image_size)
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        _print_check(report)
    if not report.can_train:
        raise typer.Exit(1)
    if synthetic:
        from ddad.data.synthetic import draw_examples

        draw_examples(data, synthetic, size=image_size)
        if not as_json:
            print(f"Synthetic defects, each outlined in red, are drawn in {synthetic}.")


@app.command()
def train(
    data: Data,
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    preset: Preset = "xs",
    image_size: Annotated[
        int | None, typer.Option(help="The model's height and width are about this; a multiple of 32.")
    ] = None,
    tiles: Annotated[
        Any,
        typer.Option(
            parser=_tiles, metavar="RxC", help="For large photographs: rows and columns of overlapping tiles, as 2x3."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps.")] = None,
    time_budget: Annotated[
        float | None,
        typer.Option(parser=_duration, metavar="TIME", help="For the whole command, such as 30m; by default 1h."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of weights, batches and noise.")] = 0,
    false_alarms: FalseAlarms = 0.01,
    features: Annotated[
        str | None, typer.Option(help="efficientnet-lite2 (offline), a timm name, or local-dir:FOLDER.")
    ] = None,
    denoising_steps: Annotated[int | None, typer.Option(min=1, help="Network calls an image.")] = None,
    adapt: Annotated[bool, typer.Option(help="Adapt the features where that finds synthetic defects better.")] = True,
    categories: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="One network for many: all, or a,b of DATA, which has a folder for each."),
    ] = None,
    augment: Annotated[
        str | None, typer.Option(help="Any of hflip,vflip,rot90, where a turned part is as good.")
    ] = None,
    log_with: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Trackers: tensorboard,mlflow or others that Accelerate knows.")
    ] = None,
    log_dir: Annotated[Path | None, typer.Option(help="The trackers' folder; by default OUT.logs.")] = None,
    device: Device = None,
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """Train on good images. The same command again resumes, or finds the model done."""
    settings = _settings(
        preset,
        image_size=image_size,
        tiles=tiles,
        seed=seed,
        false_alarms=false_alarms,
        features=features,
        denoising_steps=denoising_steps,
        augment=augment,
        adapt=adapt,
    )
    if categories is not None:
        if log_with:
            raise ConfigError(
                "Expected no --log-with beside --categories, whose training is not tracked; leave it out."
            )
        from ddad.fit_family import train_family

        with _Interruptible(), _ProgressPrinter(quiet=as_json) as printer:
            train_family(
                data,
                out,
                settings,
                categories=None if categories == "all" else categories.split(","),
                steps=steps,
                time_budget=time_budget,
                device=device,
                workers=workers,
                on_estimate=printer.estimate,
                on_progress=printer.progress,
                on_stage=printer.say,
            )
        _print_family(out, as_json)
        if not as_json:
            printer.say(f"Family written to {out}. Next: ddad predict {out} IMAGES... --out DIR")
        return
    from ddad.detector import read_record
    from ddad.fit import fit

    with _Interruptible(), _ProgressPrinter(quiet=as_json) as printer:
        fit(
            data,
            out,
            settings,
            steps=steps,
            time_budget=time_budget,
            device=device,
            workers=workers,
            log_with=log_with.split(",") if log_with else (),
            log_dir=log_dir,
            on_estimate=printer.estimate,
            on_progress=printer.progress,
            on_stage=printer.say,
        )
    if as_json:
        print(json.dumps(read_record(out), indent=2))
    else:
        printer.say(_promise(read_record(out)))
        printer.say(f"Model written to {out}. Next: ddad predict {out} IMAGES... --out DIR")


@app.command()
def predict(
    model: Model,
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="The folder for results.jsonl and the pictures.")],
    category: Category = None,
    batch_size: BatchSize = 4,
    fast: Fast = False,
    backend: BackendName = None,
    precision: PrecisionName = None,
    device: Device = None,
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """Inspect photographs: scores, verdicts, heatmaps, overlays, reconstructions."""
    from ddad.images import named_images
    from ddad.results import print_results, write_results

    paths = named_images(images)
    inspector: Inspector
    if family := _load_family(model, category, device, fast, backend, precision):
        inspector = family.detector(category) if category else family
    else:
        inspector = _load(model, device, fast, backend, precision)
    with _Interruptible():
        rows = write_results(inspector, paths, out, batch_size=batch_size, workers=workers)
        print_results(rows, out, as_json)


@app.command()
def score(
    model: Model,
    manifest: Annotated[
        str,
        typer.Argument(
            help="Parquet or CSV with a column `uri`, a folder of Parquet files, or a folder of images; "
            "a path, or a URI that fsspec reads (s3://, gs://, https:// ...)."
        ),
    ],
    out: Annotated[str, typer.Option(metavar="PLACE", help="The folder for the results, a path or URI.")],
    engine: Annotated[str, typer.Option(metavar="NAME", help="local (processes) or ray.")] = "local",
    workers: Annotated[
        Any,
        typer.Option(
            parser=_bounds,
            metavar="[MIN:]MAX",
            help="Processes, or Ray actors; by default as many as there are processors or GPUs.",
        ),
    ] = None,
    part: Annotated[
        Any,
        typer.Option(
            "--shard", parser=_slice, metavar="I/N", help="Only every n-th shard, from the i-th on (1/n to n/n)."
        ),
    ] = "1/1",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster; by default RAY_ADDRESS, or this machine.")
    ] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0, help="GPUs that each Ray actor takes; 0.5: two share one.")
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Photographs a shard: what is lost with a worker.")] = 1000,
    batch_size: BatchSize = 8,
    threads: Annotated[int, typer.Option(min=1, help="Of each worker.")] = 1,
    readers: Annotated[int, typer.Option(min=1, help="Threads of each worker that fetch and decode.")] = 4,
    heatmaps: Annotated[bool, typer.Option("--heatmaps", help="Also write the anomaly maps, as .npz.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what all would take here, from a sample.")
    ] = False,
    price: Annotated[
        float | None, typer.Option(min=0, help="Of one worker an hour, for the cost in a dry run.")
    ] = None,
    fast: Fast = False,
    backend: BackendName = None,
    precision: PrecisionName = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Score an archive of any size into Parquet. The same command again goes on where it was stopped."""
    from ddad.bulk.run import check_engine, estimate, score_manifest

    options: dict[str, Any] = {
        "shard_size": shard_size,
        "batch_size": batch_size,
        "threads": threads,
        "readers": readers,
        "heatmaps": heatmaps,
        "fast": fast,
        "backend": backend,
        "precision": precision,
        "device": device,
    }
    least, most = workers or (1, None)
    check_engine(engine, address, gpus_per_worker, least)
    if dry_run:
        expected = estimate(model, manifest, workers=most, **options)
        print(json.dumps(expected.to_dict(price), indent=2) if as_json else expected.sentence(price))
        return
    with _Interruptible(), _ProgressPrinter(quiet=as_json) as printer:
        report = score_manifest(
            model,
            manifest,
            out,
            engine=engine,
            workers=most,
            least_workers=least,
            slice_of=part,
            address=address,
            gpus_per_worker=gpus_per_worker,
            on_stage=printer.say,
            on_progress=printer.scored,
            **options,
        )
    print(json.dumps(report.to_dict(), indent=2) if as_json else report.sentence(out))
    if report.given_up:
        raise typer.Exit(1)


@app.command()
def evaluate(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option(help="The folder for metrics.json and report.html.")],
    category: Category = None,
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Also judge nearest-neighbour features of the same images.")
    ] = False,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images inspected together; only scores as published depend on it.")
    ] = None,
    fast: Fast = False,
    backend: BackendName = None,
    precision: PrecisionName = None,
    device: Device = None,
    workers: Workers = 2,
    as_json: AsJson = False,
) -> None:
    """Measure a model on labelled test images; write metrics.json and one report.html."""
    from ddad.report import evaluate_folder

    if family := _load_family(model, category, device, fast, backend, precision):
        if category is None:
            raise ConfigError(f"Expected --category with one of {', '.join(family.categories)}, found none.")
        detector = family.detector(category)
    else:
        detector = _load(model, device, fast, backend, precision)
    with _Interruptible():
        evaluation = evaluate_folder(detector, data, out, baseline=baseline, batch_size=batch_size, workers=workers)
    _print_evaluation(evaluation, out, as_json)


@app.command()
def recalibrate(
    model: Model,
    data: Annotated[Path, typer.Argument(help="Good images: a plain folder, or one in MVTec layout.")],
    out: OutModel = None,
    merge: Annotated[bool, typer.Option("--merge", help="Keep the earlier images' scores, and add these.")] = False,
    false_alarms: Annotated[
        float | None, typer.Option(parser=_rate, metavar="RATE", help="Such as 1%; by default the model's.")
    ] = None,
    backend: BackendName = None,
    precision: PrecisionName = None,
    device: Device = None,
    workers: Workers = 2,
) -> None:
    """Give a model a new threshold from good images that it was not trained on."""
    from ddad.refit import recalibrate as calibrate_again

    model = _to_change(model, out)
    with _Interruptible():
        detector = calibrate_again(
            model,
            data,
            out,
            merge=merge,
            false_alarms=false_alarms,
            backend=backend,  # type: ignore[arg-type]  # checked there
            precision=precision,  # type: ignore[arg-type]
            device=device,
            workers=workers,
        )
    _print_calibrated(detector, out or model)


@app.command()
def adapt(
    model: Model,
    data: Data,
    out: OutModel = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the good images, at most.")] = None,
    device: Device = None,
    workers: Workers = 2,
) -> None:
    """Adapt the features of a model to its product, where that finds synthetic defects better."""
    from ddad.refit import adapt as adapt_model

    model = _to_change(model, out)
    with _Interruptible():
        detector = adapt_model(model, data, out, epochs=epochs, device=device, workers=workers, on_stage=print)
    _print_calibrated(detector, out or model)


@app.command()
def tune(
    model: Model,
    data: Data,
    out: OutModel = None,
    time_budget: Annotated[
        float | None, typer.Option(parser=_duration, metavar="TIME", help="For the search; by default 10m.")
    ] = None,
    device: Device = None,
    workers: Workers = 2,
) -> None:
    """Choose a model's settings on good images and synthetic defects, and calibrate it again."""
    from ddad.refit import DEFAULT_SECONDS
    from ddad.refit import tune as tune_model

    model = _to_change(model, out)
    with _Interruptible():
        seconds = time_budget or DEFAULT_SECONDS
        detector = tune_model(model, data, out, seconds=seconds, device=device, workers=workers, on_stage=print)
    _print_calibrated(detector, out or model)


@app.command()
def distill(
    model: Model,
    data: Data,
    out: OutModel = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps; by default none where the first call does, else 600.")
    ] = None,
    device: Device = None,
    workers: Workers = 2,
) -> None:
    """Give a model a one-call student for --fast, where it finds synthetic defects as well."""
    from ddad.refit import distill as distill_model

    model = _to_change(model, out)
    with _Interruptible(), _ProgressPrinter(quiet=False) as printer:
        student = distill_model(
            model,
            data,
            out,
            steps=steps,
            device=device,
            workers=workers,
            on_stage=printer.say,
            on_progress=printer.progress,
        )
    _print_calibrated(student, out or model)


@app.command()
def monitor(
    model: Model,
    results: Annotated[
        Path,
        typer.Argument(
            help="The results.jsonl of ddad predict, or the folder of ddad score, in the order of inspection."
        ),
    ],
    window: Annotated[int | None, typer.Option(min=2, help="Photographs compared at a time; by default 50.")] = None,
    alarm_rate: Annotated[
        float | None,
        typer.Option(
            parser=_rate, metavar="RATE", help="Expected alarms per window of good photographs; by default 0.01%."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Warn where photographs are no longer like those of calibration; the threshold stays."""
    from pydantic import ValidationError

    from ddad.calibration import Calibration
    from ddad.detector import model_folder, read_record
    from ddad.drift import FALSE_ALARMS, WINDOW, watch
    from ddad.results import read_results

    record = read_record(model_folder(model))
    try:
        calibration = Calibration.model_validate(record.get("calibration") or {"scales": ()})
    except ValidationError:
        raise ModelError(
            f"Expected a calibration that this version understands in {model}, found another one; run ddad recalibrate."
        ) from None
    watcher = calibration.monitor(window or WINDOW, alarm_rate or FALSE_ALARMS)
    assert calibration.threshold is not None  # it has scores
    alarms = 0
    if results.is_dir():
        from ddad.bulk.tables import read_results as read_scores

        rows = read_scores(str(results))
    else:
        rows = read_results(results)
    for alarm in watch(watcher, rows, calibration.threshold):
        alarms += 1
        print(alarm.model_dump_json() if as_json else f"After {alarm.images} photographs: {alarm.message}")
    few = ""
    if watcher.images < watcher.window:
        few = f"; fewer than a window of {watcher.window}, so nothing was compared"
    if not as_json:
        print(f"{watcher.images} photographs, {alarms or 'no'} {'alarm' if alarms == 1 else 'alarms'}{few}.")
    elif few:
        print(f"{watcher.images} photographs{few}.", file=sys.stderr)


@app.command()
def serve(
    models: Annotated[
        list[Path], typer.Argument(help="Model folders, or owner/name on the hub; each is served under its name.")
    ],
    host: Annotated[
        str, typer.Option(help="The address to listen on; others than this machine's own need a token.")
    ] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help="A file with the token that clients must show; or set DDAD_TOKEN.")
    ] = None,
    history: Annotated[Path, typer.Option(help="The folder that keeps past inspections.")] = Path("ddad-history"),
    history_size: Annotated[
        int, typer.Option(parser=_size, metavar="SIZE", show_default="2GB", help="The oldest are removed beyond it.")
    ] = 2 << 30,
    max_batch: Annotated[int, typer.Option(min=1, help="Photographs inspected together; scores stay.")] = 8,
    max_wait: Annotated[float, typer.Option(min=0, help="Milliseconds that a photograph waits for others.")] = 5.0,
    max_queue: Annotated[int, typer.Option(min=1, help="Photographs that may be inside; more are refused.")] = 256,
    max_files: Annotated[int, typer.Option(min=1, help="Photographs a request.")] = 32,
    max_request: Annotated[
        int, typer.Option(parser=_size, metavar="SIZE", show_default="64MB", help="Of a request's body.")
    ] = 64 << 20,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of a photograph.")] = 50_000_000,
    rate: Annotated[float, typer.Option(min=0.1, help="Requests a second from one address.")] = 100.0,
    deadline: Annotated[float, typer.Option(min=0.1, help="Seconds until a photograph is given up.")] = 30.0,
    fast: Fast = False,
    backend: BackendName = None,
    precision: PrecisionName = None,
    device: Device = None,
    workers: Workers = 2,
) -> None:
    """Inspect photographs over HTTP: a page for people, an API for machines."""
    from ddad.detector import model_folder
    from ddad.server.run import Options, serve_forever

    serve_forever(
        [model_folder(model) for model in models],
        Options(
            host=host,
            port=port,
            token_file=token_file,
            history=history,
            history_bytes=history_size,
            max_batch=max_batch,
            max_wait=max_wait / 1000,
            max_queue=max_queue,
            max_files=max_files,
            max_bytes=max_request,
            max_pixels=max_pixels,
            rate=rate,
            deadline=deadline,
            fast=fast,
            backend=backend,  # type: ignore[arg-type]  # checked there
            precision=precision,  # type: ignore[arg-type]
            device=device,
            workers=workers,
        ),
    )


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="The published code's U-Net, as torch.save wrote it.")],
    out: Annotated[Path, typer.Option(help="The model folder to write.")],
    extractor: Annotated[Path | None, typer.Option(help="The adapted extractor beside it (feat<N>).")] = None,
    features: Annotated[
        str | None, typer.Option(help="The backbone, a timm name; by default the paper's wide_resnet101_2.tv_in1k.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="mvtec-ad or visa: with --category, take the authors' w and v of that category.")
    ] = None,
    category: Annotated[str | None, typer.Option(help="The product.")] = None,
) -> None:
    """Make a model folder from a checkpoint of the published DDAD code."""
    from ddad.integrations.authors import convert_checkpoint

    convert_checkpoint(checkpoint, out, features=extractor, features_name=features, dataset=dataset, category=category)
    print(
        f"Model written to {out}. It gives scores, but no verdict until it has seen good images that it was not "
        f"trained on: ddad recalibrate {out} GOOD_FOLDER"
    )


@app.command()
def benchmark(
    root: Annotated[Path, typer.Argument(help="The data set, as released.")],
    out: Annotated[Path, typer.Option(help="The folder for models, results and tables.")],
    dataset: Annotated[str, typer.Option(help="Its layout: mvtec-ad, visa, mtd or folder.")] = "folder",
    categories: Annotated[str | None, typer.Option(help="Some of them: tile,wood; by default all.")] = None,
    preset: Preset = "xs",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each category.")] = 3,
    image_size: Annotated[int | None, typer.Option(help="As for train.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of each training.")] = None,
    time_budget: Annotated[
        float | None, typer.Option(parser=_duration, metavar="TIME", help="Of each training; by default 1h.")
    ] = None,
    features: Annotated[str | None, typer.Option(help="As for train.")] = None,
    published: Annotated[bool, typer.Option(help="The authors' settings of each category (paper, paper-s).")] = False,
    dry_run: Annotated[bool, typer.Option(help="Only say how long it would take.")] = False,
    ablate: Annotated[bool, typer.Option(help="Also judge the first network of each category part by part.")] = False,
    ablate_images: Annotated[int | None, typer.Option(min=2, help="Test images for that; by default all.")] = None,
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="local: one training after the other; ray: on a whole cluster.")
    ] = "local",
    address: Annotated[
        str | None, typer.Option(help="Of a Ray cluster; by default RAY_ADDRESS, or this machine.")
    ] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0, help="GPUs that each training takes on the cluster; 0.5: two share one.")
    ] = None,
    device: Device = None,
    workers: Workers = 2,
) -> None:
    """Train and judge many categories and seeds; one table with the paper's figures beside ours."""
    from ddad.benchmark import run_benchmark

    with _Interruptible(), _ProgressPrinter(quiet=False) as printer:
        report = run_benchmark(
            root,
            dataset,
            out,
            categories=categories.split(",") if categories else None,
            preset=preset,
            seeds=seeds,
            image_size=image_size,
            steps=steps,
            time_budget=time_budget,
            changes={"scoring": {"features": features}} if features else None,
            published=published,
            dry_run=dry_run,
            device=device,
            workers=workers,
            engine=engine,
            address=address,
            gpus_per_worker=gpus_per_worker,
            on_estimate=printer.estimate,
            on_progress=printer.progress,
            on_stage=printer.say,
        )
        if dry_run:
            return
        printer.say(report.table)
        for name, error in report.failures.items():
            printer.say(f"{name} failed: {error}")
        printer.say(f"Written to {out / 'results.md'}, results.csv and results.html.")
        for folder, data in report.models.items() if ablate else ():
            from ddad.ablation import run_ablation

            try:
                table = run_ablation(
                    folder,
                    data,
                    folder.parent,
                    max_images=ablate_images,
                    device=device,
                    workers=workers,
                    on_stage=printer.say,
                )
            except DDADError as error:  # the other categories go on
                report.failures[f"ablation of {data.category}"] = table = str(error)
            printer.say(table)
    if report.failures:
        raise typer.Exit(1)


@app.command()
def info(model: Model, as_json: AsJson = False) -> None:
    """Say what a model is: settings, data, promise."""
    from ddad.detector import is_family, model_folder, read_record

    if is_family(model):
        _print_family(model, as_json)
        return
    model = model_folder(model)
    record = read_record(model)
    if as_json:
        print(json.dumps(record, indent=2))
        return
    settings, training, data = record["settings"], record.get("training", {}), record.get("data")
    table = Table(show_header=False, box=None)
    rows = {
        "category": record.get("category"),
        "preset": settings["preset"],
        "shape": "{} x {} pixels".format(*record["shape"])
        + (" in {} x {} tiles".format(*tiles) if (tiles := settings.get("tiles", [1, 1])) != [1, 1] else ""),
        "features": settings["scoring"]["features"],
        "adaptation": record.get("adaptation", {}).get("said"),
        "tuning": record.get("tuning", {}).get("said"),
        "student": (_student_record(model) or {}).get("distillation", {}).get("said"),
        "converted from": record.get("converted", {}).get("checkpoint", {}).get("file"),
        "trained": record.get("trained"),
        "steps": training.get("steps"),
        "held-out loss": _figure(training["held_out_loss"]) if training.get("held_out_loss") else None,
        "good images": data
        and " + ".join(str(len(data[part])) for part in ("train", "select", "calibration"))
        + " (train + select + calibration)",
        "false alarms": _promise(record),
        "versions": ", ".join(f"{name} {number}" for name, number in record["versions"].items()),
    }
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, str(value))
    Console(soft_wrap=True, highlight=False).print(table)


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option(help="The folder for the graphs, the comparison and how to call them.")],
    graph_format: Annotated[str, typer.Option("--format", metavar="NAME", help="onnx or openvino.")] = "onnx",
    precision: Annotated[str, typer.Option(metavar="NAME", help="fp32, fp16 or int8; bf16 with openvino.")] = "fp32",
    data: Annotated[
        Path | None,
        typer.Option(help="Photographs to compare on, as for train; by default images that the model makes."),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="How far a score may move; by default 0.001 in fp32.")
    ] = None,
    fast: Fast = False,
) -> None:
    """Write a model as one graph that needs no PyTorch; refused where it does not say the same."""
    from ddad.detector import model_folder
    from ddad.export import export as export_model

    exported = export_model(
        model_folder(model),
        out,
        format=graph_format,  # type: ignore[arg-type]  # checked there
        precision=precision,  # type: ignore[arg-type]
        data=data,
        tolerance=tolerance,
        fast=fast,
        on_stage=print,
    )
    print(exported.said)
    print(f"Written to {out}. Next: ddad-runtime {out} IMAGES... --out DIR")


@app.command()
def push(
    model: Annotated[Path, typer.Argument(help="A model folder, as written by `ddad train`.")],
    name: Annotated[str, typer.Argument(help="owner/name on the Hugging Face hub.")],
    metrics: Annotated[
        Path | None, typer.Option(help="The metrics.json of ddad evaluate on this model, for its card.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="Where the repository is new: for all to see.")] = False,
    revision: Annotated[str | None, typer.Option(help="A branch; made where it is not there yet.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
) -> None:
    """Upload a model, with a card of what was measured, to the Hugging Face hub; no photograph is in it."""
    from ddad.detector import push_folder
    from ddad.evaluation import Evaluation

    commit = push_folder(
        model,
        name,
        metrics=Evaluation.load(metrics).to_dict() if metrics else None,
        private=not public,
        revision=revision,
        message=message,
    )
    print(f"Pushed to {name}. Next: ddad predict {name}@{commit} IMAGES... --out DIR")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder for images, model and report.")] = Path("demo"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 720,
    seed: Annotated[int, typer.Option(min=0, help="Of images, weights and batches.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Train on built-in rendered parts, evaluate, write report.html: offline, on a CPU, in minutes."""
    from ddad.config import make_settings
    from ddad.data.demo import write_demo_dataset

    data = write_demo_dataset(out / "parts", seed=seed)
    # A few hundred steps want a larger rate. Adaptation would take a minute more, and does not help (docs/log.md).
    settings = make_settings(
        "xs",
        image_size=96,
        seed=seed,
        false_alarms=0.05,
        training={"learning_rate": 1.6e-3},
        adaptation={"epochs": 0},
    )
    from ddad.detector import Detector
    from ddad.fit import fit
    from ddad.report import evaluate_folder

    with _Interruptible(), _ProgressPrinter(quiet=as_json) as printer:
        printer.say(f"Rendered parts are in {data}.")
        fit(
            data,
            out / "model",
            settings,
            steps=steps,
            on_estimate=printer.estimate,
            on_progress=printer.progress,
            on_stage=printer.say,
        )
        printer.say("Inspecting the test images.")
        evaluation = evaluate_folder(Detector.from_pretrained(out / "model"), data, out, workers=2)
    _print_evaluation(evaluation, out, as_json)


def _load(model: Path, device: str | None, fast: bool, backend: Any, precision: Any) -> "Detector":
    from ddad.detector import Detector

    detector = Detector.from_pretrained(model, device, fast=fast, backend=backend, precision=precision)
    if detector.warning:
        print(f"Warning: {detector.warning}", file=sys.stderr)
    return detector


def _load_family(
    model: Path, category: str | None, device: str | None, fast: bool, backend: str | None, precision: str | None
) -> "Family | None":
    """The family of categories in a folder; None for a model of one."""
    from ddad.detector import is_family

    if not is_family(model):
        if category is not None:
            raise ConfigError(f"Expected a family for --category, found a model of one in {model}; leave it out.")
        return None
    from ddad.family import Family, check_computed

    check_computed(fast, backend, precision)
    return Family.from_pretrained(model, device)


def _print_family(folder: Path, as_json: bool) -> None:
    """What a family is, and the promise of each category."""
    from ddad.detector import read_record
    from ddad.family import read_family

    record = read_family(folder)
    if as_json:
        print(json.dumps(record, indent=2))
        return
    training = record.get("training", {})
    rows = {
        "categories": ", ".join(record["categories"]),
        "preset": record["settings"]["preset"],
        "shape": "{} x {} pixels".format(*record["shape"]),
        "features": record["settings"]["scoring"]["features"],
        "trained": record.get("trained"),
        "steps": training.get("steps"),
        "held-out loss": _figure(training["held_out_loss"]) if training.get("held_out_loss") else None,
    }
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, str(value))
    for name in record["categories"]:
        table.add_row(name, _promise(read_record(folder / "categories" / name)))
    Console(soft_wrap=True, highlight=False).print(table)


def _to_change(model: Path, out: Path | None) -> Path:
    """The folder of a model that a command changes, in place unless there is an `out`."""
    from ddad.detector import model_folder
    from ddad.hub import parse_name

    if out is None and parse_name(model):
        raise ConfigError(f"Expected a model folder, or --out for a model of the hub, found neither for {model}.")
    return model_folder(model)


def _settings(preset: str, **options: Any) -> Any:
    from ddad.config import PRESETS, make_settings

    changes: dict[str, Any] = {key: options.get(key) for key in ("image_size", "tiles", "seed", "false_alarms")}
    if options.get("features"):
        changes["scoring"] = {"features": options["features"]}
    if options.get("augment"):
        changes["training"] = {"augment": tuple(options["augment"].split(","))}
    if options.get("adapt") is False:
        changes["adaptation"] = {"epochs": 0}
    count = options.get("denoising_steps")
    if count:
        start = make_settings(preset).sampling.start_timestep if preset in PRESETS else 0
        if start % count:
            divisors = ", ".join(str(n) for n in range(1, 51) if start and start % n == 0)
            raise ConfigError(f"Expected a number of denoising steps that divides {start} ({divisors}), found {count}.")
        changes["sampling"] = {"stride": start // count}
    return make_settings(preset, **changes)


def _print_check(report: "CheckReport") -> None:
    console = Console(soft_wrap=True, highlight=False)
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.test.items()) or "none"
    console.print(f"{report.category}: {report.train} good images to train on; test images: {kinds}.", markup=False)
    if report.shape and report.split:
        parts = ", ".join(f"{count} {part}" for part, count in report.split.items())
        console.print(f"Model of {report.shape[0]} x {report.shape[1]} pixels (height x width); {parts}.", markup=False)
    colours = {"error": "red", "warning": "yellow", "info": "cyan"}
    for finding in report.findings:
        console.print(f"{finding.level}: {finding.message}", style=colours[finding.level], markup=False)
        if finding.advice:
            console.print(f"    {finding.advice}", markup=False)
        for path in finding.paths[:SHOWN_PATHS]:
            console.print(f"    - {path}", markup=False)
        if len(finding.paths) > SHOWN_PATHS:
            console.print(f"    - and {len(finding.paths) - SHOWN_PATHS} more", markup=False)
    console.print("Training can start." if report.can_train else "Training cannot start.", markup=False)


def _promise(record: dict[str, Any]) -> str:
    from ddad.calibration import Calibration

    calibration = record.get("calibration")
    return Calibration.model_validate(calibration).promise() if calibration else "not calibrated"


def _student_record(model: Path) -> dict[str, Any] | None:
    from ddad.detector import RECORD, STUDENT, read_record

    return read_record(model / STUDENT) if (model / STUDENT / RECORD).is_file() else None


def _print_calibrated(detector: "Detector", folder: Path) -> None:
    assert detector.calibration is not None
    print(detector.calibration.promise())
    print(f"Model written to {folder}.")


def _print_evaluation(evaluation: "Evaluation", out: Path, as_json: bool) -> None:
    if as_json:
        print(json.dumps(evaluation.to_dict(), indent=2))
        return
    beside = evaluation.baseline
    table = Table("metric", "value", "95 % interval", *([beside["name"]] if beside else []), box=None)
    for name, value in evaluation.metrics.items():
        label = f"{name} (oracle)" if name == "image_f1_max" else name
        interval = evaluation.intervals.get(name)
        between = f"{interval[0]:.4g} to {interval[1]:.4g}" if interval else ""
        table.add_row(label, _figure(value), between, *([_figure(beside.get(name))] if beside else []))
    console = Console(soft_wrap=True, highlight=False)
    console.print(table)
    for note in evaluation.notes:
        console.print(note, markup=False)
    console.print(f"Written to {out / 'metrics.json'} and {out / 'report.html'}.", markup=False)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


class _Interruptible:
    """Ctrl-C and a saved stop end in a sentence and exit code 130."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Interrupted):
            print(f"Stopped at {error}, and saved. The same command goes on from there.", file=sys.stderr)
            raise SystemExit(INTERRUPTED)
        if isinstance(error, KeyboardInterrupt):
            print("Stopped.", file=sys.stderr)
            raise SystemExit(INTERRUPTED)


class _ProgressPrinter:
    """A bar with the time left on a terminal; a plain line every tenth elsewhere."""

    def __init__(self, quiet: bool) -> None:
        self.console = Console(stderr=quiet, soft_wrap=True, highlight=False)
        self.bar: Any = None
        self.task: Any = None
        self.tenth = 0

    def __enter__(self) -> "_ProgressPrinter":
        return self

    def __exit__(self, *details: Any) -> None:
        self._stop()

    def say(self, sentence: str) -> None:
        self._stop()
        self.console.print(sentence, markup=False)

    def estimate(self, estimate: "Estimate") -> None:
        epochs = estimate.adaptation_epochs
        adapt = f"{epochs} adaptation passes in {_time(estimate.adapt_seconds)}, " if epochs else ""
        self.say(
            f"{estimate.parameters / 1e6:.1f} M parameters in {estimate.precision}, "
            f"{estimate.images_per_second:.1f} images a second, {estimate.memory_mb / 1000:.1f} GB of memory: "
            f"{estimate.steps} steps in about {_time(estimate.train_seconds)}, {adapt}"
            f"then {_time(estimate.calibrate_seconds)} to calibrate."
        )

    def progress(self, progress: "Progress") -> None:
        held_out = "" if progress.held_out_loss is None else f", held-out loss {progress.held_out_loss:.5f}"
        if self.console.is_terminal:
            if self.bar is None:
                self._start(progress.steps)
            self.bar.update(self.task, completed=progress.step, said=f"loss {progress.loss:.4f}{held_out}")
        elif progress.step % max(1, progress.steps // 10) == 0 or progress.step == progress.steps:
            left = progress.seconds / progress.step * (progress.steps - progress.step)
            self.console.print(
                f"step {progress.step} of {progress.steps}, loss {progress.loss:.4f}{held_out}, {_time(left)} left",
                markup=False,
            )

    def scored(self, progress: "ScoreProgress") -> None:
        said = f"in this run {progress.flagged:,} anomalous, {progress.errors:,} not inspected"
        if self.console.is_terminal:
            if self.bar is None:
                self._start(progress.images)
            self.bar.update(self.task, completed=progress.done, said=said)
            return
        tenth = 10 * progress.done // progress.images
        if tenth > self.tenth:
            self.tenth = tenth
            left = "" if progress.seconds_left is None else f"; {_time(progress.seconds_left)} left"
            self.console.print(f"{progress.done:,} of {progress.images:,} photographs; {said}{left}", markup=False)

    def _start(self, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[said]}"))
        self.bar = Bar(*columns, console=self.console)
        self.task = self.bar.add_task("", total=total, said="")
        self.bar.start()

    def _stop(self) -> None:
        if self.bar:
            self.bar.stop()
            self.bar = None


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    main()
