"""Write predictions where people and programs find them: `results.jsonl` and pictures."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ddad.errors import DataError
from ddad.images import heatmap, overlay, read_image, reduced_size, resize, write_png
from ddad.prediction import Inspector, Prediction, photo_statistics
from ddad.streaming import in_threads

PICTURES = ("heatmap", "overlay", "reconstruction")
MAX_PICTURE_SIDE = 1024
"""Pixels of the longer side; larger photographs are drawn reduced."""


def write_results(
    detector: Inspector, images: Iterable[Path], out: Path, *, batch_size: int = 4, workers: int = 1
) -> Iterator[dict[str, Any]]:
    """Inspect photographs; write `results.jsonl` under `out`, and a heatmap, an overlay and the reconstruction each.

    A generator of the rows as they are written. A file that cannot be read becomes a row with its reason in `error`;
    `files` are relative to `out`. All pictures have the photograph's shape, and all heatmaps one scale of colours,
    taken from good parts.

    Raises:
        DataError: nothing can be written to `out`.
    """
    names = _Names()
    try:
        out.mkdir(parents=True, exist_ok=True)
        for kind in PICTURES:
            (out / f"{kind}s").mkdir(exist_ok=True)
        results = (out / "results.jsonl").open("w", encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"Expected a folder to write to, found {out} ({error.strerror}); choose another --out."
        ) from None

    def inspected() -> Iterator[tuple[Path, Prediction | DataError, str]]:
        for path, result in detector.stream(images, batch_size, workers):
            assert isinstance(path, Path)
            yield path, result, names.unique(path) if isinstance(result, Prediction) else ""

    def written(item: tuple[Path, Prediction | DataError, str]) -> dict[str, Any]:
        path, result, name = item
        row = to_row(path, result)
        if isinstance(result, Prediction):
            try:
                row["files"] = _write_pictures(detector, path, result, out, name)
            except DataError as error:  # gone, or replaced, since it was inspected
                row = to_row(path, error)
        return row

    with results:
        # Threads draw and encode while the network works on the next batch.
        for _, row in in_threads(written, inspected(), workers, ahead=2 * batch_size):
            results.write(json.dumps(row, ensure_ascii=False) + "\n")
            results.flush()
            yield row


def to_row(path: Path | str, result: Prediction | DataError) -> dict[str, Any]:
    """One line of `results.jsonl`."""
    ok = result if isinstance(result, Prediction) else None
    return {
        **({"category": ok.category} if ok and ok.category is not None else {}),
        "path": str(path),
        "anomaly_score": ok and ok.anomaly_score,
        "p_value": ok and ok.p_value,
        "is_anomalous": ok and ok.is_anomalous,
        "threshold": ok and ok.threshold,
        "photo": photo_statistics(ok.image)._asdict() if ok else None,
        "regions": [asdict(region) for region in ok.regions] if ok else [],
        "files": {},
        "error": None if ok else str(result),
    }


def sentence(row: dict[str, Any]) -> str:
    """One line of `results.jsonl` for people."""
    if row["error"]:
        return f"{row['path']}: not inspected. {row['error']}"
    verdict = {True: "anomalous", False: "good", None: "no verdict"}[row["is_anomalous"]]
    p_value = "" if row["p_value"] is None else f", p = {row['p_value']:.3g}"
    judged_as = f" as {row['category']}" if row.get("category") else ""
    return f"{row['path']}: {verdict}{judged_as} (score {row['anomaly_score']:.3f}{p_value})"


def print_results(rows: Iterable[dict[str, Any]], out: Path, as_json: bool) -> None:
    """Print rows as they come, as sentences with a summary in the end, or as JSON."""
    images = unreadable = flagged = 0
    for row in rows:
        images += 1
        unreadable += row["error"] is not None
        flagged += bool(row["is_anomalous"])
        print(json.dumps(row, ensure_ascii=False) if as_json else sentence(row))
    if not as_json:
        print(
            f"{images} images: {flagged} anomalous, {images - flagged - unreadable} not, {unreadable} unreadable. "
            f"Written to {out}."
        )


def read_results(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a `results.jsonl`.

    Raises:
        DataError: there is no such file, or a line is something else.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                yield _parsed(line, f"line {number} of {path}")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text"
        raise DataError(
            f"Expected a results.jsonl at {path}, found none that can be read ({why}); run ddad predict first."
        ) from None


def _parsed(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise DataError(f"Expected a JSON object in {where}, found something else; run ddad predict again.")
    return row


def _write_pictures(detector: Inspector, path: Path, prediction: Prediction, out: Path, name: str) -> dict[str, str]:
    photo = read_image(path, rule=detector.image_rule)
    photo = resize(photo, reduced_size(photo.shape[0], photo.shape[1], MAX_PICTURE_SIDE))
    pictures = draw(detector, photo, prediction)
    files = {kind: f"{kind}s/{name}.png" for kind in PICTURES}
    for kind, picture in pictures.items():
        write_png(out / files[kind], picture)
    return files


def draw(detector: Inspector, photo: np.ndarray, prediction: Prediction) -> dict[str, np.ndarray]:
    """The pictures of one inspection by kind, uint8 of the shape of `photo` (H, W, 3), with one scale of colours."""
    limit = prediction.threshold or 1.0  # 1 is what a good part's peak typically is
    if not detector.is_calibrated:  # no unit: each picture on a scale of its own
        limit = max(float(np.quantile(prediction.anomaly_map, 0.95)), 1e-6)
    shape = photo.shape[0], photo.shape[1]
    anomaly_map = resize(prediction.anomaly_map, shape)
    return {
        "heatmap": heatmap(anomaly_map, limit),
        "overlay": overlay(photo, anomaly_map, limit),
        "reconstruction": resize(prediction.reconstruction, shape),
    }


class _Names:
    """A name for each photograph's pictures: its stem, with a number where two photographs share it."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def unique(self, path: Path) -> str:
        name, number = path.stem, 1
        while name.lower() in self._taken:  # some file systems do not tell A from a
            number += 1
            name = f"{path.stem}-{number}"
        self._taken.add(name.lower())
        return name
