"""Manifests in, results out: everything that is a table. Parquet and CSV through pyarrow.

A manifest is a Parquet file, a folder of them, a CSV file with a header, or a folder of images. Its first reading is
written down as a listing, cut into shards, so that all workers and all later runs see the same rows whatever happens to
the folder meanwhile, and each finds its shard without reading the others.
"""

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from ddad.bulk import places
from ddad.errors import DataError, DDADError
from ddad.images import is_hidden
from ddad.streaming import chunks

URI = "uri"
RESULTS = pa.schema(
    [
        ("row", pa.int64()),  # of the manifest, from 0
        ("uri", pa.string()),  # as the manifest has it
        ("etag", pa.string()),  # of the manifest or the listing, where it has one
        ("sha256", pa.string()),  # of the bytes that were inspected
        ("category", pa.string()),  # given or inferred, where the model knows several
        ("anomaly_score", pa.float64()),
        ("p_value", pa.float64()),
        ("is_anomalous", pa.bool_()),
        ("threshold", pa.float64()),
        (
            "regions",
            pa.list_(
                pa.struct([("box", pa.list_(pa.int32())), ("area", pa.int64()), ("peak", pa.float64())]),
            ),
        ),
        (
            "photo",
            pa.struct([(name, pa.float64()) for name in ("brightness", "focus", "horizontal", "vertical")]),
        ),
        ("error", pa.string()),
        ("model", pa.string()),  # SHA-256 of its detector.json, which has the hashes of its files
    ]
)
"""Columns of the results, in the words of `results.jsonl`."""
FRAME = pa.schema([field for field in RESULTS if field.name != "row"])
"""The same without the row, for frames that have an order of their own."""

_LISTING = pa.schema([("uri", pa.string()), ("etag", pa.string()), ("category", pa.string())])
SHARDS_A_PART = 256
"""Row groups a file of the listing: few enough that opening it is quick."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One photograph of a manifest."""

    row: int
    uri: str
    etag: str | None = None
    category: str | None = None


def read_manifest(manifest: str) -> tuple[str, Iterator[tuple[str, str | None, str | None]]]:
    """The folder that relative URIs refer to, and (uri, etag, category) of each photograph, a few in memory at a time.

    Raises:
        DataError: there is no manifest, it has no column `uri`, or a row has none.
    """
    if not places.exists(manifest):
        raise DataError(f"Expected a manifest or a folder of images at {manifest}, found nothing; check its name.")
    if places.state(manifest) is None:
        parts = [name for name in places.names(manifest) if name.endswith(".parquet") and not is_hidden(name)]
        if not parts:
            return manifest, ((place, etag, None) for place, etag in places.images(manifest))
        return manifest, _columns(_parquet(places.join(manifest, name)) for name in parts)
    folder = manifest.rpartition("/")[0]
    if manifest.lower().endswith(".parquet"):
        return folder, _columns([_parquet(manifest)])
    if manifest.lower().endswith(".csv"):
        return folder, _columns([_csv(manifest)])
    raise DataError(f"Expected a manifest that ends in .parquet or .csv, or a folder, found {manifest}; rename it.")


Batches = tuple[str, Iterator[pa.RecordBatch]]


def _parquet(place: str) -> Batches:
    def batches() -> Iterator[pa.RecordBatch]:
        files, path = places.file_system(place)
        with files.open(path, "rb") as opened:
            table = pyarrow.parquet.ParquetFile(opened)
            wanted = _wanted(table.schema_arrow.names, place)
            for group in range(table.num_row_groups):  # over all groups, Arrow keeps what it has read (25.0)
                yield from table.iter_batches(1 << 14, row_groups=[group], columns=wanted)

    return place, batches()


def _csv(place: str) -> Batches:
    # Python's own reader: threads of Arrow's were seen to end a process badly that stops in the middle of a file.
    def batches() -> Iterator[pa.RecordBatch]:
        files, path = places.file_system(place)
        with files.open(path, "rb") as opened:
            rows = csv.DictReader(io.TextIOWrapper(opened, encoding="utf-8-sig", newline=""), strict=True)
            wanted = _wanted(list(rows.fieldnames or ()), place)
            for some in chunks(rows, 1 << 14):
                if any(None in row or None in row.values() for row in some):
                    raise ValueError(f"a row before line {rows.line_num + 1} has another number of columns")
                yield pa.record_batch({name: pa.array([row[name] for row in some], pa.string()) for name in wanted})

    return place, batches()


def _wanted(there: list[str], place: str) -> list[str]:
    """The columns that a listing has of those of a table."""
    if URI not in there:
        raise DataError(
            f"Expected a column uri in {place}, found {', '.join(there) or 'no column'}; "
            "rename the one that holds the paths."
        )
    wanted = [name for name in _LISTING.names if name in there]
    if twice := [name for name in wanted if there.count(name) > 1]:
        raise DataError(f"Expected one column {twice[0]} in {place}, found several; rename the others.")
    return wanted


def _columns(sources: Iterable[Batches]) -> Iterator[tuple[str, str | None, str | None]]:
    for place, batches in sources:
        try:
            for batch in batches:
                columns = [
                    batch.column(name).cast(pa.string()).to_pylist()
                    if name in batch.schema.names
                    else [None] * batch.num_rows
                    for name in _LISTING.names
                ]
                for uri, etag, category in zip(*columns, strict=True):
                    if not uri:
                        raise DataError(f"Expected a uri in every row of {place}, found an empty one; remove the row.")
                    yield uri, etag or None, category or None
        except DDADError:
            raise
        except Exception as error:  # a damaged file, or a file system that raises what its package likes
            raise DataError(
                f"Expected a Parquet or CSV table in {place}, found none that can be read ({places.reason(error)}); "
                "write it again."
            ) from None


def write_listing(folder: str, rows: Iterable[tuple[str, str | None, str | None]], shard_size: int) -> int:
    """Write the rows of a manifest as `part-*.parquet`, one row group a shard; returns how many rows there are."""
    count = 0
    shards = (
        pa.Table.from_arrays([pa.array(column, pa.string()) for column in zip(*shard, strict=True)], schema=_LISTING)
        for shard in chunks(rows, shard_size)
    )
    for number, part in enumerate(_groups(shards, SHARDS_A_PART)):
        buffer = io.BytesIO()
        with pyarrow.parquet.ParquetWriter(buffer, _LISTING, compression="zstd") as writer:
            for table in part:
                writer.write_table(table, row_group_size=shard_size)
                count += table.num_rows
        places.write(_part(folder, number), buffer.getvalue())
    return count


def _groups(items: Iterable[Any], size: int) -> Iterator[Iterator[Any]]:
    """Like `chunks`, one item in memory at a time; each group must be used up before the next."""
    remaining = iter(items)
    for first in remaining:

        def group(first: Any = first) -> Iterator[Any]:
            yield first
            for _, item in zip(range(size - 1), remaining, strict=False):
                yield item

        yield group()


def read_shard(listing: str, shard: int, shard_size: int) -> list[Entry]:
    """The entries of one shard of a listing; raises DataError where it cannot be read."""
    part = _part(listing, shard // SHARDS_A_PART)
    try:
        files, path = places.file_system(part)
        with files.open(path, "rb") as opened:
            table = pyarrow.parquet.ParquetFile(opened).read_row_group(shard % SHARDS_A_PART, use_threads=False)
    except Exception as error:
        raise DataError(
            f"Expected the listing of this job in {part}, found none that can be read ({places.reason(error)}); begin "
            "again with another --out."
        ) from None
    columns = [table.column(name).to_pylist() for name in _LISTING.names]
    first = shard * shard_size
    return [Entry(first + place, *values) for place, values in enumerate(zip(*columns, strict=True))]


def _part(folder: str, number: int) -> str:
    return places.join(folder, f"part-{number:06d}.parquet")


def encode_results(rows: list[dict[str, Any]]) -> bytes:
    """A Parquet file of result rows: the same rows, the same bytes."""
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows, RESULTS), buffer, compression="zstd")
    return buffer.getvalue()


def read_results(out: str) -> Iterator[dict[str, Any]]:
    """The rows of all finished shards in `out`, in the order of the manifest, a few in memory at a time.

    Raises:
        DataError: there are none.
    """
    shards = [name for name in places.names(out) if name.endswith(".parquet")]
    if not shards:
        raise DataError(f"Expected the results of ddad score in {out}, found no shard; score a manifest first.")
    for name in shards:
        files, path = places.file_system(places.join(out, name))
        with files.open(path, "rb") as opened:
            yield from pyarrow.parquet.ParquetFile(opened).read(use_threads=False).to_pylist()


def encode_maps(rows: list[int], maps: list[np.ndarray]) -> bytes:
    """An .npz of `row` (n,) int64 and `anomaly_map` (n, H, W) float16, in units of the calibration."""
    buffer = io.BytesIO()
    stacked = np.stack(maps) if maps else np.zeros((0, 0, 0), np.float16)
    np.savez_compressed(buffer, row=np.array(rows, np.int64), anomaly_map=stacked)
    return buffer.getvalue()
