"""A model as an MLflow model: log it, register it, serve it with `mlflow models serve`. No pickle.

The flavour is python_function with this module as its loader, and the model folder as its data. Input: a column
`image` of encoded photographs (PNG, JPEG, ...), in base64 where it travels as JSON. Output: one row each, as in
`results.jsonl`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ddad import __version__
from ddad.data.demo import render_part
from ddad.detector import Detector, model_folder, read_record
from ddad.errors import ConfigError, DataError
from ddad.images import encode_png
from ddad.results import to_row

try:
    import mlflow.pyfunc
    import pandas as pd
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, Schema
except ModuleNotFoundError as error:
    if error.name and error.name.startswith("ddad"):
        raise
    raise ConfigError(f"Expected the package {error.name}, found none; pip install 'ddad[track]'.") from None

SIGNATURE = ModelSignature(
    inputs=Schema([ColSpec("binary", "image")]),
    outputs=Schema(
        [
            ColSpec("double", "anomaly_score", required=False),
            ColSpec("double", "p_value", required=False),
            ColSpec("boolean", "is_anomalous", required=False),
            ColSpec("double", "threshold", required=False),
            ColSpec("string", "regions"),
            ColSpec("string", "error", required=False),
        ]
    ),
)
"""`regions` is JSON; a photograph that cannot be read has its reason in `error`, and nothing else."""


def save_model(model: str | Path, path: str | Path, **options: Any) -> None:
    """Write an MLflow model to the folder `path`.

    Args:
        model: a model folder, or `owner/name` on the hub.
        options: of `mlflow.pyfunc.save_model`.

    Raises:
        ModelError: there is no such model.
    """
    mlflow.pyfunc.save_model(path, **_arguments(model), **options)


def log_model(model: str | Path, name: str, **options: Any) -> Any:
    """Log an MLflow model to the active run, or to a new one.

    Args:
        model: as of `save_model`.
        name: of the MLflow model.
        options: of `mlflow.pyfunc.log_model`, such as `registered_model_name`.

    Returns:
        MLflow's `ModelInfo`.
    """
    return mlflow.pyfunc.log_model(name=name, **_arguments(model), **options)


def _arguments(model: str | Path) -> dict[str, Any]:
    folder = model_folder(model)
    height, width = read_record(folder)["shape"]
    # A rendered part: what is logged with a model is for all to see.
    example, _ = render_part(np.random.default_rng(0), size=max(height, width))
    return {
        "loader_module": __name__,
        "data_path": str(folder),
        "signature": SIGNATURE,
        "input_example": pd.DataFrame({"image": [encode_png(example)]}),
        "pip_requirements": [f"ddad=={__version__}"],
    }


class _Model:
    def __init__(self, detector: Detector) -> None:
        self.detector = detector

    def predict(self, model_input: pd.DataFrame) -> pd.DataFrame:
        images = list(model_input["image"])
        for image in images:
            if not isinstance(image, bytes):  # a path, which MLflow would let through, is not for clients to choose
                raise DataError(
                    f"Expected encoded photographs (bytes) in the column image, found {type(image).__name__}."
                )
        rows = [to_row("", result) for _, result in self.detector.stream(images)]
        columns = SIGNATURE.outputs.input_names()
        # As objects: a number that is not there stays None, and JSON has no NaN.
        table = pd.DataFrame({name: [row[name] for row in rows] for name in columns}, dtype=object)
        return table.assign(regions=[json.dumps(row["regions"]) for row in rows])


def _load_pyfunc(path: str) -> _Model:
    """Called by MLflow, with where the model folder lies."""
    return _Model(Detector.from_pretrained(path))
