"""Inspect with an exported model: NumPy, Pillow and ONNX Runtime (or OpenVINO) are all it takes.

    pip install numpy pillow onnxruntime
    pip install --no-deps ddad
    ddad-runtime EXPORT IMAGES... --out DIR

`ddad export` writes the folder EXPORT. What is read, computed, printed and written is what `ddad predict` does.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddad.errors import ConfigError, DDADError, ModelError
from ddad.files import sha256
from ddad.images import ImageRule, named_images
from ddad.prediction import Inspector, Photo, Prediction, regions
from ddad.results import print_results, write_results

RECORD = "export.json"
FORMAT_VERSION = 1
INPUT = "image"
ENGINES = {"onnx": "onnxruntime", "openvino": "openvino"}
"""The package that runs each format."""


class Outputs(NamedTuple):
    """What the graph says of B photographs; H x W is the model's shape."""

    anomaly_score: np.ndarray
    """(B,) float32."""
    p_value: np.ndarray
    """(B,) float64."""
    is_anomalous: np.ndarray
    """(B,) bool."""
    anomaly_map: np.ndarray
    """(B, H, W) float32, ≥ 0."""
    reconstruction: np.ndarray
    """(B, H, W, 3) uint8."""


OUTPUTS = Outputs._fields


class Runtime(Inspector):
    """An exported detector; predictions are those of the `Detector` it was made from, as `export.json` measured."""

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        """
        Args:
            folder: what `ddad export` wrote.
            threads: of the graph; by default as many as the engine likes.

        Raises:
            ModelError: the folder is missing, damaged or of a newer format.
            ConfigError: the package that runs it is not installed.
        """
        folder = Path(folder)
        self.record = read_export(folder)
        engine = ENGINES[self.record["format"]]
        if find_spec(engine) is None:
            raise ConfigError(
                f"Expected the package {engine} to run {folder}, found none; pip install {engine}, or export again in "
                "another --format."
            )
        self.shape: tuple[int, int] = tuple(self.record["shape"])
        self.image_rule = ImageRule(**self.record["image_rule"])
        self.threshold: float = self.record["threshold"]
        self._run = load_graph(folder / self.record["graph"], engine, self.record["precision"], threads)

    @property
    def is_calibrated(self) -> bool:
        """Always: only calibrated models are exported."""
        return True

    def infer(self, images: np.ndarray) -> Outputs:
        """What the graph says of photographs uint8 (B, H, W, 3) of any one size, RGB and upright."""
        return Outputs(*self._run(np.ascontiguousarray(images)))

    def predict_photos(self, batch: Sequence[Photo]) -> list[Prediction]:
        """Inspect photographs that are read already, all in one batch."""
        if not batch:
            return []
        outputs = self.infer(np.stack([photo.image for photo in batch]))
        return [
            Prediction(
                path=photo.path,
                anomaly_score=float(score),
                p_value=float(p_value),
                is_anomalous=bool(is_anomalous),
                threshold=self.threshold,
                anomaly_map=anomaly_map,
                reconstruction=reconstruction,
                image=photo.image,
                regions=regions(anomaly_map, self.threshold, photo.size),
            )
            for photo, score, p_value, is_anomalous, anomaly_map, reconstruction in zip(batch, *outputs, strict=True)
        ]


def read_export(folder: Path) -> dict[str, Any]:
    """The contents of `export.json`, once the files are found to be those it records.

    Raises:
        ModelError: the folder is missing, damaged or of a newer format.
    """
    path = folder / RECORD
    if not path.is_file():
        raise ModelError(
            f"Expected an exported model with an {RECORD}, found none at {folder}; name the folder that `ddad export` "
            "wrote."
        )
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found, files = record["format_version"], dict(record["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ModelError(f"Expected a complete {path}, found a damaged one; copy or export the model again.") from None
    if found != FORMAT_VERSION:
        raise ModelError(f"Expected export format {FORMAT_VERSION} in {path}, found {found}; update ddad.")
    for name, digest in files.items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise ModelError(f"Expected the file {name} that {path} records, found another or none; copy it again.")
    return record


def load_graph(path: Path, engine: str, precision: str, threads: int | None) -> Callable[..., Sequence[np.ndarray]]:
    """A graph on the CPU, as a function of its inputs, in their order.

    Args:
        engine: `onnxruntime` or `openvino`.
        precision: that OpenVINO computes in: bf16, or else fp32.
        threads: by default as many as the engine likes.
    """
    if engine == "onnxruntime":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [given.name for given in session.get_inputs()]
        return lambda *batch: session.run(None, dict(zip(names, batch, strict=True)))
    hints: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
    }
    if threads:
        hints["INFERENCE_NUM_THREADS"] = threads
    model = openvino_core().compile_model(path, "CPU", hints)
    # The answer's memory is used again by the next call.
    return lambda *batch: [np.array(output) for output in model(list(batch)).values()]


@cache
def openvino_core() -> Any:
    """One a process, kept: each sets a stack for signals and frees it with itself, and the next signal then crashes."""
    import openvino

    return openvino.Core()


def main() -> None:
    """Entry point of `ddad-runtime`: users' mistakes end in one line and exit code 1."""
    parser = argparse.ArgumentParser(
        prog="ddad-runtime", description="Inspect photographs with an exported model, without PyTorch."
    )
    parser.add_argument("export", type=Path, metavar="EXPORT", help="the folder that `ddad export` wrote")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGES", help="image files, or folders of them")
    parser.add_argument("--out", type=Path, required=True, help="the folder for results.jsonl and the pictures")
    parser.add_argument("--batch-size", type=_positive, default=4, help="images inspected together (default 4)")
    parser.add_argument("--workers", type=_positive, default=2, help="threads that decode images (default 2)")
    parser.add_argument("--threads", type=_positive, help="threads of the networks (default: the engine's choice)")
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    given = parser.parse_args()
    try:
        paths = named_images(given.images)
        runtime = Runtime(given.export, given.threads)
        rows = write_results(runtime, paths, given.out, batch_size=given.batch_size, workers=given.workers)
        print_results(rows, given.out, given.json)
    except DDADError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(130)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    main()
