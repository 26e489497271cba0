"""Turn a model into a graph that runs without PyTorch, and prove that it says the same.

The graph takes photographs of any size as bytes and gives score, p-value, verdict, map and reconstruction: resizing,
the network calls of every step, comparison, units, calibration and threshold are inside, so that whoever calls it from
C# or C++ cannot get them wrong. It is then asked about photographs at their own size, and compared with the model: one
verdict that differs, or one score by more than a stated tolerance, and nothing is written.
"""

import csv
import io
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ddad import __version__
from ddad.anomaly_map import image_score, pixel_distance
from ddad.backends import export_network, find_graphs, make_graphs
from ddad.data.folder import scan
from ddad.data.samples import paths_by_hash, spread
from ddad.detector import RECORD as DETECTOR
from ddad.detector import STUDENT, Detector, package_versions
from ddad.errors import ConfigError, ModelError
from ddad.files import atomic_folder, check_place, sha256, write_json, write_text
from ddad.images import read_image, resize
from ddad.runtime import FORMAT_VERSION, INPUT, OUTPUTS, RECORD, Runtime, openvino_core
from ddad.sampling import to_pixels
from ddad.streaming import chunks

Format = Literal["onnx", "openvino"]
ExportPrecision = Literal["fp32", "fp16", "bf16", "int8"]
PRECISIONS: dict[Format, tuple[ExportPrecision, ...]] = {
    "onnx": ("fp32", "fp16", "int8"),
    "openvino": ("fp32", "fp16", "bf16", "int8"),
}
TOLERANCES: dict[ExportPrecision, float] = {"fp32": 0.001, "fp16": 0.02, "bf16": 0.1, "int8": 0.1}
"""How far a score may move; 1 is what a good part typically reaches."""
COMPARED = 64
"""Photographs that the graph is compared on, of the calibration and of the test images each."""
OWN_PAIRS = 16
QUANTISING = 32
"""Photographs whose activations give the ranges of int8."""
GRAPHS = {"onnx": "detector.onnx", "openvino": "detector.xml"}
COMPARISON = "comparison.csv"


@dataclass(frozen=True)
class Compared:
    """One photograph, as the model and as the graph judge it."""

    path: str
    height: int
    width: int
    anomaly_score: float
    exported_score: float
    is_anomalous: bool
    exported_is_anomalous: bool

    @property
    def difference(self) -> float:
        """Infinite where a score is no number, so that it is never the smaller one."""
        difference = abs(self.exported_score - self.anomaly_score)
        return difference if math.isfinite(difference) else math.inf


class ExportDiffers(ModelError):
    """The graph does not say what the model says; `comparison` has the figures."""

    def __init__(self, sentence: str, comparison: dict[str, Any]) -> None:
        super().__init__(sentence)
        self.comparison = comparison


class Exported(NamedTuple):
    """How the graph compares with the model, and the contents of its `export.json`."""

    compared: tuple[Compared, ...]
    record: dict[str, Any]

    @property
    def said(self) -> str:
        """The comparison in a sentence."""
        return _said(self.record["comparison"])


def export(
    model: str | Path,
    out: str | Path,
    *,
    format: Format = "onnx",
    precision: ExportPrecision = "fp32",
    data: str | Path | None = None,
    tolerance: float | None = None,
    fast: bool = False,
    on_stage: Callable[[str], Any] = lambda sentence: None,
) -> Exported:
    """Write a model as one graph, with its two networks beside it; replaces an older export of this name.

    Args:
        model: a model folder, calibrated, whose reconstructions are deterministic.
        out: where to.
        format: `onnx` or `openvino`.
        precision: one of `PRECISIONS[format]`. fp16 is of the weights in OpenVINO, and of the networks in ONNX; bf16 is
            what OpenVINO computes in; int8 takes its ranges from photographs.
        data: photographs to compare on, as for `ddad train`: those of calibration where they are in it, and test images
            of any kind. By default images that the model makes itself.
        tolerance: how far a score may move; by default `TOLERANCES[precision]`.
        fast: the model's one-call student.

    Raises:
        ModelError: no usable model, or one that is not calibrated.
        ExportDiffers: a verdict of the graph differs, or a score by more than the tolerance. Nothing is written then.
        ConfigError: an option that is none, a model with random reconstructions, or `out` holds something else.
        DataError: no photographs in `data`.
    """
    model, out = Path(model), Path(out)
    if precision not in PRECISIONS.get(format, ()):
        known = "; ".join(f"{name} with {', '.join(precisions)}" for name, precisions in PRECISIONS.items())
        raise ConfigError(f"Expected a format and precision among {known}, found {format} with {precision}.")
    check_place(out, RECORD, "export")
    reference = Detector.from_pretrained(model, "cpu", fast=fast)
    traced = Detector.from_pretrained(model, "cpu", fast=fast, backend="torch", precision="fp32")
    source = model / STUDENT if fast else model
    _check_model(traced, model)
    tolerance = TOLERANCES[precision] if tolerance is None else tolerance
    photographs = _photographs(traced, data)

    with atomic_folder(out) as temporary:
        on_stage("Tracing the model, which takes about a minute.")
        _write_networks(temporary / "networks", source, traced, format)
        graph = temporary / GRAPHS["onnx"]
        if (format, precision) == ("onnx", "fp16"):
            _halve(traced)
        _write_graph(traced, graph)
        if precision == "int8":
            on_stage(f"Finding the ranges of int8 on {len(photographs.others)} photographs.")
        _convert(graph, format, precision, photographs.others)
        record = _record(traced, source, format, precision)
        record["files"] = {
            file.relative_to(temporary).as_posix(): sha256(file)
            for file in sorted(temporary.rglob("*"))
            if file.is_file()
        }
        write_json(temporary / RECORD, record)

        on_stage(f"Comparing on {len(photographs.compared)} {photographs.what}.")
        compared, milliseconds = _compare(reference, Runtime(temporary), photographs.compared)
        worst = max(compared, key=lambda one: one.difference)
        record["comparison"] = {
            "images": len(compared),
            "of": photographs.what,
            "tolerance": tolerance,
            "largest_difference": worst.difference,
            "largest_difference_at": worst.path,
            # The calibration photograph whose score is the threshold is on the edge, and any rounding decides.
            "verdicts_flipped": sum(
                one.is_anomalous != one.exported_is_anomalous
                and not math.isclose(one.anomaly_score, record["threshold"], rel_tol=1e-5)
                for one in compared
            ),
            "milliseconds": milliseconds,
            "bytes": sum(file.stat().st_size for file in temporary.glob("detector.*")),
        }
        _refuse_unless_same(record["comparison"], precision)
        write_json(temporary / RECORD, record)
        write_text(temporary / COMPARISON, _table(compared))
        write_text(temporary / "README.md", _readme(record))
    return Exported(compared, record)


# -- the graph ---------------------------------------------------------------------------------------------------------


class Inspection(nn.Module):
    """Photographs in, what `Detector.predict` says of them out; the detector's own functions, traced."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        assert detector.calibration is not None
        self.unet, self.features = detector.unet, detector.features  # so that their weights are the graph's
        self._detector = detector
        assert detector.calibration.threshold is not None
        self._threshold = detector.calibration.threshold
        self._scores = torch.tensor(detector.calibration.scores, dtype=torch.float64)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """`OUTPUTS` for uint8 (B, H, W, 3) of any one size."""
        detector = self._detector
        tiling = detector.tiling
        target = resized(image, detector.shape) / 127.5 - 1
        tiles = tiling.cut(target)
        rebuilt = detector.rebuild(tiles, conditioning_weight=detector.settings.sampling.conditioning_weight)
        reconstruction = tiling.blend(rebuilt)
        if tiling.number > 1:
            rebuilt = tiling.cut(reconstruction)
        of_features = tiling.blend(detector.feature_distances(tiles, rebuilt))
        distances = torch.cat([pixel_distance(target, reconstruction)[:, None], of_features], dim=1)
        maps = detector.fuse(detector.smooth(distances))
        score = image_score(maps)
        # conformal.p_value
        at_least = (self._scores >= score.double()[:, None]).sum(dim=1)
        p_value = (1 + at_least).double() / (len(self._scores) + 1)
        return score, p_value, score.double() > self._threshold, maps, to_pixels(reconstruction)


def resized(images: Tensor, shape: tuple[int, int]) -> Tensor:
    """`ddad.images.resize` to the pixel: uint8 (B, H, W, 3) to whole numbers 0 ... 255 in float32 (B, 3, h, w).

    Pillow resizes with weights in units of 2⁻²², and rounds after each direction. Products of pixels with such weights
    would be inexact in float32, so a weight goes as 2048 · high + low, both below 2¹¹.
    """
    values = images.permute(0, 3, 1, 2).float()
    high, low = _weights(images.shape[2], shape[1])
    values = _rounded(values @ high.T, values @ low.T)
    high, low = _weights(images.shape[1], shape[0])
    return _rounded(high @ values, low @ values)


def _weights(given: int, wanted: int) -> tuple[Tensor, Tensor]:
    """Weights (wanted, given) of a triangle filter as wide as a pixel of the smaller side, high and low part."""
    # In units of 1 / (2 · wanted) pixels, so that everything is a whole number until it is divided by the row's total.
    places = (2 * torch.arange(given) + 1) * wanted
    centres = (2 * torch.arange(wanted)[:, None] + 1) * given
    reach: Any = 2 * torch.sym_max(given, wanted)
    weights: Tensor = (reach - (places - centres).abs()).clamp(min=0)
    total = weights.sum(dim=1, keepdim=True)
    high = torch.div(weights * 2048, total, rounding_mode="trunc")
    low = ((weights * 2048 - high * total).float() / total.float() * 2048 + 0.5).floor()
    return high.float(), low


def _rounded(high: Tensor, low: Tensor) -> Tensor:
    """(2048 · high + low) / 2²², rounded half up; every intermediate is exact in float32."""
    return ((high + 1024 + (low / 2048).floor()) / 2048).floor().clamp(0, 255)


def _halve(detector: Detector) -> None:
    """Both networks in fp16, and nothing else: resizing and comparing would overflow."""
    detector.unet.half()
    detector.features.half()
    denoise, features = detector._networks.denoise, detector._networks.features
    detector._networks = detector._networks._replace(
        denoise=lambda sample, timesteps: denoise(sample.half(), timesteps).float(),
        features=lambda images: [layer.float() for layer in features(images.half())],
    )


def _write_graph(detector: Detector, path: Path) -> None:
    import onnxscript

    op: Any = onnxscript.opset20

    def median(values: Any, dim: int, keepdim: bool = False) -> Any:  # of an even number the lower one, as torch has it
        middle = (values.shape[dim] + 1) // 2
        smallest, places = op.TopK(values, op.Constant(value_ints=[middle]), axis=dim, largest=0, sorted=1)
        last = op.Constant(value_int=middle - 1)
        return op.Gather(smallest, last, axis=dim), op.Gather(places, last, axis=dim)

    export_network(
        Inspection(detector),
        (torch.zeros(2, detector.shape[0] + 7, detector.shape[1] + 5, 3, dtype=torch.uint8),),
        path,
        sizes={0: "batch", 1: "height", 2: "width"},
        input_names=[INPUT],
        output_names=list(OUTPUTS),
        custom_translation_table={torch.ops.aten.median.dim: median},  # PyTorch's exporter has none
    )


# -- formats and precisions --------------------------------------------------------------------------------------------


def _convert(graph: Path, format: Format, precision: ExportPrecision, images: Sequence[np.ndarray]) -> None:
    """Turn the ONNX graph in fp32 into what was asked for, in its place or, for OpenVINO, beside and instead of it."""
    if format == "openvino":
        import openvino

        network = openvino_core().read_model(graph)  # openvino.convert_model would report to a server
        if precision == "int8":
            network = _openvino_int8(network, images)
        openvino.save_model(network, graph.with_suffix(".xml"), compress_to_fp16=precision == "fp16")
        del network  # it reads the file
        graph.unlink()
    elif precision == "int8":
        _onnx_int8(graph, images)


def _inside_networks(node: Any) -> bool:
    """Whether an ONNX node belongs to the U-Net or the features: only these are computed less precisely."""
    scopes = next((one.value for one in node.metadata_props if one.key == "pkg.torch.onnx.name_scopes"), "")
    return "'unet" in scopes or "'features" in scopes


def _onnx_int8(graph: Path, images: Sequence[np.ndarray]) -> None:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._images = iter(images)

        def get_next(self) -> dict[str, np.ndarray] | None:
            image = next(self._images, None)
            return None if image is None else {INPUT: image[None]}

    nodes = [
        node.name
        for node in onnx.load(graph, load_external_data=False).graph.node
        if node.op_type in ("Conv", "MatMul", "Gemm") and _inside_networks(node)
    ]
    quantize_static(
        graph,
        graph,
        Reader(),
        quant_format=QuantFormat.QDQ,
        nodes_to_quantize=nodes,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


def _openvino_int8(network: Any, images: Sequence[np.ndarray]) -> Any:
    os.environ.setdefault("NNCF_CI", "1")  # or it reports to a server
    import nncf

    data = nncf.Dataset(list(images), lambda image: {INPUT: image[None]})
    return nncf.quantize(network, data, subset_size=len(images), preset=nncf.QuantizationPreset.MIXED)


def _write_networks(folder: Path, model: Path, detector: Detector, format: Format) -> None:
    """The two networks and the noise schedule, for whoever runs the steps in a program of their own; in fp32."""
    tile = detector.tiling.tile
    _, _, alphas_cumprod, prediction_type = detector._networks
    graphs = find_graphs(model, tile) or make_graphs(
        model, tile, detector.unet, detector.features, alphas_cumprod, prediction_type
    )
    folder.mkdir()
    for name in ("unet", "features"):
        source = graphs.folder / f"{name}.onnx"
        if format == "onnx":
            shutil.copyfile(source, folder / source.name)
        else:
            import openvino

            openvino.save_model(openvino_core().read_model(source), folder / f"{name}.xml", compress_to_fp16=False)
    sampling = detector.settings.sampling
    write_json(
        folder / "schedule.json",
        {
            "prediction_type": prediction_type,
            "start_timestep": sampling.start_timestep,
            "timesteps": list(sampling.timesteps),
            "alphas_cumprod": alphas_cumprod.tolist(),
        },
    )


# -- the comparison ----------------------------------------------------------------------------------------------------


class _Photographs(NamedTuple):
    compared: Sequence[tuple[str, np.ndarray]]
    """Name and uint8 (H, W, 3) of each."""
    others: Sequence[np.ndarray]
    """For the ranges of int8."""
    what: str


def _photographs(detector: Detector, data: str | Path | None) -> _Photographs:
    if data is None:
        own = own_images(detector, OWN_PAIRS)
        named = [(f"image {number}", image) for number, image in enumerate(own[: len(own) // 2], start=1)]
        return _Photographs(named, own[len(own) // 2 :], "images that the model made")
    dataset = scan(data)
    good = paths_by_hash(sample.path for sample in dataset.train)
    known = detector.record.get("data", {})

    def part(name: str) -> list[Path]:
        used = set(known.get(name, ()))
        return [path for digest, path in good.items() if digest in used] or list(good.values())

    tested = [sample.path for sample in dataset.test]
    chosen = [*spread(part("calibration"), COMPARED), *spread(tested, COMPARED)]

    def read(paths: Iterable[Path]) -> Iterator[np.ndarray]:
        return (read_image(path, rule=detector.image_rule) for path in paths)

    named = [
        (path.relative_to(dataset.root).as_posix(), image) for path, image in zip(chosen, read(chosen), strict=True)
    ]
    return _Photographs(named, list(read(spread(part("train"), QUANTISING))), "photographs")


def own_images(detector: Detector, pairs: int, seed: int = 0) -> list[np.ndarray]:
    """Images like those of calibration, for a model whose photographs are elsewhere: uint8, of many sizes, in pairs.

    The model is given soft noise as bright as its good parts. One image of a pair it may rebuild three times, which
    leaves what it takes for a good part; the other stays anomalous.
    """
    rng = np.random.default_rng(seed)
    known = detector.calibration.photographs if detector.calibration else ()
    height, width = detector.shape

    def noise(brightness: float) -> np.ndarray:
        soft = resize(rng.normal(brightness, 40, (height // 8, width // 8, 3)).astype(np.float32), (height, width))
        return np.clip(soft + rng.normal(0, 5, soft.shape), 0, 255).astype(np.uint8)

    images = [noise(known[number % len(known)].brightness if known else 128.0) for number in range(2 * pairs)]
    rebuilt = images[:pairs]
    for _ in range(3):
        rebuilt = [image for part in chunks(rebuilt, 4) for image in to_pixels(detector.reconstruct(part)).numpy()]
    mixed = [image for pair in zip(rebuilt, images[pairs:], strict=True) for image in pair]
    sizes = np.rint(rng.uniform(0.8, 3, (2 * pairs, 2)) * detector.shape).astype(int)
    return [resize(image, (size[0], size[1])) for image, size in zip(mixed, sizes.tolist(), strict=True)]


def _compare(
    reference: Detector, runtime: Runtime, photographs: Sequence[tuple[str, np.ndarray]]
) -> tuple[tuple[Compared, ...], float]:
    """Each photograph by both, the graph at the photograph's own size; and the graph's median milliseconds."""
    compared, seconds = [], []
    for name, image in photographs:
        expected = reference.predict(image)
        started = time.perf_counter()
        found = runtime.infer(image[None])
        seconds.append(time.perf_counter() - started)
        compared.append(
            Compared(
                name,
                image.shape[0],
                image.shape[1],
                expected.anomaly_score,
                float(found.anomaly_score[0]),
                bool(expected.is_anomalous),
                bool(found.is_anomalous[0]),
            )
        )
    return tuple(compared), 1000 * statistics.median(seconds)


def _refuse_unless_same(comparison: dict[str, Any], precision: ExportPrecision) -> None:
    # A score that is not a number is no difference within the tolerance.
    if not comparison["verdicts_flipped"] and comparison["largest_difference"] <= comparison["tolerance"]:
        return
    advice = {
        "fp32": "report it, since the same mathematics should give the same scores",
        "bf16": "use --precision fp32, or calibrate for it: ddad recalibrate MODEL GOOD_FOLDER --backend openvino "
        "--precision bf16",
    }.get(precision, "use --precision fp32")
    raise ExportDiffers(
        f"Expected the model's verdicts from its export and scores within {comparison['tolerance']:g}, found "
        f"{comparison['verdicts_flipped']} of {comparison['images']} verdicts flipped and a score that differs by "
        f"{comparison['largest_difference']:.3g} ({comparison['largest_difference_at']}); nothing is written; "
        f"{advice}.",
        comparison,
    )


def _said(comparison: dict[str, Any]) -> str:
    return (
        f"{comparison['images']} {comparison['of']}: no verdict differs from the model's, scores by at most "
        f"{comparison['largest_difference']:.2g} (tolerance {comparison['tolerance']:g})."
    )


def _table(compared: Iterable[Compared]) -> str:
    text = io.StringIO()
    rows = [asdict(one) for one in compared]
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# -- the folder --------------------------------------------------------------------------------------------------------


def _check_model(detector: Detector, model: Path) -> None:
    sampling = detector.settings.sampling
    if detector.calibration is None or detector.calibration.threshold is None:
        raise ModelError(
            f"Expected a calibrated model, since the graph holds the threshold, found none in {model}; run ddad "
            "recalibrate first."
        )
    if sampling.eta > 0 or sampling.start_noise == "seeded":
        raise ConfigError(
            f"Expected a model whose reconstructions are deterministic, found {model} with noise seeded by each image "
            f"(preset {detector.settings.preset}); export one of preset xs, s or base."
        )


def _record(detector: Detector, model: Path, format: Format, precision: ExportPrecision) -> dict[str, Any]:
    calibration = detector.calibration
    assert calibration is not None
    return {
        "format_version": FORMAT_VERSION,
        "format": format,
        "precision": precision,
        "graph": GRAPHS[format],
        "shape": detector.shape,
        "image_rule": asdict(detector.image_rule),
        "threshold": calibration.threshold,
        "promise": calibration.promise(),
        "category": detector.record.get("category"),
        "preset": detector.settings.preset,
        "model": sha256(model / DETECTOR),
        "versions": package_versions(),
    }


def _readme(record: dict[str, Any]) -> str:
    height, width = record["shape"]
    comparison = record["comparison"]
    return f"""# Exported anomaly detector for {record["category"] or "a product that was not named"}

`{record["graph"]}` is the whole of it: {record["format"]} in {record["precision"]}, made by ddad {__version__}.
{_said(comparison)} Each is in `{COMPARISON}`. {record["promise"]}

| input | type | shape |
|---|---|---|
| `{INPUT}` | uint8 | (photographs, height, width, 3): RGB, upright, of any one size; 8 bit |

| output | type | shape | |
|---|---|---|---|
| `anomaly_score` | float32 | (photographs) | 1 is what a good part typically reaches |
| `p_value` | float64 | (photographs) | share of good parts that look at least this anomalous |
| `is_anomalous` | bool | (photographs) | the score is above the threshold, {record["threshold"]:.6g} |
| `anomaly_map` | float32 | (photographs, {height}, {width}) | its largest value is the score |
| `reconstruction` | uint8 | (photographs, {height}, {width}, 3) | the part without its defect |

Give photographs as the camera made them: resizing to {height} x {width} is inside, and exact. Photographs of 16 bit
become 8 bit as value x 255 / {record["image_rule"]["white"]}, rounded, after they were resized: `ddad-runtime` does so.

    pip install numpy pillow {"onnxruntime" if record["format"] == "onnx" else "openvino"}
    pip install --no-deps ddad
    ddad-runtime THIS_FOLDER IMAGES... --out DIR

`networks/` holds the U-Net (`sample` (B, 3, h, w) and `timesteps` (B,) to its raw output), the feature network and the
noise schedule, for a program that runs the steps itself.
"""
