"""Scores inside of Spark and Dask: a function from data frames to data frames."""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from ddad.bulk.scoring import Scorer
from ddad.bulk.tables import FRAME, URI, Entry
from ddad.detector import model_folder
from ddad.errors import DataError


def predict_batches(
    frames: Iterable[pd.DataFrame],
    model: str | Path,
    *,
    batch_size: int = 8,
    readers: int = 4,
    fast: bool = False,
    backend: str | None = None,
    precision: str | None = None,
    device: str | None = None,
    threads: int = 1,
) -> Iterator[pd.DataFrame]:
    """Score the photographs of data frames; for `mapInPandas` of Spark and `map_partitions` of Dask.

    Args:
        frames: each with a column `uri`: paths or URIs that this process can read, relative ones from its working
            folder; `etag` and `category` where there are any. One is in memory at a time.
        model: a model folder that this process can read, or owner/name on the hub. It is loaded once a process.
        batch_size, readers, threads, fast, backend, precision, device: as of `ddad.bulk.run.score_manifest`.

    Yields:
        One frame for each, with its index and the columns of `ddad.bulk.tables.FRAME`. A file that cannot be read is a
        row with its reason in `error`.

    Raises:
        DataError: a frame has no column `uri`.
        ModelError: the model cannot be loaded.
    """
    scorer = _loaded(str(model), batch_size, readers, fast, backend, precision, device, threads)
    for frame in frames:
        if URI not in frame:
            raise DataError(
                f"Expected a column uri, found {', '.join(map(str, frame.columns)) or 'none'}; rename the one that "
                "holds the paths."
            )
        entries = (
            Entry(row, *values)
            for row, values in enumerate(
                zip(*(_column(frame, name) for name in (URI, "etag", "category")), strict=True)
            )
        )
        rows = [row for row, _, _ in scorer.rows(entries)]
        yield pa.Table.from_pylist(rows, FRAME).to_pandas().set_index(frame.index)


def empty_frame() -> pd.DataFrame:
    """No rows, but the columns and types of the results: `meta` for Dask."""
    return FRAME.empty_table().to_pandas()


def _column(frame: pd.DataFrame, name: str) -> list[Any]:
    if name not in frame:
        return [None] * len(frame)
    return [None if pd.isna(value) else str(value) for value in frame[name]]


@lru_cache(maxsize=1)
def _loaded(
    model: str,
    batch_size: int,
    readers: int,
    fast: bool,
    backend: str | None,
    precision: str | None,
    device: str | None,
    threads: int,
) -> Scorer:
    return Scorer.load(
        model_folder(model),
        fast=fast,
        backend=backend,
        precision=precision,
        device=device,
        threads=threads,
        batch_size=batch_size,
        readers=readers,
    )
