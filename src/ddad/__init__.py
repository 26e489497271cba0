"""ddad: denoising diffusion anomaly detection.

Learns from photographs of good parts only, rebuilds each new photograph as it would look without a defect, and shows
the difference. The method is DDAD (Mousakhan, Brox, Tayyub, arXiv 2305.15956).

    from ddad import Detector
    detector = Detector.from_pretrained("models/tile")
    result = detector.predict("part.png")

Where to read: the method is `unet`, `sampling`, `features`, `anomaly_map`, `calibration`, `detector`, in this order;
`tiling` cuts large photographs and `backends` makes it fast; `training`, `adaptation`, `tuning`, `distillation` and
`fit` make the weights, in several processes where `distributed` says so, and `tracking` follows them; `baseline`,
`evaluation`, `report`, `ablation` and `benchmark` judge them; `conformal` makes the promise, `drift` watches it.
`family` is one network for many categories, which `fit_family` trains. `export` writes a graph, which `runtime` uses
without torch; `hub` and `card` publish a model; `integrations` are for anomalib, MLflow and the authors' checkpoints;
`server` is the inspection station, `bulk` scores archives, on a `cluster` too, and `cli` is the command line. A module
imports only modules above it. Names below are loaded when first used, so that `import ddad` does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddad.calibration import Calibration
    from ddad.config import Settings, make_settings
    from ddad.detector import Detector
    from ddad.errors import ConfigError, DataError, DDADError, ModelError
    from ddad.evaluation import Evaluation, evaluate
    from ddad.family import Family
    from ddad.fit import fit
    from ddad.prediction import Prediction
    from ddad.report import write_report

__version__ = "0.1.0"

_HOME = {
    "Calibration": "calibration",
    "ConfigError": "errors",
    "DDADError": "errors",
    "DataError": "errors",
    "Detector": "detector",
    "Evaluation": "evaluation",
    "Family": "family",
    "ModelError": "errors",
    "Prediction": "prediction",
    "Settings": "config",
    "evaluate": "evaluation",
    "fit": "fit",
    "make_settings": "config",
    "write_report": "report",
}

__all__ = [
    "Calibration",
    "ConfigError",
    "DDADError",
    "DataError",
    "Detector",
    "Evaluation",
    "Family",
    "ModelError",
    "Prediction",
    "Settings",
    "evaluate",
    "fit",
    "make_settings",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"ddad.{_HOME[name]}"), name)
    raise AttributeError(f"module 'ddad' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
