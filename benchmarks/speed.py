"""How fast is it, and how close to what the machine can do? One table a section, all from one run.

    python benchmarks/speed.py [--sections inference,training,growth,metrics,startup] [--presets xs,s,base]
                               [--batches 1,8,32] [--size 256] [--model MODEL --data DATA] [--json PATH]

inference  `published` is the published configuration: base, n = 10, eager fp32, Wide-ResNet-101, random weights. The
           other rows are our presets in each backend, whole pipeline: read a PNG, denoise, features, map, verdict.
           Every row is a process of its own; those of a preset, and `published` with each, are measured in turn, again
           and again. With a trained MODEL (and the good images DATA it was calibrated on) there are rows of it and of
           its student, and verdicts are compared.
training   one optimisation step, against the machine's largest measured convolution rate.
growth     cost against resolution, network calls, calibration images and images scored.
metrics    pixel AUROC, AP and AUPRO of 582 maps of 256 x 256 on one thread.
startup    CPU time of whole commands.

A rate is "of peak" against the largest matrix product or convolution measured here, in the same precision.
"""

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SEED = 0
LONGEST = 20.0
"""Seconds of one measurement; a batch that would take longer is left out."""
SECTIONS = ("inference", "training", "growth", "metrics", "startup")
VERDICT_IMAGES = 100
WITH_BF16 = ("torch", "openvino")


@dataclass(frozen=True)
class Row:
    """One configuration of the table of inference."""

    preset: str
    backend: str
    precision: str = "fp32"
    device: str = "cpu"
    model: str | None = None
    fast: bool = False

    @property
    def name(self) -> str:
        return " ".join((self.preset, *(("--fast",) if self.fast else ()), self.backend, self.precision, self.device))


# -- a process a row --------------------------------------------------------------------------------------------------


def load(row: Row, size: int, folder: Path) -> Any:
    """The detector of a row; without a model, one with random weights and an arbitrary calibration."""
    import torch

    from ddad.config import make_settings
    from ddad.detector import Detector
    from ddad.distillation import student_settings
    from ddad.features import FeatureExtractor, create_features
    from ddad.unet import create_scheduler, create_unet

    if row.model:
        return Detector.from_pretrained(
            row.model, row.device, fast=row.fast, backend=row.backend, precision=row.precision
        )
    torch.manual_seed(SEED)
    preset = "paper" if row.preset == "published" else row.preset
    settings = make_settings(preset, image_size=size, false_alarms=0.2)
    scoring = settings.scoring
    if preset == "paper":
        import timm

        backbone = timm.create_model("wide_resnet101_2", pretrained=False)
        features = FeatureExtractor(backbone, "wide_resnet101_2", scoring.feature_layers, (0.5,) * 3, (0.25,) * 3)
    else:
        features = create_features(scoring.features, scoring.feature_layers)
    prediction = settings.network.prediction_type
    unet = create_unet(settings.network.architecture)
    if row.fast:
        settings = student_settings(settings)
    detector = Detector(unet, create_scheduler(prediction), features, settings, (size, size), device=row.device)
    if preset == "paper":
        return detector
    images = [photo(i, size) for i in range(6)]
    detector.calibrate(images[:2], images[2:], batch_size=1)
    place = folder / f"{preset}{'-fast' if row.fast else ''}"
    if not place.exists():
        detector.save_pretrained(place)
    return Detector.from_pretrained(place, row.device, backend=row.backend, precision=row.precision)


def photo(index: int, size: int) -> np.ndarray:
    """A photograph of sorts: smooth shades and grain, uint8 (size, size, 3)."""
    rng = np.random.default_rng([SEED, index])
    coarse = Image.fromarray(rng.integers(60, 200, (8, 8, 3), dtype=np.uint8)).resize((size, size), Image.BICUBIC)
    return np.clip(np.asarray(coarse, np.float32) + 6 * rng.standard_normal((size, size, 1)), 0, 255).astype(np.uint8)


def child(pipe: Any, row: Row, size: int, folder: Path, paths: list[Path]) -> None:
    """Answer measurements until told to stop: ("run", batch), ("stages", batch), ("scores", images) or None."""
    import torch

    from ddad.images import read_photo

    detector = load(row, size, folder)
    published = row.preset == "published"

    def run(images: list[Path], batch: int) -> list[float]:
        found = detector.stream(images, batch, batch_max=published)
        return [prediction.anomaly_score for _, prediction in found]

    def stages(images: list[Path]) -> dict[str, float]:
        def timed(work: Callable[[], Any]) -> tuple[Any, float]:
            started = time.perf_counter()
            result = work()
            if row.device != "cpu":
                torch.cuda.synchronize()
            return result, time.perf_counter() - started

        seconds: dict[str, float] = {}
        arrays, seconds["read"] = timed(
            lambda: [read_photo(path, detector.shape, detector.image_rule)[0] for path in images]
        )
        rebuilt, seconds["denoise"] = timed(lambda: detector.reconstruct(arrays))
        distances, seconds["features"] = timed(lambda: detector.distances(arrays, rebuilt))
        _, seconds["map"] = timed(lambda: detector.fuse(detector.smooth(distances)).amax().item())
        return seconds

    pipe.send(gigaflops(detector))
    while (asked := pipe.recv()) is not None:
        what, argument = asked
        if what == "run":
            images = (paths * argument)[:argument]
            started = time.perf_counter()
            run(images, argument)
            pipe.send(time.perf_counter() - started)
        elif what == "stages":
            pipe.send(stages((paths * argument)[:argument]))
        elif what == "scores":
            threshold = detector.calibration.threshold if detector.calibration else None
            pipe.send((run(argument, 1 if row.backend == "compile" else 4), threshold))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if row.device != "cpu":
        memory = torch.cuda.max_memory_allocated() / 2**20
    pipe.send(memory)


def gigaflops(detector: Any) -> dict[str, float]:
    """Of one image: all network calls, and the features of photograph and reconstruction; 2 a multiply-add."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ddad.unet import predict

    image = torch.zeros(1, 3, *detector.shape, device=detector.device)
    steps = torch.zeros(1, dtype=torch.long, device=detector.device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        predict(detector.unet, image, steps)
    call = counter.get_total_flops() / 1e9
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        detector.features(image)
    calls = len(detector.settings.sampling.timesteps)
    return {"calls": calls, "call": call, "image": calls * call + 2 * counter.get_total_flops() / 1e9}


def inference(options: argparse.Namespace, peak: dict[str, float]) -> Iterator[dict[str, Any]]:
    """Rows of the table, measured in turn."""
    import torch

    cuda = torch.cuda.is_available()
    bf16 = cuda or torch.cpu._is_avx512_bf16_supported()
    device = "cuda" if cuda else "cpu"
    rows = [Row("published", "torch", device=device)] if options.published else []
    for preset in options.presets:
        if cuda:
            rows += [Row(preset, "torch", device="cuda"), Row(preset, "torch", "bf16", "cuda")]
            rows += [Row(preset, "compile", "bf16", "cuda")]
            continue
        # Compiling the larger ones takes a CPU many minutes.
        rows += [Row(preset, backend) for backend in options.backends if backend != "compile" or preset == "xs"]
        rows += [Row(preset, backend, "bf16") for backend in options.backends if bf16 and backend in WITH_BF16]
    if not cuda and "xs" in options.presets:
        rows += [Row("xs", backend, fast=True) for backend in options.backends if backend != "compile"]
        if bf16 and "openvino" in options.backends:
            rows.append(Row("xs", "openvino", "bf16", fast=True))
    if options.model:
        for fast in (False, True) if (Path(options.model) / "fast").is_dir() else (False,):
            rows += [Row("model", one, model=options.model, fast=fast) for one in options.backends if one != "compile"]
            rows += [
                Row("model", one, "bf16", model=options.model, fast=fast)
                for one in options.backends
                if bf16 and one in WITH_BF16
            ]

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = []
        for index in range(32):
            paths.append(folder / f"{index}.png")
            Image.fromarray(photo(100 + index, options.size)).save(paths[-1])
        judged = good_images(options)
        # Processes keep what memory they once had, so that those of all presets together would not fit.
        for preset in dict.fromkeys(row.preset for row in rows if row.preset != "published"):
            group = [row for row in rows if row.preset in ("published", preset)]
            yield from in_turn(group, options, peak, folder, paths, judged)


def in_turn(
    rows: list[Row],
    options: argparse.Namespace,
    peak: dict[str, float],
    folder: Path,
    paths: list[Path],
    judged: list[Path],
) -> Iterator[dict[str, Any]]:
    """Measure rows in turn, again and again, each in a process that stays."""
    context = multiprocessing.get_context("spawn")
    workers: dict[Row, Any] = {}
    facts: dict[Row, dict[str, float]] = {}
    for row in rows:
        here, there = context.Pipe()
        process = context.Process(target=child, args=(there, row, options.size, folder, paths), daemon=True)
        process.start()
        there.close()
        try:
            facts[row] = here.recv()
        except EOFError:
            print(f"{row.name}: not measured, its process ended.", file=sys.stderr)
            continue
        workers[row] = here
        print(f"{row.name} is ready.", file=sys.stderr)

    def ask(row: Row, what: str, argument: Any) -> Any:
        workers[row].send((what, argument))
        return workers[row].recv()

    seconds: dict[tuple[Row, int], list[float]] = {}
    first = {row: ask(row, "run", 1) and ask(row, "run", 1) for row in workers}  # the first one warms up
    cases = [
        (row, batch)
        for batch in options.batches
        for row in workers
        # Every batch size is compiled anew, which takes minutes on a CPU.
        if batch == 1 or (batch * first[row] < LONGEST and (row.backend != "compile" or row.device != "cpu"))
    ]
    for _ in range(options.repeats):
        for row, batch in cases:
            seconds.setdefault((row, batch), []).append(ask(row, "run", batch) / batch)
    stages = {row: [ask(row, "stages", 1) for _ in range(options.repeats)] for row in workers}
    scores: dict[Row, tuple[list[float], float | None]] = {}
    for row in workers:
        wanted = judged if row.model else paths[: 2 if row.preset == "base" else 8]
        if row.preset != "published":
            scores[row] = ask(row, "scores", wanted)
    memory = {}
    for row, pipe in workers.items():
        pipe.send(None)
        memory[row] = pipe.recv()

    for (row, batch), found in seconds.items():
        reference = next((one for one in scores if (one.preset, one.fast) == (row.preset, row.fast)), None)
        found_ms = [1000 * one for one in found]
        share = {name: statistics.median(one[name] for one in stages[row]) for name in stages[row][0]}
        whole = sum(share.values())
        result = {
            "section": "inference",
            "preset": row.preset,
            "fast": row.fast,
            "backend": row.backend,
            "precision": row.precision,
            "device": row.device,
            "batch": batch,
            "ms_per_image": statistics.median(found_ms),
            "ms_spread": [min(found_ms), max(found_ms)],
            "network_calls": facts[row]["calls"],
            "gflop_per_image": facts[row]["image"],
            "gflops": facts[row]["image"] / statistics.median(found),
            "of_peak": facts[row]["image"] / statistics.median(found) / peak[f"{row.device} {row.precision}"],
            "share": {name: value / whole for name, value in share.items()},
            "memory_mb": memory[row],
        }
        if row in scores and reference:
            ours, threshold = scores[row]
            theirs, _ = scores[reference]
            result["score_difference"] = float(np.abs(np.array(ours) - np.array(theirs)).max())
            result["largest_score"] = float(np.max(theirs))
            if row.model and threshold is not None:
                flipped = (np.array(ours) > threshold) != (np.array(theirs) > threshold)
                result["verdicts"], result["verdicts_flipped"] = len(ours), int(flipped.sum())
        yield result


def good_images(options: argparse.Namespace) -> list[Path]:
    """Calibration images of the model: what verdicts are compared on."""
    if not options.model:
        return []
    from ddad.data.folder import scan
    from ddad.data.samples import paths_by_hash
    from ddad.detector import read_record

    paths = paths_by_hash(sample.path for sample in scan(options.data).train)
    return [paths[one] for one in read_record(Path(options.model))["data"]["calibration"]][:VERDICT_IMAGES]


# -- in this process --------------------------------------------------------------------------------------------------


def best_seconds(work: Callable[[], Any], repeats: int = 7) -> float:
    """The quickest of several, after one that does not count."""
    work()
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return min(found)


def measured_peak() -> dict[str, float]:
    """GFLOP/s of the better of a large matrix product and a large convolution, by device and precision."""
    import torch

    found = {}
    cuda = torch.cuda.is_available()
    for device in ("cpu", "cuda") if cuda else ("cpu",):
        side, batch = (8192, 64) if device == "cuda" else (1536, 8)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            matrix = torch.randn(side, side, device=device, dtype=dtype)
            image = torch.randn(batch, 128, 64, 64, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            layer = torch.nn.Conv2d(128, 128, 3, padding=1, device=device, dtype=dtype)
            layer = layer.to(memory_format=torch.channels_last)

            def synchronised(work: Callable[[], Any], device: str = device) -> Callable[[], Any]:
                def both() -> None:
                    work()
                    if device == "cuda":
                        torch.cuda.synchronize()

                return both

            with torch.no_grad():
                product = 2 * side**3 / best_seconds(synchronised(lambda m=matrix: m @ m))
                convolution = 2 * batch * 64 * 64 * 128 * 128 * 9 / best_seconds(
                    synchronised(lambda one=layer, i=image: one(i))
                )  # fmt: skip
            found[f"{device} {name}"] = max(product, convolution) / 1e9
    return found


def training(options: argparse.Namespace, peak: dict[str, float]) -> Iterator[dict[str, Any]]:
    """One optimisation step of each preset: images a second, share of peak. A step is three times a call forwards."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ddad.config import make_settings
    from ddad.training import Trainer
    from ddad.unet import create_unet, predict

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for preset in options.presets:
        settings = make_settings(preset, image_size=options.size)
        if device.type == "cpu" and preset != "xs":
            settings = make_settings(preset, image_size=options.size, training={"batch_size": 2})
        unet = create_unet(settings.network.architecture)
        trainer = Trainer(
            unet,
            settings.training,
            prediction_type=settings.network.prediction_type,
            max_timestep=settings.max_timestep,
            seed=SEED,
            device=device,
        )
        images = [photo(i, options.size) for i in range(32)]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            image = torch.zeros(1, 3, options.size, options.size, device=device)
            predict(unet, image, torch.zeros(1, dtype=torch.long, device=device))
        found = []
        for step in range(2 + options.repeats):
            started = time.perf_counter()
            float(trainer.step(images, step, 1000))
            found.append(time.perf_counter() - started)
        batch = settings.training.batch_size
        seconds = statistics.median(found[2:])
        rate = 3 * batch * counter.get_total_flops() / 1e9 / seconds
        yield {
            "section": "training",
            "preset": preset,
            "precision": trainer.precision,
            "device": device.type,
            "batch": batch,
            "images_per_second": batch / seconds,
            "seconds_spread": [min(found[2:]), max(found[2:])],
            "gflops": rate,
            "of_peak": rate / peak[f"{device.type} {trainer.precision}"],
        }


def growth(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """How cost grows, with the smallest preset in eager PyTorch."""
    import psutil
    import torch

    from ddad.calibration import Ranking, calibrate
    from ddad.config import make_settings
    from ddad.detector import Detector
    from ddad.features import create_features
    from ddad.unet import create_scheduler, create_unet

    torch.manual_seed(SEED)
    features, unet = create_features("efficientnet-lite2", (2, 3)), create_unet("xs")

    def detector(size: int, stride: int = 40) -> Detector:
        settings = make_settings("xs", image_size=size, sampling={"stride": stride}, false_alarms=0.2)
        made = Detector(unet, create_scheduler("v_prediction"), features, settings, (size, size))
        made.calibrate([photo(i, size) for i in range(2)], [photo(i, size) for i in range(2, 6)])
        return made

    def row(what: str, value: int, seconds: float, **more: float) -> dict[str, Any]:
        return {"section": "growth", "against": what, "value": value, "ms": 1000 * seconds, **more}

    for size in (64, 128, 256, 512):
        one = detector(size)
        yield row("pixels of a side", size, best_seconds(lambda d=one, s=size: d.predict(photo(9, s)), 3))
    for calls in (1, 2, 5, 10):
        one = detector(128, 200 // calls)
        yield row("network calls", calls, best_seconds(lambda d=one: d.predict(photo(9, 128)), 3))
    for count in (100, 10_000, 1_000_000):
        scores = np.random.default_rng(SEED).random(count).tolist()
        ranking = Ranking(calibrate((1.0,), scores, 0.05))
        yield row("calibration images, a verdict", count, best_seconds(lambda r=ranking: r.p_value(0.9)))
    one = detector(64, 200)
    with tempfile.TemporaryDirectory() as temporary:
        paths = []
        for index in range(100):
            paths.append(Path(temporary) / f"{index}.png")
            Image.fromarray(photo(index, 64)).save(paths[-1])
        for count in (100, 1_000, 10_000):
            process, peak, started = psutil.Process(), 0, time.perf_counter()
            for number, _ in enumerate(one.stream((paths[i % 100] for i in range(count)), 8, workers=1)):
                if number % 50 == 0:
                    peak = max(peak, process.memory_info().rss)
            yield row("images scored, each", count, (time.perf_counter() - started) / count, memory_mb=peak / 2**20)


def metrics(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Pixel metrics of as many maps as Magnetic Tile Defects has, exact."""
    from scipy import ndimage

    from ddad.metrics import PixelMetrics

    rng = np.random.default_rng(SEED)
    maps, masks = [], []
    for index in range(582):
        mask = np.zeros((256, 256), dtype=bool)
        for _ in range(rng.integers(1, 4) if index >= 190 else 0):
            top, left, height, width = *rng.integers(0, 200, 2), *rng.integers(5, 50, 2)
            mask[top : top + height, left : left + width] = True
        noise = ndimage.gaussian_filter(rng.standard_normal((256, 256), dtype=np.float32), 4)
        maps.append(np.abs(noise) + 0.02 * mask)
        masks.append(mask)
    for name, limit in (("exact", 2**31), ("streaming", 0)):
        started = time.process_time()
        pixels = PixelMetrics(limit)
        for anomaly_map, mask in zip(maps, masks, strict=True):
            pixels.update(anomaly_map, mask)
        found = pixels.compute()
        yield {"section": "metrics", "way": name, "cpu_seconds": time.process_time() - started, **found}


def startup(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """CPU seconds of whole commands, the smallest of several."""
    script = str(Path(sys.executable).with_name("ddad"))
    commands = {
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        "ddad --help": [script, "--help"],
    }
    with tempfile.TemporaryDirectory() as temporary:
        if options.model:
            file = Path(temporary) / "part.png"
            Image.fromarray(photo(0, 256)).save(file)
            for backend in ("torch", "onnxruntime", "openvino"):
                command = [script, "predict", options.model, file, "--out", f"{temporary}/out", "--backend", backend]
                commands[f"ddad predict, one image, {backend}"] = [*map(str, command)]
        for name, command in commands.items():
            found = []
            for _ in range(4):  # the first one fills caches
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
            yield {"section": "startup", "command": name, "cpu_seconds": min(found[1:])}


# -- the page ---------------------------------------------------------------------------------------------------------


def shown(rows: list[dict[str, Any]]) -> str:
    """Markdown tables, one a section."""
    text = []
    for section in SECTIONS:
        chosen = [row for row in rows if row["section"] == section]
        if not chosen:
            continue
        columns = [name for name in dict.fromkeys(key for row in chosen for key in row) if name != "section"]
        text += [f"### {section}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
        text += ["| " + " | ".join(cell(row.get(name)) for name in columns) + " |" for row in chosen]
        text.append("")
    return "\n".join(text)


def cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {100 * share:.0f} %" for name, share in value.items())
    if isinstance(value, list):
        return "-".join(cell(one) for one in value)
    return f"{value:.3g}" if isinstance(value, float) and value < 1000 else "" if value is None else str(value)


def machine() -> str:
    import torch

    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    vectors = torch.backends.cpu.get_cpu_capability()
    return f"{os.cpu_count()} cores of {model} ({vectors}), {torch.get_num_threads()} threads, {gpu}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def several(text: str) -> list[str]:
        return [one for one in text.split(",") if one]

    parser.add_argument("--sections", type=several, default=list(SECTIONS))
    parser.add_argument("--presets", type=several, default=["xs", "s", "base"])
    parser.add_argument("--backends", type=several, default=["torch", "onnxruntime", "openvino"])
    parser.add_argument("--batches", type=lambda text: [int(one) for one in text.split(",")], default=[1, 8, 32])
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-published", dest="published", action="store_false")
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    peak = measured_peak() if {"inference", "training"} & set(options.sections) else {}
    works: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "inference": lambda: inference(options, peak),
        "training": lambda: training(options, peak),
        "growth": lambda: growth(options),
        "metrics": lambda: metrics(options),
        "startup": lambda: startup(options),
    }
    rows = []
    for section in options.sections:
        for row in works[section]():
            rows.append(row)
            print(row, file=sys.stderr)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    facts = {"machine": machine(), "commit": commit.stdout.strip(), "date": f"{datetime.now(UTC):%F}", "peak": peak}
    if options.json:
        options.json.write_text(json.dumps([{**row, **facts} for row in rows], indent=1) + "\n")
    rates = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in peak.items())
    print(f"{facts['machine']}, commit {facts['commit']}, {facts['date']}. Peak measured: {rates}.\n\n{shown(rows)}")


if __name__ == "__main__":
    main()
