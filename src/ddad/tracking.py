"""Follow a training in TensorBoard, MLflow, or any other tracker that Accelerate knows and that is installed."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import MLflowTracker, TensorBoardTracker, get_available_trackers
from accelerate.utils import LoggerType

from ddad.errors import ConfigError
from ddad.files import write_json
from ddad.training import Progress

POINTS = 1000
"""Steps that are logged, about: enough for a curve, and no delay where a step takes milliseconds."""
PROJECT = "ddad"
"""Experiment (MLflow) or project that runs appear under."""
_URI = "MLFLOW_TRACKING_URI"

Log = Callable[[dict[str, float], int], None]
"""Numbers by name, and the step they belong to."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError where Accelerate knows no tracker of a name, or it is not installed."""
    known = [str(one) for one in LoggerType if one != LoggerType.ALL]
    for name in names:
        if name not in known:
            raise ConfigError(f"Expected trackers among {', '.join(known)}, found {name!r}.")
        if name not in map(str, get_available_trackers()):
            package = "'ddad[track]'" if name in ("tensorboard", "mlflow") else name.replace("_", "-")
            raise ConfigError(f"Expected the package of the tracker {name}, found none; pip install {package}.")


@contextmanager
def trackers(
    names: Sequence[str],
    folder: Path,
    model: str,
    *,
    done: int,
    settings: dict[str, Any],
    state: Path,
    device: torch.device,
) -> Iterator[Log]:
    """Trackers for the length of the block; yields what logs to all of them.

    Args:
        names: as of Accelerate; none log nothing.
        folder: of TensorBoard's events, and of MLflow's database where MLFLOW_TRACKING_URI names no other.
        model: the name of the run.
        done: steps done by an earlier sitting, whose run goes on in TensorBoard and MLflow without repeating them.
        settings: nested; logged as hyper-parameters.
        state: a JSON file that keeps the identity of the run from one sitting to the next.
        device: of the training.
    """
    if not names:
        yield lambda numbers, step: None
        return
    folder = folder.absolute()
    with _mlflow_uri(folder) as (uri, own):
        known = json.loads(state.read_text(encoding="utf-8")) if state.exists() else {}
        made: list[Any] = []
        for name in names:
            if name == "tensorboard":
                made.append(TensorBoardTracker(model, folder, purge_step=done + 1))
            elif name == "mlflow":
                run = known.get("run") if known.get("uri") == uri else None
                artifacts = (folder / "artifacts").as_uri() if own else None
                made.append(MLflowTracker(PROJECT, run_name=model, run_id=run, logging_dir=artifacts))
            else:
                made.append(name)
        accelerator = Accelerator(cpu=device.type == "cpu", log_with=made, project_dir=folder)
        folder.mkdir(parents=True, exist_ok=True)
        accelerator.init_trackers(PROJECT, config=None if done else dict(_flat(settings)))
        try:
            for one in accelerator.trackers:
                if one.name == "mlflow":
                    write_json(state, {"uri": uri, "run": one.tracker.info.run_id})
            yield lambda numbers, step: accelerator.log(numbers, step=step)
        finally:
            accelerator.end_training()


def log_progress(log: Log, event: Progress, batch_size: int) -> None:
    """Log a step of the training loop, or leave it out between two points of the curve."""
    last = event.step == event.steps
    if event.step % max(1, event.steps // POINTS) and event.held_out_loss is None and not last:
        return
    numbers = {
        "loss": event.loss,
        "learning_rate": event.learning_rate,
        "images_per_second": event.step * batch_size / event.seconds,
    }
    if event.held_out_loss is not None:
        numbers["held_out_loss"] = event.held_out_loss
    log(numbers, event.step)


@contextmanager
def _mlflow_uri(folder: Path) -> Iterator[tuple[str, bool]]:
    """Where MLflow writes, and whether that is ours: a database in `folder` unless the user has named a place."""
    if uri := os.environ.get(_URI):  # mlflow.set_tracking_uri sets it, too
        yield uri, False
        return
    os.environ[_URI] = uri = f"sqlite:///{folder / 'mlflow.db'}"
    try:
        yield uri, True
    finally:
        del os.environ[_URI]


def _flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as `group.name` and what every tracker takes: numbers and text."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, bool | int | float | str) else str(value)
